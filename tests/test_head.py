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
"""head.py against float64, finite differences and closed forms.

`truth` and `token_truth` are the truth: dense logits, the definitions, and autograd, all in float64. `table_truth` is
the table of divergence.py for probabilities that are zero, where autograd meets 0 * inf. None of the three
uses a piece of the module.
"""

import math
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from verl.on_policy_distillation import divergence as divergence_module
from verl.on_policy_distillation import head as head_module
from verl.on_policy_distillation.buckets import InSharedVocabulary, SharedLogits, SharedVocabulary
from verl.on_policy_distillation.divergence import (
    DIVERGENCES,
    LOG_ZERO,
    DenseLogits,
    DivergenceSpec,
    TokenDivergence,
    token_divergence,
)
from verl.on_policy_distillation.head import (
    LinearLogits,
    divergence_of_head,
    linear_divergence,
    linear_token_divergence,
    tokens_of_head,
)
from verl.on_policy_distillation.roofline import Chunking

CASES = [
    ("reverse_kl", 1.0),
    ("reverse_kl", 0.3),
    ("forward_kl", 1.0),
    ("forward_kl", 0.0),
    ("gkd", 0.0),
    ("gkd", 0.1),
    ("gkd", 0.5),
    ("gkd", 0.9),
    ("gkd", 1.0),
    ("skew_reverse_kl", 0.1),
    ("skew_reverse_kl", 0.5),
    ("skew_reverse_kl", 0.9),
    ("skew_reverse_kl", 1.0),
]
# One of each kind, where a test is about something else than the formulas.
FEW = [("reverse_kl", 1.0), ("forward_kl", 1.0), ("gkd", 0.5), ("skew_reverse_kl", 0.5)]

VOCABULARIES = [(37, 37), (37, 29), (29, 37)]  # (student's, teacher's)

# Relative errors of values, and of gradients in the norm. The products' own rounding is in both.
FLOAT32, FLOAT64 = 2e-6, 1e-12
# A gradient of 16-bit products: logits' gradient, hidden state or weight, and the result are each rounded once.
HALF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


# ----------------------------------------------------------------------------------------------------------------------
# truth


@dataclass
class Problem:
    """Arguments of the two functions. Only the student's are differentiated."""

    student_hidden: torch.Tensor
    student_weight: torch.Tensor
    student_bias: torch.Tensor | None
    teacher_hidden: torch.Tensor
    teacher_weight: torch.Tensor
    teacher_bias: torch.Tensor | None
    labels: torch.Tensor

    def arguments(self):
        tensors = (self.student_hidden, self.student_weight, self.teacher_hidden, self.teacher_weight)
        return tensors, {"student_bias": self.student_bias, "teacher_bias": self.teacher_bias}

    def student(self):
        tensors = (self.student_hidden, self.student_weight, self.student_bias)
        return [tensor for tensor in tensors if tensor is not None]

    def leaves(self, names=("student_hidden", "student_weight", "student_bias")) -> "Problem":
        """A copy in which the student's tensors in `names` require gradients."""
        return self.map(lambda name, tensor: tensor.detach().clone().requires_grad_(name in names))

    def map(self, function) -> "Problem":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {k: function(k, v) for k, v in values.items() if v is not None and v.is_floating_point()}
        return replace(self, **changed)


def problem(n=7, vocab=(37, 37), width=(6, 9), bias=True, scale=1.5, seed=0, dtype=torch.float32) -> Problem:
    """Standard deviation of the logits: `scale` (and a bias of a third of it). `dtype`: one, or one per side."""
    generator = torch.Generator().manual_seed(seed)
    dtypes = dtype if isinstance(dtype, tuple) else (dtype, dtype)

    def side(index):
        def random(*shape, scale):
            return (scale * torch.randn(*shape, generator=generator)).to(dtypes[index])

        hidden = random(n, width[index], scale=1.0)
        weight = random(vocab[index], width[index], scale=scale / math.sqrt(width[index]))
        return hidden, weight, random(vocab[index], scale=scale / 3) if bias else None

    return Problem(*side(0), *side(1), torch.randint(vocab[0], (n,), generator=generator))


def head(hidden, weight, bias):
    """Float64 logits of inputs of any dtype, with the roundings that are documented, each of gradient one."""

    def rounded(values):
        return values + (values.detach().to(weight.dtype).double() - values.detach())

    logits = rounded(hidden.double()) @ weight.double().T
    if weight.dtype in HALF:  # the products of a processor are rounded once
        logits = rounded(logits)
    return logits if bias is None else logits + bias.double()


def log_probabilities(logits, temperature):
    shifted = (logits - logits.amax(-1, keepdim=True).detach()) / temperature
    return shifted - shifted.exp().sum(-1, keepdim=True).log()


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def definition(kind, beta, log_s, log_t):
    if kind == "reverse_kl" or (kind in ("gkd", "skew_reverse_kl") and beta == 1.0):
        return kl(log_s, log_t)
    if kind == "forward_kl" or (kind == "gkd" and beta == 0.0):
        return kl(log_t, log_s)
    high = torch.maximum(log_s, log_t).detach()
    log_m = high + (beta * (log_t - high).exp() + (1.0 - beta) * (log_s - high).exp()).log()
    if kind == "skew_reverse_kl":
        return kl(log_s, log_m)
    return beta * kl(log_t, log_m) + (1.0 - beta) * kl(log_s, log_m)


def logits_of(p: Problem):
    """Of both sides, cut to the vocabulary that they share."""
    student = head(p.student_hidden, p.student_weight, p.student_bias)
    teacher = head(p.teacher_hidden, p.teacher_weight, p.teacher_bias).detach()
    vocab = min(student.shape[-1], teacher.shape[-1])
    return student[:, :vocab], teacher[:, :vocab]


def shared_log_probabilities(p: Problem, temperature):
    return (log_probabilities(logits, temperature) for logits in logits_of(p))


def truth(p: Problem, kind="reverse_kl", beta=1.0, temperature=1.0, weights=None):
    """Loss, per-token values, and the gradients of the student's tensors."""
    p = p.leaves()
    value = definition(kind, beta, *shared_log_probabilities(p, temperature))
    loss = value.mean() if weights is None else (value * weights.double()).sum()
    return loss.detach(), value.detach(), torch.autograd.grad(loss, p.student())


