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
"""The teacher's own prompt: ``teacher.prompt_key``, a column of the data set.

With it the teacher scores x' + y, where y is the student's response to its own prompt x, and x' is what the sample has
in the column: solved examples, a system prompt, the reference answer. The loss is

    D(student(. | x, y_<t), teacher(. | x', y_<t)),    y ~ student(. | x)

and the rest is as without: y and its mask stay, and `tokens.py` finds the rows that predict y from the end of each
sequence, so it does not matter how long x and x' are. This is on-policy context distillation (arXiv:2602.12275), and
with the reference solution in x' and the student's own checkpoint as the teacher, on-policy self-distillation
(arXiv:2601.18734).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict

from verl.utils.tokenizer import normalize_token_ids
from verl.utils.tokenizer.chat_template import apply_chat_template

__all__ = ["TRUNCATIONS", "PromptSettings", "TeacherPrompts", "listed", "with_prompts"]

TRUNCATIONS = ("error", "left", "right", "middle")  # of VERL's data.truncation


@dataclass(frozen=True)
class PromptSettings:
    """How the values of a column become token ids.

    Args:
        key: the column, ``teacher.prompt_key``.
        max_length: tokens, ``teacher.max_prompt_length``.
        truncation: what happens to more of them, ``data.truncation``: "error" refuses them; "left", "right" and
            "middle" say which end of the prompt goes, or that its middle does.
        chat_template_kwargs: of the student's chat template, ``data.apply_chat_template_kwargs``.
    """

    key: str
    max_length: int
    truncation: str
    chat_template_kwargs: Mapping[str, Any]

    @classmethod
    def of(cls, config: DictConfig) -> Optional["PromptSettings"]:
        """Read the trainer's configuration; None where the teacher sees the student's prompt."""
        key, longest = (config.teacher.get(name, None) for name in ("prompt_key", "max_prompt_length"))
        if key is None:
            return None
        data = config.data
        kwargs = OmegaConf.to_container(OmegaConf.create(data.get("apply_chat_template_kwargs", None) or {}))
        return cls(
            key, data.max_prompt_length if longest is None else longest, data.get("truncation", "error"), dict(kwargs)
        )


class TeacherPrompts:
    """Puts the teacher's prompts in the place of the student's.

    Args:
        settings: how a value of the column becomes token ids.
        tokenizer: the student's; the teacher's has the same vocabulary.
    """

    def __init__(self, settings: PromptSettings, tokenizer: Any):
        self._settings, self._tokenizer = settings, tokenizer

    def replace(self, data: TensorDict) -> TensorDict:
        """The batch `data` as the teacher is to see it; takes the column out of `data`.

        Raises:
            ValueError: a prompt that cannot be used, see `token_ids`; or samples with images, video or audio.
        """
        return with_prompts(data, self.all_token_ids(listed(data.pop(self._settings.key))))

    def all_token_ids(self, prompts: Sequence[Any]) -> list[torch.Tensor]:
        """Of each prompt its ids (length,) int64. Equal prompts, as of several rollouts, are tokenised once."""
        made: dict[str, torch.Tensor] = {}
        ids = []
        for prompt in prompts:
            name = json.dumps(prompt, default=lambda value: value.tolist())  # arrays, of parquet files
            if name not in made:
                made[name] = torch.tensor(self.token_ids(prompt), dtype=torch.int64)
            ids.append(made[name])
        return ids

    def token_ids(self, prompt: Any) -> list[int]:
        """The ids of one prompt: chat messages, or a string, which is one message of the user.

        Like VERL's rollout, which only knows messages, it applies the student's chat template, with the prompt of the
        answer at its end.

        Raises:
            ValueError: no string and no messages; a part of a message that is no text; a template that does not take
                the messages; no token at all; more than ``max_length``, with ``truncation`` "error".
        """
        messages = _messages(prompt)
        try:
            rendered = apply_chat_template(
                self._tokenizer,
                messages,
                tokenize=True,
                add_generation_prompt=True,
                **self._settings.chat_template_kwargs,
            )
        except Exception as error:  # a template raises what it likes
            raise ValueError(f"the student's chat template does not take it: {error}") from error
        ids = normalize_token_ids(rendered)
        if not ids:
            raise ValueError("there is not one token in it, and the first token of a response needs one before it.")
        return self._shortened(ids)

    def _shortened(self, ids: list[int]) -> list[int]:
        """As VERL's `postprocess_data` does."""
        longest, truncation = self._settings.max_length, self._settings.truncation
        if len(ids) <= longest:
            return ids
        if truncation == "error":
            raise ValueError(
                f"it has {len(ids)} tokens, and teacher.max_prompt_length={longest}: raise it (null is "
                "data.max_prompt_length), leave such rows out, or set data.truncation to left, right or middle."
            )
        if truncation == "right":
            return ids[:longest]
        first = longest // 2 if truncation == "middle" else 0
        return ids[:first] + ids[len(ids) - (longest - first) :]


def with_prompts(data: TensorDict, prompts: Sequence[torch.Tensor]) -> TensorDict:
    """A batch whose samples have other prompts and the same responses.

    Args:
        data: nested ``prompts``, ``responses``, ``input_ids`` and ``position_ids``, each (batch, length) - the last may
            be (batch, axes, length), as models with rotary sections have it - and what else a batch has.
        prompts: of each sample its new prompt (length,) int64.

    Returns:
        `data` itself is left alone; the batch returned shares its other fields.

    Raises:
        ValueError: samples with images, video or audio, whose place in the prompt would be lost.
    """
    if "multi_modal_inputs" in data and any(listed(data["multi_modal_inputs"])):
        raise ValueError(
            "teacher.prompt_key with images, video or audio: they belong to places in the student's prompt, which the "
            "teacher does not see. Leave them, or teacher.prompt_key, out."
        )
    device = data["input_ids"].device
    prompts = [prompt.to(device) for prompt in prompts]
    sequences = [
        torch.cat((prompt, response)) for prompt, response in zip(prompts, data["responses"].unbind(), strict=True)
    ]
    axes = data["position_ids"].shape[1:-1]  # all count alike where there is only text
    positions = [torch.arange(len(ids), device=device).expand(*axes, -1).contiguous() for ids in sequences]
    changed = data.copy()
    changed["prompts"] = _nested(prompts)
    changed["input_ids"] = _nested(sequences)
    changed["position_ids"] = _nested(positions)
    return changed


def _nested(rows: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


def listed(values: Any) -> list[Any]:
    """The values of a column that is no tensor, or of a field of one of its values."""
    return values.tolist() if hasattr(values, "tolist") else list(values)


def _messages(prompt: Any) -> list[dict[str, Any]]:
    """`prompt` as the messages of a chat."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    messages = listed(prompt) if _is_list(prompt) else []
    if not messages:
        raise ValueError("it is neither a string nor a list of chat messages.")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"{message!r} is no chat message, which has a role and a content.")
        content = message.get("content")
        for part in listed(content) if _is_list(content) else ():
            if isinstance(part, Mapping) and part.get("type", "text") != "text":
                raise ValueError(f"a message has a part of type {part['type']!r}, and the teacher's prompt is text.")
    return [dict(message) for message in messages]


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple | np.ndarray)
