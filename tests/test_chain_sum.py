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
"""reasoning-gym's chain_sum as a task of the headline: its working, and its verifier as VERL's reward."""

import headline
import pytest

pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed; run_tests.sh installs it where pip can")

import chain_sum  # noqa: E402


def test_the_working_is_that_of_python():
    assert chain_sum.with_working("5+9-7-9") == ("5+9-7-9=", "5+9=14-7=7-9=-2")
    taught, _ = chain_sum.problems(terms=7, seed=0, count=50, held_out=10)
    for expression in taught:
        question, answer = chain_sum.with_working(expression)
        first, *steps = answer.split("=")
        totals = [eval(expression[: 2 * terms - 1]) for terms in range(2, 8)]
        assert eval(first) == totals[0]
        assert [eval(step) for step in steps[:-1]] == totals[1:]  # "14-7" of "5+9=14-7=7"
        assert chain_sum.with_result(expression) == (question, str(totals[-1]))


def test_no_problem_is_held_out_and_trained_on_or_held_out_twice():
    taught, held_out = chain_sum.problems(terms=2, seed=0, count=60, held_out=40)  # of 200 that there are
    assert len(held_out) == len(set(held_out)) > 0 and not set(taught) & set(held_out)
    assert chain_sum.problems(terms=2, seed=0, count=60, held_out=40) == (taught, held_out)


@pytest.mark.parametrize(
    "answer, score",
    [
        ("5+9=14-7=7-9=-2", 1.0),
        ("1=-2", 1.0),
        ("-2", 1.0),
        ("5+9=14-7=7-9=-2=", 0.0),
        ("5+9=14-7=7-9=2", 0.0),
        ("5+9=14-7=7-9=-21", 0.0),
        ("5+9=14-7=7-9", 0.0),
        ("", 0.0),
    ],
)
def test_the_last_number_is_what_is_judged(answer, score):
    assert chain_sum.compute_score("chain_sum", answer, "-2") == score


def test_another_task_s_answer_is_refused():
    with pytest.raises(ValueError, match="'gsm8k'"):
        chain_sum.compute_score("gsm8k", "1", "1")


@pytest.mark.parametrize("terms", [2, 4, 8])
def test_no_right_answer_is_longer_than_its_bound(terms):
    longest = max("9" + "+9" * (terms - 1), "0" + "-9" * (terms - 1), key=lambda e: len(chain_sum.with_working(e)[1]))
    expressions = [longest, *chain_sum.expressions(terms, 0, 200)]
    lengths = [len(chain_sum.with_working(expression)[1]) + 1 for expression in expressions]
    assert max(lengths) <= chain_sum.answer_tokens(terms) <= lengths[0] + terms  # minus signs


def test_the_headline_s_tasks_have_room_for_every_answer():
    for terms in (4, 8):
        task = headline.TASKS[f"chain_sum_{terms}"]
        assert task.answer_tokens == chain_sum.answer_tokens(terms)
        assert task.prompt_tokens == 2 * terms
