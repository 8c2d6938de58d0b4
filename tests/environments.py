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
"""Python environments for tests of the installation: this one's packages without VERL and without this project."""

import importlib.util
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from conftest import ROOT

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
OURS = ("verl", "verl_on_policy_distillation", "__editable__")  # how the names begin that an environment lacks


def run(*command, cwd=None, **environment):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("VERL_", "PYTHONPATH"))}
    return subprocess.run(
        [str(part) for part in command],
        env=inherited | {name: str(value) for name, value in environment.items()},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )


def succeed(*command, **options):
    done = run(*command, **options)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def _link_packages(folder):
    """Every package that is installed here but VERL and this project, as links."""
    folder.mkdir()
    installed = Path(importlib.util.find_spec("torch").origin).parents[1]
    for entry in installed.iterdir():
        if not entry.name.startswith(OURS) and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    return folder


class Environment:
    """A virtual environment in `folder`."""

    def __init__(self, folder):
        self.folder = folder
        self.python = folder / "bin" / "python"
        [self.site] = folder.glob("lib/python3*/site-packages")

    @classmethod
    def make(cls, folder, packages):
        venv.create(folder, symlinks=True)
        environment = cls(folder)
        (environment.site / "packages.pth").write_text(f"{packages}\n")
        return environment

    def copy(self, folder):
        shutil.copytree(self.folder, folder, symlinks=True)
        return Environment(folder)

    def pip(self, *arguments):
        return succeed(PIP[0], *PIP[1:3], "--python", self.python, *PIP[3:], *arguments)

    def install(self, source, *options):
        self.pip("install", "--no-deps", "--no-build-isolation", *options, source)


def project_source(folder):
    """What `pip install .` needs of this repository, in a folder where it may build."""
    folder.mkdir()
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("verl", "verl_on_policy_distillation"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def environment_with_the_package(folder):
    """`pip install .` into an environment without VERL."""
    environment = Environment.make(folder / "environment", _link_packages(folder / "packages"))
    environment.install(project_source(folder / "source"))
    return environment
