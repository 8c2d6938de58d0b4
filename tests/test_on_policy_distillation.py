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
"""The two policy losses of verl/trainer/ppo/on_policy_distillation.py, through their public functions.

The divergences themselves are tested in test_divergence.py; here the truth is torch.distributions in float64, and for
the RL term VERL's own losses. Run with pytest, or in a patched checkout of VERL that has only what VERL needs:
`python PATH/tests/test_on_policy_distillation.py`, which without pytest runs a part, in less than a minute.
"""

import math
import os
import sys
from types import SimpleNamespace

if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())  # the checkout, as with `python -m`

try:
    import pytest
except ImportError:
    import without_pytest as pytest

import torch
from omegaconf import OmegaConf
from torch.distributions import Categorical, kl_divergence
from transformers import LlamaConfig, LlamaForCausalLM

from verl.on_policy_distillation.config import RL_TERM, DistillationPolicyLossConfig, _warn_of_default_beta
from verl.on_policy_distillation.divergence import DenseLogits, DivergenceSpec, token_divergence
from verl.on_policy_distillation.head import LinearLogits
from verl.on_policy_distillation.losses import aggregate, distillation_metrics, token_weights
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, get_policy_loss_fn
from verl.trainer.ppo.on_policy_distillation import (
    HYBRID,
    PURE,
    DistillationLossConfig,
    compute_hybrid_rl_distillation_loss,
    compute_on_policy_distillation_loss,
    is_distillation_loss,
)
from verl.workers.config import ActorConfig, FSDPActorConfig, PolicyLossConfig

BATCH, TOKENS, VOCAB = 5, 7, 13
LENGTHS = [7, 4, 1, 0, 5]  # response tokens per sequence; one sequence has none
LOSSES = [compute_on_policy_distillation_loss, compute_hybrid_rl_distillation_loss]
AGG_MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]
RL_MODES = [name for name in POLICY_LOSS_REGISTRY if name not in (PURE, HYBRID, RL_TERM)]
DISTILLATION_METRICS = {
    "distillation/loss",
    "distillation/kl",
    "distillation/forward_kl",
    "distillation/student_entropy",
    "distillation/teacher_entropy",
    "distillation/top1_agreement",
}


# ----------------------------------------------------------------------------------------------------------------------
# inputs


def normal(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def response_mask(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.arange(TOKENS) < torch.tensor(LENGTHS).unsqueeze(1)).to(dtype)


def logits(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    student, teacher = (normal(BATCH, TOKENS, VOCAB, seed=seed, scale=2.0).to(dtype) for seed in (0, 1))
    return {"student_logits": student.requires_grad_(), "teacher_logits": teacher}


def both_sides() -> tuple[torch.Tensor, torch.Tensor]:
    """The same student and teacher, as plain numbers."""
    return tuple(side.detach() for side in logits().values())


def rl_inputs() -> dict[str, torch.Tensor]:
    """Ratios on both sides of the clip range, advantages of both signs, log_prob a leaf."""
    log_prob = -normal(BATCH, TOKENS, seed=2).abs() - 0.5
    return {
        "old_log_prob": log_prob + normal(BATCH, TOKENS, seed=3, scale=0.3),
        "log_prob": log_prob.requires_grad_(),
        "advantages": normal(BATCH, TOKENS, seed=4),
    }


def no_rl_inputs() -> dict[str, None]:
    return dict.fromkeys(("old_log_prob", "log_prob", "advantages"))


def pure(config=None, mask=None, **options):
    inputs = no_rl_inputs() | {"response_mask": response_mask() if mask is None else mask} | logits() | options
    return compute_on_policy_distillation_loss(config=config, **inputs)


def hybrid(config=None, mask=None, **options):
    inputs = rl_inputs() | {"response_mask": response_mask() if mask is None else mask} | logits() | options
    return compute_hybrid_rl_distillation_loss(config=config, **inputs)


def rl_loss(mode: str = "vanilla", config: ActorConfig | None = None, **options):
    inputs = rl_inputs() | {"response_mask": response_mask()} | options
    return get_policy_loss_fn(mode)(config=config or actor_config(), **inputs)


def actor_config(policy_loss: PolicyLossConfig | None = None, **settings) -> ActorConfig:
    required = {"strategy": "fsdp", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 1}
    return ActorConfig(**required | {"policy_loss": policy_loss or PolicyLossConfig()} | settings)


def gradient(loss: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, leaf, retain_graph=True)[0]


# ----------------------------------------------------------------------------------------------------------------------
# truth, in float64


def distributions(student, teacher, temperature: float = 1.0, beta: float = 0.0) -> tuple[Categorical, ...]:
    """S, T and M of every position."""
    s, t = (torch.softmax(side.double() / temperature, -1) for side in (student, teacher))
    return Categorical(probs=s), Categorical(probs=t), Categorical(probs=beta * t + (1 - beta) * s)


def true_divergence(student, teacher, kind="reverse_kl", beta=1.0, temperature=1.0) -> torch.Tensor:
    s, t, m = distributions(student, teacher, temperature, beta)
    if kind == "forward_kl" or (kind == "gkd" and beta == 0.0):
        return kl_divergence(t, s)
    if kind == "reverse_kl" or beta == 1.0:
        return kl_divergence(s, t)
    if kind == "skew_reverse_kl":
        return kl_divergence(s, m)
    return beta * kl_divergence(t, m) + (1 - beta) * kl_divergence(s, m)


def near(expected):
    """The bound on values: 1e-6, relative or absolute, whichever is looser."""
    return pytest.approx(expected, rel=1e-6, abs=1e-6)


def response_mean(values: torch.Tensor) -> torch.Tensor:
    return values[response_mask(torch.bool)].mean()


def true_aggregate(values, mode, dp_size=1, batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None):
    """VERL's aggregation modes from their definitions: `values` has a list of the response tokens of each sequence."""
    rows = [row for row in values if row]
    sequences = global_batch_size or len(rows)
    if mode == "token-mean":
        return dp_size * sum(map(sum, rows)) / (batch_num_tokens or sum(map(len, rows)))
    if mode == "token-sum":
        return dp_size * sum(map(sum, rows))
    if mode == "seq-mean-token-mean":
        return dp_size * sum(sum(row) / len(row) for row in rows) / sequences
    norm = (loss_scale_factor or TOKENS) if mode == "seq-mean-token-sum-norm" else 1
    return dp_size * sum(map(sum, rows)) / sequences / norm


def by_sequence(values: torch.Tensor) -> list[list[float]]:
    return [row[:length].tolist() for row, length in zip(values, LENGTHS, strict=True)]


# ----------------------------------------------------------------------------------------------------------------------
# registry and the users' documents


def test_registry_names():
    assert (PURE, HYBRID) == ("on_policy_distillation", "hybrid_rl_distillation")
    assert get_policy_loss_fn("on_policy_distillation") is compute_on_policy_distillation_loss
    assert get_policy_loss_fn("hybrid_rl_distillation") is compute_hybrid_rl_distillation_loss


@pytest.mark.parametrize(
    ("name", "expected"), [(PURE, True), (HYBRID, True), ("vanilla", False), ("", False), ("gspo", False)]
)
def test_is_distillation_loss(name, expected):
    assert is_distillation_loss(name) is expected


def llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        initializer_range=0.3,  # far enough apart to have something to distill
    )
    return LlamaForCausalLM(config).eval()


# Word for word the example of the user's guide ("Example: Training with On-Policy Distillation").
DOCUMENTED_TRAINING = """
import torch
from verl.trainer.ppo.on_policy_distillation import compute_on_policy_distillation_loss

# Student generates sequences
student_sequences = student_model.generate(prompts)
student_logits = student_model(student_sequences)

# Teacher evaluates student's sequences
teacher_logits = teacher_model(student_sequences)

# Compute distillation loss
loss, _, kl, _ = compute_on_policy_distillation_loss(
    old_log_prob=None,  # Not used
    log_prob=None,      # Not used
    advantages=None,    # Not used
    response_mask=mask,
    loss_agg_mode="token-mean",
    config={
        "distillation_type": "reverse_kl",
        "distillation_temperature": 1.0,
    },
    teacher_logits=teacher_logits,
    student_logits=student_logits,
)

# Backward and update
loss.backward()
optimizer.step()
"""


def test_documented_training_runs_as_written():
    student_model, teacher_model = llama(0), llama(1)
    student_model.generation_config.max_new_tokens = 6
    optimizer = torch.optim.SGD(student_model.parameters(), lr=0.5)
    prompts = torch.randint(3, 32, (3, 4), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 10, dtype=torch.int64)
    mask[:, :3] = 0  # the logits at position t predict token t + 1
    mask[:, 9] = 0
    names = {"student_model": student_model, "teacher_model": teacher_model, "prompts": prompts, "mask": mask}
    exec(DOCUMENTED_TRAINING, names | {"optimizer": optimizer} | (result := {}), result)

    sequences = result["student_sequences"]
    assert sequences.shape == (3, 10)
    expected = true_divergence(result["student_logits"].logits, result["teacher_logits"].logits)[mask.bool()].mean()
    assert expected > 0.1
    assert result["loss"].item() == near(expected.item())
    assert result["kl"].item() == near(expected.item())
    assert all(parameter.grad is None for parameter in teacher_model.parameters())
    # the step did what it is for
    after = true_divergence(student_model(sequences).logits, result["teacher_logits"].logits)[mask.bool()].mean()
    assert after < expected


# The option dictionaries of the user's guide and the quick reference; `policy_loss` is the name of the loss.
DOCUMENTED_OPTIONS = {
    "pure": {
        "policy_loss": "on_policy_distillation",
        "distillation_type": "reverse_kl",
        "distillation_temperature": 1.0,
    },
    "hybrid": {
        "policy_loss": "hybrid_rl_distillation",
        "distillation_type": "reverse_kl",
        "hybrid_lambda_rl": 0.5,
        "hybrid_lambda_distill": 0.5,
    },
    "all keys": {
        "policy_loss": "hybrid_rl_distillation",
        "distillation_type": "reverse_kl",
        "distillation_beta": 1.0,
        "distillation_temperature": 1.0,
        "hybrid_lambda_rl": 1.0,
        "hybrid_lambda_distill": 1.0,
    },
}


@pytest.mark.parametrize("option", DOCUMENTED_OPTIONS)
def test_documented_options(option):
    config = DOCUMENTED_OPTIONS[option]
    policy_loss_fn = get_policy_loss_fn(config["policy_loss"])
    inputs = no_rl_inputs() if option == "pure" else rl_inputs()
    mask = response_mask()
    # "loss, _, kl, _ = policy_loss_fn(..., teacher_logits=teacher_logits, student_logits=student_logits)"
    loss, _, kl, _ = policy_loss_fn(*inputs.values(), mask, "token-mean", config, **logits())
    expected = response_mean(true_divergence(*both_sides()))
    assert kl.item() == near(expected.item())
    if option == "pure":
        assert loss.item() == near(expected.item())
    else:
        weight = config["hybrid_lambda_rl"]
        assert loss.item() == near(weight * (rl_loss()[0].item() + expected.item()))


# ----------------------------------------------------------------------------------------------------------------------
# values


DIVERGENCES = [
    ("reverse_kl", 0.3),
    ("forward_kl", 0.3),
    ("gkd", 0.0),
    ("gkd", 0.3),
    ("gkd", 1.0),
    ("skew_reverse_kl", 0.3),
    ("skew_reverse_kl", 1.0),
]


def settings_of(kind: str, beta: float, temperature: float = 1.0) -> dict:
    mixes = kind in ("gkd", "skew_reverse_kl")  # to the others a beta is a contradiction
    beta_of_mixture = {"distillation_beta": beta} if mixes else {}
    return {"distillation_type": kind, "distillation_temperature": temperature} | beta_of_mixture


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("kind", "beta"), DIVERGENCES)
def test_loss_kl_and_gradient_against_float64(kind, beta, temperature, dtype):
    inputs = logits(dtype)
    student, teacher = inputs["student_logits"], inputs["teacher_logits"]
    loss, _, kl, _ = pure(settings_of(kind, beta, temperature), **inputs)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)

    truth = student.detach().double().requires_grad_()
    expected = response_mean(true_divergence(truth, teacher, kind, beta, temperature))
    assert loss.item() == near(expected.item())
    # KL(S||T) at the same temperature, whatever the type
    expected_kl = response_mean(true_divergence(student.detach(), teacher, temperature=temperature))
    assert kl.item() == near(expected_kl.item())
    (expected_gradient,) = torch.autograd.grad(expected, truth)
    # one ulp of half precision, and the spacing of float16's numbers around zero
    relative, absolute = {torch.bfloat16: (2**-7, 0.0), torch.float16: (2**-10, 2**-24)}.get(dtype, (1e-5, 0.0))
    bound = relative * expected_gradient.abs() + 1e-5 * expected_gradient.abs().max() + absolute
    assert ((gradient(loss, student) - expected_gradient).abs() <= bound).all()


