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
"""apply_patch.sh and git on real VERL trees: the patch goes on whole, comes off without a trace, or nothing changes."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT, copy_unpatched_verl

PATCH = ROOT / "0001-on-policy-distillation.patch"
GENERATED_PATCH = ROOT / "scripts" / "generated.patch"
SCRIPT = ROOT / "apply_patch.sh"
TEXT = PATCH.read_text(encoding="utf-8")
CHANGED = re.findall(r"^--- a/(\S+)$", TEXT, flags=re.MULTILINE)
NEW = re.findall(r"^--- /dev/null\n\+\+\+ b/(\S+)$", TEXT, flags=re.MULTILINE)
GENERATED = sorted(set(re.findall(r"^--- a/(\S+)$", GENERATED_PATCH.read_text(encoding="utf-8"), flags=re.MULTILINE)))
EDITED = "verl/trainer/main_ppo.py"  # one of CHANGED
ADDED = "    prepare(config)\n"  # by the patch, to EDITED
# Lines of context below what the patch adds: the second one merges, the first one conflicts.
CONFLICTS = "    # Automatically set `config.trainer.device = npu` when running on Ascend NPU.\n"
MERGES = "    auto_set_device(config)\n"
# What has to be there besides: the package, its version, and files that are no business of the patch.
OTHERS = ["verl/__init__.py", "verl/version/version", "verl/protocol.py", "verl/plugin/__init__.py"]
NOBODY = 65534
GIT_SETTINGS = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    **{f"GIT_{who}_{what}": f"{who}@example.com" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
}

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


# ----------------------------------------------------------------------------------------------------------------------
# trees


@pytest.fixture(scope="session")
def whole_verl(tmp_path_factory):
    """An unpatched VERL, not to be written to."""
    folder = tmp_path_factory.mktemp("verl")
    copy_unpatched_verl(folder)
    return folder


@pytest.fixture(scope="module")
def verl(whole_verl, tmp_path_factory):
    """Its files that the patch touches and a few others, as that is all that the script and git look at."""
    folder = tmp_path_factory.mktemp("small")
    for name in [*CHANGED, *GENERATED, *OTHERS]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(whole_verl / name, folder / name)
    return folder


def copy_of(verl, folder):
    folder.mkdir(parents=True)
    shutil.copytree(verl / "verl", folder / "verl")
    return folder


@pytest.fixture
def whole_tree(whole_verl, tmp_path):
    return copy_of(whole_verl, tmp_path / "a whole tree")


@pytest.fixture
def tree(verl, tmp_path):
    """An unpacked source tree, its path with spaces and a quote."""
    return copy_of(verl, tmp_path / "it's a tree")


def git(folder, *arguments):
    done = subprocess.run(
        ["git", "-C", str(folder), *map(str, arguments)],
        env=os.environ | GIT_SETTINGS,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.fixture
def checkout(tree):
    git(tree, "init", "-q")
    git(tree, "add", "-A")
    git(tree, "commit", "-q", "-m", "VERL")
    return tree


def content(folder):
    """Path to bytes of all files, a repository's own among them, but for what Python compiled."""
    paths = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def edit(tree, line=MERGES):
    """Add to a line of EDITED."""
    path = tree / EDITED
    text = path.read_text()
    assert text.count(line) == 1
    path.write_text(text.replace(line, f"{line.rstrip()}  # mine\n"))


def set_version(tree, version):
    (tree / "verl" / "version" / "version").write_text(f"{version}\n")


# ----------------------------------------------------------------------------------------------------------------------
# calls


