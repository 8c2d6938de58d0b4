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
"""The headline experiment: how many steps RL needs, and how many on-policy distillation needs for the same gain.

    python headline.py [--task NAME] [--methods NAME ...] [--out DIR] [--results FILE] [--seeds N] [--jobs N]

1. A base model that gets some of the task's problems right.
2. GRPO from that base, once for each learning rate of the grid. The result at the best one is the teacher.
3. Each way of distilling that teacher back into the base, once for each learning rate of the grid.
4. The main two, GRPO and reverse KL, again with other seeds at their best learning rates; each seed of GRPO is the
   teacher of that seed of reverse KL.
5. Asked for by --methods: ways to go beyond the teacher, in as many steps as GRPO, at GRPO's best learning rate, every
   seed.

The tasks differ in the length of their answers. Every run is VERL's trainer as a user starts it, in a folder of its own
below DIR/TASK/runs. A finished run is not done again unless its settings or its teacher have changed; an interrupted
one is done from its start. FILE receives what was measured, after every run. The mathematics of what is reported is in
headline_results.py.
"""

import argparse
import importlib
import json
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import arithmetic
import headline_results
from baselines import SAMPLED_K1, TOP_K, truncated
from headline_results import MAIN
from metrics import StepMetrics, read_run
from progress import end_with_trainers, overrides_of, train

HERE = Path(__file__).resolve().parent
ACTOR = "actor_rollout_ref.actor"
LOSS = f"{ACTOR}.policy_loss"

# The same for every method: rollouts and updates a step, optimizer and schedule.
ROLLOUTS, UPDATES = 256, 16
GRPO_STEPS, GRPO_SCORE_EVERY, GROUP = 70, 2, 8
BEYOND_SCORE_EVERY = 10  # where such a run ends is what counts
DISTILLATION_STEPS = 12
WEAK_TEACHER_STEP = 20  # of GRPO
HELD_OUT = 2000
LAYERS, MODEL_SEED = 3, 0
BASE_MAX_STEPS = 20_000

Pairs = list[tuple[str, str]]  # (question, answer)


@dataclass(frozen=True)
class Data:
    """Of a task: what the base is taught, the problems of every run with their ground truth, and those held out."""

    lessons: Pairs
    problems: Pairs
    held_out: Pairs


@dataclass(frozen=True)
class Task:
    """One point of the headline.

    `module` has `compute_score` and DATA_SOURCE. The base's training stops where the share `base_share` of its lessons
    is answered as taught, without a decay of the learning rate. The learning rates are the grid of every method.
    """

    title: str
    module: str
    data: Callable[[], Data]
    prompt_tokens: int
    answer_tokens: int
    hidden: int
    base_share: float
    base_learning_rate: float
    learning_rates: tuple[float, ...]

    @property
    def reward_file(self) -> Path:
        return HERE / f"{self.module}.py"

    @property
    def reward(self) -> Callable[..., float]:
        return importlib.import_module(self.module).compute_score

    @property
    def data_source(self) -> str:
        return importlib.import_module(self.module).DATA_SOURCE


def addition_data() -> Data:
    taught, held_out = arithmetic.problems(MODEL_SEED, held_out=HELD_OUT)
    return Data(taught, taught, held_out)


def chain_sum_data(terms: int) -> Data:
    try:
        import chain_sum
    except ModuleNotFoundError as error:
        raise SystemExit(f"this task needs reasoning-gym: pip install -r {REASONING_GYM} ({error})") from None

    taught, held_out = chain_sum.problems(terms, MODEL_SEED, CHAIN_SUMS, HELD_OUT)
    results = [chain_sum.with_result(expression) for expression in taught]
    return Data(
        [chain_sum.with_working(expression) for expression in taught],
        results,
        [chain_sum.with_result(expression) for expression in held_out],
    )


