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
"""Configuration of the teacher worker group of full-vocabulary on-policy distillation (the ``teacher`` group)."""

from dataclasses import dataclass, field
from typing import Optional

from verl.base_config import BaseConfig

from .engine import FSDPEngineConfig
from .model import HFModelConfig

__all__ = ["TEACHER_PAYLOADS", "TeacherConfig"]

TEACHER_PAYLOADS = ("hidden_states", "logits")


@dataclass
class TeacherConfig(BaseConfig):
    """A frozen teacher that scores the student's sequences once per batch.

    Args:
        model (HFModelConfig): The teacher's checkpoint; ``model.path`` is the one key without a default.
        fsdp_config (FSDPEngineConfig): How the teacher is sharded. Always forward-only.
        payload (str): What travels from the teacher to the actor for each response token: "hidden_states" (last hidden
            states; the actor projects them with the teacher's output projection, a chunk at a time) or "logits" (the
            plain reference: every logit, vocab_size / hidden_size times larger).
        payload_dtype (str): The dtype that the payload travels in.
        use_dynamic_bsz (bool): Whether micro-batches are cut by tokens instead of by sequences.
        micro_batch_size_per_gpu (Optional[int]): Sequences per teacher forward, without dynamic batching.
        max_token_len_per_gpu (int): Tokens per teacher forward, with dynamic batching.
        dump_freq (int): Every how many steps the KL of single tokens is written; -1 never. Needs
            ``policy_loss.distillation_head=fused``.
        dump_dir (Optional[str]): The folder for it, on the machine of each worker.
        dump_size (int): Sequences per rank and dump.
    """

    model: HFModelConfig = field(default_factory=BaseConfig)
    fsdp_config: FSDPEngineConfig = field(default_factory=FSDPEngineConfig)
    payload: str = "hidden_states"
    payload_dtype: str = "bfloat16"
    use_dynamic_bsz: bool = False
    micro_batch_size_per_gpu: Optional[int] = None
    max_token_len_per_gpu: int = 16384
    dump_freq: int = -1
    dump_dir: Optional[str] = None
    dump_size: int = 16
