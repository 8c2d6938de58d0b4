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
"""Top-k with its tail: divergences of k + 1 outcomes, against the definitions and autograd in float64."""

import math

import pytest
import torch
from test_mixture import KINDS, truth

from verl.on_policy_distillation import divergence as divergence_module
from verl.on_policy_distillation.buckets import TopKTail, top_k_tail
from verl.on_policy_distillation.divergence import DenseLogits, DivergenceSpec
from verl.on_policy_distillation.head import LinearLogits, divergence_of_head, tokens_of_head

TOKENS, VOCAB = 11, 61


@pytest.fixture
def problem():
    torch.manual_seed(5)
    hidden, weight = torch.randn(TOKENS, 6).double(), torch.randn(VOCAB, 6).double()
    return hidden.requires_grad_(), weight.requires_grad_(), 2.0 * torch.randn(TOKENS, VOCAB).double()


def bucketed(logits, ids, tau):
    """Logits of the k entries `ids` of softmax(logits / tau) and of the sum of all others, (n, k + 1)."""
    p = torch.softmax(logits / tau, -1)
    is_named = torch.zeros_like(p, dtype=torch.bool).scatter(-1, ids.long(), True)
    return torch.cat((p.gather(-1, ids.long()), p.masked_fill(is_named, 0.0).sum(-1, keepdim=True)), -1).log()


def exact(kind, beta, student, teacher, tau=1.0):
    return truth(kind, beta, student, [teacher], torch.ones(len(student), 1).double(), tau)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("tau", [1.0, 0.7])