def chain_sum_task(terms: int, answer_tokens: int) -> Task:
    return Task(
        title=f"sums of {terms} digits with their working",
        module="chain_sum",
        data=partial(chain_sum_data, terms),
        prompt_tokens=2 * terms,
        answer_tokens=answer_tokens,
        hidden=128,
        base_share=0.5,
        base_learning_rate=1e-3,
        learning_rates=(5e-6, 1.5e-5, 5e-5, 1.5e-4),
    )


CHAIN_SUMS = 20_000  # problems to train on
REASONING_GYM = HERE / "headline_requirements.txt"
TASKS = {
    "addition": Task(
        title="two-digit addition",
        module="arithmetic",
        data=addition_data,
        prompt_tokens=8,
        answer_tokens=arithmetic.MAX_ANSWER_TOKENS,
        hidden=256,
        base_share=0.45,
        base_learning_rate=7e-4,
        learning_rates=(7e-6, 2e-5, 6e-5),
    ),
    "chain_sum_4": chain_sum_task(terms=4, answer_tokens=19),
    "chain_sum_8": chain_sum_task(terms=8, answer_tokens=43),
}


@dataclass(frozen=True)
class Method:
    """One curve.

    Args:
        title: in tables.
        overrides: of the trainer's configuration.
        responses: to a prompt.
        score_every: steps from one that is scored on the held-out problems to the next. The last one is always scored.
        teacher_step: of the GRPO run with the same seed; None: no teacher.
        start: the method whose last step this one goes on from, instead of the base.
    """

    title: str
    overrides: tuple[str, ...]
    responses: int = 1
    steps: int = DISTILLATION_STEPS
    score_every: int = 1
    teacher_step: int | None = GRPO_STEPS
    start: str | None = None


def pure(title: str, distillation_type: str, *more: str) -> Method:
    return Method(
        title, (f"{LOSS}.loss_mode=on_policy_distillation", f"{LOSS}.distillation_type={distillation_type}", *more)
    )


def hybrid(title: str, *more: str, responses: int) -> Method:
    common = (f"{LOSS}.loss_mode=hybrid_rl_distillation", "algorithm.adv_estimator=grpo")
    return Method(title, (*common, *more), responses=responses)


def grpo(title: str, steps: int, start: str | None = None) -> Method:
    chosen = ("algorithm.adv_estimator=grpo",)
    score_every = GRPO_SCORE_EVERY if start is None else BEYOND_SCORE_EVERY
    return Method(title, chosen, GROUP, steps, score_every, teacher_step=None, start=start)


def beyond(title: str, teacher_step: int, *more: str) -> Method:
    """Hybrid with RL's whole weight, for as many steps as RL."""
    method = hybrid(title, f"{LOSS}.hybrid_lambda_rl=1.0", *more, responses=GROUP)
    return replace(method, steps=GRPO_STEPS, score_every=BEYOND_SCORE_EVERY, teacher_step=teacher_step)


def falling(weight: float, steps: int) -> tuple[str, ...]:
    return (
        f"{LOSS}.hybrid_lambda_distill={weight}",
        f"{LOSS}.hybrid_lambda_distill_schedule=linear",
        f"{LOSS}.hybrid_lambda_distill_steps={steps}",
    )


