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
"""The registered losses on whole logits inside VERL's own engine: what the student's head is compared with.

VERL's engine calls a loss twice where its own top-k distillation is on: in the forward with the student's logits, then
with everything else. The oracle keeps the logits in between, which no code of the package does.
"""

import copy
from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM

from verl.trainer.ppo.core_algos import get_policy_loss_fn, register_policy_loss
from verl.utils.metric import AggregationType, Metric
from verl.workers.utils.losses import ppo_loss

NAME = "dense_oracle"
FLAGS = {"distillation_use_topk": True}


class DenseOracle:
    def __init__(self, config, teacher_path):
        register_policy_loss(NAME)(bound_loss)
        self.config, self.loss_mode = config, config.policy_loss.loss_mode
        self.teacher = AutoModelForCausalLM.from_pretrained(teacher_path, attn_implementation="eager").eval()
        self.bound = copy.copy(config)
        object.__setattr__(self.bound, "policy_loss", replace(config.policy_loss, loss_mode=NAME))

    def __call__(self, model_output=None, data=None, dp_group=None, student_logits=None):
        if student_logits is not None:
            self.packed = student_logits.squeeze(0)
            return {}
        self.logits, self.metrics, self.data = self.response_logits(data), {}, data
        oracles.append(self)
        try:
            if self.loss_mode == "hybrid_rl_distillation":
                loss, metrics = ppo_loss(self.bound, model_output, data, dp_group)
            else:
                self.config.global_batch_info.update(
                    {name: data[name] for name in ("dp_size", "batch_num_tokens", "global_batch_size")}
                )
                mask = data["response_mask"].to_padded_tensor(0)
                loss, metrics = self.policy_loss(None, None, None, mask, self.config.loss_agg_mode, self.config)
        finally:
            oracles.pop()
        return loss, metrics | self.metrics

    def response_logits(self, data):
        """Both sides' (batch, longest response, shared vocabulary), one sequence at a time."""
        self.teacher.to(self.packed.device)
        student, teacher, end = [], [], 0
        for prompt, response in zip(data["prompts"].unbind(), data["responses"].unbind(), strict=True):
            first, end = end + len(prompt) - 1, end + len(prompt) + len(response)
            student.append(self.packed[first : end - 1] * data["temperature"])
            with torch.no_grad():
                whole = self.teacher(torch.cat((prompt, response)).unsqueeze(0)).logits[0].float()
            teacher.append(whole[len(prompt) - 1 : -1])
        vocab = min(student[0].shape[-1], teacher[0].shape[-1])
        student, teacher = (
            torch.nn.utils.rnn.pad_sequence([rows[:, :vocab] for rows in side], batch_first=True)
            for side in (student, teacher)
        )
        return {"student_logits": student, "teacher_logits": teacher}

    def policy_loss(self, *arguments, **named):
        output = get_policy_loss_fn(self.loss_mode)(*arguments, **named, **self.logits)
        metrics = dict(output.metrics)
        share = int((self.data["response_mask"].values() != 0).sum()) * self.data["dp_size"]
        for name in [name for name in metrics if name.startswith("distillation/")]:
            factor = 1.0 if name == "distillation/loss" else share / self.data["batch_num_tokens"]
            self.metrics[name] = Metric(AggregationType.SUM, metrics.pop(name) * factor)
        return output[0], metrics


oracles: list[DenseOracle] = []  # the one whose loss is being computed


def bound_loss(**arguments):
    return oracles[-1].policy_loss(**arguments)
