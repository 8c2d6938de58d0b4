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
"""From the headline experiment's curves to its numbers.

Definitions, also given to readers of the table:

- gain: the teacher's held-out accuracy less the base's; the teacher of a seed is the last step of GRPO with that seed.
- noise: two binomial standard errors of the held-out set, at the target's accuracy.
- steps to 95 % of the gain: the first validated step at or above base + 0.95 * gain, after which no validated step of
  the run falls below that by more than the noise. None if there is no such step.
- steps to the teacher's level: the first validated step that McNemar's exact test on the held-out problems, one-sided,
  does not call worse than the teacher at 5 %, and after which it calls none worse at 1 %. The test looks at the
  problems that one of the two gets right and the other wrong (McNemar, Psychometrika 12, 1947).
- speed-up: GRPO's steps to a milestone over reverse KL's, seed by seed.
- best learning rate: the highest mean held-out accuracy over the validated steps, for every method alike.
"""

import json
import math
import statistics
from pathlib import Path

import pandas

SHARE = 0.95
WORSE, LATER_WORSE = 0.05, 0.01
MILESTONES = {"95%": "95 % of the gain", "level": "the teacher's level"}
MAIN = ("grpo", "reverse_kl")
DEFINITIONS = (
    "The gain is the teacher's accuracy less the base's; the teacher is the last step of GRPO with the same seed. "
    "Steps to 95 % of it: the first step that has it and after which no step falls below it by more than two "
    "binomial standard errors of the held-out set. Steps to the teacher's level: the first step that McNemar's exact "
    "one-sided test on the held-out problems does not call worse than the teacher at 5 %, and after which it calls "
    "none worse at 1 %. The learning rate is the one of the grid with the highest mean accuracy over the run, and "
    "GRPO's for the ways to go beyond the teacher. "
    "Numbers of several seeds are their mean and range. Tokens and seconds are those of training steps, without "
    "validation."
)


def standard_error(share: float, count: int) -> float:
    """Of a share that was measured on `count` problems."""
    return math.sqrt(share * (1 - share) / count)


def validated(curve: dict[str, list]) -> dict[int, float]:
    """Held-out accuracy by step."""
    pairs = zip(curve["step"], curve["accuracy"], strict=True)
    return {step: value for step, value in pairs if value is not None}


def mean_accuracy(curve: dict[str, list]) -> float:
    return statistics.fmean(validated(curve).values())


def first_and_last(curve: dict[str, list]) -> tuple[float, float]:
    accuracies = validated(curve)
    return accuracies[min(accuracies)], accuracies[max(accuracies)]


def steps_until(accuracies: dict[int, float], target: float, noise: float) -> int | None:
    """The first step at or above `target` after which none is below `target` - `noise`."""
    for step in sorted(accuracies):
        later = [value for other, value in accuracies.items() if other >= step]
        if accuracies[step] >= target and min(later) >= target - noise:
            return step
    return None


def worse_p_value(only_teacher: int, only_student: int) -> float:
    """Of McNemar's exact test: the chance of so many problems that only the teacher gets right, were both as good."""
    count = only_teacher + only_student
    return sum(math.comb(count, found) for found in range(only_teacher, count + 1)) / 2**count


def steps_to_level(curve: dict[str, list]) -> int | None:
    """The first step that is not worse than the teacher, and after which none is."""
    columns = zip(curve["step"], curve["only_teacher"], curve["only_student"], strict=True)
    p_values = {step: worse_p_value(teacher, student) for step, teacher, student in columns if teacher is not None}
    for step in sorted(p_values):
        later = [value for other, value in p_values.items() if other >= step]
        if p_values[step] >= WORSE and min(later) >= LATER_WORSE:
            return step
    return None


def cost(curve: dict[str, list], until: int | None) -> tuple[float | None, float | None]:
    """Tokens generated and seconds of the training steps up to and with `until`; validation is in neither."""
    if until is None:
        return None, None
    rows = [
        (tokens, seconds)
        for step, tokens, seconds in zip(curve["step"], curve["tokens"], curve["seconds"], strict=True)
        if 0 < step <= until
    ]
    return sum(tokens for tokens, _ in rows), sum(seconds for _, seconds in rows)


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


def runs_of(results: dict, method: str, seed: int | None = None, learning_rate: float | None = None) -> list[dict]:
    return [
        run
        for run in results["runs"]
        if run["method"] == method and seed in (None, run["seed"]) and learning_rate in (None, run["learning_rate"])
    ]


def best_learning_rate(results: dict, method: str) -> float:
    """Of seed 0, which every learning rate was tried with."""
    return max(runs_of(results, method, seed=0), key=lambda run: mean_accuracy(run["curve"]))["learning_rate"]