@pytest.mark.parametrize("loss_fn", [pure, hybrid])
@pytest.mark.parametrize(("kind", "beta"), DIVERGENCES)
def test_metrics_against_float64(kind, beta, loss_fn):
    metrics = loss_fn(settings_of(kind, beta, 1.5)).metrics
    student, teacher = both_sides()
    s, t, _ = distributions(student, teacher, 1.5)
    expected = {
        "distillation/loss": true_divergence(student, teacher, kind, beta, 1.5),
        "distillation/kl": kl_divergence(s, t),
        "distillation/forward_kl": kl_divergence(t, s),
        "distillation/student_entropy": s.entropy(),
        "distillation/teacher_entropy": t.entropy(),
        "distillation/top1_agreement": (s.probs.argmax(-1) == t.probs.argmax(-1)).double(),
    }
    assert set(expected) == DISTILLATION_METRICS <= set(metrics)
    for name, values in expected.items():
        assert metrics[name] == near(response_mean(values).item()), name


@pytest.mark.parametrize("loss_fn", [pure, hybrid])
def test_metrics_are_floats(loss_fn):
    metrics = loss_fn().metrics
    assert {key: type(value) for key, value in metrics.items()} == dict.fromkeys(metrics, float)


def test_pure_metrics_are_the_distillation_metrics():
    assert set(pure().metrics) == DISTILLATION_METRICS


@pytest.mark.parametrize("loss_fn", [pure, hybrid])
def test_outputs_are_four_scalars_and_only_the_loss_requires_a_gradient(loss_fn):
    result = loss_fn()
    assert isinstance(result, tuple) and len(result) == 4
    assert all(isinstance(value, torch.Tensor) and value.shape == () for value in result)
    assert [value.requires_grad for value in result] == [True, False, False, False]


def test_clip_fractions_of_the_pure_loss_are_zero():
    _, pg_clipfrac, _, pg_clipfrac_lower = pure(**rl_inputs())
    assert pg_clipfrac.item() == 0.0 and pg_clipfrac_lower.item() == 0.0


def test_pure_loss_ignores_the_rl_inputs():
    inputs = {name: torch.full_like(value, math.nan) for name, value in rl_inputs().items()}
    weights = torch.full((BATCH, TOKENS), math.nan)
    assert torch.equal(pure(**inputs, rollout_is_weights=weights)[0], pure()[0])


