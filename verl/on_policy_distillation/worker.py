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

from dataclasses import replace
from functools import cache, partial
from typing import Optional

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
        vocab = self.actor.model_config.hf_config.get_text_config().vocab_size
        self.teachers = Teachers(self.config.teacher, temperature, vocab)
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
        """VERL's update; then, or when it fails, what the teachers said is forgotten."""
        tu.assign_non_tensor(data, **{engine_fsdp.ENDS_IN_COLUMNS: True})
        if self.config.actor.policy_loss.loss_mode == PURE:
            tu.assign_non_tensor(data, calculate_entropy=False)  # the pure loss reads none
        try:
            return super().update_actor(data)
        finally:
            self.teachers.release()