def policy_truth(p: Problem, temperature):
    """log-probability of the labels and entropy, over the student's whole vocabulary."""
    log_p = log_probabilities(head(p.student_hidden, p.student_weight, p.student_bias), temperature)
    return log_p.gather(-1, p.labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def token_truth(p: Problem, factors, kind="reverse_kl", beta=1.0, temperature=1.0, log_prob_temperature=1.0):
    """(log_prob, entropy, divergence), and the gradients of their sum with `factors` (3, n)."""
    p = p.leaves()
    value = definition(kind, beta, *shared_log_probabilities(p, temperature))
    results = torch.stack((*policy_truth(p, log_prob_temperature), value))
    return results.detach(), torch.autograd.grad((results * factors.double()).sum(), p.student())


def table_truth(p: Problem, kind, beta, weights):
    """As `truth`, from the table of the module, with LOG_ZERO for log 0 and 0 log 0 = 0."""

    def log(probabilities):
        return probabilities.log().nan_to_num(neginf=LOG_ZERO)

    def dot(p, q):
        return (p * q).sum(-1, keepdim=True)

    s, t = (torch.softmax(logits.detach(), -1) for logits in logits_of(p))
    m = beta * t + (1.0 - beta) * s
    reverse, forward = dot(s, log(s) - log(t)), dot(t, log(t) - log(s))
    if kind == "reverse_kl" or (kind in ("gkd", "skew_reverse_kl") and beta == 1.0):
        value, gradient = reverse, s * (log(s) - log(t) - reverse)
    elif kind == "forward_kl" or (kind == "gkd" and beta == 0.0):
        value, gradient = forward, s - t
    elif kind == "gkd":
        of_student = dot(s, log(s) - log(m))
        value = beta * dot(t, log(t) - log(m)) + (1.0 - beta) * of_student
        gradient = (1.0 - beta) * s * (log(s) - log(m) - of_student)
    else:
        h = log(s) - log(m) - (1.0 - beta) * torch.where(s > 0.0, s / m, 0.0)
        value, gradient = dot(s, log(s) - log(m)), s * (h - dot(s, h))
    full = torch.zeros(len(s), len(p.student_weight), dtype=torch.float64)
    full[:, : s.shape[-1]] = gradient * weights.double()[:, None]
    products = full @ p.student_weight.double(), full.T @ p.student_hidden.double(), full.sum(0)
    return value[:, 0], products[: len(p.student())]


# ----------------------------------------------------------------------------------------------------------------------
# what is tested


def run(p: Problem, kind="reverse_kl", beta=1.0, temperature=1.0, weights=None):
    """As `truth`."""
    p = p.leaves()
    tensors, biases = p.arguments()
    out = linear_divergence(
        *tensors, **biases, distillation_type=kind, beta=beta, temperature=temperature, token_weights=weights
    )
    return out.loss.detach(), out.divergence, torch.autograd.grad(out.loss, p.student())


def tokens_of(p: Problem, **options):
    tensors, biases = p.arguments()
    return linear_token_divergence(*tensors, p.labels, **biases, **options)


def run_tokens(p: Problem, factors, kind="reverse_kl", beta=1.0, **options):
    """As `token_truth`."""
    p = p.leaves()
    log_prob, entropy, tokens = tokens_of(p, distillation_type=kind, beta=beta, **options)
    results = torch.stack((log_prob, entropy, tokens.divergence))
    return results.detach(), torch.autograd.grad((results * factors).sum(), p.student())


def factors_for(n, seed=11, dtype=torch.float32):
    return torch.randn(3, n, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights_for(n, seed=12, dtype=torch.float32):
    """Of both signs, one of them zero."""
    weights = torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return weights.index_fill_(0, torch.tensor([n // 2]), 0.0)


def assert_values(actual, expected, tolerance):
    worst = ((actual.double() - expected).abs() / expected.abs().clamp(min=1.0)).max().item()
    assert worst <= tolerance, f"value off by {worst:.2g}, allowed {tolerance:.2g}"


def assert_gradients(actual, expected, tolerance, scale=0.0):
    """`tolerance` is relative to the gradient's norm, or to `scale` where that is larger."""
    assert len(actual) == len(expected)
    for mine, true in zip(actual, expected, strict=True):
        assert mine.shape == true.shape and mine.isfinite().all()
        error = (mine.double() - true.double()).norm().item()
        bound = tolerance * max(true.double().norm().item(), scale)
        assert error <= bound, f"gradient {tuple(true.shape)} off by {error:.2g}, allowed {bound:.2g}"


def assert_same(actual, expected, tolerance=FLOAT32, scale=0.0):
    """Both are (values..., gradients)."""
    for mine, true in zip(actual[:-1], expected[:-1], strict=True):
        assert_values(mine, true, tolerance)
    assert_gradients(actual[-1], expected[-1], 5 * tolerance, scale)


def set_chunks(monkeypatch, tokens, vocab, cached_tokens=None):
    """Chunks of so many tokens, in blocks of `cached_tokens`."""
    monkeypatch.setattr(divergence_module, "CHUNK_ELEMENTS", tokens * vocab)
    monkeypatch.setattr(divergence_module, "CACHED_BLOCK_ELEMENTS", (cached_tokens or tokens) * vocab)


# ----------------------------------------------------------------------------------------------------------------------
# values and gradients against float64


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_loss_and_gradients_in_float32(kind, beta, bias, vocab, temperature):
    p = problem(vocab=vocab, bias=bias)
    weights = weights_for(7)
    actual = run(p, kind, beta, temperature, weights)
    assert {tensor.dtype for tensor in (*actual[:2], *actual[2])} == {torch.float32}
    assert_same(actual, truth(p, kind, beta, temperature, weights))


@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (0.7, 1.3), (3.0, 0.5)])
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_tokens_and_gradients_in_float32(kind, beta, bias, vocab, temperatures):
    p, factors = problem(vocab=vocab, bias=bias), factors_for(7)
    options = dict(zip(("temperature", "log_prob_temperature"), temperatures, strict=True))
    actual = run_tokens(p, factors, kind, beta, **options)
    assert {tensor.dtype for tensor in (actual[0], *actual[1])} == {torch.float32}
    assert_same(actual, token_truth(p, factors, kind, beta, **options))


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_float64(kind, beta, vocab):
    p, weights = problem(vocab=vocab, dtype=torch.float64), weights_for(7, dtype=torch.float64)
    actual = run(p, kind, beta, 1.3, weights)
    assert {tensor.dtype for tensor in (*actual[:2], *actual[2])} == {torch.float64}
    assert_same(actual, truth(p, kind, beta, 1.3, weights), FLOAT64)
    factors = factors_for(7, dtype=torch.float64)
    actual = run_tokens(p, factors, kind, beta, temperature=1.3)
    assert {tensor.dtype for tensor in (actual[0], *actual[1])} == {torch.float64}
    assert_same(actual, token_truth(p, factors, kind, beta, temperature=1.3), FLOAT64)


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("kind", "beta"), FEW)
def test_half_precision(kind, beta, dtype, vocab):
    p, weights, factors = problem(vocab=vocab, dtype=dtype), weights_for(7), factors_for(7)
    loss, values, gradients = run(p, kind, beta, weights=weights)
    expected = truth(p, kind, beta, weights=weights)
    assert loss.dtype == values.dtype == torch.float32  # statistics are not rounded
    assert {gradient.dtype for gradient in gradients} == {dtype}
    # What is left in the values are logits that fell on the other side of a tie.
    assert_values(values, expected[1], HALF[dtype])
    assert_gradients(gradients, expected[2], 4 * HALF[dtype])
    results, gradients = run_tokens(p, factors, kind, beta)
    expected = token_truth(p, factors, kind, beta)
    assert results.dtype == torch.float32 and {gradient.dtype for gradient in gradients} == {dtype}
    assert_values(results, expected[0], HALF[dtype])
    assert_gradients(gradients, expected[1], 4 * HALF[dtype])


@pytest.mark.parametrize(
    ("dtypes", "tolerance"),
    [
        # student's hidden states and weight, teacher's hidden states and weight
        ((torch.float32, torch.float32, torch.bfloat16, torch.bfloat16), None),
        ((torch.float32, torch.float32, torch.bfloat16, torch.float32), 1.0),
        ((torch.bfloat16, torch.float32, torch.float32, torch.float32), None),
        ((torch.float32, torch.bfloat16, torch.float32, torch.float32), None),
        ((torch.bfloat16, torch.bfloat16, torch.float32, torch.float32), None),
        ((torch.float16, torch.float16, torch.bfloat16, torch.bfloat16), None),
        ((torch.float64, torch.float32, torch.float32, torch.float64), 1.0),
        ((torch.float32, torch.float64, torch.float16, torch.float32), 1.0),
    ],
)
@pytest.mark.parametrize(("kind", "beta"), FEW)
def test_mixed_dtypes(kind, beta, dtypes, tolerance):
    """Each product is made in the dtype of its weight; each gradient has the dtype of what it is the gradient of."""
    p = problem()
    names = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
    p = replace(p, **{name: getattr(p, name).to(dtype) for name, dtype in zip(names, dtypes, strict=True)})
    tolerance = FLOAT32 if tolerance else 2.0**-8  # bfloat16's, where there is one among the products
    weights = weights_for(7)
    loss, values, gradients = run(p, kind, beta, weights=weights)
    assert [gradient.dtype for gradient in gradients] == [tensor.dtype for tensor in p.student()]
    expected = truth(p, kind, beta, weights=weights)
    assert_values(values, expected[1], tolerance)
    assert_values(loss, expected[0], tolerance)
    assert_gradients(gradients, expected[2], 5 * tolerance)


def test_student_in_float32_does_not_pay_for_a_teacher_in_bfloat16():
    """Given the teacher's rounded logits, the student's side is float32: the bias of the teacher carries them."""
    p = problem(dtype=(torch.float32, torch.bfloat16), width=(6, 1), n=1)
    p = replace(p, teacher_hidden=torch.zeros_like(p.teacher_hidden))
    weights = torch.ones(1)
    assert_same(run(p, weights=weights), truth(p, weights=weights))


@pytest.mark.parametrize(("kind", "beta"), FEW)
def test_a_vocabulary_that_is_a_multiple_of_nothing(kind, beta):
    p, weights = problem(n=3, vocab=(10007, 10009), scale=3.0), weights_for(3)
    # The bound of the gradients is that of a norm of 0.01: they are small differences of probabilities here.
    assert_same(run(p, kind, beta, weights=weights), truth(p, kind, beta, weights=weights), scale=0.01)
    factors = factors_for(3)
    assert_same(run_tokens(p, factors, kind, beta), token_truth(p, factors, kind, beta), scale=0.01)


@pytest.mark.parametrize(("kind", "beta"), [*FEW, ("gkd", 0.01), ("skew_reverse_kl", 0.999)])
def test_gradients_by_finite_differences(kind, beta):
    p = problem(n=3, vocab=(7, 6), width=(3, 2), dtype=torch.float64)
    weights, step = weights_for(3, dtype=torch.float64), 1e-5

    def loss_at(name, index, change):
        moved = getattr(p, name).clone()
        moved.view(-1)[index] += change
        tensors, biases = replace(p, **{name: moved}).arguments()
        options = {"distillation_type": kind, "beta": beta, "temperature": 1.3, "token_weights": weights}
        return linear_divergence(*tensors, **biases, **options).loss.item()

    _, _, gradients = run(p, kind, beta, 1.3, weights)
    for name, gradient in zip(("student_hidden", "student_weight", "student_bias"), gradients, strict=True):
        for index, expected in enumerate(gradient.flatten().tolist()):
            slope = (loss_at(name, index, step) - loss_at(name, index, -step)) / (2 * step)
            assert slope == pytest.approx(expected, rel=1e-6, abs=1e-9), (name, index)


@pytest.mark.parametrize(("kind", "beta"), [*FEW, ("gkd", 0.01), ("skew_reverse_kl", 0.999)])
def test_token_gradients_by_gradcheck(kind, beta):
    p = problem(n=3, vocab=(7, 6), width=(3, 2), dtype=torch.float64).leaves()

    def results(hidden, weight, bias):
        q = replace(p, student_hidden=hidden, student_weight=weight, student_bias=bias)
        out = tokens_of(q, distillation_type=kind, beta=beta, temperature=1.3, log_prob_temperature=0.8)
        return out.log_prob, out.entropy, out.tokens.divergence

    torch.autograd.gradcheck(results, p.student())


# ----------------------------------------------------------------------------------------------------------------------
# closed forms


def test_two_entries_in_closed_form():
    """Student (p, 1 - p), teacher (q, 1 - q); only the first logit moves with the student's one hidden unit."""
    p, q = 0.8, 0.3
    student, teacher = (math.log(x / (1.0 - x)) for x in (p, q))
    hidden = torch.tensor([[student]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]], requires_grad=True)
    out = linear_divergence(hidden, weight, torch.tensor([[teacher]]), weight)
    expected = p * math.log(p / q) + (1.0 - p) * math.log((1.0 - p) / (1.0 - q))
    slope = p * (1.0 - p) * (student - teacher)  # dKL/dp = the difference of the log-odds, dp/dz = p (1 - p)
    assert out.loss.item() == pytest.approx(expected, rel=1e-6)
    out.loss.backward()
    assert hidden.grad.item() == pytest.approx(slope, rel=1e-6)
    assert weight.grad.flatten().tolist() == pytest.approx([slope * student, -slope * student], rel=1e-6)


@pytest.mark.parametrize("value", [0.0, 2.5])
@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_equal_heads_have_no_divergence_and_no_gradient(kind, beta, value):
    p = problem()
    p = replace(p, teacher_hidden=p.student_hidden, teacher_weight=p.student_weight, teacher_bias=p.student_bias)
    p = replace(p, teacher_bias=p.student_bias + value)  # a common offset is no difference
    loss, values, gradients = run(p, kind, beta)
    assert loss.abs() < 1e-6 and values.abs().max() < 1e-6
    assert all(gradient.abs().max() < 2e-6 for gradient in gradients)


def test_uniform_heads_in_closed_form():
    """Logits of zero: log-probability -log V, entropy log V, and no divergence within the shared prefix."""
    zeros = torch.zeros
    out = linear_token_divergence(zeros(2, 3), zeros(11, 3), zeros(2, 4), zeros(5, 4), torch.tensor([0, 10]))
    assert out.log_prob.tolist() == pytest.approx([-math.log(11)] * 2)
    assert out.entropy.tolist() == pytest.approx([math.log(11)] * 2)
    assert out.tokens.student_entropy.tolist() == pytest.approx([math.log(5)] * 2)
    assert out.tokens.teacher_entropy.tolist() == pytest.approx([math.log(5)] * 2)
    assert out.tokens.divergence.tolist() == pytest.approx([0.0] * 2, abs=1e-7)


def test_forward_kl_of_bias_alone():
    """dKL(T||S)/db = S - T, summed with the weights of the tokens."""
    student_bias = torch.tensor([0.3, -1.0, 2.0], requires_grad=True)
    teacher_bias = torch.tensor([1.0, 0.5, -2.0])
    nothing = torch.zeros(2, 1), torch.zeros(3, 1)
    weights = torch.tensor([0.25, -2.0])
    biases = {"student_bias": student_bias, "teacher_bias": teacher_bias}
    linear_divergence(
        *nothing, *nothing, distillation_type="forward_kl", token_weights=weights, **biases
    ).loss.backward()
    expected = -1.75 * (student_bias.detach().softmax(-1) - teacher_bias.softmax(-1))
    torch.testing.assert_close(student_bias.grad, expected)


# ----------------------------------------------------------------------------------------------------------------------
# scaled and soft-capped logits

# (scale, soft cap) of the student, and of the teacher. Standard deviation of the logits before: 1.5.
CAPS = [
    ((0.25, None), (3.0, None)),
    ((1.0, 2.0), (1.0, 2.0)),
    ((2.0, 1.5), (1.0, None)),
    ((1.0, None), (0.5, 3.0)),
]
OPTIONS = ("student_scale", "student_softcap", "teacher_scale", "teacher_softcap")


def capped(logits, scale, softcap):
    """As the models write it."""
    logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def cap_options(caps):
    return dict(zip(OPTIONS, (*caps[0], *caps[1]), strict=True))


def cap_truth(p: Problem, caps, factors, kind, beta, temperature, log_prob_temperature):
    """As `token_truth`."""
    p = p.leaves()
    whole = capped(head(p.student_hidden, p.student_weight, p.student_bias), *caps[0])
    teacher = capped(head(p.teacher_hidden, p.teacher_weight, p.teacher_bias), *caps[1])
    vocab = min(whole.shape[-1], teacher.shape[-1])
    sides = (log_probabilities(side[:, :vocab], temperature) for side in (whole, teacher.detach()))
    log_p = log_probabilities(whole, log_prob_temperature)
    policy = log_p.gather(-1, p.labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    results = torch.stack((*policy, definition(kind, beta, *sides)))
    return results.detach(), torch.autograd.grad((results * factors.double()).sum(), p.student())


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("caps", CAPS)
@pytest.mark.parametrize(("kind", "beta"), FEW)
def test_scaled_and_capped_heads(kind, beta, caps, dtype, vocab, monkeypatch):
    set_chunks(monkeypatch, 3, 37, 2)
    p, factors = problem(vocab=vocab, dtype=dtype), factors_for(7, dtype=dtype)
    tolerance = FLOAT32 if dtype == torch.float32 else FLOAT64
    actual = run_tokens(p, factors, kind, beta, temperature=0.7, log_prob_temperature=1.3, **cap_options(caps))
    assert_same(actual, cap_truth(p, caps, factors, kind, beta, 0.7, 1.3), tolerance)
    only_divergence = factors * torch.tensor([[0.0], [0.0], [1.0]])
    results, gradients = cap_truth(p, caps, only_divergence, kind, beta, 0.7, 1.0)
    leaves = p.leaves()
    tensors, biases = leaves.arguments()
    options = {"distillation_type": kind, "beta": beta, "temperature": 0.7, "token_weights": factors[2]}
    out = linear_divergence(*tensors, **biases, **options, **cap_options(caps))
    out.loss.backward()
    assert_values(out.divergence, results[2], tolerance)
    assert_gradients([tensor.grad for tensor in leaves.student()], gradients, 5 * tolerance)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("caps", CAPS)
def test_half_precision_scaled_and_capped(caps, dtype):
    p, factors = problem(dtype=dtype), factors_for(7)
    results, gradients = run_tokens(p, factors, "gkd", 0.5, **cap_options(caps))
    expected = cap_truth(p, caps, factors, "gkd", 0.5, 1.0, 1.0)
    assert_values(results, expected[0], 3 * HALF[dtype])  # the scale multiplies a logit's rounding
    assert_gradients(gradients, expected[1], 6 * HALF[dtype])


@pytest.mark.parametrize("caps", CAPS)
def test_capped_token_gradients_by_gradcheck(caps):
    p = problem(n=3, vocab=(7, 6), width=(3, 2), dtype=torch.float64).leaves()

    def results(hidden, weight, bias):
        q = replace(p, student_hidden=hidden, student_weight=weight, student_bias=bias)
        out = tokens_of(q, distillation_type="gkd", beta=0.3, temperature=1.3, **cap_options(caps))
        return out.log_prob, out.entropy, out.tokens.divergence

    torch.autograd.gradcheck(results, p.student())


@pytest.mark.parametrize("caps", CAPS)
@pytest.mark.parametrize(("kind", "beta"), FEW)
def test_capped_gradients_by_finite_differences(kind, beta, caps):
    p, step = problem(n=3, vocab=(7, 6), width=(3, 2), dtype=torch.float64), 1e-5
    options = {"distillation_type": kind, "beta": beta, "temperature": 1.3, **cap_options(caps)}

    def loss_of(q):
        tensors, biases = q.arguments()
        return linear_divergence(*tensors, **biases, **options).loss

    def loss_at(name, index, change):
        moved = getattr(p, name).clone()
        moved.view(-1)[index] += change
        return loss_of(replace(p, **{name: moved})).item()

    leaves = p.leaves()
    gradients = torch.autograd.grad(loss_of(leaves), leaves.student())
    for name, gradient in zip(("student_hidden", "student_weight", "student_bias"), gradients, strict=True):
        for index, expected in enumerate(gradient.flatten().tolist()):
            slope = (loss_at(name, index, step) - loss_at(name, index, -step)) / (2 * step)
            assert slope == pytest.approx(expected, rel=1e-6, abs=1e-9), (name, index)


def test_a_cap_that_is_reached_keeps_the_digits_of_its_slope():
    """Logits of 20 under a cap of 2: the slope is 1 / cosh(10)^2 = 8e-9, which 1 - tanh^2 in float32 gives as 0."""
    hidden = torch.tensor([[20.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]])
    out = linear_divergence(hidden, weight, torch.zeros(1, 1), weight, student_softcap=2.0)
    out.loss.backward()
    wide = hidden.detach().double().requires_grad_()
    logits = 2.0 * torch.tanh(wide @ weight.double().T / 2.0)
    log_s = torch.log_softmax(logits, -1)
    true_slope = (log_s.exp() * (log_s + math.log(2.0))).sum()
    (expected,) = torch.autograd.grad(true_slope, logits)
    expected = expected[0, 0].item() / math.cosh(10.0) ** 2
    assert 0.0 < expected < 1e-8
    assert hidden.grad.item() == pytest.approx(expected, rel=1e-5)


def test_extreme_logits_under_a_cap():
    p, weights = integer_problem(-57, 58), weights_for(5)
    tensors, _ = p.leaves().arguments()
    out = linear_divergence(*tensors, token_weights=weights, student_softcap=30.0, teacher_softcap=30.0)
    out.loss.backward()
    assert out.loss.isfinite() and tensors[0].grad.isfinite().all() and tensors[1].grad.isfinite().all()


def test_a_scale_costs_no_memory_and_a_cap_one_chunk(monkeypatch):
    set_chunks(monkeypatch, CHUNK_TOKENS, MEMORY_VOCAB, 1)
    peaks = []
    for options in ({}, {"student_scale": 2.0}, {"student_softcap": 2.0}, {"teacher_softcap": 2.0}):
        p = problem(n=10 * CHUNK_TOKENS, vocab=(MEMORY_VOCAB, MEMORY_VOCAB), width=(8, 8)).leaves()
        tensors, biases = p.arguments()
        with Memory(p) as memory:
            linear_divergence(*tensors, **biases, **options).loss.backward()
        peaks.append(memory.peak)
    chunk = 4 * CHUNK_TOKENS * MEMORY_VOCAB
    assert peaks[1] == peaks[0] and peaks[3] == peaks[0]
    assert peaks[0] + 0.9 * chunk < peaks[2] < peaks[0] + 1.2 * chunk


def test_rows_of_linear_logits_are_scaled_and_capped():
    p = problem()
    product = head(p.student_hidden, p.student_weight, p.student_bias)
    for scale, softcap in ((1.0, None), (0.25, None), (1.0, 2.0), (3.0, 1.5)):
        logits = LinearLogits(p.student_hidden, p.student_weight, p.student_bias, scale, softcap).cut(30)
        expected = capped(product, scale, softcap)[[5, 2], :30]
        torch.testing.assert_close(logits.rows(torch.tensor([5, 2])).double(), expected, rtol=1e-6, atol=1e-6)


def tiny(name, **options):
    """A model of transformers with random weights: hidden states of its last layer, output weight, logits."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": 37, "pad_token_id": 0, "bos_token_id": 1}
    config = getattr(transformers, name + "Config")(**sizes, eos_token_id=2, initializer_range=0.5, **options)
    model = getattr(transformers, name + "ForCausalLM")(config).eval()
    with torch.no_grad():
        ids = torch.arange(3, 12).unsqueeze(0)
        hidden = model.model(ids).last_hidden_state[0]
        return hidden, model.get_output_embeddings().weight.detach(), model(ids).logits[0]


@pytest.mark.parametrize(
    ("name", "options", "scale", "softcap"),
    [
        ("Gemma2", {"final_logit_softcapping": 3.0}, 1.0, 3.0),
        ("Cohere", {"logit_scale": 0.0625}, 0.0625, None),
        ("Granite", {"logits_scaling": 8.0}, 1 / 8.0, None),
    ],
)
def test_logits_of_models_that_scale_or_cap_theirs(name, options, scale, softcap):
    hidden, weight, logits = tiny(name, **options)
    assert not torch.allclose(logits, hidden @ weight.T, rtol=0.05)  # what the head alone would say
    source = LinearLogits(hidden, weight, scale=scale, softcap=softcap)
    torch.testing.assert_close(source.rows(torch.arange(9)), logits, rtol=1e-5, atol=1e-5)
    p = problem(n=9)
    sides = {"scale": scale, "softcap": softcap}
    forward = linear_divergence(
        hidden, weight, p.teacher_hidden, p.teacher_weight, **{f"student_{k}": v for k, v in sides.items()}
    )
    reverse = linear_divergence(
        p.teacher_hidden, p.teacher_weight, hidden, weight, **{f"teacher_{k}": v for k, v in sides.items()}
    )
    log_model = log_probabilities(logits.double(), 1.0)
    log_other = log_probabilities(head(p.teacher_hidden, p.teacher_weight, None), 1.0)
    assert_values(forward.divergence, kl(log_model, log_other), 2 * FLOAT32)
    assert_values(reverse.divergence, kl(log_other, log_model), 2 * FLOAT32)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_errors_of_scales_and_caps(name, value):
    arguments = change(problem(), **{name: value})
    ending = " or None" if name.endswith("softcap") else ""
    with pytest.raises(ValueError, match=rf"{name}={value}: pass a positive number{ending}\."):
        linear_token_divergence(**arguments)
    del arguments["labels"]
    with pytest.raises(ValueError, match=rf"{name}={value}: pass a positive number"):
        linear_divergence(**arguments)
    p, option = problem(), name.split("_")[1]
    with pytest.raises(ValueError, match=rf"^{option}={value}: pass a positive number"):
        LinearLogits(p.student_hidden, p.student_weight, **{option: value})


# ----------------------------------------------------------------------------------------------------------------------
# divergences that a loss is built on later


def sources(p: Problem):
    """The student's head, and the teacher as hidden states and as logits, float32."""
    teacher = LinearLogits(p.teacher_hidden, p.teacher_weight, p.teacher_bias)
    return LinearLogits(p.student_hidden, p.student_weight, p.student_bias), (
        teacher,
        DenseLogits(teacher.rows(slice(None))),
    )


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize(("kind", "beta"), FEW)
def test_divergence_of_head_with_any_teacher(kind, beta, vocab):
    p, weights = problem(vocab=vocab).leaves(), weights_for(7)
    expected = truth(p, kind, beta, 1.3, weights)
    student, teachers = sources(p)
    for teacher in teachers:
        tokens = divergence_of_head(student, teacher, DivergenceSpec(kind, beta, 1.3), weights)
        assert [name for name in tokens._fields if getattr(tokens, name).requires_grad] == ["divergence"]
        loss = (tokens.divergence * weights).sum()
        actual = loss.detach(), tokens.divergence.detach(), torch.autograd.grad(loss, p.student())
        assert_same(actual, expected)


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_tokens_of_head_with_any_teacher(vocab):
    p, factors = problem(vocab=vocab).leaves(), factors_for(7)
    expected = token_truth(p, factors, "gkd", 0.3, 1.3, 0.8)
    student, teachers = sources(p)
    for teacher in teachers:
        out = tokens_of_head(student, teacher, DivergenceSpec("gkd", 0.3, 1.3), p.labels, 0.8)
        results = torch.stack((out.log_prob, out.entropy, out.tokens.divergence))
        gradients = torch.autograd.grad((results * factors).sum(), p.student())
        assert_same((results.detach(), gradients), expected)


@pytest.mark.parametrize("factor", [1.0, -0.5, 1024.0, 1e-6])
def test_a_loss_that_is_a_multiple_of_the_promised_one(factor):
    """As a trainer builds it: columns picked by a mask, a mean, a scale."""
    p, weights = problem().leaves(), torch.tensor([0.5, 0.0, 0.25, 0.25, 0.0, -0.5, 0.5])
    student, (teacher, _) = sources(p)
    tokens = divergence_of_head(student, teacher, DivergenceSpec(), weights)
    loss = factor * (tokens.divergence.double() * weights / 3.0).sum()
    expected = truth(p, weights=weights * factor / 3.0)[2]
    assert_gradients(torch.autograd.grad(loss, p.student()), expected, 5 * FLOAT32)


@pytest.mark.parametrize(
    "used",
    [
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
        [1.0, 0.5, 0.0, 0.25, 1.0, 1.0, 1.001],
        [1.0, 0.5, 0.01, 0.25, 1.0, 1.0, 1.0],
        [0.0, 0.5, 0.0, 0.25, 1.0, 1.0, 1.0],
        [1.0, 0.5, math.nan, 0.25, 1.0, 1.0, 1.0],
    ],
)
def test_a_loss_that_breaks_the_promise_is_refused(used):
    p, weights = problem().leaves(), torch.tensor([1.0, 0.5, 0.0, 0.25, 1.0, 1.0, 1.0])
    student, (teacher, _) = sources(p)
    tokens = divergence_of_head(student, teacher, DivergenceSpec(), weights)
    loss = (tokens.divergence * torch.tensor(used)).sum()
    with pytest.raises(RuntimeError, match=r"the loss weighs token \d with .*, and token_weights promised .*: build"):
        loss.backward()
    assert p.student_weight.grad is None


def test_roundings_of_the_promised_weights_are_allowed():
    p, weights = problem().leaves(), weights_for(7)
    student, (teacher, _) = sources(p)
    tokens = divergence_of_head(student, teacher, DivergenceSpec(), weights)
    (tokens.divergence * (weights * (1.0 + 5e-5 * torch.linspace(-1.0, 1.0, 7)))).sum().backward()
    assert_gradients([tensor.grad for tensor in p.student()], truth(p, weights=weights)[2], 1e-4)


def test_weights_of_zero_give_gradients_of_zero():
    p, weights = problem().leaves(), torch.zeros(7)
    student, (teacher, _) = sources(p)
    tokens = divergence_of_head(student, teacher, DivergenceSpec(), weights)
    (tokens.divergence * weights).sum().backward(retain_graph=True)
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in p.student())
    tokens = divergence_of_head(student, teacher, DivergenceSpec(), weights)
    with pytest.raises(RuntimeError, match="token_weights promised 0"):
        tokens.divergence.sum().backward()


def test_no_tokens_of_a_head():
    p = problem(n=0).leaves()
    student, (teacher, _) = sources(p)
    divergence_of_head(student, teacher, DivergenceSpec(), torch.zeros(0)).divergence.sum().backward()
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in p.student())


