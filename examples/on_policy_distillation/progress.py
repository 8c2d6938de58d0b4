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

The trainer's own output goes to FOLDER/train.log; its last lines are shown if it fails. The trainer ends when this
program is ended.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from metrics import StepMetrics, mean_scores, next_metric_file, read_metrics

POLL_SECONDS = 0.5
SECONDS_TO_END = 30.0  # for a trainer that was asked to; Ray has processes of its own to stop
LINES_SHOWN_ON_FAILURE = 40

# Set by the first signal to end. No threading.Event: a signal handler must not wait for a lock.
_ending = False


def overrides_of(machine: str) -> list[str]:
    """The lines of <machine>_overrides.txt, without its comments."""
    lines = (Path(__file__).resolve().parent / f"{machine}_overrides.txt").read_text().splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def step_line(step: int, steps: int, metrics: StepMetrics, seconds_left: float | None = None) -> str:
    parts = [f"step {step:3d}/{steps}"]
    if "distillation/kl" in metrics:
        parts.append(f"KL {number(metrics['distillation/kl'], '.4f')}")
    elif "critic/score/mean" in metrics:
        parts.append(f"reward {number(metrics['critic/score/mean'], '.3f')}")
    if "timing_s/step" in metrics:
        parts.append(f"{number(metrics['timing_s/step'], '.1f')} s")
    if scores := held_out(metrics):
        parts.append(f"held-out accuracy {scores}")
    if seconds_left is not None:
        parts.append(f"{clock(seconds_left)} left")
    return "   ".join(parts)


def number(value: float | None, form: str) -> str:
    """`value` as text; one that was not finite reads as nan, as the logger does not say which it was."""
    return "nan" if value is None else format(value, form)


def held_out(metrics: StepMetrics) -> str:
    """The accuracy of each data source that was validated on; they are named if there are several."""
    scores = {match["data_source"]: number(metrics[name], ".1%") for name, match in mean_scores(metrics).items()}
    if len(scores) == 1:
        return "".join(scores.values())
    return ", ".join(f"{data_source} {score}" for data_source, score in scores.items())


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d} min"


def seconds_left(run: dict[int, StepMetrics], step: int, steps: int) -> float | None:
    """What the steps after `step` will take if they take what those up to it took on average, validation included."""
    took = [
        seconds + (metrics.get("timing_s/testing") or 0.0)
        for done, metrics in run.items()
        if done <= step and (seconds := metrics.get("timing_s/step")) is not None
    ]
    return (steps - step) * sum(took) / len(took) if took and step < steps else None


def end_with_trainers() -> None:
    """Have Ctrl-C and SIGTERM end this program and, whichever threads wait for them, its trainers.

    For a program to call in its main thread, before it trains; elsewhere Python does not take signal handlers.
    """
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(signal_number) is not signal.SIG_IGN:  # a shell's background job ignores Ctrl-C
            signal.signal(signal_number, _end)


def _end(signal_number: int, _frame: FrameType | None) -> None:
    """Only the first signal does anything: waiting for the trainers is not to be cut short by another."""
    global _ending
    if not _ending:
        _ending = True
        sys.exit(128 + signal_number)


def exit_if_ending() -> None:
    """The exception of `_end` reaches the main thread alone; here the others join it."""
    if _ending:
        sys.exit("ended by a signal")


def stop(process: subprocess.Popen) -> None:
    """End `process` and wait for it; nothing if it has ended."""
    process.terminate()
    try:
        process.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


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
        exit_if_ending()
        if ended:
            return process.returncode
        time.sleep(POLL_SECONDS)


def train(
    folder: Path, steps: int, command: list[str], environment: dict[str, str] | None = None, label: str = ""
) -> None:
    """Run the trainer `command` with its metrics and output in `folder`; exits with its last lines if it fails.

    However this function is left, the trainer has ended by then.
    """
    exit_if_ending()
    path = next_metric_file(folder)
    log_path = folder / "train.log"
    print(f"{label}training with VERL; its output is in {log_path} (the first step takes about a minute)", flush=True)
    environment = os.environ | (environment or {}) | {"VERL_FILE_LOGGER_PATH": str(path.resolve())}
    with open(log_path, "a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            code = follow(process, path, steps, label)
        finally:
            stop(process)
    if code != 0:
        print("".join(log_path.read_text(errors="replace").splitlines(keepends=True)[-LINES_SHOWN_ON_FAILURE:]))
        sys.exit(f"training failed with exit code {code}; the whole output is in {log_path}")


def main() -> None:
    folder, steps, separator, *command = sys.argv[1:]
    if separator != "--":
        sys.exit(__doc__)
    end_with_trainers()
    train(Path(folder), int(steps), command)


if __name__ == "__main__":
    main()
