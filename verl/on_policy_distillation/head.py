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
"""Per-token divergences of a linear head over a large vocabulary without its logits: hidden states in, gradients out.

The divergences and their gradients with respect to logits are those of `divergence.py`. With a head's product
a = h W^T + b and G = dloss/da (n, V), the rest is matrix products:

    dloss/dh = G W        dloss/dW = G^T h        dloss/db = sum_i G_i

Its logits are z = scale * a, or softcap * tanh(scale * a / softcap). A factor of the logits is one of the temperature,
and costs nothing there; dz/da of a soft cap is scale / cosh(scale * a / softcap)^2.

Two functions share one loop over chunks of tokens. No tensor of (tokens, V) outlives its chunk, but for the gradients
of a group of chunks, which go into the products together: how many tokens at a time is `roofline.py`'s topic.

`divergence_of_head` is for a loss sum_i w_i D_i whose weights are known beforehand. G is then known as soon as a
chunk's logits are, so the forward makes the gradients too: three products with the student's weight, one with the
teacher's, and the backward multiplies by one number. (Computing gradients in the forward of a fused linear loss: Liger
Kernel, Hsu et al., arXiv:2410.10989, sec. 3.2.)

`tokens_of_head` is for losses that use the tokens in ways only they know, such as a policy-gradient term: it returns
per-token results that any loss may be built on. The gradients of the three results are separate until the backward
says how they mix, so either G is stored for each (three (n, V) tensors, what this module is there to avoid) or the
logits are projected again in the backward: one more product with each weight, four and two in all. Recomputing is the
cheaper by far: a product of H multiplications per logit against writing and reading a logit from main memory costs
time, but for n = 8,192 and V = 151,936 each stored tensor would cost 5 GB in float32.

`linear_divergence` and `linear_token_divergence` are the same with plain tensors as arguments.
"""

import math
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Iterator, NamedTuple, Optional, Sequence

import torch

from verl.on_policy_distillation import divergence as divergence_module
from verl.on_policy_distillation.buckets import (
    InSharedVocabulary,
    SharedLogits,
    SharedVocabulary,
    TopKTail,
    coarsen_,
    refine,
    rest_mass,
)
from verl.on_policy_distillation.divergence import (
    DIVERGENCES,
    CompareRows,
    DivergenceSpec,
    LogitSource,
    Policy,
    Temperatures,
    TokenDivergence,
    cache_blocks,
    chunks,
    padded_rows,
    with_policy_,
    with_policy_gradient_,
)
from verl.on_policy_distillation.mixture import MixtureLogits, mixture_of
from verl.on_policy_distillation.roofline import TILE, Chunking, accelerator_of, chunking_for

__all__ = [
    "KL_TO",
    "REST_MASSES",
    "LinearDivergence",
    "LinearLogits",
    "PolicyTokens",
    "divergence_by_teacher",
    "divergence_of_head",
    "extra_columns",
    "implementation",
    "linear_divergence",
    "linear_token_divergence",
    "project",
    "tokens_by_teacher",
    "tokens_of_head",
]

# How far a loss may be from token_weights, relative to the largest of its weights: rounding, not another loss.
WEIGHT_TOLERANCE = 1e-4

# Whether torch.addmm takes factors narrower than what it adds to. Before 2.10 it raises; mm does since 2.8.
_HAS_WIDE_ADDMM = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)

# Chunks of logits that are alive at once when teachers are mixed, and when entries are taken together (`buckets.py`).
_MIXTURE_SIDES, _BUCKET_SIDES = 8, 6

KL_TO = "kl_to/"  # how the names of `extra_columns` begin that are KL(S||T_k) of one of several teachers
REST_MASSES = ("teacher_rest_mass", "student_rest_mass")


# ----------------------------------------------------------------------------------------------------------------------
# a head and its products


@dataclass(frozen=True)
class LinearLogits:
    """Logits that are projected when they are read, from the product a = `hidden` (n, H) @ `weight` (V, H).T + `bias`.

    scale: logits are scale * a (Cohere's logit_scale; Granite's logits_scaling divides: pass its inverse).
    softcap: logits are softcap * tanh(scale * a / softcap) (Gemma 2's final_logit_softcapping); None for no cap.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        _require_factors("", self.scale, self.softcap)

    @property
    def shape(self) -> tuple[int, int]:
        return self.hidden.shape[0], self.weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits: float32, or float64 for float64 weights."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    @property
    def unit(self) -> float:
        """Logits are this times `in_units`."""
        return self.scale if self.softcap is None else self.softcap

    def rows(self, index: torch.Tensor | slice) -> torch.Tensor:
        logits = self.in_units(index)
        return logits if self.unit == 1.0 else logits.mul_(self.unit)

    def in_units(
        self,
        index: torch.Tensor | slice,
        out: Optional[torch.Tensor] = None,
        before_cap: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Logits in units of `unit`, which the divergence's temperature takes in: without a cap the bare product.

        Written to the first rows of `out` (rows, V), of `dtype`, where it is given: a loop over chunks reuses it. So
        is, with a cap, what the tanh is taken of, to `before_cap`.
        """
        units = project(self.hidden[index], self.weight, self.bias, out)
        if self.softcap is None:
            return units
        for rows in cache_blocks(units):
            capped = units[rows].mul_(self.scale / self.softcap)
            if before_cap is not None:
                before_cap[rows] = capped
            capped.tanh_()
        return units

    def uncap_(self, gradient: torch.Tensor, before_cap: torch.Tensor) -> None:
        """Makes a gradient by `in_units` (rows, V) one by the product. Overwrites `before_cap`."""
        assert self.softcap is not None
        for rows in cache_blocks(gradient):
            # Not 1 - tanh^2, which has no digits left where the cap is reached.
            slope = before_cap[rows].cosh_().square_().mul_(self.softcap / self.scale)
            gradient[rows].div_(slope)

    def cut(self, vocab: int) -> "LinearLogits":
        return replace(self, weight=self.weight[:vocab], bias=None if self.bias is None else self.bias[:vocab])

    def tokens(self, tokens: torch.Tensor) -> "LinearLogits":
        return replace(self, hidden=self.hidden[tokens])


