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
"""What the head of an update costs on an accelerator, by a roofline; and how many tokens it should take at a time.

    python -m verl.on_policy_distillation.roofline --vocab 151936 --student-width 2048 --teacher-width 5120

prints the table. Nothing here is measured: an accelerator is its data sheet's numbers times `PRODUCT_SHARE`,
`BANDWIDTH_SHARE` and `ISSUE_SHARE`, and each step takes the longest of its arithmetic, its memory and its instructions.

The steps, for a chunk of r tokens, V entries, 16-bit weights (V, H) of b = 2 bytes, and float32 logits:

====================  =========================  ==================================================
step                  multiplications            bytes
====================  =========================  ==================================================
logits of a side      r' V H                     b V H (weight) + b r H + 4 r V
divergence            (instructions)             18 r V for the KLs, 26 r V for the mixtures
gradient of hidden    g' V H                     b V H (weight) + b g V + 4 g H
gradient of weight    g V H                      8 V H (read and written) + b g V + b g H
its ends, once        (none)                     4 V H (zeros) + 8 V H (scaled) + (4 + b) V H (rounded)
====================  =========================  ==================================================

r' and g' are r and g in whole tiles of `TILE` rows. The gradient of the weight is summed up in float32, which is read
and written by each product: that takes 8 V H / bandwidth, and the product 2 g V H / flops, so below

    g = 4 flops / bandwidth         tokens (about 920 on an H100, whatever V and H)

memory is what it waits for. Hence two numbers, a `Chunking`: `rows` tokens have logits at a time, and the 16-bit
gradients of `group` tokens are collected for one such product. Their buffers take V (8 rows + 2 group) bytes.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

__all__ = [
    "ACCELERATORS",
    "HEAD_MEMORY",
    "Accelerator",
    "Chunking",
    "HeadCost",
    "INSTRUCTIONS",
    "POLICY_INSTRUCTIONS",
    "READS",
    "READ_BYTES",
    "TILE",
    "accelerator_named",
    "accelerator_of",
    "buffer_bytes",
    "chunking_for",
    "head_cost",
    "positive",
]

# The shares of a data sheet's numbers that a long kernel keeps up.
PRODUCT_SHARE = 0.7
BANDWIDTH_SHARE = 0.9
ISSUE_SHARE = 0.85

TILE = 256  # rows of a product that are computed together

HEAD_MEMORY = 3 << 29  # bytes that the buffers of a head may take: 1.5 GiB

# Of a logit, by the kernel of `divergence_triton.py`: bytes in each read of both sides, and how many reads.
READ_BYTES = 8
READS = {"reverse_kl": 2, "forward_kl": 2, "entropy_switch": 2, "gkd": 3, "skew_reverse_kl": 3}
# Instructions of a logit that it issues in its loops; a test counts them in the compiled kernel.
INSTRUCTIONS = {"reverse_kl": 96, "forward_kl": 92, "entropy_switch": 102, "gkd": 247, "skew_reverse_kl": 225}
POLICY_INSTRUCTIONS = 30  # more, in each launch that takes hybrid's log-prob and entropy along


class Chunking(NamedTuple):
    """How a head walks through its tokens: `rows` of logits at a time, and a weight's gradient every `group` tokens."""

    rows: int
    group: int


@dataclass(frozen=True)
class Accelerator:
    """What a data sheet says of a device; the properties are what is counted on.

    sheet_flops: of products of 16-bit factors without sparsity, and `sheet_float32` of float32 ones outside of tensor
    cores, per second; sheet_bandwidth: bytes per second of its memory; sheet_link: of its way to the host, one
    direction; memory: bytes.
    """

    name: str
    sheet_flops: float
    sheet_float32: float
    sheet_bandwidth: float
    sheet_link: float
    memory: float

    def flops(self, weight_bytes: int = 2) -> float:
        return PRODUCT_SHARE * (self.sheet_flops if weight_bytes == 2 else self.sheet_float32)

    @property
    def bandwidth(self) -> float:
        return BANDWIDTH_SHARE * self.sheet_bandwidth

    @property
    def link(self) -> float:
        return BANDWIDTH_SHARE * self.sheet_link

    @property
    def issue(self) -> float:
        """Instructions of single lanes per second; a float32 multiplication and addition is one, and counts as two."""
        return ISSUE_SHARE * self.sheet_float32 / 2


