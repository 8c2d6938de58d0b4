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
"""Configuration mistakes surface when the trainer starts, before Ray, with the key, the value and the fix."""

import copy
import functools
import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch
from arithmetic import tiny_model
from composition import composed
from conftest import ROOT
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from verl.on_policy_distillation.checks import (
    MINIMUM_TORCH,
    prepare,
    refuse_misspelt_overrides,
    require_torch,
    validate,
    warn_of_unfinished_schedule,
)
from verl.on_policy_distillation.config import DistillationPolicyLossConfig, TeacherConfig, field_names
from verl.on_policy_distillation.divergence import DivergenceSpec
from verl.on_policy_distillation.output_projection import find_output_projection
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.workers.config import PolicyLossConfig

ACTOR = "actor_rollout_ref.actor"
PURE = f"{ACTOR}.policy_loss.loss_mode=on_policy_distillation"
HYBRID = f"{ACTOR}.policy_loss.loss_mode=hybrid_rl_distillation"
BASICS = (
    f"{ACTOR}.strategy=fsdp2",
    f"{ACTOR}.ppo_micro_batch_size_per_gpu=1",
    "actor_rollout_ref.rollout.name=hf",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1",
    "+actor_rollout_ref.model.override_config.attn_implementation=eager",
    "trainer.n_gpus_per_node=1",
    "data.max_prompt_length=32",  # not more together than the 128 positions of tiny_model
    "data.max_response_length=32",
)


@functools.cache
def basics():
    return composed(*BASICS)


def make_config(*overrides):
    """`composed` with BASICS, without reading VERL's files each time. For values alone: groups are chosen there."""
    config = copy.deepcopy(basics())
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    assert not any("/" in override.key_or_group or "@" in override.key_or_group for override in parsed)
    ConfigLoaderImpl._apply_overrides_to_config(parsed, config)
    return config


def test_overrides_give_what_hydra_gives(models):
    overrides = (HYBRID, *models, "+trainer.added=[1,2]", "++data.train_batch_size=8", "~trainer.logger")
    assert make_config(*overrides) == composed(*BASICS, *overrides)
    assert make_config() != make_config(*overrides)


