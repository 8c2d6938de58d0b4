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
"""The ablation: its truncated losses, its text, its scores, its numbers from hand-made curves, and its document."""

import importlib
import math
import sys
from types import SimpleNamespace

import ablation
import ablation_results
import ablation_scores
import headline
import headline_results
import pandas
import pytest
import python_docs
import torch
from ablation_scores import Scorer, of_tokens, pick, until_eos
from arithmetic import EOS, tiny_model, untrained_model
from baselines import TOP_KS, forward_kl_topk, reverse_kl_topk, truncated
from composition import composed
from conftest import ROOT
from headline_picture import between_markers, with_block
from progress import overrides_of
from transformers import LlamaForCausalLM

from verl.on_policy_distillation.checks import prepare
from verl.on_policy_distillation.divergence import DIVERGENCES, DenseLogits, DivergenceSpec, token_divergence
from verl.plugin import after_import
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config

RESULTS = ROOT / "examples" / "on_policy_distillation" / "results" / "ablation.json"


def logits(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# Truncated losses
# ---------------------------------------------------------------------------------------------------------------------


def test_truncated_reverse_kl_and_its_gradient():
    z = logits(0, 5, 9).requires_grad_()
    log_s, log_t = z.log_softmax(-1), logits(1, 5, 9).log_softmax(-1)
    index = log_t.argsort(-1, descending=True)[:, :3]
    s = log_s.gather(-1, index)
    expected = (s.exp() * (s - log_t.gather(-1, index))).sum(-1)
    value, gradient = reverse_kl_topk(log_s.detach(), log_t, k=3)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), z)[0])


def test_truncated_reverse_kl_of_the_whole_vocabulary_is_reverse_kl():
    z = logits(0, 5, 9).requires_grad_()
    log_s, log_t = z.log_softmax(-1), logits(1, 5, 9).log_softmax(-1)
    exact = (log_s.exp() * (log_s - log_t)).sum(-1)
    value, gradient = reverse_kl_topk(log_s.detach(), log_t, k=9)
    torch.testing.assert_close(value, exact.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(exact.sum(), z)[0])


def with_mass_on_top(log_t, k, mass):
    """The teacher with so much on its top k, in its own proportions, and the rest on the others likewise."""
    t = log_t.exp()
    is_top = torch.zeros_like(t, dtype=torch.bool).scatter(-1, log_t.topk(k, -1).indices, True)
    on_top = (t * is_top).sum(-1, keepdim=True)
    return torch.where(is_top, t * mass / on_top, t * (1 - mass) / (1 - on_top)).log()


def test_truncated_reverse_kl_is_lowest_where_most_of_the_mass_has_left():
    log_t = logits(1, 5, 9).log_softmax(-1)
    t = log_t.topk(3, -1).values.exp().sum(-1, keepdim=True)
    lowest, gradient = reverse_kl_topk(with_mass_on_top(log_t, 3, t / math.e), log_t, k=3)
    torch.testing.assert_close(lowest, -t.squeeze(-1) / math.e)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))
    of_teacher, slope = reverse_kl_topk(log_t, log_t, k=3)
    assert (of_teacher.abs() < 1e-12).all() and (slope.abs().amax(-1) > 0.01).all()
    assert (reverse_kl_topk(logits(2, 5, 9).log_softmax(-1), log_t, k=3)[0] > lowest).all()


def test_truncated_forward_kl_stops_where_the_student_has_less_tail_than_the_teacher():
    log_t = logits(1, 5, 9).log_softmax(-1)
    t = log_t.topk(3, -1).values.exp().sum(-1, keepdim=True)
    value, gradient = forward_kl_topk(with_mass_on_top(log_t, 3, (1 + t) / 2), log_t, k=3)
    assert (value == 0).all() and (gradient == 0).all()
    value, gradient = forward_kl_topk(with_mass_on_top(log_t, 3, t / 2), log_t, k=3)
    torch.testing.assert_close(value, (t * math.log(2)).squeeze(-1))
    assert (gradient.abs().amax(-1) > 0.01).all()


