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
"""Exact full-vocabulary divergences between a student and a teacher, and their gradients. Pure tensor math.

Notation, for one token position with student logits z and teacher logits u over a vocabulary of size V:

    S = softmax(z / tau)        the student          log S, log T, log M: natural logarithms (nats)
    T = softmax(u / tau)        the teacher          tau: the distillation temperature
    M = beta T + (1 - beta) S   the mixture

==================  ======================================  ===================================================
type                D                                       tau * dD/dz_v
==================  ======================================  ===================================================
reverse_kl          KL(S||T) = sum_v S (log S - log T)      S_v (log S_v - log T_v - D)
forward_kl          KL(T||S) = sum_v T (log T - log S)      S_v - T_v
gkd                 beta KL(T||M) + (1 - beta) KL(S||M)     (1 - beta) S_v (log S_v - log M_v - KL(S||M))
skew_reverse_kl     KL(S||M)                                S_v (h_v - sum_w S_w h_w),
                                                            h_v = log S_v - log M_v - (1 - beta) S_v / M_v
==================  ======================================  ===================================================

Every gradient follows from dS_w/dz_v = S_w (1[v=w] - S_v) / tau, i.e. dD/dz_v = S_v (g_v - sum_w S_w g_w) / tau
for g = dD/dS taken with the S_v as independent variables; the teacher is a constant. Each sums to zero over v.
No factor tau^2 (Hinton et al., 2015) is applied: the loss is the divergence of the tempered distributions itself.

Sources. `gkd` is the generalized Jensen-Shannon divergence of Agarwal et al., "On-Policy Distillation of Language
Models", arXiv:2306.13649, eq. (1). As a function it vanishes at both ends of beta; like the paper, which calls
them its limits, beta = 0 here *is* forward KL and beta = 1 *is* reverse KL. `skew_reverse_kl` is the one-sided
term of it, the skew KL of Ko et al., "DistiLLM", arXiv:2402.03898, eq. (3), with alpha = 1 - beta: exactly reverse
KL at beta = 1, exactly zero at beta = 0.

Zero probabilities. A logit of -inf is a probability of exactly zero. 0 log 0 = 0, so an entry that both sides mask
costs nothing. Where one side has mass and the other has none the KL is +inf by definition; to keep the loss and the
gradient finite, log 0 is then taken as `LOG_ZERO`, the logarithm of the smallest positive float32. Finite logits,
however far apart, are never clamped.
"""

import math
from dataclasses import dataclass
from typing import Callable, Iterator, NamedTuple, Optional, Protocol

import torch

__all__ = [
    "DIVERGENCES",
    "LOG_ZERO",
    "DenseLogits",
    "DivergenceSpec",
    "LinearLogits",
    "LogitSource",
    "Rows",
    "TokenDivergence",
    "cache_blocks",
    "chunks",
    "divergence_rows_",
    "log_zero_",
    "project",
    "tempered_log_softmax",
    "token_divergence",
    "wide_mm",
]

LOG_ZERO = -103.27893  # log(2**-149), the smallest positive float32

# Elements of one chunk of logits, which bounds the extra memory whatever the number of tokens: one chunk of the
# student's and one of the teacher's float32 logits are alive at once (2 x 128 MiB; 220 tokens of a vocabulary of
# 152 k). Larger chunks make better matrix products, smaller ones need less memory.
CHUNK_ELEMENTS = 1 << 25

# Elements of the blocks in which a processor with a cache walks through a chunk: the five tensors of a block (2 MiB
# each) then stay in it, and the elementwise passes cost a fraction of what they cost from main memory.
CACHED_BLOCK_ELEMENTS = 1 << 19


class LogitSource(Protocol):
    """Logits of n tokens over V entries that are read a few rows at a time, so they need not all exist at once."""

    @property
    def shape(self) -> tuple[int, int]:
        """(n, V)."""

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Logits (len(index), V) of the tokens `index` (int64), any float dtype; new memory, the caller's to change."""

    def cut(self, vocab: int) -> "LogitSource":
        """The first `vocab` entries of the vocabulary, not copied."""


@dataclass(frozen=True)
class DenseLogits:
    """Logits that exist: `values` (n, V), any float dtype."""

    values: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        return self.values[index]

    def cut(self, vocab: int) -> "DenseLogits":
        return DenseLogits(self.values[:, :vocab])


