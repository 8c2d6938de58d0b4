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
"""The ablation's tables and picture, from its committed results.

    python ablation_results.py [--results FILE]

Reads FILE (default: results/ablation.json), writes ablation.svg beside it, which needs matplotlib, and the tables into
ABLATION.md, between the lines <!-- ablation:begin --> and <!-- ablation:end -->.

Definitions, also given to readers of the tables:

- best learning rate: the one of the grid whose last step, with seed 0, has the lowest held-out negative log-likelihood.
- at equal steps: the last step of every run at its method's best learning rate.
- at equal seconds: the same runs when they had trained for as many seconds as the fastest method takes for all its
  steps, its mean over the seeds; linear between the scored steps.
"""

import argparse
from pathlib import Path

import headline_results
import pandas
from headline_picture import with_block
from headline_results import markdown, spread
from report import import_pyplot

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- ablation:begin -->", "<!-- ablation:end -->"
REFERENCES = {"base": "the student before", "teacher": "the teacher"}
CUT_ABOVE = 0.25  # nats above the student before, in the picture
DEFINITIONS = (
    "NLL: negative log-likelihood of held-out text. KL(S‖T), entropy and the student's mass outside of the teacher's "
    "top k: on the student's own samples. KL(T‖S): on the teacher's. All over the whole vocabulary, in nats a token, "
    "alike for all methods. Reward: F1 of words with how the documentation goes on, of the step's own rollouts; only "
    "the hybrid trains for it. Seconds: of training steps; the first, which waits for processes to start, counts as "
    "the median of the others. The best learning rate is the one of the grid whose last step has the lowest NLL. "
    "Numbers of several seeds are their mean and range."
)


def runs(results: dict) -> pandas.DataFrame:
    """A row for each scored step of each run."""
    about = ("method", "learning_rate", "seed")
    parts = [
        pandas.DataFrame(run["curve"]).astype(float).assign(**{key: run[key] for key in about})
        for run in results["runs"]
    ]
    return pandas.concat(parts, ignore_index=True)


def last(frame: pandas.DataFrame) -> pandas.DataFrame:
    """The last step of each run."""
    return frame[frame.step == frame.step.max()]


def best_learning_rate(results: dict, method: str) -> float:
    """Of seed 0, which every learning rate was tried with."""
    tried = last(runs(results)).query("method == @method and seed == 0")
    return tried.set_index("learning_rate").nll.idxmin()


def best_runs(results: dict) -> pandas.DataFrame:
    """`runs` of each method at its best learning rate, in the order of the methods."""
    frame = runs(results)
    parts = []
    for method in results["methods"]:
        of_method = frame[frame.method == method]
        if len(of_method):
            parts.append(of_method[of_method.learning_rate == best_learning_rate(results, method)])
    return pandas.concat(parts, ignore_index=True)


def fastest(results: dict) -> tuple[str, float]:
    """The method whose steps take the fewest seconds, and how many."""
    seconds = last(best_runs(results)).groupby("method").seconds.mean()
    return seconds.idxmin(), seconds.min()


def at_seconds(run: pandas.DataFrame, seconds: float) -> dict:
    """The row of a run at `seconds`, linear between its scored steps; its last one if it was done by then.

    What its first step has no number for, the reward, has none before the second.
    """
    by_seconds = run.set_index("seconds").drop(columns="method")
    moment = min(seconds, by_seconds.index.max())
    row = by_seconds.reindex(by_seconds.index.union([moment])).interpolate(method="index").loc[moment]
    return {"method": run.method.iloc[0], "seconds": moment, **row}


def at_equal_steps(results: dict) -> pandas.DataFrame:
    return last(best_runs(results))


def at_equal_seconds(results: dict) -> pandas.DataFrame:
    seconds = fastest(results)[1]
    by_run = best_runs(results).groupby(["method", "seed"], sort=False)
    return pandas.DataFrame([at_seconds(run, seconds) for _, run in by_run])


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def scores(results: dict, values: pandas.DataFrame) -> dict[str, str]:
    """The cells of one row."""
    cells = {
        "NLL": spread(values.nll, "{:.3f}"),
        "KL(S‖T)": spread(values.reverse_kl, "{:.3f}"),
        "KL(T‖S)": spread(values.forward_kl, "{:.3f}"),
        "Entropy": spread(values.entropy, "{:.2f}"),
    }
    for k in results["top_ks"]:
        cells[f"Outside top {k}"] = f"{spread(100 * values[f'outside_{k}'], '{:.1f}')} %"
    return cells


