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
"""How a student stands to its teacher: what the ablation measures of every checkpoint, alike for every method.

Each number is a mean over response tokens, in nats or a share of mass, of the whole vocabulary at temperature 1:

- nll: of held-out text, -log S(token). The score.
- reverse_kl: KL(S||T) on responses that the student samples to held-out prompts.
- entropy: H(S) on the same.
- outside_K: the student's mass outside of the teacher's K most likely tokens, on the same.
- forward_kl: KL(T||S) on responses that the teacher samples to these prompts.

A response ends with its first EOS, which belongs to it. Sampling inverts the cumulative distribution at fixed numbers
in [0, 1), one for each token of each response, so that two equal models sample the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LlamaForCausalLM

ROWS = 32  # sequences that are scored at a time


@dataclass(frozen=True)
class Responses:
    """Sequences (n, prompt + response) int64, and which of their response tokens count (n, response) bool."""

    sequences: torch.Tensor
    mask: torch.Tensor


def pick(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """(n,) int64: the entry at which the running sum of `probabilities` (n, V) exceeds `uniform` (n,), in [0, 1)."""
    sums = probabilities.double().cumsum(-1)
    return torch.searchsorted(sums, uniform.double().unsqueeze(-1) * sums[:, -1:], right=True).squeeze(-1)


def until_eos(tokens: torch.Tensor, eos: int) -> torch.Tensor:
    """Bool, shaped like `tokens` (n, response): up to and with the first EOS of each row."""
    is_eos = (tokens == eos).int()
    return is_eos.cumsum(-1) - is_eos == 0


@torch.no_grad()
def sample(model: LlamaForCausalLM, prompts: torch.Tensor, uniform: torch.Tensor) -> Responses:
    """Responses of `uniform.shape[1]` tokens to `prompts` (n, prompt), token i of row r drawn by uniform[r, i]."""
    sequences, cache, new = prompts, None, prompts
    for step in range(uniform.shape[1]):
        output = model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        new = pick(output.logits[:, -1].softmax(-1), uniform[:, step]).unsqueeze(-1)
        sequences = torch.cat((sequences, new), dim=-1)
    return Responses(sequences, until_eos(sequences[:, prompts.shape[1] :], model.config.eos_token_id))


@torch.no_grad()
def response_log_probs(model: LlamaForCausalLM, sequences: torch.Tensor, length: int) -> torch.Tensor:
    """(n, length, V): of what may stand at each of the last `length` tokens."""
    return model(input_ids=sequences[:, :-1], logits_to_keep=length).logits.log_softmax(-1)


def negative_log_likelihood(model: LlamaForCausalLM, windows: torch.Tensor, length: int) -> float:
    """Of the last `length` tokens of `windows` (n, tokens), given those before; their mean."""
    nll = [
        -response_log_probs(model, rows, length).gather(-1, rows[:, -length:].unsqueeze(-1))
        for rows in windows.split(ROWS)
    ]
    return torch.cat(nll).double().mean().item()


def of_tokens(log_s: torch.Tensor, log_t: torch.Tensor, ks: Sequence[int]) -> dict[str, torch.Tensor]:
    """Both KLs, the student's entropy and its mass outside of the teacher's top k; each without the last dimension."""
    s, t = log_s.exp(), log_t.exp()
    top = log_t.topk(max(ks), dim=-1).indices
    inside = s.gather(-1, top).cumsum(-1)
    return {
        "reverse_kl": (s * (log_s - log_t)).sum(-1),
        "forward_kl": (t * (log_t - log_s)).sum(-1),
        "entropy": -(s * log_s).sum(-1),
        **{f"outside_{k}": 1 - inside[..., k - 1] for k in ks},
    }


def means(
    student: LlamaForCausalLM, teacher: LlamaForCausalLM, responses: Responses, ks: Sequence[int]
) -> dict[str, float]:
    """What `of_tokens` says, as means over the response tokens that count."""
    length = responses.mask.shape[1]
    parts = [
        of_tokens(response_log_probs(student, rows, length), response_log_probs(teacher, rows, length), ks)
        for rows in responses.sequences.split(ROWS)
    ]
    return {name: torch.cat([part[name] for part in parts])[responses.mask].double().mean().item() for name in parts[0]}


class Scorer:
    """Scores students against one teacher.

    Args:
        teacher: the teacher, in float32.
        windows: (n, prompt + response) int64, held-out text.
        length: response tokens.
        ks: the k of outside_k.
        seed: of the numbers that responses are sampled by; the students' are others than the teacher's.
    """

    def __init__(self, teacher: LlamaForCausalLM, windows: torch.Tensor, length: int, ks: Sequence[int], seed: int = 0):
        self.teacher, self.windows, self.length, self.ks = teacher, windows, length, ks
        generator = torch.Generator().manual_seed(seed)
        of_teacher, self.uniform = torch.rand((2, len(windows), length), generator=generator)
        self.prompts = windows[:, :-length]
        self.of_teacher = sample(teacher, self.prompts, of_teacher)

    def __call__(self, student: LlamaForCausalLM) -> dict[str, float]:
        own = means(student, self.teacher, sample(student, self.prompts, self.uniform), self.ks)
        own["forward_kl"] = means(student, self.teacher, self.of_teacher, self.ks)["forward_kl"]
        return {"nll": negative_log_likelihood(student, self.windows, self.length)} | own
