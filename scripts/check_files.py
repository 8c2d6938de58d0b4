#!/usr/bin/env python3
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
"""Check of our files what VERL's hooks check of its own: licence headers, docstrings, device API usage.

    .venv/bin/python scripts/check_files.py    exit 1, naming what is missing or not allowed

VERL's scripts (tests/special_sanity) know its own folders only.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# VERL's hook knows its own holders only; elsewhere either of the two.
HOLDERS = (
    "# Copyright 2026 Bytedance Ltd. and/or its affiliates\n",
    "# Copyright 2026 The on-policy-distillation authors\n",
)
LICENCE = '# Licensed under the Apache License, Version 2.0 (the "License");\n'
DEVICE = re.compile(r"""\.cuda\b|"cuda"|"nccl\"""")  # of one vendor only; VERL asks verl/utils/device.py


def sources():
    """Our Python files, tracked or not yet, by their names from the root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in listed if (ROOT / name).is_file()]


def complaints(name, text):
    """What is wrong with the file `name` (from the root), one line each."""
    is_verls, tree = name.startswith("verl/"), ast.parse(text)
    head = "".join(text.splitlines(keepends=True)[:5])  # below a #! line
    if LICENCE not in head or not any(holder in head for holder in (HOLDERS[:1] if is_verls else HOLDERS)):
        yield f"{name}: no licence at its head: copy that of a file beside it"
    if tree.body and not ast.get_docstring(tree):  # an __init__.py that marks a package has comments only
        yield f"{name}: no docstring of the module"
    if is_verls:
        yield from (
            f"{name}:{node.lineno}: no docstring of {node.name}"
            for node in offered(tree)
            if not ast.get_docstring(node)
        )
        for number, line in enumerate(text.splitlines(), start=1):
            if DEVICE.search(line):
                yield f"{name}:{number}: {line.strip()}: ask verl/utils/device.py, or the tensor's own device"


def offered(tree):
    """The classes and functions that a module names in its ``__all__``."""
    lists = [node.value for node in tree.body if ast.unparse(node).startswith("__all__ = ")]
    names = [name for value in lists for name in ast.literal_eval(value)]
    return [node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name in names]


def main():
    found = [line for name in sources() for line in complaints(name, (ROOT / name).read_text(encoding="utf-8"))]
    print(*found, sep="\n", end="\n" if found else "", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
