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
"""Chosen tokens, the clamp and the entropy switch in both losses, against plain loops over sequences in float64.

`truth` below is written from the definitions, one token at a time, with autograd for the gradients. It is compared with
the registered losses on whole logits, and with what the engine does: columns of the student's head, then the loss.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict

from verl.on_policy_distillation.buckets import top_k_tail
from verl.on_policy_distillation.config import DistillationLossConfig, DistillationPolicyLossConfig
from verl.on_policy_distillation.divergence import DenseLogits, TokenDivergence
from verl.on_policy_distillation.head import LinearLogits
from verl.on_policy_distillation.losses import actor_loss, contributions, head_columns
from verl.on_policy_distillation.mixture import mixture_of
from verl.on_policy_distillation.token_choice import EVERY_TOKEN, kept_tokens
from verl.on_policy_distillation.tokens import plan_tokens
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.trainer.ppo.on_policy_distillation import HYBRID, PURE
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPActorConfig

TOKENS, VOCAB, HIDDEN = 9, 13, 6
AGG_MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]
# Which response tokens of each sequence are supervised: zeros inside, as tool outputs have; one sequence has none.
MASK = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 0, 1, 1, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 1, 1, 1, 0, 0],
    ]
)
BATCH = len(MASK)
CLAMP, THRESHOLD = 2.5, 1.5  # of the logits below, some tokens are on either side

CHOICES = {
    "top_entropy": {"distillation_token_selection": "top_entropy", "distillation_keep_fraction": 0.5},
    "top_divergence": {"distillation_token_selection": "top_divergence", "distillation_keep_fraction": 0.3},
    "prefix": {"distillation_token_selection": "prefix", "distillation_keep_fraction": 0.4},
    "clamp": {"distillation_loss_max_clamp": CLAMP},
    "switch": {"distillation_entropy_threshold": THRESHOLD},
    "all three": {
        "distillation_token_selection": "top_entropy",
        "distillation_keep_fraction": 0.6,
        "distillation_loss_max_clamp": CLAMP,
        "distillation_entropy_threshold": THRESHOLD,
        "distillation_temperature": 0.8,
    },
    "with gkd": {
        "distillation_token_selection": "top_divergence",
        "distillation_keep_fraction": 0.5,
        "distillation_loss_max_clamp": 0.2,
        "distillation_type": "gkd",
        "distillation_beta": 0.3,
    },
}


# ----------------------------------------------------------------------------------------------------------------------
# truth, in float64


@dataclass
class Truth:
    """`loss` with its graph, and the shares of tokens that are kept and above the clamp."""

    loss: torch.Tensor
    kept: float
    clamped: float


def true_divergence(s: torch.Tensor, t: torch.Tensor, settings: dict) -> torch.Tensor:
    """Of one token, from its two distributions (V,)."""

    def kl(p, q):
        return (p * (p.log() - q.log())).sum()

    threshold = settings.get("distillation_entropy_threshold")
    if threshold is not None:
        return kl(t, s) if -(t * t.log()).sum() > threshold else kl(s, t)
    if settings.get("distillation_type") == "gkd":
        beta = settings["distillation_beta"]
        m = beta * t + (1 - beta) * s
        return beta * kl(t, m) + (1 - beta) * kl(s, m)
    return kl(s, t)


def ceiling(fraction: float, tokens: int) -> int:
    """Of the product as a person writes it: 0.07 * 100 is 7."""
    return math.ceil(Fraction(str(fraction)) * tokens)


def truth(student, teacher, settings: dict, mode: str, mask=MASK, batch_info=None) -> Truth:
    """`student`, `teacher`: logits (batch, tokens, V). `batch_info`: of the whole batch, where this is a part of it."""
    temperature = settings.get("distillation_temperature", 1.0)
    selection, clamp = settings.get("distillation_token_selection", "all"), settings.get("distillation_loss_max_clamp")
    rows, kept, clamped, total = [], 0, 0, int((mask != 0).sum())
    for i in range(len(mask)):
        tokens = [t for t in range(mask.shape[1]) if mask[i, t]]
        s, t = (torch.softmax(side[i].double() / temperature, -1) for side in (student, teacher))
        divergences = [true_divergence(s[place], t[place], settings) for place in tokens]
        factor, chosen = 1.0, set(range(len(tokens)))
        if selection != "all" and tokens:
            count = ceiling(settings["distillation_keep_fraction"], len(tokens))
            scores = {
                "top_entropy": [-(s[place] * s[place].log()).sum().item() for place in tokens],
                "top_divergence": [value.item() for value in divergences],
                "prefix": [0.0] * len(tokens),
            }[selection]
            chosen = set(sorted(range(len(tokens)), key=lambda j: (-scores[j], j))[:count])
            factor = len(tokens) / count
        kept += len(chosen)
        clamped += sum(clamp is not None and value.item() > clamp for value in divergences)
        row = []
        for j, value in enumerate(divergences):
            if clamp is not None and value.item() > clamp:
                value = torch.tensor(clamp, dtype=torch.float64)
            row.append(factor * value if j in chosen else 0.0 * value)
        rows.append(row)
    return Truth(true_aggregate(rows, mode, mask.shape[1], batch_info), kept / total, clamped / total)


def true_aggregate(rows: list[list[torch.Tensor]], mode: str, longest: int, batch_info=None) -> torch.Tensor:
    rows = [row for row in rows if row]
    info = batch_info or {"dp_size": 1, "batch_num_tokens": sum(map(len, rows)), "global_batch_size": len(rows)}
    sums = [sum(row) for row in rows]
    if mode == "token-mean":
        return sum(sums) * info["dp_size"] / info["batch_num_tokens"]
    if mode == "token-sum":
        return sum(sums) * info["dp_size"]
    if mode == "seq-mean-token-mean":
        sums = [total / len(row) for total, row in zip(sums, rows, strict=True)]
    loss = sum(sums) * info["dp_size"] / info["global_batch_size"]
    return loss / longest if mode == "seq-mean-token-sum-norm" else loss


# ----------------------------------------------------------------------------------------------------------------------
# the registered losses


def random_logits(seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = 0.5 + 2.5 * torch.rand(BATCH, TOKENS, 1, generator=generator)  # flat and sharp distributions
    return (scale * torch.randn(BATCH, TOKENS, VOCAB, generator=generator)).to(dtype)


def both_sides(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return random_logits(0, dtype).requires_grad_(), random_logits(1, dtype)


def rl_inputs(mask: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    values = [torch.randn(mask.shape, generator=generator) for _ in range(3)]
    names = ("old_log_prob", "log_prob", "advantages")
    return dict(zip(names, (values[0] - 2.0, values[0] + 0.3 * values[1] - 2.0, values[2]), strict=True))


def registered(name: str, student, teacher, settings: dict, mode: str = "token-mean", mask=MASK, batch_info=None):
    inputs = dict.fromkeys(("old_log_prob", "log_prob", "advantages")) if name == PURE else rl_inputs(mask)
    config = {"policy_loss": settings} | ({"global_batch_info": batch_info} if batch_info else {})
    return get_policy_loss_fn(name)(
        **inputs,
        response_mask=mask,
        loss_agg_mode=mode,
        config=config,
        student_logits=student,
        teacher_logits=teacher,
    )


@pytest.mark.parametrize("mode", AGG_MODES)
@pytest.mark.parametrize("choice", CHOICES)
def test_value_and_gradient_of_the_pure_loss(choice, mode):
    student, teacher = both_sides()
    expected = truth(student, teacher, CHOICES[choice], mode)
    output = registered(PURE, student, teacher, CHOICES[choice], mode)
    assert output[0].item() == pytest.approx(expected.loss.item(), rel=1e-12)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (output[0], expected.loss)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)
    plain = torch.autograd.grad(registered(PURE, student, teacher, {}, mode)[0], student)[0]
    assert not torch.allclose(gradients[0], plain, rtol=1e-3)  # or the settings do nothing here


@pytest.mark.parametrize("choice", CHOICES)
def test_the_hybrid_loss_adds_the_same_term(choice):
    student, teacher = both_sides()
    settings = CHOICES[choice] | {"hybrid_lambda_rl": 0.7, "hybrid_lambda_distill": 0.3}
    expected = truth(student, teacher, settings, "token-mean").loss
    rl = registered(HYBRID, student, teacher, settings | {"hybrid_lambda_distill": 0.0})[0]
    loss = registered(HYBRID, student, teacher, settings)[0]
    assert loss.item() == pytest.approx(rl.item() + 0.3 * expected.item(), rel=1e-6)
    gradients = [torch.autograd.grad(value, student)[0] for value in (loss, 0.3 * expected)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", [PURE, HYBRID])
def test_metrics_say_how_many_and_the_statistics_stay_those_of_all_tokens(name):
    student, teacher = both_sides()
    plain = registered(name, student, teacher, {"distillation_temperature": 0.8}).metrics
    metrics = registered(name, student, teacher, CHOICES["all three"]).metrics
    expected = truth(student, teacher, CHOICES["all three"], "token-mean")
    assert metrics["distillation/kept_tokens"] == pytest.approx(expected.kept)
    assert metrics["distillation/clamped_tokens"] == pytest.approx(expected.clamped)
    assert 0.0 < expected.clamped < expected.kept < 1.0
    for key in ("kl", "forward_kl", "student_entropy", "teacher_entropy", "top1_agreement"):
        assert metrics[f"distillation/{key}"] == plain[f"distillation/{key}"]
    assert metrics.keys() - plain.keys() == {"distillation/kept_tokens", "distillation/clamped_tokens"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_set_is_the_loss_without_a_choice_bit_for_bit(dtype):
    student, teacher = both_sides(dtype)
    tokens = TokenDivergence(*(torch.rand(5) for _ in TokenDivergence._fields))
    trained, metrics = contributions(tokens, torch.tensor([5]), DistillationLossConfig().token_choice)
    assert trained is tokens.divergence and not metrics
    whole = {"distillation_token_selection": "top_divergence", "distillation_keep_fraction": 1.0}
    results = [registered(PURE, student, teacher, settings)[0] for settings in ({}, whole)]
    gradients = [torch.autograd.grad(loss, student)[0] for loss in results]
    assert torch.equal(*results) and torch.equal(*gradients)


@pytest.mark.parametrize("selection", ["top_entropy", "top_divergence", "prefix"])
def test_no_response_token(selection):
    student, teacher = both_sides()
    settings = {"distillation_token_selection": selection, "distillation_keep_fraction": 0.5}
    output = registered(PURE, student, teacher, settings, mask=torch.zeros_like(MASK))
    assert output[0].item() == 0.0 and output.metrics["distillation/kept_tokens"] == 0.0
    assert not torch.autograd.grad(output[0], student)[0].any()


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("choice", CHOICES)
def test_micro_batches_add_up_to_the_batch(choice, mode):
    """With a rank among the tokens of a micro-batch they would not."""
    student, teacher = both_sides()
    info = {"dp_size": 1, "batch_num_tokens": int(MASK.sum()), "global_batch_size": BATCH}
    whole = registered(PURE, student, teacher, CHOICES[choice], mode, batch_info=info)[0]
    parts = [slice(0, 1), slice(1, 3), slice(3, 5)]
    losses = [
        registered(PURE, student[part], teacher[part], CHOICES[choice], mode, MASK[part], info)[0] for part in parts
    ]
    torch.testing.assert_close(sum(losses), whole, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (whole, sum(losses))]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-16)


# ----------------------------------------------------------------------------------------------------------------------
# which tokens, and the clamp


@pytest.mark.parametrize(
    ("fraction", "tokens", "kept"),
    [(0.5, 4, 2), (0.5, 5, 3), (0.07, 100, 7), (0.1, 10, 1), (0.2, 11, 3), (1e-6, 50, 1), (1.0, 7, 7), (0.99, 3, 3)],
)
def test_the_fraction_is_rounded_up(fraction, tokens, kept):
    score = torch.rand(tokens, generator=torch.Generator().manual_seed(0))
    factor = kept_tokens(score, torch.tensor([tokens]), fraction)
    assert sorted((factor > 0).nonzero().flatten().tolist()) == sorted(score.topk(kept).indices.tolist())
    assert factor[factor > 0].tolist() == pytest.approx([tokens / kept] * kept)


def test_of_equal_scores_the_earlier_token_is_kept():
    score = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0, 3.0, 3.0])
    assert (kept_tokens(score, torch.tensor([5, 0, 2]), 0.4) > 0).tolist() == [0, 1, 1, 0, 0, 1, 0]


def test_each_sequence_keeps_its_weight():
    """A divergence that is the same at all tokens of a sequence has the mean that it has without a choice."""
    counts = torch.tensor([7, 1, 0, 12, 3])
    factor = kept_tokens(torch.rand(23), counts, 0.35)
    assert [part.sum().item() for part in factor.split(counts.tolist())] == pytest.approx(counts.tolist())


def test_the_clamp_bounds_the_token_and_not_an_entry():
    """Terms of +3.3 and -2.0 nats make a divergence of 1.3, which a clamp of 2 leaves alone; one of 1 does not."""
    student = torch.tensor([[[math.log(0.7), math.log(0.3)]]], dtype=torch.float64).requires_grad_()
    teacher = torch.tensor([[[math.log(0.05), math.log(0.95)]]], dtype=torch.float64)
    terms = [0.7 * math.log(0.7 / 0.05), 0.3 * math.log(0.3 / 0.95)]
    one = torch.ones(1, 1)
    for clamp, value in ((1.6, sum(terms)), (1.0, 1.0)):
        assert terms[0] > 1.6 > sum(terms) > 1.0
        loss = registered(PURE, student, teacher, {"distillation_loss_max_clamp": clamp}, mask=one)[0]
        assert loss.item() == pytest.approx(value, rel=1e-12)
        assert torch.autograd.grad(loss, student)[0].any() == (value > 1.0)


# ----------------------------------------------------------------------------------------------------------------------
# the engine: columns of the head, then the loss


def nested(values: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    return torch.nested.as_nested_tensor([row[:n] for row, n in zip(values, lengths, strict=True)], layout=torch.jagged)


def engine_batch(mask=MASK) -> TensorDict:
    """One prompt token a sequence, and its responses as long as the last supervised token, at the least one."""
    lengths = [max([1, *(t + 1 for t in range(TOKENS) if row[t])]) for row in mask]
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(VOCAB, (len(mask), TOKENS + 1), generator=generator)
    rl = rl_inputs(mask)
    fields = {
        "input_ids": nested(ids, [n + 1 for n in lengths]),
        "prompts": nested(ids, [1] * len(mask)),
        "responses": nested(ids[:, 1:], lengths),
        "response_mask": nested(mask, lengths),
        "loss_mask": nested(mask, lengths),
        "old_log_probs": nested(rl["old_log_prob"], lengths),
        "advantages": nested(rl["advantages"], lengths),
    }
    data = TensorDict(fields, batch_size=len(mask))
    tu.assign_non_tensor(
        data,
        use_remove_padding=True,
        temperature=1.0,
        dp_size=1,
        batch_num_tokens=int(mask.sum()),
        global_batch_size=len(mask),
    )
    return data


def engine_config(name: str, settings: dict, mode: str) -> FSDPActorConfig:
    policy_loss = DistillationPolicyLossConfig(loss_mode=name, **settings)
    required = {"strategy": "fsdp2", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 1}
    return FSDPActorConfig(**required, policy_loss=policy_loss, loss_agg_mode=mode, loss_scale_factor=TOKENS)


class Heads:
    """A student's head over the supervised tokens of `MASK`, and a teacher's; leaves in `dtype`."""

    def __init__(self, dtype: torch.dtype = torch.float64, mask=MASK):
        generator = torch.Generator().manual_seed(7)
        self.mask = mask != 0
        tokens = int(self.mask.sum())
        sizes = ((tokens, HIDDEN), (VOCAB, HIDDEN), (tokens, HIDDEN), (VOCAB, HIDDEN))
        tensors = [torch.randn(*size, generator=generator).to(dtype) for size in sizes]
        self.hidden, self.weight = (leaf.requires_grad_() for leaf in tensors[:2])
        self.student, self.teacher = LinearLogits(self.hidden, self.weight), LinearLogits(*tensors[2:])

    def grid(self, logits: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, V) of the supervised tokens' logits."""
        values = logits.new_zeros((*self.mask.shape, VOCAB))
        return values.index_put(self.mask.nonzero(as_tuple=True), logits)

    def truth(self, settings: dict, mode: str, teacher: torch.Tensor | None = None, info=None) -> Truth:
        teacher = self.teacher.hidden @ self.teacher.weight.T if teacher is None else teacher
        return truth(self.grid(self.hidden @ self.weight.T), self.grid(teacher), settings, mode, self.mask, info)

    def gradients(self, loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss, (self.hidden, self.weight))


