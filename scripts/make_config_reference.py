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
"""Write the tables of docs/CONFIGURATION.md: each key with its type, default and meaning, and what is refused.

    .venv/bin/python scripts/make_config_reference.py            write them
    .venv/bin/python scripts/make_config_reference.py --check    exit 1 when they are not what would be written

Each thing is said in one place: meaning and default in the comments of the YAML below verl/trainer/config/, the type in
the dataclasses of verl/on_policy_distillation/config.py, and what is refused in their docstrings, below "Refused:".
"""

import argparse
import inspect
import re
import sys
import typing
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "CONFIGURATION.md"
YAML = ROOT / "verl" / "trainer" / "config"
# The group of the page, its YAML, and the name of its dataclass.
GROUPS = {
    "loss": (YAML / "policy_loss" / "on_policy_distillation.yaml", "DistillationLossConfig"),
    "teacher": (YAML / "teacher" / "teacher.yaml", "TeacherConfig"),
}
NO_KEYS = ("defaults", "_target_")  # Hydra's


class ReferenceError(Exception):
    """YAML, dataclass and docstring do not go together; the message says where."""


def read_yaml(path):
    """{key: (default as it is written, the comment above it)}; the keys of a subgroup as `group.key`."""
    keys, comment, parents = {}, [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        indentation = (len(line) - len(line.lstrip())) // 2
        if line.lstrip().startswith("#"):
            comment.append(line.lstrip().removeprefix("#").strip())
        elif match := re.match(r" *([\w]+):\s*(.*)$", line):
            name, default = match.groups()
            parents = [*parents[:indentation], name]
            if parents[0] not in NO_KEYS:
                keys[".".join(parents)] = default, " ".join(comment)
            comment = []
        else:  # a comment with an empty line below it is the file's
            comment = []
    return keys


def read_refused(config_class):
    """{key: what of it is refused}, from the docstring."""
    _, found, section = inspect.getdoc(config_class).partition("\nRefused:\n")
    if not found:
        raise ReferenceError(f"{config_class.__name__}: its docstring has no section 'Refused:'")
    entries = re.findall(r"^    ([\w.]+): (.*(?:\n {8}.*)*)", section, flags=re.MULTILINE)
    return {key: " ".join(text.split()) for key, text in entries}


def type_of(config_class, key):
    """What the annotations say of a key; nothing for an entry of a dictionary."""
    hint = config_class
    for name in key.split("."):
        hint = typing.get_type_hints(hint).get(name) if isinstance(hint, type) else None
    is_optional = type(None) in typing.get_args(hint)
    if is_optional:
        hint = typing.get_args(hint)[0]
    if hint in (None, typing.Any):
        return ""
    return (typing.get_origin(hint) or hint).__name__ + (" or null" if is_optional else "")


def default_in_words(default):
    """As it stands in the YAML; where it follows another key, that key."""
    follows = r"\$\{oc\.select:([\w.]+),([^}]*)\}"
    if whole := re.fullmatch(follows, default):
        return f"as `{whole[1]}`, else `{whole[2]}`"
    named = re.sub(follows, r"<\1>", default)
    return f"`{named}`" if named else ""


def table(path, config_class):
    """One group as a Markdown table."""
    keys, refused = read_yaml(path), read_refused(config_class)
    names = {item.name for item in fields(config_class)} - set(NO_KEYS)
    if missing := names ^ {key for key in keys if "." not in key}:
        raise ReferenceError(f"{path.name} and {config_class.__name__} differ in {sorted(missing)}")
    if stray := set(refused) - set(keys):
        raise ReferenceError(f"{config_class.__name__}: 'Refused:' has {sorted(stray)}, which {path.name} has not")
    groups = {key.rpartition(".")[0] for key in keys}
    if silent := [key for key, (_, meaning) in keys.items() if not meaning and key not in groups]:
        raise ReferenceError(f"{path.name}: no comment above {silent}")
    rows = ["| Key | Type | Default | Meaning | Refused |", "|-----|------|---------|---------|---------|"]
    for key, (default, meaning) in keys.items():
        if key in groups and not meaning:
            continue
        said = [text.replace("|", "\\|").replace("<", "&lt;").rstrip(".") for text in (meaning, refused.get(key, ""))]
        rows.append(f"| {' | '.join([f'`{key}`', type_of(config_class, key), default_in_words(default), *said])} |")
    return "\n".join(rows)


def build(text):
    """The page with what it should have between its markers."""
    from verl.on_policy_distillation import config

    for group, (path, name) in GROUPS.items():
        begin, end = f"<!-- {group}:begin -->\n", f"<!-- {group}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ReferenceError(f"{PAGE.name}: it does not have {begin.strip()} and {end} once")
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}{table(path, getattr(config, name))}\n{end}{rest.partition(end)[2]}"
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    try:
        wanted = build(text)
    except ReferenceError as error:
        print(f"make_config_reference.py: error: {error}", file=sys.stderr)
        return 1
    if arguments.check:
        if text != wanted:
            print(f"{PAGE.relative_to(ROOT)} is stale: run scripts/make_config_reference.py.", file=sys.stderr)
        return int(text != wanted)
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
