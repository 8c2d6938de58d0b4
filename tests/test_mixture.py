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
"""Exact mixtures of teachers against the definitions and autograd in float64."""

import math

import pytest
import torch

from verl.on_policy_distillation import divergence as divergence_module
from verl.on_policy_distillation.divergence import DenseLogits, DivergenceSpec
from verl.on_policy_distillation.head import (
    LinearLogits,
    divergence_by_teacher,
    linear_divergence,
    linear_token_divergence,
    tokens_by_teacher,
)
from verl.on_policy_distillation.mixture import MixtureLogits, MixturePart, mixture_of, normalized_weights
from verl.trainer.ppo.core_algos import get_policy_loss_fn

KINDS = [("reverse_kl", 1.0), ("forward_kl", 1.0), ("gkd", 0.3), ("skew_reverse_kl", 0.4)]
TOKENS, VOCAB = 11, 29


def kl(p, q):
    return torch.where(p > 0, p * (p.log() - q.log()), 0.0).sum(-1)


def truth(kind, beta, student, teachers, weights, tau):
    """(n,) float64: the divergence from the student's logits to sum_k weights[:, k] softmax(teachers[k] / tau)."""
    s = torch.softmax(student / tau, -1)
    t = sum(w.unsqueeze(-1) * torch.softmax(u / tau, -1) for w, u in zip(weights.unbind(-1), teachers, strict=True))
    m = beta * t + (1 - beta) * s
    return {
        "reverse_kl": lambda: kl(s, t),
        "forward_kl": lambda: kl(t, s),
        "gkd": lambda: beta * kl(t, m) + (1 - beta) * kl(s, m),
        "skew_reverse_kl": lambda: kl(s, m),
    }[kind]()


@pytest.fixture
def problem():
    torch.manual_seed(3)
    hidden, weight = torch.randn(TOKENS, 6).double(), torch.randn(VOCAB, 6).double()
    heads = [(torch.randn(TOKENS, size).double(), torch.randn(VOCAB, size).double()) for size in (4, 7, 5)]
    return hidden.requires_grad_(), weight.requires_grad_(), heads


def logits_of(heads):
    return [hidden @ weight.T for hidden, weight in heads]


def by_sample(heads, shares, tau):
    """The mixture whose weights are a token's own, (n, K); a teacher has rows for its tokens alone."""
    parts = []
    for (hidden, weight), share in zip(heads, shares.unbind(-1), strict=True):
        has = share > 0
        row = torch.where(has, has.cumsum(0) - 1, -1)
        parts.append(MixturePart(lambda h=hidden[has], w=weight: LinearLogits(h, w), row, share.log()))
    return MixtureLogits(tuple(parts), ("a", "b", "c"), tau, VOCAB)


# The tokens' own weights: of one teacher, of two, of all three.
SHARES = torch.tensor([[1.0, 0, 0], [0, 0.25, 0.75], [0.2, 0.5, 0.3], [0, 0, 1.0], [0.5, 0.5, 0]], dtype=torch.float64)
OWN = SHARES[torch.arange(TOKENS) % 5]


@pytest.mark.parametrize("elements", [1, 3 * VOCAB, 1 << 20])
@pytest.mark.parametrize("tau", [0.7, 1.0])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_value_gradient_and_each_teacher_s_kl(problem, kind, beta, tau, elements, monkeypatch):
    monkeypatch.setattr(divergence_module, "CHUNK_ELEMENTS", elements)
    hidden, weight, heads = problem
    factors = torch.rand(TOKENS).double()
    spec, mixture = DivergenceSpec(kind, beta, tau), by_sample(heads, OWN, tau)
    expected = truth(kind, beta, hidden @ weight.T, logits_of(heads), OWN, tau)
    wanted = torch.autograd.grad((expected * factors).sum(), (hidden, weight))
    tokens, by_teacher = divergence_by_teacher(LinearLogits(hidden, weight), mixture, spec, factors)
    found = torch.autograd.grad((tokens.divergence * factors).sum(), (hidden, weight))
    labels = torch.arange(TOKENS)
    policy, again = tokens_by_teacher(LinearLogits(hidden, weight), mixture, spec, labels)
    recomputed = torch.autograd.grad((policy.tokens.divergence * factors).sum(), (hidden, weight))
    log_prob = torch.log_softmax(hidden @ weight.T, -1)[torch.arange(TOKENS), labels]
    torch.testing.assert_close(policy.log_prob, log_prob)  # the tokens are sorted by teacher, and back
    for value in (tokens.divergence, policy.tokens.divergence):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    for gradients in (found, recomputed):
        for gradient, correct in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(gradient, correct, rtol=1e-10, atol=1e-12)
    student = hidden @ weight.T
    for number, logits in enumerate(logits_of(heads)):
        alone = truth("reverse_kl", 1.0, student, [logits], torch.ones(TOKENS, 1).double(), tau)
        correct = torch.where(OWN[:, number] > 0, alone, math.nan)
        for kls in (by_teacher, again):
            torch.testing.assert_close(kls[number], correct, rtol=1e-10, atol=1e-12, equal_nan=True)


