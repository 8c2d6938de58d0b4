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
"""The patch, the environment and the wheel are what the repository's files say."""

import base64
import csv
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, copy_unpatched_verl

PATCH = ROOT / "0001-on-policy-distillation.patch"
BOOTSTRAP = ROOT / "scripts" / "bootstrap.sh"
VENV = ROOT / ".venv"
NOT_THE_PROJECT = {".git", ".venv", "__pycache__", ".pytest_cache", ".ruff_cache", "build", "dist", "outputs", "runs"}
WHEEL_MODULES = {
    "verl/plugin/on_policy_distillation.py",
    "verl/trainer/ppo/on_policy_distillation.py",
    "verl/utils/divergence.py",
    "verl/utils/kernel/divergence_rows.py",
    "verl/utils/kernel/linear_divergence.py",
}

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def run(*command, cwd=ROOT):
    # Without the ceiling git would take the repository's own work tree for the root when the copy lies in it.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(Path(cwd).resolve().parent)}
    return subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)


def succeed(*command, cwd=ROOT):
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def test_benchmark_tables_are_those_of_the_results():
    succeed(sys.executable, ROOT / "benchmarks" / "render.py", "--check")


def project_files():
    """Tracked files and untracked ones that are not ignored, relative to the root."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard") if shutil.which("git") else None
    if listed and listed.returncode == 0:
        names = [Path(name) for name in listed.stdout.split("\0") if name]
    else:
        names = [path.relative_to(ROOT) for path in ROOT.rglob("*")]
        names = [name for name in names if not NOT_THE_PROJECT & set(name.parts)]
    return [name for name in names if (ROOT / name).is_file()]


def tree(directory):
    """Path to bytes for the files below directory, without what Python compiled."""
    paths = (path for path in directory.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def installed_verl():
    """The verl directory that Python imports; it must have the patch."""
    found = importlib.util.find_spec("verl")
    assert found is not None and found.origin, "VERL is not installed: run scripts/bootstrap.sh"
    return Path(found.origin).parent


@pytest.fixture
def pristine(installed_verl, tmp_path):
    """A directory with VERL's own verl/ in it."""
    copy_unpatched_verl(tmp_path / "pristine")
    return tmp_path / "pristine"


def recorded_hashes(installed_verl):
    """Path to SHA-256 of each file below verl/ that VERL's wheel brought."""
    [record] = installed_verl.parent.glob("verl-[0-9]*.dist-info/RECORD")
    with open(record, newline="") as rows:
        entries = {name: digest for name, digest, _ in csv.reader(rows) if name.startswith("verl/")}
    return {name: digest for name, digest in entries.items() if "__pycache__" not in name}


def record_hash(content):
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def test_patch_and_summary_are_not_stale():
    done = run(sys.executable, ROOT / "scripts" / "make_patch.py", "--check")
    assert done.returncode == 0, done.stderr


@pytest.fixture
def sources(tmp_path):
    """A copy of the repository, to be changed."""
    for name in project_files():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def append(path, text):
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")


STALE = {
    "verl/utils/divergence.py": {"0001-on-policy-distillation.patch", "PATCH_SUMMARY.txt"},
    "ON_POLICY_DISTILLATION.md": {"PATCH_SUMMARY.txt"},
    "PATCH_SUMMARY.txt": {"PATCH_SUMMARY.txt"},
}


@pytest.mark.parametrize("name", STALE)
def test_what_is_stale_is_found_and_one_command_mends_it(name, sources):
    make_patch = sources / "scripts" / "make_patch.py"
    append(sources / name, "# more\n")
    done = run(sys.executable, make_patch, "--check")
    assert done.returncode == 1
    assert set(re.findall(r"^(\S+) is stale", done.stderr, flags=re.MULTILINE)) == STALE[name]
    succeed(sys.executable, make_patch)
    succeed(sys.executable, make_patch, "--check")


def test_tables_of_files_have_every_file_and_no_other(sources):
    patch = PATCH.read_text(encoding="utf-8")
    files = re.findall(r"^diff --git a/(\S+) ", patch, flags=re.MULTILINE)
    rows = re.findall(r"^\| `(verl/\S+)` \|", (ROOT / "PATCH_README.md").read_text(), flags=re.MULTILINE)
    assert [row for row in rows if not any(f == row or row[-1] == "/" and f.startswith(row) for f in files)] == []
    (sources / "verl" / "utils" / "new.py").write_text("")
    done = run(sys.executable, sources / "scripts" / "make_patch.py")
    assert (
        done.returncode == 1
        and "PATCH_README.md: the tables of files have no row for `verl/utils/new.py`" in done.stderr
    )