@pytest.mark.parametrize("loss_fn", [pure, hybrid])
def test_teacher_gets_no_gradient(loss_fn):
    inputs = logits()
    inputs["teacher_logits"].requires_grad_()
    loss_fn({"distillation_type": "gkd", "distillation_beta": 0.5}, **inputs)[0].backward()
    assert inputs["teacher_logits"].grad is None and inputs["student_logits"].grad.any()


@pytest.mark.parametrize("loss_fn", [pure, hybrid])
def test_objects_with_logits_are_logits(loss_fn):
    inputs = logits()
    expected = loss_fn(**inputs)[0]
    outputs = {name: SimpleNamespace(logits=value) for name, value in inputs.items()}
    assert torch.equal(loss_fn(**outputs)[0], expected)


@pytest.mark.parametrize("loss_fn", [pure, hybrid])
def test_memory_layout_does_not_matter(loss_fn):
    contiguous = {name: side.detach() for name, side in logits().items()}
    strided = {name: side.transpose(0, 1).contiguous().transpose(0, 1) for name, side in contiguous.items()}
    assert not any(side.is_contiguous() for side in strided.values())
    assert torch.equal(loss_fn(**strided)[0], loss_fn(**contiguous)[0])


def test_student_without_gradient():
    """Validation: the loss under no_grad is the same number and carries no graph."""
    expected = pure()[0]
    with torch.no_grad():
        loss = pure()[0]
    assert torch.equal(loss, expected) and not loss.requires_grad


# ----------------------------------------------------------------------------------------------------------------------
# masks


@pytest.mark.parametrize("loss_fn", [pure, hybrid])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.float32, torch.bfloat16])
def test_mask_dtypes(loss_fn, dtype):
    inputs, reference_inputs = logits(), logits()
    loss, reference = loss_fn(mask=response_mask(dtype), **inputs)[0], loss_fn(**reference_inputs)[0]
    torch.testing.assert_close(loss, reference, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        gradient(loss, inputs["student_logits"]), gradient(reference, reference_inputs["student_logits"])
    )


@pytest.mark.parametrize("loss_fn", [pure, hybrid])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["student_logits", "teacher_logits"])
def test_masked_logits_inject_nothing(loss_fn, side, bad):
    clean, dirty = logits(), logits()
    with torch.no_grad():
        dirty[side][~response_mask(torch.bool)] = bad
    expected, actual = loss_fn(**clean), loss_fn(**dirty)
    assert torch.equal(actual[0], expected[0]) and actual.metrics == expected.metrics
    clean_gradient = gradient(expected[0], clean["student_logits"])
    dirty_gradient = gradient(actual[0], dirty["student_logits"])
    assert torch.equal(dirty_gradient, clean_gradient)
    assert not dirty_gradient[~response_mask(torch.bool)].any()


@pytest.mark.parametrize("bad", [0.0, math.nan])
@pytest.mark.parametrize("mode", AGG_MODES)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("loss_fn", [pure, hybrid])
def test_all_masked_batch_costs_nothing(loss_fn, dtype, mode, bad):
    inputs, rl = logits(), rl_inputs()
    with torch.no_grad():
        inputs["student_logits"].fill_(bad)
    result = loss_fn(None, torch.zeros(BATCH, TOKENS, dtype=dtype), loss_agg_mode=mode, **inputs, **rl)
    assert [value.item() for value in result] == [0.0] * 4
    assert DISTILLATION_METRICS <= set(result.metrics) and not any(result.metrics.values())
    result[0].backward()
    assert torch.equal(inputs["student_logits"].grad, torch.zeros(BATCH, TOKENS, VOCAB))
    assert rl["log_prob"].grad is None or not rl["log_prob"].grad.any()


def test_batch_of_no_sequences():
    empty = torch.zeros(0, TOKENS, VOCAB).requires_grad_()
    result = pure(mask=torch.zeros(0, TOKENS), student_logits=empty, teacher_logits=empty.detach())
    assert [value.item() for value in result] == [0.0] * 4
    result[0].backward()
    assert empty.grad.shape == empty.shape


# ----------------------------------------------------------------------------------------------------------------------
# aggregation


GLOBAL_BATCH = {"dp_size": 2, "batch_num_tokens": 40, "global_batch_size": 12, "loss_scale_factor": 9}


@pytest.mark.parametrize("info", [{}, GLOBAL_BATCH, {"loss_scale_factor": 9}], ids=["alone", "global", "scaled"])
@pytest.mark.parametrize("mode", AGG_MODES)
def test_aggregation(mode, info):
    student, teacher = both_sides()
    expected = true_aggregate(by_sequence(true_divergence(student, teacher)), mode, **info)
    result = pure({"global_batch_info": info}, loss_agg_mode=mode)
    assert result[0].item() == near(expected)
    assert result.metrics["distillation/loss"] == near(expected)
    # the reported KL is a mean over tokens, however the loss is aggregated
    assert result[2].item() == near(response_mean(true_divergence(student, teacher)).item())


def config_with_global_batch(form: str, info: dict):
    if form == "dict":
        return {"global_batch_info": info}
    if form == "DictConfig":
        return OmegaConf.create({"global_batch_info": info})
    return actor_config(global_batch_info=info)


@pytest.mark.parametrize("form", ["dict", "DictConfig", "ActorConfig"])
@pytest.mark.parametrize("loss_fn", [pure, hybrid])
def test_global_batch_info_of_every_kind_of_config(loss_fn, form):
    expected = loss_fn({"global_batch_info": GLOBAL_BATCH})[0]
    assert expected.item() != loss_fn()[0].item()
    assert torch.equal(loss_fn(config_with_global_batch(form, GLOBAL_BATCH))[0], expected)


def rows_of(inputs: dict, rows: slice) -> dict:
    return {name: value[rows] for name, value in inputs.items()}