# NVIDIA's data sheets: H100 SXM5, H200 SXM, A100 80GB SXM, B200 (of DGX B200), L40S.
ACCELERATORS = {
    "H100": Accelerator("H100", 989e12, 67e12, 3.35e12, 64e9, 80e9),
    "H200": Accelerator("H200", 989e12, 67e12, 4.8e12, 64e9, 141e9),
    "A100": Accelerator("A100", 312e12, 19.5e12, 2.04e12, 32e9, 80e9),
    "B200": Accelerator("B200", 2250e12, 75e12, 8.0e12, 64e9, 180e9),
    "L40S": Accelerator("L40S", 362e12, 91.6e12, 0.864e12, 32e9, 48e9),
}
_UNKNOWN = "H100"  # what another device is taken for


def accelerator_of(device: torch.device) -> Accelerator:
    """The entry of `ACCELERATORS` that the device's name contains; an H100's numbers for a device of another name."""
    return accelerator_named(torch.get_device_module(device).get_device_properties(device).name)


def accelerator_named(name: str) -> Accelerator:
    """Of a device that calls itself so: the entry of `ACCELERATORS` that its name contains, else an H100's numbers."""
    return ACCELERATORS[next((known for known in ACCELERATORS if known in name), _UNKNOWN)]


class HeadCost(NamedTuple):
    """Predicted: `seconds` and, by step, their `parts`; `floor_seconds` of the products alone, of all tokens at once;
    `extra_bytes` of the buffers, beside inputs and gradients."""

    seconds: float
    floor_seconds: float
    extra_bytes: int
    parts: dict[str, float]


def head_cost(
    tokens: int,
    vocab: int,
    student_width: int,
    teacher_widths: Sequence[int],
    chunking: Chunking,
    accelerator: Accelerator,
    *,
    kind: str = "reverse_kl",
    weight_bytes: int = 2,
    is_hybrid: bool = False,
    is_frozen: bool = False,
) -> HeadCost:
    """Of forward and backward of `divergence_of_head`, or, `is_hybrid`, of `tokens_of_head`, which projects twice.

    Args:
        teacher_widths: the hidden sizes of the teachers of each token; more than one are mixed.
        kind: a key of `INSTRUCTIONS`.
        weight_bytes: of an entry of the weights: 2, or 4 for float32.
        is_frozen: the student's weight gets no gradient, as with a LoRA.
    """
    cost = _Costs(vocab, student_width, weight_bytes, accelerator)
    rows, group = max(1, min(chunking.rows, tokens)), max(1, min(chunking.group, tokens))
    groups = _pieces(tokens, group)
    chunks = [(length, many * count) for size, many in groups for length, count in _pieces(size, rows)]
    projections = 2 if is_hybrid else 1
    parts = {
        "student logits": projections * sum(many * cost.logits(r, student_width) for r, many in chunks),
        "teacher logits": projections
        * sum(many * cost.logits(r, width) for r, many in chunks for width in teacher_widths),
        "divergence": cost.divergence(tokens, kind, is_hybrid),
        "gradient of hidden": sum(many * cost.hidden_gradient(size) for size, many in groups),
    }
    products = projections * (student_width + sum(teacher_widths)) + student_width
    if not is_frozen:
        parts["gradient of weight"] = sum(many * cost.weight_gradient(size) for size, many in groups)
        parts["its ends"] = cost.weight_gradient_ends()
        products += student_width
    floor = 2 * tokens * vocab * products / accelerator.flops(weight_bytes)
    return HeadCost(sum(parts.values()), floor, buffer_bytes(vocab, Chunking(rows, group), weight_bytes), parts)


