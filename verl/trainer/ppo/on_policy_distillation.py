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
"""On-policy distillation as a policy loss.

Importing this module registers two policy losses:

- ``on_policy_distillation``: the divergence between student and teacher on the student's own tokens, nothing else;
- ``hybrid_rl_distillation``: ``hybrid_lambda_rl * RL + hybrid_lambda_distill * divergence``, where RL is any policy
  loss registered in VERL (``hybrid_rl_loss_mode``).

The divergences, their gradients and their sources are in ``verl/utils/divergence.py``. Like Agarwal et al.
(arXiv:2306.13649, sec. 3) the gradient is that of the divergence at the visited states; it is not taken through the
sampling of the tokens. This module turns divergences into losses: it reads the configuration, pairs up tokens, and
aggregates with VERL's ``agg_loss``.
"""

import difflib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Optional

import torch

from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, agg_loss, get_policy_loss_fn, register_policy_loss
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.divergence import (
    DIVERGENCES,
    DenseLogits,
    DivergenceSpec,
    LogitSource,
    TokenDivergence,
    token_divergence,
)
from verl.workers.config import ActorConfig, PolicyLossConfig

__all__ = [
    "HYBRID",
    "PURE",
    "DistillationLossConfig",
    "DistillationLossOutput",
    "HEADS",
    "HeadDivergence",
    "StudentLogits",
    "TeacherLogits",
    "compute_hybrid_rl_distillation_loss",
    "compute_on_policy_distillation_loss",
    "is_distillation_loss",
    "misspelt_key",
    "token_weights",
]

PURE = "on_policy_distillation"
HYBRID = "hybrid_rl_distillation"

# How a trainer gets the divergence: in the student's head from hidden states, or from the logits of a dense head.
HEADS = ("fused", "dense")


def is_distillation_loss(loss_mode: str) -> bool:
    """Whether `loss_mode` names one of the two losses of this module."""
    return loss_mode in (PURE, HYBRID)


# ----------------------------------------------------------------------------------------------------------------------
# configuration


@dataclass(frozen=True)
class DistillationLossConfig:
    """The keys of ``policy_loss`` that the two losses read.

    Args:
        distillation_type: "reverse_kl", "forward_kl", "gkd" or "skew_reverse_kl" (see verl/utils/divergence.py).
        distillation_beta: weight of the teacher in the mixture, in [0, 1]; used by "gkd" and "skew_reverse_kl".
        distillation_temperature: softmax temperature of both sides, positive and finite.
        hybrid_lambda_rl: weight of the RL term in the hybrid loss, not negative.
        hybrid_lambda_distill: weight of the divergence in the hybrid loss, not negative.
        hybrid_rl_loss_mode: the registered policy loss that is the RL term of the hybrid loss.
        distillation_head: read by VERL's trainer only. "fused": the student's head turns hidden states into
            divergences and never holds the logits; "dense": it makes the logits, and the loss compares them.
    """

    distillation_type: str = "reverse_kl"
    distillation_beta: float = 1.0
    distillation_temperature: float = 1.0
    hybrid_lambda_rl: float = 1.0
    hybrid_lambda_distill: float = 1.0
    hybrid_rl_loss_mode: str = "vanilla"
    distillation_head: str = "fused"

    def __post_init__(self):
        if self.distillation_type not in list(DIVERGENCES):  # a list, as what was given may not be hashable
            raise ValueError(
                f"distillation_type={self.distillation_type!r} is not a divergence: choose one of {list(DIVERGENCES)}."
            )
        for name in ("distillation_beta", "distillation_temperature", "hybrid_lambda_rl", "hybrid_lambda_distill"):
            _require_finite_number(name, getattr(self, name))
        if not 0.0 <= self.distillation_beta <= 1.0:
            raise ValueError(
                f"distillation_beta={self.distillation_beta} is outside [0, 1]: with distillation_type=gkd, "
                "0 is forward KL and 1 is reverse KL."
            )
        if self.distillation_temperature <= 0.0:
            raise ValueError(
                f"distillation_temperature={self.distillation_temperature} is not positive: "
                "1.0 compares the distributions as they are."
            )
        for name in ("hybrid_lambda_rl", "hybrid_lambda_distill"):
            if getattr(self, name) < 0.0:
                raise ValueError(f"{name}={getattr(self, name)} is negative: weights are 0 or more.")
        if self.hybrid_lambda_rl == 0.0 and self.hybrid_lambda_distill == 0.0:
            raise ValueError(
                "hybrid_lambda_rl=0 and hybrid_lambda_distill=0 leave nothing to train: give one of them a weight."
            )
        choices = [name for name in POLICY_LOSS_REGISTRY if not is_distillation_loss(name)]
        if self.hybrid_rl_loss_mode not in choices:
            raise ValueError(
                f"hybrid_rl_loss_mode={self.hybrid_rl_loss_mode!r} is no registered RL loss: choose one of {choices}."
            )
        if self.distillation_head not in list(HEADS):
            raise ValueError(f"distillation_head={self.distillation_head!r}: choose one of {list(HEADS)}.")

    @classmethod
    def from_config(cls, config: Any) -> "DistillationLossConfig":
        """Read None (all defaults), a flat mapping, a DictConfig, or an actor config with ``policy_loss`` inside.

        Keys of other owners are left alone; a key that is not theirs and looks like ours is refused.
        """
        section = _policy_loss_section(config)
        names = _field_names(cls)
        given = list(section)  # a VERL config raises AttributeError, not KeyError, on `in`
        for key in given:
            if nearest := misspelt_key(str(key)):
                raise ValueError(f"{key}={section[key]!r} is not a key of these losses: did you mean {nearest}?")
        if section is not config and (stray := [name for name in names if name in list(config or ())]):
            raise ValueError(f"{stray[0]}={config[stray[0]]!r} stands beside policy_loss: move it into policy_loss.")
        return cls(**{name: section[name] for name in names if name in given})

    @property
    def divergence(self) -> DivergenceSpec:
        return DivergenceSpec(self.distillation_type, self.distillation_beta, self.distillation_temperature)


