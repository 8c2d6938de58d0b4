# Copyright 2026 Bytedance Ltd. and/or its affiliates
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What a teacher says of the student's tokens: its bytes, and the logits that it stands for.

A `Signal` covers the n supervised tokens of a micro-batch. `SignalStore` keeps what was said of whole samples in the
host memory of this process, under row ids: only the ids travel between a teacher's scoring and the student's update.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from verl.on_policy_distillation.buckets import InSharedVocabulary, SharedLogits, SharedVocabulary, TopKTail
from verl.on_policy_distillation.divergence import DenseLogits, LogitSource
from verl.on_policy_distillation.head import LinearLogits
from verl.on_policy_distillation.mixture import MixtureLogits, MixturePart
from verl.on_policy_distillation.output_projection import OutputProjection

__all__ = [
    "NO_ROW",
    "HiddenStates",
    "Logits",
    "MissingRows",
    "Mixture",
    "RowIds",
    "SharedEntries",
    "Signal",
    "SignalStore",
    "ToStudent",
    "TopK",
]

NO_ROW = -1  # the id of samples whose rows nobody wants: they keep ranks in step
_IDS_PER_RANK = 1 << 40


class Signal(Protocol):
    """What a teacher says of n tokens."""

    def logits(self) -> LogitSource:
        """(n, V), read a chunk at a time."""


@dataclass(frozen=True)
class HiddenStates:
    """Last hidden states `values` (n, H), projected by the teacher's own output projection when they are read.

    `projection` brings it to the device, and is called for that alone.
    """

    values: torch.Tensor
    projection: Callable[[], OutputProjection]

    def logits(self) -> LinearLogits:
        projection = self.projection()
        return LinearLogits(self.values, projection.weight, projection.bias, projection.scale, projection.softcap)


@dataclass(frozen=True)
class Logits:
    """The logits themselves, `values` (n, V)."""

    values: torch.Tensor

    def logits(self) -> DenseLogits:
        return DenseLogits(self.values)


@dataclass(frozen=True)
class Mixture:
    """What several teachers say, to be mixed token by token.

    Args:
        names: of all K teachers.
        signals: of each, its signal of the m tokens that it has a weight in.
        shares: (n, K), the weight of each teacher in each token; zero where it says nothing.
        temperature: at which the distributions are mixed, see `mixture.py`.
        vocab: the entries that all teachers have.
    """

    names: tuple[str, ...]
    signals: tuple[Signal, ...]
    shares: torch.Tensor
    temperature: float
    vocab: int

    def logits(self) -> MixtureLogits:
        parts = []
        for signal, share in zip(self.signals, self.shares.unbind(-1), strict=True):
            is_spoken_for = share > 0.0
            row = torch.where(is_spoken_for, is_spoken_for.cumsum(0) - 1, -1)
            parts.append(MixturePart(signal.logits, row, share.log()))
        return MixtureLogits(tuple(parts), self.names, self.temperature, self.vocab)


@dataclass(frozen=True)
class TopK:
    """The k largest probabilities and the rest, `values` of n tokens."""

    values: TopKTail

    def logits(self) -> TopKTail:
        return self.values


@dataclass(frozen=True)
class SharedEntries:
    """What `signal` says of the shared entries and, as one, of all others; see `SharedLogits`."""

    signal: Signal
    shared: SharedVocabulary
    temperature: float

    def logits(self) -> SharedLogits:
        return SharedLogits(self.signal.logits(), self.shared, self.temperature)


@dataclass(frozen=True)
class ToStudent:
    """`signal`, which is over the shared entries and the rest, said to a student with `vocab` entries."""

    signal: Signal
    shared: SharedVocabulary
    vocab: int

    def logits(self) -> InSharedVocabulary:
        return InSharedVocabulary(self.signal.logits(), self.shared, self.vocab)


class MissingRows(KeyError):
    """Samples whose rows are not in this process."""

    def __init__(self, missing: Sequence[int], wanted: int):
        super().__init__(
            f"{len(missing)} of {wanted} samples have no teacher signal in this process (row {missing[0]}): "
            "scoring and update must see the same samples on the same rank, in one step."
        )


class RowIds:
    """Ids of samples that never repeat.

    Ranks of different data-parallel rank never share one, so an id from another step or another rank is an error and
    not another sample's rows.

    Args:
        rank: the data-parallel rank; ranks that hold the same samples share it.
    """

    def __init__(self, rank: int):
        self._next = rank * _IDS_PER_RANK

    def new(self, samples: int) -> torch.Tensor:
        """Ids that no sample has had, (samples,) int64."""
        first, self._next = self._next, self._next + samples
        return torch.arange(first, self._next)


class SignalStore:
    """Rows (tokens, width) of samples in host memory, by row id."""

    def __init__(self) -> None:
        self._rows: dict[int, torch.Tensor] = {}

    def put(self, ids: torch.Tensor, samples: Sequence[torch.Tensor]) -> None:
        """Keep the rows (tokens, width) of each of the samples `ids` but `NO_ROW`; a sample may have none."""
        self._rows.update(pair for pair in zip(ids.tolist(), samples, strict=True) if pair[0] != NO_ROW)

    def get(self, ids: torch.Tensor, device: torch.device | str) -> torch.Tensor:
        """The rows of the samples `ids` (batch,), one sample after the other, on `device`.

        Raises:
            MissingRows: an id of another rank, or of a step whose rows were released.
        """
        wanted = ids.tolist()
        if missing := [row for row in wanted if row not in self._rows]:
            raise MissingRows(missing, len(wanted))
        if not wanted:  # a teacher that says nothing of these samples
            return torch.empty((0, 0), device=device)
        return torch.cat([self._rows[row] for row in wanted]).to(device)

    def counts(self, ids: torch.Tensor) -> torch.Tensor:
        """How many rows are kept of each of the samples `ids`, (batch,) int64."""
        return torch.tensor([len(self._rows.get(row, ())) for row in ids.tolist()], dtype=torch.int64)

    def num_bytes(self, ids: torch.Tensor) -> torch.Tensor:
        """What is kept of each of the samples `ids`, (batch,) int64; zero of one that has no rows here."""
        rows = (self._rows.get(row) for row in ids.tolist())
        return torch.tensor([0 if kept is None else kept.nbytes for kept in rows], dtype=torch.int64)

    def release(self) -> None:
        """Forget all rows."""
        self._rows.clear()
