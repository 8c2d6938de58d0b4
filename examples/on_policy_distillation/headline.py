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

    python headline.py [--out DIR] [--results FILE] [--seeds N] [--jobs N]

1. A base model that adds two-digit numbers, some of them right.
2. GRPO from that base, once for each learning rate of the grid. The result at the best one is the teacher.
3. Each way of distilling that teacher back into the base, once for each learning rate of the grid.
4. The main two, GRPO and reverse KL, again with other seeds at their best learning rates; each seed of GRPO is the
   teacher of that seed of reverse KL.

Every run is VERL's trainer as a user starts it, in a folder of its own below DIR/runs. A finished run is not done
again unless its settings or its teacher have changed; an interrupted one is done from its start. FILE receives what was
measured, after every run. The mathematics of what is reported is in headline_results.py.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import arithmetic
import headline_results
import torch
from baselines import FORWARD_KL_TOPK, SAMPLED_K1, TOP_K
from metrics import StepMetrics, read_run
from progress import end_with_trainers, overrides_of, train
from transformers import LlamaForCausalLM

HERE = Path(__file__).resolve().parent
ACTOR = "actor_rollout_ref.actor"
LOSS = f"{ACTOR}.policy_loss"

# The same for every method: rollouts and updates a step, optimizer and schedule, and the learning rates to choose from.
ROLLOUTS, UPDATES = 256, 16
LEARNING_RATES = (7e-6, 2e-5, 6e-5)
GRPO_STEPS, GRPO_SCORE_EVERY, GROUP = 70, 2, 8
DISTILLATION_STEPS = 12
HELD_OUT = 2000
# The base. Its training stops where this share of its training problems is right, without a decay of the learning rate.
LAYERS, HIDDEN, MODEL_SEED = 3, 256, 0
BASE_SHARE, BASE_LEARNING_RATE = 0.45, 7e-4


@dataclass(frozen=True)
class Method:
    """One curve: its name in tables, overrides of the trainer's configuration, responses to a prompt, steps,
    and steps from one that is scored on the held-out problems to the next."""

    title: str
    overrides: tuple[str, ...]
    responses: int = 1
    steps: int = DISTILLATION_STEPS
    score_every: int = 1
    has_teacher: bool = True


def pure(title: str, distillation_type: str, *more: str) -> Method:
    return Method(
        title, (f"{LOSS}.loss_mode=on_policy_distillation", f"{LOSS}.distillation_type={distillation_type}", *more)
    )


def hybrid(title: str, *more: str, responses: int) -> Method:
    common = (f"{LOSS}.loss_mode=hybrid_rl_distillation", "algorithm.adv_estimator=grpo")
    return Method(title, (*common, *more), responses=responses)


METHODS = {
    "grpo": Method("GRPO", ("algorithm.adv_estimator=grpo",), GROUP, GRPO_STEPS, GRPO_SCORE_EVERY, has_teacher=False),
    "reverse_kl": pure("reverse KL", "reverse_kl"),
    "forward_kl": pure("forward KL", "forward_kl"),
    "gkd": pure("gkd, beta 0.5", "gkd", f"{LOSS}.distillation_beta=0.5"),
    "hybrid": hybrid(
        "hybrid, 0.5 RL + 0.5 reverse KL",
        f"{LOSS}.hybrid_lambda_rl=0.5",
        f"{LOSS}.hybrid_lambda_distill=0.5",
        responses=GROUP,
    ),
    "topk": pure(f"forward KL, teacher's top {TOP_K} (baseline)", FORWARD_KL_TOPK),
    "k1": hybrid(
        "sampled token, k1 (baseline)",
        f"{LOSS}.hybrid_rl_loss_mode={SAMPLED_K1}",
        f"{LOSS}.hybrid_lambda_distill=0.0",
        responses=1,
    ),
}


@dataclass(frozen=True)
class Run:
    method: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-lr{self.learning_rate:g}-seed{self.seed}"