@cache  # every loss call asks for every key of its configuration
def misspelt_key(key: str) -> Optional[str]:
    """The field of `DistillationLossConfig` that `key` stands for; None if it is one, or VERL's, or like none."""
    names = _field_names(DistillationLossConfig)
    if key in (*names, *_field_names(PolicyLossConfig), *_field_names(ActorConfig)):
        return None
    cutoff = 0.0 if key.startswith(("distil", "hybrid_")) else 0.8
    return next(iter(difflib.get_close_matches(key, names, n=1, cutoff=cutoff)), None)


def _field_names(config_class: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(config_class))


def _require_finite_number(name: str, value: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= sys.float_info.max:  # not math.isfinite, which huge integers overflow
        raise ValueError(f"{name}={value!r} is not a finite number: give it as a float, for example {name}=1.0.")


def _policy_loss_section(config: Any) -> Mapping:
    """The mapping that holds our keys: `config` itself, or its ``policy_loss`` where that is a mapping.

    In the flat dictionaries of the user guide ``policy_loss`` is the name of the loss, a string.
    """
    if config is None:
        return {}
    if not isinstance(config, Mapping):
        raise ValueError(
            f"config is a {type(config).__name__}: pass None, a dict, a DictConfig or VERL's ActorConfig instead."
        )
    section = config.get("policy_loss", None)
    return section if isinstance(section, Mapping) else config


def _actor_config(config: Any) -> ActorConfig:
    """The actor config that VERL's own losses read: `config`, or VERL's defaults overridden by the keys in `config`."""
    if isinstance(config, ActorConfig):
        return config
    config = config or {}
    if config.get("_target_", None):
        return omega_conf_to_dataclass(config)
    required = {"strategy": "fsdp", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 1}
    policy_loss = PolicyLossConfig(**_known_keys(PolicyLossConfig, _policy_loss_section(config)))
    return ActorConfig(**required | _known_keys(ActorConfig, config) | {"policy_loss": policy_loss})


def _known_keys(config_class: type, config: Mapping) -> dict[str, Any]:
    names = _field_names(config_class)
    return {key: config[key] for key in config if key in names}


def _global_batch_info(config: Any) -> dict[str, Any]:
    """dp_size, batch_num_tokens, global_batch_size, loss_scale_factor, where a trainer has put them."""
    return dict(config.get("global_batch_info", None) or {}) if isinstance(config, Mapping) else {}


# ----------------------------------------------------------------------------------------------------------------------
# inputs and outputs


@dataclass(frozen=True)
class StudentLogits:
    """Student logits packed as (total, V), with a place on the (batch, tokens) grid for each response position.

    A trainer that packs its sequences passes this where a custom training loop passes a (batch, tokens, V) tensor.

    Args:
        values: (total, V), any float dtype; carries the gradient.
        row: (batch, tokens) int64, the row of `values` that predicts the token; any number where nothing is predicted.
        scale: what `values` must be multiplied by to be logits (a trainer's sampling temperature).
    """

    values: torch.Tensor
    row: torch.Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int, int]:
        return *self.row.shape, self.values.shape[-1]


