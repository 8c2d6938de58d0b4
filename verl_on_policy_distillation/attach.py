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
"""Serves our files of the package ``verl`` to the VERL that is imported. Standard library only."""

import importlib
import importlib.abc
import importlib.util
import logging
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Iterable

from .guard import refuse_without_teacher
from .repeats import drop_repeats

__all__ = ["DISTRIBUTION", "FILES", "Finder", "attach", "is_patched"]

logger = logging.getLogger(__name__)

DISTRIBUTION = "verl-on-policy-distillation"
LOSSES = "verl.trainer.ppo.on_policy_distillation"
REGISTRY = "verl.trainer.ppo.core_algos"
CHECKS = "verl.utils.config"
CPU_PLATFORM = "verl.plugin.cpu"
CONTINUOUS_TOKENS = "verl.utils.tokenizer.continuous_token_wiring"


def _files() -> Path:
    here = Path(__file__).resolve().parent
    installed, repository = here / "files", here.parent / "verl"
    return installed if installed.is_dir() else repository


FILES = _files()  # below it stands what a patched VERL has below verl/


def is_patched(verl_path: Iterable[str]) -> bool:
    """Whether the package with this ``__path__`` has files of its own for our names."""
    return any((Path(folder) / "trainer" / "ppo" / "on_policy_distillation.py").is_file() for folder in verl_path)


class Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of `files` under ``verl``, and nothing else. It comes last: what VERL has is VERL's."""

    def __init__(self, files: Path):
        self.files = files

    def find_spec(self, fullname, path=None, target=None):
        root, _, name = fullname.partition(".")
        verl = sys.modules.get("verl")
        if root != "verl" or not name or verl is None or is_patched(verl.__path__):
            return None
        base = self.files.joinpath(*name.split("."))
        package = base / "__init__.py"
        if package.is_file():
            return importlib.util.spec_from_file_location(fullname, package, submodule_search_locations=[str(base)])
        module = base.with_name(base.name + ".py")
        return importlib.util.spec_from_file_location(fullname, module) if module.is_file() else None


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _register_losses(_: ModuleType) -> None:
    try:
        importlib.import_module(LOSSES)
    except Exception as error:
        # Training with another loss goes on, as it does without this package.
        message = "%s: %s could not be imported, so its policy losses are not registered: %s"
        logger.warning(message, DISTRIBUTION, LOSSES, _text(error), exc_info=True)


def _check_trainer(module: ModuleType) -> None:
    if not is_patched(sys.modules["verl"].__path__):
        refuse_without_teacher(module)


def _register_cpu(_: ModuleType) -> None:
    importlib.import_module(CPU_PLATFORM)


def _load_after_import():
    """``verl.plugin.after_import`` under a name of our own: under its own it would import ``verl`` first."""
    path = FILES / "plugin" / "after_import.py"
    spec = importlib.util.spec_from_file_location(f"{__package__}.after_import", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.after_import


def _attach() -> None:
    if any(isinstance(finder, Finder) for finder in sys.meta_path):
        return
    callbacks = {REGISTRY: _register_losses, CHECKS: _check_trainer, CONTINUOUS_TOKENS: drop_repeats}
    if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu":
        callbacks["verl"] = _register_cpu
    after_import = _load_after_import()
    sys.meta_path.append(Finder(FILES))
    after_import(callbacks)


def attach() -> None:
    """Make our modules importable and let the losses register; a second call does nothing.

    It does not raise, because VERL would say so at DEBUG only: a failure is a warning.
    """
    try:
        _attach()
    except Exception as error:
        logger.warning("%s: could not attach to VERL: %s", DISTRIBUTION, _text(error), exc_info=True)
