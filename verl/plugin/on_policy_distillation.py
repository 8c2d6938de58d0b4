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
"""Entry point of the ``verl.plugins`` group: ``import verl`` loads this module where the package is pip-installed.

It registers the two policy losses for custom trainers. VERL's own trainer needs the patch as well, for the teacher. An
unpatched trainer would find that out at its first update, minutes in; here it is told when it checks its configuration.
"""

import functools
import importlib.util

import verl.utils.config
from verl.trainer.ppo.on_policy_distillation import is_distillation_loss

__all__: list[str] = []


def _is_patched() -> bool:
    return importlib.util.find_spec("verl.trainer.ppo.distillation_setup") is not None


def _refuse_without_teacher(validate_config):
    @functools.wraps(validate_config)
    def validate(config, *args, **kwargs):
        loss_mode = config.actor_rollout_ref.actor.policy_loss.loss_mode
        if is_distillation_loss(loss_mode):
            raise ValueError(
                f"actor_rollout_ref.actor.policy_loss.loss_mode={loss_mode} needs a teacher, which this VERL's trainer "
                "does not have: apply 0001-on-policy-distillation.patch to it (./apply_patch.sh), or call the loss "
                "from a trainer of your own with get_policy_loss_fn."
            )
        return validate_config(config, *args, **kwargs)

    return validate


if not _is_patched():
    # VERL has no hook for checks on its configuration; its entry points all import this function after the plugins.
    verl.utils.config.validate_config = _refuse_without_teacher(verl.utils.config.validate_config)
