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
"""Divergence of two linear heads over a large vocabulary without their logits: hidden states in, gradients out.

The divergences and their gradients with respect to logits are those of ``verl/utils/divergence.py``. With student
logits z = h W^T + b and G = dloss/dz (n, V), the rest is matrix products:

    dloss/dh = G W        dloss/dW = G^T h        dloss/db = sum_i G_i

Two entry points share one loop over chunks of tokens. No tensor of (tokens, V) outlives its chunk.

`linear_divergence` is for a loss sum_i w_i D_i whose weights are known beforehand. G is then known as soon as a chunk's
logits are, so the forward makes the gradients too: three products with the student's weight, one with the teacher's,
and the backward multiplies by one number. (Computing gradients in the forward of a fused linear loss: Liger Kernel,
Hsu et al., arXiv:2410.10989, sec. 3.2.)

`linear_token_divergence` is for losses that use the tokens in ways only they know, such as a policy-gradient term: it
returns per-token results that any loss may be built on. The gradients of the three results are separate until the
backward says how they mix, so either G is stored for each (three (n, V) tensors, what this module is there to avoid)
or the logits are projected again in the backward: one more product with each weight, four and two in all. Recomputing
is the cheaper by far: a product of H multiplications per logit against writing and reading a logit from main memory
costs time, but for n = 8,192 and V = 151,936 each stored tensor would cost 5 GB in float32.
"""

from typing import Iterator, NamedTuple, Optional

import torch

from verl.utils import divergence as divergence_module
from verl.utils.divergence import (
    DIVERGENCES,
    DivergenceSpec,
    LinearLogits,
    LogitSource,
    TokenDivergence,
    cache_blocks,
    chunks,
    divergence_rows_,
    log_zero_,
    tempered_log_softmax,
    wide_mm,
)

