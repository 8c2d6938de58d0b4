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
"""Writes the tables of benchmarks/results/*.json into benchmarks/RESULTS.md, between their markers.

    python benchmarks/render.py            write
    python benchmarks/render.py --check    exit 1 where RESULTS.md is behind the results

What stands outside of the markers, and between those of other benchmarks, stays.
"""

import json
import statistics
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
DOCUMENT = FOLDER / "RESULTS.md"

NAMES = {
    "ours": "ours",
    "hybrid": "ours, hybrid",
    "dense": "dense torch",
    "trl": "TRL {trl}",
    "liger": "Liger {liger_kernel}",
    "liger_eager": "Liger {liger_kernel}, not compiled",
    "verl_topk": "VERL's top 64",
}


def load(name: str) -> dict | None:
    path = FOLDER / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def conditions(run: dict, sizes: dict) -> str:
    """Of a run: its command and its machine."""
    m = run["machine"]
    size = f"V = {sizes['vocab']:,}, H_s = {sizes['student_width']:,}, H_t = {sizes['teacher_width']:,}"
    size += f", {sizes['dtype']}" if "dtype" in sizes else ", float32"
    load = "" if m["load"] is None else f" (load {m['load']} at the start)"
    return (
        f"`{run['command']}`, {m['date']}. {m['device']}, {m['cores']} cores, {m['threads']} threads{load}, "
        f"torch {m['torch']}, Python {m['python']}. {size}."
    )


class Results:
    """Medians by (n, type, implementation)."""

    def __init__(self, facts: dict):
        self.facts, self.rows = facts, {(r["n"], r["kind"], r["implementation"]): r for r in facts["rows"]}
        self.tokens = sorted({n for n, _, _ in self.rows})
        self.kinds = list(dict.fromkeys(kind for _, kind, _ in self.rows if kind != "all"))
        self.names = [name for name in NAMES if any(key[2] == name for key in self.rows)]

    def median(self, n: int, kind: str, name: str, field: str) -> float | None:
        row = self.rows.get((n, "all" if name == "floor" else kind, name))
        return statistics.median(row[field]) if row and row[field] and "error" not in row else None

    def title(self, name: str) -> str:
        return NAMES[name].format(**self.facts["runs"][str(self.tokens[-1])]["machine"])

    def conditions(self) -> str:
        lines = [f"- n = {n:,}: {conditions(self.facts['runs'][str(n)], self.facts['sizes'])}" for n in self.tokens]
        return "\n".join(lines)

    def cell(self, n, kind, name, field, scale, base: str | None) -> str:
        """The value, and how many times that of `base` it is."""
        value = self.median(n, kind, name, field)
        if value is None:
            return "failed" if (n, kind, name) in self.rows else "—"
        reference = self.median(n, kind, base, field) if base else None
        return number(value * scale) + (f" (× {value / reference:.2f})" if reference else "")

    def times(self) -> str:
        header = ["n, type", "floor, s", "ours, s (× floor)"]
        others = [name for name in self.names if name != "ours"]
        header += [f"{self.title(name)}, s (× ours)" for name in others]
        rows = []
        for n in self.tokens:
            for kind in self.kinds:
                cells = [self.cell(n, kind, "floor", "seconds", 1.0, None)]
                cells.append(self.cell(n, kind, "ours", "seconds", 1.0, "floor"))
                cells += [self.cell(n, kind, name, "seconds", 1.0, "ours") for name in others]
                rows.append([f"{n:,}, {kind}", *cells])
        return table(header, rows)

    def memory(self) -> str:
        header = ["n, type", "ours, MB"] + [f"{self.title(n)}, MB (× ours)" for n in self.names if n != "ours"]
        rows = []
        for n in self.tokens:
            for kind in self.kinds:
                cells = [
                    self.cell(n, kind, name, "extra_bytes", 1e-6, "ours" if name != "ours" else None)
                    for name in self.names
                ]
                rows.append([f"{n:,}, {kind}", *cells])
        return table(header, rows)

    def gap(self) -> str | None:
        """How far VERL's own loss is from the divergence that it stands for."""
        rows = [row for row in self.rows.values() if "exact" in row]
        if not rows:
            return None
        gaps = ", ".join(f"{row['loss'] / row['exact'] - 1:+.1%} at n = {row['n']:,}" for row in rows)
        return (
            f"VERL's `forward_kl_topk` is not the forward KL but its part on the teacher's 64 largest entries: {gaps}. "
            "These heads' distributions are nearly flat; a language model's are not. VERL's teacher scores in a vLLM "
            "of its own, on other GPUs: no product with the teacher's weight is in its time, nor in its memory."
        )

    def notes(self) -> str:
        lines = []
        for (n, kind, name), row in self.rows.items():
            if "error" in row:
                lines.append(f"- {name}, n = {n:,}, {kind}: failed, {row['error']}")
            if row.get("disagreement"):
                lines.append(f"- {name}, n = {n:,}, {kind}: other work than ours, {row['disagreement']}")
        counts = sorted({len(row["seconds"]) for row in self.rows.values() if "error" not in row})
        calls = " to ".join(str(c) for c in dict.fromkeys((counts[0], counts[-1]))) if counts else "no"
        agreed = "Losses and gradients' norms agree with ours to 1e-3" + (", except:" if lines else ".")
        notes = [f"Medians of {calls} calls after a warm-up, interleaved. {agreed}\n" + "\n".join(lines), self.gap()]
        return "\n\n".join(note.strip() for note in notes if note)