@dataclass(frozen=True)
class LinearLogits:
    """Logits that are projected when they are read: `hidden` (n, H) @ `weight` (V, H).T + `bias` (V,)."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.hidden.shape[0], self.weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits: float32, or float64 for float64 weights."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    def rows(self, index: torch.Tensor | slice, out: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Written to the first rows of `out` (rows, V), of `dtype`, where it is given: a loop over chunks reuses it."""
        return project(self.hidden[index], self.weight, self.bias, out)

    def cut(self, vocab: int) -> "LinearLogits":
        return LinearLogits(self.hidden, self.weight[:vocab], None if self.bias is None else self.bias[:vocab])


def project(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor] = None,
    out: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Logits (n, V) = `hidden` (n, H) @ `weight` (V, H).T + `bias` (V,), multiplied in the weight's dtype.

    Returned in float32, or float64 for float64 weights: 16-bit products keep the sums that the device made in float32
    where it can return them, and are rounded once where it cannot. `out` as in `LinearLogits.rows`.
    """
    # A training engine calls the loss inside autocast, which would round a float32 teacher's logits to bfloat16.
    with torch.autocast(hidden.device.type, enabled=False):
        logits = wide_mm(hidden.to(weight.dtype), weight.T, out)
        return logits if bias is None else logits.add_(bias)


def wide_mm(a: torch.Tensor, b: torch.Tensor, out: Optional[torch.Tensor] = None) -> torch.Tensor:
    """a @ b, at least float32, new memory or `out`. On CUDA 16-bit factors give their float32 sums without rounding."""
    out = None if out is None else out[: len(a)]
    if a.dtype not in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out=out)
    if a.is_cuda:  # of the devices, CUDA alone has a product with an output wider than its factors
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a, b).float() if out is None else out.copy_(torch.mm(a, b))


class TokenDivergence(NamedTuple):
    """Per-token results, each (n,), in nats. Only `divergence` carries a gradient, and only to the student."""

    divergence: torch.Tensor
    reverse_kl: torch.Tensor
    forward_kl: torch.Tensor
    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    top1_agreement: torch.Tensor  # 1.0 where student and teacher have the same most likely entry, else 0.0


class Rows(NamedTuple):
    """Both distributions of a few tokens, float32 or float64, as the functions in `DIVERGENCES` get them.

    (rows, V): probabilities `s` and `t`, their logarithms, with LOG_ZERO for log 0, and `ratio` = log_s - log_t.
    (rows,): the two KLs in nats.
    """

    s: torch.Tensor
    log_s: torch.Tensor
    t: torch.Tensor
    log_t: torch.Tensor
    ratio: torch.Tensor
    reverse_kl: torch.Tensor
    forward_kl: torch.Tensor


def _log_mixture_over(log_ratio: torch.Tensor, weight: float, out: torch.Tensor) -> torch.Tensor:
    """log(M / P), written to `out`, for the mixture M = weight Q + (1 - weight) P and log_ratio = log Q - log P.

    A small weight leaves a small logarithm, whose digits expm1 and log1p keep; with a large weight they would cancel
    where Q << P, and the logarithm of the sum does not.
    """
    if weight <= 0.5:
        return torch.expm1(log_ratio, out=out).mul_(weight).log1p_()
    return torch.exp(log_ratio, out=out).mul_(weight).add_(1.0 - weight).log_()


def _clamp_ratio_(d: Rows) -> torch.Tensor:
    """Keeps expm1 finite. An entry beyond the limit has e^-88 of the other side's mass (e^-700 in float64)."""
    limit = 88.0 if d.ratio.dtype == torch.float32 else 700.0
    return d.ratio.clamp_(-limit, limit)


def _reverse_kl(d: Rows, beta: float) -> torch.Tensor:
    torch.mul(d.ratio.sub_(d.reverse_kl.unsqueeze(-1)), d.s, out=d.s)
    return d.reverse_kl


def _forward_kl(d: Rows, beta: float) -> torch.Tensor:
    d.s.sub_(d.t)
    return d.forward_kl


def _gkd(d: Rows, beta: float) -> torch.Tensor:
    ratio = _clamp_ratio_(d)
    log_m_over_t = _log_mixture_over(ratio, 1.0 - beta, out=d.log_t)
    log_m_over_s = _log_mixture_over(ratio.neg_(), beta, out=d.log_s)
    kl_teacher = -torch.linalg.vecdot(d.t, log_m_over_t)
    kl_student = -torch.linalg.vecdot(d.s, log_m_over_s)
    torch.mul(log_m_over_s.add_(kl_student.unsqueeze(-1)), d.s, out=d.s).mul_(beta - 1.0)
    return beta * kl_teacher + (1.0 - beta) * kl_student


