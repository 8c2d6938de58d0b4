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
"""The verbs of `divergence.py` in Triton: the same results, with two or three reads of the logits.

One program walks one row of both sides in blocks:

1. The statistics, while the maxima are still being found: when one grows, what was summed so far is moved to the new
   one, as `merge` moves the sums of a shard.
2. gkd and skew_reverse_kl alone: their sums, which need the masses.
3. The gradient.

For rows that are whole one launch does all three, `_rows_kernel`, or all three together with the policy's log-prob and
entropy, `_policy_kernel`; for shards of the vocabulary each is a launch of its own, and what an all-reduce has made of
the results is `normalize`d and `finalize`d by torch in between.

Bytes of a logit, both sides in float32 and a 16-bit gradient: 8 for each read and 2 for the gradient, 18 for the KLs
and 26 for the mixtures. Loads of the next blocks are on their way while one is computed (`NUM_STAGES`).

The blocks that a row has whole are read and written without a mask, 16 bytes at a time, whatever the number of its
entries. A mask keeps the compiler from reading vectors, so only the block at a row's end has one. That takes rows that
begin at multiples of 16 entries, as `padded_rows` of `divergence.py` lays them out. Others (odd strides, shards that
begin anywhere) are read and written entry by entry: correct, and slower.

A student's x, and likewise y, of -inf is a probability of zero, with `LOG_ZERO` for its logarithm. All sums are kept
per lane of the block and added up at the end of the row.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl

from verl.on_policy_distillation import divergence
from verl.on_policy_distillation.divergence import (
    DIVERGENCES,
    ENTROPY_SWITCH,
    LOG_ZERO,
    DivergenceSpec,
    Normalized,
    Policy,
    Statistics,
    Temperatures,
    TokenDivergence,
    function_of,
)

__all__ = [
    "divergence_rows_",
    "gradient",
    "is_compiled",
    "mixture_sums",
    "policy_gradient_",
    "policy_rows_",
    "statistics",
]

# What the kernels compute: these names, as long as nobody has given them another function.
_COMPILED = {name: DIVERGENCES[name] for name in ("reverse_kl", "forward_kl", "gkd", "skew_reverse_kl")}
_COMPILED["entropy_switch"] = ENTROPY_SWITCH
_MIXTURES = ("gkd", "skew_reverse_kl")


def is_compiled(spec: DivergenceSpec) -> bool:
    """Whether the kernels compute this divergence. One of the user's own is left to torch."""
    return _COMPILED.get(spec.resolve()) is function_of(spec)


# Float32 entries of a row in one step, and of those in one thread. With 2048 and 8, a program has 8 warps, and its
# eight sums per lane fill half of the 128 registers (what `_options` allows) that leave room for two programs on one of
# an H100's 132 multiprocessors, one program computing while the other waits; 16 KiB of loads per program and step,
# because memory gives its full speed only to some 2 MiB of requests. One choice for all rows: it is computed, not
# measured, and other sizes would only be compiled in vain.
BLOCK = 2048
ENTRIES_PER_THREAD = 8

# Blocks that are on their way or being computed. With three, asynchronous copies of two blocks of each side run ahead
# of the one at hand; without them every step would wait for its loads. Costs 32 KiB of shared memory, and no register.
NUM_STAGES = 3

_TRITON_DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
_REGISTERS = 65536  # of a multiprocessor

_LOG_ZERO = tl.constexpr(LOG_ZERO)
_NO_ENTRY = tl.constexpr(2**31 - 1)


@triton.jit
def _parameter(value, dtype: tl.constexpr):
    """A float argument in `dtype`: compiled code gets a float64 scalar, the interpreter a Python float."""
    return (tl.zeros((), dtype) + value).to(dtype)


@triton.jit
def _load(row, start, end, BLOCK: tl.constexpr):
    """Entries `start` to `start + BLOCK` of a row, (BLOCK,); -inf from `end` on. None: the row has them all."""
    entry = start + tl.arange(0, BLOCK)
    if end is None:
        logits = tl.load(row + entry)
    else:
        logits = tl.load(row + entry, mask=entry < end, other=-float("inf"))
    return logits


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
def _moved(sums, step, other_step):
    """One side's sums (BLOCK,) after its maximum has grown by `step`, and the other side's by `other_step`."""
    kept, lost, own, cross = sums
    factor = tl.exp(-step)
    own = (own - step * (kept + lost)) * factor
    cross = (cross - step * (kept + lost) + other_step * kept) * factor
    return kept * factor, lost * factor, own, cross


@triton.jit
def _added(sums, e, x, gap, is_lost):
    """One side's sums (BLOCK,) with another block: of e, apart where y is -inf (it counts as 0), e x and e (x - y)."""
    kept, lost, own, cross = sums
    return kept + tl.where(is_lost, 0.0, e), lost + tl.where(is_lost, e, 0.0), own + e * x, cross + e * gap


