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
"""`divergence_rows_` of `verl/utils/divergence.py` in Triton: the same results, with two or three reads of the logits.

One program walks one row of both sides in blocks. With x and y the tempered logits less the row's maximum,
e = exp(x), f = exp(y) and L = sum e, N = sum f:

1. The sums L, sum e x, sum e (x - y) and their twins N, sum f y, sum f (y - x), while the maxima are still being
   found: when one grows, what was summed so far is moved to the new one. Both KLs and both entropies follow, e.g.
   KL(S||T) = sum e (x - y) / L + log(N / L). The log-sum-exps themselves cancel in x - y, so close distributions keep
   more digits than log-probabilities would.
2. gkd and skew_reverse_kl alone: the sums over log(M / S) and log(M / T), which need L and N.
3. The gradient.

A student's x, and likewise y, of -inf is a probability of zero, with `LOG_ZERO` for its logarithm. All sums are kept
per lane of the block and added up at the end of the row.

In float32, logits further than 1e32 apart count as 1e32 apart, which keeps the sums over a row finite.
"""

import torch
import triton
import triton.language as tl

from verl.utils import divergence
from verl.utils.divergence import DIVERGENCES, LOG_ZERO, DivergenceSpec, TokenDivergence

__all__ = ["divergence_rows_"]

# What the kernel computes. A key of DIVERGENCES that has another function is left to torch.
_COMPILED = {
    "reverse_kl": divergence._reverse_kl,
    "forward_kl": divergence._forward_kl,
    "gkd": divergence._gkd,
    "skew_reverse_kl": divergence._skew_reverse_kl,
}

# Float32 entries of a row in one step, and of those in one thread. With 2048 and 8, a program has 8 warps, and its
# eight sums per lane fill half of the 128 registers (what ptxas gives it) that leave room for two programs on one of
# an H100's 132 multiprocessors. Two, because a chunk of 220 rows is then resident at once, one program computing while
# the other waits; 16 KiB of loads per program and step, because memory gives its full speed only to some 2 MiB of
# requests. One choice for all rows: it is computed, not measured, and other sizes would only be compiled in vain.
BLOCK = 2048
ENTRIES_PER_THREAD = 8

_LOG_ZERO = tl.constexpr(LOG_ZERO)


@triton.jit
def _parameter(value, dtype: tl.constexpr):
    """A float argument in `dtype`: compiled code gets a float64 scalar, the interpreter a Python float."""
    return (tl.zeros((), dtype) + value).to(dtype)


@triton.jit
def _load(row, start, vocab, BLOCK: tl.constexpr):
    """Entries `start` to `start + BLOCK` of a row, (BLOCK,); -inf after its end."""
    entry = start + tl.arange(0, BLOCK)
    return tl.load(row + entry, mask=entry < vocab, other=-float("inf"))


@triton.jit
def _known(x, if_zero, FAR: tl.constexpr):
    """x with `if_zero` in place of -inf, and finite."""
    return tl.where(x == -float("inf"), if_zero, tl.where(x < -FAR, -FAR, x))


@triton.jit
def _step(highest, logits, rate, FAR: tl.constexpr):
    """The maximum (scalar) with `logits` (BLOCK,) added, and by how much it grew, tempered."""
    grown = tl.maximum(highest, tl.max(logits, axis=0))
    step = (grown - highest) * rate
    return grown, tl.where(step > FAR, FAR, step)  # an infinite step times an empty sum would be NaN


@triton.jit
def _moved(kept, lost, own, cross, step, other_step):
    """One side's sums (BLOCK,) after its maximum has grown by `step`, and the other side's by `other_step`."""
    factor = tl.exp(-step)
    own = (own - step * (kept + lost)) * factor
    cross = (cross - step * (kept + lost) + other_step * kept) * factor
    return kept * factor, lost * factor, own, cross


@triton.jit
def _added(kept, lost, own, cross, e, x, gap, is_lost):
    """One side's sums (BLOCK,) with another block: of e, apart where y is -inf (it counts as 0), e x and e (x - y)."""
    return kept + tl.where(is_lost, 0.0, e), lost + tl.where(is_lost, e, 0.0), own + e * x, cross + e * gap


@triton.jit
def _total(kept, lost, own, cross):
    """Of the lanes' sums of one side: the mass, then what is lost and the other two, divided by it."""
    lost_mass = tl.sum(lost, axis=0)
    mass = tl.sum(kept, axis=0) + lost_mass
    return mass, lost_mass / mass, tl.sum(own, axis=0) / mass, tl.sum(cross, axis=0) / mass


