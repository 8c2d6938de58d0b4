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
"""Registers the baselines of `baselines.py` in VERL. VERL imports this module in every process:

    VERL_PLATFORM=cpu VERL_USE_EXTERNAL_MODULES=verl_on_policy_distillation,baselines_plugin

It does so while `verl` itself is being imported, so each registration waits for the module that it is about.
"""

import functools
from types import ModuleType

import torch
from baselines import SAMPLED_K1, TRUNCATED, sampled_k1_advantages

from verl.plugin.after_import import after_import


def truncated_rows(name: str, d, beta: float) -> torch.Tensor:
    """An entry of DIVERGENCES: returns the values and leaves the gradient in `d.s`."""
    function, k = TRUNCATED[name]
    value, gradient = function(d.log_s, d.log_t, k)
    d.s.copy_(gradient)
    return value


def _register_truncated(divergence: ModuleType) -> None:
    divergence.DIVERGENCES.update({name: functools.partial(truncated_rows, name) for name in TRUNCATED})


def _register_k1(core_algos: ModuleType) -> None:
    """The name. Given the estimator as its advantages, VERL's own PPO loss is the policy gradient."""
    core_algos.POLICY_LOSS_REGISTRY[SAMPLED_K1] = core_algos.POLICY_LOSS_REGISTRY["vanilla"]


def _give_advantages(worker: ModuleType) -> None:
    """Puts the estimator in place of the advantages of a rank's batch before its update."""
    update_actor = worker._WorkerWithTeachers.update_actor

    @functools.wraps(update_actor)
    def update_with_advantages(self, data):
        if self.config.actor.policy_loss.hybrid_rl_loss_mode == SAMPLED_K1:
            signal = self.teachers.signal(data, torch.device("cpu"))
            data["advantages"] = sampled_k1_advantages(signal.logits(), data["responses"], data["old_log_probs"])
        return update_actor(self, data)

    worker._WorkerWithTeachers.update_actor = update_with_advantages


after_import(
    {
        "verl.on_policy_distillation.divergence": _register_truncated,
        "verl.trainer.ppo.core_algos": _register_k1,
        "verl.on_policy_distillation.worker": _give_advantages,
    }
)
