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
    python benchmarks/render.py --check    exit 1 where a document is behind the results

What stands outside of the markers, and between those of other benchmarks, stays.
"""

import json
import statistics
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
DOCUMENT = FOLDER / "RESULTS.md"
GUIDE = FOLDER.parent / "PATCH_README.md"  # what a user of the patch wants to know of it

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


def summary() -> str:
    """The head at its largest size, and a step of the trainer."""
    heads, update = load("linear_divergence_cpu"), load("trainer_update_cpu")
    if heads is None or update is None:
        raise FileNotFoundError("results/linear_divergence_cpu.json or trainer_update_cpu.json is missing")
    results = Results(heads)
    n, names = results.tokens[-1], ["ours", "dense", "trl", "liger"]
    rows = []
    for kind in results.kinds:
        seconds = [results.cell(n, kind, name, "seconds", 1.0, None) for name in ["floor", *names]]
        memory = [results.cell(n, kind, name, "extra_bytes", 1e-6, None) for name in names]
        rows += [[f"{kind}, seconds", *seconds], [f"{kind}, MB beyond inputs and gradients", "—", *memory]]
    header = [f"head, n = {n:,}, V = {heads['sizes']['vocab']:,}", "bare products", *map(results.title, names)]
    titles = {"pure": "pure distillation", "grpo": "GRPO, VERL's own"}
    fields = ["step without its rollout", "seconds", "update's extra memory, MB"]
    m = heads["runs"][str(n)]["machine"]
    what = f"{m['device']}, {m['cores']} cores, no GPU, torch {m['torch']}, float32, {m['date']}."
    step = steps(update["medians"], titles, fields, ("step_s", "update_extra_mb"))
    return "\n\n".join((what, table(header, rows), step))


# The goals: at most so many times the four bare products, so many times as fast as a peer, GiB beside the inputs.
FLOOR_GOALS = {"reverse_kl": 1.3, "forward_kl": 1.3, "gkd": 1.5}
SPEED_GOAL, MEMORY_GOAL = 1.5, 1.5


def gpu(folder: Path = FOLDER / "results" / "gpu") -> str:
    """Of the JSONs of benchmarks/gpu; without them, what a roofline predicts."""
    found = {name: json.loads(path.read_text()) for name in GPU_PARTS if (path := folder / f"{name}.json").exists()}
    if not found:
        return f"Not measured: no CUDA device was at hand.\n\n{predictions()}"
    parts = [gpu_steps(found)]
    measured = {name: step for name, step in found.items() if step["rows"] or "trainer_update" in step}
    parts += [render(measured[name]) for name, render in GPU_PARTS.items() if name in measured]
    return "\n\n".join(part.strip() for part in parts if part)


def predictions() -> str:
    from verl.on_policy_distillation import roofline

    tokens, vocab, teacher_width = 8192, 151936, 5120
    accelerator = roofline.ACCELERATORS["H100"]
    rows = []
    for width in (2048, 4096):
        chunking = roofline.chunking_for(tokens, vocab, width, teacher_width, 2, accelerator)
        for name, kind in (("reverse_kl", "reverse_kl"), ("gkd", "gkd"), ("reverse_kl, hybrid", "reverse_kl")):
            cost = roofline.head_cost(
                *(tokens, vocab, width, (teacher_width,), chunking, accelerator),
                kind=kind,
                is_hybrid="hybrid" in name,
            )
            cells = [f"{1e3 * cost.seconds:.0f}", f"× {cost.seconds / cost.floor_seconds:.2f}"]
            cells += [f"{cost.extra_bytes / 2**30:.2f}", f"{chunking.rows:,} / {chunking.group:,}"]
            rows.append([f"H_s = {width:,}, {name}", *(f"{cell} (predicted)" for cell in cells[:3]), cells[3]])
    header = ["size, type", "forward and backward, ms", "× its bare products", "buffers, GiB", "rows / group"]
    what = (
        f"Predictions, not measurements: `verl.on_policy_distillation.roofline` for an {accelerator.name}, n = "
        f"{tokens:,}, V = {vocab:,}, H_t = {teacher_width:,}, 16-bit weights. The hybrid loss projects twice, and so "
        "do the products that it is compared with."
    )
    return f"{what}\n\n{table(header, rows)}"


def gpu_steps(found: dict[str, dict]) -> str:
    """The machine, and how each step ended."""
    m = next(iter(found.values()))["machine"]
    what = f"`benchmarks/gpu/run.sh`, {m['date']}. {m['device']}, driver {m['driver']}, torch {m['torch']}, Triton "
    what += f"{m['triton']}, Python {m['python']}."
    if any(step["is_dry_run"] for step in found.values()):
        what += " **A dry run on a processor: none of its numbers means anything.**"
    rows = [[name, step["status"], number(step["seconds"])] for name, step in found.items()]
    said = [
        f"- {name}: {step.get('skipped') or ' | '.join(step['last_lines'][-1:])}"
        for name, step in found.items()
        if step["status"] != "ok"
    ]
    return "\n\n".join([what, table(["step", "status", "s"], rows), "\n".join(said)])


def gpu_products(step: dict) -> str:
    rows = [[row["product"], f"{row['error']:.1e}", number(row["teraflops"])] for row in step["rows"]]
    return "Products:\n\n" + table(["product", "error, of the largest entry", "TFLOP/s"], rows)


def gpu_kernel(step: dict) -> str:
    wrong = [row for row in step["rows"] if not row["is_right"]]
    names = [row.get("check") or f"{row['kind']} at V = {row['vocab']:,}" for row in wrong]
    return f"Kernel: {len(step['rows']) - len(wrong)} of {len(step['rows'])} checks right." + (
        f" Wrong: {'; '.join(names)}." if wrong else ""
    )


def gpu_bandwidth(step: dict) -> str:
    """By divergence and rows: as the kernel launches itself, which comes first, and the best of the sweep."""
    timed: dict[tuple, list[dict]] = {}
    for row in step["rows"]:
        if "error" not in row:
            timed.setdefault((row["kind"], row["rows"]), []).append(row)
    rows = []
    for (kind, count), launches in sorted(timed.items()):
        best = max(launches, key=lambda row: row["gigabytes_per_s"])
        shape = f"{best['block']:,} / {best['warps']} / {best['stages']}"
        speeds = [number(row["gigabytes_per_s"]) for row in (launches[0], best)]
        rows.append([f"{kind}, {count:,} rows", *speeds, shape])
    header = ["divergence", "its own launch, GB/s", "best, GB/s", "of block / warps / stages"]
    return f"Bandwidth of the kernel, V = {step['vocab']:,}:\n\n{table(header, rows)}"


def gpu_head(step: dict) -> str:
    parts = []
    sweep: dict[tuple, list[dict]] = {}
    for row in step["rows"]:
        if "linear_divergence" in row:
            results = Results(row["linear_divergence"])
            parts += [results.conditions(), "Goals:", goals(results), "Time, forward plus backward:", results.times()]
            parts += ["Peak memory beyond inputs and gradients:", results.memory(), results.notes()]
        elif "error" not in row:
            sweep.setdefault((row["student_width"], row["implementation"], row["kind"]), []).append(row)
    if sweep:
        parts += ["Chunkings, rows / group; the head's own is what it chooses:", chunkings(sweep)]
    return "\n\n".join(parts)


def goals(results: Results) -> str:
    n = results.tokens[-1]

    def ratio(kind: str, name: str, base: str) -> float | None:
        above, below = (results.median(n, kind, each, "seconds") for each in (name, base))
        return above / below if above and below else None

    rows = []
    for kind, goal in FLOOR_GOALS.items():
        rows.append(goal_row(f"{kind} in at most × {goal} the bare products", ratio(kind, "ours", "floor"), goal, -1))
    for peer in (name for name in ("trl", "liger") if name in results.names):
        found = [value for kind in results.kinds if (value := ratio(kind, peer, "ours"))]
        slowest = min(found, default=None)
        rows.append(goal_row(f"at least × {SPEED_GOAL} as fast as {results.title(peer)}", slowest, SPEED_GOAL, 1))
    extra = [value for kind in results.kinds if (value := results.median(n, kind, "ours", "extra_bytes")) is not None]
    most = max(extra) / 2**30 if extra else None
    rows.append(goal_row(f"at most {MEMORY_GOAL} GiB beside inputs and gradients", most, MEMORY_GOAL, -1))
    return table(["goal", "measured", ""], rows)


def goal_row(goal: str, measured: float | None, bound: float, sign: int) -> list[str]:
    """`sign`: 1 if more is better, else -1."""
    if measured is None:
        return [goal, "—", "not measured"]
    return [goal, f"{measured:.2f}", "reached" if sign * measured >= sign * bound else "missed"]


def chunkings(sweep: dict[tuple, list[dict]]) -> str:
    rows = []
    for (width, implementation, kind), measured in sweep.items():
        best = min(measured, key=lambda row: row["seconds"])
        own = next((row for row in measured if row["chunking"] is None), None)
        cells = [
            f"{1e3 * row['seconds']:.1f} ({row['extra_bytes'] / 2**30:.2f})" if row else "—" for row in (own, best)
        ]
        shape = " / ".join(f"{size:,}" for size in best["chunking"]) if best["chunking"] else "its own"
        rows.append([f"H_s = {width:,}, {NAMES[implementation]}, {kind}", *cells, shape])
    return table(["size, type", "its own, ms (extra GiB)", "best, ms (extra GiB)", "the best"], rows)


def gpu_engine(step: dict) -> str:
    """A row for each case that was compared with another; the others are what is compared with."""
    rows = []
    for row in step["rows"]:
        if "error" in row:
            rows.append([row["case"], row["error"], *["—"] * 5])
        elif "against" in row:
            cells = [f"{row[name]:.1e}" for name in ("loss_error", "gradient_error", "bound")]
            cells += [number(row[name]) for name in ("after_start_mb", "after_update_mb", "peak_mb")]
            rows.append([f"{row['case']}{'' if row['is_right'] else ' (wrong)'}", *cells])
    header = ["case", "error of the loss", "of the gradients", "bound"]
    header += ["after the start, MB", "after the update, MB", "the update's peak, MB"]
    what = "VERL's engine without Ray, head against whole logits, those in bfloat16 against float32; memory beyond "
    what += "what was taken when the case began:"
    return f"{what}\n\n{table(header, rows)}"


def gpu_trainer(step: dict) -> str:
    if step["is_dry_run"]:
        composed = ", ".join(row["machine"] for row in step["rows"])
        return f"The quickstart through Ray: its configuration was composed for {composed}; nothing was trained."
    phases = sorted({name for row in step["rows"] for name in row["phases"]})
    values = {"KL, nats": [row["kl"] for row in step["rows"]]}
    values |= {f"{name}, s": [row["phases"].get(name) for row in step["rows"]] for name in phases}
    rows = [[name, *("—" if value is None else number(value) for value in line)] for name, line in values.items()]
    header = ["", *(f"step {row['step']}" for row in step["rows"])]
    what = f"The quickstart through Ray, with its settings for {step['machine_overrides']}:"
    return f"{what}\n\n{table(header, rows)}"


def gpu_update(step: dict) -> str:
    facts = step["trainer_update"]
    titles = {"pure": "pure distillation", "verl_topk": "VERL's own top-64 distillation", "grpo": "GRPO"}
    header = ["step", "before the update, s", "update, s", "step, s", "extra memory of the update, MB"]
    fields = ("prepare_s", "update_s", "step_s", "update_extra_mb")
    what = f"Update of {facts['sizes']['tokens']:,} tokens, V = {facts['sizes']['vocab']:,}, medians of "
    return f"{what}{facts['repeats']}:\n\n{steps(facts['medians'], titles, header, fields)}"


GPU_PARTS = {
    "products": gpu_products,
    "kernel": gpu_kernel,
    "bandwidth": gpu_bandwidth,
    "head": gpu_head,
    "engine": gpu_engine,
    "update": gpu_update,
    "trainer": gpu_trainer,
}


SECTIONS = {
    "linear_divergence_cpu": ("Two linear heads, on a processor", lambda: linear_divergence("cpu")),
    "linear_divergence_cuda": ("Two linear heads, on CUDA", lambda: linear_divergence("cuda")),
    "gpu": ("On one GPU", gpu),
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


def rendered() -> dict[Path, str]:
    """Each document as it should be."""
    results = DOCUMENT.read_text() if DOCUMENT.exists() else "# Measurements\n"
    for name, (title, render) in SECTIONS.items():
        body = render()
        if body is not None:
            results = with_section(results, name, title, body)
    return {DOCUMENT: results, GUIDE: with_section(GUIDE.read_text(), "measured", "Measured results", summary())}


def main() -> None:
    documents = rendered()
    if "--check" in sys.argv[1:]:
        sys.exit(any(not path.exists() or path.read_text() != text for path, text in documents.items()))
    for path, text in documents.items():
        path.write_text(text)


if __name__ == "__main__":
    main()