@pytest.mark.parametrize("scale", [math.inf, math.nan])
def test_an_overflow_of_a_scaled_loss_reaches_the_gradients(scale):
    """A gradient scaler looks for it there, and skips the step."""
    p, weights = problem().leaves(), weights_for(7)
    student, (teacher, _) = sources(p)
    tokens = divergence_of_head(student, teacher, DivergenceSpec(), weights)
    (scale * (tokens.divergence * weights).sum()).backward()
    assert not any(tensor.grad.isfinite().any() for tensor in p.student())


def test_second_backward_of_head_divergences_is_refused():
    p, weights = problem().leaves(), weights_for(7)
    student, (teacher, _) = sources(p)
    loss = (divergence_of_head(student, teacher, DivergenceSpec(), weights).divergence * weights).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward through one result.*call divergence_of_head again"):
        loss.backward()


def test_head_divergences_without_gradients_make_no_gradient_products():
    p = problem().leaves()
    student, (teacher, _) = sources(p)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tokens = divergence_of_head(student, teacher, DivergenceSpec(), torch.ones(7))
    assert not tokens.divergence.requires_grad
    assert counter.get_total_flops() == 2 * 7 * 37 * (6 + 9)


def test_errors_of_heads():
    p = problem()
    student, (teacher, _) = sources(p)
    few = LinearLogits(p.teacher_hidden[:5], p.teacher_weight)
    with pytest.raises(ValueError, match="the head has 7 tokens, the teacher 5: pass the same"):
        divergence_of_head(student, few, DivergenceSpec(), torch.ones(7))
    with pytest.raises(ValueError, match="the head has 7 tokens, the teacher 5: pass the same"):
        tokens_of_head(student, few, DivergenceSpec(), p.labels)
    with pytest.raises(ValueError, match=r"token_weights has shape \(6,\): pass one value per token, \(7,\)"):
        divergence_of_head(student, teacher, DivergenceSpec(), torch.ones(6))
    with pytest.raises(ValueError, match=r"distillation_type='jsd': choose one of "):
        divergence_of_head(student, teacher, DivergenceSpec("jsd"), torch.ones(7))
    with pytest.raises(ValueError, match="labels are torch.int32: pass int64 token ids"):
        tokens_of_head(student, teacher, DivergenceSpec(), p.labels.int())


