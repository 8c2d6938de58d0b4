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
"""Per-token columns become losses and metrics. No function here keeps anything between two calls.

Two callers share the first half: the registered policy losses (``verl/trainer/ppo/on_policy_distillation.py``), which
are given logits, and the training engine, whose forward has ended in columns. The second half is the engine's:

- `head_columns` says which columns the student's head has to make for a micro-batch;
- `actor_loss` is what VERL's worker calls with them.

Aggregation is VERL's `agg_loss`, normalised over the global batch, so that gradients do not depend on how a batch is
split into micro-batches or over ranks.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Optional

import torch
from tensordict import TensorDict

from verl.on_policy_distillation.config import HYBRID, PURE, RL_TERM, DistillationLossConfig
from verl.on_policy_distillation.divergence import DivergenceSpec, LogitSource, TokenDivergence
from verl.on_policy_distillation.head import (
    KL_TO,
    REST_MASSES,
    LinearLogits,
    divergence_by_teacher,
    divergence_of_head,
    extra_columns,
    tokens_by_teacher,
)
from verl.on_policy_distillation.token_choice import EVERY_TOKEN, ChosenTokens, TokenChoice, choose
from verl.on_policy_distillation.tokens import TokenPlan, padded_response_mask, plan_tokens, response_rows
from verl.trainer.ppo.core_algos import agg_loss, get_policy_loss_fn, register_policy_loss
from verl.utils import tensordict_utils as tu
from verl.utils.metric import AggregationType, Metric
from verl.workers.config import ActorConfig
from verl.workers.utils.losses import ppo_loss

__all__ = [
    "GLOBAL_STEPS",
    "HeadColumns",
    "actor_loss",
    "aggregate",
    "contributions",
    "distillation_metrics",
    "global_batch_info",
    "head_columns",
    "require_distributions",
    "scheduled_weight",
    "token_weights",
    "weighted_rl_loss",
]

# The student's and the teacher's logits of the n tokens of a plan -> named columns (n,), with their graph.
HeadColumns = Callable[[LinearLogits, LogitSource], dict[str, torch.Tensor]]

# Non-tensor entry of the batch that the actor is updated on: the number of the training step. VERL's own
# ``global_steps`` is a column with the step that each sample was generated in.
GLOBAL_STEPS = "distillation_global_steps"

# The columns of chosen tokens: what each contributes to the loss, with its graph, and whether it is kept (1.0 or 0.0).
_CONTRIBUTION, _KEPT = "contribution", "kept"


# ----------------------------------------------------------------------------------------------------------------------
# of both callers


def global_batch_info(config: Any) -> dict[str, Any]:
    """dp_size, batch_num_tokens, global_batch_size, loss_scale_factor, where a trainer has put them."""
    return dict(config.get("global_batch_info", None) or {}) if isinstance(config, Mapping) else {}


def aggregate(
    divergence: torch.Tensor, mask: torch.Tensor, loss_agg_mode: str, batch_info: dict[str, Any]
) -> torch.Tensor:
    """One number, as VERL's `agg_loss` makes it, of the divergences (n,) of the nonzero entries of `mask`."""
    if divergence.numel() == 0:  # a mean over nothing is NaN; keep the graph, so that backward gives zeros
        return divergence.sum()
    grid = divergence.new_zeros(mask.shape).masked_scatter(mask, divergence)
    return agg_loss(loss_mat=grid, loss_mask=mask, loss_agg_mode=loss_agg_mode, **batch_info)


def contributions(
    tokens: TokenDivergence, counts: torch.Tensor, choice: TokenChoice
) -> tuple[torch.Tensor, dict[str, float]]:
    """What each of n tokens contributes to the loss, (n,), and the metrics of the choice.

    Args:
        counts: (batch,) int64, how many of the n tokens each sequence has.
    """
    if choice == EVERY_TOKEN:
        return tokens.divergence, {}
    chosen = choose(choice, tokens, counts)
    return chosen.contribution(tokens.divergence), _choice_metrics(choice, tokens, chosen.factor > 0.0)


