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
"""Runs VERL's own actor and teacher workers over one fixed batch, without Ray, and saves loss, metrics and gradients.

Started by test_distillation_engine.py, one process per FSDP rank: ``python engine_process.py SPEC.pt OUT.pt`` with
RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set. SPEC holds "cases" (a name each, with Hydra overrides), the paths of
the checkpoints, and the batch as lists of token ids.
"""

import os
import sys

import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from tensordict import TensorDict
from torch.distributed.tensor import DTensor

from verl.trainer.ppo.v1.distillation_hooks import DistillationTrainerHooks
from verl.utils import tensordict_utils as tu
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl.workers.teacher_worker import TeacherWorker

MACHINE = (
    "trainer.device=cpu",
    "trainer.n_gpus_per_node=1",
    "actor_rollout_ref.rollout.name=hf",
    "actor_rollout_ref.model.use_remove_padding=False",
    "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
    "actor_rollout_ref.model.enable_gradient_checkpointing=False",
    "actor_rollout_ref.actor.strategy=fsdp2",
    "actor_rollout_ref.actor.fsdp_config.model_dtype=fp32",
    "+actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp32",
    "actor_rollout_ref.actor.use_torch_compile=False",
    "actor_rollout_ref.actor.fsdp_config.use_torch_compile=False",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=2",
    "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=${actor_rollout_ref.actor.use_dynamic_bsz}",
    "teacher.fsdp_config.model_dtype=fp32",
    "teacher.payload_dtype=float32",
)


def compose_config(overrides):
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=[*MACHINE, *overrides])
    OmegaConf.resolve(config)
    return config


def nested(rows, dtype=torch.int64):
    return torch.nested.as_nested_tensor([torch.tensor(row, dtype=dtype) for row in rows], layout=torch.jagged)


def local_batch(batch, rank, world_size):
    """This rank's share of the batch as the trainer hands it to a worker."""
    rows = batch[rank::world_size]
    sequences = [row["prompt"] + row["response"] for row in rows]
    fields = {
        "input_ids": nested(sequences),
        "position_ids": nested([range(len(sequence)) for sequence in sequences]),
        "prompts": nested([row["prompt"] for row in rows]),
        "responses": nested([row["response"] for row in rows]),
        "response_mask": nested([row["mask"] for row in rows]),
        "loss_mask": nested([row["mask"] for row in rows]),
        "old_log_probs": nested([row["old_log_prob"] for row in rows], torch.float32),
        "advantages": nested([row["advantage"] for row in rows], torch.float32),
    }
    return TensorDict(fields, batch_size=len(rows))


def full_gradients(module):
    gradients = {}
    for name, parameter in module.named_parameters():
        gradient = parameter.grad
        if gradient is not None:
            gradients[name] = (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).clone()
    return gradients


def run_case(overrides, batch, rank, world_size):
    config = compose_config(overrides)
    torch.manual_seed(0)  # adapters start at random
    actor = ActorRolloutRefWorker(
        config=config.actor_rollout_ref, role="actor", distillation_config=None, teacher_config=config.teacher
    )
    actor.init_model()
    data = local_batch(batch, rank, world_size)
    payload = None
    hooks = DistillationTrainerHooks(config)
    if hooks.enabled:
        teacher = TeacherWorker(config=config.teacher)
        teacher.init_model()
        payload = teacher.score(data.clone())["teacher_payload"]
        data["teacher_payload"] = payload
    tu.assign_non_tensor(
        data,
        temperature=config.actor_rollout_ref.rollout.temperature,
        global_batch_size=len(batch),
        use_dynamic_bsz=config.actor_rollout_ref.actor.use_dynamic_bsz,
        micro_batch_size_per_gpu=config.actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu,
        max_token_len_per_gpu=config.actor_rollout_ref.actor.ppo_max_token_len_per_gpu,
        use_remove_padding=config.actor_rollout_ref.model.use_remove_padding,
        use_fused_kernels=False,
        **({"calculate_entropy": config.actor_rollout_ref.actor.entropy_coeff != 0} | hooks.update_flags(step=1)),
    )
    engine = actor.actor.engine
    with engine.train_mode(zero_grad_on_exit=False):
        engine.optimizer_zero_grad()
        output = engine.forward_backward_batch(data, actor.loss_fn)
        gradients = full_gradients(engine.module)
    result = actor.actor._postprocess_output(
        output | {"model_output": {}}, global_token_num=None, delta_time=1.0, forward_only=False, images_seqlens=None
    )
    metrics = {
        # a list of each rank's values; a Metric knows how ranks combine
        name: type(value[0]).aggregate_dp(value) if hasattr(value[0], "aggregate") else value
        for name, value in tu.get(result, "metrics").items()
        if isinstance(value, list)
    }
    width = None if payload is None else (payload.dtype, payload.values().shape[-1])
    return {"loss": tu.get(result, "metrics")["loss"], "metrics": metrics, "gradients": gradients, "payload": width}


def main(spec_path, out_path):
    spec = torch.load(spec_path, weights_only=False)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    results = {name: run_case(overrides, spec["batch"], rank, world_size) for name, overrides in spec["cases"].items()}
    if rank == 0:
        torch.save(results, out_path)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