@pytest.fixture
def plugin(monkeypatch):
    """VERL knows the baselines, for one test: imported as it is, the plugin would tell it for good."""
    monkeypatch.setattr(after_import, "after_import", lambda callbacks: None)
    monkeypatch.delitem(sys.modules, "baselines_plugin", raising=False)
    module = importlib.import_module("baselines_plugin")
    found = SimpleNamespace(DIVERGENCES={}, POLICY_LOSS_REGISTRY=dict(POLICY_LOSS_REGISTRY))
    module._register_truncated(found)
    module._register_k1(found)
    for registry, entries in (
        (DIVERGENCES, found.DIVERGENCES),
        (POLICY_LOSS_REGISTRY, found.POLICY_LOSS_REGISTRY),
    ):
        for name, entry in entries.items():
            monkeypatch.setitem(registry, name, entry)
    yield
    del sys.modules["baselines_plugin"]


@pytest.mark.parametrize("name, function", [("forward_kl", forward_kl_topk), ("reverse_kl", reverse_kl_topk)])
@pytest.mark.parametrize("k", TOP_KS)
def test_the_names_reach_the_functions_with_their_k(name, function, k, plugin):
    z, u, rows = logits(0, 4, 100).requires_grad_(), logits(1, 4, 100), torch.arange(4)
    found = token_divergence(z, rows, DenseLogits(u), rows, DivergenceSpec(truncated(name, k))).divergence
    value, gradient = function(z.detach().log_softmax(-1), u.log_softmax(-1), k)
    torch.testing.assert_close(found.detach(), value)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), z)[0], gradient)


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A standard library of three modules, and tests that are none of it."""
    (tmp_path / "test").mkdir()
    (tmp_path / "b.py").write_text('"""Module b."""\n\ndef f():\n    """Same."""\n\nclass C:\n    """Of C."""\n')
    (tmp_path / "a.py").write_bytes(b'# -*- coding: latin-1 -*-\n"""Module \xe4."""\n\ndef g():\n    """Same."""\n')
    (tmp_path / "c.py").write_text("x = 1\n")
    (tmp_path / "test" / "d.py").write_text('"""A test."""\n')
    return tmp_path


def test_documents_are_topics_and_docstrings_and_no_passage_is_there_twice(folder):
    found = python_docs.documents(folder)
    modules = {name: texts for name, texts in found.items() if not name.startswith("help: ")}
    assert modules == {"a.py": ["Module ä.", "Same."], "b.py": ["Module b.", "Of C."]}
    assert "lambda" in found["help: lambda"][0]
    texts = python_docs.passages(found)
    assert len(texts) == len(set(texts))


def test_a_tenth_of_the_documents_is_held_out():
    found = {str(number): [str(number)] for number in range(95)}
    train, held_out = python_docs.split(found)
    assert (len(train), len(held_out)) == (85, 10)
    assert train | held_out == found
    assert (train, held_out) == python_docs.split(dict(reversed(found.items())))


@pytest.fixture(scope="module")
def some_documents():
    names = list(python_docs.topics())[::4]
    return {name: [python_docs.topics()[name]] for name in names} | {"last": ["Ärger — 漢字"]}


@pytest.fixture(scope="module")
def tokenizer(some_documents):
    return python_docs.train_tokenizer(python_docs.passages(some_documents), vocab_size=600)


def test_the_tokenizer_gives_a_text_back_and_its_template_is_the_message(tokenizer):
    assert len(tokenizer) == 600
    assert tokenizer.convert_ids_to_tokens([0, 1]) == [tokenizer.eos_token, tokenizer.pad_token]
    text = "  def f(x):\n\tÄ 漢 🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False) == text


def test_windows_are_of_the_text_and_their_prompts_are_read_as_they_were_cut(some_documents, tokenizer):
    found = python_docs.windows(some_documents, tokenizer, count=200)
    texts = [python_docs.token_ids(texts, tokenizer) for texts in some_documents.values()]
    cut = [tuple(ids[start : start + 48]) for ids in texts for start in range(0, len(ids), 48)]
    assert len(found) == 200 and set(map(tuple, found)) <= set(cut)
    assert all(cut.count(tuple(window)) >= found.count(window) for window in found[:20])
    for window, (prompt, rest) in zip(found, python_docs.problems(found, tokenizer), strict=True):
        assert tokenizer(prompt)["input_ids"] == window[:16]
        expected = tokenizer.decode(window[16:]).split(EOS)[0]
        assert rest == expected
    with pytest.raises(ValueError, match="windows of 48 tokens, and 99999 are needed"):
        python_docs.windows(some_documents, tokenizer, count=99_999)


@pytest.mark.parametrize(
    "said, wanted, expected",
    [
        ("Return the value.", "return The value", 1.0),
        ("a b c d", "a b", 2 * (2 / 4) * (2 / 2) / (2 / 4 + 2 / 2)),
        ("a a a", "a b", 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)),
        ("x", "y", 0.0),
        ("...", "y", 0.0),
        ("...", "", 1.0),
    ],
)
def test_the_reward_is_the_f1_of_words(said, wanted, expected):
    assert python_docs.compute_score("python_docs", said, wanted) == pytest.approx(expected)


def test_the_reward_is_of_this_data_alone():
    with pytest.raises(ValueError, match="scores 'python_docs', not 'gsm8k'"):
        python_docs.compute_score("gsm8k", "", "")


def test_data_and_models_are_made_once(some_documents, monkeypatch, tmp_path):
    sizes = {"teacher": python_docs.Size(1, 32, 40, 1e-2), "base": python_docs.Size(1, 32, 1, 1e-2)}
    monkeypatch.setattr(python_docs, "documents", lambda: some_documents)
    monkeypatch.setattr(python_docs, "MODELS", sizes)
    monkeypatch.setattr(python_docs, "VOCAB_SIZE", 600)
    monkeypatch.setattr(python_docs, "PROMPTS", 100)
    monkeypatch.setattr(python_docs, "HELD_OUT", 16)
    trains = python_docs.train_tokenizer
    monkeypatch.setattr(python_docs, "train_tokenizer", lambda texts: trains(texts, 600))
    record = python_docs.make(tmp_path)
    held_out = torch.tensor(record["held_out"])
    assert held_out.shape == (16, 48)
    nll = [ablation_scores.negative_log_likelihood(load(tmp_path / name), held_out, 32) for name in ("teacher", "base")]
    assert nll[0] < nll[1] - 0.5 and nll[1] == pytest.approx(math.log(600), abs=0.2)
    monkeypatch.setattr(python_docs, "documents", None)
    assert python_docs.make(tmp_path) == record


def load(path):
    return LlamaForCausalLM.from_pretrained(path).eval()


def test_the_learning_rate_warms_up_and_ends_at_zero():
    size = python_docs.Size(1, 32, steps=300, learning_rate=1.0)
    assert python_docs.learning_rate(15, size) == 0.5
    assert python_docs.learning_rate(150, size) == pytest.approx(0.5)
    assert python_docs.learning_rate(300, size) == pytest.approx(0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------


def peaked_model(seed):
    """Untrained, in float64, far from uniform."""
    model = untrained_model(hidden=32, layers=1, vocab_size=258, tied=False, seed=seed).double().eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(25.0)
    return model


def distribution(model, ids):
    """Of the token after `ids`, by the whole forward."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1).tolist()