@triton.jit
def _statistics(
    student, teacher, vocab, student_rate, teacher_rate, LOWEST: tl.constexpr, FAR: tl.constexpr, BLOCK: tl.constexpr
):
    """First pass: (maximum, mass, rate of each side), the (reverse, forward) KL, both entropies; scalars."""
    dtype: tl.constexpr = student.dtype.element_ty
    # Not -inf: -inf - -inf would be NaN where a row begins with a whole block of them.
    s_high = tl.full((), LOWEST, dtype)
    t_high = tl.full((), LOWEST, dtype)
    s_kept = tl.zeros((BLOCK,), dtype)
    s_lost = tl.zeros((BLOCK,), dtype)
    s_own = tl.zeros((BLOCK,), dtype)
    s_cross = tl.zeros((BLOCK,), dtype)
    t_kept = tl.zeros((BLOCK,), dtype)
    t_lost = tl.zeros((BLOCK,), dtype)
    t_own = tl.zeros((BLOCK,), dtype)
    t_cross = tl.zeros((BLOCK,), dtype)
    for start in range(0, vocab, BLOCK):
        z = _load(student, start, vocab, BLOCK)
        u = _load(teacher, start, vocab, BLOCK)
        s_high, s_step = _step(s_high, z, student_rate, FAR)
        t_high, t_step = _step(t_high, u, teacher_rate, FAR)
        if s_step + t_step > 0:  # a few times a row: the other blocks are spared a third of the work
            s_kept, s_lost, s_own, s_cross = _moved(s_kept, s_lost, s_own, s_cross, s_step, t_step)
            t_kept, t_lost, t_own, t_cross = _moved(t_kept, t_lost, t_own, t_cross, t_step, s_step)
        x = (z - s_high) * student_rate
        y = (u - t_high) * teacher_rate
        is_x_lost = y == -float("inf")
        is_y_lost = x == -float("inf")
        e = tl.exp(x)
        f = tl.exp(y)
        x = _known(x, 0.0, FAR)
        y = _known(y, 0.0, FAR)
        s_kept, s_lost, s_own, s_cross = _added(s_kept, s_lost, s_own, s_cross, e, x, x - y, is_x_lost)
        t_kept, t_lost, t_own, t_cross = _added(t_kept, t_lost, t_own, t_cross, f, y, y - x, is_y_lost)
    s_mass, s_lost_part, s_own_mean, s_cross_mean = _total(s_kept, s_lost, s_own, s_cross)
    t_mass, t_lost_part, t_own_mean, t_cross_mean = _total(t_kept, t_lost, t_own, t_cross)
    log_ratio = tl.log(t_mass / s_mass)  # less of a rounding than the difference of two logarithms
    reverse_kl = s_cross_mean + log_ratio - s_lost_part * (_LOG_ZERO + tl.log(t_mass))
    forward_kl = t_cross_mean - log_ratio - t_lost_part * (_LOG_ZERO + tl.log(s_mass))
    normal = (s_high, s_mass, student_rate, t_high, t_mass, teacher_rate)
    return normal, (reverse_kl, forward_kl), (tl.log(s_mass) - s_own_mean, tl.log(t_mass) - t_own_mean)


@triton.jit
def _expm1(x, exp_x):
    """exp(x) - 1, given exp(x). Triton's own is a library call that its interpreter lacks."""
    if x.dtype == tl.float64:
        # Kahan: (w - 1) / log w varies slowly, so that it may be taken at the rounded w = exp(x).
        near = tl.where(exp_x == 1.0, x, (exp_x - 1.0) * x / tl.log(exp_x))
    else:
        series = 1 / 5040.0 + x * (1 / 40320.0 + x * (1 / 362880.0))
        series = 1 / 24.0 + x * (1 / 120.0 + x * (1 / 720.0 + x * series))
        near = x * (1.0 + x * (1 / 2.0 + x * (1 / 6.0 + x * series)))
    return tl.where(tl.abs(x) < 0.5, near, exp_x - 1.0)


