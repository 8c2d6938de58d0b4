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

from typing import NamedTuple

import torch
from tensordict import TensorDict

from verl.on_policy_distillation import engine_fsdp  # registers the engines
from verl.on_policy_distillation.config import TeacherConfig
from verl.on_policy_distillation.engine_fsdp import TEACHER_ROW
from verl.on_policy_distillation.output_projection import (
    OutputProjection,
    checkpoint_folder,
    find_output_projection,
    logit_transform,
)
from verl.on_policy_distillation.signal import HiddenStates, Logits, Signal, SignalStore
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.utils.memory_utils import aggressive_empty_cache
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.config import TrainingWorkerConfig
from verl.workers.engine_workers import TrainingWorker

__all__ = ["Scored", "Teacher", "Teachers"]

_ENGINES = {"hidden_states": engine_fsdp.TEACHER_HIDDEN_STATES, "logits": engine_fsdp.TEACHER_LOGITS}


class Scored(NamedTuple):
    """Of a batch, each (batch,) int64: the samples' row ids, and the bytes that are kept of each."""

    rows: torch.Tensor
    num_bytes: torch.Tensor


class Teacher:
    """A frozen language model on VERL's FSDP engine."""

    def __init__(self, config: TeacherConfig):
        engine_config = config.fsdp_config
        engine_config.use_dynamic_bsz = config.use_dynamic_bsz
        engine_config.infer_micro_batch_size_per_gpu = config.micro_batch_size_per_gpu
        engine_config.infer_max_token_len_per_gpu = config.max_token_len_per_gpu
        self._config = config
        self._worker = TrainingWorker(
            TrainingWorkerConfig(
                model_type=_ENGINES[config.payload], model_config=config.model, engine_config=engine_config
            )
        )
        self._worker.reset()
        self._projection = _read_projection(config) if config.payload == "hidden_states" else None
        # VERL has measured the free memory for the rollout engines already, or is about to.
        aggressive_empty_cache(force_sync=True)

    @property
    def dp_rank(self) -> int:
        return self._worker.engine.get_data_parallel_rank()

    def connect(self, store: SignalStore) -> None:
        """Set once: where what it says goes, by the row ids of the batch."""
        self._worker.engine.connect(store.put, PrecisionType.to_dtype(self._config.payload_dtype))

    def score(self, data: TensorDict) -> None:
        """Say the rows (supervised tokens, width) of each sample, in ``payload_dtype``, in host memory."""
        tu.assign_non_tensor(data, temperature=1.0, compute_loss=False)
        self._worker.infer_batch(data)

    def signal(self, rows: torch.Tensor) -> Signal:
        """What `rows` (n, width), on the device, mean."""
        return Logits(rows) if self._projection is None else HiddenStates(rows, self._projection)


class Teachers:
    """Scores batches and keeps what was said until it is released.

    Args:
        config: the ``teacher`` group of the trainer's configuration.
    """

    def __init__(self, config: TeacherConfig):
        self._teacher = Teacher(config)
        self._store = SignalStore(self._teacher.dp_rank)
        self._teacher.connect(self._store)

    def score(self, data: TensorDict) -> Scored:
        """Score the samples of `data`; what was said of an earlier batch is forgotten.

        Args:
            data: nested ``input_ids``, ``position_ids``, ``loss_mask``, ``response_mask``, ``prompts`` and
                ``responses``.
        """
        self.release()
        data[TEACHER_ROW] = ids = self._store.new_ids(len(data))
        self._teacher.score(data)
        return Scored(ids, self._store.num_bytes(ids))

    def signal(self, micro_batch: TensorDict, device: torch.device) -> Signal:
        """What was said of a micro-batch's supervised tokens, in their order."""
        return self._teacher.signal(self._store.get(micro_batch[TEACHER_ROW], device))

    def release(self) -> None:
        """Forget what was said."""
        self._store.release()


def _read_projection(config: TeacherConfig) -> OutputProjection:
    text_config = config.model.hf_config.get_text_config()
    file = find_output_projection(checkpoint_folder(config.model.local_path), bool(text_config.tie_word_embeddings))
    dtype = PrecisionType.to_dtype(config.fsdp_config.model_dtype)
    return file.load(get_device_id(), dtype, logit_transform(text_config))
