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
"""The teachers of a worker process: they score its samples, and what they say stays in the process until the update."""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Optional

import torch
from omegaconf import DictConfig
from tensordict import TensorDict

from verl.on_policy_distillation import engine_fsdp  # registers the engines
from verl.on_policy_distillation.buckets import SharedVocabulary, TopKTail, top_k_tail
from verl.on_policy_distillation.config import SELF, TeacherConfig, teacher_groups
from verl.on_policy_distillation.divergence import LogitSource
from verl.on_policy_distillation.engine_fsdp import ENDS_IN_ROWS, TEACHER_ROW
from verl.on_policy_distillation.head import LinearLogits
from verl.on_policy_distillation.output_projection import (
    OutputProjection,
    StoredProjection,
    find_output_projection,
    logit_transform,
)
from verl.on_policy_distillation.routing import Routes
from verl.on_policy_distillation.self_teacher import Moving, ShadowWeights
from verl.on_policy_distillation.signal import (
    NO_ROW,
    HiddenStates,
    Logits,
    MissingRows,
    Mixture,
    RowIds,
    SharedEntries,
    Signal,
    SignalStore,
    TopK,
    ToStudent,
)
from verl.on_policy_distillation.teacher_prompts import listed
from verl.on_policy_distillation.vocabulary import shared_ids
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.device import get_device_id, get_device_name
from verl.utils.memory_utils import aggressive_empty_cache
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.config import HFModelConfig, TrainingWorkerConfig
from verl.workers.engine_workers import TrainingWorker

__all__ = ["Projections", "Scored", "StudentAsTeacher", "Teacher", "Teachers"]

_ENGINES = {
    "hidden_states": engine_fsdp.TEACHER_HIDDEN_STATES,
    "logits": engine_fsdp.TEACHER_LOGITS,
    "topk": engine_fsdp.TEACHER_HIDDEN_STATES,
}


class Scored(NamedTuple):
    """Of a batch, each (batch,) int64: the samples' row ids, and the bytes that are kept of each."""

    rows: torch.Tensor
    num_bytes: torch.Tensor


