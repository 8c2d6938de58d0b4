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
"""A reward manager for training that does not need a reward: it is there for metrics and validation."""

from verl import DataProto
from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager

__all__ = ["OptionalRewardManager"]


class OptionalRewardManager(NaiveRewardManager):
    """Scores as `NaiveRewardManager` does, and gives 0 to a sample without a ground truth or a scoring rule."""

    async def run_single(self, data: DataProto) -> dict:
        unscored = {"reward_score": 0.0, "reward_extra_info": {}}
        sample = data[-1:][0].non_tensor_batch
        if "data_source" not in sample or "ground_truth" not in (sample.get("reward_model") or {}):
            return unscored
        try:
            return await super().run_single(data)
        except NotImplementedError:  # VERL's word for a data source that it has no rule for
            return unscored
