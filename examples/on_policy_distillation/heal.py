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
"""Takes layers out of a language model, and heals it: it learns from the original, on its own generations.

    python heal.py MODEL [FOLDER] [--drop N] [--steps N] [--text FILE] [HYDRA_OVERRIDE ...]

MODEL is a causal language model in Hugging Face format: a folder, or a name on the Hub. FOLDER (default: runs/heal)
receives the shortened model, the data, the metrics, results.json, report.html and the healed model. Run again with the
same arguments, it continues an interrupted run. A finished one it shows, if what is said fits it; MODEL and FOLDER are
enough.

Some layers of the middle are dropped, evenly spread; `drop_layers.py`. The student goes on from the beginnings of
passages of a text, and the original, its teacher, says at each token what it would have said: on-policy distillation by
reverse KL. The text is by default the language reference that Python has for its `help()`. What is measured is the
negative log-likelihood of other passages of it, which is not what is trained on.
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import python_docs
import quickstart
import torch
from arithmetic import quiet
from datasets import Dataset
from drop_layers import drop_layers, evenly_spread, require_same
from generations import score_generation, write_generations
from metrics import read_run
from progress import end_with_trainers, overrides_of, train
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

HERE = Path(__file__).resolve().parent
ACTOR = "actor_rollout_ref.actor"
TOTAL_STEPS = "trainer.total_training_steps"
DATA_SOURCE = "text"

DROP, STEPS = 3, 8
PROMPTS, PROMPT_TOKENS, RESPONSE_TOKENS = 32, 32, 32  # of a step; a prompt may have a few tokens more when read again
MAX_PROMPT_TOKENS = PROMPT_TOKENS + 8
UPDATES, LEARNING_RATE = 2, 5e-5  # of a step
PASSAGE = 600  # characters, or a paragraph more
HELD_OUT, SCORED_TOKENS = 32, 128  # passages, and of each the first tokens
SHOWN = 6  # passages in the report


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def passages(text: str) -> list[str]:
    """`text` cut at blank lines into passages. Of equal paragraphs only the first counts."""
    found, current = [], ""
    for paragraph in dict.fromkeys(re.split(r"\n\s*\n", text)):
        current = f"{current}\n\n{paragraph}" if current else paragraph
        if len(current) >= PASSAGE:
            found.append(current)
            current = ""
    return found


def require_enough(count: int, needed: int, what: str) -> None:
    if count < needed:
        raise ValueError(f"the text has {count} {what}, and {needed} are needed: give a longer one with --text")


def split(found: list[str]) -> tuple[list[str], list[str]]:
    """Passages to begin from, and held-out ones, which are spread over the text."""
    require_enough(len(found), HELD_OUT + PROMPTS, f"passages of {PASSAGE} characters")
    every = len(found) // HELD_OUT
    held_out = found[every - 1 :: every][:HELD_OUT]
    return [passage for passage in found if passage not in held_out], held_out


def prompts(found: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Their beginnings: enough for a step at least, as VERL fills its batches."""
    texts = beginnings(found, tokenizer)
    what = f"passages to learn from whose beginning has at most {MAX_PROMPT_TOKENS} tokens when read again"
    require_enough(len(texts), PROMPTS, what)
    return texts


def beginnings(found: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The first tokens of each passage, as text; without those that are too many when they are read again."""
    texts = [tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][:PROMPT_TOKENS]) for text in found]
    return [text for text in texts if len(tokenizer(text)["input_ids"]) <= MAX_PROMPT_TOKENS]


def plain_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """A chat template that makes of a message its text, read as the tokenizer reads a text."""
    begins = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return (tokenizer.bos_token if begins else "") + "{% for message in messages %}{{ message.content }}{% endfor %}"


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


def load(path: str | Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def make_student(model_path: str, drop: int, path: Path) -> dict[str, Any]:
    """Write the shortened model to `path`, which appears only when complete. Returns what was done."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto")
    layers = model.config.get_text_config().num_hidden_layers
    dropped = evenly_spread(layers, drop)
    before = model.num_parameters()
    drop_layers(model, dropped)
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    saved = AutoModelForCausalLM.from_pretrained(partial, dtype="auto")
    require_same(model, saved, tokenizer("The quick brown fox", return_tensors="pt")["input_ids"])
    shutil.rmtree(path, ignore_errors=True)
    os.replace(partial, path)
    return {"layers": layers, "dropped": dropped, "parameters": {"teacher": before, "student": model.num_parameters()}}


