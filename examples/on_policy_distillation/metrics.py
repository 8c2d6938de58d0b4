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
"""The metrics that VERL's file logger leaves in FOLDER/metrics, one file for each time the trainer was started."""

import json
from pathlib import Path


def metric_files(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted((folder / "metrics").glob("*.jsonl"))


def next_metric_file(folder: Path) -> Path:
    """Where the next start of the trainer is to log: VERL truncates its file, so each start has one of its own."""
    (folder / "metrics").mkdir(exist_ok=True, parents=True)
    return folder / "metrics" / f"{len(metric_files(folder)):04d}.jsonl"


def read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """Metrics by step. A last line that is still being written is left for later."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return {record["step"]: record["data"] for record in records}


def read_run(folder: Path) -> dict[int, dict[str, float]]:
    """Metrics by step over every start of the run; a step that was done again counts as it was done last."""
    steps: dict[int, dict[str, float]] = {}
    for path in metric_files(folder):
        steps.update(read_metrics(path))
    return dict(sorted(steps.items()))


def accuracy(metrics: dict[str, float]) -> float | None:
    """Held-out accuracy, on the steps that validated."""
    return next((value for name, value in metrics.items() if name.startswith("val-core/")), None)
