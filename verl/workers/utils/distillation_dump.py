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
"""Writes the KL of single tokens, and what student and teacher would have said there, for people to read.

One JSON line per sequence, in ``<dump_dir>/step_<k>.rank<r>.jsonl``::

    {"prompt": str, "tokens": [str], "kl": [float or null],
     "student_top": [[[token, probability], ...] or null], "teacher_top": likewise, "score": null}

The lists have one entry per response token; null where the token is not in the loss. ``kl`` is KL(student||teacher) in
nats at the temperature of the divergence, and so are the probabilities.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict

from verl.utils import divergence as divergence_module
from verl.utils.divergence import LogitSource, chunks

__all__ = ["DUMP_FLAG", "TokenDump", "TopEntries", "top_entries"]

DUMP_FLAG = "distillation_dump"  # on the batch of a step that is dumped: the file's path without rank and suffix
_NUM_TOP = 5


class TopEntries(NamedTuple):
    """The likeliest entries per token: `probability` and `token`, each (n, 5), or fewer for a smaller vocabulary."""

    probability: torch.Tensor
    token: torch.Tensor


@torch.no_grad()
def top_entries(source: LogitSource, index: torch.Tensor, temperature: float) -> TopEntries:
    """Of the rows `index` (n,) of `source`, a chunk at a time."""
    parts = []
    for chunk in chunks(len(index), source.shape[-1], divergence_module.CHUNK_ELEMENTS):
        logits = source.rows(index[chunk]).float() / temperature
        log_prob, token = logits.log_softmax(-1).topk(min(_NUM_TOP, logits.shape[-1]))
        parts.append(TopEntries(log_prob.exp(), token))
    return TopEntries(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


class TokenDump:
    """The file of one step and rank.

    Args:
        path: the value of `DUMP_FLAG`.
        tokenizer: turns ids into text.
        size: how many sequences the file takes.
    """

    def __init__(self, path: str, tokenizer: Any, size: int):
        self.path = path
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        self._file = Path(f"{path}.rank{rank}.jsonl")
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text("")  # a resumed run repeats a step
        self._tokenizer = tokenizer
        self._left = size

    def num_tokens(self, data: TensorDict) -> int:
        """How many tokens of the loss, from the front, the sequences of `data` that still fit in have."""
        mask = data["response_mask"]
        end = mask.offsets()[: self._left + 1][-1]
        return int((mask.values()[:end] != 0).sum())

    def write(self, data: TensorDict, kl: torch.Tensor, student: TopEntries, teacher: TopEntries) -> None:
        """The sequences of `data` that still fit in. `kl` (n,) and the entries are of the tokens of the loss."""
        values = iter(zip(kl.tolist(), self._named(student), self._named(teacher), strict=False))
        columns = (data[name].unbind() for name in ("prompts", "responses", "response_mask"))
        rows = list(zip(*columns, strict=True))[: self._left]
        with self._file.open("a") as out:
            for prompt, response, mask in rows:
                out.write(json.dumps(self._line(prompt, response, mask, values)) + "\n")
        self._left -= len(rows)

    def _line(self, prompt: torch.Tensor, response: torch.Tensor, mask: torch.Tensor, values) -> dict[str, Any]:
        tokens = [next(values) if is_token else (None, None, None) for is_token in (mask != 0).tolist()]
        kl, student, teacher = (list(column) for column in zip(*tokens, strict=True)) if tokens else ([], [], [])
        return {
            "prompt": self._tokenizer.decode(prompt.tolist()),
            "tokens": [self._tokenizer.decode([token]) for token in response.tolist()],
            "kl": kl,
            "student_top": student,
            "teacher_top": teacher,
            "score": None,
        }

    def _named(self, top: TopEntries) -> list[list[tuple[str, float]]]:
        return [
            [(self._tokenizer.decode([token]), probability) for token, probability in zip(tokens, row, strict=True)]
            for tokens, row in zip(top.token.tolist(), top.probability.tolist(), strict=True)
        ]
