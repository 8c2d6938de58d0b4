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
"""divergence_triton.py against float64 formulas and against its twin in torch; and that it compiles.

Triton's interpreter runs the kernel on the processor. It is chosen when the module is imported, so it has a process of
its own here: what other tests import stays compiled. With a CUDA device the compiled kernel runs the same tests too.

`truth` is the table of divergence.py in float64, with `LOG_ZERO` for log 0, and shares no code with either.
"""

import importlib.util
import math
import multiprocessing
import os
import pickle
import re
import subprocess
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from vocabulary_shards import CUTS, random_rows, sharded

from verl.on_policy_distillation import divergence
from verl.on_policy_distillation import head as head_module
from verl.on_policy_distillation.divergence import DIVERGENCES, LOG_ZERO, DivergenceSpec, Policy, Temperatures
from verl.on_policy_distillation.head import implementation, linear_divergence, linear_token_divergence
from verl.on_policy_distillation.roofline import INSTRUCTIONS, POLICY_INSTRUCTIONS, READS, Chunking

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

KINDS = [("reverse_kl", 1.0), ("forward_kl", 1.0), ("gkd", 0.1), ("skew_reverse_kl", 0.9)]
CASES = [("reverse_kl", 1.0), ("forward_kl", 1.0)]
CASES += [(kind, beta) for kind in ("gkd", "skew_reverse_kl") for beta in (1e-4, 0.1, 0.5, 0.9, 0.999)]

# As in tests/test_divergence.py: relative or absolute, whichever is looser; of a gradient relative to its largest
# entry, or absolute by the bound of the value.
VALUE_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
# One rounding to a narrower gradient: half a unit in the last place. The interpreter cuts bfloat16 off: a whole one.
ROUNDING = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 0.0}

# ----------------------------------------------------------------------------------------------------------------------
# truth


