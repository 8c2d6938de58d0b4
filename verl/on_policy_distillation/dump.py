# Copyright 2026 Bytedance Ltd. and/or its affiliates
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
nats; the probabilities are at the temperature of the divergence.
"""

import json
from pathlib import Path
from typing import Any, Optional

import torch
from tensordict import TensorDict

from verl.on_policy_distillation import divergence
from verl.on_policy_distillation.divergence import LogitSource, chunks
from verl.utils import tensordict_utils as tu

__all__ = ["DUMP_PATH", "TokenDump", "top_entries"]

DUMP_PATH = "distillation_dump"  # on the batch of a step that is dumped: the file's path without rank and suffix
_NUM_TOP = 5
_SIDES = ("student", "teacher")
_TOP_COLUMNS = tuple(f"{side}_{part}" for side in _SIDES for part in ("probability", "token"))


@torch.no_grad()
def top_entries(source: LogitSource, index: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Probability and token of the likeliest entries of the rows `index` (n,), a chunk at a time.

    Returns:
        Two (n, 5) tensors, or (n, V) for a smaller vocabulary.
    """
    probabilities, tokens = [], []
    for chunk in chunks(len(index), source.shape[-1], divergence.CHUNK_ELEMENTS):
        logits = source.rows(index[chunk]).float() / temperature
        log_prob, token = logits.log_softmax(-1).topk(min(_NUM_TOP, logits.shape[-1]))
        probabilities.append(log_prob.exp())
        tokens.append(token)
    return torch.cat(probabilities), torch.cat(tokens)


class TokenDump:
    """The dumps of one rank: a file for each step whose batch says so.

    Args:
        tokenizer: turns ids into text.
        size: how many sequences a file takes.
        temperature: of the divergence.
    """

    def __init__(self, tokenizer: Any, size: int, temperature: float):
        self._tokenizer, self._size, self._temperature = tokenizer, size, temperature
        self._file: Optional[_DumpFile] = None

    def top_columns(
        self, micro_batch: TensorDict, student: LogitSource, teacher: LogitSource
    ) -> dict[str, torch.Tensor]:
        """Both sides' likeliest entries, (d, 5) each, of the first d supervised tokens, if these are dumped."""
        file = self._file_of(micro_batch)
        num_tokens = 0 if file is None else file.num_tokens(micro_batch)
        if not num_tokens:
            return {}
        index = torch.arange(num_tokens, device=micro_batch["responses"].device)
        columns = {}
        for side, source in zip(_SIDES, (student, teacher), strict=True):
            columns[f"{side}_probability"], columns[f"{side}_token"] = top_entries(source, index, self._temperature)
        return columns

    def write(self, micro_batch: TensorDict, columns: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Write what `top_columns` put into `columns`; returns the other columns."""
        file = self._file_of(micro_batch)
        tops = {name: columns[name] for name in _TOP_COLUMNS if name in columns}
        if file is not None and tops:
            named = [self._named(tops[f"{side}_probability"], tops[f"{side}_token"]) for side in _SIDES]
            file.write(micro_batch, columns["reverse_kl"].tolist(), *named)
        return {name: column for name, column in columns.items() if name not in tops}

    def _file_of(self, micro_batch: TensorDict) -> Optional["_DumpFile"]:
        path = tu.get_non_tensor_data(data=micro_batch, key=DUMP_PATH, default=None)
        if path is None:
            return None
        if self._file is None or self._file.path != path:
            self._file = _DumpFile(path, self._tokenizer, self._size)
        return self._file

    def _named(self, probabilities: torch.Tensor, tokens: torch.Tensor) -> list[list[tuple[str, float]]]:
        return [
            [(self._tokenizer.decode([token]), probability) for token, probability in zip(ids, row, strict=True)]
            for ids, row in zip(tokens.tolist(), probabilities.tolist(), strict=True)
        ]


class _DumpFile:
    """The file of one step and rank. `path` is the value of `DUMP_PATH`."""

    def __init__(self, path: str, tokenizer: Any, size: int):
        self.path = path
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        self._file = Path(f"{path}.rank{rank}.jsonl")
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text("")  # a resumed run repeats a step
        self._tokenizer = tokenizer
        self._left = size

    def num_tokens(self, data: TensorDict) -> int:
        """How many supervised tokens, from the front, the sequences of `data` that still fit in have."""
        mask = data["response_mask"]
        end = mask.offsets()[: self._left + 1][-1]
        return int((mask.values()[:end] != 0).sum())

    def write(self, data: TensorDict, kl: list[float], student: list, teacher: list) -> None:
        """The sequences of `data` that still fit in. `kl` and the entries are of the supervised tokens."""
        values = iter(zip(kl, student, teacher, strict=False))
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
