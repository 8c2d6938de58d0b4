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
"""The environment and the wheel are what the repository's files say."""

import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

import check_files
import pytest
import yaml
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import render  # noqa: E402

BOOTSTRAP = ROOT / "scripts" / "bootstrap.sh"
VENV = ROOT / ".venv"
NOT_THE_PROJECT = {".git", ".venv", "__pycache__", ".pytest_cache", ".ruff_cache", "build", "dist", "outputs", "runs"}
needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def run(*command, cwd=ROOT):
    # Without the ceiling git would take the repository's own work tree for the root when the copy lies in it.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(Path(cwd).resolve().parent)}
    return subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)


def succeed(*command, cwd=ROOT):
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def test_processes_of_the_environment_collect_garbage_less_often():
    assert succeed(sys.executable, "-c", "import gc; print(gc.get_threshold()[0])") == "20000\n"


def test_benchmark_tables_are_those_of_the_results():
    assert [path.name for path, text in render.rendered().items() if path.read_text(encoding="utf-8") != text] == []


def test_the_bars_are_those_of_the_results(monkeypatch):
    """Every number that the picture must show is in it, with the name of what it is of."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    render = importlib.import_module("render")
    results = render.Results(render.load("linear_divergence_cpu"))
    picture = (ROOT / "benchmarks" / "results" / "linear_divergence_bars.svg").read_text(encoding="utf-8")
    texts = Counter(re.findall(r">([^<>]+)</text>", picture))
    n = results.tokens[-1]
    medians = [
        (name, results.median(n, kind, name, field), scale)
        for kind in results.kinds
        for field, scale in (("seconds", 1.0), ("extra_bytes", 1e-6))
        for name in results.names
    ]
    wanted = [(name, value * scale) for name, value, scale in medians if value is not None]
    assert not Counter(render.number(value) for _, value in wanted) - texts
    assert not Counter(results.title(name) for name, _ in wanted) - texts
    assert len(wanted) > 20


def project_files():
    """Tracked files and untracked ones that are not ignored, relative to the root."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard") if shutil.which("git") else None
    if listed and listed.returncode == 0:
        names = [Path(name) for name in listed.stdout.split("\0") if name]
    else:
        names = [path.relative_to(ROOT) for path in ROOT.rglob("*")]
        names = [name for name in names if not NOT_THE_PROJECT & set(name.parts)]
    return [name for name in names if (ROOT / name).is_file()]


@pytest.mark.skipif(not (VENV / "bin" / "python").exists(), reason="no .venv in the repository")
def test_second_bootstrap_does_nothing_and_is_fast():
    # --check first: a run that has something to do would replace VERL under the tests that run now.
    done = run(BOOTSTRAP, "--check")
    assert done.returncode == 0, done.stderr
    before = {path: path.stat().st_mtime_ns for path in VENV.iterdir()}
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        assert succeed(BOOTSTRAP, cwd="/") == ""
        seconds.append(time.perf_counter() - start)
    # It takes about 0.02 s. The best of three, as the machine may be busy with something else.
    assert min(seconds) < 0.3
    assert {path: path.stat().st_mtime_ns for path in VENV.iterdir()} == before


def test_wheel_has_our_files_in_their_own_folder_and_the_entry_point(tmp_path):
    source = tmp_path / "source"
    for name in project_files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    succeed(*pip, "wheel", ".", "--no-deps", "--no-build-isolation", "-w", tmp_path / "wheels", cwd=source)
    [path] = (tmp_path / "wheels").glob("*.whl")
    ours = {name.as_posix() for name in project_files()}
    expected = {
        name.replace("verl/", "verl_on_policy_distillation/files/", 1) if name.startswith("verl/") else name: name
        for name in ours
        if name.startswith(("verl/", "verl_on_policy_distillation/"))
    }
    with zipfile.ZipFile(path) as wheel:
        files = {name for name in wheel.namelist() if ".dist-info/" not in name}
        assert files == set(expected)  # nothing in VERL's own folder
        for name in files:
            assert wheel.read(name) == (ROOT / expected[name]).read_bytes()
        wheel.extractall(tmp_path / "unpacked")
    [distribution] = importlib.metadata.distributions(path=[str(tmp_path / "unpacked")])
    [entry_point] = distribution.entry_points
    assert entry_point.group == "verl.plugins"
    assert entry_point.name == "on_policy_distillation"
    assert entry_point.value == "verl_on_policy_distillation"
    # VERL logs a failure here at DEBUG and goes on without the plugin, so nobody would see it.
    assert entry_point.load().__name__ == entry_point.value


