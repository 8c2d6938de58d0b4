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
"""The documentation that every Python ships, as a text to model: the ablation's data, models and reward.

A document is a topic of `help()`, or the docstrings of one module of the standard library. One document in ten is held
out. A byte-pair vocabulary of 4,096 is trained on the others, and so are two models: the teacher, and a student that is
smaller and has seen less.

VERL reads the reward from this file too: `reward.custom_reward_function.path=python_docs.py`, whose default name is
`compute_score`.
"""

import ast
import json
import math
import os
import random
import re
import sysconfig
import time
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from arithmetic import EOS, PAD, make_split, one_thread, save_checkpoint, untrained_model, with_plain_template
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

DATA_SOURCE = "python_docs"
OTHER_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}  # not documentation, or not Python's
HELD_OUT_SHARE, SEED = 0.1, 0
VOCAB_SIZE = 4096
PROMPT_TOKENS, RESPONSE_TOKENS = 16, 32
WINDOW = PROMPT_TOKENS + RESPONSE_TOKENS
PROMPTS, HELD_OUT = 4096, 256  # windows
BATCH = 32  # of windows, to train on

Documents = dict[str, list[str]]  # name -> passages


@dataclass(frozen=True)
class Size:
    """A model, and the steps that it is trained for."""

    layers: int
    hidden: int
    steps: int
    learning_rate: float


# With Python 3.11's documentation: held-out NLL 4.73 and 5.37; six minutes and one on a core.
MODELS = {"teacher": Size(3, 192, 1500, 3e-3), "base": Size(2, 128, 500, 2e-3)}


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def topics() -> dict[str, str]:
    """What `help()` knows of the language, by name."""
    from pydoc_data.topics import topics as texts

    return dict(sorted(texts.items()))


def reference() -> str:
    """All topics, one after the other."""
    return "\n\n".join(topics().values())


def docstrings(source: str) -> list[str]:
    """Of a module and of its classes and functions, in their order, without indentation."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    found = (ast.get_docstring(node) for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)))
    return [text for text in found if text]


def source_files(folder: Path) -> Iterator[Path]:
    """Python's modules below `folder`, in the order of their names."""
    for path in sorted(folder.rglob("*.py")):
        if not OTHER_FOLDERS.intersection(path.relative_to(folder).parts):
            yield path


def documents(folder: Path | None = None) -> Documents:
    """Passages by document, none twice: the topics, and the docstrings of the modules below `folder`.

    Args:
        folder: by default that of the standard library.
    """
    folder = folder or Path(sysconfig.get_paths()["stdlib"])
    found = {f"help: {name}": [text.strip()] for name, text in topics().items()}
    for path in source_files(folder):
        with tokenize.open(path) as file:  # decoded as the file itself says
            found[path.relative_to(folder).as_posix()] = docstrings(file.read())
    return without_repetition(found)


def without_repetition(found: Documents) -> Documents:
    """Each passage where it is first, and the documents that have one."""
    known: set[str] = set()
    unique = {}
    for name, texts in found.items():
        new = [text for text in dict.fromkeys(texts) if text not in known]
        known.update(new)
        if new:
            unique[name] = new
    return unique


def split(found: Documents, seed: int = SEED) -> tuple[Documents, Documents]:
    """Documents to train on, and held-out ones."""
    names = sorted(found)
    random.Random(seed).shuffle(names)
    count = math.ceil(HELD_OUT_SHARE * len(names))
    return {name: found[name] for name in names[count:]}, {name: found[name] for name in names[:count]}


def passages(found: Documents) -> list[str]:
    return [text for texts in found.values() for text in texts]


# ---------------------------------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Byte pairs of `texts`; every byte has a token. Its chat template is the message itself."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return with_plain_template(backend)


