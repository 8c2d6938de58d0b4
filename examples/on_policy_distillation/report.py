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
picture shows the runs that have its metrics. The pictures need matplotlib.

Each FILE has one JSON object a line, one line a sequence, and becomes a paragraph of coloured tokens. This is what
`generations.py` writes, and what the trainer writes every `teacher.dump_freq` steps:

    {"prompt": str,
     "tokens": [str, ...],                       the response, token by token
     "kl": [float, ...],                         KL(student || teacher) in nats, where each token was chosen
     "teacher_top": [[[str, float], ...], ...],  for each token, the teacher's most likely ones and their probabilities
     "student_top": [[[str, float], ...], ...],  the same of the student
     "score": float or null}

The lists have one entry for each token; an entry other than a token is null where the token is not in the loss.
"""

import argparse
import base64
import html
import io
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from metrics import accuracy, read_metrics, read_run

Metrics = dict[int, dict[str, float]]  # by step

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
TOKEN_FIELDS = ("prompt", "tokens", "kl", "teacher_top", "student_top", "score")


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read_named_run(argument: str) -> tuple[str, Metrics]:
    """`NAME=PATH` or `PATH`; without a name it is the folder's or the file's own."""
    name, _, file_or_folder = argument.rpartition("=")
    path = Path(file_or_folder)
    run = read_run(path) if path.is_dir() else read_metrics(path)
    if not run:
        raise ValueError(f"{path} has no metrics: give a metrics file of VERL, or a folder with metrics/*.jsonl")
    return name or (path.name if path.is_dir() else path.stem), run


def column(run: Metrics, key: str) -> tuple[list[int], list[float]]:
    """Steps and values, of the steps that have one."""
    pairs = [(step, metrics[key]) for step, metrics in run.items() if key in metrics]
    return [step for step, _ in pairs], [value for _, value in pairs]


def accuracies(run: Metrics) -> tuple[list[int], list[float]]:
    pairs = [(step, accuracy(metrics)) for step, metrics in run.items() if accuracy(metrics) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def phase_seconds(run: Metrics) -> dict[str, float]:
    """Mean seconds a step of each phase; empty for a run without timings."""
    _, steps = column(run, "timing_s/step")
    if not steps:
        return {}
    seconds = {phase: sum(column(run, f"timing_s/{phase}")[1]) / len(steps) for phase in PHASES}
    seconds["other"] = max(0.0, statistics.fmean(steps) - sum(seconds.values()))
    return {phase: value for phase, value in seconds.items() if value > 0}


def read_generations(path: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for number, record in enumerate(records, 1):
        if missing := [field for field in TOKEN_FIELDS if field not in record]:
            raise ValueError(f"{path}, line {number}: {missing[0]} is missing")
        lengths = {field: len(record[field]) for field in ("tokens", "kl", "teacher_top", "student_top")}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"{path}, line {number}: one entry for each token is wanted, not {lengths}")
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


def picture(draw, title: str, *arguments: Any) -> str:
    """An <img> of what `draw(axes, *arguments)` draws; nothing if it returns False, for want of metrics."""
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    drawn = draw(axes, *arguments)
    axes.set_title(title)
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    encoded = base64.b64encode(content.getvalue()).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/svg+xml;base64,{encoded}">' if drawn else ""


def draw_lines(axes, curves: list[tuple[str, tuple[list[int], list[float]], str]], label: str) -> bool:
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
    if drawn:
        axes.legend()
    return bool(drawn)


def draw_metric(axes, runs: dict[str, Metrics], key: str, label: str) -> bool:
    return draw_lines(axes, [(name, column(run, key), ".-") for name, run in runs.items()], label)


def draw_kl(axes, runs: dict[str, Metrics]) -> bool:
    axes.set_yscale("log")
    return draw_metric(axes, runs, "distillation/kl", "KL(student || teacher), nats a token")


def draw_accuracy(axes, runs: dict[str, Metrics]) -> bool:
    return draw_lines(axes, [(name, accuracies(run), ".-") for name, run in runs.items()], "held-out accuracy")


def draw_entropy(axes, runs: dict[str, Metrics]) -> bool:
    curves = []
    for name, run in runs.items():
        curves.append((name, column(run, "distillation/student_entropy"), "-"))
        curves.append((name, column(run, "distillation/teacher_entropy"), "--"))
    return draw_lines(axes, curves, "nats a token")


def draw_phases(axes, runs: dict[str, Metrics]) -> bool:
    seconds = {name: phase_seconds(run) for name, run in runs.items()}
    seconds = {name: phases for name, phases in seconds.items() if phases}
    left = dict.fromkeys(seconds, 0.0)
    for phase in (*PHASES, "other"):
        widths = [phases.get(phase, 0.0) for phases in seconds.values()]
        if any(widths):
            axes.barh(list(seconds), widths, left=list(left.values()), label=phase)
            left = {name: left[name] + width for name, width in zip(seconds, widths, strict=True)}
    axes.set_xlabel("seconds a step, mean")
    if seconds:
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return bool(seconds)


def pictures(runs: dict[str, Metrics]) -> str:
    return "\n".join(
        [
            picture(draw_accuracy, "Held-out accuracy", runs),
            picture(draw_kl, "KL on the student's own tokens", runs),
            picture(draw_entropy, "Entropy: student (line), teacher (dashes)", runs),
            picture(
                draw_metric, "Same most likely token", runs, "distillation/top1_agreement", "share of response tokens"
            ),
            picture(draw_phases, "Time for each phase of a step", runs),
        ]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------------------------------


def shown(token: str) -> str:
    """A token as visible HTML."""
    return html.escape(token.replace("\n", "↵").replace("\t", "⇥").replace(" ", "\u00a0")) or "∅"


def alternatives(side: str, top: list[list]) -> str:
    return f"{side}: " + ", ".join(f"{token!r} {probability:.1%}" for token, probability in top)


def token_span(
    token: str, kl: float | None, teacher_top: list[list] | None, student_top: list[list] | None, worst: float
) -> str:
    if kl is None or teacher_top is None or student_top is None:
        return f'<span class="token" title="not in the loss">{shown(token)}</span>'
    title = "\n".join([f"KL {kl:.4f}", alternatives("teacher", teacher_top), alternatives("student", student_top)])
    strength = min(1.0, max(0.0, kl / worst)) if worst > 0 else 0.0
    return (
        f'<span class="token" style="background:rgba(220,60,30,{strength:.2f})" title="{html.escape(title)}">'
        f"{shown(token)}</span>"
    )


def sequence(record: dict[str, Any], worst: float) -> str:
    entries = zip(record["tokens"], record["kl"], record["teacher_top"], record["student_top"], strict=True)
    tokens = "".join(token_span(*entry, worst) for entry in entries)
    score = "" if record["score"] is None else f' <span class="score">score {record["score"]:g}</span>'
    return f'<p><span class="prompt">{shown(record["prompt"])}</span>{tokens}{score}</p>'


def generations(named: dict[str, list[dict[str, Any]]]) -> str:
    """One section for each file, side by side; one scale of colour for all, so that before and after compare."""
    if not named:
        return ""
    every_kl = [kl for records in named.values() for record in records for kl in record["kl"] if kl is not None]
    worst = max(every_kl, default=0.0)
    sections = "".join(
        f"<section><h3>{html.escape(title)}</h3>{''.join(sequence(record, worst) for record in records)}</section>"
        for title, records in named.items()
    )
    return (
        "<h2>Generations</h2><p>The redder a token, the larger the KL between student and teacher where it was chosen "
        f"(full red: {worst:.3f} nats). Point at a token to see what both would have said.</p>"
        f'<div class="columns">{sections}</div>'
    )


# ---------------------------------------------------------------------------------------------------------------------
# Page
# ---------------------------------------------------------------------------------------------------------------------

STYLE = """
body { font-family: sans-serif; max-width: 80em; margin: 2em auto; padding: 0 1em; }
img { width: 32em; max-width: 100%; }
.columns { display: flex; flex-wrap: wrap; gap: 3em; }
.prompt { color: #666; }
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
        runs = dict(read_named_run(argument) for argument in arguments.runs)
        named = (argument.rpartition("=") for argument in arguments.generations)
        tokens = {title or Path(path).stem: read_generations(Path(path)) for title, _, path in named}
    except (OSError, ValueError) as error:
        sys.exit(f"report.py: {error}")
    arguments.out.write_text(page(runs, tokens), encoding="utf-8")
    print(f"report:  {arguments.out}")


if __name__ == "__main__":
    main()
