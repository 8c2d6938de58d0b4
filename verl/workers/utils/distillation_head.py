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
"""The student's output layer, which in an update turns hidden states into divergences instead of logits.

It runs where the model runs its head, inside the model's forward: sharded weights have been gathered for it, and their
gradients are reduced as those of any other layer.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Optional

import torch

from verl.utils.divergence import DivergenceSpec, LinearLogits, LogitSource, TokenDivergence
from verl.utils.kernel.linear_divergence import divergence_of_head, tokens_of_head
from verl.workers.utils.distillation_dump import TopEntries, top_entries

__all__ = ["DistillationHead", "DivergenceTask", "HeadTask", "PolicyTask"]


@dataclass(kw_only=True)
class HeadTask(ABC):
    """What a head computes for one micro-batch in place of logits.

    Args:
        rows: (n,) int64, the rows of the model's output that predict the n tokens to be compared.
        teacher: logits of the same n tokens.
        dumped: (d,) int64, which of the n tokens are dumped with both sides' likeliest entries; mostly none.
    """

    rows: torch.Tensor
    teacher: LogitSource
    spec: DivergenceSpec
    dumped: torch.Tensor
    tokens: TokenDivergence = field(init=False)  # set by the call
    tops: Optional[tuple[TopEntries, TopEntries]] = field(default=None, init=False)

    @abstractmethod
    def __call__(self, head: LinearLogits) -> torch.Tensor:
        """`head.hidden`: (rows, H), all rows of the model's output. Returns (1, tokens, width)."""

    @abstractmethod
    def model_output(self, output: torch.Tensor, offsets: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the engine hands to the loss, from the head's output; `offsets` are those of the packed sequences."""

    def _compared(self, head: LinearLogits) -> tuple[LinearLogits, LogitSource]:
        """Both sides' logits, not yet projected; of those to be dumped, the likeliest entries."""
        student = LinearLogits(head.hidden[self.rows], head.weight, head.bias)
        teacher = self.teacher.cut(len(head.weight))
        if len(self.dumped):
            student_top, teacher_top = (
                top_entries(side, self.dumped, self.spec.temperature) for side in (student, teacher)
            )
            self.tops = student_top, teacher_top
        return student, teacher


class DistillationHead(torch.nn.Linear):
    """A linear output layer with a `task`. Without one it is the layer it was made from."""

    task: Optional[HeadTask]

    @classmethod
    def convert(cls, layer: torch.nn.Module) -> "DistillationHead":
        """Make `layer` a DistillationHead in place: its parameters and their names stay.

        Raises:
            ValueError: it is not a torch.nn.Linear.
        """
        _require_type(layer, torch.nn.Linear)
        layer.__class__ = cls
        layer.task = None
        return layer

    @classmethod
    def require(cls, layer: torch.nn.Module) -> None:
        """Raise ValueError if something, such as a LoRA adapter, has taken the place of a converted layer."""
        _require_type(layer, cls)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.task is None:
            return super().forward(hidden)
        return self.task(LinearLogits(hidden.flatten(0, -2), self.weight, self.bias))


def _require_type(layer: torch.nn.Module, expected: type) -> None:
    if type(layer) is not expected:
        raise ValueError(
            "actor_rollout_ref.actor.policy_loss.distillation_head=fused needs a plain torch.nn.Linear as the "
            f"student's output layer, and it is a {type(layer).__name__}: set distillation_head=dense."
        )


@dataclass(kw_only=True)
class DivergenceTask(HeadTask):
    """The pure loss, whose token weights are known before the forward: value and gradients in one pass.

    Args:
        token_weights: (n,), see `verl.trainer.ppo.on_policy_distillation.token_weights`.
    """

    token_weights: torch.Tensor

    def __call__(self, head: LinearLogits) -> torch.Tensor:
        student, teacher = self._compared(head)
        out = divergence_of_head(student, teacher, self.spec, self.token_weights)
        self.tokens = out.metrics
        return out.loss.view(1, 1, 1)

    def model_output(self, output: torch.Tensor, offsets: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"distillation_loss": output.view(())}


@dataclass(kw_only=True)
class PolicyTask(HeadTask):
    """The hybrid loss, whose RL term needs log-probabilities too: per-token results with a gradient of their own.

    Args:
        packed_rows: (n,) int64, the places of `rows` in the packed sequences.
        labels: (n,) int64, the tokens.
        temperature: the sampling temperature, of `log_probs` and `entropy`.
        calculate_entropy: whether the loss reads `entropy`.
    """

    packed_rows: torch.Tensor
    labels: torch.Tensor
    temperature: float
    calculate_entropy: bool

    def __call__(self, head: LinearLogits) -> torch.Tensor:
        student, teacher = self._compared(head)
        out = tokens_of_head(student, teacher, self.spec, self.labels, self.temperature)
        self.tokens = out.tokens
        return torch.stack((out.log_prob, out.entropy, out.tokens.divergence), dim=-1).unsqueeze(0)

    def model_output(self, output: torch.Tensor, offsets: torch.Tensor) -> dict[str, torch.Tensor]:
        log_prob, entropy, divergence = output.squeeze(0).unbind(-1)
        self.tokens = self.tokens._replace(divergence=divergence)
        outputs = {"log_probs": log_prob} | ({"entropy": entropy} if self.calculate_entropy else {})
        return {name: self._nested(values, offsets) for name, values in outputs.items()}

    def _nested(self, values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """(n,) at their places in the packed sequences, zero at prompt positions, which no loss reads."""
        packed = values.new_zeros(int(offsets[-1])).index_copy(0, self.packed_rows, values)
        return torch.nested.nested_tensor_from_jagged(packed, offsets)
