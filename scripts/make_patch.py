#!/usr/bin/env python3
"""Make 0001-on-policy-distillation.patch from verl/ (new files) and scripts/hunks.patch (changes to VERL's files).

    scripts/make_patch.py                   write the patch, scripts/generated.patch and PATCH_SUMMARY.txt
    scripts/make_patch.py --check           exit 1, naming what is stale, when they are not what would be written
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

ROOT = Path(__file__).resolve().parent.parent
PATCH = ROOT / "0001-on-policy-distillation.patch"
SUMMARY = ROOT / "PATCH_SUMMARY.txt"
HUNKS = ROOT / "scripts" / "hunks.patch"
GENERATED = ROOT / "scripts" / "generated.patch"
REQUIREMENTS = ROOT / "scripts" / "requirements.txt"
APPLY = ROOT / "scripts" / "apply_patch.py"
GUIDE = ROOT / "PATCH_README.md"
PRESET = ROOT / "verl" / "trainer" / "config" / "policy_loss" / "on_policy_distillation.yaml"
# VERL's wheels: the first folder is where they are put, the others where set-ups leave them.
WHEELS = [ROOT / ".venv" / ".versions", ROOT / ".venv" / ".pristine", Path(sys.prefix) / ".pristine"]

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
MAIL = ["--stdout", "--zero-commit", "--stat=72", "--signature=on-policy-distillation"]

# From VERL's scripts/generate_trainer_config.sh, its spelling included.
VARIANTS = {
    "_generated_ppo_trainer.yaml": "",
    "_generated_ppo_megatron_trainer.yaml": "model_engine=megatron",
    "_generated_ppo_veomni_trainer.yaml": "model_engine=veomni",
    "_generated_ppo_torchtitan_trainer.yaml": "model_engine=torchtitan",
}
GENERATED_HEAD = """\
# This reference configration yaml is automatically generated via 'scripts/generate_trainer_config.sh'
# in which it invokes 'python3 scripts/print_cfg.py --cfg job {argument}' to flatten the \
'verl/trainer/config/ppo_trainer.yaml' config fields into a single file.
# Do not modify this file directly.
# The file is usually only for reference and never used.

"""


# What a user gets beside the patch, in the order of reading.
PACKAGE = {
    "apply_patch.sh": "applies, checks and removes the patch",
    "README.md": "what this is, two commands, first configuration",
    "PATCH_README.md": "installation, usage, configuration, troubleshooting",
    "ON_POLICY_DISTILLATION.md": "the technical document",
    "examples/on_policy_distillation/README.md": "quickstart, own data, troubleshooting",
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

FILES in verl/ (added and removed lines; {new} are new, {changed} are VERL's)
{files}
and, where they are VERL's own, its four trainer/config/_generated_*.yaml (scripts/generated.patch)
"""


class PatchError(Exception):
    """The input cannot become a patch; the message says which file and why."""


def git(repository, *arguments):
    """What git prints, as bytes."""
    if not shutil.which("git"):
        raise PatchError("git is needed")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")} | SETTINGS
    command = ["git", "-c", "core.autocrlf=false", *map(str, arguments)]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True)
    if done.returncode:
        raise PatchError(f"git {arguments[0]}: {done.stderr.decode().strip()}")
    return done.stdout


def verl_wheel(version):
    """VERL's wheel of `version`, fetched when it is not there yet."""
    found = [path for folder in WHEELS for path in folder.glob(f"verl-{version}-*.whl")]
    if found:
        return found[0]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps"]
    if subprocess.run(
        [*pip, "--only-binary", ":all:", "-d", str(WHEELS[0]), f"verl=={version}"], stderr=subprocess.PIPE
    ).returncode:
        raise PatchError(f"could not fetch verl=={version}; put its wheel into {WHEELS[0]}")
    return next(WHEELS[0].glob(f"verl-{version}-*.whl"))


def unpack_verl(version, folder, wanted=("verl/", "verl-")):
    """Put VERL's package and its metadata, or what else is wanted of its wheel, into `folder`."""
    with zipfile.ZipFile(verl_wheel(version)) as wheel:
        wheel.extractall(folder, [name for name in wheel.namelist() if name.startswith(tuple(wanted))])
    return folder


