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
"""What a student says to a few held-out problems and how far from the teacher it is, token by token.

    python generations.py FOLDER

FOLDER is that of a finished quickstart. Writes FOLDER/generations/before.jsonl and after.jsonl, for the base and for
the trained student, in the format of `report.py`.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from arithmetic import DATA_SOURCE, MAX_ANSWER_TOKENS, compute_score, one_thread, quiet
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

TOP = 5
PROBLEMS = 12


def most_likely(log_probs: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> list[list]:
    """(vocab,) -> the likeliest tokens, each with its probability."""
    top = log_probs.exp().topk(min(TOP, len(log_probs)))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [[tokenizer.decode([index]), round(probability, 5)] for index, probability in pairs]


def kl_divergence(log_s: torch.Tensor, log_t: torch.Tensor) -> torch.Tensor:
    """KL(student || teacher) of log-probabilities (tokens, vocab) -> (tokens,).

    A token that the student never says counts 0, also where the teacher never says it: 0 * inf would make a nan of it.
    """
    probability = log_s.exp()
    return (probability * (log_s - log_t)).masked_fill(probability == 0, 0.0).sum(-1)


@one_thread()
@torch.no_grad()
def score_generation(
    prompt: str,
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    scorer: Callable[[str], float] | None = None,
) -> dict[str, Any]:
    """The student's greedy response to `prompt` and, for each of its tokens, both distributions and their KL.

    Args:
        student, teacher: causal language models of one tokenizer, on the CPU.
        scorer: gives the decoded response a score; None for none.
    """
    prompt_ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    sequence = student.generate(
        input_ids=prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    first = prompt_ids.shape[1]
    log_s, log_t = (
        model(input_ids=sequence).logits[0, first - 1 : -1].float().log_softmax(-1) for model in (student, teacher)
    )  # each (response tokens, vocab)
    vocab = min(log_s.shape[-1], log_t.shape[-1])  # beyond the shorter is padding
    log_s, log_t = log_s[:, :vocab], log_t[:, :vocab]
    response = sequence[0, first:]
    text = tokenizer.decode(response, skip_special_tokens=True)
    return {
        "prompt": prompt,
        "tokens": [tokenizer.decode([token]) for token in response.tolist()],
        "kl": [round(kl, 5) for kl in kl_divergence(log_s, log_t).tolist()],
        "teacher_top": [most_likely(row, tokenizer) for row in log_t],
        "student_top": [most_likely(row, tokenizer) for row in log_s],
        "score": None if scorer is None else scorer(text),
    }


def write_generations(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def score_held_out(student_path: Path, folder: Path) -> list[dict[str, Any]]:
    """`score_generation` of the first held-out problems."""
    student, teacher = (AutoModelForCausalLM.from_pretrained(p).eval() for p in (student_path, folder / "teacher"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    records = []
    for row in Dataset.from_parquet(str(folder / "test.parquet")).to_list()[:PROBLEMS]:
        prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        scorer = partial(compute_score, DATA_SOURCE, ground_truth=row["reward_model"]["ground_truth"])
        records.append(score_generation(prompt, student, teacher, tokenizer, MAX_ANSWER_TOKENS, scorer))
    return records


def main() -> None:
    folder = Path(sys.argv[1])
    quiet()
    trained = json.loads((folder / "results.json").read_text())["checkpoint"]
    for name, student in (("before", "base"), ("after", trained)):
        write_generations(folder / "generations" / f"{name}.jsonl", score_held_out(folder / student, folder))


if __name__ == "__main__":
    main()