def sampled(model, prompt, uniform, eos):
    """The distributions before each token of a response, and its tokens, until EOS or the numbers end."""
    ids = list(prompt)
    for number in uniform:
        probabilities, total = distribution(model, ids), 0.0
        for token, probability in enumerate(probabilities):
            total += probability
            if total > number:
                break
        ids.append(token)
        if token == eos:
            break
    return ids[len(prompt) :]


def kl(p, q):
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_scores_are_those_of_a_computation_from_scratch():
    student, teacher, eos, length, ks = peaked_model(0), peaked_model(1), 40, 6, (2, 5)
    for model in (student, teacher):
        model.config.eos_token_id = eos
        with torch.no_grad():
            model.lm_head.weight[eos] *= 3.0
    windows = torch.randint(0, 256, (5, 4 + length), generator=torch.Generator().manual_seed(0))
    scorer = Scorer(teacher, windows, length, ks)
    found = scorer(student)

    numbers = torch.rand((2, 5, length), generator=torch.Generator().manual_seed(0)).tolist()
    expected = {"nll": [], "reverse_kl": [], "forward_kl": [], "entropy": [], "outside_2": [], "outside_5": []}
    lengths = []
    for row, window in enumerate(windows.tolist()):
        for end in range(4, 4 + length):
            expected["nll"].append(-math.log(distribution(student, window[:end])[window[end]]))
        for model, uniform in ((teacher, numbers[0][row]), (student, numbers[1][row])):
            response = sampled(model, window[:4], uniform, eos)
            lengths.append(len(response))
            for end in range(len(response)):
                s, t = (distribution(one, window[:4] + response[:end]) for one in (student, teacher))
                if model is teacher:
                    expected["forward_kl"].append(kl(t, s))
                    continue
                expected["reverse_kl"].append(kl(s, t))
                expected["entropy"].append(-math.fsum(p * math.log(p) for p in s))
                by_teacher = sorted(range(258), key=lambda token: -t[token])
                for k in ks:
                    expected[f"outside_{k}"].append(math.fsum(s[token] for token in by_teacher[k:]))
    assert min(lengths) < length and max(lengths) == length  # some end early, some do not
    for name, values in expected.items():
        assert found[name] == pytest.approx(math.fsum(values) / len(values), rel=1e-6), name