def test_the_changelog_s_newest_version_is_the_package_s():
    numbers = re.findall(
        r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert f'\nversion = "{numbers[0]}"\n' in (ROOT / "pyproject.toml").read_text()
    assert numbers == sorted(numbers, key=lambda number: [int(part) for part in number.split(".")], reverse=True)


def test_files_have_licence_and_docstrings():
    names = [name.as_posix() for name in project_files() if name.suffix == ".py"]
    assert [line for name in names for line in check_files.complaints(name, (ROOT / name).read_text("utf-8"))] == []


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "verl/on_policy_distillation/a.py",
            f'{check_files.HOLDERS[1]}#\n{check_files.LICENCE}"""A."""\n',
            "no licence",
        ),
        ("examples/a.py", '"""A."""\n', "no licence"),
        ("tests/a.py", f"{check_files.HOLDERS[0]}#\n{check_files.LICENCE}A = 1\n", "no docstring of the module"),
        (
            "verl/on_policy_distillation/a.py",
            f'{check_files.HOLDERS[0]}#\n{check_files.LICENCE}"""A."""\n__all__ = ["f"]\n\n\ndef f():\n    pass\n',
            "no docstring of f",
        ),
        (
            "verl/on_policy_distillation/a.py",
            f'{check_files.HOLDERS[0]}#\n{check_files.LICENCE}"""A."""\nDEVICE = "cuda"\n',
            "ask verl/utils/device.py",
        ),
    ],
)
def test_what_a_file_lacks_is_said(name, text, said):
    [line] = check_files.complaints(name, text)
    assert line.startswith(name) and said in line


def test_every_hook_calls_a_file_that_is_here():
    [repository] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    entries = {hook["id"]: hook["entry"].split() for hook in repository["hooks"]}
    assert {"ruff", "ruff-format", "mypy"} <= set(entries)
    for tool, *arguments in entries.values():
        assert tool.startswith(".venv/bin/")
        assert all((ROOT / argument).is_file() for argument in arguments if argument.startswith("scripts/"))
    generators = {path.name for path in (ROOT / "scripts").glob("make_*.py")}
    assert generators <= {Path(argument).name for arguments in entries.values() for argument in arguments}


def test_the_workflow_runs_what_continuous_integration_calls():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert {"push", "pull_request"} <= set(workflow[True])  # YAML takes the key `on` for a truth value
    [job] = workflow["jobs"].values()
    [step] = [step for step in job["steps"] if "run" in step]
    assert step["run"] == ".ci/run" and (ROOT / ".ci" / "run").stat().st_mode & 0o100
    assert {"cache": "pip", "python-version": "3.12"}.items() <= job["steps"][1]["with"].items()


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_a_form_asks_for_something(name):
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert form["name"] and form["description"]
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids)) and any(field.get("validations", {}).get("required") for field in form["body"])
    assert all(field["attributes"]["label"] for field in form["body"])


def test_no_machine_path_or_registry_host_in_the_repository():
    # Put together here, so that this file does not have them.
    words = ["/wo" + "rk/", "pypi" + ".org", "pythonhosted" + ".org", "npmjs" + ".org"]
    forbidden = re.compile("|".join(rf"(?<![\w.]){re.escape(word)}" for word in words))
    found = []
    for name in project_files():
        text = (ROOT / name).read_bytes().decode("utf-8", "replace")
        found += [f"{name}:{text[: match.start()].count(chr(10)) + 1}" for match in forbidden.finditer(text)]
    assert found == []