@dataclass(frozen=True)
class TeacherLogits:
    """Teacher logits from a `LogitSource` of rows, with a place on the (batch, tokens) grid for each.

    They need never exist as a whole: a `LinearLogits` projects hidden states chunk by chunk.

    Args:
        source: rows (total, V).
        row: (batch, tokens) int64, the row of `source` for each position; any number where there is none.
    """

    source: LogitSource
    row: torch.Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        return *self.row.shape, self.source.shape[-1]


@dataclass(frozen=True)
class HeadDivergence:
    """What the student's head has computed already, passed as ``student_logits`` by a trainer that has no logits.

    Args:
        tokens: of the response tokens, in the order of ``response_mask``'s nonzero entries.
        loss: sum_i w_i D_i with its graph, where w_i are the `token_weights`; None where `tokens.divergence` has one.
    """

    tokens: TokenDivergence
    loss: Optional[torch.Tensor] = None


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


def _row_grid(shape: torch.Size, device: torch.device) -> torch.Tensor:
    return torch.arange(shape[0] * shape[1], device=device).view(shape[0], shape[1])


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


def _student(logits: Any) -> StudentLogits:
    if isinstance(logits, StudentLogits):
        return logits
    dense = _dense("student_logits", logits)
    return StudentLogits(dense.flatten(0, 1), _row_grid(dense.shape, dense.device))


def _teacher(logits: Any) -> TeacherLogits:
    if isinstance(logits, TeacherLogits):
        return logits
    dense = _dense("teacher_logits", logits)
    return TeacherLogits(DenseLogits(dense.detach().flatten(0, 1)), _row_grid(dense.shape, dense.device))