def test_a_teacher_scored_as_a_student_is_no_distance_from_itself():
    teacher = peaked_model(1)
    windows = torch.randint(0, 256, (3, 8), generator=torch.Generator().manual_seed(0))
    scores = Scorer(teacher, windows, 4, (2,))(teacher)
    assert scores["reverse_kl"] == scores["forward_kl"] == 0.0
    assert scores["outside_2"] > 0.0


def test_pick_inverts_the_cumulative_distribution():
    p = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25])
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 0.9999])
    assert pick(p.expand(6, 5), uniform).tolist() == [1, 1, 3, 3, 4, 4]


def test_a_response_ends_with_its_first_eos():
    tokens = torch.tensor([[5, 7, 5, 7], [7, 5, 5, 5], [5, 5, 5, 5]])
    assert until_eos(tokens, eos=7).int().tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]


def test_statistics_of_tokens_keep_their_shape():
    log_s, log_t = logits(0, 2, 3, 9).log_softmax(-1), logits(1, 2, 3, 9).log_softmax(-1)
    assert {values.shape for values in of_tokens(log_s, log_t, (1, 4)).values()} == {(2, 3)}


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    out = tmp_path_factory.mktemp("models")
    tiny_model(out / "base")
    tiny_model(out / "teacher", hidden=64, seed=1)
    return out


@pytest.mark.parametrize("name", ablation.METHODS)
def test_every_method_is_a_configuration_that_the_trainer_accepts(name, plugin, models):
    sources = headline.Sources(models / "base", models / "teacher")
    lines = headline.overrides(headline.Run(name, 1e-3, 2), ablation.SETUP, models, sources)
    config = composed(*overrides_of("cpu"), *lines)
    prepare(config)
    validate_config(config, need_reference_policy(config), need_critic(config))
    actor = config.actor_rollout_ref
    assert config.data.train_batch_size * actor.rollout.n == ablation.ROLLOUTS
    assert config.data.train_batch_size == ablation.UPDATES * actor.actor.ppo_mini_batch_size
    assert config.trainer.total_training_steps == ablation.STEPS
    assert config.data.max_prompt_length + config.data.max_response_length == python_docs.WINDOW


