# Copyright 2026 The on-policy-distillation authors
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
"""What VERL's own distillation minimizes, as baselines of the headline and of the ablation. The math;
`baselines_plugin.py` makes VERL know it by name:

- ``distillation_type=forward_kl_top8``: forward KL over the teacher's 8 most likely tokens, VERL's ``forward_kl_topk``.
- ``distillation_type=reverse_kl_top8``: reverse KL over them, which VERL's authors tried and left out (VERL #5041) and
  others propose again (VERL #7806).
- ``hybrid_rl_loss_mode=sampled_k1`` with ``hybrid_lambda_distill=0``: a policy gradient whose advantage is the
  one-sample estimate log T(y) - log S_old(y) of minus the reverse KL, as with VERL's ``use_policy_gradient=True``.

VERL's own need teacher servers (vLLM or SGLang) on devices of their own. Here the teacher, the data and the trainer are
those of the exact losses, so that the curves differ in the loss and in nothing else.

The truncated losses, with K the teacher's top k, s and t the student's and the teacher's mass on it, both of their
distributions over the whole vocabulary, and z the student's logits (dS_w/dz_v = S_w (1[v = w] - S_v)):

=========  =================================  =========================================================
truncated  D                                  dD/dz_v
=========  =================================  =========================================================
forward    sum_K T (log T - log S)            t S_v - 1[v in K] T_v
reverse    sum_K S (log S - log T)            S_v (1[v in K] (log S_v - log T_v + 1) - D - s)
=========  =================================  =========================================================

With K the whole vocabulary they are the two KLs. With less they are no divergences, and the teacher is not their
minimum. Where S / T is the same on all of K, D is t log(t / s), and s log(s / t); for a given s nothing is lower
(log-sum inequality). So forward is lowest at s = 1, t log t: the student has no tail at all. VERL takes max(D, 0),
which has no gradient where D < 0; so does `forward_kl_topk`. D < 0 needs s > t: what it leaves alone has less tail than
the teacher. And reverse is lowest at s = t / e, -t / e: at its minimum 63 % or more of the student's mass is outside of
K, anywhere.
"""

import torch

from verl.on_policy_distillation.divergence import LogitSource

# Of the headline. VERL's default is 32 of some 150,000 entries. The tasks' answers use 11 or 13 of the 258 tokens: 32
# would cut nothing off.
TOP_K = 2
TOP_KS = (8, 64)  # of the ablation
SAMPLED_K1 = "sampled_k1"


def truncated(divergence: str, k: int) -> str:
    """The name of a divergence, "forward_kl" or "reverse_kl", over the teacher's k most likely tokens."""
    return f"{divergence}_top{k}"


def forward_kl_topk(log_s: torch.Tensor, log_t: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """sum over the teacher's top k of T (log T - log S), or 0 where that is negative, and its gradient.

    Args:
        log_s, log_t: (tokens, vocab), log-probabilities over the whole vocabulary.

    Returns:
        (tokens,) and, by the student's logits, (tokens, vocab). With k = vocab it is forward KL and S - T.
    """
    top, index = log_t.topk(k, dim=-1)
    t = top.exp()
    value = (t * (top - log_s.gather(-1, index))).sum(-1)
    gradient = (log_s.exp() * t.sum(-1, keepdim=True)).scatter_add(-1, index, -t)
    return value.clamp_min(0.0), gradient.masked_fill_((value < 0.0).unsqueeze(-1), 0.0)


def reverse_kl_topk(log_s: torch.Tensor, log_t: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """sum over the teacher's top k of S (log S - log T), which may be negative, and its gradient.

    Args:
        log_s, log_t: (tokens, vocab), log-probabilities over the whole vocabulary.

    Returns:
        (tokens,) and, by the student's logits, (tokens, vocab). With k = vocab it is reverse KL and its gradient.
    """
    top, index = log_t.topk(k, dim=-1)
    log_s_top = log_s.gather(-1, index)
    s, ratio = log_s_top.exp(), log_s_top - top
    value = (s * ratio).sum(-1)
    gradient = log_s.exp() * -(value + s.sum(-1)).unsqueeze(-1)
    return value, gradient.scatter_add_(-1, index, s * (ratio + 1.0))


TRUNCATED = {
    truncated(name, k): (function, k)
    for name, function in (("forward_kl", forward_kl_topk), ("reverse_kl", reverse_kl_topk))
    for k in (TOP_K, *TOP_KS)
}


def sampled_k1_advantages(teacher: LogitSource, responses: torch.Tensor, old_log_probs: torch.Tensor) -> torch.Tensor:
    """log T(y) - log S_old(y) of every sampled token y.

    Args:
        teacher: logits (total response tokens, vocab).
        responses, old_log_probs: nested (batch, response length).

    Returns:
        Nested, like `old_log_probs`.
    """
    every_row = torch.arange(teacher.shape[0])
    log_t = torch.log_softmax(teacher.rows(every_row).float(), dim=-1)
    log_t_sampled = log_t.gather(-1, responses.values().unsqueeze(-1)).squeeze(-1)
    offsets = old_log_probs.offsets()
    lengths = offsets.diff()
    return torch.nested.nested_tensor_from_jagged(
        log_t_sampled - old_log_probs.values(),
        offsets,
        min_seqlen=int(lengths.min()),
        max_seqlen=int(lengths.max()),  # padded to this; without it, to the sum of the lengths
    )
