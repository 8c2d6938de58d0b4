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
"""The headline experiment: its numbers from hand-made curves, its baselines, and the README from the results."""

import json
import math
import os
from fractions import Fraction

import headline
import headline_picture
import headline_results
import pytest
import torch
from baselines import forward_kl_topk, sampled_k1_advantages
from conftest import ROOT
from headline_results import (
    best_learning_rate,
    cost,
    speed_ups,
    standard_error,
    steps_to_level,
    steps_until,
    summary,
    worse_p_value,
)

from verl.on_policy_distillation.divergence import DenseLogits
from verl.on_policy_distillation.head import LinearLogits

RESULTS = ROOT / "examples" / "on_policy_distillation" / "results"


@pytest.mark.parametrize(
    "accuracies, expected",
    [
        ([0.4, 0.5, 0.7, 0.8], 2),
        ([0.4, 0.7, 0.69, 0.8], 1),  # a dip within the noise
        ([0.4, 0.7, 0.65, 0.8], 3),  # a dip beyond it
        ([0.4, 0.7, 0.8, 0.6], None),  # lost at the end
        ([0.4, 0.5, 0.6, 0.69], None),  # never there
        ([0.7, 0.7, 0.7, 0.7], 0),
    ],
)
def test_steps_until_wants_the_target_and_that_it_lasts(accuracies, expected):
    assert steps_until(dict(enumerate(accuracies)), target=0.7, noise=0.02) == expected


def test_steps_until_counts_validated_steps_only():
    assert steps_until({0: 0.4, 5: 0.6, 10: 0.75, 15: 0.74}, target=0.7, noise=0.02) == 10


def test_standard_error_is_the_binomial_one():
    assert standard_error(0.5, 100) == pytest.approx(0.05)


def exact_p_value(only_teacher, only_student):
    """By counting every outcome of so many fair coins."""
    coins = only_teacher + only_student
    outcomes = (bin(faces).count("1") for faces in range(2**coins))
    return Fraction(sum(heads >= only_teacher for heads in outcomes), 2**coins)


@pytest.mark.parametrize("pair", [(0, 0), (0, 5), (5, 0), (4, 4), (7, 3), (10, 2)])
def test_the_p_value_is_that_of_fair_coins(pair):
    assert worse_p_value(*pair) == pytest.approx(float(exact_p_value(*pair)))


def test_the_p_value_of_many_problems_is_the_normal_one():
    deviation = (530 - 500 - 0.5) / math.sqrt(1000 / 4)
    assert worse_p_value(530, 470) == pytest.approx(math.erfc(deviation / math.sqrt(2)) / 2, rel=0.01)


@pytest.mark.parametrize(
    "only_teacher, expected",
    [
        # 100 problems differ: p < 1 % from 62 on, < 5 % from 59 on
        ([90, 80, 55, 50], 2),
        ([90, 55, 60, 50], 1),  # a dip that the later, milder test lets pass
        ([90, 55, 65, 50], 3),
        ([90, 55, 50, 70], None),
        ([90, 80, 70, 60], None),
        ([50, 50, 50, 50], 0),
    ],
)
def test_steps_to_level_wants_a_step_that_is_not_worse_and_none_later_that_is(only_teacher, expected):
    columns = {"step": [0, 1, 2, 3, 4], "only_teacher": [*only_teacher[:2], None, *only_teacher[2:]]}
    columns["only_student"] = [None if lost is None else 100 - lost for lost in columns["only_teacher"]]
    renamed = {0: 0, 1: 1, 2: 3, 3: 4}
    assert steps_to_level(columns) == (None if expected is None else renamed[expected])


def curve(accuracies, seconds=2.0, tokens=100):
    """Of a teacher that gets 800 of 1,000 problems; student and teacher differ at 50 more, each way."""
    steps = list(range(len(accuracies)))
    per_step = [None] + [1.0] * (len(steps) - 1)
    return {
        "step": steps,
        "accuracy": accuracies,
        "seconds": [value and seconds for value in per_step],
        "tokens": [value and tokens for value in per_step],
        "only_teacher": [50 + round(1000 * max(0.8 - accuracy, 0)) for accuracy in accuracies],
        "only_student": [50 + round(1000 * max(accuracy - 0.8, 0)) for accuracy in accuracies],
    }


