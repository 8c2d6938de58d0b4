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
"""What `plan.py` says of a trainer's configuration before it starts: warnings of memory that will not be enough."""

import logging
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

from omegaconf import DictConfig, OmegaConf

from verl.on_policy_distillation.config import HYBRID, DistillationLossConfig, teacher_tokens
from verl.on_policy_distillation.plan import GIB, Settings, advise, largest, model_of, payload_bytes
from verl.on_policy_distillation.roofline import INSTRUCTIONS, Accelerator, accelerator_named
from verl.on_policy_distillation.routing import Routes
from verl.utils.torch_dtypes import PrecisionType

__all__ = ["host_memory", "settings_of", "warn_of_memory"]

logger = logging.getLogger(__name__)


def warn_of_memory(config: DictConfig, student: Any, teachers: Sequence[Any]) -> None:
    """Compare what a step needs with the memory of this machine: its own, and, where it has one, its accelerator's.

    Responses may be shorter than they are allowed to be, and workers elsewhere, so this warns. Where neither can be, it
    raises.

    Args:
        config: the trainer's configuration, which has been checked.
        student, teachers: their Hugging Face configurations; a teacher that is the student has the student's.

    Raises:
        ValueError: with ``rollout.ignore_eos`` on one node, what the teachers say exceeds the machine's memory.
    """
    _warn_of_payload(config, teachers, host_memory("MemAvailable"), host_memory("MemTotal"))
    if config.trainer.get("device", None) != "cpu" and (accelerator := _accelerator()):
        _warn_of_device(config, student, teachers, accelerator)


def host_memory(entry: str) -> Optional[int]:
    """Bytes that the kernel names so: MemTotal or MemAvailable. None where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{entry}:")), None)


def _warn_of_payload(
    config: DictConfig, teachers: Sequence[Any], available: Optional[int], total: Optional[int]
) -> None:
    teacher, nodes = config.teacher, config.trainer.nnodes
    tokens = config.data.train_batch_size * config.actor_rollout_ref.rollout.n * config.data.max_response_length / nodes
    said = tokens * _token_bytes(config, teachers)
    if available is None or total is None or said <= available:
        return
    fixes = ["lower data.train_batch_size or data.max_response_length"]
    if nodes > 1 or OmegaConf.select(config, "trainer.n_gpus_per_node", default=1) > 1:
        fixes.append("take more nodes")
    if teacher.payload == "logits":
        fixes.insert(0, "set teacher.payload=hidden_states")
    elif teacher.payload_dtype == "float32":
        fixes.insert(0, "set teacher.payload_dtype=bfloat16")
    of_top_k = " (hidden states, until their top-k is taken)" if teacher.payload == "topk" else ""
    message = (
        f"teacher.payload={teacher.payload}{of_top_k} of data.train_batch_size={config.data.train_batch_size} x "
        f"actor_rollout_ref.rollout.n={config.actor_rollout_ref.rollout.n} responses of data.max_response_length="
        f"{config.data.max_response_length} tokens is {said / GIB:.1f} GiB of host memory on each of {nodes} node(s), "
        f"and this machine has {available / GIB:.1f} GiB left of {total / GIB:.1f}: {', or '.join(fixes)}."
    )
    is_exact = bool(OmegaConf.select(config, "actor_rollout_ref.rollout.ignore_eos"))
    if is_exact and said > total and nodes == 1 and _is_ray_here(config):
        raise ValueError(message)
    logger.warning("If all responses become as long as they may: %s", message)


def _token_bytes(config: DictConfig, teachers: Sequence[Any]) -> int:
    """What is kept of a response token, of as many teachers as score a sample at most."""
    number = PrecisionType.to_dtype(config.teacher.payload_dtype).itemsize
    # Of a top-k too: it is taken when all is scored.
    payload = "hidden_states" if config.teacher.payload == "topk" else config.teacher.payload
    texts = [teacher.get_text_config() for teacher in teachers]
    sizes = [payload_bytes(payload, text.hidden_size, text.vocab_size, 0, number) for text in texts]
    return sum(largest(sizes, Routes.of(config.teacher).width))


def _is_ray_here(config: DictConfig) -> bool:
    address = OmegaConf.select(config, "ray_kwargs.ray_init.address")
    return address in (None, "local") and not os.getenv("RAY_ADDRESS")


def _accelerator() -> Optional[Accelerator]:
    """Of this machine. torch would take memory of the device for as long as the trainer's driver lives."""
    if (command := shutil.which("nvidia-smi")) is None:
        return None
    query = [command, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True).stdout.splitlines()
        name, mebibytes = lines[0].rsplit(",", 1)
        return replace(accelerator_named(name), memory=int(mebibytes) * 2**20)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None  # a machine with the tool and no device