@pytest.mark.parametrize("k", [1, 3, 50])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_value_and_gradient_are_those_of_k_plus_one_outcomes(problem, kind, beta, k, tau, cap, monkeypatch):
    monkeypatch.setattr(divergence_module, "CHUNK_ELEMENTS", 4 * VOCAB)
    hidden, weight, teacher = problem
    said = top_k_tail(DenseLogits(teacher), k, tau)
    assert torch.equal(said.ids.long(), teacher.topk(k).indices)
    product = 0.5 * (hidden @ weight.T)
    student = product if cap is None else cap * torch.tanh(product / cap)
    coarse = (bucketed(logits, said.ids, tau) for logits in (student, teacher))
    expected = exact(kind, beta, *coarse)
    factors = torch.rand(TOKENS).double()
    wanted = torch.autograd.grad((expected * factors).sum(), (hidden, weight), retain_graph=True)
    head, spec = LinearLogits(hidden, weight, None, 0.5, cap), DivergenceSpec(kind, beta, tau)
    labels = torch.arange(TOKENS)
    policy = tokens_of_head(head, said, spec, labels)
    torch.testing.assert_close(policy.log_prob, torch.log_softmax(student, -1)[labels, labels])
    for value in (divergence_of_head(head, said, spec, factors).divergence, policy.tokens.divergence):
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-12)
        found = torch.autograd.grad((value * factors).sum(), (hidden, weight))
        for gradient, correct in zip(found, wanted, strict=True):
            torch.testing.assert_close(gradient, correct, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_all_entries_are_the_whole_distribution(problem, kind, beta):
    hidden, weight, teacher = problem
    said = top_k_tail(DenseLogits(teacher), VOCAB, 1.0)
    assert said.log_prob[:, -1].eq(-math.inf).all()
    head, spec, ones = LinearLogits(hidden, weight), DivergenceSpec(kind, beta), torch.ones(TOKENS)
    found, whole = (divergence_of_head(head, side, spec, ones) for side in (said, DenseLogits(teacher)))
    torch.testing.assert_close(found.divergence, whole.divergence, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad(side.divergence.sum(), hidden)[0] for side in (found, whole)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_more_entries_say_more_and_never_more_than_there_is(problem, kind, beta):
    """The data-processing inequality: a coarser view has a smaller divergence, which is not negative."""
    hidden, weight, teacher = problem
    head, spec, ones = LinearLogits(hidden, weight), DivergenceSpec(kind, beta), torch.ones(TOKENS)
    sizes = (1, 2, 5, 20, 60)
    values = [divergence_of_head(head, top_k_tail(DenseLogits(teacher), k, 1.0), spec, ones).divergence for k in sizes]
    values.append(divergence_of_head(head, DenseLogits(teacher), spec, ones).divergence)
    assert (values[0] >= 0).all()
    for coarser, finer in zip(values, values[1:], strict=False):
        assert (coarser <= finer + 1e-12).all()


def test_a_student_that_has_the_teacher_s_buckets_has_no_divergence_and_no_gradient(problem):
    """Its entries outside of the k are in another order: that is what the bucket does not see."""
    _, _, teacher = problem
    said = top_k_tail(DenseLogits(teacher), 3, 1.0)
    rest = torch.ones_like(teacher, dtype=torch.bool).scatter(-1, said.ids.long(), False)
    student = teacher.clone()
    student[rest] = teacher[rest].view(TOKENS, -1).flip(-1).flatten()
    hidden = student.requires_grad_()
    head = LinearLogits(hidden, torch.eye(VOCAB).double())
    tokens = divergence_of_head(head, said, DivergenceSpec(), torch.ones(TOKENS))
    torch.testing.assert_close(tokens.divergence, torch.zeros(TOKENS).double(), rtol=0, atol=1e-14)
    gradient = torch.autograd.grad(tokens.divergence.sum(), hidden)[0]
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-14)


def test_a_tiny_rest_keeps_its_digits_and_an_empty_one_is_zero():
    logits = torch.tensor([[0.0, -40.0, -41.0], [0.0, -math.inf, -math.inf]])
    rest = top_k_tail(DenseLogits(logits), 1, 1.0).log_prob[:, 1]
    assert rest[0].item() == pytest.approx(-40.0 + math.log1p(math.exp(-1.0)), rel=1e-6) and rest[1] == -math.inf


def test_bfloat16_weights_follow_the_float64_truth(problem):
    hidden, weight, teacher = problem
    hidden, weight = hidden.detach().bfloat16(), weight.detach().bfloat16()
    said = top_k_tail(DenseLogits(teacher.float()), 5, 1.0)
    student = hidden.double().requires_grad_()
    expected = exact("gkd", 0.3, *(bucketed(u, said.ids, 1.0) for u in (student @ weight.double().T, teacher)))
    wanted = torch.autograd.grad(expected.sum(), student)[0]
    leaf = hidden.requires_grad_()
    value = divergence_of_head(LinearLogits(leaf, weight), said, DivergenceSpec("gkd", 0.3), torch.ones(TOKENS))
    torch.testing.assert_close(value.divergence.double(), expected, rtol=0.05, atol=0.02)
    found = torch.autograd.grad(value.divergence.sum(), leaf)[0].double()
    torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.05)


def test_what_does_not_go_together_is_refused(problem):
    hidden, weight, teacher = problem
    with pytest.raises(ValueError, match="k=62 of a vocabulary of 61 entries"):
        top_k_tail(DenseLogits(teacher), VOCAB + 1, 1.0)
    said = top_k_tail(DenseLogits(teacher), 3, 0.7)
    with pytest.raises(ValueError, match="temperature 0.7, the divergence of 1.0"):
        divergence_of_head(LinearLogits(hidden, weight), said, DivergenceSpec(), torch.ones(TOKENS))
    with pytest.raises(ValueError, match="61 entries cannot be cut to 5"):
        said.cut(5)


def test_no_tokens_give_no_rows():
    said = top_k_tail(DenseLogits(torch.empty(0, VOCAB)), 3, 1.0)
    assert said.ids.shape == (0, 3) and said.log_prob.shape == (0, 4)


def test_for_a_dump_the_rest_is_spread_evenly(problem):
    said = top_k_tail(DenseLogits(problem[2]), 3, 0.7)
    assert isinstance(said, TopKTail)
    p = (said.rows(slice(0, TOKENS)) / 0.7).softmax(-1)
    torch.testing.assert_close(p.gather(-1, said.ids.long()), said.log_prob[:, :3].exp())
    torch.testing.assert_close(p.amin(-1), said.log_prob[:, 3].exp() / (VOCAB - 3))