def verl_pin():
    return re.search(r"^verl==(\S+)$", REQUIREMENTS.read_text(), flags=re.MULTILINE)[1]


def new_files(folder=ROOT):
    """Relative paths of the files below folder/verl that a patch can hold.

    All of them: what serves an unpatched VERL (hydra_source.py, main_on_policy_distillation.py) comes too, so that a
    launch script written for one works in the other.
    """
    paths = (path for path in (folder / "verl").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def copy_file(name, source, target):
    if re.search(rb"[\0\r]", (source / name).read_bytes()):
        raise PatchError(f"{source / name}: has NUL or carriage return characters, which mail patches do not carry")
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / name, target / name)


def commit_patch(folder, version):
    """The hunks and the new files in a commit; path to (added, removed) lines, and which files are new."""
    created = new_files()
    # What changes, what would stand in the way, and what the configuration is composed of.
    changed = re.findall(r"^--- a/(.*)$", HUNKS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    unpack_verl(version, folder, [*changed, *created, "verl/trainer/config/"])
    git(folder, "init", "-q")
    git(folder, "add", "--force", "verl")
    git(folder, "commit", "-q", "-m", "VERL")
    try:
        git(folder, "apply", HUNKS)
    except PatchError as error:
        raise PatchError(f"{HUNKS.name} does not fit VERL {version}: {error}") from None
    for name in created:
        if (folder / name).exists():
            raise PatchError(f"{name}: is in verl/ as a new file, and VERL has one of that name")
        copy_file(name, ROOT, folder)
    git(folder, "add", "--force", "verl")
    git(folder, "commit", "-q", "-m", MESSAGE)
    rows = git(folder, "show", "--numstat", "--format=", "--no-renames").decode().splitlines()
    counts = {name: (int(added), int(removed)) for added, removed, name in (row.split("\t") for row in rows)}
    return counts, created


def generate(folder, name, argument):
    """One of VERL's flattened configurations, as its scripts/generate_trainer_config.sh writes it."""
    try:
        from hydra import compose, initialize_config_dir
        from omegaconf import OmegaConf
    except ModuleNotFoundError as error:
        raise PatchError(f"{sys.executable} has no {error.name}; call .venv/bin/python scripts/make_patch.py") from None
    with initialize_config_dir(str((folder / "verl" / "trainer" / "config").resolve()), version_base=None):
        text = OmegaConf.to_yaml(compose("ppo_trainer", overrides=[argument] if argument else []))
    head = GENERATED_HEAD.format(argument=argument)
    (folder / "verl" / "trainer" / "config" / name).write_text(head + text[text.index("actor_rollout_ref:") :])


def generate_all(folder):
    for variant, argument in VARIANTS.items():
        generate(folder, variant, argument)
    return git(folder, "diff", *DIFF)


def build():
    """Path to bytes of everything that is generated."""
    with tempfile.TemporaryDirectory() as folder:
        folders = {version: Path(folder) / version for version in supported("RELEASES").split()}
        made = {version: commit_patch(path, version) for version, path in folders.items()}
        counts, created = made[verl_pin()]
        patch = git(folders[verl_pin()], "format-patch", "-1", *DIFF, *MAIL)
        generated = b"".join(map(generate_all, reversed(folders.values())))
    return {PATCH: patch, GENERATED: generated, SUMMARY: build_summary(patch, counts, created)}


def supported(name):
    """What scripts/apply_patch.py says that the patch is for: "RELEASES" or "BRANCH", as one string."""
    return re.search(rf'^SUPPORTED_{name} = "(.*)"$', APPLY.read_text(encoding="utf-8"), re.MULTILINE)[1]


def file_rows(counts):
    """A row for each row of PATCH_README.md's tables, a file's or a directory's, with the lines of all its files."""
    told = dict(re.findall(r"^\| `(verl/\S+)` \| (.*) \|$", GUIDE.read_text(encoding="utf-8"), flags=re.MULTILINE))
    rows = {}
    for name, pair in counts.items():
        path = next((path for path in told if name == path or path[-1] == "/" and name.startswith(path)), None)
        if path is None:
            raise PatchError(f"{GUIDE.name}: the tables of files have no row for `{name}`")
        rows[path] = [sum(both) for both in zip(rows.get(path, (0, 0)), pair, strict=True)]
    return [
        (f"  {path[5:]:<54} {f'+{added}':>5} {f'-{removed}' if removed else '':<2}", told[path])
        for path, (added, removed) in rows.items()
    ]


def build_summary(patch, counts, created):
    """The page, as bytes. `counts`: (added, removed) lines by file; `created`: the files that are new."""
    changed = len(counts) - len(created)
    package = {PATCH.name: (patch, f"{len(created)} new and {changed} changed files")}
    package |= {name: ((ROOT / name).read_bytes(), what) for name, what in PACKAGE.items()}
    keys = re.findall(r"^((?:# .*\n)+)([a-z]\w*): (\S+)$", PRESET.read_text(encoding="utf-8"), flags=re.MULTILINE)
    page = PAGE.format(
        releases=supported("RELEASES").replace(" ", " and "),
        branch=supported("BRANCH"),
        package=column(
            (f"  {name:<42} {f'{len(text) / 1024:.0f} KB':>7} {text.count(10):>6,} ", what)
            for name, (text, what) in package.items()
        ),
        keys=column((f"  {key:<25} {default:<11}", text.replace("# ", "")) for text, key, default in keys),
        new=len(created),
        changed=changed,
        files=column(file_rows(counts)),
    )
    return page.encode("utf-8")


def column(rows):
    """Of each (head, text): the text beside the head, in as many lines as it takes."""
    filled = (textwrap.fill(text, 120, initial_indent=f"{head} ", subsequent_indent=" " * 4) for head, text in rows)
    return "\n".join(line.rstrip() for line in filled)


def by_file(patch):
    """The parts of a patch: each file's by its path, and what comes before the first one."""
    parts = re.split(r"^(?=diff --git |-- $)", patch.decode("utf-8", "replace"), flags=re.MULTILINE)
    return {"the message or the diffstat" if part is parts[0] else part.split("\n")[0][11:]: part for part in parts}


def stale_parts(present, wanted):
    old, new = by_file(present), by_file(wanted)
    return [name.partition(" b/")[2] or name for name in {**new, **old} if old.get(name) != new.get(name)]


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


def write():
    for path, content in build().items():
        path.write_bytes(content)
        print(f"wrote {path.relative_to(ROOT)}")


def write_hunks(edited):
    if not (edited / "verl" / "__init__.py").is_file():
        raise PatchError(f"{edited}: has no verl/__init__.py in it")
    with tempfile.TemporaryDirectory() as name:
        folder = unpack_verl(verl_pin(), Path(name), ["verl/"])
        theirs, here, ours = (set(new_files(tree)) for tree in (folder, edited, ROOT))
        if lost := sorted(name for name in theirs if name not in here or (edited / name).is_symlink()):
            raise PatchError(f"{edited / lost[0]}: VERL's own file is gone or a symbolic link: no hunk can say that")
        if stray := sorted(name for name in here - theirs - ours if not (edited / name).is_symlink()):
            raise PatchError(f"{edited / stray[0]}: neither VERL's nor in {ROOT / 'verl'}; new files belong there")
        same = [path for path in theirs if (edited / path).read_bytes() == (folder / path).read_bytes()]
        for path in same:
            (folder / path).unlink()
        git(folder, "init", "-q")
        git(folder, "add", "--force", "verl")
        for path in theirs.difference(same):
            if Path(path).name not in VARIANTS:
                copy_file(path, edited, folder)
        HUNKS.write_bytes(git(folder, "diff", *DIFF))
    print(f"wrote {HUNKS.relative_to(ROOT)}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog="Without an option all is written from what is there."
    )
    only_one = parser.add_mutually_exclusive_group()
    only_one.add_argument("--check", action="store_true", help="write nothing; exit 1 when something is stale")
    only_one.add_argument("--hunks-from", type=Path, metavar="DIR", help="directory whose verl/ was edited in place")
    arguments = parser.parse_args()
    try:
        if arguments.check:
            return check()
        if arguments.hunks_from:
            write_hunks(arguments.hunks_from.resolve())
        write()
    except PatchError as error:
        print(f"make_patch.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
