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

The entropy switch. With `DivergenceSpec.entropy_threshold` each token has a divergence of its own: forward KL where the
teacher's entropy H(T) = -sum_v T log T is above the threshold, reverse KL elsewhere. Value and gradient are those of
the table, token by token; H(T) is a constant, so the switch itself has none. The gate is that of Jin et al.,
"Entropy-Aware On-Policy Distillation of Language Models", arXiv:2603.07079. Their loss adds a forward KL to the reverse
KL above the threshold; here it takes its place.

Zero probabilities. A logit of -inf is a probability of exactly zero. 0 log 0 = 0, so an entry that both sides mask
costs nothing. Where one side has mass and the other has none the KL is +inf by definition; to keep the loss and the
gradient finite, log 0 is then taken as `LOG_ZERO`, the logarithm of the smallest positive float32. Finite logits,
however far apart, are never clamped. (In float32, logits further than 1e32 apart count as 1e32 apart.)

Three verbs, so that the vocabulary may lie in shards:

1. `statistics` of a shard. With x = (z - max z) / tau and e = exp(x), y and f the teacher's: the maxima, and the sums
   of e, e x, e (x - y), f, f y, f (y - x). `merge` moves the sums of all shards to the largest maximum and adds them:
   one all-reduce MAX and one all-reduce SUM (`Statistics.payload`).
2. `normalize` and `finalize`, of (rows,) numbers. With L = sum e and N = sum f,
   KL(S||T) = sum e (x - y) / L + log(N / L), and H(S) = log L - sum e x / L. The log-sum-exps themselves cancel in
   x - y, so close distributions keep more digits than log-probabilities would. The part of L where y is -inf is summed
   apart: there y counts as 0 in the sums, and LOG_ZERO + log N takes its place here.
   The mixtures need L and N in a second sum over the vocabulary, `mixture_sums`; those of shards are added (SUM).
3. `gradient` of a shard, which writes weights * dD/dz.

`divergence_rows_` does all of it for rows that are whole, in one pass over blocks that stay in a processor's cache;
`policy_rows_` and `policy_gradient_` do so together with what RL reads of the student.
"""

import math
from dataclasses import dataclass
from typing import Callable, Iterator, NamedTuple, Optional, Protocol, Sequence

import torch

__all__ = [
    "CHUNK_ELEMENTS",
    "DIVERGENCES",
    "LOG_ZERO",
    "DenseLogits",
    "CompareRows",
    "Divergence",
    "DivergenceSpec",
    "ENTROPY_SWITCH",
    "Entries",
    "LogitSource",
    "Normalized",
    "Policy",
    "PolicyRows",
    "Rows",
    "Statistics",
    "Temperatures",
    "TokenDivergence",
    "cache_blocks",
    "chunks",
    "divergence_rows_",
    "far",
    "finalize",
    "function_of",
    "gradient",
    "log_zero_",
    "merge",
    "mixture_sums",
    "normalize",
    "padded_rows",
    "policy_gradient_",
    "policy_rows_",
    "statistics",
    "temper_",
    "token_divergence",
    "with_policy_",
    "with_policy_gradient_",
]

LOG_ZERO = -103.27893  # log(2**-149), the smallest positive float32

# Elements of one chunk of logits, which bounds the extra memory whatever the number of tokens: one chunk of the
# student's and one of the teacher's float32 logits are alive at once (2 x 128 MiB; 220 tokens of a vocabulary of
# 152 k). Larger chunks make better matrix products, smaller ones need less memory. The head of an accelerator has
# larger ones, see `roofline.py`.
CHUNK_ELEMENTS = 1 << 25

# Elements of the blocks in which a processor with a cache walks through a chunk: the five tensors of a block (2 MiB
# each) then stay in it, and the elementwise passes cost a fraction of what they cost from main memory.
CACHED_BLOCK_ELEMENTS = 1 << 19

# Rows of logits begin at multiples of so many entries: a kernel loads vectors of 16 bytes, and a compiler knows that a
# row is aligned to them where its stride is a multiple of 16.
ROW_ENTRIES = 16

# The same on devices without such a cache: their torch passes need several tensors of a block, and a chunk of logits is
# large there. 110 tokens of a vocabulary of 152 k, which fill such a device.
STREAMED_BLOCK_ELEMENTS = 1 << 24


class LogitSource(Protocol):
    """Logits of n tokens over V entries that are read a few rows at a time, so they need not all exist at once."""

    @property
    def shape(self) -> tuple[int, int]:
        """(n, V)."""

    @property
    def unit(self) -> float:
        """Logits are this times `in_units`."""

    def rows(self, index: torch.Tensor | slice) -> torch.Tensor:
        """Logits (len(index), V) of the tokens `index` (int64), any float dtype; new memory, the caller's to change."""

    def in_units(self, index: torch.Tensor | slice, out: Optional[torch.Tensor] = None) -> torch.Tensor:
        """`rows` in units of `unit`. `out`: memory (rows, V) that may be used for it, of the dtype that it has."""

    def cut(self, vocab: int) -> "LogitSource":
        """The first `vocab` entries of the vocabulary, not copied."""

    def tokens(self, tokens: torch.Tensor) -> "LogitSource":
        """Of the tokens `tokens` (m,) int64, in that order."""


