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
"""The documents: tables that are made from the code, links that lead somewhere, and what is said in one place only."""

import ast
import re
from dataclasses import fields
from functools import cache
from pathlib import Path

import make_batch_drawing
import make_config_reference
import pytest
import yaml
from arithmetic import tiny_model
from conftest import ROOT
from test_checks import make_config

import verl
from verl.on_policy_distillation import divergence
from verl.on_policy_distillation.checks import prepare
from verl.on_policy_distillation.config import DistillationLossConfig, TeacherConfig

DOCUMENTS = [ROOT / name for name in ("README.md", "ON_POLICY_DISTILLATION.md", "PATCH_README.md", "CONTRIBUTING.md")]
DOCUMENTS += [path for folder in ("docs", "examples", "benchmarks") for path in sorted((ROOT / folder).rglob("*.md"))]
DOCUMENTS += [path for path in [ROOT / "CHANGELOG.md"] if path.is_file()]


def leaves(group, prefix=""):
    """The keys of a YAML group, those of its subgroups with a point; a group without keys is one."""
    for key, value in group.items():
        if key not in ("defaults", "_target_"):
            yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [prefix + key]


def test_the_configuration_reference_is_what_the_code_says():
    text = make_config_reference.PAGE.read_text(encoding="utf-8")
    assert make_config_reference.build(text) == text, "run scripts/make_config_reference.py"


@pytest.mark.parametrize(("group", "config_class"), [("loss", DistillationLossConfig), ("teacher", TeacherConfig)])
def test_every_key_is_in_the_configuration_reference(group, config_class):
    page = make_config_reference.PAGE.read_text(encoding="utf-8")
    section = page.partition(f"<!-- {group}:begin -->")[2].partition(f"<!-- {group}:end -->")[0]
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.*) \|$", section, flags=re.MULTILINE))
    path, _ = make_config_reference.GROUPS[group]
    wanted = {*leaves(yaml.safe_load(path.read_text())), *(item.name for item in fields(config_class))} - {"_target_"}
    assert wanted <= set(rows)
    for item in fields(config_class):  # its default, as Python has it
        if isinstance(item.default, str | int | float) and not isinstance(item.default, bool) and item.name[0] != "_":
            assert f"| `{item.default}` |" in rows[item.name]


def test_a_key_without_a_meaning_and_a_refusal_of_no_key_are_errors(tmp_path):
    path, _ = make_config_reference.GROUPS["loss"]
    silent = tmp_path / "silent.yaml"
    silent.write_text(re.sub(r"# Softmax temperature.*\n", "", path.read_text()))
    with pytest.raises(make_config_reference.ReferenceError, match="no comment above.*distillation_temperature"):
        make_config_reference.table(silent, DistillationLossConfig)
    with pytest.raises(make_config_reference.ReferenceError, match="differ in"):
        make_config_reference.table(path, TeacherConfig)

    class Renamed(DistillationLossConfig):
        __doc__ = DistillationLossConfig.__doc__.replace("distillation_beta:", "distillation_gamma:")

    with pytest.raises(make_config_reference.ReferenceError, match="Refused.*distillation_gamma"):
        make_config_reference.table(path, Renamed)


def test_the_mathematics_of_the_guide_are_those_of_divergence_py():
    """The definitions and the table, line by line; the lines below and above its columns are drawn differently."""
    section = (ROOT / "ON_POLICY_DISTILLATION.md").read_text(encoding="utf-8").partition("\n## The divergences\n")[2]
    shown = [line for block in re.findall(r"^```\n(.*?)^```", section, re.M | re.S)[:2] for line in block.splitlines()]
    stated = [line.strip() for line in divergence.__doc__.splitlines()]
    ruled = [line.replace("-", "=") if not line.strip("- ") else line.strip() for line in shown]
    assert len(ruled) == 10
    assert [line for line in ruled if line not in stated] == []


def test_the_drawing_of_a_batch_is_that_of_its_description():
    assert make_batch_drawing.PICTURE.read_text(encoding="utf-8") == make_batch_drawing.build(), (
        "run scripts/make_batch_drawing.py"
    )


