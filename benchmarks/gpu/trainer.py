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
"""VERL's trainer with Ray on the device: a few steps of the quickstart, whose KL has to be finite and to fall.

Models, data and what is said to the trainer are those of examples/on_policy_distillation/quickstart.py; a row for each
step has its KL and the seconds of its phases. It is there soon after the step, as are the last lines of the trainer's
log: what is killed at its time limit writes nothing more, and its folder is a temporary one. The models are made on a
processor, in about a minute.

A dry run trains nothing. It composes the trainer's configuration for each machine that the quickstart knows, and has
the checks of a start go over it.
"""

import math
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import record

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "on_policy_distillation"
STEPS = 4
OVERRIDES = [  # training alone: the held-out problems and the checkpoints are the quickstart's
    f"trainer.total_training_steps={STEPS}",
    "trainer.val_before_train=False",
    "trainer.test_freq=-1",
    "trainer.save_freq=-1",
]
SECONDS = "timing_s/"
POLL_SECONDS = 1.0
LOG_LINES = 40


def compose_only(step: record.Record, folder: Path) -> None:
    """A row for each machine."""
    import quickstart
    from arithmetic import tiny_model
    from hydra import compose, initialize_config_module

    from verl.on_policy_distillation import checks, hydra_source

    for name in ("base", "teacher"):
        tiny_model(folder / name)
    hydra_source.install()
    for machine in quickstart.MACHINES:
        arguments = [*quickstart.overrides(folder, machine), *OVERRIDES]
        checks.refuse_misspelt_overrides(arguments)
        with initialize_config_module("verl.trainer.config", version_base=None):
            config = compose("ppo_trainer", overrides=arguments)
        checks.prepare(config)
        said = {"steps": config.trainer.total_training_steps, "rollout": config.actor_rollout_ref.rollout.name}
        step.add(machine=machine, loss=config.actor_rollout_ref.actor.policy_loss.loss_mode, **said)


def train(step: record.Record, folder: Path) -> None:
    import arithmetic
    import quickstart

    step.note(machine_overrides=quickstart.this_machine(), models=arithmetic.make(folder))
    with recorded(step, folder):
        quickstart.run(folder, OVERRIDES)


@contextmanager
def recorded(step: record.Record, folder: Path) -> Iterator[None]:
    """In the meantime `record_so_far` again and again, and once more at the end, however that comes."""
    ended = threading.Event()

    def follow() -> None:
        is_last = False
        while not is_last:
            is_last = ended.wait(POLL_SECONDS)  # asked first: what was logged before the end is then still read
            record_so_far(step, folder)

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def record_so_far(step: record.Record, folder: Path) -> None:
    """A row for each step that has none yet, and the last lines of the trainer's log."""
    from metrics import read_run

    log = folder / "train.log"
    lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:] if log.exists() else []
    if lines != step.facts.get("log_last_lines", []):
        step.note(log_last_lines=lines)
    recorded_steps = {row["step"] for row in step.facts["rows"]}
    for number, found in read_run(folder).items():
        if number not in recorded_steps:
            phases = {name.removeprefix(SECONDS): value for name, value in found.items() if name.startswith(SECONDS)}
            step.add(step=number, kl=found.get("distillation/kl"), phases=phases)


def require_falling(kls: Sequence[float | None]) -> None:
    """Ends the process where a step has no finite KL, or the last is not below the first."""
    numbers = [kl for kl in kls if kl is not None and math.isfinite(kl)]  # the logger writes what is not finite as null
    if len(numbers) < STEPS or len(numbers) < len(kls) or numbers[-1] >= numbers[0]:
        raise SystemExit(f"the KL has to be finite in {STEPS} steps, and to fall: {list(kls)}")


def main() -> None:
    step = record.of_arguments(__doc__)
    step.require_verl()
    sys.path.insert(0, str(EXAMPLE))
    with tempfile.TemporaryDirectory() as name:
        if step.is_dry_run:
            compose_only(step, Path(name))
            return
        train(step, Path(name))
    require_falling([row["kl"] for row in step.facts["rows"]])


if __name__ == "__main__":
    main()