def test_a_curve_has_the_scored_steps_with_the_seconds_and_tokens_until_them():
    metrics = {
        step: {"timing_s/step": seconds, "response_length/mean": 30.0 + step, "critic/score/mean": step / 10}
        for step, seconds in enumerate((50.0, 2.0, 3.0, 1.0), 1)  # the first with its start: 2 is the others' median
    }
    assert ablation.curve(metrics, {0: {"nll": 5.0}, 2: {"nll": 4.5}, 4: {"nll": 4.25}}) == {
        "step": [0, 2, 4],
        "seconds": [0.0, 4.0, 8.0],
        "tokens": [0, 63 * ablation.ROLLOUTS, 130 * ablation.ROLLOUTS],
        "reward": [None, 0.2, 0.4],
        "nll": [5.0, 4.5, 4.25],
    }


@pytest.mark.parametrize("teacher", [5.0, 4.9, math.nan])
def test_a_teacher_that_is_hardly_better_is_refused(teacher):
    with pytest.raises(ValueError, match=f"the teacher's held-out NLL is {teacher:.3f} and the student's 5.000: less"):
        ablation.require_gap({"base": {"nll": 5.0}, "teacher": {"nll": teacher}})
    ablation.require_gap({"base": {"nll": 5.0}, "teacher": {"nll": 4.5}})


def test_the_grid_comes_first_and_then_the_other_seeds_at_the_best_rate(tmp_path, monkeypatch):
    made = []
    experiment = ablation.Ablation.__new__(ablation.Ablation)  # without models
    experiment.out, experiment.results_path, experiment.jobs = tmp_path, tmp_path / "results.json", 1
    experiment.text, experiment.references, experiment.curves = {}, {}, {}

    def train_once(run):
        made.append(run.name)
        return curve(last_nll=4.0 if run.learning_rate == 1e-3 else 4.5)

    monkeypatch.setattr(experiment, "train_once", train_once)
    experiment.run(["k1", "gkd"], seeds=2)
    grid = [f"{name}-lr{rate:g}-seed0" for name in ("k1", "gkd") for rate in ablation.LEARNING_RATES]
    assert made == [*grid, "k1-lr0.001-seed1", "gkd-lr0.001-seed1"]
    written = headline_results.read(tmp_path / "results.json")
    assert len(written["runs"]) == len(made)
    assert written["runs"][0] == {"method": "k1", "learning_rate": 3e-4, "seed": 0, "curve": curve(last_nll=4.5)}


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


def curve(last_nll, seconds=8.0):
    """Of two scored steps, evenly from an NLL of 5 and a KL of 1 to `last_nll` and to 0.5."""
    return {
        "step": [0, 4, 8],
        "seconds": [0.0, seconds / 2, seconds],
        "tokens": [0, 400, 800],
        "reward": [None, 0.25, 0.5],
        "nll": [5.0, (5.0 + last_nll) / 2, last_nll],
        "reverse_kl": [1.0, 0.75, 0.5],
        "forward_kl": [1.0, 0.75, 0.5],
        "entropy": [3.0, 3.0, 3.0],
        "outside_8": [0.5, 0.4, 0.3],
        "outside_64": [0.25, 0.2, 0.15],
    }


def results():
    """Exact is slow and good; k1 takes half the seconds."""
    scores = {"reverse_kl": 1.0, "forward_kl": 1.0, "entropy": 3.0, "outside_8": 0.5, "outside_64": 0.25}
    made = [
        ("exact", 1e-3, 0, curve(4.6)),
        ("exact", 1e-2, 0, curve(4.2)),
        ("exact", 1e-2, 1, curve(4.4)),
        ("k1", 1e-3, 0, curve(4.8, seconds=4.0)),
        ("k1", 1e-2, 0, curve(6.0, seconds=1.0)),
    ]
    return {
        "machine": {"cpu": "some CPU", "cores": 2},
        "versions": {"verl": "0.9.1"},
        "python": "3.12",
        "text": {
            "documents": 700,
            "bytes": 2_500_000,
            "tokens": 700_000,
            "held_out_documents": 70,
            "models": {"teacher": {"layers": 4, "hidden": 256}, "base": {"layers": 2, "hidden": 128}},
        },
        "held_out": 256,
        "vocabulary": 4096,
        "prompt_tokens": 16,
        "response_tokens": 32,
        "rollouts_per_step": 128,
        "updates_per_step": 8,
        "steps": 8,
        "jobs": 2,
        "learning_rates": [1e-3, 1e-2],
        "top_ks": [8, 64],
        "references": {"base": {"nll": 5.0} | scores, "teacher": {"nll": 4.0} | scores},
        "methods": {"exact": {"title": "the exact"}, "gone": {"title": "not run"}, "k1": {"title": "the sampled"}},
        "runs": [dict(zip(("method", "learning_rate", "seed", "curve"), run, strict=True)) for run in made],
    }


