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
"""Values and gradients of divergence.py against float64, finite differences and closed forms.

`reference` and `loop_reference` below are the truth. They are written from the formulas, in float64, and share no
code with the module: one with autograd for the gradients, one as plain loops for probabilities that are zero.
"""

import math
from dataclasses import dataclass, field

import pytest
import torch
from vocabulary_shards import CUTS, random_rows, sharded

from verl.on_policy_distillation import divergence as divergence_module
from verl.on_policy_distillation.divergence import (
    DIVERGENCES,
    LOG_ZERO,
    DenseLogits,
    DivergenceSpec,
    Temperatures,
    divergence_rows_,
    merge,
    token_divergence,
)
from verl.on_policy_distillation.head import LinearLogits

# The bounds in float32. A gradient entry is S_v times a difference of log-ratios, so where a token's gradient vanishes
# its rounding does not: it stays that of the value.
VALUE_TOLERANCE = 1e-6  # relative or absolute, whichever is looser
GRADIENT_TOLERANCE = 1e-5  # relative to the largest entry of the token's gradient, or the bound of its value

INSIDE = [
    ("reverse_kl", 0.5),
    ("forward_kl", 0.5),
    ("gkd", 0.01),
    ("gkd", 0.1),
    ("gkd", 0.5),
    ("gkd", 0.9),
    ("gkd", 0.999),
    ("skew_reverse_kl", 0.01),
    ("skew_reverse_kl", 0.1),
    ("skew_reverse_kl", 0.5),
    ("skew_reverse_kl", 0.9),
    ("skew_reverse_kl", 0.999),
    ("skew_reverse_kl", 0.999999),
]
ENDS = [("gkd", 0.0), ("gkd", 1.0), ("skew_reverse_kl", 1.0)]
# skew_reverse_kl at beta = 0 vanishes; a relative bound has no meaning there, so it has a test of its own.
CASES = INSIDE + ENDS


# ----------------------------------------------------------------------------------------------------------------------
# truth


