#!/usr/bin/env bash
# The ablation: exact, truncated, sampled and scheduled losses on text, with VERL's PPO trainer.
#
#   ./examples/on_policy_distillation/ablation.sh [FOLDER] [--methods NAME ...] [--seeds N] [--jobs N] [--results FILE]
#
# Sets up what it needs (.venv), makes text, teacher and student in code, trains every run of ablation.py, N jobs at a
# time (default: 2), and ends with the tables. FOLDER (default: runs/ablation) receives models, text and runs; FILE
# (default: FOLDER/results.json) what was measured. Run again, it does only what is not finished.
# To renew the committed results: --results examples/on_policy_distillation/results/ablation.json, then
# .venv/bin/python examples/on_policy_distillation/ablation_results.py and scripts/make_patch.py
# It runs on the CPU, as the models are small.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
if [[ $# -gt 0 && $1 != --* ]]; then folder=$1; shift; else folder=$root/runs/ablation; fi

"$root/scripts/bootstrap.sh"
export TOKENIZERS_PARALLELISM=false
exec "$root/.venv/bin/python" "$here/ablation.py" --out "$folder" "$@"
