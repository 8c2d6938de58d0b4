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

RUN is a metrics file of VERL (trainer.logger=file, VERL_FILE_LOGGER_PATH=FILE), or a folder with metrics/*.jsonl as the
quickstart leaves one. Any run of the two distillation losses will do, and runs without a teacher for comparison; a
picture shows the runs that have its metrics, and the page says which pictures no run has the metrics for. The pictures
need matplotlib.

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
import html
import io
import math
import reprlib
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from metrics import StepMetrics, json_object, mean_scores, read_metrics, read_run

Metrics = dict[int, StepMetrics]  # by step

NEEDS_MATPLOTLIB = "report.py draws with matplotlib, which is not installed: pip install matplotlib"
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
    run = read_run(path) if path.is_dir() else read_metrics(path)
    if not run:
        raise ValueError(f"{path} has no metrics: give a metrics file of VERL, or a folder with metrics/*.jsonl")
    return run


def column(run: Metrics, key: str) -> tuple[list[int], list[float]]:
    """Steps and values, of the steps that have one. A value that was not finite is a nan, so that a line has a gap."""
    pairs = [(step, metrics[key]) for step, metrics in run.items() if key in metrics]
    return [step for step, _ in pairs], [math.nan if value is None else value for _, value in pairs]


def phase_seconds(run: Metrics) -> dict[str, float]:
    """Mean seconds a step of each phase; empty for a run without timings."""
    _, steps = column(run, "timing_s/step")
    if not steps:
        return {}
    seconds = {phase: sum(column(run, f"timing_s/{phase}")[1]) / len(steps) for phase in PHASES}
    seconds["other"] = max(0.0, statistics.fmean(steps) - sum(seconds.values()))
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


def check_record(record: dict[str, Any], where: str) -> None:
    for field, is_right in DUMP_FIELDS.items():
        if field not in record:
            raise ValueError(f"{where}: {field} is missing, so the file is no token dump")
        if not is_right(record[field]):
            raise ValueError(
                f"{where}: {field} is {reprlib.repr(record[field])}, which is not what a token dump has there; "
                "report.py --help shows the format"
            )
    lengths = {field: len(record[field]) for field in ("tokens", "kl", "teacher_top", "student_top")}
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
        sys.exit(NEEDS_MATPLOTLIB)
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "report"  # the same picture from the same numbers
    import matplotlib.pyplot as pyplot

    return pyplot


class Picture(NamedTuple):
    title: str
    metrics: tuple[str, ...]  # what it shows: one of them is enough to draw it
    draw: Callable[..., None]  # onto (axes, runs)


def has_numbers(runs: dict[str, Metrics], metrics: tuple[str, ...]) -> bool:
    return any(math.isfinite(value) for run in runs.values() for key in metrics for value in column(run, key)[1])


def image(picture: Picture, runs: dict[str, Metrics]) -> str:
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    picture.draw(axes, runs)
    axes.set_title(picture.title)
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    encoded = base64.b64encode(content.getvalue()).decode()
    return f'<img alt="{html.escape(picture.title)}" src="data:image/svg+xml;base64,{encoded}">'


def draw_lines(axes, curves: list[tuple[str, tuple[list[int], list[float]], str]], label: str) -> None:
    """`curves`: name, (steps, values), line style. A run has the same colour in every picture, whatever it lacks."""
    names = list(dict.fromkeys(name for name, _, _ in curves))
    drawn: set[str] = set()
    for name, (steps, values), style in curves:
        if steps:
            legend = None if name in drawn else name
            axes.plot(steps, values, style, color=f"C{names.index(name)}", label=legend, markersize=3)
            drawn.add(name)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend()


def draw_metric(axes, runs: dict[str, Metrics], key: str, label: str) -> None:
    draw_lines(axes, [(name, column(run, key), ".-") for name, run in runs.items()], label)


def draw_kl(axes, runs: dict[str, Metrics]) -> None:
    axes.set_yscale("log")
    draw_metric(axes, runs, "distillation/kl", "KL(student || teacher), nats a token")


def draw_entropy(axes, runs: dict[str, Metrics]) -> None:
    curves = []
    for name, run in runs.items():
        curves.append((name, column(run, "distillation/student_entropy"), "-"))
        curves.append((name, column(run, "distillation/teacher_entropy"), "--"))
    draw_lines(axes, curves, "nats a token")


def draw_phases(axes, runs: dict[str, Metrics]) -> None:
    seconds = {name: phase_seconds(run) for name, run in runs.items()}
    seconds = {name: phases for name, phases in seconds.items() if phases}
    left = dict.fromkeys(seconds, 0.0)
    for phase in (*PHASES, "other"):
        widths = [phases.get(phase, 0.0) for phases in seconds.values()]
        if any(widths):
            axes.barh(list(seconds), widths, left=list(left.values()), label=phase)
            left = {name: left[name] + width for name, width in zip(seconds, widths, strict=True)}
    axes.set_xlabel("seconds a step, mean")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))


def metric_picture(title: str, key: str, label: str) -> Picture:
    return Picture(title, (key,), partial(draw_metric, key=key, label=label))


def held_out_pictures(runs: dict[str, Metrics]) -> list[Picture]:
    """One for each data source that a run was validated on."""
    names = (name for run in runs.values() for metrics in run.values() for name in metrics)
    found = []
    for key, match in mean_scores(names).items():
        data_source, metric, mean = match.groups()
        found.append(metric_picture(f"Held-out {SCORE_NAMES[metric]}: {data_source}", key, f"{metric}, {mean}"))
    return found or [metric_picture("Held-out accuracy", "val-core/<data source>/<metric>/mean@<n>", "")]


def all_pictures(runs: dict[str, Metrics]) -> list[Picture]:
    """Whether or not there are metrics for them."""
    entropies = ("distillation/student_entropy", "distillation/teacher_entropy")
    return [
        *held_out_pictures(runs),
        Picture("KL on the student's own tokens", ("distillation/kl",), draw_kl),
        Picture("Entropy: student (line), teacher (dashes)", entropies, draw_entropy),
        metric_picture("Same most likely token", "distillation/top1_agreement", "share of response tokens"),
        Picture("Time for each phase of a step", ("timing_s/step",), draw_phases),
    ]


def not_drawn(missing: list[Picture]) -> str:
    if not missing:
        return ""
    items = "".join(
        f"<li>{html.escape(picture.title)}: <code>{html.escape(' or '.join(picture.metrics))}</code></li>"
        for picture in missing
    )
    return f'<div class="missing">Not drawn, as no run has numbers of the metric:<ul>{items}</ul></div>'


def pictures(runs: dict[str, Metrics]) -> str:
    images, missing = [], []
    for picture in all_pictures(runs):
        if has_numbers(runs, picture.metrics):
            images.append(image(picture, runs))
        else:
            missing.append(picture)
    return "\n".join([*images, not_drawn(missing)])


# ---------------------------------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------------------------------


def shown(token: str) -> str:
    """A token as visible HTML; its spaces are kept by the style."""
    return html.escape(token.replace("\n", "↵").replace("\t", "⇥")) or "∅"


def alternatives(side: str, top: list[list]) -> str:
    return f"{side}: " + ", ".join(f"{token!r} {probability:.1%}" for token, probability in top)


def redness(kl: float, worst: float) -> float:
    """0 to 1. What is not finite is as bad as can be."""
    if not math.isfinite(kl):
        return 1.0
    return min(1.0, max(0.0, kl / worst)) if worst > 0 else 0.0


def token_span(
    token: str, kl: float | None, teacher_top: list[list] | None, student_top: list[list] | None, worst: float
) -> str:
    if kl is None or teacher_top is None or student_top is None:
        return f'<span class="token" title="not in the loss">{shown(token)}</span>'
    title = "\n".join([f"KL {kl:.4f}", alternatives("teacher", teacher_top), alternatives("student", student_top)])
    return (
        f'<span class="token" style="background:rgba(220,60,30,{redness(kl, worst):.2f})" title="{html.escape(title)}">'
        f"{shown(token)}</span>"
    )


def sequence(record: dict[str, Any], worst: float) -> str:
    entries = zip(record["tokens"], record["kl"], record["teacher_top"], record["student_top"], strict=True)
    tokens = "".join(token_span(*entry, worst) + "<wbr>" for entry in entries)  # a line may end after any token
    score = "" if record["score"] is None else f' <span class="score">score {record["score"]:g}</span>'
    return f'<p><span class="prompt">{shown(record["prompt"])}</span>{tokens}{score}</p>'


def generations(named: dict[str, list[dict[str, Any]]]) -> str:
    """One section for each file, side by side; one scale of colour for all, so that before and after compare."""
    if not named:
        return ""
    every_kl = [kl for records in named.values() for record in records for kl in record["kl"] if kl is not None]
    finite = [kl for kl in every_kl if math.isfinite(kl)]
    worst = max(finite, default=0.0)
    also = "" if len(finite) == len(every_kl) else f", and {len(every_kl) - len(finite)} that are not finite"
    sections = "".join(
        f"<section><h3>{html.escape(title)}</h3>{''.join(sequence(record, worst) for record in records)}</section>"
        for title, records in named.items()
    )
    return (
        "<h2>Generations</h2><p>The redder a token, the larger the KL between student and teacher where it was chosen "
        f"(full red: {worst:.3f} nats{also}). Point at a token to see what both would have said.</p>"
        f'<div class="columns">{sections}</div>'
    )


# ---------------------------------------------------------------------------------------------------------------------
# Page
# ---------------------------------------------------------------------------------------------------------------------

STYLE = """
body { font-family: sans-serif; max-width: 80em; margin: 2em auto; padding: 0 1em; }
img { width: 32em; max-width: 100%; }
.columns { display: flex; flex-wrap: wrap; gap: 1em 3em; }
.columns section { flex: 1 1 24em; min-width: 0; overflow-wrap: anywhere; line-height: 1.5; }
.prompt, .token { white-space: break-spaces; }
.prompt, .missing { color: #666; }
.token { font-family: monospace; font-size: 1.2em; padding: 0.1em 0.15em; border-bottom: 1px solid #bbb; }
.score { color: #666; font-size: 0.8em; }
"""


def page(runs: dict[str, Metrics], tokens: dict[str, list[dict[str, Any]]]) -> str:
    names = ", ".join(html.escape(name) for name in runs)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>On-policy distillation</title>'
        f"<style>{STYLE}</style></head><body>\n<h1>On-policy distillation</h1><p>Runs: {names}</p>\n"
        f"{pictures(runs)}\n{generations(tokens)}\n</body></html>\n"
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
