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
"""All that is measured on one GPU, step by step; each in a process of its own, with a time limit.

    benchmarks/gpu/run.sh [--steps NAME ...] [--out FOLDER] [--dry-run]

Each step leaves OUT/NAME.json: the machine, "status" (ok, failed, timeout, skipped), "seconds", "rows" as far as it
came, and where it did not end well the last lines of what it printed, and of its trainer's log. The next step goes on
whatever happened. The first four need torch and Triton alone, the others VERL. `--dry-run` runs everything at small
sizes on a processor, several at a time, and of the trainer its configuration: it shows that a step works, and its
numbers mean nothing.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
TAIL_LINES = 60  # of the output of a step that failed; progress.py alone shows 40 of a trainer that failed


@dataclass(frozen=True)
class Step:
    """A script that is called with --out FILE and --dry-run, and `limit`: the seconds that it gets."""

    name: str
    script: Path
    limit: float
    needs_verl: bool = False


# The four that do without VERL stay below ten minutes together, and so does each of the others.
STEPS = [
    Step(name, FOLDER / f"{name}.py", limit, needs_verl)
    for name, limit, needs_verl in (
        ("products", 30, False),
        ("kernel", 170, False),
        ("bandwidth", 150, False),
        ("head", 230, False),
        ("engine", 300, True),
        ("update", 420, True),
        ("trainer", 560, True),
    )
]


def environment(is_dry_run: bool, before: Sequence[Path] = ()) -> dict[str, str]:
    """Of a step: this tree's files are found where they are not installed, and a dry run sees no accelerator.

    before: folders for PYTHONPATH, ahead of all others.
    """
    inherited = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    chosen = {
        "PYTHONPATH": os.pathsep.join([*map(str, before), str(ROOT), str(ROOT / "benchmarks"), *inherited]),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if is_dry_run:
        chosen |= {"CUDA_VISIBLE_DEVICES": "", "VERL_PLATFORM": "cpu", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return {"VERL_USE_EXTERNAL_MODULES": "verl_on_policy_distillation"} | os.environ | chosen


def hide_verl(folder: Path) -> None:
    """Put a package `verl` into `folder` that is this repository's files alone, as where VERL is not installed."""
    (folder / "verl").mkdir()
    (folder / "verl" / "__init__.py").write_text(f"__path__ = [{str(ROOT / 'verl')!r}]\n")


def call(command: Sequence[str], limit: float, variables: dict[str, str]) -> tuple[str, str]:
    """("ok", "failed" or "timeout", the output); what the command has started ends with it."""
    process = subprocess.Popen(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=limit)
        status = "failed" if process.returncode else "ok"
    except subprocess.TimeoutExpired:
        end_group(process)
        output, _ = process.communicate()
        status = "timeout"
    end_group(process)
    return status, output


def end_group(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def machine(variables: dict[str, str]) -> dict:
    """As `record.py` reports it from a process that then ends: this one takes no memory of the device."""
    done = subprocess.run([sys.executable, FOLDER / "record.py"], env=variables, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"torch does not run here:\n{done.stderr}")
    return json.loads(done.stdout)


def run_step(step: Step, out: Path, facts: dict, variables: dict[str, str], is_dry_run: bool) -> dict:
    """What its JSON then holds."""
    path = out / f"{step.name}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, str(step.script), "--out", str(path), *(["--dry-run"] if is_dry_run else [])]
    started = time.perf_counter()
    status, output = call(command, step.limit, variables)
    seconds = round(time.perf_counter() - started, 1)
    found = json.loads(path.read_text()) if path.exists() else {"rows": []}
    log = found.pop("log_last_lines", None)
    if status == "ok" and "skipped" in found:
        status = "skipped"
    head = {"step": step.name, "status": status, "seconds": seconds, "limit_s": step.limit, "is_dry_run": is_dry_run}
    if status in ("failed", "timeout"):
        head["last_lines"] = output.splitlines()[-TAIL_LINES:]
        head |= {"log_last_lines": log} if log else {}
    found = head | {"machine": facts} | found
    path.write_text(json.dumps(found, indent=1) + "\n")
    return found


def run(steps: Sequence[Step], out: Path, is_dry_run: bool) -> bool:
    """Whether none failed."""
    out.mkdir(parents=True, exist_ok=True)
    facts = machine(environment(is_dry_run))
    if not is_dry_run and not facts["driver"]:
        raise SystemExit("there is no CUDA device: pass --dry-run to run the steps at small sizes on a processor")
    # In a dry run nothing is measured: as many at a time as there are cores. And what says that it does without VERL
    # has to, which is also quicker: an import of VERL takes longer than what these steps then do.
    at_a_time = len(os.sched_getaffinity(0)) if is_dry_run else 1
    results = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(at_a_time) as pool:
        hide_verl(Path(folder))

        def one(step: Step) -> dict:
            before = [Path(folder)] if is_dry_run and not step.needs_verl else []
            return run_step(step, out, facts, environment(is_dry_run, before), is_dry_run)

        for step, found in zip(steps, pool.map(one, steps), strict=True):
            results.append(found)
            said = found.get("skipped") or " | ".join(found.get("last_lines", [])[-1:])
            print(f"{step.name:10} {found['seconds']:7.1f} s  {found['status']}  {said[:200]}".rstrip(), flush=True)
    return all(found["status"] in ("ok", "skipped") for found in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [step.name for step in STEPS]
    parser.add_argument("--steps", nargs="+", choices=names, default=names, help="they run in their own order")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu, of a dry run .benchmarks/gpu")
    parser.add_argument("--dry-run", action="store_true", help="small sizes, on a processor")
    options = parser.parse_args()
    default = ROOT / ".benchmarks" / "gpu" if options.dry_run else ROOT / "benchmarks" / "results" / "gpu"
    steps = [step for step in STEPS if step.name in options.steps]
    sys.exit(not run(steps, options.out or default, options.dry_run))


if __name__ == "__main__":
    main()
