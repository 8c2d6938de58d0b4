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
"""The headline picture and the headline table of the README, from the committed results.

    python headline_picture.py [--results FILE]

Writes headline.svg beside FILE, the table into README.md and its sentence into ON_POLICY_DISTILLATION.md, between the
lines <!-- headline:begin --> and <!-- headline:end -->. Needs matplotlib.
"""

import argparse
from pathlib import Path

import headline_results
from headline_results import best_learning_rate, first_and_last, runs_of, teacher_curve, validated
from report import import_pyplot

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BEGIN, END = "<!-- headline:begin -->", "<!-- headline:end -->"
COLOURS = {
    "grpo": "tab:gray",
    "reverse_kl": "tab:red",
    "forward_kl": "tab:blue",
    "gkd": "tab:purple",
    "hybrid": "tab:green",
    "topk": "tab:cyan",
    "k1": "tab:orange",
}
MAIN = ("grpo", "reverse_kl")


def draw(axes, results: dict, methods: list[str]) -> None:
    """Held-out accuracy against steps, each method at its best learning rate, one line a seed."""
    for method in methods:
        for run in runs_of(results, method, learning_rate=best_learning_rate(results, method)):
            accuracies = validated(run["curve"])
            axes.plot(
                list(accuracies),
                [100 * value for value in accuracies.values()],
                color=COLOURS[method],
                label=results["methods"][method]["title"] if run["seed"] == 0 else None,
                linewidth=1.8 if method in MAIN else 1.2,
                alpha=1.0 if run["seed"] == 0 else 0.45,
            )
    base, teacher = first_and_last(teacher_curve(results, 0))
    axes.axhline(100 * teacher, color="black", linewidth=0.8, linestyle="--")
    axes.axhline(100 * base, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="lower right")


def draw_headline(results: dict, path: Path) -> None:
    pyplot = import_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    draw(left, results, [method for method in MAIN if runs_of(results, method)])
    draw(right, results, [method for method in results["methods"] if method != "grpo" and runs_of(results, method)])
    left.set_ylabel("held-out accuracy, %")
    left.set_title("RL against distillation, every seed (dashes: teacher of seed 0, dots: base)")
    right.set_title("Ways of distilling")
    for axes in (left, right):
        axes.title.set_fontsize("medium")
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def readme_block(results: dict, picture: str) -> str:
    """What stands between the markers."""
    return "\n\n".join(
        [
            f"![Held-out accuracy against steps]({picture})",
            headline_results.sentence(results),
            headline_results.table(results),
            f"{headline_results.conditions(results)} {headline_results.DEFINITIONS}",
            "Every learning rate of the shared grid, seed 0: mean held-out accuracy over the run, then that of its "
            "last step. The best mean is chosen.",
            headline_results.grid_table(results),
        ]
    )


def between_markers(text: str) -> str:
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip("\n")


def with_block(text: str, block: str) -> str:
    """`text` with `block` between its markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"one {BEGIN} and one {END} are wanted")
    return f"{text[: text.index(BEGIN)]}{BEGIN}\n{block}\n{text[text.index(END) :]}"


def picture_path(results_path: Path) -> Path:
    return results_path.with_suffix(".svg")


def documents(results: dict, picture: Path) -> dict[Path, str]:
    """What each document has between its markers."""
    link = picture.resolve().relative_to(ROOT).as_posix()
    return {
        ROOT / "README.md": readme_block(results, link),
        ROOT / "ON_POLICY_DISTILLATION.md": headline_results.sentence(results),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "headline.json")
    arguments = parser.parse_args()
    results = headline_results.read(arguments.results)
    picture = picture_path(arguments.results)
    draw_headline(results, picture)
    print(f"picture: {picture}")
    for document, block in documents(results, picture).items():
        document.write_text(with_block(document.read_text(), block))
        print(f"numbers: {document}")


if __name__ == "__main__":
    main()
