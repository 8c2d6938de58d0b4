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
"""The trainer and the worker with a teacher are VERL's own classes, whichever; the reference has none."""

import pytest
import ray
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict

from verl.experimental.separation.engine_workers import DetachActorWorker
from verl.on_policy_distillation.progress import with_progress
from verl.on_policy_distillation.trainer import task_runner_class, with_teacher
from verl.on_policy_distillation.worker import with_teachers
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.utils.tracking import Tracking
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

LOSSES = ("on_policy_distillation", "hybrid_rl_distillation")


def config_of(loss_mode, **others):
    actor = {"policy_loss": {"loss_mode": loss_mode}, "use_kl_loss": True}
    settings = {
        "actor_rollout_ref": {"actor": actor, "model": {}, "rollout": {}},
        "teacher": {"model": {"path": "teacher"}},
        "algorithm": {"use_kl_in_reward": False, "adv_estimator": "grpo"},
        "critic": {"enable": False},
        "trainer": {"n_gpus_per_node": 1, "nnodes": 1},
        "reward": {"reward_model": {"enable_resource_pool": False, "nnodes": 0, "n_gpus_per_node": 0}},
    }
    return OmegaConf.create(settings)


@pytest.mark.parametrize("mode", ["sync", "colocate_async", "separate_async"])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_trainer_is_a_subclass_of_the_one_that_is_registered(loss, mode):
    registered = get_trainer_cls(mode)
    trainer_cls = with_teacher(registered, config_of(loss))
    assert issubclass(trainer_cls, registered) and trainer_cls is not registered
    assert with_teacher(trainer_cls, config_of(loss)) is trainer_cls  # a patched main_ppo may ask again


def test_other_losses_keep_their_trainer():
    registered = get_trainer_cls("sync")
    assert with_teacher(registered, config_of("vanilla")) is registered


@pytest.mark.parametrize(("loss", "has_reward"), [("vanilla", True), (LOSSES[0], False), (LOSSES[1], True)])
def test_any_trainer_shows_its_progress(loss, has_reward, capsys):
    registered = get_trainer_cls("sync")
    trainer_cls = with_progress(with_teacher(registered, config_of(loss)))
    assert issubclass(trainer_cls, registered) and with_progress(trainer_cls) is trainer_cls
    trainer = trainer_cls.__new__(trainer_cls)
    trainer.config = OmegaConf.create({"trainer": {"test_freq": 2, "save_freq": -1, "total_epochs": 3}})
    trainer.global_steps, trainer.total_training_steps, trainer.steps_per_epoch = 0, 9, 2
    assert trainer.has_reward is has_reward and getattr(trainer, "logger", None) is None
    trainer.logger = tracking = Tracking("project", "experiment", [])
    assert trainer.logger is tracking
    tracking.log({"timing_s/step": 2.0, "distillation/kl": 0.5, "critic/score/mean": 0.25}, step=1)
    reward = "   reward 0.250" if has_reward else ""
    assert capsys.readouterr().out == f"step 1/6   KL 0.5000{reward}   2.0 s   0:00:10 left\n"


@pytest.mark.parametrize("worker_cls", [ActorRolloutRefWorker, DetachActorWorker])
def test_the_worker_is_a_subclass_of_the_one_that_the_trainer_maps(worker_cls):
    with_ours = with_teachers(worker_cls)
    assert issubclass(with_ours, worker_cls) and with_teachers(worker_cls) is with_ours
    assert issubclass(with_ours.actor_worker_cls, worker_cls.actor_worker_cls)
    assert with_ours.ref_worker_cls is worker_cls.ref_worker_cls
    assert worker_cls.actor_worker_cls is TrainingWorker  # VERL's own is as it was


@pytest.mark.parametrize(("has_replicas", "role"), [(True, Role.ActorRolloutRef), (False, Role.Actor)])
def test_the_actor_s_role_gets_teachers_and_the_reference_s_does_not(has_replicas, role):
    trainer_cls = with_teacher(get_trainer_cls("sync"), config_of("hybrid_rl_distillation"))
    trainer = trainer_cls.__new__(trainer_cls)
    trainer.config, trainer._enable_hybrid_replicas = config_of("hybrid_rl_distillation"), has_replicas
    trainer._init_resource_pool_mgr()
    workers = {role: cls.__ray_actor_class__ for role, cls in trainer.role_worker_mapping.items()}
    assert workers.pop(role) is with_teachers(ActorRolloutRefWorker)
    assert workers == ({} if has_replicas else {Role.RefPolicy: ActorRolloutRefWorker})
    assert trainer.config.actor_rollout_ref.teacher == trainer.config.teacher
    assert not ray.is_initialized()


def test_options_of_the_actor_classes_stay():
    @ray.remote(num_cpus=3, max_concurrency=5)
    class TaskRunner:
        def run(self, config):
            return config

    runner = task_runner_class(TaskRunner)
    assert issubclass(runner.__ray_actor_class__, TaskRunner.__ray_actor_class__)
    assert runner._default_options["num_cpus"] == 3 and runner._default_options["max_concurrency"] == 5


class FailingWorker(ActorRolloutRefWorker):
    def __init__(self):  # nothing but what update_actor reads
        self.config = config_of("on_policy_distillation").actor_rollout_ref
        self.enable_routing_replay = False

    def update_actor(self, data):
        if "fails" in data.keys():
            raise RuntimeError("out of memory")
        return data


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_teacher_said_is_forgotten_after_the_update_whatever_happens(fails):
    class Teachers:
        released, followed = 0, 0

        def release(self):
            self.released += 1

        def follow(self):
            self.followed += 1

    worker = with_teachers(FailingWorker)()
    worker.teachers = Teachers()
    data = TensorDict({"x": torch.zeros(2)} | ({"fails": torch.zeros(2)} if fails else {}), batch_size=2)
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            worker.update_actor(data)
    else:
        worker.update_actor(data)
    assert worker.teachers.released == 1 and worker.teachers.followed == (0 if fails else 1)