def linear_divergence(device: str) -> str | None:
    facts = load(f"linear_divergence_{device}")
    if facts is None:
        return "Not measured: no CUDA device was at hand." if device == "cuda" else None
    results = Results(facts)
    parts = [results.conditions(), "Time, forward plus backward:", results.times()]
    parts += ["Peak memory beyond inputs and gradients:", results.memory(), results.notes()]
    return "\n\n".join(part.strip() for part in parts)


def sparse_columns() -> str | None:
    facts = load("sparse_columns_cpu")
    if facts is None:
        return None
    entropy, tail = ("{} (student), {} (teacher)".format(*facts[key]) for key in ("entropy", "tail"))
    what = f"n = {facts['sizes']['n']:,}; mean entropy in nats {entropy}; mass outside of the candidates {tail}."
    floors = {row["kind"]: row["seconds"] for row in facts["rows"] if row["threshold"] == "floor"}
    header = ["type, threshold", "time, s (× floor)", "its gradient products, s", "columns kept"]
    header += ["skipped sum of gradient", "error of hidden gradient", "error of weight gradient"]
    rows = []
    for row in facts["rows"]:
        name = row["threshold"] if row["threshold"] == "floor" else row["threshold"] or "exact"
        name = f"{name:.0e}" if isinstance(name, float) else name
        cells = [
            f"{row['seconds']:.3g} (× {row['seconds'] / floors[row['kind']]:.2f})",
            f"{row['product_seconds']:.3g}",
        ]
        cells.append(f"{row['kept_columns']:.1%}" if "kept_columns" in row else "100%")
        cells += [f"{row[k]:.1e}" if k in row else "0" for k in ("skipped_mass", "hidden_error", "weight_error")]
        rows.append([f"{row['kind']}, {name}", *cells])
    return "\n\n".join((conditions(facts, facts["sizes"]), what, table(header, rows)))


def payloads() -> str | None:
    facts = load("payloads_cpu")
    return None if facts is None else "\n\n".join(payloads_of(name, facts[name]) for name in facts)


def payloads_of(name: str, facts: dict) -> str:
    m, sizes, kinds = facts["machine"], facts["sizes"], ("reverse_kl", "forward_kl", "gkd")
    exact, *kept = facts["rows"]
    widths = f", H_s = {facts['student_width']:,}, H_t = {facts['teacher_width']:,}" if "student_width" in facts else ""
    values = ", ".join(f"{kind} {exact[kind]:.4f}" for kind in kinds)
    entropy = "{} (student), {} (teacher)".format(*facts["entropy"])
    what = (
        f"Pair {name}: `{facts['command']}`, {m['date']}, torch {m['torch']}. n = {sizes['n']:,}, V = "
        f"{sizes['vocab']:,}{widths}, float32. Mean entropy in nats {entropy}; exact divergences {values}."
    )
    header = ["payload", f"bytes a token, H_t = {facts['kept_width']:,}"]
    header += [f"{kind}: value, relative to exact (error of the gradient)" for kind in kinds]
    rows = []
    for row in kept:
        gaps = [f"{row[kind] / exact[kind]:+.2%} ({row[f'{kind}_gradient']:.2g})" for kind in kinds]
        rows.append([row["payload"], f"{row['bytes']:,}", *gaps])
    return "\n\n".join((what, table(header, rows)))