def project(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor] = None,
    out: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Logits (n, V) = `hidden` (n, H) @ `weight` (V, H).T + `bias` (V,), multiplied in the weight's dtype.

    Returned in float32, or float64 for float64 weights: 16-bit products keep the sums that the device made in float32
    where it can return them, and are rounded once where it cannot. `out` as in `LinearLogits.in_units`.
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


class LinearDivergence(NamedTuple):
    """`loss`: scalar in nats, differentiable. `divergence` and `metrics`: per token (n,), without gradient."""

    loss: torch.Tensor
    divergence: torch.Tensor
    metrics: TokenDivergence


class PolicyTokens(NamedTuple):
    """Per token (n,): of the student, `log_prob` of the label and `entropy`; and the divergence with its statistics.

    `log_prob`, `entropy` and `tokens.divergence` are differentiable.
    """

    log_prob: torch.Tensor
    entropy: torch.Tensor
    tokens: TokenDivergence


class _HeadGradients:
    """Gradients of a linear head, accumulated chunk by chunk in the dtype of its logits; only those in `needs`."""

    def __init__(self, head: LinearLogits, needs: tuple[bool, ...]):
        self._head, dtype = head, head.dtype
        self.hidden = torch.empty_like(head.hidden) if needs[0] else None
        self.weight = torch.zeros_like(head.weight, dtype=dtype) if needs[1] else None
        self.bias = torch.zeros_like(head.bias, dtype=dtype) if needs[2] else None
        self.is_any = any(needs)

    def add(self, chunk: slice, gradient: torch.Tensor) -> None:
        """`gradient` (chunk, V' <= V), in the weight's dtype: with respect to the first V' logits of each token."""
        vocab = gradient.shape[-1]
        if self.hidden is not None:
            self.hidden[chunk] = wide_mm(gradient, self._head.weight[:vocab]).to(self.hidden.dtype)
        if self.weight is not None:
            _add_product_(self.weight[:vocab], gradient.T, self._head.hidden[chunk].to(gradient.dtype))
        if self.bias is not None:
            self.bias[:vocab] += gradient.sum(0, dtype=self.bias.dtype)

    def scaled(self, factor: torch.Tensor) -> tuple[Optional[torch.Tensor], ...]:
        """All times `factor`, in place, in the dtypes of what they are gradients of."""
        gradients = (self.hidden, self.weight, self.bias)
        return tuple(
            None if gradient is None else gradient.mul_(factor).to(tensor.dtype)
            for gradient, tensor in zip(gradients, (self._head.hidden, self._head.weight, self._head.bias), strict=True)
        )


def _add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total (V, H) += a (V, rows) @ b (rows, H), summed in the dtype of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and _HAS_WIDE_ADDMM:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        _add_product_in_blocks_(total, a, b)


