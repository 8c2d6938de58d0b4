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
"""Adds on-policy distillation to the VERL in TARGET, a directory with verl/ in it: a git checkout, an unpacked source
tree or a site-packages directory. Without TARGET: the VERL that Python imports. Needs git. PYTHON=... names the Python
that finds VERL and verifies the patch.

The whole patch is applied or nothing is changed, whatever goes wrong. A tree that has the patch is left as it is.
In a git checkout the files that the patch changes must have no uncommitted changes (--3way merges with them); all
other files may be in any state, and neither the index nor the history is touched. VERL's four _generated_*.yaml, which
nothing reads, are changed where they are a release's own and left as they are where they are not.

Exit status: 0 done or nothing to do, 1 an error (and an unchanged tree), 2 wrong usage.
"""

# The files that the patch touches are copied into a temporary git repository of their own, where git applies the
# patch, takes it out or merges it. A result that is whole is copied back; whatever goes wrong then, or in the
# verification, the files as they were are put back. No packages: any Python runs this.

import argparse
import contextlib
import functools
import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATCH = ROOT / "0001-on-policy-distillation.patch"
GENERATED = ROOT / "scripts" / "generated.patch"
PYTHON = os.environ.get("PYTHON") or sys.executable

# Releases are checked whole; the branch moves: it was checked at a commit.
SUPPORTED_RELEASES = ["0.9.0", "0.9.1"]
SUPPORTED_BRANCH = "0.10.0.dev"
VERSIONS = f"{', '.join(SUPPORTED_RELEASES)} and {SUPPORTED_BRANCH}"

OF_A_REPOSITORY = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_OBJECT_DIRECTORY")
FIND_VERL = "import importlib.util; print(importlib.util.find_spec('verl').origin)"


class Refused(Exception):
    """What the user reads; the tree is as it was."""


def say(text, file=None):
    print(f"apply_patch.sh: {text}", file=file, flush=True)


def imported_verl():
    """The directory of the VERL that Python would import."""
    if shutil.which(PYTHON):
        done = subprocess.run([PYTHON, "-c", FIND_VERL], capture_output=True, text=True)
        origin = Path(done.stdout.rstrip("\n"))
        if origin.is_file():
            return origin.resolve().parents[1]
    advice = "name its directory (./apply_patch.sh TARGET) or another Python (PYTHON=...)"
    raise Refused(f"{PYTHON} has no VERL; {advice}")


def resolve(target):
    """The directory that has verl/ in it; the package itself, as in .../site-packages/verl, is taken for it."""
    if not os.path.isdir(target):
        raise Refused(f"'{target}' is not a directory")
    tree = Path(target).resolve()
    if tree.name == "verl" and (tree / "__init__.py").is_file():
        tree = tree.parent
    if not (tree / "verl" / "__init__.py").is_file():
        raise Refused(f"{target} has no verl/__init__.py in it: not a VERL tree")
    return tree


def find_version(tree):
    for pattern in ("verl/version/version", "verl-[0-9]*.dist-info/METADATA", "verl.egg-info/PKG-INFO", "PKG-INFO"):
        for path in tree.glob(pattern):
            if found := re.search(
                r"^(?:Version: *)?(\d\S*)[ \t]*$", path.read_text(errors="replace"), flags=re.MULTILINE
            ):
                return found[1]
    return "unknown"