def _choice_metrics(choice: TokenChoice, tokens: TokenDivergence, is_kept: torch.Tensor) -> dict[str, float]:
    """Shares of the response tokens: those that are kept, and those above the clamp, kept or not."""
    shares = {}
    if choice.selection != "all":
        shares["distillation/kept_tokens"] = is_kept
    if choice.max_clamp is not None:
        shares["distillation/clamped_tokens"] = tokens.divergence > choice.max_clamp
    return {name: int(tokens_in.sum()) / max(len(tokens_in), 1) for name, tokens_in in shares.items()}


def token_weights(mask: torch.Tensor, loss_agg_mode: str, batch_info: dict[str, Any]) -> torch.Tensor:
    """What `loss_agg_mode` multiplies each token's divergence by, before any is known.

    VERL's `agg_loss` is linear in the tokens' losses, so its gradient is their weights.

    Args:
        mask: (batch, tokens); nonzero marks the n response tokens.
        loss_agg_mode, batch_info: as `agg_loss` takes them.

    Returns:
        (n,) float32, in the order of the mask's nonzero entries.
    """
    mask = mask != 0
    with torch.enable_grad():
        divergence = torch.ones(int(mask.sum()), device=mask.device, requires_grad=True)
        return torch.autograd.grad(aggregate(divergence, mask, loss_agg_mode, batch_info), divergence)[0]


def require_distributions(tokens: TokenDivergence) -> None:
    """Refuse response tokens where one side is no distribution, instead of training on NaN.

    The entropy of a side depends on that side alone, so it says whose fault it is.
    """
    bad = torch.stack((tokens.teacher_entropy, tokens.student_entropy)).isnan().sum(-1).tolist()
    for name, count in zip(("teacher_logits", "student_logits"), bad, strict=True):
        if count:
            raise ValueError(
                f"{name} have NaN, +inf or nothing but -inf at {count} of {len(tokens.divergence)} response tokens: "
                "find where the model's forward overflows; bfloat16 and float32 have the range that float16 lacks."
            )


def distillation_metrics(tokens: TokenDivergence, loss: torch.Tensor) -> dict[str, float]:
    """Means over response tokens, in nats; zeros when there are none. `loss` as aggregated, before any weight."""
    names = ("reverse_kl", "forward_kl", "student_entropy", "teacher_entropy", "top1_agreement")
    columns = torch.stack([getattr(tokens, name) for name in names]).detach()  # (5, n)
    means = columns.sum(-1) / max(columns.shape[-1], 1)
    values = torch.cat((loss.detach().reshape(1).to(means.dtype), means)).tolist()
    keys = ("loss", "kl", "forward_kl", "student_entropy", "teacher_entropy", "top1_agreement")
    return {f"distillation/{key}": value for key, value in zip(keys, values, strict=True)}


def scheduled_weight(settings: DistillationLossConfig, global_steps: Optional[int]) -> tuple[float, dict[str, float]]:
    """Weight of the divergence in the hybrid loss at step `global_steps`, and its metric if it changes."""
    weight = settings.lambda_distill(global_steps)
    is_constant = settings.hybrid_lambda_distill_schedule == "constant"
    return weight, {} if is_constant else {"distillation/lambda_distill": weight}


