#!/usr/bin/env python3
"""Check the patch against every VERL that it supports, from the packages that VERL published. Prints a table.

    .venv/bin/python scripts/check_versions.py              the releases that apply_patch.sh supports, and the losses
                                                            alone in older ones
    .venv/bin/python scripts/check_versions.py --quick      nothing but: the patch goes on and comes off byte for byte
    .venv/bin/python scripts/check_versions.py --trainer    also six steps of VERL's trainer in each (minutes)
    .venv/bin/python scripts/check_versions.py --tree DIR   another tree too: a checkout of the development branch

Run it with a Python that can import VERL's dependencies, such as .venv's; all versions are checked with the packages
of that one. VERL's own package is never installed: it is unpacked into a temporary directory. Exit status 1 when a
check failed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from patch_summary import supported

ROOT = Path(__file__).resolve().parent.parent
APPLY = ROOT / "apply_patch.sh"
VERIFY = ROOT / "scripts" / "verify_patch.py"
CACHE = ROOT / ".venv" / ".versions"
# Without the trainer that the patch is for. The two losses can be copied into them, for trainers of one's own. 0.7.0 is
# not here as it does not import with the pinned transformers.
LOSSES_ONLY = ["0.7.1", "0.8.0"]
COLUMNS = ["applies", "comes off", "registry", "imports", "configuration", "losses", "trainer"]
TRAINER_TESTS = ["tests/test_trainer.py", "-k", "test_pure_distillation"]
NOT_RUN = ""


class CheckError(Exception):
    """Why there is nothing to check; for the user."""


def fetch(version, cache):
    """VERL's wheel of `version`, from the package index unless it is in `cache`."""
    pattern = f"verl-{version}-*.whl"
    if not list(cache.glob(pattern)):
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps"]
        command = [*pip, "--only-binary", ":all:", "-d", str(cache), f"verl=={version}"]
        if subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
            raise CheckError(f"could not fetch verl=={version}")
    return next(cache.glob(pattern))


def unpack(version, cache, folder):
    with zipfile.ZipFile(fetch(version, cache)) as wheel:
        wheel.extractall(folder, [name for name in wheel.namelist() if name.startswith(("verl/", "verl-"))])
    return folder


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(*command, **environment):
    return subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def outcome(done):
    return ("ok", "") if done.returncode == 0 else ("FAILED", done.stdout)


def verified(tree, *options):
    """Column to (outcome, what it printed), for each line of verify_patch.py."""
    done = run(sys.executable, VERIFY, *options, tree)
    lines = re.findall(r"^verify: (\w+) +(ok|FAILED|not checked): (.*)$", done.stdout, flags=re.MULTILINE)
    results = {name: (result, "" if result == "ok" else text) for name, result, text in lines}
    if done.returncode != 0 and all(result == "ok" for result, _ in results.values()):  # it came to an early end
        results["losses"] = ("FAILED", done.stdout)
    return results


def trainer_steps(tree):
    return outcome(run(sys.executable, "-m", "pytest", "-q", *TRAINER_TESTS, PYTHONPATH=str(tree)))


def check_patch(tree, quick, trainer):
    before = content(tree)
    results = {"applies": outcome(run(APPLY, "--no-verify", tree))}
    if results["applies"][0] == "ok":
        if not quick:
            results |= verified(tree)
        if trainer:
            results["trainer"] = trainer_steps(tree)
        results["comes off"] = outcome(run(APPLY, "--reverse", tree))
        if results["comes off"][0] == "ok" and content(tree) != before:
            results["comes off"] = ("FAILED", "files differ afterwards")
    return results


def check_losses(tree):
    """What `pip install .` brings, in a VERL that is not patched."""
    # Not with tomllib, which Python 3.10 does not have.
    modules = re.findall(r'^    "(verl\.[\w.]+)",$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    for name in (module.replace(".", "/") + ".py" for module in modules):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    return verified(tree, "--losses")


def report(results):
    print("| VERL | " + " | ".join(COLUMNS) + " |")
    print("|---|" + "---|" * len(COLUMNS))
    for version, result in results.items():
        print(f"| {version} | " + " | ".join(result.get(column, (NOT_RUN,))[0] for column in COLUMNS) + " |")
    for version, result in results.items():
        for column, (status, text) in result.items():
            if status != "ok":
                print(f"\n{version}, {column}: {status}\n{text.strip()}")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="only whether the patch goes on and comes off")
    parser.add_argument("--trainer", action="store_true", help="also six steps of VERL's trainer")
    parser.add_argument("--tree", type=Path, action="append", default=[], metavar="DIR", help="check this tree too")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="DIR", help="where VERL's wheels are kept")
    arguments = parser.parse_args()
    if arguments.quick and arguments.trainer:
        parser.error("--quick and --trainer exclude each other")
    return arguments


def check_all(arguments, folder):
    results = {}
    for version in supported("releases").split():
        tree = unpack(version, arguments.cache, folder / version)
        results[version] = check_patch(tree, arguments.quick, arguments.trainer)
    for tree in arguments.tree:
        copy = folder / f"tree {len(results)}"
        shutil.copytree(tree / "verl", copy / "verl", ignore=shutil.ignore_patterns("__pycache__"))
        version = (copy / "verl" / "version" / "version").read_text().strip()
        results[f"{version} ({tree})"] = check_patch(copy, arguments.quick, arguments.trainer)
    if not arguments.quick:
        for version in LOSSES_ONLY:
            results[f"{version} (losses alone)"] = check_losses(unpack(version, arguments.cache, folder / version))
    return results


def main():
    arguments = parse_arguments()
    try:
        with tempfile.TemporaryDirectory() as folder:
            results = check_all(arguments, Path(folder).resolve())
    except CheckError as error:
        print(f"check_versions.py: error: {error}", file=sys.stderr)
        return 1
    report(results)
    return any(status == "FAILED" for result in results.values() for status, _ in result.values())


if __name__ == "__main__":
    sys.exit(main())
