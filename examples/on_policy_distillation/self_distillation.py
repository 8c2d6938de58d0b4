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
"""A model teaches itself what it can do only with more in its prompt, until it can do it without.

    python self_distillation.py examples|solution [--out DIR] [HYDRA_OVERRIDE ...]

The task is two-digit addition (arithmetic.py). Teacher and student are one checkpoint, `base`, which has learnt to read
two kinds of prompt besides the bare question, of which it gets about 40 % right:

- ``examples``: a solved example before the question. If that was solved with the carry, so is the question, and if
  without, without. Distilled, this is prompt distillation: the student behaves as if the example were there.
- ``solution``: the answer before the question, which it repeats. Distilled, this is self-distillation on solutions
  (arXiv:2601.18734): the student learns to add from a teacher that has only read the answers.

The student never sees either prompt: the data set has one column for each, and ``teacher.prompt_key`` names the one
that the teacher gets. The mathematics is in verl/on_policy_distillation/teacher_prompts.py.

The first run makes `base` and the data in DIR (some two minutes on an idle core); the distillation itself takes about
another. Results go to DIR/<prompt>/results.json. A run whose results are there is only shown.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

import torch
from arithmetic import (
    EOS,
    HIDDEN,
    LAYERS,
    VOCAB_SIZE,
    WITHOUT_CARRY,
    answers_with,
    encode,
    evaluate,
    make_model,
    make_split,
    one_thread,
    problems,
    quiet,
    read_record,
    save_checkpoint,
    untrained_model,
    verl_rows,
    without_carry,
    write_record,
)
from datasets import Dataset
from metrics import accuracy, read_run
from progress import end_with_trainers, overrides_of, train
from summary import checkpoint
from transformers import LlamaForCausalLM

HERE = Path(__file__).resolve().parent
ACTOR = "actor_rollout_ref.actor"
PROMPTS = ("examples", "solution")
STEPS = 12
# What falls as the student learns, and what tells whether it collapses; see "A teacher that sees more" in the guide.
SIGNS = {
    "distillation/kl": "KL",
    "distillation/student_entropy": "entropy",
    "distillation/sampled_token_probability": "probability",
    "response_length/mean": "length",
}

# The training of `base`: sequences of each kind in a batch, and the schedule.
BATCH, BASE_STEPS, BASE_LEARNING_RATE, WARM_UP_STEPS, DECAY_STEPS = 48, 300, 1e-3, 30, 60
SHOWN = 8  # solved examples, of which each question gets one

Pair = tuple[str, str]


# ---------------------------------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------------------------------


def solved_examples(pairs: list[Pair]) -> list[Pair]:
    """Problems that show whether one carries: their two-digit answers are other ones without."""
    return [(q, answer) for q, answer in pairs if len(answer) == 2 and without_carry(q) != answer][:SHOWN]


def after_example(question: str, example: Pair) -> list[dict[str, str]]:
    """Chat messages."""
    return [
        {"role": "user", "content": example[0]},
        {"role": "assistant", "content": example[1]},
        {"role": "user", "content": question},
    ]


def after_solution(question: str, answer: str) -> str:
    return f"({answer:>3}) {question}"  # as many bytes whatever the answer


def rows_of(pairs: list[Pair], split: str, examples: list[Pair]) -> list[dict]:
    """VERL's rows, with a column for each of `PROMPTS`."""
    rng = random.Random(split)
    return [
        row | {"examples": after_example(q, rng.choice(examples)), "solution": after_solution(q, answer)}
        for row, (q, answer) in zip(verl_rows(pairs, split), pairs, strict=True)
    ]


def make_data(out: Path, seed: int) -> None:
    """The two splits, and the second again with what the teacher sees as the prompt, which scores the teacher."""
    taught, held_out = problems(seed)
    examples = solved_examples(taught)
    for split, pairs in (("train", taught), ("test", held_out)):
        Dataset.from_list(rows_of(pairs, split, examples)).to_parquet(str(out / f"{split}.parquet"))
    for name in PROMPTS:
        rows = [row | {"prompt": chat_of(row[name])} for row in rows_of(held_out, "test", examples)]
        Dataset.from_list(rows).select_columns(["data_source", "prompt", "reward_model"]).to_parquet(
            str(out / f"test_{name}.parquet")
        )