def git_in_checkout(tree, *arguments):
    """What git says of the user's repository, with his settings; None where the tree is not the root of one."""
    environment = {name: value for name, value in os.environ.items() if name not in OF_A_REPOSITORY}
    command = ["git", "-C", str(tree), "--no-optional-locks", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 and (tree / ".git").exists() else None


class Workshop:
    """The files of a tree that the patch touches, in a git repository of their own."""

    def __init__(self, tree, folder):
        self.tree, self.work, self.before = tree, folder / "work", folder / "before"
        self.version = find_version(tree)
        self.patch = PATCH.read_text(encoding="utf-8")
        self.changed = re.findall(r"^--- a/(.*)$", self.patch, flags=re.MULTILINE)
        self.new = re.findall(r"^diff --git a/(.*) b/.*\nnew file mode", self.patch, flags=re.MULTILINE)
        sections = re.split(r"^(?=diff --git )", GENERATED.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
        self.generated = [(re.match("diff --git a/(.*) b/", section)[1], section) for section in sections]
        self.files = [*self.changed, *self.new, *sorted({name for name, _ in self.generated})]
        objects = git_in_checkout(tree, "rev-parse", "--git-path", "objects")
        self.objects = tree / objects.rstrip("\n") if objects else None
        self.work.mkdir()
        self.git("init", "-q")
        for name in filter(lambda name: (tree / name).is_file(), self.files):
            for copy in (self.work / name, self.before / name):
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(tree / name, copy)

    def git(self, *arguments, text=None, **settings):
        """Whether git in the repository of our own succeeds, and what it says."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        environment.update(GIT_CONFIG_GLOBAL=os.devnull, GIT_CONFIG_NOSYSTEM="1", **settings)
        environment["GIT_ALTERNATE_OBJECT_DIRECTORIES"] = str(self.objects or "")  # what a merge starts from
        command = ["git", "-c", "core.autocrlf=false", *arguments]
        done = subprocess.run(command, cwd=self.work, env=environment, input=text, capture_output=True, text=True)
        return done.returncode == 0, done.stderr

    def apply(self, *options, patch=None, **settings):
        return self.git("apply", "--whitespace=nowarn", *options, text=patch or self.patch, **settings)

    def merge(self, *direction):
        """apply, with what the checkout's history knows of the files."""
        self.git("add", "--all", "--force", ".")
        if direction:  # it starts from VERL's own files with the patch, which no repository has
            index = {"GIT_INDEX_FILE": str(self.before / "index")}
            lines = re.findall(r"^index (\w+)\.\.\w+ (\d+)\n--- a/(.*)$", self.patch, flags=re.MULTILINE)
            blobs = "".join(f"{mode} {blob}\t{name}\n" for blob, mode, name in lines)
            self.git("update-index", "--index-info", text=blobs, **index)
            self.apply("--cached", **index)
        return self.apply("--3way", *direction)

    def apply_generated(self, *direction):
        """VERL's flattened configurations, where they are those of a release; the files that stay as they are."""
        left = {name for name, _ in self.generated}
        for name, section in self.generated:  # a release's, and each release has its own
            is_its_own = f"\nindex {git_hash(self.work / name)}.." in section
            if (direction or is_its_own) and self.apply(*direction, patch=section)[0]:
                left.discard(name)
        return sorted(left)

    def differing(self):
        return [name for name in self.files if content(self.work / name) != content(self.tree / name)]


def content(path):
    return path.read_bytes() if path.is_file() else None


def git_hash(path):
    data = content(path) or b""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def check_tree(shop, options):
    """What is refused before the patch is looked at."""
    # What follows a plus is the packager's: 0.9.1+local is 0.9.1.
    public = shop.version.split("+")[0]
    known = public in SUPPORTED_RELEASES or public.startswith(SUPPORTED_BRANCH)
    if not known and not options.any_version:
        raise Refused(f"""{shop.tree} has VERL {shop.version}; the patch is for {VERSIONS}.
Nothing was changed. --any-version tries it all the same.""")
    if present := [name for name in shop.new if os.path.lexists(shop.tree / name)]:
        raise Refused(f"""{len(present)} of the {len(shop.new)} new files are in {shop.tree} already:
this patch with changes made since, another version of it, or the rest of one after VERL was installed anew.
Nothing was changed. Take that one out first (--reverse, with the apply_patch.sh it came from), or use a fresh VERL.""")
    status = ["status", "--porcelain", "--untracked-files=no", "--", *shop.changed]
    if dirty := None if options.three_way else git_in_checkout(shop.tree, *status):
        raise Refused(f"""files that the patch changes have uncommitted changes:
{dirty}Nothing was changed. Commit or stash them, or merge with --3way.""")
    if not known:
        say(f"VERL {shop.version}: not a version that the patch was checked with")


def refuse_conflict(shop, options, said, *direction):
    in_the_way = r"^(?:U |error: (?!patch failed: |repository lacks))(.*?)(?:: patch does not apply)?$"
    for file in re.findall(in_the_way, said, flags=re.MULTILINE):
        print(f"  {'conflict: ' if options.three_way else ''}{file}", file=sys.stderr)
    if options.three_way:
        by_hand = ["git", "-C", str(shop.tree), "apply", "--3way", *direction, str(PATCH)]
        raise Refused(f"""the patch and the changes in {shop.tree} do not merge by themselves; nothing was changed.
To have both written into the files and resolve the conflicts by hand, commit your changes and run:
  {shlex.join(by_hand)}
If blobs are missing, fetch VERL's tag v{SUPPORTED_RELEASES[-1]} into the checkout first.""")
    what = "cannot be taken out of" if direction else "does not apply to"
    why = "are not as the patch left them" if direction else "differ from VERL's"
    merge = ". Try --3way, which merges" if shop.objects else ""
    raise Refused(f"""the patch {what} {shop.tree} (VERL {shop.version}); nothing was changed.
The files above {why}{merge}.""")


def put(source, path):
    """A file of its own, as package managers link installed files into their caches; mode and owner as before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        shutil.copyfile(source, partial)
        shutil.copymode(path if path.exists() else source, partial)
        if path.exists() and os.geteuid() == 0:
            os.chown(partial, path.stat().st_uid, path.stat().st_gid)
        os.replace(partial, path)
    finally:
        if partial.is_file():
            partial.unlink()


def remove(path):
    """The file, what Python compiled from it, and the directories that only it needed."""
    for file in (path, *path.parent.glob(f"__pycache__/{path.stem}.*.pyc")):
        if file.exists():
            file.unlink()
    for folder in (path.parent / "__pycache__", path.parent):
        with contextlib.suppress(OSError):  # it is not empty, or there is none
            os.removedirs(folder)


def copy_back(shop, source):
    for name in shop.files:
        if not (source / name).is_file():
            remove(shop.tree / name)
        elif content(source / name) != content(shop.tree / name):
            put(source / name, shop.tree / name)


def put_back(shop):
    on_signals(signal.SIG_IGN)
    try:
        copy_back(shop, shop.before)
    except OSError as error:
        kept = shutil.copytree(shop.before, tempfile.mkdtemp(prefix="verl-"), dirs_exist_ok=True)
        say(f"NOT everything could be undone ({error}); the files as they were are in {kept}", file=sys.stderr)


def write(shop, then=lambda: None):
    """Bring the tree to what the workshop has and do what comes `then`, or leave everything as it was."""
    try:
        copy_back(shop, shop.work)
        then()
        on_signals(signal.SIG_IGN)
    except BaseException as error:
        put_back(shop)
        if isinstance(error, OSError):
            raise Refused(f"writing failed; what was written has been undone: {error}") from None
        raise


def verify(tree):
    own = tree.parents[2] / "bin" / "python" if tree.name == "site-packages" else Path()
    python = str(own) if own.is_file() and not os.environ.get("PYTHON") else PYTHON
    if not shutil.which(python):
        say(f"not verified: there is no {python}")
        return
    doctor = ["-B", str(tree / "verl" / "on_policy_distillation" / "doctor.py"), "--tree", str(tree)]
    status = subprocess.run([python, *doctor]).returncode
    if status == 3:
        say(f"""not verified in full, as {python} lacks what is named above. With the Python that trains:
  {shlex.join(["PYTHON", *doctor])}""")
    elif status:
        raise Refused("the patched VERL does not work, so the patch was taken out again. --no-verify leaves it in.")


def transform(shop, options, *direction):
    """Apply the patch in the workshop, or refuse; VERL's flattened configurations that stay as they are."""
    fits, said = shop.merge(*direction) if options.three_way else shop.apply(*direction)
    if not fits:
        refuse_conflict(shop, options, said, *direction)
    left = shop.apply_generated(*direction)
    for path in (shop.tree / name for name in shop.differing()):
        folder = next(parent for parent in path.parents if parent.is_dir())
        for place in (folder, path):
            if place.exists() and not os.access(place, os.W_OK) or place.is_symlink():
                raise Refused(f"{place} is not writable; nothing was changed")
    return left


def apply(shop, options):
    if shop.apply("--check", "--reverse")[0]:
        say(f"{shop.tree} has the patch already; nothing to do")
        return
    check_tree(shop, options)
    left = transform(shop, options)
    counts = f"{len(set(shop.differing()) - set(shop.new))} files changed, {len(shop.new)} added"
    if left:
        say(f"note: left as they are, for VERL's scripts/generate_trainer_config.sh: {', '.join(left)}")
    if options.check:
        say(f"the patch applies to VERL {shop.version} in {shop.tree} ({counts}); nothing was changed")
        return
    write(shop, lambda: None if options.no_verify else verify(shop.tree))
    say(f"patched VERL {shop.version} in {shop.tree} ({counts})")
    print(f"""Next: add these to a VERL command that runs PPO or GRPO
  actor_rollout_ref.actor.policy_loss.loss_mode=on_policy_distillation teacher.model.path=PATH_OF_THE_TEACHER
Remove it (before VERL is upgraded or uninstalled):
  {shlex.join([str(ROOT / "apply_patch.sh"), "--reverse", str(shop.tree)])}""")


def reverse(shop, options):
    if shop.apply("--check")[0]:
        say(f"{shop.tree} does not have the patch; nothing to do")
        return
    transform(shop, options, "--reverse")
    if options.check:
        say(f"the patch can be taken out of VERL {shop.version} in {shop.tree}; nothing was changed")
        return
    write(shop)
    say(f"took the patch out of VERL {shop.version} in {shop.tree}")


def parse_arguments():
    usage = "./apply_patch.sh [OPTIONS] [TARGET]"
    parser = argparse.ArgumentParser("apply_patch.sh", usage, __doc__, add_help=False, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    flag = functools.partial(parser.add_argument, action="store_true")
    flag("--check", help="say what would happen; change nothing")
    flag("--reverse", "-R", help="take the patch out again: every file is then as it was, byte for byte")
    flag("--3way", dest="three_way", help="in a git checkout, merge with changes of your own; also with --reverse")
    flag("--any-version", help="try it on a version that the patch was not checked with")
    flag("--no-verify", help="do not try the patched VERL afterwards")
    parser.add_argument("--help", "-h", action="help", help="this text")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=argparse.SUPPRESS)
    options, unknown = parser.parse_known_intermixed_args()
    if unknown:
        parser.error(f"unknown option {unknown[0]}; see --help")
    if len(options.targets) > 1:
        parser.error("more than one TARGET; see --help")
    return options


def run(options):
    for path in (PATCH, GENERATED):
        if not path.is_file():
            raise Refused(f"{path} is missing; nothing was changed")
    if not shutil.which("git"):
        raise Refused("git is not installed, and does the work; nothing was changed")
    tree = resolve(options.targets[0] if options.targets else imported_verl())
    # Who can read VERL's files must be able to read the new ones, whatever the umask of who applies the patch.
    os.umask(os.umask(0) & 0o022)
    with tempfile.TemporaryDirectory() as folder:
        shop = Workshop(tree, Path(folder))
        if options.three_way and shop.objects is None:
            raise Refused(f"--3way needs a git checkout of VERL, which {tree} is not; nothing was changed")
        if options.reverse:
            reverse(shop, options)
        else:
            apply(shop, options)


def stop(number, frame):
    raise Refused("stopped by a signal; nothing was changed, or it was undone")


def on_signals(handler):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, handler)


def main():
    options = parse_arguments()
    on_signals(stop)
    try:
        run(options)
    except (Refused, OSError) as error:
        say(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