def test_a_mixture_is_no_average_of_losses_and_never_above_it(problem):
    hidden, weight, heads = problem
    student, weights = hidden @ weight.T, torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).expand(TOKENS, 3)
    for kind in ("reverse_kl", "forward_kl"):
        mixture = mixture_of([LinearLogits(*head) for head in heads], [2, 5, 3], 1.0, hidden.device)
        value = divergence_by_teacher(LinearLogits(hidden, weight), mixture, DivergenceSpec(kind), torch.ones(TOKENS))[
            0
        ]
        ones = torch.ones(TOKENS, 1).double()
        singles = torch.stack([truth(kind, 1.0, student, [u], ones, 1.0) for u in logits_of(heads)], -1)
        assert (value.divergence < (singles * weights).sum(-1)).all()


def test_probabilities_of_zero_are_mixed_as_such():
    """One teacher masks an entry, another does not: the mixture has what the second has."""
    one, two = torch.tensor([[0.0, -math.inf, 1.0, -math.inf]]), torch.tensor([[0.5, 0.2, -math.inf, -math.inf]])
    mixture = mixture_of([DenseLogits(one), DenseLogits(two)], [1, 3], 1.0, one.device)
    expected = 0.25 * torch.softmax(one.double(), -1) + 0.75 * torch.softmax(two.double(), -1)
    torch.testing.assert_close(mixture.rows(slice(0, 1)).exp().double(), expected, rtol=1e-6, atol=0.0)


def test_vocabularies_of_different_length_are_cut_before_the_softmax(problem):
    hidden, weight, _ = problem
    teachers = [torch.randn(TOKENS, size).double() for size in (VOCAB, VOCAB + 6)]
    mixture = mixture_of([DenseLogits(u) for u in teachers], [1, 1], 1.0, hidden.device)
    expected = torch.stack([torch.softmax(u[:, :VOCAB], -1) for u in teachers]).mean(0)
    torch.testing.assert_close(mixture.rows(torch.arange(TOKENS)).exp(), expected)
    torch.testing.assert_close(
        mixture.cut(5).rows(torch.arange(TOKENS)).exp(), torch.stack([u[:, :5].softmax(-1) for u in teachers]).mean(0)
    )


def test_a_weight_of_one_is_the_teacher_itself(problem):
    _, _, heads = problem
    teachers = [LinearLogits(*head) for head in heads]
    assert mixture_of(teachers, [0, 2, 0], 0.7, torch.device("cpu")).hidden is teachers[1].hidden


def test_weights_are_normalised():
    assert normalized_weights([1, 3], 2) == [0.25, 0.75]


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([1.0], "1 weights, and there are 2 teachers"),
        ([1.0, -0.5], "0 or more"),
        ([0.0, 0.0], "not all zero"),
        ([math.nan, 1.0], "0 or more"),
        ([math.inf, 1.0], "0 or more"),
        ([None, 1.0], "give numbers"),
    ],
)
def test_weights_that_weigh_nothing_are_refused(weights, said):
    with pytest.raises(ValueError, match=said):
        normalized_weights(weights, 2)


# ----------------------------------------------------------------------------------------------------------------------
# for trainers of one's own


