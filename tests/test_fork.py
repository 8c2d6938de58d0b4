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
"""A fork is a VERL too: 30 edits of its own in the files that training runs through, then both ways in."""

import importlib.util
import shutil
import sys

import pytest
from conftest import ROOT, copy_unpatched_verl
from environments import run, succeed
from fork import EDITS, RENAMED, make_fork

BUILD_THE_TRAINER = """
import sys
import verl
from hydra import compose, initialize_config_dir
from verl.on_policy_distillation import doctor, hydra_source
from verl.on_policy_distillation.trainer import with_teacher
from verl.trainer.ppo.v1 import get_trainer_cls

if not doctor.is_patched():
    hydra_source.install()
with initialize_config_dir(config_dir=f"{doctor.verl_folder()}/trainer/config", version_base=None):
    config = compose("ppo_trainer", overrides=[
        "actor_rollout_ref.actor.policy_loss.loss_mode=on_policy_distillation", "teacher.model.path=teacher",
    ])
trainer = with_teacher(get_trainer_cls("sync"), config)
assert issubclass(trainer, get_trainer_cls("sync"))
print("patched" if doctor.is_patched() else "beside", verl.__file__)
sys.exit(doctor.main([]))
"""


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """A folder with VERL as a fork has it."""
    folder = tmp_path_factory.mktemp("fork")
    copy_unpatched_verl(folder)
    edits = make_fork(folder)
    assert len(edits) == 30 and sum(f" is {RENAMED}" in edit for edit in edits) >= 8, edits
    assert len(set(edits)) >= 25, edits  # in many places
    return folder


def test_the_edits_are_where_training_runs(fork):
    original = importlib.util.find_spec("verl").submodule_search_locations[0]
    for name, count in EDITS.items():
        lines = (fork / name).read_text().splitlines()
        unedited = set(open(f"{original}/{name.removeprefix('verl/')}").read().splitlines())
        assert len([line for line in lines if line not in unedited]) >= count


def test_beside_a_fork(fork):
    before = {name: (fork / name).read_bytes() for name in EDITS}
    done = run(sys.executable, "-c", BUILD_THE_TRAINER, cwd="/", PYTHONPATH=fork, VERL_PLATFORM="cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"beside {fork}/verl/__init__.py" in done.stdout and done.stdout.count(" ok: ") == 5
    assert {name: (fork / name).read_bytes() for name in EDITS} == before


@pytest.mark.skipif(shutil.which("git") is None, reason="git, which applies the patch, is not installed")
def test_in_the_tree_of_a_fork(fork, tmp_path):
    shutil.copytree(fork / "verl", tmp_path / "verl", ignore=shutil.ignore_patterns("__pycache__"))
    succeed(ROOT / "apply_patch.sh", tmp_path, PYTHON=sys.executable, cwd="/")
    done = run(sys.executable, "-c", BUILD_THE_TRAINER, cwd="/", PYTHONPATH=tmp_path, VERL_PLATFORM="cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"patched {tmp_path}/verl/__init__.py" in done.stdout and done.stdout.count(" ok: ") == 5