def results():
    """GRPO gains 0.4 in 8 steps, evenly; reverse KL does so in 2."""
    rl = [0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8]
    runs = [
        ("grpo", 1e-3, 0, rl),
        ("grpo", 1e-2, 0, [0.4] + [0.1] * 8),
        ("reverse_kl", 1e-3, 0, [0.4, 0.5, 0.6, 0.7]),
        ("reverse_kl", 1e-2, 0, [0.4, 0.7, 0.8, 0.8]),
        ("grpo", 1e-3, 1, rl),
        ("reverse_kl", 1e-2, 1, [0.4, 0.8, 0.79, 0.8]),
        ("k1", 1e-3, 0, [0.4, 0.5, 0.6, 0.6]),
    ]
    return {
        "held_out": 10_000,
        "learning_rates": [1e-3, 1e-2],
        "rollouts_per_step": 256,
        "updates_per_step": 4,
        "jobs": 2,
        "optimizer": "AdamW over the run",
        "top_k": 2,
        "task": "a task",
        "model": {"type": "Llama", "layers": 1, "hidden": 32},
        "machine": {"cpu": "some CPU", "cores": 2},
        "versions": {"verl": "0.9.1"},
        "methods": {
            "grpo": {"title": "GRPO", "steps": 8},
            "reverse_kl": {"title": "reverse KL", "steps": 3},
            "k1": {"title": "k1", "steps": 3},
            "gkd": {"title": "not run yet", "steps": 3},
        },
        "runs": [
            {"method": method, "learning_rate": rate, "seed": seed, "curve": curve(accuracies)}
            for method, rate, seed, accuracies in runs
        ],
    }


def test_the_best_learning_rate_is_that_of_the_highest_mean_accuracy():
    assert best_learning_rate(results(), "grpo") == 1e-3
    assert best_learning_rate(results(), "reverse_kl") == 1e-2


def test_summary_of_known_curves():
    frame = summary(results())
    of = {method: rows for method, rows in frame.groupby("method")}
    assert list(of["grpo"]["steps_95%"]) == [8, 8]
    assert list(of["reverse_kl"]["steps_level"]) == [2, 1]
    first = of["reverse_kl"].iloc[0]
    assert (first["steps_95%"], first["tokens_95%"], first["seconds_95%"]) == (2, 200, 4.0)
    assert of["k1"][["steps_95%", "tokens_95%", "seconds_95%", "steps_level"]].isna().all(axis=None)
    assert "gkd" not in of


def test_speed_ups_are_of_steps_seed_by_seed():
    assert list(speed_ups(results(), "level")) == [4.0, 8.0]
    unfinished = results()
    unfinished["runs"][-2]["curve"] = curve([0.4, 0.5])  # reverse KL, seed 1
    assert list(speed_ups(unfinished, "level").isna()) == [False, True]
    assert "both reached with 1 of 2 seeds" in headline_results.sentence(unfinished)


def test_costs_leave_the_base_out():
    assert cost(curve([0.4, 0.5, 0.6]), until=2) == (200, 4.0)


def cells(markdown):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.splitlines()]


def test_text_of_known_curves():
    assert "it takes 6.0 (4.0–8.0) times as many steps to 95 % of the gain;" in headline_results.sentence(results())
    assert "6.0 (4.0–8.0) times as many steps to the teacher's level (" in headline_results.sentence(results())
    said = headline_results.teacher_cost(results())
    assert "8 steps of GRPO, 1 k tokens and 16 s;" in said and said.endswith("take 0 k tokens and 6 s.")
    rows = {row[0]: row[1:] for row in cells(headline_results.table(results()))}
    *begin, tokens, seconds = rows["reverse KL"]
    assert begin == ["0.01", "2", "80.0 %", "1.5 (1–2)", "1.5 (1–2)", "80.0"] and seconds == "3 (2–4)"
    assert tokens.endswith("(0.1 k–0.2 k)")
    assert rows["k1"] == ["0.001", "1", "60.0 %", "> 3", "> 3", "–", "–", "–"]
    grid = {row[0]: row[1:] for row in cells(headline_results.grid_table(results()))}
    assert grid["reverse KL"] == ["55.0%, 70.0%", "**67.5%, 80.0%**"]
    assert "k1" not in grid  # not all of its learning rates have been run
    assert "not run yet" not in headline_picture.details(results())


