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
"""The headline's pictures and tables, from the committed results of its tasks.

    python headline_picture.py

Reads results/headline_TASK.json and writes beside them

- headline.svg and headline_dark.svg, the README's: both curves of one task, for light and dark pages,
- speed_up.svg: the speed-up against the length of an answer,
- ways.svg: every way of distilling that was run on one task;

and, between the lines <!-- headline:begin --> and <!-- headline:end -->, the README's summary, the sentence of
ON_POLICY_DISTILLATION.md and the tables of HEADLINE.md. Needs matplotlib.
"""

from pathlib import Path

import headline_results
import pandas
from headline_results import MILESTONES, best_runs, first_and_last, runs_of, teacher_curve, validated
from report import import_pyplot

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BEGIN, END = "<!-- headline:begin -->", "<!-- headline:end -->"
README_TASK, WAYS_TASK = "chain_sum_8", "addition"
RESULTS = HERE / "results"
COLOURS = {
    "grpo": "tab:gray",
    "reverse_kl": "tab:red",
    "forward_kl": "tab:blue",
    "gkd": "tab:purple",
    "hybrid": "tab:green",
    "topk": "tab:cyan",
    "k1": "tab:orange",
}
# Of GitHub's pages: text and background. The colours of the curves are seen on both.
PAGES = {"headline.svg": ("#1f2328", "#ffffff"), "headline_dark.svg": ("#f0f6fc", "#0d1117")}
RL, OWN = "#8c959f", "#d1242f"


def on_page(text: str, background: str) -> dict[str, str]:
    """matplotlib's settings."""
    parts = ["text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"]
    return dict.fromkeys(parts, text) | dict.fromkeys(["figure.facecolor", "axes.facecolor"], background)


def mean_curve(runs: list[dict]) -> pandas.Series:
    """Accuracy by step in percent, over the seeds."""
    return 100 * pandas.DataFrame([validated(run["curve"]) for run in runs]).mean()


def steps_to_level(results: dict, method: str) -> float | None:
    """Mean over the seeds; None if one did not get there."""
    steps = headline_results.summary(results).query("method == @method").steps_level
    return None if steps.isna().any() else steps.mean()


def draw_curve(axes, results: dict, method: str, colour: str, name: str, place: tuple[int, int]) -> None:
    """The mean over seeds, each seed as a thin line, and the step that is at the teacher's level.

    Args:
        place: of the text, in points from that step.
    """
    runs = best_runs(results, method)
    for run in runs:
        axes.plot(100 * pandas.Series(validated(run["curve"])), color=colour, linewidth=0.7, alpha=0.5)
    mean = mean_curve(runs)
    axes.plot(mean, color=colour, linewidth=2.2)
    step = steps_to_level(results, method)
    if step is None:
        return
    height = float(mean[mean.index <= step].iloc[-1])
    axes.plot([step], [height], "o", color=colour, markersize=7)
    axes.annotate(
        f"{name}:\nthe teacher's level at step {step:.0f}",
        (step, height),
        xytext=place,
        textcoords="offset points",
        color=colour,
        fontsize=12,
        fontweight="bold",
    )


def draw_headline(results: dict, path: Path, colours: tuple[str, str]) -> None:
    """One panel: both curves until their last step, and the steps that reach the teacher's level."""
    pyplot = import_pyplot()
    base = 100 * first_and_last(teacher_curve(results, 0))[0]
    with pyplot.rc_context(on_page(*colours) | {"font.size": 11}):
        figure, axes = pyplot.subplots(figsize=(8, 3.8), layout="constrained")
        draw_curve(axes, results, "grpo", RL, "GRPO", place=(12, -40))
        draw_curve(axes, results, "reverse_kl", OWN, "distillation of its result", place=(6, 22))
        axes.set_ylim(bottom=base)
        axes.set_ylim(top=base + 1.25 * (axes.get_ylim()[1] - base))  # room for the text above a curve
        axes.set_xlim(left=0)
        axes.set_ylabel("held-out accuracy, %")
        axes.set_xlabel(f"training step (the accuracy axis starts at the base's {base:.0f} %)")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        figure.savefig(path, format="svg", metadata={"Date": None})
        pyplot.close(figure)


