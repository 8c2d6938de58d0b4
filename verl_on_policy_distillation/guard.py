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
"""``main_ppo`` of an unpatched VERL has no teacher. It would find that out at its first update, minutes in."""

import functools
from types import ModuleType

__all__ = ["refuse_without_teacher"]


def _check(config) -> None:
    from omegaconf import OmegaConf

    from verl.trainer.ppo.on_policy_distillation import is_distillation_loss

    loss_mode = OmegaConf.select(config, "actor_rollout_ref.actor.policy_loss.loss_mode")
    # `teacher` with its class is what verl.trainer.main_on_policy_distillation composes.
    if is_distillation_loss(loss_mode) and OmegaConf.select(config, "teacher._target_") is None:
        raise ValueError(
            f"actor_rollout_ref.actor.policy_loss.loss_mode={loss_mode} needs a teacher, which this trainer does not "
            "have: run python -m verl.trainer.main_on_policy_distillation with the same arguments, apply the patch to "
            "VERL (./apply_patch.sh), or call the loss from a trainer of your own with get_policy_loss_fn."
        )


def refuse_without_teacher(config_module: ModuleType) -> None:
    """Wrap ``verl.utils.config.validate_config``, which VERL's entry points import after the plugins."""
    validate_config = config_module.validate_config

    @functools.wraps(validate_config)
    def validate(config, *args, **kwargs):
        _check(config)
        return validate_config(config, *args, **kwargs)

    config_module.validate_config = validate  # type: ignore[attr-defined]
