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
"""Checks the trainer's configuration and settles what follows from it, in the driver, before any Ray actor starts.

Every error names the key, its value and the fix.
"""

import difflib
import functools
import logging
import math
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from packaging.version import Version

from verl.on_policy_distillation.config import (
    HYBRID,
    PURE,
    RL_TERM,
    SELF,
    TEACHER_PAYLOADS,
    TEACHER_VOCABS,
    TEACHER_WEIGHTS,
    DistillationLossConfig,
    is_distillation_loss,
    misspelt_loss_key,
    misspelt_teacher_key,
    teacher_groups,
    teacher_tokens,
)
from verl.on_policy_distillation.memory import warn_of_memory
from verl.on_policy_distillation.output_projection import find_output_projection, require_readable
from verl.on_policy_distillation.routing import TEACHER_KEYS, Routes
from verl.on_policy_distillation.teacher_prompts import TRUNCATIONS, PromptSettings, TeacherPrompts
from verl.on_policy_distillation.vocabulary import difference, shared_ids
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
from verl.utils.fs import copy_to_local
from verl.utils.torch_dtypes import PrecisionType

__all__ = [
    "MINIMUM_TORCH",
    "loss_mode",
    "prepare",
    "refuse_misspelt_overrides",
    "require_one_prompt",
    "require_prompts",
    "require_routes",
    "require_torch",
    "validate",
    "warn_of_unfinished_schedule",
]

logger = logging.getLogger(__name__)

MINIMUM_TORCH = "2.8"

_POLICY_LOSS = "actor_rollout_ref.actor.policy_loss"


def loss_mode(config: DictConfig) -> str:
    """The name of the actor's policy loss."""
    # Trainers without this key share VERL's checks, so it may be absent.
    return OmegaConf.select(config, f"{_POLICY_LOSS}.loss_mode", default="vanilla")


def prepare(config: DictConfig) -> None:
    """Check the trainer's configuration and settle, in place, what the loss decides; nothing for other losses.

    The divergence that type and beta choose is written out, where it is one for all tokens; so is the number of tokens
    in a teacher's forward. The pure loss has no critic, no critic warm-up and no reference policy, and needs no reward.

    Raises:
        ValueError: naming the key, the value and the fix.
    """
    validate(config)
    if not is_distillation_loss(loss_mode(config)):
        return
    if config.teacher.use_dynamic_bsz:
        _, config.teacher.max_token_len_per_gpu = teacher_tokens(config)
    policy_loss = config.actor_rollout_ref.actor.policy_loss
    divergence = DistillationLossConfig.from_config(config.actor_rollout_ref.actor).divergence
    if divergence.entropy_threshold is None:
        with open_dict(policy_loss):
            policy_loss.distillation_type, policy_loss.distillation_beta = divergence.distillation_type, divergence.beta
    if loss_mode(config) != PURE:
        return
    if config.trainer.critic_warmup > 0:
        logger.warning("trainer.critic_warmup=%s is taken as 0: %s has no critic.", config.trainer.critic_warmup, PURE)
    with open_dict(config):
        config.critic.enable = False
        config.trainer.critic_warmup = 0
        _make_reward_optional(config)


def require_torch(found: str = torch.__version__) -> None:
    """Raise RuntimeError if the torch that runs is older than `MINIMUM_TORCH`."""
    if Version(found).release < Version(MINIMUM_TORCH).release:  # 2.8.0a0 of a vendor's build has what 2.8 has
        raise RuntimeError(
            f"torch {found} is older than {MINIMUM_TORCH}, with which products of 16-bit matrices come in float32 "
            f"(torch.mm with out_dtype): install torch>={MINIMUM_TORCH}."
        )


def validate(config: DictConfig) -> None:
    """Check the trainer's configuration; does nothing when neither distillation loss nor a teacher is named.

    Raises:
        ValueError: naming the key, the value and the fix.
        RuntimeError: torch is too old.
    """
    if "teachers" in config:
        raise ValueError(f"teachers={config.teachers}: there is no teachers group, did you mean teacher.model.path?")
    _check_spelling(loss_mode(config))
    if not is_distillation_loss(loss_mode(config)):
        for key, value in _teachers_named(config).items():
            raise ValueError(
                f"{key}={value} has no effect with {_POLICY_LOSS}.loss_mode="
                f"{loss_mode(config)}: set loss_mode={PURE} or {HYBRID}, or leave {key} out."
            )
        return
    require_torch()
    _check_trainer(config)
    _check_student(config)
    _check_loss(config)
    _check_teacher(config)


def _teachers_named(config: DictConfig) -> dict[str, Any]:
    """The keys that say something of teachers, and their values."""
    keys = ("model.path", "routing_key", "weights_key", "ema", "refresh_freq", "topk")
    named = {f"teacher.{key}": OmegaConf.select(config, f"teacher.{key}") for key in keys}
    for name, model in (OmegaConf.select(config, "teacher.models") or {}).items():
        named[f"teacher.models.{name}"] = model
    return {key: value for key, value in named.items() if value is not None}