# Those of the grid: every learning rate.
DISTILLED = {
    "reverse_kl": pure("reverse KL", "reverse_kl"),
    "forward_kl": pure("forward KL", "forward_kl"),
    "gkd": pure("gkd, beta 0.5", "gkd", f"{LOSS}.distillation_beta=0.5"),
    "hybrid": hybrid(
        "hybrid, 0.5 RL + 0.5 reverse KL",
        f"{LOSS}.hybrid_lambda_rl=0.5",
        f"{LOSS}.hybrid_lambda_distill=0.5",
        responses=GROUP,
    ),
    "topk": pure(f"forward KL, teacher's top {TOP_K} (baseline)", truncated("forward_kl", TOP_K)),
    "k1": hybrid(
        "sampled token, k1 (baseline)",
        f"{LOSS}.hybrid_rl_loss_mode={SAMPLED_K1}",
        f"{LOSS}.hybrid_lambda_distill=0.0",
        responses=1,
    ),
}
# Those that can end above the teacher: RL with help, in RL's number of steps.
BEYOND = {
    "weak_fade_35": beyond("hybrid, weak teacher, weight 1 to 0 in 35 steps", WEAK_TEACHER_STEP, *falling(1.0, 35)),
    "weak_fade_15": beyond("hybrid, weak teacher, weight 1 to 0 in 15 steps", WEAK_TEACHER_STEP, *falling(1.0, 15)),
    "full_fade_35": beyond("hybrid, weight 1 to 0 in 35 steps", GRPO_STEPS, *falling(1.0, 35)),
    "full_half": beyond("hybrid, constant weight 0.5", GRPO_STEPS, f"{LOSS}.hybrid_lambda_distill=0.5"),
    "kl_then_grpo": grpo(
        f"reverse KL for {DISTILLATION_STEPS} steps, then GRPO", GRPO_STEPS - DISTILLATION_STEPS, start="reverse_kl"
    ),
}
METHODS = {"grpo": grpo("GRPO", GRPO_STEPS), **DISTILLED, **BEYOND}


@dataclass(frozen=True)
class Setup:
    """What all runs of an experiment have in common; rollouts and updates are those of a step."""

    experiment: str
    methods: dict[str, Method]
    prompt_tokens: int
    answer_tokens: int
    rollouts: int
    updates: int
    reward_file: Path


def setup(task: Task) -> Setup:
    return Setup("headline", METHODS, task.prompt_tokens, task.answer_tokens, ROLLOUTS, UPDATES, task.reward_file)


@dataclass(frozen=True)
class Run:
    method: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-lr{self.learning_rate:g}-seed{self.seed}"


@dataclass(frozen=True)
class Sources:
    """The checkpoints that a run needs: where it starts, and its teacher."""

    start: Path
    teacher: Path | None

    @property
    def changed_at(self) -> float:
        return max(path.stat().st_mtime for path in (self.start, self.teacher) if path is not None)


def overrides(run: Run, common: Setup, out: Path, sources: Sources) -> list[str]:
    """What is said to VERL's trainer, beside what the machine needs."""
    method = common.methods[run.method]
    prompts = common.rollouts // method.responses
    return [
        f"actor_rollout_ref.model.path={sources.start}",
        f"data.train_files={out}/train.parquet",
        f"data.val_files={out}/test.parquet",  # wanted by VERL, not used
        f"data.max_prompt_length={common.prompt_tokens}",
        f"data.max_response_length={common.answer_tokens}",
        f"data.train_batch_size={prompts}",
        f"data.seed={run.seed}",
        f"actor_rollout_ref.rollout.n={method.responses}",
        f"actor_rollout_ref.rollout.seed={run.seed}",
        f"{ACTOR}.ppo_mini_batch_size={prompts // common.updates}",
        f"{ACTOR}.data_loader_seed={run.seed}",
        f"{ACTOR}.optim.lr={run.learning_rate:g}",
        f"{ACTOR}.optim.lr_scheduler_type=cosine",  # at a constant rate accuracy keeps jumping by a point or two
        f"reward.custom_reward_function.path={common.reward_file}",
        f"trainer.total_training_steps={method.steps}",
        "trainer.total_epochs=1000",
        # The trainer's own validation generates through its agent loop and takes longer than a step does. Steps are
        # saved instead, in a fraction of the time, and scored afterwards.
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        f"trainer.save_freq={method.score_every}",
        f"{ACTOR}.checkpoint.save_contents=[hf_model]",
        "trainer.resume_mode=disable",
        f"trainer.default_local_dir={out}/runs/{run.name}/checkpoints",
        "trainer.logger=[file]",
        f"trainer.project_name={common.experiment}",
        f"trainer.experiment_name={run.name}",
        *([f"teacher.model.path={sources.teacher}"] if sources.teacher else []),
        *method.overrides,
    ]


def checkpoint(run: Run, out: Path, step: int) -> Path:
    return out / "runs" / run.name / "checkpoints" / f"global_step_{step}" / "actor" / "huggingface"