def weighted_rl_loss(
    settings: DistillationLossConfig, response_mask: torch.Tensor, log_prob: torch.Tensor, **arguments: Any
) -> tuple[torch.Tensor, dict[str, Any]]:
    """``hybrid_lambda_rl`` times the policy loss that ``hybrid_rl_loss_mode`` names, and that loss's metrics.

    Args:
        arguments: the other arguments of VERL's policy losses.

    Returns:
        A weight of zero, or a mask without tokens, gives exactly zero, with the metrics' names all the same.
    """
    is_empty = not (response_mask != 0).any()
    loss, metrics = get_policy_loss_fn(settings.hybrid_rl_loss_mode)(
        response_mask=torch.ones_like(response_mask) if is_empty else response_mask, log_prob=log_prob, **arguments
    )
    if is_empty:
        # Of no tokens VERL's losses are NaN or an error. Their metrics' names are wanted all the same: VERL combines
        # ranks only if each has counted the same metrics in every micro-batch.
        return _zero_like(log_prob), {name: 0.0 for name in metrics}
    if settings.hybrid_lambda_rl == 0.0:
        return _zero_like(log_prob), metrics
    return settings.hybrid_lambda_rl * loss, metrics


def _zero_like(log_prob: torch.Tensor) -> torch.Tensor:
    """Zero with the graph of `log_prob`, whose backward gives zeros."""
    return log_prob.nan_to_num(neginf=0.0, posinf=0.0).sum() * 0.0


# ----------------------------------------------------------------------------------------------------------------------
# of the engine: what the head has to make


def head_columns(config: ActorConfig, data: TensorDict, plan: TokenPlan) -> HeadColumns:
    """What the student's head makes of the micro-batch `data` for the loss that `actor_loss` returns."""
    return _HEAD_COLUMNS[config.policy_loss.loss_mode](config, data, plan)


def _columns_of_pure(config: ActorConfig, data: TensorDict, plan: TokenPlan) -> HeadColumns:
    """The token weights are known before the forward, so value and gradients take one pass; of chosen tokens two."""
    weights = token_weights(padded_response_mask(data), config.loss_agg_mode, _batch_info(config, data))
    spec, choice = config.policy_loss.divergence, config.policy_loss.token_choice
    if choice == EVERY_TOKEN:
        return partial(_divergence_columns, spec=spec, weights=weights)
    return partial(_chosen_divergence_columns, spec=spec, weights=weights, choice=choice, counts=plan.counts)


def _columns_of_hybrid(config: ActorConfig, data: TensorDict, plan: TokenPlan) -> HeadColumns:
    """The RL term uses the tokens in ways only it knows: log-probs, and gradients by a second projection."""
    columns = partial(
        _policy_columns,
        spec=config.policy_loss.divergence,
        labels=plan.label,
        temperature=float(data["temperature"]),
        with_entropy=tu.get_non_tensor_data(data=data, key="calculate_entropy", default=False),
    )
    choice = config.policy_loss.token_choice
    if choice == EVERY_TOKEN:
        return columns
    return partial(_chosen_policy_columns, columns=columns, choice=choice, counts=plan.counts)


def _divergence_columns(
    student: LinearLogits, teacher: LogitSource, spec: DivergenceSpec, weights: torch.Tensor
) -> dict[str, torch.Tensor]:
    tokens, by_teacher = divergence_by_teacher(student, teacher, spec, weights)
    return tokens._asdict() | _named(teacher, by_teacher)