@pytest.mark.parametrize("mode", AGG_MODES)
@pytest.mark.parametrize("loss_fn", [pure, hybrid])
def test_micro_batches_add_up(loss_fn, mode):
    """With the counts of the whole batch, the sum over micro-batches is the batch: loss and gradient."""
    info = {"dp_size": 1, "batch_num_tokens": sum(LENGTHS), "global_batch_size": 4, "loss_scale_factor": TOKENS}
    config = {"global_batch_info": info}
    inputs, rl = logits(), rl_inputs()
    whole = loss_fn(config, loss_agg_mode=mode, **inputs, **rl)[0]
    parts = sum(
        loss_fn(config, response_mask()[rows], loss_agg_mode=mode, **rows_of(inputs | rl, rows))[0]
        for rows in (slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 5))  # the sequence of row 3 has no tokens
    )
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-7)
    for leaf in (inputs["student_logits"], *([rl["log_prob"]] if loss_fn is hybrid else [])):
        torch.testing.assert_close(gradient(parts, leaf), gradient(whole, leaf), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("mode", AGG_MODES)
@pytest.mark.parametrize("loss_fn", [pure, hybrid])
def test_data_parallel_ranks_average_to_the_batch(loss_fn, mode):
    """FSDP averages gradients over ranks: two halves with dp_size=2 average to the batch on one rank."""
    counts = {"batch_num_tokens": sum(LENGTHS), "global_batch_size": 4, "loss_scale_factor": TOKENS}
    inputs, rl = logits(), rl_inputs()
    whole = loss_fn({"global_batch_info": {"dp_size": 1} | counts}, loss_agg_mode=mode, **inputs, **rl)[0]
    config = {"global_batch_info": {"dp_size": 2} | counts}
    ranks = [
        loss_fn(config, response_mask()[rows], loss_agg_mode=mode, **rows_of(inputs | rl, rows))[0]
        for rows in (slice(0, 3), slice(3, 5))
    ]
    average = sum(ranks) / 2
    torch.testing.assert_close(average, whole, rtol=1e-6, atol=1e-7)
    leaf = inputs["student_logits"]
    torch.testing.assert_close(gradient(average, leaf), gradient(whole, leaf), rtol=1e-5, atol=1e-8)


# ----------------------------------------------------------------------------------------------------------------------
# configuration


def flat(settings):
    return settings


def flat_with_name(settings):
    return {"policy_loss": PURE} | settings


def nested(settings):
    return {"policy_loss": {"loss_mode": PURE} | settings}


def dict_config_flat(settings):
    return OmegaConf.create(flat_with_name(settings))


def dict_config_nested(settings):
    return OmegaConf.create(nested(settings))


def actor_config_instance(settings):
    return actor_config(DistillationPolicyLossConfig(loss_mode=PURE, **settings))


def fsdp_actor_config_instance(settings):
    required = {"strategy": "fsdp2", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 1}
    return FSDPActorConfig(**required, policy_loss=DistillationPolicyLossConfig(loss_mode=PURE, **settings))


CONFIG_FORMS = [
    flat,
    flat_with_name,
    nested,
    dict_config_flat,
    dict_config_nested,
    actor_config_instance,
    fsdp_actor_config_instance,
]
FALLING = {"hybrid_lambda_distill_schedule": "linear", "hybrid_lambda_distill_steps": 4}  # 1, 0.75, 0.5, 0.25, 0, ...
EVERY_SETTING = {
    "distillation_type": "gkd",
    "distillation_beta": 0.25,
    "distillation_temperature": 2.0,
    "hybrid_lambda_rl": 0.5,
    "hybrid_lambda_distill": 3.0,
    "hybrid_rl_loss_mode": "cispo",
}


@pytest.mark.parametrize("form", CONFIG_FORMS)
def test_every_form_of_config_gives_the_same_losses(form):
    config = form(EVERY_SETTING)
    student, teacher = both_sides()
    expected = response_mean(true_divergence(student, teacher, "gkd", 0.25, 2.0)).item()
    assert pure(config)[0].item() == near(expected)
    expected_hybrid = 0.5 * rl_loss("cispo")[0].item() + 3.0 * expected
    assert hybrid(config)[0].item() == near(expected_hybrid)


def settings_in(config):
    settings = DistillationLossConfig.from_config(config)
    return {name: getattr(settings, name) for name in EVERY_SETTING}


@pytest.mark.parametrize("form", CONFIG_FORMS)
def test_every_form_of_config_is_read_whole(form):
    assert settings_in(form(EVERY_SETTING)) == EVERY_SETTING


@pytest.mark.parametrize("form", CONFIG_FORMS)
def test_every_form_of_config_has_the_schedule(form):
    settings = DistillationLossConfig.from_config(form(FALLING | {"hybrid_lambda_distill": 0.5}))
    assert [settings.lambda_distill(step) for step in range(1, 7)] == [0.5, 0.375, 0.25, 0.125, 0.0, 0.0]


DEFAULTS = {
    "distillation_type": None,  # reverse_kl, see test_the_divergence_that_type_and_beta_choose
    "distillation_beta": None,
    "distillation_temperature": 1.0,
    "hybrid_lambda_rl": 1.0,
    "hybrid_lambda_distill": 1.0,
    "hybrid_rl_loss_mode": "vanilla",
}


@pytest.mark.parametrize("config", [None, {}, OmegaConf.create({}), {"policy_loss": PURE}, {"policy_loss": {}}])
def test_defaults(config):
    assert settings_in(config) == DEFAULTS
    assert torch.equal(pure(config)[0], pure()[0])


@pytest.mark.parametrize("form", [actor_config_instance, fsdp_actor_config_instance])
def test_defaults_of_the_patched_verl(form):
    assert settings_in(form({})) == DEFAULTS


@pytest.mark.parametrize(
    ("settings", "kind", "beta"),
    [
        ({}, "reverse_kl", 1.0),
        ({"distillation_beta": 1.0}, "reverse_kl", 1.0),
        ({"distillation_beta": 0.0}, "forward_kl", 0.0),
        ({"distillation_beta": 0}, "forward_kl", 0.0),
        ({"distillation_beta": 0.3}, "gkd", 0.3),
        ({"distillation_type": "forward_kl"}, "forward_kl", 0.0),
        ({"distillation_type": "forward_kl", "distillation_beta": 0.0}, "forward_kl", 0.0),
        ({"distillation_type": "reverse_kl", "distillation_beta": 1.0}, "reverse_kl", 1.0),
        ({"distillation_type": "gkd"}, "reverse_kl", 1.0),
        ({"distillation_type": "gkd", "distillation_beta": 0.3}, "gkd", 0.3),
        ({"distillation_type": "gkd", "distillation_beta": 0.0}, "forward_kl", 0.0),
    ],
)
def test_the_divergence_that_type_and_beta_choose(settings, kind, beta):
    """As the user's guide says: ``distillation_type="forward_kl"`` or ``distillation_beta=0.0``."""
    student, teacher = both_sides()
    expected = response_mean(true_divergence(student, teacher, kind, beta, 1.0)).item()
    assert pure(settings)[0].item() == near(expected)


def test_a_mixture_without_a_beta_says_once_that_it_is_reverse_kl(caplog):
    _warn_of_default_beta.cache_clear()
    for _ in range(3):
        pure({"distillation_type": "gkd"})
    assert [record.message for record in caplog.records if "distillation_beta" in record.message] == [
        "distillation_type=gkd without distillation_beta: the documented default 1.0 is used, which is reverse KL. "
        "Set distillation_beta between 0 and 1 to mix."
    ]


def test_keys_of_other_owners_are_left_alone():
    config = {"clip_ratio": 0.3, "learning_rate": 1e-5, "policy_loss": {"loss_mode": PURE, "dro_beta": 0.1, "new": 1}}
    assert settings_in(config) == DEFAULTS


def hydra_actor(settings):
    """What Hydra holds before VERL turns it into its dataclasses."""
    return OmegaConf.create(
        {
            "_target_": "verl.workers.config.FSDPActorConfig",
            "strategy": "fsdp2",
            "rollout_n": 1,
            "ppo_micro_batch_size_per_gpu": 1,
            "policy_loss": {"_target_": "verl.on_policy_distillation.config.DistillationPolicyLossConfig"},
        }
        | settings
    )


@pytest.mark.parametrize("form", [flat, nested, dict_config_flat, hydra_actor])
def test_keys_of_the_rl_loss_reach_it(form):
    """Clip ranges stand beside `policy_loss` in VERL's actor config, and beside our keys in a flat dictionary."""
    settings = {"clip_ratio_low": 0.01, "clip_ratio_high": 0.02, "clip_ratio_c": 1.05}
    config = form({}) | settings if form is nested else form(settings)
    loss, pg_clipfrac, _, pg_clipfrac_lower = hybrid(config)
    expected, metrics = rl_loss(config=actor_config(**settings))
    default = rl_loss()[1]
    assert metrics["actor/pg_clipfrac"] > default["actor/pg_clipfrac"]
    assert metrics["actor/pg_clipfrac_lower"] > default["actor/pg_clipfrac_lower"]
    assert pg_clipfrac.item() == pytest.approx(metrics["actor/pg_clipfrac"])
    assert pg_clipfrac_lower.item() == pytest.approx(metrics["actor/pg_clipfrac_lower"])
    assert loss.item() == near(expected.item() + pure()[0].item())


# ----------------------------------------------------------------------------------------------------------------------
# bad inputs


# (what is wrong, words that the message must have: the key, the value, the fix)
BAD_SETTINGS = [
    ({"distillation_type": "kl"}, ["distillation_type", "'kl'", "reverse_kl", "forward_kl", "gkd", "skew_reverse_kl"]),
    ({"distillation_type": ["gkd"]}, ["distillation_type", "['gkd']", "reverse_kl"]),
    ({"distillation_type": 1}, ["distillation_type", "1", "reverse_kl"]),
    ({"distillation_beta": -0.1}, ["distillation_beta", "-0.1", "[0, 1]"]),
    ({"distillation_beta": 1.5}, ["distillation_beta", "1.5", "[0, 1]"]),
    ({"distillation_beta": math.nan}, ["distillation_beta", "nan", "finite"]),
    ({"distillation_beta": "0.5"}, ["distillation_beta", "'0.5'", "float"]),
    ({"distillation_beta": True}, ["distillation_beta", "True", "float"]),
    ({"distillation_temperature": 0.0}, ["distillation_temperature", "0.0", "positive", "1.0"]),
    ({"distillation_temperature": -1}, ["distillation_temperature", "-1", "positive", "1.0"]),
    ({"distillation_temperature": math.inf}, ["distillation_temperature", "inf", "finite", "1.0"]),
    ({"distillation_temperature": math.nan}, ["distillation_temperature", "nan", "finite", "1.0"]),
    ({"hybrid_lambda_rl": -1.0}, ["hybrid_lambda_rl", "-1.0", "0 or more"]),
    ({"hybrid_lambda_distill": -1.0}, ["hybrid_lambda_distill", "-1.0", "0 or more"]),
    ({"hybrid_lambda_rl": math.inf}, ["hybrid_lambda_rl", "inf", "finite"]),
    (
        {"hybrid_lambda_rl": 0.0, "hybrid_lambda_distill": 0},
        ["hybrid_lambda_rl=0", "hybrid_lambda_distill=0", "weight"],
    ),
    (
        {"hybrid_lambda_distill_schedule": "cosine"},
        ["hybrid_lambda_distill_schedule", "'cosine'", "constant", "linear"],
    ),
    ({"hybrid_lambda_distill_schedule": ["linear"]}, ["hybrid_lambda_distill_schedule", "['linear']", "constant"]),
    (
        {"hybrid_lambda_distill_steps": 8},
        ["hybrid_lambda_distill_steps=8", "hybrid_lambda_distill_schedule=constant", "linear", "leave it out"],
    ),
    *(
        (FALLING | {"hybrid_lambda_distill_steps": bad}, [f"hybrid_lambda_distill_steps={bad}", "linear", "1 or more"])
        for bad in (None, 0, -3, 2.5, True)
    ),
    (
        FALLING | {"hybrid_lambda_distill": 0},
        ["hybrid_lambda_distill=0", "linear", "above 0", "leave the schedule out"],
    ),
    (FALLING | {"hybrid_lambda_rl": 0.0}, ["hybrid_lambda_rl=0.0", "linear", "after step 4", "above 0"]),
    ({"hybrid_rl_loss_mode": "ppo"}, ["hybrid_rl_loss_mode", "'ppo'", "vanilla", "gspo"]),
    ({"hybrid_rl_loss_mode": HYBRID}, ["hybrid_rl_loss_mode", HYBRID, "vanilla", "gspo"]),
    ({"hybrid_rl_loss_mode": PURE}, ["hybrid_rl_loss_mode", PURE, "vanilla", "gspo"]),
    ({"hybrid_rl_loss_mode": ["gspo"]}, ["hybrid_rl_loss_mode", "['gspo']", "vanilla", "gspo"]),
    ({"distilation_type": "gkd"}, ["distilation_type", "'gkd'", "distillation_type"]),
    ({"distillation_temprature": 2.0}, ["distillation_temprature", "2.0", "distillation_temperature"]),
    ({"distillation-beta": 0.5}, ["distillation-beta", "0.5", "distillation_beta"]),
    ({"hybrid_lambda_distil": 0.5}, ["hybrid_lambda_distil", "0.5", "hybrid_lambda_distill"]),
    ({"distillation_head": "dense"}, ["distillation_head", "'dense'", "not a key any more", "leave the key out"]),
    ({"temperature": 2.0}, ["temperature=2.0", "did you mean distillation_temperature"]),
    (
        {"distillation_type": "forward_kl", "distillation_beta": 1.0},
        ["distillation_type=forward_kl", "distillation_beta=1.0", "contradict"],
    ),
    (
        {"distillation_type": "reverse_kl", "distillation_beta": 0.5},
        ["distillation_type=reverse_kl", "distillation_beta=0.5", "contradict", "gkd"],
    ),
    ({"distillation_entropy_threshold": -0.1}, ["distillation_entropy_threshold=-0.1", "negative", "forward_kl"]),
    ({"distillation_entropy_threshold": math.inf}, ["distillation_entropy_threshold=inf", "finite"]),
    ({"distillation_entropy_threshold": True}, ["distillation_entropy_threshold=True", "float"]),
    (
        {"distillation_entropy_threshold": 0.8, "distillation_type": "gkd"},
        ["distillation_type=gkd", "distillation_entropy_threshold=0.8", "contradict", "Leave one of them out"],
    ),
    (
        {"distillation_entropy_threshold": 0.8, "distillation_type": "forward_kl"},
        ["distillation_type=forward_kl", "distillation_entropy_threshold=0.8", "contradict"],
    ),
    (
        {"distillation_entropy_threshold": 0.8, "distillation_beta": 1.0},
        ["distillation_beta=1.0", "distillation_entropy_threshold=0.8", "contradict"],
    ),
    (
        {"distillation_token_selection": "top", "distillation_keep_fraction": 0.5},
        ["distillation_token_selection", "'top'", "top_entropy", "top_divergence", "prefix"],
    ),
    ({"distillation_token_selection": ["prefix"]}, ["distillation_token_selection", "['prefix']", "top_entropy"]),
    (
        {"distillation_token_selection": "prefix", "distillation_keep_fraction": 0.0},
        ["distillation_keep_fraction=0.0", "(0, 1]"],
    ),
    (
        {"distillation_token_selection": "prefix", "distillation_keep_fraction": 1.1},
        ["distillation_keep_fraction=1.1", "(0, 1]"],
    ),
    (
        {"distillation_token_selection": "prefix", "distillation_keep_fraction": "half"},
        ["distillation_keep_fraction='half'", "finite"],
    ),
    (
        {"distillation_token_selection": "prefix"},
        ["distillation_token_selection=prefix", "distillation_keep_fraction=None", "set both"],
    ),
    (
        {"distillation_keep_fraction": 0.5},
        ["distillation_token_selection=all", "distillation_keep_fraction=0.5", "set both", "top_entropy"],
    ),
    ({"distillation_loss_max_clamp": 0.0}, ["distillation_loss_max_clamp=0.0", "not positive", "10.0", "null"]),
    ({"distillation_loss_max_clamp": -2.0}, ["distillation_loss_max_clamp=-2.0", "not positive"]),
    ({"distillation_loss_max_clamp": math.nan}, ["distillation_loss_max_clamp=nan", "finite"]),
    ({"distillation_keep_ratio": 0.5}, ["distillation_keep_ratio", "did you mean distillation_keep_fraction"]),
    ({"distillation_beta": []}, ["distillation_beta", "[]", "float"]),
    ({"distillation_temperature": 10**400}, ["distillation_temperature", "finite"]),
    ({"disitllation_type": "gkd"}, ["disitllation_type", "'gkd'", "did you mean distillation_type"]),
    ({"hybird_lambda_rl": 0.5}, ["hybird_lambda_rl", "0.5", "did you mean hybrid_lambda_rl"]),
    ({"dstillation_beta": 0.5}, ["dstillation_beta", "0.5", "did you mean distillation_beta"]),
    ({"hybrid_rl_loss": "gspo"}, ["hybrid_rl_loss", "'gspo'", "hybrid_rl_loss_mode"]),
]


@pytest.mark.parametrize("loss_fn", [pure, hybrid])
@pytest.mark.parametrize("form", [flat_with_name, nested, dict_config_nested])
@pytest.mark.parametrize(("settings", "words"), BAD_SETTINGS, ids=[str(settings)[:60] for settings, _ in BAD_SETTINGS])
def test_bad_setting_names_key_value_and_fix(settings, words, form, loss_fn):
    with pytest.raises(ValueError) as error:
        loss_fn(form(settings))
    assert [word for word in words if word not in str(error.value)] == [], str(error.value)


def other_vocabulary():
    return torch.zeros(BATCH, TOKENS, VOCAB + 3)


def other_tokens():
    return torch.zeros(BATCH, TOKENS + 1, VOCAB)


# (arguments, words that the message must have)
BAD_INPUTS = {
    "no teacher": ({"teacher_logits": None}, ["teacher_logits", "missing", "teacher.model.path"]),
    "no student": ({"student_logits": None}, ["student_logits", "missing", "pass student_logits="]),
    "no tensor in a list": ({"teacher_logits": [1.0]}, ["teacher_logits[0]", "float", ".logits"]),
    "tuple of a model": ({"student_logits": (torch.zeros(1),)}, ["student_logits", "tuple", ".logits"]),
    "no logits in the output": (
        {"student_logits": SimpleNamespace(logits=None)},
        ["student_logits", "NoneType", ".logits"],
    ),
    "tokens instead of logits": (
        {"teacher_logits": torch.zeros(BATCH, TOKENS, VOCAB, dtype=torch.int64)},
        ["teacher_logits", "int64", "floating-point"],
    ),
    "flat logits": (
        {"student_logits": torch.zeros(TOKENS, VOCAB)},
        ["student_logits", "(7, 13)", "(batch, tokens, vocab)"],
    ),
    "vocabularies": ({"teacher_logits": other_vocabulary()}, ["vocabulary", "13", "16", "tokenizer"]),
    "teacher's tokens": ({"teacher_logits": other_tokens()}, ["teacher_logits", "(5, 8)", "(5, 7)", "response tokens"]),
    "student's tokens": ({"student_logits": other_tokens()}, ["student_logits", "(5, 8)", "(5, 7)", "response tokens"]),
    "mask's tokens": ({"mask": torch.ones(BATCH, TOKENS - 1)}, ["(5, 7)", "response_mask", "(5, 6)"]),
    "flat mask": ({"mask": torch.ones(BATCH * TOKENS)}, ["response_mask", "(35,)", "(batch, tokens)"]),
    "list mask": ({"mask": [[1] * TOKENS] * BATCH}, ["response_mask", "list", "(batch, tokens)"]),
    "NaN mask": ({"mask": torch.full((BATCH, TOKENS), math.nan)}, ["response_mask", "NaN", "zero"]),
    "empty vocabulary": (
        {"teacher_logits": torch.zeros(BATCH, TOKENS, 0)},
        ["vocabulary", "13", "of 0", "tokenizer"],
    ),
    "complex logits": (
        {"student_logits": torch.zeros(BATCH, TOKENS, VOCAB, dtype=torch.complex64)},
        ["student_logits", "complex64", "floating-point"],
    ),
    "teacher's device": (
        {"teacher_logits": torch.zeros(BATCH, TOKENS, VOCAB, device="meta")},
        ["teacher_logits are on meta", "student_logits on cpu", "move"],
    ),
    "config's name": ({"config": PURE}, ["config", "str", "ActorConfig"]),
    "config's list": ({"config": [("distillation_type", "gkd")]}, ["config", "list", "dict"]),
}


@pytest.mark.parametrize("loss_fn", [pure, hybrid])
@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_names_argument_value_and_fix(case, loss_fn):
    arguments, words = BAD_INPUTS[case]
    with pytest.raises(ValueError) as error:
        loss_fn(**arguments)
    assert [word for word in words if word not in str(error.value)] == [], str(error.value)


NO_DISTRIBUTION = {
    "one NaN": lambda row: row.index_fill(-1, torch.tensor([3]), math.nan),
    "one +inf": lambda row: row.index_fill(-1, torch.tensor([0]), math.inf),
    "nothing but -inf": lambda row: torch.full_like(row, -math.inf),
}


@pytest.mark.parametrize("loss_fn", [pure, hybrid])
@pytest.mark.parametrize("bad", NO_DISTRIBUTION)
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "gkd", "skew_reverse_kl"])
@pytest.mark.parametrize("side", ["student_logits", "teacher_logits"])
def test_a_response_token_without_a_distribution_names_the_side(side, kind, bad, loss_fn):
    inputs = logits()
    values = inputs[side].detach().clone()
    values[0, :2] = NO_DISTRIBUTION[bad](values[0, :2])  # two response tokens
    message = f"{side} have NaN, .inf or nothing but -inf at 2 of {sum(LENGTHS)} response tokens: .*bfloat16"
    with pytest.raises(ValueError, match=message):
        loss_fn(settings_of(kind, 0.5), **inputs | {side: values})