# ----------------------------------------------------------------------------------------------------------------------
# vocabularies of different sizes


@pytest.mark.parametrize(("kind", "beta"), FEW)
def test_gradients_beyond_the_shared_prefix_are_zero(kind, beta):
    p = problem(vocab=(37, 29))
    _, _, (_, weight, bias) = run(p, kind, beta)
    assert weight[29:].count_nonzero() == bias[29:].count_nonzero() == 0
    assert (weight[:29] != 0).all() and (bias[:29] != 0).all()


@pytest.mark.parametrize("vocab", [(37, 29), (29, 37)])
@pytest.mark.parametrize(("kind", "beta"), FEW)
def test_what_lies_beyond_the_shared_prefix_does_not_matter(kind, beta, vocab):
    p, weights = problem(vocab=vocab), weights_for(7)

    def spoiled(name, tensor):
        tensor = tensor.clone()
        if name.endswith(("weight", "bias")):
            tensor[29:] = math.nan
        return tensor

    expected, actual = (run(q, kind, beta, weights=weights) for q in (p, p.map(spoiled)))
    for mine, true in zip((*actual[:2], *actual[2]), (*expected[:2], *expected[2]), strict=True):
        assert torch.equal(mine, true)


def test_log_prob_of_a_label_that_the_teacher_lacks():
    p = replace(problem(n=2, vocab=(37, 29)), labels=torch.tensor([36, 30]))
    factors = factors_for(2)
    actual = run_tokens(p, factors)
    assert_same(actual, token_truth(p, factors))
    _, weight, _ = actual[1]
    assert (weight[29:] != 0).all()  # log_prob and entropy know the whole vocabulary


