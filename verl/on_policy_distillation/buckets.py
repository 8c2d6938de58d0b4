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
"""Divergences between coarse distributions: k entries of the vocabulary, and one bucket with all the rest. Pure math.

With A the k entries and x = z / tau, both sides are compared as distributions over k + 1 outcomes,

    S' = softmax(x_A, x_rest),    x_rest = log sum_{v not in A} exp(x_v),

and T' likewise: the probabilities of A as they are, and the sum of all others. Every divergence of `divergence.py`
between S' and T' is exact, never negative, zero only if the two agree on all k + 1, and never above the one between S
and T (the data-processing inequality; Cover and Thomas, "Elements of Information Theory", sec. 2.8). Nothing is
renormalised, cut off or clamped. The gradient follows from that of the k + 1 logits by

    dx_rest / dx_v = exp(x_v - x_rest) for v not in A,

so entries outside of A keep a gradient: together that of the bucket, shared by their probabilities.

Two teachers need it. One says of a token no more than its k largest probabilities (`TopKTail`; A differs from token to
token). The other has a vocabulary that agrees with the student's in some ids only (`SharedVocabulary`; A is the same
for all tokens, and the bucket holds other entries on each side: added ones, and paddings). Of such a teacher's k + 1
entries there may be a top-k.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Optional, Protocol

import torch

from verl.on_policy_distillation import divergence as divergence_module
from verl.on_policy_distillation.divergence import LogitSource, chunks, padded_rows, temper_

__all__ = [
    "Coarse",
    "EntriesByToken",
    "FirstEntries",
    "InSharedVocabulary",
    "NamedEntries",
    "SharedLogits",
    "SharedVocabulary",
    "TopKTail",
    "coarsen_",
    "rest_mass",
    "refine",
    "top_k_tail",
]


# ----------------------------------------------------------------------------------------------------------------------
# logits made coarse, and gradients made fine


class NamedEntries(Protocol):
    """A of a few tokens: the k entries that keep a name of their own."""

    def split_(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x_A (rows, k), and x outside of A (rows, any), which may have -inf in A. Overwrites x (rows, V)."""

    def with_rest_(self, x: torch.Tensor, named: torch.Tensor, x_rest: torch.Tensor) -> torch.Tensor:
        """`named` and `x_rest` (rows, 1) side by side, (rows, k + 1), in the memory of `x` if they fit there."""

    def put_together(self, named: torch.Tensor, others: torch.Tensor, out: torch.Tensor) -> None:
        """Values of A (rows, k) and of the others, shaped as by `split_`, to `out` (rows, V). Overwrites `others`."""