@torch.no_grad()
def negative_log_likelihood(path: str | Path, texts: list[str]) -> float:
    """Mean of -log p(token | those before it), in nats, over the first tokens of the texts, but the first of each."""
    model, tokenizer = load(path), AutoTokenizer.from_pretrained(path)
    total, count = 0.0, 0
    for text in texts:
        input_ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :SCORED_TOKENS]
        log_probs = model(input_ids=input_ids).logits[0, :-1].float().log_softmax(-1)  # (predicted tokens, vocab)
        total -= log_probs.gather(-1, input_ids[0, 1:, None]).sum().item()
        count += len(log_probs)
    return total / count


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def require_as_made(out: Path, made_with: dict[str, Any], said: dict[str, Any]) -> None:
    """Refuse what is said of a folder that was made with something else. None says nothing."""
    other = {name: value for name, value in said.items() if value is not None and value != made_with[name]}
    if other:
        raise ValueError(f"{out} was made with {made_with}, not with {other}: choose another folder")


def prepare(out: Path, model: str, drop: int | None, text: str | None) -> dict[str, Any]:
    """Make student and data in `out`, and measure student and teacher; once. Returns the record of it."""
    path = out / "heal.json"
    if path.exists():
        record = json.loads(path.read_text())
        require_as_made(out, record["settings"], {"model": model, "drop": drop, "text": text})
        return record
    drop = DROP if drop is None else drop
    learnt, held_out = split(passages(Path(text).read_text() if text else python_docs.reference()))
    texts = prompts(learnt, AutoTokenizer.from_pretrained(model))
    made = make_student(model, drop, out / "student")
    rows = [{"data_source": DATA_SOURCE, "prompt": [{"role": "user", "content": text}]} for text in texts]
    Dataset.from_list(rows).to_parquet(str(out / "train.parquet"))
    record = {"settings": {"model": model, "drop": drop, "text": text}, **made, "held_out": held_out}
    print(what_was_dropped(record), flush=True)
    record["nll"] = {"student before": negative_log_likelihood(out / "student", held_out)}
    record["nll"]["teacher"] = negative_log_likelihood(model, held_out)
    path.write_text(json.dumps(record, indent=2) + "\n")
    return record


def trainer_command(out: Path, model: str, steps: int, template: str, machine: str, overrides: list[str]) -> list[str]:
    return [
        *(sys.executable, "-m", "verl.trainer.main_on_policy_distillation"),
        *overrides_of(machine),
        f"{ACTOR}.policy_loss.loss_mode=on_policy_distillation",
        f"{ACTOR}.policy_loss.distillation_type=reverse_kl",
        f"teacher.model.path={model}",
        f"actor_rollout_ref.model.path={out}/student",
        f"data.train_files={out}/train.parquet",
        f"data.val_files={out}/train.parquet",  # VERL wants one; nothing is validated
        f"+data.apply_chat_template_kwargs.chat_template={quoted(template)}",
        f"data.max_prompt_length={MAX_PROMPT_TOKENS}",
        f"data.max_response_length={RESPONSE_TOKENS}",
        f"data.train_batch_size={PROMPTS}",
        "data.seed=0",
        "actor_rollout_ref.rollout.n=1",
        f"{ACTOR}.ppo_mini_batch_size={PROMPTS // UPDATES}",
        f"{ACTOR}.optim.lr={LEARNING_RATE}",
        f"{TOTAL_STEPS}={steps}",
        f"trainer.total_epochs={steps}",  # enough: an epoch has a step or more
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        f"trainer.save_freq={max(1, steps // 2)}",
        "trainer.max_actor_ckpt_to_keep=1",
        f"{ACTOR}.checkpoint.save_contents=[model,optimizer,extra,hf_model]",
        f"trainer.default_local_dir={out}/checkpoints",
        "trainer.logger=[file]",
        "trainer.project_name=on_policy_distillation",
        "trainer.experiment_name=heal",
        *overrides,
    ]


def quoted(value: str) -> str:
    """`value` as Hydra's command line takes a string of any characters."""
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def healed(out: Path, steps: int) -> Path:
    """The student of the last step, as a Hugging Face checkpoint. VERL may end before that step without an error."""
    student = out / "checkpoints" / f"global_step_{steps}" / "actor" / "huggingface"
    if not student.exists():
        raise ValueError(
            f"the training ended without {student}: give the --steps that the folder was begun with, or choose another "
            f"folder; {out}/train.log says more"
        )
    return student