def best_runs(results: dict, method: str) -> list[dict]:
    """Every seed of `method` at its best learning rate."""
    runs = runs_of(results, method, learning_rate=best_learning_rate(results, method))
    return sorted(runs, key=lambda run: run["seed"])


def teacher_curve(results: dict, seed: int) -> dict[str, list]:
    """The GRPO run whose last step is the teacher of `seed`."""
    (run,) = runs_of(results, "grpo", seed, best_learning_rate(results, "grpo"))
    return run["curve"]


def measure(results: dict, run: dict) -> dict:
    """A row of `summary`."""
    curve = run["curve"]
    base, teacher = first_and_last(teacher_curve(results, run["seed"]))
    target = base + SHARE * (teacher - base)
    steps = {
        "95%": steps_until(validated(curve), target, 2 * standard_error(target, results["held_out"])),
        "level": steps_to_level(curve),
    }
    measured = {name: run[name] for name in ("method", "learning_rate", "seed")}
    measured |= {"base": base, "teacher": teacher, "final": first_and_last(curve)[1]}
    for milestone, step in steps.items():
        tokens, seconds = cost(curve, step)
        measured |= {f"steps_{milestone}": step, f"tokens_{milestone}": tokens, f"seconds_{milestone}": seconds}
    level = steps["level"]
    return measured | {"accuracy_level": None if level is None else validated(curve)[level]}


def summary(results: dict) -> pandas.DataFrame:
    """A row for each method and seed at the method's best learning rate; NaN where a milestone was not reached."""
    methods = [method for method in results["methods"] if runs_of(results, method, seed=0)]
    rows = [measure(results, run) for method in methods for run in best_runs(results, method)]
    frame = pandas.DataFrame(rows)
    numbers = [name for name in frame if name != "method"]
    return frame.astype(dict.fromkeys(numbers, float))


def speed_ups(results: dict, milestone: str) -> pandas.Series:
    """By seed; NaN where one of the two did not get there."""
    frame = summary(results).pivot(index="seed", columns="method", values=f"steps_{milestone}")
    return frame["grpo"] / frame["reverse_kl"]


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def spread(values: pandas.Series, form: str = "{:.0f}") -> str:
    """Mean and, if the values differ, their range."""
    if len(values) == 1 or values.min() == values.max():
        return form.format(values.iloc[0])
    return f"{form.format(values.mean())} ({form.format(values.min())}–{form.format(values.max())})"


def cell(values: pandas.Series, form: str, never: str) -> str:
    """`never`, and how many got there, where a seed did not."""
    if not values.isna().any():
        return spread(values, form)
    reached = values.notna().sum()
    return never if reached == 0 else f"{never} ({reached} of {len(values)} seeds got there)"


def table_row(results: dict, method: str, seeds: pandas.DataFrame) -> dict[str, str]:
    never = f"> {results['methods'][method]['steps']}"
    return {
        "Method": results["methods"][method]["title"],
        "Learning rate": f"{seeds.learning_rate.iloc[0]:g}",
        "Seeds": str(len(seeds)),
        "Held-out accuracy at the end": f"{spread(100 * seeds.final, '{:.1f}')} %",
        "Steps to 95 % of the gain": cell(seeds["steps_95%"], "{:.3g}", never),
        "Steps to the teacher's level": cell(seeds.steps_level, "{:.3g}", never),
        "Accuracy there": cell(100 * seeds.accuracy_level, "{:.1f}", "–"),
        "Tokens generated to 95 %": cell(seeds["tokens_95%"] / 1000, "{:.1f} k", "–"),
        "Seconds to 95 %": cell(seeds["seconds_95%"], "{:.0f}", "–"),
    }


def markdown(rows: list[dict[str, str]]) -> str:
    return pandas.DataFrame(rows).to_markdown(index=False, disable_numparse=True)


def table(results: dict) -> str:
    """Markdown, one row a method."""
    by_method = summary(results).groupby("method", sort=False)
    return markdown([table_row(results, method, seeds) for method, seeds in by_method])


def grid_cell(results: dict, method: str, learning_rate: float) -> str:
    """Mean and last accuracy of seed 0, bold for the best learning rate; empty if there is no such run."""
    for run in runs_of(results, method, 0, learning_rate):
        text = f"{mean_accuracy(run['curve']):.1%}, {first_and_last(run['curve'])[1]:.1%}"
        return f"**{text}**" if learning_rate == best_learning_rate(results, method) else text
    return ""


def grid_table(results: dict) -> str:
    """Markdown: every learning rate of the grid with seed 0, by mean and last held-out accuracy."""
    rates = results["learning_rates"]
    rows = [
        {"Method": about["title"]} | {f"lr {rate:g}": grid_cell(results, method, rate) for rate in rates}
        for method, about in results["methods"].items()
        if len({run["learning_rate"] for run in runs_of(results, method, seed=0)}) == len(rates)
    ]
    return markdown(rows)


