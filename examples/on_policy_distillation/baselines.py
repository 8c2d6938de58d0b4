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
"""What VERL's own distillation minimizes, as baselines of the headline experiment. The math; `baselines_plugin.py`
makes VERL know it under two names:

- ``distillation_type=forward_kl_topk``: forward KL over the teacher's `TOP_K` most likely tokens; both sides keep the
  probabilities that they have over the whole vocabulary, as VERL's loss of this name does.
- ``hybrid_rl_loss_mode=sampled_k1`` with ``hybrid_lambda_distill=0``: a policy gradient whose advantage is the
  one-sample estimate log T(y) - log S_old(y) of minus the reverse KL, as with VERL's ``use_policy_gradient=True``.

VERL's own need teacher servers (vLLM or SGLang) on devices of their own. Here the teacher, the data and the trainer are
those of the exact losses, so that the curves differ in the loss and in nothing else.
"""

import torch

from verl.on_policy_distillation.divergence import LogitSource

# VERL's default is 32 of some 150,000 entries. The task's answers use 11 of the 258 tokens: 32 would cut nothing off.
TOP_K = 2
SAMPLED_K1 = "sampled_k1"
FORWARD_KL_TOPK = "forward_kl_topk"


def forward_kl_topk(log_s: torch.Tensor, log_t: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """sum over the teacher's top k of T (log T - log S), and its gradient by the student's logits.

    Args:
        log_s, log_t: (tokens, vocab), log-probabilities over the whole vocabulary.

    Returns:
        (tokens,) and (tokens, vocab). With k = vocab it is forward KL and its gradient S - T.
    """
    top, index = log_t.topk(k, dim=-1)
    t = top.exp()
    value = (t * (top - log_s.gather(-1, index))).sum(-1)
    return value, (log_s.exp() * t.sum(-1, keepdim=True)).scatter_add(-1, index, -t)


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