def refuse_misspelt_overrides(arguments: list[str]) -> None:
    """Look for slips in our keys in the overrides of the command line.

    Hydra refuses an unknown key too, before VERL sees any configuration, but does not say which one was meant.

    Raises:
        ValueError: naming the override and the nearest key.
    """
    has_own_yaml = any(re.match("-c[pnd]|--config-(path|name|dir)", argument) for argument in arguments)
    for argument in arguments:
        key = argument.partition("=")[0].lstrip("+~")
        parent, _, name = key.rpartition(".")
        nearest = None
        if parent == _POLICY_LOSS:
            nearest = misspelt_loss_key(name)
        elif parent == "teacher":
            nearest = misspelt_teacher_key(name)
        elif key.startswith("teacher.models.") and not argument.startswith(("+", "~")) and not has_own_yaml:
            raise ValueError(f"{argument}: Hydra adds new keys with a plus: write +{argument}.")
        if nearest:
            raise ValueError(f"{argument}: there is no {name} in {parent}, did you mean {parent}.{nearest}?")
        if key.partition(".")[0] == "teachers":
            raise ValueError(f"{argument}: there is no teachers group, did you mean teacher.model.path?")


def _make_reward_optional(config: DictConfig) -> None:
    """Without a reward function of the user's, score what VERL can score and give the rest zero."""
    reward = config.reward
    uses_defaults = reward.reward_manager.source == "register" and reward.reward_manager.name == "naive"
    if reward.reward_model.enable or reward.custom_reward_function.path or not uses_defaults:
        return
    reward.reward_manager.source = "importlib"
    reward.reward_manager.name = "OptionalRewardManager"
    reward.reward_manager.module.path = "pkg://verl.on_policy_distillation.optional_reward"


def _refuse(config: DictConfig, key: str, bad: Any, fix: str) -> None:
    """Raise if `key` has the value `bad`."""
    value = OmegaConf.select(config, key)
    if value == bad:
        raise ValueError(f"{key}={value} does not go with policy_loss.loss_mode={loss_mode(config)}: {fix}")


def _check_spelling(name: str) -> None:
    """VERL looks the name up at the first update only; a slip in one of ours need not wait so long."""
    if name == RL_TERM:
        raise ValueError(f"{_POLICY_LOSS}.loss_mode={name} is a part of {HYBRID}: set loss_mode={HYBRID}.")
    nearest = difflib.get_close_matches(name, [PURE, HYBRID], n=1, cutoff=0.8)
    if nearest and name not in POLICY_LOSS_REGISTRY:
        raise ValueError(f"{_POLICY_LOSS}.loss_mode={name} is not registered: did you mean {nearest[0]}?")


def _check_trainer(config: DictConfig) -> None:
    _refuse(
        config,
        "distillation.enabled",
        True,
        "it is VERL's own top-k / sampled distillation. Choose one: distillation.enabled=False keeps the exact "
        "full-vocabulary loss, policy_loss.loss_mode=vanilla keeps VERL's.",
    )
    for name, model in (OmegaConf.select(config, "distillation.teacher_models") or {}).items():
        if model.get("model_path") is not None:
            raise ValueError(
                f"distillation.teacher_models.{name}.model_path={model.model_path} belongs to VERL's own distillation "
                f"and has no effect with {loss_mode(config)}: leave it out, and set teacher.model.path."
            )
    _refuse(config, "trainer.use_v1", False, "only the V1 trainer has a teacher; set trainer.use_v1=True.")
    mode = config.trainer.v1.trainer_mode
    if mode == "separate_async":
        raise ValueError(f"trainer.v1.trainer_mode={mode} is not supported with {loss_mode(config)}: set it to sync.")


def _check_student(config: DictConfig) -> None:
    actor = "actor_rollout_ref.actor"
    _check_engine(config, f"{actor}.strategy", f"{actor}.fsdp_config", "actor_rollout_ref.model")
    _require_no_sequence_parallelism(config, f"{actor}.ulysses_sequence_parallel_size")
    adapter, rank = (config.actor_rollout_ref.model.get(key, None) for key in ("lora_adapter_path", "lora_rank"))
    if adapter is not None and not rank:
        raise ValueError(
            f"actor_rollout_ref.model.lora_adapter_path={adapter} with lora_rank={rank}: VERL loads an adapter with "
            "a rank above 0 only. Set actor_rollout_ref.model.lora_rank to the adapter's."
        )
    targets = config.actor_rollout_ref.model.get("target_modules", None)
    if config.actor_rollout_ref.model.get("lora_rank", 0) and targets and "lm_head" in targets:
        raise ValueError(
            f"actor_rollout_ref.model.target_modules={targets} adapts lm_head, which distillation reads as a plain "
            "matrix: leave lm_head out."
        )
    if OmegaConf.select(config, "actor_rollout_ref.actor.calculate_sum_pi_squared"):
        raise ValueError(
            "actor_rollout_ref.actor.calculate_sum_pi_squared=True needs the student's logits, which distillation "
            "never makes: set it to False."
        )