# ----------------------------------------------------------------------------------------------------------------------
# token weights


@pytest.mark.parametrize(("kind", "beta"), FEW)
def test_no_weights_take_the_mean(kind, beta):
    p = problem()
    assert_same(run(p, kind, beta), truth(p, kind, beta))


@pytest.mark.parametrize(
    "weights",
    [
        torch.zeros(7),
        -torch.ones(7),
        torch.full((7,), 1e-6),
        torch.full((7,), 1e-30),
        torch.full((7,), 1e30),
        torch.tensor([1e-6, 1.0, -3.0, 0.0, 1e3, -1e-3, 0.5]),
        torch.tensor([0.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0]),
        torch.tensor([True, False, True, True, False, False, True]),
        torch.arange(7),
        torch.full((7,), 1 / 7, dtype=torch.float64),
    ],
    ids=lambda weights: f"{weights.dtype}-{weights[0]}",
)
def test_token_weights(weights):
    p = problem()
    loss, values, gradients = run(p, weights=weights)
    expected = truth(p, weights=weights)
    assert_values(values, expected[1], FLOAT32)
    terms = (weights.double() * expected[1]).abs().sum().item()
    assert loss.item() == pytest.approx(expected[0].item(), rel=FLOAT32, abs=FLOAT32 * terms)
    assert_gradients(gradients, expected[2], 5 * FLOAT32)


@pytest.mark.parametrize("dtype", HALF)
def test_tiny_weights_do_not_cost_half_precision_its_gradients(dtype):
    """1e-6 is not a normal float16, its products with probabilities are zero. A scaled loss finds them unharmed."""
    p, n, loss_scale = problem(n=64, dtype=dtype, scale=0.5).leaves(), 64, 2.0**16
    weights = torch.full((n,), 1e-6)
    tensors, biases = p.arguments()
    out = linear_divergence(*tensors, **biases, token_weights=weights)
    gradients = torch.autograd.grad(out.loss * loss_scale, p.student())
    assert_gradients(gradients, truth(p, weights=weights * loss_scale)[2], 4 * HALF[dtype])


def test_token_weights_get_no_gradient():
    p, weights = problem().leaves(), torch.ones(7, requires_grad=True)
    tensors, biases = p.arguments()
    linear_divergence(*tensors, **biases, token_weights=weights).loss.backward()
    assert weights.grad is None and weights.tolist() == [1.0] * 7


# ----------------------------------------------------------------------------------------------------------------------
# sizes at their ends


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weights", [None, torch.zeros(0)])
@pytest.mark.parametrize(("kind", "beta"), FEW)
def test_no_tokens(kind, beta, weights, bias):
    loss, values, gradients = run(problem(n=0, bias=bias), kind, beta, weights=weights)
    assert loss.item() == 0.0 and values.shape == (0,)
    assert [tuple(gradient.shape) for gradient in gradients] == [(0, 6), (37, 6), (37,)][: len(gradients)]
    assert all(gradient.count_nonzero() == 0 for gradient in gradients)


@pytest.mark.parametrize(("kind", "beta"), FEW)
def test_no_tokens_per_token(kind, beta):
    results, gradients = run_tokens(problem(n=0), factors_for(0), kind, beta)
    assert results.shape == (3, 0)
    assert all(gradient.count_nonzero() == 0 for gradient in gradients)


@pytest.mark.parametrize("vocab", [(1, 1), (2, 2), (2, 1), (1, 2), (3, 3), (5, 7)])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_small_sizes(kind, beta, n, vocab):
    p = problem(n=n, vocab=vocab, width=(1, 2))
    assert_same(run(p, kind, beta), truth(p, kind, beta), scale=0.1)
    factors = factors_for(n)
    assert_same(run_tokens(p, factors, kind, beta), token_truth(p, factors, kind, beta), scale=0.1)


# ----------------------------------------------------------------------------------------------------------------------
# extreme logits


