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
"""VERL's FSDP engine on both sides: a teacher whose forward ends in a signal, a student whose forward ends in columns.

Both let the model run its own forward up to the output layer, and take over there (`end_at_output_layer`). That is
inside the model's forward, so sharded weights have been gathered, and their gradients are reduced as any other's.
"""

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Optional

import torch
from tensordict import TensorDict

from verl.on_policy_distillation.dump import TokenDump
from verl.on_policy_distillation.head import LinearLogits
from verl.on_policy_distillation.losses import HeadColumns
from verl.on_policy_distillation.output_projection import LogitTransform, logit_transform
from verl.on_policy_distillation.signal import Signal
from verl.on_policy_distillation.tokens import TokenPlan, plan_tokens
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name
from verl.utils.fsdp_utils import fsdp_version
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

__all__ = [
    "ENDS_IN_COLUMNS",
    "ENDS_IN_ROWS",
    "STUDENT",
    "TEACHER_HIDDEN_STATES",
    "TEACHER_LOGITS",
    "TEACHER_ROW",
    "FSDPStudentEngine",
    "FSDPTeacherHiddenStatesEngine",
    "FSDPTeacherLogitsEngine",
    "end_at_output_layer",
    "output_layer_logits",
    "reshard_root",
]

TEACHER_ROW = "teacher_row"  # (batch,) in a batch that a teacher scores or has scored: row ids of `SignalStore`
ENDS_IN_COLUMNS = "ends_in_columns"  # flag of a batch in which the student's forward ends in columns
ENDS_IN_ROWS = "ends_in_rows"  # flag of a batch that the student scores as its own teacher

# The keys of the engines in VERL's registry.
STUDENT, TEACHER_HIDDEN_STATES, TEACHER_LOGITS = (
    "distillation_student",
    "distillation_teacher_hidden_states",
    "distillation_teacher_logits",
)
# The device as VERL looks it up.
_WHERE = {"backend": ["fsdp", "fsdp2"], "device": os.getenv("VERL_ENGINE_DEVICE") or get_device_name()}

# the ids of a micro-batch's samples, and the rows of each on the host
Keep = Callable[[torch.Tensor, Sequence[torch.Tensor]], None]
# hidden states (rows, H) and the output layer they are the input of -> what the model returns
OutputFunction = Callable[[torch.Tensor, torch.nn.Module], dict[str, torch.Tensor]]


def end_at_output_layer(model: torch.nn.Module) -> None:
    """Give a causal language model the keyword ``output_function``, which replaces its output layer in one forward.

    ``model(..., output_function=f)`` runs up to the output layer and returns f(hidden states, layer); without the
    keyword nothing changes. What a model does after the layer (soft caps, scales) runs on no rows; see
    `output_layer_logits`.
    """
    forward = model.forward

    @functools.wraps(forward)
    def forward_to_output_layer(*args, output_function: Optional[OutputFunction] = None, **kwargs):
        if output_function is None:
            return forward(*args, **kwargs)
        layer, tap = model.get_output_embeddings(), _Tap()
        model.set_output_embeddings(tap)
        try:
            forward(*args, **kwargs)
        finally:
            model.set_output_embeddings(layer)
        if len(tap.inputs) != 1:
            raise RuntimeError(
                f"{type(model).__name__} calls its output layer {len(tap.inputs)} times in a forward, and distillation "
                "needs one: switch off what adds heads, such as actor_rollout_ref.model.mtp.enable."
            )
        return _call_as(layer, output_function, tap.inputs[0].flatten(0, -2))

    model.forward = forward_to_output_layer


class _Tap(torch.nn.Module):
    """In the place of an output layer: keeps its input, and gives what follows none of the rows."""

    def __init__(self):
        super().__init__()
        self.inputs: list[torch.Tensor] = []

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.inputs.append(hidden)
        return hidden[..., :0, :]


