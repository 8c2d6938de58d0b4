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
"""What the quickstart says to VERL's trainer. The run itself is too slow to be tested here; see test_trainer.py."""

import re
import subprocess
import sys

import pytest
import quickstart
from arithmetic import problems
from conftest import ROOT
from progress import PROGRESS, overrides_of

from verl.on_policy_distillation.progress import step_line


@pytest.mark.parametrize("machine", quickstart.MACHINES)
def test_what_depends_on_the_machine_comes_first_and_nothing_is_said_twice(machine, tmp_path):
    own = overrides_of(machine)
    assert own and all("=" in line and not line.startswith(("#", " ")) for line in own)
    said = quickstart.overrides(tmp_path, machine)
    assert said[: len(own)] == own
    keys = [line.partition("=")[0].lstrip("+") for line in said]
    assert len(set(keys)) == len(keys)
    assert f"teacher.model.path={tmp_path}/teacher" in said


def test_a_finished_run_takes_no_overrides(tmp_path):
    script = ROOT / "examples" / "on_policy_distillation" / "quickstart.sh"
    (tmp_path / "results.json").touch()
    done = subprocess.run([script, tmp_path, "data.seed=1"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        f"quickstart: {tmp_path} is finished, and data.seed=1 would have no effect: name another folder\n"
    )


def test_epochs_do_not_end_a_run_before_its_steps(tmp_path):
    taught, _ = problems()
    epochs = [line for line in quickstart.overrides(tmp_path, "cpu") if line.startswith("trainer.total_epochs=")]
    assert len(taught) // 256 * int(epochs[0].partition("=")[2]) >= 10_000


def test_a_run_has_what_the_machine_needs_and_the_user_s_overrides_last(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(quickstart, "train", lambda *arguments: trained.append(arguments))
    monkeypatch.setattr(quickstart, "this_machine", lambda: "gpu_without_vllm")
    quickstart.run(tmp_path, ["trainer.total_training_steps=4"])
    ((folder, command, environment),) = trained
    assert folder == tmp_path
    assert command[:3] == [sys.executable, "-m", "verl.trainer.main_on_policy_distillation"]
    assert command[3:] == [*quickstart.overrides(tmp_path, "gpu_without_vllm"), "trainer.total_training_steps=4"]
    assert "verl.plugin.cpu" in environment["VERL_USE_EXTERNAL_MODULES"]


PRINTED = re.compile(
    r"step +(?P<step>\d+)/15(?:   KL (?P<kl>[\d.]+)   (?P<seconds>[\d.]+) s)?"
    r"(?:   (?P<left>0:\d\d:\d\d) left)?(?:   held-out accuracy (?P<accuracy>[\d.]+)%)?"
)


@pytest.mark.parametrize("page", ["README.md", "examples/on_policy_distillation/README.md"])
def test_the_pages_show_the_lines_as_the_trainer_prints_them(page):
    lines = [line for line in (ROOT / page).read_text(encoding="utf-8").splitlines() if PROGRESS.fullmatch(line)]
    steps = [line for line in lines if "done; " not in line]
    assert steps
    for line in steps:
        said = PRINTED.fullmatch(line)
        metrics = {}
        if said["kl"]:
            metrics = {"distillation/kl": float(said["kl"]), "timing_s/step": float(said["seconds"])}
        if said["accuracy"]:
            metrics["val-core/task/acc/mean@1"] = float(said["accuracy"]) / 100
        hours, minutes, seconds = map(int, (said["left"] or "0:00:00").split(":"))
        left = 3600 * hours + 60 * minutes + seconds if said["left"] else None
        assert step_line(int(said["step"]), 15, metrics, left) == line
    if page == "README.md":
        assert lines[-1].startswith("step 15/15   done; the trained model: ")