@triton.jit
def _log_mixture_over(log_ratio, weight, rest):
    """log(M / P), M / P and M / P - 1 for M = weight Q + rest P and log_ratio = log Q - log P.

    A small M / P - 1 keeps its digits in the logarithm, and a small M / P, as the sum of its two terms, does too.
    """
    # Keeps the exponential finite, and above zero. An entry beyond the limit has e^-80 of the other side's mass
    # (e^-700 in float64). Not tl.clamp, which would replace NaN.
    limit: tl.constexpr = 700.0 if log_ratio.dtype == tl.float64 else 80.0
    log_ratio = tl.where(log_ratio > limit, limit, tl.where(log_ratio < -limit, -limit, log_ratio))
    ratio = tl.exp(log_ratio)
    excess = weight * _expm1(log_ratio, ratio)
    over = tl.where(excess < -0.5, weight * ratio + rest, 1.0 + excess)
    # log1p by Kahan's quotient, see `_expm1`.
    log_over = tl.where(over == 1.0, excess, tl.log(over) * (excess / (over - 1.0)))
    return log_over, over, excess


@triton.jit
def _skew_slope(log_ratio, beta, rest):
    """log(S / M), and h of the table in `verl/utils/divergence.py` less 1 - beta, which drops out of the gradient."""
    log_m_over_s, m_over_s, excess = _log_mixture_over(-log_ratio, beta, rest)
    return -log_m_over_s, rest * (excess / m_over_s) - log_m_over_s


@triton.jit
def _distributions(z, u, normal, FAR: tl.constexpr):
    """S, T and log S - log T of a block of logits, (BLOCK,). `normal`: each side's maximum, mass and rate, scalars."""
    s_high, s_mass, student_rate, t_high, t_mass, teacher_rate = normal
    x = (z - s_high) * student_rate
    y = (u - t_high) * teacher_rate
    # What x and y are where the logarithm is LOG_ZERO.
    x_known = _known(x, _LOG_ZERO + tl.log(s_mass), FAR)
    y_known = _known(y, _LOG_ZERO + tl.log(t_mass), FAR)
    return tl.exp(x) * (1.0 / s_mass), tl.exp(y) * (1.0 / t_mass), x_known - y_known + tl.log(t_mass / s_mass)