def overrides(run: Run, out: Path, teacher: Path | None) -> list[str]:
    """What is said to VERL's trainer, beside what the machine needs."""
    method = METHODS[run.method]
    prompts = ROLLOUTS // method.responses
    return [
        f"actor_rollout_ref.model.path={out}/base",
        f"data.train_files={out}/train.parquet",
        f"data.val_files={out}/test.parquet",  # wanted by VERL, not used
        "data.max_prompt_length=8",
        f"data.max_response_length={arithmetic.MAX_ANSWER_TOKENS}",
        f"data.train_batch_size={prompts}",
        f"data.seed={run.seed}",
        f"actor_rollout_ref.rollout.n={method.responses}",
        f"actor_rollout_ref.rollout.seed={run.seed}",
        f"{ACTOR}.ppo_mini_batch_size={prompts // UPDATES}",
        f"{ACTOR}.data_loader_seed={run.seed}",
        f"{ACTOR}.optim.lr={run.learning_rate:g}",
        f"{ACTOR}.optim.lr_scheduler_type=cosine",  # at a constant rate accuracy keeps jumping by a point or two
        f"reward.custom_reward_function.path={HERE}/arithmetic.py",
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
        "trainer.project_name=headline",
        f"trainer.experiment_name={run.name}",
        *([f"teacher.model.path={teacher}"] if method.has_teacher else []),
        *method.overrides,
    ]


def checkpoint(run: Run, out: Path, step: int) -> Path:
    return out / "runs" / run.name / "checkpoints" / f"global_step_{step}" / "actor" / "huggingface"


def final_checkpoint(run: Run, out: Path) -> Path:
    return checkpoint(run, out, METHODS[run.method].steps)


def held_out_accuracy(path: Path) -> float:
    """Greedy accuracy of a checkpoint on the held-out problems, in one forward."""
    _, held_out = arithmetic.problems(MODEL_SEED, held_out=HELD_OUT)
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return arithmetic.answers_with(model, *arithmetic.encode(held_out)).float().mean().item()


def score_checkpoints(run: Run, out: Path) -> dict[int, float]:
    """Held-out accuracy by step, 0 being the base. Removes all checkpoints but the last, which may be a teacher."""
    method = METHODS[run.method]
    scored = range(method.score_every, method.steps + 1, method.score_every)
    accuracies = {0: held_out_accuracy(out / "base")}
    accuracies |= {step: held_out_accuracy(checkpoint(run, out, step)) for step in scored}
    for step in scored[:-1]:
        shutil.rmtree(out / "runs" / run.name / "checkpoints" / f"global_step_{step}")
    return accuracies


def finished_curve(done: Path, settings: list[str], teacher: Path | None) -> dict | None:
    """The curve in `done`, if it is of a run with these settings and with the teacher that is there now."""
    if not done.exists() or (teacher is not None and teacher.stat().st_mtime > done.stat().st_mtime):
        return None
    saved = json.loads(done.read_text())
    return saved["curve"] if saved["settings"] == settings else None


