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
"""On-policy distillation as a policy loss.

Importing this module registers two policy losses:

- ``on_policy_distillation``: the divergence between student and teacher on the student's own tokens, nothing else;
- ``hybrid_rl_distillation``: ``hybrid_lambda_rl * RL + hybrid_lambda_distill * divergence``, where RL is any policy
  loss registered in VERL (``hybrid_rl_loss_mode``) and the second weight may fall from step to step
  (``hybrid_lambda_distill_schedule``).

The divergences, their gradients and their sources are in ``verl/on_policy_distillation/divergence.py``. Like Agarwal et
al. (arXiv:2306.13649, sec. 3) the gradient is that of the divergence at the visited states; it is not taken through the
sampling of the tokens.

Trainers of one's own call the two functions with logits. VERL's trainer needs no logits: its engine makes the per-token
divergences in the student's head, and ``verl/on_policy_distillation/losses.py`` aggregates them as these functions do.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional

import torch

from verl.on_policy_distillation import losses  # not its names: both modules import core_algos, which imports this one
from verl.on_policy_distillation.config import (
    HYBRID,
    PURE,
    DistillationLossConfig,
    field_names,
    is_distillation_loss,
    policy_loss_section,
)
from verl.on_policy_distillation.divergence import (
    DenseLogits,
    DivergenceSpec,
    LogitSource,
    TokenDivergence,
    token_divergence,
)
from verl.on_policy_distillation.mixture import mixture_of
from verl.trainer.ppo.core_algos import register_policy_loss
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import ActorConfig, PolicyLossConfig

__all__ = [
    "HYBRID",
    "PURE",
    "DistillationLossConfig",
    "DistillationLossOutput",
    "compute_hybrid_rl_distillation_loss",
    "compute_on_policy_distillation_loss",
    "is_distillation_loss",
]


class DistillationLossOutput(tuple):
    """``(loss, pg_clipfrac, kl, pg_clipfrac_lower)``, all scalar tensors, with a dict of floats at ``.metrics``.

    Only ``loss`` carries a gradient. ``kl`` is the mean over response tokens of KL(student||teacher) in nats,
    whatever the loss minimizes, so that runs compare.
    """

    metrics: dict[str, float]

    def __new__(cls, loss, pg_clipfrac, kl, pg_clipfrac_lower, *, metrics):
        self = super().__new__(cls, (loss, pg_clipfrac, kl, pg_clipfrac_lower))
        self.metrics = metrics
        return self


@register_policy_loss(PURE)
def compute_on_policy_distillation_loss(
    old_log_prob: Optional[torch.Tensor],
    log_prob: Optional[torch.Tensor],
    advantages: Optional[torch.Tensor],
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: Optional[Any] = None,
    rollout_is_weights: Optional[torch.Tensor] = None,
    *,
    teacher_logits: Any = None,
    student_logits: Any = None,
    global_steps: Optional[int] = None,
) -> DistillationLossOutput:
    """The divergence between student and teacher on the student's tokens.

    Args:
        old_log_prob, log_prob, advantages, rollout_is_weights, global_steps: not used; may be None.
        response_mask: (batch, tokens), bool, int or float; nonzero marks the tokens of the loss. Tokens are chosen
            (``distillation_token_selection``) within each of its rows.
        loss_agg_mode: any mode of VERL's `agg_loss`.
        config: None, a flat mapping, a DictConfig or VERL's ActorConfig; see `DistillationLossConfig`.
        teacher_logits: (batch, tokens, vocab), float32, bfloat16 or float16, or an object with such ``.logits``;
            position t holds the logits that predict response token t. Never receives a gradient. A list of them is the
            exact mixture of several teachers (``verl/on_policy_distillation/mixture.py``), with the weights
            ``teacher_weights`` of `config`, one for each, normalised here; without them all weigh alike.
        student_logits: like `teacher_logits`; carries the gradient.

    Returns:
        (loss, pg_clipfrac = 0, kl, pg_clipfrac_lower = 0), scalars in nats, and ``.metrics``. With no response token
        the loss, its gradient and every metric are zero.

    Raises:
        ValueError: missing logits, shapes or vocabularies that do not match, a bad configuration, or logits of a
            response token that are no distribution: NaN, +inf, or -inf throughout.
    """
    settings = DistillationLossConfig.from_config(config)
    teachers = _Teachers(teacher_logits, _teacher_weights(config))
    tokens, mask = _response_divergence(student_logits, teachers, response_mask, settings.divergence)
    losses.require_distributions(tokens)
    trained, of_choice = losses.contributions(tokens, mask.sum(-1), settings.token_choice)
    loss = losses.aggregate(trained, mask, loss_agg_mode, losses.global_batch_info(config))
    return _output(loss, losses.distillation_metrics(tokens, loss) | of_choice)


@register_policy_loss(HYBRID)
def compute_hybrid_rl_distillation_loss(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: Optional[Any] = None,
    rollout_is_weights: Optional[torch.Tensor] = None,
    *,
    teacher_logits: Any = None,
    student_logits: Any = None,
    global_steps: Optional[int] = None,
) -> DistillationLossOutput:
    """``hybrid_lambda_rl * RL + hybrid_lambda_distill * divergence``.

    The RL term is the policy loss registered as ``hybrid_rl_loss_mode``, called with VERL's own arguments;
    `rollout_is_weights` go to it and not to the divergence. With a ``hybrid_lambda_distill_schedule`` the second weight
    is what is left of it at step `global_steps`. A weight of zero drops its term altogether, so that the other is
    reproduced exactly.

    Args:
        old_log_prob, log_prob, advantages: (batch, tokens), as VERL's policy losses take them.
        global_steps: the number of the training step, 1 for the first; only a schedule needs it.
        Everything else as in `compute_on_policy_distillation_loss`.

    Returns:
        (loss, pg_clipfrac, kl, pg_clipfrac_lower), with the RL term's own metrics among ``.metrics``; with a schedule
        also the weight.

    Raises:
        ValueError: as in `compute_on_policy_distillation_loss`, when the RL term's inputs are missing, and when a
            schedule is without `global_steps`.
    """
    settings = DistillationLossConfig.from_config(config)
    weight, of_schedule = losses.scheduled_weight(settings, global_steps)
    teachers = _Teachers(teacher_logits, _teacher_weights(config))
    tokens, mask = _response_divergence(student_logits, teachers, response_mask, settings.divergence)
    for name, value in (("old_log_prob", old_log_prob), ("log_prob", log_prob), ("advantages", advantages)):
        _require_rl_input(name, value, response_mask)
    if rollout_is_weights is not None:
        _require_rl_input("rollout_is_weights", rollout_is_weights, response_mask)
    if weight != 0.0:
        losses.require_distributions(tokens)
    trained, of_choice = losses.contributions(tokens, mask.sum(-1), settings.token_choice)
    distill_loss = losses.aggregate(trained, mask, loss_agg_mode, losses.global_batch_info(config))
    rl_loss, rl_metrics = losses.weighted_rl_loss(
        settings,
        old_log_prob=old_log_prob,
        log_prob=log_prob,
        advantages=advantages,
        response_mask=response_mask,
        loss_agg_mode=loss_agg_mode,
        config=_actor_config(config),
        rollout_is_weights=rollout_is_weights,
    )
    loss = rl_loss + weight * distill_loss if weight != 0.0 else rl_loss
    return _output(loss, losses.distillation_metrics(tokens, distill_loss) | of_choice | of_schedule | rl_metrics)


def _output(loss: torch.Tensor, metrics: dict[str, float]) -> DistillationLossOutput:
    names = ("actor/pg_clipfrac", "distillation/kl", "actor/pg_clipfrac_lower")
    return DistillationLossOutput(loss, *(loss.new_tensor(metrics.get(name, 0.0)) for name in names), metrics=metrics)


# ----------------------------------------------------------------------------------------------------------------------
# inputs


class _Teachers(NamedTuple):
    """What the caller passed: the logits of one teacher or of several, and their weights."""

    logits: Any
    weights: Optional[Sequence[float]]


def _teacher_weights(config: Any) -> Optional[Sequence[float]]:
    weights = policy_loss_section(config).get("teacher_weights", None)
    if weights is not None and (isinstance(weights, str) or not isinstance(weights, Sequence)):
        raise ValueError(f"teacher_weights={weights!r} is no list: pass one number for each of teacher_logits.")
    return weights


def _response_divergence(
    student_logits: Any, teachers: _Teachers, response_mask: torch.Tensor, spec: DivergenceSpec
) -> tuple[TokenDivergence, torch.Tensor]:
    """Divergence of the n masked-in tokens, and the (batch, tokens) bool mask they come from."""
    for name, logits, origin in (
        ("teacher_logits", teachers.logits, "the teacher's logits on the student's sequences"),
        ("student_logits", student_logits, "the student's logits, with their graph"),
    ):
        if logits is None:
            raise ValueError(
                f"{name} is missing: pass {name}=, {origin}. VERL's own trainer needs no logits: set "
                "teacher.model.path and start it with python -m verl.trainer.main_on_policy_distillation."
            )
    student = _dense("student_logits", student_logits)
    teacher = _teacher_source(student, teachers, response_mask, spec)
    mask = response_mask.to(student.device) != 0
    rows = mask.flatten().nonzero().squeeze(-1)
    return token_divergence(student.flatten(0, 1), rows, teacher, rows, spec), mask


def _teacher_source(
    student: torch.Tensor, teachers: _Teachers, response_mask: torch.Tensor, spec: DivergenceSpec
) -> LogitSource:
    """The teacher's logits (batch * tokens, V), or the mixture of several."""

    def source(name: str, logits: Any) -> DenseLogits:
        teacher = _dense(name, logits).detach()
        _require_same_shape(name, student, teacher, response_mask)
        return DenseLogits(teacher.flatten(0, 1))

    if not isinstance(teachers.logits, list | tuple):
        if teachers.weights is not None:
            raise ValueError(
                f"teacher_weights={list(teachers.weights)} with one teacher: pass a list as teacher_logits."
            )
        return source("teacher_logits", teachers.logits)
    if not teachers.logits:
        raise ValueError("teacher_logits is an empty list: pass the logits of one teacher or more.")
    sources = [source(f"teacher_logits[{number}]", logits) for number, logits in enumerate(teachers.logits)]
    weights = [1.0] * len(sources) if teachers.weights is None else teachers.weights
    try:
        return mixture_of(sources, weights, spec.temperature, student.device)
    except ValueError as error:
        raise ValueError(f"teacher_weights: {error}") from None


