#!/usr/bin/env python3
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
"""Write docs/batch.svg: how a batch travels from the rollout through teacher and head to the update.

    scripts/make_batch_drawing.py            write it
    scripts/make_batch_drawing.py --check    exit 1 when it is not what would be written

What is drawn is the description below; a test looks its files and functions up in the tree. Paths without a folder are
below verl/on_policy_distillation/, those with one below verl/.
"""

import argparse
import re
import sys
from html import escape
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "batch.svg"

TITLE = "How a batch travels"
SUMMARY = (
    "The student's rollout puts a batch into TransferQueue. The teacher scores it and keeps its hidden states in the "
    "same process; row ids go back. The student's update takes the batch with its ids, and the head compares both "
    "sides' logits a chunk at a time. The loss sums up the divergences, and the new weights go to the rollout."
)

WIDTH, HEIGHT = 1000, 938
LEFT, RIGHT, BOTH = (20, 360), (620, 360), (20, 960)  # x and width of the columns
LINE, MARGIN = 18, 12  # height of a line of text, and what is above and below the lines of a box


class Box(NamedTuple):
    column: tuple[int, int]
    y: int
    title: str
    lines: tuple[str, ...]
    is_elsewhere: bool = False  # in processes of its own, not on the training devices

    @property
    def height(self):
        return 2 * MARGIN + LINE * (1 + len(self.lines))


class Arrow(NamedTuple):
    points: tuple[tuple[int, int], ...]
    label: tuple[int, int]  # where its first line begins
    lines: tuple[str, ...]


# What is between backticks is a file, and what follows it with "()" a function of that file.
BOXES = (
    Box(
        BOTH, 20, "Student rollout", ("VERL's rollout backend (vllm, sglang), or hf of `plugin/cpu/rollout.py`",), True
    ),
    Box(
        BOTH,
        130,
        "TransferQueue",
        ("tensors by key, in storage processes; hybrid: also VERL's log-probs, values and advantages",),
        True,
    ),
    Box(
        LEFT,
        260,
        "Teacher",
        (
            "`worker.py`: score()",
            "`teachers.py`: this rank's samples",
            "`engine_fsdp.py`: forward only, without the LM head",
        ),
    ),
    Box(
        LEFT,
        410,
        "Signal store",
        ("`signal.py`: by row id, in host memory, until", "the update is over or has failed"),
    ),
    Box(
        RIGHT,
        260,
        "Student",
        (
            "`worker.py`: update_actor()",
            "`engine_fsdp.py`: of each micro-batch the forward,",
            "up to the output layer",
        ),
    ),
    Box(
        LEFT,
        560,
        "Divergence",
        ("`divergence.py`: the mathematics", "`divergence_triton.py`: the same on an accelerator"),
    ),
    Box(
        RIGHT,
        560,
        "Head",
        ("`head.py`: inside the forward, in place of logits;", "hidden @ weight.T of both sides, by chunks"),
    ),
    Box(
        RIGHT, 700, "Loss", ("`losses.py`: VERL's agg_loss; hybrid: and its", "ppo_loss around the registered RL loss")
    ),
    Box(
        RIGHT,
        840,
        "Update",
        ("backward, optimizer step, new weights to the", "rollout: VERL's `workers/engine_workers.py`"),
    ),
)
ARROWS = (
    Arrow(((500, 80), (500, 130)), (514, 109), ("prompts, responses, input_ids, position_ids, masks",)),
    Arrow(((60, 190), (60, 260)), (74, 220), ("`trainer.py`: _score()", "the fields that the teacher reads")),
    Arrow(
        ((60, 356), (60, 410)),
        (74, 380),
        ("last hidden states of the positions that predict", "tokens of the loss; which these are: `tokens.py`"),
    ),
    Arrow(((380, 428), (410, 428), (410, 190)), (424, 300), ("of each sample a row id", "and a number of bytes")),
    Arrow(((660, 190), (660, 260)), (674, 220), ("`trainer.py`: _update_actor()", "the batch with its row ids")),
    Arrow(
        ((780, 356), (780, 560)),
        (794, 440),
        ("hidden states of the same", "positions (`tokens.py`), and", "the output layer's weight"),
    ),
    Arrow(
        ((380, 474), (660, 474), (660, 560)),
        (394, 446),
        ("what the ids name; the weight that", "`output_projection.py` has read"),
    ),
    Arrow(((620, 582), (380, 582)), (412, 574), ("both sides' logits of a chunk",)),
    Arrow(((380, 614), (620, 614)), (398, 634), ("each token's divergence, gradient,", "KL, entropies, agreement")),
    Arrow(
        ((660, 638), (660, 700)),
        (674, 664),
        ("model_output: one column for each name", "(`engine_fsdp.py`); hybrid: also log-probs"),
    ),
    Arrow(((660, 778), (660, 840)), (674, 814), ("loss, metrics",)),
)

