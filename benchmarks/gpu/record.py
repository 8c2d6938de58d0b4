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
"""What every step of benchmarks/gpu shares: arguments, device, JSON; and, as a script, the machine's facts."""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NoReturn

import linear_divergence
import torch

VERL_NEEDED = "VERL is not installed: pip install 'verl[verl-core]>=0.9,<0.10'"


class Record:
    """The JSON of a step. It is written anew with every row, so that a step that is cut short leaves what it has.

    A step that is killed while it writes leaves what was there before: the file is replaced whole.
    """

    def __init__(self, path: Path, is_dry_run: bool):
        self._path, self.is_dry_run = path, is_dry_run
        self.device = "cpu" if is_dry_run else "cuda"
        self.facts: dict = {"rows": []}
        self._write()

    def choose(self, on_gpu, in_dry_run):
        """Sizes that differ."""
        return in_dry_run if self.is_dry_run else on_gpu

    def note(self, **facts) -> None:
        self.facts |= facts
        self._write()

    def add(self, **row) -> None:
        self.facts["rows"].append(row)
        print(json.dumps(row), flush=True)
        self._write()

    def _write(self) -> None:
        part = self._path.with_name(f".{self._path.name}.part")
        part.write_text(json.dumps(self.facts, indent=1) + "\n")
        part.replace(self._path)

    def require_verl(self) -> None:
        """Ends the process without VERL, whose folder `verl` may still be there: this repository's. Imports nothing."""
        found = importlib.util.find_spec("verl")
        folders = found.submodule_search_locations if found else None
        if not any(Path(folder, "workers", "engine_workers.py").exists() for folder in folders or []):
            self._skip(VERL_NEEDED)

    def require(self, package: str) -> None:
        if importlib.util.find_spec(package) is None:
            self._skip(f"{package} is not installed: pip install {package}")

    def _skip(self, why: str) -> NoReturn:
        self.note(skipped=why)
        sys.exit(0)

    def require_all(self, fact: str) -> None:
        """Fails where a row's `fact` is false."""
        if wrong := [row for row in self.facts["rows"] if row.get(fact) is False]:
            raise SystemExit(f"{len(wrong)} of {len(self.facts['rows'])} rows are wrong: {wrong[:3]}")


def of_arguments(description: str) -> Record:
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    return Record(options.out, options.dry_run)


def seconds_of(call: Callable[[], object], device: str, repeats: int) -> float:
    """The median of `repeats` calls after one that is not counted."""
    call()
    seconds = []
    for _ in range(repeats):
        with linear_divergence.meter(device) as measured:
            call()
        seconds.append(measured.seconds)
    return statistics.median(seconds)


def machine() -> dict:
    has_cuda = torch.cuda.is_available()
    facts = linear_divergence.machine("cuda" if has_cuda else "cpu", torch.get_num_threads())
    facts["triton"] = next((found.version for found in metadata.distributions(name="triton")), None)
    facts["driver"] = None
    if has_cuda:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        facts["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    return facts


if __name__ == "__main__":
    print(json.dumps(machine()))
