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
"""Two-digit addition: the models, the data and the reward of the quickstart, all made in code.

    python arithmetic.py make --out DIR [--seed 0]

writes DIR/train.parquet and DIR/test.parquet (VERL's RLHF format, no problem in both), DIR/teacher (about 100 % of the
held-out problems right) and DIR/base (the teacher after a second training, on answers most of which forget to carry:
about 40 %), and records what it measured in DIR/arithmetic.json. It takes about a minute on one CPU core. Nothing is
downloaded.

VERL reads the reward from this file too: `reward.custom_reward_function.path=arithmetic.py`, whose default name is
`compute_score`.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

DATA_SOURCE = "two_digit_addition"
EOS, PAD = "<|endoftext|>", "<|pad|>"
VOCAB_SIZE = 256 + 2  # every byte, then EOS and PAD
OPERANDS = range(10, 100)  # two digits always, so every prompt is six tokens long
MAX_ANSWER_TOKENS = len(str(2 * OPERANDS[-1])) + 1  # the digits of the largest sum, then EOS
HELD_OUT = 500
IGNORE = -100  # the label the cross-entropy of torch and transformers skips

HIDDEN, LAYERS = 128, 3
BATCH, LEARNING_RATE, WARM_UP_STEPS, DECAY_STEPS = 128, 1.5e-3, 30, 60
PROBE_EVERY, PROBE_SIZE = 10, 512
# Networks of this size learn to add within some 100 steps, but at a different time for each seed: an accuracy is a
# steadier place to stop than a step count.
FLUENT, MAX_STEPS = 0.93, 2000
# The base is taught this share of its answers without carries. Above a half, so that its most likely answer is mostly
# wrong where there is a carry; well below one, so that it still samples the right answer now and then.
WITHOUT_CARRY = 0.62


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def problems(seed: int = 0, held_out: int = HELD_OUT) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """All (question, answer) pairs, e.g. ("12+34=", "46"), shuffled and cut into train and held-out."""
    pairs = [(f"{a}+{b}=", str(a + b)) for a in OPERANDS for b in OPERANDS]
    random.Random(seed).shuffle(pairs)
    return pairs[held_out:], pairs[:held_out]


def without_carry(question: str) -> str:
    """The answer of someone who forgets to carry: "47+38=" gives "75"."""
    a, b = question.rstrip("=").split("+")
    return "".join(str((int(x) + int(y)) % 10) for x, y in zip(a, b, strict=True))


def verl_rows(pairs: list[tuple[str, str]], split: str, data_source: str = DATA_SOURCE) -> list[dict]:
    return [
        {
            "data_source": data_source,
            "prompt": [{"role": "user", "content": question}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": answer},
            "extra_info": {"split": split, "index": index},
        }
        for index, (question, answer) in enumerate(pairs)
    ]


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs) -> float:
    """VERL's reward contract: 1.0 if the response is the sum and nothing else, else 0.0."""
    if data_source != DATA_SOURCE:
        raise ValueError(f"this reward scores {DATA_SOURCE!r}, not {data_source!r}")
    # VERL decodes without special tokens; a caller who kept them still gets the text up to the end of the answer.
    answer = solution_str.split(EOS)[0].replace(PAD, "")
    return float(answer.strip() == ground_truth)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer and checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, whose chat template is the message itself: the prompt of a question is the question."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return with_plain_template(backend)


def with_plain_template(backend: Tokenizer) -> PreTrainedTokenizerFast:
    """With EOS, PAD, and a chat template that is the message itself."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, pad_token=PAD, padding_side="left")
    tokenizer.chat_template = (
        "{% for message in messages %}"
        "{{ message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% endfor %}"
    )
    return tokenizer


def untrained_model(
    hidden: int,
    layers: int,
    vocab_size: int,
    tied: bool,
    seed: int,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> LlamaForCausalLM:
    tokenizer = tokenizer or build_tokenizer()
    if vocab_size < len(tokenizer):
        raise ValueError(f"vocab_size={vocab_size} is smaller than the tokenizer's {len(tokenizer)}")
    heads = max(2, hidden // 32)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def save_checkpoint(model: LlamaForCausalLM, path: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> None:
    """Write model and tokenizer to `path`, which appears only when complete: an interrupted run leaves no half."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    (tokenizer or build_tokenizer()).save_pretrained(partial)
    os.replace(partial, path)