@dataclass(frozen=True)
class DenseLogits:
    """Logits that exist: `values` (n, V), any float dtype."""

    values: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def unit(self) -> float:
        return 1.0

    def rows(self, index: torch.Tensor | slice) -> torch.Tensor:
        return self.values[index].clone() if isinstance(index, slice) else self.values[index]

    def in_units(self, index: torch.Tensor | slice, out: Optional[torch.Tensor] = None) -> torch.Tensor:
        return self.rows(index)

    def cut(self, vocab: int) -> "DenseLogits":
        return DenseLogits(self.values[:, :vocab])

    def tokens(self, tokens: torch.Tensor) -> "DenseLogits":
        return DenseLogits(self.values[tokens])


class TokenDivergence(NamedTuple):
    """Per-token results, each (n,), in nats. Only `divergence` carries a gradient, and only to the student."""

    divergence: torch.Tensor
    reverse_kl: torch.Tensor
    forward_kl: torch.Tensor
    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    top1_agreement: torch.Tensor  # 1.0 where student and teacher have the same most likely entry, else 0.0


# ----------------------------------------------------------------------------------------------------------------------
# the divergences: what each adds to the two KLs


class Temperatures(NamedTuple):
    """What divides each side's logits."""

    student: float
    teacher: float


class Normalized(NamedTuple):
    """Both distributions of a few tokens over the whole vocabulary, (rows,) each; of two sides (2, rows)."""

    highest: torch.Tensor  # the largest logits
    masses: torch.Tensor  # L and N: the sums of e and f
    log_ratio: torch.Tensor  # log(N / L)
    reverse_kl: torch.Tensor
    forward_kl: torch.Tensor
    entropies: torch.Tensor
    is_agreed: torch.Tensor  # bool: student and teacher have the same most likely entry

    def rows(self, rows: slice) -> "Normalized":
        return Normalized(*(values[..., rows] for values in self))


class Entries(NamedTuple):
    """Both distributions of a few tokens by entry, of a shard or of the whole vocabulary; float32 or float64.

    (rows, V): e = L S, f = N T, and `gap`, which is log S - log T less `offset`; `spare` and `other` are memory.
    (rows, 1): `offset`, and the masses L and N. A function may overwrite everything.
    """

    e: torch.Tensor
    f: torch.Tensor
    gap: torch.Tensor
    spare: torch.Tensor
    other: torch.Tensor
    offset: torch.Tensor
    student_mass: torch.Tensor
    teacher_mass: torch.Tensor


