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
"""VERL's configuration with overrides, as its trainer composes it."""

from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from verl.on_policy_distillation import hydra_source


def composed(*overrides: str) -> DictConfig:
    """Raises what Hydra does for a key that VERL does not have."""
    hydra_source.install()
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=list(overrides))
