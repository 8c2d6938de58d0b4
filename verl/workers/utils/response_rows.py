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
"""Where the rows that predict response tokens lie among the packed rows of a micro-batch."""

import torch
from tensordict import TensorDict

__all__ = ["padded_rows", "response_rows"]


def response_rows(data: TensorDict) -> torch.Tensor:
    """Rows, among the packed (total tokens, ...) model outputs, that predict the response tokens.

    Sequence i is its prompt followed by its response, and row t predicts token t + 1, so the response of length r that
    ends at packed offset e is predicted by rows [e - r - 1, e - 1).

    Args:
        data: holds the nested ``prompts`` and ``responses``, each (batch, length).

    Returns:
        (total response tokens,) int64, in the order of ``responses.values()``.
    """
    offsets = data["responses"].offsets()
    lengths = offsets.diff()
    ends = (data["prompts"].offsets().diff() + lengths).cumsum(0)
    first = (ends - lengths - 1).repeat_interleave(lengths)
    within = torch.arange(int(offsets[-1]), device=offsets.device) - offsets[:-1].repeat_interleave(lengths)
    return first + within


def padded_rows(rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Where packed `rows` (n,) lie in right-padded sequences, flattened: (batch * longest, ...) outputs.

    Args:
        offsets: (batch + 1,) of the packed sequences.
    """
    sequence = torch.searchsorted(offsets, rows, right=True) - 1
    return sequence * int(offsets.diff().max()) + rows - offsets[sequence]