def log_probabilities(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    shifted = (logits - logits.amax(-1, keepdim=True).detach()) / temperature
    return shifted - shifted.exp().sum(-1, keepdim=True).log()


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return torch.einsum("nv,nv->n", log_p.exp(), log_p - log_q)


def log_mixture(log_s: torch.Tensor, log_t: torch.Tensor, beta: float) -> torch.Tensor:
    high = torch.maximum(log_s, log_t).detach()
    return high + (beta * (log_t - high).exp() + (1.0 - beta) * (log_s - high).exp()).log()


def reference(kind: str, beta: float, log_s: torch.Tensor, log_t: torch.Tensor) -> torch.Tensor:
    """The divergences of float64 log-probabilities, straight from their definitions."""
    if kind == "reverse_kl" or (kind in ("gkd", "skew_reverse_kl") and beta == 1.0):
        return kl(log_s, log_t)
    if kind == "forward_kl" or (kind == "gkd" and beta == 0.0):
        return kl(log_t, log_s)
    log_m = log_mixture(log_s, log_t, beta)
    if kind == "skew_reverse_kl":
        return kl(log_s, log_m)
    return beta * kl(log_t, log_m) + (1.0 - beta) * kl(log_s, log_m)


def reference_with_gradient(kind, beta, student, teacher, temperature=1.0, student_scale=1.0, weights=None):
    """Values (n,) and, by autograd, the gradient (n, V) of their weighted sum, both in float64."""
    z = student.detach().double().requires_grad_()
    log_s = log_probabilities(z * student_scale, temperature)
    value = reference(kind, beta, log_s, log_probabilities(teacher.detach().double(), temperature))
    (value if weights is None else value * weights.double()).sum().backward()
    return value.detach(), z.grad


def loop_probabilities(logits: list[float]) -> list[float]:
    high = max(logits)
    weights = [math.exp(z - high) for z in logits]
    return [w / sum(weights) for w in weights]


def loop_log(p: float) -> float:
    return math.log(p) if p > 0.0 else LOG_ZERO


def loop_kl(p: list[float], q: list[float]) -> float:
    return sum(a * (math.log(a) - loop_log(b)) for a, b in zip(p, q, strict=True) if a > 0.0)


def loop_reference(kind: str, beta: float, s: list[float], t: list[float]) -> tuple[float, list[float]]:
    """Value and gradient for probabilities, some of which may be zero; log 0 is LOG_ZERO. The module's table."""
    m = [beta * b + (1.0 - beta) * a for a, b in zip(s, t, strict=True)]
    if kind == "reverse_kl":
        value = loop_kl(s, t)
        return value, [a * (loop_log(a) - loop_log(b) - value) for a, b in zip(s, t, strict=True)]
    if kind == "forward_kl":
        return loop_kl(t, s), [a - b for a, b in zip(s, t, strict=True)]
    of_student = loop_kl(s, m)
    if kind == "gkd":
        gradient = [(1 - beta) * a * (loop_log(a) - loop_log(c) - of_student) for a, c in zip(s, m, strict=True)]
        return beta * loop_kl(t, m) + (1 - beta) * of_student, gradient
    h = [loop_log(a) - loop_log(c) - ((1 - beta) * a / c if a > 0.0 else 0.0) for a, c in zip(s, m, strict=True)]
    mean = sum(a * b for a, b in zip(s, h, strict=True))
    return of_student, [a * (b - mean) for a, b in zip(s, h, strict=True)]


# ----------------------------------------------------------------------------------------------------------------------
# what is tested


def random_logits(*shape: int, scale: float = 3.0, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def random_pair(n: int = 16, vocab: int = 37, scale: float = 3.0, dtype: torch.dtype = torch.float32, seed: int = 0):
    return (random_logits(n, vocab, scale=scale, seed=2 * seed + side, dtype=dtype) for side in (0, 1))


def divergence_of(student, teacher, kind="reverse_kl", beta=1.0, temperature=1.0, student_scale=1.0):
    """`token_divergence` of all rows in order; `teacher` is a tensor or a LogitSource."""
    index = torch.arange(len(student))
    source = DenseLogits(teacher) if isinstance(teacher, torch.Tensor) else teacher
    return token_divergence(student, index, source, index, DivergenceSpec(kind, beta, temperature), student_scale)


def with_gradient(student, teacher, kind="reverse_kl", beta=1.0, *, weights=None, **options):
    """Values and the gradient of their weighted sum."""
    z = student.detach().clone().requires_grad_()
    value = divergence_of(z, teacher, kind, beta, **options).divergence
    (value if weights is None else value * weights).sum().backward()
    return value.detach(), z.grad


def assert_values(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = VALUE_TOLERANCE) -> None:
    bound = tolerance * expected.abs().clamp(min=1.0)
    worst = ((actual.double() - expected).abs() / bound).max().item()
    assert worst <= 1.0, f"value off by {worst:.2g} times the bound"


def assert_same(actual, expected, tolerance: float = 1.0, rounding: float | torch.Tensor = 0.0) -> None:
    """Both are (value, gradient). `tolerance` is in units of the two bounds; `rounding` is added to the gradient's."""
    assert_values(actual[0], expected[0].double(), tolerance * VALUE_TOLERANCE)
    value, gradient = (side.double() for side in expected)
    relative = GRADIENT_TOLERANCE * gradient.abs().amax(-1)
    absolute = VALUE_TOLERANCE * value.abs().clamp(min=1.0)
    bound = tolerance * torch.maximum(relative, absolute).unsqueeze(-1) + rounding
    worst = ((actual[1].double() - gradient).abs() / bound).max().item()
    assert worst <= 1.0, f"gradient off by {worst:.2g} times the bound"


# ----------------------------------------------------------------------------------------------------------------------
# values and gradients against float64


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("scale", [0.3, 3.0, 10.0])
@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_value_and_gradient_in_float32(kind, beta, scale, temperature):
    student, teacher = random_pair(scale=scale)
    actual = with_gradient(student, teacher, kind, beta, temperature=temperature)
    assert actual[0].dtype == actual[1].dtype == torch.float32
    assert_same(actual, reference_with_gradient(kind, beta, student, teacher, temperature))


# Also where M is almost S, whose logarithms then differ by little more than their rounding.
@pytest.mark.parametrize("scale", [0.3, 1.0])
@pytest.mark.parametrize("vocab", [37, 1000])
@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_relative_error_of_the_gradient_in_float32(kind, beta, vocab, scale):
    student, teacher = random_pair(vocab=vocab, scale=scale)
    _, gradient = with_gradient(student, teacher, kind, beta)
    _, expected = reference_with_gradient(kind, beta, student, teacher)
    assert ((gradient - expected).norm(dim=-1) <= GRADIENT_TOLERANCE * expected.norm(dim=-1)).all()


@pytest.mark.parametrize(("kind", "beta"), [case for case in CASES if case[1] in (0.0, 0.5, 1.0)])
def test_value_and_gradient_of_a_large_vocabulary(kind, beta):
    student, teacher = random_pair(n=4, vocab=50_257, scale=2.0)
    expected = reference_with_gradient(kind, beta, student, teacher)
    assert_same(with_gradient(student, teacher, kind, beta), expected)


@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_gradient_with_upstream_weights(kind, beta):
    student, teacher = random_pair()
    weights = 1.0 + torch.arange(len(student)) % 5
    expected = reference_with_gradient(kind, beta, student, teacher, weights=weights)
    assert_same(with_gradient(student, teacher, kind, beta, weights=weights), expected)


@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_gradient_by_finite_differences(kind, beta):
    student, teacher = random_pair(n=3, vocab=5, scale=1.5, dtype=torch.float64)

    def value(z):
        return divergence_of(z, teacher, kind, beta, temperature=0.7, student_scale=1.3).divergence

    # the difference quotient of a divergence scaled down by beta or 1 - beta drowns in 1e-16 / eps
    assert torch.autograd.gradcheck(value, (student.requires_grad_(),), eps=1e-5, atol=1e-8, rtol=1e-5)


@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_value_and_gradient_in_float64(kind, beta):
    student, teacher = random_pair(dtype=torch.float64)
    actual = with_gradient(student, teacher, kind, beta, temperature=1.7)
    assert actual[0].dtype == actual[1].dtype == torch.float64
    assert_same(actual, reference_with_gradient(kind, beta, student, teacher, 1.7), tolerance=1e-6)


# The distance from 1 to the next number: a result rounded twice, in the gradient that is kept and in its product with
# the upstream gradient, is off by one of it at most. `least` is the spacing of the numbers around zero.
@pytest.mark.parametrize(("dtype", "ulp", "least"), [(torch.bfloat16, 2**-7, 0.0), (torch.float16, 2**-10, 2**-24)])
@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_value_and_gradient_of_half_precision_logits(kind, beta, dtype, ulp, least):
    student, teacher = random_pair(dtype=dtype)
    weights = 0.5 + torch.rand(len(student), generator=torch.Generator().manual_seed(3))
    actual = with_gradient(student, teacher, kind, beta, weights=weights)
    expected = reference_with_gradient(kind, beta, student, teacher, weights=weights)
    assert actual[0].dtype == torch.float32 and actual[1].dtype == dtype
    assert_same(actual, expected, rounding=ulp * expected[1].abs() + least)


@pytest.mark.parametrize("teacher_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("student_dtype", [torch.float32, torch.bfloat16])
def test_value_of_mixed_dtypes(student_dtype, teacher_dtype):
    student, _ = random_pair(dtype=student_dtype)
    _, teacher = random_pair(dtype=teacher_dtype)
    value, _ = with_gradient(student, teacher, "gkd", 0.3)
    assert_values(value, reference_with_gradient("gkd", 0.3, student, teacher)[0])


def test_float16_gradient_survives_loss_scaling():
    """Gradients below float16's smallest number wait in float32, so that a scaled loss still receives them."""
    student, teacher = random_pair(vocab=2000, scale=4.0, dtype=torch.float16)
    loss_scale = torch.full((len(student),), 2.0**14)
    _, gradient = with_gradient(student, teacher, weights=loss_scale)
    _, expected = reference_with_gradient("reverse_kl", 1.0, student, teacher, weights=loss_scale)
    small = (expected.abs() < 2.0**14 * 2.0**-25) & (expected.abs() > 2.0**-14)  # zero in float16 without the scale
    assert small.sum() > 1000
    torch.testing.assert_close(gradient[small].double(), expected[small], rtol=2**-9, atol=0)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
def test_beta_is_ignored_without_a_mixture(kind, beta):
    student, teacher = random_pair()
    for actual, expected in zip(
        with_gradient(student, teacher, kind, beta), with_gradient(student, teacher, kind, 0.5), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("kind", "beta", "same_as"),
    [
        ("gkd", 0.0, "forward_kl"),
        ("gkd", 0, "forward_kl"),
        ("gkd", 1.0, "reverse_kl"),
        ("gkd", 1, "reverse_kl"),
        ("skew_reverse_kl", 1.0, "reverse_kl"),
        ("skew_reverse_kl", 1, "reverse_kl"),
    ],
)
def test_ends_of_beta_are_exact(kind, beta, same_as):
    student, teacher = random_pair()
    for actual, expected in zip(
        with_gradient(student, teacher, kind, beta), with_gradient(student, teacher, same_as), strict=True
    ):
        assert torch.equal(actual, expected)


def test_skew_reverse_kl_vanishes_at_beta_zero():
    student, teacher = random_pair(scale=10.0)
    value, gradient = with_gradient(student, teacher, "skew_reverse_kl", 0.0)
    assert not value.any()
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize(("beta", "limit"), [(1e-7, "forward_kl"), (1.0 - 1e-7, "reverse_kl")])
def test_gkd_tends_to_its_ends(beta, limit):
    """gkd / (its vanishing weight) tends to the KL that the end of beta stands for: the paper's limit."""
    student, teacher = random_pair(scale=1.0, dtype=torch.float64)
    weight = min(beta, 1.0 - beta)
    actual = [side / weight for side in with_gradient(student, teacher, "gkd", beta)]
    assert_same(actual, with_gradient(student, teacher, limit), tolerance=10.0)


# ----------------------------------------------------------------------------------------------------------------------
# closed forms


@pytest.mark.parametrize("p", [0.5, 0.9, 1e-6])
@pytest.mark.parametrize("q", [0.5, 0.2, 1e-3])
@pytest.mark.parametrize(("kind", "beta"), [("reverse_kl", 1.0), ("forward_kl", 1.0), ("gkd", 0.3), ("gkd", 0.5)])
def test_two_entries(kind, beta, p, q):
    s, t = [p, 1.0 - p], [q, 1.0 - q]
    student, teacher = (torch.tensor([[math.log(a) for a in side]], dtype=torch.float64) for side in (s, t))
    value, gradient = with_gradient(student, teacher, kind, beta)
    expected_value, expected_gradient = loop_reference(kind, beta, s, t)
    assert value.item() == pytest.approx(expected_value, rel=1e-10, abs=1e-14)
    assert gradient[0].tolist() == pytest.approx(expected_gradient, rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("low", [-1e4, -math.inf])
@pytest.mark.parametrize("vocab", [2, 5, 1000])
def test_certain_student_and_uniform_teacher(vocab, low):
    """S = (1, 0, ...), T = 1/V: KL(S||T) = log V, KL(T||S) = (V-1)/V (-log 0) - log V, JSD in closed form."""
    student = torch.full((1, vocab), low)
    student[0, 0] = 0.0
    teacher = torch.zeros(1, vocab)
    log_zero = LOG_ZERO if low == -math.inf else low
    assert divergence_of(student, teacher).divergence.item() == pytest.approx(math.log(vocab), rel=1e-6)
    forward = -(vocab - 1) / vocab * log_zero - math.log(vocab)
    assert divergence_of(student, teacher, "forward_kl").divergence.item() == pytest.approx(forward, rel=1e-6)
    first, rest = (1 + 1 / vocab) / 2, 1 / (2 * vocab)  # M
    of_teacher = math.log(1 / vocab / first) / vocab + (vocab - 1) / vocab * math.log(1 / vocab / rest)
    jsd = (of_teacher - math.log(first)) / 2
    assert divergence_of(student, teacher, "gkd", 0.5).divergence.item() == pytest.approx(jsd, rel=1e-6)
    skew = divergence_of(student, teacher, "skew_reverse_kl", 0.5).divergence.item()
    assert skew == pytest.approx(-math.log(first), rel=1e-6)


def test_statistics():
    student, teacher = random_pair(n=40, vocab=6)
    result = divergence_of(student, teacher, "gkd", 0.4, temperature=0.8)
    log_s, log_t = (log_probabilities(side.double(), 0.8) for side in (student, teacher))
    assert_values(result.reverse_kl, kl(log_s, log_t))
    assert_values(result.forward_kl, kl(log_t, log_s))
    assert_values(result.student_entropy, -torch.einsum("nv,nv->n", log_s.exp(), log_s))
    assert_values(result.teacher_entropy, -torch.einsum("nv,nv->n", log_t.exp(), log_t))
    best_s, best_t = ([max(range(6), key=row.__getitem__) for row in side.tolist()] for side in (log_s, log_t))
    agree = [float(a == b) for a, b in zip(best_s, best_t, strict=True)]
    assert result.top1_agreement.tolist() == agree
    assert 0.0 < sum(agree) < len(agree)


@pytest.mark.parametrize("support", [1, 2, 8])
def test_entropy_of_a_uniform_distribution(support):
    logits = torch.full((1, 8), -math.inf)
    logits[:, :support] = 5.0
    result = divergence_of(logits, logits)
    assert result.student_entropy.item() == pytest.approx(math.log(support), abs=1e-6)
    assert result.teacher_entropy.item() == pytest.approx(math.log(support), abs=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# identities


@pytest.mark.parametrize(("kind", "beta"), [*CASES, ("skew_reverse_kl", 0.0)])
def test_zero_where_student_is_teacher(kind, beta):
    student, _ = random_pair(scale=5.0)
    value, gradient = with_gradient(student, student, kind, beta)
    assert value.abs().max() < VALUE_TOLERANCE
    assert gradient.abs().max() < VALUE_TOLERANCE


@pytest.mark.parametrize("distance", [1e-4, 1e-2, 1.0, 30.0])
@pytest.mark.parametrize(("kind", "beta"), [*CASES, ("skew_reverse_kl", 0.0)])
def test_not_negative(kind, beta, distance):
    student, noise = random_pair(n=200, vocab=50)
    result = divergence_of(student, student + distance * noise, kind, beta)
    for name in ("divergence", "reverse_kl", "forward_kl", "student_entropy", "teacher_entropy"):
        assert getattr(result, name).min() > -VALUE_TOLERANCE, name


@pytest.mark.parametrize(("kind", "beta"), [*CASES, ("skew_reverse_kl", 0.0)])
def test_gradient_sums_to_zero_over_the_vocabulary(kind, beta):
    student, teacher = random_pair(vocab=500)
    value, gradient = with_gradient(student, teacher, kind, beta)
    assert (gradient.double().sum(-1).abs() <= VALUE_TOLERANCE * value.clamp(min=1.0)).all()


def test_reverse_kl_is_forward_kl_with_sides_swapped():
    student, teacher = random_pair()
    one = divergence_of(student, teacher, "reverse_kl").divergence
    assert torch.equal(one, divergence_of(teacher, student, "forward_kl").divergence)


@pytest.mark.parametrize("beta", [0.0, 0.2, 0.5, 1.0])
def test_gkd_is_symmetric_under_swapping_sides_and_beta(beta):
    """Swapping S and T turns beta into 1 - beta; at 1/2, the Jensen-Shannon divergence, it changes nothing."""
    student, teacher = random_pair()
    one = divergence_of(student, teacher, "gkd", beta).divergence
    other = divergence_of(teacher, student, "gkd", 1.0 - beta).divergence
    torch.testing.assert_close(one, other, rtol=0, atol=VALUE_TOLERANCE)


@pytest.mark.parametrize("beta", [0.3, 0.5])
def test_gkd_is_bounded_by_the_entropy_of_beta(beta):
    student, teacher = random_pair(n=100, scale=100.0)
    bound = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    largest = divergence_of(student, teacher, "gkd", beta).divergence.max().item()
    assert 0.9 * bound < largest <= bound + VALUE_TOLERANCE


# Multiples of 2**-10 below 2**4 stay exact in float32 when 1024 is added: both sides see the same distribution.
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_a_constant_added_to_the_logits_changes_nothing(kind, beta, temperature):
    student, teacher = (((side * 1024).round() / 1024).clamp(-15, 15) for side in random_pair())
    expected = with_gradient(student, teacher, kind, beta, temperature=temperature)
    for one, other in ((student + 1024, teacher), (student, teacher - 1024), (student - 1024, teacher + 1024)):
        assert_same(with_gradient(one, other, kind, beta, temperature=temperature), expected)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_value_and_gradient_of_logits_far_from_zero(kind, beta, temperature):
    """Logits of real models sit tens from zero; dividing them by a temperature must not cost their differences."""
    student, teacher = random_pair()
    student, teacher = student + 40.0, teacher - 40.0
    actual = with_gradient(student, teacher, kind, beta, temperature=temperature)
    assert_same(actual, reference_with_gradient(kind, beta, student, teacher, temperature))


@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_student_scale_is_a_scale_of_the_student_logits(kind, beta):
    student, teacher = random_pair()
    actual = with_gradient(student, teacher, kind, beta, temperature=1.5, student_scale=0.6)
    assert_same(actual, reference_with_gradient(kind, beta, student, teacher, 1.5, student_scale=0.6))


def test_temperature_is_a_scale_of_both_logits():
    student, teacher = random_pair()
    value, gradient = with_gradient(student / 3.0, teacher / 3.0, "gkd", 0.3)
    # no factor tau**2: the gradient is smaller by tau, and so by tau**2 for a divergence close to its minimum
    assert_same(with_gradient(student, teacher, "gkd", 0.3, temperature=3.0), (value, gradient / 3.0))


# ----------------------------------------------------------------------------------------------------------------------
# extreme logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_logits_of_ten_thousand(kind, beta, dtype):
    """Finite logits are never clamped: KL(S||T) of logits 1e4 against -1e4 is about 2e4."""
    student = torch.tensor([[1e4, -1e4, 0.0], [1e4, -1e4, 9990.0], [-1e4, 1e4, 1e4], [1e4, 1e4, 1e4]]).to(dtype)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [1.0, 2.0, 3.0], [-1e4, 1e4, 9990.0], [1e4, -1e4, 9990.0]]).to(dtype)
    value, gradient = with_gradient(student, teacher, kind, beta)
    expected_value, expected_gradient = reference_with_gradient(kind, beta, student, teacher)
    assert value.isfinite().all() and gradient.isfinite().all()
    assert_values(value, expected_value)
    ulp = torch.finfo(dtype).eps
    # Rows whose gradient is below the smallest number of float32 are zeros here and 1e-4343 in truth.
    torch.testing.assert_close(
        gradient.double(), expected_gradient, rtol=max(ulp, GRADIENT_TOLERANCE), atol=max(2**-24, 1e-6)
    )


def test_logits_of_ten_thousand_in_closed_form():
    student, teacher = torch.tensor([[1e4, -1e4]]), torch.tensor([[-1e4, 1e4]])
    assert divergence_of(student, teacher, "reverse_kl").divergence.item() == 2e4
    assert divergence_of(student, teacher, "forward_kl").divergence.item() == 2e4
    for kind in ("gkd", "skew_reverse_kl"):
        assert divergence_of(student, teacher, kind, 0.5).divergence.item() == pytest.approx(math.log(2), rel=1e-6)


LOG = [0.3, -1.2, 2.0, 0.7, -0.4]  # logits of an ordinary distribution
ONE_SIDED = {
    "teacher": (LOG, [-math.inf, 1.0, 0.2, -math.inf, 0.5]),
    "student": ([-math.inf, 1.0, 0.2, -math.inf, 0.5], LOG),
    "either": ([-math.inf, 1.0, 0.2, -0.1, 0.5], [0.3, -math.inf, 2.0, 0.7, -0.4]),
    "disjoint": ([1.0, 0.5, -math.inf, -math.inf, -math.inf], [-math.inf, -math.inf, 0.3, 0.4, 0.5]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", ONE_SIDED)
@pytest.mark.parametrize(("kind", "beta"), INSIDE)
def test_zero_probability_on_one_side(kind, beta, masked, dtype):
    """Mass where the other side has none costs its log-probability minus LOG_ZERO."""
    student, teacher = ONE_SIDED[masked]
    actual = with_gradient(torch.tensor([student]).to(dtype), torch.tensor([teacher]).to(dtype), kind, beta)
    value, gradient = loop_reference(kind, beta, loop_probabilities(student), loop_probabilities(teacher))
    expected = torch.tensor([value], dtype=torch.float64), torch.tensor([gradient], dtype=torch.float64)
    assert_same(actual, expected)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.999, 1 - 1e-8, 1.0])
@pytest.mark.parametrize("kind", list(DIVERGENCES))
@pytest.mark.parametrize("masked", ONE_SIDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_zero_probabilities_give_finite_results(dtype, masked, kind, beta):
    student, teacher = (torch.tensor([side], dtype=dtype) for side in ONE_SIDED[masked])
    value, gradient = with_gradient(student, teacher, kind, beta)
    statistics = torch.stack(divergence_of(student, teacher, kind, beta)[1:])
    assert value.isfinite().all() and gradient.isfinite().all() and statistics.isfinite().all()


def test_log_zero_is_the_logarithm_of_the_smallest_float32():
    assert LOG_ZERO == pytest.approx(math.log(2.0**-149), abs=1e-5)
    student, teacher = torch.tensor([[0.0, -math.inf]]), torch.tensor([[-math.inf, 0.0]])
    for kind in ("reverse_kl", "forward_kl"):
        assert divergence_of(student, teacher, kind).divergence.item() == pytest.approx(-LOG_ZERO, rel=1e-6)


@pytest.mark.parametrize(("kind", "beta"), [*CASES, ("skew_reverse_kl", 0.0)])
def test_entry_masked_on_both_sides_is_an_entry_less(kind, beta):
    student, teacher = random_pair(vocab=9)
    kept, masked = [0, 2, 3, 5, 6, 8], [1, 4, 7]
    expected = with_gradient(student[:, kept], teacher[:, kept], kind, beta)
    student[:, masked] = teacher[:, masked] = -math.inf
    value, gradient = with_gradient(student, teacher, kind, beta)
    assert_same((value, gradient[:, kept]), expected)
    assert not gradient[:, masked].any()


@pytest.mark.parametrize("low", [torch.finfo(torch.float32).min, -1e30])
@pytest.mark.parametrize(("kind", "beta"), [*CASES, ("skew_reverse_kl", 0.0)])
def test_lowest_finite_logit_on_both_sides_is_an_entry_less(kind, beta, low):
    """Padding of a vocabulary is often masked with the lowest finite number instead of -inf."""
    student, teacher = random_pair(vocab=9)
    expected = with_gradient(student[:, :6], teacher[:, :6], kind, beta)
    student[:, 6:] = teacher[:, 6:] = low
    value, gradient = with_gradient(student, teacher, kind, beta)
    assert_same((value, gradient[:, :6]), expected)
    assert not gradient[:, 6:].any()


# ----------------------------------------------------------------------------------------------------------------------
# shapes, pairing, chunks


@pytest.mark.parametrize("kind", list(DIVERGENCES))
def test_no_tokens(kind):
    student = random_logits(5, 7).requires_grad_()
    none = torch.empty(0, dtype=torch.int64)
    result = token_divergence(student, none, DenseLogits(random_logits(3, 7)), none, DivergenceSpec(kind, 0.5))
    assert all(column.shape == (0,) for column in result)
    result.divergence.sum().backward()
    assert torch.equal(student.grad, torch.zeros(5, 7))


@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_one_token(kind, beta):
    student, teacher = random_pair(n=1)
    actual = with_gradient(student, teacher, kind, beta)
    assert actual[0].shape == (1,)
    assert_same(actual, reference_with_gradient(kind, beta, student, teacher))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", list(DIVERGENCES))
def test_vocabulary_of_one(kind, beta):
    student, teacher = random_pair(vocab=1)
    value, gradient = with_gradient(student, teacher, kind, beta)
    assert value.abs().max() < VALUE_TOLERANCE and gradient.abs().max() < VALUE_TOLERANCE
    result = divergence_of(student, teacher, kind, beta)
    assert not result.student_entropy.any() and not result.teacher_entropy.any() and result.top1_agreement.all()


def test_tokens_are_paired_by_index():
    student, teacher = random_logits(10, 7, seed=1).requires_grad_(), random_logits(6, 7, seed=2)
    student_index, teacher_index = torch.tensor([8, 0, 3, 5]), torch.tensor([2, 5, 2, 0])  # a teacher row may repeat
    result = token_divergence(student, student_index, DenseLogits(teacher), teacher_index, DivergenceSpec("gkd", 0.3))
    result.divergence.sum().backward()
    expected = reference_with_gradient("gkd", 0.3, student[student_index], teacher[teacher_index])
    assert_same((result.divergence.detach(), student.grad[student_index]), expected)
    assert not student.grad[[1, 2, 4, 6, 7, 9]].any()


@pytest.mark.parametrize("rows_per_chunk", [1, 3, 16, 1000])
@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_chunks_change_nothing(kind, beta, rows_per_chunk, monkeypatch):
    student, teacher = random_pair()
    value, gradient = with_gradient(student, teacher, kind, beta)
    statistics = torch.stack(divergence_of(student, teacher, kind, beta))
    monkeypatch.setattr(divergence_module, "CHUNK_ELEMENTS", rows_per_chunk * student.shape[1])
    chunked_value, chunked_gradient = with_gradient(student, teacher, kind, beta)
    torch.testing.assert_close(chunked_value, value, rtol=0, atol=VALUE_TOLERANCE)
    torch.testing.assert_close(chunked_gradient, gradient, rtol=0, atol=1e-7)
    chunked_statistics = torch.stack(divergence_of(student, teacher, kind, beta))
    torch.testing.assert_close(chunked_statistics, statistics, rtol=0, atol=VALUE_TOLERANCE)


@dataclass
class CountingLogits:
    """A logit source that remembers how many rows it was asked for at a time."""

    values: torch.Tensor
    requests: list[int] = field(default_factory=list)

    unit = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.values.shape)

    def in_units(self, index: torch.Tensor) -> torch.Tensor:
        self.requests.append(len(index))
        return self.values[index]


@pytest.mark.parametrize("elements", [1, 37, 5 * 37, 5 * 37 + 36])
def test_teacher_logits_are_read_once_and_a_chunk_at_a_time(elements, monkeypatch):
    monkeypatch.setattr(divergence_module, "CHUNK_ELEMENTS", elements)
    student, teacher = random_pair()
    source = CountingLogits(teacher)
    with_gradient(student, source)  # forward and backward
    assert sum(source.requests) == len(student)
    most = max(1, elements // 37)  # one row is the least there can be
    assert max(source.requests) <= most and len(source.requests) == -(-len(student) // most)


# ----------------------------------------------------------------------------------------------------------------------
# vocabularies in shards

SHARD_TEMPERATURES = Temperatures(0.7, 1.3)


def whole_rows(student, teacher, spec, weights):
    gradient = student.clone()
    return divergence_rows_(gradient, teacher.clone(), spec, SHARD_TEMPERATURES, weights, gradient), gradient


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "beta"), [*CASES, ("skew_reverse_kl", 0.0)])
def test_shards_give_what_the_whole_gives(kind, beta, dtype, cuts):
    student, teacher = random_rows(dtype)
    before = student.clone(), teacher.clone()
    spec, weights = DivergenceSpec(kind, beta), torch.linspace(-1.0, 2.0, 10, dtype=dtype)
    results, gradient = sharded(divergence_module, student, teacher, spec, SHARD_TEMPERATURES, weights, cuts)
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])
    expected, expected_gradient = whole_rows(student, teacher, spec, weights)
    tolerance = 1.0 if dtype == torch.float32 else 1e-6
    for mine, true in zip(results, expected, strict=True):
        assert_values(mine, true.double(), tolerance * VALUE_TOLERANCE)
    assert torch.equal(results[-1], expected[-1])
    # The bound of a row is that of its largest divergence, as a gradient is made of differences of those.
    size = torch.maximum(expected_gradient.abs().amax(-1), 0.1 * expected[0].abs().clamp(min=1.0))
    error = (gradient - expected_gradient).abs().amax(-1)
    assert (error <= tolerance * GRADIENT_TOLERANCE * size).all()


@pytest.mark.parametrize(("kind", "beta"), [("reverse_kl", 1.0), ("gkd", 0.3), ("skew_reverse_kl", 0.7)])
def test_shards_against_the_definition(kind, beta):
    student, teacher = random_pair(dtype=torch.float64)
    weights, spec = torch.ones(16, dtype=torch.float64), DivergenceSpec(kind, beta, 1.7)
    temperatures = Temperatures(1.7, 1.7)
    results, gradient = sharded(divergence_module, student, teacher, spec, temperatures, weights, (3, 30))
    assert_same((results[0], gradient), reference_with_gradient(kind, beta, student, teacher, 1.7), tolerance=1e-6)


@pytest.mark.parametrize(("kind", "beta"), [("forward_kl", 1.0), ("gkd", 0.5), ("skew_reverse_kl", 0.5)])
def test_gradients_of_shards_in_another_dtype_are_rounded_once(kind, beta):
    student, teacher = random_rows()
    arguments = student, teacher, DivergenceSpec(kind, beta), SHARD_TEMPERATURES, torch.ones(10), (10,)
    _, gradient = sharded(divergence_module, *arguments)
    _, half = sharded(divergence_module, *arguments, gradient_dtype=torch.bfloat16)
    assert torch.equal(half, gradient.to(torch.bfloat16))


def test_a_merge_of_merges_is_the_merge_of_all():
    student, teacher = random_rows(torch.float64)
    edges = (0, 5, 10, 22, 37)
    parts = [slice(*edge) for edge in zip(edges[:-1], edges[1:], strict=True)]
    shards = [divergence_module.statistics(student[:, part], teacher[:, part], SHARD_TEMPERATURES) for part in parts]
    halves = [merge(shards[:2], SHARD_TEMPERATURES), merge(shards[2:], SHARD_TEMPERATURES)]
    at_once, twice = merge(shards, SHARD_TEMPERATURES), merge(halves, SHARD_TEMPERATURES)
    assert torch.equal(at_once.highest, twice.highest) and torch.equal(at_once.top, twice.top)
    torch.testing.assert_close(at_once.sums, twice.sums, rtol=1e-12, atol=1e-12)


def test_a_merge_is_one_maximum_and_one_sum_over_processes():
    """Each process knows its shard and two tensors that all of them have reduced."""
    student, teacher = random_rows()
    parts = slice(0, 10), slice(10, 30), slice(30, 37)
    shards = [divergence_module.statistics(student[:, part], teacher[:, part], SHARD_TEMPERATURES) for part in parts]
    highest = torch.maximum(torch.maximum(shards[0].highest, shards[1].highest), shards[2].highest)
    payload = sum(shard.payload(highest, SHARD_TEMPERATURES, i, 3) for i, shard in enumerate(shards))
    reduced = type(shards[0]).of_payload(highest, payload)
    assert all(map(torch.equal, reduced, merge(shards, SHARD_TEMPERATURES)))


def test_agreement_over_shards_is_of_the_first_of_equal_maxima():
    student, teacher = torch.zeros(4, 300), torch.zeros(4, 300)
    student[:, [70, 71, 250]] = 2.0
    for row, best in enumerate((70, 71, 250)):
        teacher[row, best] = 1.0
    spec, temperatures, weights = DivergenceSpec(), Temperatures(1.0, 1.0), torch.ones(4)
    for cuts in ((71,), (70, 72), (200,), (100, 299)):
        results, _ = sharded(divergence_module, student, teacher, spec, temperatures, weights, cuts)
        assert results[-1].tolist() == [1.0, 0.0, 0.0, 1.0], cuts


@pytest.mark.parametrize("vocab", [1, 127, 128, 129, 300, 1000])
def test_agreement_is_of_the_first_of_equal_maxima(vocab):
    for place in {0, vocab // 2, vocab - 1}:
        student, teacher = torch.zeros(2, vocab), torch.zeros(2, vocab)
        student[:, place:] = 1.0
        teacher[0, place], teacher[1, place - 1] = 1.0, 1.0
        agreed = divergence_of(student, teacher).top1_agreement.tolist()
        assert agreed == [1.0, float(vocab == 1)], place


@pytest.mark.parametrize("kind", list(DIVERGENCES))
def test_no_rows_of_shards(kind):
    student, teacher = torch.zeros(0, 37), torch.zeros(0, 37)
    arguments = student, teacher, DivergenceSpec(kind, 0.5), SHARD_TEMPERATURES, torch.zeros(0), (10,)
    results, gradient = sharded(divergence_module, *arguments)
    assert results.shape == (6, 0) and gradient.shape == (0, 37)


def test_the_vocabulary_of_a_plain_function_is_whole(monkeypatch):
    def total_variation(d, beta):
        value = (d.s - d.t).abs().sum(-1) / 2.0
        d.s.sub_(d.t)
        return value

    monkeypatch.setitem(DIVERGENCES, "total_variation", total_variation)
    student, teacher = random_pair()
    value, gradient = with_gradient(student, teacher, "total_variation", temperature=1.3)
    s, t = (torch.softmax(side.double() / 1.3, -1) for side in (student, teacher))
    assert_same((value, gradient), ((s - t).abs().sum(-1) / 2.0, (s - t) / 1.3))
    spec = DivergenceSpec("total_variation")
    with pytest.raises(ValueError, match="'total_variation' is a plain function .*: register a Divergence"):
        sharded(divergence_module, student, teacher, spec, SHARD_TEMPERATURES, torch.ones(16), (10,))


# ----------------------------------------------------------------------------------------------------------------------
# the entropy switch


def teacher_entropy(teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    log_t = log_probabilities(teacher.detach().double(), temperature)
    return -(log_t.exp() * log_t).sum(-1)


def switched_reference(student, teacher, threshold: float, temperature: float = 1.0):
    """Value and gradient, by autograd: forward KL where the entropy is above the threshold, reverse KL elsewhere."""
    z = student.detach().double().requires_grad_()
    log_s, log_t = (log_probabilities(side, temperature) for side in (z, teacher.detach().double()))
    is_forward = teacher_entropy(teacher, temperature) > threshold
    assert is_forward.any() and not is_forward.all()  # or there is nothing to test
    value = torch.stack([kl(log_t, log_s)[i] if is_forward[i] else kl(log_s, log_t)[i] for i in range(len(z))])
    value.sum().backward()
    return value.detach(), z.grad


def between(entropies: torch.Tensor) -> float:
    """A threshold in the middle of the widest gap but the outer ones, which no rounding crosses."""
    values = entropies.sort().values[1:-1]
    gap = values.diff().argmax()
    return ((values[gap] + values[gap + 1]) / 2).item()


def with_switch(student, teacher, threshold, temperature=1.0):
    z, index = student.detach().clone().requires_grad_(), torch.arange(len(student))
    spec = DivergenceSpec(temperature=temperature, entropy_threshold=threshold)
    value = token_divergence(z, index, DenseLogits(teacher), index, spec).divergence
    value.sum().backward()
    return value.detach(), z.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_the_switch_takes_the_teachers_entropy_at_the_temperature(scale, temperature, dtype):
    student, teacher = random_pair(scale=scale, dtype=dtype)
    threshold = between(teacher_entropy(teacher, temperature))
    actual = with_switch(student, teacher, threshold, temperature)
    tolerance = 1.0 if dtype == torch.float32 else 1e-6
    assert_same(actual, switched_reference(student, teacher, threshold, temperature), tolerance)


def test_the_switch_by_finite_differences():
    student, teacher = random_pair(n=6, vocab=5, scale=1.5, dtype=torch.float64)
    threshold, index = between(teacher_entropy(teacher, 0.7)), torch.arange(6)
    spec = DivergenceSpec(temperature=0.7, entropy_threshold=threshold)

    def value(z):
        return token_divergence(z, index, DenseLogits(teacher), index, spec).divergence

    assert torch.autograd.gradcheck(value, (student.requires_grad_(),), eps=1e-5, atol=1e-8, rtol=1e-5)


@pytest.mark.parametrize(("threshold", "kind"), [(-1.0, "forward_kl"), (100.0, "reverse_kl")])
def test_a_switch_at_either_end_is_that_kl_exactly(threshold, kind):
    student, teacher = random_pair()
    assert all(map(torch.equal, with_switch(student, teacher, threshold), with_gradient(student, teacher, kind)))


def test_entropy_at_the_threshold_is_not_above_it():
    """A uniform teacher over four entries has an entropy of log 4, exactly so in these numbers."""
    student, teacher = random_logits(1, 4, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float64)
    for threshold, kind in ((math.log(4), "reverse_kl"), (math.nextafter(math.log(4), 0), "forward_kl")):
        assert all(map(torch.equal, with_switch(student, teacher, threshold), with_gradient(student, teacher, kind)))


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shards_switch_by_the_entropy_of_the_whole(cuts, dtype):
    """No shard knows it; rows with zero probabilities on either side are among them."""
    student, teacher = random_rows(dtype)
    entropies = divergence_of(student, teacher, temperature=1.3).teacher_entropy
    weights, threshold = torch.linspace(-1.0, 2.0, 10, dtype=dtype), between(entropies)
    spec = DivergenceSpec(temperature=1.3, entropy_threshold=threshold)
    arguments = student, teacher, spec, SHARD_TEMPERATURES, weights
    results, gradient = sharded(divergence_module, *arguments, cuts)
    is_forward = entropies > threshold
    assert 2 <= is_forward.sum() <= 8
    parts = {
        kind: whole_rows(student, teacher, DivergenceSpec(kind, temperature=1.3), weights)
        for kind in ("forward_kl", "reverse_kl")
    }
    assert torch.equal(whole_rows(student, teacher, spec, weights)[1][is_forward], parts["forward_kl"][1][is_forward])
    expected = torch.where(is_forward, parts["forward_kl"][0], parts["reverse_kl"][0])
    expected_gradient = torch.where(is_forward.unsqueeze(-1), parts["forward_kl"][1], parts["reverse_kl"][1])
    tolerance = 1.0 if dtype == torch.float32 else 1e-6
    for mine, true in zip(results, expected, strict=True):
        assert_values(mine, true.double(), tolerance * VALUE_TOLERANCE)
    size = torch.maximum(expected_gradient.abs().amax(-1), 0.1 * expected[0].abs().clamp(min=1.0))
    error = (gradient - expected_gradient).abs().amax(-1)
    assert (error <= tolerance * GRADIENT_TOLERANCE * size).all()


def test_a_switch_of_another_divergence_is_refused():
    with pytest.raises(ValueError, match="entropy_threshold=0.5 with distillation_type='gkd'.*leave one of them out"):
        DivergenceSpec("gkd", 0.5, entropy_threshold=0.5)


# ----------------------------------------------------------------------------------------------------------------------
# linear logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows_per_chunk", [4, 1000])
def test_linear_logits_are_dense_logits_of_the_product(has_bias, dtype, rows_per_chunk, monkeypatch):
    hidden, weight = (random_logits(rows, 8, scale=1.0, seed=rows, dtype=dtype) for rows in (16, 37))
    bias = random_logits(37, scale=1.0, dtype=dtype) if has_bias else None
    product = hidden.double() @ weight.double().T + (bias.double() if has_bias else 0.0)
    source = LinearLogits(hidden, weight, bias)
    assert source.shape == (16, 37)
    monkeypatch.setattr(divergence_module, "CHUNK_ELEMENTS", rows_per_chunk * 37)
    student, _ = random_pair()
    actual = with_gradient(student, source)
    assert_same(actual, with_gradient(student, DenseLogits(source.rows(torch.arange(16)))))
    # a bfloat16 projection rounds its logits once, and each by half an ulp at most (log T moves by twice that)
    rounding = 2 * 2**-8 * product.abs().max().item() if dtype == torch.bfloat16 else 2e-6
    truth = reference_with_gradient("reverse_kl", 1.0, student, product)[0]
    assert (actual[0] - truth).abs().max() <= rounding


def test_linear_logits_are_projected_in_the_dtype_of_the_weight():
    """A bfloat16 payload with a float32 projection loses nothing more."""
    hidden, weight = random_logits(16, 8, scale=1.0, dtype=torch.bfloat16), random_logits(37, 8, scale=1.0, seed=1)
    student, _ = random_pair()
    value, _ = with_gradient(student, LinearLogits(hidden, weight))
    product = hidden.double() @ weight.double().T
    # the float32 product itself is off by some 1e-7 of the sizes it adds up
    assert_values(value, reference_with_gradient("reverse_kl", 1.0, student, product)[0], 2 * VALUE_TOLERANCE)


def test_autocast_changes_nothing():
    """VERL's engines call the loss inside autocast; the teacher's projection must not become a bfloat16 one there."""
    student, teacher = random_pair()
    hidden, weight = (random_logits(rows, 8, scale=1.0, seed=rows) for rows in (16, 37))
    for source in (teacher, LinearLogits(hidden, weight)):
        expected = with_gradient(student, source, "gkd", 0.3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = with_gradient(student, source, "gkd", 0.3)
        assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1]), type(source).__name__


# ----------------------------------------------------------------------------------------------------------------------
# autograd


def test_teacher_never_gets_a_gradient():
    student, teacher = (side.requires_grad_() for side in random_pair())
    hidden, weight, bias = (random_logits(*shape).requires_grad_() for shape in ((16, 8), (37, 8), (37,)))
    for source in (DenseLogits(teacher), LinearLogits(hidden, weight, bias)):
        divergence_of(student, source, "gkd", 0.5).divergence.sum().backward()
    assert student.grad is not None
    assert all(leaf.grad is None for leaf in (teacher, hidden, weight, bias))


def test_teacher_may_share_the_students_logits():
    """Self-distillation: the teacher's side of one tensor is a constant."""
    student, _ = random_pair()
    shared = student.requires_grad_()
    index, other = torch.arange(8), torch.arange(8, 16)
    token_divergence(shared, index, DenseLogits(shared), other, DivergenceSpec()).divergence.sum().backward()
    _, expected = reference_with_gradient("reverse_kl", 1.0, student[:8], student[8:])
    torch.testing.assert_close(shared.grad[:8].double(), expected, rtol=1e-5, atol=1e-5)
    assert not shared.grad[8:].any()


def test_only_the_divergence_requires_a_gradient():
    student, teacher = random_pair()
    result = divergence_of(student.requires_grad_(), teacher.requires_grad_())
    assert [name for name in result._fields if getattr(result, name).requires_grad] == ["divergence"]


def test_nothing_requires_a_gradient_without_one():
    student, teacher = random_pair()
    assert not any(column.requires_grad for column in divergence_of(student, teacher))
    with torch.no_grad():
        assert not any(column.requires_grad for column in divergence_of(student.requires_grad_(), teacher))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_second_backward_gives_the_same_gradient(dtype):
    student, teacher = random_pair(dtype=dtype)
    loss = divergence_of(student.requires_grad_(), teacher).divergence.sum()
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, student, retain_graph=True)
    assert torch.equal(kept, second)


def test_logits_overwritten_before_the_backward_do_not_matter():
    """A fused log-prob backward writes its gradient over the logits (`inplace_backward` in VERL)."""
    student, teacher = random_pair()
    _, expected = with_gradient(student, teacher)
    leaf = student.clone().requires_grad_()
    values = leaf * 1.0
    loss = divergence_of(values, teacher).divergence.sum()
    values.data.fill_(math.nan)
    loss.backward()
    assert torch.equal(leaf.grad, expected)


def test_gradient_flows_through_what_made_the_logits():
    student, teacher = random_pair()
    weight = torch.ones(37, requires_grad=True)
    divergence_of(student * weight, teacher, "gkd", 0.3).divergence.sum().backward()
    expected = (reference_with_gradient("gkd", 0.3, student, teacher)[1] * student.double()).sum(0)
    torch.testing.assert_close(weight.grad.double(), expected, rtol=1e-5, atol=1e-5)
