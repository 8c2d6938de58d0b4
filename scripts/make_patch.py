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
"""Make 0001-on-policy-distillation.patch from verl/ (new files) and scripts/hunks.patch (changes to VERL's files).

    scripts/make_patch.py                   write the patch, scripts/generated.patch and PATCH_SUMMARY.txt
    scripts/make_patch.py --check           exit 1, naming what is stale, when they are not what would be written
    scripts/make_patch.py --wheel           print where VERL's own wheel is; fetch it first when it is not there
    scripts/make_patch.py --hunks-from DIR  rewrite scripts/hunks.patch from DIR, whose verl/ is the pinned VERL with
                                            the patch and was edited in place; then write all three

git makes the patch in a temporary repository whose first commit is VERL's published package; the same input always
gives the same bytes. scripts/generated.patch has the _generated_*.yaml of each release, as VERL's own script makes
them from the patched tree; this takes a Python that has hydra-core, as .venv's.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from pathlib import Path

from apply_patch import GENERATED, PATCH, ROOT, SUPPORTED_BRANCH, SUPPORTED_RELEASES

SUMMARY = ROOT / "PATCH_SUMMARY.txt"
HUNKS = ROOT / "scripts" / "hunks.patch"
REQUIREMENTS = ROOT / "scripts" / "requirements.txt"
GUIDE = ROOT / "PATCH_README.md"
PRESET = ROOT / "verl" / "trainer" / "config" / "policy_loss" / "on_policy_distillation.yaml"
# VERL's wheels: where they are put, where another checkout's .venv has them, and where they were put before.
WHEELS = [ROOT / ".venv" / ".versions", Path(sys.prefix) / ".versions", Path(sys.prefix) / ".pristine"]

MESSAGE = """\
[algo, trainer, fsdp, cfg] feat: exact on-policy distillation

Add two policy losses, on_policy_distillation and
hybrid_rl_distillation. The student samples, a teacher scores every
position of the samples, and the actor minimizes an exact
full-vocabulary divergence (reverse KL, forward KL, generalized JSD or
skew reverse KL), alone or beside any registered RL loss.

The teacher lives in the actor's resource pool and needs no devices of
its own. Its last hidden states of the response tokens reach the
student, whose output layer turns them into divergences a chunk of
tokens at a time, so that no tensor of (tokens, vocabulary) exists.

Nothing changes unless actor.policy_loss.loss_mode names one of the two
losses. What does not go together (Megatron, fused kernels, sequence
parallelism, separate_async, the legacy trainer) is refused in the
driver, before any Ray actor starts.
"""
# Constants, and none of the user's settings, so that the patch changes only when its content does.
SETTINGS = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    **{f"GIT_{who}_NAME": "The on-policy-distillation authors" for who in ("AUTHOR", "COMMITTER")},
    **{f"GIT_{who}_EMAIL": "noreply@example.com" for who in ("AUTHOR", "COMMITTER")},
    **{f"GIT_{who}_DATE": "2026-01-01T00:00:00+0000" for who in ("AUTHOR", "COMMITTER")},
}
DIFF = ["--full-index", "--no-renames", "--no-ext-diff", "--no-color", "-U3", "--diff-algorithm=myers"]
MAIL = ["--stdout", "--zero-commit", "--stat=110", "--compact-summary", "--signature=on-policy-distillation"]

# What a user gets beside the patch, in the order of reading.
PACKAGE = {
    PATCH.name: "the patch itself",
    "apply_patch.sh": "applies, checks and removes the patch",
    "README.md": "what this is, two commands, first configuration",
    "PATCH_README.md": "installation, settings, troubleshooting, measurements",
    "ON_POLICY_DISTILLATION.md": "the technical document",
    "examples/on_policy_distillation/README.md": "quickstart, overrides, own models and data",
    "tests/test_on_policy_distillation.py": "tests of the losses; python FILE runs a part without pytest",
}
PAGE = """\
EXACT ON-POLICY DISTILLATION FOR VERL: THE PATCH ON ONE PAGE
Written by scripts/make_patch.py; do not edit.

For VERL {releases}, and the development branch ({branch}) as far as PATCH_README.md says.

PACKAGE                                           size  lines
{package}

QUICK START
  ./apply_patch.sh                     into the VERL that Python imports; a directory as argument: into that one
  ./apply_patch.sh --check             what would happen
  ./apply_patch.sh --reverse           takes it out again, byte for byte
  git apply 0001-on-policy-distillation.patch        by hand, in a checkout; git am makes a commit of it
