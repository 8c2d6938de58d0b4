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
"""The recipes as they are: their commands against VERL's configuration, our checks and the planner; their data.

test_trainer.py trains with each of them.
"""

import json
import re
import shlex
import sys
from copy import deepcopy
from dataclasses import replace
from functools import cache

import prompts
import pytest
import teacher_prompt
from arithmetic import problems, tiny_model, verl_rows
from calculator import calculate
from composition import composed
from datasets import Dataset
from recipe_scripts import NAMES, RECIPES, arguments_of, recipe
from transformers import Qwen2Config, Qwen3Config

from verl.on_policy_distillation.checks import prepare, refuse_misspelt_overrides
from verl.on_policy_distillation.memory import settings_of
from verl.on_policy_distillation.plan import GIB, _parser, _settings, model_of, payload_bytes, plan
from verl.on_policy_distillation.roofline import ACCELERATORS
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config

README = (RECIPES / "README.md").read_text()


def qwen3(hidden, layers, heads, intermediate, tied):
    """As published on the Hub."""
    return Qwen3Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=intermediate,
        vocab_size=151_936,
        tie_word_embeddings=tied,
    )


def qwen25(hidden, layers, heads, key_heads, intermediate, vocab, tied):
    return Qwen2Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        intermediate_size=intermediate,
        vocab_size=vocab,
        tie_word_embeddings=tied,
    )


