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
"""What a truncated, a sampled or a scheduled loss loses against the exact ones, on text with a vocabulary of 4,096.

    python ablation.py [--methods NAME ...] [--out DIR] [--results FILE] [--seeds N] [--jobs N]

1. Text, teacher and student of python_docs.py.
2. Every method with seed 0, once for each learning rate of the grid.
3. Every method again with the other seeds, at the learning rate that left the lowest held-out negative log-likelihood.

Every run is VERL's trainer as a user starts it, in a folder of its own below DIR/runs; a finished one is not done again
unless its settings or the teacher have changed. The trainer saves some of its steps, which are scored when it has
ended, alike for all methods; ablation_scores.py says how. FILE receives what was measured, after every run. From there
to tables: ablation_results.py.
"""

import argparse
import platform
import shutil
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import ablation_results
import headline_results
import python_docs
import torch
from ablation_scores import Scorer
from arithmetic import one_thread, quiet
from baselines import SAMPLED_K1, TOP_KS, truncated
from headline import (
    GROUP,
    HERE,
    LOSS,
    Method,
    Run,
    Setup,
    Sources,
    checkpoint,
    falling,
    hybrid,
    pure,
    significant,
    surroundings,
    trained,
)
from metrics import StepMetrics, read_run
from progress import end_with_trainers
from transformers import LlamaForCausalLM

ROLLOUTS, UPDATES = 128, 8  # of a step
STEPS, SCORE_EVERY = 16, 4
LEARNING_RATES = (3e-4, 1e-3, 3e-3)
LEAST_GAP = 0.2  # nats of held-out NLL between student and teacher


def topk_methods(k: int) -> dict[str, Method]:
    return {
        f"tail{k}": pure(
            f"reverse KL, top {k} and the tail", "reverse_kl", "teacher.payload=topk", f"teacher.topk={k}"
        ),
        f"forward_top{k}": pure(f"forward KL, VERL's top {k}", truncated("forward_kl", k)),
        f"reverse_top{k}": pure(f"reverse KL, truncated to the top {k}", truncated("reverse_kl", k)),
    }


def in_this_size(methods: dict[str, Method]) -> dict[str, Method]:
    return {name: replace(method, steps=STEPS, score_every=SCORE_EVERY) for name, method in methods.items()}


METHODS = in_this_size(
    {
        "reverse_kl": pure("reverse KL, exact", "reverse_kl"),
        "forward_kl": pure("forward KL, exact", "forward_kl"),
        "gkd": pure("gkd, beta 0.5, exact", "gkd", f"{LOSS}.distillation_beta=0.5"),
        **{name: method for k in TOP_KS for name, method in topk_methods(k).items()},
        "k1": hybrid(
            "reverse KL, sampled token (k1)",
            f"{LOSS}.hybrid_rl_loss_mode={SAMPLED_K1}",
            f"{LOSS}.hybrid_lambda_distill=0.0",
            responses=1,
        ),
        "hybrid": hybrid(
            f"0.5 GRPO + reverse KL, weight 1 to 0 in {STEPS} steps",
            f"{LOSS}.hybrid_lambda_rl=0.5",
            *falling(1.0, STEPS),
            responses=GROUP,
        ),
    }
)
SETUP = Setup(
    experiment="ablation",
    methods=METHODS,
    prompt_tokens=python_docs.PROMPT_TOKENS,
    answer_tokens=python_docs.RESPONSE_TOKENS,
    rollouts=ROLLOUTS,
    updates=UPDATES,
    reward_file=HERE / "python_docs.py",
)


def curve(metrics: dict[int, StepMetrics], scores: dict[int, dict[str, float]]) -> dict[str, list]:
    """One list a column, one entry a scored step: seconds and tokens are those of all steps up to it.

    The first step waits for processes that are still starting, several times as long as it trains: it counts as the
    median of the others.

    Args:
        metrics: of every step, from 1 on.
        scores: of the scored steps; step 0 is the student before.
    """
    steps = sorted(scores)
    seconds = {step: row["timing_s/step"] for step, row in metrics.items()}
    seconds[1] = statistics.median(seconds[step] for step in metrics if step != 1)
    until = {step: [metrics[done] for done in metrics if done <= step] for step in steps}
    return {
        "step": steps,
        "seconds": [significant(sum(seconds[done] for done in metrics if done <= step)) for step in steps],
        "tokens": [round(sum(row["response_length/mean"] for row in until[step]) * ROLLOUTS) for step in steps],
        "reward": [significant(metrics.get(step, {}).get("critic/score/mean")) for step in steps],
        **{name: [significant(scores[step][name]) for step in steps] for name in scores[0]},
    }


