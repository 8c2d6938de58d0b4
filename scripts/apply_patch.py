"""Adds on-policy distillation to the VERL in TARGET, a directory with verl/ in it: a git checkout, an unpacked source
tree or a site-packages directory. Without TARGET: the VERL that Python imports. Needs git.

  --check        say what would happen; change nothing
  --reverse      take the patch out again: every file is then as it was, byte for byte
  --3way         in a git checkout, merge with changes of your own in the same files; also with --reverse
  --any-version  try it on a version that the patch was not checked with
  --no-verify    do not try the patched VERL afterwards
  -h, --help     this text

PYTHON=... names the Python that finds VERL and verifies the patch.

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

# Releases are checked whole; the branch moves: it was checked at a commit.
SUPPORTED_RELEASES = ["0.9.0", "0.9.1"]
SUPPORTED_BRANCH = "0.10.0.dev"
VERSIONS = f"{', '.join(SUPPORTED_RELEASES)} and {SUPPORTED_BRANCH}"

OF_A_REPOSITORY = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_OBJECT_DIRECTORY")
FIND_VERL = """
import importlib.util, os, sys
spec = importlib.util.find_spec("verl")
if spec is None or not spec.origin:
    sys.exit(1)
print(os.path.dirname(os.path.dirname(os.path.realpath(spec.origin))))
"""


class Refused(Exception):
    """What the user reads; the tree is as it was."""


def say(text, file=None):
    print(f"apply_patch.sh: {text}", file=file, flush=True)


def quote(*words):
    return " ".join(shlex.quote(str(word)) for word in words)


def pythons():
    return [os.environ["PYTHON"]] if os.environ.get("PYTHON") else ["python3", "python"]


def imported_verl():
    """A Python, and the directory of the VERL that it would import."""
    for python in filter(shutil.which, pythons()):
        done = subprocess.run([python, "-c", FIND_VERL], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        if done.returncode == 0:
            return python, done.stdout.rstrip("\n")
    advice = "name its directory (./apply_patch.sh TARGET) or another Python (PYTHON=...)"
    raise Refused(f"{pythons()[0]} has no VERL; {advice}")


def resolve(target):
    """The directory that has verl/ in it; the package itself, as in .../site-packages/verl, is taken for it."""
    if not os.path.isdir(target):
        raise Refused(f"'{target}' is not a directory")
    tree = Path(target).resolve()
    if tree.name == "verl" and not (tree / "verl" / "__init__.py").exists() and (tree / "version" / "version").exists():
        tree = tree.parent
    if not (tree / "verl" / "__init__.py").is_file():
        raise Refused(f"{target} has no verl/__init__.py in it: not a VERL tree")
    return tree


def find_version(tree):
    file = tree / "verl" / "version" / "version"
    texts = [f"Version: {file.read_text()}"] if file.is_file() else []
    for pattern in ("verl-[0-9]*.dist-info/METADATA", "verl.egg-info/PKG-INFO", "PKG-INFO"):
        texts += [path.read_text(errors="replace") for path in tree.glob(pattern)]
    found = (re.search(r"^Version: *(\S+)", text, flags=re.MULTILINE) for text in texts)
    return next((match[1] for match in found if match), "unknown")


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
        self.patch = PATCH.read_text(encoding="utf-8")
        self.changed = re.findall(r"^--- a/(.*)$", self.patch, flags=re.MULTILINE)
        self.new = re.findall(r"^diff --git a/(.*) b/.*\nnew file mode", self.patch, flags=re.MULTILINE)
        text = GENERATED.read_text(encoding="utf-8") if GENERATED.exists() else ""
        self.generated = re.split(r"^(?=diff --git )", text, flags=re.MULTILINE)[1:]
        generated = {re.search("^--- a/(.*)$", section, flags=re.MULTILINE)[1] for section in self.generated}
        self.files = [*self.changed, *self.new, *sorted(generated)]
        self.objects = git_in_checkout(tree, "rev-parse", "--git-path", "objects")
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
        if self.objects:  # what a merge starts from
            environment["GIT_ALTERNATE_OBJECT_DIRECTORIES"] = str(self.tree / self.objects.rstrip("\n"))
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
        left = {re.match(r"diff --git a/(.*) b/", section)[1]: None for section in self.generated}
        for section in self.generated:
            name, old = re.search(r" b/(.*)\nindex (\w+)", section).groups()
            if (direction or git_hash(self.work / name) == old) and self.apply(*direction, patch=section)[0]:
                left.pop(name)
        return list(left)

    def differing(self):
        return [name for name in self.files if content(self.work / name) != content(self.tree / name)]


def content(path):
    return path.read_bytes() if path.is_file() else None


def git_hash(path):
    data = content(path) or b""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def check_tree(shop, options, version):
    """What is refused before the patch is looked at."""
    # What follows a plus is the packager's: 0.9.1+local is 0.9.1.
    known = version.split("+")[0] in SUPPORTED_RELEASES or version.startswith(SUPPORTED_BRANCH)
    if not known and not options.any_version:
        raise Refused(f"""{shop.tree} has VERL {version}; the patch is for {VERSIONS}.
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
        say(f"VERL {version}: not a version that the patch was checked with")