@triton.jit
def _mixture_means(
    student,
    teacher,
    vocab,
    normal,
    beta,
    rest,
    KIND: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Second pass: the divergence, and the student's mean of what its gradient subtracts; scalars."""
    dtype: tl.constexpr = student.dtype.element_ty
    value_sum = tl.zeros((BLOCK,), dtype)
    mean_sum = tl.zeros((BLOCK,), dtype)
    blocks = tl.cdiv(vocab, BLOCK)
    for index in range(0, blocks):
        # Backwards: the cache holds the end of the row, which the first pass has just read.
        start = (blocks - 1 - index) * BLOCK
        z = _load(student, start, vocab, BLOCK)
        u = _load(teacher, start, vocab, BLOCK)
        s, t, log_ratio = _distributions(z, u, normal, FAR)
        if KIND == "gkd":
            log_m_over_s, _, _ = _log_mixture_over(-log_ratio, beta, rest)
            log_m_over_t, _, _ = _log_mixture_over(log_ratio, rest, beta)
            mean_sum += s * log_m_over_s
            value_sum -= beta * (t * log_m_over_t) + rest * (s * log_m_over_s)
        else:
            log_s_over_m, h = _skew_slope(log_ratio, beta, rest)
            mean_sum += s * h
            value_sum += s * log_s_over_m
    return tl.sum(value_sum, axis=0), tl.sum(mean_sum, axis=0)


@triton.jit
def _write_gradient(
    student,
    teacher,
    gradient,
    factor,
    vocab,
    normal,
    mean,
    beta,
    rest,
    KIND: tl.constexpr,
    IS_BACKWARD: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Last pass: `factor` * tau * dD/dz. Returns the first entry of the student's maximum (scalar), which it meets."""
    best = tl.full((BLOCK,), 2147483647, tl.int32)
    blocks = tl.cdiv(vocab, BLOCK)
    for index in range(0, blocks):
        if IS_BACKWARD:  # against the direction of the pass before, as in `_mixture_means`
            start = (blocks - 1 - index) * BLOCK
        else:
            start = index * BLOCK
        entry = start + tl.arange(0, BLOCK)
        z = _load(student, start, vocab, BLOCK)
        u = _load(teacher, start, vocab, BLOCK)
        best = tl.minimum(best, tl.where(z == normal[0], entry, 2147483647))
        s, t, log_ratio = _distributions(z, u, normal, FAR)
        if KIND == "reverse_kl":
            slope = s * (log_ratio - mean)
        elif KIND == "forward_kl":
            slope = s - t
        elif KIND == "gkd":
            log_m_over_s, _, _ = _log_mixture_over(-log_ratio, beta, rest)
            slope = s * rest * (mean - log_m_over_s)
        else:
            _, h = _skew_slope(log_ratio, beta, rest)
            slope = s * (h - mean)
        slope *= factor
        if gradient.dtype.element_ty.primitive_bitwidth == 16:
            slope = slope.to(tl.float32)  # from float64 there is no direct way
        tl.store(gradient + entry, slope.to(gradient.dtype.element_ty), mask=entry < vocab)
    return tl.min(best, axis=0)


@triton.jit(do_not_specialize=["rows"])  # the last chunk's number may be any
def _rows_kernel(
    student,
    teacher,
    gradient,
    results,
    factors,
    student_stride,
    teacher_stride,
    gradient_stride,
    rows,
    vocab,
    student_rate: tl.float64,
    teacher_rate: tl.float64,
    beta: tl.float64,
    rest: tl.float64,
    KIND: tl.constexpr,
    LOWEST: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row. student, teacher, gradient: (rows, vocab), with strides from row to row.

    results: (6, rows); factors: (rows,), what multiplies the gradient; the rates: 1 / temperature; rest: 1 - beta.
    """
    dtype: tl.constexpr = student.dtype.element_ty
    is_mixture: tl.constexpr = KIND == "gkd" or KIND == "skew_reverse_kl"
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    gradient += row * gradient_stride
    student_rate = _parameter(student_rate, dtype)
    teacher_rate = _parameter(teacher_rate, dtype)
    beta = _parameter(beta, dtype)
    rest = _parameter(rest, dtype)

    normal, divergences, entropies = _statistics(
        student, teacher, vocab, student_rate, teacher_rate, LOWEST, FAR, BLOCK
    )
    reverse_kl, forward_kl = divergences
    value = reverse_kl
    mean = reverse_kl
    if KIND == "forward_kl":
        value = forward_kl
    if is_mixture:
        value, mean = _mixture_means(student, teacher, vocab, normal, beta, rest, KIND, FAR, BLOCK)
    factor = tl.load(factors + row)
    best = _write_gradient(
        student, teacher, gradient, factor, vocab, normal, mean, beta, rest, KIND, not is_mixture, FAR, BLOCK
    )
    # A row of NaN has no maximum.
    is_agreed = tl.load(teacher + best, mask=best < vocab, other=-float("inf")) == normal[3]

    # The order of TokenDivergence's fields.
    results += row
    tl.store(results, value)
    tl.store(results + rows, reverse_kl)
    tl.store(results + 2 * rows, forward_kl)
    tl.store(results + 3 * rows, entropies[0])
    tl.store(results + 4 * rows, entropies[1])
    tl.store(results + 5 * rows, is_agreed.to(dtype))


def _block_and_warps(dtype: torch.dtype) -> tuple[int, int]:
    """Entries that a program takes at once, and its warps. Wider entries come in fewer, for the registers' sake."""
    block = BLOCK * 4 // dtype.itemsize
    return block, max(1, block // (32 * ENTRIES_PER_THREAD))


def divergence_rows_(
    student: torch.Tensor,
    teacher: torch.Tensor,
    spec: DivergenceSpec,
    student_temperature: float,
    weights: torch.Tensor,
    gradient: torch.Tensor,
) -> torch.Tensor:
    """`verl.utils.divergence.divergence_rows_`, whose arguments and results these are, for CUDA tensors.

    The rows may lie apart; their entries may not. A divergence of the user's own goes to the function in torch.
    """
    kind = spec.resolve()
    if _COMPILED.get(kind) is not DIVERGENCES[kind]:
        return divergence.divergence_rows_(student, teacher, spec, student_temperature, weights, gradient)
    rows, vocab = student.shape
    results = student.new_empty((len(TokenDivergence._fields), rows))
    if rows == 0:
        return results
    block, num_warps = _block_and_warps(student.dtype)
    with torch.cuda.device_of(student):  # Triton launches on the current device
        _rows_kernel[(rows,)](
            student,
            teacher,
            gradient,
            results,
            (weights / student_temperature).to(student.dtype).contiguous(),
            student.stride(0),
            teacher.stride(0),
            gradient.stride(0),
            rows,
            vocab,
            1.0 / student_temperature,
            1.0 / spec.temperature,
            spec.beta,
            1.0 - spec.beta,
            KIND=kind,
            LOWEST=torch.finfo(student.dtype).min,
            FAR=1e32 if student.dtype == torch.float32 else 1e300,
            BLOCK=block,
            num_warps=num_warps,
        )
    return results
