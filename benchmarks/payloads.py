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
"""What is kept of a teacher for each token, and what it says less than the teacher's own distribution does.

    benchmarks/run.sh --payloads

Hidden states and logits are kept in bfloat16, a top-k as int32 ids and float32 probabilities, as the trainer keeps
them. Each is compared with the exact divergence of float32: values in the mean over tokens, and the gradient in the
norm. A top-k's values are exact divergences between k + 1 outcomes, so they are less than the exact ones; its gradient
tells the k entries apart and takes the rest as one.

Two pairs of student and teacher, whose distributions have 1 nat of entropy in the mean:

- heads: those of sparse_columns.py, two random heads. Each token has 8 candidates about which the sides disagree, and
  a normal tail of a few per cent of the mass about which they know nothing of each other. The gradient is that of the
  student's hidden states.
- power_law: the teacher's probabilities fall as a power of the rank, each token at its own rate (of log-normal spread
  0.5), as those of language models do; the student's logits are the teacher's with normal noise of deviation 0.7 on
  each. The gradient is that of the student's logits. There are no hidden states.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from linear_divergence import RESULTS, command_line, machine, say
from sparse_columns import entropy_of, make_sides

os.environ.setdefault("VERL_PLATFORM", "cpu")

from verl.on_policy_distillation.buckets import top_k_tail  # noqa: E402
from verl.on_policy_distillation.divergence import DenseLogits, DivergenceSpec, LogitSource  # noqa: E402
from verl.on_policy_distillation.head import LinearLogits, divergence_of_head  # noqa: E402

TOP_K = (1, 8, 64, 256)
TYPES = (("reverse_kl", 1.0), ("forward_kl", 1.0), ("gkd", 0.5))


def payloads(exact: LinearLogits, has_hidden_states: bool) -> dict[str, Callable[[], LogitSource]]:
    """What each stands for; made when it is its turn."""
    rounded = exact.hidden.bfloat16()
    made: dict[str, Callable[[], LogitSource]] = {}
    if has_hidden_states:
        made["hidden_states"] = lambda: replace(exact, hidden=rounded.float())
    made["logits"] = lambda: DenseLogits(exact.rows(slice(0, len(rounded))).bfloat16())
    return made | {f"topk, k = {k}": lambda k=k: top_k_tail(exact, k, 1.0) for k in TOP_K}  # type: ignore[misc]


def bytes_of(payload: str, width: int, vocab: int) -> int:
    """Of one token."""
    if payload == "hidden_states":
        return 2 * width
    if payload == "logits":
        return 2 * vocab
    k = int(payload.split()[-1])
    return 4 * k + 4 * (k + 1)


@dataclass
class Pair:
    """Two heads, the tensor of the student's whose gradient is looked at, and facts about the distributions."""

    student: LinearLogits
    teacher: LinearLogits
    leaf: str
    facts: dict


def heads(options: argparse.Namespace) -> Pair:
    widths = options.student_width, options.teacher_width
    sides = make_sides(options.tokens, options.vocab, widths, options.decay)
    student, teacher = (LinearLogits(side.hidden, side.weight) for side in sides)
    facts = {"entropy": [round(side.entropy, 3) for side in sides], "student_width": widths[0]}
    return Pair(student, teacher, "hidden", facts | {"teacher_width": widths[1]})


def power_law(options: argparse.Namespace) -> Pair:
    """Logits as heads: the hidden states are the rows of the identity, and the weight is the logits, transposed."""
    generator = torch.Generator().manual_seed(0)
    log_rank = torch.arange(1, options.vocab + 1).log()
    rate = (0.5 * torch.randn(options.tokens, 1, generator=generator)).exp()
    low, high = 0.0, 10.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if entropy_of(-middle * rate * log_rank).mean() > 1.0 else (low, middle)
    teacher = -high * rate * log_rank
    student = teacher + 0.7 * torch.randn(teacher.shape, generator=generator)
    facts = {"entropy": [round(entropy_of(side).mean().item(), 3) for side in (student, teacher)]}
    one = torch.eye(options.tokens)
    return Pair(LinearLogits(one, student.T.contiguous()), LinearLogits(one, teacher.T.contiguous()), "weight", facts)


PAIRS = {"heads": heads, "power_law": power_law}


def evaluated(pair: Pair, teacher: LogitSource, spec: DivergenceSpec) -> tuple[float, torch.Tensor]:
    """The mean divergence, and its gradient."""
    leaf = getattr(pair.student, pair.leaf).detach().requires_grad_()
    weights = torch.full((pair.student.shape[0],), 1.0 / pair.student.shape[0])
    tokens = divergence_of_head(replace(pair.student, **{pair.leaf: leaf}), teacher, spec, weights)
    loss = torch.dot(weights, tokens.divergence)
    return loss.item(), torch.autograd.grad(loss, leaf)[0]


def measure(pair: Pair, width: int) -> list[dict]:
    truths = {kind: evaluated(pair, pair.teacher, DivergenceSpec(kind, beta)) for kind, beta in TYPES}
    rows: list[dict] = [{"payload": "exact"} | {kind: truths[kind][0] for kind, _ in TYPES}]
    for name, make in payloads(pair.teacher, pair.leaf == "hidden").items():
        said, row = make(), {"payload": name, "bytes": bytes_of(name, width, pair.teacher.shape[1])}
        for kind, beta in TYPES:
            value, gradient = evaluated(pair, said, DivergenceSpec(kind, beta))
            true, true_gradient = truths[kind]
            row[kind] = value - true
            row[f"{kind}_gradient"] = ((gradient - true_gradient).norm() / true_gradient.norm()).item()
        rows.append(row)
        say(json.dumps(row))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--student-width", type=int, default=512)
    parser.add_argument("--teacher-width", type=int, default=1024)
    parser.add_argument("--kept-width", type=int, default=4096, help="hidden size that the bytes of a token are for")
    parser.add_argument("--decay", type=float, default=3.0, help="as in sparse_columns.py")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", default=str(RESULTS / "payloads_cpu.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    path = Path(options.output)
    results = json.loads(path.read_text()) if path.exists() else {}  # pairs that are left out stay as they were
    for name in options.pairs:
        pair = PAIRS[name](options)
        results[name] = {
            "command": command_line("benchmarks/run.sh --payloads", sys.argv[1:]),
            "machine": machine("cpu", options.threads),
            "sizes": {"n": options.tokens, "vocab": options.vocab},
            "kept_width": options.kept_width,
            **pair.facts,
            "rows": measure(pair, options.kept_width),
        }
        path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