def call(*arguments, script=SCRIPT, cwd="/", environment=None, **options):
    return subprocess.run(
        [str(part) for part in (script, *arguments)],
        cwd=cwd,
        env=os.environ | GIT_SETTINGS | (environment or {}),
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def succeed(*arguments, **options):
    done = call(*arguments, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def unchanged(tree, *arguments, **options):
    """What a call says that must succeed and leave the tree as it is."""
    before = content(tree)
    said = succeed(*arguments, tree, **options)
    assert content(tree) == before
    return said


def refused(tree, *arguments, status=1, **options):
    """The message of a call that must fail and leave the tree, its index and its objects as they are."""
    before = content(tree)
    done = call(*arguments, tree, **options)
    assert done.returncode == status, done.stdout + done.stderr
    assert content(tree) == before
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stderr


@pytest.fixture
def path_without(tmp_path):
    """A PATH of one directory that lacks the commands that are named."""

    def make(*missing):
        folder = tmp_path / "bin"
        folder.mkdir()
        for name in ("bash", "dirname", "env", "git"):
            if name not in missing:
                (folder / name).symlink_to(shutil.which(name) or pytest.skip(f"{name} is not installed"))
        return {"PATH": str(folder), "PYTHON": sys.executable}

    return make


@pytest.fixture(scope="module")
def patched(verl, tmp_path_factory):
    """What the patch makes of VERL: by git apply, without the script."""
    folder = copy_of(verl, tmp_path_factory.mktemp("patched") / "tree")
    hashes = git(verl, "hash-object", "--no-filters", *GENERATED).split()
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    subprocess.run(["git", "apply", str(PATCH)], cwd=folder, env=environment, check=True)
    for section in re.split(r"^(?=diff --git )", GENERATED_PATCH.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        if re.search(r"^index (\w+)", section, flags=re.MULTILINE)[1] in hashes:
            subprocess.run(["git", "apply"], input=section, text=True, cwd=folder, env=environment, check=True)
    return content(folder)


def apply(tree, *options, **settings):
    return succeed("--no-verify", *options, tree, **settings)


# ----------------------------------------------------------------------------------------------------------------------
# on and off


def test_patch_goes_on_and_comes_off_byte_for_byte(tree, patched):
    before = content(tree)
    said = apply(tree)
    assert content(tree) == patched
    assert f"{len(CHANGED) + len(GENERATED)} files changed, {len(NEW)} added" in said
    assert "loss_mode=on_policy_distillation" in said and "--reverse" in said
    # what imports leave behind
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(tree / "verl" / "plugin")], check=True)
    succeed("--reverse", tree)
    assert content(tree) == before
    compiled = {path.name.split(".")[0] for path in tree.rglob("*.pyc")}
    assert not compiled & {"on_policy_distillation", "hf_rollout"}
    assert not (tree / "verl" / "plugin" / "cpu").exists()
    assert not (tree / "verl" / "trainer" / "config" / "teacher").exists()


def test_the_command_it_prints_removes_the_patch(tree):
    before = content(tree)
    command = apply(tree).splitlines()[-1]
    subprocess.run(command, shell=True, check=True, cwd="/", capture_output=True)
    assert content(tree) == before


def test_twice_changes_nothing_in_either_direction(tree):
    assert "does not have the patch; nothing to do" in unchanged(tree, "--reverse")
    apply(tree)
    assert "has the patch already; nothing to do" in unchanged(tree, "--no-verify")
    assert "has the patch already; nothing to do" in unchanged(tree, "--check")


def test_check_changes_nothing(tree):
    assert "the patch applies to VERL 0.9.1" in unchanged(tree, "--check")
    apply(tree)
    assert "can be taken out" in unchanged(tree, "--check", "--reverse")


def test_without_target_it_is_the_verl_that_python_imports(tree, patched):
    # A path that is relative, from the directory above: PYTHONPATH as users have it.
    environment = {"PYTHON": sys.executable, "PYTHONPATH": tree.name}
    said = succeed("--no-verify", cwd=tree.parent, environment=environment)
    assert str(tree) in said
    assert content(tree) == patched


@pytest.mark.parametrize("target", ["verl", ".", "verl/.."])
def test_target_is_relative_or_the_package_itself(target, tree, patched):
    succeed("--no-verify", target, cwd=tree)
    assert content(tree) == patched


def test_script_is_called_by_a_relative_path(tree, patched):
    succeed("--no-verify", tree, script="./apply_patch.sh", cwd=ROOT)
    assert content(tree) == patched


def test_tree_inside_of_another_repository(checkout, verl, patched):
    # As a .venv in a project; git apply would skip every file without a word.
    inner = copy_of(verl, checkout / "venv" / "site-packages")
    apply(inner, cwd=checkout)
    assert content(inner) == patched
    assert git(checkout, "status", "--porcelain").split() == ["??", "venv/"]


def test_checkout_of_another_user(checkout):
    apply(checkout, environment={"GIT_TEST_ASSUME_DIFFERENT_OWNER": "1"})
    assert sorted(CHANGED + GENERATED) == git(checkout, "diff", "--name-only").split()


def modes(folder):
    """Path to permissions of all files and directories."""
    paths = (path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.stat().st_mode & 0o777 for path in paths}


@pytest.mark.parametrize("umask", [0o077, 0o002])
def test_modes_of_files_stay_and_new_files_can_be_read(umask, tree):
    for file, mode in zip(CHANGED, (0o664, 0o640), strict=False):
        (tree / file).chmod(mode)
    before = modes(tree)
    apply(tree, umask=umask)
    patched = modes(tree)
    succeed("--reverse", tree, umask=umask)
    assert {file: patched[file] for file in before} == modes(tree) == before
    added = patched.keys() - before.keys()
    assert added and [file for file in added if patched[file] & 0o444 != 0o444] == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_owners_of_files_stay(tree):
    os.chown(tree / EDITED, NOBODY, NOBODY)
    apply(tree)
    assert (tree / EDITED).stat().st_uid == (tree / EDITED).stat().st_gid == NOBODY


def test_hard_links_are_cut(tree, tmp_path):
    # uv links what it installs into its cache.
    (tmp_path / "cache.py").hardlink_to(tree / EDITED)
    before = (tmp_path / "cache.py").read_bytes()
    apply(tree)
    assert (tmp_path / "cache.py").read_bytes() == before


# ----------------------------------------------------------------------------------------------------------------------
# checkouts


def test_checkout_gets_changes_that_are_not_staged(checkout, patched):
    index = git(checkout, "ls-files", "--stage")
    apply(checkout)
    assert {name: data for name, data in content(checkout).items() if not name.startswith(".git/")} == patched
    assert git(checkout, "ls-files", "--stage") == index
    succeed("--reverse", checkout)
    assert git(checkout, "status", "--porcelain") == ""


def test_other_files_of_a_checkout_may_be_dirty(checkout):
    (checkout / "verl" / "protocol.py").write_text("mine\n")
    (checkout / "notes.txt").write_text("mine\n")
    apply(checkout)
    succeed("--reverse", checkout)
    assert (checkout / "verl" / "protocol.py").read_text() == "mine\n"
    assert (checkout / "notes.txt").read_text() == "mine\n"


@pytest.mark.parametrize("staged", [False, True])
def test_uncommitted_changes_in_the_patch_s_files_are_refused(staged, checkout):
    with open(checkout / EDITED, "a") as file:
        file.write("\n# mine\n")
    if staged:
        git(checkout, "add", "-A")
    message = refused(checkout)
    assert EDITED in message and "--3way" in message and "Nothing was changed" in message


@pytest.mark.parametrize("committed", [False, True])
def test_three_way_merges(committed, checkout):
    edit(checkout)
    if committed:
        git(checkout, "commit", "-qam", "mine")
        message = refused(checkout)
        assert f"  {EDITED}\n" in message and "Try --3way" in message
    before, index = content(checkout), git(checkout, "ls-files", "--stage")
    assert "the patch applies" in succeed("--check", "--3way", checkout)
    assert content(checkout) == before
    apply(checkout, "--3way")
    merged = (checkout / EDITED).read_text()
    assert "auto_set_device(config)  # mine" in merged and ADDED in merged
    assert git(checkout, "ls-files", "--stage") == index
    assert sorted(CHANGED + GENERATED) == git(checkout, "diff", "--name-only").split()
    # Plain --reverse finds the changed line in the context of the patch.
    message = refused(checkout, "--reverse")
    assert f"  {EDITED}\n" in message and "Try --3way" in message
    succeed("--reverse", "--3way", checkout)
    assert content(checkout) == before


def test_three_way_that_conflicts_changes_nothing(checkout):
    edit(checkout, CONFLICTS)
    git(checkout, "commit", "-qam", "mine")
    message = refused(checkout, "--3way")
    assert f"conflict: {EDITED}" in message and "nothing was changed" in message


def test_three_way_needs_a_checkout(tree):
    assert "needs a git checkout" in refused(tree, "--3way")


COMMANDS = {"apply": ["apply"], "3way": ["apply", "--3way"], "am": ["am", "-q"], "am -3": ["am", "-q", "-3"]}


@pytest.mark.parametrize("command", COMMANDS)
def test_git_takes_the_patch(command, checkout, patched):
    before = content(checkout)
    git(checkout, *COMMANDS[command], PATCH)
    files = {name: data for name, data in content(checkout).items() if not name.startswith(".git/")}
    assert files == patched | {name: before[name] for name in GENERATED}
    if "am" not in COMMANDS[command]:
        return
    assert git(checkout, "status", "--porcelain") == ""
    author, subject, body = git(checkout, "log", "-1", "--format=%an <%ae>%n%s%n%b").split("\n", 2)
    assert re.fullmatch(r"\S.* <\S+@\S+>", author)
    # VERL's form of a title is "[modules] type: description"; git am drops what is in brackets.
    assert re.search(r"^Subject: \[PATCH\] \[[a-z_, ]+\] feat: \S", TEXT, flags=re.MULTILINE)
    assert re.fullmatch(r"feat: \S.*", subject) and len(subject) <= 72
    assert len(body.split("\n")) > 5 and max(map(len, body.split("\n"))) <= 72
    assert "make_patch" not in body and "files changed" not in body
    git(checkout, "revert", "--no-edit", "HEAD")
    assert git(checkout, "diff", "HEAD~2") == ""


# ----------------------------------------------------------------------------------------------------------------------
# VERL's flattened configurations


def test_flattened_configuration_of_a_fork_is_left_and_refuses_nothing(tree, patched):
    own, deleted = tree / GENERATED[0], tree / GENERATED[1]
    own.write_text(own.read_text().replace("loss_mode: vanilla", "loss_mode: mine"))
    deleted.unlink()
    before = content(tree)
    assert all(name in unchanged(tree, "--check") for name in GENERATED[:2])
    said = apply(tree)
    assert re.search(rf"note: left as they are.*: {GENERATED[0]}, {GENERATED[1]}$", said, flags=re.MULTILINE)
    expected = patched | {GENERATED[0]: before[GENERATED[0]]}
    del expected[GENERATED[1]]
    assert content(tree) == expected
    assert "already" in unchanged(tree)
    succeed("--reverse", tree)
    assert content(tree) == before


def test_flattened_configuration_that_was_edited_since_loses_the_patch_s_keys(tree):
    path = tree / GENERATED[0]
    with open(path, "a") as file:
        file.write("mine: 1\n")
    expected = path.read_text()
    path.write_text(expected.removesuffix("mine: 1\n"))
    apply(tree)
    with open(path, "a") as file:
        file.write("mine: 1\n")
    succeed("--reverse", tree)
    assert path.read_text() == expected


def test_flattened_configuration_may_have_uncommitted_changes(checkout):
    with open(checkout / GENERATED[0], "a") as file:
        file.write("mine: 1\n")
    before = content(checkout)
    assert GENERATED[0] in apply(checkout)
    succeed("--reverse", checkout)
    assert content(checkout) == before


# ----------------------------------------------------------------------------------------------------------------------
# refusals


def test_local_edit_that_conflicts(tree):
    edit(tree)
    message = refused(tree)
    assert f"  {EDITED}\n" in message and "nothing was changed" in message
    assert "fatal" not in message and "3way" not in message


def test_file_that_is_missing(tree):
    (tree / EDITED).unlink()
    assert EDITED in refused(tree)


def test_edits_inside_of_the_patch_s_lines_stop_the_removal(tree):
    apply(tree)
    edit(tree, ADDED)
    message = refused(tree, "--reverse")
    assert f"  {EDITED}\n" in message and "nothing was changed" in message


def test_edits_elsewhere_survive_the_removal(tree, verl):
    apply(tree)
    with open(tree / EDITED, "a") as file:
        file.write("\n# mine\n")
    succeed("--reverse", tree)
    assert (tree / EDITED).read_bytes() == (verl / EDITED).read_bytes() + b"\n# mine\n"


@pytest.mark.parametrize("version", ["0.8.0", "0.9.2", "0.10.0", "0.9.1.dev0", ""])
def test_unsupported_version(version, tree, patched):
    set_version(tree, version)
    message = refused(tree)
    assert f"VERL {version or 'unknown'};" in message and "0.9.0, 0.9.1" in message and "--any-version" in message
    apply(tree, "--any-version")
    assert (tree / EDITED).read_bytes() == patched[EDITED]


@pytest.mark.parametrize("version", ["0.9.0", "0.9.1+local", "0.10.0.dev", "0.10.0.dev20260822"])
def test_supported_version(version, tree):
    set_version(tree, version)
    assert f"VERL {version} " in succeed("--check", tree)


@pytest.mark.parametrize("file", ["PKG-INFO", "verl-0.9.1.dist-info/METADATA"])
def test_version_from_the_metadata(file, tree):
    (tree / "verl" / "version" / "version").unlink()
    (tree / file).parent.mkdir(exist_ok=True)
    (tree / file).write_text("Metadata-Version: 2.1\nName: verl\nVersion: 0.9.1\n\nVersion: of the text\n")
    assert "VERL 0.9.1 " in succeed("--check", tree)


def test_another_version_of_the_patch(tree):
    apply(tree)
    for name in CHANGED:  # VERL installed anew over a patched one: pip knows nothing of the new files
        subprocess.run(["git", "-C", str(tree), "apply", "-R", f"--include={name}", str(PATCH)], check=True,
                       env=os.environ | {"GIT_DIR": "/nonexistent"})  # fmt: skip
    message = refused(tree)
    assert f"{len(NEW)} of the {len(NEW)} new files are in" in message and "Nothing was changed" in message


def test_pip_package_in_the_same_place_steps_aside(whole_tree):
    package, metadata = (whole_tree / f"verl_on_policy_distillation{end}" for end in ("", "-0.1.0.dist-info"))
    shutil.copytree(ROOT / "verl_on_policy_distillation", package)
    shutil.copytree(ROOT / "verl", package / "files")
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: verl-on-policy-distillation\nVersion: 0.1.0\n")
    (metadata / "entry_points.txt").write_text("[verl.plugins]\non_policy_distillation = verl_on_policy_distillation\n")
    environment = {"PYTHON": sys.executable, "PYTHONPATH": str(whole_tree)}
    assert "in VERL: patched" in succeed(whole_tree, environment=environment)
    found = "import verl.on_policy_distillation as module; print(module.__file__)"
    said = succeed("-c", found, script=sys.executable, environment=environment)
    assert said.splitlines()[-1] == str(whole_tree / "verl" / "on_policy_distillation" / "__init__.py")


@pytest.mark.parametrize("read_only", ["files", "directories"])
def test_read_only_tree(read_only, verl):
    # Not in pytest's folder, which only its owner may enter: root may write anywhere, so somebody else has to call.
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        tree = copy_of(verl, folder / "tree")
        (folder / "scripts").mkdir()
        for name in ("apply_patch.sh", PATCH.name, "scripts/apply_patch.py", "scripts/generated.patch"):
            shutil.copy(ROOT / name, folder / name)
        paths = [path for path in tree.rglob("*") if path.is_dir() == (read_only == "directories")]
        for path in paths:
            path.chmod(path.stat().st_mode & ~0o222)
        options = {"script": folder / "apply_patch.sh"}
        if os.geteuid() == 0:
            if read_only == "files":
                for path in tree.rglob("*"):
                    if path.is_dir():
                        os.chown(path, NOBODY, NOBODY)
            options |= {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        assert "is not writable; nothing was changed" in refused(tree, "--no-verify", **options)
        for path in paths:
            path.chmod(path.stat().st_mode | 0o200)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_file_that_is_a_symbolic_link(tree, tmp_path):
    (tree / EDITED).rename(tmp_path / "elsewhere.py")
    (tree / EDITED).symlink_to(tmp_path / "elsewhere.py")
    assert "is not writable; nothing was changed" in refused(tree, "--no-verify")
    assert (tree / EDITED).is_symlink()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--chek"], "unknown option --chek"),
        (["a", "b"], "more than one TARGET"),
    ],
)
def test_wrong_usage(arguments, words):
    done = call(*arguments)
    assert done.returncode == 2 and words in done.stderr and "--help" in done.stderr


