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
"""From the headline experiment's curves to its numbers. Needs nothing but Python.

Definitions, also given to readers of the table:

- gain: the teacher's held-out accuracy less the base's; the teacher of a seed is the last step of GRPO with that seed.
- noise: two binomial standard errors of the held-out set, at the target's accuracy.
- steps until a share of the gain: the first validated step at or above base + share * gain, after which no validated
  step of the run falls below that by more than the noise. None if there is no such step.
- best learning rate: the highest mean held-out accuracy over the validated steps, for every method alike.
"""

import json
import math
import statistics
from pathlib import Path

SHARES = (0.95, 1.0)
DEFINITIONS = (
    "The gain is the teacher's accuracy less the base's; the teacher is the last step of GRPO with the same seed. "
    "Steps to a share of it: the first step that has it and after which no step falls below it by more than two "
    "binomial standard errors of the held-out set. The best learning rate is the one of the grid with the highest mean "
    "accuracy over the run. Tokens and seconds are those of training steps, without validation."
)


def standard_error(share: float, count: int) -> float:
    """Of a share that was measured on `count` problems."""
    return math.sqrt(share * (1 - share) / count)


def validated(curve: dict[str, list]) -> dict[int, float]:
    """Held-out accuracy by step."""
    pairs = zip(curve["step"], curve["accuracy"], strict=True)
    return {step: value for step, value in pairs if value is not None}


def steps_until(accuracies: dict[int, float], target: float, noise: float) -> int | None:
    """The first step at or above `target` after which none is below `target` - `noise`."""
    for step in sorted(accuracies):
        later = [value for other, value in accuracies.items() if other >= step]
        if accuracies[step] >= target and min(later) >= target - noise:
            return step
    return None


def first_and_last(curve: dict[str, list]) -> tuple[float, float]:
    accuracies = validated(curve)
    return accuracies[min(accuracies)], accuracies[max(accuracies)]


def runs_of(results: dict, method: str, seed: int | None = None, learning_rate: float | None = None) -> list[dict]:
    return [
        run
        for run in results["runs"]
        if run["method"] == method and seed in (None, run["seed"]) and learning_rate in (None, run["learning_rate"])
    ]


def best_learning_rate(results: dict, method: str) -> float:
    """Of seed 0, which every learning rate was tried with."""

    def mean_accuracy(run: dict) -> float:
        return statistics.fmean(validated(run["curve"]).values())

    return max(runs_of(results, method, seed=0), key=mean_accuracy)["learning_rate"]


def teacher_curve(results: dict, seed: int) -> dict[str, list]:
    """The GRPO run whose last step is the teacher of `seed`."""
    (run,) = runs_of(results, "grpo", seed, best_learning_rate(results, "grpo"))
    return run["curve"]


def cost(curve: dict[str, list], until: int) -> tuple[int, float]:
    """Tokens generated and seconds of the training steps up to and with `until`; validation is in neither."""
    rows = [
        (tokens, seconds)
        for step, tokens, seconds in zip(curve["step"], curve["tokens"], curve["seconds"], strict=True)
        if 0 < step <= until
    ]
    return sum(tokens for tokens, _ in rows), sum(seconds for _, seconds in rows)


def measure(results: dict, run: dict) -> dict:
    """What one run contributes to the table."""
    base, teacher = first_and_last(teacher_curve(results, run["seed"]))
    accuracies = validated(run["curve"])
    measured: dict[str, float | dict] = {"base": base, "teacher": teacher, "final": accuracies[max(accuracies)]}
    for share in SHARES:
        target = base + share * (teacher - base)
        noise = 2 * standard_error(target, results["held_out"])
        step = steps_until(accuracies, target, noise)
        tokens, seconds = (None, None) if step is None else cost(run["curve"], step)
        measured[f"{share:.0%}"] = {"steps": step, "tokens": tokens, "seconds": seconds}
    return measured


def summarize(results: dict) -> dict[str, dict]:
    """By method: its best learning rate, and the measurements of each of its seeds there."""
    summary = {}
    for method in results["methods"]:
        if runs_of(results, method, seed=0):
            learning_rate = best_learning_rate(results, method)
            runs = sorted(runs_of(results, method, learning_rate=learning_rate), key=lambda run: run["seed"])
            summary[method] = {"learning_rate": learning_rate, "seeds": [measure(results, run) for run in runs]}
    return summary


def ratios(results: dict, share: float) -> list[float | None]:
    """For each seed, the steps of GRPO over those of reverse KL."""
    summary = summarize(results)
    pairs = zip(summary["grpo"]["seeds"], summary["reverse_kl"]["seeds"], strict=False)
    steps = [(rl[f"{share:.0%}"]["steps"], own[f"{share:.0%}"]["steps"]) for rl, own in pairs]
    return [None if None in pair or 0 in pair else pair[0] / pair[1] for pair in steps]


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def spread(values: list, form: str = "{:.0f}") -> str:
    """Mean and, if the values differ, their range."""
    if len(values) == 1 or min(values) == max(values):
        return form.format(values[0])
    return f"{form.format(statistics.fmean(values))} ({form.format(min(values))}–{form.format(max(values))})"