Then add to a VERL command that runs PPO or GRPO:
  actor_rollout_ref.actor.policy_loss.loss_mode=on_policy_distillation teacher.model.path=PATH_OF_THE_TEACHER

CONFIGURATION, below actor_rollout_ref.actor.policy_loss (with loss_mode=on_policy_distillation or
hybrid_rl_distillation); the teacher.* group is in verl/trainer/config/teacher/teacher.yaml
{keys}

FILES and their changed lines; those that are not new are VERL's own; PATCH_README.md says what each is
{files}
 and, where they are VERL's own, its four trainer/config/_generated_*.yaml (scripts/generated.patch)
"""


class PatchError(Exception):
    """The input cannot become a patch; the message says which file and why."""


def git(repository, *arguments):
    """What git prints, as bytes."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")} | SETTINGS
    command = ["git", "-c", "core.autocrlf=false", "-c", "core.fileMode=false", *map(str, arguments)]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True)
    if done.returncode:
        raise PatchError(f"git {arguments[0]}: {done.stderr.decode().strip()}")
    return done.stdout


def verl_wheel(version):
    """VERL's wheel of `version`, fetched when it is not there yet."""
    if found := [path for folder in WHEELS for path in folder.glob(f"verl-{version}-*.whl")]:
        return found[0]
    WHEELS[0].mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps"]
    with tempfile.TemporaryDirectory(dir=WHEELS[0]) as partial:  # a wheel in WHEELS is whole
        command = [*pip, "--only-binary", ":all:", "-d", partial, f"verl=={version}"]
        done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise PatchError(f"could not fetch verl=={version}; put its wheel into {WHEELS[0]}. {done.stderr}")
        [wheel] = Path(partial).iterdir()
        return wheel.rename(WHEELS[0] / wheel.name)


def unpack_verl(version, folder, wanted=("verl/", "verl-")):
    """Put VERL's package and its metadata, or what else is wanted of its wheel, into `folder`."""
    with zipfile.ZipFile(verl_wheel(version)) as wheel:
        wheel.extractall(folder, [name for name in wheel.namelist() if name.startswith(tuple(wanted))])
    return folder


def verl_pin():
    return re.search(r"^verl==(\S+)$", REQUIREMENTS.read_text(), flags=re.MULTILINE)[1]


