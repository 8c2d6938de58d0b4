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
"""What all tests share: the root, the folders of scripts and examples on the path, and VERL's own files."""

import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "on_policy_distillation"
sys.path[:0] = [str(EXAMPLE), str(EXAMPLE / "recipes"), str(ROOT / "scripts")]

import make_patch  # noqa: E402

# VERL chooses its platform when it is first imported; the tests run where there may be no accelerator.
os.environ.setdefault("VERL_PLATFORM", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def copy_unpatched_verl(folder):
    """Put VERL's own verl/ into `folder`, as its published package has it, or as the tree VERL_TREE has it."""
    if tree := os.environ.get("VERL_TREE"):
        shutil.copytree(Path(tree) / "verl", Path(folder) / "verl", ignore=shutil.ignore_patterns("__pycache__"))
    else:
        make_patch.unpack_verl(make_patch.verl_pin(), folder)


def pytest_collection_modifyitems(items):
    """The file that takes the longest first, so that it does not run alone at the end."""
    items.sort(key=lambda item: item.path.name != "test_trainer.py")