__all__ = [
    "LinearDivergence",
    "PolicyTokens",
    "divergence_of_head",
    "linear_divergence",
    "linear_token_divergence",
    "tokens_of_head",
]


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
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # a 16-bit product on a device without wide ones: by blocks, as its (V, H) result is larger than a chunk
        for rows in chunks(len(total), total.shape[1], divergence_module.CHUNK_ELEMENTS // 4):
            total[rows] += torch.mm(a[rows], b)


class _Target(NamedTuple):
    """What the student is compared with, and how; nothing here has a gradient.

    `teacher` covers the vocabulary that both share.
    """

    teacher: LogitSource
    spec: DivergenceSpec

    @property
    def vocab(self) -> int:
        return self.teacher.shape[-1]

    def logits(self, chunk: slice, like: torch.Tensor, out: Optional[torch.Tensor]) -> torch.Tensor:
        if isinstance(self.teacher, LinearLogits):
            return self.teacher.rows(chunk, out).to(like.dtype)
        return self.teacher.rows(torch.arange(chunk.start, chunk.stop, device=like.device)).to(like.dtype)

    def rows_(self, student: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor, gradient: torch.Tensor):
        """`divergence_rows_` by Triton's kernel on CUDA, by its twin in torch elsewhere."""
        function = divergence_rows_
        if student.is_cuda:
            from verl.utils.kernel.divergence_rows import divergence_rows_ as function
        return function(student, teacher, self.spec, self.spec.temperature, weights, gradient)


class _Chunk(NamedTuple):
    """A few tokens, and where both sides' logits of them go. The memory is the next chunk's afterwards."""

    tokens: slice
    student: torch.Tensor
    teacher: Optional[torch.Tensor]


def _memory(logits: LogitSource, tokens: int) -> Optional[torch.Tensor]:
    """For the logits of a chunk; None if they are not projected. To allocate once saves a page fault per 4 KiB."""
    if not isinstance(logits, LinearLogits):
        return None
    return logits.hidden.new_empty((tokens, logits.shape[-1]), dtype=logits.dtype)


def _token_chunks(head: LinearLogits, target: _Target) -> Iterator[_Chunk]:
    slices = list(chunks(*head.shape, divergence_module.CHUNK_ELEMENTS))
    longest = slices[0].stop if slices else 0
    memory = _memory(head, longest), _memory(target.teacher, longest)
    return (_Chunk(tokens, *memory) for tokens in slices)


def _chunk_logits(head: LinearLogits, target: _Target, chunk: _Chunk) -> tuple[torch.Tensor, torch.Tensor]:
    """Student's and teacher's logits of a chunk, in the memory that it brings."""
    student = head.rows(chunk.tokens, chunk.student)
    return student, target.logits(chunk.tokens, student, chunk.teacher)


def _exact(head: LinearLogits) -> torch.autocast:
    """A training engine runs the model inside autocast, which would take float32 sums in 16 bits."""
    return torch.autocast(head.hidden.device.type, enabled=False)


class _LinearDivergence(torch.autograd.Function):
    """Loss, per-token results and gradients in one pass; the backward scales the gradients."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, token_weights, needs_gradients):
        whole = LinearLogits(hidden, weight, bias)
        head = whole.cut(target.vocab)
        gradients = _HeadGradients(whole, tuple(needs_gradients and needs for needs in ctx.needs_input_grad[:3]))
        results = hidden.new_empty((len(TokenDivergence._fields), len(hidden)), dtype=whole.dtype)
        token_weights = token_weights.to(results.dtype)
        # At most one in the products, so that the 16-bit gradients of a mean over many tokens do not vanish.
        largest = torch.linalg.vector_norm(token_weights, torch.inf) if len(hidden) else token_weights.new_ones(())
        largest = largest.clamp_min(torch.finfo(results.dtype).tiny)
        for chunk in _token_chunks(head, target):
            weights = token_weights[chunk.tokens] / largest
            results[:, chunk.tokens] = _one_pass(head, target, chunk, weights, gradients)
        ctx.gradients, ctx.largest = gradients, largest
        ctx.mark_non_differentiable(results)
        return torch.dot(token_weights, results[0]), results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_divergence: second backward through one result. The first has scaled its gradients in place "
                "and handed them over; call linear_divergence again."
            )
        gradients, ctx.gradients = ctx.gradients, None
        return (*gradients.scaled(grad_loss * ctx.largest), None, None, None)


def _one_pass(
    head: LinearLogits, target: _Target, chunk: _Chunk, weights: torch.Tensor, gradients: _HeadGradients
) -> torch.Tensor:
    """Results of a chunk's tokens; adds their gradients."""
    student, teacher = _chunk_logits(head, target, chunk)
    # Over the logits, where the products with it are in the same dtype.
    gradient = student if student.dtype == head.weight.dtype else torch.empty_like(student, dtype=head.weight.dtype)
    results = target.rows_(student, teacher, weights, gradient)
    gradients.add(chunk.tokens, gradient)
    return results


class _Policy(NamedTuple):
    """The student's tempered distribution over its whole vocabulary: log_p (rows, V), and what RL reads of it (rows,).

    With p = softmax(z / tau), d log p_a / dz_v = (1[v = a] - p_v) / tau, and for the entropy H = -sum_v p_v log p_v
    dH / dz_v = -p_v (log p_v + H) / tau.
    """

    log_p: torch.Tensor
    log_prob: torch.Tensor
    entropy: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, labels: torch.Tensor, temperature: float) -> "_Policy":
        log_p = log_zero_(tempered_log_softmax(logits.clone(), temperature, out=torch.empty_like(logits)))
        entropy = -torch.linalg.vecdot(log_p.exp(), log_p)
        return cls(log_p, log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1), entropy)

    def gradient(self, labels, temperature, grad_log_prob, grad_entropy) -> torch.Tensor:
        """With respect to the logits, (rows, V)."""
        p = self.log_p.exp()
        slope = (self.log_p + self.entropy.unsqueeze(-1)).mul_(grad_entropy.unsqueeze(-1))
        gradient = slope.add_(grad_log_prob.unsqueeze(-1)).mul_(p).neg_()
        return gradient.scatter_add_(-1, labels.unsqueeze(-1), grad_log_prob.unsqueeze(-1)).div_(temperature)


