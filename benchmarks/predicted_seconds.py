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
"""Seconds of `linear_divergence` beside what the roofline predicts, of a processor measured in the same process.

    .venv/bin/python benchmarks/predicted_seconds.py --out benchmarks/results/predicted_seconds_cpu.json

The processor's flops are those of one matrix product of the student's logits, its bandwidth that of a copy; both are
measured anew before each call, so that a busy machine slows the prediction down as much as what is predicted.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from linear_divergence import TYPES, Inputs, Sizes, machine, ours

from verl.on_policy_distillation import divergence, roofline
from verl.on_policy_distillation.roofline import Accelerator, Chunking, head_cost

COPIED = 1 << 27  # bytes; more than a cache holds
roofline.TILE = 1  # a processor's products take no whole tiles of rows


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def processor(x: Inputs, rows: int) -> Accelerator:
    """What `roofline.py` counts on is a share of a data sheet; here it is measured, so the sheet is made to say so."""
    hidden, weight = x.student_hidden.detach()[:rows], x.student_weight.detach()
    logits = hidden.new_empty((len(hidden), len(weight)))
    torch.mm(hidden, weight.T, out=logits)  # touches the pages of the result
    product = seconds(lambda: torch.mm(hidden, weight.T, out=logits))
    source = torch.empty(COPIED // 4)
    target = torch.empty_like(source)
    target.copy_(source)
    copied = seconds(lambda: target.copy_(source))
    flops = 2 * len(hidden) * weight.numel() / product / roofline.PRODUCT_SHARE
    bandwidth = 2 * COPIED / copied / roofline.BANDWIDTH_SHARE
    return Accelerator("cpu", flops, flops, bandwidth, bandwidth, 0.0)


def measure(n: int, sizes: Sizes, repeats: int) -> dict[str, dict[str, list[float]]]:
    x = Inputs(n, sizes, sizes.share_weights())
    call = ours(x)
    rows = next(iter(divergence.chunks(n, sizes.vocab, divergence.CHUNK_ELEMENTS))).stop
    results: dict[str, dict[str, list[float]]] = {kind: {"predicted": [], "measured": []} for kind in TYPES}
    for repeat in range(repeats + 1):  # the first warms up
        for kind, result in results.items():
            widths = sizes.student_width, (sizes.teacher_width,)
            accelerator = processor(x, rows)
            cost = head_cost(
                n,
                sizes.vocab,
                *widths,
                Chunking(rows, rows),
                accelerator,
                kind=kind,
                weight_bytes=x.student_weight.itemsize,
            )
            measured = seconds(lambda kind=kind: call(kind))
            x.drop_gradients()
            if repeat:
                result["predicted"].append(cost.seconds)
                result["measured"].append(measured)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512])
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--student-width", type=int, default=512)
    parser.add_argument("--teacher-width", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON")
    options = parser.parse_args()
    sizes = Sizes(options.vocab, options.student_width, options.teacher_width, "float32", "cpu")
    rows = []
    print("| n | divergence | measured, s | predicted, s | measured / predicted |\n|---|---|---|---|---|")
    for n in options.tokens:
        for kind, result in measure(n, sizes, options.repeats).items():
            ratio = statistics.median(m / p for m, p in zip(result["measured"], result["predicted"], strict=True))
            medians = [statistics.median(result[name]) for name in ("measured", "predicted")]
            print(f"| {n:,} | {kind} | {medians[0]:.2f} | {medians[1]:.2f} | {ratio:.2f} |")
            rows.append({"n": n, "kind": kind, "ratio": ratio, **result})
    if options.out is not None:
        facts = machine("cpu", torch.get_num_threads())
        options.out.write_text(json.dumps({"machine": facts, "sizes": vars(sizes), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
