#!/usr/bin/env python3
"""Run VERL's own checks on a checkout with and without the patch, and compare.

    .venv/bin/python scripts/verl_checks.py CHECKOUT

CHECKOUT is a git checkout or an unpacked source tree of VERL; it is copied, not changed. The checks are the local
hooks of its .pre-commit-config.yaml (licence headers, device API usage, docstrings, flattened configurations up to
date, ...), its tests/special_sanity that pytest runs, ruff and mypy. Exit status 1 when one says more with the patch.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = {
    "ruff": "python3 -m ruff check --output-format concise",
    "ruff-format": "python3 -m ruff format --check . | grep -v formatted$",
    "mypy": "python3 -m mypy --no-pretty --no-error-summary verl",
    "config-docs": "python3 -m pytest -q tests/special_sanity/test_config_docs.py tests/special_sanity/test_import.py",
}
COMMIT = "git add --all --force && git -c user.name=verl -c user.email=verl@example.com commit --quiet --message VERL"


def shell(command, folder):
    """Exit status, and what it printed, without what differs from run to run."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "GIT_CONFIG_GLOBAL": os.devnull}
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
    text = re.sub(r"\d+\.\d+ ?s\b|:\d+(?=:)", "", (done.stdout + done.stderr).replace(str(folder), ""))
    return done.returncode, text.splitlines()


def hooks(folder):
    """Name to command of the checks that VERL's commits go through."""
    import yaml

    config = yaml.safe_load((folder / ".pre-commit-config.yaml").read_text())
    local = [hook for repository in config["repos"] if repository["repo"] == "local" for hook in repository["hooks"]]
    return {hook["id"]: hook["entry"] for hook in local} | TOOLS


def copies(checkout, folder):
    """VERL, and VERL with the patch; each in a repository with all of it committed, as the checks ask git for files."""
    plain, patched = folder / "plain", folder / "patched"
    for tree in (plain, patched):
        shutil.copytree(checkout, tree, symlinks=True, ignore=shutil.ignore_patterns(".git", "__pycache__", ".venv"))
    said = subprocess.run([ROOT / "apply_patch.sh", "--no-verify", patched], check=True, capture_output=True, text=True)
    if "left as they are" in said.stdout:  # as on the development branch: they are the user's to write anew
        shell("scripts/generate_trainer_config.sh", patched)
    for tree in (plain, patched):
        subprocess.run(f"git init --quiet && {COMMIT}", shell=True, cwd=tree, check=True)
    return plain, patched


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkout", type=Path, metavar="CHECKOUT")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        plain, patched = copies(parser.parse_args().checkout.resolve(), Path(folder).resolve())
        for name, command in hooks(plain).items():
            (without, before), (status, after) = shell(command, plain), shell(command, patched)
            more = [line for line in after if line not in before and "result: success" not in line]
            worse = bool(status) and (status != without or bool(more))
            failed |= worse
            print(f"{name:<26} {'FAILED' if worse else 'ok':<7} exit {without} without the patch, {status} with it")
            print(*(f"    {line}" for line in more[:20] if worse), sep="\n", end="\n" if worse else "")
    return failed


if __name__ == "__main__":
    sys.exit(main())