@pytest.mark.parametrize("side", ["student_logits", "teacher_logits"])
def test_huge_logits_are_a_distribution(side):
    inputs = logits()
    loss, _, kl, _ = pure(**inputs | {side: (inputs[side] * 1e30).detach().requires_grad_()})
    assert loss.isfinite() and kl.isfinite()


@pytest.mark.parametrize("name", ["old_log_prob", "log_prob", "advantages"])
def test_hybrid_needs_the_rl_inputs(name):
    with pytest.raises(ValueError, match=f"{name}.*{PURE}"):
        hybrid(**rl_inputs() | {name: None})


# Broadcasting would turn some of these into a loss of something else without a word.
@pytest.mark.parametrize("shape", [(BATCH, TOKENS + 1), (BATCH, 1), (TOKENS,), (1, TOKENS)])
@pytest.mark.parametrize("name", ["old_log_prob", "log_prob", "advantages", "rollout_is_weights"])
def test_hybrid_refuses_rl_inputs_of_another_shape(name, shape):
    with pytest.raises(ValueError, match=name):
        hybrid(**rl_inputs() | {name: torch.zeros(shape)})


@pytest.mark.parametrize("name", ["old_log_prob", "log_prob", "advantages", "rollout_is_weights"])
def test_hybrid_refuses_rl_inputs_of_another_device(name):
    with pytest.raises(ValueError, match=f"{name} is on meta, response_mask on cpu: move"):
        hybrid(**rl_inputs() | {name: torch.zeros(BATCH, TOKENS, device="meta")})