class _LinearTokenDivergence(torch.autograd.Function):
    """Per-token results; the backward projects again, see the module docstring."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, labels, log_prob_temperature):
        head = LinearLogits(hidden, weight, bias)
        results = hidden.new_empty((2 + len(TokenDivergence._fields), len(hidden)), dtype=head.dtype)
        for chunk in _token_chunks(head, target):
            tokens = chunk.tokens
            results[:, tokens] = _token_results(head, target, chunk, labels[tokens], log_prob_temperature)
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.target, ctx.log_prob_temperature = target, log_prob_temperature
        ctx.mark_non_differentiable(*(columns := results.unbind())[3:])
        return columns

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_log_prob, grad_entropy, grad_divergence, *_):
        *tensors, labels = ctx.saved_tensors
        head, temperature = LinearLogits(*tensors), ctx.log_prob_temperature
        gradients = _HeadGradients(head, ctx.needs_input_grad[:3])
        upstream = torch.stack((grad_log_prob, grad_entropy, grad_divergence))
        with _exact(head):
            for chunk in _token_chunks(head, ctx.target):
                tokens = chunk.tokens
                gradients.add(
                    tokens, _token_gradient(head, ctx.target, chunk, labels[tokens], temperature, upstream[:, tokens])
                )
        return (*gradients.scaled(grad_log_prob.new_ones(())), None, None, None)


def _token_results(
    head: LinearLogits, target: _Target, chunk: _Chunk, labels: torch.Tensor, temperature: float
) -> torch.Tensor:
    """log_prob, entropy and the fields of TokenDivergence, (8, chunk)."""
    student, teacher = _chunk_logits(head, target, chunk)
    results = student.new_empty((2 + len(TokenDivergence._fields), len(student)))
    for rows in cache_blocks(student):
        policy = _Policy.of(student[rows], labels[rows], temperature)
        results[:2, rows] = torch.stack((policy.log_prob, policy.entropy))
        del policy
        shared = student[rows, : target.vocab]
        results[2:, rows] = target.rows_(shared, teacher[rows], shared.new_ones(len(shared)), shared)
    return results


def _token_gradient(
    head: LinearLogits,
    target: _Target,
    chunk: _Chunk,
    labels: torch.Tensor,
    temperature: float,
    upstream: torch.Tensor,
) -> torch.Tensor:
    """With respect to the logits (chunk, V), in the weight's dtype; `upstream` (3, chunk) of log_prob, entropy, D."""
    student, teacher = _chunk_logits(head, target, chunk)
    for rows in cache_blocks(student):
        grad_log_prob, grad_entropy, grad_divergence = upstream[:, rows]
        policy = _Policy.of(student[rows], labels[rows], temperature)
        gradient = policy.gradient(labels[rows], temperature, grad_log_prob, grad_entropy)
        del policy
        shared = student[rows, : target.vocab]
        target.rows_(shared, teacher[rows], grad_divergence, shared)
        gradient[:, : target.vocab] += shared
        student[rows] = gradient
    return student.to(head.weight.dtype)


def divergence_of_head(
    head: LinearLogits,
    teacher: LogitSource,
    spec: DivergenceSpec,
    token_weights: torch.Tensor,
) -> LinearDivergence:
    """`linear_divergence` for any source of the teacher's logits, which covers no more than the head's vocabulary."""
    target = _Target(teacher, spec)
    needs_gradients = torch.is_grad_enabled()  # which a Function's forward cannot see
    with _exact(head):
        loss, results = _LinearDivergence.apply(
            head.hidden, head.weight, head.bias, target, token_weights, needs_gradients
        )
    tokens = TokenDivergence(*results.unbind())
    return LinearDivergence(loss, tokens.divergence, tokens)


def tokens_of_head(
    head: LinearLogits,
    teacher: LogitSource,
    spec: DivergenceSpec,
    labels: torch.Tensor,
    log_prob_temperature: float = 1.0,
) -> PolicyTokens:
    """`linear_token_divergence` for any source of the teacher's logits, as in `divergence_of_head`."""
    target = _Target(teacher, spec)
    with _exact(head):
        log_prob, entropy, *columns = _LinearTokenDivergence.apply(
            head.hidden, head.weight, head.bias, target, labels, log_prob_temperature
        )
    return PolicyTokens(log_prob, entropy, TokenDivergence(*columns))