def _chosen_divergence_columns(
    student: LinearLogits,
    teacher: LogitSource,
    spec: DivergenceSpec,
    weights: torch.Tensor,
    choice: TokenChoice,
    counts: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """A first pass says which tokens learn; the second, over those alone, makes their gradients."""
    with torch.no_grad():
        columns = _divergence_columns(student, teacher, spec, weights)
    tokens = _tokens(columns)
    chosen = choose(choice, tokens, counts)
    learning = chosen.is_learning.nonzero().squeeze(-1)
    factor = chosen.factor[learning]
    again = divergence_of_head(student.tokens(learning), teacher.tokens(learning), spec, weights[learning] * factor)
    # Not clamped once more: a rounding above the clamp would take a gradient that is promised.
    contribution = chosen.contribution(tokens.divergence).index_copy(0, learning, factor * again.divergence)
    return columns | _choice_columns(chosen, contribution)


def _chosen_policy_columns(
    student: LinearLogits, teacher: LogitSource, columns: HeadColumns, choice: TokenChoice, counts: torch.Tensor
) -> dict[str, torch.Tensor]:
    found = columns(student, teacher)
    tokens = _tokens(found)
    chosen = choose(choice, tokens, counts)
    return found | _choice_columns(chosen, chosen.contribution(tokens.divergence))


def _choice_columns(chosen: ChosenTokens, contribution: torch.Tensor) -> dict[str, torch.Tensor]:
    return {_CONTRIBUTION: contribution, _KEPT: (chosen.factor > 0.0).to(contribution.dtype)}


def _tokens(columns: Mapping[str, torch.Tensor]) -> TokenDivergence:
    return TokenDivergence(*(columns[name] for name in TokenDivergence._fields))


def _policy_columns(
    student: LinearLogits,
    teacher: LogitSource,
    spec: DivergenceSpec,
    labels: torch.Tensor,
    temperature: float,
    with_entropy: bool,
) -> dict[str, torch.Tensor]:
    policy, by_teacher = tokens_by_teacher(student, teacher, spec, labels, temperature)
    entropy = {"entropy": policy.entropy} if with_entropy else {}
    return {"log_probs": policy.log_prob} | entropy | policy.tokens._asdict() | _named(teacher, by_teacher)


def _named(teacher: LogitSource, by_teacher: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(zip(extra_columns(teacher), by_teacher, strict=True))


_HEAD_COLUMNS = {PURE: _columns_of_pure, HYBRID: _columns_of_hybrid}


# ----------------------------------------------------------------------------------------------------------------------
# of the engine: the loss


def actor_loss(config: ActorConfig) -> Callable[..., tuple[torch.Tensor, dict[str, Any]]]:
    """The loss function of the actor's worker, called as VERL calls it: (model_output, data, dp_group).

    ``model_output`` holds the columns of `head_columns`, each nested (batch, prompt and response).
    """
    if config.policy_loss.loss_mode == PURE:
        return partial(_pure_loss, config)
    rl_config = copy.copy(config)  # shares `global_batch_info`, which `ppo_loss` fills
    # A frozen configuration: `dataclasses.replace` would check it again, and has no place for `model_config`.
    object.__setattr__(rl_config, "policy_loss", replace(config.policy_loss, loss_mode=RL_TERM))
    return partial(_hybrid_loss, config, rl_config)


def _pure_loss(
    config: ActorConfig, model_output: Mapping[str, torch.Tensor], data: TensorDict, dp_group: Any = None
) -> tuple[torch.Tensor, dict[str, Any]]:
    plan = plan_tokens(data)
    tokens = _collect(model_output, plan)
    require_distributions(tokens)
    loss, metrics = _divergence_loss(config, tokens, model_output, plan, data)
    return loss, metrics | _teacher_metrics(model_output, plan, data)


def _hybrid_loss(
    config: ActorConfig,
    rl_config: ActorConfig,
    model_output: Mapping[str, torch.Tensor],
    data: TensorDict,
    dp_group: Any = None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """``ppo_loss``, whose policy-gradient term alone is weighted, plus the weighted divergence."""
    global_steps = tu.get_non_tensor_data(data=data, key=GLOBAL_STEPS, default=None)
    weight, of_schedule = scheduled_weight(config.policy_loss, global_steps)
    plan = plan_tokens(data)
    tokens = _collect(model_output, plan)
    if weight != 0.0:
        require_distributions(tokens)
    log_probs = _with_old_log_probs(model_output["log_probs"], data, plan)
    loss, metrics = ppo_loss(rl_config, dict(model_output) | {"log_probs": log_probs}, data, dp_group)
    divergence, distillation = _divergence_loss(config, tokens, model_output, plan, data)
    metrics |= distillation | _teacher_metrics(model_output, plan, data)
    metrics |= Metric.from_dict(of_schedule, aggregation=AggregationType.MEAN)  # of equal values
    return (loss + weight * divergence if weight != 0.0 else loss), metrics


@register_policy_loss(RL_TERM)
def _rl_term(config: ActorConfig, **arguments: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """What `ppo_loss` finds under the name in `rl_config`."""
    return weighted_rl_loss(config.policy_loss, config=config, **arguments)


def _divergence_loss(
    config: ActorConfig,
    tokens: TokenDivergence,
    model_output: Mapping[str, torch.Tensor],
    plan: TokenPlan,
    data: TensorDict,
) -> tuple[torch.Tensor, dict[str, Metric]]:
    choice, trained, of_choice = config.policy_loss.token_choice, tokens.divergence, {}
    if choice != EVERY_TOKEN:
        trained = plan.collect(model_output[_CONTRIBUTION])
        of_choice = _choice_metrics(choice, tokens, plan.collect(model_output[_KEPT]) > 0.0)
    loss = aggregate(trained, padded_response_mask(data), config.loss_agg_mode, _batch_info(config, data))
    # A sum over micro-batches and a mean over ranks of this share give the mean over the global batch's tokens.
    share = len(tokens.divergence) * data["dp_size"] / max(data["batch_num_tokens"], 1)
    metrics = {
        # `agg_loss` has already normalised the loss by the global batch.
        name: Metric(AggregationType.SUM, value if name == "distillation/loss" else value * share)
        for name, value in (distillation_metrics(tokens, loss) | of_choice).items()
    }
    return loss, metrics


def _teacher_metrics(model_output: Mapping[str, torch.Tensor], plan: TokenPlan, data: TensorDict) -> dict[str, Metric]:
    """Of each of several teachers: the share of tokens that it speaks for, and, times that share, the mean KL to it.

    With a shared vocabulary, the means of what both sides have outside of it.
    """
    tokens_of_a_rank = max(data["batch_num_tokens"], 1) / data["dp_size"]
    names = [column.removeprefix(KL_TO) for column in model_output if column.startswith(KL_TO)]
    masses = [name for name in REST_MASSES if name in model_output]
    metrics: dict[str, float] = {}
    if names:
        kls = torch.stack([plan.collect(model_output[f"{KL_TO}{name}"]).detach() for name in names])
        sums = torch.stack((kls.nansum(-1), (~kls.isnan()).sum(-1).to(kls.dtype))) / tokens_of_a_rank
        for key, values in zip(("kl", "share"), sums.tolist(), strict=True):
            metrics |= {f"distillation/{name}/{key}": value for name, value in zip(names, values, strict=True)}
    for name in masses:
        mass = plan.collect(model_output[name]).detach().sum().item()
        metrics[f"distillation/{name}"] = mass / tokens_of_a_rank
    return {name: Metric(AggregationType.SUM, value) for name, value in metrics.items()}


def _collect(model_output: Mapping[str, torch.Tensor], plan: TokenPlan) -> TokenDivergence:
    return _tokens({name: plan.collect(model_output[name]) for name in TokenDivergence._fields})


def _batch_info(config: ActorConfig, data: TensorDict) -> dict[str, Any]:
    info = {name: data[name] for name in ("dp_size", "batch_num_tokens", "global_batch_size")}
    return info | {"loss_scale_factor": config.loss_scale_factor}


def _with_old_log_probs(log_probs: torch.Tensor, data: TensorDict, plan: TokenPlan) -> torch.Tensor:
    """The nested `log_probs`, with the old ones where ``response_mask`` is zero and nothing was projected.

    The ratio is then one there. Zeros would make it exp(-old log-prob), which may be infinite, and infinity times a
    mask of zero is NaN.
    """
    computed = log_probs.values()
    old = torch.zeros_like(computed).index_copy(0, response_rows(data), data["old_log_probs"].values().to(computed))
    is_projected = torch.zeros_like(computed, dtype=torch.bool).index_fill(0, plan.packed_row, True)
    return torch.nested.nested_tensor_from_jagged(torch.where(is_projected, computed, old), plan.offsets)
