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
"""The metrics that VERL's loggers leave: in FOLDER/metrics, a file for each start of the trainer; or on its console."""

import json
import math
import re
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

StepMetrics = dict[str, float | None]  # the logger writes NaN and infinity as null

# VERL's main number for each data source it validates on; a data source may have slashes of its own.
MEAN_SCORE = re.compile(r"val-core/(?P<data_source>.*)/(?P<metric>acc|reward)/(?P<mean>mean@\d+)")


# What VERL's console logger prints of a step, after what Ray puts before it.
CONSOLE_LINE = re.compile(r"(?:^|\s)step:(?P<step>\d+) - (?P<metrics>\S.*)")
CONSOLE_NUMBER = re.compile(r"(?:np\.\w+\()?(?P<number>[-+\w.]+)\)?")


def metric_files(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted((folder / "metrics").glob("*.jsonl"))


def next_metric_file(folder: Path) -> Path:
    """Where the next start of the trainer is to log: VERL truncates its file, so each start has one of its own."""
    (folder / "metrics").mkdir(exist_ok=True, parents=True)
    return folder / "metrics" / f"{len(metric_files(folder)):04d}.jsonl"


def json_object(line: bytes, path: Path, number: int, kind: str) -> dict[str, Any]:
    """Line `number` of `path`, which is to be a file of the `kind` that errors name."""
    try:
        value = json.loads(line)
    except ValueError as error:  # of JSON, or of UTF-8
        raise ValueError(f"{path}, line {number}: cut off, or the file is no {kind} ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}, line {number}: no JSON object, so the file is no {kind}")
    return value


def step_and_metrics(line: bytes, path: Path, number: int) -> tuple[int, StepMetrics]:
    record = json_object(line, path, number, "metrics file of VERL")
    step, data = record.get("step"), record.get("data")
    if not isinstance(step, int) or not isinstance(data, dict):
        raise ValueError(
            f"{path}, line {number}: a metrics file of VERL has 'step' and 'data' on each line, not "
            f"{reprlib.repr(list(record))}"
        )
    return step, data


def read_metrics(path: Path) -> dict[int, StepMetrics]:
    """Metrics by step. A last line that is still being written is left for later."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return dict(step_and_metrics(line, path, number) for number, line in enumerate(lines, 1))


def console_number(text: str) -> float | None:
    """None for what is not finite, as in the other files, and for what is no number, such as True."""
    match = CONSOLE_NUMBER.fullmatch(text)
    try:
        number = float(match["number"] if match else text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def read_console(path: Path) -> dict[int, StepMetrics]:
    """Metrics by step, of a trainer's output that somebody kept; empty if its console logger was off."""
    steps: dict[int, StepMetrics] = {}
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        if match := CONSOLE_LINE.search(line):
            pairs = (part.rpartition(":") for part in match["metrics"].split(" - "))
            steps[int(match["step"])] = {name: console_number(text) for name, _, text in pairs if name}
    return steps


def read_run(folder: Path) -> dict[int, StepMetrics]:
    """Metrics by step over every start of the run; a step that was done again counts as it was done last."""
    steps: dict[int, StepMetrics] = {}
    for path in metric_files(folder):
        steps.update(read_metrics(path))
    return dict(sorted(steps.items()))


def mean_scores(names: Iterable[str]) -> dict[str, re.Match[str]]:
    """Those of the metrics `names` that are a data source's mean score on held-out problems."""
    matches = ((name, MEAN_SCORE.fullmatch(name)) for name in names)
    return {name: match for name, match in matches if match}


def accuracy(metrics: StepMetrics) -> float | None:
    """Held-out accuracy of the first data source, on the steps that validated. The quickstart has one data source."""
    return next((metrics[name] for name in mean_scores(metrics)), None)
