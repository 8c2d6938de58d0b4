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
"""A teacher with a prompt of its own: its tokens, the rows they are compared at, and what is refused at start.

Through VERL's workers the reference is a direct float64 Hugging Face computation: the student scores its prompt and the
response, the teacher scores its own prompt and the same response, one sequence at a time, without padding.
"""

import random
import re

import datasets
import numpy as np
import pytest
import torch
from arithmetic import build_tokenizer, tiny_model
from tensordict import NonTensorStack, TensorDict
from test_checks import PURE, make_config
from test_engine import (
    HYBRID,
    LOSS,
    MICRO,
    assert_same_gradients,
    by_sequences,
    divergence,
    response_logits,
    run_workers,
    sharpened,
)
from test_engine import make_batch as make_rows
from transformers import AutoModelForCausalLM

from verl.on_policy_distillation.checks import require_one_prompt, require_prompts, validate
from verl.on_policy_distillation.teacher_prompts import PromptSettings, TeacherPrompts, with_prompts
from verl.on_policy_distillation.tokens import plan_tokens
from verl.utils import tensordict_utils as tu

KEY = "teacher.prompt_key=text"


@pytest.fixture(scope="module")
def tokenizer():
    """Its template is the messages' texts one after the other, so a reference can do without it."""
    return build_tokenizer()


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# ----------------------------------------------------------------------------------------------------------------------
# a prompt's tokens


def prompts_of(tokenizer, max_length=64, truncation="error", **kwargs):
    return TeacherPrompts(PromptSettings("text", max_length, truncation, kwargs), tokenizer)


def test_a_string_is_one_message_of_the_user(tokenizer):
    prompts = prompts_of(tokenizer)
    assert prompts.token_ids("12+34=") == ids_of(tokenizer, "12+34=")
    assert prompts.token_ids("12+34=") == prompts.token_ids([{"role": "user", "content": "12+34="}])


def test_messages_take_the_template_its_arguments_and_the_prompt_of_an_answer():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% if think %}?{% endif %}{% endif %}"
    )
    chat = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1"}]
    assert prompts_of(tokenizer).token_ids(chat) == ids_of(tokenizer, "<system>Add.<user>1+1<assistant>")
    assert prompts_of(tokenizer, think=True).token_ids("1") == ids_of(tokenizer, "<user>1<assistant>?")
    assert prompts_of(tokenizer).token_ids(np.array(chat, dtype=object)) == prompts_of(tokenizer).token_ids(chat)


@pytest.mark.parametrize(("truncation", "kept"), [("left", "45678"), ("right", "01234"), ("middle", "01678")])
def test_a_prompt_that_is_too_long_is_cut_as_the_data_set_s(truncation, kept, tokenizer):
    prompts = prompts_of(tokenizer, 5, truncation)
    assert prompts.token_ids("012345678") == ids_of(tokenizer, kept)
    assert prompts.token_ids("01234") == ids_of(tokenizer, "01234")


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("123456", "6 tokens, and teacher.max_prompt_length=5: raise it"),
        ("", "not one token"),
        (None, "neither a string nor a list of chat messages"),
        ([], "neither a string nor a list of chat messages"),
        (7, "neither a string nor a list of chat messages"),
        ({"role": "user", "content": "1"}, "neither a string nor a list of chat messages"),
        (["1"], "'1' is no chat message"),
        ([{"content": "1"}], "is no chat message"),
        ([{"role": "user", "content": [{"type": "image", "image": "x"}]}], "part of type 'image'"),
    ],
)
def test_a_prompt_that_cannot_be_used(prompt, said, tokenizer):
    with pytest.raises(ValueError, match=said):
        prompts_of(tokenizer, 5).token_ids(prompt)


def test_a_template_that_does_not_take_a_prompt_is_quoted():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="chat template does not take it: roles must alternate"):
        prompts_of(tokenizer).token_ids("1")


def test_equal_prompts_are_tokenised_once(tokenizer, monkeypatch):
    prompts, seen = prompts_of(tokenizer), []
    original = prompts.token_ids
    monkeypatch.setattr(prompts, "token_ids", lambda prompt: seen.append(prompt) or original(prompt))
    long = [{"role": "user", "content": np.arange(2000).tolist().__repr__()[:60] + end} for end in "ab"]
    column = ["1", "22", "1", long[:1], long[1:], long[:1]]
    made = prompts.all_token_ids(column)
    assert seen == ["1", "22", long[:1], long[1:]]
    assert [ids.tolist() for ids in made] == [original(prompt) for prompt in column]


# ----------------------------------------------------------------------------------------------------------------------
# a batch


def nested(rows):
    return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)


