#!/usr/bin/env bash
# Drops a few layers of a small language model and heals it: it learns from the original on its own generations.
#
#   ./examples/on_policy_distillation/heal.sh MODEL [FOLDER] [--drop N] [--steps N] [--text FILE] [HYDRA_OVERRIDE ...]
#
# Sets up what it needs (.venv); the rest is heal.py, which says what the arguments are: heal.sh --help.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)

"$root/scripts/bootstrap.sh"
export TOKENIZERS_PARALLELISM=false
exec "$root/.venv/bin/python" "$here/heal.py" "$@"