@triton.jit
def _total(sums):
    """Of the lanes' sums of one side: its four sums, scalars."""
    kept, lost, own, cross = sums
    return tl.sum(kept, axis=0), tl.sum(lost, axis=0), tl.sum(own, axis=0), tl.sum(cross, axis=0)


@triton.jit
def _statistics(
    student,
    teacher,
    vocab,
    student_rate,
    teacher_rate,
    policy_rate,
    POLICY_DTYPE: tl.constexpr,
    LOWEST: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """First pass: each side's maximum, the first entry of the student's, and each side's four sums; scalars.

    And of the policy, whose dtype POLICY_DTYPE is (None without one), its maximum and two sums; see `_policy_added`.
    """
    dtype: tl.constexpr = student.dtype.element_ty
    lowest = tl.full((), LOWEST, dtype)  # not -inf: -inf - -inf would be NaN where a row begins with a block of them
    zeros = tl.zeros((BLOCK,), dtype)
    sums = (zeros, zeros, zeros, zeros)
    policy = (lowest, lowest, lowest)  # not read without one
    if POLICY_DTYPE is not None:
        policy = (lowest, zeros, zeros)
    found = ((lowest, lowest), tl.zeros((), tl.int32), sums, sums, policy)
    rates = (student_rate, teacher_rate, policy_rate)
    whole = vocab // BLOCK * BLOCK
    for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
        found = _statistics_with(found, student, teacher, start, None, rates, POLICY_DTYPE, FAR, BLOCK)
    if whole < vocab:
        found = _statistics_with(found, student, teacher, whole, vocab, rates, POLICY_DTYPE, FAR, BLOCK)
    highest, best_start, s_sums, t_sums, policy = found
    is_best = _load(student, best_start, vocab, BLOCK) == highest[0]
    best = tl.min(tl.where(is_best, best_start + tl.arange(0, BLOCK), _NO_ENTRY), axis=0)
    if POLICY_DTYPE is not None:
        policy = (policy[0], tl.sum(policy[1], axis=0), tl.sum(policy[2], axis=0))
    return highest[0], highest[1], _total(s_sums), _total(t_sums), best, policy


@triton.jit
def _statistics_with(
    found,
    student,
    teacher,
    start,
    end,
    rates,
    POLICY_DTYPE: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`found` of the blocks so far, with the block at `start` (`end`: see `_load`).

    found: the maxima, scalars; the `start` of the block with the first of the student's; each side's four sums, and
    the policy's maximum and two sums, (BLOCK,).
    """
    highest, best_start, s_sums, t_sums, policy = found
    s_high, t_high = highest
    student_rate, teacher_rate, policy_rate = rates
    z = _load(student, start, end, BLOCK)
    u = _load(teacher, start, end, BLOCK)
    s_grown, s_step = _step(s_high, z, student_rate, FAR)
    t_high, t_step = _step(t_high, u, teacher_rate, FAR)
    if s_step + t_step > 0:  # a few times a row: the other blocks are spared a third of the work
        s_sums = _moved(s_sums, s_step, t_step)
        t_sums = _moved(t_sums, t_step, s_step)
        if POLICY_DTYPE is not None:
            policy = _policy_moved(policy, s_grown, policy_rate, POLICY_DTYPE, FAR)
    best_start = tl.where(s_grown > s_high, start, best_start)
    s_high = s_grown
    x = (z - s_high) * student_rate
    y = (u - t_high) * teacher_rate
    is_x_lost = y == -float("inf")
    is_y_lost = x == -float("inf")
    e = tl.exp(x)
    f = tl.exp(y)
    x = _known(x, 0.0, FAR)
    y = _known(y, 0.0, FAR)
    s_sums = _added(s_sums, e, x, x - y, is_x_lost)
    t_sums = _added(t_sums, f, y, y - x, is_y_lost)
    if POLICY_DTYPE is not None:
        policy = _policy_added(policy, z, policy_rate, POLICY_DTYPE, FAR)
    return (s_high, t_high), best_start, s_sums, t_sums, policy


@triton.jit
def _normalize(s_high, t_high, s_sums, t_sums, student_rate, teacher_rate):
    """(maximum, mass, rate of each side), the (reverse, forward) KL, both entropies; scalars."""
    s_mass = s_sums[0] + s_sums[1]
    t_mass = t_sums[0] + t_sums[1]
    log_ratio = tl.log(t_mass / s_mass)  # less of a rounding than the difference of two logarithms
    reverse_kl = s_sums[3] / s_mass + log_ratio - s_sums[1] / s_mass * (_LOG_ZERO + tl.log(t_mass))
    forward_kl = t_sums[3] / t_mass - log_ratio - t_sums[1] / t_mass * (_LOG_ZERO + tl.log(s_mass))
    entropies = (tl.log(s_mass) - s_sums[2] / s_mass, tl.log(t_mass) - t_sums[2] / t_mass)
    return (s_high, s_mass, student_rate, t_high, t_mass, teacher_rate), (reverse_kl, forward_kl), entropies


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
def _within_limits(log_ratio):
    """Keeps the exponential finite, and above zero.

    An entry beyond the limit has e^-80 of the other side's mass (e^-700 in float64). Not tl.clamp, which would replace
    NaN.
    """
    limit: tl.constexpr = 700.0 if log_ratio.dtype == tl.float64 else 80.0
    return tl.where(log_ratio > limit, limit, tl.where(log_ratio < -limit, -limit, log_ratio))


@triton.jit
def _log1p(excess, over):
    """log(1 + excess), given over = 1 + excess, which has the digits where it is small. As in `_expm1`, no library."""
    if excess.dtype == tl.float64:
        log_over = tl.where(over == 1.0, excess, tl.log(over) * (excess / (over - 1.0)))  # Kahan, as in `_expm1`
    else:
        # over = 2^k (1 + m) with m in [-1/4, 1/2): k is the exponent of over / 0.75. The series is a minimax fit of
        # log(1 + m) = m - m^2 / 2 + m^3 q(m), with an error below 1e-8 of it.
        exponent = (over.to(tl.int32, bitcast=True) - 0x3F400000) & -0x800000
        scale = (0x3F800000 - exponent).to(tl.float32, bitcast=True)
        m = tl.where(excess < -0.5, over * scale - 1.0, excess * scale + (scale - 1.0))
        q = 0.14478394 + m * (-0.13161194 + m * (0.10463022 + m * -0.045074806))
        q = 0.3333345 + m * (-0.25000095 + m * (0.19990861 + m * (-0.16647312 + m * q)))
        log_over = m + m * m * (-0.5 + m * q) + exponent.to(tl.float32) * 8.2629582e-08  # log(2) / 2^23
    return log_over


@triton.jit
def _log_mixture_over(log_ratio, weight, rest):
    """log(M / P), M / P and M / P - 1 for M = weight Q + rest P and log_ratio = log Q - log P.

    A small M / P - 1 keeps its digits in the logarithm, and a small M / P, as the sum of its two terms, does too.
    """
    log_ratio = _within_limits(log_ratio)
    ratio = tl.exp(log_ratio)
    excess = weight * _expm1(log_ratio, ratio)
    over = tl.where(excess < -0.5, weight * ratio + rest, 1.0 + excess)
    return _log1p(excess, over), over, excess


@triton.jit
def _log_mixture_over_both(log_ratio, beta, rest):
    """log(M / S) and log(M / T) for M = beta T + rest S and log_ratio = log S - log T.

    One exponential serves both: with P the larger of the two, Q the other, and w = Q / P,
    M / P - 1 = weight of Q * (w - 1) and M / Q - 1 = weight of P * (1 - w) / w.
    """
    log_ratio = _within_limits(log_ratio)
    is_s_larger = log_ratio >= 0.0
    less = -tl.abs(log_ratio)
    w = tl.exp(less)
    below = _expm1(less, w)
    weight_q = tl.where(is_s_larger, beta, rest)
    weight_p = tl.where(is_s_larger, rest, beta)
    excess_p = weight_q * below
    over_p = tl.where(excess_p < -0.5, weight_q * w + weight_p, 1.0 + excess_p)
    excess_q = weight_p * (-below / w)
    log_p = _log1p(excess_p, over_p)
    log_q = _log1p(excess_q, 1.0 + excess_q)
    return tl.where(is_s_larger, log_p, log_q), tl.where(is_s_larger, log_q, log_p)


@triton.jit
def _skew_slope(log_ratio, beta, rest):
    """log(S / M), and h of the table in `divergence.py` less 1 - beta, which drops out of the gradient."""
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
def _mixture_sums(
    student,
    teacher,
    vocab,
    normal,
    beta,
    rest,
    KIND: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Second pass: the two sums of `divergence.py`'s function of the same kind; scalars."""
    dtype: tl.constexpr = student.dtype.element_ty
    zeros = tl.zeros((BLOCK,), dtype)
    sums = (zeros, zeros)
    # Backwards: the cache holds the end of the row, which the first pass has just read.
    blocks = vocab // BLOCK
    if blocks * BLOCK < vocab:
        sums = _mixture_sums_with(sums, student, teacher, blocks * BLOCK, vocab, normal, beta, rest, KIND, FAR, BLOCK)
    for index in tl.range(0, blocks, num_stages=STAGES):
        start = (blocks - 1 - index) * BLOCK
        sums = _mixture_sums_with(sums, student, teacher, start, None, normal, beta, rest, KIND, FAR, BLOCK)
    return tl.sum(sums[0], axis=0), tl.sum(sums[1], axis=0)


@triton.jit
def _mixture_sums_with(
    sums, student, teacher, start, end, normal, beta, rest, KIND: tl.constexpr, FAR: tl.constexpr, BLOCK: tl.constexpr
):
    """`sums` (BLOCK,) of the blocks so far, with the block at `start` (`end`: see `_load`)."""
    z = _load(student, start, end, BLOCK)
    u = _load(teacher, start, end, BLOCK)
    s, t, log_ratio = _distributions(z, u, normal, FAR)
    if KIND == "gkd":
        log_m_over_s, log_m_over_t = _log_mixture_over_both(log_ratio, beta, rest)
        first = t * log_m_over_t
        second = s * log_m_over_s
    else:
        log_s_over_m, h = _skew_slope(log_ratio, beta, rest)
        first = s * log_s_over_m
        second = s * h
    return sums[0] + first, sums[1] + second


@triton.jit
def _finalize(reverse_kl, forward_kl, teacher_entropy, sums, beta, rest, KIND: tl.constexpr):
    """The divergence, the number that its slope subtracts, and whether the switch takes forward KL; scalars."""
    value = reverse_kl
    mean = reverse_kl
    is_forward = teacher_entropy > beta  # of the switch alone, whose threshold `beta` is
    if KIND == "forward_kl":
        value = forward_kl
    elif KIND == "gkd":
        value = -(beta * sums[0] + rest * sums[1])
        mean = sums[1]
    elif KIND == "skew_reverse_kl":
        value = sums[0]
        mean = sums[1]
    elif KIND == "entropy_switch":
        value = tl.where(is_forward, forward_kl, reverse_kl)
    return value, mean, is_forward


@triton.jit
def _slope(z, u, numbers, KIND: tl.constexpr, FAR: tl.constexpr):
    """tau * dD/dz of a block of logits, (BLOCK,).

    numbers: what it reads of a row, scalars: `normal` as `_distributions` takes it, `mean` and `is_forward` as
    `_finalize` gives them, beta and 1 - beta.
    """
    normal, mean, is_forward, beta, rest = numbers
    s, t, log_ratio = _distributions(z, u, normal, FAR)
    if KIND == "reverse_kl":
        slope = s * (log_ratio - mean)
    elif KIND == "forward_kl":
        slope = s - t
    elif KIND == "entropy_switch":
        slope = tl.where(is_forward, s - t, s * (log_ratio - mean))
    elif KIND == "gkd":
        log_m_over_s, _, _ = _log_mixture_over(-log_ratio, beta, rest)
        slope = s * rest * (mean - log_m_over_s)
    else:
        _, h = _skew_slope(log_ratio, beta, rest)
        slope = s * (h - mean)
    return slope


@triton.jit
def _store(row, start, end, values, BLOCK: tl.constexpr):
    """Entries of a row, in its dtype. `end` as in `_load`."""
    if row.dtype.element_ty.primitive_bitwidth == 16:
        values = values.to(tl.float32)  # from float64 there is no direct way
    values = values.to(row.dtype.element_ty)
    entry = start + tl.arange(0, BLOCK)
    if end is None:
        tl.store(row + entry, values)
    else:
        tl.store(row + entry, values, mask=entry < end)


@triton.jit
def _write_gradient(
    student,
    teacher,
    gradient,
    factor,
    vocab,
    end,
    numbers,
    of_policy,
    KIND: tl.constexpr,
    POLICY_DTYPE: tl.constexpr,
    IS_BACKWARD: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Last pass: `factor` * tau * dD/dz, and, with a POLICY_DTYPE, the policy's; see `_slope` and `_policy_slope`.

    To `end` >= vocab entries. It may go over the student's logits: no block is read after it is written.
    """
    blocks = vocab // BLOCK
    # The end of the row: the cache has it after a pass that went forward, and else it is as good now as at any time.
    for start in range(blocks * BLOCK, end, BLOCK):
        _write_block(
            student, teacher, gradient, factor, start, vocab, end, numbers, of_policy, KIND, POLICY_DTYPE, FAR, BLOCK
        )
    for index in tl.range(0, blocks, num_stages=STAGES):
        if IS_BACKWARD:  # against the direction of the pass before, as in `_mixture_sums`
            start = (blocks - 1 - index) * BLOCK
        else:
            start = index * BLOCK
        _write_block(
            student, teacher, gradient, factor, start, None, None, numbers, of_policy, KIND, POLICY_DTYPE, FAR, BLOCK
        )


@triton.jit
def _write_block(
    student,
    teacher,
    gradient,
    factor,
    start,
    vocab,
    end,
    numbers,
    of_policy,
    KIND: tl.constexpr,
    POLICY_DTYPE: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The block at `start` of `_write_gradient`. `vocab` and `end` are None for one that both sides have whole."""
    z = _load(student, start, end, BLOCK)
    u = _load(teacher, start, vocab, BLOCK)
    slope = _slope(z, u, numbers, KIND, FAR) * factor
    if POLICY_DTYPE is not None:
        entry = start + tl.arange(0, BLOCK)
        if vocab is not None:
            slope = tl.where(entry < vocab, slope, 0.0)
        slope += _policy_slope(z, entry, of_policy, POLICY_DTYPE, FAR)
    _store(gradient, start, end, slope, BLOCK)


# ----------------------------------------------------------------------------------------------------------------------
# the policy: log-probability of a label, and entropy, of the student alone


@triton.jit
def _policy_moved(policy, s_high, policy_rate, POLICY_DTYPE: tl.constexpr, FAR: tl.constexpr):
    """The policy's maximum and its sums of e and e x, moved to where the student's maximum is `s_high`."""
    high, mass, own = policy
    grown = tl.maximum(high, _rounded(s_high, POLICY_DTYPE))  # rounding keeps the order, so this is the rounded logits'
    step = (grown - high) * policy_rate
    step = tl.where(step > FAR, FAR, step)
    factor = tl.exp(-step)
    return grown, mass * factor, (own - step * mass) * factor


@triton.jit
def _policy_added(policy, z, policy_rate, POLICY_DTYPE: tl.constexpr, FAR: tl.constexpr):
    """Its maximum, and its sums (BLOCK,) with a block of logits, none of which is above the maximum."""
    high, mass, own = policy
    x = (_rounded(z, POLICY_DTYPE) - high) * policy_rate
    e = tl.exp(x)
    return high, mass + e, own + e * _known(x, 0.0, FAR)


@triton.jit
def _rounded(z, POLICY_DTYPE: tl.constexpr):
    """As a head that computes in the dtype POLICY_DTYPE would have given it."""
    return z.to(tl.float32).to(POLICY_DTYPE).to(z.dtype) if POLICY_DTYPE.primitive_bitwidth == 16 else z


@triton.jit
def _policy_slope(z, entry, numbers, POLICY_DTYPE: tl.constexpr, FAR: tl.constexpr):
    """of_log_prob * tau * dlog p_label/dz + of_entropy * tau * dH/dz of a block of logits, (BLOCK,).

    numbers: what it reads of a row, scalars: the policy's maximum, log-mass and entropy, its rate, the label, and what
    multiplies the two gradients.
    """
    p_high, log_mass, entropy, policy_rate, label, of_log_prob, of_entropy = numbers
    x = (_rounded(z, POLICY_DTYPE) - p_high) * policy_rate
    p = tl.exp(x - log_mass)
    slope = -p * (of_log_prob + of_entropy * (_known(x, 0.0, FAR) - log_mass + entropy))
    return tl.where(entry == label, slope + of_log_prob, slope)


# The last chunk may have any number of rows, and a mask at the end of any vocabulary takes one entry at a time: neither
# is worth a compilation of its own.
@triton.jit(do_not_specialize=["rows", "vocab"])
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
    STAGES: tl.constexpr,
):
    """One program per row. student, teacher, gradient: (rows, vocab), with strides from row to row.

    results: (6, rows); factors: (rows,), what multiplies the gradient; the rates: 1 / temperature; beta:
    `DivergenceSpec.parameter`, a threshold for the switch; rest: 1 - beta.
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

    s_high, t_high, s_sums, t_sums, best, _ = _statistics(
        student, teacher, vocab, student_rate, teacher_rate, student_rate, None, LOWEST, FAR, BLOCK, STAGES
    )
    normal, divergences, entropies = _normalize(s_high, t_high, s_sums, t_sums, student_rate, teacher_rate)
    sums = divergences  # not read without a mixture
    if is_mixture:
        sums = _mixture_sums(student, teacher, vocab, normal, beta, rest, KIND, FAR, BLOCK, STAGES)
    value, mean, is_forward = _finalize(divergences[0], divergences[1], entropies[1], sums, beta, rest, KIND)
    _store_results(results + row, rows, value, divergences, entropies, teacher, best, vocab, t_high)
    factor = tl.load(factors + row)
    numbers = (normal, mean, is_forward, beta, rest)
    _write_gradient(
        student,
        teacher,
        gradient,
        factor,
        vocab,
        vocab,
        numbers,
        numbers,
        KIND,
        None,
        not is_mixture,
        FAR,
        BLOCK,
        STAGES,
    )


@triton.jit
def _store_results(results, rows, value, divergences, entropies, teacher, best, vocab, t_high):
    """The fields of `TokenDivergence`, in their order. `best`: the first entry of the student's maximum."""
    # A row of NaN has no maximum.
    is_agreed = tl.load(teacher + best, mask=best < vocab, other=-float("inf")) == t_high
    tl.store(results, value)
    tl.store(results + rows, divergences[0])
    tl.store(results + 2 * rows, divergences[1])
    tl.store(results + 3 * rows, entropies[0])
    tl.store(results + 4 * rows, entropies[1])
    tl.store(results + 5 * rows, is_agreed.to(results.dtype.element_ty))


@triton.jit(do_not_specialize=["rows", "vocab", "policy_vocab"])
def _policy_kernel(
    student,
    teacher,
    gradient,
    results,
    labels,
    upstream,
    student_stride,
    teacher_stride,
    gradient_stride,
    rows,
    vocab,
    policy_vocab,
    student_rate: tl.float64,
    teacher_rate: tl.float64,
    policy_rate: tl.float64,
    beta: tl.float64,
    rest: tl.float64,
    KIND: tl.constexpr,
    POLICY_DTYPE: tl.constexpr,
    IS_GRADIENT: tl.constexpr,
    LOWEST: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`_rows_kernel` and the policy over policy_vocab >= vocab entries; one program per row.

    With IS_GRADIENT `gradient` (rows, policy_vocab), of `upstream` (3, rows): what multiplies the gradients of
    log-prob, entropy and divergence. Else `results` (8, rows): the log-prob of `labels` (rows,), the entropy, and those
    of `_rows_kernel`. The other is not touched.
    """
    dtype: tl.constexpr = student.dtype.element_ty
    is_mixture: tl.constexpr = KIND == "gkd" or KIND == "skew_reverse_kl"
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    student_rate = _parameter(student_rate, dtype)
    teacher_rate = _parameter(teacher_rate, dtype)
    policy_rate = _parameter(policy_rate, dtype)
    beta = _parameter(beta, dtype)
    rest = _parameter(rest, dtype)

    s_high, t_high, s_sums, t_sums, best, policy = _statistics(
        student, teacher, vocab, student_rate, teacher_rate, policy_rate, POLICY_DTYPE, LOWEST, FAR, BLOCK, STAGES
    )
    p_high, p_mass, p_own = _policy_of_the_rest(
        student, vocab, policy_vocab, policy, policy_rate, POLICY_DTYPE, FAR, BLOCK
    )
    log_mass = tl.log(p_mass)
    entropy = log_mass - p_own / p_mass
    normal, divergences, entropies = _normalize(s_high, t_high, s_sums, t_sums, student_rate, teacher_rate)
    sums = divergences
    if is_mixture:
        sums = _mixture_sums(student, teacher, vocab, normal, beta, rest, KIND, FAR, BLOCK, STAGES)
    value, mean, is_forward = _finalize(divergences[0], divergences[1], entropies[1], sums, beta, rest, KIND)
    label = tl.load(labels + row)
    if IS_GRADIENT:
        gradient += row * gradient_stride
        of_log_prob = tl.load(upstream + row) * policy_rate
        of_entropy = tl.load(upstream + rows + row) * policy_rate
        of_divergence = tl.load(upstream + 2 * rows + row) * student_rate
        numbers = (normal, mean, is_forward, beta, rest)
        of_policy = (p_high, log_mass, entropy, policy_rate, label, of_log_prob, of_entropy)
        _write_gradient(
            student,
            teacher,
            gradient,
            of_divergence,
            vocab,
            policy_vocab,
            numbers,
            of_policy,
            KIND,
            POLICY_DTYPE,
            not is_mixture,
            FAR,
            BLOCK,
            STAGES,
        )
    else:
        # An id that is no entry has no log-prob.
        is_entry = (label >= 0) & (label < policy_vocab)
        z = tl.load(student + label, mask=is_entry, other=float("nan"))
        x = (_rounded(z, POLICY_DTYPE) - p_high) * policy_rate
        results += row
        tl.store(results, _known(x, _LOG_ZERO + log_mass, FAR) - log_mass)
        tl.store(results + rows, entropy)
        _store_results(results + 2 * rows, rows, value, divergences, entropies, teacher, best, vocab, t_high)


@triton.jit
def _policy_of_the_rest(
    student,
    vocab,
    policy_vocab,
    policy,
    policy_rate,
    POLICY_DTYPE: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The policy's maximum and sums with the entries from `vocab` on added, scalars."""
    for start in range(vocab, policy_vocab, BLOCK):
        z = _load(student, start, policy_vocab, BLOCK)
        policy = _policy_moved(policy, tl.max(z, axis=0), policy_rate, POLICY_DTYPE, FAR)
        zeros = tl.zeros((BLOCK,), z.dtype)
        high, e, e_x = _policy_added((policy[0], zeros, zeros), z, policy_rate, POLICY_DTYPE, FAR)
        policy = (high, policy[1] + tl.sum(e, axis=0), policy[2] + tl.sum(e_x, axis=0))
    return policy


@triton.jit(do_not_specialize=["rows", "vocab"])
def _statistics_kernel(
    student,
    teacher,
    highest,
    sums,
    top,
    student_stride,
    teacher_stride,
    rows,
    vocab,
    student_rate: tl.float64,
    teacher_rate: tl.float64,
    LOWEST: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program per row. The results are the fields of `Statistics`, contiguous."""
    dtype: tl.constexpr = student.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    student_rate = _parameter(student_rate, dtype)
    teacher_rate = _parameter(teacher_rate, dtype)
    s_high, t_high, s_sums, t_sums, best, _ = _statistics(
        student, teacher, vocab, student_rate, teacher_rate, student_rate, None, LOWEST, FAR, BLOCK, STAGES
    )
    tl.store(highest + row, s_high)
    tl.store(highest + rows + row, t_high)
    for i in tl.static_range(4):
        tl.store(sums + i * rows + row, s_sums[i])
        tl.store(sums + (4 + i) * rows + row, t_sums[i])
    tl.store(top + row, tl.load(teacher + best, mask=best < vocab, other=-float("inf")))


@triton.jit
def _load_normal(highest, masses, row, rows, student_rate, teacher_rate):
    """(maximum, mass, rate of each side) of a row, scalars; `highest` and `masses` are (2, rows)."""
    s_high = tl.load(highest + row)
    t_high = tl.load(highest + rows + row)
    return (s_high, tl.load(masses + row), student_rate, t_high, tl.load(masses + rows + row), teacher_rate)


@triton.jit(do_not_specialize=["rows", "vocab"])
def _mixture_kernel(
    student,
    teacher,
    highest,
    masses,
    sums,
    student_stride,
    teacher_stride,
    rows,
    vocab,
    student_rate: tl.float64,
    teacher_rate: tl.float64,
    beta: tl.float64,
    rest: tl.float64,
    KIND: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program per row. highest, masses: (2, rows), of the whole vocabulary; sums: (2, rows), of the shard."""
    dtype: tl.constexpr = student.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    student_rate = _parameter(student_rate, dtype)
    teacher_rate = _parameter(teacher_rate, dtype)
    beta = _parameter(beta, dtype)
    rest = _parameter(rest, dtype)
    normal = _load_normal(highest, masses, row, rows, student_rate, teacher_rate)
    first, second = _mixture_sums(student, teacher, vocab, normal, beta, rest, KIND, FAR, BLOCK, STAGES)
    tl.store(sums + row, first)
    tl.store(sums + rows + row, second)


@triton.jit(do_not_specialize=["rows", "vocab"])
def _gradient_kernel(
    student,
    teacher,
    gradient,
    highest,
    masses,
    means,
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
    FAR: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program per row, as in `_mixture_kernel`. means (k, rows) as `finalize` gives them; factors (rows,)."""
    dtype: tl.constexpr = student.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    gradient += row * gradient_stride
    student_rate = _parameter(student_rate, dtype)
    teacher_rate = _parameter(teacher_rate, dtype)
    beta = _parameter(beta, dtype)
    rest = _parameter(rest, dtype)
    normal = _load_normal(highest, masses, row, rows, student_rate, teacher_rate)
    mean = tl.load(means + row)
    is_forward = mean > beta  # not read without a switch
    if KIND == "entropy_switch":
        is_forward = tl.load(means + rows + row) > 0
    factor = tl.load(factors + row)
    numbers = (normal, mean, is_forward, beta, rest)
    _write_gradient(
        student, teacher, gradient, factor, vocab, vocab, numbers, numbers, KIND, None, False, FAR, BLOCK, STAGES
    )


def _block_and_warps(dtype: torch.dtype) -> tuple[int, int]:
    """Entries that a program takes at once, and its warps. Wider entries come in fewer, for the registers' sake."""
    block = BLOCK * 4 // dtype.itemsize
    return block, max(1, block // (32 * ENTRIES_PER_THREAD))


def _on_device(logits: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current device."""
    if not logits.is_cuda:
        return nullcontext()
    return torch.get_device_module(logits.device).device(logits.device)


def _options(logits: torch.Tensor) -> dict:
    block, num_warps = _block_and_warps(logits.dtype)
    options = {"FAR": divergence.far(logits.dtype), "BLOCK": block, "STAGES": NUM_STAGES, "num_warps": num_warps}
    if logits.dtype == torch.float32 and torch.version.hip is None:  # an option of NVIDIA's compiler
        # So that two programs share a multiprocessor. One would else take 170 for each thread, to no gain.
        options["maxnreg"] = min(255, _REGISTERS // (2 * 32 * num_warps))
    return options


def _factors(weights: torch.Tensor, temperatures: Temperatures, like: torch.Tensor) -> torch.Tensor:
    return (weights / temperatures.student).to(like.dtype).contiguous()


def statistics(student: torch.Tensor, teacher: torch.Tensor, temperatures: Temperatures) -> Statistics:
    """`divergence.statistics`. The rows of logits may lie apart here and below; their entries may not."""
    rows, vocab = student.shape
    found = Statistics(student.new_empty((2, rows)), student.new_empty((8, rows)), student.new_empty(rows))
    if rows:
        with _on_device(student):
            _statistics_kernel[(rows,)](
                student,
                teacher,
                *found,
                student.stride(0),
                teacher.stride(0),
                rows,
                vocab,
                *(1.0 / temperature for temperature in temperatures),
                LOWEST=torch.finfo(student.dtype).min,
                **_options(student),
            )
    return found


def mixture_sums(
    student: torch.Tensor,
    teacher: torch.Tensor,
    spec: DivergenceSpec,
    temperatures: Temperatures,
    normalized: Normalized,
) -> torch.Tensor:
    """`divergence.mixture_sums`."""
    rows, vocab = student.shape
    kind = spec.resolve()
    sums = student.new_empty((2 if kind in _MIXTURES else 0, rows))
    if sums.numel():
        with _on_device(student):
            _mixture_kernel[(rows,)](
                student,
                teacher,
                normalized.highest.contiguous(),
                normalized.masses.contiguous(),
                sums,
                student.stride(0),
                teacher.stride(0),
                rows,
                vocab,
                *(1.0 / temperature for temperature in temperatures),
                spec.parameter,
                1.0 - spec.parameter,
                KIND=kind,
                **_options(student),
            )
    return sums


def gradient(
    student: torch.Tensor,
    teacher: torch.Tensor,
    spec: DivergenceSpec,
    temperatures: Temperatures,
    normalized: Normalized,
    mean: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """`divergence.gradient`."""
    rows, vocab = student.shape
    if rows:
        with _on_device(student):
            _gradient_kernel[(rows,)](
                student,
                teacher,
                out,
                normalized.highest.contiguous(),
                normalized.masses.contiguous(),
                mean.contiguous(),
                _factors(weights, temperatures, student),
                student.stride(0),
                teacher.stride(0),
                out.stride(0),
                rows,
                vocab,
                *(1.0 / temperature for temperature in temperatures),
                spec.parameter,
                1.0 - spec.parameter,
                KIND=spec.resolve(),
                **_options(student),
            )
    return out


def divergence_rows_(
    student: torch.Tensor,
    teacher: torch.Tensor,
    spec: DivergenceSpec,
    temperatures: Temperatures,
    weights: torch.Tensor,
    gradient: torch.Tensor,
) -> torch.Tensor:
    """`divergence.divergence_rows_`, in one launch."""
    rows, vocab = student.shape
    results = student.new_empty((len(TokenDivergence._fields), rows))
    if rows:
        with _on_device(student):
            _rows_kernel[(rows,)](
                student,
                teacher,
                gradient,
                results,
                _factors(weights, temperatures, student),
                student.stride(0),
                teacher.stride(0),
                gradient.stride(0),
                rows,
                vocab,
                *(1.0 / temperature for temperature in temperatures),
                spec.parameter,
                1.0 - spec.parameter,
                KIND=spec.resolve(),
                LOWEST=torch.finfo(student.dtype).min,
                **_options(student),
            )
    return results


def policy_rows_(
    student: torch.Tensor,
    teacher: torch.Tensor,
    spec: DivergenceSpec,
    temperatures: Temperatures,
    policy: Policy,
) -> torch.Tensor:
    """`divergence.policy_rows_`, in one launch, which leaves both sides as they are."""
    results = student.new_empty((2 + len(TokenDivergence._fields), len(student)))
    _launch_policy(student, teacher, spec, temperatures, policy, results, results, student, is_gradient=False)
    return results


def policy_gradient_(
    student: torch.Tensor,
    teacher: torch.Tensor,
    spec: DivergenceSpec,
    temperatures: Temperatures,
    policy: Policy,
    upstream: torch.Tensor,
    gradient: torch.Tensor,
) -> None:
    """`divergence.policy_gradient_`, in one launch."""
    upstream = upstream.to(student.dtype).contiguous()
    _launch_policy(student, teacher, spec, temperatures, policy, upstream, upstream, gradient, is_gradient=True)


def _launch_policy(
    student, teacher, spec, temperatures, policy: Policy, results, upstream, gradient, is_gradient: bool
) -> None:
    rows, policy_vocab = student.shape
    if not rows:
        return
    rates = (*(1.0 / temperature for temperature in temperatures), 1.0 / policy.temperature)
    with _on_device(student):
        _policy_kernel[(rows,)](
            student,
            teacher,
            gradient,
            results,
            policy.labels.contiguous(),
            upstream,
            student.stride(0),
            teacher.stride(0),
            gradient.stride(0),
            rows,
            teacher.shape[-1],
            policy_vocab,
            *rates,
            spec.parameter,
            1.0 - spec.parameter,
            KIND=spec.resolve(),
            POLICY_DTYPE=_TRITON_DTYPES[policy.dtype],
            IS_GRADIENT=is_gradient,
            LOWEST=torch.finfo(student.dtype).min,
            **_options(student),
        )
