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
"""verl/on_policy_distillation/tokens.py against plain loops over sequences."""

import random

import pytest
import torch
from tensordict import TensorDict

from verl.on_policy_distillation.tokens import padded_response_mask, plan_tokens, response_rows
from verl.utils import tensordict_utils as tu


def nested(rows):
    return torch.nested.as_nested_tensor([torch.tensor(row, dtype=torch.int64) for row in rows], layout=torch.jagged)


def make_batch(seed, is_packed, sequences=5):
    """Each token is a number of its own. One sequence has no token of the loss, as those that fill a batch up."""
    rng, token = random.Random(seed), iter(range(10_000))
    prompts = [[next(token) for _ in range(rng.randrange(1, 5))] for _ in range(sequences)]
    responses = [[next(token) for _ in range(rng.randrange(1, 6))] for _ in range(sequences)]
    masks = [[rng.randrange(2) for _ in response] for response in responses]
    masks[seed % sequences] = [0] * len(masks[seed % sequences])
    whole = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    names = {"input_ids": whole, "prompts": prompts, "responses": responses, "response_mask": masks}
    data = TensorDict({name: nested(rows) for name, rows in names.items()}, batch_size=sequences)
    tu.assign_non_tensor(data, use_remove_padding=is_packed)
    return data, prompts, responses, masks


def supervised(prompts, responses, masks):
    """(sequence, place of the token in it, token) of each token of the loss."""
    return [
        (i, len(prompts[i]) + j, token)
        for i, response in enumerate(responses)
        for j, token in enumerate(response)
        if masks[i][j]
    ]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("is_packed", [True, False])
def test_each_row_is_the_one_before_its_token(seed, is_packed):
    data, prompts, responses, masks = make_batch(seed, is_packed)
    plan = plan_tokens(data)
    truth = supervised(prompts, responses, masks)
    assert plan.label.tolist() == [token for _, _, token in truth]
    assert plan.counts.tolist() == [sum(mask) for mask in masks]
    packed = data["input_ids"].values()
    padded = data["input_ids"].to_padded_tensor(-1)
    before = [(prompts[i] + responses[i])[place - 1] for i, place, _ in truth]
    assert packed[plan.packed_row].tolist() == before
    assert (packed if is_packed else padded.flatten())[plan.model_row].tolist() == before


def test_rows_of_all_response_tokens():
    data, prompts, responses, _ = make_batch(0, True)
    following = data["input_ids"].values()[response_rows(data) + 1]
    assert following.tolist() == [token for response in responses for token in response]


def test_a_column_is_spread_and_collected():
    data, prompts, responses, masks = make_batch(1, False)
    plan = plan_tokens(data)
    column = torch.randn(len(plan.label), requires_grad=True)
    spread = plan.spread(column)
    assert torch.equal(spread.offsets(), data["input_ids"].offsets())
    assert torch.equal(plan.collect(spread), column)
    assert int((spread.values() != 0).sum()) == len(column)  # zero at all other rows
    (gradient,) = torch.autograd.grad((plan.collect(spread) * torch.arange(len(column))).sum(), column)
    assert torch.equal(gradient, torch.arange(len(column)).float())


def test_padded_mask():
    data, _, _, masks = make_batch(3, True)
    width = max(map(len, masks))
    assert padded_response_mask(data).tolist() == [
        [bool(value) for value in mask] + [False] * (width - len(mask)) for mask in masks
    ]