def steps(medians: dict, titles: dict[str, str], header: list[str], fields: tuple[str, ...]) -> str:
    """A row for each kind of step that was measured."""
    return table(
        header,
        [
            [title, *(number(medians[kind][field]) for field in fields)]
            for kind, title in titles.items()
            if kind in medians
        ],
    )


def trainer_update() -> str | None:
    facts = load("trainer_update_cpu")
    if facts is None:
        return None
    sizes, medians, m = facts["sizes"], facts["medians"], facts["machine"]
    condition = (
        f"`benchmarks/trainer_update.py run`, {m['date']}. {m['device']}, {m['cores']} cores, torch {m['torch']}. "
        f"{sizes['tokens']:,} response tokens in one micro-batch, V = {sizes['vocab']:,}, student and teacher with "
        f"{sizes['layers']} layers of width {sizes['hidden']}, float32, FSDP2 on one rank. Medians of "
        f"{facts['repeats']} steps after a warm-up, interleaved. Memory is the peak of the update less what is "
        "resident before it; it includes the update's gradients, which are the same in all rows."
    )
    titles = {
        "pure": "pure distillation",
        "grpo": "GRPO without a reference policy, VERL's own",
    }
    header = ["step", "before the update, s", "update, s", "step, s", "update's extra memory, MB"]
    fields = ("prepare_s", "update_s", "step_s", "update_extra_mb")
    note = "Before the update: the teacher's pass, or GRPO's old log-probs. Generation is in no row."
    return "\n\n".join((condition, steps(medians, titles, header, fields), note))


def teachers() -> str | None:
    facts = load("teachers_cpu")
    if facts is None:
        return None
    sizes, medians, m = facts["sizes"], facts["medians"], facts["machine"]
    condition = (
        f"`benchmarks/trainer_update.py run teachers`, {m['date']}. {m['device']}, {m['cores']} cores, torch "
        f"{m['torch']}. {sizes['tokens']:,} response tokens in one micro-batch, V = {sizes['vocab']:,}, models with "
        f"{sizes['layers']} layers of width {sizes['hidden']}, FSDP2 on one rank. Medians of {facts['repeats']} steps "
        "after a warm-up, interleaved. What is resident before the update is the process with all its models and what "
        "the teachers have said; a processor's memory is host and device at once."
    )
    titles = {
        "pure": "one teacher",
        "routed_2": "two teachers, routed",
        "routed_4": "four teachers, routed",
        "mixed_2": "two teachers, mixed",
        "mixed_4": "four teachers, mixed",
        "topk": "one teacher, top 64 and the rest",
        "self": "the initial student",
        "self_lora": "a LoRA's base",
    }
    header = ["teacher", "scoring, s", "update, s", "step, s", "resident before the update, MB", "update's extra, MB"]
    fields = ("prepare_s", "update_s", "step_s", "before_update_mb", "update_extra_mb")
    return "\n\n".join((condition, steps(medians, titles, header, fields)))


SECTIONS = {
    "linear_divergence_cpu": ("Two linear heads, on a processor", lambda: linear_divergence("cpu")),
    "linear_divergence_cuda": ("Two linear heads, on CUDA", lambda: linear_divergence("cuda")),
    "trainer_update_cpu": ("One step of the trainer without its rollout, on a processor", trainer_update),
    "payloads_cpu": ("What is kept of a teacher, and what it leaves out", payloads),
    "teachers_cpu": ("Several teachers, and the student as its own", teachers),
    "sparse_columns_cpu": ("Below the floor: skipping columns of the gradient", sparse_columns),
}


def with_section(document: str, name: str, title: str, body: str) -> str:
    start, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    block = f"{start}\n{body}\n{end}"
    if start not in document:
        return f"{document.rstrip()}\n\n## {title}\n\n{block}\n"
    before, rest = document.split(start, 1)
    return before + block + rest.split(end, 1)[1]


def main() -> None:
    old = DOCUMENT.read_text() if DOCUMENT.exists() else "# Measurements\n"
    new = old
    for name, (title, render) in SECTIONS.items():
        body = render()
        if body is not None:
            new = with_section(new, name, title, body)
    if "--check" in sys.argv[1:]:
        sys.exit(new != old)
    DOCUMENT.write_text(new)


if __name__ == "__main__":
    main()