def _check_engine(config: DictConfig, strategy_key: str, engine: str, model: str) -> None:
    """What neither the student's engine nor the teacher's can do."""
    strategy = OmegaConf.select(config, strategy_key)
    if strategy not in ("fsdp", "fsdp2"):
        raise ValueError(
            f"{strategy_key}={strategy} is not supported with {loss_mode(config)}: set it to fsdp2 or fsdp."
        )
    _refuse(config, f"{model}.use_fused_kernels", True, "fused kernels give no logits; set it to False.")
    _refuse(config, f"{model}.mtp.enable", True, "distillation needs a model with one output layer; set it to False.")
    _refuse(
        config, f"{model}.enable_activation_offload", True, "it takes a model's output for a tensor; set it to False."
    )
    _refuse(config, f"{engine}.pad_to_length", True, "padding rows have no teacher; set it to False.")
    _require_no_sequence_parallelism(config, f"{engine}.ulysses_sequence_parallel_size")


def _require_no_sequence_parallelism(config: DictConfig, key: str) -> None:
    size = OmegaConf.select(config, key)
    if size is not None and size > 1:
        raise ValueError(f"{key}={size} is not supported with {loss_mode(config)}: set it to 1.")


def _check_loss(config: DictConfig) -> None:
    settings = DistillationLossConfig.from_config(config.actor_rollout_ref.actor)
    divergence = settings.divergence
    if (divergence.distillation_type, divergence.beta) == ("skew_reverse_kl", 0.0):
        raise ValueError(
            "distillation_beta=0.0 makes distillation_type=skew_reverse_kl zero everywhere: set "
            "distillation_beta above 0 (1.0 is reverse KL)."
        )
    if loss_mode(config) != PURE:
        return
    if (schedule := settings.hybrid_lambda_distill_schedule) != "constant":
        raise ValueError(
            f"{_POLICY_LOSS}.hybrid_lambda_distill_schedule={schedule} has no effect with {PURE}, whose divergence has "
            f"no weight: leave it out, or set loss_mode={HYBRID}."
        )
    for name, unset in (("rollout_is", None), ("rollout_rs", None), ("bypass_mode", False)):
        if (value := OmegaConf.select(config, f"algorithm.rollout_correction.{name}", default=unset)) != unset:
            raise ValueError(
                f"algorithm.rollout_correction.{name}={value} corrects policy gradients, and {PURE} has none: set it "
                f"to {'null' if unset is None else unset}."
            )
    if config.actor_rollout_ref.actor.calculate_entropy:
        logger.warning(
            "actor_rollout_ref.actor.calculate_entropy=True is not needed with %s, whose metrics have "
            "distillation/student_entropy.",
            PURE,
        )
    hybrid = f"or train with policy_loss.loss_mode={HYBRID}, which has an RL term."
    _refuse(
        config, "actor_rollout_ref.actor.use_kl_loss", True, f"it has no reference policy. Set it to False, {hybrid}"
    )
    _refuse(config, "algorithm.use_kl_in_reward", True, f"it uses no reward. Set it to False, {hybrid}")
    _refuse(config, "critic.enable", True, f"it uses no critic. Set it to null, {hybrid}")
    entropy_coeff = config.actor_rollout_ref.actor.entropy_coeff
    if entropy_coeff != 0:
        raise ValueError(
            f"actor_rollout_ref.actor.entropy_coeff={entropy_coeff} does not go with policy_loss.loss_mode={PURE}: the "
            f"divergence is the whole loss. Set it to 0, {hybrid}"
        )


def warn_of_unfinished_schedule(config: DictConfig, total_training_steps: int) -> None:
    """Say that the run has fewer steps than the weight of the divergence falls in."""
    settings = DistillationLossConfig.from_config(config.actor_rollout_ref.actor)
    steps = settings.hybrid_lambda_distill_steps
    if steps is not None and steps > total_training_steps:
        logger.warning(
            "%s.hybrid_lambda_distill_steps=%s is more than the run's %s steps: at the last one the weight of the "
            "divergence is still %.3g.",
            _POLICY_LOSS,
            steps,
            total_training_steps,
            settings.lambda_distill(total_training_steps),
        )