def refuse_conflict(shop, options, version, said, *direction):
    for line in said.splitlines():  # the files that stand in the way
        if line.startswith("U "):
            print(f"  conflict: {line[2:]}", file=sys.stderr)
        elif match := re.match("error: (?!patch failed: |repository lacks)(.*?)(: patch does not apply)?$", line):
            print(f"  {match[1]}", file=sys.stderr)
    if options.three_way:
        raise Refused(f"""the patch and the changes in {shop.tree} do not merge by themselves; nothing was changed.
To have both written into the files and resolve the conflicts by hand, commit your changes and run:
  {quote("git", "-C", shop.tree, "apply", "--3way", *direction, PATCH)}
If blobs are missing, fetch VERL's tag v{SUPPORTED_RELEASES[-1]} into the checkout first.""")
    what, why = "does not apply to", "differ from VERL's"
    if direction:
        what, why = "cannot be taken out of", "were changed after it was applied, or have another version of it"
    merge = ". Try --3way, which merges" if shop.objects else ""
    raise Refused(f"""the patch {what} {shop.tree} (VERL {version}); nothing was changed.
The files above {why}{merge}.""")


def put(source, path, like):
    """A file of its own, as package managers link installed files into their caches; mode and owner as before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        shutil.copyfile(source, partial)
        if like.exists():
            shutil.copymode(like, partial)
            if os.geteuid() == 0:
                os.chown(partial, like.stat().st_uid, like.stat().st_gid)
        os.replace(partial, path)
    finally:
        if partial.is_file():
            partial.unlink()


def copy_back(shop, source, names):
    for name in names:
        if content(source / name) == content(shop.tree / name):
            continue
        if (source / name).is_file():
            put(source / name, shop.tree / name, shop.before / name)
        else:
            (shop.tree / name).unlink()
    remove_leftovers(shop)


def remove_leftovers(shop):
    """What Python compiled from new files that are gone, and the directories that only they needed."""
    for path in (shop.tree / name for name in shop.new if not (shop.tree / name).exists()):
        for leftover in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
            leftover.unlink()
        for folder in (path.parent / "__pycache__", *path.parents):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def put_back(shop, names):
    on_signals(signal.SIG_IGN)
    try:
        copy_back(shop, shop.before, names)
    except OSError as error:
        kept = shutil.copytree(shop.before, tempfile.mkdtemp(prefix="verl-"), dirs_exist_ok=True)
        say(f"NOT everything could be undone ({error}); the files as they were are in {kept}", file=sys.stderr)


def write(shop, then=lambda: None):
    """Bring the tree to what the workshop has and do what comes `then`, or leave everything as it was."""
    # Who can read VERL's files must be able to read the new ones, whatever the umask of who applies the patch.
    os.umask(os.umask(0) & 0o022)
    names = shop.differing()
    try:
        copy_back(shop, shop.work, names)
        then()
        on_signals(signal.SIG_IGN)
    except BaseException as error:
        put_back(shop, names)
        if isinstance(error, OSError):
            raise Refused(f"writing failed; what was written has been undone: {error}") from None
        raise


def verification(python, tree):
    """A command. Exit status 0: the patched VERL works, 1: it does not, 3: this Python lacks a package."""
    return [python, "-B", tree / "verl" / "on_policy_distillation" / "doctor.py", "--tree", tree]


def verify(tree, python):
    own = tree.parents[2] / "bin" / "python" if tree.name == "site-packages" else Path()
    candidates = [str(own)] if own.is_file() and not os.environ.get("PYTHON") else pythons()
    python = python or next(filter(shutil.which, candidates), None)
    if not python:
        say(f"not verified: there is no {candidates[0]}")
        return
    status = subprocess.run([str(word) for word in verification(python, tree)]).returncode
    if status == 3:
        say(f"""not verified in full, as {python} lacks what is named above. With the Python that trains:
  {quote(*verification("PYTHON", tree))}""")
    elif status:
        raise Refused("the patched VERL does not work, so the patch was taken out again. --no-verify leaves it in.")


def transform(shop, options, version, *direction):
    """Apply the patch in the workshop, or refuse; VERL's flattened configurations that stay as they are."""
    fits, said = shop.merge(*direction) if options.three_way else shop.apply(*direction)
    if not fits:
        refuse_conflict(shop, options, version, said, *direction)
    left = shop.apply_generated(*direction)
    for path in (shop.tree / name for name in shop.differing()):
        folder = next(parent for parent in path.parents if parent.is_dir())
        for place in (folder, path):
            if place.exists() and not os.access(place, os.W_OK) or place.is_symlink():
                raise Refused(f"{place} is not writable; nothing was changed")
    return left


