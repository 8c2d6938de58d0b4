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
"""Reads a language model's output projection from its checkpoint, without building the model."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

__all__ = [
    "LogitTransform",
    "OutputProjection",
    "StoredProjection",
    "StoredTensor",
    "find_output_projection",
    "logit_transform",
    "require_readable",
]

# Untied heads first: a checkpoint that holds one uses it, whatever else it holds.
_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
)
# Where a checkpoint's weights are: an index of several files, or the only file. The first that there is counts: older
# repositories hold their weights twice.
_WEIGHTS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


# What Hugging Face configurations do to the product of a head, by the name of the setting.
_SOFTCAPS = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap")  # cap * tanh(logits / cap)
_FACTORS = ("logit_scale", "lm_head_multiplier")  # logits * factor
_DIVISORS = ("logits_scaling",)  # logits / divisor, Granite and its kind
_MULTIPLIES_BY_DIVISOR = ("hyperclovax",)  # model types that multiply by a setting of that name


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to the product of its head: times `scale`, then softcap * tanh(logits / softcap)."""

    scale: float = 1.0
    softcap: float | None = None


def logit_transform(text_config: Any) -> LogitTransform:
    """Read a language model's transform from its Hugging Face (text) configuration."""
    scale = 1.0
    for name in _FACTORS:
        scale *= _setting(text_config, name, 1.0)
    for name in _DIVISORS:
        value = _setting(text_config, name, 1.0)
        scale *= value if text_config.model_type in _MULTIPLIES_BY_DIVISOR else 1.0 / value
    caps = [cap for name in _SOFTCAPS if (cap := _setting(text_config, name, None)) is not None]
    return LogitTransform(scale, caps[0] if caps else None)


def _setting(text_config: Any, name: str, default: Any) -> Any:
    value = getattr(text_config, name, None)
    return default if value is None else float(value)


@dataclass(frozen=True)
class OutputProjection:
    """logits = softcap * tanh(scale * (hidden @ `weight` (V, H).T + `bias` (V,)) / softcap)."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float = 1.0
    softcap: float | None = None

    def to(self, device: torch.device | str) -> "OutputProjection":
        """On `device`; itself where it is there already. From pinned memory the host does not wait for the copy."""
        weight, bias = (
            None if tensor is None else tensor.to(device, non_blocking=True) for tensor in (self.weight, self.bias)
        )
        assert weight is not None
        return replace(self, weight=weight, bias=bias)

    def pinned(self) -> "OutputProjection":
        """In page-locked host memory, from which devices copy at full speed."""
        bias = None if self.bias is None else self.bias.pin_memory()
        return replace(self, weight=self.weight.pin_memory(), bias=bias)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint: the file that holds it, and its name there."""

    file: str
    name: str

    def read(self) -> torch.Tensor:
        if self.file.endswith(".safetensors"):
            with _open_safetensors(self.file) as file:
                return file.get_tensor(self.name)
        return torch.load(self.file, map_location="cpu", weights_only=True, mmap=True)[self.name]


@dataclass(frozen=True)
class StoredProjection:
    """Where a checkpoint keeps its output projection."""

    weight: StoredTensor
    bias: StoredTensor | None

    def load(
        self, device: torch.device | str, dtype: torch.dtype, transform: LogitTransform | None = None
    ) -> OutputProjection:
        """Read weight (V, H) and bias (V,) onto `device` in `dtype`; `transform` is what follows the product."""
        weight = self.weight.read().to(device=device, dtype=dtype)
        bias = None if self.bias is None else self.bias.read().to(device=device, dtype=dtype)
        transform = transform or LogitTransform()
        return OutputProjection(weight, bias, transform.scale, transform.softcap)


