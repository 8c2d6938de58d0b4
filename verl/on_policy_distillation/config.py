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
"""The configuration of on-policy distillation: one frozen object per group. Every default stands here.

- `DistillationLossConfig`: the keys of ``actor.policy_loss`` that the two losses read.
- `TeacherConfig`: the ``teacher`` group of VERL's trainer.
"""

import difflib
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Optional, TypeGuard

from omegaconf import DictConfig, OmegaConf

from verl.base_config import BaseConfig
from verl.on_policy_distillation.divergence import DIVERGENCES, DivergenceSpec
from verl.on_policy_distillation.routing import TEACHER_KEYS
from verl.on_policy_distillation.token_choice import TOKEN_SELECTIONS, TokenChoice
from verl.workers.config import ActorConfig, FSDPEngineConfig, HFModelConfig, PolicyLossConfig

__all__ = [
    "HYBRID",
    "PURE",
    "RL_TERM",
    "SELF",
    "TEACHER_PAYLOADS",
    "TEACHER_VOCABS",
    "TEACHER_WEIGHTS",
    "DistillationLossConfig",
    "DistillationPolicyLossConfig",
    "TeacherConfig",
    "is_distillation_loss",
    "misspelt_loss_key",
    "misspelt_teacher_key",
    "teacher_groups",
    "teacher_tokens",
]

logger = logging.getLogger(__name__)

PURE = "on_policy_distillation"
HYBRID = "hybrid_rl_distillation"
RL_TERM = "hybrid_rl_distillation_rl_term"  # what VERL's `ppo_loss` calls in hybrid mode; no loss for users to name

TEACHER_PAYLOADS = ("hidden_states", "logits", "topk")
TEACHER_VOCABS = ("same", "shared")
TEACHER_WEIGHTS = ("offloaded", "resident")

_ACTOR_TOKENS = "actor_rollout_ref.actor.ppo_max_token_len_per_gpu"
# A teacher's weights come from host memory in every forward, so few large forwards are faster than many small ones; and
# without a backward a token takes a fraction of the actor's memory.
_TEACHER_TOKENS_PER_ACTOR_TOKEN = 4

_LAMBDA_SCHEDULES = ("constant", "linear")

SELF = "self"  # the path of a teacher that is the student

# What a beta without a type chooses, and the beta that a type without a mixture goes with.
_TYPE_OF_BETA = {1.0: "reverse_kl", 0.0: "forward_kl"}
_BETA_OF_TYPE = {"reverse_kl": 1.0, "forward_kl": 0.0}
_MIXTURES = ("gkd", "skew_reverse_kl")

# Keys that are not near ours in spelling, and what was meant.
_MEANT = {"temperature": "distillation_temperature"}
_GONE = {
    "distillation_head": "the trainer has one path now, the student's head (the former `fused`): leave the key out. "
    "A trainer of one's own passes student_logits and teacher_logits"
}


def is_distillation_loss(loss_mode: str) -> bool:
    """Whether `loss_mode` names one of the two losses."""
    return loss_mode in (PURE, HYBRID)