@dataclass(frozen=True)
class EntriesByToken:
    """`ids` (rows, k) int64, distinct in each row."""

    ids: torch.Tensor

    def split_(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        named = x.gather(-1, self.ids)
        return named, x.scatter_(-1, self.ids, -torch.inf)

    def with_rest_(self, x: torch.Tensor, named: torch.Tensor, x_rest: torch.Tensor) -> torch.Tensor:
        return _beside(named, x_rest)

    def put_together(self, named: torch.Tensor, others: torch.Tensor, out: torch.Tensor) -> None:
        _put(out, others.scatter_(-1, self.ids, named))


@dataclass(frozen=True)
class FirstEntries:
    """The entries 0 to `size` - 1 of every token: slices, where ids would be gathered and scattered."""

    size: int

    def split_(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x[:, : self.size], x[:, self.size :].clone()

    def with_rest_(self, x: torch.Tensor, named: torch.Tensor, x_rest: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] == self.size:
            return _beside(named, x_rest)
        coarse = x[:, : self.size + 1]
        coarse[:, -1:] = x_rest
        return coarse

    def put_together(self, named: torch.Tensor, others: torch.Tensor, out: torch.Tensor) -> None:
        _put(out[:, : self.size], named)
        out[:, self.size :] = others


def _beside(named: torch.Tensor, x_rest: torch.Tensor) -> torch.Tensor:
    both = padded_rows(len(named), named.shape[-1] + 1, named)
    both[:, :-1], both[:, -1:] = named, x_rest
    return both


def _put(out: torch.Tensor, values: torch.Tensor) -> None:
    if out.data_ptr() != values.data_ptr():  # a copy to where it came from is a pass over memory for nothing
        out.copy_(values)


@dataclass(frozen=True)
class Coarse:
    """Logits x of a few tokens, made coarse: `logits` (rows, k + 1), and what `refine` needs to go back."""

    logits: torch.Tensor
    x_rest: torch.Tensor  # (rows, 1)
    others: torch.Tensor  # x outside of A, see `NamedEntries.split_`
    named: NamedEntries


def coarsen_(logits: torch.Tensor, named: NamedEntries, temperature: float) -> Coarse:
    """x_A and x_rest of x = logits / temperature. Overwrites `logits` (rows, V), and may return a part of it."""
    x_named, others = named.split_(temper_(logits, temperature))
    x_rest = others.logsumexp(-1, keepdim=True)  # -inf, which is a probability of zero, where there is nothing
    return Coarse(named.with_rest_(logits, x_named, x_rest), x_rest, others, named)


def refine(coarse: Coarse, gradient: torch.Tensor, out: torch.Tensor) -> None:
    """Writes the gradient by x to `out` (rows, V), given that by `coarse.logits` (rows, k + 1). Overwrites `coarse`.

    `out`: any float dtype; what `coarsen_` has overwritten will do. `gradient` may be `coarse.logits` itself.
    """
    # An empty rest is -inf, and so is each of its entries; exp(-inf + finite) is zero.
    x_rest = coarse.x_rest.clamp_min(torch.finfo(coarse.x_rest.dtype).min)
    others = coarse.others.sub_(x_rest).exp_().mul_(gradient[:, -1:])
    coarse.named.put_together(gradient[:, :-1], others, out)


# ----------------------------------------------------------------------------------------------------------------------
# the k largest, which differ from token to token


@dataclass(frozen=True)
class TopKTail:
    """What a teacher says of n tokens: its k largest probabilities at a temperature, and the rest.

    As a `LogitSource`, for people who read dumps, it spreads the rest evenly; a divergence never reads it as one.

    Args:
        ids: (n, k) int32 or int64, distinct entries of the vocabulary that it is taken of.
        log_prob: (n, k + 1), of these entries and, last, of all others together; nats.
        vocab: how many entries that has.
        temperature: at which the probabilities were taken.
    """

    ids: torch.Tensor
    log_prob: torch.Tensor
    vocab: int
    temperature: float

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.ids), self.vocab

    @property
    def unit(self) -> float:
        return self.temperature

    def rows(self, index: torch.Tensor | slice) -> torch.Tensor:
        return self.in_units(index).mul_(self.temperature)

    def in_units(self, index: torch.Tensor | slice, out: Optional[torch.Tensor] = None) -> torch.Tensor:
        log_prob, others = self.log_prob[index], max(self.vocab - self.ids.shape[-1], 1)
        even = (log_prob[:, -1:] - math.log(others)).expand(-1, self.vocab).clone()
        return even.scatter_(-1, self.ids[index].long(), log_prob[:, :-1])

    def cut(self, vocab: int) -> "TopKTail":
        if vocab < self.vocab:
            raise ValueError(f"a top-k of {self.vocab} entries cannot be cut to {vocab}: take it of those entries.")
        return self

    @property
    def named(self) -> EntriesByToken:
        return EntriesByToken(self.ids.long())

    def tokens(self, tokens: torch.Tensor | slice) -> "TopKTail":
        """Of these tokens."""
        return replace(self, ids=self.ids[tokens], log_prob=self.log_prob[tokens])


@torch.no_grad()
def top_k_tail(source: LogitSource, k: int, temperature: float) -> TopKTail:
    """The k largest entries of softmax(logits / temperature) of n tokens, read a chunk at a time, and the rest.

    Raises:
        ValueError: k is more than the vocabulary has.
    """
    num_tokens, vocab = source.shape
    if not 0 < k <= vocab:
        raise ValueError(f"k={k} of a vocabulary of {vocab} entries: choose 1 to {vocab}.")
    if not num_tokens:
        return TopKTail(torch.empty((0, k), dtype=torch.int32), torch.empty((0, k + 1)), vocab, temperature)
    ids, log_probs = [], []
    for chunk in chunks(num_tokens, vocab, divergence_module.CHUNK_ELEMENTS):
        logits = source.in_units(chunk)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        log_p = torch.log_softmax(temper_(logits, temperature / source.unit), dim=-1)
        top, index = log_p.topk(k, dim=-1)
        # Not 1 - sum: a small rest would have no digits left.
        rest = log_p.scatter_(-1, index, -torch.inf).logsumexp(-1, keepdim=True)
        ids.append(index.to(torch.int32))
        log_probs.append(torch.cat((top, rest), -1))
    return TopKTail(torch.cat(ids), torch.cat(log_probs), vocab, temperature)


# ----------------------------------------------------------------------------------------------------------------------
# the ids that two tokenizers agree on


@dataclass(frozen=True)
class SharedVocabulary:
    """The ids that mean the same to student and teacher. All other entries are one bucket, on either side.

    Make it by `of`.

    Args:
        size: how many ids, m.
        needs: how many entries a vocabulary has at least that has them all.
        ids: (m,) int64, ascending; None where they are 0 to m - 1.
    """

    size: int
    needs: int
    ids: Optional[torch.Tensor]

    @classmethod
    def of(cls, ids: Sequence[int], device: torch.device | str = "cpu") -> "SharedVocabulary":
        """Raises ValueError if `ids` are none, not ascending, or negative."""
        if not ids or ids[0] < 0 or any(a >= b for a, b in zip(ids, ids[1:], strict=False)):
            raise ValueError(f"{len(ids)} ids of a shared vocabulary: pass one or more, ascending, from 0.")
        is_prefix = ids[-1] == len(ids) - 1
        return cls(len(ids), ids[-1] + 1, None if is_prefix else torch.tensor(ids, dtype=torch.int64, device=device))

    def named(self, rows: int) -> NamedEntries:
        """The shared entries of so many tokens."""
        return FirstEntries(self.size) if self.ids is None else EntriesByToken(self.ids.expand(rows, -1))


@dataclass(frozen=True)
class SharedLogits:
    """One teacher's logits (n, m + 1) over the m shared entries and, last, all of its others together.

    Args:
        source: its logits over its own vocabulary.
        temperature: at which the others are summed up; the logits are of this unit.
    """

    source: LogitSource
    shared: SharedVocabulary
    temperature: float

    def __post_init__(self) -> None:
        _require_entries("the teacher", self.source.shape[-1], self.shared)

    @property
    def shape(self) -> tuple[int, int]:
        return self.source.shape[0], self.shared.size + 1

    @property
    def unit(self) -> float:
        return self.temperature

    def rows(self, index: torch.Tensor | slice) -> torch.Tensor:
        return self.in_units(index).mul_(self.temperature)

    def in_units(self, index: torch.Tensor | slice, out: Optional[torch.Tensor] = None) -> torch.Tensor:
        """`out`: for the logits of `source`."""
        logits = self.source.in_units(index, out)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return coarsen_(logits, self.shared.named(len(logits)), self.temperature / self.source.unit).logits

    def cut(self, vocab: int) -> "SharedLogits":
        if vocab <= self.shared.size:
            raise ValueError(f"{self.shared.size} shared entries and the rest cannot be cut to {vocab}.")
        return self

    def tokens(self, tokens: torch.Tensor) -> "SharedLogits":
        return replace(self, source=self.source.tokens(tokens))


@dataclass(frozen=True)
class InSharedVocabulary:
    """What a teacher says to a student with whom it shares some of the vocabulary.

    As a `LogitSource`, for people who read dumps, it is over the student's vocabulary and spreads the rest evenly; a
    divergence never reads it as one.

    Args:
        source: over the m shared entries and, last, all others together, in units of the temperature at which these
            were summed up: `SharedLogits`, a mixture of several, or a `TopKTail` of either.
        vocab: entries of the student's vocabulary.
    """

    source: LogitSource
    shared: SharedVocabulary
    vocab: int

    def __post_init__(self) -> None:
        _require_entries("the student", self.vocab, self.shared)

    @property
    def shape(self) -> tuple[int, int]:
        return self.source.shape[0], self.vocab

    @property
    def unit(self) -> float:
        return self.source.unit

    def rows(self, index: torch.Tensor | slice) -> torch.Tensor:
        return self.in_units(index).mul_(self.unit)

    def in_units(self, index: torch.Tensor | slice, out: Optional[torch.Tensor] = None) -> torch.Tensor:
        coarse, others = self.source.in_units(index), self.vocab - self.shared.size
        even = (coarse[:, -1:] - math.log(max(others, 1))).expand(-1, self.vocab).clone()
        split = even[:, :others] if self.shared.ids is None else even
        self.shared.named(len(even)).put_together(coarse[:, :-1], split.clone(), even)
        return even

    def cut(self, vocab: int) -> "InSharedVocabulary":
        return replace(self, vocab=min(vocab, self.vocab))

    def tokens(self, tokens: torch.Tensor) -> "InSharedVocabulary":
        return replace(self, source=self.source.tokens(tokens))


def _require_entries(side: str, vocab: int, shared: SharedVocabulary) -> None:
    if vocab < shared.needs:
        raise ValueError(
            f"{side} has {vocab} entries, and the shared vocabulary has ids up to {shared.needs - 1}: share those that "
            "both have."
        )


def rest_mass(said: torch.Tensor | TopKTail) -> torch.Tensor:
    """The probability (rows,) of the last entry, the rest of a shared vocabulary: of logits (rows, m + 1), which stay.

    A top-k of them tells only if the rest is one of the k; zero then stands for less than the k-th probability.
    """
    if isinstance(said, TopKTail):
        is_rest = said.ids == said.vocab - 1
        return said.log_prob[:, :-1].exp().mul_(is_rest).sum(-1)
    masses = [said.new_empty(0)]
    for rows in divergence_module.cache_blocks(said):
        masses.append((said[rows, -1] - said[rows].logsumexp(-1)).exp())
    return torch.cat(masses)
