#!/usr/bin/env bash
# Measures on one GPU, step by step, and writes a JSON of each step. See benchmarks/README.md.
#
#   benchmarks/gpu/run.sh [--steps NAME ...] [--out FOLDER] [--dry-run]
#
# PYTHON=... names the Python; without it .venv's, or python3. Nothing is installed.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
python=${PYTHON:-$root/.venv/bin/python}
command -v "$python" >/dev/null || python=python3
exec "$python" "$root/benchmarks/gpu/steps.py" "$@"
