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
"""Draws benchmarks/results/*_bars.svg from the results files: the tables of RESULTS.md as bars.

    python benchmarks/bars.py

Text stays text in the pictures, and every bar has its number, so that a test can compare them with the results.
Needs matplotlib.
"""

from pathlib import Path

import matplotlib
from render import FOLDER, Results, load, number

matplotlib.use("Agg")
import matplotlib.pyplot as pyplot  # noqa: E402

OWN, OTHER = "#d1242f", "#8c959f"
SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "bars", "font.size": 9}


def bars(axes, values: dict[str, float], own: str) -> None:
    """Horizontal, the first on top, each with its number."""
    titles = list(values)
    drawn = axes.barh(titles, list(values.values()), color=[OWN if title == own else OTHER for title in titles])
    axes.bar_label(drawn, [number(value) for value in values.values()], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xticks([])
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)


def shown(results: Results, n: int, kind: str, field: str, scale: float) -> dict[str, float]:
    """By title; without the implementations that were not measured."""
    medians = {results.title(name): results.median(n, kind, name, field) for name in results.names}
    return {title: value * scale for title, value in medians.items() if value is not None}


def two_heads(results: Results, path: Path) -> None:
    """Time and memory of the largest n, one row of panels for each."""
    n = results.tokens[-1]
    panels = [("seconds", 1.0, "seconds"), ("extra_bytes", 1e-6, "MB")]
    with pyplot.rc_context(SETTINGS):
        figure, grid = pyplot.subplots(2, len(results.kinds), figsize=(9.5, 4.6), layout="constrained")
        for row, (field, scale, unit) in zip(grid, panels, strict=True):
            for axes, kind in zip(row, results.kinds, strict=True):
                bars(axes, shown(results, n, kind, field, scale), results.title("ours"))
                axes.set_title(f"{kind}: {unit}", fontsize=9, loc="left")
                if field == "seconds":
                    floor = results.median(n, kind, "floor", field)
                    axes.axvline(floor, color="black", linewidth=0.8, linestyle=":")
        title = f"{n:,} tokens, forward and backward. Dots: the bare matrix products. MB: beyond inputs and gradients"
        figure.suptitle(title, fontsize=10)
        figure.savefig(path, format="svg", metadata={"Date": None})
        pyplot.close(figure)


def main() -> None:
    facts = load("linear_divergence_cpu")
    if facts is None:
        raise SystemExit("benchmarks/results/linear_divergence_cpu.json is missing: benchmarks/run.sh makes it")
    two_heads(Results(facts), FOLDER / "results" / "linear_divergence_bars.svg")


if __name__ == "__main__":
    main()