@dataclass
class DistillationLossConfig(BaseConfig):
    """The keys of ``policy_loss`` that the two losses read.

    What they mean is said in verl/trainer/config/policy_loss/on_policy_distillation.yaml. Every value is checked in
    both losses, also where it has no effect.

    Refused:
        distillation_type: any other name.
        distillation_beta: not a finite number; outside [0, 1]; other than 1 with `reverse_kl` or 0 with `forward_kl`.
            In the trainer also 0 with `skew_reverse_kl`, which is zero everywhere.
        distillation_temperature: not a finite number above 0.
        distillation_entropy_threshold: not a finite number of 0 or more; together with a `distillation_beta`, or with a
            type other than `reverse_kl`. In the trainer also one that no entropy over the vocabulary (with
            `teacher.payload=topk`, over k + 1 outcomes) exceeds.
        distillation_token_selection: none of the four; a selection without a `distillation_keep_fraction`.
        distillation_keep_fraction: not a finite number in (0, 1]; a fraction without a selection.
        distillation_loss_max_clamp: not a finite number above 0.
        hybrid_lambda_rl: not a finite number of 0 or more; both weights 0.
        hybrid_lambda_distill: not a finite number of 0 or more; both weights 0.
        hybrid_lambda_distill_schedule: neither of the two; `linear` with a weight of 0 on either term. In the trainer
            also `linear` with `on_policy_distillation`.
        hybrid_lambda_distill_steps: with `linear`, no whole number above 0; with `constant`, any number.
        hybrid_rl_loss_mode: a name that is not registered; one of the two distillation losses.
    """

    distillation_type: Optional[str] = None
    distillation_beta: Optional[float] = None
    distillation_temperature: float = 1.0
    distillation_entropy_threshold: Optional[float] = None
    distillation_token_selection: str = "all"
    distillation_keep_fraction: Optional[float] = None
    distillation_loss_max_clamp: Optional[float] = None
    hybrid_lambda_rl: float = 1.0
    hybrid_lambda_distill: float = 1.0
    hybrid_lambda_distill_schedule: str = "constant"
    hybrid_lambda_distill_steps: Optional[int] = None
    hybrid_rl_loss_mode: str = "vanilla"

    def __post_init__(self):
        _check_type_and_beta(self.distillation_type, self.distillation_beta)
        for name in ("distillation_temperature", "hybrid_lambda_rl", "hybrid_lambda_distill"):
            _require_finite_number(name, getattr(self, name))
        if self.distillation_temperature <= 0.0:
            raise ValueError(
                f"distillation_temperature={self.distillation_temperature} is not positive: "
                "1.0 compares the distributions as they are."
            )
        _check_entropy_threshold(self)
        _check_token_choice(self)
        for name in ("hybrid_lambda_rl", "hybrid_lambda_distill"):
            if getattr(self, name) < 0.0:
                raise ValueError(f"{name}={getattr(self, name)} is negative: weights are 0 or more.")
        if self.hybrid_lambda_rl == 0.0 and self.hybrid_lambda_distill == 0.0:
            raise ValueError(
                "hybrid_lambda_rl=0 and hybrid_lambda_distill=0 leave nothing to train: give one of them a weight."
            )
        _check_schedule(self)
        choices = _rl_losses()
        if self.hybrid_rl_loss_mode not in choices:
            raise ValueError(
                f"hybrid_rl_loss_mode={self.hybrid_rl_loss_mode!r} is no registered RL loss: choose one of {choices}."
            )

    @classmethod
    def from_config(cls, config: Any) -> "DistillationLossConfig":
        """Read None (all defaults), a flat mapping, a DictConfig, or an actor config with ``policy_loss`` inside.

        What has been parsed already is returned as it is. Keys of other owners are left alone; a key that is not
        theirs and looks like ours is refused.
        """
        section = policy_loss_section(config)
        if isinstance(section, DistillationLossConfig):
            return section
        names = field_names(cls)
        given = list(section)  # a VERL config raises AttributeError, not KeyError, on `in`
        for key in given:
            # In a flat mapping, with ours beside it, it is somebody else's.
            if section is not config or _MEANT.get(str(key)) not in given:
                refuse_unknown_loss_key(str(key), section[key])
        if section is not config and (stray := [name for name in names if name in list(config or ())]):
            raise ValueError(f"{stray[0]}={config[stray[0]]!r} stands beside policy_loss: move it into policy_loss.")
        return cls(**{name: section[name] for name in names if name in given})

    @property
    def divergence(self) -> DivergenceSpec:
        """Which divergence, with the documented meaning of a type or a beta that is not given."""
        if (threshold := self.distillation_entropy_threshold) is not None:
            temperature = float(self.distillation_temperature)
            return DivergenceSpec(temperature=temperature, entropy_threshold=float(threshold))
        kind, beta = self.distillation_type, self.distillation_beta
        if kind is None:
            kind = "reverse_kl" if beta is None else _TYPE_OF_BETA.get(float(beta), "gkd")
        if beta is None:
            beta = _BETA_OF_TYPE.get(kind, 1.0)
            if kind in _MIXTURES:
                _warn_of_default_beta(kind)
        return DivergenceSpec(kind, float(beta), float(self.distillation_temperature))

    def lambda_distill(self, global_steps: Optional[int]) -> float:
        """Weight of the divergence in the hybrid loss at training step `global_steps`, which is 1 for the first.

        With a linear schedule of N steps it is ``hybrid_lambda_distill`` * max(0, 1 - (global_steps - 1) / N): whole at
        the first step, a last N-th at step N, and 0 from step N + 1 on. It depends on the step alone, so a run that
        resumes goes on where it was.

        Raises:
            ValueError: the schedule needs the step, and `global_steps` is none.
        """
        steps = self.hybrid_lambda_distill_steps
        if steps is None:  # constant
            return float(self.hybrid_lambda_distill)
        if not _is_whole_from_one(global_steps):
            raise ValueError(
                f"hybrid_lambda_distill_schedule={self.hybrid_lambda_distill_schedule} needs the number of the "
                f"training step, and global_steps={global_steps!r}: pass global_steps= to the loss, a whole number "
                "that is 1 for the first step."
            )
        return self.hybrid_lambda_distill * max(0.0, 1.0 - (global_steps - 1) / steps)

    @property
    def token_choice(self) -> TokenChoice:
        """Which tokens train, and the clamp."""
        fraction, clamp = self.distillation_keep_fraction, self.distillation_loss_max_clamp
        return TokenChoice(
            self.distillation_token_selection,
            1.0 if fraction is None else float(fraction),
            None if clamp is None else float(clamp),
        )


