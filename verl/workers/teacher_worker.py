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
"""The Ray worker of a distillation teacher. It only carries tensors: sequences in, payload out."""

from omegaconf import DictConfig
from tensordict import TensorDict

from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.profiler import DistProfiler
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.config import TrainingWorkerConfig
from verl.workers.config.teacher import TeacherConfig
from verl.workers.engine.fsdp import teacher_impl  # noqa: F401  registers the engines
from verl.workers.engine_workers import TrainingWorker

__all__ = ["TeacherWorker"]


class TeacherWorker(TrainingWorker):
    """A frozen language model on VERL's FSDP engine that scores sequences.

    Args:
        config: the ``teacher`` group of the trainer's configuration, resolved.
    """

    def __init__(self, config: DictConfig):
        self.teacher_config: TeacherConfig = omega_conf_to_dataclass(config)
        engine_config = self.teacher_config.fsdp_config
        engine_config.use_dynamic_bsz = self.teacher_config.use_dynamic_bsz
        engine_config.infer_micro_batch_size_per_gpu = self.teacher_config.micro_batch_size_per_gpu
        engine_config.infer_max_token_len_per_gpu = self.teacher_config.max_token_len_per_gpu
        super().__init__(
            TrainingWorkerConfig(
                model_type=f"teacher_{self.teacher_config.payload}",
                model_config=self.teacher_config.model,
                engine_config=engine_config,
            )
        )

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> int:
        """Load the weights. Returns the bytes of payload per response token."""
        self.engine.initialize()
        text_config = self.teacher_config.model.hf_config.get_text_config()
        has_logits = self.teacher_config.payload == "logits"
        width = text_config.vocab_size if has_logits else text_config.hidden_size
        return width * PrecisionType.to_dtype(self.teacher_config.payload_dtype).itemsize

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="train"))
    @DistProfiler.annotate(color="olive", role="teacher_score")
    def score(self, data: TensorDict) -> TensorDict:
        """Run the teacher over the sequences of `data`.

        Args:
            data: nested ``input_ids``, ``position_ids``, ``loss_mask``, ``prompts`` and ``responses``.

        Returns:
            ``teacher_payload``: nested (batch, response length, width) in ``payload_dtype``; width is the teacher's
            hidden size or its vocabulary.
        """
        tu.assign_non_tensor(data, temperature=1.0, compute_loss=False, payload_dtype=self.teacher_config.payload_dtype)
        return self.infer_batch(data).select("teacher_payload")
