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
"""The actor's worker with teachers beside its model: one process per device holds both."""

import os
from dataclasses import replace
from functools import cache, partial
from typing import Optional

import torch
from omegaconf import OmegaConf
from tensordict import TensorDict

from verl.on_policy_distillation import engine_fsdp, losses
from verl.on_policy_distillation.config import PURE
from verl.on_policy_distillation.dump import TokenDump
from verl.on_policy_distillation.teacher_prompts import PromptSettings, TeacherPrompts
from verl.on_policy_distillation.teachers import Teachers
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.fs import copy_to_local
from verl.utils.profiler import DistProfiler
from verl.workers.config import ActorConfig, TrainingWorkerConfig
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

__all__ = ["with_teachers"]


@cache
def with_teachers(worker_cls: type[ActorRolloutRefWorker]) -> type[ActorRolloutRefWorker]:
    """The worker class `worker_cls` of the actor, with teachers."""
    actor_worker_cls = type(
        f"{worker_cls.actor_worker_cls.__name__}OfStudent", (_StudentWorker, worker_cls.actor_worker_cls), {}
    )
    bases = (_WorkerWithTeachers, worker_cls)
    return type(f"{worker_cls.__name__}WithTeachers", bases, {"actor_worker_cls": actor_worker_cls})


class _StudentWorker(TrainingWorker):
    """The actor's training worker, on the student's engine."""

    def __init__(self, config: TrainingWorkerConfig):
        super().__init__(replace(config, model_type=engine_fsdp.STUDENT))


class _WorkerWithTeachers(ActorRolloutRefWorker):
    """Expects the teachers' configuration as ``teacher`` beside ``actor`` and ``ref`` in its own.

    And beside it, where the teachers have prompts of their own, ``teacher_prompts``: the fields of `PromptSettings`.
    """

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        """VERL's models, then the teachers, then what connects them."""
        super().init_model()
        actor_config: ActorConfig = omega_conf_to_dataclass(self.config.actor)
        actor_config.model_config = self.actor.model_config
        temperature = actor_config.policy_loss.distillation_temperature
        self.teachers = Teachers(self.config.teacher, temperature, self.actor)
        tokenizer = self.actor.model_config.tokenizer
        prompts = OmegaConf.select(self.config, "teacher_prompts")
        self.teacher_prompts: Optional[TeacherPrompts] = None
        if prompts is not None:
            settings = PromptSettings(**OmegaConf.to_container(prompts))
            self.teacher_prompts = TeacherPrompts(settings, tokenizer)
        dump = TokenDump(tokenizer=tokenizer, size=self.config.teacher.dump_size, temperature=temperature)
        self.actor.engine.connect(partial(losses.head_columns, actor_config), self.teachers.signal, dump)
        self.set_loss_fn(losses.actor_loss(actor_config))

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    @DistProfiler.annotate(color="olive", role="teacher_score")
    def score(self, data: TensorDict) -> TensorDict:
        """Have the teachers score the samples of `data`; what they say stays here until the next update.

        Returns:
            (batch,) columns: `TEACHER_ROW`, by which `update_actor` finds what was said, and ``teacher_bytes``.
        """
        scored = self.teachers.score(self.teacher_prompts.replace(data) if self.teacher_prompts else data)
        columns = {engine_fsdp.TEACHER_ROW: scored.rows, "teacher_bytes": scored.num_bytes}
        return TensorDict(columns, batch_size=len(scored.rows))

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def update_actor(self, data: TensorDict) -> TensorDict:
        """VERL's update, which moving teachers follow; then, or when it fails, what the teachers said is forgotten."""
        tu.assign_non_tensor(data, **{engine_fsdp.ENDS_IN_COLUMNS: True})
        if self.config.actor.policy_loss.loss_mode == PURE:
            tu.assign_non_tensor(data, calculate_entropy=False)  # the pure loss reads none
        try:
            output = super().update_actor(data)
            self.teachers.follow()
            return output
        finally:
            self.teachers.release()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save_checkpoint(self, local_path, hdfs_path=None, global_step=0, max_ckpt_to_keep=None):
        """VERL's checkpoint; beside it, a file for each rank with the teachers that move."""
        super().save_checkpoint(local_path, hdfs_path, global_step, max_ckpt_to_keep)
        if state := self.teachers.state_dict():
            os.makedirs(local_path, exist_ok=True)
            torch.save(state, self._teacher_file(local_path))

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def load_checkpoint(self, local_path, hdfs_path=None, del_local_after_load=False):
        """VERL's checkpoint, and the teachers that move.

        Raises:
            RuntimeError: there are such teachers, and none of them or others in the checkpoint.
        """
        # VERL takes no path for a run that starts anew, and fetches one that is elsewhere.
        if local_path is not None and (expected := self.teachers.state_dict().keys()):
            file = self._teacher_file(copy_to_local(local_path))
            state = torch.load(file, map_location="cpu", weights_only=True) if os.path.exists(file) else {}
            if state.keys() != expected:
                raise RuntimeError(
                    f"{file} has the moving teachers {sorted(state)}, the configuration {sorted(expected)}: resume "
                    "with the settings and the number of devices that the run was started with, or set "
                    "trainer.resume_mode=disable."
                )
            self.teachers.load_state_dict(state)
        super().load_checkpoint(local_path, hdfs_path, del_local_after_load)

    def _teacher_file(self, folder: str) -> str:
        return os.path.join(folder, f"teacher_world_size_{self.world_size}_rank_{self.rank}.pt")
