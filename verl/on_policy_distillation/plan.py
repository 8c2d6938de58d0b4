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
"""Whether a student, its teachers and a batch fit on some devices, and how long a step takes at best: estimates.

    python -m verl.on_policy_distillation.plan --student models/Qwen3-1.7B --teacher models/Qwen3-32B --gpu H100 \\
        --gpus 8 --batch 256 --rollouts 4 --prompt-length 1024 --response-length 8192 --host-memory 1000

A model is a checkpoint folder or a config.json; its parameters are counted on torch's meta device, with no weights. The
sizes that VERL's keys decide are printed under these keys. What does not fit is printed with the keys that would help.

What is counted, per device, for FSDP2 as VERL sets it up (float32 weights and gradients, 16-bit computation,
gradient checkpointing), N devices to a copy of the weights, T tokens to a micro-batch:

- the student's shard: 4 P / N of weights, and of what trains 8 / N of Adam's moments and, in an update, 4 / N of
  gradients; in rollout and scoring less what is offloaded;
- gathered weights, 16-bit: two layers (one is used, one on its way), and what lies in no layer while it is used;
- activations: `LAYER_BYTES` T H of a layer that is computed, and 2 T H saved of every layer of the student's;
- the head of an update: its buffers (`roofline.py`), the float32 gradient of its weight, the teachers' projections.

Per node: what the teachers say of a batch, offloaded weights, and each process's copy of the teachers' projections.
Not counted: Python processes, the rollout engine's host memory, the data loader, fragmentation beyond `USABLE`.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Optional

import torch

from verl.on_policy_distillation.roofline import (
    ACCELERATORS,
    INSTRUCTIONS,
    Accelerator,
    Chunking,
    buffer_bytes,
    chunking_for,
    head_cost,
    positive,
)

__all__ = [
    "KEYS",
    "Advice",
    "Model",
    "Phase",
    "Plan",
    "Settings",
    "advise",
    "payload_bytes",
    "largest",
    "plan",
    "read_model",
]

GIB = 1 << 30

# Bytes of a token's activations in one layer, in units of the hidden size: 16-bit, without attention matrices
# (Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", arXiv:2205.05198, eq. 1).
LAYER_BYTES = 34
CONTEXT = 2 * GIB  # assumed: CUDA contexts of the trainer's process and the rollout engine's, and NCCL's buffers
USABLE = 0.95  # assumed: the share of a device's memory that an allocator can use before fragmentation stops it

# Bytes per second between two devices of a node, one direction, of NVIDIA's data sheets (NVLink; PCIe for the L40S).
_PEERS = {"H100": 450e9, "H200": 450e9, "A100": 300e9, "B200": 900e9, "L40S": 32e9}
_PEER_SHARE = 0.8  # assumed: of it, in a gather of weights

# The keys of VERL's that the settings are.
KEYS = {
    "devices": "trainer.nnodes * trainer.n_gpus_per_node",
    "devices_per_node": "trainer.n_gpus_per_node",
    "batch": "data.train_batch_size",
    "rollouts": "actor_rollout_ref.rollout.n",
    "prompt": "data.max_prompt_length",
    "response": "data.max_response_length",
    "micro_tokens": "actor_rollout_ref.actor.ppo_max_token_len_per_gpu",
    "teacher_tokens": "teacher.max_token_len_per_gpu",
    "payload": "teacher.payload",
    "topk": "teacher.topk",
    "rollout_tp": "actor_rollout_ref.rollout.tensor_model_parallel_size",
    "rollout_share": "actor_rollout_ref.rollout.gpu_memory_utilization",
    "lora_rank": "actor_rollout_ref.model.lora_rank",
    "fsdp_size": "actor_rollout_ref.actor.fsdp_config.fsdp_size",
    "teacher_fsdp_size": "teacher.fsdp_config.fsdp_size",
    "weights": "teacher.weights",
    "param_offload": "actor_rollout_ref.actor.fsdp_config.param_offload",
    "optimizer_offload": "actor_rollout_ref.actor.fsdp_config.optimizer_offload",
}


# ----------------------------------------------------------------------------------------------------------------------
# what is planned


@dataclass(frozen=True)
class Model:
    """Sizes of a language model; all but the last five are numbers of parameters.

    Args:
        name: how messages call it.
        parameters: each counted once, tied or not.
        active: those that one token goes through; fewer than `parameters` in a mixture of experts.
        largest_layer: the largest module that FSDP gathers by itself among the decoder layers.
        adapter: of a LoRA of rank 1 on every linear layer of the decoder layers.
        layers, width, vocab: decoder layers, hidden size, entries of the vocabulary.
        cache_width: numbers that a token leaves in the cache of a layer, keys and values together.
        is_tied: whether the output projection is the input embedding.
    """

    name: str
    parameters: int
    active: int
    largest_layer: int
    adapter: int
    layers: int
    width: int
    vocab: int
    cache_width: int
    is_tied: bool

    @property
    def head(self) -> int:
        """Parameters of the output projection, or of the embedding: what is gathered apart from the layers."""
        return self.vocab * self.width


def read_model(path: str, name: str = "model") -> Model:
    """Of a checkpoint folder or a config.json, without weights.

    Raises:
        ValueError: naming `name` and the path.
    """
    from transformers import AutoConfig

    if not os.path.exists(os.path.expanduser(path)):
        raise ValueError(f"{name}={path} does not exist: give a checkpoint folder or a config.json.")
    try:
        return model_of(AutoConfig.from_pretrained(os.path.expanduser(path)), name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{name}={path} is not a language model's configuration that can be read: {error}") from error


def model_of(config: Any, name: str) -> Model:
    """Of a Hugging Face configuration."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    wrapped = set(module._no_split_modules or ())  # by these names VERL shards
    layers = [part for part in module.modules() if type(part).__name__ in wrapped]
    if not layers:
        raise ValueError(f"{type(module).__name__} names no layers (_no_split_modules), by which VERL shards a model.")
    linears = [part for layer in layers for part in layer.modules() if isinstance(part, torch.nn.Linear)]
    parameters = _parameters(module)
    heads = getattr(text, "num_attention_heads", 1)
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Model(
        name,
        parameters,
        parameters - _idle(module, text),
        max(map(_parameters, layers)),
        sum(linear.in_features + linear.out_features for linear in linears),
        len(layers),
        text.hidden_size,
        text.vocab_size,
        2 * key_heads * head_width,
        bool(text.tie_word_embeddings),
    )