def integer_problem(low, high, seed=0, dtype=torch.float32):
    """Logits that are integers up to about +-1e4, so that no product is rounded."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weights = (torch.randint(low, high, (5, 3), generator=generator).to(dtype) for _ in range(2)), []
    for _ in range(2):
        weights.append(torch.randint(low, high, (23, 3), generator=generator).to(dtype))
    student_hidden, teacher_hidden = hidden
    labels = torch.randint(23, (5,), generator=generator)
    return Problem(student_hidden, weights[0], None, teacher_hidden, weights[1], None, labels)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_logits_of_ten_thousand(kind, beta, seed, temperature):
    p, weights = integer_problem(-57, 58, seed), weights_for(5)
    extreme = head(p.student_hidden, p.student_weight, None).abs().max()
    assert 3e3 < extreme < 1e4
    assert_same(run(p, kind, beta, temperature, weights), truth(p, kind, beta, temperature, weights), scale=1.0)
    factors = factors_for(5)
    actual = run_tokens(p, factors, kind, beta, temperature=temperature)
    assert_same(actual, token_truth(p, factors, kind, beta, temperature), scale=1.0)


def test_ten_thousand_in_closed_form():
    """The student is certain of entry 0, the teacher of entry 1, by 2e4 nats each."""
    hidden = torch.ones(1, 1, requires_grad=True)
    weight = torch.tensor([[1e4], [-1e4]])
    out = linear_divergence(hidden, weight, -torch.ones(1, 1), weight)
    assert out.loss.item() == pytest.approx(2e4)
    assert out.metrics.forward_kl.item() == pytest.approx(2e4)
    assert out.metrics.top1_agreement.item() == 0.0
    out.loss.backward()
    assert hidden.grad.item() == 0.0


def masked(p: Problem, student=(), teacher=()):
    """Logits of -inf, from the biases."""
    changed = {}
    for name, entries in (("student_bias", student), ("teacher_bias", teacher)):
        changed[name] = getattr(p, name).clone()
        changed[name][list(entries)] = -math.inf
    return replace(p, **changed)


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize(
    ("student", "teacher"),
    [((3, 8), ()), ((), (3, 8)), ((3, 8), (3, 8)), ((3, 8), (8, 11)), (range(1, 29), ()), ((), range(1, 29))],
    ids=["student", "teacher", "both", "some_both", "student_all_but_some", "teacher_all_but_some"],
)
@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_masked_entries(kind, beta, student, teacher, vocab):
    """Finite, and equal to the table with LOG_ZERO for log 0."""
    p, weights = masked(problem(vocab=vocab), student, teacher), weights_for(7)
    loss, values, gradients = run(p, kind, beta, weights=weights)
    expected_values, expected_gradients = table_truth(p, kind, beta, weights)
    assert loss.isfinite()
    assert_values(values, expected_values, FLOAT32)
    scale = FLOAT32 * expected_values.abs().max().item()
    assert_gradients(gradients, expected_gradients, 5 * FLOAT32, scale / FLOAT32)


@pytest.mark.parametrize(("kind", "beta"), FEW)
def test_an_entry_that_both_mask_is_an_entry_less(kind, beta):
    """Equal to the problem without that row of the weights; the gradient of the masked row is exactly zero."""
    p, weights = problem(), weights_for(7)
    keep = [v for v in range(37) if v != 5]
    without = p.map(lambda name, tensor: tensor if name.endswith("hidden") else tensor[keep])
    _, values, (hidden, weight, bias) = run(masked(p, [5], [5]), kind, beta, weights=weights)
    expected = run(without, kind, beta, weights=weights)
    torch.testing.assert_close(values, expected[1], rtol=1e-5, atol=1e-6)
    assert weight[5].count_nonzero() == bias[5].count_nonzero() == 0
    assert_gradients((hidden, weight[keep], bias[keep]), expected[2], 5 * FLOAT32)


def test_mass_where_the_teacher_has_none_costs_log_zero():
    """Uniform student over four entries, teacher over two of them: (1/4) log ((1/4) / (1/2)) and LOG_ZERO for 0."""
    mask = torch.tensor([0.0, 0.0, -math.inf, -math.inf])
    zeros = torch.zeros(1, 1), torch.zeros(4, 1)
    out = linear_divergence(*zeros, *zeros, teacher_bias=mask)
    expected = 2 * 0.25 * math.log(0.5) + 2 * 0.25 * (math.log(0.25) - LOG_ZERO)
    assert out.loss.item() == pytest.approx(expected, rel=1e-6)
    assert out.metrics.forward_kl.item() == pytest.approx(math.log(2.0), rel=1e-6)
    assert out.metrics.teacher_entropy.item() == pytest.approx(math.log(2.0), rel=1e-6)


@pytest.mark.parametrize("student", [(3, 8), range(1, 37)], ids=["few", "all_but_one"])
@pytest.mark.parametrize(("kind", "beta"), FEW)
def test_masked_entries_per_token(kind, beta, student):
    """A label that the student masks has the log-probability LOG_ZERO; entropies count no masked entry."""
    p = masked(replace(problem(n=3), labels=torch.tensor([0, 3, 8])), student, (8, 11))
    results, gradients = run_tokens(p, torch.ones(3, 3), kind, beta)
    assert results.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)
    assert results[0, 1:].tolist() == pytest.approx([LOG_ZERO] * 2)
    q = head(p.student_hidden, p.student_weight, p.student_bias).softmax(-1)
    assert results[0, 0].item() == pytest.approx(q[0, 0].log().item(), rel=1e-5, abs=1e-6)
    assert_values(results[1], -torch.special.xlogy(q, q).sum(-1), FLOAT32)
    assert_values(results[2], table_truth(p, kind, beta, torch.ones(3))[0], FLOAT32)


def test_log_prob_gradient_with_masked_entries():
    """1[v = a] - p_v, also where p_a = 0; nothing from the entropy of a masked entry."""
    p = masked(replace(problem(n=2, bias=True), labels=torch.tensor([0, 3])), (3, 8))
    q = head(p.student_hidden, p.student_weight, p.student_bias).softmax(-1)
    for row, factors in enumerate(torch.eye(3)[:2]):
        _, (_, _, bias) = run_tokens(p, factors[:, None].expand(3, 2))
        if row == 0:
            expected = (torch.nn.functional.one_hot(p.labels, 37) - q).sum(0)
        else:
            slope = torch.special.xlogy(q, q)
            expected = -(slope - q * slope.sum(-1, keepdim=True)).sum(0)
        torch.testing.assert_close(bias.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [*HALF, torch.float64])
@pytest.mark.parametrize(("kind", "beta"), FEW)
def test_masked_entries_in_other_dtypes_are_finite(kind, beta, dtype):
    p = masked(problem(dtype=dtype), (3, 8), (8, 11))
    loss, values, gradients = run(p, kind, beta)
    results, token_gradients = run_tokens(p, torch.ones(3, 7, dtype=loss.dtype), kind, beta)
    assert all(tensor.isfinite().all() for tensor in (loss, values, results, *gradients, *token_gradients))


# ----------------------------------------------------------------------------------------------------------------------
# chunks, batches and memory


@pytest.mark.parametrize("cached_tokens", [1, 2, 100])
@pytest.mark.parametrize("tokens", [1, 2, 3, 5])
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize(("kind", "beta"), FEW)
def test_chunks_change_nothing(kind, beta, vocab, tokens, cached_tokens, monkeypatch):
    p, weights, factors = problem(vocab=vocab), weights_for(7), factors_for(7)
    whole = run(p, kind, beta, weights=weights), run_tokens(p, factors, kind, beta)
    set_chunks(monkeypatch, tokens, 37, cached_tokens)
    assert_same(run(p, kind, beta, weights=weights), whole[0])
    assert_same(run_tokens(p, factors, kind, beta), whole[1])


@pytest.mark.parametrize("elements", [1, 36, 37, 38])
def test_chunks_of_less_than_a_token(elements, monkeypatch):
    p, factors = problem(dtype=(torch.float32, torch.bfloat16)), factors_for(7)
    whole = run(p), run_tokens(p, factors)
    monkeypatch.setattr(divergence_module, "CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(divergence_module, "CACHED_BLOCK_ELEMENTS", elements)
    assert_same(run(p), whole[0])
    assert_same(run_tokens(p, factors), whole[1])


@pytest.mark.parametrize(
    "chunking", [Chunking(3, 3), Chunking(2, 4), Chunking(3, 5), Chunking(16, 16), Chunking(4, 64)]
)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("caps", [{}, {"student_softcap": 2.0, "student_scale": 1.5}])
def test_groups_of_chunks_change_nothing(caps, dtype, chunking):
    """Of 11 tokens, some groups end with a shorter chunk, or are shorter themselves; 16-bit gradients are collected."""
    p, weights, factors = problem(n=11, dtype=dtype), weights_for(11), factors_for(11)

    def both(chunking):
        q = p.leaves()
        tensors, biases = q.arguments()
        out = linear_divergence(*tensors, **biases, **caps, token_weights=weights, chunking=chunking)
        pure = torch.autograd.grad(out.loss, q.student())
        log_prob, entropy, tokens = tokens_of(q, **caps, chunking=chunking)
        results = torch.stack((log_prob, entropy, tokens.divergence))
        hybrid = torch.autograd.grad((results * factors).sum(), q.student())
        return out.divergence, results.detach(), (*pure, *hybrid)

    # One rounding of each gradient, and sums in another order.
    tolerance = FLOAT32 if dtype == torch.float32 else HALF[dtype]
    assert_same(both(chunking), both(Chunking(11, 11)), tolerance)


def test_a_group_has_one_product_with_the_hidden_states(monkeypatch):
    """Which is what it is for: a product reads and writes the whole sum."""
    calls = []
    monkeypatch.setattr(head_module, "_add_product_", lambda total, a, b: calls.append(b.shape[0]))
    p = problem(n=11, dtype=torch.bfloat16).leaves()
    tensors, biases = p.arguments()
    linear_divergence(*tensors, **biases, chunking=Chunking(2, 4)).loss.backward()
    assert calls == [4, 4, 3]


def test_the_number_of_tokens_gives_buffers_few_sizes():
    """An allocator that keeps blocks by their size would have one more for each micro-batch of a dynamic batch."""
    sizes, target, chunking = [], DenseLogits(torch.zeros(1300, 48)), Chunking(512, 1024)
    for tokens in range(1, 1300, 29):
        student = LinearLogits(torch.zeros(tokens, 2, dtype=torch.bfloat16), torch.zeros(48, 2, dtype=torch.bfloat16))
        teacher = target.tokens(torch.arange(tokens))
        gradients = head_module._HeadGradients(student, (True, True, False))
        target_of_tokens = head_module._Target.of(student, teacher, DivergenceSpec())
        group = next(head_module._token_groups(student, target_of_tokens, chunking, gradients))
        buffers = group.chunks[0].student, group.gradient
        sizes.append(tuple(buffer.untyped_storage().nbytes() // (48 * buffer.itemsize) for buffer in buffers))
        assert sizes[-1][0] >= len(group.chunks[0].gradient) and sizes[-1][1] >= len(group.gradient)
    assert set(sizes) == {(256, 256), (512, 512), (512, 768), (512, 1024)}


def test_rows_of_logits_begin_at_multiples_of_16_entries(monkeypatch):
    """So that a kernel loads vectors of 16 bytes, whatever the vocabulary, and of what is left of a shared one too."""
    strides = []

    def watched(student, teacher, spec, temperatures, weights, gradient):
        strides.extend((side.stride(0) % 16, side.data_ptr() % 16) for side in (student, teacher, gradient))
        return divergence_module.divergence_rows_(student, teacher, spec, temperatures, weights, gradient)

    monkeypatch.setattr(head_module, "implementation", lambda student, spec: SimpleNamespace(divergence_rows_=watched))
    p = problem(n=11, dtype=torch.bfloat16).leaves()
    student, (teacher, _) = sources(p)
    for ids in (None, range(29), range(37), [0, 3, 5]):
        said = teacher
        if ids is not None:
            shared = SharedVocabulary.of(ids)
            said = InSharedVocabulary(SharedLogits(teacher, shared, 1.0), shared, 37)
        divergence_of_head(student, said, DivergenceSpec(), weights_for(11), Chunking(3, 5))
    assert len(strides) == 4 * 5 * 3 and set(strides) == {(0, 0)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_in_blocks_is_the_product(dtype, monkeypatch):
    """What a device does whose torch has no product that adds 16-bit factors to a float32 sum, and a processor."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(37, 5, generator=generator).to(dtype), torch.randn(5, 6, generator=generator).to(dtype))
    total = torch.randn(37, 6, generator=generator)
    expected = total.double() + a.double() @ b.double()
    monkeypatch.setattr(divergence_module, "CHUNK_ELEMENTS", 4 * 6 * 8)
    head_module._add_product_in_blocks_(total, a, b)
    assert (total - expected).abs().max() <= HALF[dtype] * expected.abs().max()


def test_chunks_of_half_precision_weights_are_summed_in_float32(monkeypatch):
    """One token a chunk and 512 tokens: sums in bfloat16 would be off by several of its roundings."""
    p = problem(n=512, dtype=torch.bfloat16)
    set_chunks(monkeypatch, 1, 37)
    _, _, (_, weight, bias) = run(p)
    _, _, (_, expected_weight, expected_bias) = truth(p)
    assert_gradients((weight, bias), (expected_weight, expected_bias), HALF[torch.bfloat16])


def test_gradients_of_split_batches_add_up():
    p, weights = problem(), weights_for(7)
    loss, values, (hidden, weight, bias) = run(p, "gkd", 0.5, weights=weights)
    parts = []
    for rows in (slice(0, 3), slice(3, 3), slice(3, 7)):
        part = replace(p, student_hidden=p.student_hidden[rows], teacher_hidden=p.teacher_hidden[rows])
        parts.append(run(part, "gkd", 0.5, weights=weights[rows]))
    torch.testing.assert_close(sum(part[0] for part in parts), loss)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), values)
    torch.testing.assert_close(torch.cat([part[2][0] for part in parts]), hidden)
    torch.testing.assert_close(sum(part[2][1] for part in parts), weight)
    torch.testing.assert_close(sum(part[2][2] for part in parts), bias)