def _dense(name: str, logits: Any) -> torch.Tensor:
    """The (batch, tokens, vocab) tensor in `logits`: itself, or the ``.logits`` of a Hugging Face output."""
    logits = getattr(logits, "logits", logits)
    if not isinstance(logits, torch.Tensor):
        raise ValueError(
            f"{name} is a {type(logits).__name__}: pass a (batch, tokens, vocab) tensor or a model output with .logits."
        )
    if logits.dim() != 3 or not logits.is_floating_point():
        raise ValueError(
            f"{name} has shape {tuple(logits.shape)} and dtype {logits.dtype}: "
            "pass floating-point logits of shape (batch, tokens, vocab)."
        )
    return logits


def _require_same_shape(teacher_name: str, student: torch.Tensor, teacher: torch.Tensor, response_mask: Any) -> None:
    if not isinstance(response_mask, torch.Tensor) or response_mask.dim() != 2:
        given = tuple(response_mask.shape) if isinstance(response_mask, torch.Tensor) else type(response_mask).__name__
        raise ValueError(f"response_mask is {given}: pass a (batch, tokens) tensor, bool, int or float.")
    if response_mask.is_floating_point() and response_mask.isnan().any():
        raise ValueError("response_mask has NaN: pass nonzero for the tokens of the loss and zero for all others.")
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"student_logits have a vocabulary of {student.shape[-1]}, {teacher_name} of {teacher.shape[-1]}: both "
            "must share one tokenizer; if only the padding differs, cut both to the tokenizer's length."
        )
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        if logits.shape[:2] != response_mask.shape:
            raise ValueError(
                f"{name} cover (batch, tokens) = {tuple(logits.shape[:2])}, response_mask "
                f"{tuple(response_mask.shape)}: pass the logits that predict the response tokens, one position per "
                "entry of the mask."
            )
    if teacher.device != student.device:
        raise ValueError(
            f"{teacher_name} are on {teacher.device}, student_logits on {student.device}: "
            "move the teacher's to the student's device."
        )


