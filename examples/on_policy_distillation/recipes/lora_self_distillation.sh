#!/usr/bin/env bash
# A LoRA learns from its own base, which is shown the solution | GSM8K | vLLM rollout | FSDP2 | 1 GPU of 80 GB

set -xeuo pipefail

# ---- user-adjustable ----
MODEL=${MODEL:-Qwen/Qwen3-4B}
TRAIN_FILE=${TRAIN_FILE:-$HOME/data/gsm8k/with_solution.parquet}
VAL_FILE=${VAL_FILE:-$HOME/data/gsm8k/test.parquet}

NNODES=${NNODES:-1}
NGPUS_PER_NODE=${NGPUS_PER_NODE:-1}

train_batch_size=${TRAIN_BATCH_SIZE:-64}
ppo_mini_batch_size=${PPO_MINI_BATCH_SIZE:-32}
max_prompt_length=${MAX_PROMPT_LENGTH:-512}
teacher_max_prompt_length=${TEACHER_MAX_PROMPT_LENGTH:-1024}
max_response_length=${MAX_RESPONSE_LENGTH:-1024}
ppo_max_token_len_per_gpu=${PPO_MAX_TOKEN_LEN_PER_GPU:-8192}
actor_lr=${ACTOR_LR:-1e-5}

lora_rank=${LORA_RANK:-32}
lora_alpha=${LORA_ALPHA:-64}

rollout_tp=${ROLLOUT_TP:-1}
rollout_gpu_mem_util=${ROLLOUT_GPU_MEM_UTIL:-0.4}

total_epochs=${TOTAL_EPOCHS:-1}
save_freq=${SAVE_FREQ:-50}
test_freq=${TEST_FREQ:-50}

project_name=${PROJECT_NAME:-on_policy_distillation}
experiment_name=${EXPERIMENT_NAME:-lora_self_distillation}
# ---- end user-adjustable ----

python3 -m verl.trainer.main_on_policy_distillation \
    actor_rollout_ref.actor.policy_loss.loss_mode=on_policy_distillation \
    actor_rollout_ref.actor.policy_loss.distillation_type=reverse_kl \
    teacher.model.path=self \
    teacher.prompt_key=teacher_prompt \
    teacher.max_prompt_length=${teacher_max_prompt_length} \
    actor_rollout_ref.model.path="$MODEL" \
    actor_rollout_ref.model.lora_rank=${lora_rank} \
    actor_rollout_ref.model.lora_alpha=${lora_alpha} \
    actor_rollout_ref.model.lora.merge=True \
    data.train_files="$TRAIN_FILE" \
    data.val_files="$VAL_FILE" \
    data.train_batch_size=${train_batch_size} \
    data.max_prompt_length=${max_prompt_length} \
    data.max_response_length=${max_response_length} \
    data.filter_overlong_prompts=True \
    +data.apply_chat_template_kwargs.enable_thinking=False \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.tensor_model_parallel_size=${rollout_tp} \
    actor_rollout_ref.rollout.gpu_memory_utilization=${rollout_gpu_mem_util} \
    actor_rollout_ref.actor.strategy=fsdp2 \
    actor_rollout_ref.actor.optim.lr=${actor_lr} \
    actor_rollout_ref.actor.ppo_mini_batch_size=${ppo_mini_batch_size} \
    actor_rollout_ref.actor.use_dynamic_bsz=True \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=${ppo_max_token_len_per_gpu} \
    actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra] \
    trainer.nnodes=${NNODES} \
    trainer.n_gpus_per_node=${NGPUS_PER_NODE} \
    trainer.total_epochs=${total_epochs} \
    trainer.test_freq=${test_freq} \
    trainer.save_freq=${save_freq} \
    trainer.max_actor_ckpt_to_keep=2 \
    trainer.resume_mode=auto \
    trainer.logger='["console","wandb"]' \
    trainer.project_name=${project_name} \
    trainer.experiment_name=${experiment_name} \
    "$@"