def require_routes(teacher: DictConfig, dataset: Any) -> None:
    """Find a teacher for every sample of the training data, before any model is loaded.

    Args:
        dataset: VERL's training data set, or one of the user's own; one without a table is checked as it is scored.

    Raises:
        ValueError: naming the field, the first row that has no teacher, and what it holds.
    """
    routes, table = Routes.of(teacher), getattr(dataset, "dataframe", None)
    names = getattr(table, "column_names", None)  # of a Hugging Face table, as VERL's own data set has one
    if not routes.columns or table is None or names is None:
        return
    for key in ("routing_key", "weights_key"):
        if teacher[key] is not None and teacher[key] not in names:
            raise _no_field(key, teacher[key], names)
    routes.shares({column: table[column] for column in routes.columns}, len(table))


def _no_field(key: str, value: str, names: list[str]) -> ValueError:
    return ValueError(
        f"teacher.{key}={value} is no field of the training data, which has {names}: set it to one of them."
    )


def require_prompts(config: DictConfig, dataset: Any, tokenizer: Any) -> None:
    """Find a teacher's prompt that can be used in every sample of the training data, before any model is loaded.

    Args:
        config: the trainer's configuration; without ``teacher.prompt_key`` there is nothing to find.
        dataset: VERL's training data set, or one of the user's own. What its table does not have, its rows must; that
            is checked as it is scored.
        tokenizer: the student's.

    Raises:
        ValueError: naming the column, the first row whose prompt cannot be used, and why.
    """
    settings, table = PromptSettings.of(config), getattr(dataset, "dataframe", None)
    if settings is None:
        return
    key, columns = settings.key, getattr(table, "column_names", None)
    if table is None or columns is None or key not in columns:
        if key in (made := list(dataset[0])):
            return
        raise _no_field("prompt_key", key, columns or made)
    for name in ("image_key", "video_key", "audio_key"):
        column = config.data.get(name, None)
        for row, parts in enumerate(table[column]) if column in columns else ():
            if parts:
                raise ValueError(
                    f"teacher.prompt_key={key} with data.{name}={column}, and row {row} of the data set has {column}: "
                    "the teacher's prompt is text. Leave such rows, or teacher.prompt_key, out."
                )
    prompts = TeacherPrompts(settings, tokenizer)
    for row, prompt in enumerate(table[key]):
        try:
            prompts.token_ids(prompt)
        except ValueError as error:
            raise ValueError(
                f"row {row} of the data set has no prompt for the teacher in teacher.prompt_key={key}: {error}"
            ) from None


def require_one_prompt(prompt_key: str, keys: list[str]) -> None:
    """An agent loop may cut a rollout into several samples, each with a prompt of its own.

    Args:
        keys: of the samples in TransferQueue; VERL's are <prompt>_<rollout>_<sample of the rollout>.

    Raises:
        ValueError: a rollout of more than one sample.
    """
    if later := [key for key in keys if re.search(r"_\d+_[1-9]\d*$", key)]:
        raise ValueError(
            f"teacher.prompt_key={prompt_key} gives a rollout one prompt, and the agent loop made several samples of "
            f"one rollout ({later[0]}): leave teacher.prompt_key out, or use an agent loop with one sample a rollout."
        )


def _check_prompts(config: DictConfig) -> None:
    """The settings of the teacher's own prompts."""
    key, longest = config.teacher.prompt_key, config.teacher.max_prompt_length
    if key is None:
        if longest is not None:
            raise ValueError(
                f"teacher.max_prompt_length={longest} has no effect without teacher.prompt_key: the teacher sees the "
                "student's prompt. Set teacher.prompt_key to a field of the data set, or leave it out."
            )
        return
    if not isinstance(key, str) or not key:
        raise ValueError(f"teacher.prompt_key={key!r}: set it to the name of a field of the data set.")
    for other in ("routing_key", "weights_key"):
        if config.teacher[other] == key:
            raise ValueError(f"teacher.prompt_key={key} is teacher.{other} too: a prompt is a field of its own.")
    if longest is not None and (not _is_whole(longest) or longest < 1):
        raise ValueError(
            f"teacher.max_prompt_length={longest!r}: set it to a whole number above 0, or to null, which is "
            "data.max_prompt_length."
        )
    truncation = config.data.get("truncation", "error")
    if truncation not in TRUNCATIONS:
        raise ValueError(f"data.truncation={truncation} is none of {list(TRUNCATIONS)}: set it to one of them.")
    if tools := config.data.get("tool_config_path", None):
        logger.warning(
            "data.tool_config_path=%s: the tools are in the student's prompt, and not in the teacher's of "
            "teacher.prompt_key=%s. Describe them there if the teacher is to know them.",
            tools,
            key,
        )


def _longest_prompt(config: DictConfig) -> tuple[str, int]:
    """The key that bounds the teacher's prompts, and its value."""
    if config.teacher.max_prompt_length is not None:
        return "teacher.max_prompt_length", config.teacher.max_prompt_length
    return "data.max_prompt_length", config.data.max_prompt_length