def _skew_reverse_kl(d: Rows, beta: float) -> torch.Tensor:
    log_s_over_m = _log_mixture_over(_clamp_ratio_(d).neg_(), beta, out=d.log_s).neg_()
    value = torch.linalg.vecdot(d.s, log_s_over_m)
    # h of the table less 1 - beta: a constant drops out of the gradient.
    h = log_s_over_m.sub_(torch.expm1(log_s_over_m, out=d.log_t).mul_(1.0 - beta))
    torch.mul(h.sub_(torch.linalg.vecdot(d.s, h).unsqueeze(-1)), d.s, out=d.s)
    return value


# Each returns D (rows,) and leaves tau * dD/dz in `s`; it may overwrite all other (rows, V) tensors.
_Divergence = Callable[[Rows, float], torch.Tensor]

DIVERGENCES: dict[str, _Divergence] = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "gkd": _gkd,
    "skew_reverse_kl": _skew_reverse_kl,
}


@dataclass(frozen=True)
class DivergenceSpec:
    """Which divergence: a key of `DIVERGENCES`, beta in [0, 1] (gkd, skew_reverse_kl), temperature tau > 0."""

    distillation_type: str = "reverse_kl"
    beta: float = 1.0
    temperature: float = 1.0

    def resolve(self) -> str:
        """The key of the function to evaluate, with the documented ends of beta."""
        ends = {("gkd", 0.0): "forward_kl", ("gkd", 1.0): "reverse_kl", ("skew_reverse_kl", 1.0): "reverse_kl"}
        return ends.get((self.distillation_type, float(self.beta)), self.distillation_type)