class Memory(TorchDispatchMode):
    """Bytes of the storages that operations have made: the peak of those alive together, and the largest."""

    def __init__(self, p: Problem):
        super().__init__()
        tensors, biases = p.arguments()
        self._inputs = {tensor.untyped_storage().data_ptr() for tensor in (*tensors, *biases.values())}
        self._storages, self.peak, self.largest = {}, 0, 0

    def alive(self) -> int:
        self._storages = {k: v for k, v in self._storages.items() if not v[0].expired()}
        return sum(size for _, size in self._storages.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self._inputs:
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self._storages[reference.cdata] = reference, storage.nbytes()
                self.largest = max(self.largest, storage.nbytes())
        self.peak = max(self.peak, self.alive())
        return result


MEMORY_VOCAB, CHUNK_TOKENS = 1008, 16  # a multiple of 16 entries, so that rows need no padding


def one_pass(p: Problem, **options):
    tensors, biases = p.arguments()
    linear_divergence(*tensors, **biases, distillation_type="gkd", beta=0.5, **options).loss.backward()


def token_pass(p: Problem, **options):
    out = tokens_of(p, distillation_type="gkd", beta=0.5, **options)
    (out.log_prob + out.entropy + out.tokens.divergence).sum().backward()


def memory_of(step, n, dtype, vocab):
    p = problem(n=n, vocab=vocab, width=(8, 8), dtype=dtype).leaves()
    with Memory(p) as memory:
        step(p)
    return memory


@pytest.mark.parametrize("vocab", [(MEMORY_VOCAB, MEMORY_VOCAB), (MEMORY_VOCAB, 900), (900, MEMORY_VOCAB)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", [one_pass, token_pass])
def test_memory_is_independent_of_the_number_of_tokens(step, dtype, vocab, monkeypatch):
    set_chunks(monkeypatch, CHUNK_TOKENS, vocab[0], 2)
    few, many = (memory_of(step, CHUNK_TOKENS * chunks, dtype, vocab) for chunks in (2, 40))
    chunk = 4 * CHUNK_TOKENS * MEMORY_VOCAB
    # No copy of a weight, no logits of more than a chunk. (Chunks of nearly equal length: few may have smaller ones.)
    assert few.largest <= many.largest <= chunk
    # Per token: the hidden states' gradient and a few of its rows, results, weights, labels.
    per_token = 4 * (3 * 8 + 40)
    assert many.peak - few.peak <= 38 * CHUNK_TOKENS * per_token
    assert many.peak < 6 * chunk


def test_results_keep_no_gradients_alive():
    """A trainer keeps metrics for long. They hold (n,) each, not the gradients that wait for a backward."""
    p = problem(n=8, vocab=(MEMORY_VOCAB, MEMORY_VOCAB)).leaves()
    with Memory(p) as memory:
        tensors, biases = p.arguments()
        out = linear_divergence(*tensors, **biases)
        assert memory.alive() > 4 * MEMORY_VOCAB
        divergence, metrics = out.divergence, out.metrics
        del out
        assert memory.alive() <= 4 * 8 * len(TokenDivergence._fields)
    assert divergence.grad_fn is None and not any(tensor.requires_grad for tensor in metrics)


def test_backward_hands_its_gradients_over():
    p = problem(n=8, vocab=(MEMORY_VOCAB, MEMORY_VOCAB)).leaves()
    tensors, biases = p.arguments()
    out = linear_divergence(*tensors, **biases)
    with Memory(p) as memory:
        out.loss.backward()
        for tensor in p.student():
            tensor.grad = None
        assert memory.alive() <= 64  # the loss is alive, its gradients are not


# ----------------------------------------------------------------------------------------------------------------------
# autograd


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", [("student_hidden",), ("student_weight",), ("student_bias",), ()])
def test_only_requested_gradients_are_computed(names, dtype):
    """LoRA and frozen heads: a frozen weight costs neither its product nor its memory."""
    vocab = (MEMORY_VOCAB, MEMORY_VOCAB)
    everything, p = (problem(vocab=vocab, dtype=dtype).leaves(*which) for which in ((), (names,)))
    one_pass(everything)
    with Memory(p) as memory:
        tensors, biases = p.arguments()
        out = linear_divergence(*tensors, **biases, distillation_type="gkd", beta=0.5)
        assert out.loss.requires_grad == bool(names)
        if "student_weight" not in names:
            assert memory.alive() < 4 * MEMORY_VOCAB * 6
    if names:
        out.loss.backward()
    for name in ("student_hidden", "student_weight", "student_bias"):
        mine, full = getattr(p, name).grad, getattr(everything, name).grad
        assert torch.equal(mine, full) if name in names else mine is None


@pytest.mark.parametrize("names", [("student_hidden",), ("student_weight",), ("student_bias",), ()])
def test_only_requested_gradients_are_computed_per_token(names):
    everything, p = (problem().leaves(*which) for which in ((), (names,)))
    token_pass(everything)
    out = tokens_of(p, distillation_type="gkd", beta=0.5)
    loss = (out.log_prob + out.entropy + out.tokens.divergence).sum()
    assert loss.requires_grad == bool(names)
    if names:
        loss.backward()
    for name in ("student_hidden", "student_weight", "student_bias"):
        mine, full = getattr(p, name).grad, getattr(everything, name).grad
        assert torch.equal(mine, full) if name in names else mine is None


def test_results_without_gradients():
    p = problem().leaves()
    with torch.no_grad():
        tensors, biases = p.arguments()
        out, tokens = linear_divergence(*tensors, **biases), tokens_of(p)
    assert not any(tensor.requires_grad for tensor in tree_leaves((out, tokens)))
    expected = truth(p)
    assert_values(out.divergence, expected[1], FLOAT32)
    assert_values(tokens.tokens.divergence, expected[1], FLOAT32)


def test_gradients_flow_to_a_low_rank_adapter():
    """The weight is W + B A, as in LoRA; and the hidden states come from a layer."""
    p = problem(bias=False, dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    factors = [
        torch.randn(*shape, generator=generator).double().requires_grad_() for shape in ((37, 2), (2, 6), (6, 6))
    ]

    def student(b, a, layer):
        return replace(p, student_weight=p.student_weight + b @ a, student_hidden=torch.tanh(p.student_hidden @ layer))

    tensors, _ = student(*factors).arguments()
    actual = torch.autograd.grad(linear_divergence(*tensors, token_weights=torch.ones(7)).loss, factors)
    expected = torch.autograd.grad(kl(*shared_log_probabilities(student(*factors), 1.0)).sum(), factors)
    assert_gradients(actual, expected, FLOAT64)


@pytest.mark.parametrize("step", [one_pass, token_pass])
def test_teacher_gets_no_gradient(step):
    p = problem().leaves()
    teacher = [tensor.requires_grad_() for tensor in (p.teacher_hidden, p.teacher_weight, p.teacher_bias)]
    step(p)
    assert all(tensor.grad is None for tensor in teacher)
    assert all(tensor.grad is not None for tensor in p.student())


@pytest.mark.parametrize("step", [one_pass, token_pass])
def test_teacher_may_share_the_students_tensors(step):
    """Self-distillation: the gradient is that of the student's part alone."""
    p = problem()
    apart = replace(p, teacher_weight=p.student_weight.clone(), teacher_hidden=p.student_hidden.flip(0)).leaves()
    shared = apart.leaves()
    shared = replace(shared, teacher_weight=shared.student_weight, teacher_hidden=shared.student_hidden.flip(0))
    for q in (apart, shared):
        step(q)
    for mine, true in zip(shared.student(), apart.student(), strict=True):
        assert torch.equal(mine.grad, true.grad)


def test_second_backward_is_refused():
    p = problem().leaves()
    tensors, biases = p.arguments()
    loss = linear_divergence(*tensors, **biases).loss
    loss.backward(retain_graph=True)
    first = p.student_weight.grad.clone()
    with pytest.raises(RuntimeError, match="second backward through one result.*call linear_divergence again"):
        loss.backward()
    assert torch.equal(p.student_weight.grad, first)


def test_second_backward_per_token_gives_the_same():
    p = problem().leaves()
    out = tokens_of(p)
    loss = (out.log_prob - out.tokens.divergence).sum()
    first, second = (torch.autograd.grad(loss, p.student(), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_backward_adds_to_gradients_that_are_there():
    p = problem().leaves()
    one_pass(p)
    once = [tensor.grad.clone() for tensor in p.student()]
    one_pass(p)
    for tensor, gradient in zip(p.student(), once, strict=True):
        torch.testing.assert_close(tensor.grad, 2 * gradient)


@pytest.mark.parametrize("factor", [0.0, 1e-3, -2.0, 65536.0])
def test_a_factor_of_the_loss_is_a_factor_of_the_gradients(factor):
    p = problem().leaves()
    tensors, biases = p.arguments()
    gradients = torch.autograd.grad(factor * linear_divergence(*tensors, **biases).loss, p.student())
    expected = [factor * gradient for gradient in truth(p)[2]]
    assert_gradients(gradients, expected, 5 * FLOAT32)


def test_nothing_is_differentiable_twice():
    p = problem().leaves()
    tensors, biases = p.arguments()
    loss = torch.ones((), requires_grad=True) * linear_divergence(*tensors, **biases).loss
    (gradient,) = torch.autograd.grad(loss, p.student_hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("absent", ["log_prob", "entropy", "divergence"])
def test_a_result_that_the_loss_does_not_use_costs_no_gradient(absent):
    p = problem().leaves()
    out = tokens_of(p)
    results = {"log_prob": out.log_prob, "entropy": out.entropy, "divergence": out.tokens.divergence}
    factors = torch.tensor([[float(name != absent)] * 7 for name in results])
    loss = sum(value.sum() for name, value in results.items() if name != absent)
    assert_gradients(torch.autograd.grad(loss, p.student()), token_truth(p, factors)[1], 5 * FLOAT32)


@pytest.mark.parametrize("step", [run, run_tokens])
def test_inputs_are_left_alone(step):
    p = problem(vocab=(37, 29)).leaves()
    before = p.leaves()
    step(p, *([factors_for(7)] if step is run_tokens else []), temperature=1.3)
    for field in fields(p):
        assert torch.equal(getattr(p, field.name), getattr(before, field.name))


def test_inputs_need_not_be_contiguous():
    p, weights = problem(), weights_for(7)

    def strided(name, tensor):
        return tensor if tensor.dim() == 1 else tensor.T.contiguous().T

    expected = run(p, weights=weights), run_tokens(p, factors_for(7))
    p = p.map(strided)
    assert not p.student_hidden.is_contiguous()
    assert_same(run(p, weights=weights), expected[0])
    assert_same(run_tokens(p, factors_for(7)), expected[1])


def test_one_hidden_state_expanded_to_all_tokens():
    p = problem()
    hidden = p.student_hidden[:1].clone().requires_grad_()
    tensors, biases = replace(p, student_hidden=hidden.expand(7, 6)).arguments()
    (gradient,) = torch.autograd.grad(linear_divergence(*tensors, **biases).loss, hidden)
    expected = truth(replace(p, student_hidden=p.student_hidden[:1].repeat(7, 1)))[2][0].sum(0, keepdim=True)
    assert_gradients((gradient,), (expected,), 5 * FLOAT32)


# ----------------------------------------------------------------------------------------------------------------------
# statistics, and agreement with the dense path


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize(("kind", "beta"), FEW)
def test_statistics(kind, beta, vocab, temperature):
    p = problem(vocab=vocab)
    log_s, log_t = shared_log_probabilities(p, temperature)
    expected = TokenDivergence(
        divergence=definition(kind, beta, log_s, log_t),
        reverse_kl=kl(log_s, log_t),
        forward_kl=kl(log_t, log_s),
        student_entropy=-(log_s.exp() * log_s).sum(-1),
        teacher_entropy=-(log_t.exp() * log_t).sum(-1),
        top1_agreement=(log_s.argmax(-1) == log_t.argmax(-1)).double(),
    )
    options = {"distillation_type": kind, "beta": beta, "temperature": temperature}
    tensors, biases = p.arguments()
    out = linear_divergence(*tensors, **biases, **options)
    for metrics in (out.metrics, tokens_of(p, **options).tokens):
        for name, mine, true in zip(metrics._fields, metrics, expected, strict=True):
            assert mine.shape == (7,), name
            assert_values(mine, true, FLOAT32)
    assert torch.equal(out.divergence, out.metrics.divergence)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_agrees_with_the_divergence_of_dense_logits(kind, beta, temperature, dtype):
    p, weights = problem(dtype=dtype), weights_for(7, dtype=dtype)
    dense = p.leaves()
    logits, index = dense.student_hidden @ dense.student_weight.T + dense.student_bias, torch.arange(7)
    teacher = DenseLogits(p.teacher_hidden @ p.teacher_weight.T + p.teacher_bias)
    spec = DivergenceSpec(kind, beta, temperature)
    expected = token_divergence(logits, index, teacher, index, spec)
    loss = (expected.divergence * weights).sum()
    gradients = torch.autograd.grad(loss, dense.student())
    tolerance = FLOAT32 if dtype == torch.float32 else FLOAT64
    dense_results = loss.detach(), expected.divergence.detach(), gradients
    assert_same(run(p, kind, beta, temperature, weights), dense_results, tolerance)
    factors = torch.stack((torch.zeros(7), torch.zeros(7), weights)).to(dtype)
    results, gradients = run_tokens(p, factors, kind, beta, temperature=temperature)
    assert_same((results[2], gradients), dense_results[1:], tolerance)


@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_not_negative(kind, beta):
    """Where both sides are almost the same, rounding may go below zero by its own size and no more."""
    for distance in (0.0, 1e-6, 1e-3):
        p = problem(n=64, scale=5.0)
        p = replace(p, teacher_hidden=p.student_hidden + distance, teacher_weight=p.student_weight)
        p = replace(p, teacher_bias=p.student_bias)
        _, values, _ = run(p, kind, beta)
        assert values.min() > -1e-6


# ----------------------------------------------------------------------------------------------------------------------
# autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "beta"), FEW)
def test_autocast_changes_nothing(kind, beta, dtype):
    p, weights, factors = problem(), weights_for(7), factors_for(7)
    expected = run(p, kind, beta, weights=weights), run_tokens(p, factors, kind, beta)
    with torch.autocast("cpu", dtype=dtype):
        actual = run(p, kind, beta, weights=weights), run_tokens(p, factors, kind, beta)
    for mine, true in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        assert mine.dtype == true.dtype and torch.equal(mine, true)


# ----------------------------------------------------------------------------------------------------------------------
# errors


def change(p: Problem, **changes) -> dict:
    """Arguments of `linear_token_divergence`, by name."""
    arguments = {field.name: getattr(p, field.name) for field in fields(p)}
    return arguments | changes


BAD = [
    ({"distillation_type": "jsd"}, r"distillation_type='jsd': choose one of \['reverse_kl', 'forward_kl', 'gkd', "),
    ({"beta": -0.1}, r"beta=-0.1, temperature=1.0: pass beta in \[0, 1\], temperature > 0"),
    ({"beta": 1.1}, r"beta=1.1, .*pass beta in \[0, 1\]"),
    ({"beta": math.nan}, r"beta=nan, .*pass beta in \[0, 1\]"),
    ({"temperature": 0.0}, r"temperature=0.0: .*temperature > 0"),
    ({"temperature": -1.0}, r"temperature=-1.0: .*temperature > 0"),
    ({"temperature": math.inf}, r"temperature=inf: .*temperature > 0"),
    ({"temperature": math.nan}, r"temperature=nan: .*temperature > 0"),
    ({"student_hidden": torch.zeros(6, 6)}, r"student_hidden has 6 tokens, teacher_hidden 7: pass the same"),
    ({"student_hidden": torch.zeros(7, 5)}, r"student_hidden \(7, 5\) torch.float32, student_weight \(37, 6\) "),
    ({"student_hidden": torch.zeros(1, 7, 6)}, r"student_hidden \(1, 7, 6\) .*pass floating-point \(n, H\), \(V, H\)"),
    ({"student_hidden": torch.zeros(7, 6).long()}, r"student_hidden \(7, 6\) torch.int64, .*pass floating-point"),
    ({"student_weight": torch.zeros(37)}, r"student_weight \(37,\) torch.float32, "),
    ({"student_weight": torch.zeros(37, 6).int()}, r"student_weight \(37, 6\) torch.int32, .*pass floating-point"),
    ({"student_bias": torch.zeros(36)}, r"student_bias \(36,\): pass floating-point .* and \(V,\) or None"),
    ({"student_bias": torch.zeros(1, 37)}, r"student_bias \(1, 37\): pass "),
    ({"teacher_hidden": torch.zeros(8, 9)}, r"student_hidden has 7 tokens, teacher_hidden 8: pass the same"),
    ({"teacher_hidden": torch.zeros(7, 8)}, r"teacher_hidden \(7, 8\) torch.float32, teacher_weight \(37, 9\) "),
    ({"teacher_weight": torch.zeros(9, 37)}, r"teacher_hidden \(7, 9\) torch.float32, teacher_weight \(9, 37\) "),
    ({"teacher_weight": torch.zeros(37, 9).bool()}, r"teacher_weight \(37, 9\) torch.bool, .*pass floating-point"),
    (
        {"teacher_weight": torch.zeros(37, 9, device="meta")},
        r"student_hidden on cpu, .*, teacher_weight on meta: move all to one device",
    ),
    ({"student_hidden": torch.zeros(7, 6, device="meta")}, r"student_hidden on meta, .*: move all to one device"),
    ({"teacher_bias": torch.zeros(9)}, r"teacher_bias \(9,\): pass floating-point"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_errors(changes, message):
    arguments = change(problem(), **changes)
    with pytest.raises(ValueError, match=message):
        linear_token_divergence(**arguments)
    del arguments["labels"]
    with pytest.raises(ValueError, match=message):
        linear_divergence(**arguments)


@pytest.mark.parametrize("weights", [torch.ones(6), torch.ones(7, 1), torch.ones(())])
def test_errors_of_token_weights(weights):
    arguments = change(problem(), token_weights=weights)
    del arguments["labels"]
    with pytest.raises(ValueError, match=r"token_weights has shape \(.*\): pass one value per token, \(7,\)"):
        linear_divergence(**arguments)


@pytest.mark.parametrize("labels", [torch.zeros(6).long(), torch.zeros(7, 1).long()])
def test_errors_of_labels(labels):
    with pytest.raises(ValueError, match=r"labels has shape \(.*\): pass one value per token, \(7,\)"):
        linear_token_divergence(**change(problem(), labels=labels))


def test_every_type_is_tested():
    assert {kind for kind, _ in FEW} == {kind for kind, _ in CASES} == set(DIVERGENCES)


@pytest.mark.parametrize("step", [one_pass, token_pass])
def test_two_chunks_of_logits_are_alive_at_once_and_no_third(step, monkeypatch):
    set_chunks(monkeypatch, CHUNK_TOKENS, MEMORY_VOCAB, 1)
    n, chunk = 40 * CHUNK_TOKENS, 4 * CHUNK_TOKENS * MEMORY_VOCAB
    memory = memory_of(step, n, torch.float32, (MEMORY_VOCAB, MEMORY_VOCAB))
    gradients = 4 * (MEMORY_VOCAB * 8 + MEMORY_VOCAB + n * 8)
    assert memory.peak - gradients < 3.2 * chunk


def test_no_gradient_products_without_gradients():
    p = problem().leaves()
    tensors, biases = p.arguments()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        linear_divergence(*tensors, **biases)
    assert counter.get_total_flops() == 2 * 7 * 37 * (6 + 9)


def test_the_mean_in_float64_is_one_in_float64():
    p = problem(dtype=torch.float64)
    assert_same(run(p), truth(p), FLOAT64)


def test_weights_below_the_smallest_normal_number_scale_the_gradient():
    p = problem()
    tensors, biases = p.arguments()
    tensors[0].requires_grad_()
    gradients = []
    for weight in (1.0, 1e-41):
        loss = linear_divergence(*tensors, **biases, token_weights=torch.full((7,), weight)).loss
        gradients.append(torch.autograd.grad(loss, tensors[0])[0])
    torch.testing.assert_close(gradients[1] / 1e-41, gradients[0], rtol=1e-3, atol=1e-3)


def test_log_probs_of_16_bit_heads_are_those_of_rounded_logits(monkeypatch):
    """A model's own head rounds its logits, and old log-probs come from there. CUDA's products here are not rounded."""
    monkeypatch.setattr(head_module, "wide_mm", lambda a, b, out=None: a.float() @ b.float())
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 32, generator=random).bfloat16()
    weight = torch.randn(50, 32, generator=random).mul(3.0).bfloat16()
    labels = torch.randint(50, (6,), generator=random)
    out = linear_token_divergence(hidden, weight, hidden, weight, labels)
    exact = hidden.float() @ weight.float().T
    rounded, wide = (
        logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0] for logits in (exact.bfloat16().float(), exact)
    )
    torch.testing.assert_close(out.log_prob, rounded, rtol=1e-5, atol=1e-5)
    assert (wide - rounded).abs().max() > 1e-2  # or this test could not fail