def held_out_outcomes(path: Path, task: Task, out: Path) -> list[bool]:
    """Which held-out problems the checkpoint at `path` gets right, decoding greedily."""
    scores = arithmetic.scores(path, out / "test.parquet", task.reward, task.answer_tokens)
    return [score == 1.0 for score in scores]


def score_checkpoints(run: Run, task: Task, out: Path, start: Path) -> dict[int, list[bool]]:
    """Outcomes by step, 0 being `start`. Removes the checkpoints that no later run needs."""
    method = METHODS[run.method]
    scored = sorted({*range(method.score_every, method.steps, method.score_every), method.steps})
    outcomes = {0: held_out_outcomes(start, task, out)}
    outcomes |= {step: held_out_outcomes(checkpoint(run, out, step), task, out) for step in scored}
    for step in {*scored} - {method.steps, WEAK_TEACHER_STEP}:
        shutil.rmtree(out / "runs" / run.name / "checkpoints" / f"global_step_{step}")
    return outcomes


@dataclass(frozen=True)
class Measured:
    """The curve of a run, and which held-out problems each of its scored steps gets right."""

    curve: dict[str, list]
    outcomes: dict[int, list[bool]]

    def to_json(self) -> dict:
        """Outcomes as strings of 0 and 1, a character a problem."""
        return {
            "curve": self.curve,
            "outcomes": {step: "".join("01"[right] for right in rights) for step, rights in self.outcomes.items()},
        }

    @classmethod
    def from_json(cls, saved: dict) -> "Measured":
        outcomes = {int(step): [mark == "1" for mark in marks] for step, marks in saved["outcomes"].items()}
        return cls(saved["curve"], outcomes)


def finished(done: Path, settings: list[str], sources: Sources) -> dict | None:
    """What is in `done`, if it is of a run with these settings and with the checkpoints that are there now."""
    if not done.exists() or sources.changed_at > done.stat().st_mtime:
        return None
    saved = json.loads(done.read_text())
    return saved if saved["settings"] == settings else None