def make_batch(prompts, responses, masks, is_packed=True, **fields):
    sequences = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    columns = {
        "prompts": nested(prompts),
        "responses": nested(responses),
        "input_ids": nested(sequences),
        "position_ids": nested([list(range(len(sequence))) for sequence in sequences]),
        "response_mask": nested(masks),
    }
    data = TensorDict(columns | fields, batch_size=len(prompts))
    tu.assign_non_tensor(data, use_remove_padding=is_packed)
    return data


RESPONSES, MASKS = [[7, 8, 9], [5], [3, 4]], [[1, 0, 1], [1], [1, 1]]
OWN, OTHER = [[1], [2, 2, 2, 2], [6, 6]], [[10, 11, 12, 13], [14], [15, 16]]  # longer, shorter, as long


@pytest.mark.parametrize("is_packed", [True, False])
def test_the_same_tokens_at_the_rows_of_the_other_prompts(is_packed):
    """As if the batch had been made with the other prompts to begin with."""
    old = make_batch(OWN, RESPONSES, MASKS, is_packed)
    new = with_prompts(old, [torch.tensor(prompt) for prompt in OTHER])
    expected = make_batch(OTHER, RESPONSES, MASKS, is_packed)
    for name in ("prompts", "responses", "input_ids", "position_ids", "response_mask"):
        assert [row.tolist() for row in new[name].unbind()] == [row.tolist() for row in expected[name].unbind()], name
    plan, other = plan_tokens(old), plan_tokens(new)
    assert other.label.tolist() == plan.label.tolist() == [7, 9, 5, 3, 4]
    assert other.counts.tolist() == plan.counts.tolist()
    # Counted by hand: of "10 11 12 13 7 8 9 | 14 5 | 15 16 3 4", the rows before 7, 9, 5, 3 and 4.
    assert other.packed_row.tolist() == [3, 5, 7, 10, 11]
    assert other.model_row.tolist() == ([3, 5, 7, 10, 11] if is_packed else [3, 5, 7, 15, 16])


def test_the_batch_itself_is_left_alone():
    old = make_batch(OWN, RESPONSES, MASKS)
    with_prompts(old, [torch.tensor(prompt) for prompt in OTHER])
    assert [row.tolist() for row in old["prompts"].unbind()] == OWN


def test_positions_of_several_axes_keep_them():
    old = make_batch(OWN, RESPONSES, MASKS)
    positions = [torch.arange(len(a) + len(b)).expand(4, -1).contiguous() for a, b in zip(OWN, RESPONSES, strict=True)]
    old["position_ids"] = torch.nested.as_nested_tensor(positions, layout=torch.jagged)
    new = with_prompts(old, [torch.tensor(prompt) for prompt in OTHER])
    for row, prompt, response in zip(new["position_ids"].unbind(), OTHER, RESPONSES, strict=True):
        assert row.tolist() == [list(range(len(prompt) + len(response)))] * 4


def test_a_batch_with_images_is_refused():
    images = NonTensorStack({}, {"pixel_values": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="teacher.prompt_key with images, video or audio"):
        with_prompts(make_batch(OWN, RESPONSES, MASKS, multi_modal_inputs=images), [torch.tensor([1])] * 3)
    text = NonTensorStack({}, {}, {})
    with_prompts(make_batch(OWN, RESPONSES, MASKS, multi_modal_inputs=text), [torch.tensor([1])] * 3)


# ----------------------------------------------------------------------------------------------------------------------
# through VERL's workers

PACKED = "actor_rollout_ref.model.use_remove_padding=True"
CASES = {
    "padded": (PURE, f"{MICRO}=4", KEY),
    "packed": (PURE, f"{MICRO}=4", KEY, PACKED),
    "logits": (PURE, f"{MICRO}=2", KEY, "teacher.payload=logits"),
    "logits_packed": (PURE, f"{MICRO}=2", KEY, PACKED, "teacher.payload=logits"),
    "chat": (PURE, f"{MICRO}=4", "teacher.prompt_key=chat"),
    "cut": (PURE, f"{MICRO}=4", KEY, "teacher.max_prompt_length=3", "data.truncation=left"),
    "hybrid": (HYBRID, f"{MICRO}=4", KEY, f"{LOSS}.hybrid_lambda_rl=0"),
    "dynamic": (
        PURE,
        KEY,
        "actor_rollout_ref.actor.use_dynamic_bsz=True",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16",
    ),
    "routed": (PURE, f"{MICRO}=2", *by_sequences(2), KEY, "teacher.routing_key=data_source"),
}
TWO_RANKS = ("packed", "dynamic", "routed")


@pytest.fixture(scope="module")
def batch():
    """Prompts of the teacher that are longer and shorter than the student's, and one that two samples share."""
    rows, rng = make_rows(seed=3), random.Random(0)
    for index, row in enumerate(rows):
        row["text"] = "".join(rng.choice("0123456789+=") for _ in range((24, 1, 9)[index % 3]))
        row["chat"] = [{"role": "system", "content": "abc"}, {"role": "user", "content": row["text"]}][index % 2 :]
        row["data_source"] = ("one", "other")[index % 2]
    rows[1]["text"] = rows[0]["text"]
    lengths = [(len(row["text"]), len(row["prompt"])) for row in rows]
    assert any(new > old for new, old in lengths) and any(new < old for new, old in lengths)
    return rows


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "student": sharpened(folder / "student", hidden=32, layers=2, seed=1),
        "one": sharpened(folder / "one", hidden=64, layers=1, seed=2),
        "other": sharpened(folder / "other", hidden=32, layers=1, seed=3),
    }


