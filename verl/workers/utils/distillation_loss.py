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
"""What a training engine calls for the two distillation losses: carries its tensors to the registered policy loss.

With ``distillation_head=fused`` the engine asks for a task before the forward, and the student's head carries it out;
the loss call that follows the forward finds the divergences computed.

With ``distillation_head=dense`` the engine calls its loss function twice per micro-batch. First, inside the forward,
with the student's logits (the hook that VERL's own top-k distillation uses); then with everything else. The registered
loss needs both, so the first call keeps the logits until the second, which follows at once.
"""

from typing import Any, Optional

import torch
from tensordict import TensorDict

from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.trainer.ppo.on_policy_distillation import (
    PURE,
    DistillationLossConfig,
    HeadDivergence,
    StudentLogits,
    TeacherLogits,
    token_weights,
)
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.utils.divergence import DenseLogits, DivergenceSpec, LinearLogits, LogitSource, TokenDivergence
from verl.utils.metric import AggregationType, Metric
from verl.utils.output_projection import OutputProjection, checkpoint_folder, find_output_projection
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.config import ActorConfig
from verl.workers.config.teacher import TeacherConfig
from verl.workers.utils.distillation_dump import DUMP_FLAG, TokenDump
from verl.workers.utils.distillation_head import DivergenceTask, HeadTask, PolicyTask
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.response_rows import padded_rows, response_rows

__all__ = ["DistillationActorLoss", "build_distillation_loss"]


def build_distillation_loss(config: ActorConfig, teacher_config: Optional[TeacherConfig]) -> "DistillationActorLoss":
    """The actor's loss function. Reads the teacher's output projection from its checkpoint, once per rank."""
    if teacher_config is None:
        raise ValueError(
            f"actor_rollout_ref.actor.policy_loss.loss_mode={config.policy_loss.loss_mode}: this trainer gives its "
            "workers no teacher; train with verl.trainer.main_ppo and trainer.use_v1=True."
        )
    projection = None
    if teacher_config.payload == "hidden_states":
        model = teacher_config.model
        tied = bool(model.hf_config.get_text_config().tie_word_embeddings)
        file = find_output_projection(checkpoint_folder(model.local_path), tied)
        dtype = PrecisionType.to_dtype(teacher_config.fsdp_config.model_dtype)
        projection = file.load(device=get_device_id(), dtype=dtype)
    return DistillationActorLoss(config, projection, teacher_config.dump_size)


