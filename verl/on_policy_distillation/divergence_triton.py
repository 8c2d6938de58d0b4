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

For rows that are whole one launch does all three, `_rows_kernel`; for shards of the vocabulary each is a launch of its
own, and what an all-reduce has made of the results is `normalize`d and `finalize`d by torch in between.

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
    Statistics,
    Temperatures,
    TokenDivergence,
    function_of,
)

__all__ = ["divergence_rows_", "gradient", "is_compiled", "mixture_sums", "statistics"]

# What the kernels compute: these names, as long as nobody has given them another function.
_COMPILED = {name: DIVERGENCES[name] for name in ("reverse_kl", "forward_kl", "gkd", "skew_reverse_kl")}
_COMPILED["entropy_switch"] = ENTROPY_SWITCH
_MIXTURES = ("gkd", "skew_reverse_kl")


def is_compiled(spec: DivergenceSpec) -> bool:
    """Whether the kernels compute this divergence. One of the user's own is left to torch."""
    return _COMPILED.get(spec.resolve()) is function_of(spec)


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
    """Of the lanes' sums of one side: its four sums, scalars."""
    return tl.sum(kept, axis=0), tl.sum(lost, axis=0), tl.sum(own, axis=0), tl.sum(cross, axis=0)


@triton.jit
def _statistics(
    student, teacher, vocab, student_rate, teacher_rate, LOWEST: tl.constexpr, FAR: tl.constexpr, BLOCK: tl.constexpr
):
    """First pass: each side's maximum, and each side's four sums; scalars."""
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
    return s_high, t_high, _total(s_kept, s_lost, s_own, s_cross), _total(t_kept, t_lost, t_own, t_cross)


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
):
    """Second pass: the two sums of `divergence.py`'s function of the same kind; scalars."""
    dtype: tl.constexpr = student.dtype.element_ty
    first = tl.zeros((BLOCK,), dtype)
    second = tl.zeros((BLOCK,), dtype)
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
            first += t * log_m_over_t
            second += s * log_m_over_s
        else:
            log_s_over_m, h = _skew_slope(log_ratio, beta, rest)
            first += s * log_s_over_m
            second += s * h
    return tl.sum(first, axis=0), tl.sum(second, axis=0)


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
def _first_best(student, vocab, high, BLOCK: tl.constexpr):
    """The first entry of the student's maximum, scalar."""
    best = tl.full((BLOCK,), 2147483647, tl.int32)
    for start in range(0, vocab, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        best = tl.minimum(best, tl.where(_load(student, start, vocab, BLOCK) == high, entry, 2147483647))
    return tl.min(best, axis=0)


@triton.jit
def _write_gradient(
    student,
    teacher,
    gradient,
    factor,
    vocab,
    normal,
    mean,
    is_forward,
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
        if IS_BACKWARD:  # against the direction of the pass before, as in `_mixture_sums`
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
        elif KIND == "entropy_switch":
            slope = tl.where(is_forward, s - t, s * (log_ratio - mean))
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

    s_high, t_high, s_sums, t_sums = _statistics(
        student, teacher, vocab, student_rate, teacher_rate, LOWEST, FAR, BLOCK
    )
    normal, divergences, entropies = _normalize(s_high, t_high, s_sums, t_sums, student_rate, teacher_rate)
    sums = divergences  # not read without a mixture
    if is_mixture:
        sums = _mixture_sums(student, teacher, vocab, normal, beta, rest, KIND, FAR, BLOCK)
    value, mean, is_forward = _finalize(divergences[0], divergences[1], entropies[1], sums, beta, rest, KIND)
    factor = tl.load(factors + row)
    best = _write_gradient(
        student,
        teacher,
        gradient,
        factor,
        vocab,
        normal,
        mean,
        is_forward,
        beta,
        rest,
        KIND,
        not is_mixture,
        FAR,
        BLOCK,
    )
    # A row of NaN has no maximum.
    is_agreed = tl.load(teacher + best, mask=best < vocab, other=-float("inf")) == normal[3]

    # The order of TokenDivergence's fields.
    results += row
    tl.store(results, value)
    tl.store(results + rows, divergences[0])
    tl.store(results + 2 * rows, divergences[1])
    tl.store(results + 3 * rows, entropies[0])
    tl.store(results + 4 * rows, entropies[1])
    tl.store(results + 5 * rows, is_agreed.to(dtype))


@triton.jit(do_not_specialize=["rows"])
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
):
    """One program per row. The results are the fields of `Statistics`, contiguous."""
    dtype: tl.constexpr = student.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    student_rate = _parameter(student_rate, dtype)
    teacher_rate = _parameter(teacher_rate, dtype)
    s_high, t_high, s_sums, t_sums = _statistics(
        student, teacher, vocab, student_rate, teacher_rate, LOWEST, FAR, BLOCK
    )
    tl.store(highest + row, s_high)
    tl.store(highest + rows + row, t_high)
    for i in tl.static_range(4):
        tl.store(sums + i * rows + row, s_sums[i])
        tl.store(sums + (4 + i) * rows + row, t_sums[i])
    best = _first_best(student, vocab, s_high, BLOCK)
    tl.store(top + row, tl.load(teacher + best, mask=best < vocab, other=-float("inf")))


@triton.jit
def _load_normal(highest, masses, row, rows, student_rate, teacher_rate):
    """(maximum, mass, rate of each side) of a row, scalars; `highest` and `masses` are (2, rows)."""
    s_high = tl.load(highest + row)
    t_high = tl.load(highest + rows + row)
    return (s_high, tl.load(masses + row), student_rate, t_high, tl.load(masses + rows + row), teacher_rate)


@triton.jit(do_not_specialize=["rows"])
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
    first, second = _mixture_sums(student, teacher, vocab, normal, beta, rest, KIND, FAR, BLOCK)
    tl.store(sums + row, first)
    tl.store(sums + rows + row, second)


@triton.jit(do_not_specialize=["rows"])
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
    _write_gradient(
        student, teacher, gradient, factor, vocab, normal, mean, is_forward, beta, rest, KIND, False, FAR, BLOCK
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
    return {"FAR": divergence.far(logits.dtype), "BLOCK": block, "num_warps": num_warps}


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
