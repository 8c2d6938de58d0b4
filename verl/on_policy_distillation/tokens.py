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
"""Which tokens of a micro-batch are supervised, and where they lie: one plan, for engines and losses alike.

Sequence i is its prompt followed by its response. Row t of a model's output predicts token t + 1, so the response of
length r that ends at packed offset e is predicted by rows [e - r - 1, e - 1). Of these, the plan keeps the rows whose
``response_mask`` is not zero: no other token is scored, projected or counted.
"""

from dataclasses import dataclass

import torch
from tensordict import TensorDict

from verl.utils import tensordict_utils as tu

__all__ = ["TokenPlan", "padded_response_mask", "plan_tokens", "response_rows"]


@dataclass(frozen=True)
class TokenPlan:
    """The n supervised tokens of a micro-batch, in the order of its sequences.

    Args:
        packed_row: (n,) int64, the row of the packed sequences (total tokens, ...) that predicts each token.
        model_row: (n,) int64, the row of the model's output, flattened to (rows, width), that predicts it.
        label: (n,) int64, the token itself.
        counts: (batch,) int64, how many of the n tokens each sequence has.
        offsets: (batch + 1,) int64, of the packed sequences.
    """

    packed_row: torch.Tensor
    model_row: torch.Tensor
    label: torch.Tensor
    counts: torch.Tensor
    offsets: torch.Tensor

    def spread(self, column: torch.Tensor) -> torch.Tensor:
        """(n,) as VERL's engines return a column: nested (batch, prompt and response), zero at all other rows."""
        packed = column.new_zeros(int(self.offsets[-1])).index_copy(0, self.packed_row, column)
        return torch.nested.nested_tensor_from_jagged(packed, self.offsets)

    def collect(self, column: torch.Tensor) -> torch.Tensor:
        """The (n,) of what `spread` returned."""
        return column.values()[self.packed_row]


def plan_tokens(data: TensorDict) -> TokenPlan:
    """The plan of a micro-batch.

    Args:
        data: holds the nested ``input_ids``, ``prompts``, ``responses`` and ``response_mask``, each (batch, length),
            and the flag ``use_remove_padding``: whether the model is given packed or right-padded sequences.
    """
    lengths, sequences = data["responses"].offsets().diff(), data["input_ids"].offsets()
    kept = data["response_mask"].values() != 0
    packed_row = response_rows(data)[kept]
    sequence = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)[kept]
    is_packed = tu.get_non_tensor_data(data=data, key="use_remove_padding", default=True)
    return TokenPlan(
        packed_row=packed_row,
        model_row=packed_row if is_packed else _padded_row(packed_row, sequence, sequences),
        label=data["responses"].values()[kept],
        counts=torch.bincount(sequence, minlength=len(lengths)),
        offsets=sequences,
    )


def response_rows(data: TensorDict) -> torch.Tensor:
    """The packed rows that predict the response tokens, masked or not: (total response tokens,) int64."""
    offsets = data["responses"].offsets()
    lengths = offsets.diff()
    ends = (data["prompts"].offsets().diff() + lengths).cumsum(0)
    first = (ends - lengths - 1).repeat_interleave(lengths)
    return first + torch.arange(int(offsets[-1]), device=offsets.device) - offsets[:-1].repeat_interleave(lengths)


def padded_response_mask(data: TensorDict) -> torch.Tensor:
    """(batch, longest response) bool."""
    return data["response_mask"].to_padded_tensor(0) != 0


def _padded_row(packed_row: torch.Tensor, sequence: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Where packed rows lie in right-padded sequences, flattened to (batch * longest, ...)."""
    return sequence * int(offsets.diff().max()) + packed_row - offsets[sequence]
