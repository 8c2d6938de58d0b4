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
"""The verbs of the divergences on shards of a vocabulary, and rows that a merge may get wrong."""

from types import ModuleType

import torch

from verl.on_policy_distillation.divergence import DivergenceSpec, Temperatures, finalize, merge, normalize

CUTS = [(10,), (3, 30), (1, 2), (36,)]  # of a vocabulary of 37


def sharded(
    verbs: ModuleType,
    student: torch.Tensor,
    teacher: torch.Tensor,
    spec: DivergenceSpec,
    temperatures: Temperatures,
    weights: torch.Tensor,
    cuts: tuple[int, ...],
    gradient_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Results and gradient of vocabularies cut at `cuts`, by `statistics`, `mixture_sums` and `gradient` of `verbs`."""
    edges = (0, *cuts, student.shape[-1])
    parts = [slice(*edge) for edge in zip(edges[:-1], edges[1:], strict=True)]
    pairs = [(student[:, part], teacher[:, part]) for part in parts]
    normalized = normalize(merge([verbs.statistics(*pair, temperatures) for pair in pairs], temperatures))
    sums = sum(verbs.mixture_sums(*pair, spec, temperatures, normalized) for pair in pairs)
    results, mean = finalize(spec, normalized, sums)
    gradient = torch.full_like(student, torch.nan, dtype=gradient_dtype)
    for part, pair in zip(parts, pairs, strict=True):
        verbs.gradient(*pair, spec, temperatures, normalized, mean, weights, gradient[:, part])
    return results, gradient


def random_rows(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """(10, 37) of both sides: ordinary, far apart, with zeros of one side, of both, and over whole shards of `CUTS`."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3.0 * torch.randn(10, 37, generator=generator).to(dtype) for _ in range(2))
    masked = torch.rand(37, generator=generator) < 0.3
    student[1] *= 1e4 / student[1].abs().max()
    teacher[1] *= 1e4 / teacher[1].abs().max()
    student[2, masked] = teacher[3, masked] = -torch.inf
    student[4, masked] = teacher[4, masked.roll(1)] = -torch.inf
    student[5, :10] = teacher[6, :10] = -torch.inf  # the first shard
    student[7, 10:], teacher[7, :10] = -torch.inf, -torch.inf  # no entry in common
    student[8, 30:] = teacher[8, 30:] = -torch.inf
    student[9], teacher[9] = 0.0, teacher[9].round()  # the first of 37 equal maxima
    return student, teacher