def test_files_and_functions_of_the_drawing_exist():
    shapes = (*make_batch_drawing.BOXES, *make_batch_drawing.ARROWS)
    named = re.findall(r"`([^`]+)`(?:: (\w+)\(\))?", "\n".join(line for shape in shapes for line in shape.lines))
    assert len(named) >= 15
    for name, function in named:
        ours = ROOT / "verl" / (name if "/" in name else f"on_policy_distillation/{name}")
        path = ours if ours.is_file() else Path(verl.__file__).parent / name
        assert path.is_file(), name
        assert not function or f"def {function}(" in path.read_text(encoding="utf-8"), (name, function)


def test_every_module_is_in_the_drawing_or_in_the_text_below_it():
    text = (ROOT / "ON_POLICY_DISTILLATION.md").read_text(encoding="utf-8").partition("\n## How a batch travels\n")[2]
    said = text.partition("\n## ")[0] + make_batch_drawing.build()
    modules = {path.name for path in (ROOT / "verl" / "on_policy_distillation").glob("*.py")} - {"__init__.py"}
    assert {name for name in modules if not re.search(rf"(?<![\w/]){re.escape(name)}", said)} == set()


@cache
def messages():
    """Every text that our code may say, as one string; what a program puts into it is left out."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "verl").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    return "\n".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


def test_the_messages_of_the_troubleshooting_page_are_those_of_the_code():
    """But for those of Python, Hydra and VERL, whose row says so."""
    text = (ROOT / "docs" / "TROUBLESHOOTING.md").read_text(encoding="utf-8")
    section = text.partition("\n## It does not start")[2].partition("\n## ")[0]
    first_cells = re.sub(r" \| .*", "", section)
    quoted = re.findall(r'"([^"\n]+)"( \((?:Python|Hydra|VERL)\))?', first_cells)
    parts = [part.strip() for quote, foreign in quoted if not foreign for part in quote.split("…")]
    assert len(quoted) >= 15
    assert [part for part in parts if part not in messages()] == []


def test_the_examples_of_the_guide_run_as_they_are_written():
    """In one go, as each goes on from the one before; but for the row of a data set, which is no program."""
    usage = (ROOT / "ON_POLICY_DISTILLATION.md").read_text(encoding="utf-8").partition("\n## Usage\n")[2]
    blocks = re.findall(r"^```python\n(.*?)^```", usage, re.MULTILINE | re.DOTALL)
    programs = [block for block in blocks if 'row["prompt"]' not in block]
    assert len(programs) == len(blocks) - 1 == 5
    names = {}
    for program in programs:
        exec(program, names)
    assert names["kl"] > 0 and names["output"].metrics["distillation/kl"] == pytest.approx(names["kl"].item())
    assert names["student_hidden"].grad.abs().sum() > 0 and names["result"].loss > 0


def configuration_examples():
    section = (ROOT / "PATCH_README.md").read_text(encoding="utf-8").partition("\n### Configuration examples\n")[2]
    return re.findall(r"^```\n(.*?)^```", section.partition("\n## ")[0], re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    student, teacher = tiny_model(folder / "student"), tiny_model(folder / "teacher", seed=1)
    return f"actor_rollout_ref.model.path={student}", f"teacher.model.path={teacher}"


def test_the_configuration_examples_pass_the_checks_at_start(models):
    found = []
    for example in configuration_examples():
        config = make_config(*models, *example.split())
        prepare(config)
        found.append(DistillationLossConfig.from_config(config.actor_rollout_ref.actor))
    assert [item.divergence.distillation_type for item in found[:3]] == ["reverse_kl", "forward_kl", "gkd"]
    assert [item.hybrid_lambda_distill_schedule for item in found[3:5]] == ["constant", "linear"]
    assert found[5].token_choice.keep_fraction == 0.5
    assert config.teacher.topk == 64


@cache
def anchors(path):
    """The names that GitHub gives to a document's headings."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document):
    broken = []
    for target in re.findall(r"\[[^]]*\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        if not path.exists() or anchor and anchor not in anchors(Path(path)):
            broken.append(target)
    assert broken == []


def test_the_readme_is_a_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130
