# Copyright 2026 Bytedance Ltd. and/or its affiliates
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
"""Vocabularies that agree in some ids: divergences over these and the rest, against the definitions in float64.

Then on VERL's real workers, as in test_teachers.py, against a direct Hugging Face computation.
"""

import math

import pytest
import torch
from test_buckets import bucketed, exact
from test_engine import HYBRID, LOSS, MICRO, PURE, divergence, make_batch, response_logits, run_workers, sharpened
from test_mixture import KINDS
from transformers import AutoModelForCausalLM, AutoTokenizer

from verl.on_policy_distillation import divergence as divergence_module
from verl.on_policy_distillation.buckets import (
    InSharedVocabulary,
    SharedLogits,
    SharedVocabulary,
    top_k_tail,
)
from verl.on_policy_distillation.divergence import LOG_ZERO, DenseLogits, DivergenceSpec
from verl.on_policy_distillation.head import (
    LinearLogits,
    divergence_by_teacher,
    divergence_of_head,
    extra_columns,
    tokens_by_teacher,
    tokens_of_head,
)
from verl.on_policy_distillation.mixture import MixtureLogits, MixturePart
from verl.on_policy_distillation.vocabulary import difference, shared_ids

TOKENS, VOCAB, TEACHER_VOCAB = 11, 31, 37
SHARED = {
    "prefix": list(range(26)),
    "all of the student's but one": list(range(30)),
    "with holes": [0, 1, 2, 5, 8, 9, 20, 30],
    "one": [7],
}


@pytest.fixture
def problem():
    torch.manual_seed(5)
    hidden, weight = torch.randn(TOKENS, 6).double(), torch.randn(VOCAB, 6).double()
    teacher = torch.randn(TOKENS, 4).double(), torch.randn(TEACHER_VOCAB, 4).double()
    return hidden.requires_grad_(), weight.requires_grad_(), teacher