def _check_teacher(config: DictConfig) -> None:
    _check_teacher_settings(config)
    Routes.of(config.teacher)
    _check_moving(config.teacher)
    student = functools.cache(lambda: _read_model("actor_rollout_ref.model", config.actor_rollout_ref.model))
    teachers = []
    if not config.teacher.models:
        teachers.append(_check_checkpoints(config, "teacher.model", student))
    elif config.teacher.model.path is not None and all("path" in own for own in config.teacher.models.values()):
        raise ValueError(
            f"teacher.model.path={config.teacher.model.path} has no effect, as every one of teacher.models has a path: "
            "leave it out, or give it a name of its own among them."
        )
    for name, group in teacher_groups(config.teacher).items() if config.teacher.models else ():
        key = f"teacher.models.{name}"
        for setting in config.teacher.models[name]:
            if setting not in TEACHER_KEYS and setting not in config.teacher.model:
                near = difflib.get_close_matches(setting, [*TEACHER_KEYS, *config.teacher.model], n=1, cutoff=0.0)[0]
                raise ValueError(
                    f"{key}.{setting}={config.teacher.models[name][setting]} is no key of a teacher's model: did you "
                    f"mean {key}.{near}?"
                )
        with open_dict(config):
            one = OmegaConf.merge(config, {"teacher": group})
        _check_engine(one, "teacher.fsdp_config.strategy", "teacher.fsdp_config", "teacher.model")
        teachers.append(_check_checkpoints(one, key, student))
    warn_of_memory(config, student().config, [teacher.config for teacher in teachers])


class _Model(NamedTuple):
    """What a checkpoint says of itself; `key` and `path`: how the user has named it."""

    key: str
    path: str
    config: Any
    tokenizer: Any

    @property
    def named(self) -> str:
        return f"{self.key}={self.path}"

    @property
    def vocab_size(self) -> int:
        return self.config.get_text_config().vocab_size


def _read_model(group: str, settings: DictConfig) -> _Model:
    """Of the model with the keys below `group`, whose weights are looked at too."""
    key, path = f"{group}.path", settings.path
    model = _Model(key, path, _load_config(key, path, settings), _tokenizer(path, settings))
    if os.path.isdir(_local_path(path)):
        require_readable(key, _local_path(path))
    return model


def _check_checkpoints(config: DictConfig, key: str, read_student: Callable[[], _Model]) -> _Model:
    """Of the one teacher in `config`, whose model the user has set with the keys below `key`, and of the student.

    Returns:
        The teacher.
    """
    path = config.teacher.model.path
    if not path:
        raise ValueError(
            f"{key}.path is not set, and policy_loss.loss_mode={loss_mode(config)} needs a teacher: "
            f"set {key}.path to a checkpoint that shares the student's tokenizer."
        )
    if not isinstance(path, str):
        raise ValueError(f"{key}.path={path!r} is no path: set it to the folder or the name of a checkpoint.")
    is_student = path == SELF
    if is_student:
        _check_self(config, key)
    student = read_student()
    teacher = student._replace(key=f"{key}.path") if is_student else _read_model(key, config.teacher.model)
    vocab = _check_tokenizers(config.teacher.vocab, student, teacher)
    _check_context(config, teacher)
    if config.teacher.payload == "topk" and config.teacher.topk > vocab:
        raise ValueError(f"teacher.topk={config.teacher.topk} is more than the {vocab} entries there are: lower it.")
    _check_entropy_threshold(config, config.teacher.topk + 1 if config.teacher.payload == "topk" else vocab)
    if config.teacher.payload != "logits" and not is_student and os.path.isdir(_local_path(path)):
        tied = bool(teacher.config.get_text_config().tie_word_embeddings)
        find_output_projection(_local_path(path), tied, teacher.key)
    return teacher


def _check_self(config: DictConfig, key: str) -> None:
    """A teacher that is the student with other weights."""
    teacher, actor = config.teacher, config.actor_rollout_ref.actor
    if teacher.payload == "logits":
        raise ValueError(
            f"teacher.payload=logits with {key}.path={SELF}: the student's engine keeps hidden states. Set "
            "teacher.payload to hidden_states or topk."
        )
    is_lora = config.actor_rollout_ref.model.get("lora_rank", 0) > 0
    is_moving = teacher.ema is not None or teacher.refresh_freq is not None
    if actor.strategy == "fsdp" and (is_moving or not is_lora):
        raise ValueError(
            f"actor_rollout_ref.actor.strategy=fsdp with {key}.path={SELF}: weights are exchanged shard by shard, as "
            "FSDP2 has them. Set actor_rollout_ref.actor.strategy=fsdp2."
        )
    dtype = actor.fsdp_config.model_dtype
    _check_dtype("actor_rollout_ref.actor.fsdp_config.model_dtype", dtype)
    if teacher.ema is not None and PrecisionType.to_dtype(dtype) != torch.float32:
        raise ValueError(
            f"teacher.ema={teacher.ema} with actor_rollout_ref.actor.fsdp_config.model_dtype={dtype}: small steps "
            "vanish in 16 bits. Set model_dtype=fp32, or use teacher.refresh_freq."
        )


