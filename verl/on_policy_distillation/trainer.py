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
"""VERL's PPO trainer with a teacher: a trainer class in, the same trainer with a teacher out.

Batches are keys here; their tensors are in TransferQueue, which no other file of ours touches. What a teacher says
never gets there: `score` leaves it in the worker, under the row ids that the batch carries.
"""

import os
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from typing import Any, Optional

import ray
import torch
import transfer_queue as tq
from omegaconf import DictConfig, open_dict
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from verl.on_policy_distillation.checks import (
    loss_mode,
    require_one_prompt,
    require_prompts,
    require_routes,
    warn_of_unfinished_schedule,
)
from verl.on_policy_distillation.config import PURE, is_distillation_loss
from verl.on_policy_distillation.dump import DUMP_PATH
from verl.on_policy_distillation.losses import GLOBAL_STEPS
from verl.on_policy_distillation.progress import ShowsProgress, with_progress
from verl.on_policy_distillation.routing import Routes
from verl.on_policy_distillation.storage_watch import StorageWatch
from verl.on_policy_distillation.teacher_prompts import PromptSettings
from verl.on_policy_distillation.worker import with_teachers
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY, PPOTrainer
from verl.utils.debug import marked_timer

__all__ = ["register_with_teacher", "task_runner_class", "with_teacher"]

# What the teacher reads. Without a selection a worker call fetches every field of the batch.
_TEACHER_FIELDS = [
    "input_ids",
    "position_ids",
    "loss_mask",
    "response_mask",
    "prompts",
    "responses",
    "multi_modal_inputs",
]
_ACTOR_ROLES = (Role.Actor, Role.ActorRollout, Role.ActorRolloutRef)
_MEGABYTE = 1024**2


def with_teacher(trainer_cls: type[PPOTrainer], config: DictConfig) -> type[PPOTrainer]:
    """The class that trains `config`: `trainer_cls` itself, or, for the two distillation losses, with a teacher."""
    if not is_distillation_loss(loss_mode(config)) or issubclass(trainer_cls, _TrainerWithTeacher):
        return trainer_cls
    mixins = (_PureTrainer, _TrainerWithTeacher) if loss_mode(config) == PURE else (_TrainerWithTeacher,)
    return type(f"{trainer_cls.__name__}WithTeacher", (*mixins, trainer_cls), {})


def register_with_teacher(config: DictConfig) -> None:
    """Put `with_progress` and `with_teacher` of the trainer's class in its place in VERL's registry, for this process.

    VERL looks the class up by ``trainer_mode``, which it compares by name elsewhere too, so there is no name of ours.
    """
    from verl.trainer.ppo import v1  # noqa: F401  registers the trainers

    mode = config.trainer.v1.trainer_mode
    if mode in TRAINER_REGISTRY:
        TRAINER_REGISTRY[mode] = with_progress(with_teacher(TRAINER_REGISTRY[mode], config))


@cache
def task_runner_class(task_runner: Any) -> Any:
    """VERL's Ray actor class `task_runner`, which runs a trainer, made to run it as `register_with_teacher` has it."""

    return _remote(task_runner, _runner_with_teacher)


def _runner_with_teacher(runner_cls: type) -> type:
    class TaskRunnerWithTeacher(runner_cls):  # type: ignore[misc, valid-type]
        def run(self, config: DictConfig):
            # Imported here: Ray sends this class by value, and with it a copy of what it names.
            from verl.on_policy_distillation import trainer

            trainer.register_with_teacher(config)
            return super().run(config)

    return TaskRunnerWithTeacher


def _remote(actor_class: Any, change: Callable[[type], type]) -> Any:
    """The Ray actor class of the changed class, with the options of `actor_class`."""
    changed = change(actor_class.__ray_actor_class__)
    options = {name: value for name, value in actor_class._default_options.items() if value is not None}
    return ray.remote(**options)(changed) if options else ray.remote(changed)