@dataclass
class DistillationPolicyLossConfig(DistillationLossConfig, PolicyLossConfig):
    """VERL's ``policy_loss`` group with the keys of the two losses."""


@dataclass
class TeacherConfig(BaseConfig):
    """The teachers, which score the student's sequences once per batch.

    What the keys mean is said in verl/trainer/config/teacher/teacher.yaml. What is refused here, checks.py refuses when
    the trainer starts.

    Refused:
        model.path: none, with one of the two losses; any, with another loss; a folder that does not exist or is no
            Hugging Face checkpoint; a weight file that is truncated, missing or unreadable; fewer logits than its
            tokenizer has ids; a context (`max_position_embeddings`, and the factor of `rope_scaling`) shorter than the
            longest prompt and response; an output projection under an unknown name, where `payload` is not `logits`.
            `self`: with `payload=logits`; for more than one teacher; with FSDP1, unless it is the base of a LoRA.
        models: a key that is none of a model's, `weight` or `route`; weights that are negative, or all 0 on a route; a
            `route` without `routing_key`; a `weight` with `weights_key`; a `model.path` that no entry uses.
        routing_key: without `models`; with `weights_key`; no field of the training data; a row that no teacher serves.
        weights_key: without `models`; with `routing_key`; no field of the training data; a row whose weights are none.
        ema: outside (0, 1); with `refresh_freq`; without `path=self`; where the actor's `model_dtype` has 16 bits.
        refresh_freq: no whole number above 0; with `ema`; without `path=self`.
        prompt_key: no field of the training data; a row that holds neither a string nor chat messages, or is too long
            with `data.truncation=error`; images, video or audio; a rollout that is several samples.
        max_prompt_length: without `prompt_key`; no whole number above 0.
        vocab: neither of the two; `same` with tokenizers that differ in any token; `shared` where an id that both have
            is another text, or they share none.
        fsdp_config.strategy: other than `fsdp` and `fsdp2`.
        fsdp_config.forward_only: false.
        fsdp_config.model_dtype: no dtype.
        payload: none of the three.
        payload_dtype: no dtype.
        topk: without `payload=topk`; with it, no whole number above 0, or more than there are entries.
        weights: neither of the two; `resident` where the student is the only teacher, or with the `param_offload` or
            `offload_policy` of `fsdp_config`.
        use_dynamic_bsz: neither true nor false.
        micro_batch_size_per_gpu: with `use_dynamic_bsz`; without it, no whole number above 0, or one that does not
            divide a device's sequences.
        max_token_len_per_gpu: without `use_dynamic_bsz`; with it, less than the longest prompt and response.
        dump_freq: no whole number.
        dump_dir: none, with a `dump_freq` above 0.
        dump_size: no whole number above 0.
    """

    model: HFModelConfig = field(default_factory=BaseConfig)
    models: dict[str, Any] = field(default_factory=dict)
    routing_key: Optional[str] = None
    weights_key: Optional[str] = None
    ema: Optional[float] = None
    refresh_freq: Optional[int] = None
    prompt_key: Optional[str] = None
    max_prompt_length: Optional[int] = None
    vocab: str = "same"
    fsdp_config: FSDPEngineConfig = field(default_factory=FSDPEngineConfig)
    payload: str = "hidden_states"
    payload_dtype: str = "bfloat16"
    topk: Optional[int] = None
    weights: str = "offloaded"
    use_dynamic_bsz: bool = True
    micro_batch_size_per_gpu: Optional[int] = None
    max_token_len_per_gpu: Optional[int] = None
    dump_freq: int = -1
    dump_dir: Optional[str] = None
    dump_size: int = 16


