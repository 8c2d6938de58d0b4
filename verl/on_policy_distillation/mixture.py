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
"""The exact mixture of several teachers' distributions, token by token. Pure tensor math.

    T = sum_k w_k T_k,    T_k = softmax(u_k / tau),    w_k >= 0,  sum_k w_k = 1

Every divergence of `divergence.py` is taken from the student to T itself, once. That is not the average of the
divergences to the T_k: KL(S||T) <= sum_k w_k KL(S||T_k), and likewise forward, as both are convex in the teacher (Cover
and Thomas, "Elements of Information Theory", theorem 2.7.2). The average of reverse KLs is, up to a constant, the KL to
the normalised geometric mean of the T_k, which has no mass where any one teacher has none.

`MixtureLogits` hands out log T in units of tau, so that what reads logits at temperature tau reads T. Each token has
weights of its own, and a teacher whose weight is zero says nothing of it: a sample routed to one teacher is a mixture
of one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Optional

import torch

from verl.on_policy_distillation.divergence import LogitSource, log_zero_, temper_

__all__ = ["MixtureLogits", "MixturePart", "mixture_of", "normalized_weights"]


@dataclass(frozen=True)
class MixturePart:
    """One teacher's share in a mixture over n tokens.

    Args:
        source: gives the logits (m, V) of the m tokens that it has a weight in; called when a chunk is read, so that
            what it takes to make them need not be in memory before.
        row: (n,) int64, the row of each token in `source`; -1 for the tokens without.
        log_weight: (n,), log w_k; not read at the tokens without.
    """

    source: Callable[[], LogitSource]
    row: torch.Tensor
    log_weight: torch.Tensor


@dataclass(frozen=True)
class MixtureLogits:
    """tau * log sum_k w_k softmax(u_k / tau) of n tokens over `vocab` entries, read a chunk at a time.

    Each teacher's logits are cut to `vocab` entries before its softmax.
    """

    parts: tuple[MixturePart, ...]
    names: tuple[str, ...]
    temperature: float
    vocab: int

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.parts[0].row), self.vocab

    @property
    def unit(self) -> float:
        return self.temperature

    def cut(self, vocab: int) -> "MixtureLogits":
        return replace(self, vocab=min(vocab, self.vocab))

    def rows(self, index: torch.Tensor | slice) -> torch.Tensor:
        return self.in_units(index).mul_(self.temperature)

    def in_units(self, index: torch.Tensor | slice, out: Optional[torch.Tensor] = None) -> torch.Tensor:
        return self._read(index, None)[0]

    def compare(self, index: slice, student: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """`in_units` of a chunk of tokens, and KL(S||T_k) of each teacher in nats, (K, rows); NaN at tokens without.

        Args:
            student: the student's logits (rows, V) of the same tokens, of which S = softmax(student / temperature).
        """
        mixed, kls = self._read(index, _Student.of(student[:, : self.vocab], temperature))
        assert kls is not None
        return mixed, kls

    def speaks(self, index: torch.Tensor | slice) -> torch.Tensor:
        """(K, tokens) bool: which teachers have a weight in the tokens `index`."""
        return torch.stack([part.row[index] >= 0 for part in self.parts])

    def order(self) -> Optional[torch.Tensor]:
        """(n,) int64: the tokens, those of the same teachers next to each other; None where all have the same."""
        route = sum((part.row >= 0).long() << k for k, part in enumerate(self.parts))
        assert isinstance(route, torch.Tensor)
        return None if bool((route == route[:1]).all()) else route.argsort(stable=True)

    def tokens(self, tokens: torch.Tensor) -> "MixtureLogits":
        """Of the tokens `tokens` (m,), in that order."""
        parts = [replace(part, row=part.row[tokens], log_weight=part.log_weight[tokens]) for part in self.parts]
        return replace(self, parts=tuple(parts))

    def _read(self, index, student: "_Student | None") -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        mixed, kls = None, []
        for part in self.parts:
            row = part.row[index]
            here = (row >= 0).nonzero().squeeze(-1)
            log_t = None
            if len(here):
                log_t = self._log_distribution(part, row[here])
                weighted = log_t + part.log_weight[index][here].to(log_t.dtype).unsqueeze(-1)
                mixed = _added(mixed, here, weighted, len(row))
            if student is not None:
                kls.append(student.kl(here, log_t))
        if mixed is None:
            device = self.parts[0].row.device
            mixed = torch.full((len(self.parts[0].row[index]), self.vocab), -torch.inf, device=device)
        return mixed, torch.stack(kls) if kls else None

    def _log_distribution(self, part: MixturePart, rows: torch.Tensor) -> torch.Tensor:
        source = part.source()
        if source.shape[-1] > self.vocab:
            source = source.cut(self.vocab)
        logits = source.in_units(rows)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return torch.log_softmax(temper_(logits, self.temperature / source.unit), dim=-1, out=logits)


def _added(mixed: Optional[torch.Tensor], here: torch.Tensor, log_p: torch.Tensor, rows: int) -> torch.Tensor:
    """The logarithm of the sum so far (rows, V), which may be None, with exp(`log_p`) added in the rows `here`."""
    if mixed is None:
        if len(here) == rows:
            return log_p
        mixed = log_p.new_full((rows, log_p.shape[-1]), -torch.inf)
    if len(here) == rows:
        return torch.logaddexp(mixed, log_p, out=mixed)
    return mixed.index_copy_(0, here, torch.logaddexp(mixed[here], log_p))


@dataclass(frozen=True)
class _Student:
    """S of a few tokens, (rows, V), and sum S log S, (rows,)."""

    p: torch.Tensor
    negentropy: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, temperature: float) -> "_Student":
        log_p = log_zero_(torch.log_softmax(temper_(logits.clone(), temperature), dim=-1))
        p = log_p.exp()
        return cls(p, torch.linalg.vecdot(p, log_p))

    def kl(self, here: torch.Tensor, log_t: Optional[torch.Tensor]) -> torch.Tensor:
        """KL(S||T_k), (rows,), given log T_k of the rows `here`; NaN at the others. Overwrites `log_t`."""
        kl = torch.full_like(self.negentropy, torch.nan)
        if log_t is None:
            return kl
        p = self.p if len(here) == len(self.p) else self.p[here]
        return kl.index_copy_(0, here, self.negentropy[here] - torch.linalg.vecdot(p, log_zero_(log_t)))


def normalized_weights(weights: Sequence[float], count: int) -> list[float]:
    """`weights` of `count` teachers, made to sum to one.

    Raises:
        ValueError: another number of weights, one that is negative or not finite, or all of them zero.
    """
    try:
        values = [float(weight) for weight in weights]
    except (TypeError, ValueError):
        raise ValueError(f"{list(weights)} are no weights of a mixture: give numbers.") from None
    if len(values) != count:
        raise ValueError(f"{values} are {len(values)} weights, and there are {count} teachers: give one for each.")
    if not all(0.0 <= value < float("inf") for value in values) or sum(values) == 0.0:
        raise ValueError(f"{values} are no weights of a mixture: give numbers of 0 or more, not all zero.")
    return [value / sum(values) for value in values]


def mixture_of(
    sources: Sequence[LogitSource], weights: Sequence[float], temperature: float, device: torch.device
) -> LogitSource:
    """The mixture of teachers whose weights are the same for all of the same n tokens.

    Args:
        sources: logits (n, V_k) each, cut to the shortest vocabulary.
        weights: one for each, normalised here; a teacher of weight zero is not read.
        temperature: tau of the module docstring, that of the divergence.
        device: of the logits.

    Raises:
        ValueError: see `normalized_weights`; or numbers of tokens that differ.
    """
    shares = normalized_weights(weights, len(sources))
    used = [(source, share) for source, share in zip(sources, shares, strict=True) if share > 0.0]
    if len({source.shape[0] for source in sources}) > 1:
        raise ValueError(f"the teachers have {[source.shape[0] for source in sources]} tokens: pass the same.")
    vocab = min(source.shape[-1] for source in sources)
    if len(used) == 1:  # itself, whose close distributions keep more digits than logarithms of probabilities do
        return used[0][0].cut(vocab)
    row = torch.arange(used[0][0].shape[0], device=device)
    parts = []
    for source, share in used:
        log_weight = torch.full(row.shape, share, dtype=torch.float64, device=device).log()
        parts.append(MixturePart(lambda source=source: source, row, log_weight))  # type: ignore[misc]
    return MixtureLogits(tuple(parts), tuple(str(k) for k in range(len(parts))), temperature, vocab)
