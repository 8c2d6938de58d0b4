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
"""reasoning-gym's task `chain_sum`, answered with its working: the headline's long answers.

Problems and verifier are reasoning-gym's. The base is taught to add one term at a time, as on paper:

    question  5+9-7-9=
    answer    5+9=14-7=7-9=-2

Each term and each sum can go wrong, and what follows is then wrong too. The verifier judges the last number alone.

VERL reads the reward from this file: `reward.custom_reward_function.path=chain_sum.py`.
"""

from functools import cache

import reasoning_gym

DATA_SOURCE = "chain_sum"
HELD_OUT_SEED = 1 << 32  # reasoning-gym's problem i has the seed `seed + i`: far from those of the training set


def expressions(terms: int, seed: int, count: int) -> list[str]:
    """Sums and differences of `terms` digits, such as "5+9-7"."""
    data = reasoning_gym.create_dataset(
        DATA_SOURCE, min_terms=terms, max_terms=terms, min_digits=1, max_digits=1, seed=seed, size=count
    )
    return [entry["metadata"]["expression"].replace(" ", "") for entry in data]


def partial_sums(expression: str) -> list[int]:
    """From the second term on: 14, 7 for "5+9-7"."""
    total, sums = int(expression[0]), []
    for operator, digit in zip(expression[1::2], expression[2::2], strict=True):
        total += int(operator + digit)
        sums.append(total)
    return sums


def with_working(expression: str) -> tuple[str, str]:
    terms = zip(expression[1::2], expression[2::2], partial_sums(expression), strict=True)
    return f"{expression}=", expression[0] + "".join(f"{operator}{digit}={total}" for operator, digit, total in terms)


def with_result(expression: str) -> tuple[str, str]:
    return f"{expression}=", str(partial_sums(expression)[-1])


def problems(terms: int, seed: int, count: int, held_out: int) -> tuple[list[str], list[str]]:
    """Expressions to train on and to hold out; none is in both, and none is twice in the second."""
    taught = expressions(terms, seed, count)
    others = dict.fromkeys(expressions(terms, seed + HELD_OUT_SEED, 2 * held_out))
    known = set(taught)
    return taught, [expression for expression in others if expression not in known][:held_out]


def answer_tokens(terms: int) -> int:
    """The most that a right answer takes, a token a character: the terms, the sums, EOS."""
    longest = (max(len(str(9 * added)), len(str(-9 * (added - 1)))) for added in range(2, terms + 1))
    return 2 + sum(3 + digits for digits in longest)


@cache
def _verifier():
    return reasoning_gym.create_dataset(DATA_SOURCE, size=1)


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs) -> float:
    """VERL's reward contract: 1.0 if reasoning-gym takes the last number of the response for the result, else 0.0.

    Its verifier gives part of a point to a number that the result is a part of; here that counts as wrong.
    """
    if data_source != DATA_SOURCE:
        raise ValueError(f"this reward scores {DATA_SOURCE!r}, not {data_source!r}")
    result = solution_str.rsplit("=", 1)[-1]
    return float(_verifier().score_answer(result, {"answer": ground_truth}) == 1.0)