def _check_moving(teacher: DictConfig) -> None:
    paths = [group.model.path for group in teacher_groups(teacher).values()]
    for key in ("ema", "refresh_freq"):
        if teacher[key] is not None and SELF not in paths:
            raise ValueError(
                f"teacher.{key}={teacher[key]} moves a teacher that is the student: set teacher.model.path={SELF}, or "
                "leave it out."
            )
    ema, frequency = teacher.ema, teacher.refresh_freq
    if ema is not None and frequency is not None:
        raise ValueError(f"teacher.ema={ema} and teacher.refresh_freq={frequency}: leave one of them out.")
    if ema is not None and (isinstance(ema, bool) or not isinstance(ema, int | float) or not 0.0 < ema < 1.0):
        raise ValueError(f"teacher.ema={ema!r}: set it between 0 and 1, for example 0.99.")
    if frequency is not None and (not _is_whole(frequency) or frequency < 1):
        raise ValueError(f"teacher.refresh_freq={frequency!r}: set it to a whole number of updates, 1 or more.")
    if paths.count(SELF) > 1:
        raise ValueError(f"{paths.count(SELF)} teachers have path={SELF}: one is enough, leave the others out.")


def _check_context(config: DictConfig, teacher: _Model) -> None:
    """A position that a model was not made for is computed without a word, or fails on the device."""
    prompt_key, longest_prompt = _longest_prompt(config)
    longest = longest_prompt + config.data.max_response_length
    positions = _longest_context(teacher.config.get_text_config())
    if positions is not None and positions < longest:
        raise ValueError(
            f"{teacher.named} has a context of {positions} tokens "
            "(max_position_embeddings, and the factor of rope_scaling), and "
            f"{prompt_key}={longest_prompt} plus data.max_response_length="
            f"{config.data.max_response_length} is {longest}: shorten them, or choose a teacher with a longer context."
        )


def _longest_context(text_config: Any) -> Optional[int]:
    """``max_position_embeddings``, or the context that YaRN and its kind stretch it to."""
    positions = getattr(text_config, "max_position_embeddings", None)
    rope = getattr(text_config, "rope_scaling", None) or getattr(text_config, "rope_parameters", None) or {}
    factor = rope.get("factor") if isinstance(rope, dict) else None
    if positions is None or not factor:
        return positions
    return max(positions, int(factor * (rope.get("original_max_position_embeddings") or positions)))


def _check_entropy_threshold(config: DictConfig, outcomes: int) -> None:
    """No distribution over so many outcomes has more entropy than their logarithm."""
    threshold = DistillationLossConfig.from_config(config.actor_rollout_ref.actor).distillation_entropy_threshold
    if threshold is not None and threshold >= math.log(outcomes):
        raise ValueError(
            f"{_POLICY_LOSS}.distillation_entropy_threshold={threshold} is never exceeded: {outcomes} outcomes have an "
            f"entropy of {math.log(outcomes):.2f} nats at most. Lower it, or leave it out for reverse KL everywhere."
        )


def _check_teacher_settings(config: DictConfig) -> None:
    """What can be judged without the checkpoints."""
    _check_teacher_keys(config.teacher)
    _check_teacher_numbers(config.teacher)
    _check_prompts(config)
    _check_engine(config, "teacher.fsdp_config.strategy", "teacher.fsdp_config", "teacher.model")
    _refuse(config, "teacher.fsdp_config.forward_only", False, "the teacher is never trained; set it to True.")
    _check_teacher_batches(config)
    _check_weights(config.teacher)
    payload = config.teacher.payload
    if payload not in TEACHER_PAYLOADS:
        raise ValueError(f"teacher.payload={payload} is not a payload: choose one of {list(TEACHER_PAYLOADS)}.")
    if config.teacher.vocab not in TEACHER_VOCABS:
        raise ValueError(f"teacher.vocab={config.teacher.vocab} is unknown: choose one of {list(TEACHER_VOCABS)}.")
    _check_top_k(config.teacher)
    for key in ("teacher.payload_dtype", "teacher.fsdp_config.model_dtype"):
        _check_dtype(key, OmegaConf.select(config, key))


