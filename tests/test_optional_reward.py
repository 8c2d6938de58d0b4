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
"""A pure run needs no reward: what can be scored is scored, and the rest gives 0 instead of an error."""

import asyncio

import numpy as np
import pytest
import torch
from arithmetic import build_tokenizer

from verl import DataProto
from verl.on_policy_distillation.optional_reward import OptionalRewardManager


def sample(response, **fields):
    ids = torch.tensor([build_tokenizer().encode(response)])
    objects = {}
    for name, value in fields.items():
        objects[name] = np.empty(1, dtype=object)
        objects[name][0] = value
    return DataProto.from_dict(tensors={"responses": ids, "attention_mask": torch.ones_like(ids)}, non_tensors=objects)


def score(data, compute_score=None):
    async def run():
        manager = OptionalRewardManager(config=None, tokenizer=build_tokenizer(), compute_score=compute_score)
        return await manager.run_single(data)

    return asyncio.run(run())["reward_score"]


def fields(source="openai/gsm8k", answer="46"):
    return {"data_source": source, "reward_model": {"style": "rule", "ground_truth": answer}, "extra_info": {}}


def test_what_verl_can_score_is_scored():
    assert score(sample("#### 46", **fields())) == 1.0
    assert score(sample("#### 47", **fields())) == 0.0


@pytest.mark.parametrize(
    "given",
    [
        {"extra_info": {}},  # prompts only
        {"data_source": "openai/gsm8k", "reward_model": {"style": "rule"}, "extra_info": {}},
        fields(source="a source without a rule"),
    ],
)
def test_what_cannot_be_scored_is_zero(given):
    assert score(sample("46", **given)) == 0.0


def test_an_error_inside_a_scoring_rule_is_not_hidden():
    def broken(**_):
        return {}["missing"]

    with pytest.raises(KeyError, match="missing"):
        score(sample("46", **fields()), compute_score=broken)
