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
"""Trains in the quickstart's folder: what is said to VERL's trainer, and a line for each step.

    python quickstart.py FOLDER [HYDRA_OVERRIDE ...]

FOLDER holds what `arithmetic.py make` leaves there. The overrides come after the quickstart's own, so they win.
"""

import subprocess
import sys
from pathlib import Path

import torch
from progress import end_with_trainers, overrides_of, train

HERE = Path(__file__).resolve().parent
ACTOR = "actor_rollout_ref.actor"
# By machine, what its <machine>_overrides.txt wants in the environment beside it.
MACHINES = {
    "cpu": {"VERL_PLATFORM": "cpu"},
    "gpu": {},
    "gpu_without_vllm": {"VERL_USE_EXTERNAL_MODULES": "verl_on_policy_distillation,verl.plugin.cpu"},  # its rollout
}


def this_machine() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    has_vllm = subprocess.run([sys.executable, "-c", "import vllm"], capture_output=True).returncode == 0
    return "gpu" if has_vllm else "gpu_without_vllm"


def overrides(folder: Path, machine: str) -> list[str]:
    """All that is said to VERL's trainer: what depends on the machine, and only that, then the run."""
    return [
        *overrides_of(machine),
        f"{ACTOR}.policy_loss.loss_mode=on_policy_distillation",
        f"{ACTOR}.policy_loss.distillation_type=reverse_kl",
        f"teacher.model.path={folder}/teacher",
        f"actor_rollout_ref.model.path={folder}/base",
        f"data.train_files={folder}/train.parquet",
        f"data.val_files={folder}/test.parquet",
        "data.max_prompt_length=8",
        "data.max_response_length=4",
        "data.train_batch_size=256",
        "data.seed=0",
        "actor_rollout_ref.rollout.n=1",
        f"{ACTOR}.ppo_mini_batch_size=64",
        f"{ACTOR}.optim.lr=2e-4",
        f"reward.custom_reward_function.path={HERE}/arithmetic.py",
        "trainer.total_training_steps=15",
        "trainer.total_epochs=1000",  # the steps alone are to end it; by default 30 epochs do
        "trainer.test_freq=3",
        "trainer.save_freq=5",
        "trainer.max_actor_ckpt_to_keep=1",
        f"{ACTOR}.checkpoint.save_contents=[model,optimizer,extra,hf_model]",
        f"trainer.default_local_dir={folder}/checkpoints",
        "trainer.logger=[file]",
        "trainer.project_name=on_policy_distillation",
        "trainer.experiment_name=quickstart",
    ]


def run(folder: Path, more: list[str]) -> None:
    """Train with `more` overrides; metrics and output go to `folder`."""
    machine = this_machine()
    arguments = [*overrides(folder, machine), *more]
    command = [sys.executable, "-m", "verl.trainer.main_on_policy_distillation", *arguments]
    train(folder, command, MACHINES[machine])


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    folder, *more = sys.argv[1:]
    end_with_trainers()
    run(Path(folder).resolve(), more)


if __name__ == "__main__":
    main()