def teacher_groups(teacher: DictConfig) -> dict[str, DictConfig]:
    """The ``teacher`` group of each teacher by itself, with its own ``model``, by name."""
    models = teacher.get("models", None) or {}
    groups = {}
    for name, own in models.items():
        group = OmegaConf.create(OmegaConf.to_container(teacher, resolve=True))
        settings = {key: value for key, value in own.items() if key not in TEACHER_KEYS}
        group.model = OmegaConf.merge(group.model, OmegaConf.create(settings))
        group.models = {}
        groups[str(name)] = group
    return groups or {"teacher": teacher}


def teacher_tokens(config: DictConfig) -> tuple[str, Any]:
    """How many tokens a teacher's forward takes with dynamic batching, and the key that says so, as errors name it.

    Args:
        config: the trainer's configuration, with its ``actor_rollout_ref`` and ``teacher``.
    """
    key, tokens = "teacher.max_token_len_per_gpu", config.teacher.max_token_len_per_gpu
    if tokens is None and (actor_tokens := OmegaConf.select(config, _ACTOR_TOKENS)) is not None:
        factor = _TEACHER_TOKENS_PER_ACTOR_TOKEN
        return f"{key} ({factor} * {_ACTOR_TOKENS}={actor_tokens})", factor * actor_tokens
    return key, tokens


def field_names(config_class: type) -> tuple[str, ...]:
    """The keys of a group, without VERL's ``_target_``."""
    return tuple(item.name for item in fields(config_class) if item.name != "_target_")


def policy_loss_section(config: Any) -> Mapping:
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


@cache  # a loss of a custom trainer asks for every key of its configuration at every call
def misspelt_loss_key(key: str) -> Optional[str]:
    """The field of `DistillationLossConfig` that `key` stands for; None if it is one, or VERL's, or like none."""
    names = field_names(DistillationLossConfig)
    if key in (*names, *field_names(PolicyLossConfig), *field_names(ActorConfig)):
        return None
    if key in _MEANT:
        return _MEANT[key]
    cutoff = 0.0 if key.startswith(("distil", "hybrid_")) else 0.8
    return next(iter(difflib.get_close_matches(key, names, n=1, cutoff=cutoff)), None)


def misspelt_teacher_key(key: str) -> Optional[str]:
    """The nearest key of the ``teacher`` group; None if `key` is one."""
    names = field_names(TeacherConfig)
    return None if key in (*names, "_target_") else difflib.get_close_matches(key, names, n=1, cutoff=0.0)[0]


def refuse_unknown_loss_key(key: str, value: Any) -> None:
    """Raise ValueError for a key of ``policy_loss`` that is gone, or that looks like ours and is not."""
    if key in _GONE:
        raise ValueError(f"{key}={value!r} is not a key any more: {_GONE[key]}.")
    if nearest := misspelt_loss_key(key):
        raise ValueError(f"{key}={value!r} is not a key of these losses: did you mean {nearest}?")


def _check_type_and_beta(kind: Any, beta: Any) -> None:
    if kind is not None and kind not in list(DIVERGENCES):  # a list, as what was given may not be hashable
        raise ValueError(f"distillation_type={kind!r} is not a divergence: choose one of {list(DIVERGENCES)}.")
    if beta is None:
        return
    _require_finite_number("distillation_beta", beta)
    if not 0.0 <= beta <= 1.0:
        raise ValueError(
            f"distillation_beta={beta} is outside [0, 1]: with distillation_type=gkd, "
            "0 is forward KL and 1 is reverse KL."
        )
    if kind in _BETA_OF_TYPE and beta != _BETA_OF_TYPE[kind]:
        raise ValueError(
            f"distillation_type={kind} and distillation_beta={beta} contradict each other: {kind} is beta "
            f"{_BETA_OF_TYPE[kind]}. Leave one of them out, or set distillation_type=gkd to mix."
        )