def test_summary_fits_on_a_page():
    lines = (ROOT / "PATCH_SUMMARY.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 100 and max(map(len, lines)) <= 120


@needs_git
def test_patch_fits_every_release_that_it_supports():
    """Needs VERL's published packages: from the package index, the first time."""
    done = run(sys.executable, ROOT / "scripts" / "check_versions.py", "--quick")
    if "could not fetch" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^\| (\S+) \| ok \| ok \|", done.stdout, flags=re.MULTILINE) == ["0.9.0", "0.9.1"]


@needs_git
def test_patch_without_its_changes_leaves_verl_as_its_wheel_had_it(pristine, installed_verl):
    found = {f"verl/{name}": record_hash(content) for name, content in tree(pristine / "verl").items()}
    assert found == recorded_hashes(installed_verl)


@needs_git
def test_patch_applies_to_pristine_verl_and_gives_the_installed_one(pristine, installed_verl):
    succeed("git", "apply", "--check", PATCH, cwd=pristine)
    succeed(ROOT / "apply_patch.sh", "--no-verify", pristine)
    patched, installed = tree(pristine / "verl"), tree(installed_verl)
    assert sorted(patched) == sorted(installed)
    assert [name for name in patched if patched[name] != installed[name]] == []


@needs_git
def test_index_lines_name_the_blobs(pristine, installed_verl):
    lines = re.findall(
        r"^diff --git a/(\S+) b/\S+\n(?:new file mode \d+\n)?index (\w+)\.\.(\w+)",
        PATCH.read_text(encoding="utf-8"),
        flags=re.MULTILINE,
    )
    assert lines
    for name, old, new in lines:
        assert new == succeed("git", "hash-object", "--no-filters", installed_verl.parent / name).strip(), name
        if old.strip("0"):
            assert old == succeed("git", "hash-object", "--no-filters", pristine / name).strip(), name
        else:
            assert not (pristine / name).exists(), name


@pytest.mark.skipif(not (VENV / "bin" / "python").exists(), reason="no .venv in the repository")
def test_second_bootstrap_does_nothing_and_is_fast():
    # --check first: a run that has something to do would replace VERL under the tests that run now.
    done = run(BOOTSTRAP, "--check")
    assert done.returncode == 0, done.stderr
    before = {path: path.stat().st_mtime_ns for path in VENV.iterdir()}
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        assert succeed(BOOTSTRAP, cwd="/") == ""
        seconds.append(time.perf_counter() - start)
    # It takes about 0.02 s. The best of three, as the machine may be busy with something else.
    assert min(seconds) < 0.3
    assert {path: path.stat().st_mtime_ns for path in VENV.iterdir()} == before


def test_wheel_has_the_three_modules_and_the_entry_point(tmp_path):
    source = tmp_path / "source"
    for name in project_files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    succeed(*pip, "wheel", ".", "--no-deps", "--no-build-isolation", "-w", tmp_path / "wheels", cwd=source)
    [path] = (tmp_path / "wheels").glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        files = {name for name in wheel.namelist() if ".dist-info/" not in name}
        for name in files:
            assert wheel.read(name) == (ROOT / name).read_bytes()
        wheel.extractall(tmp_path / "unpacked")
    assert files == WHEEL_MODULES
    [distribution] = importlib.metadata.distributions(path=[str(tmp_path / "unpacked")])
    [entry_point] = distribution.entry_points
    assert entry_point.group == "verl.plugins"
    assert entry_point.name == "on_policy_distillation"
    assert entry_point.value == "verl.plugin.on_policy_distillation"
    # VERL logs a failure here at DEBUG and goes on without the plugin, so nobody would see it.
    assert entry_point.load().__name__ == entry_point.value


def test_no_machine_path_or_registry_host_in_the_repository():
    # Put together here, so that this file does not have them.
    words = ["/wo" + "rk/", "pypi" + ".org", "pythonhosted" + ".org", "npmjs" + ".org"]
    forbidden = re.compile("|".join(rf"(?<![\w.]){re.escape(word)}" for word in words))
    found = []
    for name in project_files():
        text = (ROOT / name).read_bytes().decode("utf-8", "replace")
        found += [f"{name}:{text[: match.start()].count(chr(10)) + 1}" for match in forbidden.finditer(text)]
    assert found == []
