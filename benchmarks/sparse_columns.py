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
"""Does it pay to skip columns of the logits' gradient that are almost zero? A prototype, outside the library.

    benchmarks/run.sh --sparse

With peaked distributions most entries of a chunk's gradient G (tokens, V) are tiny. Columns whose largest |G| over the
chunk's tokens is below a threshold are left out of the two gradient products G W and G^T h; the columns that stay are
gathered. (Cut cross-entropy, Wijmans et al., arXiv:2411.09009, sec. 4.3, skips blocks of its softmax gradient so.)

The distributions are made to have 1 nat of entropy in the mean, on both sides: every token has candidates of its own,
drawn from the vocabulary by Zipf's law, whose logits fall with the logarithm of their rank, each token at its own rate;
all other logits are what random heads make of the same hidden state, a normal tail of a few per cent of the mass.

A token's weight is one here: a threshold is relative to the weight that a loss gives its tokens.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from linear_divergence import RESULTS, command_line, machine, say

os.environ.setdefault("VERL_PLATFORM", "cpu")

from verl.on_policy_distillation import divergence  # noqa: E402
from verl.on_policy_distillation.divergence import DivergenceSpec, Temperatures, chunks, divergence_rows_  # noqa: E402

CANDIDATES = 8
DECAY_SPREAD = 0.5  # deviation over tokens of the logarithm of their decay
DISAGREEMENT = 0.7  # deviation of a candidate's logit, drawn for each side
ENTROPY = 1.0  # nats
SAMPLE = 128  # tokens that the strength of the candidates is fitted on
THRESHOLDS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)

Key = float | str | None  # a threshold, None for the exact gradients, or "floor"
Times = dict[Key, tuple[list[float], list[float]]]


@dataclass
class Side:
    hidden: torch.Tensor
    weight: torch.Tensor
    entropy: float = 0.0
    tail: float = 0.0  # mass outside of the candidates


def entropy_of(logits: torch.Tensor) -> torch.Tensor:
    log_p = torch.log_softmax(logits, -1)
    return -torch.linalg.vecdot(log_p.exp(), log_p)


def strength_for(strong: torch.Tensor, rest: torch.Tensor) -> float:
    """a such that the logits a * strong + rest have the mean entropy `ENTROPY`, by bisection."""
    low, high = 0.0, 100.0
    for _ in range(20):
        middle = (low + high) / 2
        too_flat = entropy_of(middle * strong + rest).mean() > ENTROPY
        low, high = (middle, high) if too_flat else (low, middle)
    return high


def make_side(candidates: torch.Tensor, decay: torch.Tensor, vocab: int, width: int, generator) -> Side:
    weight = torch.randn(vocab, width, generator=generator).mul_(width**-0.5)
    rows = weight[candidates]  # (n, candidates, width), nearly orthogonal and of length one
    ranks = torch.arange(1, CANDIDATES + 1).log()
    noise = DISAGREEMENT * torch.randn(candidates.shape, generator=generator)
    falling = torch.einsum("nc,ncw->nw", noise - decay[:, None] * ranks, rows)
    common = rows.sum(1)
    sample = slice(0, SAMPLE)
    strength = strength_for(common[sample] @ weight.T, falling[sample] @ weight.T)
    side = Side(strength * common + falling, weight)
    logits = side.hidden[sample] @ weight.T
    side.entropy = entropy_of(logits).mean().item()
    side.tail = 1.0 - logits.softmax(-1).gather(-1, candidates[sample]).sum(-1).mean().item()
    return side


def make_sides(n: int, vocab: int, widths: tuple[int, int], mean_decay: float) -> tuple[Side, Side]:
    generator = torch.Generator().manual_seed(0)
    zipf = torch.arange(1, vocab + 1).reciprocal().expand(n, vocab)
    candidates = torch.multinomial(zipf, CANDIDATES, generator=generator)
    decay = mean_decay * (DECAY_SPREAD * torch.randn(n, generator=generator)).exp()
    student, teacher = (make_side(candidates, decay, vocab, width, generator) for width in widths)
    return student, teacher


@dataclass
class Pass:
    """Gradients of one pass over all tokens, and what it skipped."""

    hidden: torch.Tensor
    weight: torch.Tensor
    product_seconds: float = 0.0  # of both gradient products, with finding and gathering the columns
    kept: list[float] = field(default_factory=list)  # fraction of the columns, per chunk
    skipped: list[float] = field(default_factory=list)  # fraction of sum |G|, per chunk; only where asked for

    def add(self, chunk: slice, gradient: torch.Tensor, student: Side, threshold: float | None) -> None:
        start = time.perf_counter()
        hidden = student.hidden[chunk]
        if threshold is None:
            torch.mm(gradient, student.weight, out=self.hidden[chunk])
            self.weight.addmm_(gradient.T, hidden)
        else:
            low, high = torch.aminmax(gradient, dim=0)
            columns = (torch.maximum(high, low.neg_()) >= threshold).nonzero().squeeze(-1)
            part = gradient.index_select(1, columns)
            torch.mm(part, student.weight.index_select(0, columns), out=self.hidden[chunk])
            self.weight.index_add_(0, columns, part.T @ hidden)
            self.kept.append(len(columns) / gradient.shape[-1])
        self.product_seconds += time.perf_counter() - start

    def count_skipped(self, gradient: torch.Tensor, threshold: float) -> None:
        size = gradient.abs()
        self.skipped.append((size[:, size.amax(0) < threshold].double().sum() / size.double().sum()).item())


def one_pass(
    student: Side, teacher: Side, spec: DivergenceSpec, threshold: float | None, into: Pass, count: bool = False
) -> None:
    """As `linear_divergence`, with the gradient products of `Pass.add`."""
    into.weight.zero_()
    for chunk in chunks(len(student.hidden), len(student.weight), divergence.CHUNK_ELEMENTS):
        logits = student.hidden[chunk] @ student.weight.T
        others = teacher.hidden[chunk] @ teacher.weight.T
        divergence_rows_(logits, others, spec, Temperatures(1.0, 1.0), logits.new_ones(len(logits)), logits)
        del others
        if count and threshold is not None:
            into.count_skipped(logits, threshold)
        into.add(chunk, logits, student, threshold)


def floor_pass(student: Side, teacher: Side, into: Pass) -> None:
    """The bare four products."""
    into.weight.zero_()
    rows = list(chunks(len(student.hidden), len(student.weight), divergence.CHUNK_ELEMENTS))
    logits = student.hidden.new_empty(rows[0].stop, len(student.weight))
    for chunk in rows:
        part = logits[: chunk.stop - chunk.start]
        torch.mm(teacher.hidden[chunk], teacher.weight.T, out=part)
        torch.mm(student.hidden[chunk], student.weight.T, out=part)
        into.add(chunk, part, student, None)


def seconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def empty_pass(student: Side) -> Pass:
    return Pass(torch.zeros_like(student.hidden), torch.zeros_like(student.weight))


def errors(student: Side, teacher: Side, spec: DivergenceSpec) -> list[dict]:
    """Relative to the exact gradients, in the norm."""
    exact = empty_pass(student)
    one_pass(student, teacher, spec, None, exact)
    rows = []
    for threshold in THRESHOLDS:
        sparse = empty_pass(student)
        one_pass(student, teacher, spec, threshold, sparse, count=True)
        row = {"threshold": threshold, "kept_columns": statistics.mean(sparse.kept)}
        row["skipped_mass"] = statistics.mean(sparse.skipped)
        for name in ("hidden", "weight"):
            true = getattr(exact, name)
            row[f"{name}_error"] = ((getattr(sparse, name) - true).norm() / true.norm()).item()
        rows.append(row)
    return rows


def timed(student: Side, teacher: Side, spec: DivergenceSpec, repeats: int) -> Times:
    """Seconds of whole passes and of their gradient products, interleaved, after a warm-up."""
    into = empty_pass(student)
    passes: dict[Key, Callable[[], None]] = {"floor": partial(floor_pass, student, teacher, into)}
    for threshold in (None, *THRESHOLDS):
        passes[threshold] = partial(one_pass, student, teacher, spec, threshold, into)
    times: Times = {key: ([], []) for key in passes}
    for repeat in range(repeats + 1):
        for key, (whole, products) in times.items():
            into.product_seconds = 0.0
            taken = seconds(passes[key])
            if repeat:
                whole.append(taken)
                products.append(into.product_seconds)
    return times


def measure(student: Side, teacher: Side, kind: str, beta: float, repeats: int) -> list[dict]:
    spec = DivergenceSpec(kind, beta)
    rows: list[dict] = [{"threshold": "floor"}, {"threshold": None}, *errors(student, teacher, spec)]
    times = timed(student, teacher, spec, repeats)
    for row in rows:
        whole, products = times[row["threshold"]]
        row |= {"kind": kind, "seconds": statistics.median(whole), "product_seconds": statistics.median(products)}
        say(json.dumps(row))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--student-width", type=int, default=512)
    parser.add_argument("--teacher-width", type=int, default=1024)
    parser.add_argument("--decay", type=float, default=3.0, help="of logits with log rank: a larger one, a larger tail")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", default=None, help="default: benchmarks/results/sparse_columns_cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    student, teacher = make_sides(
        options.tokens, options.vocab, (options.student_width, options.teacher_width), options.decay
    )
    facts = {
        "command": command_line("benchmarks/run.sh --sparse", sys.argv[1:]),
        "machine": machine("cpu", options.threads),
        "sizes": {"n": options.tokens, "vocab": options.vocab}
        | {"student_width": options.student_width, "teacher_width": options.teacher_width},
        "decay": options.decay,
        "entropy": [round(side.entropy, 3) for side in (student, teacher)],
        "tail": [round(side.tail, 4) for side in (student, teacher)],
    }
    say(json.dumps({key: facts[key] for key in ("entropy", "tail")}))
    cases = (("reverse_kl", 1.0), ("forward_kl", 1.0), ("gkd", 0.5))
    rows = [row for case in cases for row in measure(student, teacher, *case, options.repeats)]
    path = options.output or RESULTS / "sparse_columns_cpu.json"
    with open(path, "w") as file:
        file.write(json.dumps(facts | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
