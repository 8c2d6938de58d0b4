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
"""How much of a device's memory bandwidth the kernel keeps up: divergences x rows x (block, warps) x stages.

The bytes that it must move of a logit: 8 for each read of both float32 sides, and 2 for the 16-bit gradient. A KL reads
twice, a mixture three times: 18 and 26 bytes. What the cache holds of a row between two reads need not come from memory
again, so that more than the memory's bandwidth can be read off here.

Those in use come first, then the others, so that a sweep that is cut short has said the most important.
"""

from typing import Any
from unittest import mock

import linear_divergence
import record
import torch

from verl.on_policy_distillation import divergence_triton
from verl.on_policy_distillation.divergence import DivergenceSpec, Temperatures
from verl.on_policy_distillation.roofline import READ_BYTES, READS

KINDS = ("reverse_kl", "forward_kl", "gkd", "skew_reverse_kl")
BETA = 0.5


def bytes_of(kind: str, gradient: torch.Tensor) -> int:
    return (READ_BYTES * READS[kind] + gradient.itemsize) * gradient.numel()


def launches(step: record.Record) -> list[tuple[str, int, int, int]]:
    """(divergence, block, warps, stages); the module's own first."""
    block = divergence_triton.BLOCK
    warps = block // (32 * divergence_triton.ENTRIES_PER_THREAD)
    own = (block, warps, divergence_triton.NUM_STAGES)
    shapes = step.choose([(1024, 4), (2048, 8), (4096, 8), (4096, 16)], [(256, 1)])
    others = [(*shape, stages) for shape in shapes for stages in step.choose((1, 2, 3, 4), (1,))]
    return [(kind, *choice) for choice in [own, *(o for o in others if o != own)] for kind in KINDS]


def seconds_of(kind: str, logits: list[torch.Tensor], gradient: torch.Tensor, repeats: int) -> float:
    weights = torch.full((len(gradient),), 1.0 / len(gradient), device=gradient.device)
    arguments = DivergenceSpec(kind, BETA), Temperatures(1.0, 1.0), weights, gradient

    def call():
        divergence_triton.divergence_rows_(*logits, *arguments)

    return record.seconds_of(call, gradient.device.type, repeats)


def main() -> None:
    step = record.of_arguments(__doc__)
    vocab, sizes = step.choose((151936, (216, 512, 1024, 2048)), (257, (2, 3)))
    generator = torch.Generator(step.device).manual_seed(0)
    scale = linear_divergence.LOGIT_SCALE
    sides = [scale * torch.randn(max(sizes), vocab, device=step.device, generator=generator) for _ in range(2)]
    gradient = torch.empty_like(sides[0], dtype=torch.bfloat16)
    step.note(vocab=vocab)
    for kind, block, warps, stages in launches(step):
        patches: dict[str, Any] = {"BLOCK": block, "ENTRIES_PER_THREAD": block // (32 * warps), "NUM_STAGES": stages}
        for rows in sizes:
            row = {"kind": kind, "rows": rows, "block": block, "warps": warps, "stages": stages}
            try:
                with mock.patch.multiple(divergence_triton, **patches):
                    seconds = seconds_of(kind, [side[:rows] for side in sides], gradient[:rows], step.choose(7, 1))
            except Exception as error:  # too many registers or too much shared memory: this shape alone
                step.add(**row, error=f"{type(error).__name__}: {str(error)[:200]}")
                continue
            step.add(**row, seconds=seconds, gigabytes_per_s=bytes_of(kind, gradient[:rows]) / seconds / 1e9)


if __name__ == "__main__":
    main()
