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
"""The student as its own teacher: earlier or moving weights, or, with LoRA, the base without the adapter.

There is no second model. The student's own engine scores, with the teacher's weights in place of the student's:
`ShadowWeights` keeps the parameters that differ in host memory, this rank's shards of them, and trades them for the
student's while a batch is scored. A LoRA's base is there already: the adapter is switched off, and nothing is kept.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Optional

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from verl.utils.device import get_device_name, get_torch_device

__all__ = ["Moving", "ShadowWeights"]


class Moving(NamedTuple):
    """How a teacher follows the student after an update; not at all with neither.

    ema: teacher <- ema * teacher + (1 - ema) * student, after every update.
    refresh_freq: teacher <- student, after every so many updates.
    """

    ema: Optional[float] = None
    refresh_freq: Optional[int] = None

    @property
    def is_moving(self) -> bool:
        return self.ema is not None or self.refresh_freq is not None


class ShadowWeights:
    """A second value of a module's trainable parameters, in host memory; at first the one that they have.

    Args:
        module: sharded by FSDP2, or not at all. Every rank keeps the shards that are its own.
    """

    def __init__(self, module: torch.nn.Module):
        self._module, self._updates = module, 0
        self._values = {name: _pinned(shard.to("cpu", copy=True)) for name, shard in self._shards()}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the module has these weights; afterwards its own again, whatever happened."""
        traded: set[str] = set()
        try:
            for name, shard in self._shards():
                self._trade(name, shard)
                traded.add(name)
            yield
        finally:
            for name, shard in self._shards():
                if name in traded:
                    self._trade(name, shard)

    @torch.no_grad()
    def follow(self, moving: Moving) -> None:
        """Count an update of the module, and move as `moving` says."""
        self._updates += 1
        is_refreshed = moving.refresh_freq is not None and self._updates % moving.refresh_freq == 0
        if moving.ema is None and not is_refreshed:
            return
        for name, shard in self._shards():
            if moving.ema is None:
                self._values[name].copy_(shard)
            else:
                self._values[name].lerp_(shard.to("cpu"), 1.0 - moving.ema)

    @property
    def num_bytes(self) -> int:
        """In host memory, on this rank."""
        return sum(value.nbytes for value in self._values.values())

    def state_dict(self) -> dict[str, Any]:
        return {"values": self._values, "updates": self._updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises RuntimeError if `state` is of other parameters, or of another number of ranks."""
        values = state["values"]
        shapes = [{name: tuple(value.shape) for name, value in side.items()} for side in (self._values, values)]
        if shapes[0] != shapes[1]:
            raise RuntimeError("the teacher's weights in the checkpoint are of another model or number of ranks.")
        for name, value in values.items():
            self._values[name].copy_(value)
        self._updates = state["updates"]

    @torch.no_grad()
    def _trade(self, name: str, shard: torch.Tensor) -> None:
        """The two values of one parameter. One after the other, so that the device holds one shard more at a time."""
        value = self._values[name].to(shard.device, copy=True)
        self._values[name].copy_(shard)
        shard.copy_(value)

    def _shards(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The trainable parameters' memory on this rank.

        A root module may be left gathered after a forward, with copies that would outlive an exchange.
        """
        for module in self._module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        if get_device_name() != "cpu":
            get_torch_device().synchronize()  # VERL offloads weights without waiting for the copy
        for name, parameter in self._module.named_parameters():
            if parameter.requires_grad:
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                yield name, local.detach()


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if get_device_name() == "cpu" else tensor.pin_memory()
