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
"""The whole head: forward and backward against the four bare products over all tokens at once, and against the peers.

benchmarks/linear_divergence.py measures, with a process for each implementation, in turns; what cannot be imported or
does not fit is reported as failed. Then a sweep of `Chunking(rows, group)` in one process: rows of logits at a time,
and tokens whose gradients are collected for one product.
"""

import gc
import json
import statistics
import tempfile
from pathlib import Path

import linear_divergence
import record
import torch
from linear_divergence import Inputs, Sizes

PEERS = ("dense", "trl", "liger", "verl_topk")
# Rows and groups; None is what the head chooses.
CHUNKINGS = [
    None,
    (216, 216),
    *((rows, rows * k) for rows in (256, 512, 1024, 2048) for k in (1, 2, 4) if rows * k < 4096),
]


def against_peers(step: record.Record, n: int, sizes: Sizes) -> None:
    """One row: what linear_divergence.py has written."""
    names = ["floor", "ours", *step.choose(["hybrid", *PEERS], [])]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "head.json"
        words = ["--device", step.device, "--tokens", str(n), "--vocab", str(sizes.vocab), "--dtype", sizes.dtype]
        words += ["--student-width", str(sizes.student_width), "--teacher-width", str(sizes.teacher_width)]
        words += ["--repeats", str(step.choose(5, 1)), "--implementations", *names, "--output", str(path)]
        linear_divergence.run(linear_divergence.arguments(words))
        step.add(student_width=sizes.student_width, linear_divergence=json.loads(path.read_text()))


def sweep(step: record.Record, n: int, sizes: Sizes) -> None:
    """A row for each chunking, type, and loss."""
    gc.freeze()  # what is imported is no garbage: looking through it takes longer than a small call
    x = Inputs(n, sizes, [])
    for chunking in step.choose(CHUNKINGS, [None, (4, 8)]):
        for name in ("ours", "hybrid"):
            call = {"ours": linear_divergence.ours, "hybrid": linear_divergence.hybrid}[name](x, chunking)
            for kind in linear_divergence.TYPES:
                row = {"student_width": sizes.student_width, "chunking": chunking, "implementation": name, "kind": kind}
                try:
                    linear_divergence.measure(call, x, kind)
                    found = [linear_divergence.measure(call, x, kind) for _ in range(step.choose(3, 1))]
                except torch.OutOfMemoryError as error:
                    step.add(**row, error=str(error)[:200])
                    x.drop_gradients()
                    continue
                middle = {key: statistics.median(f[key] for f in found) for key in ("seconds", "extra_bytes")}
                step.add(**row, **middle)


def main() -> None:
    step = record.of_arguments(__doc__)
    n, vocab, teacher_width, dtype = step.choose((8192, 151936, 5120, "bfloat16"), (24, 997, 32, "float32"))
    all_sizes = [Sizes(vocab, width, teacher_width, dtype, step.device) for width in step.choose((2048, 4096), (16,))]
    step.note(tokens=n, vocab=vocab, teacher_width=teacher_width)
    for sizes in all_sizes:
        against_peers(step, n, sizes)
    for sizes in all_sizes:
        sweep(step, n, sizes)


if __name__ == "__main__":
    main()