def results_of(out: Path, record: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    student = healed(out, settings["steps"])
    nll = record["nll"] | {"student after": negative_log_likelihood(student, record["held_out"])}
    return {
        "settings": settings,
        "layers": record["layers"],
        "dropped": record["dropped"],
        "parameters": record["parameters"],
        "steps": [
            {"step": step, "kl": metrics["distillation/kl"], "seconds": metrics.get("timing_s/step")}
            for step, metrics in read_run(out).items()
            if "distillation/kl" in metrics
        ],
        "held_out": {
            name: {"nll": nll[name], "perplexity": math.exp(nll[name])}
            for name in ("student before", "student after", "teacher")
        },
        "checkpoint": str(student.relative_to(out)),
    }


def write_report(out: Path, model: str, record: dict[str, Any], student: Path) -> None:
    """The curves, and how both students go on from held-out passages, with the KL of each token."""
    teacher, tokenizer = load(model), AutoTokenizer.from_pretrained(model)
    shown = beginnings(record["held_out"][:SHOWN], tokenizer)
    dumps = []
    for name, path in (("before", out / "student"), ("after", student)):
        model_of_name = load(path)
        file = out / "generations" / f"{name}.jsonl"
        write_generations(
            file, [score_generation(prompt, model_of_name, teacher, tokenizer, RESPONSE_TOKENS) for prompt in shown]
        )
        dumps.append(f"{name}={file}")
    command = [sys.executable, str(HERE / "report.py"), "--out", str(out / "report.html"), str(out)]
    subprocess.run([*command, "--generations", *dumps], check=True)


def what_was_dropped(record: dict[str, Any]) -> str:
    millions = {name: f"{count / 1e6:.1f} million parameters" for name, count in record["parameters"].items()}
    numbers = ", ".join(map(str, record["dropped"]))
    return (
        f"teacher: {record['layers']} layers, {millions['teacher']}\n"
        f"student: {record['layers'] - len(record['dropped'])} layers, {millions['student']}; without layers {numbers} "
        "(counted from 0)"
    )


def table(results: dict[str, Any]) -> str:
    lines = [what_was_dropped(results), "", " step       KL"]
    lines += [f"{row['step']:5d}   {row['kl']:6.4f}" for row in results["steps"]]
    lines += ["", f"{'held-out text':16}{'nats a token':>14}{'perplexity':>12}"]
    lines += [f"{name:16}{row['nll']:14.3f}{row['perplexity']:12.1f}" for name, row in results["held_out"].items()]
    return "\n".join(lines)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number above 0")
    return int(text)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("rest", nargs="*", metavar="FOLDER or HYDRA_OVERRIDE")
    # Not said is None: of a folder that is there it is what it was.
    parser.add_argument("--drop", type=int, help=f"how many layers (default: {DROP})")
    parser.add_argument("--steps", type=positive, help=f"of the training (default: {STEPS})")
    parser.add_argument("--text", help="a text file to take prompts and held-out passages from")
    parsed = parser.parse_intermixed_args(arguments)
    is_named = bool(parsed.rest) and "=" not in parsed.rest[0]
    parsed.out = Path(parsed.rest.pop(0) if is_named else HERE.parents[1] / "runs" / "heal").resolve()
    if Path(parsed.model).exists():
        parsed.model = str(Path(parsed.model).resolve())
    elif parsed.model.count("/") > 1 or parsed.model.startswith("/"):  # no name on the Hub
        parser.error(
            f"{parsed.model} does not exist: give the folder of a Hugging Face checkpoint, or a name on the Hub"
        )
    for said in parsed.rest:
        if said.lstrip("+~").partition("=")[0] == TOTAL_STEPS:
            parser.error(f"{said}: give the number of steps with --steps")
    parsed.text = parsed.text and str(Path(parsed.text).resolve())
    return parsed


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    out, model = arguments.out, arguments.model
    out.mkdir(parents=True, exist_ok=True)
    record = prepare(out, model, arguments.drop, arguments.text)
    path = out / "results.json"
    if path.exists():
        results = json.loads(path.read_text())
        require_as_made(out, results["settings"], {"steps": arguments.steps, "overrides": arguments.rest or None})
    else:
        settings = {"steps": arguments.steps or STEPS, "overrides": arguments.rest}
        template = plain_template(AutoTokenizer.from_pretrained(model))
        machine = quickstart.this_machine()
        command = trainer_command(out, model, settings["steps"], template, machine, settings["overrides"])
        train(out, command, quickstart.MACHINES[machine])
        results = results_of(out, record, settings)
        path.write_text(json.dumps(results, indent=2) + "\n")
    if not (out / "report.html").exists():
        write_report(out, model, record, out / results["checkpoint"])
    return results


def main() -> None:
    arguments = parse(sys.argv[1:])
    quiet()
    end_with_trainers()
    try:
        results = run(arguments)
    except (OSError, ValueError) as error:
        sys.exit(f"heal.py: {error}")
    out = arguments.out
    print(f"\n{table(results)}\n\nnumbers: {out}/results.json\nreport:  {out}/report.html")
    print(f"healed:  {out / results['checkpoint']}")


if __name__ == "__main__":
    main()