def table(results: dict, values: pandas.DataFrame) -> str:
    """Markdown, one row a method, then the references."""
    rows = [
        {
            "Method": results["methods"][method]["title"],
            "Best lr": f"{seeds.learning_rate.iloc[0]:g}",
            "Seeds": str(len(seeds)),
            "Steps": spread(seeds.step, "{:.1f}").replace(".0", ""),
            "Seconds": spread(seeds.seconds, "{:.0f}"),
            **scores(results, seeds),
            "Reward": spread(seeds.reward, "{:.3f}"),
        }
        for method, seeds in values.groupby("method", sort=False)
    ]
    rows += [
        {"Method": title, **scores(results, pandas.DataFrame([results["references"][name]]))}
        for name, title in REFERENCES.items()
    ]
    return markdown([{name: row.get(name, "") for name in rows[0]} for row in rows])


def grid_table(results: dict) -> str:
    """Markdown: every learning rate of the grid with seed 0, by the NLL of its last step; bold for the best."""
    tried = last(runs(results)).query("seed == 0").set_index(["method", "learning_rate"]).nll
    rows = []
    for method, about in results["methods"].items():
        if method not in tried.index:
            continue
        row, best = {"Method": about["title"]}, best_learning_rate(results, method)
        for rate in results["learning_rates"]:
            text = f"{tried[method, rate]:.3f}" if (method, rate) in tried.index else ""
            row[f"lr {rate:g}"] = f"**{text}**" if rate == best else text
        rows.append(row)
    return markdown(rows)


def conditions(results: dict) -> str:
    machine, text = results["machine"], results["text"]
    models = text["models"]
    teacher, student = (
        f"{models[name]['layers']} layers of width {models[name]['hidden']}" for name in ("teacher", "base")
    )
    return (
        f"VERL {results['versions']['verl']}'s trainer on {machine['cores']} cores of {machine['cpu']}, no GPU, "
        f"{results['jobs']} run{'s' * (results['jobs'] > 1)} at a time. Text: the documentation in Python "
        f"{results['python']}, {text['documents']} documents of {text['bytes'] / 1e6:.1f} MB "
        f"({text['tokens'] / 1e6:.2f} million tokens of a vocabulary of {results['vocabulary']}) to train on and "
        f"{text['held_out_documents']} held out. Teacher: {teacher}; student: {student}; both Llama. "
        f"{results['rollouts_per_step']} rollouts of {results['response_tokens']} tokens to prompts of "
        f"{results['prompt_tokens']} and {results['updates_per_step']} updates a step for every method, AdamW, the "
        f"learning rate decayed to zero by a cosine over {results['steps']} steps. Scored on {results['held_out']} "
        f"held-out windows."
    )


def block(results: dict) -> str:
    """What stands between the markers."""
    method, seconds = fastest(results)
    return "\n\n".join(
        [
            "## At equal steps",
            table(results, at_equal_steps(results)),
            "## At equal seconds",
            f"After {seconds:.0f} seconds of training, which the fastest ({results['methods'][method]['title']}) takes "
            "for all its steps. The learning rates of the others have not decayed to zero by then. Between two scored "
            "steps the numbers are interpolated.",
            table(results, at_equal_seconds(results)),
            "## Conditions",
            DEFINITIONS,
            conditions(results),
            "Every learning rate of the grid, seed 0: NLL of the last step.",
            grid_table(results),
        ]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Picture
# ---------------------------------------------------------------------------------------------------------------------


def draw(results: dict, path: Path) -> None:
    """KL to the teacher and held-out NLL against steps, means over the seeds at the best learning rates."""
    pyplot = import_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 5.2), layout="constrained")
    colours = pyplot.get_cmap("tab20").colors
    for index, (method, frame) in enumerate(best_runs(results).groupby("method", sort=False)):
        means = frame.groupby("step")[["reverse_kl", "nll"]].mean()
        style = {"color": colours[index % len(colours)], "label": results["methods"][method]["title"]}
        left.plot(means.reverse_kl, **style)
        right.plot(means.nll, **style)
    base, teacher = (results["references"][name]["nll"] for name in REFERENCES)
    right.axhline(teacher, color="black", linewidth=0.8, linestyle="--")
    right.set_ylim(top=base + CUT_ABOVE)
    left.set_yscale("log")
    left.set_title("KL(S‖T) on the student's samples, nats", fontsize="medium")
    right.set_title("held-out NLL, nats (dashes: the teacher)", fontsize="medium")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3, which="both")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "ablation.json")
    path = parser.parse_args().results
    results = headline_results.read(path)
    draw(results, path.with_suffix(".svg"))
    document = HERE / "ABLATION.md"
    document.write_text(with_block(document.read_text(), block(results), BEGIN, END))
    print(f"picture: {path.with_suffix('.svg')}\ntables: {document}")


if __name__ == "__main__":
    main()