def _require_same_shape(student: StudentLogits, teacher: TeacherLogits, response_mask: Any) -> None:
    if not isinstance(response_mask, torch.Tensor) or response_mask.dim() != 2:
        given = tuple(response_mask.shape) if isinstance(response_mask, torch.Tensor) else type(response_mask).__name__
        raise ValueError(f"response_mask is {given}: pass a (batch, tokens) tensor, bool, int or float.")
    if response_mask.is_floating_point() and response_mask.isnan().any():
        raise ValueError("response_mask has NaN: pass nonzero for the tokens of the loss and zero for all others.")
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"student_logits have a vocabulary of {student.shape[-1]}, teacher_logits of {teacher.shape[-1]}: both "
            "must share one tokenizer; if only the padding differs, cut both to the tokenizer's length."
        )
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        if logits.shape[:2] != tuple(response_mask.shape):
            raise ValueError(
                f"{name} cover (batch, tokens) = {logits.shape[:2]}, response_mask {tuple(response_mask.shape)}: "
                "pass the logits that predict the response tokens, one position per entry of the mask."
            )
    if teacher.row.device != student.row.device:
        raise ValueError(
            f"teacher_logits are on {teacher.row.device}, student_logits on {student.row.device}: "
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


def _require_distributions(tokens: TokenDivergence) -> None:
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


# ----------------------------------------------------------------------------------------------------------------------
# the losses


def _response_divergence(
    student_logits: Any, teacher_logits: Any, response_mask: torch.Tensor, spec: DivergenceSpec
) -> tuple[TokenDivergence, torch.Tensor]:
    """Divergence of the n masked-in tokens, and the (batch, tokens) bool mask they come from."""
    if isinstance(student_logits, HeadDivergence):
        return student_logits.tokens, response_mask != 0
    for name, logits, origin in (
        ("teacher_logits", teacher_logits, "the teacher's logits on the student's sequences"),
        ("student_logits", student_logits, "the student's logits, with their graph"),
    ):
        if logits is None:
            raise ValueError(
                f"{name} is missing: pass {name}=, {origin}. In VERL's trainer they come from the teacher worker "
                "group: set teacher.model.path in a VERL with the on-policy-distillation patch applied."
            )
    student, teacher = _student(student_logits), _teacher(teacher_logits)
    _require_same_shape(student, teacher, response_mask)
    mask = response_mask.to(device=student.row.device) != 0
    tokens = token_divergence(
        student.values,
        student.row[mask],
        teacher.source,
        teacher.row[mask.to(teacher.row.device)],
        spec,
        student_scale=student.scale,
    )
    return tokens, mask


def _aggregate(divergence: torch.Tensor, mask: torch.Tensor, loss_agg_mode: str, config: Any) -> torch.Tensor:
    """Scatter the (n,) divergences back onto the (batch, tokens) grid and aggregate as VERL does."""
    if divergence.numel() == 0:  # a mean over nothing is NaN; keep the graph, so that backward gives zeros
        return divergence.sum()
    grid = divergence.new_zeros(mask.shape).masked_scatter(mask, divergence)
    return agg_loss(loss_mat=grid, loss_mask=mask, loss_agg_mode=loss_agg_mode, **_global_batch_info(config))


def token_weights(response_mask: torch.Tensor, loss_agg_mode: str, config: Any) -> torch.Tensor:
    """What `loss_agg_mode` multiplies each response token's divergence by, before any is known.

    VERL's `agg_loss` is linear in the tokens' losses, so its gradient is their weights.

    Args:
        response_mask: (batch, tokens); nonzero marks the n response tokens.
        loss_agg_mode, config: as the losses take them.

    Returns:
        (n,) float32, in the order of the mask's nonzero entries.
    """
    mask = response_mask != 0
    with torch.enable_grad():
        divergence = torch.ones(int(mask.sum()), device=mask.device, requires_grad=True)
        return torch.autograd.grad(_aggregate(divergence, mask, loss_agg_mode, config), divergence)[0]


def _distillation_loss(
    student_logits: Any, tokens: TokenDivergence, mask: torch.Tensor, loss_agg_mode: str, config: Any
) -> torch.Tensor:
    aggregated = _aggregate(tokens.divergence, mask, loss_agg_mode, config)
    if not isinstance(student_logits, HeadDivergence) or student_logits.loss is None:
        return aggregated
    if not torch.allclose(student_logits.loss, aggregated, rtol=1e-3, atol=1e-5):
        raise ValueError(
            f"the head's loss is {student_logits.loss.item()}, loss_agg_mode={loss_agg_mode} of its tokens is "
            f"{aggregated.item()}: this mode is not a weighted sum over tokens; set distillation_head=dense."
        )
    return student_logits.loss


def _distillation_metrics(tokens: TokenDivergence, loss: torch.Tensor) -> dict[str, float]:
    """Means over response tokens, in nats; zeros when there are none. `loss` as aggregated, before any weight."""
    names = ("reverse_kl", "forward_kl", "student_entropy", "teacher_entropy", "top1_agreement")
    columns = torch.stack([getattr(tokens, name) for name in names])  # (5, n)
    means = columns.sum(-1) / max(columns.shape[-1], 1)
    values = torch.cat((loss.detach().reshape(1).to(means.dtype), means)).tolist()
    keys = ("loss", "kl", "forward_kl", "student_entropy", "teacher_entropy", "top1_agreement")
    return {f"distillation/{key}": value for key, value in zip(keys, values, strict=True)}


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
) -> DistillationLossOutput:
    """The divergence between student and teacher on the student's tokens.

    Args:
        old_log_prob, log_prob, advantages, rollout_is_weights: not used; may be None.
        response_mask: (batch, tokens), bool, int or float; nonzero marks the tokens of the loss.
        loss_agg_mode: any mode of VERL's `agg_loss`.
        config: None, a flat mapping, a DictConfig or VERL's ActorConfig; see `DistillationLossConfig`.
        teacher_logits: (batch, tokens, vocab), float32, bfloat16 or float16, or an object with such ``.logits``;
            position t holds the logits that predict response token t. Never receives a gradient.
        student_logits: like `teacher_logits`; carries the gradient. Trainers without (batch, tokens, vocab) tensors
            pass `StudentLogits` and `TeacherLogits`, or a `HeadDivergence` and no teacher_logits.

    Returns:
        (loss, pg_clipfrac = 0, kl, pg_clipfrac_lower = 0), scalars in nats, and ``.metrics``. With no response token
        the loss, its gradient and every metric are zero.

    Raises:
        ValueError: missing logits, shapes or vocabularies that do not match, a bad configuration, or logits of a
            response token that are no distribution: NaN, +inf, or -inf throughout.
    """
    settings = DistillationLossConfig.from_config(config)
    tokens, mask = _response_divergence(student_logits, teacher_logits, response_mask, settings.divergence)
    _require_distributions(tokens)
    loss = _distillation_loss(student_logits, tokens, mask, loss_agg_mode, config)
    metrics = _distillation_metrics(tokens, loss)
    zero = loss.new_zeros(())
    return DistillationLossOutput(loss, zero, loss.new_tensor(metrics["distillation/kl"]), zero, metrics=metrics)


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
) -> DistillationLossOutput:
    """``hybrid_lambda_rl * RL + hybrid_lambda_distill * divergence``.

    The RL term is the policy loss registered as ``hybrid_rl_loss_mode``, called with VERL's own arguments;
    `rollout_is_weights` go to it and not to the divergence. A weight of zero drops its term altogether, so that
    the other is reproduced exactly.

    Args:
        old_log_prob, log_prob, advantages: (batch, tokens), as VERL's policy losses take them.
        Everything else as in `compute_on_policy_distillation_loss`.

    Returns:
        (loss, pg_clipfrac, kl, pg_clipfrac_lower), with the RL term's own metrics among ``.metrics``.

    Raises:
        ValueError: as in `compute_on_policy_distillation_loss`, and when the RL term's inputs are missing.
    """
    settings = DistillationLossConfig.from_config(config)
    tokens, mask = _response_divergence(student_logits, teacher_logits, response_mask, settings.divergence)
    for name, value in (("old_log_prob", old_log_prob), ("log_prob", log_prob), ("advantages", advantages)):
        _require_rl_input(name, value, response_mask)
    if rollout_is_weights is not None:
        _require_rl_input("rollout_is_weights", rollout_is_weights, response_mask)
    if settings.hybrid_lambda_distill != 0.0:
        _require_distributions(tokens)
    distill_loss = _distillation_loss(student_logits, tokens, mask, loss_agg_mode, config)
    is_empty = not mask.any()
    rl_loss, rl_metrics = get_policy_loss_fn(settings.hybrid_rl_loss_mode)(
        old_log_prob=old_log_prob,
        log_prob=log_prob,
        advantages=advantages,
        response_mask=torch.ones_like(response_mask) if is_empty else response_mask,
        loss_agg_mode=loss_agg_mode,
        config=_actor_config(config),
        rollout_is_weights=rollout_is_weights,
    )
    if is_empty:
        # Of no tokens VERL's losses are NaN or an error. Their metrics' names are wanted all the same: VERL combines
        # ranks only if each has counted the same metrics in every micro-batch.
        rl_loss, rl_metrics = distill_loss, {name: 0.0 for name in rl_metrics}
    weighted = ((settings.hybrid_lambda_rl, rl_loss), (settings.hybrid_lambda_distill, distill_loss))
    loss = sum(weight * term for weight, term in weighted if weight != 0.0)
    metrics = _distillation_metrics(tokens, distill_loss) | rl_metrics
    pg_clipfrac, kl, pg_clipfrac_lower = (
        loss.new_tensor(metrics.get(key, 0.0))
        for key in ("actor/pg_clipfrac", "distillation/kl", "actor/pg_clipfrac_lower")
    )
    return DistillationLossOutput(loss, pg_clipfrac, kl, pg_clipfrac_lower, metrics=metrics)