def cells(markdown):
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.splitlines()]
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


def test_the_best_learning_rate_is_that_of_the_lowest_last_nll():
    assert ablation_results.best_learning_rate(results(), "exact") == 1e-2
    assert ablation_results.best_learning_rate(results(), "k1") == 1e-3


def test_a_run_that_broke_is_not_the_best():
    broken = results()
    broken["runs"][3]["curve"] = curve(math.nan)
    assert ablation_results.best_learning_rate(broken, "k1") == 1e-2


def test_at_equal_steps_there_are_the_last_steps_at_the_best_rates():
    frame = ablation_results.at_equal_steps(results())
    assert frame[["method", "seed", "nll"]].values.tolist() == [["exact", 0, 4.2], ["exact", 1, 4.4], ["k1", 0, 4.8]]


def test_at_equal_seconds_the_others_are_interpolated():
    assert ablation_results.fastest(results()) == ("k1", 4.0)
    frame = ablation_results.at_equal_seconds(results())
    assert frame[["method", "step", "nll"]].values.tolist() == [["exact", 4, 4.6], ["exact", 4, 4.7], ["k1", 8, 4.8]]
    run = ablation_results.runs(results()).query("method == 'exact' and learning_rate == 0.01 and seed == 0")
    row = ablation_results.at_seconds(run, 5.0)
    assert (row["step"], row["reverse_kl"], row["reward"]) == pytest.approx((5.0, 0.6875, 0.3125))
    assert row["nll"] == pytest.approx(4.6 - 0.4 / 4)
    assert ablation_results.at_seconds(run, 99.0)["step"] == 8


def test_tables_of_known_curves():
    table = cells(ablation_results.table(results(), ablation_results.at_equal_steps(results())))
    assert list(table) == ["the exact", "the sampled", "the student before", "the teacher"]
    assert table["the exact"]["NLL"] == "4.300 (4.200–4.400)"
    assert table["the exact"]["Outside top 8"] == "30.0 %"
    assert (table["the sampled"]["Seconds"], table["the sampled"]["Steps"]) == ("4", "8")
    assert (table["the teacher"]["NLL"], table["the teacher"]["Reward"]) == ("4.000", "")
    grid = cells(ablation_results.grid_table(results()))
    assert grid["the exact"] == {"lr 0.001": "4.600", "lr 0.01": "**4.200**"}
    assert "not run" not in ablation_results.block(results())


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    ablation_results.draw(results(), tmp_path / "ablation.svg")
    assert (tmp_path / "ablation.svg").read_text().count("<svg") == 1


def test_the_document_has_the_numbers_of_the_results():
    document = (ROOT / "examples" / "on_policy_distillation" / "ABLATION.md").read_text()
    block = ablation_results.block(headline_results.read(RESULTS)) if RESULTS.exists() else ""
    markers = ablation_results.BEGIN, ablation_results.END
    assert between_markers(document, *markers) == block
    assert between_markers(with_block(document, "new", *markers), *markers) == "new"


def test_the_results_are_a_small_file():
    if not RESULTS.exists():
        pytest.skip("the ablation has not been run")
    assert RESULTS.stat().st_size < 100_000
    assert len(pandas.DataFrame(headline_results.read(RESULTS)["runs"]).method.unique()) == len(ablation.METHODS)
