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
"""The patch is what the repository's files say, small, and right for every release that it supports."""

import ast
import base64
import csv
import difflib
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys

import make_patch
import pytest
from conftest import ROOT

PATCH = make_patch.PATCH
TEXT = PATCH.read_text(encoding="utf-8")
CHANGED = re.findall(r"^--- a/(\S+)$", TEXT, flags=re.MULTILINE)
RELEASES = make_patch.SUPPORTED_RELEASES
# As VERL's scripts/generate_trainer_config.sh calls its printer.
VARIANTS = {
    "_generated_ppo_trainer.yaml": "",
    "_generated_ppo_megatron_trainer.yaml": "model_engine=megatron",
    "_generated_ppo_veomni_trainer.yaml": "model_engine=veomni",
    "_generated_ppo_torchtitan_trainer.yaml": "model_engine=torchtitan",
}

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def run(*command, cwd=ROOT):
    # Without the ceiling git would take the repository's own work tree for the root when the copy lies in it.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(cwd.resolve().parent)}
    return subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)


def succeed(*command, cwd=ROOT):
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def tree(directory):
    """Path to bytes for the files below directory, without what Python compiled."""
    paths = (path for path in directory.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def make_release(tmp_path_factory):
    @functools.cache
    def make(version):
        try:
            pristine = make_patch.unpack_verl(version, tmp_path_factory.mktemp("pristine"))
        except make_patch.PatchError as error:
            pytest.skip(str(error))
        patched = shutil.copytree(pristine, tmp_path_factory.mktemp("patched") / "tree")
        succeed(ROOT / "apply_patch.sh", "--no-verify", patched)
        return pristine, patched

    return make


@pytest.fixture(params=RELEASES)
def release(request, make_release):
    """(VERL as its wheel has it, the same with the patch), neither to be written to."""
    return make_release(request.param)


@pytest.fixture
def pinned(make_release):
    """The release that the patch is made from."""
    return make_release(make_patch.verl_pin())


# ----------------------------------------------------------------------------------------------------------------------
# what is generated is not stale


@pytest.fixture
def sources(tmp_path):
    """A copy of what the patch is made of, to be changed."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "outputs", "runs", "build", "*.egg-info")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=ignored)
    (tmp_path / "copy" / ".venv").mkdir()
    make_patch.WHEELS[0].mkdir(parents=True, exist_ok=True)
    (tmp_path / "copy" / ".venv" / ".versions").symlink_to(make_patch.WHEELS[0])
    return tmp_path / "copy"


def append(path, text):
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")


def stale(sources):
    """What make_patch.py --check names."""
    done = run(sys.executable, sources / "scripts" / "make_patch.py", "--check")
    assert done.returncode == bool(done.stderr)
    return set(re.findall(r"^(\S+) is stale", done.stderr, flags=re.MULTILINE)), done.stderr


def test_patch_and_summary_are_not_stale():
    assert stale(ROOT) == (set(), "")


KEY = "verl/trainer/config/policy_loss/on_policy_distillation.yaml"
STALE = {
    "verl/plugin/cpu/platform.py": {PATCH.name, "PATCH_SUMMARY.txt"},
    KEY: {PATCH.name, "scripts/generated.patch", "PATCH_SUMMARY.txt"},
    "ON_POLICY_DISTILLATION.md": {"PATCH_SUMMARY.txt"},
    "PATCH_SUMMARY.txt": {"PATCH_SUMMARY.txt"},
}


def test_what_is_stale_is_found_and_one_command_mends_it(sources):
    before = {name: (sources / name).read_bytes() for name in STALE}
    for name, wanted in STALE.items():
        append(sources / name, "\n# more\nmore: 1\n" if name == KEY else "# more\n")
        found, said = stale(sources)
        assert found == wanted
        assert (f"it differs in the message or the diffstat, {name}" in said) == (PATCH.name in wanted)
        (sources / name).write_bytes(before[name])
    for name in STALE:
        append(sources / name, "\n# more\nmore: 1\n" if name == KEY else "# more\n")
    assert stale(sources)[0] == set.union(*STALE.values())
    succeed(sys.executable, sources / "scripts" / "make_patch.py")
    assert stale(sources) == (set(), "")
    assert "\n  # more\n  more: 1\n" in (sources / "PATCH_SUMMARY.txt").read_text()


def test_tables_of_files_have_every_file_and_no_other(sources):
    files = re.findall(r"^diff --git a/(\S+) ", TEXT, flags=re.MULTILINE)
    rows = re.findall(r"^\| `(verl/\S+)` \|", (ROOT / "PATCH_README.md").read_text(), flags=re.MULTILINE)
    assert [row for row in rows if not any(f == row or row[-1] == "/" and f.startswith(row) for f in files)] == []
    (sources / "verl" / "plugin" / "new.py").write_text("")
    done = run(sys.executable, sources / "scripts" / "make_patch.py")
    assert (
        done.returncode == 1
        and "PATCH_README.md: the tables of files have no row for `verl/plugin/new.py`" in done.stderr
    )


def test_summary_fits_on_a_page():
    lines = (ROOT / "PATCH_SUMMARY.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 100 and max(map(len, lines)) <= 120


def make_hunks(edited, sources):
    return run(sys.executable, sources / "scripts" / "make_patch.py", "--hunks-from", edited)


def test_hunks_come_from_a_tree_that_was_edited(pinned, sources, tmp_path):
    edited = shutil.copytree(pinned[1], tmp_path / "edited")
    done = make_hunks(edited, sources)
    assert done.returncode == 0 and (sources / "scripts" / "hunks.patch").read_bytes() == make_patch.HUNKS.read_bytes()
    assert (sources / PATCH.name).read_bytes() == PATCH.read_bytes()
    append(edited / "verl" / "protocol.py", "# mine\n")
    done = make_hunks(edited, sources)
    assert done.returncode == 1 and "no row for `verl/protocol.py`" in done.stderr
    assert "+# mine\n" in (sources / "scripts" / "hunks.patch").read_text()
    (edited / "verl" / "stray.py").write_text("")
    assert "stray.py: neither VERL's nor in" in make_hunks(edited, sources).stderr
    (edited / "verl" / "protocol.py").unlink()
    assert "protocol.py: VERL's own file is gone" in make_hunks(edited, sources).stderr


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("verl/plugin/cpu/crlf.py", "a\r\n", "carriage return"),
        ("verl/protocol.py", "", "as a new file, and VERL has one of that name"),
        ("scripts/hunks.patch", "@@ -1,2 +1,1 @@\n nothing\n-like this\n", "hunks.patch does not fit VERL 0.9"),
    ],
)
def test_what_cannot_become_a_patch_is_named(name, text, words, sources):
    with open(sources / name, "a", newline="") as file:
        file.write(text)
    done = run(sys.executable, sources / "scripts" / "make_patch.py", "--check")
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# the patch is small


def changed_lines(pristine, patched, name):
    """Numbers of the lines of VERL's own file that the patch removes, and of the patched one that it adds."""
    old, new = ((folder / name).read_text().splitlines() for folder in (pristine, patched))
    codes = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    different = [code for code in codes if code[0] != "equal"]
    return (
        {line for _, a, b, _, _ in different for line in range(a + 1, b + 1)},
        {line for _, _, _, a, b in different for line in range(a + 1, b + 1)},
    )


def test_patch_changes_at_most_forty_lines_of_five_files(release):
    lines = [line for line in TEXT.partition("\ndiff --git ")[2].split("\ndiff --git ")]
    own = [section.partition("\n@@ ")[2] for section in lines if "\nnew file mode " not in section]
    assert len(own) == len(CHANGED) <= 5
    assert sum(len(re.findall(r"^[+-]", section, flags=re.MULTILINE)) for section in own) <= 40
    # The same from the trees, without reading a diff.
    pristine, patched = release
    before, after = tree(pristine / "verl"), tree(patched / "verl")
    touched = {f"verl/{name}" for name in before if before[name] != after[name]}
    assert {name for name in touched if "/_generated_" not in name} == set(CHANGED)
    assert sum(len(part) for name in CHANGED for part in changed_lines(pristine, patched, name)) <= 40


def methods_of_trainers_and_workers(path):
    """(name, lines) of each class that is, or by its name or its bases may be, a trainer or a worker."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            names = [node.name, *map(ast.unparse, node.bases)]
            if any(re.search("(Trainer|Worker)", name) for name in names):
                yield node.name, set(range(node.lineno, node.end_lineno + 1))


def test_patch_changes_no_method_of_a_trainer_or_a_worker(release):
    for folder, which in zip(release, (0, 1), strict=True):
        for name in CHANGED:
            if name.endswith(".py"):
                lines = changed_lines(*release, name)[which]
                assert lines or which == 0
                hit = [owner for owner, span in methods_of_trainers_and_workers(folder / name) if span & lines]
                assert hit == [], name
    # The search would find them.
    found = dict(methods_of_trainers_and_workers(release[0] / "verl" / "trainer" / "ppo" / "v1" / "trainer_base.py"))
    assert "PPOTrainer" in found


# ----------------------------------------------------------------------------------------------------------------------
# the patch is right for every release


def record_hash(content):
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def recorded_hashes(folder):
    """Path to SHA-256 of each file below verl/ that VERL's wheel brought."""
    [record] = folder.glob("verl-[0-9]*.dist-info/RECORD")
    with open(record, newline="") as rows:
        return {name: digest for name, digest, _ in csv.reader(rows) if name.startswith("verl/")}


def test_patch_without_its_changes_leaves_verl_as_its_wheel_had_it(release, tmp_path):
    pristine, patched = release
    folder = shutil.copytree(patched, tmp_path / "tree")
    succeed(ROOT / "apply_patch.sh", "--reverse", folder)
    found = {f"verl/{name}": record_hash(content) for name, content in tree(folder / "verl").items()}
    assert found == recorded_hashes(pristine)


def test_patched_verl_has_our_files_and_no_others(release):
    pristine, patched = release
    before, after = tree(pristine / "verl"), tree(patched / "verl")
    ours = {name: content for name, content in tree(ROOT / "verl").items()}
    assert {name: after[name] for name in after.keys() - before.keys()} == ours
    assert before.keys() <= after.keys()


def test_index_lines_name_the_blobs(pinned):
    pristine, patched = pinned
    lines = re.findall(
        r"^diff --git a/(\S+) b/\S+\n(?:new file mode \d+\n)?index (\w+)\.\.(\w+)", TEXT, flags=re.MULTILINE
    )
    assert lines
    for name, old, new in lines:
        assert new == succeed("git", "hash-object", "--no-filters", patched / name).strip(), name
        if old.strip("0"):
            assert old == succeed("git", "hash-object", "--no-filters", pristine / name).strip(), name
        else:
            assert not (pristine / name).exists(), name


def test_flattened_configurations_are_what_verl_s_own_generator_prints(release):
    """By Hydra's own --cfg, as VERL's scripts/generate_trainer_config.sh calls it."""
    pristine, patched = release
    program = """
import sys
import hydra

@hydra.main(config_path=sys.argv.pop(1), config_name="ppo_trainer", version_base=None)
def main(config):
    pass

main()
"""
    for folder in release:
        directory = folder / "verl" / "trainer" / "config"
        assert {path.name for path in directory.glob("_generated_*")} == set(VARIANTS)
        for name, argument in VARIANTS.items():
            printed = succeed(sys.executable, "-c", program, directory, "--cfg", "job", *argument.split())
            head, _, flat = (directory / name).read_text().partition("\n\n")
            assert flat == printed[printed.index("actor_rollout_ref:") :]
            assert all(line.startswith("# ") for line in head.splitlines())
        head_before, head_after = ((tree / "verl/trainer/config" / name).read_text()[:400] for tree in release)
        assert head_before == head_after
    assert "\nteacher:\n" in flat and "distillation_type" in flat
