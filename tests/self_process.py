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
"""Runs the student as its own teacher on VERL's workers, without Ray, and saves what it says and the gradients.

Started by test_self_teacher.py as engine_process.py is, whose pieces are used. An "update" of the student is known
beforehand: all trainable weights times `GROWTH`, or, with LoRA, the second matrix of each adapter set to a constant.
"""

import os
import sys
import tempfile

import torch
from engine_process import compose_config, full_gradients, local_batch, main, make_actor
from omegaconf import open_dict
from torch.distributed.tensor import DTensor

from verl.on_policy_distillation.engine_fsdp import ENDS_IN_COLUMNS, TEACHER_ROW
from verl.on_policy_distillation.head import LinearLogits
from verl.utils import tensordict_utils as tu

GROWTH, STEP = 1.05, 0.02
UPDATES = 3
FAILS = "fails"  # among a case's overrides: a scoring that raises comes first


def local(parameter):
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter.data


@torch.no_grad()
def update(module, number):
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            local(parameter).fill_(STEP * number)
        elif parameter.requires_grad and "lora_A" not in name:
            local(parameter).mul_(GROWTH)


def student_weights(module):
    return {name: local(parameter).clone() for name, parameter in module.named_parameters()}


def full(module):
    """All weights of the adapters."""
    named = ((name, parameter) for name, parameter in module.named_parameters() if "lora_" in name)
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for name, p in named}


def scored(actor, data):
    """What the teacher says of this rank's supervised tokens, as logits, and that the student is as it was."""
    module = actor.actor.engine.module
    before = student_weights(module)
    ids = actor.score(data.clone())[TEACHER_ROW]
    same = all(torch.equal(value, before[name]) for name, value in student_weights(module).items())
    return ids, same


def logits_of(actor, ids):
    """As the student's engine reads them, whose head is at hand then."""
    weight = actor.actor.engine.module.get_output_embeddings().weight
    weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
    micro = tu.get_tensordict({TEACHER_ROW: ids})
    source = actor.teachers.signal(micro, LinearLogits(torch.empty(0, weight.shape[1]), weight.detach())).logits()
    return source.rows(torch.arange(source.shape[0]))


def step(actor, config, data, ids):
    """Loss and gradients of the student against what was said."""
    data = data.clone()
    data[TEACHER_ROW] = ids
    tu.assign_non_tensor(
        data,
        temperature=1.0,
        global_batch_size=8,
        use_dynamic_bsz=False,
        micro_batch_size_per_gpu=2,
        use_remove_padding=config.actor_rollout_ref.model.use_remove_padding,
        use_fused_kernels=False,
        calculate_entropy=False,
        **{ENDS_IN_COLUMNS: True},
    )
    engine = actor.actor.engine
    with engine.train_mode(zero_grad_on_exit=False):
        engine.optimizer_zero_grad()
        output = engine.forward_backward_batch(data, actor.actor.loss_fn)
        gradients = full_gradients(engine.module)
        engine.optimizer_zero_grad()
    return sum(output["loss"]), gradients


def failed_scoring(actor, data):
    """Out of memory in the middle of a scoring: whether the student has its weights afterwards."""
    module, engine = actor.actor.engine.module, actor.actor.engine
    before, forward_step = student_weights(module), engine.forward_step

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    engine.forward_step = fail
    try:
        actor.score(data.clone())
    except RuntimeError:
        pass
    else:
        return False
    finally:
        engine.forward_step = forward_step
    return all(torch.equal(value, before[name]) for name, value in student_weights(module).items())


def run_case(overrides, batch, rank, world_size):
    config = compose_config([override for override in overrides if override != FAILS])
    torch.manual_seed(0)  # adapters start at random
    actor, _, _ = make_actor(config, is_dense=False)
    module, data = actor.actor.engine.module, local_batch(batch, rank, world_size)
    result = {"said": [], "losses": [], "same": [], "adapters": full(module)}
    if FAILS in overrides:
        result["same"].append(failed_scoring(actor, data))
    for number in range(1, UPDATES + 1):
        update(module, number)
        actor.teachers.follow()
        ids, same = scored(actor, data)
        result["same"].append(same)
        result["said"].append(logits_of(actor, ids))
        loss, gradients = step(actor, config, data, ids)
        result["losses"].append(loss)
        result["gradients"] = gradients
        actor.teachers.release()
    shadow = next(iter(actor.teachers._teachers.values())).shadow
    result["shadow_bytes"] = 0 if shadow is None else shadow.num_bytes
    result["resumed"] = resumed(actor, config, data, result["said"][-1])
    return result


def resumed(actor, config, data, said):
    """Whether a fresh worker that loads the checkpoint hears the same, and what it says where there is none."""
    folder = [tempfile.mkdtemp() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(folder)
    actor.save_checkpoint(folder[0])
    torch.distributed.barrier()
    files = sorted(name for name in os.listdir(folder[0]) if name.startswith("teacher_"))
    with open_dict(config.actor_rollout_ref):
        fresh, _, _ = make_actor(config, is_dense=False)
    fresh.load_checkpoint(folder[0])
    ids, _ = scored(fresh, data)
    try:
        fresh.load_checkpoint(os.path.join(folder[0], "nowhere"))
        refusal = ""
    except Exception as error:  # VERL's own, where nothing is kept
        refusal = str(error)
    return {"files": files, "same": torch.equal(logits_of(fresh, ids), said), "refusal": refusal}


if __name__ == "__main__":
    main(run_case, *sys.argv[1:])
