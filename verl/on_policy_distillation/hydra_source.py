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
"""VERL's configuration directory, read as a patched VERL has it.

The patch adds one entry to the defaults lists of two of VERL's YAML files. Beside an unpatched VERL the same entries
are added while Hydra reads these files, and our groups with them, wherever VERL's directory stands in the search path:
as the main directory, or in ``hydra.searchpath``, as ``file://`` or as ``pkg://``. So a user's YAML overrides
our defaults, and the command line overrides both, in a patched VERL and beside an unpatched one alike.
"""

import importlib.util
import posixpath
from pathlib import Path
from typing import Any, Callable

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import Container, DictConfig, OmegaConf

__all__ = ["install"]

OUR_DIRECTORY = Path(__file__).resolve().parents[1] / "trainer" / "config"
OUR_GROUPS = ("policy_loss", "teacher")
SELF = "_self_"


def _is_verl_directory(path: Path) -> bool:
    """Also a copy of VERL's directory, which is how a user may start."""
    return (path / "ppo_trainer.yaml").is_file() and (path / "actor" / "actor.yaml").is_file()


def _add_default(config: DictConfig, key: str, value: str, before_self: bool) -> None:
    """Add `key: value` to the defaults list, unless the file has that group already, as a patched one does."""
    defaults = OmegaConf.to_container(config.get("defaults") or OmegaConf.create([SELF]), resolve=False)
    assert isinstance(defaults, list)
    if any(isinstance(entry, dict) and key in entry for entry in defaults):
        return
    at = defaults.index(SELF) if before_self and SELF in defaults else len(defaults)
    defaults.insert(at, {key: value})
    config["defaults"] = defaults


def _as_patched(name: str, config: Container) -> None:
    """What the patch does to the two YAML files."""
    if not isinstance(config, DictConfig):
        return
    if name == "actor/actor":
        _add_default(config, "../policy_loss@policy_loss", "on_policy_distillation", before_self=False)
    elif name == "ppo_trainer":
        _add_default(config, "teacher@teacher", "teacher", before_self=True)


def _normal(config_path: str) -> str:
    """A defaults list says ``actor/../policy_loss/…``."""
    return posixpath.normpath(config_path) if config_path else ""


class _VerlDirectory(FileConfigSource):
    """VERL's directory and our groups. What VERL has itself is taken from there."""

    def __init__(self, provider: str, directory: Path):
        super().__init__(provider=provider, path=str(directory))
        self._ours = FileConfigSource(provider=provider, path=str(OUR_DIRECTORY))

    def _is_ours(self, config_path: str) -> bool:
        return config_path.split("/")[0] in OUR_GROUPS

    def load_config(self, config_path: str) -> ConfigResult:
        name = _normal(config_path)
        if self._is_ours(name) and not super().is_config(name):
            return self._ours.load_config(name)
        result = super().load_config(name)
        _as_patched(name.removesuffix(".yaml"), result.config)
        return result

    def is_group(self, config_path: str) -> bool:
        name = _normal(config_path)
        return super().is_group(name) or (self._is_ours(name) and self._ours.is_group(name))

    def is_config(self, config_path: str) -> bool:
        name = _normal(config_path)
        return super().is_config(name) or (self._is_ours(name) and self._ours.is_config(name))

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        name = _normal(config_path)
        found = set(super().list(name, results_filter)) if super().is_group(name) else set()
        if self._is_ours(name) and self._ours.is_group(name):
            found |= set(self._ours.list(name, results_filter))
        elif not name and results_filter != ObjectType.CONFIG:
            found |= set(OUR_GROUPS)
        return sorted(found)


def _file_directory(path: str) -> Path | None:
    return Path(path.removeprefix("file://"))


def _package_directory(path: str) -> Path | None:
    """Directory of ``pkg://a.b`` or ``pkg://a/b``."""
    try:
        spec = importlib.util.find_spec(path.removeprefix("pkg://").replace("/", ".").rstrip("."))
    except (ImportError, ValueError):
        return None
    locations = list(spec.submodule_search_locations or []) if spec is not None else []
    return Path(locations[0]) if locations else None


def _reading_verl(source: Any, directory_of: Callable[[str], Path | None]) -> Callable[[str, str], ConfigSource]:
    """Makes a source as `source` does, unless its directory is VERL's."""

    def make(provider: str, path: str) -> ConfigSource:
        directory = directory_of(path)
        if directory is not None and _is_verl_directory(directory):
            return _VerlDirectory(provider, directory)
        return source(provider, path)

    make.__name__ = source.__name__  # Hydra compares the names when it registers a source twice
    make.__module__ = __name__
    return make


def install() -> None:
    """Let this process's Hydra read VERL's directory so; a second call does nothing."""
    Plugins.instance()  # registers Hydra's own sources
    types: dict[str, Any] = SourcesRegistry.instance().types
    for scheme, directory_of in {"file": _file_directory, "pkg": _package_directory}.items():
        if types[scheme].__module__ != __name__:
            types[scheme] = _reading_verl(types[scheme], directory_of)