def _parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _idle(module: torch.nn.Module, text: Any) -> int:
    """Parameters of the experts that a token does not go through."""
    experts = sum(p.numel() for name, p in module.named_parameters() if ".experts." in name)
    count = next((n for key in ("num_experts", "num_local_experts", "n_routed_experts") if (n := _get(text, key))), 0)
    chosen = _get(text, "num_experts_per_tok") or 0
    return experts - experts * chosen // count if experts and count and chosen else 0


def _get(text: Any, key: str) -> Optional[int]:
    return getattr(text, key, None)


@dataclass(frozen=True)
class Settings:
    """What a run is configured with; `KEYS` has VERL's names.

    Args:
        payload_bytes: of a number that is kept of a teacher (teacher.payload_dtype): 2 or 4.
        teachers_per_token: how many of the teachers score a sample.
        is_hybrid: hybrid_rl_distillation.
        kind: of divergence, a key of `roofline.INSTRUCTIONS`.
        host_memory: bytes of a node; None: unknown.
    """

    devices: int
    devices_per_node: int
    batch: int
    rollouts: int
    prompt: int
    response: int
    micro_tokens: int
    teacher_tokens: int
    payload: str = "hidden_states"
    topk: int = 64
    payload_bytes: int = 2
    teachers_per_token: int = 1
    rollout_tp: int = 1
    rollout_share: float = 0.5
    lora_rank: int = 0
    fsdp_size: int = -1
    teacher_fsdp_size: int = -1
    weights: str = "offloaded"
    param_offload: bool = False
    optimizer_offload: bool = False
    is_hybrid: bool = False
    kind: str = "reverse_kl"
    host_memory: Optional[float] = None

    def __post_init__(self):
        longest = self.prompt + self.response
        for name in ("micro_tokens", "teacher_tokens"):
            if getattr(self, name) < longest:
                raise ValueError(
                    f"{KEYS[name]}={getattr(self, name)} is less than the longest sequence, {longest} "
                    f"({KEYS['prompt']}={self.prompt} and {KEYS['response']}={self.response}): set it to {longest} or "
                    "more."
                )
        if self.devices % self.devices_per_node:
            raise ValueError(
                f"{self.devices} devices with {KEYS['devices_per_node']}={self.devices_per_node}: give whole nodes."
            )
        if not 0.0 < self.rollout_share < 1.0:
            raise ValueError(f"{KEYS['rollout_share']}={self.rollout_share}: set it between 0 and 1.")
        for name in ("fsdp_size", "teacher_fsdp_size"):
            size = getattr(self, name)
            if size != -1 and (size < 1 or self.devices % size):
                raise ValueError(f"{KEYS[name]}={size} does not divide {self.devices} devices: set -1 or a divisor.")
        if self.devices % self.rollout_tp:
            raise ValueError(
                f"{KEYS['rollout_tp']}={self.rollout_tp} does not divide {self.devices} devices: set a divisor."
            )

    @property
    def nodes(self) -> int:
        return self.devices // self.devices_per_node

    @property
    def sequences(self) -> int:
        """Of a step, on all devices."""
        return self.batch * self.rollouts

    @property
    def shards(self) -> int:
        return self.devices if self.fsdp_size == -1 else self.fsdp_size

    @property
    def teacher_shards(self) -> int:
        return self.devices if self.teacher_fsdp_size == -1 else self.teacher_fsdp_size


