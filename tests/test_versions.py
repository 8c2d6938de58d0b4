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
"""The patch on every VERL that it is for, and VERL's own checks and tests on a patched one.

    pytest tests/test_versions.py                        the patch goes on each release and comes off byte for byte
    VERL_VERSIONS=full pytest tests/test_versions.py     also what the doctor finds there, and the losses alone in VERLs
                                                         that the patch does not fit
    VERL_CHECKOUT=DIR pytest tests/test_versions.py      also a checkout: the same, VERL's own checks and its own
                                                         tests for the CPU, with and without the patch (an hour;
                                                         install pytest-asyncio, which some of these need)

Releases come from the packages that VERL published. VERL is never installed, only unpacked, and all run with the
packages of the Python that runs this. VERL's trainer: ``VERL_TREE=DIR pytest tests/test_trainer.py``.
"""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from make_patch import SUPPORTED_RELEASES, PatchError, new_files, unpack_verl

# Without the trainer that the patch is for. Our files can be copied into them, for trainers of one's own that call the
# two losses. 0.7.0 is not here as it does not import with the pinned transformers.
LOSSES_ONLY = ["0.7.1", "0.8.0"]
CHECKOUT = Path(os.environ["VERL_CHECKOUT"]).resolve() if "VERL_CHECKOUT" in os.environ else None
DOCTOR = ROOT / "verl" / "on_policy_distillation" / "doctor.py"
WITHOUT_PACKAGE = {"VERL_USE_EXTERNAL_PLUGINS": "none"}  # as if this repository were not installed
SECONDS = 200  # for a file of VERL's tests
# Many of VERL's asynchronous tests have no mark: without the mode they fail in both trees, and tell nothing.
MODE = ["--asyncio-mode=auto"] if importlib.util.find_spec("pytest_asyncio") else []

needs_full = pytest.mark.skipif(os.environ.get("VERL_VERSIONS") != "full", reason="VERL_VERSIONS is not full")
needs_checkout = pytest.mark.skipif(CHECKOUT is None, reason="VERL_CHECKOUT names no checkout of VERL")


def run(*command, **environment):
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONDONTWRITEBYTECODE": "1", **environment}
    words = [str(word) for word in command]
    return subprocess.run(words, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def succeed(*command, **environment):
    done = run(*command, **environment)
    assert done.returncode == 0, done.stdout
    return done.stdout


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module", params=[*SUPPORTED_RELEASES, *(["checkout"] if CHECKOUT else [])])
def tree(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("verl")
    if request.param == "checkout":
        shutil.copytree(CHECKOUT / "verl", folder / "verl", ignore=shutil.ignore_patterns("__pycache__"))
        return folder
    return unpacked(request.param, folder)


def unpacked(version, folder):
    try:
        return unpack_verl(version, folder)
    except PatchError as error:  # without the package index
        pytest.skip(str(error))


def test_patch_goes_on_and_comes_off_byte_for_byte(tree):
    before = content(tree)
    succeed(ROOT / "apply_patch.sh", "--no-verify", tree)
    assert content(tree) != before
    succeed(ROOT / "apply_patch.sh", "--reverse", tree)
    assert content(tree) == before


@needs_full
def test_patched_verl_works(tree):
    assert "not verified" not in succeed(ROOT / "apply_patch.sh", tree)
    succeed(ROOT / "apply_patch.sh", "--reverse", tree)


@needs_full
@pytest.mark.parametrize("version", LOSSES_ONLY)
def test_losses_alone_work_when_they_are_copied(version, tmp_path):
    tree = unpacked(version, tmp_path)
    assert run(ROOT / "apply_patch.sh", "--any-version", tree).returncode == 1
    for name in new_files():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    succeed(sys.executable, DOCTOR, "--losses", "--tree", tree)


# ----------------------------------------------------------------------------------------------------------------------
# VERL's own checks and tests


@pytest.fixture(scope="module")
def checkouts(tmp_path_factory):
    """VERL, and VERL with the patch; each in a repository with all of it committed, as the checks ask git for files."""
    folder = tmp_path_factory.mktemp("checkouts")
    plain, patched = folder / "plain", folder / "patched"
    for tree in (plain, patched):
        shutil.copytree(CHECKOUT, tree, symlinks=True, ignore=shutil.ignore_patterns(".git", "__pycache__", ".venv"))
    if "left as they are" in succeed(ROOT / "apply_patch.sh", "--no-verify", patched):
        shell("scripts/generate_trainer_config.sh", patched)  # as on the development branch
    commit = "git -c user.name=verl -c user.email=verl@example.com commit --quiet --message VERL"
    for tree in (plain, patched):
        subprocess.run(f"git init --quiet && git add --all --force && {commit}", shell=True, cwd=tree, check=True)
    return plain, patched


def shell(command, folder):
    """Exit status, and the lines that it printed, without what differs from run to run."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "GIT_CONFIG_GLOBAL": os.devnull}
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment | WITHOUT_PACKAGE, capture_output=True, text=True
    )
    text = re.sub(r"\d+\.\d+ ?s\b|:\d+(?=:)", "", (done.stdout + done.stderr).replace(str(folder), ""))
    return done.returncode, text.splitlines()


def hooks():
    """Name to command of the checks that VERL's commits go through."""
    import yaml

    if CHECKOUT is None:
        return {"none": ""}
    config = yaml.safe_load((CHECKOUT / ".pre-commit-config.yaml").read_text())
    local = [hook for repository in config["repos"] if repository["repo"] == "local" for hook in repository["hooks"]]
    sanity = "tests/special_sanity/test_config_docs.py tests/special_sanity/test_import.py"
    return {hook["id"]: hook["entry"] for hook in local} | {
        "ruff": "python3 -m ruff check --output-format concise",
        "ruff-format": "python3 -m ruff format --check . | grep -v formatted$",
        "mypy": "python3 -m mypy --no-pretty --no-error-summary verl",
        "config-docs": f"python3 -m pytest -q {sanity}",
    }


@needs_checkout
@pytest.mark.parametrize("name", hooks())
def test_verl_s_own_checks_say_no_more_with_the_patch(name, checkouts):
    (without, before), (status, after) = (shell(hooks()[name], tree) for tree in checkouts)
    more = [line for line in after if line not in before and "result: success" not in line]
    assert status == 0 or status == without and not more, "\n".join(more)


def outcomes(tree, name):
    """The tests of the file `name` of VERL's, and what becomes of each in `tree`; None where they do not end."""
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "--tb=no", "-p", "no:cacheprovider", *MODE, name]
    environment = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", **WITHOUT_PACKAGE}
    # A session of its own, so that Ray's processes end with it.
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    process = subprocess.Popen(command, cwd=tree, env=environment, **pipes)
    try:
        text = process.communicate(timeout=SECONDS)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None
    found = re.findall(r"^(?:PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS) .*?(?= - |$)", text, flags=re.MULTILINE)
    assert found or process.returncode == 5, text  # 5: there are no tests; all else ended without a word of any
    return sorted(found)


@needs_checkout
@pytest.mark.parametrize(
    "name",
    [path.relative_to(CHECKOUT).as_posix() for path in sorted(CHECKOUT.glob("tests/**/*_on_cpu.py"))]
    if CHECKOUT
    else ["none"],
)
def test_verl_s_own_tests_have_the_same_outcomes_with_the_patch(name, checkouts):
    plain, patched = (outcomes(tree, name) for tree in checkouts)
    assert patched == plain
    if plain is None:
        pytest.skip(f"does not end within {SECONDS} s, with the patch or without")
