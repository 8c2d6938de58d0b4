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
"""The FSDP engine of a distillation teacher: forward only, and what it returns are response positions."""

import torch
from tensordict import TensorDict

from verl.utils import tensordict_utils as tu
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.utils.response_rows import response_rows

from ..base import EngineRegistry
from .transformer_impl import FSDPEngineWithLMHead

__all__ = ["FSDPTeacherEngine", "FSDPTeacherLogitsEngine"]


class _FSDPTeacherEngine(FSDPEngineWithLMHead):
    def __init__(self, model_config, *args, **kwargs):
        # The registry key names the kind of engine; to the model builder a teacher is a language model.
        model_config.model_type = "language_model"
        super().__init__(model_config, *args, **kwargs)

    def prepare_model_outputs(self, output, output_args, micro_batch: TensorDict, logits_processor_func):
        """``teacher_payload``: nested (batch, response length, width), row t being what predicts response token t."""
        packed = self._packed_rows(output.logits, output_args, micro_batch)
        rows = packed[response_rows(micro_batch)].to(PrecisionType.to_dtype(micro_batch["payload_dtype"]))
        offsets = micro_batch["responses"].offsets()
        return {"teacher_payload": torch.nested.nested_tensor_from_jagged(rows, offsets)}

    def _packed_rows(self, output: torch.Tensor, output_args: dict, micro_batch: TensorDict) -> torch.Tensor:
        """(total tokens, width) from the model's padded (batch, length, width) or packed (1, total, width) output."""
        if tu.get_non_tensor_data(data=micro_batch, key="use_remove_padding", default=True):
            return self._gather_and_unpad_packed(output.squeeze(0), output_args["pad_size"])
        lengths = micro_batch["input_ids"].offsets().diff()
        return output[torch.arange(output.shape[1], device=output.device) < lengths.unsqueeze(1)]


@EngineRegistry.register(model_type="teacher_logits", backend=["fsdp", "fsdp2"], device=["cuda", "npu", "cpu"])
class FSDPTeacherLogitsEngine(_FSDPTeacherEngine):
    """Returns logits; the teacher runs its own head."""


@EngineRegistry.register(model_type="teacher_hidden_states", backend=["fsdp", "fsdp2"], device=["cuda", "npu", "cpu"])
class FSDPTeacherEngine(_FSDPTeacherEngine):
    """Returns last hidden states; the head is dropped before the model is sharded, so it never runs here."""

    def _build_module(self):
        module = super()._build_module()
        module.set_output_embeddings(torch.nn.Identity())
        return module
