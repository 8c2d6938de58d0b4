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
"""Random cases of both ways to the loss, against float64: from logits and from hidden states.

Each case draws type, beta, temperature, dtype, shape, scale, mask and aggregation mode. The bounds are those of
`VALUE` and `GRADIENT`, for logits as they are after rounding to the case's dtype.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch

from verl.on_policy_distillation.head import linear_divergence
from verl.trainer.ppo.on_policy_distillation import compute_on_policy_distillation_loss

CASES, BLOCK = 2400, 100
TYPES = ("reverse_kl", "forward_kl", "gkd", "skew_reverse_kl")
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
VALUE = 2e-6  # of a token's divergence: relative, or absolute below one nat
GRADIENT = 2e-5  # relative to the largest entry of the whole gradient, or to the bound of a value
# Of a gradient, which is rounded as the divergence's and once more as the loss's.
ROUNDING = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 2**-7, torch.float16: 2**-10}


BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0}  # of the types that are no mixture; another would contradict them


@dataclass(frozen=True)
class Case:
    seed: int

    @cached_property
    def _rng(self) -> random.Random:
        return random.Random(self.seed)

    @cached_property
    def settings(self) -> dict:
        rng = self._rng
        kind = rng.choice(TYPES)
        beta = rng.choice((0.0, 1.0, 0.5, rng.random(), 10 ** rng.uniform(-4, 0)))
        return {
            "distillation_type": kind,
            "distillation_beta": BETAS.get(kind, beta),
            "distillation_temperature": rng.choice((1.0, rng.uniform(0.3, 4.0))),
        }

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        return self._rng.randint(1, 4), self._rng.randint(1, 6), self._rng.choice((1, 2, 3, 17, 64, 257))

    @cached_property
    def dtype(self) -> torch.dtype:
        return self._rng.choice(list(ROUNDING))

    @cached_property
    def mode(self) -> str:
        return self._rng.choice(MODES)

    @cached_property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def logits(self) -> tuple[torch.Tensor, torch.Tensor]:
        scale = self._rng.choice((0.1, 1.0, 5.0, 20.0))
        return tuple((scale * self.normal(*self.shape)).to(self.dtype) for _ in range(2))

    def mask(self) -> torch.Tensor:
        mask = torch.rand(self.shape[:2], generator=self.generator) < 0.7
        mask[0, 0] = True  # an empty mask is tested elsewhere
        return mask


def true_divergence(student, teacher, distillation_type, distillation_beta, distillation_temperature) -> torch.Tensor:
    """From the definitions, in float64, (..., V) -> (...)."""
    log_s, log_t = (torch.log_softmax(side / distillation_temperature, -1) for side in (student, teacher))
    beta = distillation_beta

    def kl(log_p, log_q):
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    kinds = {("gkd", 0.0): "forward_kl", ("gkd", 1.0): "reverse_kl", ("skew_reverse_kl", 1.0): "reverse_kl"}
    kind = kinds.get((distillation_type, beta), distillation_type)
    if kind == "reverse_kl":
        return kl(log_s, log_t)
    if kind == "forward_kl":
        return kl(log_t, log_s)
    if beta == 0.0:  # skew: KL(S||S)
        return 0.0 * log_s.sum(-1)
    log_m = torch.logaddexp(log_t + torch.tensor(beta).double().log(), log_s + torch.tensor(1.0 - beta).double().log())
    return kl(log_s, log_m) if kind == "skew_reverse_kl" else beta * kl(log_t, log_m) + (1 - beta) * kl(log_s, log_m)


def true_weights(mask: torch.Tensor, mode: str) -> torch.Tensor:
    """What each aggregation mode multiplies each token by."""
    lengths = mask.sum(-1, keepdim=True).double()
    sequences = (lengths > 0).sum()
    weights = {
        "token-mean": 1.0 / lengths.sum(),
        "token-sum": torch.ones(()),
        "seq-mean-token-sum": 1.0 / sequences,
        "seq-mean-token-sum-norm": 1.0 / (sequences * mask.shape[-1]),
        "seq-mean-token-mean": 1.0 / (lengths.clamp(min=1.0) * sequences),
    }
    return mask * weights[mode]


def truth(case: Case, student, teacher, mask) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, its gradient by the student, and the mask's share of the divergences."""
    student = student.detach().double().requires_grad_()
    divergence = true_divergence(student, teacher.double(), **case.settings)
    loss = (true_weights(mask, case.mode) * divergence).sum()
    return loss.detach(), torch.autograd.grad(loss, student)[0], divergence.detach()[mask]