def test_the_table_of_tasks():
    head, _, row = cells(headline_results.task_table([results()]))
    found = dict(zip(head, row, strict=True))
    assert found["Tokens an answer"] == f"{100 / 256:.1f}"
    assert (found["Base"], found["Teacher"], found["Student"]) == ("40.0 %", "80.0 %", "80.0 %")
    assert found["Ratio of steps to the teacher's level"] == "**6.0** (**4.0**–**8.0**)"
    short_head, _, short = cells(headline_results.ratio_table([results()]))
    assert dict(zip(short_head, short, strict=True)).items() <= found.items() and len(short) == 7


def test_results_come_back_from_their_file(tmp_path):
    headline_results.write(results(), tmp_path / "results.json")
    assert headline_results.read(tmp_path / "results.json") == results()


def test_block_replaces_what_is_between_the_markers():
    text = f"a\n{headline_picture.BEGIN}\nold\n{headline_picture.END}\nb\n"
    changed = headline_picture.with_block(text, "new")
    assert changed == text.replace("old", "new")
    assert headline_picture.between_markers(changed) == "new"
    with pytest.raises(ValueError, match="headline:begin"):
        headline_picture.with_block("no markers", "new")


def test_the_documents_have_the_numbers_of_the_results():
    blocks = headline_picture.documents(headline_picture.read(RESULTS), RESULTS)
    assert [document.name for document in blocks] == ["README.md", "ON_POLICY_DISTILLATION.md", "HEADLINE.md"]
    for document, block in blocks.items():
        assert headline_picture.between_markers(document.read_text()) == block


def test_the_pictures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    for name, colours in headline_picture.PAGES.items():
        headline_picture.draw_headline(results(), tmp_path / name, colours)
    headline_picture.draw_speed_up({"one": results(), "two": results()}, tmp_path / "speed_up.svg")
    headline_picture.draw_ways(results(), tmp_path / "ways.svg")
    for path in (drawn := list(tmp_path.iterdir())):
        assert path.read_text().count("<svg") == 1
        assert (RESULTS / path.name).exists()
    assert len(drawn) == 4


# ---------------------------------------------------------------------------------------------------------------------
# What is trained
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", headline.TASKS.values(), ids=list(headline.TASKS))
def test_every_method_has_the_same_rollouts_and_updates(task, tmp_path):
    for name, method in headline.METHODS.items():
        teacher = None if method.teacher_step is None else tmp_path / "t"
        sources = headline.Sources(tmp_path / "s", teacher)
        lines = headline.overrides(headline.Run(name, 3e-5, 2), headline.setup(task), tmp_path, sources)
        given = dict(line.split("=", 1) for line in lines)
        prompts = int(given["data.train_batch_size"])
        assert prompts * int(given["actor_rollout_ref.rollout.n"]) == headline.ROLLOUTS
        assert prompts == headline.UPDATES * int(given["actor_rollout_ref.actor.ppo_mini_batch_size"])
        assert given["actor_rollout_ref.actor.optim.lr"] == "3e-05"
        assert given["actor_rollout_ref.model.path"] == str(tmp_path / "s")
        assert ("teacher.model.path" in given) is (name not in ("grpo", "kl_then_grpo"))
        assert given["trainer.total_training_steps"] == str(method.steps)


