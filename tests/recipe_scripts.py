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
"""What the tests do with the recipes of examples/on_policy_distillation/recipes."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from conftest import ROOT

RECIPES = ROOT / "examples" / "on_policy_distillation" / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.sh"))


def recipe(name):
    """The script."""
    return RECIPES / f"{name}.sh"


def environment_with(**variables):
    """In which a recipe's `python3` is the one that runs the tests."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"PATH": path} | variables


def arguments_of(name, *overrides, **variables):
    """What the recipe says to VERL's trainer: a `python3` that repeats its arguments takes the place of Python."""
    with tempfile.TemporaryDirectory() as folder:
        stub = Path(folder) / "python3"
        stub.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
        stub.chmod(0o755)
        environment = environment_with(**variables)
        environment["PATH"] = os.pathsep.join([folder, environment["PATH"]])
        done = subprocess.run([recipe(name), *overrides], env=environment, capture_output=True, text=True, check=True)
    dash_m, module, *arguments = done.stdout.split("\0")[:-1]
    assert (dash_m, module) == ("-m", "verl.trainer.main_on_policy_distillation")
    return arguments