def chunks(num_tokens: int, vocab: int, elements: int) -> Iterator[slice]:
    """Slices of nearly equal length that cover `num_tokens` rows of `vocab`, none of more than `elements` if it can."""
    most = max(1, elements // max(vocab, 1))
    step = math.ceil(num_tokens / math.ceil(num_tokens / most)) if num_tokens else 1
    return (slice(start, min(start + step, num_tokens)) for start in range(0, num_tokens, step))


def cache_blocks(logits: torch.Tensor) -> list[slice]:
    """Slices of rows that stay in a processor's cache; all rows at once on devices that stream from memory."""
    elements = CACHED_BLOCK_ELEMENTS if logits.device.type == "cpu" else logits.numel()
    return list(chunks(len(logits), logits.shape[-1], elements))


def tempered_log_softmax(logits: torch.Tensor, temperature: float, out: torch.Tensor) -> torch.Tensor:
    """log softmax(logits / temperature) in `out`; overwrites `logits` where the temperature is not one."""
    if temperature != 1.0:
        # The maximum goes first: a common offset must not cost the quotient its digits.
        logits.sub_(logits.amax(-1, keepdim=True)).div_(temperature)
    return torch.log_softmax(logits, dim=-1, out=out)


def log_zero_(log_p: torch.Tensor) -> torch.Tensor:
    """LOG_ZERO in place of -inf."""
    return log_p.nan_to_num_(nan=math.nan, posinf=math.inf, neginf=LOG_ZERO)


def _block_(student, teacher, spec, student_temperature, scratch) -> torch.Tensor:
    """`divergence_rows_` without weights, of rows that stay in the cache; leaves tau * dD/dz in `student`."""
    log_s, log_t, ratio = (buffer[: len(student)] for buffer in scratch)
    best = student.argmax(-1, keepdim=True)
    is_agreed = teacher.gather(-1, best).squeeze(-1) == teacher.amax(-1)
    s = torch.exp(tempered_log_softmax(student, student_temperature, out=log_s), out=student)
    t = torch.exp(tempered_log_softmax(teacher, spec.temperature, out=log_t), out=teacher)
    torch.sub(log_zero_(log_s), log_zero_(log_t), out=ratio)
    dot = torch.linalg.vecdot
    entropies = -dot(s, log_s), -dot(t, log_t)
    d = Rows(s, log_s, t, log_t, ratio, reverse_kl=dot(s, ratio), forward_kl=-dot(t, ratio))
    value = DIVERGENCES[spec.resolve()](d, spec.beta)
    return torch.stack((value, d.reverse_kl, d.forward_kl, *entropies, is_agreed.to(value.dtype)))


def divergence_rows_(
    student: torch.Tensor,
    teacher: torch.Tensor,
    spec: DivergenceSpec,
    student_temperature: float,
    weights: torch.Tensor,
    gradient: torch.Tensor,
) -> torch.Tensor:
    """Divergence, statistics and gradient of a chunk of logits. Overwrites both sides.

    Args:
        student, teacher: logits (rows, V), both float32 or both float64.
        spec: which divergence; its temperature is the teacher's.
        student_temperature: what divides the student's logits.
        weights: (rows,), factors of the rows' gradients.
        gradient: (rows, V), any float dtype, gets weights * dD/d(student logits); `student` itself will do.

    Returns:
        (fields of `TokenDivergence`, rows), in nats.
    """
    blocks = cache_blocks(student)
    scratch = student.new_empty((3, blocks[0].stop if blocks else 0, student.shape[-1]))
    results = student.new_empty((len(TokenDivergence._fields), len(student)))
    factors = (weights / student_temperature).to(student.dtype).unsqueeze(-1)
    for block in blocks:
        with torch.autocast(student.device.type, enabled=False):  # it would take the sums over V in bfloat16
            results[:, block] = _block_(student[block], teacher[block], spec, student_temperature, scratch)
        torch.mul(student[block], factors[block], out=student[block])
        if gradient is not student:
            gradient[block] = student[block]
    return results


def _chunk_results(student, teacher, spec, student_temperature, gradient) -> torch.Tensor:
    ones = student.new_ones(len(student))
    return divergence_rows_(
        student, teacher, spec, student_temperature, ones, student if gradient is None else gradient
    )


def _gradient_dtype(logits: torch.Tensor) -> torch.dtype:
    """The dtype gradients wait in until backward: float16 could not hold them before the loss is scaled."""
    return torch.float32 if logits.dtype == torch.float16 else logits.dtype


class _TokenDivergence(torch.autograd.Function):
    """One pass over chunks of tokens: values, statistics, and, when a backward will follow, the rows' gradients.

    The gradients are taken in the forward rather than recomputed in the backward: that saves a second teacher
    projection, costs one (n, V) tensor in the logits' dtype until the backward, and leaves nothing saved that a fused
    in-place log-prob backward (`inplace_backward` in verl.utils.torch_functional) could overwrite.
    """

    @staticmethod
    def forward(ctx, logits, student_index, student_temperature, teacher, teacher_index, spec):
        needs_gradient = ctx.needs_input_grad[0]
        dtype = torch.promote_types(logits.dtype, torch.float32)
        num_tokens, vocab = len(student_index), logits.shape[-1]
        gradients = logits.new_empty((num_tokens if needs_gradient else 0, vocab), dtype=_gradient_dtype(logits))
        results = torch.empty((len(TokenDivergence._fields), num_tokens), dtype=dtype, device=logits.device)
        for chunk in chunks(num_tokens, vocab, CHUNK_ELEMENTS):
            # One expression, so that the logits of a chunk are gone before those of the next are made.
            results[:, chunk] = _chunk_results(
                logits[student_index[chunk]].to(dtype),
                teacher.rows(teacher_index[chunk]).to(dtype),
                spec,
                student_temperature,
                gradients[chunk] if needs_gradient else None,
            )
        ctx.save_for_backward(student_index, gradients)
        ctx.logits_shape, ctx.logits_dtype = logits.shape, logits.dtype
        ctx.mark_non_differentiable(*(columns := results.unbind())[1:])
        return columns

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_divergence, *_):
        student_index, gradients = ctx.saved_tensors
        rows = (gradients * grad_divergence.unsqueeze(-1)).to(ctx.logits_dtype)
        return (rows.new_zeros(ctx.logits_shape).index_copy_(0, student_index, rows), *(None,) * 5)


def token_divergence(
    student_logits: torch.Tensor,
    student_index: torch.Tensor,
    teacher: LogitSource,
    teacher_index: torch.Tensor,
    spec: DivergenceSpec,
    student_scale: float = 1.0,
) -> TokenDivergence:
    """Divergence and statistics of the tokens that `student_index` and `teacher_index` pair up.

    Args:
        student_logits: (N, V), float64, float32, bfloat16 or float16; gradients flow to it.
        student_index: (n,) int64, distinct rows of `student_logits`, one per token.
        teacher: logits (N', V), read in chunks; never receives a gradient.
        teacher_index: (n,) int64, the rows of `teacher` for the same tokens.
        spec: which divergence, at which beta and temperature.
        student_scale: what `student_logits` must be multiplied by to be logits. A trainer holds them divided by its
            sampling temperature; the factor is folded into the softmax temperature, so it costs no copy.

    Returns:
        TokenDivergence of n tokens, in nats, float32 (float64 for float64 student logits). n = 0 gives empty tensors.
    """
    student_temperature = spec.temperature / student_scale
    results = _TokenDivergence.apply(student_logits, student_index, student_temperature, teacher, teacher_index, spec)
    return TokenDivergence(*results)