def trained(run: Run, common: Setup, out: Path, sources: Sources, measure: Callable[[], dict]) -> dict:
    """What `measure` said after `run`, which is trained unless that has been done."""
    folder = out / "runs" / run.name
    done = folder / "measured.json"
    settings = overrides(run, common, out, sources)
    measured = finished(done, settings, sources)
    if measured is None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        command = [sys.executable, "-m", "verl.trainer.main_on_policy_distillation", *overrides_of("cpu"), *settings]
        environment = {
            "VERL_PLATFORM": "cpu",
            "VERL_USE_EXTERNAL_MODULES": "verl_on_policy_distillation,baselines_plugin",
            "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        train(folder, command, environment, label=f"{out.name} {run.name}   ")
        measured = measure()
        done.write_text(json.dumps({"settings": settings} | measured) + "\n")
    return measured


def train_once(run: Run, task: Task, out: Path, sources: Sources) -> Measured:
    """What was measured of `run`."""

    def measure() -> dict:
        outcomes = score_checkpoints(run, task, out, sources.start)
        return Measured(curve(read_run(out / "runs" / run.name), outcomes), outcomes).to_json()

    return Measured.from_json(trained(run, setup(task), out, sources, measure))


COLUMNS = {
    "kl": "distillation/kl",
    "student_entropy": "distillation/student_entropy",
    "teacher_entropy": "distillation/teacher_entropy",
    "top1_agreement": "distillation/top1_agreement",
    "reward": "critic/score/mean",
    "seconds": "timing_s/step",
}


def curve(metrics: dict[int, StepMetrics], outcomes: dict[int, list[bool]]) -> dict[str, list]:
    """What the results keep of a run: one list a column, one entry a step, null where a step has no such number."""
    steps = sorted(metrics.keys() | outcomes.keys())
    accuracies = {step: statistics.fmean(rights) for step, rights in outcomes.items()}
    rows = [metrics.get(step, {}) for step in steps]
    lengths = [row.get("response_length/mean") for row in rows]
    return {
        "step": steps,
        "accuracy": [significant(accuracies.get(step)) for step in steps],
        **{name: [significant(row.get(key)) for row in rows] for name, key in COLUMNS.items()},
        "tokens": [None if length is None else round(length * ROLLOUTS) for length in lengths],
    }


def joined(before: Measured, after: Measured) -> Measured:
    """Of a run that went on from the last step of another: the steps, tokens and seconds of both."""
    last = before.curve["step"][-1]
    columns = {name: values + after.curve[name][1:] for name, values in before.curve.items()}
    columns["step"] = before.curve["step"] + [last + step for step in after.curve["step"][1:]]
    return Measured(columns, before.outcomes | {last + step: rights for step, rights in after.outcomes.items()})


def against_teacher(curve: dict[str, list], outcomes: dict[int, list[bool]], teacher: list[bool]) -> dict[str, list]:
    """Two more columns of `curve`: held-out problems that only the teacher gets right, and that only this step does."""
    pairs = [list(zip(outcomes.get(step, []), teacher, strict=step in outcomes)) for step in curve["step"]]
    return {
        "only_teacher": [sum(other and not own for own, other in pair) if pair else None for pair in pairs],
        "only_student": [sum(own and not other for own, other in pair) if pair else None for pair in pairs],
    }


def significant(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def make_base(task: Task, out: Path) -> None:
    """The data and the base. Its training stops early: what a longer one would teach is left for RL."""
    out.mkdir(parents=True, exist_ok=True)
    data = task.data()
    arithmetic.make_split(out / "train.parquet", data.problems, task.data_source)
    arithmetic.make_split(out / "test.parquet", data.held_out, task.data_source)
    if (out / "base").exists():
        return
    print(f"{out.name} base: training", flush=True)
    model = arithmetic.untrained_model(task.hidden, LAYERS, arithmetic.VOCAB_SIZE, tied=False, seed=MODEL_SEED)
    arithmetic.train(
        model,
        [data.lessons],
        [1.0],
        seed=MODEL_SEED,
        peak=task.base_learning_rate,
        fluent=task.base_share,
        decay_steps=0,
        answer_tokens=task.answer_tokens,
        max_steps=BASE_MAX_STEPS,
    )
    arithmetic.save_checkpoint(model, out / "base")


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def surroundings() -> dict:
    return {
        "machine": {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "gpu": None},
        "versions": {name: version(name) for name in ("verl", "torch", "transformers", "ray")},
    }


def description(task: Task) -> dict:
    """What a reader must know to judge the numbers."""
    return {
        **surroundings(),
        "model": {
            "type": "Llama",
            "layers": LAYERS,
            "hidden": task.hidden,
            "vocabulary": arithmetic.VOCAB_SIZE,
            "seed": MODEL_SEED,
        },
        "task": task.title,
        "held_out": HELD_OUT,
        "rollouts_per_step": ROLLOUTS,
        "updates_per_step": UPDATES,
        "learning_rates": list(task.learning_rates),
        "optimizer": "AdamW, learning rate decayed to zero over the run by a cosine",
        "top_k": TOP_K,
        "methods": {
            name: {
                "title": method.title,
                "responses_per_prompt": method.responses,
                "steps": method.steps + (METHODS[method.start].steps if method.start else 0),
                "learning_rate": "GRPO's" if name in BEYOND else "the best of the grid",
            }
            for name, method in METHODS.items()
        },
    }


class Experiment:
    """Trains what is missing, in the order in which runs need each other, and keeps the results file up to date.

    Args:
        out: models, data and runs of `task`.
        jobs: runs that are trained at the same time. They share the cores, so the seconds of a step grow with it.
    """

    def __init__(self, task: Task, out: Path, results_path: Path, jobs: int):
        self.task, self.out, self.results_path, self.jobs = task, out, results_path, jobs
        self.measured: dict[Run, Measured] = {}

    @property
    def results(self) -> dict:
        runs = [vars(run) | {"curve": self.curve(run)} for run in self.measured]
        return description(self.task) | {"jobs": self.jobs, "runs": runs}

    def curve(self, run: Run) -> dict[str, list]:
        measured = self.from_base(run)
        teacher = self.measured.get(self.teacher_run(run.seed))
        if teacher is None:
            return measured.curve
        last = teacher.outcomes[max(teacher.outcomes)]
        return measured.curve | against_teacher(measured.curve, measured.outcomes, last)

    def from_base(self, run: Run) -> Measured:
        """With the run that it goes on from, if it does."""
        before = self.run_before(run)
        return self.measured[run] if before is None else joined(self.measured[before], self.measured[run])

    def train(self, runs: Sequence[Run]) -> None:
        """Train runs that do not depend on each other."""
        pairs = [(run, self.sources(run)) for run in runs]

        def one(pair: tuple[Run, Sources]) -> Measured:
            return train_once(pair[0], self.task, self.out, pair[1])

        with ThreadPoolExecutor(self.jobs) as pool:
            for run, measured in zip(runs, pool.map(one, pairs), strict=True):
                self.measured[run] = measured
                self.results_path.parent.mkdir(parents=True, exist_ok=True)
                headline_results.write(self.results, self.results_path)

    def best(self, method: str) -> float:
        runs = {run: headline_results.mean_accuracy(measured.curve) for run, measured in self.measured.items()}
        return max((run for run in runs if run.method == method and run.seed == 0), key=runs.__getitem__).learning_rate

    def teacher_run(self, seed: int) -> Run:
        return Run("grpo", self.best("grpo"), seed)

    def run_before(self, run: Run) -> Run | None:
        """The one whose last step `run` starts from; None: it starts from the base."""
        method = METHODS[run.method].start
        return None if method is None else Run(method, self.best(method), run.seed)

    def sources(self, run: Run) -> Sources:
        before, teacher_step = self.run_before(run), METHODS[run.method].teacher_step
        start = self.out / "base" if before is None else checkpoint(before, self.out, METHODS[before.method].steps)
        teacher = None if teacher_step is None else checkpoint(self.teacher_run(run.seed), self.out, teacher_step)
        return Sources(start, teacher)

    def run(self, methods: Sequence[str], seeds: int) -> None:
        rates = self.task.learning_rates
        self.train([Run("grpo", rate, 0) for rate in rates])
        self.train([Run(name, rate, 0) for name in methods if name in DISTILLED for rate in rates])
        self.train([self.teacher_run(seed) for seed in range(1, seeds)])
        self.train([Run("reverse_kl", self.best("reverse_kl"), seed) for seed in range(1, seeds)])
        beyond = [name for name in methods if name in BEYOND]
        self.train([Run(name, self.best("grpo"), seed) for name in beyond for seed in range(seeds)])


def main() -> None:
    root = HERE.parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="chain_sum_4")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=MAIN, help=f"default: {' '.join(MAIN)}")
    parser.add_argument(
        "--out", type=Path, default=root / "runs" / "headline", help="models, data and runs of each task"
    )
    parser.add_argument("--results", type=Path, help="where the measurements go; by default OUT/TASK/results.json")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of GRPO, reverse KL and the ways beyond")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time; default 2")
    arguments = parser.parse_args()
    if missing := [name for name in MAIN if name not in arguments.methods]:
        parser.error(f"--methods: the headline compares {' and '.join(MAIN)}; add {' '.join(missing)}")
    end_with_trainers()
    out = arguments.out.resolve() / arguments.task
    began = time.monotonic()
    arithmetic.quiet()
    task = TASKS[arguments.task]
    make_base(task, out)
    experiment = Experiment(task, out, arguments.results or out / "results.json", arguments.jobs)
    experiment.run(arguments.methods, arguments.seeds)
    print(headline_results.table(experiment.results))
    print(f"\n{headline_results.sentence(experiment.results)}")
    print(f"\n{(time.monotonic() - began) / 60:.0f} minutes; results: {experiment.results_path}")


if __name__ == "__main__":
    main()