class _TrainerWithTeacher(ShowsProgress, PPOTrainer):
    """The actor's workers get teachers, which score each batch right before the actor's update."""

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        for role in _ACTOR_ROLES:
            if role in self.role_worker_mapping:
                self.role_worker_mapping[role] = _remote(self.role_worker_mapping[role], with_teachers)
        with open_dict(self.config.actor_rollout_ref):
            self.config.actor_rollout_ref.teacher = self.config.teacher
            prompts = PromptSettings.of(self.config)
            self.config.actor_rollout_ref.teacher_prompts = prompts and asdict(prompts)

    def _init_dataloader(self) -> None:
        super()._init_dataloader()
        warn_of_unfinished_schedule(self.config, self.total_training_steps)
        require_routes(self.config.teacher, self.train_dataset)
        require_prompts(self.config, self.train_dataset, self.tokenizer)
        self._prompt_key = self.config.teacher.get("prompt_key", None)
        columns = [*Routes.of(self.config.teacher).columns, *([self._prompt_key] if self._prompt_key else [])]
        self._teacher_fields = [*_TEACHER_FIELDS, *columns]

    def fit(self, agent_loop_manager: Any) -> None:
        with StorageWatch(self.config, lambda: getattr(self, "logger", None)):
            super().fit(agent_loop_manager)

    def _step_once(self, metrics: dict, timing_raw: dict, sample_batch_size: int) -> KVBatchMeta:
        scored_before = timing_raw.get("teacher", 0.0)
        batch = super()._step_once(metrics, timing_raw, sample_batch_size)
        if "update_actor" in timing_raw:
            timing_raw["update_actor"] -= timing_raw.get("teacher", 0.0) - scored_before
        return batch

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        with marked_timer("teacher", self.timing_raw, color="olive"):
            self._score(batch, metrics)
        teacher = self.config.teacher
        if teacher.dump_freq > 0 and self.global_steps % teacher.dump_freq == 0:
            folder = os.path.expanduser(teacher.dump_dir)
            batch.extra_info[DUMP_PATH] = os.path.join(folder, f"step_{self.global_steps}")
        batch.extra_info[GLOBAL_STEPS] = self.global_steps
        self._measure_sampled_tokens(batch, metrics)
        batch = super()._update_actor(batch, metrics)
        for name in [name for name in metrics if name.startswith("actor/distillation/")]:
            metrics[name.removeprefix("actor/")] = metrics.pop(name)
        for share in [name for name in metrics if name.startswith("distillation/") and name.endswith("/share")]:
            kl = share.removesuffix("share") + "kl"  # so far a sum over its tokens by the number of all
            metrics[kl] = metrics[kl] / metrics[share] if metrics[share] else 0.0
        return batch

    def _score(self, batch: KVBatchMeta, metrics: dict) -> None:
        if self._prompt_key:
            require_one_prompt(self._prompt_key, batch.keys)
        selected = KVBatchMeta(
            keys=batch.keys, tags=batch.tags, partition_id=batch.partition_id, fields=[*self._teacher_fields]
        )
        self.actor_rollout_wg.score(selected)
        if batch.fields is not None:  # a selection, which the update would otherwise keep to
            batch.fields = [*batch.fields, "teacher_row"]
        kept = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["teacher_bytes"])
        metrics["distillation/teacher_payload_mb"] = kept["teacher_bytes"].sum().item() / _MEGABYTE

    def _log_probs_field(self) -> Optional[str]:
        """Of the log-probs of the sampled tokens, where there are any."""
        return "old_log_probs"

    def _measure_sampled_tokens(self, batch: KVBatchMeta, metrics: dict) -> None:
        """How sure the student is of what it samples: it nears one where training collapses."""
        if field := self._log_probs_field():
            data = tq.kv_batch_get(
                keys=batch.keys, partition_id=batch.partition_id, select_fields=[field, "response_mask"]
            )
            is_token = data["response_mask"].values() != 0
            probability = data[field].values()[is_token].exp().sum() / max(int(is_token.sum()), 1)
            metrics["distillation/sampled_token_probability"] = probability.item()


class _PureTrainer(_TrainerWithTeacher):
    """The divergence alone: nothing of RL is computed between rollout and update."""

    has_reward = False

    def _log_probs_field(self) -> Optional[str]:
        return "rollout_log_probs" if self.config.actor_rollout_ref.rollout.calculate_log_probs else None

    def _step_once(self, metrics: dict, timing_raw: dict, sample_batch_size: int) -> KVBatchMeta:
        batch = super()._step_once(metrics, timing_raw, sample_batch_size)
        for skipped in ("old_log_prob", "adv"):
            timing_raw.pop(skipped, None)
        return batch

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        return batch

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """Zeros, which the trainer's data metrics read and nothing else."""
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["response_mask"])
        zeros = torch.zeros_like(data["response_mask"], dtype=torch.float32)
        unused = TensorDict({"advantages": zeros, "returns": zeros}, batch_size=len(batch))
        return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=unused)