def _check_weights(teacher: DictConfig) -> None:
    weights = teacher.weights
    if weights not in TEACHER_WEIGHTS:
        raise ValueError(f"teacher.weights={weights} is unknown: choose one of {list(TEACHER_WEIGHTS)}.")
    if weights != "resident":
        return
    if all(group.model.path == SELF for group in teacher_groups(teacher).values()):
        raise ValueError(
            f"teacher.weights={weights} with teacher.model.path={SELF}: the student as its own teacher runs on the "
            "student's engine, which has no weights of a teacher's. Leave teacher.weights out."
        )
    for key in ("param_offload", "offload_policy"):
        if teacher.fsdp_config[key]:
            raise ValueError(
                f"teacher.weights={weights} and teacher.fsdp_config.{key}={teacher.fsdp_config[key]} contradict each "
                "other: leave one of them out."
            )


def _check_top_k(teacher: DictConfig) -> None:
    if teacher.payload != "topk":
        if teacher.topk is not None:
            raise ValueError(
                f"teacher.topk={teacher.topk} has no effect with teacher.payload={teacher.payload}: set "
                "teacher.payload=topk, or leave it out."
            )
    elif not _is_whole(teacher.topk) or teacher.topk < 1:
        raise ValueError(
            f"teacher.topk={teacher.topk!r} with teacher.payload=topk: set it to how many entries to keep, such as 64."
        )


def _check_teacher_keys(teacher: DictConfig) -> None:
    for key in teacher:
        if nearest := misspelt_teacher_key(key):
            raise ValueError(f"teacher.{key}={teacher[key]} is not a key of the teacher: did you mean {nearest}?")


def _check_teacher_batches(config: DictConfig) -> None:
    """The size of the teacher's micro-batches, by tokens or by sequences."""
    teacher = config.teacher
    if not isinstance(teacher.use_dynamic_bsz, bool):
        raise ValueError(f"teacher.use_dynamic_bsz={teacher.use_dynamic_bsz!r}: set it to True or False.")
    sizes = ("max_token_len_per_gpu", "micro_batch_size_per_gpu")
    size, unread = sizes if teacher.use_dynamic_bsz else reversed(sizes)
    if teacher[unread] is not None:
        raise ValueError(
            f"teacher.{unread}={teacher[unread]} has no effect with teacher.use_dynamic_bsz={teacher.use_dynamic_bsz}: "
            f"set teacher.{size} in its place, or teacher.use_dynamic_bsz={not teacher.use_dynamic_bsz}."
        )
    key, value = teacher_tokens(config) if teacher.use_dynamic_bsz else (f"teacher.{size}", teacher[size])
    if not _is_whole(value) or value < 1:
        raise ValueError(f"{key}={value!r}: set it to a whole number above 0.")
    if teacher.use_dynamic_bsz:
        _check_sequences_fit(config, key, value)
    else:
        _check_even_batches(config)


def _check_sequences_fit(config: DictConfig, key: str, tokens: int) -> None:
    """VERL ends the run at the first sequence that is longer than a micro-batch of `tokens`, which `key` says."""
    prompt_key, longest = _longest_prompt(config)
    response = config.data.max_response_length
    if tokens < longest + response:
        raise ValueError(
            f"{key}={tokens} is less than {prompt_key}={longest} plus data.max_response_length={response}: set "
            f"teacher.max_token_len_per_gpu to {longest + response} or more."
        )


def _check_even_batches(config: DictConfig) -> None:
    """VERL cuts a rank's sequences into micro-batches of one size, and stops where they do not come out even."""
    rollouts = config.data.train_batch_size * config.actor_rollout_ref.rollout.n
    sequences, rest = divmod(rollouts, config.trainer.nnodes * config.trainer.n_gpus_per_node)
    size = config.teacher.micro_batch_size_per_gpu
    is_padded = len(config.teacher.models) > 1  # what several teachers get is made to come out even
    if not is_padded and not rest and sequences % size:
        raise ValueError(
            f"teacher.micro_batch_size_per_gpu={size} does not divide the {sequences} sequences that each device gets "
            "of a batch (data.train_batch_size * actor_rollout_ref.rollout.n / devices): set it to a divisor, or leave "
            "it and teacher.use_dynamic_bsz out."
        )


def _check_teacher_numbers(teacher: DictConfig) -> None:
    if not _is_whole(teacher.dump_freq):
        raise ValueError(
            f"teacher.dump_freq={teacher.dump_freq!r} is no number of steps: set it to -1 (never) or a whole number."
        )
    if teacher.dump_freq > 0 and not teacher.dump_dir:
        raise ValueError(
            f"teacher.dump_dir={teacher.dump_dir!r} with teacher.dump_freq={teacher.dump_freq}: set it to a folder."
        )
    if not _is_whole(teacher.dump_size) or teacher.dump_size < 1:
        raise ValueError(f"teacher.dump_size={teacher.dump_size!r}: set it to a whole number above 0.")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_dtype(key: str, name: Any) -> None:
    try:
        PrecisionType.to_dtype(name)
    except RuntimeError:
        raise ValueError(f"{key}={name} is not a dtype: set it to bfloat16, float16 or float32.") from None


