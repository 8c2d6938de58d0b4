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
"""Takes layers out of a causal language model of transformers."""

import torch
from transformers import PreTrainedModel


def evenly_spread(layers: int, drop: int) -> list[int]:
    """Which of `layers` layers to drop, counted from 0: `drop` of them, evenly spread, never the first or the last."""
    if not 1 <= drop <= layers - 2:
        raise ValueError(
            f"--drop {drop} of {layers} layers, of which the first and the last stay: choose 1 to {layers - 2}"
        )
    return [layers * part // (drop + 1) for part in range(1, drop + 1)]


def drop_layers(model: PreTrainedModel, dropped: list[int]) -> None:
    """Take the layers `dropped` out of `model`, in place, and out of its configuration.

    Each of the others does what it did; only its number changes, by which it finds its part of a cache. What a
    configuration says by layer (such as ``layer_types``) is cut to match. Models whose layers depend on their number in
    other ways than these are not covered; `require_same` finds them.
    """
    config = model.config.get_text_config()
    count = config.num_hidden_layers
    kept = [index for index in range(count) if index not in dropped]
    parent, name = _place_of_layers(model, count)
    layers = torch.nn.ModuleList(getattr(parent, name)[index] for index in kept)
    setattr(parent, name, layers)
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index
    by_layer = {key: value for key, value in vars(config).items() if _is_by_layer(key, value, count)}
    config.num_hidden_layers = len(kept)
    for key, value in by_layer.items():
        setattr(config, key, [value[index] for index in kept])


def _is_by_layer(key: str, value: object, count: int) -> bool:
    return "layer" in key and isinstance(value, list | tuple) and len(value) == count


def _place_of_layers(model: PreTrainedModel, count: int) -> tuple[torch.nn.Module, str]:
    """The module that holds the list of the layers, and the list's name in it: the outermost list of that length."""
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            parent, _, name = path.rpartition(".")
            return model.get_submodule(parent), name
    raise ValueError(f"{type(model).__name__} has no list of its {count} layers: its layers cannot be dropped here")


@torch.no_grad()
def require_same(model: PreTrainedModel, saved: PreTrainedModel, input_ids: torch.Tensor) -> None:
    """Refuse a shortened model that is another one after it has been saved and loaded.

    Args:
        input_ids: (1, tokens), any text.
    """
    logits, again = (each.eval()(input_ids=input_ids).logits.float() for each in (model, saved))
    difference = (logits - again).abs().max().item()
    if not difference <= 1e-3 * logits.abs().max().item():
        raise ValueError(
            f"{type(model).__name__} without some of its layers gives other logits once it is saved and loaded (by "
            f"{difference:.3g}): its layers depend on their numbers, and cannot be dropped here"
        )
