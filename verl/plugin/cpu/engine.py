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
"""VERL's FSDP2 engines on the CPU.

Imported right after ``verl.workers.engine.fsdp.transformer_impl`` (see the package's ``__init__``). Two names that
FSDPEngine looks up when it builds a model are replaced, because they hold a choice that only an accelerator can follow
and that no configuration reaches. They are replaced where they are looked up, not in a subclass, so that engines
registered elsewhere that derive from FSDPEngine are covered too.
"""

import torch
from transformers import AutoModelForTokenClassification, PretrainedConfig, PreTrainedModel

import verl.utils.model
import verl.workers.engine.fsdp.transformer_impl as fsdp
from verl.workers.engine.base import EngineRegistry


def _no_offload(pin_memory: bool = True) -> None:
    """Stands in for ``CPUOffloadPolicy``, which FSDPEngine forces on every forward-only model (reference, teacher).

    The parameters live on the CPU anyway, and pinning them fails without an accelerator.
    """
    return None


def _load_value_model(
    local_path: str, torch_dtype: torch.dtype, model_config: PretrainedConfig, trust_remote_code: bool
) -> PreTrainedModel:
    """``load_valuehead_model`` with the attention of ``model.override_config`` instead of always flash attention."""
    return AutoModelForTokenClassification.from_pretrained(
        local_path,
        dtype=torch_dtype,
        config=model_config,
        attn_implementation=model_config._attn_implementation,
        trust_remote_code=trust_remote_code,
    )


fsdp.CPUOffloadPolicy = _no_offload
verl.utils.model.load_valuehead_model = _load_value_model

EngineRegistry.register(model_type="language_model", backend="fsdp2", device="cpu")(fsdp.FSDPEngineWithLMHead)
EngineRegistry.register(model_type="value_model", backend="fsdp2", device="cpu")(fsdp.FSDPEngineWithValueHead)