def new_files():
    """Relative paths of our files.

    All of them: what serves an unpatched VERL (hydra_source.py, main_on_policy_distillation.py) comes too, so that a
    launch script written for one works in the other.
    """
    paths = (path for path in (ROOT / "verl").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


def refuse_binary(path):
    if re.search(rb"[\0\r]", path.read_bytes()):
        raise PatchError(f"{path}: has NUL or carriage return characters, which mail patches do not carry")


def commit(folder, message):
    """Commit folder/verl, the first time to a new repository."""
    git(folder, "init", "-q")  # of one that is there, it changes nothing
    git(folder, "add", "--all", "--force", "verl")
    git(folder, "commit", "-q", "-m", message)


def commit_patch(folder, version):
    """The hunks and the new files in a commit of a repository that `folder` becomes."""
    created = new_files()
    # What changes, what would stand in the way, and what the configuration is composed of.
    changed = re.findall(r"^--- a/(.*)$", HUNKS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    unpack_verl(version, folder, [*changed, *created, "verl/trainer/config/"])
    commit(folder, "VERL")
    try:
        git(folder, "apply", HUNKS)
    except PatchError as error:
        raise PatchError(f"{HUNKS.name} does not fit VERL {version}: {error}") from None
    for name in created:
        if (folder / name).exists():
            raise PatchError(f"{name}: is in verl/ as a new file, and VERL has one of that name")
        refuse_binary(ROOT / name)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    commit(folder, MESSAGE)
    return folder


def generate(folder):
    """Rewrite VERL's flattened configurations as its scripts/generate_trainer_config.sh does; the difference."""
    try:
        from hydra import compose, initialize_config_dir
        from omegaconf import OmegaConf
    except ModuleNotFoundError as error:
        raise PatchError(f"{sys.executable} has no {error.name}; call .venv/bin/python scripts/make_patch.py") from None
    directory, start = folder / "verl" / "trainer" / "config", "actor_rollout_ref:"
    with initialize_config_dir(str(directory.resolve()), version_base=None):
        for path in directory.glob("_generated_*.yaml"):
            head = path.read_text().partition(start)[0]
            arguments = re.search("--cfg job (.*?)'", head)[1].split()  # the head says how VERL makes the rest
            text = OmegaConf.to_yaml(compose("ppo_trainer", overrides=arguments))
            path.write_text(head + text[text.index(start) :])
    return git(folder, "diff", *DIFF)


def build():
    """Path to bytes of everything that is generated."""
    with tempfile.TemporaryDirectory() as folder:
        made = {name: commit_patch(Path(folder) / name, name) for name in SUPPORTED_RELEASES}
        patch = git(made[verl_pin()], "format-patch", "-1", *DIFF, *MAIL)
        generated = b"".join(map(generate, reversed(made.values())))
    refuse_untold_files(patch)
    return {PATCH: patch, GENERATED: generated, SUMMARY: build_summary(patch)}


def refuse_untold_files(patch):
    """The guide's tables have a row for each file, or for a directory that it is in."""
    rows = re.findall(r"^\| `(verl/\S+)` \|", GUIDE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for name in re.findall(r"^diff --git a/(.*) b/", patch.decode("utf-8"), flags=re.MULTILINE):
        if not any(name == row or row[-1] == "/" and name.startswith(row) for row in rows):
            raise PatchError(f"{GUIDE.name}: the tables of files have no row for `{name}`")


def build_summary(patch):
    """The page, as bytes. Its list of files is git's, from the head of the patch."""
    package = []
    for name, what in PACKAGE.items():
        text = patch if name == PATCH.name else (ROOT / name).read_bytes()
        package.append(f"  {name:<42} {len(text) / 1024:>4.0f} KB {text.count(10):>6,}  {what}")
    keys = PRESET.read_text(encoding="utf-8").split("\n\n", 2)[2]
    page = PAGE.format(
        releases=" and ".join(SUPPORTED_RELEASES),
        branch=SUPPORTED_BRANCH,
        package="\n".join(package),
        keys=textwrap.indent(keys.rstrip().replace("\n\n", "\n"), "  "),
        files=re.search("\n---\n(.*?)\n\ndiff --git ", patch.decode("utf-8"), flags=re.DOTALL)[1],
    )
    return page.encode("utf-8")


def by_file(patch):
    head, *files = re.split(r"^diff --git a/", patch.decode("utf-8", "replace"), flags=re.MULTILINE)
    return {"the message or the diffstat": head} | {text.partition(" b/")[0]: text for text in files}


def stale_parts(present, wanted):
    old, new = by_file(present), by_file(wanted)
    return [name for name in {**new, **old} if old.get(name) != new.get(name)]


def check():
    stale = []
    for path, wanted in build().items():
        present = path.read_bytes() if path.is_file() else b""
        if present != wanted:
            differs = f": it differs in {', '.join(stale_parts(present, wanted))}" if path.suffix == ".patch" else ""
            stale.append(f"{path.relative_to(ROOT)} is stale{differs}")
    if stale:
        print(*stale, "Run scripts/make_patch.py.", sep="\n", file=sys.stderr)
    return bool(stale)


def write_hunks(edited):
    with tempfile.TemporaryDirectory() as name:
        folder = unpack_verl(verl_pin(), Path(name), ["verl/"])
        commit(folder, "VERL")
        shutil.rmtree(folder / "verl")
        shutil.copytree(edited / "verl", folder / "verl", symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        git(folder, "add", "--all", "--force", "verl")
        for row in git(folder, "diff", "--cached", "--name-status", "--no-renames").decode().splitlines():
            kind, path = row.split("\t")
            if kind in ("D", "T"):
                raise PatchError(f"{edited / path}: VERL's own file is gone or a symbolic link: no hunk can say that")
            if kind == "A" and path not in new_files():
                raise PatchError(f"{edited / path}: neither VERL's nor in {ROOT / 'verl'}; new files belong there")
            refuse_binary(folder / path)
        paths = ["verl", ":(exclude)*/_generated_*.yaml"]
        HUNKS.write_bytes(git(folder, "diff", "--cached", "--diff-filter=M", *DIFF, "--", *paths))
    print(f"wrote {HUNKS.relative_to(ROOT)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    only_one = parser.add_mutually_exclusive_group()
    only_one.add_argument("--check", action="store_true")
    only_one.add_argument("--wheel", action="store_true")
    only_one.add_argument("--hunks-from", type=Path, metavar="DIR")
    arguments = parser.parse_args()
    try:
        if arguments.check:
            return check()
        if arguments.wheel:
            print(verl_wheel(verl_pin()))
            return 0
        if arguments.hunks_from:
            write_hunks(arguments.hunks_from.resolve())
        for path, content in build().items():
            path.write_bytes(content)
            print(f"wrote {path.relative_to(ROOT)}")
    except (PatchError, OSError) as error:
        print(f"make_patch.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
