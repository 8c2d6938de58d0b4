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
"""On-policy distillation beside any VERL: importing this package gives VERL the modules that a patched one has.

`import verl` imports it (entry point of the group ``verl.plugins``), in every process. Three things happen then. All
are cheap, and none loads torch or the trainer:

- The repository's files of the package ``verl``, which are installed in a directory of their own, become importable
  under their names: ``verl.trainer.ppo.on_policy_distillation`` and so on.
- The two policy losses register as soon as somebody imports VERL's registry, ``verl.trainer.ppo.core_algos``.
- A warning that VERL repeats for every sample is said once in each process (``repeats.py``).

A VERL that has the patch is left alone: it has its own files. ``VERL_PLATFORM=cpu`` registers the CPU platform. Where
plugins are switched off, ``VERL_USE_EXTERNAL_MODULES=verl_on_policy_distillation`` does the same.
"""

from .attach import attach

__all__ = ["attach"]

attach()
