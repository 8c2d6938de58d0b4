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
"""A data set of questions in the form in which VERL's own preprocessing writes GSM8K and MATH.

    python3 prompts.py zwhe99/DeepMath-103K ~/data/deepmath/train.parquet --question question --answer final_answer \\
        --ability math --after "Let's think step by step and output the final answer within \\\\boxed{}."
    python3 prompts.py ise-uiuc/Magicoder-OSS-Instruct-75K ~/data/magicoder/train.parquet --question problem \\
        --ability code

The first argument is a data set of the Hub or a folder with its files. `ability` is the column by which two_teachers.sh
chooses the teacher. VERL has no rule for the answers of these data sets: a pure run gives them a score of 0, which it
does not use; for a hybrid one bring a reward function.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

from datasets import load_dataset

__all__ = ["row_maker"]


def row_maker(
    source: str, split: str, question: str, answer: Optional[str], ability: str, after: str
) -> Callable[[dict[str, Any], int], dict[str, Any]]:
    """A function for `datasets.Dataset.map`, which makes VERL's row of a data set's row and its number.

    Args:
        source: the name of the data set, by which VERL chooses a rule for the score and names validation metrics.
        question, answer: columns; without an answer the ground truth is empty.
        after: a text that follows each question, after a space.
    """

    def row(example: dict[str, Any], index: int) -> dict[str, Any]:
        content = f"{example[question]} {after}".rstrip()
        truth = "" if answer is None else str(example[answer])
        return {
            "data_source": source,
            "prompt": [{"role": "user", "content": content}],
            "ability": ability,
            "reward_model": {"style": "rule", "ground_truth": truth},
            "extra_info": {"split": split, "index": index},
        }

    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="a name on the Hub, or a folder")
    parser.add_argument("out", type=Path, help="the parquet file to write")
    parser.add_argument("--split", default="train")
    parser.add_argument("--question", required=True, help="column of the questions")
    parser.add_argument("--answer", help="column of the answers")
    parser.add_argument("--ability", required=True, help="what the column `ability` says")
    parser.add_argument("--after", default="", help="a text after each question")
    parser.add_argument("--source", help="what the column `data_source` says; by default the data set's name")
    options = parser.parse_args()
    data = load_dataset(options.dataset, split=options.split)
    for column in (options.question, options.answer):
        if column is not None and column not in data.column_names:
            parser.error(f"{options.dataset} has no column {column}, it has {data.column_names}")
    make = row_maker(
        options.source or options.dataset,
        options.split,
        options.question,
        options.answer,
        options.ability,
        options.after,
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    data.map(make, with_indices=True, remove_columns=data.column_names).to_parquet(str(options.out))


if __name__ == "__main__":
    main()
