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
"""Ends the quickstart: evaluates base, student and teacher, writes FOLDER/results.json, and prints the table."""

import json
import sys
from pathlib import Path

from arithmetic import evaluate
from metrics import accuracy, read_run


def checkpoint(folder: Path) -> Path:
    """The trained student as a Hugging Face checkpoint."""
    step = (folder / "checkpoints" / "latest_checkpointed_iteration.txt").read_text().strip()
    return folder / "checkpoints" / f"global_step_{step}" / "actor" / "huggingface"


def make_results(folder: Path) -> dict:
    test = folder / "test.parquet"
    run = read_run(folder)
    student = checkpoint(folder)
    return {
        "steps": [
            {
                "step": step,
                "kl": metrics.get("distillation/kl"),
                "held_out_accuracy": accuracy(metrics),
                "seconds": metrics.get("timing_s/step"),
            }
            for step, metrics in run.items()
        ],
        "held_out_accuracy": {
            "base": evaluate(folder / "base", test),
            "student": evaluate(student, test),
            "teacher": evaluate(folder / "teacher", test),
        },
        "checkpoint": str(student.relative_to(folder)),
    }


def table(results: dict) -> str:
    held_out = results["held_out_accuracy"]
    lines = ["", " step       KL   held-out accuracy"]
    for row in results["steps"]:
        if row["held_out_accuracy"] is not None:
            kl = "" if row["kl"] is None else f"{row['kl']:.4f}"
            lines.append(f"{row['step']:5d}   {kl:>6}   {row['held_out_accuracy']:17.1%}")
    lines += [
        "",
        f"student before   {held_out['base']:6.1%}",
        f"student after    {held_out['student']:6.1%}   "
        f"({held_out['student'] / held_out['teacher']:.1%} of the teacher's)",
        f"teacher          {held_out['teacher']:6.1%}",
    ]
    return "\n".join(lines)


def main() -> None:
    folder = Path(sys.argv[1])
    path = folder / "results.json"
    if not path.exists():
        path.write_text(json.dumps(make_results(folder), indent=2) + "\n")
    results = json.loads(path.read_text())
    print(table(results))
    print(f"\nnumbers: {path}\nstudent: {folder / results['checkpoint']}")


if __name__ == "__main__":
    main()
