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
"""Runs the trainer of an example: its output goes to a file, and of that only the lines that say how it goes are shown.

The lines are the trainer's own (``verl/on_policy_distillation/progress.py``). The trainer ends when this program does.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import TextIO

from metrics import next_metric_file

POLL_SECONDS = 0.5
SECONDS_TO_END = 30.0  # for a trainer that was asked to; Ray has processes of its own to stop
LINES_SHOWN_ON_FAILURE = 40
# Ray's name of the process is before what the trainer says.
PROGRESS = re.compile(r"(?:\(\w+ pid=[^)]*\) )?(step +\d+/\d+   .*)")

# Set by the first signal to end. No threading.Event: a signal handler must not wait for a lock.
_ending = False


def overrides_of(machine: str) -> list[str]:
    """The lines of <machine>_overrides.txt, without its comments."""
    lines = (Path(__file__).resolve().parent / f"{machine}_overrides.txt").read_text().splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


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


def whole_lines(log: TextIO) -> list[str]:
    """Those written since the last call. A line that is still being written is left for later."""
    lines: list[str] = []
    while True:
        place = log.tell()
        line = log.readline()
        if not line.endswith("\n"):
            log.seek(place)
            return lines
        lines.append(line)


def follow(process: subprocess.Popen, log: TextIO, label: str) -> int:
    """Print what the trainer says in its `log` of how it goes, after `label`, until it ends. Returns its exit code."""
    while True:
        ended = process.poll() is not None  # asked first: what was said before the end is then still read
        for line in whole_lines(log):
            if said := PROGRESS.fullmatch(line.rstrip()):
                print(label + said[1], flush=True)
        exit_if_ending()
        if ended:
            return process.returncode
        time.sleep(POLL_SECONDS)


def train(folder: Path, command: list[str], environment: dict[str, str] | None = None, label: str = "") -> None:
    """Run the trainer `command` with its metrics and output in `folder`; exits with its last lines if it fails.

    However this function is left, the trainer has ended by then.
    """
    exit_if_ending()
    path = next_metric_file(folder)
    log_path = folder / "train.log"
    print(f"{label}training with VERL; its output is in {log_path} (the first step takes about a minute)", flush=True)
    environment = {
        **os.environ,
        **(environment or {}),
        "VERL_FILE_LOGGER_PATH": str(path.resolve()),
        "PYTHONUNBUFFERED": "1",  # a step is in the file when it is said
        "RAY_COLOR_PREFIX": "0",  # the file is no terminal
    }
    with open(log_path, "a") as output, open(log_path, errors="replace") as log:
        began = log.seek(0, os.SEEK_END)  # after what an earlier start said
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            code = follow(process, log, label)
        finally:
            stop(process)
    if code != 0:
        said = log_path.read_bytes()[began:].decode(errors="replace")
        print("".join(said.splitlines(keepends=True)[-LINES_SHOWN_ON_FAILURE:]))
        sys.exit(f"training failed with exit code {code}; the whole output is in {log_path}")