def _add_product_in_blocks_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """`_add_product_` where no product adds to a wider result: by blocks, as the (V, H) result exceeds a chunk."""
    for rows in chunks(len(total), total.shape[1], divergence_module.CHUNK_ELEMENTS // 4):
        total[rows] += wide_mm(a[rows], b)


# ----------------------------------------------------------------------------------------------------------------------
# chunks of tokens


def implementation(student: torch.Tensor, spec: DivergenceSpec) -> ModuleType:
    """Whose functions, of rows that are whole and of shards, are used for the logits `student`.

    Triton's on the devices that it is compiled for, torch's elsewhere and for a divergence of the user's own.
    """
    if student.is_cuda:
        from verl.on_policy_distillation import divergence_triton

        if divergence_triton.is_compiled(spec):
            return divergence_triton
    return divergence_module


class _Target(NamedTuple):
    """What the student is compared with, and how; nothing here has a gradient.

    teacher: over the first `vocab` entries of the student's, or over those that are `shared`, and the rest.
    """

    teacher: LogitSource
    spec: DivergenceSpec
    vocab: int
    shared: Optional[SharedVocabulary]

    @classmethod
    def of(cls, head: LinearLogits, teacher: LogitSource, spec: DivergenceSpec) -> "_Target":
        if spec.distillation_type not in DIVERGENCES:
            raise ValueError(f"distillation_type={spec.distillation_type!r}: choose one of {list(DIVERGENCES)}.")
        if head.shape[0] != teacher.shape[0]:
            raise ValueError(f"the head has {head.shape[0]} tokens, the teacher {teacher.shape[0]}: pass the same.")
        teacher = teacher.cut(head.shape[1])
        for kind, what in ((TopKTail, "top-k"), (InSharedVocabulary, "rest of the shared vocabulary")):
            if isinstance(teacher, kind) and teacher.unit != spec.temperature:
                raise ValueError(
                    f"the {what} is of temperature {teacher.unit}, the divergence of {spec.temperature}: take both at "
                    "the same."
                )
        if isinstance(teacher, InSharedVocabulary):
            return cls(teacher.source, spec, head.shape[1], teacher.shared)
        return cls(teacher, spec, teacher.shape[-1], None)

    @property
    def teachers(self) -> int:
        """Of how many teachers the KL is wanted one by one."""
        return len(self.teacher.parts) if isinstance(self.teacher, MixtureLogits) else 0

    @property
    def fields(self) -> int:
        """How many results `rows_` has of a token: those of `TokenDivergence`, and what is in the rests of both."""
        return len(TokenDivergence._fields) + (0 if self.shared is None else 2)

    def said(self, chunk: "_Chunk", dtype: torch.dtype) -> torch.Tensor | TopKTail:
        """What the teacher says of a chunk: logits in its units."""
        if isinstance(self.teacher, TopKTail):
            return self.teacher.tokens(chunk.tokens)
        return self.teacher.in_units(chunk.tokens, chunk.teacher).to(dtype)

    def compare(
        self, head: LinearLogits, chunk: "_Chunk", student: torch.Tensor
    ) -> tuple[torch.Tensor | TopKTail, Optional[torch.Tensor]]:
        """`said`, and KL(S||T_k) of each of `teachers`, (K, chunk); None where no token has more than one teacher."""
        if not isinstance(self.teacher, MixtureLogits) or bool((self.teacher.speaks(chunk.tokens).sum(0) <= 1).all()):
            return self.said(chunk, student.dtype), None
        temperature = self.spec.temperature / head.unit
        if self.shared is not None:
            student = coarsen_(student.clone(), self.shared.named(len(student)), temperature).logits
            temperature = 1.0
        mixed, kls = self.teacher.compare(chunk.tokens, student, temperature)
        return mixed.to(student.dtype), kls.to(student.dtype)

    def with_kls(self, chunk: "_Chunk", results: torch.Tensor, kls: Optional[torch.Tensor]) -> torch.Tensor:
        """`results` (`fields`, chunk) of `rows_`, and below them the KLs (K, chunk) that `compare` has found.

        Of tokens with one teacher it finds none: the reverse KL among the results is the one to that teacher.
        """
        if not isinstance(self.teacher, MixtureLogits):
            return results
        if kls is None:
            reverse_kl = results[TokenDivergence._fields.index("reverse_kl")]
            kls = torch.where(self.teacher.speaks(chunk.tokens), reverse_kl, torch.nan)
        return torch.cat((results, kls))

    def rows_(
        self,
        head: LinearLogits,
        student: torch.Tensor,
        said: torch.Tensor | TopKTail,
        weights: torch.Tensor,
        gradient: torch.Tensor,
    ) -> torch.Tensor:
        """`divergence_rows_` of both sides in their units; the gradient is by the student's. (`fields`, rows)."""
        temperature = self.temperatures(head).student
        if self.shared is None:
            return self._rows_(temperature, student, said, weights, gradient)
        coarse = coarsen_(student, self.shared.named(len(student)), temperature)
        masses = torch.stack((rest_mass(said), rest_mass(coarse.logits)))
        results = self._rows_(1.0, coarse.logits, said, weights / temperature, coarse.logits)
        refine(coarse, coarse.logits, gradient)
        return torch.cat((results, masses.to(results.dtype)))

    def _rows_(
        self,
        temperature: float,
        student: torch.Tensor,
        said: torch.Tensor | TopKTail,
        weights: torch.Tensor,
        gradient: torch.Tensor,
    ) -> torch.Tensor:
        """`rows_` over the entries of `teacher`; `temperature` divides the student's logits."""
        function = implementation(student, self.spec).divergence_rows_
        if not isinstance(said, TopKTail):
            temperatures = Temperatures(temperature, self.spec.temperature / self.teacher.unit)
            return function(student, said, self.spec, temperatures, weights, gradient)
        coarse = coarsen_(student, said.named, temperature)
        teacher, one = said.log_prob.to(coarse.logits.dtype, copy=True), Temperatures(1.0, 1.0)
        # The temperature is in the logits already.
        scaled = (weights / temperature).to(coarse.logits.dtype)
        results = function(coarse.logits, teacher, self.spec, one, scaled, coarse.logits)
        refine(coarse, coarse.logits, gradient)
        return results

    def policy_rows_(
        self, head: LinearLogits, student: torch.Tensor, said: torch.Tensor | TopKTail, policy: Policy
    ) -> torch.Tensor:
        """log_prob and entropy of the policy, and the results of `rows_`: (2 + `fields`, rows). Overwrites both."""
        if self.shared is not None or isinstance(said, TopKTail):
            return with_policy_(student, policy, self.fields, self._comparison(head, student, said))
        function = implementation(student, self.spec).policy_rows_
        return function(student, said, self.spec, self.temperatures(head), policy)

    def policy_gradient_(
        self,
        head: LinearLogits,
        student: torch.Tensor,
        said: torch.Tensor | TopKTail,
        policy: Policy,
        upstream: torch.Tensor,
        gradient: torch.Tensor,
    ) -> None:
        """By the student's logits in their units, to `gradient`, which may be these; `upstream` (3, rows)."""
        if self.shared is not None or isinstance(said, TopKTail):
            compare = self._comparison(head, student, said)
            return with_policy_gradient_(student, policy, self.vocab, compare, upstream, gradient)
        function = implementation(student, self.spec).policy_gradient_
        return function(student, said, self.spec, self.temperatures(head), policy, upstream, gradient)

    def _comparison(self, head: LinearLogits, student: torch.Tensor, said: torch.Tensor | TopKTail) -> CompareRows:
        """`rows_` of a block, over whose logits the gradient goes."""

        def compare(rows: slice, weights: torch.Tensor) -> torch.Tensor:
            shared = student[rows, : self.vocab]
            return self.rows_(head, shared, _rows_of(said, rows), weights, shared)

        return compare

    def temperatures(self, head: LinearLogits) -> Temperatures:
        """What divides each side's logits in their units."""
        return Temperatures(self.spec.temperature / head.unit, self.spec.temperature / self.teacher.unit)


def _rows_of(said: torch.Tensor | TopKTail, rows: slice) -> torch.Tensor | TopKTail:
    return said.tokens(rows) if isinstance(said, TopKTail) else said[rows]


class _Sorting(NamedTuple):
    """Puts tokens with the same teachers next to each other, so that each teacher is called once, not once a sample."""

    order: Optional[torch.Tensor]

    @classmethod
    def of(cls, target: _Target) -> "_Sorting":
        return cls(target.teacher.order() if isinstance(target.teacher, MixtureLogits) else None)

    def target(self, target: _Target) -> _Target:
        return target if self.order is None else target._replace(teacher=target.teacher.tokens(self.order))

    def head(self, head: LinearLogits) -> LinearLogits:
        return head if self.order is None else head.tokens(self.order)

    def sort(self, values: torch.Tensor) -> torch.Tensor:
        return values if self.order is None else values[self.order]

    def restore(self, columns: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if self.order is None:
            return list(columns)
        places = self.order.argsort()
        return [column[places] for column in columns]


class _Chunk(NamedTuple):
    """A few tokens, and where both sides' logits and the gradient of them go.

    The logits' memory is the next chunk's afterwards; the gradient's, where it is another, the next group's.
    """

    tokens: slice
    student: torch.Tensor
    teacher: Optional[torch.Tensor]
    before_cap: Optional[torch.Tensor]
    gradient: torch.Tensor  # (tokens, V), in the weight's dtype; may be the memory of the student's logits


class _Group(NamedTuple):
    """Tokens whose gradients, when all chunks are done, go into the products together."""

    tokens: slice
    chunks: list[_Chunk]
    gradient: torch.Tensor


def _memory(logits: LinearLogits, tokens: int) -> torch.Tensor:
    """For the logits of a chunk. To allocate once saves a page fault per 4 KiB."""
    return padded_rows(tokens, logits.shape[-1], logits.hidden, logits.dtype)


def _in_whole_tiles(rows: int, tokens: int) -> int:
    """For how many rows memory is made: no more than `rows`, and of few sizes, whatever the micro-batch's `tokens`.

    An allocator that caches what it has had would else keep a block for each size.
    """
    return min(rows, TILE * math.ceil(tokens / TILE))


def _source(teacher: LogitSource) -> LogitSource:
    """Whose logits are read."""
    return teacher.source if isinstance(teacher, SharedLogits) else teacher


def _chunking(head: LinearLogits, target: _Target, gradients: Optional[_HeadGradients]) -> Chunking:
    """The fastest by an accelerator's roofline; on a processor even chunks of `CHUNK_ELEMENTS`."""
    tokens, vocab = head.shape
    if head.hidden.is_cuda:
        teacher, student_width = _source(target.teacher), head.hidden.shape[-1]
        teacher_width = teacher.hidden.shape[-1] if isinstance(teacher, LinearLogits) else student_width
        sides = 2
        if isinstance(teacher, MixtureLogits):
            sides = _MIXTURE_SIDES
        elif isinstance(teacher, TopKTail) or target.shared is not None:
            sides = _BUCKET_SIDES
        sides += gradients is not None and gradients.is_any and head.softcap is not None
        return chunking_for(
            tokens,
            vocab,
            student_width,
            teacher_width,
            head.weight.itemsize,
            accelerator_of(head.hidden.device),
            sides,
            is_frozen=gradients is not None and gradients.weight is None,
        )
    first = next(iter(chunks(tokens, vocab, divergence_module.CHUNK_ELEMENTS)), slice(0, 1))
    return Chunking(rows=first.stop, group=first.stop)


def _token_groups(
    head: LinearLogits, target: _Target, chunking: Optional[Chunking], gradients: Optional[_HeadGradients]
) -> Iterator[_Group]:
    """`chunking`: None for the one that suits the device. `gradients`: what a group's are added to; None without any.

    Raises:
        ValueError: a chunking without rows, or with groups of less than a chunk.
    """
    needs_gradients = gradients is not None and gradients.is_any
    rows, group = chunking or _chunking(head, target, gradients)
    if not 1 <= rows <= group:
        raise ValueError(f"chunking={Chunking(rows, group)}: pass rows of 1 or more, and a group of no fewer.")
    is_over = head.dtype == head.weight.dtype or not needs_gradients
    if is_over:  # the gradient goes over the student's logits, which it fits: there is nothing to collect
        group = rows
    tokens = head.shape[0]
    most, source = _in_whole_tiles(rows, tokens), _source(target.teacher)
    student = _memory(head, most)
    teacher = _memory(source, most) if isinstance(source, LinearLogits) else None
    before_cap = _memory(head, most) if needs_gradients and head.softcap is not None else None
    gradient = student
    if not is_over:
        gradient = padded_rows(_in_whole_tiles(group, tokens), head.shape[-1], student, head.weight.dtype)
    for first in range(0, tokens, group):
        last = min(first + group, tokens)
        slices = [slice(start, min(start + rows, last)) for start in range(first, last, rows)]
        parts = [
            _Chunk(part, student, teacher, before_cap, gradient[part.start - first : part.stop - first])
            for part in slices
        ]
        yield _Group(slice(first, last), parts, gradient[: last - first])


def _student_logits(head: LinearLogits, chunk: _Chunk) -> torch.Tensor:
    """The student's logits of a chunk, in its units, in the memory that the chunk brings."""
    return head.in_units(chunk.tokens, chunk.student, chunk.before_cap)


def _gradient_memory(chunk: _Chunk, student: torch.Tensor) -> torch.Tensor:
    """Where the gradient by the logits goes: over these where the cap's slope is to come, which takes all digits."""
    return chunk.gradient if chunk.before_cap is None else student


def _keep_gradient(head: LinearLogits, chunk: _Chunk, gradient: torch.Tensor) -> None:
    """Turns `gradient` (chunk, V), by the logits in their units, into one by the product, in `chunk.gradient`."""
    if chunk.before_cap is not None:
        head.uncap_(gradient, chunk.before_cap)
    if gradient.data_ptr() != chunk.gradient.data_ptr():
        chunk.gradient.copy_(gradient)


def _exact(head: LinearLogits) -> torch.autocast:
    """A training engine runs the model inside autocast, which would take float32 sums in 16 bits."""
    return torch.autocast(head.hidden.device.type, enabled=False)


# ----------------------------------------------------------------------------------------------------------------------
# token weights that are known before


class _HeadDivergence(torch.autograd.Function):
    """Per-token results and gradients in one pass; the backward scales the gradients."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, whole, target, token_weights, needs_gradients, chunking):
        head = whole.cut(target.vocab)
        gradients = _HeadGradients(whole, tuple(needs_gradients and needs for needs in ctx.needs_input_grad[:3]))
        results = hidden.new_empty((target.fields + target.teachers, len(hidden)), dtype=whole.dtype)
        token_weights = token_weights.to(results.dtype)
        # At most one in the products, so that the 16-bit gradients of a mean over many tokens do not vanish.
        largest = torch.linalg.vector_norm(token_weights, torch.inf) if len(hidden) else token_weights.new_ones(())
        largest = largest.clamp_min(torch.finfo(results.dtype).tiny)
        for group in _token_groups(head, target, chunking, gradients):
            for chunk in group.chunks:
                weights = token_weights[chunk.tokens] / largest
                results[:, chunk.tokens] = _one_pass(head, target, chunk, weights)
            gradients.add(group.tokens, group.gradient)
        ctx.gradients, ctx.token_weights, ctx.largest = gradients, token_weights, largest
        ctx.mark_non_differentiable(*(columns := results.unbind())[1:])
        return columns

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_divergence, *_):
        if ctx.gradients is None:
            raise RuntimeError(
                "divergence_of_head: second backward through one result. The first has scaled its gradients in place "
                "and handed them over; call divergence_of_head again, or whatever called it (call linear_divergence "
                "again)."
            )
        factor = _common_factor(grad_divergence, ctx.token_weights)
        gradients, ctx.gradients = ctx.gradients, None
        return (*gradients.scaled(factor * ctx.largest), *(None,) * 5)


def _one_pass(head: LinearLogits, target: _Target, chunk: _Chunk, weights: torch.Tensor) -> torch.Tensor:
    """Results of a chunk's tokens; writes their gradient to where the chunk's goes."""
    student = _student_logits(head, chunk)
    teacher, kls = target.compare(head, chunk, student)
    gradient = _gradient_memory(chunk, student)
    results = target.rows_(head, student, teacher, weights, gradient)
    _keep_gradient(head, chunk, gradient)
    return target.with_kls(chunk, results, kls)


def _common_factor(grad_divergence: torch.Tensor, token_weights: torch.Tensor) -> torch.Tensor:
    """The number c (scalar) with dloss/dD_i = c * token_weights[i].

    Raises:
        RuntimeError: there is none.
    """
    if not len(token_weights):
        return token_weights.new_zeros(())
    largest = token_weights.abs().argmax()
    factor = grad_divergence[largest] / token_weights[largest]
    factor = torch.where(token_weights[largest] == 0.0, 0.0, factor)
    expected = factor * token_weights
    is_close = (grad_divergence - expected).abs() <= WEIGHT_TOLERANCE * expected[largest].abs()
    # A loss that overflowed, as a scaled one may, has no weights to compare: its gradients tell.
    if factor.isfinite() and not is_close.all():
        token = int(is_close.int().argmin())
        raise RuntimeError(
            f"divergence_of_head: the loss weighs token {token} with {grad_divergence[token].item():.6g}, and "
            f"token_weights promised {expected[token].item():.6g} (that of token {int(largest)} as the measure): build "
            "the loss as a multiple of sum_i token_weights[i] * divergence[i], or use tokens_of_head."
        )
    return factor


def divergence_of_head(
    head: LinearLogits,
    teacher: LogitSource,
    spec: DivergenceSpec,
    token_weights: torch.Tensor,
    chunking: Optional[Chunking] = None,
) -> TokenDivergence:
    """Divergence and statistics of n tokens, for a loss whose weights of the tokens are known beforehand.

    Args:
        head: the student's logits (n, V_s); gradients flow to its tensors.
        teacher: logits (n, V_t); never receives a gradient. Where V_s and V_t differ, both are cut to the shorter. Or
            the k largest entries and the rest, or those of a shared vocabulary and the rest (`buckets.py`), taken at
            the temperature of `spec`: divergence and statistics are then those between distributions over k + 1
            outcomes.
        token_weights: (n,), a promise: the loss is, up to a common factor, sum_i token_weights[i] * divergence[i].
        chunking: how many tokens at a time; None: what `roofline.py` predicts to be the fastest on an accelerator, and
            `CHUNK_ELEMENTS` on a processor. Its `group` says nothing with float32 weights, whose gradients go over the
            logits.

    Returns:
        TokenDivergence, whose `divergence` is differentiable, once. Its backward raises RuntimeError if the loss does
        not keep the promise.

    Raises:
        ValueError: an unknown divergence, or numbers of tokens that differ.
    """
    return divergence_by_teacher(head, teacher, spec, token_weights, chunking)[0]


def divergence_by_teacher(
    head: LinearLogits,
    teacher: LogitSource,
    spec: DivergenceSpec,
    token_weights: torch.Tensor,
    chunking: Optional[Chunking] = None,
) -> tuple[TokenDivergence, torch.Tensor]:
    """`divergence_of_head`, and the rows of `extra_columns`, (rows, n): without gradient, and none for most teachers.

    The KLs, in nats, are NaN at the tokens that a teacher has no weight in.
    """
    target = _Target.of(head, teacher, spec)
    _require_per_token("token_weights", token_weights, head.shape[0])
    sorting = _Sorting.of(target)
    head, target = sorting.head(head), sorting.target(target)
    needs_gradients = torch.is_grad_enabled()  # which a Function's forward cannot see
    with _exact(head):
        token_weights = sorting.sort(token_weights)
        columns = _HeadDivergence.apply(
            head.hidden, head.weight, head.bias, head, target, token_weights, needs_gradients, chunking
        )
    return _tokens_and_teachers(sorting.restore(columns))


def extra_columns(teacher: LogitSource) -> list[str]:
    """What `divergence_by_teacher` and `tokens_by_teacher` say of a token beside the divergence.

    `REST_MASSES` for a teacher of a shared vocabulary: the probability of the entries that only the teacher has, and
    of those that only the student has. The name, after `KL_TO`, of each teacher of a mixture: KL(S||T_k).
    """
    is_shared = isinstance(teacher, InSharedVocabulary)
    inside = teacher.source if isinstance(teacher, InSharedVocabulary) else teacher
    names = inside.names if isinstance(inside, MixtureLogits) else ()
    return [*(REST_MASSES if is_shared else ()), *(f"{KL_TO}{name}" for name in names)]


def _tokens_and_teachers(columns: list[torch.Tensor]) -> tuple[TokenDivergence, torch.Tensor]:
    own = len(TokenDivergence._fields)
    tokens = TokenDivergence(*columns[:own])
    by_teacher = torch.stack(columns[own:]) if columns[own:] else tokens.divergence.new_empty((0, len(columns[0])))
    return tokens, by_teacher


# ----------------------------------------------------------------------------------------------------------------------
# any loss


class _HeadTokens(torch.autograd.Function):
    """Per-token results; the backward projects again, see the module docstring."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, head, target, labels, log_prob_temperature, chunking):
        results = hidden.new_empty((2 + target.fields + target.teachers, len(hidden)), dtype=head.dtype)
        # A model's own head rounds its logits to its weight's dtype, and old and reference log-probs come from there:
        # ratios would not be one at the first update if these kept the digits that a wide product has.
        policy = Policy(labels, log_prob_temperature / head.unit, head.weight.dtype)
        for group in _token_groups(head, target, chunking, None):
            for chunk in group.chunks:
                results[:, chunk.tokens] = _token_results(head, target, chunk, policy.rows(chunk.tokens))
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.scale, ctx.softcap = head.scale, head.softcap
        ctx.target, ctx.temperature, ctx.chunking = target, policy.temperature, chunking
        ctx.mark_non_differentiable(*(columns := results.unbind())[3:])
        return columns

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_log_prob, grad_entropy, grad_divergence, *_):
        *tensors, labels = ctx.saved_tensors
        head = LinearLogits(*tensors, ctx.scale, ctx.softcap)
        gradients = _HeadGradients(head, ctx.needs_input_grad[:3])
        policy = Policy(labels, ctx.temperature, head.weight.dtype)
        upstream = torch.stack((grad_log_prob, grad_entropy, grad_divergence))
        with _exact(head):
            for group in _token_groups(head, ctx.target, ctx.chunking, gradients):
                for chunk in group.chunks:
                    _token_gradient(head, ctx.target, chunk, policy.rows(chunk.tokens), upstream[:, chunk.tokens])
                gradients.add(group.tokens, group.gradient)
        return (*gradients.scaled(grad_log_prob.new_ones(())), *(None,) * 5)


def _token_results(head: LinearLogits, target: _Target, chunk: _Chunk, policy: Policy) -> torch.Tensor:
    """log_prob, entropy, the target's fields and each teacher's KL, (2 + fields + K, chunk)."""
    student = _student_logits(head, chunk)
    teacher, kls = target.compare(head, chunk, student)
    results = target.policy_rows_(head, student, teacher, policy)
    return torch.cat((results[:2], target.with_kls(chunk, results[2:], kls)))


def _token_gradient(head: LinearLogits, target: _Target, chunk: _Chunk, policy: Policy, upstream: torch.Tensor) -> None:
    """By the product (chunk, V), to where the chunk's gradient goes; `upstream` (3, chunk) of log_prob, entropy, D."""
    student = _student_logits(head, chunk)
    teacher = target.said(chunk, student.dtype)
    gradient = _gradient_memory(chunk, student)
    target.policy_gradient_(head, student, teacher, policy, upstream, gradient)
    _keep_gradient(head, chunk, gradient)


def tokens_of_head(
    head: LinearLogits,
    teacher: LogitSource,
    spec: DivergenceSpec,
    labels: torch.Tensor,
    log_prob_temperature: float = 1.0,
    chunking: Optional[Chunking] = None,
) -> PolicyTokens:
    """Per token: the student's log-probability of a label, its entropy, and the divergence; all differentiable.

    Args:
        head, teacher: as in `divergence_of_head`; both are read again in the backward, and must not change before it.
        labels: (n,) int64, below V_s.
        log_prob_temperature: divides the student's logits for `log_prob` and `entropy`, which are taken over its
            whole vocabulary; the temperature in `spec` is that of the divergence.
        chunking: as in `divergence_of_head`.

    Raises:
        ValueError: an unknown divergence, numbers of tokens that differ, or labels that are not int64.
    """
    return tokens_by_teacher(head, teacher, spec, labels, log_prob_temperature, chunking)[0]


def tokens_by_teacher(
    head: LinearLogits,
    teacher: LogitSource,
    spec: DivergenceSpec,
    labels: torch.Tensor,
    log_prob_temperature: float = 1.0,
    chunking: Optional[Chunking] = None,
) -> tuple[PolicyTokens, torch.Tensor]:
    """`tokens_of_head`, and more of each token as in `divergence_by_teacher`."""
    target = _Target.of(head, teacher, spec)
    _require_per_token("labels", labels, head.shape[0])
    if labels.dtype != torch.int64:
        raise ValueError(f"labels are {labels.dtype}: pass int64 token ids.")
    sorting = _Sorting.of(target)
    head, target = sorting.head(head), sorting.target(target)
    with _exact(head):
        labels = sorting.sort(labels)
        columns = _HeadTokens.apply(
            head.hidden, head.weight, head.bias, head, target, labels, log_prob_temperature, chunking
        )
    log_prob, entropy, *columns = sorting.restore(columns)
    tokens, by_teacher = _tokens_and_teachers(columns)
    return PolicyTokens(log_prob, entropy, tokens), by_teacher


# ----------------------------------------------------------------------------------------------------------------------
# the same with plain tensors


def linear_divergence(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor | Sequence[torch.Tensor],
    teacher_weight: torch.Tensor | Sequence[torch.Tensor],
    *,
    distillation_type: str = "reverse_kl",
    beta: float = 1.0,
    temperature: float = 1.0,
    token_weights: Optional[torch.Tensor] = None,
    student_bias: Optional[torch.Tensor] = None,
    teacher_bias: Optional[torch.Tensor] | Sequence[Optional[torch.Tensor]] = None,
    student_scale: float = 1.0,
    student_softcap: Optional[float] = None,
    teacher_scale: float | Sequence[float] = 1.0,
    teacher_softcap: Optional[float] | Sequence[Optional[float]] = None,
    teacher_weights: Optional[Sequence[float]] = None,
    chunking: Optional[Chunking] = None,
) -> LinearDivergence:
    """sum_i token_weights[i] * D_i of two linear heads, with its gradient, in one pass and without their logits.

    Args:
        student_hidden: (n, H_s); student_weight: (V_s, H_s); student_bias: (V_s,) or None. Gradients flow to these.
        teacher_hidden: (n, H_t); teacher_weight: (V_t, H_t); teacher_bias: (V_t,) or None. Never receive one.
            Any float dtypes; products are made in the dtype of each weight, everything else in float32 (in float64
            for float64 weights). Where V_s and V_t differ, both are cut to the shorter: paddings of one tokenizer.
        distillation_type, beta, temperature: see `DivergenceSpec` in `divergence.py`.
        token_weights: (n,) factors of the tokens' divergences, constants; None takes the mean over tokens.
        student_scale, student_softcap, teacher_scale, teacher_softcap: see `LinearLogits`.
        teacher_weights: of several teachers, whose exact mixture is the target (`mixture.py`): `teacher_hidden` and
            `teacher_weight` are then lists with one tensor for each, and so may be the teacher's other arguments.
            Normalised here; None weighs all teachers alike.
        chunking: as in `divergence_of_head`.

    Returns:
        LinearDivergence: `loss` (scalar, nats; 0 for n = 0), per-token `divergence`, and its statistics as `metrics`.
        The backward runs once: it hands over gradients that the forward has made. Logits of -inf (from a bias) are
        probabilities of zero; how they enter is said in `divergence.py`.

    Raises:
        ValueError: an unknown divergence, shapes that do not belong together, or weights that weigh nothing.
    """
    spec = DivergenceSpec(distillation_type, beta, temperature)
    head = _head("student", student_hidden, student_weight, student_bias, student_scale, student_softcap, spec)
    settings = teacher_hidden, teacher_weight, teacher_bias, teacher_scale, teacher_softcap
    teacher = _teacher(head, settings, teacher_weights, spec)
    num_tokens = len(student_hidden)
    if token_weights is None:
        token_weights = student_hidden.new_full((num_tokens,), 1.0 / max(num_tokens, 1), dtype=head.dtype)
    tokens = divergence_of_head(head, teacher, spec, token_weights, chunking)
    with _exact(head):
        loss = torch.dot(token_weights.detach().to(head.dtype), tokens.divergence)
    tokens = tokens._replace(divergence=tokens.divergence.detach())
    return LinearDivergence(loss, tokens.divergence, tokens)


def linear_token_divergence(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor | Sequence[torch.Tensor],
    teacher_weight: torch.Tensor | Sequence[torch.Tensor],
    labels: torch.Tensor,
    *,
    distillation_type: str = "reverse_kl",
    beta: float = 1.0,
    temperature: float = 1.0,
    log_prob_temperature: float = 1.0,
    student_bias: Optional[torch.Tensor] = None,
    teacher_bias: Optional[torch.Tensor] | Sequence[Optional[torch.Tensor]] = None,
    student_scale: float = 1.0,
    student_softcap: Optional[float] = None,
    teacher_scale: float | Sequence[float] = 1.0,
    teacher_softcap: Optional[float] | Sequence[Optional[float]] = None,
    teacher_weights: Optional[Sequence[float]] = None,
    chunking: Optional[Chunking] = None,
) -> PolicyTokens:
    """Per token: the student's log-probability of a label, its entropy, and the divergence; all differentiable.

    Args:
        labels: (n,) int64, below V_s.
        teacher_hidden, teacher_weight, teacher_bias: are read again in the backward, and must not change before it.
        log_prob_temperature: divides the student's logits for `log_prob` and `entropy`, which are taken over its
            whole vocabulary; `temperature` is that of the divergence.
        Everything else as in `linear_divergence`.

    Returns:
        PolicyTokens, each entry (n,), in nats.

    Raises:
        ValueError: as in `linear_divergence`.
    """
    spec = DivergenceSpec(distillation_type, beta, temperature)
    head = _head("student", student_hidden, student_weight, student_bias, student_scale, student_softcap, spec)
    settings = teacher_hidden, teacher_weight, teacher_bias, teacher_scale, teacher_softcap
    teacher = _teacher(head, settings, teacher_weights, spec)
    return tokens_of_head(head, teacher, spec, labels, log_prob_temperature, chunking)


def _teacher(student: LinearLogits, settings: tuple, weights: Optional[Sequence[float]], spec) -> LogitSource:
    """The teacher, or the mixture of several: of each of `settings`, a list has one for each teacher."""
    hidden, weight, bias, scale, softcap = settings
    if not isinstance(hidden, list | tuple):
        if weights is not None:
            raise ValueError(
                f"teacher_weights={weights} and one teacher_hidden: pass a list with one for each teacher."
            )
        heads = [_head("teacher", hidden, weight, bias, scale, softcap, spec)]
    else:
        columns = [hidden, _one_for_each("teacher_weight", weight, len(hidden))]
        for name, setting in (("teacher_bias", bias), ("teacher_scale", scale), ("teacher_softcap", softcap)):
            is_list = isinstance(setting, list | tuple)
            columns.append(_one_for_each(name, setting if is_list else [setting] * len(hidden), len(hidden)))
        heads = [_head("teacher", h, w, b, factor, cap, spec) for h, w, b, factor, cap in zip(*columns, strict=True)]
    for head in heads:
        _require_together(student, head)
    if not isinstance(hidden, list | tuple):
        return heads[0]
    return mixture_of(
        heads, [1.0] * len(heads) if weights is None else weights, spec.temperature, student.hidden.device
    )


def _one_for_each(name: str, values: Any, teachers: int) -> Sequence:
    if not isinstance(values, list | tuple) or len(values) != teachers or not teachers:
        given = f"{len(values)} values" if isinstance(values, list | tuple) else f"a {type(values).__name__}"
        raise ValueError(
            f"{name} is {given}, and teacher_hidden has {teachers}: pass a list with one for each teacher."
        )
    return values


def _head(name: str, hidden, weight, bias, scale, softcap, spec: DivergenceSpec) -> LinearLogits:
    """The arguments that begin with `name`, checked; those of the teacher detached."""
    if spec.distillation_type not in DIVERGENCES:
        raise ValueError(f"distillation_type={spec.distillation_type!r}: choose one of {list(DIVERGENCES)}.")
    if not 0.0 <= spec.beta <= 1.0 or not 0.0 < spec.temperature < float("inf"):
        raise ValueError(f"beta={spec.beta}, temperature={spec.temperature}: pass beta in [0, 1], temperature > 0.")
    _require_factors(f"{name}_", scale, softcap)
    shapes = tuple(hidden.shape), tuple(weight.shape), None if bias is None else tuple(bias.shape)
    fits = len(shapes[0]) == len(shapes[1]) == 2 and shapes[0][1] == shapes[1][1] and shapes[2] in (None, shapes[1][:1])
    if not fits or not (hidden.is_floating_point() and weight.is_floating_point()):
        raise ValueError(
            f"{name}_hidden {shapes[0]} {hidden.dtype}, {name}_weight {shapes[1]} {weight.dtype}, {name}_bias "
            f"{shapes[2]}: pass floating-point (n, H), (V, H) and (V,) or None."
        )
    if name == "teacher":
        hidden, weight, bias = (None if tensor is None else tensor.detach() for tensor in (hidden, weight, bias))
    return LinearLogits(hidden, weight, bias, scale, softcap)


def _require_factors(prefix: str, scale: float, softcap: Optional[float]) -> None:
    for name, factor in (("scale", scale), ("softcap", 1.0 if softcap is None else softcap)):
        if not 0.0 < factor < float("inf"):
            raise ValueError(f"{prefix}{name}={factor}: pass a positive number{' or None' * (name == 'softcap')}.")


def _require_together(student: LinearLogits, teacher: LinearLogits) -> None:
    if len(student.hidden) != len(teacher.hidden):
        raise ValueError(
            f"student_hidden has {len(student.hidden)} tokens, teacher_hidden {len(teacher.hidden)}: pass the same."
        )
    heads = (("student", student), ("teacher", teacher))
    devices = {f"{name}_{part}": getattr(head, part).device for name, head in heads for part in ("hidden", "weight")}
    if len(set(devices.values())) > 1:
        placed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{placed}: move all to one device.")


def _require_per_token(name: str, values: torch.Tensor, num_tokens: int) -> None:
    if values.shape != (num_tokens,):
        raise ValueError(f"{name} has shape {tuple(values.shape)}: pass one value per token, ({num_tokens},).")