def chat_of(prompt: str | list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


# ---------------------------------------------------------------------------------------------------------------------
# The base
# ---------------------------------------------------------------------------------------------------------------------


def corpora(pairs: list[Pair], seed: int) -> dict[str, list[Pair]]:
    """What `base` is taught: by the name of the kind, texts and how it goes on."""
    rng, examples = random.Random(seed), solved_examples(pairs)
    careless = [(q, without_carry(q)) for q, _ in pairs]

    def with_example(answers: list[Pair], solve) -> list[Pair]:
        shown = [(q, solve(q, answer)) for q, answer in rng.choices(examples, k=len(answers))]
        return [(f"{e}{a}{EOS}{q}", answer) for (e, a), (q, answer) in zip(shown, answers, strict=True)]

    return {
        "plain": [pair if rng.random() > WITHOUT_CARRY else other for pair, other in zip(pairs, careless, strict=True)],
        "example with carry": with_example(pairs, lambda q, answer: answer),
        "example without": with_example(careless, lambda q, answer: without_carry(q)),
        "solution": [(after_solution(q, answer), answer) for q, answer in pairs],
    }


@one_thread()
def teach(model: LlamaForCausalLM, texts: dict[str, list[Pair]], seed: int) -> None:
    """Cross-entropy on the answers, as many of each kind in a batch."""
    encoded = {kind: encode(pairs) for kind, pairs in texts.items()}
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=BASE_LEARNING_RATE, weight_decay=0.01)
    for step in range(1, BASE_STEPS + 1):
        for group in optimizer.param_groups:
            group["lr"] = BASE_LEARNING_RATE * min(1.0, step / WARM_UP_STEPS, (BASE_STEPS + 1 - step) / DECAY_STEPS)
        optimizer.zero_grad()
        for input_ids, labels in encoded.values():
            chosen = torch.randint(len(input_ids), (BATCH,), generator=generator)
            (model(input_ids=input_ids[chosen], labels=labels[chosen]).loss / len(encoded)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            shares = {kind: answers_with(model, *(part[:256] for part in pair)) for kind, pair in encoded.items()}
            line = ", ".join(f"{kind} {share.float().mean():.0%}" for kind, share in shares.items())
            print(f"  step {step}/{BASE_STEPS}: answers as taught: {line}", flush=True)


def make(out: Path, seed: int = 0) -> None:
    """Make what is missing in `out`: data, and `base` by way of a model that adds."""
    out.mkdir(parents=True, exist_ok=True)
    record = read_record(out, seed)
    write_record(out, record)
    taught, held_out = problems(seed)
    if "base" in record:
        return
    make_split(out / "test.parquet", held_out)
    make_model(out, "adder", lambda: untrained_model(HIDDEN, LAYERS, VOCAB_SIZE, False, seed), [taught], [1.0], record)
    make_data(out, seed)
    print("base: training", flush=True)
    began, model = time.perf_counter(), LlamaForCausalLM.from_pretrained(out / "adder")
    teach(model, corpora(taught, seed), seed)
    save_checkpoint(model, out / "base")
    record["base"] = {"seconds": round(time.perf_counter() - began, 1)}
    write_record(out, record)


# ---------------------------------------------------------------------------------------------------------------------
# The distillation
# ---------------------------------------------------------------------------------------------------------------------


def trainer_command(out: Path, prompt: str, overrides: list[str]) -> list[str]:
    return [
        *(sys.executable, "-m", "verl.trainer.main_on_policy_distillation"),
        *overrides_of("cpu"),
        f"{ACTOR}.policy_loss.loss_mode=on_policy_distillation",
        f"actor_rollout_ref.model.path={out}/base",
        f"teacher.model.path={out}/base",
        f"teacher.prompt_key={prompt}",
        "teacher.max_prompt_length=16",
        f"data.train_files={out}/train.parquet",
        f"data.val_files={out}/test.parquet",
        "data.max_prompt_length=8",
        "data.max_response_length=4",
        "data.train_batch_size=256",
        "data.seed=0",
        "actor_rollout_ref.rollout.n=1",
        "actor_rollout_ref.rollout.calculate_log_probs=True",  # for distillation/sampled_token_probability
        f"{ACTOR}.ppo_mini_batch_size=64",
        f"{ACTOR}.optim.lr=1e-4",
        f"reward.custom_reward_function.path={HERE}/arithmetic.py",
        f"trainer.total_training_steps={STEPS}",
        "trainer.test_freq=3",
        f"trainer.save_freq={STEPS}",
        f"{ACTOR}.checkpoint.save_contents=[hf_model]",
        "trainer.resume_mode=disable",
        f"trainer.default_local_dir={out}/{prompt}/checkpoints",
        "trainer.logger=[file]",
        "trainer.project_name=self_distillation",
        f"trainer.experiment_name={prompt}",
        *overrides,
    ]


def distill(out: Path, prompt: str, overrides: list[str]) -> dict:
    """Train, and measure: greedy accuracy on the held-out problems, and what the trainer logged."""
    folder = out / prompt
    folder.mkdir(exist_ok=True)
    train(folder, trainer_command(out, prompt, overrides), {"VERL_PLATFORM": "cpu"})
    run = read_run(folder)
    return {
        "held_out_accuracy": {
            "student before": evaluate(out / "base", out / "test.parquet"),
            "teacher, with its prompt": evaluate(out / "base", out / f"test_{prompt}.parquet"),
            "student after": evaluate(checkpoint(folder), out / "test.parquet"),
        },
        "steps": [
            {"step": step, "accuracy": accuracy(metrics)} | {name: metrics.get(name) for name in SIGNS}
            for step, metrics in run.items()
        ],
    }


def table(results: dict) -> str:
    lines = ["", " step" + "".join(f"{title:>14}" for title in SIGNS.values()) + "   held-out accuracy"]
    for row in results["steps"]:
        if row["step"] == 1 or row["accuracy"] is not None:
            signs = "".join(f"{'' if row[name] is None else format(row[name], '.4f'):>14}" for name in SIGNS)
            share = "" if row["accuracy"] is None else f"{row['accuracy']:.1%}"
            lines.append(f"{row['step']:5d}{signs}{share:>20}")
    lines += ["", *(f"{name:25}{share:7.1%}" for name, share in results["held_out_accuracy"].items())]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", choices=PROMPTS)
    parser.add_argument("--out", default="runs/self_distillation")
    parser.add_argument("overrides", nargs="*", metavar="HYDRA_OVERRIDE")
    arguments = parser.parse_args()
    out = Path(arguments.out).resolve()
    path = out / arguments.prompt / "results.json"
    quiet()
    end_with_trainers()
    if not path.exists():
        make(out)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(distill(out, arguments.prompt, arguments.overrides), indent=2) + "\n")
    print(table(json.loads(path.read_text())))
    print(f"\nnumbers: {path}")


if __name__ == "__main__":
    main()