def _require_rl_input(name: str, value: Any, response_mask: torch.Tensor) -> None:
    if not isinstance(value, torch.Tensor):
        raise ValueError(
            f"{name} is {'None' if value is None else f'a {type(value).__name__}'}: the RL term of {HYBRID} needs a "
            f"(batch, tokens) tensor; without an RL term use {PURE}."
        )
    if value.shape != response_mask.shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, response_mask {tuple(response_mask.shape)}: "
            "pass one value per response token, (batch, tokens)."
        )
    if value.device != response_mask.device:
        raise ValueError(f"{name} is on {value.device}, response_mask on {response_mask.device}: move one of them.")


def _actor_config(config: Any) -> ActorConfig:
    """The actor config that VERL's own losses read: `config`, or VERL's defaults overridden by the keys in `config`."""
    if isinstance(config, ActorConfig):
        return config
    config = config or {}
    if config.get("_target_", None):
        return omega_conf_to_dataclass(config)
    required = {"strategy": "fsdp", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 1}
    policy_loss = PolicyLossConfig(**_known_keys(PolicyLossConfig, policy_loss_section(config)))
    return ActorConfig(**required | _known_keys(ActorConfig, config) | {"policy_loss": policy_loss})


def _known_keys(config_class: type, config: Mapping) -> dict[str, Any]:
    names = field_names(config_class)
    return {key: config[key] for key in config if key in names}