def edit_config(path, **values):
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Overrides that name a student and a teacher which go together."""
    folder = tmp_path_factory.mktemp("models")
    student, teacher = tiny_model(folder / "student"), tiny_model(folder / "teacher", hidden=64, seed=1)
    return f"actor_rollout_ref.model.path={student}", f"teacher.model.path={teacher}"


@pytest.mark.parametrize("loss", [PURE, HYBRID])
def test_naming_the_loss_and_the_teacher_is_enough(loss, models):
    config = make_config(loss, "algorithm.adv_estimator=grpo", *models)
    prepare(config)
    validate_config(config, need_reference_policy(config), need_critic(config))


def test_the_pure_loss_needs_no_critic_and_no_reference(models):
    pure, hybrid = make_config(PURE, *models), make_config(HYBRID, *models)
    prepare(pure)
    prepare(hybrid)
    assert hybrid.algorithm.adv_estimator == "gae" and need_critic(hybrid)
    assert not need_critic(pure) and not need_reference_policy(pure)


def test_a_critic_warm_up_without_a_critic_is_said(models, caplog):
    pure = make_config(PURE, *models, "trainer.critic_warmup=5")
    prepare(pure)
    assert pure.trainer.critic_warmup == 0
    assert "trainer.critic_warmup=5 is taken as 0: on_policy_distillation has no critic." in caplog.text


def test_a_switch_between_divergences_is_not_written_out_as_one(models):
    config = make_config(PURE, *models, f"{ACTOR}.policy_loss.distillation_entropy_threshold=1.5")
    for _ in range(2):  # what was prepared may be prepared again
        prepare(config)
    policy_loss = omega_conf_to_dataclass(config.actor_rollout_ref.actor.policy_loss)
    assert (policy_loss.distillation_type, policy_loss.distillation_beta) == (None, None)
    assert policy_loss.divergence == DivergenceSpec(temperature=1.0, entropy_threshold=1.5)


def test_a_teacher_s_forward_takes_four_times_the_actor_s_tokens(models):
    for overrides, tokens in (
        ([f"{ACTOR}.ppo_max_token_len_per_gpu=16"], 64),
        (["teacher.max_token_len_per_gpu=100"], 100),
        (["teacher.use_dynamic_bsz=False", "teacher.micro_batch_size_per_gpu=2"], None),
    ):
        config = make_config(PURE, *models, *overrides)
        for _ in range(2):  # what was prepared may be prepared again
            prepare(config)
        assert config.teacher.max_token_len_per_gpu == tokens


@pytest.mark.parametrize("found", ["2.7.1+cu126", "2.6.0", "1.13.1"])
def test_a_torch_that_is_too_old(found):
    with pytest.raises(RuntimeError, match=f"torch {re.escape(found)} is older than 2.8, .*install torch>=2.8"):
        require_torch(found)


@pytest.mark.parametrize("found", ["2.8.0", "2.8.0a0+5228986c39.nv25.05", "2.13.0+cpu", "3.0"])
def test_a_torch_that_is_new_enough(found):
    require_torch(found)


def test_the_package_asks_for_the_torch_that_the_start_asks_for():
    assert f'"torch>={MINIMUM_TORCH}"' in (ROOT / "pyproject.toml").read_text()


def test_other_losses_are_left_as_they_are(models):
    config = make_config(models[0], "trainer.critic_warmup=5")
    before = OmegaConf.to_yaml(config)
    prepare(config)
    assert OmegaConf.to_yaml(config) == before


def test_the_yaml_files_have_the_keys_and_defaults_of_the_dataclasses(models):
    config = make_config(*models)
    section = config.actor_rollout_ref.actor.policy_loss
    defaults = DistillationPolicyLossConfig()
    ours = set(field_names(DistillationPolicyLossConfig)) - set(field_names(PolicyLossConfig))
    assert set(section) - {"_target_"} <= set(field_names(DistillationPolicyLossConfig))
    assert {name: section[name] for name in ours} == {name: getattr(defaults, name) for name in ours}
    assert set(config.teacher) - {"_target_"} == set(field_names(TeacherConfig))
    plain = ("vocab", "payload", "payload_dtype", "topk", "models", "routing_key", "weights_key", "ema", "refresh_freq")
    plain += ("weights", "use_dynamic_bsz", "micro_batch_size_per_gpu", "max_token_len_per_gpu")
    plain += ("dump_freq", "dump_size")  # the others follow the student
    assert [config.teacher[name] for name in plain] == [getattr(TeacherConfig(), name) for name in plain]


def test_the_teacher_follows_the_student_by_default(models):
    config = make_config(PURE, *models)
    OmegaConf.resolve(config)
    teacher = omega_conf_to_dataclass(config.teacher)
    assert isinstance(teacher, TeacherConfig)
    assert teacher.fsdp_config.strategy == "fsdp2" and teacher.fsdp_config.forward_only
    assert teacher.model.hf_config._attn_implementation == "eager"
    assert (teacher.payload, teacher.payload_dtype) == ("hidden_states", "bfloat16")


MISTAKES = {
    "typo in the loss": (
        [f"{ACTOR}.policy_loss.loss_mode=on_policy_distilation"],
        "did you mean on_policy_distillation",
    ),
    "no teacher": ([PURE, "teacher.model.path=null"], "teacher.model.path is not set.*set teacher.model.path"),
    "teacher without the loss": ([], "teacher.model.path=.* has no effect with .*loss_mode=vanilla: set loss_mode"),
    "VERL's distillation too": ([PURE, "distillation.enabled=True"], "distillation.enabled=True.*Choose one"),
    "legacy trainer": ([PURE, "trainer.use_v1=False"], "trainer.use_v1=False.*set trainer.use_v1=True"),
    "separate rollout": (
        [PURE, "trainer.v1.trainer_mode=separate_async"],
        "trainer_mode=separate_async.*set it to sync",
    ),
    "fused kernels": (
        [PURE, "actor_rollout_ref.model.use_fused_kernels=True"],
        "use_fused_kernels=True.*set it to False",
    ),
    "sequence parallel": (
        [PURE, f"{ACTOR}.ulysses_sequence_parallel_size=2"],
        "ulysses_sequence_parallel_size=2.*to 1",
    ),
    "static padding": ([PURE, f"{ACTOR}.fsdp_config.pad_to_length=True"], "pad_to_length=True.*set it to False"),
    "pure with KL loss": ([PURE, f"{ACTOR}.use_kl_loss=True"], "use_kl_loss=True.*hybrid_rl_distillation"),
    "pure with KL reward": ([PURE, "algorithm.use_kl_in_reward=True"], "use_kl_in_reward=True.*hybrid_rl_distillation"),
    "pure with critic": ([PURE, "critic.enable=True"], "critic.enable=True.*hybrid_rl_distillation"),
    "pure with entropy": ([PURE, f"{ACTOR}.entropy_coeff=0.01"], "entropy_coeff=0.01.*Set it to 0"),
    "payload": ([PURE, "teacher.payload=logit"], r"teacher.payload=logit .*\['hidden_states', 'logits', 'topk'\]"),
    "vocabulary": ([PURE, "teacher.vocab=similar"], r"teacher.vocab=similar is unknown: .*\['same', 'shared'\]"),
    "payload dtype": ([PURE, "teacher.payload_dtype=bf8"], "teacher.payload_dtype=bf8 is not a dtype: set it to"),
    "path": ([PURE, "teacher.model.path=5"], "teacher.model.path=5 is no path: set it to"),
    "dynamic": ([PURE, "teacher.use_dynamic_bsz=maybe"], "teacher.use_dynamic_bsz='maybe': set it to True or False"),
    "micro batch": (
        [PURE, "teacher.use_dynamic_bsz=False"],
        "teacher.micro_batch_size_per_gpu=None: set it to a whole number above 0",
    ),
    "micro batch of zero": (
        [PURE, "teacher.use_dynamic_bsz=False", "teacher.micro_batch_size_per_gpu=0"],
        "micro_batch_size_per_gpu=0: set it to",
    ),
    "micro batch with dynamic batching": (
        [PURE, "teacher.micro_batch_size_per_gpu=4"],
        "teacher.micro_batch_size_per_gpu=4 has no effect with teacher.use_dynamic_bsz=True: set "
        "teacher.max_token_len_per_gpu in its place, or teacher.use_dynamic_bsz=False",
    ),
    "tokens without dynamic batching": (
        [PURE, "teacher.use_dynamic_bsz=False", "teacher.max_token_len_per_gpu=64"],
        "teacher.max_token_len_per_gpu=64 has no effect with teacher.use_dynamic_bsz=False: set "
        "teacher.micro_batch_size_per_gpu in its place, or teacher.use_dynamic_bsz=True",
    ),
    "tokens": ([PURE, "teacher.max_token_len_per_gpu=1.5"], "teacher.max_token_len_per_gpu=1.5: set it to a whole"),
    "tokens of nobody": (
        [PURE, f"{ACTOR}.ppo_max_token_len_per_gpu=null"],
        "teacher.max_token_len_per_gpu=None: set it to a whole number",
    ),
    "sequences longer than a forward": (
        [PURE, "teacher.max_token_len_per_gpu=63"],
        "teacher.max_token_len_per_gpu=63 is less than data.max_prompt_length=32 plus data.max_response_length=32: "
        "set teacher.max_token_len_per_gpu to 64 or more",
    ),
    "sequences longer than four of the actor's": (
        [PURE, f"{ACTOR}.ppo_max_token_len_per_gpu=15"],
        r"teacher.max_token_len_per_gpu \(4 \* .*ppo_max_token_len_per_gpu=15\)=60 is less than .* to 64 or more",
    ),
    "where the weights are": ([PURE, "teacher.weights=gpu"], "teacher.weights=gpu is unknown: choose one of"),
    "weights of nobody": (
        [PURE, "teacher.model.path=self", "teacher.weights=resident"],
        "teacher.weights=resident with teacher.model.path=self: .* Leave teacher.weights out",
    ),
    "weights that stay and leave": (
        [PURE, "teacher.weights=resident", "teacher.fsdp_config.param_offload=True"],
        "teacher.weights=resident and teacher.fsdp_config.param_offload=True contradict",
    ),
    "dump frequency": ([PURE, "teacher.dump_freq=often"], "teacher.dump_freq='often' .* set it to -1 .never. or"),
    "dump folder": ([PURE, "teacher.dump_freq=1", "teacher.dump_dir=null"], "teacher.dump_dir=None .*set it to a fold"),
    "dump size": ([PURE, "teacher.dump_freq=1", "teacher.dump_size=-1"], "teacher.dump_size=-1: set it to a whole"),
    "temperature of the divergence": (
        [PURE, f"+{ACTOR}.policy_loss.temperature=2"],
        "temperature=2 is not a key of these losses: did you mean distillation_temperature",
    ),
    "type and beta": (
        [PURE, f"{ACTOR}.policy_loss.distillation_type=forward_kl", f"{ACTOR}.policy_loss.distillation_beta=0.5"],
        "distillation_type=forward_kl and distillation_beta=0.5 contradict each other",
    ),
    "VERL's teachers": (
        [PURE, "+distillation.teacher_models.math.model_path=x"],
        "teacher_models.math.model_path=x belongs to VERL's own distillation.*leave it out, and set teacher.model.path",
    ),
    "a part of the hybrid loss": (
        [f"{ACTOR}.policy_loss.loss_mode=hybrid_rl_distillation_rl_term"],
        "hybrid_rl_distillation_rl_term is a part of hybrid_rl_distillation: set",
    ),
    "teachers": ([PURE, "+teachers.math.path=x"], "there is no teachers group, did you mean teacher.model.path"),
    "rollout correction": (
        [PURE, "algorithm.rollout_correction.rollout_rs=sequence"],
        "rollout_correction.rollout_rs=sequence corrects policy gradients.*set it to null",
    ),
    "activation offload": (
        [PURE, "actor_rollout_ref.model.enable_activation_offload=True"],
        "enable_activation_offload=True.*set it to False",
    ),
    "several heads": ([PURE, "actor_rollout_ref.model.mtp.enable=True"], "mtp.enable=True.*set it to False"),
    "short context": (
        [PURE, "data.max_response_length=100"],
        "context of 128 tokens.*max_prompt_length=32 plus data.max_response_length=100 is 132: shorten them",
    ),
    "adapted head": (
        [PURE, "actor_rollout_ref.model.lora_rank=4", "actor_rollout_ref.model.target_modules=[q_proj,lm_head]"],
        r"target_modules=\['q_proj', 'lm_head'\] adapts lm_head.*leave lm_head out",
    ),
    "sums over squares": (
        [PURE, f"{ACTOR}.calculate_sum_pi_squared=True"],
        "calculate_sum_pi_squared=True needs the student's logits.*set it to False",
    ),
    "megatron": ([PURE, f"{ACTOR}.strategy=megatron"], "strategy=megatron is not supported.*fsdp2 or fsdp"),
    "engine's sequence parallel": (
        [PURE, f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size=2"],
        "fsdp_config.ulysses_sequence_parallel_size=2.*to 1",
    ),
    "teacher's sequence parallel": (
        [PURE, "teacher.fsdp_config.ulysses_sequence_parallel_size=2"],
        "teacher.fsdp_config.ulysses_sequence_parallel_size=2.*to 1",
    ),
    "teacher's engine": (
        [PURE, "teacher.fsdp_config.strategy=megatron"],
        "teacher.fsdp_config.strategy=megatron.*fsdp2 or fsdp",
    ),
    "teacher in training": ([PURE, "teacher.fsdp_config.forward_only=False"], "forward_only=False.*set it to True"),
    "teacher's fused kernels": (
        [PURE, "teacher.model.use_fused_kernels=True"],
        "teacher.model.use_fused_kernels=True.*set it to False",
    ),
    "uneven micro-batches": (
        [
            PURE,
            "data.train_batch_size=10",
            "teacher.use_dynamic_bsz=False",
            "teacher.micro_batch_size_per_gpu=4",
        ],
        "teacher.micro_batch_size_per_gpu=4 does not divide the 10 sequences.*set it to a divisor",
    ),
    "typo in the teacher": ([PURE, "+teacher.paylod=logits"], "teacher.paylod=logits .*did you mean payload"),
    "model dtype": (
        [PURE, "teacher.fsdp_config.model_dtype=int"],
        "teacher.fsdp_config.model_dtype=int is not a dtype",
    ),
    "type": ([PURE, f"{ACTOR}.policy_loss.distillation_type=kl"], "distillation_type='kl'.*choose one of"),
    "beta": ([PURE, f"{ACTOR}.policy_loss.distillation_beta=1.5"], r"distillation_beta=1.5 is outside \[0, 1\]"),
    "selection": (
        [PURE, f"{ACTOR}.policy_loss.distillation_token_selection=top"],
        "distillation_token_selection='top'.*choose one of",
    ),
    "selection without a fraction": (
        [PURE, f"{ACTOR}.policy_loss.distillation_token_selection=prefix"],
        "distillation_token_selection=prefix with distillation_keep_fraction=None: set both",
    ),
    "fraction without a selection": (
        [HYBRID, f"{ACTOR}.policy_loss.distillation_keep_fraction=0.5"],
        "distillation_token_selection=all with distillation_keep_fraction=0.5: set both",
    ),
    "clamp": (
        [PURE, f"{ACTOR}.policy_loss.distillation_loss_max_clamp=0"],
        "distillation_loss_max_clamp=0 is not positive.*null",
    ),
    "threshold and beta": (
        [PURE, f"{ACTOR}.policy_loss.distillation_entropy_threshold=1", f"{ACTOR}.policy_loss.distillation_beta=0.5"],
        "distillation_beta=0.5 and distillation_entropy_threshold=1 contradict each other",
    ),
    "threshold of no effect": (
        [PURE, f"{ACTOR}.policy_loss.distillation_entropy_threshold=8"],
        "distillation_entropy_threshold=8 is never exceeded: 258 outcomes.*5.55 nats.*Lower it",
    ),
    "threshold of no effect on a top-k": (
        [PURE, f"{ACTOR}.policy_loss.distillation_entropy_threshold=2", "teacher.payload=topk", "teacher.topk=4"],
        "distillation_entropy_threshold=2 is never exceeded: 5 outcomes.*1.61 nats",
    ),
    "temperature": ([PURE, f"{ACTOR}.policy_loss.distillation_temperature=0"], "distillation_temperature=0.*positive"),
    "weight": ([HYBRID, f"{ACTOR}.policy_loss.hybrid_lambda_rl=-1"], "hybrid_lambda_rl=-1.*negative"),
    "schedule without RL": (
        [
            PURE,
            f"{ACTOR}.policy_loss.hybrid_lambda_distill_schedule=linear",
            f"{ACTOR}.policy_loss.hybrid_lambda_distill_steps=8",
        ],
        "hybrid_lambda_distill_schedule=linear has no effect with on_policy_distillation.*hybrid_rl_distillation",
    ),
    "schedule without an end": (
        [HYBRID, f"{ACTOR}.policy_loss.hybrid_lambda_distill_schedule=linear"],
        "hybrid_lambda_distill_steps=None with hybrid_lambda_distill_schedule=linear: set it to a whole number",
    ),
    "head": (
        [PURE, f"+{ACTOR}.policy_loss.distillation_head=dense"],
        "distillation_head='dense' is not a key any more",
    ),
    "RL term": ([HYBRID, f"{ACTOR}.policy_loss.hybrid_rl_loss_mode=ppo"], "hybrid_rl_loss_mode='ppo'.*choose one of"),
    "a loss of zero": (
        [PURE, f"{ACTOR}.policy_loss.distillation_type=skew_reverse_kl", f"{ACTOR}.policy_loss.distillation_beta=0"],
        "distillation_beta=0.*zero everywhere",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_names_the_key_the_value_and_the_fix(mistake, models):
    overrides, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        validate(make_config(*models, *overrides))


def test_a_schedule_that_the_run_does_not_end_is_said(models, caplog):
    schedule = ("schedule=linear", "steps=35")
    config = make_config(HYBRID, *models, *(f"{ACTOR}.policy_loss.hybrid_lambda_distill_{part}" for part in schedule))
    validate(config)
    warn_of_unfinished_schedule(config, 35)
    assert not caplog.text
    warn_of_unfinished_schedule(config, 15)
    assert "hybrid_lambda_distill_steps=35 is more than the run's 15 steps: at the last one" in caplog.text
    assert "still 0.6." in caplog.text


def test_a_stretched_context_is_long_enough(models, tmp_path):
    path = tmp_path / "stretched"
    tiny_model(path, hidden=64)
    longer = (PURE, *models, f"teacher.model.path={path}", "data.max_response_length=100")
    with pytest.raises(ValueError, match="context of 128 tokens"):
        validate(make_config(*longer))
    validate(make_config(*longer, "+teacher.model.override_config.max_position_embeddings=132"))
    edit_config(path, rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64})
    validate(make_config(*longer))


def test_an_unknown_key_is_refused(models):
    with pytest.raises(ConfigCompositionException, match="distilation_beta"):
        make_config(PURE, *models, f"{ACTOR}.policy_loss.distilation_beta=0.5")
    with pytest.raises(ValueError, match="distilation_beta=0.5.*did you mean distillation_beta"):
        validate(make_config(PURE, *models, f"+{ACTOR}.policy_loss.distilation_beta=0.5"))


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        (f"{ACTOR}.policy_loss.distilation_beta=0.5", f"{ACTOR}.policy_loss.distillation_beta"),
        (f"++{ACTOR}.policy_loss.hybird_lambda_rl=0.5", f"{ACTOR}.policy_loss.hybrid_lambda_rl"),
        ("teacher.paylod=logits", "teacher.payload"),
        ("+teacher.dumpfreq=1", "teacher.dump_freq"),
        (f"{ACTOR}.policy_loss.temperature=2", f"{ACTOR}.policy_loss.distillation_temperature"),
        ("+teachers.math.path=x", "teacher.model.path"),
    ],
)
def test_a_slip_on_the_command_line_names_the_nearest_key(override, meant):
    with pytest.raises(ValueError, match=re.escape(override) + f".*did you mean {meant}\\?"):
        refuse_misspelt_overrides([*BASICS, override])


def test_overrides_without_slips_are_let_through(models):
    refuse_misspelt_overrides(
        [
            *BASICS,
            *models,
            PURE,
            f"{ACTOR}.policy_loss.distillation_beta=0.5",
            f"{ACTOR}.policy_loss.clip_cov_ratio=0.1",
            f"+{ACTOR}.policy_loss.mine=1",
            "teacher.payload=logits",
            "teacher.fsdp_config.model_dtype=float32",
            "--cfg",
            "job",
        ]
    )


@pytest.mark.parametrize("missing", ["{folder}/missing", "{folder}/file"])
def test_a_teacher_that_is_not_there(missing, models, tmp_path):
    (tmp_path / "file").write_text("")
    path = missing.format(folder=tmp_path)
    with pytest.raises(ValueError, match=f"teacher.model.path={path} does not exist"):
        validate(make_config(PURE, *models, f"teacher.model.path={path}"))


def test_a_teacher_that_is_no_checkpoint(models, tmp_path):
    with pytest.raises(ValueError, match="teacher.model.path=.* is not a Hugging Face checkpoint"):
        validate(make_config(PURE, *models, f"teacher.model.path={tmp_path}"))


def other_tokenizer(path):
    tiny_model(path, vocab_size=300)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(path)
    return str(path)


def test_a_teacher_with_another_tokenizer(models, tmp_path):
    teacher = other_tokenizer(tmp_path / "other")
    with pytest.raises(
        ValueError,
        match="teacher.model.path=.* has another tokenizer than actor_rollout_ref.model.path=.*the teacher alone has "
        "'<think>' = 258.*choose a teacher with the student's tokenizer, or set teacher.vocab=shared",
    ):
        validate(make_config(PURE, *models, f"teacher.model.path={teacher}"))


def renamed_token(path, changes, **settings):
    """A checkpoint whose tokenizer has other texts for some of the ids."""
    tiny_model(path)
    file = path / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    for old, new in changes.items():
        vocab[new] = vocab.pop(old)
    file.write_text(json.dumps(tokenizer))
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return str(path)


def test_a_vocabulary_that_differs_in_added_entries_may_be_shared(models, tmp_path):
    shared = (PURE, models[0], f"teacher.model.path={other_tokenizer(tmp_path / 'other')}", "teacher.vocab=shared")
    validate(make_config(*shared))
    top_k = (*shared, "teacher.payload=topk")
    validate(make_config(*top_k, "teacher.topk=259"))  # the student's 258, and the rest
    with pytest.raises(ValueError, match="teacher.topk=260 is more than the 259 entries there are"):
        validate(make_config(*top_k, "teacher.topk=260"))
    validate(make_config(PURE, *models, "teacher.vocab=shared"))


@pytest.mark.parametrize("mode", ["same", "shared"])
def test_an_id_with_two_texts_is_refused_in_either_mode(mode, models, tmp_path):
    teacher = renamed_token(tmp_path / "renamed", {"a": "aa"})
    with pytest.raises(ValueError, match="other texts in the student's 'a' = .*than in the teacher's 'aa' = ") as error:
        validate(make_config(PURE, *models, f"teacher.model.path={teacher}", f"teacher.vocab={mode}"))
    assert ("teacher.vocab=shared" in str(error.value)) == (mode == "shared")  # it would not help


def test_other_ends_and_templates_are_said(models, tmp_path, caplog):
    validate(make_config(PURE, *models))
    assert "ends a text" not in caplog.text and "chat template" not in caplog.text
    teacher = renamed_token(tmp_path / "other", {}, eos_token="<|pad|>")
    (tmp_path / "other" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    config = make_config(PURE, *models, f"teacher.model.path={teacher}")
    validate(config)
    names = r"teacher.model.path=\S* {}, actor_rollout_ref.model.path=\S* with '<\|endoftext\|>'"
    assert re.search(names.format(r"ends a text with '<\|pad\|>'"), caplog.text)
    assert re.search(r"another chat template than actor\S*, .*the teacher's: '\S* ?messages\[0\].content", caplog.text)


def test_tokens_that_the_teacher_cannot_read_are_said(models, tmp_path, caplog):
    student = other_tokenizer(tmp_path / "student")
    validate(make_config(PURE, models[1], f"actor_rollout_ref.model.path={student}", "teacher.vocab=shared"))
    assert "has no embedding for 1 tokens of the student's ('<think>')" in caplog.text


@pytest.mark.parametrize("key", ["actor_rollout_ref.model.path", "teacher.model.path"])
@pytest.mark.parametrize("name", ["model.safetensors", "model-00002-of-00003.safetensors", "pytorch_model.bin"])
def test_a_truncated_file_of_a_checkpoint_is_named(name, key, models, tmp_path):
    path = tmp_path / "cut"
    tiny_model(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    (path / "model.safetensors").unlink()
    if name == "pytorch_model.bin":
        torch.save(model.state_dict(), path / name)
    else:
        model.save_pretrained(path, max_shard_size="5GB" if name == "model.safetensors" else "30KB")
    file = next(path.glob(name.replace("00003", "*")))
    validate(make_config(PURE, *models, f"{key}={path}"))
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(ValueError, match=f"{key}={path}: {file} cannot be read .*truncated: copy or download it again"):
        validate(make_config(PURE, *models, f"{key}={path}"))


def test_output_projection_is_the_model_s(tmp_path):
    """Untied, tied, sharded safetensors and .bin checkpoints, against the loaded model."""
    for tied in (False, True):
        path = tiny_model(tmp_path / f"tied_{tied}", tied=tied)
        model = AutoModelForCausalLM.from_pretrained(path)
        model.save_pretrained(tmp_path / f"sharded_{tied}", max_shard_size="20KB")
        assert (tmp_path / f"sharded_{tied}" / "model.safetensors.index.json").exists()
        (tmp_path / f"bin_{tied}").mkdir()
        torch.save(model.state_dict(), tmp_path / f"bin_{tied}" / "pytorch_model.bin")
        for kind in ("tied", "sharded", "bin"):
            found = find_output_projection(str(tmp_path / f"{kind}_{tied}"), tied=tied).load("cpu", torch.float32)
            assert torch.equal(found.weight, model.get_output_embeddings().weight), (kind, tied)
            assert found.bias is None


def test_output_projection_bias_is_read(tmp_path):
    weight, bias = torch.randn(7, 3), torch.randn(7)
    torch.save({"lm_head.weight": weight, "lm_head.bias": bias}, tmp_path / "pytorch_model.bin")
    found = find_output_projection(str(tmp_path), tied=False).load("cpu", torch.bfloat16)
    assert torch.equal(found.weight, weight.bfloat16()) and torch.equal(found.bias, bias.bfloat16())


def test_a_tied_checkpoint_with_a_head_of_its_own(tmp_path):
    embedding, other = torch.randn(2, 7, 3)
    for head, is_refused in ((embedding, False), (other, True)):
        tensors = {"model.embed_tokens.weight": embedding, "lm_head.weight": head.clone()}
        torch.save(tensors, tmp_path / "pytorch_model.bin")
        if is_refused:
            with pytest.raises(ValueError, match="tie_word_embeddings=True and a lm_head.weight that is not its"):
                find_output_projection(str(tmp_path), tied=True)
        else:
            assert torch.equal(find_output_projection(str(tmp_path), tied=True).weight.read(), embedding)
        assert torch.equal(find_output_projection(str(tmp_path), tied=False).weight.read(), head)


@pytest.mark.parametrize("kind", ["one file", "an index", "an index of .bin files"])
@pytest.mark.parametrize("tied", [False, True])
def test_of_a_name_on_the_hub_only_the_file_with_the_projection_is_read(kind, tied, tmp_path):
    """In a process of its own: the Hub's library reads its cache folder from the environment when it is imported."""
    repository = tmp_path / "models--org--teacher"
    snapshot = repository / "snapshots" / "0123abc"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abc")
    (repository / "blobs").mkdir()
    tiny_model(snapshot, tied=tied)
    model = AutoModelForCausalLM.from_pretrained(snapshot)
    weight = "model.embed_tokens.weight" if tied else "lm_head.weight"
    if kind == "an index":
        (snapshot / "model.safetensors").unlink()
        model.save_pretrained(snapshot, max_shard_size="20KB")
        weight_map = json.loads((snapshot / "model.safetensors.index.json").read_text())["weight_map"]
    elif kind == "an index of .bin files":
        (snapshot / "model.safetensors").unlink()
        weight_map = {name: "a.bin" if name == weight else "b.bin" for name, _ in model.named_parameters()}
        (snapshot / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        torch.save({weight: model.get_output_embeddings().weight}, snapshot / "a.bin")
    else:
        weight_map = {weight: "model.safetensors"}
    for file in snapshot.iterdir():  # as if nothing else had been fetched, and the network were down
        if file.name != weight_map[weight] and not file.name.endswith(".index.json"):
            file.unlink()
    out = tmp_path / "out.pt"
    code = (
        "import torch\n"
        "from verl.on_policy_distillation.output_projection import find_output_projection\n"
        f"found = find_output_projection('org/teacher', tied={tied})\n"
        f"torch.save((found.weight.file, found.load('cpu', torch.float32).weight), {str(out)!r})"
    )
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    file, found = torch.load(out)
    assert file == str(snapshot / weight_map[weight])
    assert torch.equal(found, model.get_output_embeddings().weight)


def test_safetensors_are_read_where_both_kinds_are_there(tmp_path):
    weights = {"lm_head.weight": torch.randn(7, 3)}
    index = {"weight_map": {"lm_head.weight": "pytorch_model-00001-of-00001.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    save_file(weights, tmp_path / "model.safetensors")
    assert torch.equal(find_output_projection(str(tmp_path), tied=False).weight.read(), weights["lm_head.weight"])


def test_a_checkpoint_without_a_known_head_names_the_fallback(tmp_path):
    torch.save({"decoder.out_proj.weight": torch.randn(7, 3)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no output projection.*teacher.payload=logits"):
        find_output_projection(str(tmp_path), tied=False)


def start_trainer(*overrides, timeout=60):
    """Start VERL's trainer as a user does. Returns its output and the seconds it took to end."""
    began = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-m", "verl.trainer.main_on_policy_distillation", *BASICS, *overrides],
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert process.returncode != 0
    return process.stdout + process.stderr, time.monotonic() - began


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher.model.path=/does/not/exist", "teacher.model.path=/does/not/exist does not exist"),
        ("teacher.model.path={other}", "has another tokenizer"),
        ("teacher.paylod=logits", "there is no paylod in teacher, did you mean teacher.payload?"),
    ],
)
def test_the_trainer_refuses_within_seconds(override, message, models, tmp_path):
    override = override.format(other=other_tokenizer(tmp_path / "other"))
    output, seconds = start_trainer(PURE, *models, override)
    assert message in output
    assert "ray init" not in output
    # About 6 on an idle machine, nearly all of it imports. Other tests run beside this one, so it has a second try.
    assert seconds < 15 or start_trainer(PURE, *models, override)[1] < 15