def truth_side(logits: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and their logarithms (rows, V), float64."""
    log_p = torch.log_softmax((logits.double() - logits.double().amax(-1, keepdim=True)) / temperature, dim=-1)
    return log_p.exp(), log_p.masked_fill(log_p == -torch.inf, LOG_ZERO)


def truth(student, teacher, spec, student_temperature, weights):
    """(6, rows) and (rows, V), float64: results and the weighted gradient, by the table."""
    s, log_s = truth_side(student, student_temperature)
    t, log_t = truth_side(teacher, spec.temperature)
    reverse_kl, forward_kl = (s * (log_s - log_t)).sum(-1), (t * (log_t - log_s)).sum(-1)
    m = spec.beta * t + (1.0 - spec.beta) * s
    log_m = torch.where(m > 0.0, m, 1.0).log()
    student_to_m = (s * (log_s - log_m)).sum(-1)
    entropies = -(s * log_s).sum(-1), -(t * log_t).sum(-1)
    is_forward = entropies[1] > (torch.inf if spec.entropy_threshold is None else spec.entropy_threshold)
    if spec.distillation_type == "reverse_kl":
        value, slope = torch.where(is_forward, forward_kl, reverse_kl), log_s - log_t - reverse_kl[:, None]
    elif spec.distillation_type == "forward_kl":
        value, slope = forward_kl, torch.where(s > 0.0, 1.0 - t / s, 0.0)
    elif spec.distillation_type == "gkd":
        value = spec.beta * (t * (log_t - log_m)).sum(-1) + (1.0 - spec.beta) * student_to_m
        slope = (1.0 - spec.beta) * (log_s - log_m - student_to_m[:, None])
    else:
        h = log_s - log_m - (1.0 - spec.beta) * torch.where(m > 0.0, s / m, 0.0)
        value, slope = student_to_m, h - (s * h).sum(-1, keepdim=True)
    gradient = torch.where(is_forward[:, None], s - t, s * slope)
    if spec.distillation_type == "forward_kl":
        gradient = s - t
    first_best = (student == student.amax(-1, keepdim=True)).int().argmax(-1, keepdim=True)
    is_agreed = teacher.gather(-1, first_best).squeeze(-1) == teacher.amax(-1)
    results = torch.stack((value, reverse_kl, forward_kl, *entropies, is_agreed.double()))
    return results, gradient * (weights.double() / student_temperature)[:, None]


# ----------------------------------------------------------------------------------------------------------------------
# what is tested, and where it runs


@dataclass
class Problem:
    """Arguments, without a gradient to write to."""

    student: torch.Tensor
    teacher: torch.Tensor
    spec: DivergenceSpec
    temperatures: Temperatures
    weights: torch.Tensor


def problem(
    student, teacher, kind="reverse_kl", beta=1.0, temperatures=(0.7, 1.3), weights=None, threshold=None
) -> Problem:
    """`temperatures`: the student's and the teacher's; `threshold`: of the entropy switch."""
    weights = torch.linspace(-1.0, 2.0, len(student), dtype=student.dtype) if weights is None else weights
    spec = DivergenceSpec(kind, beta, temperatures[1], threshold)
    return Problem(student, teacher, spec, Temperatures(*temperatures), weights)


def switching(student, teacher, **settings) -> Problem:
    """With a threshold in the widest gap between the rows' entropies."""
    t, log_t = truth_side(teacher, 1.3)
    entropies = -(t * log_t).sum(-1).sort().values
    gap = entropies.diff().argmax()
    return problem(student, teacher, threshold=((entropies[gap] + entropies[gap + 1]) / 2).item(), **settings)


@dataclass
class Layout:
    """`gradient`: its dtype, None for over the student. `padding`: entries of memory after each row, per tensor."""

    gradient: torch.dtype | None = None
    padding: tuple[int, int, int] = (0, 0, 0)
    block: int | None = None  # in place of the module's BLOCK
    cuts: tuple[int, ...] | None = None  # of the vocabulary into shards, each verb a launch


UNTOUCHED = -77.0  # after the rows of a gradient
UNREAD = math.nan  # after those of logits, where it would spoil whatever reads it


def padded(values: torch.Tensor, padding: int, filler: float) -> torch.Tensor:
    memory = values.new_full((len(values), values.shape[-1] + padding), filler)
    memory[:, : values.shape[-1]] = values
    return memory


def laid_out(case: Problem, layout: Layout, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student, teacher, and where the gradient goes."""
    target = case.student if layout.gradient is None else torch.full_like(case.student, 3.0, dtype=layout.gradient)
    tensors = (case.student, case.teacher, target)
    student, teacher, gradient = (
        padded(values, padding, filler).to(device)[:, : values.shape[-1]]
        for values, padding, filler in zip(tensors, layout.padding, (UNREAD, UNREAD, UNTOUCHED), strict=True)
    )
    return student, teacher, student if layout.gradient is None else gradient


def assert_untouched(gradient: torch.Tensor) -> None:
    """The memory between its rows."""
    whole = gradient.as_strided((len(gradient), gradient.stride(0)), gradient.stride())
    between = whole[:, gradient.shape[-1] :]
    assert ((between == UNTOUCHED) | between.isnan()).all()


def call(case: Problem, layout: Layout, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Results and gradient; checks that memory between the rows of the gradient is left alone."""
    from verl.on_policy_distillation import divergence_triton as module

    student, teacher, gradient = laid_out(case, layout, device)
    with mock.patch.object(module, "BLOCK", layout.block or module.BLOCK):
        weights = case.weights.to(device)
        if layout.cuts is not None:
            arguments = student, teacher, case.spec, case.temperatures, weights, layout.cuts
            results, gradient = sharded(module, *arguments, gradient_dtype=layout.gradient)
            return results.cpu(), gradient.cpu()
        results = module.divergence_rows_(student, teacher, case.spec, case.temperatures, weights, gradient)
    assert_untouched(gradient)
    return results.cpu(), gradient.cpu()


def call_pickled(arguments: bytes) -> bytes:
    function, *rest = pickle.loads(arguments)
    # Lanes that a select discards may overflow or be NaN: on purpose, and silently so on a device.
    with np.errstate(all="ignore"):
        return pickle.dumps(function(*rest, device="cpu"))


def call_in(process: ProcessPoolExecutor, function, *arguments):
    # As bytes: plain tensors would be handed over in shared memory, one file descriptor each.
    return pickle.loads(process.submit(call_pickled, pickle.dumps((function, *arguments))).result())


@pytest.fixture(scope="module", params=["interpreter", "cuda"] if torch.cuda.is_available() else ["interpreter"])
def run(request):
    """(function, *arguments) -> what the function returns, called where kernels can be launched."""
    if request.param == "cuda":
        yield lambda function, *arguments: function(*arguments, device="cuda")
        return
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
            process.submit(os.getpid).result()  # starts it
        yield partial(call_in, process)


@pytest.fixture(scope="module")
def kernel(run):
    """(case, layout) -> (results, gradient)."""
    return partial(run, call)


def close(actual, expected, dtype, factors, rounding=0.0, tolerance=1.0) -> None:
    """Both are (results, gradient). `factors` (rows,): what the gradients were multiplied by."""
    results, gradient = (side.double() for side in actual)
    expected_results, expected_gradient = (side.double() for side in expected)
    assert results.isfinite().all() and gradient.isfinite().all()
    bound = VALUE_TOLERANCE[dtype] * expected_results.abs().clamp(min=1.0)
    worst = ((results - expected_results).abs() / bound).amax(-1).tolist()
    assert max(worst) <= tolerance, f"results off by {worst} times the bound"
    relative = GRADIENT_TOLERANCE[dtype] * expected_gradient.abs().amax(-1)
    bound = torch.maximum(relative, bound[0] * factors.double().abs()).unsqueeze(-1)
    # 2**-25: half of the smallest float16.
    bound = tolerance * bound + rounding * expected_gradient.abs() + (2.0**-25 if rounding > 2.0**-24 else 0.0)
    excess = ((gradient - expected_gradient).abs() - bound).max().item()
    assert excess <= 0.0, f"gradient off by {excess:.2g} more than the bound"


def check(kernel, case: Problem, layout: Layout | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what the kernel gave."""
    layout = layout or Layout()
    dtype = case.student.dtype
    results, gradient = kernel(case, layout)
    assert results.dtype == dtype and gradient.dtype == (layout.gradient or dtype)
    rounding = ROUNDING[gradient.dtype] if gradient.dtype != dtype else 0.0
    expected = truth(case.student, case.teacher, case.spec, case.temperatures.student, case.weights)
    factors = case.weights / case.temperatures.student
    close((results, gradient), expected, dtype, factors, rounding)

    student, teacher = case.student.clone(), case.teacher.clone()
    twin_results = divergence.divergence_rows_(student, teacher, case.spec, case.temperatures, case.weights, student)
    close((results, gradient), (twin_results, student), dtype, factors, rounding, tolerance=2.0)
    assert torch.equal(results[-1], twin_results[-1])
    return results, gradient


def random_logits(rows: int, vocab: int, scale: float = 3.0, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return (scale * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))).to(dtype)


def five_rows(vocab: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Ordinary, far apart, and with zero probabilities: of the student, of the teacher, of both (not only shared)."""
    student, teacher = (random_logits(5, vocab, seed=seed, dtype=dtype) for seed in (0, 1))
    student[1] *= 1e4 / student[1].abs().max()
    teacher[1] *= 1e4 / teacher[1].abs().max()
    if vocab > 1:
        masked = [torch.rand(vocab, generator=torch.Generator().manual_seed(seed)) < 0.3 for seed in (2, 3)]
        masked[0][:2], masked[1][:2] = torch.tensor([True, False]), torch.tensor([False, True])
        student[2, masked[0]] = teacher[3, masked[1]] = -torch.inf
        student[4, masked[0]] = teacher[4, masked[1]] = -torch.inf
    return student, teacher


# ----------------------------------------------------------------------------------------------------------------------
# results and gradients


@pytest.mark.parametrize("vocab", [1, 2, 37, 1000, 1025])
@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_float32(kernel, kind, beta, vocab):
    check(kernel, problem(*five_rows(vocab), kind, beta))


@pytest.mark.parametrize(("kind", "beta"), KINDS + [("gkd", 1e-4), ("skew_reverse_kl", 1e-4)])
def test_float64(kernel, kind, beta):
    check(kernel, problem(*five_rows(1025, torch.float64), kind, beta), Layout(block=1024))


@pytest.mark.parametrize(("kind", "beta"), [("gkd", 0.0), ("gkd", 1.0), ("skew_reverse_kl", 1.0)])
def test_ends_of_beta(kernel, kind, beta):
    case = problem(*five_rows(37), kind, beta)
    other = problem(*five_rows(37), case.spec.resolve())
    assert all(map(torch.equal, kernel(case, Layout()), kernel(other, Layout())))


def test_skew_vanishes_at_beta_zero(kernel):
    results, gradient = kernel(problem(*five_rows(37), "skew_reverse_kl", 0.0), Layout())
    assert not results[0].any() and not gradient.any()


@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (3.0, 3.0), (0.3, 0.2), (1.0, 2.5)])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_temperatures(kernel, kind, beta, temperatures):
    check(kernel, problem(*five_rows(37), kind, beta, temperatures))


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_a_common_offset_costs_no_digits(kernel, kind, beta):
    student, teacher = ((random_logits(5, 37, seed=seed) * 16).round() / 16 for seed in (0, 1))
    plain = kernel(problem(student, teacher, kind, beta), Layout())
    shifted = kernel(problem(student + 1e5, teacher - 1e5, kind, beta), Layout())
    assert all(map(torch.equal, plain, shifted))


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_maxima_that_grow_over_many_blocks(kernel, kind, beta):
    """The sums of the first pass are moved to each new maximum, from masked blocks and over long distances too."""
    vocab = 1025
    student, teacher = five_rows(vocab)
    student[0], teacher[0] = student[0].sort().values, teacher[0].sort(descending=True).values
    student[1], teacher[1] = student[1].sort().values, teacher[1].sort().values
    student[2, :300] = -torch.inf
    student[3, :300] = teacher[3, :300] = -torch.inf
    teacher[4, :300] = teacher[4, -300:] = -torch.inf
    check(kernel, problem(student, teacher, kind, beta), Layout(block=128))


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_two_far_groups_of_entries(kernel, kind, beta):
    """Mass that the other side has 1e4 away, met before and after the other side's maximum."""
    student, teacher = random_logits(2, 300), random_logits(2, 300, seed=1)
    student[0, :200] -= 40.0
    teacher[0, 100:] += 1e4
    teacher[1, 100:] -= 1e4
    check(kernel, problem(student, teacher, kind, beta), Layout(block=64))


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_the_lowest_finite_logits_give_no_nan(kernel, kind, beta):
    lowest = torch.finfo(torch.float32).min
    student, teacher = random_logits(5, 200), random_logits(5, 200, seed=1)
    student[0, :70] = lowest
    teacher[1, :70] = lowest
    student[2, 70:] = teacher[2, :100] = lowest
    student[3], teacher[4] = lowest, lowest
    for temperatures in ((1.0, 1.0), (0.5, 2.0)):
        results, gradient = kernel(problem(student, teacher, kind, beta, temperatures), Layout(block=64))
        assert results.isfinite().all() and gradient.isfinite().all()


# Where M is almost S or T, divergence and gradient are small, and so must their errors be. Those of skew_reverse_kl are
# of second order in beta: the first order, whose rounding stays, cancels. Hence its larger beta.
@pytest.mark.parametrize(("kind", "beta"), [("gkd", 1e-4), ("gkd", 0.9999), ("skew_reverse_kl", 0.01)])
def test_relative_error_where_the_divergence_is_small(kernel, kind, beta):
    case = problem(random_logits(5, 1000), random_logits(5, 1000, seed=1), kind, beta)
    results, gradient = kernel(case, Layout())
    expected, expected_gradient = truth(case.student, case.teacher, case.spec, 0.7, case.weights)
    assert ((results[0] - expected[0]).abs() <= 1e-5 * expected[0]).all()
    assert ((gradient - expected_gradient).norm(dim=-1) <= 1e-5 * expected_gradient.norm(dim=-1)).all()


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_close_distributions_keep_their_digits(kernel, kind, beta):
    """The logits' differences are exact in float32 here, and what is computed of them keeps to their scale."""
    student = (random_logits(5, 1000) * 16).round() / 16
    teacher = student + (random_logits(5, 1000, seed=1) * 4).round() / 4096
    case = problem(student, teacher, kind, beta, (1.0, 1.0))
    results, gradient = kernel(case, Layout())
    expected, expected_gradient = truth(student, teacher, case.spec, 1.0, case.weights)
    assert ((results[:3] - expected[:3]).abs() <= 2e-7).all()
    # S - T of forward_kl is a difference of roundings of the two sums' own; elsewhere a common factor drops out.
    bound = 1e-3 if kind == "forward_kl" else 1e-6
    assert ((gradient - expected_gradient).norm(dim=-1) <= bound * expected_gradient.norm(dim=-1)).all()


def test_equal_sides_have_no_divergence(kernel):
    student, _ = five_rows(37)
    for kind, beta in KINDS:
        results, gradient = kernel(problem(student, student.clone(), kind, beta, (1.3, 1.3)), Layout())
        assert results[:3].abs().max() <= 1e-6 and gradient.abs().max() <= 1e-6
        assert (results[-1] == 1.0).all()


def test_agreement_is_of_the_first_of_equal_maxima(kernel):
    student, teacher = torch.zeros(4, 300), torch.zeros(4, 300)
    student[:, [70, 71, 250]] = 2.0
    for row, best in enumerate((70, 71, 250)):
        teacher[row, best] = 1.0
    results, _ = kernel(problem(student, teacher), Layout(block=64))
    assert results[-1].tolist() == [1.0, 0.0, 0.0, 1.0]


# ----------------------------------------------------------------------------------------------------------------------
# the entropy switch


@pytest.mark.parametrize("vocab", [37, 1025])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_switch(kernel, dtype, vocab):
    check(kernel, switching(*five_rows(vocab, dtype)), Layout(block=256))


@pytest.mark.parametrize(("threshold", "kind"), [(-1.0, "forward_kl"), (100.0, "reverse_kl")])
def test_a_switch_at_either_end_is_that_kl_exactly(kernel, threshold, kind):
    case, other = problem(*five_rows(300), threshold=threshold), problem(*five_rows(300), kind)
    for layout in (Layout(block=128), Layout(block=128, cuts=(100,))):
        assert all(map(torch.equal, kernel(case, layout), kernel(other, layout)))


@pytest.mark.parametrize("cuts", CUTS[:2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shards_switch_by_the_entropy_of_the_whole(kernel, dtype, cuts):
    check(kernel, switching(*random_rows(dtype)), Layout(block=32, cuts=cuts))


# ----------------------------------------------------------------------------------------------------------------------
# vocabularies in shards


@pytest.mark.parametrize("cuts", CUTS[:2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_shards_give_what_the_whole_gives(kernel, kind, beta, dtype, cuts):
    case = problem(*random_rows(dtype), kind, beta)
    factors = case.weights / case.temperatures.student
    close(check(kernel, case, Layout(block=32, cuts=cuts)), kernel(case, Layout(block=32)), dtype, factors)


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_shards_of_many_blocks_with_narrow_gradients_and_rows_that_lie_apart(kernel, kind, beta):
    layout = Layout(torch.bfloat16, (11, 3, 0), block=256, cuts=(300, 777))
    check(kernel, problem(*five_rows(1025), kind, beta), layout)


def test_agreement_over_shards_is_of_the_first_of_equal_maxima(kernel):
    student, teacher = torch.zeros(4, 300), torch.zeros(4, 300)
    student[:, [70, 71, 250]] = 2.0
    for row, best in enumerate((70, 71, 250)):
        teacher[row, best] = 1.0
    for cuts in ((71,), (70, 72), (100, 299)):
        results, _ = kernel(problem(student, teacher), Layout(block=64, cuts=cuts))
        assert results[-1].tolist() == [1.0, 0.0, 0.0, 1.0]


# ----------------------------------------------------------------------------------------------------------------------
# weights and memory


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_a_weight_of_zero_gives_no_gradient(kernel, kind, beta):
    weights = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.5])
    case = problem(*five_rows(37), kind, beta, weights=weights)
    _, gradient = kernel(case, Layout())
    assert not gradient[weights == 0.0].any() and gradient[4].any()
    check(kernel, case)


def test_weights_of_another_dtype_and_stride(kernel):
    case = problem(*five_rows(37))
    expanded = problem(*five_rows(37), weights=torch.tensor(0.25, dtype=torch.float64).expand(5))
    check(kernel, expanded)
    case.weights = torch.arange(20, dtype=torch.float32)[::4]
    check(kernel, case)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("padding", [(0, 0, 0), (11, 0, 3), (3, 27, 0)])
@pytest.mark.parametrize("rows", [1, 5])
def test_gradients_of_any_dtype_and_rows_that_lie_apart(kernel, rows, padding, dtype):
    student, teacher = (side[:rows] for side in five_rows(37))
    check(kernel, problem(student, teacher, "gkd", 0.5), Layout(dtype, padding))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrower_gradients_of_float64_logits(kernel, dtype):
    case = problem(*five_rows(37, torch.float64))
    _, gradient = kernel(case, Layout(dtype))
    _, expected = truth(case.student, case.teacher, case.spec, 0.7, case.weights)
    bound = 1.01 * ROUNDING[dtype] * expected.abs() + 2.0**-25
    assert gradient.dtype == dtype and ((gradient.double() - expected).abs() <= bound).all()


# ----------------------------------------------------------------------------------------------------------------------
# with the policy


def call_policy(case: Problem, policy: Policy, upstream: torch.Tensor, layout: Layout, device: str):
    """Results, and the gradient of sum(upstream * (log-prob, entropy, divergence))."""
    from verl.on_policy_distillation import divergence_triton as module

    student, teacher, gradient = laid_out(case, layout, device)
    settings = case.spec, case.temperatures, policy._replace(labels=policy.labels.to(device))
    with mock.patch.object(module, "BLOCK", layout.block or module.BLOCK):
        results = module.policy_rows_(student, teacher, *settings)
        assert torch.equal(student.cpu(), case.student)  # no gradient was written over it
        module.policy_gradient_(student, teacher, *settings, upstream.to(device), gradient)
    assert_untouched(gradient)
    return results.cpu(), gradient.cpu()


def call_policy_twin(case: Problem, policy: Policy, upstream: torch.Tensor, layout: Layout):
    """The same by torch."""
    settings = case.spec, case.temperatures, policy
    results = divergence.policy_rows_(case.student.clone(), case.teacher.clone(), *settings)
    student, teacher, gradient = laid_out(case, layout, "cpu")
    divergence.policy_gradient_(student, teacher, *settings, upstream, gradient)
    assert_untouched(gradient)
    return results, gradient


def policy_truth(case: Problem, policy: Policy, upstream: torch.Tensor):
    """The same in float64: the policy by autograd, the divergence by the table."""
    logits = case.student.to(policy.dtype).double().clone().requires_grad_()
    shifted = (logits - logits.detach().amax(-1, keepdim=True)) / policy.temperature
    log_p = torch.log_softmax(shifted, -1)
    log_prob = log_p.gather(-1, policy.labels.unsqueeze(-1)).squeeze(-1)
    known = log_p.masked_fill(log_p == -torch.inf, LOG_ZERO)
    entropy = -(known.exp() * known).sum(-1)
    (upstream[:2].double() * torch.stack((log_prob, entropy))).sum().backward()
    vocab = case.teacher.shape[-1]
    student = case.student[:, :vocab]
    results, gradient = truth(student, case.teacher, case.spec, case.temperatures.student, upstream[2])
    logits.grad[:, :vocab] += gradient
    log_prob = log_prob.detach().masked_fill(log_prob == -torch.inf, LOG_ZERO)
    return torch.cat((torch.stack((log_prob, entropy.detach())), results)), logits.grad


def check_policy(run, case: Problem, policy: Policy, layout: Layout | None = None) -> None:
    layout = layout or Layout(block=256)
    rows, dtype = len(case.student), case.student.dtype
    upstream = torch.linspace(-1.0, 1.5, 3 * rows).view(3, rows).to(dtype)
    expected, expected_gradient = policy_truth(case, policy, upstream)
    rounding = 0.0 if layout.gradient is None else ROUNDING[layout.gradient]
    calls = run(call_policy, case, policy, upstream, layout), call_policy_twin(case, policy, upstream, layout)
    for results, gradient in calls:
        assert results.dtype == dtype and results.shape == (8, rows)
        assert gradient.dtype == (layout.gradient or dtype) and gradient.shape == case.student.shape
        bound = VALUE_TOLERANCE[dtype] * expected.abs().clamp(min=1.0)
        assert ((results - expected).abs() <= bound).all()
        scale = expected_gradient.abs().amax(-1, keepdim=True).clamp(min=1e-2)
        bound = GRADIENT_TOLERANCE[dtype] * scale + rounding * expected_gradient.abs() + (2.0**-25 if rounding else 0.0)
        assert ((gradient.double() - expected_gradient).abs() <= bound).all()


@pytest.mark.parametrize(
    ("vocabs", "layout"),
    [
        ((300, 300), Layout(padding=(4, 4, 0), block=256)),
        ((300, 261), Layout(torch.float32, padding=(4, 11, 20), block=256)),
        ((1025, 1025), Layout(torch.float16, padding=(0, 15, 7), block=256)),
        ((1025, 512), Layout(block=256)),
    ],
)
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_the_policy_in_the_same_launch(run, kind, beta, vocabs, layout):
    """Over entries that the teacher does not have, too, with a maximum among them; and rows that lie apart."""
    student, _ = five_rows(vocabs[0])
    _, teacher = five_rows(vocabs[1])
    student[0, -1], student[2, :2] = student[0].max() + 2.0, -torch.inf
    labels = torch.tensor([0, 1, vocabs[0] - 1, 5, vocabs[0] // 2])
    labels[3:] = student[3:].argmax(-1)
    check_policy(run, problem(student, teacher, kind, beta), Policy(labels, 1.7, torch.float32), layout)


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_the_policy_in_float64(run, kind, beta):
    student, _ = five_rows(300, torch.float64)
    _, teacher = five_rows(261, torch.float64)
    policy = Policy(student.argmax(-1), 0.6, torch.float64)
    check_policy(run, problem(student, teacher, kind, beta), policy, Layout(block=128))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_policy_reads_rounded_logits(run, dtype):
    """Logits that both rounding and cutting off, as the interpreter does, take to the same; a 16-bit gradient."""
    student, teacher = random_logits(5, 300).to(dtype).float(), random_logits(5, 300, seed=1)
    student *= 1.0 + torch.finfo(dtype).eps / 8.0
    policy = Policy(torch.arange(5), 1.0, dtype)
    case = problem(student, teacher, "gkd", 0.3)
    check_policy(run, case, policy, Layout(torch.bfloat16, block=256))
    arguments = torch.zeros(3, 5), Layout(block=256)
    unrounded = run(call_policy, case, policy._replace(dtype=torch.float32), *arguments)[0]
    rounded = run(call_policy, case, policy, *arguments)[0]
    assert (unrounded[:2] - rounded[:2]).abs().min() > 1e-6  # it does make a difference
    torch.testing.assert_close(unrounded[2:], rounded[2:], rtol=1e-6, atol=1e-6)  # not to the divergence


def test_the_policy_and_the_switch(run):
    case = switching(*five_rows(300))
    check_policy(run, case, Policy(torch.arange(5) + 40, 0.9, torch.float32))


def test_a_label_of_no_probability(run):
    student, teacher = five_rows(300)
    student[:, 7] = -torch.inf
    policy = Policy(torch.full((5,), 7), 1.3, torch.float32)
    arguments = problem(student, teacher), policy, torch.ones(3, 5), Layout(block=256)
    results, gradient = run(call_policy, *arguments)
    assert (results[0] == LOG_ZERO).all() and gradient.isfinite().all()


# ----------------------------------------------------------------------------------------------------------------------
# under the head


def call_head(function, heads, keywords, is_compiled: bool, device: str):
    """What `function` returns for the heads, and their gradients, by the kernels or by torch; and the calls."""
    from verl.on_policy_distillation import divergence_triton

    student_hidden, student_weight, teacher_hidden, teacher_weight = (tensor.to(device) for tensor in heads)
    student_hidden.requires_grad_()
    student_weight.requires_grad_()
    keywords = {name: value.to(device) if torch.is_tensor(value) else value for name, value in keywords.items()}
    module, calls = divergence_triton if is_compiled else divergence, []
    watched = {
        name: mock.patch.object(divergence_triton, name, counted(getattr(divergence_triton, name), name, calls))
        for name in ("divergence_rows_", "policy_rows_", "policy_gradient_")
    }
    with mock.patch.object(head_module, "implementation", lambda student, spec: module), ExitStack() as stack:
        for patch in watched.values():
            stack.enter_context(patch)
        found = function(student_hidden, student_weight, teacher_hidden, teacher_weight, **keywords)
        if function is linear_divergence:
            found.loss.backward()
            columns = found.metrics
        else:
            weights = torch.linspace(-1.0, 1.0, len(found.log_prob)).to(found.log_prob)
            (weights * (found.log_prob + 0.3 * found.entropy + 0.7 * found.tokens.divergence)).sum().backward()
            columns = (found.log_prob, found.entropy, *found.tokens)
    columns = [column.detach().cpu() for column in columns]
    return columns, [student_hidden.grad.cpu(), student_weight.grad.cpu()], sorted(calls)


def counted(function, name: str, calls: list[str]):
    def call(*arguments):
        calls.append(name)
        return function(*arguments)

    return call


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", [linear_divergence, linear_token_divergence])
def test_the_head_on_kernels_gives_what_it_gives_on_torch(run, function, dtype, softcap):
    """In groups of chunks too: 11 tokens as 6 (4 + 2) and 5 (4 + 1)."""
    shapes = (11, 8), (300, 8), (11, 12), (280, 12)
    heads = [random_logits(*shape, scale=1.0, seed=seed).to(dtype) for seed, shape in enumerate(shapes)]
    keywords = {"distillation_type": "gkd", "beta": 0.4, "student_softcap": softcap, "chunking": Chunking(4, 6)}
    # Where the gradients have the logits' dtype there is nothing to collect: chunks of 4, 4 and 3 tokens.
    chunks = 3 if dtype == torch.float32 else 4
    calls = ["divergence_rows_"] * chunks
    if function is linear_token_divergence:
        keywords |= {"labels": torch.arange(11) * 27, "log_prob_temperature": 1.2}
        calls = ["policy_gradient_"] * chunks + ["policy_rows_"] * 3
    compiled = run(call_head, function, heads, keywords, True)
    expected = run(call_head, function, heads, keywords, False)
    assert (compiled[2], expected[2]) == (calls, [])
    # The interpreter cuts bfloat16 off where torch rounds: of the policy's logits, and of the gradients, a unit more.
    is_rounded = dtype == torch.bfloat16 and function is linear_token_divergence
    for index, (actual, wanted) in enumerate(zip(compiled[0], expected[0], strict=True)):
        of_policy = is_rounded and index < 2
        bound = (torch.finfo(dtype).eps if of_policy else 2e-6) * wanted.abs().max().clamp(min=1.0)
        assert actual.dtype == wanted.dtype and (actual - wanted).abs().max() <= bound
    for actual, wanted in zip(compiled[1], expected[1], strict=True):
        bound = (2e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps) * wanted.abs().max()
        assert actual.dtype == wanted.dtype and 0.0 < wanted.abs().max()
        assert (actual - wanted).abs().max() <= bound


# ----------------------------------------------------------------------------------------------------------------------
# without a launch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_rows_launch_nothing(dtype):
    results, gradient = call(problem(*(torch.empty(0, 37, dtype=dtype) for _ in range(2))), Layout(), "cpu")
    assert results.shape == (6, 0) and results.dtype == dtype and gradient.shape == (0, 37)


def _total_variation(d, beta):
    d.s.sub_(d.t)
    return d.s.abs().sum(-1) / 2.0


@pytest.mark.parametrize("kind", ["total_variation", "reverse_kl"])
def test_a_divergence_of_the_users_own_is_left_to_torch(monkeypatch, kind):
    from verl.on_policy_distillation import divergence_triton

    case = problem(*five_rows(37), kind)
    on_device = SimpleNamespace(is_cuda=True)
    if kind in DIVERGENCES:
        assert implementation(on_device, case.spec) is divergence_triton
    monkeypatch.setitem(DIVERGENCES, kind, _total_variation)
    assert implementation(on_device, case.spec) is divergence
    student, teacher = case.student.clone(), case.teacher.clone()
    expected = divergence.divergence_rows_(student, teacher, case.spec, case.temperatures, case.weights, student)
    chosen = implementation(on_device, case.spec)
    gradient = torch.empty_like(case.student)
    results = chosen.divergence_rows_(
        case.student.clone(), case.teacher.clone(), case.spec, case.temperatures, case.weights, gradient
    )
    assert torch.equal(results, expected) and torch.equal(gradient, student)


def test_the_switch_is_compiled():
    from verl.on_policy_distillation import divergence_triton

    assert implementation(SimpleNamespace(is_cuda=True), DivergenceSpec(entropy_threshold=1.0)) is divergence_triton


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_torch_is_used_without_a_device(kind, beta):
    assert implementation(torch.zeros(1), DivergenceSpec(kind, beta)) is divergence


# ----------------------------------------------------------------------------------------------------------------------
# compilation


class TargetWithoutDevice(SimpleNamespace):
    """As much of a driver of Triton's as compiling needs.

    Its device's number is nobody else's, nor that of another target: what is compiled is kept by device.
    """

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return -self.capability

    def get_current_stream(self, device):
        return 0


@pytest.fixture(params=[90])
def compiled(request, monkeypatch, tmp_path_factory):
    """The kernels that calls would have launched, compiled to machine code in place of it: for an H100 by default."""
    import triton

    from verl.on_policy_distillation import divergence_triton as module

    kernels = []
    target = TargetWithoutDevice(capability=request.param)

    class Launcher:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **kwargs: kernels.append(self.compile(*args, grid=grid, **kwargs))

        def compile(self, *args, **kwargs):
            kernel = self.kernel.warmup(*args, **kwargs)
            assert kernel.metadata.target == target.get_current_target()
            return kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "compiled"))
    monkeypatch.setattr(triton.runtime.driver, "_active", target)
    for name in ("_rows_kernel", "_statistics_kernel", "_mixture_kernel", "_gradient_kernel", "_policy_kernel"):
        monkeypatch.setattr(module, name, Launcher(getattr(module, name)))
    return kernels


def reads_wide(kernel) -> bool:
    """128 bits at a time, copied to shared memory while others are computed."""
    copies = [line for line in kernel.asm["ptx"].splitlines() if "cp.async.c" in line and "group" not in line]
    return bool(copies) and all("0x10" in line for line in copies)


@dataclass
class MachineCode:
    """Registers of a thread, bytes of its stack (where registers are spilled), of shared memory; and its loops."""

    registers: int
    stack: int
    shared: int
    loops: list[list[str]]  # instructions; those that copy the next blocks' logits while one is computed

    @property
    def per_logit(self) -> float:
        from verl.on_policy_distillation.divergence_triton import ENTRIES_PER_THREAD

        return sum(map(len, self.loops)) / ENTRIES_PER_THREAD


def machine_code(kernel, folder: Path) -> MachineCode:
    """As the disassembler that comes with Triton reads it."""
    import triton

    (folder / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

    def dump(option: str) -> str:
        command = [str(tool), option, str(folder / "kernel.cubin")]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", dump("-res-usage")))
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", dump("-sass"), re.MULTILINE)
    lines, loops = {int(address, 16): instruction for address, instruction in lines}, []
    for address, instruction in lines.items():
        jump = re.search(r"BRA\S*\s.*?(0x[0-9a-f]+)", instruction)
        if jump and int(jump[1], 16) < address:  # back: what is between is a loop
            loops.append([lines[at] for at in lines if int(jump[1], 16) <= at <= address])
    loops = [loop for loop in loops if any("LDGSTS" in instruction for instruction in loop)]
    stack = int(usage["STACK"]) + int(usage["LOCAL"])
    return MachineCode(int(usage["REG"]), stack, kernel.metadata.shared, loops)


# Of models: a multiple of 16 entries, and two that rows are padded for.
SIZES = (151936, 151643, 50257)


def zeros_at_size(kind: str, vocab: int) -> tuple[Problem, Layout]:
    """Rows as `padded_rows` of divergence.py lays them out."""
    switch = kind == "entropy_switch"
    zeros = torch.zeros(2, vocab)
    case = problem(zeros, zeros, "reverse_kl" if switch else kind, 0.5, threshold=0.5 if switch else None)
    return case, Layout(torch.bfloat16, (-vocab % 16,) * 3)


def assert_loops_are_wide(code: MachineCode) -> None:
    """Whole blocks are read and written by 16 bytes, whatever is at the end of a row."""
    moves = [
        instruction for loop in code.loops for instruction in loop if re.search(r"\b(LDG|LDGSTS|STG)\b", instruction)
    ]
    assert moves and all(".128" in move for move in moves), moves


@pytest.mark.parametrize("compiled", [90, 80], indirect=True)
@pytest.mark.parametrize("kind", list(INSTRUCTIONS))
def test_two_programs_share_a_multiprocessor(compiled, tmp_path, kind):
    """65,536 registers, for 512 threads; nothing spilled; two programs' shared memory in an A100's 164 KiB."""
    for vocab in SIZES:
        call(*zeros_at_size(kind, vocab), "cpu")
    assert all(kernel is compiled[0] for kernel in compiled)  # one for all sizes
    found = machine_code(compiled[0], tmp_path)
    assert found.registers <= 128 and found.stack == 0
    assert 0 < found.shared <= 33 * 1024  # 32 KiB of logits, and what the warps tell each other
    assert len(found.loops) == READS[kind]
    assert_loops_are_wide(found)


@pytest.mark.parametrize("kind", list(INSTRUCTIONS))
def test_the_roofline_counts_the_instructions_of_the_kernel(compiled, tmp_path, kind):
    call(*zeros_at_size(kind, SIZES[0]), "cpu")
    assert machine_code(compiled[0], tmp_path).per_logit == pytest.approx(INSTRUCTIONS[kind], rel=0.1)


@pytest.mark.parametrize("compiled", [90, 80], indirect=True)
@pytest.mark.parametrize("kind", ["reverse_kl", "gkd"])
def test_the_policy_compiles(compiled, tmp_path, kind):
    policy = Policy(torch.zeros(2, dtype=torch.int64), 1.0, torch.bfloat16)
    for vocab in SIZES:
        case, layout = zeros_at_size(kind, vocab)
        call_policy(case, policy, torch.ones(3, 2), layout, "cpu")
    assert len(set(map(id, compiled))) == 2
    for kernel, reads in zip(compiled[:2], (READS[kind] - 1, READS[kind]), strict=True):
        found = machine_code(kernel, tmp_path)
        assert found.registers <= 128 and found.stack == 0 and found.shared <= 33 * 1024
        assert len(found.loops) == reads
        assert_loops_are_wide(found)
        # As `_Costs.kernel` of roofline.py counts them: a part of those of the divergence, and the policy's.
        counted = INSTRUCTIONS[kind] * reads / READS[kind] + POLICY_INSTRUCTIONS
        assert found.per_logit == pytest.approx(counted, rel=0.15)


DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float64),
]


@pytest.mark.parametrize(
    ("kind", "dtype", "gradient"),
    # Narrower gradients are written alike for all kinds; the float64 passes of skew_reverse_kl are compiled one by one
    # below.
    [(kind, torch.float32, torch.bfloat16) for kind, _ in KINDS]
    + [(kind, torch.float64, torch.float64) for kind, _ in KINDS[:3]]
    + [("reverse_kl", *dtypes) for dtypes in (DTYPES[0], DTYPES[2], (torch.float64, torch.bfloat16))],
)
def test_compiles_for_hopper(compiled, kind, dtype, gradient):
    call(problem(*(torch.zeros(2, 48, dtype=dtype) for _ in range(2)), kind, 0.5), Layout(gradient), "cpu")
    (kernel,) = compiled
    assert kernel.asm["cubin"]
    if dtype == gradient == torch.float64:
        assert "f32" not in kernel.asm["ttir"]  # a constant or argument of fewer digits
    if dtype == torch.float32:
        assert reads_wide(kernel)
        assert "xf64" not in kernel.asm["ttir"]  # nor is a block computed in more digits than that


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("kind", "launches"), [("reverse_kl", 2), ("forward_kl", 2), ("gkd", 3), ("skew_reverse_kl", 3)]
)
def test_the_verbs_compile_for_hopper(compiled, kind, launches, dtype):
    call(problem(*(torch.zeros(2, 48, dtype=dtype) for _ in range(2)), kind, 0.5), Layout(cuts=()), "cpu")
    assert len(compiled) == launches and all(kernel.asm["cubin"] for kernel in compiled)
    for kernel in compiled:
        if dtype == torch.float64:
            assert "f32" not in kernel.asm["ttir"]
        else:
            assert reads_wide(kernel) and "xf64" not in kernel.asm["ttir"]


@pytest.mark.parametrize("dtypes", DTYPES)
def test_the_switch_compiles_for_hopper(compiled, dtypes):
    case = problem(*(torch.zeros(2, 48, dtype=dtypes[0]) for _ in range(2)), threshold=0.5)
    call(case, Layout(dtypes[1]), "cpu")
    call(case, Layout(cuts=()), "cpu")  # two verbs: it has no sums of its own
    assert len(compiled) == 3 and all(kernel.asm["cubin"] for kernel in compiled)
    if dtypes[0] == dtypes[1] == torch.float64:
        assert not any("f32" in kernel.asm["ttir"] for kernel in compiled)


# Strides of one, of no and of another alignment are compiled apart; numbers of rows and entries are not.
@pytest.mark.parametrize("vocab", [1, 37, 151936])
def test_compiles_for_any_shape(compiled, vocab):
    for rows in (1, 3):
        call(problem(torch.zeros(rows, vocab), torch.zeros(rows, vocab), "gkd", 0.1), Layout(), "cpu")
    assert compiled[0].asm["cubin"] and len(compiled) == 2 and compiled[1] is compiled[0]
