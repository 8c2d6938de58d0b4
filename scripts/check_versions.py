#!/usr/bin/env python3
"""Check the patch against every VERL that it supports, from the packages that VERL published. Prints a table.

    .venv/bin/python scripts/check_versions.py              the releases that apply_patch.sh supports, and the losses
                                                            alone in older ones
    .venv/bin/python scripts/check_versions.py --quick      nothing but: the patch goes on and comes off byte for byte
    .venv/bin/python scripts/check_versions.py --trainer    also six steps of VERL's trainer in each (minutes)
    .venv/bin/python scripts/check_versions.py --tree DIR   another tree too: a checkout of the development branch

Run it with a Python that can import VERL's dependencies, such as .venv's; all versions are checked with the packages
of that one. VERL is never installed, only unpacked into a temporary directory. Exit status 1 when a check failed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from make_patch import ROOT, PatchError, new_files, unpack_verl
from patch_summary import supported

APPLY = ROOT / "apply_patch.sh"
DOCTOR = ROOT / "verl" / "on_policy_distillation" / "doctor.py"
TRAINER_TESTS = [sys.executable, "-m", "pytest", "-q", "tests/test_trainer.py", "-k", "pure_distillation or hybrid"]
# Without the trainer that the patch is for. Our files can be copied into them, for trainers of one's own that call the
# two losses. 0.7.0 is not here as it does not import with the pinned transformers.
LOSSES_ONLY = ["0.7.1", "0.8.0"]
COLUMNS = ["applies", "comes off", "works", "trainer", "losses alone"]


def run(*command, **environment):
    """(outcome, what it printed)."""
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONDONTWRITEBYTECODE": "1", **environment}
    words = [str(word) for word in command]
    done = subprocess.run(words, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return "FAILED" if done.returncode else "ok", done.stdout


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_patch(tree, arguments):
    before = content(tree)
    results = {}
    if arguments.trainer:  # six steps beside a fork of it, and six in the patched fork
        results["trainer"] = run(*TRAINER_TESTS, VERL_TREE=str(tree))
    results["applies"] = run(APPLY, "--no-verify", tree)
    if results["applies"][0] == "FAILED":
        return results
    results["comes off"] = run(APPLY, "--reverse", tree)
    if results["comes off"][0] == "ok" and content(tree) != before:
        results["comes off"] = ("FAILED", "files differ afterwards")
    if not arguments.quick:
        results["works"] = run(APPLY, tree)
        if "not checked" in results["works"][1]:
            results["works"] = ("not checked", results["works"][1])
    return results


def check_losses(tree):
    for name in new_files():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    return {"losses alone": run(sys.executable, DOCTOR, "--losses", "--tree", tree)}


def check_all(arguments, folder):
    """Version to results, each a column to (outcome, text)."""
    results = {}
    for version in supported("RELEASES").split():
        results[version] = check_patch(unpack_verl(version, folder / version), arguments)
    for number, tree in enumerate(arguments.tree):
        copy = folder / f"tree {number}"
        shutil.copytree(tree / "verl", copy / "verl", ignore=shutil.ignore_patterns("__pycache__"))
        version = (copy / "verl" / "version" / "version").read_text().strip()
        results[f"{version} ({tree})"] = check_patch(copy, arguments)
    for version in [] if arguments.quick else LOSSES_ONLY:
        results[version] = check_losses(unpack_verl(version, folder / version))
    return results


def report(results):
    print(f"| VERL | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    for version, result in results.items():
        print(f"| {version} | {' | '.join(result.get(column, [''])[0] for column in COLUMNS)} |")
    for version, result in results.items():
        for column, (outcome, text) in result.items():
            if outcome != "ok":
                print(f"\n{version}, {column}: {outcome}\n{text.strip()}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    only_one = parser.add_mutually_exclusive_group()
    only_one.add_argument("--quick", action="store_true", help="only whether the patch goes on and comes off")
    only_one.add_argument("--trainer", action="store_true", help="also six steps of VERL's trainer")
    parser.add_argument("--tree", type=Path, action="append", default=[], metavar="DIR", help="check this tree too")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            results = check_all(arguments, Path(folder).resolve())
    except PatchError as error:
        print(f"check_versions.py: error: {error}", file=sys.stderr)
        return 1
    report(results)
    return any(outcome == "FAILED" for result in results.values() for outcome, _ in result.values())


if __name__ == "__main__":
    sys.exit(main())
