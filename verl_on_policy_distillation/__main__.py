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
"""What is installed, and does it work together? ``python -m verl_on_policy_distillation``

Prints a line for each thing it finds: Python, torch, VERL, how VERL gets our modules, then the checks of
``verl.on_policy_distillation.doctor``. Exit status: 0 all is well, 1 something is missing, with the reason beside it.
"""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from .attach import DISTRIBUTION, FILES, is_patched

ENTRY_POINT = "on_policy_distillation"

# In a process of its own, which imports VERL and nothing of ours before it: as any training does.
CHECK = "import sys, verl; from verl.on_policy_distillation import doctor; sys.exit(doctor.main([]))"


def line(name: str, outcome: str) -> None:
    print(f"verify: {name:<13} {outcome}", flush=True)


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def find_verl() -> Path | None:
    """VERL's folder, without importing it. A folder verl/ without an __init__.py is none."""
    spec = importlib.util.find_spec("verl")
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def version_of_verl(folder: Path) -> str:
    file = folder / "version" / "version"
    return file.read_text().strip() if file.is_file() else "of unknown version"


def why_not_served(verl: Path, log: str) -> str:
    """Why `import verl`, which wrote `log`, does not make our modules importable."""
    if is_patched([str(verl)]):
        return f"this VERL has another version of the patch: ./apply_patch.sh --reverse {verl.parent} with that version"
    warnings = [part.split(f"{DISTRIBUTION}: ")[1] for part in log.splitlines() if f"{DISTRIBUTION}: " in part]
    if warnings:
        return warnings[0]
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto").strip().lower()
    if policy != "auto" and ENTRY_POINT not in [name.strip() for name in policy.split(",")]:
        return (
            f"VERL_USE_EXTERNAL_PLUGINS={policy} switches this plugin off: unset it, add {ENTRY_POINT} to it, or set "
            "VERL_USE_EXTERNAL_MODULES=verl_on_policy_distillation"
        )
    if not any(entry.name == ENTRY_POINT for entry in importlib.metadata.entry_points(group="verl.plugins")):
        return f"{DISTRIBUTION} is not installed in this Python: run pip install on its repository"
    return "VERL did not load its plugin"


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1]


def check(verl: Path) -> bool:
    """Run the checks as training would; say why when they cannot start."""
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True)
    if done.stdout.startswith("verify: ") or "\nverify: " in done.stdout:
        print("\n".join(part for part in done.stdout.splitlines() if part.startswith("verify: ")))
        return done.returncode == 0
    error = last_line(done.stderr)
    if "No module named 'verl.on_policy_distillation'" in error:
        line("modules", f"FAILED: {why_not_served(verl, done.stderr)}")
    else:
        line("import verl", f"FAILED: {error}")
    return False


def main() -> int:
    line("python", f"ok: {sys.version.split()[0]}, {sys.executable}")
    torch = importlib.util.find_spec("torch") is not None
    line("torch", f"ok: {version_of('torch')}" if torch else "FAILED: not installed: pip install torch")
    verl = find_verl()
    if verl is None:
        line("verl", "FAILED: this Python finds no VERL: pip install verl, or put its repository on PYTHONPATH")
        return 1
    line("verl", f"ok: {version_of_verl(verl)}, {verl}")
    if is_patched([str(verl)]):
        line("package", "ok: not used, as this VERL has the patch")
    else:
        line("package", f"ok: {DISTRIBUTION} {version_of(DISTRIBUTION) or '(not installed)'}, {FILES}")
    return 0 if check(verl) and torch else 1


if __name__ == "__main__":
    sys.exit(main())