def payload_bytes(payload: str, width: int, vocab: int, topk: int, number_bytes: int = 2) -> int:
    """What is kept of a teacher for a token. Of a top-k: int32 ids, and float32 log-probs of these and of the rest."""
    return {"hidden_states": width * number_bytes, "logits": vocab * number_bytes, "topk": 4 * topk + 4 * (topk + 1)}[
        payload
    ]


def largest(sizes: Iterable[int], count: int) -> list[int]:
    """The `count` largest, in order: of all teachers, those that score a sample, at worst."""
    return sorted(sizes, reverse=True)[:count]


# ----------------------------------------------------------------------------------------------------------------------
# memory


class Phase(NamedTuple):
    """`parts`: bytes by name, all there at once, in the memory of a `place`: "device", "engine" or "host".

    limit: what there is of it; None where that is not known.
    """

    place: str
    name: str
    parts: dict[str, float]
    limit: Optional[float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.limit is None or self.total <= self.limit


class Plan(NamedTuple):
    """Memory of a device and of a node, by phase; `seconds` of a step, by phase."""

    phases: list[Phase]
    seconds: dict[str, float]

    @property
    def too_large(self) -> list[Phase]:
        return [phase for phase in self.phases if not phase.fits]

    def total(self, place: str, name: str) -> float:
        """Bytes of a phase."""
        return next(phase.total for phase in self.phases if (phase.place, phase.name) == (place, name))


def plan(student: Model, teachers: Sequence[Model], s: Settings, accelerator: Accelerator) -> Plan:
    """Of one step; each of `teachers` has weights of its own."""
    phases = [
        *_start(student, teachers, s, accelerator),
        _rollout(student, teachers, s, accelerator),
        _rollout_engine(student, s, accelerator),
        _scoring(student, teachers, s, accelerator),
        *_update(student, teachers, s, accelerator),
        *_host(student, teachers, s),
    ]
    return Plan(phases, _seconds(student, teachers, s, accelerator))


def _trained(student: Model, s: Settings) -> int:
    return student.adapter * s.lora_rank if s.lora_rank else student.parameters


def _resident(teachers: Sequence[Model], s: Settings) -> dict[str, float]:
    """Weights of teachers that stay on the device."""
    if s.weights != "resident":
        return {}
    return {f"{teacher.name}: weights": 2 * teacher.parameters / s.teacher_shards for teacher in teachers}


def _student_shard(student: Model, s: Settings, is_updated: bool) -> dict[str, float]:
    parts = {}
    if is_updated or not s.param_offload:
        parts["student: float32 weights"] = 4 * student.parameters / s.shards
    if is_updated or not s.optimizer_offload:
        parts["student: optimizer"] = 8 * _trained(student, s) / s.shards
    if is_updated:
        parts["student: gradients"] = 4 * _trained(student, s) / s.shards
    return parts


def _start(student: Model, teachers: Sequence[Model], s: Settings, accelerator: Accelerator) -> list[Phase]:
    """VERL puts a checkpoint on one device of a shard group, whole, and shards it from there."""
    if not teachers:
        return []
    teacher = max(teachers, key=lambda teacher: teacher.parameters)
    loaded = {f"{teacher.name}: weights, whole, while it is loaded": 2.0 * teacher.parameters}
    parts = {**_student_shard(student, s, is_updated=False), **loaded, "contexts (assumed)": CONTEXT}
    return [Phase("device", "start", parts, USABLE * accelerator.memory)]


def _rollout(student: Model, teachers: Sequence[Model], s: Settings, accelerator: Accelerator) -> Phase:
    parts = {
        f"{KEYS['rollout_share']}={s.rollout_share:g}": s.rollout_share * accelerator.memory,
        **_student_shard(student, s, is_updated=False),
        **_resident(teachers, s),
        "largest tensor, gathered for the engine": 6 * student.head,
        "contexts (assumed)": CONTEXT,
    }
    return Phase("device", "rollout", parts, accelerator.memory)


def _rollout_engine(student: Model, s: Settings, accelerator: Accelerator) -> Phase:
    """What the rollout engine needs at least of what it is given."""
    longest = s.prompt + s.response
    parts = {
        "weights": 2 * student.parameters / s.rollout_tp,
        "cache of one sequence": 2 * longest * student.layers * student.cache_width / s.rollout_tp,
    }
    return Phase("engine", "rollout", parts, s.rollout_share * accelerator.memory)


def _scoring(student: Model, teachers: Sequence[Model], s: Settings, accelerator: Accelerator) -> Phase:
    """One teacher after the other; the largest counts."""

    def working(teacher: Model) -> dict[str, float]:
        tokens = s.teacher_tokens
        parts = {
            "gathered weights": 2 * (2 * teacher.largest_layer + teacher.head),
            f"activations of {KEYS['teacher_tokens']}={tokens:,}": LAYER_BYTES * tokens * teacher.width,
        }
        if s.payload == "logits":  # the model's, and the supervised rows of them
            parts["logits of a micro-batch"] = 4 * tokens * teacher.vocab
        return {f"{teacher.name}: {name}": size for name, size in parts.items()}

    most = max((working(teacher) for teacher in teachers), key=lambda parts: sum(parts.values()), default={})
    always = _student_shard(student, s, is_updated=False) | _resident(teachers, s)
    return Phase("device", "scoring", {**always, **most, "contexts (assumed)": CONTEXT}, USABLE * accelerator.memory)


def _update(student: Model, teachers: Sequence[Model], s: Settings, accelerator: Accelerator) -> list[Phase]:
    """At the output layer, with all saved activations; and in the backward of the last layer, with a layer's own."""
    tokens = s.micro_tokens
    always = {
        **_student_shard(student, s, is_updated=True),
        **_resident(teachers, s),
        f"saved activations of {KEYS['micro_tokens']}={tokens:,}": 2 * tokens * student.width * student.layers,
        "contexts (assumed)": CONTEXT,
    }
    head = {
        "output projection, 16-bit": 2 * student.head,
        "hidden states and their gradients": 6 * tokens * student.width,
        "what the teachers said": tokens * _said_bytes(teachers, s, s.payload),
        "head: buffers": buffer_bytes(student.vocab, _chunking(student, teachers, s, accelerator)),
    }
    if s.payload == "hidden_states":
        projections = largest((teacher.head for teacher in teachers), s.teachers_per_token)
        head["teachers' output projections"] = 2 * sum(projections)
    if not s.lora_rank:
        head["head: float32 gradient of its weight"] = 4 * student.head
    layer = {
        "gathered weights": 2 * (2 * student.largest_layer + (student.head if student.is_tied else 0)),
        "activations of a layer, and their gradients": 2 * LAYER_BYTES * tokens * student.width,
    }
    if not s.lora_rank:  # 16-bit, and the float32 copy that is reduced
        layer["a layer's gradients"] = 6 * student.largest_layer
        if student.is_tied:
            layer["the embedding's gradient"] = 2 * student.head
    limit = USABLE * accelerator.memory
    return [
        Phase("device", "update, output layer", always | head, limit),
        Phase("device", "update, layers", always | layer, limit),
    ]


def _said_bytes(teachers: Sequence[Model], s: Settings, payload: str) -> int:
    """Of a token, by all teachers that score it."""
    sizes = (payload_bytes(payload, t.width, t.vocab, s.topk, s.payload_bytes) for t in teachers)
    return sum(largest(sizes, s.teachers_per_token))


def _chunking(student: Model, teachers: Sequence[Model], s: Settings, accelerator: Accelerator) -> Chunking:
    widest = max((teacher.width for teacher in teachers), default=student.width)
    is_frozen = bool(s.lora_rank)
    return chunking_for(s.micro_tokens, student.vocab, student.width, widest, 2, accelerator, is_frozen=is_frozen)


def _host(student: Model, teachers: Sequence[Model], s: Settings) -> list[Phase]:
    """Of a node. A top-k is taken when all is scored, so that hidden states wait for it."""
    local = s.devices_per_node
    always: dict[str, float] = {}
    for teacher in teachers:
        if s.weights == "offloaded":
            always[f"{teacher.name}: offloaded weights"] = 2 * teacher.parameters * local / s.teacher_shards
        if s.payload != "logits":
            always[f"{teacher.name}: output projection, pinned by each process"] = 2 * teacher.head * local
    if s.param_offload:
        always["student: offloaded weights"] = 4 * student.parameters * local / s.shards
    if s.optimizer_offload:
        always["student: offloaded optimizer"] = 8 * _trained(student, s) * local / s.shards
    tokens = s.sequences * s.response / s.nodes

    said = f"{KEYS['payload']}={s.payload} of {s.sequences // s.nodes:,} responses of {s.response:,} tokens"
    if s.payload == "topk":
        one = tokens * payload_bytes("topk", 0, 0, s.topk)
        until_then = tokens * _said_bytes(teachers, s, "hidden_states")
        scoring = {said: one, "hidden states, until their top-k is taken": until_then}
        return [
            Phase("host", "scoring", always | scoring, s.host_memory),
            Phase("host", "update", always | {said: one}, s.host_memory),
        ]
    return [
        Phase(
            "host", "scoring and update", always | {said: tokens * _said_bytes(teachers, s, s.payload)}, s.host_memory
        )
    ]


# ----------------------------------------------------------------------------------------------------------------------
# seconds


def _seconds(student: Model, teachers: Sequence[Model], s: Settings, accelerator: Accelerator) -> dict[str, float]:
    """At best. Full-length sequences, no communication but that of weights, and all of that behind computation."""
    sequences = s.sequences / s.devices
    length = s.prompt + s.response
    forward = partial(_forward_seconds, tokens=sequences * length, length=length, accelerator=accelerator)
    # Every new token reads the weights once; all sequences of a device at once.
    rollout = max(
        s.response * 2 * student.active / s.rollout_tp / accelerator.bandwidth,
        forward(student),
    )
    scoring = 0.0
    for teacher in teachers:
        share = min(1.0, s.teachers_per_token / len(teachers))
        rows = {"hidden_states": 0, "logits": length, "topk": s.response}[s.payload]  # that it projects itself
        head = share * sequences * rows * 2 * teacher.head / accelerator.flops()
        batches = math.ceil(share * sequences / max(1, s.teacher_tokens // length))
        moved = batches * _gather_seconds(teacher, s, accelerator)
        scoring += max(share * forward(teacher) + head, moved)
    per_batch = max(1, s.micro_tokens // length)
    batches = math.ceil(sequences / per_batch)
    supervised = min(per_batch, math.ceil(sequences)) * s.response
    widths = largest((teacher.width for teacher in teachers), s.teachers_per_token)
    widths = widths if s.payload == "hidden_states" else []
    chunking = _chunking(student, teachers, s, accelerator)
    head = head_cost(
        supervised,
        student.vocab,
        student.width,
        widths,
        chunking,
        accelerator,
        kind=s.kind,
        is_hybrid=s.is_hybrid,
        is_frozen=bool(s.lora_rank),
    ).seconds
    # Forward, its repetition by checkpointing, and a backward of two products for each of the forward's; one of them
    # for weights that do not train.
    passes = 3 if s.lora_rank else 4
    peer = _PEERS[accelerator.name] * _PEER_SHARE
    gathers = batches * 3 * 2 * student.parameters * (s.shards - 1) / s.shards / peer
    return {
        "rollout, at least": rollout,
        "scoring": scoring,
        "update": max(passes * forward(student), gathers) + batches * head,
    }


def _forward_seconds(model: Model, *, tokens: float, length: int, accelerator: Accelerator) -> float:
    """Of the decoder layers: 2 multiply-adds a parameter, and attention to half of the sequence before a token."""
    products = 2 * (model.active - (1 if model.is_tied else 2) * model.head)
    attention = 2 * length * model.width * model.layers
    return tokens * (products + attention) / accelerator.flops()


def _gather_seconds(teacher: Model, s: Settings, accelerator: Accelerator) -> float:
    """To bring all weights to every device once: the shard from the host, and the others' from their devices."""
    shard = 2 * teacher.parameters / s.teacher_shards
    peer = shard * (s.teacher_shards - 1) / (_PEERS[accelerator.name] * _PEER_SHARE)
    return max(peer, shard / accelerator.link if s.weights == "offloaded" else 0.0)


# ----------------------------------------------------------------------------------------------------------------------
# what to change


class Advice(NamedTuple):
    """`phase` does not fit and `settings` do; `changes` are what is new in them, by VERL's keys. None: nothing fits."""

    phase: Phase
    changes: dict[str, Any]
    settings: Optional[Settings]


def advise(student: Model, teachers: Sequence[Model], s: Settings, accelerator: Accelerator) -> list[Advice]:
    """For each phase that does not fit: one key that is enough, or else several together; the mildest value of each."""

    def planned(settings: Settings) -> Plan:
        return plan(student, teachers, settings, accelerator)

    return [_advice(phase, s, planned) for phase in planned(s).too_large]


def _advice(phase: Phase, s: Settings, planned: Callable[[Settings], Plan]) -> Advice:
    before = _names(planned(s))

    def helps(changed: Settings) -> bool:
        after = _names(planned(changed))
        return phase[:2] not in after and after <= before

    for field, values in _candidates(s):
        for value in values:
            if helps(changed := replace(s, **{field: value})):
                return Advice(phase, {KEYS[field]: value}, changed)
    changes: dict[str, Any] = {}
    changed = s
    for field, values in _candidates(s):
        for value in values:
            tried = replace(changed, **{field: value})
            if (
                planned(tried).total(*phase[:2]) >= planned(changed).total(*phase[:2])
                or _names(planned(tried)) - before
            ):
                continue
            changed, changes = tried, changes | {KEYS[field]: value}
            if helps(changed):
                return Advice(phase, changes, changed)
    return Advice(phase, {}, None)


def _names(found: Plan) -> set[tuple[str, str]]:
    return {phase[:2] for phase in found.too_large}


def _candidates(s: Settings) -> Iterator[tuple[str, list]]:
    """Fields and values to try, those that cost the least first."""
    longest = s.prompt + s.response
    yield "weights", ["offloaded"] if s.weights == "resident" else []
    yield "teacher_tokens", _halved(s.teacher_tokens, longest)
    yield "micro_tokens", _halved(s.micro_tokens, longest)
    share = round(100 * s.rollout_share)
    yield "rollout_share", [percent / 100 for percent in (*range(share - 1, 9, -1), *range(share + 1, 96))]
    yield "rollout_tp", [tp for tp in (2, 4, 8) if s.rollout_tp < tp <= s.devices_per_node and s.devices % tp == 0]
    yield "optimizer_offload", [] if s.optimizer_offload else [True]
    yield "param_offload", [] if s.param_offload else [True]
    yield "payload", ["hidden_states"] if s.payload == "logits" else []
    yield "batch", _halved(s.batch, 1)


def _halved(value: int, least: int) -> list[int]:
    values = []
    while value > least:
        value = max(value // 2, least)
        values.append(value)
    return values


# ----------------------------------------------------------------------------------------------------------------------
# the command


def describe(found: Plan, advice: Sequence[Advice], s: Settings, accelerator: Accelerator) -> str:
    """As text; every number an estimate."""
    lines = [
        f"Estimates for {s.devices} x {accelerator.name}, not measurements: {s.sequences:,} sequences a step "
        f"({KEYS['batch']}={s.batch} x {KEYS['rollouts']}={s.rollouts}) of {KEYS['prompt']}={s.prompt:,} and "
        f"{KEYS['response']}={s.response:,} tokens, all of full length.",
    ]
    titles = {"device": "a device", "engine": "the rollout engine's share of a device", "host": "the host, a node"}
    for phase in found.phases:
        limit = "" if phase.limit is None else f" of {phase.limit / GIB:.1f}"
        verdict = "" if phase.fits else "   DOES NOT FIT"
        lines.append(f"\n{phase.name}, memory of {titles[phase.place]}: {phase.total / GIB:.1f}{limit} GiB{verdict}")
        lines += [f"{size / GIB:>10.2f}  {name}" for name, size in phase.parts.items()]
    lines.append("\nseconds of a step, by a roofline, with nothing waiting for anything else")
    lines += [f"{value:>10.1f}  {name}" for name, value in found.seconds.items()]
    for one in advice:
        changes = ", ".join(f"{key}={value}" for key, value in one.changes.items())
        fix = f"set {changes}" if changes else "no key helps: take more devices, or a smaller model"
        lines.append(f"\n{one.phase.name} ({titles[one.phase.place]}) does not fit: {fix}.")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whole = partial(parser.add_argument, type=positive)
    parser.add_argument("--student", required=True, help="checkpoint folder or config.json")
    parser.add_argument("--teacher", action="append", required=True, help="the same; again for each teacher")
    whole("--gpus", required=True, help=KEYS["devices"])
    whole("--gpus-per-node", help=f"{KEYS['devices_per_node']}; 8, or all")
    parser.add_argument("--gpu", choices=list(ACCELERATORS), default="H100")
    parser.add_argument("--gpu-memory", type=float, help="GiB; the GPU's of its data sheet")
    parser.add_argument("--host-memory", type=float, help="GiB of a node; unknown")
    for name in ("batch", "prompt-length", "response-length"):
        whole(f"--{name}", required=True, help=KEYS[name.removesuffix("-length")])
    whole("--rollouts", default=1, help=KEYS["rollouts"])
    whole("--micro", help=f"{KEYS['micro_tokens']}; VERL's 16384, or the longest sequence")
    whole("--teacher-micro", help=f"{KEYS['teacher_tokens']}; four times --micro")
    parser.add_argument("--payload", choices=["hidden_states", "topk", "logits"], default="hidden_states")
    whole("--topk", default=64, help=KEYS["topk"])
    whole("--teachers-per-token", default=1, help="teachers that score a sample: 1 with routes, all in a mixture")
    whole("--rollout-tp", default=1, help=KEYS["rollout_tp"])
    parser.add_argument("--rollout-memory-utilization", type=float, default=0.5, help=KEYS["rollout_share"])
    parser.add_argument("--lora-rank", type=int, default=0, help=KEYS["lora_rank"])
    parser.add_argument("--fsdp-size", type=int, default=-1, help=KEYS["fsdp_size"])
    parser.add_argument("--teacher-fsdp-size", type=int, default=-1, help=KEYS["teacher_fsdp_size"])
    parser.add_argument("--weights", choices=["offloaded", "resident"], default="offloaded", help=KEYS["weights"])
    parser.add_argument("--param-offload", action="store_true", help=KEYS["param_offload"])
    parser.add_argument("--optimizer-offload", action="store_true", help=KEYS["optimizer_offload"])
    parser.add_argument("--mode", choices=["pure", "hybrid"], default="pure")
    parser.add_argument("--kind", choices=list(INSTRUCTIONS), default="reverse_kl", help="the divergence")
    return parser


def _settings(options: argparse.Namespace) -> Settings:
    longest = options.prompt_length + options.response_length
    micro = options.micro or max(16384, longest)
    return Settings(
        devices=options.gpus,
        devices_per_node=options.gpus_per_node or min(8, options.gpus),
        batch=options.batch,
        rollouts=options.rollouts,
        prompt=options.prompt_length,
        response=options.response_length,
        micro_tokens=micro,
        teacher_tokens=options.teacher_micro or 4 * micro,
        payload=options.payload,
        topk=options.topk,
        teachers_per_token=options.teachers_per_token,
        rollout_tp=options.rollout_tp,
        rollout_share=options.rollout_memory_utilization,
        lora_rank=options.lora_rank,
        fsdp_size=options.fsdp_size,
        teacher_fsdp_size=options.teacher_fsdp_size,
        weights=options.weights,
        param_offload=options.param_offload,
        optimizer_offload=options.optimizer_offload,
        is_hybrid=options.mode == "hybrid",
        kind=options.kind,
        host_memory=None if options.host_memory is None else options.host_memory * GIB,
    )


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Print the plan; 0 if it fits."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        settings = _settings(options)
        student = read_model(options.student, "student")
        teachers = [read_model(path, _teacher_name(i, options.teacher)) for i, path in enumerate(options.teacher)]
    except ValueError as error:
        parser.error(str(error))
    accelerator = ACCELERATORS[options.gpu]
    if options.gpu_memory is not None:
        accelerator = replace(accelerator, memory=options.gpu_memory * GIB)
    found = plan(student, teachers, settings, accelerator)
    print(describe(found, advise(student, teachers, settings, accelerator), settings, accelerator))
    return 1 if found.too_large else 0


def _teacher_name(index: int, paths: Sequence[str]) -> str:
    return "teacher" if len(paths) == 1 else f"teacher {index + 1}"


if __name__ == "__main__":
    sys.exit(main())