def cell(results: dict, method: str, seeds: list[dict], share: float, key: str, form: str, scale: float = 1.0) -> str:
    """Mean and range over seeds of a cost of `share` of the gain; "> steps" or a dash when a seed never got there."""
    values = [seed[f"{share:.0%}"][key] for seed in seeds]
    if None in values:
        reached = sum(value is not None for value in values)
        limit = f"> {results['methods'][method]['steps']}" if key == "steps" else "–"
        return limit if reached == 0 else f"{limit} ({reached} of {len(values)} seeds got there)"
    return spread([value * scale for value in values], form)


def table(results: dict) -> str:
    """Markdown, one row a method."""
    lines = [
        "| Method | Best lr | Seeds | Held-out accuracy at the end | Steps to 95 % of the gain | Steps to 100 % "
        "| Tokens generated to 95 % | Seconds to 95 % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, row in summarize(results).items():
        seeds = row["seeds"]
        lines.append(
            f"| {results['methods'][method]['title']} | {row['learning_rate']:g} | {len(seeds)} "
            f"| {spread([100 * seed['final'] for seed in seeds], '{:.1f}')} % "
            f"| {cell(results, method, seeds, 0.95, 'steps', '{:.3g}')} "
            f"| {cell(results, method, seeds, 1.0, 'steps', '{:.3g}')} "
            f"| {cell(results, method, seeds, 0.95, 'tokens', '{:.1f} k', 1e-3)} "
            f"| {cell(results, method, seeds, 0.95, 'seconds', '{:.0f}')} |"
        )
    return "\n".join(lines)


def grid_cell(results: dict, method: str, learning_rate: float) -> str:
    """Mean and last accuracy of seed 0, bold for the best learning rate; empty if there is no such run."""
    for run in runs_of(results, method, 0, learning_rate):
        accuracies = validated(run["curve"])
        text = f"{statistics.fmean(accuracies.values()):.1%}, {accuracies[max(accuracies)]:.1%}"
        return f"**{text}**" if learning_rate == best_learning_rate(results, method) else text
    return ""


def grid_table(results: dict) -> str:
    """Markdown: every learning rate of the grid with seed 0, by mean and last held-out accuracy."""
    rates = results["learning_rates"]
    lines = ["| Method | " + " | ".join(f"lr {rate:g}" for rate in rates) + " |", "|---" * (len(rates) + 1) + "|"]
    for method, described in results["methods"].items():
        cells = [grid_cell(results, method, rate) for rate in rates]
        if any(cells):
            lines.append(f"| {described['title']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ratio_text(results: dict, share: float) -> str:
    values = ratios(results, share)
    if None in values:
        known = sum(value is not None for value in values)
        return f"no ratio for {share:.0%} of the gain, which both reached with {known} of {len(values)} seeds"
    return f"{spread(values, '{:.1f}')} × fewer steps to {share:.0%} of the gain"


def sentence(results: dict) -> str:
    """The ratio in words."""
    grpo = summarize(results)["grpo"]["seeds"]
    before, after = (spread([100 * seed[name] for seed in grpo], "{:.1f}") for name in ("base", "teacher"))
    return (
        f"GRPO takes held-out accuracy from {before} % to {after} % in {results['methods']['grpo']['steps']} steps. "
        f"Reverse KL to that result, from the same base: {'; '.join(ratio_text(results, share) for share in SHARES)} "
        f"({'one seed' if len(grpo) == 1 else f'mean over {len(grpo)} seeds, range in parentheses'})."
    )


def conditions(results: dict) -> str:
    model, machine, methods = results["model"], results["machine"], results["methods"]
    return (
        f"VERL {results['versions']['verl']}'s trainer on {machine['cores']} cores of {machine['cpu']}, no GPU; "
        f"{model['type']} with {model['layers']} layers of width {model['hidden']}, two-digit addition, "
        f"{results['held_out']} held-out problems, greedy decoding; {results['rollouts_per_step']} rollouts and "
        f"{results['updates_per_step']} updates a step for every method; {results['optimizer']}, which is "
        f"{methods['grpo']['steps']} steps for GRPO and {methods['reverse_kl']['steps']} for all others; "
        f"{results['jobs']} run{'s' * (results['jobs'] > 1)} at a time. The baselines are what VERL ships, as "
        f"losses of this trainer; the top k is the top {results['top_k']}, as answers use eleven tokens in all."
    )


# ---------------------------------------------------------------------------------------------------------------------
# File
# ---------------------------------------------------------------------------------------------------------------------


def write(results: dict, path: Path) -> None:
    """JSON with one line a column, so that a change of the results can be read."""
    head = {key: value for key, value in results.items() if key != "runs"}
    lines = json.dumps(head, indent=1)[:-2] + ',\n "runs": [\n'
    runs = []
    for run in results["runs"]:
        about = json.dumps({key: value for key, value in run.items() if key != "curve"})[:-1]
        columns = ",\n".join(f"    {json.dumps(name)}: {json.dumps(column)}" for name, column in run["curve"].items())
        runs.append(f'  {about}, "curve": {{\n{columns}\n  }}}}')
    path.write_text(lines + ",\n".join(runs) + "\n ]\n}\n")


def read(path: Path) -> dict:
    return json.loads(path.read_text())
