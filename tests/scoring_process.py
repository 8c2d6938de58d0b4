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
"""Scores one batch with a teacher alone, on VERL's engine, and saves what it said and how it was built.

Started by test_scoring.py as test_engine.py starts engine_process.py.
"""

import sys

import torch
from engine_process import compose_config, local_batch, main
from tensordict import TensorDict
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule

import verl.workers.engine.fsdp.transformer_impl as verl_engine
from verl.on_policy_distillation.engine_fsdp import TEACHER_ROW
from verl.on_policy_distillation.signal import RowIds
from verl.on_policy_distillation.teachers import Teacher
from verl.utils.config import omega_conf_to_dataclass


class UnpinnedOffload(CPUOffloadPolicy):
    """In the place of what the CPU plugin has for it, which is nothing: its parameters are on the CPU anyway."""

    def __init__(self, pin_memory: bool):
        super().__init__(pin_memory=False)


def tensors_below(value):
    """Every tensor in what an engine returns."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict | TensorDict):
        value = list(value.values())
    return [tensor for item in value for tensor in tensors_below(item)] if isinstance(value, list | tuple) else []


def gathered(module):
    """Names of the parameters that a forward has left whole: FSDP2 puts a plain tensor in a shard's place."""
    return [name for name, parameter in module.named_parameters() if not hasattr(parameter, "to_local")]


def run_case(overrides, batch, rank, world_size):
    verl_engine.CPUOffloadPolicy = UnpinnedOffload
    config = compose_config(overrides)
    teacher = Teacher(omega_conf_to_dataclass(config.teacher))
    engine = teacher._worker.engine
    data = local_batch(batch, rank, world_size)
    data[TEACHER_ROW] = ids = RowIds(teacher.dp_rank).new(len(data))
    said = data.copy()
    teacher.score(said)  # it leaves its settings in the batch
    with engine.eval_mode():
        outputs = engine.infer_batch(said)
        left = gathered(engine.module)  # before VERL's own exit
    built = engine._build_module()  # once more, to see it before it is sharded
    units = [module for module in engine.module.modules() if isinstance(module, FSDPModule)]
    result = {
        "rows": teacher.store.get(ids, torch.device("cpu")),
        "outputs": [tuple(tensor.shape) for tensor in tensors_below(outputs)],
        "gathered": left,
        "is_meta": all(parameter.is_meta for parameter in built.parameters()),
        "offloads": {type(unit._get_fsdp_state()._fsdp_param_group.offload_policy).__name__ for unit in units},
        "projection": None if config.teacher.payload == "logits" else teacher.read_projection().weight,
    }
    results = [None] * world_size
    torch.distributed.all_gather_object(results, result)
    return results


if __name__ == "__main__":
    main(run_case, *sys.argv[1:])
