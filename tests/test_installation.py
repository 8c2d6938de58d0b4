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
"""How the losses reach a VERL: by the patch, without any import of ours; or by pip, next to an unpatched one."""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, copy_unpatched_verl

NAMES = ("on_policy_distillation", "hybrid_rl_distillation")
LOSS_FROM_THE_REGISTRY = """
import torch
import verl
from verl.trainer.ppo.core_algos import get_policy_loss_fn
assert get_policy_loss_fn("hybrid_rl_distillation").__name__ == "compute_hybrid_rl_distillation_loss"
student, teacher = torch.zeros(1, 1, 4), torch.tensor([[[0.0, 0.0, -torch.inf, -torch.inf]]])
loss, _, kl, _ = get_policy_loss_fn("on_policy_distillation")(
    None, None, None, torch.ones(1, 1), "token-mean", {"distillation_type": "forward_kl"},
    teacher_logits=teacher, student_logits=student,
)
print(f"loss {loss.item():.6f} from {verl.__file__}")
"""


def python(*arguments, cwd=None, **environment):
    # An unpatched VERL has no CPU plugin, which conftest.py asks for.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("VERL_")}
    return subprocess.run(
        [sys.executable, *arguments], env=inherited | environment, cwd=cwd, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def unpatched(tmp_path_factory):
    """A folder for PYTHONPATH: an unpatched VERL, and what `pip install .` adds to it."""
    if shutil.which("git") is None:
        pytest.skip("git, which takes the patch back out of a copy of VERL, is not installed")
    folder = tmp_path_factory.mktemp("unpatched")
    copy_unpatched_verl(folder)
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "verl", source / "verl", ignore=shutil.ignore_patterns("__pycache__"))
    pip = ("-m", "pip", "--disable-pip-version-check", "-q", "install", "--no-deps", "--no-build-isolation")
    done = python(*pip, "--target", str(folder / "plugin"), str(source))
    assert done.returncode == 0, done.stderr
    shutil.copytree(folder / "plugin", folder, dirs_exist_ok=True)
    return folder


def test_a_patched_verl_has_the_losses_without_an_import_of_ours():
    done = python("-c", LOSS_FROM_THE_REGISTRY)
    assert "loss 0.693147" in done.stdout, done.stderr  # KL(uniform over 2 || uniform over 4) = log 2


def test_pip_install_adds_the_losses_to_an_unpatched_verl(unpatched):
    done = python("-c", LOSS_FROM_THE_REGISTRY, PYTHONPATH=str(unpatched))
    assert f"loss 0.693147 from {unpatched}" in done.stdout, done.stderr
    assert not (unpatched / "verl" / "trainer" / "ppo" / "distillation_setup.py").exists()


@pytest.mark.parametrize("name", NAMES)
def test_the_trainer_of_an_unpatched_verl_refuses_at_start(name, unpatched):
    done = python(
        *("-m", "verl.trainer.main_ppo", "actor_rollout_ref.actor.strategy=fsdp2"),
        f"actor_rollout_ref.actor.policy_loss.loss_mode={name}",
        PYTHONPATH=str(unpatched),
    )
    assert done.returncode != 0 and "ray init" not in done.stdout + done.stderr
    assert f"loss_mode={name} needs a teacher" in done.stderr and "apply_patch.sh" in done.stderr


def test_the_loss_tests_run_in_a_patched_checkout_without_pytest(tmp_path):
    (tmp_path / "pytest.py").write_text("raise ImportError('no pytest here')\n")
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (checkout / "verl").symlink_to(Path(importlib.util.find_spec("verl").origin).parent)
    start = time.monotonic()
    script = ROOT / "tests" / "test_on_policy_distillation.py"
    done = python(str(script), PYTHONPATH=str(tmp_path), cwd=checkout)
    assert done.returncode == 0 and "\n0 failed, " in f"\n{done.stdout}", done.stdout + done.stderr
    assert time.monotonic() - start < 60
