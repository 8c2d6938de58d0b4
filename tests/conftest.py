import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "on_policy_distillation"))

# VERL chooses its platform when it is first imported; the tests run where there may be no accelerator.
os.environ.setdefault("VERL_PLATFORM", "cpu")
os.environ.setdefault("VERL_USE_EXTERNAL_MODULES", "verl.plugin.cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def copy_unpatched_verl(folder):
    """Put VERL's own verl/ into `folder`: a copy of the installed one, with the patch taken back out."""
    installed = Path(importlib.util.find_spec("verl").origin).parent
    shutil.copytree(installed, folder / "verl", ignore=shutil.ignore_patterns("__pycache__"))
    # Without the ceiling git would take a repository above the copy for its root, and skip every file.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.resolve().parent)}
    patch = ROOT / "0001-on-policy-distillation.patch"
    subprocess.run(["git", "apply", "--reverse", str(patch)], cwd=folder, env=environment, check=True)