def train_once(run: Run, out: Path, teacher: Path | None) -> dict:
    """The curve of `run`, trained unless that has been done."""
    folder = out / "runs" / run.name
    done = folder / "curve.json"
    settings = overrides(run, out, teacher)
    measured = finished_curve(done, settings, teacher)
    if measured is None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        command = [sys.executable, "-m", "verl.trainer.main_on_policy_distillation", *overrides_of("cpu"), *settings]
        environment = {
            "VERL_PLATFORM": "cpu",
            "VERL_USE_EXTERNAL_MODULES": "verl_on_policy_distillation,baselines_plugin",
            "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        train(folder, METHODS[run.method].steps, command, environment, label=f"{run.name}   ")
        measured = curve(read_run(folder), score_checkpoints(run, out))
        done.write_text(json.dumps({"settings": settings, "curve": measured}) + "\n")
    return measured


COLUMNS = {
    "kl": "distillation/kl",
    "student_entropy": "distillation/student_entropy",
    "teacher_entropy": "distillation/teacher_entropy",
    "top1_agreement": "distillation/top1_agreement",
    "reward": "critic/score/mean",
    "seconds": "timing_s/step",
}


def curve(metrics: dict[int, StepMetrics], accuracies: dict[int, float]) -> dict[str, list]:
    """What the results keep of a run: one list a column, one entry a step, null where a step has no such number."""
    steps = sorted(metrics.keys() | accuracies.keys())
    rows = [metrics.get(step, {}) for step in steps]
    lengths = [row.get("response_length/mean") for row in rows]
    return {
        "step": steps,
        "accuracy": [significant(accuracies.get(step)) for step in steps],
        **{name: [significant(row.get(key)) for row in rows] for name, key in COLUMNS.items()},
        "tokens": [None if length is None else round(length * ROLLOUTS) for length in lengths],
    }


def significant(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def make_base(out: Path) -> None:
    """The data and the base. Its training stops early: what a longer one would teach is left for RL."""
    out.mkdir(parents=True, exist_ok=True)
    taught, held_out = arithmetic.problems(MODEL_SEED, held_out=HELD_OUT)
    arithmetic.make_split(out / "train.parquet", taught)
    arithmetic.make_split(out / "test.parquet", held_out)
    if (out / "base").exists():
        return
    print("base: training", flush=True)
    model = arithmetic.untrained_model(HIDDEN, LAYERS, arithmetic.VOCAB_SIZE, tied=False, seed=MODEL_SEED)
    arithmetic.train(
        model,
        [taught],
        [1.0],
        seed=MODEL_SEED,
        peak=BASE_LEARNING_RATE,
        fluent=BASE_SHARE,
        decay_steps=0,
    )
    arithmetic.save_checkpoint(model, out / "base")


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def description() -> dict:
    """What a reader must know to judge the numbers."""
    return {
        "machine": {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "gpu": None},
        "versions": {name: version(name) for name in ("verl", "torch", "transformers", "ray")},
        "model": {
            "type": "Llama",
            "layers": LAYERS,
            "hidden": HIDDEN,
            "vocabulary": arithmetic.VOCAB_SIZE,
            "seed": MODEL_SEED,
        },
        "task": arithmetic.DATA_SOURCE,
        "held_out": HELD_OUT,
        "rollouts_per_step": ROLLOUTS,
        "updates_per_step": UPDATES,
        "learning_rates": list(LEARNING_RATES),
        "optimizer": "AdamW, learning rate decayed to zero over the run by a cosine",
        "top_k": TOP_K,
        "methods": {
            name: {"title": method.title, "responses_per_prompt": method.responses, "steps": method.steps}
            for name, method in METHODS.items()
        },
    }


class Experiment:
    """Trains what is missing, in the order in which runs need each other, and keeps the results file up to date.

    Args:
        jobs: runs that are trained at the same time. They share the cores, so the seconds of a step grow with it.
    """

    def __init__(self, out: Path, results_path: Path, jobs: int):
        self.out, self.results_path, self.jobs = out, results_path, jobs
        self.results = description() | {"jobs": jobs, "runs": []}

    def train(self, runs: list[tuple[Run, Path | None]]) -> None:
        """Train runs, each with its teacher, that do not depend on each other."""
        with ThreadPoolExecutor(self.jobs) as pool:
            for (run, _), measured in zip(
                runs, pool.map(lambda pair: train_once(pair[0], self.out, pair[1]), runs), strict=True
            ):
                self.results["runs"].append(vars(run) | {"curve": measured})
                self.results_path.parent.mkdir(parents=True, exist_ok=True)
                headline_results.write(self.results, self.results_path)

    def best(self, method: str) -> float:
        return headline_results.best_learning_rate(self.results, method)

    def teacher(self, seed: int) -> Path:
        return final_checkpoint(Run("grpo", self.best("grpo"), seed), self.out)

    def run(self, seeds: int) -> None:
        self.train([(Run("grpo", rate, 0), None) for rate in LEARNING_RATES])
        distilled = [name for name, method in METHODS.items() if method.has_teacher]
        self.train([(Run(name, rate, 0), self.teacher(0)) for name in distilled for rate in LEARNING_RATES])
        self.train([(Run("grpo", self.best("grpo"), seed), None) for seed in range(1, seeds)])
        self.train([(Run("reverse_kl", self.best("reverse_kl"), seed), self.teacher(seed)) for seed in range(1, seeds)])


def main() -> None:
    root = HERE.parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=root / "runs" / "headline", help="models, data and runs")
    parser.add_argument("--results", type=Path, help="where the measurements go; by default OUT/headline.json")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of GRPO and reverse KL")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time; default 2")
    arguments = parser.parse_args()
    end_with_trainers()
    out = arguments.out.resolve()
    began = time.monotonic()
    arithmetic.quiet()
    make_base(out)
    experiment = Experiment(out, arguments.results or out / "headline.json", arguments.jobs)
    experiment.run(arguments.seeds)
    print(headline_results.table(experiment.results))
    print(f"\n{headline_results.sentence(experiment.results)}")
    print(f"\n{(time.monotonic() - began) / 60:.0f} minutes; results: {experiment.results_path}")


if __name__ == "__main__":
    main()