def _local_path(path: str) -> str:
    return copy_to_local(os.path.expanduser(path))


def _load_config(key: str, path: str, model: DictConfig) -> Any:
    from transformers import AutoConfig

    local = _local_path(path)
    # A name such as org/model may be on the Hub; an absolute path or one below an existing folder is meant to be here.
    is_local = os.path.isabs(local) or os.path.isdir(os.path.dirname(local))
    if is_local and not os.path.isdir(local):
        raise ValueError(f"{key}={path} does not exist: give the folder of a Hugging Face checkpoint.")
    try:
        config = AutoConfig.from_pretrained(local, trust_remote_code=model.get("trust_remote_code", False))
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}={path} is not a Hugging Face checkpoint that can be read: {error}") from error
    for name, value in (model.get("override_config", None) or {}).items():  # as VERL does before it loads the model
        if hasattr(config, name):
            setattr(config, name, OmegaConf.to_container(value) if OmegaConf.is_config(value) else value)
    return config


def _tokenizer(path: str, model: DictConfig) -> Any:
    from verl.utils import hf_tokenizer

    local = _local_path(model.get("tokenizer_path", None) or path)
    tokenizer = hf_tokenizer(local, trust_remote_code=model.get("trust_remote_code", False))
    if model.get("custom_chat_template", None) is not None:  # as VERL does
        tokenizer.chat_template = model.custom_chat_template
    return tokenizer


def _check_tokenizers(mode: str, student: _Model, teacher: _Model) -> int:
    """The same token ids must mean the same text, or the two distributions are over different things.

    Args:
        mode: ``teacher.vocab``.

    Returns:
        How many entries are compared.
    """
    vocabs = [model.tokenizer.get_vocab() for model in (student, teacher)]
    _check_vocabularies(mode, student.named, teacher.named, vocabs)
    for model, vocab in zip((student, teacher), vocabs, strict=True):
        if model.vocab_size <= max(vocab.values()):
            raise ValueError(
                f"{model.named} has vocab_size={model.vocab_size}, fewer than the tokenizer's "
                f"{max(vocab.values()) + 1} ids: give a checkpoint whose embedding covers its tokenizer."
            )
    _warn_of_other_habits(student.named, teacher.named, student.tokenizer, teacher.tokenizer)
    if mode == "same":
        return min(student.vocab_size, teacher.vocab_size)
    if unread := [token for token, index in vocabs[0].items() if index >= teacher.vocab_size]:
        logger.warning(
            "%s has no embedding for %d tokens of the student's (%s): it reads its padding token in their place.",
            teacher.named,
            len(unread),
            ", ".join(map(repr, unread[:3])),
        )
    return len(shared_ids(vocabs)) + 1


def _check_vocabularies(mode: str, student: str, teacher: str, vocabs: list[dict[str, int]]) -> None:
    """`student`, `teacher`: the settings that name them; `vocabs`: their tokenizers' entries."""
    found = difference(*vocabs)
    has_conflicts = any(found.conflicts)
    if mode == "shared":
        if has_conflicts:
            raise ValueError(
                f"teacher.vocab={mode}, and {teacher} means something else than {student} by ids that both have "
                f"({found}): choose a teacher whose ids mean what the student's mean."
            )
        if not shared_ids(vocabs):
            raise ValueError(
                f"teacher.vocab={mode}, and {teacher} shares no id with {student}: choose another teacher."
            )
    elif found:
        hint = "" if has_conflicts else ", or set teacher.vocab=shared, which takes what only one of them has as one"
        raise ValueError(
            f"{teacher} has another tokenizer than {student} ({found}): they are compared entry by entry, so choose a "
            f"teacher with the student's tokenizer{hint}."
        )


def _warn_of_other_habits(student: str, teacher: str, ours: Any, theirs: Any) -> None:
    """The ids may agree, and still the teacher expect other texts than the student writes."""
    if ours.eos_token != theirs.eos_token:
        logger.warning(
            "%s ends a text with %r, %s with %r: what the student learns to write at an end may not stop its rollouts.",
            teacher,
            theirs.eos_token,
            student,
            ours.eos_token,
        )
    templates = [str(tokenizer.chat_template or "") for tokenizer in (ours, theirs)]
    if templates[0] != templates[1]:
        begin = len(os.path.commonprefix(templates))
        excerpts = [repr(template[begin : begin + 60]) if template else "there is none" for template in templates]
        logger.warning(
            "%s has another chat template than %s, whose prompts it reads (from character %d on, the teacher's: %s; "
            "the student's: %s).",
            teacher,
            student,
            begin,
            excerpts[1],
            excerpts[0],
        )