@pytest.mark.parametrize("mode", RL_MODES)
def test_a_batch_without_response_tokens_has_every_metric_of_a_full_one(mode):
    """VERL refuses to combine ranks of which one has counted a metric less often."""
    config = weights_config(0.5, 0.5, mode)
    full, empty = hybrid(config), hybrid(config, mask=torch.zeros(BATCH, TOKENS))
    assert empty.metrics.keys() == full.metrics.keys()
    assert [value for value in empty.metrics.values() if value != 0.0] == []


@pytest.mark.parametrize("name", ["old_log_prob", "log_prob", "advantages", "rollout_is_weights"])
def test_hybrid_refuses_rl_inputs_that_are_no_tensors(name):
    with pytest.raises(ValueError, match=f"{name} is a list: .* needs a .batch, tokens. tensor"):
        hybrid(**rl_inputs() | {name: [[0.0] * TOKENS] * BATCH})


def test_unknown_aggregation_mode():
    with pytest.raises(ValueError, match="token-median"):
        pure(loss_agg_mode="token-median")


# ----------------------------------------------------------------------------------------------------------------------
# hybrid


def weights_config(rl: float, distill: float, mode: str = "vanilla") -> dict:
    weights = {"hybrid_lambda_rl": rl, "hybrid_lambda_distill": distill, "hybrid_rl_loss_mode": mode}
    # dro has no default for its one key; the other losses do not read it
    return weights | {"distillation_type": "forward_kl", "dro_beta": 0.1}