def buffer_bytes(vocab: int, chunking: Chunking, weight_bytes: int = 2, sides: int = 2) -> int:
    """Of the logits of `sides`, and of the gradients; those of float32 weights go over the student's logits."""
    return vocab * (max(4, weight_bytes) * sides * chunking.rows + (2 * chunking.group if weight_bytes == 2 else 0))


@lru_cache(maxsize=4096)
def chunking_for(
    tokens: int,
    vocab: int,
    student_width: int,
    teacher_width: int,
    weight_bytes: int,
    accelerator: Accelerator,
    sides: int = 2,
    is_frozen: bool = False,
    memory: int = HEAD_MEMORY,
) -> Chunking:
    """The fastest by `head_cost` whose buffers take no more than `memory` bytes; the smaller of two that are as fast.

    Judged by the reverse KL to one teacher: more teachers, other divergences and hybrid mode add the same to all.

    Args:
        sides: chunks of logits that are alive at once: the student's and the teacher's; more for several teachers.
        is_frozen: as in `head_cost`.
    """
    if tokens == 0:
        return Chunking(1, 1)
    most = max(1, memory // buffer_bytes(vocab, Chunking(1, 1), weight_bytes, sides))  # rows that fit, ungrouped
    choices = [
        choice
        for rows in {min(most, TILE), *range(32, TILE, 32), *range(TILE, 8 * TILE + 1, TILE)}
        for choice in _groups_of(rows, weight_bytes)
        if buffer_bytes(vocab, choice, weight_bytes, sides) <= memory or choice == Chunking(1, 1)
    ]

    def cost(choice: Chunking) -> tuple[float, int]:
        found = head_cost(
            tokens,
            vocab,
            student_width,
            (teacher_width,),
            choice,
            accelerator,
            weight_bytes=weight_bytes,
            is_frozen=is_frozen,
        )
        return found.seconds, found.extra_bytes

    return min(choices, key=cost)


def _groups_of(rows: int, weight_bytes: int) -> list[Chunking]:
    """Up to four chunks, or so many as make some tiles."""
    if weight_bytes != 2:  # there are no gradients of the weight's own dtype to collect
        return [Chunking(rows, rows)]
    return [Chunking(rows, times * step) for step in sorted({rows, max(rows, TILE)}) for times in (1, 2, 3, 4)]


@dataclass(frozen=True)
class _Costs:
    """Seconds of the steps in the module's docstring."""

    vocab: int
    student_width: int
    weight_bytes: int
    accelerator: Accelerator

    def logits(self, rows: int, width: int) -> float:
        moved = self.weight_bytes * (self.vocab + rows) * width + 4 * rows * self.vocab
        return self._product(_in_tiles(rows), width, moved)

    def divergence(self, tokens: int, kind: str, is_hybrid: bool) -> float:
        reads = READS[kind]
        if not is_hybrid:
            return self.kernel(tokens, kind, reads, writes=1)
        forward = self.kernel(tokens, kind, reads - 1, writes=0, of_policy=POLICY_INSTRUCTIONS)
        return forward + self.kernel(tokens, kind, reads, writes=1, of_policy=POLICY_INSTRUCTIONS)

    def kernel(self, tokens: int, kind: str, reads: int, writes: int, of_policy: int = 0) -> float:
        logits = tokens * self.vocab
        moved = (READ_BYTES * reads + self.weight_bytes * writes) * logits / self.accelerator.bandwidth
        instructions = INSTRUCTIONS[kind] * reads / READS[kind] + of_policy
        return max(moved, instructions * logits / self.accelerator.issue)

    def hidden_gradient(self, rows: int) -> float:
        moved = self.weight_bytes * self.vocab * (self.student_width + rows) + 4 * rows * self.student_width
        return self._product(_in_tiles(rows), self.student_width, moved)

    def weight_gradient(self, rows: int) -> float:
        moved = 8 * self.vocab * self.student_width + self.weight_bytes * rows * (self.vocab + self.student_width)
        return self._product(rows, self.student_width, moved)

    def weight_gradient_ends(self) -> float:
        """Made of zeros, multiplied by what the loss is multiplied by, and rounded to the weight's dtype."""
        rounded = 4 + self.weight_bytes if self.weight_bytes == 2 else 0
        return (4 + 8 + rounded) * self.vocab * self.student_width / self.accelerator.bandwidth

    def _product(self, rows: int, width: int, moved: float) -> float:
        seconds = 2 * rows * self.vocab * width / self.accelerator.flops(self.weight_bytes)
        return max(seconds, moved / self.accelerator.bandwidth)


def _in_tiles(rows: int) -> int:
    return TILE * math.ceil(rows / TILE)


def _pieces(tokens: int, step: int) -> list[tuple[int, int]]:
    """(length, how many) of the pieces of `step` tokens, the last of which may be shorter."""
    whole, rest = divmod(tokens, step)
    return [(length, count) for length, count in ((step, whole), (rest, 1)) if length and count]


# ----------------------------------------------------------------------------------------------------------------------
# the command


def _table(arguments: argparse.Namespace) -> str:
    accelerator = ACCELERATORS[arguments.gpu]
    sizes = arguments.tokens, arguments.vocab, arguments.student_width
    options = {"kind": arguments.kind, "is_hybrid": arguments.hybrid}
    memory = int(arguments.memory * 2**30)
    chosen = chunking_for(*sizes, arguments.teacher_width, 2, accelerator, memory=memory)
    shown = {Chunking(216, 216), *(Chunking(rows, rows) for rows in (256, 512, 1024, 2048)), chosen}
    shown |= {Chunking(512, group) for group in (1024, 2048)}
    lines = [
        f"Predicted for {accelerator.name} by a roofline, not measured: {arguments.kind}"
        f"{', hybrid' if arguments.hybrid else ''}, n = {sizes[0]:,}, V = {sizes[1]:,}, H_s = {sizes[2]:,}, "
        f"H_t = {arguments.teacher_width:,}, 16-bit weights.",
        f"{'rows':>6}{'group':>7}{'ms':>9}{'x products':>12}{'buffers, GiB':>14}",
    ]
    for chunking in sorted(shown):
        cost = head_cost(*sizes, (arguments.teacher_width,), chunking, accelerator, **options)
        lines.append(
            f"{chunking.rows:>6,}{chunking.group:>7,}{1e3 * cost.seconds:>9.1f}"
            f"{cost.seconds / cost.floor_seconds:>12.2f}{cost.extra_bytes / 2**30:>14.2f}"
            f"{'   chosen' if chunking == chosen else ''}"
        )
    cost = head_cost(*sizes, (arguments.teacher_width,), chosen, accelerator, **options)
    lines.append("Of the chosen, ms: " + ", ".join(f"{name} {1e3 * part:.1f}" for name, part in cost.parts.items()))
    return "\n".join(lines)


def positive(text: str) -> int:
    """The type of a command's argument: a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: pass a whole number above 0")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("vocab", "student-width", "teacher-width"):
        parser.add_argument(f"--{name}", type=positive, required=True)
    parser.add_argument("--tokens", type=positive, default=8192, help="response tokens of a micro-batch")
    parser.add_argument("--kind", choices=list(INSTRUCTIONS), default="reverse_kl")
    parser.add_argument("--hybrid", action="store_true", help="hybrid_rl_distillation, which projects twice")
    parser.add_argument("--gpu", choices=list(ACCELERATORS), default="H100")
    parser.add_argument("--memory", type=float, default=HEAD_MEMORY / 2**30, help="GiB that the buffers may take")
    print(_table(parser.parse_args()))


if __name__ == "__main__":
    main()
