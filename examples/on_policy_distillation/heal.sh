#!/usr/bin/env bash
# Drops a few layers of a small language model and heals it: it learns from the original on its own generations.
#
#   ./examples/on_policy_distillation/heal.sh MODEL [FOLDER] [--drop N] [--steps N] [--text FILE] [HYDRA_OVERRIDE ...]
#
# MODEL is a causal language model in Hugging Face format: a folder, or a name on the Hub. FOLDER (default: runs/heal)
# receives what is made of it, with results.json, report.html and the healed model. --drop says how many layers go
# (default: 3), --steps how long it learns (default: 8), --text which file prompts and held-out passages are from
# (default: the texts of Python's help()). What has a = goes to VERL's trainer.
# Sets up what it needs (.venv); the rest is heal.py.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)

usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$here/heal.sh"; }
for argument in "$@"; do
    case $argument in -h | --help) usage; exit ;; esac
done
case ${1:--} in -*) { echo "heal.sh: MODEL comes first"; usage; } >&2; exit 2 ;; esac

"$root/scripts/bootstrap.sh"
export TOKENIZERS_PARALLELISM=false
exec "$root/.venv/bin/python" "$here/heal.py" "$@"
