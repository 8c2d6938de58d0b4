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
"""What the PPO trainer does for full-vocabulary distillation, on the driver. Batches are keys; tensors never come here.

For any other policy loss every method leaves what it is given as it was, so the trainer calls them without asking.
"""

import os
from typing import Any

import torch
from omegaconf import DictConfig, open_dict
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from verl.trainer.ppo.distillation_setup import is_pure_distillation, teacher_is_enabled
from verl.trainer.ppo.utils import Role
from verl.utils.debug import marked_timer
from verl.workers.utils.distillation_dump import DUMP_FLAG

__all__ = ["DistillationTrainerHooks"]

# What the teacher reads. Without a selection a worker call fetches every field of the batch.
_TEACHER_FIELDS = ["input_ids", "position_ids", "loss_mask", "prompts", "responses", "multi_modal_inputs"]
_MEGABYTE = 1024**2


class DistillationTrainerHooks:
    """Adds the teacher worker group to a `PPOTrainer`.

    Args:
        config: the trainer's configuration, resolved.
    """

    def __init__(self, config: DictConfig):
        self.enabled = teacher_is_enabled(config)
        self.is_pure = is_pure_distillation(config)
        self._config = config
        self._teacher_wg: RayWorkerGroup  # set by `init_teacher`
        self._bytes_per_token = 0
        if self.is_pure:
            _make_reward_optional(config)

    def add_teacher(self, pool: RayResourcePool, resource_pool_to_cls: dict[RayResourcePool, dict]) -> None:
        """Put the teacher beside the actor: one more class in the worker process of each device of `pool`."""
        if self.enabled:
            import ray

            from verl.workers.teacher_worker import TeacherWorker

            worker_cls = RayClassWithInitArgs(cls=ray.remote(TeacherWorker), config=self._config.teacher)
            resource_pool_to_cls[pool][str(Role.TeacherModel)] = worker_cls

    def init_teacher(self, worker_groups: dict[str, RayWorkerGroup]) -> None:
        """Load the teacher's weights."""
        if self.enabled:
            self._teacher_wg = worker_groups[str(Role.TeacherModel)]
            self._bytes_per_token = self._teacher_wg.init_model()[0]

    def score(self, batch: KVBatchMeta, metrics: dict[str, Any], timing_raw: dict[str, float]) -> KVBatchMeta:
        """Have the teacher score the batch; its payload goes from worker to worker through TransferQueue.

        Called right before the actor's update: any worker call in between would fetch the payload for nothing.
        """
        if not self.enabled:
            return batch
        with marked_timer("teacher", timing_raw, color="olive"):
            self._teacher_wg.score(
                KVBatchMeta(keys=batch.keys, tags=batch.tags, partition_id=batch.partition_id, fields=_TEACHER_FIELDS)
            )
        if batch.fields is not None:  # a selection, which the update would otherwise keep to
            batch.fields = [*batch.fields, "teacher_payload"]
        num_tokens = sum(tag["response_len"] for tag in batch.tags)
        metrics["distillation/teacher_payload_mb"] = num_tokens * self._bytes_per_token / _MEGABYTE
        return batch

    def update_flags(self, step: int) -> dict[str, Any]:
        """Flags of the engine's forward: hand the logits to the loss; the pure loss needs no log-probs or entropy."""
        if not self.enabled:
            return {}
        flags: dict[str, Any] = {"distillation_use_topk": True, "distillation_only": self.is_pure}
        teacher = self._config.teacher
        if teacher.dump_freq > 0 and step % teacher.dump_freq == 0:
            flags[DUMP_FLAG] = os.path.join(os.path.expanduser(teacher.dump_dir), f"step_{step}")
        return flags | ({"calculate_entropy": False} if self.is_pure else {})

    def log_names(self, actor_metrics: dict[str, Any]) -> dict[str, Any]:
        """The loss's metrics under their own names; the trainer prefixes what a worker returns with ``actor/``."""
        if not self.enabled:
            return actor_metrics
        return {
            name.removeprefix("actor/") if "/distillation/" in name else name: v for name, v in actor_metrics.items()
        }

    def add_unused_fields(self, data: TensorDict) -> TensorDict:
        """Zeros where the trainer's data metrics read RL quantities that the pure loss does not compute."""
        if self.is_pure:
            for name in ("advantages", "returns"):
                data[name] = torch.zeros_like(data["response_mask"], dtype=torch.float32)
        return data


def _make_reward_optional(config: DictConfig) -> None:
    """Without a reward function of the user's, score what VERL can score and give the rest zero."""
    reward = config.reward
    uses_defaults = reward.reward_manager.source == "register" and reward.reward_manager.name == "naive"
    if reward.reward_model.enable or reward.custom_reward_function.path or not uses_defaults:
        return
    with open_dict(config):
        reward.reward_manager.source = "importlib"
        reward.reward_manager.name = "OptionalRewardManager"
        reward.reward_manager.module.path = "pkg://verl.experimental.reward_loop.reward_manager.optional"
