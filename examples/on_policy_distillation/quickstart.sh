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

# What depends on the machine, and only that: one Hydra override a line.
machine=cpu
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    machine=gpu
    if ! python -c 'import vllm' 2> /dev/null; then machine=gpu_without_vllm; fi
fi
case $machine in
    cpu) export VERL_PLATFORM=cpu ;;
    gpu_without_vllm) export VERL_USE_EXTERNAL_MODULES=verl_on_policy_distillation,verl.plugin.cpu ;; # its rollout
esac
mapfile -t machine_overrides < <(grep -vE '^\s*(#|$)' "$here/${machine}_overrides.txt")

steps=15
python "$here/progress.py" "$folder" "$steps" -- python -m verl.trainer.main_on_policy_distillation \
    "${machine_overrides[@]}" \
    actor_rollout_ref.actor.policy_loss.loss_mode=on_policy_distillation \
    actor_rollout_ref.actor.policy_loss.distillation_type=reverse_kl \
    teacher.model.path="$folder/teacher" \
    actor_rollout_ref.model.path="$folder/base" \
    data.train_files="$folder/train.parquet" \
    data.val_files="$folder/test.parquet" \
    data.max_prompt_length=8 \
    data.max_response_length=4 \
    data.train_batch_size=256 \
    data.seed=0 \
    actor_rollout_ref.rollout.n=1 \
    actor_rollout_ref.actor.ppo_mini_batch_size=64 \
    actor_rollout_ref.actor.optim.lr=2e-4 \
    reward.custom_reward_function.path="$here/arithmetic.py" \
    trainer.total_training_steps="$steps" \
    trainer.test_freq=3 \
    trainer.save_freq=5 \
    trainer.max_actor_ckpt_to_keep=1 \
    'actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]' \
    trainer.default_local_dir="$folder/checkpoints" \
    'trainer.logger=[file]' \
    trainer.project_name=on_policy_distillation \
    trainer.experiment_name=quickstart \
    "$@"

finish
