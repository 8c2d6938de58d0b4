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
"""The watch ends a run for a storage unit that is dead, and for nothing else. A real death is in test_trainer.py."""

import logging

import pytest
import ray
from omegaconf import OmegaConf
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from verl.on_policy_distillation import storage_watch
from verl.on_policy_distillation.storage_watch import StorageWatch

RECOVERS = [
    ActorUnavailableError("the network is slow", None),
    RayTaskError("__ray_ready__", "traceback", ValueError("inside")),
]


def answer(error):
    def get(call):
        if error is not None:
            raise error

    return get


@pytest.mark.parametrize("error", [None, *RECOVERS])
def test_a_unit_that_lives_or_may_come_back_is_not_dead(error, monkeypatch, caplog):
    monkeypatch.setattr(ray, "get", answer(error))
    assert storage_watch._death("call") is None
    assert ("did not answer" in caplog.text) == (error is not None)


def test_a_unit_that_has_died_is_dead(monkeypatch):
    error = ActorDiedError()
    monkeypatch.setattr(ray, "get", answer(error))
    assert storage_watch._death("call") is error


def make_config(backend):
    settings = {"trainer": {"default_local_dir": "nowhere", "resume_mode": "auto"}}
    return OmegaConf.create(settings | {"transfer_queue": {"backend": {"storage_backend": backend}}})


@pytest.mark.parametrize(("backend", "is_said"), [("SimpleStorage", True), ("MooncakeStore", False)])
def test_units_that_cannot_be_watched_are_said(backend, is_said, caplog):
    """Here nothing has started TransferQueue."""
    with caplog.at_level(logging.WARNING), StorageWatch(make_config(backend), lambda: None):
        pass
    assert ("does not show its storage units" in caplog.text) == is_said