def find_output_projection(checkpoint: str, tied: bool, key: str = "teacher.model.path") -> StoredProjection:
    """Locate the output projection in the Hugging Face checkpoint `checkpoint` (safetensors or .bin).

    Of a checkpoint on the Hub only the file that holds the projection is fetched, and the index that names it.

    Args:
        checkpoint: folder of the checkpoint, or the name of its repository on the Hugging Face Hub.
        tied: whether the model's configuration ties the projection to the input embedding.
        key: the setting that names the checkpoint.

    Raises:
        ValueError: when no tensor of the checkpoint is recognisably the output projection.
    """
    files = _tensor_files(checkpoint, key)

    def stored(name: str) -> StoredTensor:
        return StoredTensor(_fetched(checkpoint, files[name]), name)

    suffixes = _EMBEDDINGS if tied else _HEADS
    weight = _first(files, suffixes)
    if weight is None:
        raise ValueError(
            f"{key}={checkpoint} has no output projection under a known name "
            f"({', '.join(suffixes)}): set teacher.payload=logits, which lets the teacher run its own head."
        )
    head = _first(files, _HEADS)
    if tied and head is not None:
        _require_equal(f"{key}={checkpoint}", stored(weight), stored(head))
    bias = weight.removesuffix("weight") + "bias"
    has_bias = not tied and bias in files
    return StoredProjection(stored(weight), stored(bias) if has_bias else None)


def _first(names: Iterable[str], suffixes: tuple[str, ...]) -> str | None:
    """The first of `names` that ends with the first of `suffixes` that any ends with."""
    return next((name for suffix in suffixes for name in names if _ends_with(name, suffix)), None)


def _require_equal(named: str, embedding: StoredTensor, head: StoredTensor) -> None:
    """Versions of transformers differ in which of two different tensors a tied model gets."""
    rows, others = embedding.read(), head.read()
    if rows.shape == others.shape and not torch.equal(rows, others):  # of another shape it is no head
        raise ValueError(
            f"{named} has tie_word_embeddings=True and a {head.name} that is not its "
            f"{embedding.name}: set tie_word_embeddings to what the model is in its config.json, or set "
            "teacher.payload=logits, which lets the teacher run its own head."
        )


def _ends_with(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith("." + suffix)


def _tensor_files(checkpoint: str, key: str) -> dict[str, str]:
    """Tensor name -> the name of the checkpoint's file that holds it."""
    name, path = _weights(checkpoint, key)
    return _weight_map(path) if name.endswith(".json") else dict.fromkeys(_tensor_names(path), name)


def _weight_map(index: str) -> dict[str, str]:
    with open(index) as file:
        return json.load(file)["weight_map"]


def _weights(checkpoint: str, key: str) -> tuple[str, str]:
    """The first of `_WEIGHTS` that the checkpoint has, and where it is here."""
    from huggingface_hub.errors import EntryNotFoundError

    reason = None
    for name in _WEIGHTS:
        try:
            return name, _fetched(checkpoint, name)
        except (FileNotFoundError, EntryNotFoundError) as error:
            reason = error
    raise ValueError(
        f"{key}={checkpoint} holds none of {', '.join(_WEIGHTS)}: point it at a Hugging Face checkpoint folder."
    ) from reason


def _fetched(checkpoint: str, name: str) -> str:
    """Where the checkpoint's file `name` is on this machine."""
    if not os.path.isdir(checkpoint):
        from huggingface_hub import hf_hub_download

        return hf_hub_download(checkpoint, name)
    path = os.path.join(checkpoint, name)
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no {path}")
    return path


def weight_files(key: str, checkpoint: str) -> list[str]:
    """The files with weights of the folder `checkpoint`, which the setting `key` names; they may be missing.

    Raises:
        ValueError: it has none, and no index of any.
    """
    name, path = _weights(checkpoint, key)
    if not name.endswith(".json"):
        return [path]
    return sorted({os.path.join(checkpoint, shard) for shard in _weight_map(path).values()})


def require_readable(key: str, checkpoint: str) -> None:
    """Open every weight file of the folder `checkpoint`, which `key` names: its header says how long it should be.

    Raises:
        ValueError: naming the file that is truncated, missing or unreadable.
    """
    for file in weight_files(key, checkpoint):
        try:
            _tensor_names(file)
        except Exception as error:  # each format has errors of its own
            raise ValueError(
                f"{key}={checkpoint}: {file} cannot be read ({error}). It may be truncated: copy or download it again."
            ) from error


def _open_safetensors(path: str) -> Any:
    from safetensors import safe_open

    return safe_open(path, framework="pt")


def _tensor_names(path: str) -> list[str]:
    if path.endswith(".safetensors"):
        with _open_safetensors(path) as file:
            return list(file.keys())
    return list(torch.load(path, map_location="meta", weights_only=True, mmap=True))
