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

    VERL_USE_EXTERNAL_MODULES=verl.plugin.cpu,baselines_plugin

It does so while `verl` itself is being imported, so each registration waits for the module that it is about.
"""

from types import ModuleType

import torch
from baselines import FORWARD_KL_TOPK, SAMPLED_K1, TOP_K, forward_kl_topk, sampled_k1_advantages

from verl.plugin.cpu import after_import


def _topk_rows(d, beta: float) -> torch.Tensor:
    """An entry of DIVERGENCES: returns the values and leaves the gradient in `d.s`."""
    value, gradient = forward_kl_topk(d.log_s, d.log_t, TOP_K)
    d.s.copy_(gradient)
    return value


def _register_topk(divergence: ModuleType) -> None:
    divergence.DIVERGENCES[FORWARD_KL_TOPK] = _topk_rows


def _register_k1(core_algos: ModuleType) -> None:
    """The name. Given the estimator as its advantages, VERL's own PPO loss is the policy gradient."""
    core_algos.POLICY_LOSS_REGISTRY[SAMPLED_K1] = core_algos.POLICY_LOSS_REGISTRY["vanilla"]


def _give_advantages(distillation_loss: ModuleType) -> None:
    """Puts the estimator in place of the advantages of a micro-batch before its loss is computed."""
    call = distillation_loss.DistillationActorLoss.__call__

    def call_with_advantages(self, model_output=None, data=None, *args, **kwargs):
        if model_output is not None and self.config.policy_loss.hybrid_rl_loss_mode == SAMPLED_K1:
            weight, bias = (None, None) if self.projection is None else (self.projection.weight, self.projection.bias)
            data["advantages"] = sampled_k1_advantages(
                data["teacher_payload"], weight, bias, data["responses"], data["old_log_probs"]
            )
        return call(self, model_output, data, *args, **kwargs)

    distillation_loss.DistillationActorLoss.__call__ = call_with_advantages


after_import(
    {
        "verl.utils.divergence": _register_topk,
        "verl.trainer.ppo.core_algos": _register_k1,
        "verl.workers.utils.distillation_loss": _give_advantages,
    }
)