def test_a_run_s_curve_has_its_metrics_and_accuracies():
    metrics = {1: {"distillation/kl": 0.123456789, "timing_s/step": 2.0, "response_length/mean": 3.5}}
    assert headline.curve(metrics, {0: [True, False], 1: [True, True]}) == {
        "step": [0, 1],
        "accuracy": [0.5, 1.0],
        "kl": [None, 0.12346],
        "student_entropy": [None, None],
        "teacher_entropy": [None, None],
        "top1_agreement": [None, None],
        "reward": [None, None],
        "seconds": [None, 2.0],
        "tokens": [None, round(3.5 * headline.ROLLOUTS)],
    }


def test_a_run_that_goes_on_from_another_has_the_steps_of_both():
    before = headline.Measured({"step": [0, 1, 2], "tokens": [None, 10, 11]}, {0: [False], 2: [True]})
    after = headline.Measured({"step": [0, 1, 2], "tokens": [None, 12, 13]}, {0: [True], 2: [False]})
    whole = headline.joined(before, after)
    assert whole.curve == {"step": [0, 1, 2, 3, 4], "tokens": [None, 10, 11, 12, 13]}
    assert whole.outcomes == {0: [False], 2: [True], 4: [False]}


def test_a_run_is_compared_with_its_teacher_problem_by_problem():
    outcomes = {0: [False, False, True, True], 2: [True, True, True, False]}
    columns = headline.against_teacher({"step": [0, 1, 2]}, outcomes, teacher=[True, True, False, True])
    assert columns == {"only_teacher": [2, None, 1], "only_student": [1, None, 1]}


def test_every_run_is_trained_once_in_the_order_of_its_teachers(tmp_path, monkeypatch):
    trained, sources = [], {}
    task = headline.TASKS["addition"]

    def train_once(run, of_task, out, made_from):
        trained.append(run.name)
        sources[run.name] = [path and path.relative_to(out).parts for path in (made_from.start, made_from.teacher)]
        accuracies = [0.4, 0.5, 0.9 if run.learning_rate == task.learning_rates[1] else 0.6]
        outcomes = {step: [problem < 10 * share for problem in range(10)] for step, share in enumerate(accuracies)}
        measured = curve(accuracies)
        return headline.Measured({key: measured[key] for key in ("step", "accuracy", "seconds", "tokens")}, outcomes)

    monkeypatch.setattr(headline, "train_once", train_once)
    experiment = headline.Experiment(task, tmp_path, tmp_path / "results" / "headline_addition.json", jobs=1)
    experiment.run(list(headline.METHODS), seeds=2)
    best = f"lr{task.learning_rates[1]:g}"
    grid = len(task.learning_rates)
    distilled, beyond = len(headline.DISTILLED), len(headline.BEYOND)
    assert len(trained) == len(set(trained)) == grid * (1 + distilled) + 2 + 2 * beyond

    def last(method, seed, step):
        return ("runs", f"{method}-{best}-seed{seed}", "checkpoints", f"global_step_{step}", "actor", "huggingface")

    for name in trained[:grid]:
        assert sources[name] == [("base",), None]
    for name in trained[grid : grid * (1 + distilled)]:
        assert sources[name] == [("base",), last("grpo", 0, 70)]
    assert trained[grid * (1 + distilled) :][:2] == [f"grpo-{best}-seed1", f"reverse_kl-{best}-seed1"]
    assert sources[f"reverse_kl-{best}-seed1"] == [("base",), last("grpo", 1, 70)]
    assert sources[f"weak_fade_35-{best}-seed1"] == [("base",), last("grpo", 1, 20)]
    assert sources[f"full_half-{best}-seed0"] == [("base",), last("grpo", 0, 70)]
    assert sources[f"kl_then_grpo-{best}-seed1"] == [last("reverse_kl", 1, 12), None]
    (written,) = headline_picture.read(tmp_path / "results").values()
    assert len(written["runs"]) == len(trained)
    teacher = headline_results.teacher_curve(written, 0)
    assert (teacher["only_teacher"], teacher["only_student"]) == ([5, 4, 0], [0, 0, 0])
    assert headline_picture.details(written)
    (after,) = (run["curve"] for run in written["runs"] if run["method"] == "kl_then_grpo" and run["seed"] == 0)
    assert after["step"] == [0, 1, 2, 3, 4]
    grid = headline_results.grid_table(written)
    assert "reverse KL for 12 steps" not in grid and "gkd" in grid
    assert "70 steps for GRPO, " in headline_results.conditions(written)
    headline_picture.draw_ways(written, tmp_path / "ways.svg")


