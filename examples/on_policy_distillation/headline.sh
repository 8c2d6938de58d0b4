#!/usr/bin/env bash
# The headline experiment: GRPO against on-policy distillation, steps to the same gain, with VERL's PPO trainer.
#
#   ./examples/on_policy_distillation/headline.sh [FOLDER] [--task NAME] [--seeds N] [--jobs N] [--results FILE] ...
#
# Sets up what it needs (.venv, reasoning-gym in it), makes the base model and the data in code, trains every run of
# headline.py, N jobs at a time (default: 2), and ends with a table. FOLDER (default: runs/headline) receives models, data
# and runs; FILE (default: FOLDER/TASK/results.json) what was measured. Run again, it does only what is not finished.
# --task: chain_sum_4 (default), chain_sum_8 or addition. --seeds 1 is the quickest. headline.py --help has the rest.
# To renew the committed results: --results examples/on_policy_distillation/results/headline_TASK.json, then
# .venv/bin/python examples/on_policy_distillation/headline_picture.py and scripts/make_patch.py
# It runs on the CPU, as the models are small.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
if [[ $# -gt 0 && $1 != -* ]]; then folder=$1; shift; else folder=$root/runs/headline; fi

"$root/scripts/bootstrap.sh"
"$root/.venv/bin/python" -m pip --disable-pip-version-check -q install -r "$here/headline_requirements.txt" ||
    echo "headline: reasoning-gym could not be installed (see above); without it there is --task addition"
export TOKENIZERS_PARALLELISM=false
exec "$root/.venv/bin/python" "$here/headline.py" --out "$folder" "$@"