def speed_up_text(results: dict, milestone: str) -> str:
    values, target = speed_ups(results, milestone), MILESTONES[milestone]
    if values.isna().any():
        count = f"{values.notna().sum()} of {len(values)} seeds"
        return f"no known number of times as many to {target}, which both reached with {count}"
    return f"{spread(values, '{:.1f}')} times as many steps to {target}"


def sentence(results: dict) -> str:
    """The speed-up in words."""
    grpo = summary(results).query("method == 'grpo'")
    before, after = (spread(100 * grpo[name], "{:.1f}") for name in ("base", "teacher"))
    said = "; ".join(speed_up_text(results, milestone) for milestone in MILESTONES)
    return (
        f"GRPO takes held-out accuracy from {before} % to {after} % in {results['methods']['grpo']['steps']} steps. "
        f"Against reverse KL to that result, from the same base, it takes {said} "
        f"({'one seed' if len(grpo) == 1 else f'mean over {len(grpo)} seeds, range in parentheses'})."
    )


def whole_cost(results: dict, method: str) -> str:
    """Tokens and seconds of all steps of a run, the mean over the seeds."""
    costs = [cost(run["curve"], run["curve"]["step"][-1]) for run in best_runs(results, method)]
    tokens, seconds = (statistics.fmean(values) for values in zip(*costs, strict=True))
    return f"{tokens / 1000:.0f} k tokens and {seconds:.0f} s"


def teacher_cost(results: dict) -> str:
    """What has to be paid before there is something to distil."""
    steps = {method: results["methods"][method]["steps"] for method in MAIN}
    return (
        f"The teacher itself costs {steps['grpo']} steps of GRPO, {whole_cost(results, 'grpo')}; all "
        f"{steps['reverse_kl']} steps of reverse KL, which go on after the milestones, take "
        f"{whole_cost(results, 'reverse_kl')}."
    )


def answer_tokens(results: dict) -> float:
    """Mean length of the answers of the first GRPO run's last step, EOS included."""
    return teacher_curve(results, 0)["tokens"][-1] / results["rollouts_per_step"]


def task_row(results: dict) -> dict[str, str]:
    """Of a task, for the table of all of them."""
    frame = summary(results)
    grpo, own = (frame[frame.method == method] for method in MAIN)
    row = {
        "Task": results["task"],
        "Tokens an answer": f"{answer_tokens(results):.1f}",
        "Base": f"{100 * grpo.base.iloc[0]:.1f} %",
        "Teacher": f"{spread(100 * grpo.teacher, '{:.1f}')} %",
        "Student": f"{spread(100 * own.final, '{:.1f}')} %",
    }
    for milestone, target in MILESTONES.items():
        for title, seeds in (("GRPO", grpo), ("reverse KL", own)):
            never = f"> {results['methods'][seeds.method.iloc[0]]['steps']}"
            row[f"{title}: steps to {target}"] = cell(seeds[f"steps_{milestone}"], "{:.3g}", never)
        row[f"Ratio of steps to {target}"] = cell(speed_ups(results, milestone), "**{:.1f}**", "–")
    return row


def task_table(every_task: list[dict]) -> str:
    return markdown([task_row(results) for results in every_task])


def ratio_table(every_task: list[dict]) -> str:
    """The columns of `task_table` that fit a narrow page."""
    ratios = [f"Ratio of steps to {target}" for target in MILESTONES.values()]
    titles = ["Task", "Tokens an answer", "Base", "Teacher", "Student", *ratios]
    rows = map(task_row, every_task)
    return markdown([{title: row[title] for title in titles} for row in rows])


def run_lengths(methods: dict[str, dict]) -> str:
    """Steps of a run, in words."""
    by_steps: dict[int, list[str]] = {}
    for method in methods.values():
        by_steps.setdefault(method["steps"], []).append(method["title"])
    return " and ".join(f"{steps} steps for {', '.join(titles)}" for steps, titles in by_steps.items())


def conditions(results: dict) -> str:
    model, machine = results["model"], results["machine"]
    methods = {name: about for name, about in results["methods"].items() if runs_of(results, name, seed=0)}
    return (
        f"VERL {results['versions']['verl']}'s trainer on {machine['cores']} cores of {machine['cpu']}, no GPU; "
        f"{model['type']} with {model['layers']} layers of width {model['hidden']}, {results['task']}, "
        f"{results['held_out']} held-out problems, greedy decoding; {results['rollouts_per_step']} rollouts and "
        f"{results['updates_per_step']} updates a step for every method; {results['optimizer']}, which is "
        f"{run_lengths(methods)}; {results['jobs']} run{'s' * (results['jobs'] > 1)} at a time."
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