class DistillationActorLoss:
    """Loss function of a training engine for ``policy_loss.loss_mode`` on_policy_distillation or hybrid.

    Args:
        config: the actor's configuration; ``policy_loss`` names the loss and holds its keys.
        projection: the teacher's output projection where ``teacher_payload`` is hidden states; None where it is logits.
        dump_size: sequences per rank in the dump of a step.
    """

    def __init__(self, config: ActorConfig, projection: Optional[OutputProjection], dump_size: int):
        self.config = config
        self.projection = projection
        self._packed_logits: Optional[torch.Tensor] = None
        self._task: Optional[HeadTask] = None
        self._dump_size = dump_size
        self._dump: Optional[TokenDump] = None

    @property
    def is_pure(self) -> bool:
        return self.config.policy_loss.loss_mode == PURE

    def __call__(
        self,
        model_output: Optional[dict[str, torch.Tensor]] = None,
        data: Optional[TensorDict] = None,
        dp_group: Any = None,
        student_logits: Optional[torch.Tensor] = None,
    ) -> Any:
        """The engine's two calls.

        Args:
            model_output: per-token outputs; the hybrid loss reads ``log_probs`` (and ``entropy``, if computed). After
                a `head_task`, what its `model_output` returned.
            data: the micro-batch, with the nested ``teacher_payload``.
            dp_group: passed on to VERL's PPO loss.
            student_logits: first call only: (1, total tokens, vocab), divided by the sampling temperature.

        Returns:
            First call: {}, no per-token outputs. Second call: (loss, metrics).
        """
        if student_logits is not None:
            self._packed_logits = student_logits.squeeze(0)
            return {}
        policy_loss = _BoundPolicyLoss(self.config, data, self._compared(model_output or {}, data))
        if self.is_pure:
            return self._pure(policy_loss, data)
        loss, metrics = ppo_loss(self.config, model_output, data, dp_group, policy_loss_fn=policy_loss)
        return loss, metrics | policy_loss.metrics

    def head_task(self, data: TensorDict) -> HeadTask:
        """What the student's head shall compute for the micro-batch `data`; the loss call for it follows."""
        packed = response_rows(data)
        rows = packed
        if not tu.get_non_tensor_data(data=data, key="use_remove_padding", default=True):
            rows = padded_rows(packed, data["input_ids"].offsets())
        self._task = self._divergence_task(data, rows) if self.is_pure else self._policy_task(data, rows, packed)
        return self._task

    def _divergence_task(self, data: TensorDict, rows: torch.Tensor) -> DivergenceTask:
        self._set_global_batch_info(data)
        is_token = data["response_mask"].values() != 0
        weights = token_weights(_padded_mask(data), self.config.loss_agg_mode, self.config)
        teacher = self._teacher_source(data["teacher_payload"].values()[is_token])
        return DivergenceTask(
            rows=rows[is_token], teacher=teacher, spec=self._spec, token_weights=weights, dumped=self._dumped(data)
        )

    def _policy_task(self, data: TensorDict, rows: torch.Tensor, packed_rows: torch.Tensor) -> PolicyTask:
        return PolicyTask(
            rows=rows,
            packed_rows=packed_rows,
            teacher=self._teacher_source(data["teacher_payload"].values()),
            spec=self._spec,
            labels=data["responses"].values(),
            temperature=float(data["temperature"]),
            calculate_entropy=tu.get_non_tensor_data(data=data, key="calculate_entropy", default=False),
            dumped=(data["response_mask"].values() != 0).nonzero().squeeze(-1)[self._dumped(data)],
        )

    @property
    def _spec(self) -> DivergenceSpec:
        return DistillationLossConfig.from_config(self.config).divergence

    def _compared(self, model_output: dict[str, torch.Tensor], data: TensorDict) -> dict[str, Any]:
        """The registered loss's ``student_logits`` and ``teacher_logits``."""
        task, self._task = self._task, None
        if task is None:
            logits, self._packed_logits = self._packed_logits, None
            return self._response_logits(logits, data)
        if self.is_pure:
            computed = HeadDivergence(task.tokens, loss=model_output["distillation_loss"])
        else:
            is_token = data["response_mask"].values() != 0  # the policy task covers every response token
            computed = HeadDivergence(TokenDivergence(*(column[is_token] for column in task.tokens)))
        if self._dump is not None and task.tops is not None:
            self._dump.write(data, computed.tokens.reverse_kl, *task.tops)
        return {"student_logits": computed}

    def _dumped(self, data: TensorDict) -> torch.Tensor:
        """(d,) which tokens of the loss go into this step's dump; none in most steps."""
        path = tu.get_non_tensor_data(data=data, key=DUMP_FLAG, default=None)
        if path is None:
            return torch.arange(0)
        if self._dump is None or self._dump.path != path:
            self._dump = TokenDump(path, self.config.model_config.tokenizer, self._dump_size)
        return torch.arange(self._dump.num_tokens(data), device=data["responses"].device)

    def _set_global_batch_info(self, data: TensorDict) -> None:
        for key in ("dp_size", "batch_num_tokens", "global_batch_size"):
            self.config.global_batch_info[key] = data[key]
        self.config.global_batch_info["loss_scale_factor"] = self.config.loss_scale_factor

    def _pure(self, policy_loss: "_BoundPolicyLoss", data: TensorDict) -> tuple[torch.Tensor, dict[str, Metric]]:
        self._set_global_batch_info(data)
        loss, _ = policy_loss(
            old_log_prob=None,
            log_prob=None,
            advantages=None,
            response_mask=_padded_mask(data),
            loss_agg_mode=self.config.loss_agg_mode,
            config=self.config,
            rollout_is_weights=None,
        )
        return loss, policy_loss.metrics

    def _response_logits(self, logits: torch.Tensor, data: TensorDict) -> dict[str, Any]:
        """Both sides over the (batch, response length) grid of `data`, cut to the vocabulary they share.

        Checkpoints of one tokenizer may pad their vocabularies differently (Qwen2.5: 151,936 and 152,064); the entries
        beyond the shorter are padding on both sides.
        """
        payload = data["teacher_payload"]
        source = self._teacher_source(payload.values()).cut(logits.shape[-1])
        student_row = _grid(response_rows(data), payload.offsets())
        teacher_row = _grid(torch.arange(source.shape[0], device=logits.device), payload.offsets())
        return {
            "student_logits": StudentLogits(
                logits[:, : source.shape[-1]], student_row, scale=float(data["temperature"])
            ),
            "teacher_logits": TeacherLogits(source, teacher_row),
        }

    def _teacher_source(self, rows: torch.Tensor) -> LogitSource:
        if self.projection is None:
            return DenseLogits(rows)
        return LinearLogits(rows, self.projection.weight, self.projection.bias)


def _padded_mask(data: TensorDict) -> torch.Tensor:
    """(batch, longest response) bool."""
    return data["response_mask"].to_padded_tensor(0).bool()


class _BoundPolicyLoss:
    """The registered policy loss, bound to what one micro-batch compares, in the form that VERL's `ppo_loss` calls.

    This is the one place that adapts the documented 4-tuple to VERL's ``(loss, metrics)``. The distillation metrics
    stay on `self.metrics`: VERL averages a loss's metrics over micro-batches, which is wrong for means over tokens.
    """

    def __init__(self, config: ActorConfig, data: TensorDict, compared: dict[str, Any]):
        self._function = get_policy_loss_fn(config.policy_loss.loss_mode)
        self._compared = compared
        # A sum over micro-batches and a mean over ranks of this share give the mean over the global batch's tokens.
        num_tokens = int((data["response_mask"].values() != 0).sum())
        self._share = num_tokens * data["dp_size"] / max(data["batch_num_tokens"], 1)
        self.metrics: dict[str, Metric] = {}

    def __call__(self, **arguments: Any) -> tuple[torch.Tensor, dict[str, float]]:
        output = self._function(**arguments, **self._compared)
        loss, *_ = output
        rl_metrics = dict(output.metrics)
        for name in [name for name in rl_metrics if name.startswith("distillation/")]:
            value = rl_metrics.pop(name)
            # `agg_loss` has already normalized the loss by the global batch.
            share = 1.0 if name == "distillation/loss" else self._share
            self.metrics[name] = Metric(AggregationType.SUM, value * share)
        return loss, rl_metrics


def _grid(rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """(total response tokens,) laid out as (batch, longest response), right-padded with 0."""
    lengths = offsets.diff()
    is_token = torch.arange(int(lengths.max()), device=rows.device) < lengths.unsqueeze(1)
    return rows.new_zeros(is_token.shape).masked_scatter(is_token, rows)