@pytest.mark.parametrize(("kind", "beta"), KINDS)
@pytest.mark.parametrize("loss_mode", ["on_policy_distillation", "hybrid_rl_distillation"])
def test_lists_of_teacher_logits_in_both_losses(loss_mode, kind, beta):
    torch.manual_seed(0)
    student = torch.randn(2, 5, VOCAB).double().requires_grad_()
    teachers = [torch.randn(2, 5, VOCAB).double() for _ in range(2)]
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    rl = torch.zeros(2, 5)
    config = {"distillation_type": kind, "distillation_temperature": 1.3, "teacher_weights": [1, 3]}
    config |= {"distillation_beta": beta} if kind in ("gkd", "skew_reverse_kl") else {}
    for weights in ([1, 3], None):
        config = {key: value for key, value in config.items() if key != "teacher_weights" or weights}
        loss = get_policy_loss_fn(loss_mode)(
            rl, rl, rl, mask, "token-mean", config, teacher_logits=teachers, student_logits=student
        )[0]
        shares = torch.tensor([0.25, 0.75] if weights else [0.5, 0.5]).double().expand(8, 2)
        kept = mask.bool()
        expected = truth(kind, beta, student[kept], [u[kept] for u in teachers], shares, 1.3).mean()
        torch.testing.assert_close(loss, expected)
        found, wanted = (torch.autograd.grad(value, student)[0] for value in (loss, expected))
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("teachers", "weights", "said"),
    [
        ([], None, "empty list"),
        ([torch.zeros(1, 2, 4)] * 2, [1.0], "1 weights, and there are 2 teachers"),
        ([torch.zeros(1, 2, 4)] * 2, [-1.0, 2.0], "teacher_weights.*0 or more"),
        ([torch.zeros(1, 2, 4)] * 2, "1,2", "no list"),
        (torch.zeros(1, 2, 4), [1.0], "pass a list as teacher_logits"),
        ([torch.zeros(1, 2, 4), torch.zeros(1, 2, 5)], None, r"teacher_logits\[1\] of 5"),
    ],
)
def test_bad_lists_of_teachers(teachers, weights, said):
    config = {} if weights is None else {"teacher_weights": weights}
    with pytest.raises(ValueError, match=said):
        get_policy_loss_fn("on_policy_distillation")(
            None,
            None,
            None,
            torch.ones(1, 2),
            config=config,
            teacher_logits=teachers,
            student_logits=torch.zeros(1, 2, 4, requires_grad=True),
        )


@pytest.mark.parametrize("weights", [None, [0.5, 1.5, 2.0]])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_lists_of_teachers_from_hidden_states(problem, kind, beta, weights):
    hidden, weight, heads = problem
    bias, scales, caps = torch.randn(VOCAB).double(), [1.0, 0.5, 1.0], [None, None, 3.0]
    logits = logits_of(heads)
    logits = [logits[0] + bias, 0.5 * logits[1], 3.0 * torch.tanh(logits[2] / 3.0)]
    shares = torch.tensor(weights or [1.0, 1.0, 1.0]).double()
    expected = truth(kind, beta, hidden @ weight.T, logits, (shares / shares.sum()).expand(TOKENS, 3), 1.3)
    settings = {"distillation_type": kind, "beta": beta, "temperature": 1.3, "teacher_weights": weights}
    settings |= {"teacher_bias": [bias, None, None], "teacher_scale": scales, "teacher_softcap": caps}
    hiddens, projections = zip(*heads, strict=True)
    result = linear_divergence(hidden, weight, list(hiddens), list(projections), **settings)
    torch.testing.assert_close(result.loss, expected.mean())
    found, wanted = (torch.autograd.grad(value, hidden)[0] for value in (result.loss, expected.mean()))
    torch.testing.assert_close(found, wanted)
    labels = torch.zeros(TOKENS, dtype=torch.int64)
    tokens = linear_token_divergence(hidden, weight, hiddens, projections, labels, **settings).tokens
    torch.testing.assert_close(tokens.divergence, expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"teacher_weight": torch.zeros(VOCAB, 4)}, "teacher_weight is a Tensor, and teacher_hidden has 3"),
        ({"teacher_scale": [1.0]}, "teacher_scale is 1 values, and teacher_hidden has 3"),
        ({"teacher_weights": [1.0, 2.0]}, "2 weights, and there are 3 teachers"),
        ({"teacher_hidden": torch.zeros(TOKENS, 4), "teacher_weights": [1.0]}, "one teacher_hidden: pass a list"),
        ({"teacher_hidden": []}, "teacher_weight is 3 values, and teacher_hidden has 0"),
    ],
)
def test_bad_lists_of_hidden_states(problem, change, said):
    hidden, weight, heads = problem
    hiddens, projections = zip(*heads, strict=True)
    arguments = {"teacher_hidden": list(hiddens), "teacher_weight": list(projections)} | change
    with pytest.raises(ValueError, match=said):
        linear_divergence(hidden, weight, **arguments)
