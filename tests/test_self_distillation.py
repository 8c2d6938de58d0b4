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
"""The self-distillation example: its prompts, what its base is taught, and the command it starts.

The training itself is too slow to be tested here; test_trainer.py has a run with a teacher's own prompt.
"""

import functools
import json
from types import SimpleNamespace

import pytest
import self_distillation
from arithmetic import EOS, build_tokenizer, problems, tiny_model, without_carry
from composition import composed
from datasets import Dataset
from self_distillation import PROMPTS, corpora, make_data, solved_examples, table, trainer_command
from transformers import AutoTokenizer

from verl.on_policy_distillation.checks import require_prompts, validate

TAUGHT, HELD_OUT = problems()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("self_distillation")
    make_data(folder, seed=0)
    tiny_model(folder / "base")
    return folder


def table_of(path):
    return Dataset.from_parquet(str(path))


@functools.cache
def tokenizer():
    return build_tokenizer()


def text_of(prompt):
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return tokenizer().apply_chat_template(chat, add_generation_prompt=True, tokenize=False)


def test_the_examples_show_the_carry():
    examples = solved_examples(TAUGHT)
    assert len(examples) == self_distillation.SHOWN
    assert all(eval(q.rstrip("=")) == int(answer) != int(without_carry(q)) for q, answer in examples)


@pytest.mark.parametrize(("split", "pairs"), [("train", TAUGHT), ("test", HELD_OUT)])
def test_each_row_has_the_student_s_prompt_and_the_two_of_the_teacher(split, pairs, folder):
    rows = table_of(folder / f"{split}.parquet")
    assert len(rows) == len(pairs)
    for row, (question, answer) in zip(rows.select(range(300)), pairs[:300], strict=True):
        assert row["prompt"] == [{"role": "user", "content": question}]
        assert row["solution"].startswith("(") and row["solution"].endswith(f"{answer}) {question}")
        shown, rest = text_of(row["examples"]).split(EOS)
        assert rest == question and tuple(shown.split("=")) in {(q[:-1], a) for q, a in solved_examples(TAUGHT)}


def test_the_base_is_taught_the_texts_that_the_teacher_reads(folder):
    """An example with carry is followed by right answers, one without by careless ones, a solution by itself."""
    taught = corpora(TAUGHT, seed=0)
    rows = table_of(folder / "train.parquet").select(range(200))
    solutions = dict(taught["solution"])
    assert all(solutions[text_of(row["solution"])] == row["reward_model"]["ground_truth"] for row in rows)
    careful = {text.split(EOS)[0] for text, _ in taught["example with carry"]}
    assert {text_of(row["examples"]).split(EOS)[0] for row in rows} <= careful
    for kind, solve in (("example with carry", lambda q: str(eval(q[:-1]))), ("example without", without_carry)):
        for text, answer in taught[kind][:500]:
            shown, question = text.split(EOS)
            assert answer == solve(question)
            assert shown.split("=")[1] == solve(shown.split("=")[0] + "=")
    right = [answer == str(eval(q[:-1])) for q, answer in taught["plain"]]
    assert 0.4 < sum(right) / len(right) < 0.65  # 38 % by choice, and those of the others that have no carry


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_trainer_takes_the_command_and_every_row(prompt, folder):
    overrides = trainer_command(folder, prompt, ["data.seed=1"])[3:]
    config = composed(*overrides)
    assert config.teacher.prompt_key == prompt and config.data.seed == 1
    validate(config)

    data = SimpleNamespace(dataframe=table_of(folder / "train.parquet").select(range(300)))
    require_prompts(config, data, AutoTokenizer.from_pretrained(folder / "base"))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_teacher_is_scored_with_its_own_prompt(prompt, folder):
    scored, rows = table_of(folder / f"test_{prompt}.parquet"), table_of(folder / "test.parquet")
    assert scored["prompt"] == [
        [{"role": "user", "content": row}] if isinstance(row, str) else row for row in rows[prompt]
    ]
    assert [row["ground_truth"] for row in scored["reward_model"]] == [answer for _, answer in HELD_OUT]


def test_the_table_has_the_steps_that_validated_and_the_first():
    steps = [{"step": step, "accuracy": step % 3 == 0 and 0.5 or None} for step in range(5)]
    results = {
        "steps": [row | dict.fromkeys(self_distillation.SIGNS, 0.25 if row["step"] else None) for row in steps],
        "held_out_accuracy": {"student before": 0.4, "student after": 1.0},
    }
    lines = table(json.loads(json.dumps(results))).splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["0", "1", "3"]
    assert lines[-1].split()[-1] == "100.0%"