def test_a_finished_run_is_done_again_only_if_its_settings_or_its_teacher_changed(tmp_path):
    done, teacher = tmp_path / "measured.json", tmp_path / "teacher"
    measured = headline.Measured({"step": [0]}, {0: [True, False, True]})
    sources = headline.Sources(start=tmp_path / "start", teacher=teacher)
    assert headline.finished(done, ["lr=1"], sources) is None
    for path in (sources.start, teacher):
        path.mkdir()
        os.utime(path, (0, 0))
    done.write_text(json.dumps({"settings": ["lr=1"]} | measured.to_json()))
    assert headline.Measured.from_json(headline.finished(done, ["lr=1"], sources)) == measured
    without_teacher = headline.finished(done, ["lr=1"], headline.Sources(sources.start, None))
    assert headline.Measured.from_json(without_teacher) == measured
    assert headline.finished(done, ["lr=2"], sources) is None
    for path in (sources.start, teacher):
        os.utime(path, (2e9, 2e9))
        assert headline.finished(done, ["lr=1"], sources) is None
        os.utime(path, (0, 0))


def logits(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_truncated_forward_kl_and_its_gradient():
    z = logits(0, 64, 9).requires_grad_()
    log_s, log_t = z.log_softmax(-1), logits(1, 64, 9).log_softmax(-1)
    top, index = log_t.topk(3, dim=-1)
    expected = (top.exp() * (top - log_s.gather(-1, index))).sum(-1).clamp_min(0.0)  # as VERL does
    value, gradient = forward_kl_topk(log_s.detach(), log_t, k=3)
    torch.testing.assert_close(value, expected.detach())
    assert 0 < (value == 0.0).sum() < len(value)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), z)[0])


def test_truncated_forward_kl_of_the_whole_vocabulary_is_forward_kl():
    log_s, log_t = logits(0, 4, 9).log_softmax(-1), logits(1, 4, 9).log_softmax(-1)
    value, gradient = forward_kl_topk(log_s, log_t, k=9)
    torch.testing.assert_close(value, (log_t.exp() * (log_t - log_s)).sum(-1))
    torch.testing.assert_close(gradient, log_s.exp() - log_t.exp())


def jagged(*rows):
    return torch.nested.nested_tensor([torch.as_tensor(row) for row in rows], layout=torch.jagged)


@pytest.mark.parametrize("is_projected", [False, True])
def test_sampled_k1_is_the_log_ratio_of_the_sampled_tokens(is_projected):
    hidden, weight, bias = logits(0, 3, 4).float(), logits(1, 7, 4).float(), logits(2, 7).float()
    log_t = (hidden @ weight.T + bias).log_softmax(-1)
    teacher = LinearLogits(hidden, weight, bias) if is_projected else DenseLogits(hidden @ weight.T + bias)
    advantages = sampled_k1_advantages(
        teacher,
        responses=jagged([6, 0], [2]),
        old_log_probs=jagged([-1.0, -2.0], [-3.0]),
    )
    expected = torch.tensor([[log_t[0, 6] + 1.0, log_t[1, 0] + 2.0], [log_t[2, 2] + 3.0, 0.0]])
    torch.testing.assert_close(advantages.to_padded_tensor(0.0), expected)


def test_sampled_k1_is_minus_the_reverse_kl_on_average():
    """Over every token as often as the student says it."""
    log_s, log_t = logits(0, 7).log_softmax(-1), logits(1, 7).log_softmax(-1)
    advantages = sampled_k1_advantages(
        DenseLogits(log_t.expand(7, 7)), responses=jagged(list(range(7))), old_log_probs=jagged(log_s)
    )
    expected = -(log_s.exp() * (log_s - log_t)).sum().item()
    assert (log_s.exp() * advantages.values()).sum().item() == pytest.approx(expected, rel=1e-6)
