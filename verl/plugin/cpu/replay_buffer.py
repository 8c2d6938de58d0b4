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
"""The synchronous replay buffer with a poll interval of its own.

VERL's looks for finished rollouts every two seconds, at least twice a step: most of a small model's step on a CPU.
Chosen by ``trainer.v1.sampler.custom_sampler``. VERL leaves group filtering (DAPO) to a custom sampler; this one does
none.
"""

from omegaconf import DictConfig

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer


class FastPollReplayBuffer(ReplayBuffer):
    """Polls every ``trainer.v1.sampler.sampler_kwargs.poll_interval`` seconds."""

    def __init__(self, *, trainer_mode: str, sampler_kwargs: DictConfig, **kwargs):
        if trainer_mode != "sync":
            raise ValueError(f"FastPollReplayBuffer samples synchronously, got trainer_mode={trainer_mode!r}")
        super().__init__(
            trainer_mode=trainer_mode,
            sampler_kwargs=sampler_kwargs,
            poll_interval=sampler_kwargs.poll_interval,
            **kwargs,
        )