@pytest.fixture(params=[4 * VOCAB, 1 << 20])
def chunks(request, monkeypatch):
    """Of both kinds: those of tokens, and the blocks within them."""
    monkeypatch.setattr(divergence_module, "CHUNK_ELEMENTS", request.param)
    monkeypatch.setattr(divergence_module, "CACHED_BLOCK_ELEMENTS", max(1, request.param // 2))


def coarse(logits, ids, tau=1.0):
    """Logits of softmax(logits / tau) of the entries `ids` and of the sum of all others, (n, m + 1)."""
    return bucketed(logits, torch.tensor(ids).expand(len(logits), -1), tau)


def capped(product, scale, cap):
    return scale * product if cap is None else cap * torch.tanh(scale * product / cap)


def said_to(head, source, ids, tau):
    """What a teacher of its own vocabulary says to a student."""
    shared = SharedVocabulary.of(ids)
    return InSharedVocabulary(SharedLogits(source, shared, tau), shared, head.shape[1])


def assert_is(head, teacher, spec, expected, masses):
    """Of both functions of the head: values, gradients, and the masses outside of the shared entries."""
    leaves, factors, labels = (head.hidden, head.weight), torch.rand(TOKENS).double(), torch.arange(TOKENS)
    wanted = torch.autograd.grad((expected * factors).sum(), leaves, retain_graph=True)
    tokens, rows = divergence_by_teacher(head, teacher, spec, factors)
    policy, again = tokens_by_teacher(head, teacher, spec, labels)
    log_p = torch.log_softmax(capped(head.hidden @ head.weight.T, head.scale, head.softcap), -1)
    torch.testing.assert_close(policy.log_prob, log_p[labels, labels])
    torch.testing.assert_close(policy.entropy, -(log_p.exp() * log_p).sum(-1))
    for value, extra in ((tokens.divergence, rows), (policy.tokens.divergence, again)):
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-12)
        for gradient, correct in zip(torch.autograd.grad((value * factors).sum(), leaves), wanted, strict=True):
            torch.testing.assert_close(gradient, correct, rtol=1e-9, atol=1e-12)
        columns = dict(zip(extra_columns(teacher), extra, strict=True))
        for name, mass in zip(("teacher_rest_mass", "student_rest_mass"), masses, strict=True):
            torch.testing.assert_close(columns[name], mass, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize(("tau", "cap"), [(1.0, None), (0.7, None), (1.3, 2.0)])
@pytest.mark.parametrize("ids", SHARED)
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_value_and_gradient_are_those_of_the_shared_entries_and_the_rest(problem, kind, beta, ids, tau, cap, chunks):
    hidden, weight, (teacher_hidden, teacher_weight) = problem
    ids, head = SHARED[ids], LinearLogits(hidden, weight, None, 0.5, cap)
    teacher = LinearLogits(teacher_hidden, teacher_weight, None, 0.8, 3.0)
    sides = capped(hidden @ weight.T, 0.5, cap), capped(teacher_hidden @ teacher_weight.T, 0.8, 3.0)
    sides = [coarse(logits, ids, tau) for logits in sides]
    masses = [side[:, -1].exp().detach() for side in reversed(sides)]
    said = said_to(head, teacher, ids, tau)
    assert_is(head, said, DivergenceSpec(kind, beta, tau), exact(kind, beta, *sides), masses)


@pytest.mark.parametrize("ids", SHARED)
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_a_top_k_of_them(problem, kind, beta, k, ids):
    hidden, weight, (teacher_hidden, teacher_weight) = problem
    ids, head, tau = SHARED[ids], LinearLogits(hidden, weight), 0.7
    whole = said_to(head, LinearLogits(teacher_hidden, teacher_weight), ids, tau)
    top = top_k_tail(whole.source, k, tau)
    sides = [coarse(logits, ids, tau) for logits in (hidden @ weight.T, teacher_hidden @ teacher_weight.T)]
    named = sides[1].topk(k).indices
    is_rest = named == len(ids)
    masses = [(sides[1].gather(-1, named).exp() * is_rest).sum(-1), sides[0][:, -1].exp().detach()]
    if k < len(ids) + 1:
        sides = [bucketed(side, named, 1.0) for side in sides]
    expected = exact(kind, beta, *sides)
    said = InSharedVocabulary(top, whole.shared, VOCAB)
    assert_is(head, said, DivergenceSpec(kind, beta, tau), expected, masses)


@pytest.mark.parametrize("ids", SHARED)
def test_a_mixture_of_teachers_each_with_entries_of_its_own(problem, ids, chunks):
    hidden, weight, teacher = problem
    ids, tau, kind, beta = SHARED[ids], 0.7, "gkd", 0.3
    head, shared, other = LinearLogits(hidden, weight), SharedVocabulary.of(ids), torch.randn(TOKENS, 33).double()
    shares = torch.tensor([[0.25, 0.75], [1.0, 0.0], [0.0, 1.0]]).double()[torch.arange(TOKENS) % 3]
    logits, parts = (teacher[0] @ teacher[1].T, other), []
    for source, share in zip(logits, shares.unbind(-1), strict=True):
        has = share > 0
        row = torch.where(has, has.cumsum(0) - 1, -1)
        parts.append(MixturePart(lambda u=source[has]: SharedLogits(DenseLogits(u), shared, tau), row, share.log()))
    mixture = MixtureLogits(tuple(parts), ("a", "b"), tau, len(ids) + 1)
    student, *alone = (coarse(side, ids, tau) for side in (hidden @ weight.T, *logits))
    mixed = sum(share.unsqueeze(-1) * side.exp() for share, side in zip(shares.unbind(-1), alone, strict=True)).log()
    said = InSharedVocabulary(mixture, shared, VOCAB)
    masses = [side[:, -1].exp().detach() for side in (mixed, student)]
    assert_is(head, said, DivergenceSpec(kind, beta, tau), exact(kind, beta, student, mixed), masses)
    _, rows = divergence_by_teacher(head, said, DivergenceSpec(kind, beta, tau), torch.ones(TOKENS).double())
    columns = dict(zip(extra_columns(said), rows, strict=True))
    for name, side, share in zip(("kl_to/a", "kl_to/b"), alone, shares.unbind(-1), strict=True):
        correct = torch.where(share > 0, exact("reverse_kl", 1.0, student, side), math.nan)
        torch.testing.assert_close(columns[name], correct.detach(), rtol=1e-10, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_a_vocabulary_that_is_all_shared_is_compared_entry_by_entry(problem, kind, beta):
    """Both rests are empty: probabilities of zero, which cost nothing."""
    hidden, weight, _ = problem
    teacher = DenseLogits(torch.randn(TOKENS, VOCAB).double())
    head, spec, ones = LinearLogits(hidden, weight), DivergenceSpec(kind, beta), torch.ones(TOKENS)
    found = divergence_of_head(head, said_to(head, teacher, list(range(VOCAB)), 1.0), spec, ones)
    whole = divergence_of_head(head, teacher, spec, ones)
    for value, correct in zip(found, whole, strict=True):
        torch.testing.assert_close(value, correct, rtol=1e-11, atol=1e-12)
    gradients = [torch.autograd.grad(side.divergence.sum(), (hidden, weight)) for side in (found, whole)]
    for gradient, correct in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, correct, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("kind", "empty"), [("forward_kl", "student"), ("reverse_kl", "teacher")])
def test_mass_where_the_other_side_has_no_entry_costs_what_a_masked_entry_does(problem, kind, empty):
    hidden, weight, (teacher_hidden, teacher_weight) = problem
    size = VOCAB if empty == "student" else VOCAB - 4
    head, ids = LinearLogits(hidden, weight), list(range(size))
    source = LinearLogits(teacher_hidden, teacher_weight if empty == "student" else teacher_weight[:size])
    s, t = (coarse(logits, ids) for logits in (hidden @ weight.T, source.rows(slice(0, TOKENS))))
    s, t = (torch.where(side == -math.inf, LOG_ZERO, side) for side in (s, t))
    one, other = (s, t) if kind == "reverse_kl" else (t, s)
    expected = (one.exp() * (one - other)).sum(-1)
    tokens = divergence_of_head(head, said_to(head, source, ids, 1.0), DivergenceSpec(kind), torch.ones(TOKENS))
    torch.testing.assert_close(tokens.divergence, expected, rtol=1e-10, atol=1e-12)
    assert torch.autograd.grad(tokens.divergence.sum(), hidden)[0].isfinite().all()


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_fewer_shared_entries_say_less(problem, kind, beta):
    hidden, weight, _ = problem
    teacher = DenseLogits(torch.randn(TOKENS, VOCAB).double())
    head, spec, ones = LinearLogits(hidden, weight), DivergenceSpec(kind, beta), torch.ones(TOKENS)
    order = [[7], [2, 7], [0, 2, 7, 11], list(range(20)), list(range(VOCAB - 2))]
    values = [divergence_of_head(head, said_to(head, teacher, ids, 1.0), spec, ones).divergence for ids in order]
    values.append(divergence_of_head(head, teacher, spec, ones).divergence)
    assert (values[0] >= 0).all()
    for coarser, finer in zip(values, values[1:], strict=False):
        assert (coarser <= finer + 1e-12).all()


@pytest.mark.parametrize("ids", ["prefix", "with holes"])
def test_finite_differences(problem, ids):
    hidden, weight, (teacher_hidden, teacher_weight) = problem
    teacher, labels = LinearLogits(teacher_hidden[:2], teacher_weight), torch.arange(2)

    def divergences(hidden):
        head = LinearLogits(hidden, weight, None, 1.0, 4.0)
        said = said_to(head, teacher, SHARED[ids], 1.3)
        return tokens_of_head(head, said, DivergenceSpec("gkd", 0.3, 1.3), labels).tokens.divergence

    assert torch.autograd.gradcheck(divergences, hidden.detach()[:2].requires_grad_())


@pytest.mark.parametrize("ids", ["prefix", "with holes"])
@pytest.mark.parametrize("masked", [0, 8, 30])
def test_masked_entries_are_probabilities_of_zero(problem, ids, masked):
    """-inf on both sides: a shared entry, and one of the rest."""
    hidden, weight, _ = problem
    bias = torch.zeros(VOCAB).double().index_fill(0, torch.tensor([masked]), -math.inf)
    teacher = torch.randn(TOKENS, VOCAB).double() + bias
    head = LinearLogits(hidden, weight, bias)
    sides = [coarse(logits, SHARED[ids]) for logits in (hidden @ weight.T + bias, teacher)]
    tokens = divergence_of_head(
        head, said_to(head, DenseLogits(teacher), SHARED[ids], 1.0), DivergenceSpec(), torch.ones(TOKENS)
    )
    s, t = sides
    expected = torch.where(s == -math.inf, 0.0, s.exp() * (s - t)).nan_to_num().sum(-1)
    torch.testing.assert_close(tokens.divergence, expected, rtol=1e-11, atol=1e-12)
    for gradient in torch.autograd.grad(tokens.divergence.sum(), (hidden, weight)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("ids", ["prefix", "with holes"])
def test_bfloat16_weights_follow_the_float64_truth(problem, ids):
    hidden, weight, teacher = problem
    hidden, weight = hidden.detach().bfloat16(), weight.detach().bfloat16()
    u = (teacher[0] @ teacher[1].T).float()
    student = hidden.double().requires_grad_()
    sides = (coarse(logits, SHARED[ids]) for logits in (student @ weight.double().T, u.double()))
    expected = exact("gkd", 0.3, *sides)
    wanted = torch.autograd.grad(expected.sum(), student)[0]
    head = LinearLogits(hidden.requires_grad_(), weight)
    said = said_to(head, DenseLogits(u), SHARED[ids], 1.0)
    tokens = divergence_of_head(head, said, DivergenceSpec("gkd", 0.3), torch.ones(TOKENS))
    torch.testing.assert_close(tokens.divergence.double(), expected, rtol=0.05, atol=0.02)
    found = torch.autograd.grad(tokens.divergence.sum(), hidden)[0].double()
    torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("ids", SHARED)
def test_some_of_the_tokens(problem, ids):
    hidden, weight, (teacher_hidden, teacher_weight) = problem
    head, chosen = LinearLogits(hidden, weight), torch.tensor([8, 2, 3])
    said = said_to(head, LinearLogits(teacher_hidden, teacher_weight), SHARED[ids], 1.0)
    whole = divergence_of_head(head, said, DivergenceSpec(), torch.ones(TOKENS)).divergence
    part = divergence_of_head(head.tokens(chosen), said.tokens(chosen), DivergenceSpec(), torch.ones(3)).divergence
    torch.testing.assert_close(part, whole[chosen])


@pytest.mark.parametrize("ids", SHARED)
def test_for_a_dump_the_rest_is_spread_evenly_over_the_student_s_other_entries(problem, ids):
    hidden, weight, (teacher_hidden, teacher_weight) = problem
    ids, head = SHARED[ids], LinearLogits(hidden, weight)
    said = said_to(head, LinearLogits(teacher_hidden, teacher_weight), ids, 0.7)
    p = (said.rows(torch.arange(TOKENS)) / 0.7).softmax(-1)
    correct = coarse(teacher_hidden @ teacher_weight.T, ids, 0.7).exp()
    assert p.shape == (TOKENS, VOCAB)
    torch.testing.assert_close(p[:, ids], correct[:, :-1])
    others = [index for index in range(VOCAB) if index not in ids]
    torch.testing.assert_close(p[:, others], (correct[:, -1:] / len(others)).expand(-1, len(others)))


def test_what_does_not_go_together_is_refused(problem):
    hidden, weight, (teacher_hidden, teacher_weight) = problem
    head, teacher = LinearLogits(hidden, weight), LinearLogits(teacher_hidden, teacher_weight)
    with pytest.raises(ValueError, match="temperature 0.7, the divergence of 1.0"):
        divergence_of_head(head, said_to(head, teacher, [0, 1], 0.7), DivergenceSpec(), torch.ones(TOKENS))
    with pytest.raises(ValueError, match="the teacher has 37 entries, .* ids up to 37"):
        said_to(head, teacher, [3, 37], 1.0)
    with pytest.raises(ValueError, match="the student has 31 entries, .* ids up to 33"):
        said_to(head, teacher, [3, 33], 1.0)
    with pytest.raises(ValueError, match="the student has 20 entries, .* ids up to 25"):
        divergence_of_head(
            head.cut(20), said_to(head, teacher, SHARED["prefix"], 1.0), DivergenceSpec(), torch.ones(11)
        )
    with pytest.raises(ValueError, match="2 shared entries and the rest cannot be cut to 2"):
        said_to(head, teacher, [0, 1], 1.0).source.cut(2)
    for ids in ([], [3, 3], [4, 2], [-1, 2]):
        with pytest.raises(ValueError, match=f"{len(ids)} ids of a shared vocabulary"):
            SharedVocabulary.of(ids)


# ----------------------------------------------------------------------------------------------------------------------
# two tokenizers


def test_a_difference_says_what_only_one_side_has_and_what_both_have_in_another_way():
    ours, theirs = {"a": 0, "b": 1, "<think>": 3}, {"a": 0, "c": 1, "<pad>": 2, "x": 4, "y": 5, "z": 6}
    found = difference(ours, theirs)
    assert found.conflicts == ([(1, "b")], [(1, "c")])
    assert found.student == [(3, "<think>")] and [index for index, _ in found.teacher] == [2, 4, 5, 6]
    assert (
        "'b' = 1" in str(found) and "'c' = 1" in str(found) and "'<pad>' = 2, 'x' = 4, 'y' = 5 and 1 more" in str(found)
    )
    assert not difference(ours, dict(ours))


def test_two_tokens_of_one_id_are_compared_together():
    assert difference({"a": 0, "A": 0}, {"a": 0}).conflicts == ([(0, "A")], [])
    assert shared_ids([{"a": 0, "A": 0, "b": 1}, {"a": 0, "b": 1}]) == [1]


def test_shared_ids_are_those_that_all_have_with_one_text():
    vocabs = {"a": 0, "b": 1, "c": 2, "d": 4}, {"a": 0, "b": 1, "c": 2, "e": 5}, {"a": 0, "x": 1, "c": 2}
    assert (
        shared_ids(vocabs[:1]) == [0, 1, 2, 4] and shared_ids(vocabs[:2]) == [0, 1, 2] and shared_ids(vocabs) == [0, 2]
    )


# ----------------------------------------------------------------------------------------------------------------------
# on VERL's workers

GKD = (f"{LOSS}.distillation_type=gkd", f"{LOSS}.distillation_beta=0.3", f"{LOSS}.distillation_temperature=1.7")
CASES = {
    "plain": (PURE, f"{MICRO}=4"),
    "tempered": (PURE, f"{MICRO}=2", *GKD),
    "hybrid": (HYBRID, f"{MICRO}=4", f"{LOSS}.hybrid_lambda_rl=0", *GKD),
    "logits": (PURE, f"{MICRO}=4", *GKD, "teacher.payload=logits"),
    "top_k": (PURE, f"{MICRO}=4", *GKD, "teacher.payload=topk", "teacher.topk=7"),
}
READ, UNREAD = 258, 265  # tokens that the student has added; the teacher's embedding ends at 262


def with_tokens(path, tokens, **kwargs):
    """A checkpoint whose tokenizer has more than the quickstart's 258 entries."""
    sharpened(path, **kwargs)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(tokens)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    added = [f"<tool {index}>" for index in range(10)]
    return {
        "student": with_tokens(folder / "student", added, hidden=32, layers=2, vocab_size=272, seed=1),
        "teacher": with_tokens(folder / "teacher", [], hidden=64, vocab_size=262, seed=2),
    }


@pytest.fixture(scope="module")
def batch():
    rows = make_batch(seed=5)
    rows[0]["response"][0], rows[3]["prompt"][-1] = READ, UNREAD
    return rows


@pytest.fixture(scope="module")
def results(checkpoints, batch, tmp_path_factory):
    models = [f"actor_rollout_ref.model.path={checkpoints['student']}", f"teacher.model.path={checkpoints['teacher']}"]
    cases = {name: [*overrides, *models, "teacher.vocab=shared"] for name, overrides in CASES.items()}
    return run_workers(tmp_path_factory.mktemp("out"), "ranks1", cases, batch, world_size=1)


@pytest.mark.parametrize("name", CASES)
def test_workers_compare_what_is_shared(name, results, checkpoints, batch):
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(checkpoints[side], attn_implementation="eager").double().eval()
        for side in ("student", "teacher")
    )
    kind, beta, tau = ("reverse_kl", 1.0, 1.0) if name == "plain" else ("gkd", 0.3, 1.7)
    pad, ids = AutoTokenizer.from_pretrained(checkpoints["teacher"]).pad_token_id, list(range(258))
    losses, masses = [], []
    for row in batch:
        read = dict(row) | {part: [pad if i >= 262 else i for i in row[part]] for part in ("prompt", "response")}
        mask = torch.tensor(row["mask"]) != 0
        with torch.no_grad():
            u = response_logits(teacher, read)
        sides = [coarse(logits, ids, tau) for logits in (response_logits(student, row), u)]
        masses.append(torch.stack([side[:, -1].detach().exp()[mask] for side in sides], -1))
        if name == "top_k":
            named = sides[1].topk(7).indices
            masses[-1][:, 1] *= (named == 258).any(-1)[mask]
            sides = [bucketed(side, named, 1.0) for side in sides]
        losses.append(divergence(*sides, kind, beta, 1.0)[mask])
    loss, result = torch.cat(losses).mean(), results[name]
    loss.backward()
    assert result["metrics"]["distillation/loss"] == pytest.approx(loss.item(), rel=2e-5)
    for side, mass in zip(("student", "teacher"), torch.cat(masses).mean(0).tolist(), strict=True):
        assert result["metrics"][f"distillation/{side}_rest_mass"] == pytest.approx(mass, rel=2e-5, abs=1e-9)
    for parameter, gradient in ((key, p.grad) for key, p in student.named_parameters()):
        found = result["gradients"][parameter].double()
        torch.testing.assert_close(found, gradient, rtol=2e-4, atol=2e-6, msg=parameter)