class Divergence(NamedTuple):
    """How a divergence follows from the statistics.

    sums: its sums over the entries of the vocabulary, (k, rows), which add up over shards; None where the two KLs say
        it all. It may leave in the entries' memory what `slope` reads.
    finalize: of these sums, D (rows,) and what the slope reads of a row: the number (rows,) that it subtracts, or
        several, (k, rows).
    slope: of the entries that `sums` has seen, these numbers, (rows, 1) or (k, rows, 1), and `factor` (rows, 1): writes
        factor * L * tau * dD/dz to its last argument (rows, V), which may be `spare`.

    The float that each takes is `DivergenceSpec.parameter`.
    """

    sums: Optional[Callable[[Entries, float], torch.Tensor]]
    finalize: Callable[[Normalized, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]
    slope: Callable[[Entries, torch.Tensor, torch.Tensor, float, torch.Tensor], torch.Tensor]


def _log_mixture_over(log_ratio: torch.Tensor, weight: float, out: torch.Tensor) -> torch.Tensor:
    """log(M / P), written to `out`, for the mixture M = weight Q + (1 - weight) P and log_ratio = log Q - log P.

    A small weight leaves a small logarithm, whose digits expm1 and log1p keep; with a large weight they would cancel
    where Q << P, and the logarithm of the sum does not.
    """
    if weight <= 0.5:
        return torch.expm1(log_ratio, out=out).mul_(weight).log1p_()
    return torch.exp(log_ratio, out=out).mul_(weight).add_(1.0 - weight).log_()


def _log_ratio(d: Entries) -> torch.Tensor:
    """log S - log T in `gap`, with finite exponentials: one beyond has e^-88 of the other side's mass (e^-700)."""
    limit = 88.0 if d.gap.dtype == torch.float32 else 700.0
    return d.gap.add_(d.offset).clamp_(-limit, limit)


def _reverse_slope(d: Entries, mean, factor, beta: float, out: torch.Tensor) -> torch.Tensor:
    return torch.mul(d.gap.sub_(mean - d.offset), d.e, out=out).mul_(factor)


def _forward_slope(d: Entries, mean, factor, beta: float, out: torch.Tensor) -> torch.Tensor:
    return torch.mul(d.e, factor, out=out).addcmul_(d.f, -factor * (d.student_mass / d.teacher_mass))


def _gkd_sums(d: Entries, beta: float) -> torch.Tensor:
    """-KL(T||M) and -KL(S||M); leaves log(M / S) in `spare`."""
    ratio = _log_ratio(d)
    log_m_over_t = _log_mixture_over(ratio, 1.0 - beta, out=d.other)
    log_m_over_s = _log_mixture_over(ratio.neg_(), beta, out=d.spare)
    return torch.stack((_mean(d.f, log_m_over_t, d.teacher_mass), _mean(d.e, log_m_over_s, d.student_mass)))


def _gkd(d: Normalized, sums: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    return -(beta * sums[0] + (1.0 - beta) * sums[1]), sums[1]


def _gkd_slope(d: Entries, mean, factor, beta: float, out: torch.Tensor) -> torch.Tensor:
    return torch.mul(d.spare.sub_(mean), d.e, out=out).mul_((beta - 1.0) * factor)


def _skew_sums(d: Entries, beta: float) -> torch.Tensor:
    """KL(S||M) and sum S h; leaves h in `spare`, less 1 - beta: a constant drops out of the gradient."""
    log_s_over_m = _log_mixture_over(_log_ratio(d).neg_(), beta, out=d.spare).neg_()
    value = _mean(d.e, log_s_over_m, d.student_mass)
    h = log_s_over_m.sub_(torch.expm1(log_s_over_m, out=d.other).mul_(1.0 - beta))
    return torch.stack((value, _mean(d.e, h, d.student_mass)))


def _skew_slope(d: Entries, mean, factor, beta: float, out: torch.Tensor) -> torch.Tensor:
    return torch.mul(d.spare.sub_(mean), d.e, out=out).mul_(factor)


def _switch(d: Normalized, sums: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    is_forward = d.entropies[1] > threshold
    value = torch.where(is_forward, d.forward_kl, d.reverse_kl)
    return value, torch.stack((d.reverse_kl, is_forward.to(value.dtype)))


def _switch_slope(d: Entries, numbers, factor, threshold: float, out: torch.Tensor) -> torch.Tensor:
    mean, is_forward = numbers
    forward = factor * is_forward
    # The terms of the slope that is not the row's own are finite, and times zero.
    _reverse_slope(d, mean, factor - forward, threshold, out)
    return out.addcmul_(d.e, forward).addcmul_(d.f, -forward * (d.student_mass / d.teacher_mass))


def _mean(weights: torch.Tensor, values: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vecdot(weights, values) / mass.squeeze(-1)


class Rows(NamedTuple):
    """Both distributions of a few tokens over the whole vocabulary, as a plain function in `DIVERGENCES` gets them.

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


# A user may add a divergence by name: a `Divergence`, or a plain function that returns D (rows,) and leaves tau * dD/dz
# in `s`; it may overwrite all other (rows, V) tensors. The vocabulary of a plain function cannot lie in shards.
WholeRows = Callable[[Rows, float], torch.Tensor]

DIVERGENCES: dict[str, Divergence | WholeRows] = {
    "reverse_kl": Divergence(None, lambda d, _, beta: (d.reverse_kl, d.reverse_kl), _reverse_slope),
    "forward_kl": Divergence(None, lambda d, _, beta: (d.forward_kl, d.forward_kl), _forward_slope),
    "gkd": Divergence(_gkd_sums, _gkd, _gkd_slope),
    "skew_reverse_kl": Divergence(_skew_sums, lambda d, sums, beta: (sums[0], sums[1]), _skew_slope),
}

# Not a type that a user names: what `DivergenceSpec.entropy_threshold` makes of reverse KL.
ENTROPY_SWITCH = Divergence(None, _switch, _switch_slope)


@dataclass(frozen=True)
class DivergenceSpec:
    """Which divergence: a key of `DIVERGENCES`, beta in [0, 1] (gkd, skew_reverse_kl), temperature tau > 0.

    With an entropy_threshold (nats), reverse KL is forward KL where the teacher's entropy is above it.

    Raises:
        ValueError: an entropy_threshold with another type.
    """

    distillation_type: str = "reverse_kl"
    beta: float = 1.0
    temperature: float = 1.0
    entropy_threshold: Optional[float] = None

    def __post_init__(self) -> None:
        if self.entropy_threshold is not None and self.distillation_type != "reverse_kl":
            raise ValueError(
                f"entropy_threshold={self.entropy_threshold} with distillation_type={self.distillation_type!r}: it "
                "switches between reverse_kl and forward_kl; leave one of them out."
            )

    @property
    def parameter(self) -> float:
        """What the functions of `Divergence` take: beta, or the threshold."""
        return self.beta if self.entropy_threshold is None else self.entropy_threshold

    def resolve(self) -> str:
        """The key of the function to evaluate, with the documented ends of beta; or the switch, which is no key."""
        if self.entropy_threshold is not None:
            return "entropy_switch"
        ends = {("gkd", 0.0): "forward_kl", ("gkd", 1.0): "reverse_kl", ("skew_reverse_kl", 1.0): "reverse_kl"}
        return ends.get((self.distillation_type, float(self.beta)), self.distillation_type)


def function_of(spec: DivergenceSpec) -> Divergence | WholeRows:
    """What computes the divergence of `spec`."""
    return DIVERGENCES[spec.resolve()] if spec.entropy_threshold is None else ENTROPY_SWITCH


def chunks(num_tokens: int, vocab: int, elements: int) -> Iterator[slice]:
    """Slices of nearly equal length that cover `num_tokens` rows of `vocab`, none of more than `elements` if it can."""
    most = max(1, elements // max(vocab, 1))
    step = math.ceil(num_tokens / math.ceil(num_tokens / most)) if num_tokens else 1
    return (slice(start, min(start + step, num_tokens)) for start in range(0, num_tokens, step))


def padded_rows(rows: int, vocab: int, like: torch.Tensor, dtype: Optional[torch.dtype] = None) -> torch.Tensor:
    """New memory (rows, vocab), whose rows begin at multiples of `ROW_ENTRIES` entries; contiguous if vocab is one."""
    whole = ROW_ENTRIES * math.ceil(vocab / ROW_ENTRIES)
    return like.new_empty((rows, whole), dtype=dtype or like.dtype)[:, :vocab]


def cache_blocks(logits: torch.Tensor) -> list[slice]:
    """Slices of rows that a processor's cache holds, or that fill a device without one."""
    elements = CACHED_BLOCK_ELEMENTS if logits.device.type == "cpu" else STREAMED_BLOCK_ELEMENTS
    return list(chunks(len(logits), logits.shape[-1], elements))


def temper_(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """`logits` (rows, V) over the temperature, up to an offset of each row, which drops out of softmax; in place."""
    if temperature != 1.0:
        # The maximum goes first: a common offset must not cost the quotient its digits.
        logits.sub_(logits.amax(-1, keepdim=True)).div_(temperature)
    return logits


def log_zero_(log_p: torch.Tensor) -> torch.Tensor:
    """LOG_ZERO in place of -inf."""
    return log_p.nan_to_num_(nan=math.nan, posinf=math.inf, neginf=LOG_ZERO)


# ----------------------------------------------------------------------------------------------------------------------
# statistics -> normalize, finalize -> gradient


class Statistics(NamedTuple):
    """What is left of a shard of the vocabulary when it has been read once, see the module docstring.

    highest: (2, rows), the largest logit of the student and of the teacher; the lowest number where all are -inf.
    sums: (8, rows), four of the student and four of the teacher: of e, apart where y is -inf; of e x; of e (x - y),
        where y counts as 0 if it is -inf.
    top: (rows,), the teacher's logit at the first of the student's largest.
    """

    highest: torch.Tensor
    sums: torch.Tensor
    top: torch.Tensor

    def payload(self, highest: torch.Tensor, temperatures: Temperatures, shard: int, shards: int) -> torch.Tensor:
        """(8 + 2 * shards, rows): what shard number `shard` adds to a sum over all, whose `highest` is their maximum.

        After the sums, a place for each shard says if it has the student's maximum, and its `top`.
        """
        steps = self._steps(highest, temperatures)
        sums = (_moved(side, *pair) for side, pair in zip(self.sums.chunk(2), (steps, steps.flip(0)), strict=True))
        places = self.sums.new_zeros((2, shards, self.top.shape[-1]))
        is_best = self.highest[0] == highest[0]
        places[0, shard] = is_best
        places[1, shard] = torch.where(is_best, self.top, 0.0)
        return torch.cat((*sums, *places))

    @classmethod
    def of_payload(cls, highest: torch.Tensor, payload: torch.Tensor) -> "Statistics":
        """Of the whole vocabulary, from the sum of all shards' payloads."""
        is_best, tops = payload[8:].chunk(2)
        return cls(highest, payload[:8], tops.gather(0, is_best.argmax(0, keepdim=True)).squeeze(0))

    def _steps(self, highest: torch.Tensor, temperatures: Temperatures) -> torch.Tensor:
        """(2, rows): by how much each side's x shrinks; finite, as an infinite one times an empty sum would be NaN."""
        steps = (highest - self.highest) / highest.new_tensor(temperatures).unsqueeze(-1)
        return steps.clamp_max(far(steps.dtype))


def _moved(sums: torch.Tensor, step: torch.Tensor, other_step: torch.Tensor) -> torch.Tensor:
    """One side's sums (4, rows) after its maximum has grown by `step`, and the other side's by `other_step`."""
    kept, lost, own, cross = sums
    own = own - step * (kept + lost)
    cross = cross - step * (kept + lost) + other_step * kept
    return torch.stack((kept, lost, own, cross)) * torch.exp(-step)


def merge(shards: Sequence[Statistics], temperatures: Temperatures) -> Statistics:
    """Of the vocabulary that `shards`, in its order, make up.

    Processes that hold one shard each do the same: `highest` by all-reduce MAX, then the payloads by all-reduce SUM.
    """
    highest = torch.stack([shard.highest for shard in shards]).amax(0)
    payloads = [shard.payload(highest, temperatures, i, len(shards)) for i, shard in enumerate(shards)]
    return Statistics.of_payload(highest, torch.stack(payloads).sum(0))


def normalize(statistics: Statistics) -> Normalized:
    """Of the whole vocabulary's statistics: the masses, both KLs and both entropies."""
    # In float64: these few numbers are differences of larger ones.
    kept, lost, own, cross = statistics.sums.view(2, 4, -1).double().unbind(1)
    masses = kept + lost
    log_masses = masses.log()
    log_ratio = _log_quotient(masses[1], masses[0])
    kls = cross / masses + torch.stack((log_ratio, -log_ratio)) - lost / masses * (LOG_ZERO + log_masses.flip(0))
    numbers = (masses, log_ratio, kls[0], kls[1], log_masses - own / masses)
    masses, log_ratio, reverse_kl, forward_kl, entropies = (number.to(statistics.sums.dtype) for number in numbers)
    is_agreed = statistics.top == statistics.highest[1]
    return Normalized(statistics.highest, masses, log_ratio, reverse_kl, forward_kl, entropies, is_agreed)


def _log_quotient(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """log(a / b), which is exactly -log(b / a), and has less of a rounding than a difference of two logarithms."""
    return torch.where(a >= b, torch.log(a / b), -torch.log(b / a))


def finalize(spec: DivergenceSpec, normalized: Normalized, sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(fields of `TokenDivergence`, rows) in nats, and what the slope reads, (rows,) or (k, rows).

    `sums`: those of `mixture_sums` over the whole vocabulary.
    """
    value, mean = _shardable(spec).finalize(normalized, sums, spec.parameter)
    return _results(value, normalized), mean


def _results(value: torch.Tensor, d: Normalized) -> torch.Tensor:
    return torch.stack((value, d.reverse_kl, d.forward_kl, *d.entropies, d.is_agreed.to(value.dtype)))


def statistics(student: torch.Tensor, teacher: torch.Tensor, temperatures: Temperatures) -> Statistics:
    """Of a shard: its logits (rows, V), both float32 or both float64, which stay as they are."""
    memory, found = _memory(student, 5), [_no_rows(student)]
    with _exact(student):
        for block in cache_blocks(student):
            highest, top = _highest(student[block], teacher[block])
            shifted = _shifted(student[block], teacher[block], highest, temperatures, memory)
            found.append(Statistics(highest, _sums(shifted)[0], top))
    return Statistics(*(torch.cat(columns, -1) for columns in zip(*found, strict=True)))


def mixture_sums(
    student: torch.Tensor,
    teacher: torch.Tensor,
    spec: DivergenceSpec,
    temperatures: Temperatures,
    normalized: Normalized,
) -> torch.Tensor:
    """What `finalize` needs beside `normalized`, of a shard as in `statistics`: (2, rows); (0, rows) for the KLs."""
    divergence, memory = _shardable(spec), _memory(student, 5)
    if divergence.sums is None:
        return student.new_empty((0, len(student)))
    found = [student.new_empty((2, 0))]
    with _exact(student):
        for block in cache_blocks(student):
            entries = _shard_entries(student[block], teacher[block], temperatures, normalized.rows(block), memory)
            found.append(divergence.sums(entries, spec.parameter))
    return torch.cat(found, -1)


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
    """weights * dD/dz of a shard as in `statistics`, written to `out` (rows, V), any float dtype, and returned.

    `mean` is what `finalize` returned; `out` may be `student`.
    """
    divergence, memory = _shardable(spec), _memory(student, 5)
    factors = _factors(weights, temperatures, normalized)
    with _exact(student):
        for block in cache_blocks(student):
            entries = _shard_entries(student[block], teacher[block], temperatures, normalized.rows(block), memory)
            if divergence.sums is not None:
                divergence.sums(entries, spec.parameter)  # for what it leaves in the entries
            slope = entries.spare if out.dtype != student.dtype else out[block]
            divergence.slope(entries, mean[..., block].unsqueeze(-1), factors[block], spec.parameter, slope)
            if out.dtype != student.dtype:
                out[block] = slope
    return out


def divergence_rows_(
    student: torch.Tensor,
    teacher: torch.Tensor,
    spec: DivergenceSpec,
    temperatures: Temperatures,
    weights: torch.Tensor,
    gradient: torch.Tensor,
) -> torch.Tensor:
    """All verbs for whole rows of logits: divergence, statistics and gradient. Overwrites both sides.

    Args:
        student, teacher: logits (rows, V), both float32 or both float64.
        spec: which divergence; its temperature is not read.
        temperatures: what divides the logits of each side.
        weights: (rows,), factors of the rows' gradients.
        gradient: (rows, V), any float dtype, gets weights * dD/d(student logits); `student` itself will do.

    Returns:
        (fields of `TokenDivergence`, rows), in nats.
    """
    memory, is_masked = _memory(student, 3), False
    results = student.new_empty((len(TokenDivergence._fields), len(student)))
    with _exact(student):
        for block in cache_blocks(student):
            z, u = student[block], teacher[block]
            highest, top = _highest(z, u)
            shifted = _shifted(z, u, highest, temperatures, (z, u, *memory))
            sums, is_masked = _sums(shifted, is_masked)
            normalized = normalize(Statistics(highest, sums, top))
            slope = gradient[block] if gradient.dtype == student.dtype else z
            results[:, block] = _finished(shifted, spec, temperatures, normalized, is_masked, weights[block], slope)
            if gradient.dtype != student.dtype:
                gradient[block] = slope
    return results


def _finished(shifted, spec, temperatures, normalized, is_masked, weights, slope) -> torch.Tensor:
    """Results of a block whose statistics are known; writes its gradient to `slope`."""
    divergence = function_of(spec)
    if not isinstance(divergence, Divergence):
        rows = _whole_rows(shifted, normalized)
        value = divergence(rows, spec.parameter)
        torch.mul(rows.s, (weights / temperatures.student).to(value.dtype).unsqueeze(-1), out=slope)
        return _results(value, normalized)
    entries = _entries(shifted, normalized, is_masked)
    sums = shifted.x.new_empty(0) if divergence.sums is None else divergence.sums(entries, spec.parameter)
    value, mean = divergence.finalize(normalized, sums, spec.parameter)
    factors = _factors(weights, temperatures, normalized)
    divergence.slope(entries, mean.unsqueeze(-1), factors, spec.parameter, slope)
    return _results(value, normalized)


# ----------------------------------------------------------------------------------------------------------------------
# their parts, for a block of rows


class _Shifted(NamedTuple):
    """Of the module docstring, (rows, V) each: x, y, e, f, and x - y."""

    x: torch.Tensor
    y: torch.Tensor
    e: torch.Tensor
    f: torch.Tensor
    gap: torch.Tensor


def _exact(logits: torch.Tensor) -> torch.autocast:
    """A training engine calls this inside autocast, which would take the sums over V in bfloat16."""
    return torch.autocast(logits.device.type, enabled=False)


def _memory(logits: torch.Tensor, tensors: int) -> torch.Tensor:
    """For so many tensors of a block of `logits`."""
    return logits.new_empty(
        (tensors, max((block.stop - block.start for block in cache_blocks(logits)), default=0), logits.shape[-1])
    )


def _no_rows(logits: torch.Tensor) -> Statistics:
    return Statistics(logits.new_empty((2, 0)), logits.new_empty((8, 0)), logits.new_empty(0))


def far(dtype: torch.dtype) -> float:
    """What logits are apart at the most, which keeps the sums over a row finite."""
    return 1e32 if dtype == torch.float32 else 1e300


def _shardable(spec: DivergenceSpec) -> Divergence:
    divergence = function_of(spec)
    if not isinstance(divergence, Divergence):
        raise ValueError(
            f"distillation_type={spec.distillation_type!r} is a plain function in DIVERGENCES, which needs the whole "
            "vocabulary: register a Divergence to compute it over shards."
        )
    return divergence


def _factors(weights: torch.Tensor, temperatures: Temperatures, normalized: Normalized) -> torch.Tensor:
    """(rows, 1), what turns the slopes of `Divergence` into weights * dD/dz."""
    return (weights / (temperatures.student * normalized.masses[0])).to(normalized.masses.dtype).unsqueeze(-1)


def _highest(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`highest` and `top` of `Statistics`. In two steps, as an argmax of all entries costs as much as their exp."""
    vocab = student.shape[-1]
    width = min(128, vocab)
    whole = vocab - vocab % width
    maxima = student[:, :whole].unflatten(-1, (-1, width)).amax(-1)
    if whole < vocab:
        maxima = torch.cat((maxima, student[:, whole:].amax(-1, keepdim=True)), dim=-1)
    # The part with the first of the largest entries, or the last `width` entries, where that part is shorter.
    start = (maxima.argmax(-1, keepdim=True) * width).clamp_max(vocab - width)
    best = start + student.gather(-1, start + torch.arange(width, device=start.device)).argmax(-1, keepdim=True)
    # Not less than the lowest number: -inf - -inf is NaN, where a shard has no mass.
    highest = torch.stack((maxima.amax(-1), teacher.amax(-1))).clamp_min_(torch.finfo(student.dtype).min)
    return highest, teacher.gather(-1, best).squeeze(-1)


def _shifted(student, teacher, highest, temperatures: Temperatures, memory) -> _Shifted:
    """`highest` (2, rows). `memory`: for the five tensors; the first two may be that of the logits."""
    x, y, e, f, gap = (tensor[: len(student)] for tensor in memory)
    for logits, high, temperature, out in zip((student, teacher), highest, temperatures, (x, y), strict=True):
        torch.sub(logits, high.unsqueeze(-1), out=out)
        if temperature != 1.0:
            out.div_(temperature)
    return _Shifted(x, y, torch.exp(x, out=e), torch.exp(y, out=f), torch.sub(x, y, out=gap))


def _sums(d: _Shifted, is_masked: bool = False) -> tuple[torch.Tensor, bool]:
    """`sums` of `Statistics`, and whether there is an entry of -inf (or lower than float32 can say).

    Where there is one, the plain sums are NaN; `is_masked` spares them.
    """
    dot = torch.linalg.vecdot
    if not is_masked:
        none = d.e.new_zeros(len(d.e))
        student = d.e.sum(-1), none, dot(d.e, d.x), dot(d.e, d.gap)
        sums = torch.stack((*student, d.f.sum(-1), none, dot(d.f, d.y), -dot(d.f, d.gap)))
        if sums.isfinite().all():
            return sums, False
    x, y = (_known(side, 0.0) for side in (d.x, d.y))
    sides = []
    for e, own, other, other_side in ((d.e, x, y, d.y), (d.f, y, x, d.x)):
        is_lost = other_side == -math.inf
        sides += [e.masked_fill(is_lost, 0.0).sum(-1), e.masked_fill(~is_lost, 0.0).sum(-1)]
        sides += [dot(e, own), dot(e, own - other)]
    return torch.stack(sides), True


def _known(x: torch.Tensor, if_zero: float | torch.Tensor) -> torch.Tensor:
    """x with `if_zero` in place of -inf, and not too far."""
    return torch.where(x == -math.inf, if_zero, x.clamp_min(-far(x.dtype)))


def _entries(d: _Shifted, normalized: Normalized, is_masked: bool) -> Entries:
    if is_masked:
        # What x and y are where the logarithm is LOG_ZERO.
        zeros = (LOG_ZERO + normalized.masses.log()).unsqueeze(-1)
        torch.sub(_known(d.x, zeros[0]), _known(d.y, zeros[1]), out=d.gap)
    masses = normalized.masses.unsqueeze(-1)
    return Entries(d.e, d.f, d.gap, d.x, d.y, normalized.log_ratio.unsqueeze(-1), masses[0], masses[1])


def _shard_entries(student, teacher, temperatures, normalized: Normalized, memory) -> Entries:
    return _entries(_shifted(student, teacher, normalized.highest, temperatures, memory), normalized, is_masked=True)


def _whole_rows(d: _Shifted, normalized: Normalized) -> Rows:
    """What a plain function in DIVERGENCES gets, in the memory of `d`."""
    masses = normalized.masses.unsqueeze(-1)
    log_s, log_t = (log_zero_(side.sub_(mass.log())) for side, mass in zip((d.x, d.y), masses, strict=True))
    ratio = torch.sub(log_s, log_t, out=d.gap)
    s, t = d.e.div_(masses[0]), d.f.div_(masses[1])
    return Rows(s, log_s, t, log_t, ratio, normalized.reverse_kl, normalized.forward_kl)


# ----------------------------------------------------------------------------------------------------------------------
# what RL reads of the student alone


class Policy(NamedTuple):
    """What RL reads of tokens: the log-probability of `labels` (rows,) int64, and the entropy, at `temperature`.

    dtype: logits are rounded to it first, where it is narrower than theirs.
    """

    labels: torch.Tensor
    temperature: float
    dtype: torch.dtype

    def rows(self, rows: slice) -> "Policy":
        return self._replace(labels=self.labels[rows])


class PolicyRows(NamedTuple):
    """A `policy` over the student's whole vocabulary: log_p (rows, V), and what RL reads of it (rows,).

    With p = softmax(z / tau), d log p_a / dz_v = (1[v = a] - p_v) / tau, and for the entropy H = -sum_v p_v log p_v
    dH / dz_v = -p_v (log p_v + H) / tau.
    """

    policy: Policy
    log_p: torch.Tensor
    log_prob: torch.Tensor
    entropy: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, policy: Policy) -> "PolicyRows":
        """`logits` (rows, V), which stay as they are."""
        logits = logits.to(policy.dtype).to(logits.dtype, copy=True)
        log_p = log_zero_(torch.log_softmax(temper_(logits, policy.temperature), dim=-1))
        entropy = -torch.linalg.vecdot(log_p.exp(), log_p)
        return cls(policy, log_p, log_p.gather(-1, policy.labels.unsqueeze(-1)).squeeze(-1), entropy)

    def gradient(self, grad_log_prob: torch.Tensor, grad_entropy: torch.Tensor) -> torch.Tensor:
        """With respect to the logits, (rows, V), of what these (rows,) multiply. Once: it takes the memory of log_p."""
        p = self.log_p.exp()
        slope = self.log_p.add_(self.entropy.unsqueeze(-1)).mul_(grad_entropy.unsqueeze(-1))
        gradient = slope.add_(grad_log_prob.unsqueeze(-1)).mul_(p).neg_()
        labels = self.policy.labels.unsqueeze(-1)
        return gradient.scatter_add_(-1, labels, grad_log_prob.unsqueeze(-1)).div_(self.policy.temperature)


# Of a block of rows, given the weights (rows,) of its gradient: results (fields, rows). Leaves the gradient, weighted,
# over the student's first V logits.
CompareRows = Callable[[slice, torch.Tensor], torch.Tensor]


def policy_rows_(
    student: torch.Tensor, teacher: torch.Tensor, spec: DivergenceSpec, temperatures: Temperatures, policy: Policy
) -> torch.Tensor:
    """What `policy` reads of rows, and the results of `divergence_rows_`. Overwrites both sides.

    Args:
        student: logits (rows, V_s), all entries of which the policy is over.
        teacher: logits (rows, V <= V_s), of the student's first entries.
        Everything else as in `divergence_rows_`.

    Returns:
        (2 + fields of `TokenDivergence`, rows): the log-probability of the label and the entropy first; nats.
    """
    compare = _comparison(student, teacher, spec, temperatures)
    return with_policy_(student, policy, len(TokenDivergence._fields), compare)


def policy_gradient_(
    student: torch.Tensor,
    teacher: torch.Tensor,
    spec: DivergenceSpec,
    temperatures: Temperatures,
    policy: Policy,
    upstream: torch.Tensor,
    gradient: torch.Tensor,
) -> None:
    """The gradient by `student` of sum(upstream * (log-probability, entropy, divergence)). Overwrites both sides.

    Args:
        upstream: (3, rows).
        gradient: (rows, V_s), any float dtype, in which it is written; `student` itself will do.
        Everything else as in `policy_rows_`.
    """
    compare = _comparison(student, teacher, spec, temperatures)
    with_policy_gradient_(student, policy, teacher.shape[-1], compare, upstream, gradient)


def _comparison(student, teacher, spec: DivergenceSpec, temperatures: Temperatures) -> CompareRows:
    def compare(rows: slice, weights: torch.Tensor) -> torch.Tensor:
        shared = student[rows, : teacher.shape[-1]]
        return divergence_rows_(shared, teacher[rows], spec, temperatures, weights, shared)

    return compare


def with_policy_(student: torch.Tensor, policy: Policy, fields: int, compare: CompareRows) -> torch.Tensor:
    """`policy_rows_` of any comparison that has so many fields: (2 + fields, rows)."""
    results = student.new_empty((2 + fields, len(student)))
    for rows in cache_blocks(student):
        of_policy = PolicyRows.of(student[rows], policy.rows(rows))
        results[:2, rows] = torch.stack((of_policy.log_prob, of_policy.entropy))
        del of_policy  # its memory is as much as the block's
        results[2:, rows] = compare(rows, student.new_ones(rows.stop - rows.start))
    return results


def with_policy_gradient_(
    student: torch.Tensor,
    policy: Policy,
    vocab: int,
    compare: CompareRows,
    upstream: torch.Tensor,
    gradient: torch.Tensor,
) -> None:
    """`policy_gradient_` of any comparison, which is of the student's first `vocab` entries."""
    for rows in cache_blocks(student):
        grad_log_prob, grad_entropy, grad_divergence = upstream[:, rows]
        slope = PolicyRows.of(student[rows], policy.rows(rows)).gradient(grad_log_prob, grad_entropy)
        compare(rows, grad_divergence)
        slope[:, :vocab] += student[rows, :vocab]
        gradient[rows] = slope


# ----------------------------------------------------------------------------------------------------------------------
# of dense logits, with autograd


def _chunk_results(student, teacher, spec, temperatures, gradient) -> torch.Tensor:
    ones = student.new_ones(len(student))
    return divergence_rows_(student, teacher, spec, temperatures, ones, student if gradient is None else gradient)


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
    def forward(ctx, logits, student_index, temperatures, teacher, teacher_index, spec):
        needs_gradient = ctx.needs_input_grad[0]
        dtype = torch.promote_types(logits.dtype, torch.float32)
        num_tokens, vocab = len(student_index), logits.shape[-1]
        gradients = logits.new_empty((num_tokens if needs_gradient else 0, vocab), dtype=_gradient_dtype(logits))
        results = torch.empty((len(TokenDivergence._fields), num_tokens), dtype=dtype, device=logits.device)
        for chunk in chunks(num_tokens, vocab, CHUNK_ELEMENTS):
            # One expression, so that the logits of a chunk are gone before those of the next are made.
            results[:, chunk] = _chunk_results(
                logits[student_index[chunk]].to(dtype),
                teacher.in_units(teacher_index[chunk]).to(dtype),
                spec,
                temperatures,
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
    temperatures = Temperatures(spec.temperature / student_scale, spec.temperature / teacher.unit)
    results = _TokenDivergence.apply(student_logits, student_index, temperatures, teacher, teacher_index, spec)
    return TokenDivergence(*results)