@pytest.mark.parametrize(
    ("target", "words"), [("", "not a directory"), ("missing", "not a directory"), (".", "no verl/")]
)
def test_target_that_is_no_verl(target, words, tmp_path):
    done = call(target, cwd=tmp_path)
    assert done.returncode == 1 and words in done.stderr


def test_python_without_verl(tmp_path):
    done = call(environment={"PYTHON": "/missing/python"})
    assert done.returncode == 1 and "/missing/python has no VERL" in done.stderr and "PYTHON=" in done.stderr


def test_python_that_is_missing_is_not_needed_with_a_target(tree, patched):
    said = succeed(tree, environment={"PYTHON": "/missing/python"})
    assert "not verified: there is no /missing/python" in said
    assert content(tree) == patched


def test_no_python_at_all(tree, path_without):
    environment = path_without() | {"PYTHON": "/missing/python"}
    assert "no Python 3.8 or later found; nothing was changed" in refused(tree, environment=environment)


def test_help_names_every_option():
    text, source = succeed("--help"), (ROOT / "scripts" / "apply_patch.py").read_text(encoding="utf-8")
    source = source[source.index("def parse_arguments") : source.index("def run(")]
    options = set(re.findall(r'"(--[\w-]+)"[^\n]*action="store_true"', source)) | set(
        re.findall(r'\("(--[\w-]+)"', source)
    )
    assert {"--check", "--reverse", "--3way", "--any-version", "--no-verify", "--help"} == options
    assert all(option in text for option in options)
    assert max(map(len, text.splitlines())) <= 120