def _check_entropy_threshold(config: DistillationLossConfig) -> None:
    threshold = config.distillation_entropy_threshold
    if threshold is None:
        return
    _require_finite_number("distillation_entropy_threshold", threshold)
    if threshold < 0.0:
        raise ValueError(
            f"distillation_entropy_threshold={threshold} is negative, and an entropy is 0 or more: set it in nats, or "
            "set distillation_type=forward_kl alone, which is forward KL everywhere."
        )
    for name, agrees in (("distillation_type", (None, "reverse_kl")), ("distillation_beta", (None,))):
        if (value := getattr(config, name)) not in agrees:
            raise ValueError(
                f"{name}={value} and distillation_entropy_threshold={threshold} contradict each other: the threshold "
                "switches between reverse_kl and forward_kl, token by token. Leave one of them out."
            )


def _check_token_choice(config: DistillationLossConfig) -> None:
    selection, fraction = config.distillation_token_selection, config.distillation_keep_fraction
    if selection not in TOKEN_SELECTIONS:
        raise ValueError(
            f"distillation_token_selection={selection!r} is not a selection: choose one of {list(TOKEN_SELECTIONS)}."
        )
    if fraction is not None:
        _require_finite_number("distillation_keep_fraction", fraction)
        if not 0.0 < fraction <= 1.0:
            raise ValueError(
                f"distillation_keep_fraction={fraction} is outside (0, 1]: 0.5 keeps half of each sequence's tokens."
            )
    if (selection == "all") != (fraction is None):
        raise ValueError(
            f"distillation_token_selection={selection} with distillation_keep_fraction={fraction}: set both, or leave "
            f"both out. The selections are {list(TOKEN_SELECTIONS[1:])}."
        )
    if (clamp := config.distillation_loss_max_clamp) is not None:
        _require_finite_number("distillation_loss_max_clamp", clamp)
        if clamp <= 0.0:
            raise ValueError(
                f"distillation_loss_max_clamp={clamp} is not positive and leaves no token a gradient: set it in nats, "
                "such as 10.0, or to null for no clamp."
            )


def _check_schedule(config: DistillationLossConfig) -> None:
    schedule, steps = config.hybrid_lambda_distill_schedule, config.hybrid_lambda_distill_steps
    if schedule not in _LAMBDA_SCHEDULES:
        raise ValueError(
            f"hybrid_lambda_distill_schedule={schedule!r} is not a schedule: choose one of {list(_LAMBDA_SCHEDULES)}."
        )
    if schedule == "constant":
        if steps is not None:
            raise ValueError(
                f"hybrid_lambda_distill_steps={steps} has no effect with hybrid_lambda_distill_schedule={schedule}: "
                "set hybrid_lambda_distill_schedule=linear, or leave it out."
            )
        return
    if not _is_whole_from_one(steps):
        raise ValueError(
            f"hybrid_lambda_distill_steps={steps!r} with hybrid_lambda_distill_schedule={schedule}: set it to a whole "
            "number, 1 or more, the steps in which hybrid_lambda_distill falls to 0."
        )
    if config.hybrid_lambda_distill == 0.0:
        raise ValueError(
            f"hybrid_lambda_distill={config.hybrid_lambda_distill} with hybrid_lambda_distill_schedule={schedule} has "
            "nothing to fall from: set a weight above 0, or leave the schedule out."
        )
    if config.hybrid_lambda_rl == 0.0:
        raise ValueError(
            f"hybrid_lambda_rl={config.hybrid_lambda_rl} with hybrid_lambda_distill_schedule={schedule} leaves nothing "
            f"to train after step {steps}: set a weight above 0, or leave the schedule out."
        )


def _is_whole_from_one(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@cache  # once a process
def _warn_of_default_beta(kind: str) -> None:
    logger.warning(
        "distillation_type=%s without distillation_beta: the documented default 1.0 is used, which is reverse KL. "
        "Set distillation_beta between 0 and 1 to mix.",
        kind,
    )


def _rl_losses() -> list[str]:
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY  # imports this module when it is done

    return [name for name in POLICY_LOSS_REGISTRY if name not in (PURE, HYBRID, RL_TERM)]


def _require_finite_number(name: str, value: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= sys.float_info.max:  # not math.isfinite, which huge integers overflow
        raise ValueError(f"{name}={value!r} is not a finite number: give it as a float, for example {name}=1.0.")