def in_engine(heads: Heads, name: str, settings: dict, mode: str = "token-mean", teacher=None):
    """Loss, metrics and columns as the engine makes them of one micro-batch."""
    config, data = engine_config(name, settings, mode), engine_batch(heads.mask.long())
    plan = plan_tokens(data)
    columns = head_columns(config, data, plan)(heads.student, heads.teacher if teacher is None else teacher)
    spread = {key: plan.spread(column) for key, column in columns.items()}
    loss, metrics = actor_loss(config)(spread, data)
    return loss, metrics, columns


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("choice", CHOICES)
def test_the_engine_s_pure_loss(choice, mode):
    heads, info = Heads(), {"dp_size": 1, "batch_num_tokens": int(MASK.sum()), "global_batch_size": BATCH}
    expected = heads.truth(CHOICES[choice], mode, info=info)
    loss, metrics, _ = in_engine(heads, PURE, CHOICES[choice], mode)
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)  # weights of tokens are float32
    for found, wanted in zip(heads.gradients(loss), heads.gradients(expected.loss), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    if "distillation_keep_fraction" in CHOICES[choice]:
        assert metrics["distillation/kept_tokens"].values[0] == pytest.approx(expected.kept)
    if "distillation_loss_max_clamp" in CHOICES[choice]:
        assert metrics["distillation/clamped_tokens"].values[0] == pytest.approx(expected.clamped)
        assert 0.0 < expected.clamped < 1.0


@pytest.mark.parametrize("choice", CHOICES)
def test_the_engine_s_hybrid_loss(choice):
    heads = Heads()
    settings = CHOICES[choice] | {"hybrid_lambda_rl": 0.0, "hybrid_lambda_distill": 0.3}
    expected = heads.truth(settings, "token-mean")
    loss, metrics, _ = in_engine(heads, HYBRID, settings)
    assert loss.item() == pytest.approx(0.3 * expected.loss.item(), rel=1e-6)
    for found, wanted in zip(heads.gradients(loss), heads.gradients(0.3 * expected.loss), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    pure = in_engine(heads, PURE, CHOICES[choice])[1]
    for key, metric in pure.items():
        assert metrics[key].values[0] == pytest.approx(metric.values[0], rel=1e-9), key


@pytest.mark.parametrize("name", [PURE, HYBRID])
def test_nothing_set_leaves_the_engine_s_columns_as_they_were(name):
    _, metrics, columns = in_engine(Heads(), name, {})
    policy = {"log_probs"} if name == HYBRID else set()
    assert columns.keys() == {*TokenDivergence._fields, *policy}
    assert columns["divergence"].requires_grad
    assert not {"distillation/kept_tokens", "distillation/clamped_tokens"} & metrics.keys()


class CountingLogits(DenseLogits):
    """Notes of how many tokens each of its views is read."""

    read: list[int] = []

    def in_units(self, index, out=None):
        self.read.append(len(self.values[index]))
        return super().in_units(index, out)

    def tokens(self, tokens):
        return CountingLogits(self.values[tokens])

    def cut(self, vocab):
        return CountingLogits(self.values[:, :vocab])


def test_gradients_are_made_of_the_learning_tokens_alone():
    heads, CountingLogits.read = Heads(), []
    teacher = CountingLogits(heads.teacher.rows(slice(None)))
    settings = CHOICES["all three"]
    contribution = in_engine(heads, PURE, settings, teacher=teacher)[2]["contribution"]
    expected = heads.truth(settings, "token-mean")
    learning = int(heads.gradients(expected.loss)[0].any(-1).sum())
    assert 0 < learning < round(expected.kept * int(MASK.sum())) < int(MASK.sum())
    assert CountingLogits.read == [int(MASK.sum()), learning]
    assert int((contribution > 0.0).sum()) == round(expected.kept * int(MASK.sum()))


def test_no_token_learns():
    """All are above the clamp: the loss is the clamp, and every parameter has a gradient, of zero."""
    heads = Heads()
    loss, metrics, _ = in_engine(heads, PURE, {"distillation_loss_max_clamp": 1e-6})
    assert loss.item() == pytest.approx(1e-6) and metrics["distillation/clamped_tokens"].values[0] == 1.0
    assert not any(gradient.any() for gradient in heads.gradients(loss))


@pytest.mark.parametrize("name", [PURE, HYBRID])
def test_a_micro_batch_without_tokens(name):
    heads = Heads(mask=torch.zeros(2, TOKENS, dtype=torch.int64))
    settings = CHOICES["all three"] | {"hybrid_lambda_rl": 0.0}
    loss, metrics, _ = in_engine(heads, name, settings)
    assert loss.item() == 0.0 and metrics["distillation/kept_tokens"].values[0] == 0.0
    assert not any(gradient.any() for gradient in heads.gradients(loss))


@pytest.mark.parametrize("kind", ["dense", "mixture", "topk"])
def test_teachers_of_every_kind(kind):
    """The second pass reads a part of their tokens."""
    heads = Heads()
    logits = [
        torch.randn(len(heads.hidden), VOCAB, generator=torch.Generator().manual_seed(k)).double() for k in (8, 9)
    ]
    if kind == "mixture":
        source = mixture_of([DenseLogits(side) for side in logits], [0.3, 0.7], 1.0, torch.device("cpu"))
        target = (0.3 * logits[0].softmax(-1) + 0.7 * logits[1].softmax(-1)).log()
    else:
        source, target = DenseLogits(logits[0]), logits[0]
        source = top_k_tail(source, VOCAB, 1.0) if kind == "topk" else source  # all entries, and an empty rest
    settings = CHOICES["top_divergence"] | CHOICES["clamp"]
    expected = heads.truth(settings, "token-mean", target)
    loss, _, _ = in_engine(heads, PURE, settings, teacher=source)
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    for found, wanted in zip(heads.gradients(loss), heads.gradients(expected.loss), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_the_second_pass_keeps_its_promise_in_bfloat16_at_the_clamp():
    """Rounding may put a token on either side of the clamp in the two passes; the backward must not mind."""
    heads = Heads(torch.bfloat16)
    divergences = in_engine(heads, PURE, {})[2]["divergence"].detach()
    for clamp in divergences[divergences > 0.1].tolist()[::4]:  # exactly the divergence of a token
        loss = in_engine(heads, PURE, {"distillation_loss_max_clamp": clamp})[0]
        assert all(gradient.isfinite().all() for gradient in heads.gradients(loss))


# ----------------------------------------------------------------------------------------------------------------------
# configuration


@pytest.mark.parametrize(
    "form", [dict, OmegaConf.create, lambda settings: {"policy_loss": {"loss_mode": PURE} | settings}]
)
def test_the_keys_are_read_in_every_form(form):
    settings = DistillationLossConfig.from_config(form(CHOICES["all three"]))
    assert settings.token_choice == ("top_entropy", 0.6, CLAMP)
    assert settings.divergence.entropy_threshold == THRESHOLD and settings.divergence.temperature == 0.8
    assert DistillationLossConfig.from_config(form({})).token_choice == EVERY_TOKEN


def test_reverse_kl_may_be_named_with_a_threshold():
    both = DistillationLossConfig(distillation_type="reverse_kl", distillation_entropy_threshold=0.5)
    assert both.divergence == DistillationLossConfig(distillation_entropy_threshold=0.5).divergence