def draw_speed_up(every_task: dict[str, dict], path: Path) -> None:
    """A point for each seed, a line through the means."""
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(6.5, 3.8), layout="constrained")
    for (milestone, target), colour in zip(MILESTONES.items(), ("tab:blue", "tab:red"), strict=True):
        points = [
            (headline_results.answer_tokens(results), headline_results.speed_ups(results, milestone).dropna())
            for results in every_task.values()
        ]
        for length, ratios in points:
            axes.plot([length] * len(ratios), ratios, "o", color=colour, alpha=0.4, markersize=5)
        means = {length: ratios.mean() for length, ratios in points if len(ratios)}
        axes.plot(
            pandas.Series(means, dtype=float).sort_index(), color=colour, marker="o", linewidth=2, label=f"to {target}"
        )
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_xlabel("tokens an answer")
    axes.set_ylabel("GRPO's steps / reverse KL's steps")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="lower right")
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def draw_ways(results: dict, path: Path) -> None:
    """Every way of distilling that takes as many steps as reverse KL, seed 0 at its best learning rate."""
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(6.5, 3.8), layout="constrained")
    steps = results["methods"]["reverse_kl"]["steps"]
    alike = [name for name, about in results["methods"].items() if about["steps"] == steps]
    for method in [name for name in alike if runs_of(results, name, seed=0)]:
        curve = best_runs(results, method)[0]["curve"]
        title = results["methods"][method]["title"]
        axes.plot(100 * pandas.Series(validated(curve)), color=COLOURS[method], label=title)
    base, teacher = first_and_last(teacher_curve(results, 0))
    axes.axhline(100 * teacher, color="black", linewidth=0.8, linestyle="--")
    axes.axhline(100 * base, color="black", linewidth=0.8, linestyle=":")
    axes.set_title("Ways of distilling (dashes: teacher, dots: base)", fontsize="medium")
    axes.set_xlabel("step")
    axes.set_ylabel("held-out accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="lower right")
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def picture(link: str, text: str) -> str:
    """HTML: the light one, or the dark one where the reader's page is dark."""
    light, dark = (f"{link}/{name}" for name in PAGES)
    source = f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
    return f'<picture>{source}<img alt="{text}" src="{light}"></picture>'


def readme_block(every_task: dict[str, dict], link: str) -> str:
    """What stands between the markers."""
    results = every_task[README_TASK]
    return "\n\n".join(
        [
            picture(link, "Held-out accuracy against training steps"),
            f"The picture shows {results['task']}. {headline_results.sentence(results)}",
            headline_results.ratio_table(list(every_task.values())),
        ]
    )


def details(results: dict) -> str:
    """Of one task."""
    return "\n\n".join(
        [
            f"## {results['task'].capitalize()}",
            f"{headline_results.sentence(results)} {headline_results.teacher_cost(results)}",
            headline_results.table(results),
            headline_results.conditions(results),
            "Every learning rate of the grid, seed 0: mean held-out accuracy over the run, then that of its last step. "
            "The best mean is chosen.",
            headline_results.grid_table(results),
        ]
    )


def between_markers(text: str, begin: str = BEGIN, end: str = END) -> str:
    return text[text.index(begin) + len(begin) : text.index(end)].strip("\n")


def with_block(text: str, block: str, begin: str = BEGIN, end: str = END) -> str:
    """`text` with `block` between its markers."""
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"one {begin} and one {end} are wanted")
    return f"{text[: text.index(begin)]}{begin}\n{block}\n{text[text.index(end) :]}"


def read(folder: Path) -> dict[str, dict]:
    """The results by task, in the order of their answers' length."""
    found = {
        path.stem.removeprefix("headline_"): headline_results.read(path) for path in folder.glob("headline_*.json")
    }
    return dict(sorted(found.items(), key=lambda item: headline_results.answer_tokens(item[1])))


def documents(every_task: dict[str, dict], folder: Path) -> dict[Path, str]:
    """What each document has between its markers."""
    link = folder.resolve().relative_to(ROOT).as_posix()
    return {
        ROOT / "README.md": readme_block(every_task, link),
        ROOT / "ON_POLICY_DISTILLATION.md": headline_results.task_table(list(every_task.values())),
        HERE / "HEADLINE.md": "\n\n".join([headline_results.DEFINITIONS, *map(details, every_task.values())]),
    }


def main() -> None:
    every_task = read(RESULTS)
    if missing := {README_TASK, WAYS_TASK} - every_task.keys():
        raise SystemExit(f"{RESULTS} has no results of {', '.join(sorted(missing))}; headline.sh measures them")
    blocks = documents(every_task, RESULTS)
    for name, colours in PAGES.items():
        draw_headline(every_task[README_TASK], RESULTS / name, colours)
    draw_speed_up(every_task, RESULTS / "speed_up.svg")
    draw_ways(every_task[WAYS_TASK], RESULTS / "ways.svg")
    for document, block in blocks.items():
        document.write_text(with_block(document.read_text(), block))
        print(f"numbers: {document}")


if __name__ == "__main__":
    main()