def results_of(checkpoints, batch, folder, names, ranks):
    cases = {}
    for name in names:
        teachers = [f"teacher.model.path={checkpoints['one']}"]
        if name == "routed":
            teachers = [f"+teacher.models.{teacher}.path={checkpoints[teacher]}" for teacher in ("one", "other")]
        cases[name] = [*CASES[name], f"actor_rollout_ref.model.path={checkpoints['student']}", *teachers]
    return run_workers(folder, f"ranks{ranks}", cases, batch, world_size=ranks)


@pytest.fixture(scope="module")
def one_rank(checkpoints, batch, tmp_path_factory):
    return results_of(checkpoints, batch, tmp_path_factory.mktemp("one"), CASES, 1)


@pytest.fixture(scope="module")
def two_ranks(checkpoints, batch, tmp_path_factory):
    return results_of(checkpoints, batch, tmp_path_factory.mktemp("two"), TWO_RANKS, 2)


@pytest.fixture(scope="module")
def reference(checkpoints, batch, tokenizer):
    """Of a case: the loss and the gradients, float64."""
    load = AutoModelForCausalLM.from_pretrained
    models = {name: load(path, attn_implementation="eager").double().eval() for name, path in checkpoints.items()}

    def text_of(name, row):
        if name == "chat":
            return "".join(message["content"] for message in row["chat"])
        return row["text"][-3:] if name == "cut" else row["text"]

    def direct(name):
        models["student"].zero_grad()
        losses = []
        for row in batch:
            teacher = models[row["data_source"] if name == "routed" else "one"]
            with torch.no_grad():
                target = response_logits(teacher, row | {"prompt": ids_of(tokenizer, text_of(name, row))})
            mask = torch.tensor(row["mask"]) != 0
            losses.append(divergence(response_logits(models["student"], row), target, "reverse_kl", 1.0, 1.0)[mask])
        loss = torch.cat(losses).mean()
        loss.backward()
        return loss.item(), {name: weight.grad.clone() for name, weight in models["student"].named_parameters()}

    return direct


@pytest.mark.parametrize("case", CASES)
def test_the_teacher_answers_to_its_own_prompt(case, one_rank, reference):
    loss, gradients = reference(case)
    assert one_rank[case]["loss"] == pytest.approx(loss, rel=1e-5)
    assert one_rank[case]["metrics"]["distillation/kl"] == pytest.approx(loss, rel=1e-5)
    assert_same_gradients(one_rank[case]["gradients"], gradients, tolerance=1e-5)


@pytest.mark.parametrize("case", TWO_RANKS)
def test_two_ranks_equal_one(case, two_ranks, reference):
    loss, gradients = reference(case)
    assert two_ranks[case]["loss"] == pytest.approx(loss, rel=1e-5)
    assert_same_gradients(two_ranks[case]["gradients"], gradients, tolerance=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# at start


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    student, teacher = tiny_model(folder / "student"), tiny_model(folder / "teacher", hidden=64, seed=1)
    return f"actor_rollout_ref.model.path={student}", f"teacher.model.path={teacher}"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["teacher.max_prompt_length=8"], "teacher.max_prompt_length=8 has no effect without teacher.prompt_key"),
        ([KEY, "teacher.max_prompt_length=0"], "teacher.max_prompt_length=0: set it to a whole number above 0"),
        ([KEY, "teacher.max_prompt_length=8.5"], "teacher.max_prompt_length=8.5: set it to a whole number above 0"),
        (["teacher.prompt_key=7"], "teacher.prompt_key=7: set it to the name of a field"),
        ([KEY, "data.truncation=centre"], r"data.truncation=centre is none of \['error', 'left', 'right', 'middle'\]"),
        (
            [KEY, "teacher.max_prompt_length=97"],  # tiny_model has 128 positions
            "context of 128 tokens .*teacher.max_prompt_length=97 plus data.max_response_length=32 is 129: shorten",
        ),
        (
            [KEY, "teacher.max_prompt_length=16", "teacher.max_token_len_per_gpu=47"],
            "teacher.max_token_len_per_gpu=47 is less than teacher.max_prompt_length=16 plus "
            "data.max_response_length=32: set teacher.max_token_len_per_gpu to 48 or more",
        ),
        (
            [KEY, "teacher.routing_key=text", "+teacher.models.a.path=x"],
            "teacher.prompt_key=text is teacher.routing_key too",
        ),
        (["teacher.prompt_ky=text"], "did you mean prompt_key"),
    ],
)
def test_settings_that_cannot_work(overrides, said, models):
    overrides = [f"+{override}" if "prompt_ky" in override else override for override in overrides]
    with pytest.raises(ValueError, match=said):
        validate(make_config(PURE, *models, *overrides))