def _call_as(layer: torch.nn.Module, function: OutputFunction, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    """`function` in the place of `layer`'s forward, so that a layer that is sharded by itself is gathered for it."""
    inner = getattr(layer, "_fsdp_wrapped_module", layer)  # FSDP1 puts a module of its own around such a layer
    own_forward = inner.__dict__.get("forward")
    inner.forward = lambda inputs: function(inputs, inner)
    try:
        return layer(hidden)
    finally:
        del inner.forward
        if own_forward is not None:
            inner.forward = own_forward


def output_layer_logits(hidden: torch.Tensor, layer: torch.nn.Module, transform: LogitTransform) -> LinearLogits:
    """The logits of `hidden` (n, H) that the output layer and what follows it stand for, not yet projected."""
    return LinearLogits(hidden, layer.weight, layer.bias, transform.scale, transform.softcap)


def _require_linear_output_layer(model: torch.nn.Module, fix: str) -> None:
    layer = model.get_output_embeddings()
    if not isinstance(layer, torch.nn.Linear):
        raise ValueError(
            f"the output layer of {type(model).__name__} is a {type(layer).__name__}, and distillation reads it as a "
            f"plain matrix (torch.nn.Linear): {fix}."
        )


class _EngineToOutputLayer(FSDPEngineWithLMHead):
    def __init__(self, model_config: Any, *args, **kwargs):
        # The registry's key names the kind of engine; to the model builder each is a language model.
        model_config.model_type = "language_model"
        super().__init__(model_config, *args, **kwargs)

    def _build_module(self):
        module = super()._build_module()
        end_at_output_layer(module)
        return module


@EngineRegistry.register(model_type=STUDENT, **_WHERE)
class FSDPStudentEngine(_EngineToOutputLayer):
    """VERL's engine, and of a batch with the flag `ENDS_IN_COLUMNS` the forward ends in columns: no logits ever exist.

    Everything else (old log-probs, exports) is VERL's.
    """

    def _build_module(self):
        module = super()._build_module()
        _require_linear_output_layer(module, "choose another student")
        return module

    def _build_lora_module(self, module):
        module = super()._build_lora_module(module)
        _require_linear_output_layer(module, "take the adapter off it (actor_rollout_ref.model.target_modules)")
        return module

    def connect(
        self,
        columns: Callable[[TensorDict, TokenPlan], HeadColumns],
        signal: Callable[[TensorDict, LinearLogits], Signal],
        dump: TokenDump,
    ) -> None:
        """Set once, before the first update.

        Args:
            columns: what the loss wants of the head for a micro-batch.
            signal: what the teachers said of a micro-batch's supervised tokens, given the student's head.
            dump: takes the tokens of the steps that are dumped.
        """
        self._columns, self._signal, self._dump = columns, signal, dump

    def connect_as_teacher(self, keep: Keep, keep_head: Callable[[LinearLogits], None], dtype: torch.dtype) -> None:
        """Set once, if the student is its own teacher. `keep_head` sees the head of each micro-batch that is scored."""
        self._keep, self._keep_head, self._dtype = keep, keep_head, dtype

    def prepare_model_inputs(self, micro_batch: TensorDict):
        model_inputs, output_args = super().prepare_model_inputs(micro_batch)
        if tu.get_non_tensor_data(data=micro_batch, key=ENDS_IN_ROWS, default=False):
            output_args["token_plan"] = plan = plan_tokens(micro_batch)
            model_inputs["output_function"] = partial(self._rows, plan)
            output_args[ENDS_IN_ROWS] = True
        elif tu.get_non_tensor_data(data=micro_batch, key=ENDS_IN_COLUMNS, default=False):
            output_args["token_plan"] = plan = plan_tokens(micro_batch)
            model_inputs["output_function"] = partial(self._output, micro_batch, plan)
        return model_inputs, output_args

    def _output(
        self, micro_batch: TensorDict, plan: TokenPlan, hidden: torch.Tensor, layer: torch.nn.Module
    ) -> dict[str, torch.Tensor]:
        student = self._head(plan, hidden, layer)
        teacher = self._signal(micro_batch, student).logits().cut(len(student.weight))
        columns = self._columns(micro_batch, plan)(student, teacher)
        return columns | self._dump.top_columns(micro_batch, student, teacher)

    def _rows(self, plan: TokenPlan, hidden: torch.Tensor, layer: torch.nn.Module) -> dict[str, torch.Tensor]:
        head = self._head(plan, hidden, layer)
        self._keep_head(head)
        return {"hidden_states": head.hidden}

    def _head(self, plan: TokenPlan, hidden: torch.Tensor, layer: torch.nn.Module) -> LinearLogits:
        transform = logit_transform(self.model_config.hf_config.get_text_config())
        return output_layer_logits(hidden[plan.model_row], layer, transform)

    def prepare_model_outputs(self, output, output_args, micro_batch: TensorDict, logits_processor_func):
        """``model_output``: the columns, each nested (batch, prompt and response)."""
        if "token_plan" not in output_args:
            return super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        if ENDS_IN_ROWS in output_args:
            keep_rows(self._keep, output["hidden_states"], self._dtype, micro_batch, output_args["token_plan"])
            return {}
        columns = self._dump.write(micro_batch, output)
        return {name: output_args["token_plan"].spread(column) for name, column in columns.items()}


def keep_rows(keep: Keep, rows: torch.Tensor, dtype: torch.dtype, micro_batch: TensorDict, plan: TokenPlan) -> None:
    """`rows` (supervised tokens, width) of the micro-batch, in `dtype`, to the host."""
    keep(micro_batch[TEACHER_ROW], rows.to(dtype).cpu().split(plan.counts.tolist()))


def reshard_root(module: torch.nn.Module) -> None:
    """Let go of the gathered weights that a forward leaves in the outermost FSDP unit (embeddings, last norm).

    They stay there for the backward, which a teacher has not, and VERL's engine lets go of them only where
    ``fsdp_size`` is above 1.
    """
    if fsdp_version(module) == 2:
        module.reshard()
    elif (handle := module._handle) is not None and handle.uses_sharded_strategy:
        handle.reshard(True)  # as VERL does


class _FSDPTeacherEngine(_EngineToOutputLayer):
    """Forward only. What it says of a micro-batch goes to `connect`'s store at once, and no output is left.

    VERL's engine keeps the output of every micro-batch on the device until the last, and then copies it twice.
    """

    keeps_weights_on_device = False  # to be set before the model is built

    def _build_fsdp_module(self, module):
        if not self.keeps_weights_on_device:
            return super()._build_fsdp_module(module)
        # VERL offloads what is forward-only, and asks for nothing else of it here.
        config = self.engine_config
        self.engine_config = replace(config, forward_only=False)
        try:
            return super()._build_fsdp_module(module)
        finally:
            self.engine_config = config

    def forward_backward_batch(self, data: TensorDict, loss_function: Callable, forward_only: bool = False):
        output = super().forward_backward_batch(data, loss_function, forward_only)
        reshard_root(self.module)
        return output

    def connect(self, keep: Keep, dtype: torch.dtype) -> None:
        """Set once. `keep` takes rows in `dtype`."""
        self._keep, self._dtype = keep, dtype

    def _say(self, rows: torch.Tensor, micro_batch: TensorDict, plan: TokenPlan) -> dict[str, torch.Tensor]:
        """`rows` (supervised tokens, width) of the micro-batch."""
        keep_rows(self._keep, rows, self._dtype, micro_batch, plan)
        return {}


@EngineRegistry.register(model_type=TEACHER_LOGITS, **_WHERE)
class FSDPTeacherLogitsEngine(_FSDPTeacherEngine):
    """The payload is logits; the teacher runs its own head."""

    def prepare_model_outputs(self, output, output_args, micro_batch: TensorDict, logits_processor_func):
        plan = plan_tokens(micro_batch)
        return self._say(output.logits.flatten(0, 1)[plan.model_row], micro_batch, plan)


@EngineRegistry.register(model_type=TEACHER_HIDDEN_STATES, **_WHERE)
class FSDPTeacherHiddenStatesEngine(_FSDPTeacherEngine):
    """The payload is last hidden states. The head is dropped before the model is sharded, so it never runs here."""

    def _build_module(self):
        module = super()._build_module()
        _require_linear_output_layer(module, "set teacher.payload=logits, which lets the teacher run its own head")
        module.set_output_embeddings(torch.nn.Identity())
        return module

    def prepare_model_inputs(self, micro_batch: TensorDict):
        model_inputs, output_args = super().prepare_model_inputs(micro_batch)
        plan = plan_tokens(micro_batch)
        model_inputs["output_function"] = lambda hidden, layer: {"hidden_states": hidden[plan.model_row]}
        return model_inputs, output_args | {"token_plan": plan}

    def prepare_model_outputs(self, output, output_args, micro_batch: TensorDict, logits_processor_func):
        return self._say(output["hidden_states"], micro_batch, output_args["token_plan"])
