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
"""Turns VERL runs of on-policy distillation into one HTML page with pictures, which needs no other file.

    python report.py --out report.html [NAME=]RUN ... [--generations TITLE=FILE ...]

RUN is what VERL's loggers left of a run: the metrics file of trainer.logger=[file], the trainer's output with
trainer.logger=[console], kept in a file, or a folder with metrics/*.jsonl as the quickstart leaves one. Any run of the
two distillation losses will do, and runs without a teacher for comparison; a picture shows the runs that have its
metrics, and the page says which pictures no run has the metrics for. Needs jinja2 and pandas, which come with VERL, and
matplotlib.

NAME and TITLE are by default the folder's name, or the file's without .jsonl. Each must be given once.

Each FILE has one JSON object a line, one line a sequence, and becomes a paragraph of coloured tokens. This is what
`generations.py` writes, and what the trainer writes every `teacher.dump_freq` steps:

    {"prompt": str,
     "tokens": [str, ...],                       the response, token by token
     "kl": [float, ...],                         KL(student || teacher) in nats, where each token was chosen; NaN
                                                 and Infinity, which Python writes and reads, are shown as the worst
     "teacher_top": [[[str, float], ...], ...],  for each token, the teacher's most likely ones and their probabilities
     "student_top": [[[str, float], ...], ...],  the same of the student
     "score": float or null}

The lists have one entry for each token; an entry other than a token is null where the token is not in the loss.
"""

import argparse
import base64
import io
import math
import reprlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from metrics import StepMetrics, json_object, mean_scores, read_console, read_metrics, read_run

KEEP_METRICS = (
    "start the run with 'trainer.logger=[console,file]', and give the metrics file that VERL writes then, "
    "<trainer.project_name>/<trainer.experiment_name>.jsonl where it was started, or VERL_FILE_LOGGER_PATH; or give "
    "the trainer's output, kept in a file"
)
NEEDS = "report.py needs {0}, which is not installed: pip install {0}"

try:
    import jinja2
    import pandas
except ImportError as error:
    sys.exit(NEEDS.format(error.name))

Metrics = dict[int, StepMetrics]  # by step

TEMPLATE = Path(__file__).resolve().with_name("report.html.jinja")
# From timing_s/ of VERL, in the order of a step. What is left of a step is shown as "other".
PHASES = (
    "gen",
    "reward",
    "old_log_prob",
    "ref",
    "values",
    "adv",
    "teacher",
    "update_critic",
    "update_actor",
    "update_weights",
    "save_checkpoint",
)
# What VERL's main validation metric is called in a title. Without an accuracy it is the reward.
SCORE_NAMES = {"acc": "accuracy", "reward": "reward"}


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def named_paths(arguments: list[str]) -> dict[str, Path]:
    """Of arguments `NAME=PATH` or `PATH`; without a name it is the folder's or the file's own."""
    paths: dict[str, Path] = {}
    for argument in arguments:
        name, path = split_name(argument)
        name = name or (path.name if path.is_dir() else path.stem)
        if name in paths:
            raise ValueError(f"{paths[name]} and {path} are both named {name!r}: name them, NAME=PATH")
        paths[name] = path
    return paths


def split_name(argument: str) -> tuple[str, Path]:
    """The name, empty if there is none, and the path. Hydra's folders have "=" in their names, so a path may, too."""
    name, equals, path = argument.partition("=")
    if not equals or Path(argument).exists():
        return "", Path(argument)
    if not Path(path).exists():
        raise ValueError(f"{argument}: there is neither {argument} nor {path}")
    return name, Path(path)


def read_file_or_folder(path: Path) -> Metrics:
    try:
        run = read_run(path) if path.is_dir() else read_console(path) or read_metrics(path)
    except ValueError as error:
        raise ValueError(f"{error}; {KEEP_METRICS}") from None
    if not run:
        raise ValueError(f"{path} has no metrics: {KEEP_METRICS}")
    return run


def column(run: Metrics, key: str) -> pandas.Series:
    """Values by step, of the steps that have one. A value that was not finite is a nan, so that a line has a gap."""
    return pandas.Series({step: metrics[key] for step, metrics in run.items() if key in metrics}, dtype=float)


