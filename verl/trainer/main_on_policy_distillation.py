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
"""VERL's ``main_ppo`` with a teacher, beside an unpatched VERL::

    python -m verl.trainer.main_on_policy_distillation <the arguments of verl.trainer.main_ppo>

With any other policy loss it is ``main_ppo``, and says how the run goes; in a patched VERL it is always ``main_ppo``.
"""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from verl.on_policy_distillation import hydra_source
from verl.on_policy_distillation.checks import prepare, refuse_misspelt_overrides
from verl.trainer import main_ppo

__all__ = ["main", "run"]


def _is_patched() -> bool:
    """Whether this file is in VERL's own directory, where `main_ppo` does all of this by itself."""
    return Path(__file__).resolve().parent == Path(main_ppo.__file__).resolve().parent


def run(config: DictConfig) -> None:
    """`main_ppo.main` for a composed configuration; the trainer shows its progress, with a teacher if it needs one."""
    if not _is_patched():
        prepare(config)  # of another loss too: it may be one of ours misspelt, or have a teacher that it would ignore
        if config.trainer.use_v1:  # a distillation loss has been refused without it
            from verl.on_policy_distillation.trainer import task_runner_class

            # The body of VERL's main, which a fork may have edited, hands this class to Ray.
            main_ppo.TaskRunnerV1 = task_runner_class(main_ppo.TaskRunnerV1)
    main_ppo.main.__wrapped__(config)


def _task(config: DictConfig) -> None:
    run(config)


# Hydra takes the task's file for the place that `--config-path` is relative to: let it be `main_ppo`'s, as in
# `python -m verl.trainer.main_ppo`.
_task.__code__ = _task.__code__.replace(
    co_filename=main_ppo.__file__, co_firstlineno=main_ppo.main.__wrapped__.__code__.co_firstlineno
)
_task.__module__ = "__main__"


def main() -> None:
    """Compose the configuration from the command line as `main_ppo` does, with our defaults in it, and run."""
    refuse_misspelt_overrides(sys.argv[1:])
    hydra_source.install()
    hydra.main(config_path="config", config_name="ppo_trainer", version_base=None)(_task)()


if __name__ == "__main__":
    main()