def with_seed(function, *arguments, **options):
    """clip_cov draws the tokens it clips."""
    torch.manual_seed(0)
    return function(*arguments, **options)


def rl_reference(mode: str, **options):
    config = actor_config(PolicyLossConfig(dro_beta=0.1))
    return with_seed(rl_loss, mode, config, **options)


@pytest.mark.parametrize("agg_mode", ["token-mean", "seq-mean-token-sum"])
@pytest.mark.parametrize("mode", RL_MODES)
def test_hybrid_is_the_weighted_sum(mode, agg_mode):
    rl, inputs = rl_inputs(), logits()
    config = weights_config(0.7, 0.2, mode)
    result = with_seed(hybrid, config, loss_agg_mode=agg_mode, **rl, **inputs)

    rl_term, rl_metrics = rl_reference(mode, loss_agg_mode=agg_mode, **rl)
    distill_term = pure(config, loss_agg_mode=agg_mode, **inputs)
    torch.testing.assert_close(result[0], 0.7 * rl_term + 0.2 * distill_term[0], rtol=1e-6, atol=1e-7)
    for term, weight, leaf in ((rl_term, 0.7, rl["log_prob"]), (distill_term[0], 0.2, inputs["student_logits"])):
        torch.testing.assert_close(gradient(result[0], leaf), weight * gradient(term, leaf), rtol=1e-5, atol=1e-8)
    # the metrics of both terms as they are, without the weights
    assert result.metrics == near(rl_metrics | distill_term.metrics)
    assert result[1].item() == pytest.approx(rl_metrics.get("actor/pg_clipfrac", 0.0))
    assert torch.equal(result[2], distill_term[2])
    assert result[3].item() == pytest.approx(rl_metrics.get("actor/pg_clipfrac_lower", 0.0))


def test_the_usual_rl_losses_are_among_them():
    assert {"vanilla", "gspo", "cispo", "gpg", "dro", "bypass_mode"} <= set(RL_MODES)


@pytest.mark.parametrize("agg_mode", AGG_MODES)
@pytest.mark.parametrize("mode", RL_MODES)
def test_without_distillation_the_rl_loss_is_exact(mode, agg_mode):
    rl = rl_inputs()
    result = with_seed(hybrid, weights_config(1.0, 0.0, mode), loss_agg_mode=agg_mode, **rl)
    expected, metrics = rl_reference(mode, loss_agg_mode=agg_mode, **rl)
    assert torch.equal(result[0], expected)
    assert torch.equal(gradient(result[0], rl["log_prob"]), gradient(expected, rl["log_prob"]))
    assert {name: result.metrics[name] for name in metrics} == metrics


@pytest.mark.parametrize("agg_mode", AGG_MODES)
@pytest.mark.parametrize("mode", RL_MODES)
def test_without_rl_the_pure_loss_is_exact(mode, agg_mode):
    inputs = logits()
    config = weights_config(0.0, 1.0, mode)
    loss = hybrid(config, loss_agg_mode=agg_mode, **inputs)[0]
    expected = pure(config, loss_agg_mode=agg_mode, **inputs)[0]
    assert torch.equal(loss, expected)
    leaf = inputs["student_logits"]
    assert torch.equal(gradient(loss, leaf), gradient(expected, leaf))


def log_probs_of_logits(student_logits: torch.Tensor) -> torch.Tensor:
    tokens = torch.randint(VOCAB, (BATCH, TOKENS, 1), generator=torch.Generator().manual_seed(5))
    return student_logits.log_softmax(-1).gather(-1, tokens).squeeze(-1)


@pytest.mark.parametrize(("rl_weight", "distill_weight"), [(1.0, 0.0), (0.0, 1.0)])
def test_exactness_where_both_terms_share_the_logits(rl_weight, distill_weight):
    """In a trainer log_prob comes from the student's logits: the dropped term must leave no trace in their gradient."""
    inputs, rl = logits(), rl_inputs()
    leaf = inputs["student_logits"]
    rl |= {"log_prob": log_probs_of_logits(leaf), "old_log_prob": log_probs_of_logits(leaf).detach() + 0.1}
    loss = hybrid(weights_config(rl_weight, distill_weight), **inputs, **rl)[0]
    expected = rl_loss(**rl)[0] if rl_weight else pure({"distillation_type": "forward_kl"}, **inputs)[0]
    assert torch.equal(loss, expected) and torch.equal(gradient(loss, leaf), gradient(expected, leaf))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["advantages", "old_log_prob", "log_prob"])
def test_bad_numbers_in_a_dropped_rl_term_do_not_leak(name, bad):
    inputs = logits()
    rl = rl_inputs() | {name: torch.full((BATCH, TOKENS), bad).requires_grad_()}
    loss, _, kl, _ = hybrid(weights_config(0.0, 1.0), **inputs, **rl)
    assert loss.isfinite() and kl.isfinite()
    assert gradient(loss, inputs["student_logits"]).isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["student_logits", "teacher_logits"])
def test_bad_numbers_in_a_dropped_distillation_term_do_not_leak(name, bad):
    rl = rl_inputs()
    inputs = logits() | {name: torch.full((BATCH, TOKENS, VOCAB), bad).requires_grad_()}
    loss = hybrid(weights_config(1.0, 0.0), **inputs, **rl)[0]
    assert torch.equal(loss, rl_loss(**rl)[0]) and gradient(loss, rl["log_prob"]).isfinite().all()


@pytest.mark.parametrize("steps", [1, 15, 35])
@pytest.mark.parametrize("whole", [1.0, 0.3])
def test_the_weight_falls_by_equal_parts_from_the_whole_to_zero(whole, steps):
    settings = FALLING | {"hybrid_lambda_distill": whole, "hybrid_lambda_distill_steps": steps}
    weights = [DistillationLossConfig(**settings).lambda_distill(step) for step in range(1, steps + 4)]
    assert weights[0] == whole and weights[steps:] == [0.0] * 3
    assert weights[:steps] == pytest.approx([whole * left / steps for left in range(steps, 0, -1)], rel=1e-12)


@pytest.mark.parametrize(("step", "weight"), [(1, 1.0), (2, 0.75), (4, 0.25)])
def test_a_falling_weight_is_at_each_step_a_constant_one(step, weight):
    falling, constant = logits(), logits()
    result = hybrid(FALLING, global_steps=step, **falling)
    expected = hybrid({"hybrid_lambda_distill": weight}, **constant)
    assert torch.equal(result[0], expected[0])
    leaves = falling["student_logits"], constant["student_logits"]
    assert torch.equal(*(gradient(loss[0], leaf) for loss, leaf in zip((result, expected), leaves, strict=True)))
    assert result.metrics == expected.metrics | {"distillation/lambda_distill": weight}


@pytest.mark.parametrize("step", [5, 6, 1000])
def test_after_the_schedule_the_rl_loss_is_exact(step):
    rl, teacher = rl_inputs(), torch.full((BATCH, TOKENS, VOCAB), math.nan)  # which nothing is learnt from any more
    result = hybrid(FALLING, global_steps=step, **rl, teacher_logits=teacher)
    assert torch.equal(result[0], rl_loss(**rl)[0])
    assert result.metrics["distillation/lambda_distill"] == 0.0