# ----------------------------------------------------------------------------------------------------------------------
# without git; writing that fails


def test_without_git(tree, path_without):
    assert "git is not installed" in refused(tree, environment=path_without("git"))


def directions(tree, direction):
    """The options of a direction, on a tree that it can be taken in."""
    if direction == "reverse":
        apply(tree)
        return ["--reverse"]
    return []


@pytest.mark.parametrize("direction", ["apply", "reverse"])
def test_writing_that_fails_is_undone(direction, tree):
    """A folder is where the last of VERL's own files is written before it takes its name."""
    options = directions(tree, direction)
    path = tree / max(CHANGED)
    in_the_way = path.with_name(f".{path.name}.partial")
    in_the_way.mkdir()
    message = refused(tree, "--no-verify", *options)
    assert "writing failed; what was written has been undone" in message
    assert in_the_way.is_dir()
    in_the_way.rmdir()
    assert not [path for path in tree.rglob("*.partial")]
    succeed("--no-verify", *options, tree)


@pytest.mark.parametrize("direction", ["apply", "reverse"])
def test_git_that_fails_changes_nothing(direction, tree, path_without):
    """git has written and then does not succeed."""
    options = directions(tree, direction)
    environment = path_without("git")
    wrapper = Path(environment["PATH"]) / "git"
    harmless = "*--check*|*init*"
    wrapper.write_text(
        f'#!/usr/bin/env bash\n{shutil.which("git")} "$@" || exit\ncase "$*" in {harmless}) ;; *) exit 1 ;; esac\n'
    )
    wrapper.chmod(0o755)
    assert "nothing was changed" in refused(tree, *options, environment=environment)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_after_writing_is_undone(number, tree, tmp_path):
    """The Python that is to verify the patch tells the script to stop instead, once."""
    python = tmp_path / "python"
    python.write_text(f"""#!/usr/bin/env bash
case "$*" in
*doctor*) test -e {NEW[0]!r} && kill -{int(number)} $PPID; sleep 5 ;;
*) exec {sys.executable} "$@" ;;
esac
""")
    python.chmod(0o755)
    message = refused(tree, environment={"PYTHON": str(python)}, cwd=tree)
    assert "stopped by a signal" in message and "it was undone" in message


# ----------------------------------------------------------------------------------------------------------------------
# verification


def test_verification(whole_tree):
    said = succeed(whole_tree, environment={"PYTHON": sys.executable})
    for name in ("registry", "imports", "configuration", "losses"):
        assert re.search(rf"^verify: {name} +ok: ", said, flags=re.MULTILINE), said
    assert not list(whole_tree.rglob("__pycache__"))


def test_python_without_packages_is_said_and_is_no_failure(tree, tmp_path, patched):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    environment = {"PYTHON": str(tmp_path / "venv" / "bin" / "python"), "PYTHONPATH": ""}
    said = succeed(tree, environment=environment)
    assert "not checked" in said and "not verified in full" in said and "Next:" in said
    assert content(tree) == patched


def test_verification_that_fails_takes_the_patch_out(tree):
    with open(tree / "verl" / "__init__.py", "a") as file:
        file.write("\nraise RuntimeError('this VERL is broken')\n")
    message = refused(tree, environment={"PYTHON": sys.executable})
    assert "does not work, so the patch was taken out again" in message
