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


def step_line(step: int, steps: int, metrics: dict[str, float]) -> str:
    parts = [f"step {step:3d}/{steps}"]
    if "distillation/kl" in metrics:
        parts.append(f"KL {metrics['distillation/kl']:.4f}")
        parts.append(f"{metrics['timing_s/step']:.1f} s")
    if accuracy(metrics) is not None:
        parts.append(f"held-out accuracy {accuracy(metrics):.1%}")
    return "   ".join(parts)


def follow(process: subprocess.Popen, path: Path, steps: int) -> int:
    """Print each step as it is logged, until the trainer ends. Returns its exit code."""
    shown: set[int] = set()
    while True:
        ended = process.poll() is not None  # asked first: what was logged before the end is then still read
        for step, metrics in read_metrics(path).items():
            if step not in shown:
                print(step_line(step, steps, metrics), flush=True)
                shown.add(step)
        if ended:
            return process.returncode
        time.sleep(POLL_SECONDS)


def main() -> None:
    folder, steps, separator, *command = sys.argv[1:]
    if separator != "--":
        sys.exit(__doc__)
    folder = Path(folder)
    path = next_metric_file(folder)
    log_path = folder / "train.log"
    print(f"training with VERL; its output is in {log_path} (the first step takes about a minute)", flush=True)
    with open(log_path, "a") as log:
        environment = os.environ | {"VERL_FILE_LOGGER_PATH": str(path.resolve())}
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            code = follow(process, path, int(steps))
        except KeyboardInterrupt:
            process.wait()
            raise
    if code != 0:
        print("".join(log_path.read_text(errors="replace").splitlines(keepends=True)[-LINES_SHOWN_ON_FAILURE:]))
        sys.exit(f"training failed with exit code {code}; the whole output is in {log_path}")


if __name__ == "__main__":
    main()
