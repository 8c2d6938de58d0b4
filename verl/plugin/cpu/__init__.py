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
"""Runs VERL's trainer on a machine without an accelerator.

Usage::

    # beside VERL, by pip
    VERL_PLATFORM=cpu python -m verl.trainer.main_on_policy_distillation ...
    # in a patched VERL
    VERL_PLATFORM=cpu VERL_USE_EXTERNAL_MODULES=verl.plugin.cpu python -m verl.trainer.main_ppo ...

Without ``VERL_PLATFORM=cpu`` it only adds the rollout backend ``hf`` (which generates on the CPU) to VERL.

VERL imports this module in every process, while ``verl`` itself is still being imported. Two things follow:

- The platform is registered at once, because VERL's modules ask for the device name as they are imported.
- Nothing else may be imported yet: the workers need a complete ``verl``, and most processes (storage units, reward
  workers) never need them at all. Each remaining registration therefore waits for the VERL module that owns the
  registry, and runs right after that module has been executed, before anybody can look the entry up.
"""

import importlib
import os
from types import ModuleType
from typing import Any

from verl.plugin.after_import import Callback, after_import

from . import platform  # noqa: F401  (registers the platform)


def _use_plain_gloo(distributed: Any) -> None:
    """VERL asks for ``cpu:gloo,<device>:<backend>``, which names the CPU twice here and is refused by torch."""
    initialize = distributed.initialize_global_process_group_ray

    def initialize_global_process_group_ray(timeout_second=None, backend="gloo"):
        initialize(timeout_second=timeout_second, backend=backend)

    distributed.initialize_global_process_group_ray = initialize_global_process_group_ray


def _register_engines(_: ModuleType) -> None:
    importlib.import_module("verl.plugin.cpu.engine")


def _register_rollout(base: ModuleType) -> None:
    base._ROLLOUT_REGISTRY[("hf", "async")] = "verl.plugin.cpu.rollout.ServerAdapter"


def _register_rollout_replica(replica: ModuleType) -> None:
    def load():
        return importlib.import_module("verl.plugin.cpu.rollout").HFReplica

    replica.RolloutReplicaRegistry.register("hf", load)


# With an accelerator only the rollout backend is offered, for machines without vLLM or SGLang; VERL stays as it is.
_AFTER_IMPORT: dict[str, Callback] = {
    "verl.workers.rollout.base": _register_rollout,
    "verl.workers.rollout.replica": _register_rollout_replica,
}
if os.environ.get("VERL_PLATFORM", "").strip().lower() == platform.PLATFORM_NAME:
    _AFTER_IMPORT |= {
        "verl.utils.distributed": _use_plain_gloo,
        "verl.workers.engine.fsdp.transformer_impl": _register_engines,
    }

after_import(_AFTER_IMPORT)
