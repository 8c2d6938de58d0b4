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
"""VERL's warning for each sample is said once in a process, and no error is held back."""

import logging
from unittest import mock

import pytest

from verl.utils.tokenizer import continuous_token_wiring as wiring


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("verl"), "propagate", True)  # a trainer's process turns it off
    caplog.set_level(logging.INFO, wiring.logger.name)
    return lambda: [record.getMessage() for record in caplog.records if record.name == wiring.logger.name]


def test_a_warning_is_said_once_for_each_model_type(said):
    for model_type in ("a model", "another model", "a model", "a model"):
        wiring.infer_continuous_token_model_family(hf_model_type=model_type)
    first, second = said()
    assert "'a model'" in first and "'another model'" in second


def test_a_message_that_cannot_be_put_together_is_not_ours_to_raise(said):
    with mock.patch.object(logging, "raiseExceptions", False):
        wiring.logger.warning("%s and %s", "one")


def test_errors_are_said_each_time(said):
    for _ in range(2):
        wiring.logger.error("broken")
    assert said() == ["broken", "broken"]