def _warn_of_device(config: DictConfig, student: Any, teachers: Sequence[Any], accelerator: Accelerator) -> None:
    try:
        settings = settings_of(config)
        models = [model_of(teacher, f"teacher {i + 1}") for i, teacher in enumerate(teachers) if teacher is not student]
        advice = advise(model_of(student, "student"), models, settings, accelerator)
    except ValueError as error:  # a model with code of its own, or settings that VERL will refuse
        logger.warning("The memory of a device was not estimated: %s", error)
        return
    for one in advice:
        if one.phase.place != "host":
            changes = ", ".join(f"{key}={value}" for key, value in one.changes.items()) or "more devices"
            logger.warning(
                "%s may not fit: %.1f GiB of %.1f, by the estimate of python -m verl.on_policy_distillation.plan. "
                "Consider %s.",
                one.phase.name,
                one.phase.total / GIB,
                (one.phase.limit or 0) / GIB,
                changes,
            )


def settings_of(config: DictConfig) -> Settings:
    """What the trainer's configuration says to the planner.

    Raises:
        ValueError: naming the key that does not go with the others.
    """
    teacher, actor, rollout = config.teacher, config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    prompt, response = config.data.max_prompt_length, config.data.max_response_length
    sequence = prompt + response
    micro = (
        actor.ppo_max_token_len_per_gpu
        if actor.use_dynamic_bsz
        else sequence * (actor.ppo_micro_batch_size_per_gpu or 1)
    )
    of_teacher = sequence * (teacher.micro_batch_size_per_gpu or 1)
    if teacher.use_dynamic_bsz:
        _, of_teacher = teacher_tokens(config)
    divergence = DistillationLossConfig.from_config(actor).divergence
    kind = "entropy_switch" if divergence.entropy_threshold is not None else divergence.distillation_type
    return Settings(
        devices=config.trainer.nnodes * config.trainer.n_gpus_per_node,
        devices_per_node=config.trainer.n_gpus_per_node,
        batch=config.data.train_batch_size,
        rollouts=rollout.n,
        prompt=prompt,
        response=response,
        micro_tokens=micro,
        teacher_tokens=of_teacher,
        payload=teacher.payload,
        topk=teacher.topk or 0,
        payload_bytes=PrecisionType.to_dtype(teacher.payload_dtype).itemsize,
        teachers_per_token=Routes.of(teacher).width,
        rollout_tp=1 if rollout.name == "hf" else rollout.tensor_model_parallel_size,
        rollout_share=rollout.gpu_memory_utilization,
        lora_rank=config.actor_rollout_ref.model.get("lora_rank", 0),
        fsdp_size=actor.fsdp_config.fsdp_size,
        teacher_fsdp_size=teacher.fsdp_config.fsdp_size,
        weights=teacher.get("weights", "offloaded"),
        param_offload=actor.fsdp_config.param_offload,
        optimizer_offload=actor.fsdp_config.optimizer_offload,
        is_hybrid=actor.policy_loss.loss_mode == HYBRID,
        kind=kind if kind in INSTRUCTIONS else "gkd",  # of a divergence of the user's own nothing is known
    )