def linear_divergence(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    *,
    distillation_type: str = "reverse_kl",
    beta: float = 1.0,
    temperature: float = 1.0,
    token_weights: Optional[torch.Tensor] = None,
    student_bias: Optional[torch.Tensor] = None,
    teacher_bias: Optional[torch.Tensor] = None,
) -> LinearDivergence:
    """sum_i token_weights[i] * D_i of two linear heads, with its gradient, in one pass and without their logits.

    Args:
        student_hidden: (n, H_s); student_weight: (V_s, H_s); student_bias: (V_s,) or None. Gradients flow to these.
        teacher_hidden: (n, H_t); teacher_weight: (V_t, H_t); teacher_bias: (V_t,) or None. Never receive one.
            Any float dtypes; products are made in the dtype of each weight, everything else in float32 (in float64
            for float64 weights). Where V_s and V_t differ, both are cut to the shorter: paddings of one tokenizer.
        distillation_type, beta, temperature: see `verl.utils.divergence.DivergenceSpec`.
        token_weights: (n,) factors of the tokens' divergences, constants; None takes the mean over tokens.

    Returns:
        LinearDivergence: `loss` (scalar, nats; 0 for n = 0), per-token `divergence`, and its statistics as `metrics`.
        The backward runs once: it hands over gradients that the forward has made. Logits of -inf (from a bias) are
        probabilities of zero; how they enter is said in `verl/utils/divergence.py`.

    Raises:
        ValueError: an unknown divergence, or shapes that do not belong together.
    """
    spec = DivergenceSpec(distillation_type, beta, temperature)
    head, teacher = _shared_heads(
        LinearLogits(student_hidden, student_weight, student_bias),
        LinearLogits(teacher_hidden, teacher_weight, teacher_bias),
        spec,
    )
    num_tokens = len(student_hidden)
    if token_weights is None:
        token_weights = student_hidden.new_full((num_tokens,), 1.0 / max(num_tokens, 1), dtype=head.dtype)
    _require_per_token("token_weights", token_weights, num_tokens)
    return divergence_of_head(head, teacher, spec, token_weights)


def linear_token_divergence(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    distillation_type: str = "reverse_kl",
    beta: float = 1.0,
    temperature: float = 1.0,
    log_prob_temperature: float = 1.0,
    student_bias: Optional[torch.Tensor] = None,
    teacher_bias: Optional[torch.Tensor] = None,
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
    head, teacher = _shared_heads(
        LinearLogits(student_hidden, student_weight, student_bias),
        LinearLogits(teacher_hidden, teacher_weight, teacher_bias),
        spec,
    )
    _require_per_token("labels", labels, len(student_hidden))
    if labels.dtype != torch.int64:
        raise ValueError(f"labels are {labels.dtype}: pass int64 token ids.")
    return tokens_of_head(head, teacher, spec, labels, log_prob_temperature)


def _shared_heads(
    student: LinearLogits, teacher: LinearLogits, spec: DivergenceSpec
) -> tuple[LinearLogits, LinearLogits]:
    """Both heads, checked; the teacher's cut to no more than the student's vocabulary and detached."""
    if spec.distillation_type not in DIVERGENCES:
        raise ValueError(f"distillation_type={spec.distillation_type!r}: choose one of {list(DIVERGENCES)}.")
    if not 0.0 <= spec.beta <= 1.0 or not 0.0 < spec.temperature < float("inf"):
        raise ValueError(f"beta={spec.beta}, temperature={spec.temperature}: pass beta in [0, 1], temperature > 0.")
    _require_head("student", student)
    _require_head("teacher", teacher)
    if len(student.hidden) != len(teacher.hidden):
        raise ValueError(
            f"student_hidden has {len(student.hidden)} tokens, teacher_hidden {len(teacher.hidden)}: pass the same."
        )
    heads = (("student", student), ("teacher", teacher))
    devices = {f"{name}_{part}": getattr(head, part).device for name, head in heads for part in ("hidden", "weight")}
    if len(set(devices.values())) > 1:
        placed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{placed}: move all to one device.")
    detached = (
        None if tensor is None else tensor.detach() for tensor in (teacher.hidden, teacher.weight, teacher.bias)
    )
    return student, LinearLogits(*detached).cut(len(student.weight))


def _require_head(name: str, head: LinearLogits) -> None:
    hidden, weight = tuple(head.hidden.shape), tuple(head.weight.shape)
    bias = None if head.bias is None else tuple(head.bias.shape)
    fits = len(hidden) == 2 and len(weight) == 2 and hidden[1] == weight[1] and bias in (None, weight[:1])
    if not fits or not (head.hidden.is_floating_point() and head.weight.is_floating_point()):
        raise ValueError(
            f"{name}_hidden {hidden} {head.hidden.dtype}, {name}_weight {weight} {head.weight.dtype}, {name}_bias "
            f"{bias}: pass floating-point (n, H), (V, H) and (V,) or None."
        )


def _require_per_token(name: str, values: torch.Tensor, num_tokens: int) -> None:
    if values.shape != (num_tokens,):
        raise ValueError(f"{name} has shape {tuple(values.shape)}: pass one value per token, ({num_tokens},).")