def phase_seconds(run: Metrics) -> dict[str, float]:
    """Mean seconds a step of each phase; empty for a run without timings."""
    steps = column(run, "timing_s/step")
    if steps.empty:
        return {}
    seconds = {phase: column(run, f"timing_s/{phase}").sum() / len(steps) for phase in PHASES}
    seconds["other"] = max(0.0, steps.mean() - sum(seconds.values()))
    return {phase: value for phase, value in seconds.items() if value > 0}


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def is_number_or_null(value: Any) -> bool:
    return value is None or is_number(value)


def is_top_or_null(value: Any) -> bool:
    return value is None or is_list(value, is_token_and_probability)


def is_token_and_probability(value: Any) -> bool:
    return is_list(value) and len(value) == 2 and is_text(value[0]) and is_number(value[1])


def is_list(value: Any, is_entry: Callable[[Any], bool] = lambda _: True) -> bool:
    return isinstance(value, list) and all(map(is_entry, value))


# The format above: for each field, what its value must be.
DUMP_FIELDS: dict[str, Callable[[Any], bool]] = {
    "prompt": is_text,
    "tokens": partial(is_list, is_entry=is_text),
    "kl": partial(is_list, is_entry=is_number_or_null),
    "teacher_top": partial(is_list, is_entry=is_top_or_null),
    "student_top": partial(is_list, is_entry=is_top_or_null),
    "score": is_number_or_null,
}
TOKEN_FIELDS = ("tokens", "kl", "teacher_top", "student_top")  # those that have one entry for each token


def check_record(record: dict[str, Any], where: str) -> None:
    for field, is_right in DUMP_FIELDS.items():
        if field not in record:
            raise ValueError(f"{where}: {field} is missing, so the file is no token dump")
        if not is_right(record[field]):
            raise ValueError(
                f"{where}: {field} is {reprlib.repr(record[field])}, which is not what a token dump has there; "
                "report.py --help shows the format"
            )
    lengths = {field: len(record[field]) for field in TOKEN_FIELDS}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{where}: one entry for each token is wanted, not {lengths}")


def read_generations(path: Path) -> list[dict[str, Any]]:
    lines = path.read_bytes().split(b"\n")
    if not lines[-1]:  # what follows the end of the last line
        lines.pop()
    records = []
    for number, line in enumerate(lines, 1):
        records.append(json_object(line, path, number, "token dump"))
        check_record(records[-1], f"{path}, line {number}")
    return records


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def import_pyplot():
    """matplotlib.pyplot, drawing to files."""
    try:
        import matplotlib
    except ImportError:
        sys.exit(NEEDS.format("matplotlib"))
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "report"  # the same picture from the same numbers
    import matplotlib.pyplot as pyplot

    return pyplot


class Picture(NamedTuple):
    title: str
    metrics: tuple[str, ...]  # what it shows: one of them is enough to draw it
    draw: Callable[..., None]  # onto (axes, runs)


def has_numbers(runs: dict[str, Metrics], metrics: tuple[str, ...]) -> bool:
    return any(column(run, key).abs().lt(math.inf).any() for run in runs.values() for key in metrics)


def image(picture: Picture, runs: dict[str, Metrics]) -> tuple[str, str]:
    """The title, and the SVG in base64."""
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    picture.draw(axes, runs)
    axes.set_title(picture.title)
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return picture.title, base64.b64encode(content.getvalue()).decode()


def draw_lines(axes, runs: dict[str, Metrics], styles: dict[str, str], label: str, scale: str) -> None:
    """`styles`: line style by metric. A run has the same colour in every picture, whatever it lacks."""
    lines: dict[str, Any] = {}
    for number, (name, run) in enumerate(runs.items()):
        for key, style in styles.items():
            values = column(run, key)
            if not values.empty:
                [line] = axes.plot(values, style, color=f"C{number}", markersize=3)
                lines.setdefault(name, line)
    axes.set_yscale(scale)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend(lines.values(), lines.keys())


def draw_phases(axes, runs: dict[str, Metrics]) -> None:
    seconds = pandas.DataFrame({name: phase_seconds(run) for name, run in runs.items()}).reindex([*PHASES, "other"])
    seconds = seconds.dropna(how="all").dropna(how="all", axis="columns")
    seconds.T.plot.barh(ax=axes, stacked=True, width=0.8)
    axes.set_xlabel("seconds a step, mean")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))