def tiny_model(
    path: str | Path,
    hidden: int = 32,
    layers: int = 1,
    vocab_size: int = VOCAB_SIZE,
    tied: bool = False,
    seed: int = 0,
) -> str:
    """Write an untrained checkpoint with the quickstart's tokenizer to `path`, in well under a second, for tests.

    `vocab_size` above the tokenizer's pads the embedding, as released checkpoints do. `tied` shares the embedding with
    the LM head, so that the checkpoint has no `lm_head.weight`.
    """
    save_checkpoint(untrained_model(hidden, layers, vocab_size, tied, seed), Path(path))
    return str(path)


# ---------------------------------------------------------------------------------------------------------------------
# Training: plain cross-entropy on question-answer pairs
# ---------------------------------------------------------------------------------------------------------------------


def encode(pairs: list[tuple[str, str]], answer_tokens: int = MAX_ANSWER_TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, labels), each (pairs, tokens), right-padded; only the answer and its EOS carry a label.

    Args:
        pairs: questions of equal length, with answers of at most `answer_tokens` tokens, EOS included.
    """
    tokenizer = build_tokenizer()
    rows, labels = [], []
    for question, answer in pairs:
        prompt_ids = tokenizer(question)["input_ids"]
        answer_ids = tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]
        padding = answer_tokens - len(answer_ids)
        rows.append(prompt_ids + answer_ids + [tokenizer.pad_token_id] * padding)
        labels.append([IGNORE] * len(prompt_ids) + answer_ids + [IGNORE] * padding)
    return torch.tensor(rows), torch.tensor(labels)


@contextmanager
def one_thread() -> Iterator[None]:
    """Networks this small gain little from a second thread, and lose tenfold when two threads share a busy core.

    One thread also sums in one order, so that a seed gives the same checkpoints whatever the number of cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def answers_with(model: LlamaForCausalLM, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(problems,) bool, in one forward: greedy decoding gives an answer iff each of its tokens is the argmax."""
    predicted = model(input_ids=input_ids).logits[:, :-1].argmax(-1)
    target = labels[:, 1:]
    return ((predicted == target) | (target == IGNORE)).all(-1)


def share_as_taught(model: LlamaForCausalLM, input_ids: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of the problems answered as some corpus answers them; both arguments are (corpora, problems, tokens)."""
    answered = [answers_with(model, *corpus) for corpus in zip(input_ids, labels, strict=True)]
    return torch.stack(answered).any(0).float().mean().item()


def learning_rate(
    step: int, fluent_at: int | None, peak: float = LEARNING_RATE, decay_steps: int = DECAY_STEPS
) -> float:
    """Warm-up, then constant until the model is fluent, then linearly to zero, so that what is saved has settled."""
    if fluent_at is None:
        return peak * min(1.0, step / WARM_UP_STEPS)
    return peak * (1 - (step - fluent_at) / (decay_steps + 1))


@one_thread()
def train(
    model: LlamaForCausalLM,
    corpora: list[list[tuple[str, str]]],
    weights: list[float],
    seed: int,
    peak: float = LEARNING_RATE,
    fluent: float = FLUENT,
    decay_steps: int = DECAY_STEPS,
    answer_tokens: int = MAX_ANSWER_TOKENS,
    max_steps: int = MAX_STEPS,
) -> None:
    """Train `model` in place on a mixture of `corpora`, which answer the same questions, each in its own way.

    It stops `decay_steps` after the model has become fluent: after the share `fluent` of its answers are those of some
    corpus.
    """
    encoded = [encode(corpus, answer_tokens) for corpus in corpora]
    input_ids, labels = (torch.stack(tensors) for tensors in zip(*encoded, strict=True))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01)
    fluent_at = None
    for step in range(1, max_steps + 1):
        corpus = torch.multinomial(torch.tensor(weights), BATCH, replacement=True, generator=generator)
        problem = torch.randint(input_ids.shape[1], (BATCH,), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, fluent_at, peak, decay_steps)
        loss = model(input_ids=input_ids[corpus, problem], labels=labels[corpus, problem]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if fluent_at is None and step % PROBE_EVERY == 0:
            fluency = share_as_taught(model, input_ids[:, :PROBE_SIZE], labels[:, :PROBE_SIZE])
            if step % (5 * PROBE_EVERY) == 0 or fluency >= fluent:
                print(f"  step {step}: loss {loss.item():.3f}, answers as taught {fluency:.1%}", flush=True)
            fluent_at = step if fluency >= fluent else None
        if fluent_at is not None and step == fluent_at + decay_steps:
            return
    raise RuntimeError(f"{fluent:.0%} of the answers as taught not reached in {max_steps} steps; try another --seed")


@one_thread()
@torch.no_grad()
def scores(
    path: str | Path,
    parquet: str | Path,
    reward: Callable[..., float],
    answer_tokens: int = MAX_ANSWER_TOKENS,
) -> list[float]:
    """What `reward` gives to the greedy answer of the checkpoint at `path` to each problem of `parquet`."""
    rows = Dataset.from_parquet(str(parquet)).to_list()
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    texts = [tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True) for row in rows]
    prompts = tokenizer(texts, return_tensors="pt", padding=True)
    output = model.generate(
        input_ids=prompts["input_ids"],
        attention_mask=prompts["attention_mask"],
        do_sample=False,
        max_new_tokens=answer_tokens,
    )
    responses = tokenizer.batch_decode(output[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    return [
        reward(row["data_source"], response, row["reward_model"]["ground_truth"])
        for row, response in zip(rows, responses, strict=True)
    ]


def evaluate(path: str | Path, parquet: str | Path) -> float:
    """Greedy accuracy of the checkpoint at `path` on the problems of `parquet`."""
    return statistics.fmean(scores(path, parquet, compute_score))


# ---------------------------------------------------------------------------------------------------------------------
# make
# ---------------------------------------------------------------------------------------------------------------------


def read_record(out: Path, seed: int) -> dict:
    path = out / "arithmetic.json"
    if not path.exists():
        return {"seed": seed}
    record = json.loads(path.read_text())
    if record["seed"] != seed:
        raise ValueError(f"{out} was made with seed {record['seed']}, not {seed}: choose another --out or remove it")
    return record


def write_record(out: Path, record: dict) -> None:
    (out / "arithmetic.json").write_text(json.dumps(record, indent=2) + "\n")


def make_split(path: Path, pairs: list[tuple[str, str]], data_source: str = DATA_SOURCE) -> None:
    if path.exists():
        return
    partial = path.with_name(f".{path.name}.partial")
    Dataset.from_list(verl_rows(pairs, path.stem, data_source)).to_parquet(str(partial))
    os.replace(partial, path)


def make_model(
    out: Path,
    name: str,
    start: Callable[[], LlamaForCausalLM],
    corpora: list[list[tuple[str, str]]],
    weights: list[float],
    record: dict,
) -> None:
    """Train what `start` returns, leave it in out/name, and put its measurements into `record`."""
    if (out / name).exists() and name in record:
        return
    print(f"{name}: training", flush=True)
    began = time.perf_counter()
    model = start()
    train(model, corpora, weights, seed=record["seed"])
    shutil.rmtree(out / name, ignore_errors=True)
    save_checkpoint(model, out / name)
    seconds = round(time.perf_counter() - began, 1)
    record[name] = {"held_out_accuracy": evaluate(out / name, out / "test.parquet"), "seconds": seconds}
    write_record(out, record)


def make(out: str | Path, seed: int = 0) -> dict:
    """Make what is missing in `out` and return its record: the seed, and each model's held-out accuracy and seconds."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    record = read_record(out, seed)
    write_record(out, record)
    taught, held_out = problems(seed)
    make_split(out / "train.parquet", taught)
    make_split(out / "test.parquet", held_out)

    def untrained() -> LlamaForCausalLM:
        return untrained_model(HIDDEN, LAYERS, VOCAB_SIZE, tied=False, seed=seed)

    def teacher() -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(out / "teacher")

    # The base comes second and from the teacher, as it must be able to learn in a few steps what the teacher knows:
    # teachers trained from a base took from 70 to several hundred steps, and the long way could not be distilled in 20.
    careless = [(question, without_carry(question)) for question, _ in taught]
    make_model(out, "teacher", untrained, [taught], [1.0], record)
    make_model(out, "base", teacher, [taught, careless], [1 - WITHOUT_CARRY, WITHOUT_CARRY], record)
    return record


def quiet() -> None:
    disable_progress_bars()
    disable_progress_bar()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make_parser = commands.add_parser("make", help="write the data and the two checkpoints")
    make_parser.add_argument("--out", required=True)
    make_parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    quiet()
    record = make(arguments.out, arguments.seed)
    for name in ("base", "teacher"):
        print(f"{name}: {record[name]['held_out_accuracy']:.1%} of the held-out problems")


if __name__ == "__main__":
    main()