def apply(shop, options, version, python):
    if shop.apply("--check", "--reverse")[0]:
        say(f"{shop.tree} has the patch already; nothing to do")
        return
    check_tree(shop, options, version)
    left = transform(shop, options, version)
    counts = f"{len(set(shop.differing()) - set(shop.new))} files changed, {len(shop.new)} added"
    if left:
        say(f"note: left as they are, for VERL's scripts/generate_trainer_config.sh: {', '.join(left)}")
    if options.check:
        say(f"the patch applies to VERL {version} in {shop.tree} ({counts}); nothing was changed")
        return
    write(shop, lambda: None if options.no_verify else verify(shop.tree, python))
    say(f"patched VERL {version} in {shop.tree} ({counts})")
    print(f"""Next: add these to a VERL command that runs PPO or GRPO
  actor_rollout_ref.actor.policy_loss.loss_mode=on_policy_distillation teacher.model.path=PATH_OF_THE_TEACHER
Remove it (before VERL is upgraded or uninstalled):
  {quote(ROOT / "apply_patch.sh", "--reverse", shop.tree)}""")


def reverse(shop, options, version):
    if shop.apply("--check")[0]:
        say(f"{shop.tree} does not have the patch; nothing to do")
        return
    transform(shop, options, version, "--reverse")
    if options.check:
        say(f"the patch can be taken out of VERL {version} in {shop.tree}; nothing was changed")
        return
    write(shop)
    say(f"took the patch out of VERL {version} in {shop.tree}")


def parse_arguments():
    parser = argparse.ArgumentParser("apply_patch.sh", "./apply_patch.sh [OPTIONS] [TARGET]", add_help=False)
    for names in (("--help", "-h"), ("--check",), ("--reverse", "-R"), ("--any-version",), ("--no-verify",)):
        parser.add_argument(*names, action="store_true")
    parser.add_argument("--3way", action="store_true", dest="three_way")
    parser.add_argument("targets", nargs="*")
    options, unknown = parser.parse_known_intermixed_args()
    if unknown:
        parser.error(f"unknown option {unknown[0]}; see --help")
    if len(options.targets) > 1:
        parser.error("more than one TARGET; see --help")
    return options


def run(options):
    if not PATCH.is_file() or not shutil.which("git"):
        missing = f"{PATCH} is missing" if not PATCH.is_file() else "git is not installed, and does the work"
        raise Refused(f"{missing}; nothing was changed")
    python, target = (None, options.targets[0]) if options.targets else imported_verl()
    tree = resolve(target)
    with tempfile.TemporaryDirectory() as folder:
        shop = Workshop(tree, Path(folder))
        if options.three_way and shop.objects is None:
            raise Refused(f"--3way needs a git checkout of VERL, which {tree} is not; nothing was changed")
        if options.reverse:
            reverse(shop, options, find_version(tree))
        else:
            apply(shop, options, find_version(tree), python)


def stop(number, frame):
    raise Refused("stopped by a signal; nothing was changed, or it was undone")


def on_signals(handler):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, handler)


def main():
    options = parse_arguments()
    if options.help:
        print(f"Usage: ./apply_patch.sh [OPTIONS] [TARGET]\n\n{__doc__}", end="")
        return 0
    on_signals(stop)
    try:
        run(options)
    except (Refused, OSError) as error:
        say(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
