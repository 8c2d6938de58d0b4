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
"""The FSDP engine of a student whose head computes divergences: no logits of the update ever exist as a whole."""

import torch
from tensordict import TensorDict

from verl.trainer.ppo.on_policy_distillation import is_distillation_loss
from verl.utils.device import get_device_id
from verl.workers.config import ActorConfig
from verl.workers.utils.distillation_head import DistillationHead
from verl.workers.utils.distillation_loss import DistillationActorLoss

from ..base import EngineRegistry
from .transformer_impl import FSDPEngineWithLMHead

__all__ = ["FSDPStudentEngine", "student_engine_type"]

_FUSED_STUDENT = "fused_distillation_student"  # the key of this engine in VERL's registry


def student_engine_type(config: ActorConfig) -> str:
    """The ``model_type`` under which VERL's registry finds the actor's engine."""
    policy_loss = config.policy_loss
    if is_distillation_loss(policy_loss.loss_mode) and policy_loss.distillation_head == "fused":
        return _FUSED_STUDENT
    return config.model_config.get("model_type", "language_model")


@EngineRegistry.register(model_type=_FUSED_STUDENT, backend=["fsdp", "fsdp2"], device=["cuda", "npu", "cpu"])
class FSDPStudentEngine(FSDPEngineWithLMHead):
    """Gives the head its task in updates; everywhere else (old log-probs, exports) it is VERL's engine."""

    def __init__(self, model_config, *args, **kwargs):
        # The registry key names the kind of engine; to the model builder a student is a language model.
        model_config.model_type = "language_model"
        super().__init__(model_config, *args, **kwargs)

    def _build_module(self):
        module = super()._build_module()
        self._head = DistillationHead.convert(module.get_output_embeddings())
        return module

    def _build_lora_module(self, module):
        module = super()._build_lora_module(module)
        DistillationHead.require(module.get_output_embeddings())
        return module

    def forward_step(self, micro_batch: TensorDict, loss_function, forward_only):
        if not isinstance(loss_function, DistillationActorLoss):
            return super().forward_step(micro_batch, loss_function, forward_only)
        micro_batch = micro_batch.to(get_device_id())
        self._head.task = loss_function.head_task(micro_batch)
        try:
            return super().forward_step(micro_batch, loss_function, forward_only)
        finally:
            self._head.task = None

    def prepare_model_outputs(self, output, output_args, micro_batch: TensorDict, logits_processor_func):
        if self._head.task is None:
            return super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        results: torch.Tensor = output.logits  # whatever the head returned
        return self._head.task.model_output(results, micro_batch["input_ids"].offsets())
