#!/usr/bin/env bash
# Distils a teacher into a student that makes mistakes, on the student's own generations, with VERL's PPO trainer.
#
#   ./examples/on_policy_distillation/quickstart.sh [FOLDER] [HYDRA_OVERRIDE ...]
#
# Sets up what it needs (.venv), makes a base model, a teacher and the data in code, trains, and ends with a table and a
# report with pictures. FOLDER (default: runs/quickstart) receives models, data, metrics, results.json, report.html and
# the trained checkpoint. Run again, it continues an interrupted run, and shows the table of a finished one; another
# FOLDER starts afresh.
# With a GPU the same script uses it, and vLLM when it is installed.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
if [[ $# -gt 0 && $1 != *=* ]]; then folder=$1; shift; else folder=$root/runs/quickstart; fi
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)

if [[ $# -gt 0 && -e $folder/results.json ]]; then
    echo "quickstart: $folder is finished, and $* would have no effect: name another folder" >&2
    exit 1
fi
"$root/scripts/bootstrap.sh"
export PATH="$root/.venv/bin:$PATH" TOKENIZERS_PARALLELISM=false

finish() {
    python "$here/summary.py" "$folder"
    if [[ -e $folder/report.html ]]; then echo "report:  $folder/report.html"; return; fi
    python "$here/generations.py" "$folder"
    python "$here/report.py" --out "$folder/report.html" "$folder" --generations \
        "before=$folder/generations/before.jsonl" "after=$folder/generations/after.jsonl"
}

if [[ -e $folder/results.json ]]; then
    finish
    exit
fi
python "$here/arithmetic.py" make --out "$folder"
python "$here/quickstart.py" "$folder" "$@"

finish
