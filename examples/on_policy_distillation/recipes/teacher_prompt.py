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
"""Adds a column with the teacher's own prompt to a parquet file of VERL's form, for `teacher.prompt_key`.

The teacher's prompt is the student's with a system message before it, a text after its last message, or both:

    python3 teacher_prompt.py train.parquet with_system_prompt.parquet --system prompt.txt
    python3 teacher_prompt.py train.parquet with_solution.parquet --after \\
        $'\\n\\nA correct solution:\\n{extra_info[answer]}\\n\\nSolve it in your own words.'

A value that names a file stands for the text in it. In --after, {column} and {column[key]} stand for values of the row;
{{ and }} for braces.
"""

import argparse
from pathlib import Path
from typing import Any, Optional

from datasets import Dataset

__all__ = ["COLUMN", "teacher_prompt"]

COLUMN = "teacher_prompt"


def teacher_prompt(row: dict[str, Any], system: Optional[str], after: Optional[str]) -> list[dict[str, str]]:
    """The messages that the teacher reads in place of ``row["prompt"]``.

    Raises:
        ValueError: `after` names a value that the row does not have.
    """
    messages = [dict(message) for message in row["prompt"]]
    if after is not None:
        try:
            messages[-1]["content"] += after.format_map(row)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(
                f"--after={after!r} asks for {error}, and a row has {list(row)}: name one of them, and write braces "
                "that stand for themselves twice, {{ and }}."
            ) from error
    if system is not None:
        messages = [{"role": "system", "content": system}, *(m for m in messages if m["role"] != "system")]
    return messages


def _text(argument: str) -> str:
    """Of the file of that name, or the argument itself."""
    is_file = "\n" not in argument and len(argument) < 256 and Path(argument).is_file()
    return Path(argument).read_text() if is_file else argument


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parquet", help="the file to read")
    parser.add_argument("out", type=Path, help="the file to write")
    parser.add_argument("--system", type=_text, help="a system message, in place of the row's own")
    parser.add_argument("--after", type=_text, help="a text after the last message")
    options = parser.parse_args()
    if options.system is None and options.after is None:
        parser.error("nothing to add: give --system, --after or both")
    data = Dataset.from_parquet(options.parquet)
    made = data.map(lambda row: {COLUMN: teacher_prompt(row, options.system, options.after)})
    options.out.parent.mkdir(parents=True, exist_ok=True)
    made.to_parquet(str(options.out))


if __name__ == "__main__":
    main()