def line_picture(title: str, styles: dict[str, str], label: str, scale: str = "linear") -> Picture:
    return Picture(title, tuple(styles), partial(draw_lines, styles=styles, label=label, scale=scale))


def held_out_pictures(runs: dict[str, Metrics]) -> list[Picture]:
    """One for each data source that a run was validated on."""
    names = (name for run in runs.values() for metrics in run.values() for name in metrics)
    found = []
    for key, match in mean_scores(names).items():
        data_source, metric, mean = match.groups()
        found.append(line_picture(f"Held-out {SCORE_NAMES[metric]}: {data_source}", {key: ".-"}, f"{metric}, {mean}"))
    return found or [line_picture("Held-out accuracy", {"val-core/<data source>/<metric>/mean@<n>": ".-"}, "")]


def all_pictures(runs: dict[str, Metrics]) -> list[Picture]:
    """Whether or not there are metrics for them."""
    kl, entropies = "KL(student || teacher), nats a token", "Entropy: student (line), teacher (dashes)"
    return [
        *held_out_pictures(runs),
        line_picture("KL on the student's own tokens", {"distillation/kl": ".-"}, kl, scale="log"),
        line_picture(
            entropies, {"distillation/student_entropy": "-", "distillation/teacher_entropy": "--"}, "nats a token"
        ),
        line_picture("Same most likely token", {"distillation/top1_agreement": ".-"}, "share of response tokens"),
        Picture("Time for each phase of a step", ("timing_s/step",), draw_phases),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------------------------------


def shown(token: str) -> str:
    """A token with all of it visible; its spaces are kept by the style."""
    return token.replace("\n", "↵").replace("\t", "⇥") or "∅"


def alternatives(side: str, top: list[list]) -> str:
    return f"{side}: " + ", ".join(f"{token!r} {probability:.1%}" for token, probability in top)


def redness(kl: float, worst: float) -> float:
    """0 to 1. What is not finite is as bad as can be."""
    if not math.isfinite(kl):
        return 1.0
    return min(1.0, max(0.0, kl / worst)) if worst > 0 else 0.0


def judged(record: dict[str, Any], worst: float) -> Iterator[tuple[str, float | None, str]]:
    """Of each token: itself, its redness (None for one that is not in the loss), and what to say about it."""
    for token, kl, *tops in zip(*(record[field] for field in TOKEN_FIELDS), strict=True):
        if kl is None or None in tops:
            yield token, None, "not in the loss"
        else:
            sides = map(alternatives, ("teacher", "student"), tops)
            yield token, redness(kl, worst), "\n".join([f"KL {kl:.4f}", *sides])


# ---------------------------------------------------------------------------------------------------------------------
# Page
# ---------------------------------------------------------------------------------------------------------------------


def page(runs: dict[str, Metrics], dumps: dict[str, list[dict[str, Any]]]) -> str:
    """The dumps stand side by side, with one scale of colour for all, so that before and after compare."""
    every_kl = [kl for records in dumps.values() for record in records for kl in record["kl"] if kl is not None]
    finite = list(filter(math.isfinite, every_kl))
    pictures = all_pictures(runs)
    drawn = [picture for picture in pictures if has_numbers(runs, picture.metrics)]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"shown": shown, "judged": judged}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        runs=runs,
        images=[image(picture, runs) for picture in drawn],
        missing=[picture for picture in pictures if picture not in drawn],
        dumps=dumps,
        worst=max(finite, default=0.0),
        not_finite=len(every_kl) - len(finite),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--generations", nargs="*", default=[], metavar="TITLE=FILE")
    arguments = parser.parse_args()
    try:
        runs = {name: read_file_or_folder(path) for name, path in named_paths(arguments.runs).items()}
        tokens = {title: read_generations(path) for title, path in named_paths(arguments.generations).items()}
    except (OSError, ValueError) as error:
        sys.exit(f"report.py: {error}")
    arguments.out.write_text(page(runs, tokens), encoding="utf-8")
    print(f"report:  {arguments.out}")


if __name__ == "__main__":
    main()