# Its own background, so that it can be read on any page; the browser says which of the two is asked for.
STYLE = """\
.page { fill: #ffffff } .box { fill: #eef3fb; stroke: #3b6ea8 } .elsewhere { fill: #f4f4f1; stroke-dasharray: 6 4 }
.arrow { fill: none; stroke: #3b6ea8; stroke-width: 1.5 } .head { fill: #3b6ea8 }
text { fill: #1c2733; font: 12.5px sans-serif }
.title { font-weight: bold; font-size: 14px } .file { font-family: monospace }
@media (prefers-color-scheme: dark) {
  .page { fill: #14181f } .box { fill: #1f2a3a; stroke: #7fb0e8 } .elsewhere { fill: #232629 }
  .arrow { stroke: #7fb0e8 } .head { fill: #7fb0e8 } text { fill: #e6edf3 }
}"""


def text(x, y, line, kind=""):
    """One line; what is between backticks is set as a file name."""
    parts = re.split("`([^`]*)`", line)
    spans = [f'<tspan class="file">{escape(part)}</tspan>' if i % 2 else escape(part) for i, part in enumerate(parts)]
    return f'<text x="{x}" y="{y}"{kind}>{"".join(spans)}</text>'


def draw_box(box):
    x, width = box.column
    kind = "box elsewhere" if box.is_elsewhere else "box"
    yield f'<rect class="{kind}" x="{x}" y="{box.y}" width="{width}" height="{box.height}" rx="6"/>'
    yield text(x + MARGIN, box.y + MARGIN + 13, box.title, ' class="title"')
    for index, line in enumerate(box.lines, start=1):
        yield text(x + MARGIN, box.y + MARGIN + 13 + index * LINE, line)


def draw_arrow(arrow):
    points = " ".join(f"{x},{y}" for x, y in arrow.points)
    yield f'<polyline class="arrow" marker-end="url(#head)" points="{points}"/>'
    for index, line in enumerate(arrow.lines):
        yield text(arrow.label[0], arrow.label[1] + index * (LINE - 2), line)


def build():
    """The picture, as SVG."""
    shapes = [line for box in BOXES for line in draw_box(box)] + [
        line for arrow in ARROWS for line in draw_arrow(arrow)
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
            f"<title>{TITLE}</title>",
            f"<desc>{SUMMARY}</desc>",
            f"<style>\n{STYLE}\n</style>",
            '<defs><marker id="head" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">',
            '<path class="head" d="M0,0 L9,4 L0,8 z"/></marker></defs>',
            f'<rect class="page" width="{WIDTH}" height="{HEIGHT}"/>',
            *shapes,
            "</svg>\n",
        ]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        PICTURE.write_text(build(), encoding="utf-8")
        return 0
    if PICTURE.is_file() and PICTURE.read_text(encoding="utf-8") == build():
        return 0
    print(f"{PICTURE.relative_to(ROOT)} is stale: run scripts/make_batch_drawing.py.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