@pytest.mark.parametrize("step", [None, 0, -1, 2.0, True, "3"])
def test_a_schedule_without_the_number_of_the_step(step):
    with pytest.raises(ValueError) as error:
        hybrid(FALLING, global_steps=step)
    for word in ("hybrid_lambda_distill_schedule=linear", f"global_steps={step!r}", "pass global_steps= to the loss"):
        assert word in str(error.value)


@pytest.mark.parametrize("loss_fn", [pure, hybrid])
def test_without_a_schedule_the_step_does_not_matter(loss_fn):
    assert torch.equal(loss_fn(global_steps=3)[0], loss_fn()[0])
    assert loss_fn(global_steps=3).metrics == loss_fn().metrics


def test_rollout_weights_go_to_the_rl_term_alone():
    weights = normal(BATCH, TOKENS, seed=6).exp()
    loss = hybrid(rollout_is_weights=weights)[0]
    assert loss.item() != hybrid()[0].item()
    assert loss.item() == near(rl_loss(rollout_is_weights=weights)[0].item() + pure()[0].item())


def test_any_registered_loss_can_be_the_rl_term(monkeypatch):
    """A loss of someone else's, with metrics of its own and without the usual ones."""

    def squared_error(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights):
        assert isinstance(config, ActorConfig) and loss_agg_mode == "token-sum" and rollout_is_weights is None
        return ((log_prob - old_log_prob) * response_mask).square().sum(), {"actor/mine": 2.0}

    monkeypatch.setitem(POLICY_LOSS_REGISTRY, "squared_error", squared_error)
    rl = rl_inputs()
    expected = ((rl["log_prob"] - rl["old_log_prob"]) * response_mask()).square().sum().item()
    result = hybrid({"hybrid_rl_loss_mode": "squared_error", "hybrid_lambda_distill": 0.0}, loss_agg_mode="token-sum")
    assert result[0].item() == near(expected)
    assert result[1].item() == result[3].item() == 0.0
    assert result.metrics["actor/mine"] == 2.0 and DISTILLATION_METRICS < set(result.metrics)


def test_hybrid_metrics_have_the_rl_metrics():
    rl = {"actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"}
    assert set(hybrid().metrics) == DISTILLATION_METRICS | rl


# ----------------------------------------------------------------------------------------------------------------------
# packed logits


def packed(values: torch.Tensor, seed: int, junk: float = math.nan) -> tuple[torch.Tensor, torch.Tensor]:
    """The response rows of (batch, tokens, ...) in random places among rows of junk, and the grid of their places."""
    mask = response_mask(torch.bool)
    total = int(mask.sum()) + 11
    places = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[: int(mask.sum())]
    rows = torch.full((total, *values.shape[2:]), junk, dtype=values.dtype).index_copy(0, places, values[mask])
    return rows, torch.full(mask.shape, -(10**9)).masked_scatter(mask, places)  # no row where nothing is predicted


REVERSE_KL = DivergenceSpec()


def packed_loss(student, student_place, teacher, teacher_place, spec=REVERSE_KL, scale=1.0, mask=None):
    """What a trainer that packs its sequences does: divergences of the rows it names, aggregated as the losses do."""
    mask = response_mask(torch.bool) if mask is None else mask
    tokens = token_divergence(student, student_place[mask], teacher, teacher_place[mask], spec, student_scale=scale)
    loss = aggregate(tokens.divergence, mask, "token-mean", {})
    return loss, distillation_metrics(tokens, loss)


@pytest.mark.parametrize("seed", [0, 1])
def test_packed_logits_equal_dense_logits(seed):
    dense, config = logits(), settings_of("gkd", 0.3, 1.5)
    expected = pure(config, **dense)
    leaf = logits()["student_logits"]
    rows, place = packed(leaf, seed)
    teacher_rows, teacher_place = packed(dense["teacher_logits"], seed + 10)
    spec = DistillationLossConfig(**config).divergence
    loss, metrics = packed_loss(rows, place, DenseLogits(teacher_rows), teacher_place, spec)
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=1e-7)
    assert metrics == near(expected.metrics)
    torch.testing.assert_close(
        gradient(loss, leaf), gradient(expected[0], dense["student_logits"]), rtol=1e-5, atol=1e-8
    )


@pytest.mark.parametrize("scale", [0.5, 0.7, 1.3])
def test_packed_logits_with_a_sampling_temperature(scale):
    """A trainer holds logits / scale; the loss is that of the logits, the gradient that of what it holds."""
    leaf, dense = logits()["student_logits"], logits()
    expected = pure(**dense)
    rows, place = packed(leaf / scale, 0)
    held = rows.detach().requires_grad_()
    teacher, teacher_place = packed(dense["teacher_logits"], 1)
    loss, metrics = packed_loss(held, place, DenseLogits(teacher), teacher_place, scale=scale)
    assert metrics == pytest.approx(expected.metrics, rel=1e-5)
    mask = response_mask(torch.bool)
    torch.testing.assert_close(
        gradient(loss, held)[place[mask]],
        scale * gradient(expected[0], dense["student_logits"])[mask],
        rtol=1e-5,
        atol=1e-7,
    )


def test_packed_teacher_of_hidden_states():
    hidden, weight = normal(BATCH, TOKENS, 6, seed=7), normal(VOCAB, 6, seed=8)
    expected = pure(teacher_logits=hidden @ weight.T)
    rows, place = packed(hidden, 3)
    student, student_place = packed(logits()["student_logits"], 4)
    _, metrics = packed_loss(student, student_place, LinearLogits(rows, weight), place)
    assert metrics == pytest.approx(expected.metrics, rel=1e-5, abs=1e-6)


def test_packed_logits_of_an_all_masked_batch():
    values = torch.full((4, VOCAB), math.nan).requires_grad_()
    nowhere = torch.full((BATCH, TOKENS), -1)
    teacher = LinearLogits(torch.zeros(0, 6), torch.zeros(VOCAB, 6))
    nothing = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    loss, _ = packed_loss(values, nowhere, teacher, nowhere, mask=nothing)
    loss.backward()
    assert loss.item() == 0.0 and torch.equal(values.grad, torch.zeros(4, VOCAB))


# ----------------------------------------------------------------------------------------------------------------------
# weights of tokens, which the student's head is given before it runs


@pytest.mark.parametrize("mode", AGG_MODES)
@pytest.mark.parametrize("info", [{}, {"dp_size": 2, "batch_num_tokens": 40, "global_batch_size": 10}])
def test_token_weights_give_the_loss_of_every_aggregation_mode(mode, info):
    inputs = logits()
    mask = response_mask() != 0
    rows = torch.arange(BATCH * TOKENS).view(BATCH, TOKENS)[mask]
    student, teacher = inputs["student_logits"], DenseLogits(inputs["teacher_logits"].flatten(0, 1))
    tokens = token_divergence(student.flatten(0, 1), rows, teacher, rows, DivergenceSpec())
    loss = (token_weights(response_mask(), mode, info) * tokens.divergence).sum()
    dense = logits()
    expected = pure({"global_batch_info": info}, loss_agg_mode=mode, **dense)
    assert loss.item() == near(expected[0].item())
    assert distillation_metrics(tokens, loss) == pytest.approx(expected.metrics, rel=1e-6)
    torch.testing.assert_close(gradient(loss, student), gradient(expected[0], dense["student_logits"]))


def test_token_weights_of_no_tokens_are_none():
    assert token_weights(torch.zeros(2, 3), "token-mean", {}).shape == (0,)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