def test_settings_that_can(models):
    fitting = (KEY, "teacher.max_token_len_per_gpu=64")
    validate(make_config(PURE, *models, *fitting))
    validate(make_config(PURE, *models, *fitting, "teacher.max_prompt_length=32", "data.truncation=middle"))
    # The student's prompts may be longer than the teacher's context, as it never sees them.
    longer = ["data.max_prompt_length=128", "teacher.max_prompt_length=32"]
    validate(make_config(PURE, *models, KEY, *longer))


def test_tools_that_the_teacher_does_not_see_are_said(models, caplog):
    validate(make_config(PURE, *models, KEY, "data.tool_config_path=tools.yaml"))
    assert "data.tool_config_path=tools.yaml: the tools are in the student's prompt, and not in the teacher's" in (
        caplog.text
    )


class Rows(list):
    """A data set of the user's own: rows, and no table."""


def training_data(**columns):
    """As VERL reads it: rows, and the table that they come from."""
    table = datasets.Dataset.from_dict(columns)
    data = Rows(table)
    data.dataframe = table
    return data


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"prompt": ["a"], "answer": ["b"]}, r"teacher.prompt_key=text is no field .* has \['prompt', 'answer'\]"),
        ({"text": ["a", None]}, "row 1 of the data set has no prompt .*neither a string nor"),
        ({"text": [1, 2]}, "row 0 of the data set has no prompt .*neither a string nor"),
        ({"text": ["a", "b", "a" * 33]}, "row 2 of the data set .*33 tokens, and teacher.max_prompt_length=32"),
        ({"text": [[{"role": "user", "content": "a"}], []]}, "row 1 of the data set has no prompt"),
        ({"text": ["a", "b"], "images": [[], ["x.png"]]}, "data.image_key=images, and row 1 of the data set has"),
    ],
)
def test_the_training_data_is_checked_row_by_row(columns, said, models, tokenizer):
    with pytest.raises(ValueError, match=said):
        require_prompts(make_config(PURE, *models, KEY), training_data(**columns), tokenizer)


def test_training_data_that_passes(models, tokenizer):
    config = make_config(PURE, *models, KEY)
    require_prompts(config, training_data(text=["a", "b" * 32], images=[[], None]), tokenizer)
    require_prompts(config, training_data(text=[[{"role": "user", "content": "a"}]]), tokenizer)
    cut = make_config(PURE, *models, KEY, "data.truncation=right")
    require_prompts(cut, training_data(text=["b" * 99]), tokenizer)
    require_prompts(make_config(PURE, *models), training_data(other=["a"]), tokenizer)


def test_a_data_set_of_the_user_s_own_may_make_the_column(models, tokenizer):
    config = make_config(PURE, *models, KEY)
    require_prompts(config, Rows([{"prompt": "a", "text": "b"}]), tokenizer)
    data = training_data(prompt=["a"])
    data[0] = data[0] | {"text": "b"}  # in its __getitem__
    require_prompts(config, data, tokenizer)
    with pytest.raises(ValueError, match=r"teacher.prompt_key=text is no field .* has \['prompt'\]: set it"):
        require_prompts(config, Rows([{"prompt": "a"}]), tokenizer)


def test_a_rollout_of_several_samples_is_refused():
    require_one_prompt("text", ["3f-a_0_0", "3f-a_1_0", "pad0b_1_0", "named_1"])
    with pytest.raises(ValueError, match=re.escape("several samples of one rollout (3f-a_1_2)")):
        require_one_prompt("text", ["3f-a_0_0", "3f-a_1_2"])
