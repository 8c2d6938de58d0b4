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
"""Runs the trainer and prints one line a step.

    python progress.py FOLDER STEPS -- COMMAND ...

The trainer's own output goes to FOLDER/train.log; its last lines are shown if it fails.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from metrics import accuracy, next_metric_file, read_metrics

POLL_SECONDS = 0.5
LINES_SHOWN_ON_FAILURE = 40


def step_line(step: int, steps: int, metrics: dict[str, float], seconds_left: float | None = None) -> str:
    parts = [f"step {step:3d}/{steps}"]
    if "distillation/kl" in metrics:
        parts.append(f"KL {metrics['distillation/kl']:.4f}")
    elif "critic/score/mean" in metrics:
        parts.append(f"reward {metrics['critic/score/mean']:.3f}")
    if "timing_s/step" in metrics:
        parts.append(f"{metrics['timing_s/step']:.1f} s")
    if accuracy(metrics) is not None:
        parts.append(f"held-out accuracy {accuracy(metrics):.1%}")
    if seconds_left is not None:
        parts.append(f"{clock(seconds_left)} left")
    return "   ".join(parts)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d} min"


def seconds_left(run: dict[int, dict[str, float]], step: int, steps: int) -> float | None:
    """What the steps after `step` will take if they take what those up to it took on average, validation included."""
    took = [
        metrics["timing_s/step"] + metrics.get("timing_s/testing", 0.0)
        for done, metrics in run.items()
        if done <= step and "timing_s/step" in metrics
    ]
    return (steps - step) * sum(took) / len(took) if took and step < steps else None


def follow(process: subprocess.Popen, path: Path, steps: int, label: str = "") -> int:
    """Print each step as it is logged, after `label`, until the trainer ends. Returns its exit code."""
    shown: set[int] = set()
    while True:
        ended = process.poll() is not None  # asked first: what was logged before the end is then still read
        run = read_metrics(path)
        for step, metrics in run.items():
            if step not in shown:
                print(label + step_line(step, steps, metrics, seconds_left(run, step, steps)), flush=True)
                shown.add(step)
        if ended:
            return process.returncode
        time.sleep(POLL_SECONDS)


def train(
    folder: Path, steps: int, command: list[str], environment: dict[str, str] | None = None, label: str = ""
) -> None:
    """Run the trainer `command` with its metrics and output in `folder`; exits with its last lines if it fails."""
    path = next_metric_file(folder)
    log_path = folder / "train.log"
    print(f"{label}training with VERL; its output is in {log_path} (the first step takes about a minute)", flush=True)
    environment = os.environ | (environment or {}) | {"VERL_FILE_LOGGER_PATH": str(path.resolve())}
    with open(log_path, "a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            code = follow(process, path, steps, label)
        except KeyboardInterrupt:
            process.wait()
            raise
    if code != 0:
        print("".join(log_path.read_text(errors="replace").splitlines(keepends=True)[-LINES_SHOWN_ON_FAILURE:]))
        sys.exit(f"training failed with exit code {code}; the whole output is in {log_path}")


def main() -> None:
    folder, steps, separator, *command = sys.argv[1:]
    if separator != "--":
        sys.exit(__doc__)
    train(Path(folder), int(steps), command)


if __name__ == "__main__":
    main()
