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

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from types import ModuleType

import torch
from baselines import FORWARD_KL_TOPK, SAMPLED_K1, TOP_K, forward_kl_topk, log_prob_of, sampled_k1_advantage


def _register_topk(divergence: ModuleType) -> None:
    divergence.DIVERGENCES[FORWARD_KL_TOPK] = lambda d, beta: forward_kl_topk(d.log_s, d.log_t, TOP_K)


class _Response:
    """The tokens of the micro-batch that the loss is being computed of; a policy loss is not given them."""

    tokens: torch.Tensor


def _register_k1(losses: ModuleType) -> None:
    """Gives the RL term of the hybrid loss the estimator as its advantage, when `sampled_k1` is chosen."""
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    hybrid = POLICY_LOSS_REGISTRY[losses.HYBRID]

    def with_sampled_advantage(old_log_prob, log_prob, advantages, response_mask, *args, teacher_logits, **kwargs):
        if kwargs["config"].policy_loss.hybrid_rl_loss_mode == SAMPLED_K1:
            teacher = log_prob_of(teacher_logits, _Response.tokens, response_mask)
            advantages = sampled_k1_advantage(teacher, old_log_prob, response_mask)
        return hybrid(old_log_prob, log_prob, advantages, response_mask, *args, teacher_logits=teacher_logits, **kwargs)

    POLICY_LOSS_REGISTRY[SAMPLED_K1] = POLICY_LOSS_REGISTRY["vanilla"]
    POLICY_LOSS_REGISTRY[losses.HYBRID] = with_sampled_advantage


def _remember_tokens(distillation_loss: ModuleType) -> None:
    call = distillation_loss.DistillationActorLoss.__call__

    def call_and_remember(self, model_output=None, data=None, *args, **kwargs):
        if model_output is not None:
            _Response.tokens = data["responses"].to_padded_tensor(0)
        return call(self, model_output, data, *args, **kwargs)

    distillation_loss.DistillationActorLoss.__call__ = call_and_remember


_AFTER_IMPORT = {
    "verl.utils.divergence": _register_topk,
    "verl.trainer.ppo.on_policy_distillation": _register_k1,
    "verl.workers.utils.distillation_loss": _remember_tokens,
}


class _AfterImportFinder(MetaPathFinder):
    """Finds the modules of `_AFTER_IMPORT` as usual and runs their function once they have been executed."""

    def find_spec(self, fullname, path=None, target=None):
        spec = PathFinder.find_spec(fullname, path, target) if fullname in _AFTER_IMPORT else None
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def execute_then_register(module: ModuleType) -> None:
            execute(module)
            _AFTER_IMPORT[fullname](module)

        spec.loader.exec_module = execute_then_register
        return spec


sys.meta_path.insert(0, _AfterImportFinder())