class _Scorer:
    """A model that scores samples and keeps what it says of them in `store`."""

    def __init__(self, worker: TrainingWorker, use_dynamic_bsz: bool, micro_batch_size: Optional[int]):
        self.store = SignalStore()
        self._worker = worker
        # Without dynamic batching a rank's samples come in whole micro-batches.
        self._multiple = 1 if use_dynamic_bsz else micro_batch_size or 1

    @property
    def dp_rank(self) -> int:
        return self._worker.engine.get_data_parallel_rank()

    @property
    def vocab(self) -> int:
        """Entries of its vocabulary."""
        return _vocab_of(self._worker)

    @property
    def tokens(self) -> dict[str, int]:
        """Its tokenizer's entries."""
        return self._worker.model_config.tokenizer.get_vocab()

    def score(self, data: TensorDict) -> None:
        """Keep the rows (supervised tokens, width) of each sample, in ``payload_dtype``, in `store`."""
        tu.assign_non_tensor(data, temperature=1.0, compute_loss=False)
        self._worker.infer_batch(data)

    def score_some(self, data: TensorDict, is_wanted: torch.Tensor) -> None:
        """`score`, of the samples `is_wanted` (batch,) bool; all ranks call it, whatever each of them wants.

        The ranks gather the model's weights together, so they run the same number of forwards: where one has fewer
        samples than another, it repeats its shortest and nobody keeps the result.
        """
        wanted = is_wanted.nonzero().squeeze(-1)
        samples = self._samples_of_a_rank(len(wanted))
        if samples == 0:
            return
        shortest = data["input_ids"].offsets().diff().argmin().cpu()
        index = torch.cat((wanted, shortest.repeat(samples - len(wanted))))
        chosen = tu.index_select_tensor_dict(data, index)
        chosen[TEACHER_ROW][len(wanted) :] = NO_ROW
        self.score(chosen)

    def release(self) -> None:
        """Forget what was said."""
        self.store.release()

    def _samples_of_a_rank(self, wanted: int) -> int:
        """What the rank with the most samples wants, in whole micro-batches."""
        most = torch.tensor([wanted], device=get_device_name())
        if torch.distributed.is_initialized():
            group = self._worker.engine.get_data_parallel_group()
            torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX, group=group)
        return -(-int(most) // self._multiple) * self._multiple


class Teacher(_Scorer):
    """A frozen language model on VERL's FSDP engine.

    The engine is forward-only, which VERL keeps in host memory (page-locked, with FSDP2) and brings to the device a
    layer at a time: several teachers need the device memory of one layer. With ``weights: resident`` they stay there.
    """

    def __init__(self, config: TeacherConfig):
        engine_config = config.fsdp_config
        engine_config.use_dynamic_bsz = config.use_dynamic_bsz
        engine_config.infer_micro_batch_size_per_gpu = config.micro_batch_size_per_gpu
        engine_config.infer_max_token_len_per_gpu = config.max_token_len_per_gpu
        self._config = config
        self._stored = None if config.payload == "logits" else _take_projection(config.model)
        worker = TrainingWorker(
            TrainingWorkerConfig(
                model_type=_ENGINES[config.payload], model_config=config.model, engine_config=engine_config
            )
        )
        super().__init__(worker, config.use_dynamic_bsz, config.micro_batch_size_per_gpu)
        worker.engine.keeps_weights_on_device = config.weights == "resident"
        worker.reset()
        # VERL has measured the free memory for the rollout engines already, or is about to.
        aggressive_empty_cache(force_sync=True)
        worker.engine.connect(self.store.put, PrecisionType.to_dtype(config.payload_dtype))

    def score(self, data: TensorDict) -> None:
        super().score(self._readable(data))

    def _readable(self, data: TensorDict) -> TensorDict:
        """With its padding token in place of the student's tokens that it has no embedding for."""
        ids = data["input_ids"]
        is_unread = ids.values() >= self.vocab
        if not is_unread.any():
            return data
        values = ids.values().masked_fill(is_unread, self._config.model.tokenizer.pad_token_id)
        data = data.copy()
        data["input_ids"] = torch.nested.nested_tensor_from_jagged(values, ids.offsets())
        return data

    def read_projection(self) -> OutputProjection:
        """Its output projection, from its checkpoint, in host memory."""
        assert self._stored is not None, "a teacher whose payload is logits runs its own head"
        dtype = PrecisionType.to_dtype(self._config.fsdp_config.model_dtype)
        return self._stored.load("cpu", dtype, logit_transform(self._config.model.hf_config.get_text_config()))


def _take_projection(model: HFModelConfig) -> StoredProjection:
    """Find the output projection of a model whose engine will have none, and untie what is left from it.

    VERL has every rank load a whole checkpoint with tied embeddings, and of any other one rank for all. `model` is the
    teacher's own copy.
    """
    text_config = model.hf_config.get_text_config()
    stored = find_output_projection(model.local_path, bool(text_config.tie_word_embeddings))
    for config in (model.hf_config, text_config):
        config.tie_word_embeddings = False
    return stored


class StudentAsTeacher(_Scorer):
    """The student with other weights, on its own engine; see `self_teacher.py`.

    Args:
        student: the actor's worker.
        config: the ``teacher`` group, whose path is ``self``.
    """

    def __init__(self, student: TrainingWorker, config: DictConfig):
        super().__init__(student, config.use_dynamic_bsz, config.micro_batch_size_per_gpu)
        is_lora = student.model_config.lora_rank > 0
        self._config, self._moving = config, Moving(config.ema, config.refresh_freq)
        self._is_base = is_lora and not self._moving.is_moving
        self.shadow = None if self._is_base else ShadowWeights(student.engine.module)
        # An adapter never has the head: it is the student's own, which is at hand when the student's logits are.
        self._copies_head = not is_lora or config.payload == "topk"
        self._head: Optional[OutputProjection] = None
        dtype = PrecisionType.to_dtype(config.payload_dtype)
        student.engine.connect_as_teacher(self.store.put, self._keep_head, dtype)

    def score(self, data: TensorDict) -> None:
        self._head = None
        sizes = {"use_dynamic_bsz": self._config.use_dynamic_bsz}
        sizes["micro_batch_size_per_gpu"] = self._config.micro_batch_size_per_gpu
        sizes["max_token_len_per_gpu"] = self._config.max_token_len_per_gpu
        tu.assign_non_tensor(data, **sizes, **{ENDS_IN_ROWS: True}, no_lora_adapter=self._is_base)
        with nullcontext() if self.shadow is None else self.shadow.in_place():
            super().score(data)

    def follow(self) -> None:
        """Take note of an update of the student."""
        if self._moving.is_moving:
            assert self.shadow is not None
            self.shadow.follow(self._moving)

    @property
    def moving(self) -> Optional[ShadowWeights]:
        """The weights that a checkpoint of the run has to keep; the initial student's are where it was loaded from."""
        return self.shadow if self._moving.is_moving else None

    def projection(self, student: Optional[LinearLogits]) -> OutputProjection:
        """The head that it scored with; `student`: the student's."""
        if self._head is not None:
            return self._head
        assert student is not None and not self._copies_head
        return _projection_of(student)

    def release(self) -> None:
        super().release()
        self._head = None

    def _keep_head(self, head: LinearLogits) -> None:
        if self._copies_head and self._head is None:  # the weights are gathered, and let go after the forward
            head = replace(head, weight=head.weight.clone(), bias=None if head.bias is None else head.bias.clone())
            self._head = _projection_of(head)


def _projection_of(head: LinearLogits) -> OutputProjection:
    bias = None if head.bias is None else head.bias.detach()
    return OutputProjection(head.weight.detach(), bias, head.scale, head.softcap)


class Projections:
    """The teachers' output projections: in host memory, page-locked where that makes copies to a device faster.

    On the device they are from their first use in an update until they `leave`: a rollout needs that memory itself. One
    of (151,936, 5,120) in 16 bits is 1.45 GiB, which takes 30 ms to copy. On a CPU there is one copy of each.

    Args:
        read: of each teacher, reads its projection into host memory.
        resident: how many are on the device at a time: as many as the mixture of one sample needs.
    """

    def __init__(self, read: dict[str, Callable[[], OutputProjection]], resident: int):
        self._resident = resident
        self._device: OrderedDict[str, OutputProjection] = OrderedDict()
        is_accelerator = get_device_name() != "cpu"
        projections = ((name, function()) for name, function in read.items())
        self._host = {name: found.pinned() if is_accelerator else found for name, found in projections}

    @property
    def on_device(self) -> tuple[str, ...]:
        """Whose are on the device; the one that was not asked for the longest comes first."""
        return tuple(self._device)

    def get(self, name: str) -> OutputProjection:
        """On the device; the one that was not asked for the longest makes room."""
        if name not in self._device:
            while len(self._device) >= self._resident:
                self._device.popitem(last=False)
            self._device[name] = self._host[name].to(get_device_id())
        self._device.move_to_end(name)
        return self._device[name]

    def leave(self) -> None:
        """Leave the device."""
        self._device.clear()


class Teachers:
    """Scores batches and keeps what was said until it is released.

    Args:
        config: the ``teacher`` group of the trainer's configuration.
        temperature: of the divergence, at which several teachers are mixed and a top-k is taken.
        student: the actor's worker, whose vocabulary it is, and which may be its own teacher.
    """

    def __init__(self, config: DictConfig, temperature: float, student: TrainingWorker):
        self._routes, self._temperature = Routes.of(config), temperature
        self._teachers = {name: _teacher(group, student) for name, group in teacher_groups(config).items()}
        self._student_vocab, self._shared = _vocab_of(student), None
        self._vocab = min(self._student_vocab, *(teacher.vocab for teacher in self._teachers.values()))
        if config.vocab == "shared":
            tokens = [teacher.tokens for teacher in self._teachers.values()]
            ids = shared_ids([student.model_config.tokenizer.get_vocab(), *tokens])
            self._shared = SharedVocabulary.of(ids, get_device_name())
            self._vocab = self._shared.size + 1
        self._top_k = TopKStore(config.topk, self._vocab, temperature) if config.payload == "topk" else None
        self._ids = RowIds(next(iter(self._teachers.values())).dp_rank)
        self._shares: dict[int, torch.Tensor] = {}
        read = {
            name: teacher.read_projection for name, teacher in self._teachers.items() if isinstance(teacher, Teacher)
        }
        self._projections = None
        if config.payload != "logits":
            self._projections = Projections(read, self._routes.width)

    def score(self, data: TensorDict) -> Scored:
        """Score the samples of `data`; what was said of an earlier batch is forgotten.

        Args:
            data: nested ``input_ids``, ``position_ids``, ``loss_mask``, ``response_mask``, ``prompts`` and
                ``responses``; and the fields of the data set that say where a sample goes.
        """
        self.release()
        fields = {column: listed(data.pop(column)) for column in self._routes.columns}
        shares = self._routes.shares(fields, len(data))
        data[TEACHER_ROW] = ids = self._ids.new(len(data))
        self._shares.update(zip(ids.tolist(), shares, strict=True))
        for teacher, share in zip(self._teachers.values(), shares.unbind(-1), strict=True):
            if len(self._teachers) == 1:
                teacher.score(data)
            else:
                teacher.score_some(data, share > 0.0)
        if self._top_k is None:
            return Scored(ids, sum(teacher.store.num_bytes(ids) for teacher in self._teachers.values()))
        self._keep_top_k(ids, shares)
        return Scored(ids, self._top_k.num_bytes(ids))

    def signal(self, micro_batch: TensorDict, student: LinearLogits) -> Signal:
        """What was said of a micro-batch's supervised tokens, in their order; `student`: the student's head."""
        ids, device = micro_batch[TEACHER_ROW].cpu(), student.hidden.device
        said = self._said(ids, device, student) if self._top_k is None else TopK(self._top_k.get(ids, device))
        return said if self._shared is None else ToStudent(said, self._shared, self._student_vocab)

    def follow(self) -> None:
        """Take note of an update of the student."""
        for teacher in self._teachers.values():
            if isinstance(teacher, StudentAsTeacher):
                teacher.follow()

    def state_dict(self) -> dict[str, Any]:
        """Of the teachers that move, on this rank; empty if there are none."""
        return {name: weights.state_dict() for name, weights in self._moving().items()}

    def load_state_dict(self, states: dict[str, Any]) -> None:
        for name, weights in self._moving().items():
            weights.load_state_dict(states[name])

    def _moving(self) -> dict[str, ShadowWeights]:
        students = {name: teacher for name, teacher in self._teachers.items() if isinstance(teacher, StudentAsTeacher)}
        return {name: teacher.moving for name, teacher in students.items() if teacher.moving is not None}

    def _keep_top_k(self, ids: torch.Tensor, shares: torch.Tensor) -> None:
        """Make a top-k of what was said of the samples `ids`, of those of the same teachers one after the other."""
        assert self._top_k is not None
        route = (shares > 0.0).long() @ (1 << torch.arange(shares.shape[-1]))
        for index in route.argsort(stable=True):
            sample = ids[index : index + 1]
            self._top_k.put(sample, self._said(sample, torch.device(get_device_name()), None).logits())
        assert self._projections is not None
        self._projections.leave()
        for teacher in self._teachers.values():
            teacher.release()

    def _said(self, ids: torch.Tensor, device: torch.device, student: Optional[LinearLogits]) -> Signal:
        if len(self._teachers) == 1:
            [name] = self._teachers
            return self._signal_of(name, ids, device, student)
        if missing := [row for row in ids.tolist() if row not in self._shares]:
            raise MissingRows(missing, len(ids))
        shares = torch.stack([self._shares[row] for row in ids.tolist()])
        stores = [teacher.store for teacher in self._teachers.values()]
        counts = torch.stack([store.counts(ids) for store in stores]).amax(0)
        return Mixture(
            tuple(self._teachers),
            tuple(
                self._signal_of(name, ids[share > 0.0], device, student)
                for name, share in zip(self._teachers, shares.unbind(-1), strict=True)
            ),
            shares.repeat_interleave(counts, dim=0).to(device),
            self._temperature,
            self._vocab,
        )

    def release(self) -> None:
        """Forget what was said, and leave the device."""
        self._shares.clear()
        if self._projections is not None:
            self._projections.leave()
        if self._top_k is not None:
            self._top_k.release()
        for teacher in self._teachers.values():
            teacher.release()

    def _signal_of(self, name: str, ids: torch.Tensor, device: torch.device, student: Optional[LinearLogits]) -> Signal:
        signal = self._whole_signal_of(name, ids, device, student)
        return signal if self._shared is None else SharedEntries(signal, self._shared, self._temperature)

    def _whole_signal_of(
        self, name: str, ids: torch.Tensor, device: torch.device, student: Optional[LinearLogits]
    ) -> Signal:
        """Over the teacher's own vocabulary."""
        teacher = self._teachers[name]
        rows = teacher.store.get(ids, device)
        if isinstance(teacher, StudentAsTeacher):
            return HiddenStates(rows, partial(teacher.projection, student))
        return Logits(rows) if self._projections is None else HiddenStates(rows, partial(self._projections.get, name))


def _vocab_of(worker: TrainingWorker) -> int:
    """Entries of its model's vocabulary."""
    return worker.model_config.hf_config.get_text_config().vocab_size


def _teacher(group: DictConfig, student: TrainingWorker) -> "Teacher | StudentAsTeacher":
    if group.model.path == SELF:
        return StudentAsTeacher(student, group)
    return Teacher(omega_conf_to_dataclass(group))


class TopKStore:
    """The top-k of samples in host memory, by row id."""

    def __init__(self, k: int, vocab: int, temperature: float):
        self._k, self._vocab, self._temperature = k, vocab, temperature
        self._ids, self._log_prob = SignalStore(), SignalStore()

    def put(self, sample: torch.Tensor, logits: LogitSource) -> None:
        """Take it of one sample's logits (n, V)."""
        said = top_k_tail(logits.cut(self._vocab), self._k, self._temperature)
        self._ids.put(sample, [said.ids.cpu()])
        self._log_prob.put(sample, [said.log_prob.float().cpu()])

    def get(self, ids: torch.Tensor, device: torch.device) -> TopKTail:
        """Of the samples `ids`, one after the other."""
        return TopKTail(self._ids.get(ids, device), self._log_prob.get(ids, device), self._vocab, self._temperature)

    def num_bytes(self, ids: torch.Tensor) -> torch.Tensor:
        return self._ids.num_bytes(ids) + self._log_prob.num_bytes(ids)

    def release(self) -> None:
        self._ids.release()
        self._log_prob.release()
