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
from typing import Callable, NamedTuple, Protocol

import torch

__all__ = [
    "DIVERGENCES",
    "LOG_ZERO",
    "DenseLogits",
    "DivergenceSpec",
    "LinearLogits",
    "LogitSource",
    "TokenDivergence",
    "token_divergence",
]

LOG_ZERO = -103.27893  # log(2**-149), the smallest positive float32

# Elements of one chunk of logits. Bounds the extra memory, whatever the number of tokens: about a dozen float32 tensors
# of this size are alive at once (16 Mi elements: 768 MiB; 110 tokens of a vocabulary of 152 k).
CHUNK_ELEMENTS = 1 << 24


class LogitSource(Protocol):
    """Logits of n tokens over V entries that are read a few rows at a time, so they need not all exist at once."""

    @property
    def shape(self) -> tuple[int, int]:
        """(n, V)."""

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Logits (len(index), V) of the tokens `index` (int64), in any float dtype."""


@dataclass(frozen=True)
class DenseLogits:
    """Logits that exist: `values` (n, V), any float dtype."""

    values: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        return self.values[index]


@dataclass(frozen=True)
class LinearLogits:
    """Logits that are projected when they are read: `hidden` (n, H) @ `weight` (V, H).T + `bias` (V,)."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.hidden.shape[0], self.weight.shape[0]

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        hidden = self.hidden[index].to(self.weight.dtype)
        # A training engine calls the loss inside autocast, which would round a float32 teacher's logits to bfloat16.
        with torch.autocast(hidden.device.type, enabled=False):
            return torch.nn.functional.linear(hidden, self.weight, self.bias)


class TokenDivergence(NamedTuple):
    """Per-token results, each (n,), in nats. Only `divergence` carries a gradient, and only to the student."""

    divergence: torch.Tensor
    reverse_kl: torch.Tensor
    forward_kl: torch.Tensor
    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    top1_agreement: torch.Tensor  # 1.0 where student and teacher have the same most likely entry, else 0.0


class _Distributions(NamedTuple):
    """Probabilities and logarithms of both sides for one chunk, each (chunk, V), float32 or float64."""

    s: torch.Tensor
    log_s: torch.Tensor
    t: torch.Tensor
    log_t: torch.Tensor


def _probabilities(logits: torch.Tensor, temperature: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    # The maximum goes first: a common offset must not cost the quotient its digits.
    logits = logits.to(dtype) - logits.amax(-1, keepdim=True)
    log_p = torch.log_softmax(logits / temperature, dim=-1)
    p = log_p.exp()
    # -inf would turn 0 * log 0 into NaN below; the lowest finite number is multiplied away by p = 0.
    return p, log_p.clamp_(min=torch.finfo(dtype).min)


def _log_ratio(p: torch.Tensor, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """log p - log q where p > 0, else 0; log q of a zero probability is LOG_ZERO (see the module docstring)."""
    is_zero = log_q == torch.finfo(log_q.dtype).min
    return (log_p - log_q.masked_fill(is_zero, LOG_ZERO)).masked_fill_(p == 0, 0.0)


def _log_mixture_ratio(log_p: torch.Tensor, log_q: torch.Tensor, weight: float) -> torch.Tensor:
    """log((weight q + (1 - weight) p) / p), where 0 < weight < 1 or either end of it.

    By expm1 where the ratio is near one: the difference of log M and log p would lose the digits that a small weight,
    or a p near q, leaves. By logaddexp elsewhere: nothing over- or underflows.
    """
    difference = log_q - log_p
    change = weight * torch.expm1(difference)
    log_weight = math.log(weight) if weight > 0.0 else -math.inf
    log_rest = math.log1p(-weight) if weight < 1.0 else -math.inf
    far = torch.logaddexp(difference + log_weight, torch.full_like(difference, log_rest))
    return torch.where(change.abs() < 0.5, torch.log1p(change), far)


def _reverse_kl(d: _Distributions, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    ratio = _log_ratio(d.s, d.log_s, d.log_t)
    value = (d.s * ratio).sum(-1)
    return value, d.s * (ratio - value.unsqueeze(-1))


def _forward_kl(d: _Distributions, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    return (d.t * _log_ratio(d.t, d.log_t, d.log_s)).sum(-1), d.s - d.t


def _gkd(d: _Distributions, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    ratio = -_log_mixture_ratio(d.log_s, d.log_t, beta).masked_fill_(d.s == 0, 0.0)  # log S - log M
    kl_student = (d.s * ratio).sum(-1)
    kl_teacher = -(d.t * _log_mixture_ratio(d.log_t, d.log_s, 1.0 - beta).masked_fill_(d.t == 0, 0.0)).sum(-1)
    gradient = (1.0 - beta) * d.s * (ratio - kl_student.unsqueeze(-1))
    return beta * kl_teacher + (1.0 - beta) * kl_student, gradient


def _skew_reverse_kl(d: _Distributions, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    ratio = -_log_mixture_ratio(d.log_s, d.log_t, beta).masked_fill_(d.s == 0, 0.0)
    h = ratio - (1.0 - beta) * torch.expm1(ratio)  # h of the table less 1 - beta; a constant drops out of the gradient
    return (d.s * ratio).sum(-1), d.s * (h - (d.s * h).sum(-1, keepdim=True))


_Divergence = Callable[[_Distributions, float], tuple[torch.Tensor, torch.Tensor]]

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

    def resolve(self) -> _Divergence:
        """The function to evaluate, with the documented ends of beta."""
        ends = {("gkd", 0.0): "forward_kl", ("gkd", 1.0): "reverse_kl", ("skew_reverse_kl", 1.0): "reverse_kl"}
        return DIVERGENCES[ends.get((self.distillation_type, float(self.beta)), self.distillation_type)]


def _statistics(d: _Distributions) -> tuple[torch.Tensor, ...]:
    """reverse_kl, forward_kl, student_entropy, teacher_entropy, top1_agreement of one chunk, each (chunk,)."""
    return (
        (d.s * _log_ratio(d.s, d.log_s, d.log_t)).sum(-1),
        (d.t * _log_ratio(d.t, d.log_t, d.log_s)).sum(-1),
        -(d.s * d.log_s.masked_fill(d.s == 0, 0.0)).sum(-1),
        -(d.t * d.log_t.masked_fill(d.t == 0, 0.0)).sum(-1),
        (d.log_s.argmax(-1) == d.log_t.argmax(-1)).to(d.s.dtype),
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
        divergence = spec.resolve()
        step = max(1, CHUNK_ELEMENTS // max(vocab, 1))
        for start in range(0, num_tokens, step):
            chunk = slice(start, start + step)
            student = _probabilities(logits[student_index[chunk]], student_temperature, dtype)
            d = _Distributions(*student, *_probabilities(teacher.rows(teacher_index[chunk]), spec.temperature, dtype))
            value, gradient = divergence(d, spec.beta)
            results[:, chunk] = torch.stack((value, *_statistics(d)))
            if needs_gradient:
                gradients[chunk] = gradient.div_(student_temperature)
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