def assert_close(case: Case, what: str, actual: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    error = (actual.double() - expected).abs().max().item()
    assert error <= bound, f"{what} off by {error:.3g}, bound {bound:.3g}: {case}, {case.settings}, {case.dtype}"


def check_logits(case: Case) -> None:
    student, teacher = case.logits()
    mask = case.mask()
    leaf = student.clone().requires_grad_()
    loss, _, kl, _ = compute_on_policy_distillation_loss(
        None, None, None, mask, case.mode, case.settings, student_logits=leaf, teacher_logits=teacher
    )
    gradient = torch.autograd.grad(loss, leaf)[0]
    expected, true_gradient, divergences = truth(case, student, teacher, mask)
    weights = true_weights(mask, case.mode)
    value_bound = VALUE * (weights[mask] * divergences.clamp(min=1.0)).sum().item()
    assert_close(case, "loss", loss, expected, value_bound)
    bound_of_a_value = VALUE * weights.max().item() * divergences.max().clamp(min=1.0).item()
    gradient_bound = (GRADIENT + ROUNDING[case.dtype]) * true_gradient.abs().max().item()
    gradient_bound += bound_of_a_value / case.settings["distillation_temperature"]
    assert_close(case, "gradient", gradient, true_gradient, gradient_bound)
    assert loss.item() >= -value_bound, f"negative: {loss.item()}, {case}, {case.settings}"
    if case.dtype in (torch.float32, torch.float64):
        sums = gradient.double().sum(-1).abs().max().item()
        assert sums <= gradient_bound * case.shape[-1] ** 0.5, f"gradient sums to {sums}: {case}, {case.settings}"
    assert torch.isfinite(kl)


def check_hidden(case: Case) -> None:
    """The fused head gives what its own logits give."""
    batch, tokens, vocab = case.shape
    n, widths = batch * tokens, (5, 8)
    hidden = [case.normal(n, width).requires_grad_() for width in widths]
    heads = [case.normal(vocab, width).requires_grad_() for width in widths]
    weights = true_weights(case.mask(), case.mode).flatten()
    names = {name.removeprefix("distillation_"): value for name, value in case.settings.items()}
    names["distillation_type"] = names.pop("type")
    out = linear_divergence(hidden[0], heads[0], hidden[1], heads[1], token_weights=weights, **names)
    gradients = torch.autograd.grad(out.loss, (hidden[0], heads[0]))
    wide = [side.detach().double().requires_grad_() for side in (hidden[0], heads[0])]
    teacher = hidden[1].detach().double() @ heads[1].detach().double().T
    divergence = true_divergence(wide[0] @ wide[1].T, teacher, **case.settings)
    loss = (weights * divergence).sum()
    sizes = weights * divergence.detach().clamp(min=1.0)
    assert_close(case, "fused loss", out.loss, loss.detach(), 5e-6 * sizes.sum().item())
    for actual, expected in zip(gradients, torch.autograd.grad(loss, wide), strict=True):
        bound = GRADIENT * expected.abs().max().item() + 5e-6 * sizes.sum().item()
        assert_close(case, "fused gradient", actual, expected, bound)


@pytest.mark.parametrize("first", range(0, CASES, BLOCK))
def test_random_cases_from_logits(first):
    for seed in range(first, first + BLOCK):
        check_logits(Case(seed))


@pytest.mark.parametrize("first", range(CASES, CASES + 600, BLOCK))
def test_random_cases_from_hidden_states(first):
    for seed in range(first, first + BLOCK):
        check_hidden(Case(seed))


@pytest.mark.parametrize("first", range(0, 300, BLOCK))
def test_no_divergence_where_both_agree(first):
    for seed in range(first, first + BLOCK):
        case = Case(seed)
        student, _ = case.logits()
        leaf = student.clone().requires_grad_()
        loss, *_ = compute_on_policy_distillation_loss(
            None, None, None, case.mask(), "token-mean", case.settings, student_logits=leaf, teacher_logits=student
        )
        assert abs(loss.item()) <= VALUE, f"{loss.item()}: {case}, {case.settings}"
        assert torch.autograd.grad(loss, leaf)[0].abs().max() <= VALUE / case.settings["distillation_temperature"]


def half_way(kind: str, mask: torch.Tensor, temperature: float, **sides: torch.Tensor) -> float:
    config = {
        "distillation_type": kind,
        "distillation_beta": BETAS.get(kind, 0.5),
        "distillation_temperature": temperature,
    }
    return compute_on_policy_distillation_loss(None, None, None, mask, "token-mean", config, **sides)[0].item()


@pytest.mark.parametrize("first", range(0, 300, BLOCK))
def test_swapping_both_sides(first):
    """The symmetric divergence does not notice; forward KL becomes reverse KL."""
    for seed in range(first, first + BLOCK):
        case = Case(seed)
        student, teacher = (side.float() for side in case.logits())
        mask, temperature = case.mask(), case.settings["distillation_temperature"]
        for kind, swapped in (("gkd", "gkd"), ("forward_kl", "reverse_kl")):
            one = half_way(kind, mask, temperature, student_logits=student, teacher_logits=teacher)
            other = half_way(swapped, mask, temperature, student_logits=teacher, teacher_logits=student)
            assert one == pytest.approx(other, rel=VALUE, abs=VALUE), f"{kind}: {case}"


def check_against_trl(case: Case, generalized_jsd_loss: Callable[..., torch.Tensor]) -> None:
    student, teacher = (side.float() for side in case.logits())
    mask, kind = case.mask(), case.settings["distillation_type"]
    leaves = [student.clone().requires_grad_() for _ in range(2)]
    theirs = generalized_jsd_loss(
        leaves[0],
        teacher,
        labels=torch.where(mask, 0, -100),
        beta=BETAS.get(kind, case.settings["distillation_beta"]),
        temperature=case.settings["distillation_temperature"],
        num_items_in_batch=mask.sum(),
    )
    ours, *_ = compute_on_policy_distillation_loss(
        None, None, None, mask, "token-mean", case.settings, student_logits=leaves[1], teacher_logits=teacher
    )
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-4, abs=1e-5), f"{case}, {case.settings}"
    expected, actual = (torch.autograd.grad(loss, leaf)[0] for loss, leaf in zip((theirs, ours), leaves, strict=True))
    bound = 1e-4 * expected.abs().max().item() + 1e-5  # TRL computes in float32 throughout
    assert_close(case, "gradient", actual, expected.double(), bound)


@pytest.mark.parametrize("first", range(0, CASES, BLOCK))
def test_against_trl(first):
    """TRL's reference function, where it is installed: a peer's own words for the same divergences."""
    trl = pytest.importorskip("trl.experimental.gkd.gkd_trainer", reason="TRL is not installed beside VERL")
    for seed in range(first, first + BLOCK):
        if (case := Case(seed)).settings["distillation_type"] != "skew_reverse_kl":
            check_against_trl(case, trl.GKDTrainer.generalized_jsd_loss)
