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
"""The kernel on a device: its tests, whole vocabularies of released models, and what compute-sanitizer says of it.

    kernel.py --three-rows DEVICE    launches it on three rows and ends, for compute-sanitizer

The truth is the one of tests/test_divergence_triton.py: the formulas in float64.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import record

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
SANITIZER = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
LAST_LINES = 12


def cases(vocab: int, rows: int):
    """(name, problem) of each divergence, over bfloat16 gradients as a student of that dtype has them."""
    import test_divergence_triton as tests

    for seed, (kind, beta) in enumerate(tests.KINDS):
        student, teacher = (tests.random_logits(rows, vocab, seed=2 * seed + side) for side in (0, 1))
        yield kind, tests.problem(student, teacher, kind, beta)


def three_rows(device: str) -> None:
    import test_divergence_triton as tests
    import torch

    for _, case in cases(vocab=5000, rows=3):
        tests.call(case, tests.Layout(torch.bfloat16), device)


def compare(step: record.Record, vocab: int, rows: int) -> None:
    """With float64: values to the bound of the tests, gradients to a rounding of their 16 bits beyond it."""
    import test_divergence_triton as tests
    import torch

    for kind, case in cases(vocab, rows):
        found = tests.call(case, tests.Layout(torch.bfloat16), step.device)
        truth = tests.truth(case.student, case.teacher, case.spec, case.temperatures.student, case.weights)
        pairs = zip(found, truth, strict=True)
        error = [((a.double() - b).abs() / b.abs().amax(-1, keepdim=True)).max().item() for a, b in pairs]
        factors = case.weights / case.temperatures.student
        row = {"vocab": vocab, "kind": kind, "value_error": error[0], "gradient_error": error[1]}
        try:
            tests.close(found, truth, torch.float32, factors, rounding=tests.ROUNDING[torch.bfloat16])
            step.add(**row, is_right=True)
        except AssertionError as problem:
            step.add(**row, is_right=False, problem=str(problem)[:200])


def run(step: record.Record, name: str, command: list[str], seconds: float, **variables: str) -> None:
    """A row for a command, right if it ends well and in time."""
    try:
        done = subprocess.run(
            command,
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        step.add(check=name, is_right=False, last_lines=[f"ran past {seconds} s"])
        return
    step.add(check=name, is_right=done.returncode == 0, last_lines=done.stdout.splitlines()[-LAST_LINES:])


def main() -> None:
    step = record.of_arguments(__doc__)
    rows = 4
    for vocab in step.choose((151936, 262144, 50257), (1025,)):
        compare(step, vocab, rows)
    chosen = step.choose("not interpreter", "no_rows")
    pytest = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(TESTS / "test_divergence_triton.py")]
    pytest += ["-k", chosen]
    if not step.is_dry_run and importlib.util.find_spec("xdist"):
        pytest += ["-n", "8"]  # they compile for most of their time
    # The tests choose the interpreter where they want it.
    run(step, "tests/test_divergence_triton.py", [sys.executable, *pytest], seconds=100, TRITON_INTERPRET="0")
    if SANITIZER and not step.is_dry_run:
        launch = [sys.executable, str(Path(__file__)), "--three-rows", step.device]
        run(step, "compute-sanitizer, three rows", [SANITIZER, "--error-exitcode", "9", *launch], seconds=50)
    step.require_all("is_right")


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))
    if sys.argv[1:2] == ["--three-rows"]:
        three_rows(sys.argv[2])
    else:
        main()
