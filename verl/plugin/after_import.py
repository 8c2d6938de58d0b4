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
"""Run code right after a module has been imported, without importing it.

VERL loads plugins and external modules while ``verl`` itself is still being imported. Whatever they add to one of its
registries therefore waits for the module that owns the registry, and most processes never import that module at all.
"""

import importlib.abc
import sys
from types import ModuleType
from typing import Callable

__all__ = ["after_import"]

Callback = Callable[[ModuleType], None]


class _AfterImportFinder(importlib.abc.MetaPathFinder):
    """Finds the modules of ``callbacks`` as usual and runs their callback once they have been executed."""

    def __init__(self, callbacks: dict[str, Callback]):
        self._callbacks = callbacks

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in self._callbacks:
            return None
        spec = self._find_as_usual(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        exec_module = spec.loader.exec_module

        def exec_module_then_call(module: ModuleType) -> None:
            exec_module(module)
            self._callbacks[fullname](module)

        spec.loader.exec_module = exec_module_then_call
        return spec

    def _find_as_usual(self, fullname, path, target):
        """Ask the finders behind this one, which may be of this class too."""
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(fullname, path, target) if hasattr(finder, "find_spec") else None
            if spec is not None:
                return spec
        return None


def after_import(callbacks: dict[str, Callback]) -> None:
    """Call each callback with the module of its name as soon as that has been executed, or now if it is there."""
    sys.meta_path.insert(0, _AfterImportFinder(callbacks))
    for name, callback in callbacks.items():
        if name in sys.modules:
            callback(sys.modules[name])
