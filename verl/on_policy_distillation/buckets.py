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

A teacher may say of a token no more than its k largest probabilities. With A the k entries and x = z / tau, both sides
are then compared as distributions over k + 1 outcomes,

    S' = softmax(x_A, x_rest),    x_rest = log sum_{v not in A} exp(x_v),

and T' likewise: the probabilities of A as they are, and the sum of all others. Every divergence of `divergence.py`
between S' and T' is exact, never negative, zero only if the two agree on all k + 1, and never above the one between S
and T (the data-processing inequality; Cover and Thomas, "Elements of Information Theory", sec. 2.8). Nothing is
renormalised, cut off or clamped. The gradient follows from that of the k + 1 logits by

    dx_rest / dx_v = exp(x_v - x_rest) for v not in A,

so entries outside of A keep a gradient: together that of the bucket, shared by their probabilities.
"""

import math
from dataclasses import dataclass, replace
from typing import Optional

import torch

from verl.on_policy_distillation import divergence as divergence_module
from verl.on_policy_distillation.divergence import LogitSource, chunks

__all__ = ["Coarse", "TopKTail", "coarsen_", "refine", "top_k_tail"]


@dataclass(frozen=True)
class TopKTail:
    """What a teacher says of n tokens: its k largest probabilities at a temperature, and the rest.

    As a `LogitSource`, for people who read dumps, it spreads the rest evenly; a divergence never reads it as one.

    Args:
        ids: (n, k) int32 or int64, distinct entries of the student's vocabulary.
        log_prob: (n, k + 1), of these entries and, last, of all others together; nats.
        vocab: entries of the student's vocabulary.
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
    ids, log_probs = [torch.empty((0, k), dtype=torch.int32)], [torch.empty((0, k + 1))]
    for chunk in chunks(num_tokens, vocab, divergence_module.CHUNK_ELEMENTS):
        logits = source.in_units(chunk)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        log_p = torch.log_softmax(logits.mul_(source.unit / temperature), dim=-1)
        top, index = log_p.topk(k, dim=-1)
        # Not 1 - sum: a small rest would have no digits left.
        rest = log_p.scatter_(-1, index, -torch.inf).logsumexp(-1, keepdim=True)
        ids.append(index.to(torch.int32))
        log_probs.append(torch.cat((top, rest), -1))
    first = 0 if len(ids) == 1 else 1  # the empty ones are of a device and a dtype that nobody has chosen
    return TopKTail(torch.cat(ids[first:]), torch.cat(log_probs[first:]), vocab, temperature)


@dataclass(frozen=True)
class Coarse:
    """Logits x of a few tokens, made coarse: `logits` (rows, k + 1), and what `refine` needs to go back."""

    logits: torch.Tensor
    rest: torch.Tensor  # (rows, V): x outside of A, -inf in A
    ids: torch.Tensor  # (rows, k) int64


def coarsen_(logits: torch.Tensor, ids: torch.Tensor, temperature: float) -> Coarse:
    """x_A and x_rest of x = logits / temperature. Overwrites `logits` (rows, V).

    Args:
        ids: (rows, k), A of each row.
    """
    ids = ids.long()
    if temperature != 1.0:
        # The maximum goes first: a common offset must not cost the quotient its digits. It drops out of softmax.
        logits.sub_(logits.amax(-1, keepdim=True)).div_(temperature)
    named = logits.gather(-1, ids)
    rest = logits.scatter_(-1, ids, -torch.inf)
    return Coarse(torch.cat((named, rest.logsumexp(-1, keepdim=True)), -1), rest, ids)


def refine(coarse: Coarse, gradient: torch.Tensor, out: Optional[torch.Tensor] = None) -> torch.Tensor:
    """The gradient by x (rows, V), given that by `coarse.logits` (rows, k + 1). Overwrites `coarse.rest`.

    `out`: memory for the result, any float dtype; `coarse.rest` will do, and is taken without one.
    """
    # An empty rest is -inf, and so is each of its entries; exp(-inf + finite) is zero.
    x_rest = coarse.logits[:, -1:].clamp_min(torch.finfo(coarse.logits.dtype).min)
    within = coarse.rest.sub_(x_rest).exp_().mul_(gradient[:, -1:])
    within.scatter_(-1, coarse.ids, gradient[:, :-1])
    return within if out is None else out.copy_(within)