def token_ids(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Of all texts, with EOS after each."""
    return [token for ids in tokenizer(texts)["input_ids"] for token in [*ids, tokenizer.eos_token_id]]


def windows(found: Documents, tokenizer: PreTrainedTokenizerFast, count: int, seed: int = SEED) -> list[list[int]]:
    """`count` runs of WINDOW tokens, none overlapping another, whose first PROMPT_TOKENS make a prompt.

    A prompt is text without EOS that is the same tokens again when it is read: VERL gets it as text.
    """
    cut = []
    for texts in found.values():
        ids = token_ids(texts, tokenizer)
        cut += [ids[start : start + WINDOW] for start in range(0, len(ids) - WINDOW + 1, WINDOW)]
    random.Random(seed).shuffle(cut)
    prompts = [window[:PROMPT_TOKENS] for window in cut]
    again = tokenizer(tokenizer.batch_decode(prompts))["input_ids"]
    kept = [
        window
        for window, prompt, ids in zip(cut, prompts, again, strict=True)
        if ids == prompt and tokenizer.eos_token_id not in prompt
    ]
    if len(kept) < count:
        raise ValueError(f"the documents have {len(kept)} windows of {WINDOW} tokens, and {count} are needed")
    return kept[:count]


def problems(cut: list[list[int]], tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, str]]:
    """(prompt, how the text goes on until its passage or the window ends)."""
    prompts = tokenizer.batch_decode([window[:PROMPT_TOKENS] for window in cut])
    rest = tokenizer.batch_decode([window[PROMPT_TOKENS:] for window in cut])
    return [(prompt, text.split(EOS)[0]) for prompt, text in zip(prompts, rest, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# Reward
# ---------------------------------------------------------------------------------------------------------------------


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs) -> float:
    """VERL's reward contract: the F1 of words between the response and how the documentation goes on, in [0, 1].

    Words count as often as they occur, whatever their order or case, as in SQuAD (Rajpurkar et al., arXiv:1606.05250).
    """
    if data_source != DATA_SOURCE:
        raise ValueError(f"this reward scores {DATA_SOURCE!r}, not {data_source!r}")
    said, wanted = (Counter(re.findall(r"\w+", text.lower())) for text in (solution_str, ground_truth))
    if not said or not wanted:
        return float(said == wanted)
    return 2 * (said & wanted).total() / (said.total() + wanted.total())


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


def learning_rate(step: int, size: Size) -> float:
    """A short warm-up, then a cosine to zero."""
    return size.learning_rate * min(step / 30, (1 + math.cos(math.pi * step / size.steps)) / 2)


@one_thread()
def train_model(name: str, ids: torch.Tensor, tokenizer: PreTrainedTokenizerFast, seed: int = SEED) -> LlamaForCausalLM:
    """A language model of the tokens `ids` (n,), by next-token cross-entropy on windows from anywhere in them."""
    size = MODELS[name]
    model = untrained_model(size.hidden, size.layers, len(tokenizer), tied=False, seed=seed, tokenizer=tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    within = torch.arange(WINDOW)
    for step in range(1, size.steps + 1):
        starts = torch.randint(len(ids) - WINDOW + 1, (BATCH, 1), generator=generator)
        rows = ids[starts + within]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, size)
        loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"  {name}, step {step}/{size.steps}: loss {loss.item():.3f}", flush=True)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# make
# ---------------------------------------------------------------------------------------------------------------------


def make(out: Path) -> dict:
    """Make the data and the two models in `out`, unless they are there. Returns what they are.

    "held_out" has the windows (HELD_OUT, WINDOW) to score with; every other entry is small.
    """
    path = out / "python_docs.json"
    if path.exists():
        return json.loads(path.read_text())
    out.mkdir(parents=True, exist_ok=True)
    train, held_out = split(documents())
    tokenizer = train_tokenizer(passages(train))
    held_out_windows = windows(held_out, tokenizer, HELD_OUT)
    make_split(out / "train.parquet", problems(windows(train, tokenizer, PROMPTS), tokenizer), DATA_SOURCE)
    make_split(out / "test.parquet", problems(held_out_windows, tokenizer), DATA_SOURCE)
    ids = torch.tensor(token_ids(passages(train), tokenizer))
    record = {
        "documents": len(train),
        "bytes": sum(len(text.encode()) for text in passages(train)),
        "tokens": len(ids),
        "held_out_documents": len(held_out),
        "held_out_bytes": sum(len(text.encode()) for text in passages(held_out)),
        "models": {name: vars(size) for name, size in MODELS.items()},
        "held_out": held_out_windows,
    }
    for name in MODELS:
        make_model(name, out, ids, tokenizer)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(record) + "\n")
    os.replace(partial, path)
    return record


def make_model(name: str, out: Path, ids: torch.Tensor, tokenizer: PreTrainedTokenizerFast) -> None:
    if (out / name).exists():
        return
    print(f"{name}: training", flush=True)
    began = time.perf_counter()
    save_checkpoint(train_model(name, ids, tokenizer), out / name, tokenizer)
    print(f"{name}: {time.perf_counter() - began:.0f} seconds", flush=True)
