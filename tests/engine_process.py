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

Started by test_engine.py, one process per FSDP rank: ``python engine_process.py SPEC.pt OUT.pt`` with
RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set. SPEC holds "cases" (a name each, with Hydra overrides), the paths of
the checkpoints, and the batch as lists of token ids.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import NamedTuple

import torch
from composition import composed
from dense_oracle import FLAGS, DenseOracle
from omegaconf import DictConfig, OmegaConf, open_dict
from tensordict import NonTensorData, NonTensorStack, TensorDict
from torch.distributed.tensor import DTensor

from verl.on_policy_distillation.engine_fsdp import ENDS_IN_COLUMNS, TEACHER_ROW
from verl.on_policy_distillation.head import LinearLogits
from verl.on_policy_distillation.losses import GLOBAL_STEPS
from verl.on_policy_distillation.signal import HiddenStates, Logits
from verl.on_policy_distillation.teacher_prompts import PromptSettings
from verl.on_policy_distillation.worker import with_teachers
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.engine_workers import ActorRolloutRefWorker

STEP = 4  # of the training, for every case
DENSE = "dense"  # among a case's overrides: the losses on whole logits, instead of the student's head
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
    "teacher.max_token_len_per_gpu=40",  # several micro-batches
)


def compose_config(overrides):
    config = composed(*MACHINE, *overrides)
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
        "ref_log_prob": nested([row["ref_log_prob"] for row in rows], torch.float32),
    }
    for name in ("data_source", "weights", "text", "chat"):  # fields of a data set, as TransferQueue hands them on
        if name in rows[0]:
            fields[name] = NonTensorStack(*(NonTensorData(row[name]) for row in rows))
    return TensorDict(fields, batch_size=len(rows))


def full_gradients(module):
    """Copies, on the processor: they outlive the update, and a device's memory is measured without them."""
    gradients = {}
    for name, parameter in module.named_parameters():
        gradient = parameter.grad
        if gradient is not None:
            whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            gradients[name] = whole.to("cpu", copy=True)
    return gradients


def make_actor(config, is_dense):
    """The actor's worker for the configured loss, with teachers if that needs them, and the flags of its update."""
    calculate_entropy = {"calculate_entropy": config.actor_rollout_ref.actor.entropy_coeff != 0}
    if is_dense or config.actor_rollout_ref.actor.policy_loss.loss_mode == "vanilla":
        actor = ActorRolloutRefWorker(config=config.actor_rollout_ref, role="actor")
        actor.init_model()
        if not is_dense:
            return actor, actor.loss_fn, calculate_entropy
        actor_config = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
        return actor, DenseOracle(actor_config, config.teacher.model.path), calculate_entropy | FLAGS
    with open_dict(config.actor_rollout_ref):
        config.actor_rollout_ref.teacher = config.teacher
        if prompts := PromptSettings.of(config):
            config.actor_rollout_ref.teacher_prompts = asdict(prompts)
    actor = with_teachers(ActorRolloutRefWorker)(config=config.actor_rollout_ref, role="actor")
    actor.init_model()
    return actor, actor.actor.loss_fn, calculate_entropy | {ENDS_IN_COLUMNS: True}


def payload_of(actor, rows):
    """(dtype, width, bytes) of what the teacher said of the samples `rows`; nothing of several teachers."""
    head = LinearLogits(torch.empty(0, 1), torch.empty(1, 1))  # nothing of it but its device is read
    signal = actor.teachers.signal(TensorDict({TEACHER_ROW: rows}, batch_size=len(rows)), head)
    if not isinstance(signal, HiddenStates | Logits):
        return ()
    return signal.values.dtype, signal.values.shape[-1], signal.values.nbytes


class Started(NamedTuple):
    """Of one case: the workers with their models, and what its update is called with."""

    config: DictConfig
    actor: ActorRolloutRefWorker
    loss_function: Callable
    flags: dict[str, bool]


def start(overrides):
    is_dense = DENSE in overrides
    config = compose_config([override for override in overrides if override != DENSE])
    torch.manual_seed(0)  # adapters start at random
    return Started(config, *make_actor(config, is_dense))


def run_case(overrides, batch, rank, world_size):
    return update(start(overrides), batch, rank, world_size)


def update(started, batch, rank, world_size):
    """Loss, metrics and gradients of one update, less its optimizer's step."""
    config, actor, loss_function, flags = started
    data = local_batch(batch, rank, world_size)
    if not config.actor_rollout_ref.actor.use_kl_loss:
        del data["ref_log_prob"]
    payload, sent = None, None
    if hasattr(actor, "teachers"):
        scored = actor.score(data.clone())
        data[TEACHER_ROW] = scored[TEACHER_ROW]
        sent = {name: (value.dtype, tuple(value.shape)) for name, value in scored.items()}
        payload = (*payload_of(actor, scored[TEACHER_ROW]), int(scored["teacher_bytes"].sum()))
    tu.assign_non_tensor(
        data,
        temperature=config.actor_rollout_ref.rollout.temperature,
        global_batch_size=len(batch),
        use_dynamic_bsz=config.actor_rollout_ref.actor.use_dynamic_bsz,
        micro_batch_size_per_gpu=config.actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu,
        max_token_len_per_gpu=config.actor_rollout_ref.actor.ppo_max_token_len_per_gpu,
        use_remove_padding=config.actor_rollout_ref.model.use_remove_padding,
        use_fused_kernels=False,
        **{GLOBAL_STEPS: STEP},
        **flags,
    )
    engine = actor.actor.engine
    forward_only = None
    if payload is not None:
        with engine.eval_mode():
            output = engine.infer_batch(data.clone(), loss_function=loss_function)
        forward_only = {"loss": sum(output["loss"]), "columns": sorted(output["model_output"])}
    with engine.train_mode(zero_grad_on_exit=False):
        engine.optimizer_zero_grad()
        output = engine.forward_backward_batch(data, loss_function)
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
    return {
        "loss": tu.get(result, "metrics")["loss"],
        "metrics": metrics,
        "gradients": gradients,
        "payload": payload,
        "sent": sent,
        "forward_only": forward_only,
    }


def main(run_case, spec_path, out_path):
    spec = torch.load(spec_path, weights_only=False)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    results = {name: run_case(overrides, spec["batch"], rank, world_size) for name, overrides in spec["cases"].items()}
    if rank == 0:
        torch.save(results, out_path)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(run_case, *sys.argv[1:])