MODELS = {
    "Qwen3-32B": qwen3(5120, 64, 64, 25_600, False),
    "Qwen3-8B": qwen3(4096, 36, 32, 12_288, False),
    "Qwen3-4B": qwen3(2560, 36, 32, 9_728, True),
    "Qwen3-1.7B": qwen3(2048, 28, 16, 6_144, True),
    "Qwen2.5-Math-7B-Instruct": qwen25(3584, 28, 28, 4, 18_944, 152_064, False),
    "Qwen2.5-Coder-7B-Instruct": qwen25(3584, 28, 28, 4, 18_944, 152_064, False),
    "Qwen2.5-1.5B-Instruct": qwen25(1536, 28, 12, 2, 8_960, 151_936, True),
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Small models with the context of large ones, so that the recipes keep their own lengths."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("student", "teacher")):
        file = f"{tiny_model(folder / name, seed=seed)}/config.json"
        with open(file) as config:
            edited = json.load(config) | {"max_position_embeddings": 40_960}
        with open(file, "w") as config:
            json.dump(edited, config)
    teachers = ("TEACHER_MODEL", "MATH_TEACHER", "CODE_TEACHER")
    models = {name: str(folder / "teacher") for name in teachers}
    return models | {"STUDENT_MODEL": str(folder / "student"), "MODEL": str(folder / "student")}


@pytest.fixture(scope="module")
def config_of(paths):
    """The configuration of a recipe with variables, such as NNODES=2, by its name."""

    @cache
    def compose_once(name, *variables):
        arguments = arguments_of(name, **paths, **dict(variable.split("=") for variable in variables))
        refuse_misspelt_overrides(arguments)
        return composed(*arguments)

    return lambda *arguments: deepcopy(compose_once(*arguments))


@pytest.mark.parametrize("name", NAMES)
def test_verl_and_our_checks_take_the_command(name, config_of):
    config = config_of(name)
    prepare(config)
    validate_config(config, need_reference_policy(config), need_critic(config))
    assert config.trainer.resume_mode == "auto" and "wandb" in config.trainer.logger
    saved = set(config.actor_rollout_ref.actor.checkpoint.save_contents)
    assert saved >= {"model", "optimizer", "extra"}
    # VERL writes a LoRA's weights under names that transformers does not know: README.md has the command that does.
    assert ("hf_model" in saved) == (not config.actor_rollout_ref.model.lora_rank)


def test_the_number_of_nodes_is_a_variable(config_of):
    config = config_of("qwen3_32b_to_4b", "NNODES=2")
    prepare(config)
    assert (config.trainer.nnodes, config.trainer.n_gpus_per_node) == (2, 8)


@pytest.mark.parametrize("name", NAMES)
def test_overrides_come_last(name):
    assert arguments_of(name, "trainer.total_training_steps=2")[-1] == "trainer.total_training_steps=2"


@pytest.mark.parametrize("name", NAMES)
def test_each_variable_of_a_recipe_is_used_in_it(name):
    script = recipe(name).read_text()
    defaults = re.findall(r"^((\w+)=\$\{.*)\n", script, re.MULTILINE)
    assert len(defaults) > 15
    for line, variable in defaults:
        assert re.search(rf"\$\{{?{variable}\b", script.replace(line, "")), variable


# ----------------------------------------------------------------------------------------------------------------------
# README.md


def test_the_readme_names_every_recipe_and_file():
    for file in RECIPES.iterdir():
        assert file.suffix not in (".sh", ".py") or f"`{file.name}`" in README, file.name


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_makes_every_file_that_a_recipe_reads(name):
    files = re.findall(r":-\$HOME(/data/\w+)/(\w+\.parquet)\}", recipe(name).read_text())
    assert len(files) >= 2
    for folder, file in files:
        assert f"~{folder}/{file}" in README or f"--local_save_dir ~{folder}\n" in README, (folder, file)


def plans():
    """Each command for the planner that README.md has: the recipe with its variables, and the arguments."""
    commands = re.findall(r"^# (\S+\.sh.*)\npython3 -m verl.on_policy_distillation.plan ((?:.*\\\n)*.*)$", README, re.M)
    return {title: shlex.split(command.replace("\\\n", " ")) for title, command in commands}


@pytest.fixture(scope="module")
def sizes():
    return {name: model_of(config, name) for name, config in MODELS.items()}


def test_every_recipe_has_an_estimate():
    assert {title.split()[0] for title in plans()} == {f"{name}.sh" for name in NAMES}


@pytest.mark.parametrize("title", plans())
def test_the_estimates_are_the_planner_s_for_the_recipe_s_settings_and_fit(title, config_of, sizes):
    script, *variables = title.split()
    config = config_of(script.removesuffix(".sh"), *variables)
    options = _parser().parse_args(plans()[title])
    settings = _settings(options)
    assert replace(settings_of(config), topk=settings.topk) == settings
    named = {value.rpartition("/")[2] for value in re.findall(r":-(Qwen/[\w.-]+)", (RECIPES / script).read_text())}
    assert {options.student, *options.teacher} == named
    student, teachers = sizes[options.student], [sizes[name] for name in options.teacher]
    found = plan(student, teachers, settings, ACCELERATORS[options.gpu])
    assert not found.too_large
    row = f"| `{script}`{''.join(f' {v}' for v in variables)} | {' | '.join(estimates(found, teachers, settings))} |"
    assert row in README.splitlines(), row


def estimates(found, teachers, settings):
    """The cells of a row: GiB of a device in each phase, of a node's host, of the payload of a step; seconds."""
    total = {"start": 0.0, "rollout": 0.0, "scoring": 0.0, "update": 0.0}
    for phase in found.phases:
        if phase.place == "device":
            name = phase.name.partition(",")[0]
            total[name] = max(total[name], phase.total)
    host = max(phase.total for phase in found.phases if phase.place == "host")
    width = max(teacher.width for teacher in teachers)
    said = settings.sequences * settings.response * payload_bytes(settings.payload, width, 0, 0)
    gibibytes = [f"{size / GIB:.2g}" for size in (*total.values(), host, said)]
    return [*gibibytes, " + ".join(f"{seconds:.2g}" for seconds in found.seconds.values())]


# ----------------------------------------------------------------------------------------------------------------------
# data and tool


def run(module, monkeypatch, *arguments):
    """As `python3 <module>.py <arguments>` does."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
    module.main()


def test_any_data_set_of_questions_becomes_verl_s_form(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    Dataset.from_list([{"question": "What is $1+1$?", "final_answer": "2", "topic": "Algebra"}]).to_parquet(
        source / "train.parquet"
    )
    columns = ("--question", "question", "--answer", "final_answer", "--ability", "math")
    out = tmp_path / "new" / "train.parquet"
    options = ("--after", r"Answer in \boxed{}.", "--source", "deepmath")
    run(prompts, monkeypatch, source, out, *columns, *options)
    assert Dataset.from_parquet(str(out)).to_list() == [
        {
            "data_source": "deepmath",
            "prompt": [{"role": "user", "content": r"What is $1+1$? Answer in \boxed{}."}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "2"},
            "extra_info": {"split": "train", "index": 0},
        }
    ]
    # The columns of VERL's own GSM8K and MATH, as its trainer reads them here.
    assert verl_rows(problems()[0][:1], "train")[0].keys() == Dataset.from_parquet(str(out))[0].keys()


def test_a_column_that_is_not_there_is_refused(tmp_path, monkeypatch, capsys):
    Dataset.from_list([{"problem": "What is $1+1$?"}]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(SystemExit):
        run(prompts, monkeypatch, tmp_path, tmp_path / "out", "--question", "question", "--ability", "math")
    assert f"{tmp_path} has no column question, it has ['problem']" in capsys.readouterr().err


def test_a_teacher_s_prompt_is_a_column(tmp_path, monkeypatch):
    rows = verl_rows([("12+34=", "46")], "train")
    rows[0]["prompt"].insert(0, {"role": "system", "content": "Be brief."})
    Dataset.from_list(rows).to_parquet(str(tmp_path / "train.parquet"))
    (tmp_path / "rules.txt").write_text("Never forget to carry.")
    out = tmp_path / "out.parquet"
    after = "\nIt is {reward_model[ground_truth]}, not {{}}."
    options = ("--system", tmp_path / "rules.txt", "--after", after)
    run(teacher_prompt, monkeypatch, tmp_path / "train.parquet", out, *options)
    [row] = Dataset.from_parquet(str(out)).to_list()
    assert row.pop(teacher_prompt.COLUMN) == [
        {"role": "system", "content": "Never forget to carry."},
        {"role": "user", "content": "12+34=\nIt is 46, not {}."},
    ]
    assert row == rows[0]


@pytest.mark.parametrize("after", ["{answer}", "{extra_info[solution]}", r"\boxed{}", "{"])
def test_a_text_that_asks_for_what_a_row_does_not_have_is_refused(after):
    row = verl_rows([("12+34=", "46")], "train")[0]
    with pytest.raises(ValueError, match="name one of them") as error:
        teacher_prompt.teacher_prompt(row, None, after)
    assert repr(after) in str(error.value)


@pytest.mark.parametrize(
    "expression, said",
    [
        ("(12 + 3) * -4", "-60"),
        ("7 / 2", "3.5"),
        ("111111 * 1000001", "111111111111"),
        ("1 / 0", "This cannot be calculated: division by zero."),
        ("__import__('os')", "This cannot be calculated: only numbers, +, -, *, / and parentheses are known."),
        ("9 ** 99999999", "This cannot be calculated: only numbers, +, -, *, / and parentheses are known."),
    ],
)
def test_the_calculator(expression, said):
    assert calculate(expression) == said


def test_the_calculator_refuses_what_is_long_and_what_is_no_expression():
    assert calculate("1" * 300).endswith("it has more than 200 characters.")
    assert calculate("12 apples").startswith("This cannot be calculated: ")
    assert calculate("(" * 150).startswith("This cannot be calculated: ")