def require_gap(references: dict[str, dict[str, float]]) -> None:
    """Raise ValueError, before any run, where the teacher has little to teach."""
    student, teacher = (references[name]["nll"] for name in ("base", "teacher"))
    print(f"held-out NLL: student {student:.3f}, teacher {teacher:.3f}", flush=True)
    if not student - teacher >= LEAST_GAP:
        raise ValueError(
            f"the teacher's held-out NLL is {teacher:.3f} and the student's {student:.3f}: less than {LEAST_GAP} to "
            "gain. Train the teacher for longer, or the student for less (MODELS in python_docs.py), in another --out."
        )


class Ablation:
    """Trains and scores what is missing, and keeps the results file up to date.

    Args:
        out: text, models and runs.
        jobs: runs at the same time. They share the cores, so the seconds of a step grow with it.
    """

    def __init__(self, out: Path, results_path: Path, jobs: int):
        self.out, self.results_path, self.jobs = out, results_path, jobs
        self.text = python_docs.make(out)
        windows = torch.tensor(self.text.pop("held_out"))
        with one_thread():
            teacher = LlamaForCausalLM.from_pretrained(out / "teacher", dtype=torch.float32).eval()
            self.scorer = Scorer(teacher, windows, python_docs.RESPONSE_TOKENS, TOP_KS)
        self.references = {name: self.scores(out / name) for name in ("base", "teacher")}
        require_gap(self.references)
        self.curves: dict[Run, dict[str, list]] = {}

    @one_thread()
    def scores(self, path: Path) -> dict[str, float]:
        return self.scorer(LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval())

    def measure(self, run: Run) -> dict:
        """The curve of a run that has been trained; removes its checkpoints."""
        steps = range(SCORE_EVERY, STEPS + 1, SCORE_EVERY)
        scores = {step: self.scores(checkpoint(run, self.out, step)) for step in steps}
        folder = self.out / "runs" / run.name
        measured = {"curve": curve(read_run(folder), {0: self.references["base"]} | scores)}
        shutil.rmtree(folder / "checkpoints")
        return measured

    def train_once(self, run: Run) -> dict[str, list]:
        sources = Sources(self.out / "base", self.out / "teacher")
        return trained(run, SETUP, self.out, sources, lambda: self.measure(run))["curve"]

    def train(self, runs: Sequence[Run]) -> None:
        with ThreadPoolExecutor(self.jobs) as pool:
            for run, columns in zip(runs, pool.map(self.train_once, runs), strict=True):
                self.curves[run] = columns
                self.results_path.parent.mkdir(parents=True, exist_ok=True)
                headline_results.write(self.results, self.results_path)

    def run(self, methods: Sequence[str], seeds: int) -> None:
        self.train([Run(name, rate, 0) for name in methods for rate in LEARNING_RATES])
        best = {name: ablation_results.best_learning_rate(self.results, name) for name in methods}
        self.train([Run(name, best[name], seed) for name in methods for seed in range(1, seeds)])

    @property
    def results(self) -> dict:
        """What a reader must know to judge the numbers, and the numbers."""
        return {
            **surroundings(),
            "python": platform.python_version(),
            "text": self.text,
            "held_out": python_docs.HELD_OUT,
            "vocabulary": python_docs.VOCAB_SIZE,
            "prompt_tokens": python_docs.PROMPT_TOKENS,
            "response_tokens": python_docs.RESPONSE_TOKENS,
            "rollouts_per_step": ROLLOUTS,
            "updates_per_step": UPDATES,
            "steps": STEPS,
            "learning_rates": list(LEARNING_RATES),
            "top_ks": list(TOP_KS),
            "jobs": self.jobs,
            "references": {
                name: {key: significant(value) for key, value in scores.items()}
                for name, scores in self.references.items()
            },
            "methods": {
                name: {"title": method.title, "responses_per_prompt": method.responses}
                for name, method in METHODS.items()
            },
            "runs": [vars(run) | {"curve": columns} for run, columns in self.curves.items()],
        }


def main() -> None:
    root = HERE.parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--out", type=Path, default=root / "runs" / "ablation", help="text, models and runs")
    parser.add_argument("--results", type=Path, help="where the measurements go; by default OUT/results.json")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of every method; default 3")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time; default 2")
    arguments = parser.parse_args()
    end_with_trainers()
    quiet()
    began = time.monotonic()
    out = arguments.out.resolve()
    ablation = Ablation(out, arguments.results or out / "results.json", arguments.jobs)
    ablation.run(arguments.methods, arguments.seeds)
    print(ablation_results.block(ablation.results))
    print(f"\n{(time.monotonic() - began) / 60:.0f} minutes; results: {ablation.results_path}")


if __name__ == "__main__":
    main()
