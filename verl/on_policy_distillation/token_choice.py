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
"""Which tokens' divergences count, and by how much. Pure tensor math.

Of the n_i supervised tokens of sequence i, k_i = ceil(f n_i) are kept. With D_t the divergence of token t and c the
clamp, a token contributes to the loss

    (n_i / k_i) 1[t is kept] min(D_t, c)        its gradient: (n_i / k_i) 1[t is kept] 1[D_t <= c] dD_t/dz

in the place of D_t. Which tokens are kept is a constant: no gradient passes through the choice.

Kept are those with the largest score, of equal ones the earlier. The score is the student's entropy (`top_entropy`; of
sampled tokens Wang et al., "Beyond the 80/20 Rule", arXiv:2506.01939; in distillation Xu et al., "TIP: Token Importance
in On-Policy Distillation", arXiv:2604.14084), the divergence that is minimized (`top_divergence`; its second axis), or
the same for all, which keeps the first k_i (`prefix`; Zhang et al., arXiv:2602.15260).

Chosen per sequence, as TIP does: the top floor(f n_i) of a rollout (its eq. 8; here the ceiling, so that none is left
empty), and the mean over those (eq. 9), which ``seq-mean-token-mean`` makes of the factor. TIP's table 3, where half of
the tokens match all, draws tokens with probabilities in proportion to the entropy; here the largest are taken. The
first paper has one threshold for a whole batch. Here a batch is cut into micro-batches and over ranks, and a rank among
the tokens of a micro-batch would make the gradient depend on the cut. A rank within the sequence does not. The factor
n_i / k_i leaves each sequence the weight that it has without a choice, under every ``loss_agg_mode``: the mean of a
sequence's contributions is that of its kept tokens' divergences.

The clamp bounds a token's divergence, never one entry of the vocabulary: those terms are signed, and to cut the
positive ones alone would bias the sum.
"""

from dataclasses import dataclass
from typing import NamedTuple, Optional

import torch

from verl.on_policy_distillation.divergence import TokenDivergence

__all__ = ["EVERY_TOKEN", "TOKEN_SELECTIONS", "ChosenTokens", "TokenChoice", "choose", "kept_tokens"]

TOKEN_SELECTIONS = ("all", "top_entropy", "top_divergence", "prefix")


class TokenChoice(NamedTuple):
    """The settings: one of `TOKEN_SELECTIONS`, f in (0, 1], and c > 0 in nats, None for no clamp."""

    selection: str = "all"
    keep_fraction: float = 1.0
    max_clamp: Optional[float] = None


EVERY_TOKEN = TokenChoice()


@dataclass(frozen=True)
class ChosenTokens:
    """What a choice makes of n tokens; constants.

    Args:
        factor: (n,), n_i / k_i of the kept tokens and zero of the others, in the divergence's dtype.
        max_clamp: c, nats; None for no clamp.
        is_learning: (n,) bool, the tokens that have a gradient: kept, and not clamped.
    """

    factor: torch.Tensor
    max_clamp: Optional[float]
    is_learning: torch.Tensor

    def contribution(self, divergence: torch.Tensor) -> torch.Tensor:
        """What the tokens contribute, (n,), differentiable by `divergence` (n,)."""
        return self.factor * (divergence if self.max_clamp is None else divergence.clamp_max(self.max_clamp))


def choose(choice: TokenChoice, tokens: TokenDivergence, counts: torch.Tensor) -> ChosenTokens:
    """The tokens that `choice` keeps.

    Args:
        tokens: of n tokens, in the order of their sequences; not differentiated.
        counts: (batch,) int64, how many of the n tokens each sequence has.
    """
    divergence = tokens.divergence.detach()
    factor = torch.ones_like(divergence)
    if choice.selection != "all":
        factor = kept_tokens(_score(choice.selection, tokens), counts, choice.keep_fraction)
    is_learning = factor > 0.0
    if choice.max_clamp is not None:
        is_learning &= divergence <= choice.max_clamp
    return ChosenTokens(factor, choice.max_clamp, is_learning)


def kept_tokens(score: torch.Tensor, counts: torch.Tensor, keep_fraction: float) -> torch.Tensor:
    """n_i / k_i of the k_i tokens of each sequence with the largest score, zero of the others; (n,), as `score`."""
    # A fraction such as 0.07 has no exact number: 0.07 * 100 is a little above 7, whose ceiling is not meant.
    kept = (counts.double() * keep_fraction - 1e-9).ceil().clamp_min(1.0)
    factor = (counts / kept).to(score.dtype)
    sequence = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    # Two stable sorts: by score, then by sequence, so that equal scores stay in the order of their positions.
    order = score.argsort(descending=True, stable=True)
    order = order[sequence[order].argsort(stable=True)]
    first = counts.cumsum(0) - counts
    rank = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
    rank -= first[sequence]
    return torch.where(rank < kept[sequence], factor[sequence], 0.0)


def _score(selection: str, tokens: TokenDivergence) -> torch.Tensor:
    if selection == "prefix":
        return torch.zeros_like(tokens.divergence)
    return (tokens.student_entropy if selection == "top_entropy" else tokens.divergence).detach()
