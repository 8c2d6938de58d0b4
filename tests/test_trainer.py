# Copyright 2026 The on-policy-distillation authors
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
"""End to end: VERL's trainer, started by the recipes as a user starts it, on real Ray, TransferQueue, FSDP2, rollouts.

The recipes run at toy size, by the paths in their environment and overrides after their own. The pure runs are beside a
VERL, the hybrid one is in a patched VERL without the package. Two of the three VERLs are forks, with edits of their own
where training runs (fork.py).
"""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from arithmetic import (
    EOS,
    build_tokenizer,
    compute_score,
    make_split,
    one_thread,
    problems,
    save_checkpoint,
    tiny_model,
    untrained_model,
    verl_rows,
)
from conftest import ROOT, copy_unpatched_verl
from datasets import Dataset
from fork import make_fork
from metrics import accuracy, metric_files, next_metric_file, read_metrics, read_run
from peft import PeftModel
from progress import overrides_of
from recipe_scripts import arguments_of, environment_with, recipe
from teacher_prompt import COLUMN, teacher_prompt
from transformers import AutoModelForCausalLM

from verl.model_merger.__main__ import main as merge_checkpoint

EXAMPLE = ROOT / "examples" / "on_policy_distillation"
ACTOR = "actor_rollout_ref.actor"
TEACHER_HIDDEN = 64
PROMPTS, SAMPLES = 32, 2
METRICS = ("loss", "kl", "forward_kl", "student_entropy", "teacher_entropy", "top1_agreement", "teacher_payload_mb")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A student, a teacher whose distributions are far from uniform, and the data."""
    folder = tmp_path_factory.mktemp("files")
    tiny_model(folder / "student", hidden=32, seed=1)
    tiny_model(folder / "teacher", hidden=TEACHER_HIDDEN, seed=2)
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    with torch.no_grad():
        teacher.lm_head.weight.mul_(10.0)
    teacher.save_pretrained(folder / "teacher")
    train, test = problems()
    make_split(folder / "train.parquet", train[:512])
    rows = Dataset.from_parquet(str(folder / "train.parquet")).to_list()
    for index, ability in enumerate(("math", "code")):
        Dataset.from_list([row | {"ability": ability} for row in rows[index::2]]).to_parquet(
            folder / f"{ability}.parquet"
        )
    make_split(folder / "test.parquet", test[:16])
    return folder


FORKED = "this is a fork's trainer"  # printed by it


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """A folder for PYTHONPATH with a VERL that has 30 edits of its own."""
    folder = tmp_path_factory.mktemp("fork")
    copy_unpatched_verl(folder)
    make_fork(folder)
    with (folder / "verl" / "trainer" / "ppo" / "v1" / "trainer_base.py").open("a") as trainer:
        trainer.write(f"\n\nprint({FORKED!r})\n")
    return folder


@pytest.fixture(scope="module")
def patched_fork(fork, tmp_path_factory):
    folder = tmp_path_factory.mktemp("patched_fork")
    shutil.copytree(fork / "verl", folder / "verl", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [ROOT / "apply_patch.sh", "--no-verify", folder], check=True, env=os.environ | {"PYTHON": sys.executable}
    )
    return folder


def beside(verl):
    """How a run is started with the VERL in the folder `verl`, and this package beside it: as the recipe does."""
    return None, {"PYTHONPATH": str(verl)}


def inside(verl):
    """... with the patched VERL in the folder `verl`, as if this package were not installed: main_ppo takes it all."""
    environment = {"VERL_USE_EXTERNAL_PLUGINS": "none", "VERL_USE_EXTERNAL_MODULES": "verl.plugin.cpu"}
    return "verl.trainer.main_ppo", {"PYTHONPATH": str(verl)} | environment


INSTALLED = (None, {})


def paths_of(files):
    """The variables in which the recipes take their models and files."""
    return {
        "STUDENT_MODEL": f"{files}/student",
        "TEACHER_MODEL": f"{files}/teacher",
        "TRAIN_FILE": f"{files}/train.parquet",
        "VAL_FILE": f"{files}/test.parquet",
        "MATH_TRAIN_FILE": f"{files}/math.parquet",
        "CODE_TRAIN_FILE": f"{files}/code.parquet",
    }


def overrides_at_toy_size(folder, *overrides):
    return [
        *overrides_of("cpu"),
        "data.max_prompt_length=8",
        "data.max_response_length=4",
        f"data.train_batch_size={PROMPTS}",
        "data.seed=0",
        f"actor_rollout_ref.rollout.n={SAMPLES}",
        f"{ACTOR}.ppo_mini_batch_size={PROMPTS // 2}",
        f"{ACTOR}.ppo_max_token_len_per_gpu=200",  # several micro-batches per mini-batch
        f"{ACTOR}.optim.lr=1e-2",
        "trainer.total_training_steps=6",
        "trainer.test_freq=2",
        "trainer.save_freq=2",
        f"trainer.default_local_dir={folder}/checkpoints",
        "trainer.logger=[file]",
        *overrides,
    ]


def start(files, folder, name, *overrides, verl=INSTALLED, **paths):
    """The recipe `name` as a process group of its own, its metrics and its output in new files below `folder`."""
    metrics = next_metric_file(folder)
    module, settings = verl
    paths = paths_of(files) | paths
    overrides = overrides_at_toy_size(folder, *overrides)
    command = [recipe(name), *overrides]
    if module is not None:
        command = [sys.executable, "-m", module, *arguments_of(name, *overrides, **paths)]
    environment = environment_with(
        **paths,
        **settings,
        VERL_PLATFORM="cpu",
        VERL_FILE_LOGGER_PATH=str(metrics),
        VERL_LOGGING_LEVEL="ERROR",
    )
    with open(folder / f"{metrics.stem}.log", "wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def end_of(process, timeout):
    """Its exit code. When it does not end in time, nothing of it is left."""
    try:
        return process.wait(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def run(files, folder, name, *overrides, verl=INSTALLED, **paths):
    process = start(files, folder, name, *overrides, verl=verl, **paths)
    end_of(process, timeout=400)
    log = sorted(folder.glob("*.log"))[-1].read_text(errors="replace")
    assert process.returncode == 0, log[-6000:]
    assert (FORKED in log) == (verl is not INSTALLED)
    return read_metrics(metric_files(folder)[-1])


@pytest.fixture(scope="module")
def pure_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pure")


@pytest.fixture(scope="module")
def pure(files, pure_folder, fork):
    """Six steps of the pure loss: no reward function, and VERL's default advantage estimator, which wants a critic."""
    dump = ("teacher.dump_freq=3", f"teacher.dump_size={PROMPTS * SAMPLES}")
    return run(files, pure_folder, "qwen3_32b_to_4b", *dump, verl=beside(fork))


def test_pure_distillation_lowers_the_divergence(pure):
    assert pure[6]["distillation/kl"] < 0.8 * pure[1]["distillation/kl"]
    assert pure[1]["distillation/loss"] == pytest.approx(pure[1]["distillation/kl"], rel=1e-5)  # reverse KL


def test_pure_distillation_logs_its_metrics_each_step(pure):
    for step in range(1, 7):
        assert {f"distillation/{name}" for name in METRICS} | {"timing_s/teacher"} <= pure[step].keys()


def test_the_payload_is_the_teacher_s_hidden_states_at_response_positions_in_bf16(pure):
    tokens = pure[1]["response_length/mean"] * PROMPTS * SAMPLES
    assert pure[1]["distillation/teacher_payload_mb"] == pytest.approx(tokens * TEACHER_HIDDEN * 2 / 1024**2, rel=1e-6)


def test_pure_distillation_computes_no_rl_quantity(pure):
    skipped = {"timing_s/old_log_prob", "timing_s/ref", "timing_s/values", "timing_s/adv", "timing_s/update_critic"}
    assert not skipped & pure[1].keys()
    assert not {"actor/pg_loss", "actor/entropy", "critic/vf_loss"} & pure[1].keys()


def test_pure_distillation_validates_without_a_reward_function(pure):
    assert [step for step, metrics in pure.items() if accuracy(metrics) is not None] == [0, 2, 4, 6]


def test_the_trained_student_is_a_hugging_face_checkpoint(pure, pure_folder, files):
    student = AutoModelForCausalLM.from_pretrained(pure_folder / "checkpoints/global_step_6/actor/huggingface")
    before = AutoModelForCausalLM.from_pretrained(files / "student").state_dict()
    moved = {name for name, weight in student.state_dict().items() if not torch.equal(weight.float(), before[name])}
    assert moved >= {name for name in before if name.endswith("proj.weight")} | {"lm_head.weight"}


def dumped(folder, step=3):
    files = folder.glob(f"step_{step}.rank*.jsonl")
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def assert_dump_is_the_step(lines, metrics):
    """Every sequence of the step: the mean of the tokens' KLs is what the step logged.

    But for a little: the step logs the mean of two mini-batches, which need not have the same number of tokens.
    """
    assert len(lines) == PROMPTS * SAMPLES
    kl = [value for line in lines for value in line["kl"]]
    assert sum(kl) / len(kl) == pytest.approx(metrics["distillation/kl"], rel=5e-3)
    agreed = [
        student[0][0] == teacher[0][0]
        for line in lines
        for student, teacher in zip(line["student_top"], line["teacher_top"], strict=True)
    ]
    # Different bytes that are no text by themselves read alike, so more look agreed than are.
    assert sum(agreed) / len(agreed) >= metrics["distillation/top1_agreement"] - 1e-6
    for line in lines:
        assert len(line["kl"]) == len(line["tokens"]) == len(line["student_top"])
        assert all(len(top) == 5 and top[0][1] >= top[4][1] > 0.0 for top in line["student_top"])


def test_the_dump_holds_the_kl_of_every_token_of_its_step(pure, pure_folder):
    folder = pure_folder / "checkpoints" / "token_kl"
    assert sorted(file.name for file in folder.iterdir()) == ["step_3.rank0.jsonl", "step_6.rank0.jsonl"]
    assert_dump_is_the_step(dumped(folder), pure[3])


def storage_unit_of(metrics):
    """The process of the run's TransferQueue storage; Ray hands the run's environment on to it."""
    for process in psutil.process_iter():
        try:
            is_unit = "SimpleStorageUnit" in " ".join(process.cmdline())
            if is_unit and process.environ().get("VERL_FILE_LOGGER_PATH") == str(metrics):
                return process
        except psutil.Error:
            continue
    raise AssertionError("the run has no storage unit")


def test_a_run_whose_storage_dies_ends_with_the_cause_and_continues_where_it_was(pure, files, tmp_path):
    """Killed after step 5, one step after the last checkpoint: the second start repeats step 5 and goes on.

    TransferQueue's own clients would wait for ten minutes.

    One update a step: with more, the KL of the later mini-batches depends on what the first held, and VERL orders them
    by random ids.
    """
    top_k = ("teacher.payload=topk", "teacher.topk=64")  # kept and found again as any other payload
    overrides = ("qwen3_8b_to_1.7b", f"{ACTOR}.ppo_mini_batch_size={PROMPTS}", *top_k)
    process = start(files, tmp_path, *overrides)
    deadline = time.monotonic() + 300
    while 5 not in read_run(tmp_path):
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "0000.log").read_text()[-4000:]
        time.sleep(0.1)
    storage_unit_of(metric_files(tmp_path)[-1]).kill()
    began = time.monotonic()
    assert end_of(process, timeout=60) != 0
    assert time.monotonic() - began < 60
    log = (tmp_path / "0000.log").read_text(errors="replace")
    assert "storage unit" in log and "has died" in log
    assert f"the run resumes from {tmp_path}/checkpoints/global_step_4" in log
    first = read_run(tmp_path)
    resumed = run(files, tmp_path, *overrides)
    assert [step for step, metrics in resumed.items() if "distillation/kl" in metrics] == [5, 6]
    # The same weights on the same prompts, with the same random numbers.
    assert resumed[5]["distillation/kl"] == pytest.approx(first[5]["distillation/kl"], rel=2e-3)
    # Starting over from the base instead would be as far from the teacher as step 1 was.
    assert resumed[5]["distillation/kl"] < 0.9 * pure[1]["distillation/kl"]


def test_a_teacher_with_a_prompt_of_its_own(files, tmp_path):
    """Student and teacher are one model that stands still. The teacher has the student's prompt in the first step, so
    they agree, and another prompt in the second."""
    rows = verl_rows(problems()[0][: 2 * PROMPTS], "train")
    for index, row in enumerate(rows):
        other = [{"role": "system", "content": "Add. "}] if index >= PROMPTS else []
        row[COLUMN] = [*other, *row["prompt"]]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "train.parquet"))
    steps = run(
        files,
        tmp_path,
        "prompt_distillation",
        "teacher.max_prompt_length=11",
        "teacher.payload_dtype=float32",
        "teacher.fsdp_config.model_dtype=fp32",
        "data.shuffle=False",
        "actor_rollout_ref.rollout.calculate_log_probs=True",
        f"{ACTOR}.optim.lr=0",
        "trainer.total_training_steps=2",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        MODEL=f"{files}/teacher",
        TRAIN_FILE=f"{tmp_path}/train.parquet",
    )
    assert abs(steps[1]["distillation/kl"]) < 1e-5
    assert steps[2]["distillation/kl"] > 1e-2
    for metrics in steps.values():
        # By Jensen the mean probability of a sample is no less than exp(-entropy); 256 tokens are a few percent off.
        bound = math.exp(-metrics["distillation/student_entropy"])
        assert 0.9 * bound < metrics["distillation/sampled_token_probability"] < 0.9


@pytest.fixture(scope="module")
def hybrid_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hybrid")


@pytest.fixture(scope="module")
def hybrid(files, hybrid_folder, patched_fork):
    return run(
        files,
        hybrid_folder,
        "hybrid",
        "teacher.dump_freq=3",
        f"teacher.dump_dir={hybrid_folder}/dump",
        f"teacher.dump_size={PROMPTS * SAMPLES}",
        f"{ACTOR}.policy_loss.hybrid_lambda_rl=0.5",
        f"{ACTOR}.policy_loss.hybrid_lambda_distill=0.5",
        f"{ACTOR}.policy_loss.hybrid_lambda_distill_steps=20",
        f"{ACTOR}.policy_loss.distillation_type=gkd",
        f"{ACTOR}.policy_loss.distillation_beta=0.5",
        f"{ACTOR}.use_kl_loss=True",
        f"reward.custom_reward_function.path={EXAMPLE / 'arithmetic.py'}",
        f"reward.custom_reward_function.name={compute_score.__name__}",
        "actor_rollout_ref.rollout.temperature=0.8",
        "teacher.payload=logits",
        "trainer.n_gpus_per_node=2",
        "trainer.save_freq=-1",
        verl=inside(patched_fork),
    )


def test_hybrid_lowers_the_divergence_on_two_ranks(hybrid):
    assert hybrid[6]["distillation/kl"] < 0.85 * hybrid[1]["distillation/kl"]
    assert hybrid[1]["distillation/loss"] < hybrid[1]["distillation/kl"]  # the JSD is bounded by log 2


def test_hybrid_s_weight_of_the_divergence_falls_from_step_to_step(hybrid):
    weights = [hybrid[step]["distillation/lambda_distill"] for step in range(1, 7)]
    assert weights == pytest.approx([0.5, 0.475, 0.45, 0.425, 0.4, 0.375])


def test_hybrid_keeps_all_of_rl(hybrid):
    kept = {"timing_s/old_log_prob", "timing_s/ref", "timing_s/adv", "timing_s/teacher"}
    assert kept <= hybrid[1].keys()
    assert {"actor/pg_loss", "actor/kl_loss", "actor/pg_clipfrac", "actor/ppo_kl", "actor/entropy"} <= hybrid[1].keys()
    assert {f"distillation/{name}" for name in METRICS} <= hybrid[1].keys()


def test_each_rank_of_a_hybrid_run_dumps_its_sequences(hybrid, hybrid_folder):
    folder = hybrid_folder / "dump"
    assert {"step_3.rank0.jsonl", "step_3.rank1.jsonl"} <= {file.name for file in folder.iterdir()}
    assert_dump_is_the_step(dumped(folder), hybrid[3])


# ----------------------------------------------------------------------------------------------------------------------
# several teachers: one of its own for a topic, the moving student for the other


SEVERAL = (
    "two_teachers",
    "teacher.ema=0.9",
    f"{ACTOR}.policy_loss.distillation_token_selection=top_entropy",
    f"{ACTOR}.policy_loss.distillation_keep_fraction=0.5",
    f"{ACTOR}.policy_loss.distillation_loss_max_clamp=20",
    f"{ACTOR}.ppo_mini_batch_size={PROMPTS}",  # one update a step, after whose scoring nothing has moved
    "trainer.total_training_steps=3",
    "trainer.save_freq=3",
    "trainer.test_freq=-1",
)


@pytest.fixture(scope="module")
def several_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("several")


@pytest.fixture(scope="module")
def several(files, several_folder):
    return run(files, several_folder, *SEVERAL, **teachers(files))


def teachers(files):
    return {"MATH_TEACHER": "self", "CODE_TEACHER": f"{files}/teacher"}


def test_each_topic_is_learnt_from_its_teacher(several):
    assert several[1]["distillation/math/kl"] == pytest.approx(0.0, abs=2e-3)  # the student, but for 16 bits
    assert several[1]["distillation/code/kl"] > 0.05
    assert several[3]["distillation/code/kl"] < several[1]["distillation/code/kl"]
    for step in (1, 2, 3):
        assert 0.5 <= several[step]["distillation/kept_tokens"] < 0.8  # half of each sequence, rounded up
        assert several[step]["distillation/clamped_tokens"] == 0.0
        shares = {name: several[step][f"distillation/{name}/share"] for name in ("math", "code")}
        assert sum(shares.values()) == pytest.approx(1.0) and 0.2 < shares["math"] < 0.8
        weighted = sum(shares[name] * several[step][f"distillation/{name}/kl"] for name in shares)
        assert several[step]["distillation/kl"] == pytest.approx(weighted, rel=2e-2, abs=1e-3)


def test_the_moving_teacher_is_in_the_checkpoint(several, several_folder):
    [file] = several_folder.glob("checkpoints/global_step_3/actor/teacher_world_size_1_rank_0.pt")
    state = torch.load(file, weights_only=True)
    assert state["math"]["updates"] == 3


def test_a_row_without_a_teacher_ends_the_run_before_any_model_is_loaded(files, tmp_path):
    process = start(files, tmp_path, *SEVERAL, "teacher.routing_key=data_source", **teachers(files))
    assert end_of(process, timeout=300) != 0
    log = (tmp_path / "0000.log").read_text(errors="replace")
    assert "row 0 has data_source=" in log and "teacher.models has the routes ['code', 'math']" in log
    assert "model engine initialized" not in log


# ----------------------------------------------------------------------------------------------------------------------
# a LoRA and its base


def test_a_lora_learns_from_its_base_which_sees_more(files, tmp_path, monkeypatch):
    """VERL's merger makes the base and an adapter of its checkpoint, by the command of the recipes' README."""
    rows = verl_rows(problems()[0][:PROMPTS], "train")
    for row in rows:
        row[COLUMN] = teacher_prompt(row, system="Add. ", after="{reward_model[ground_truth]}=")
    Dataset.from_list(rows).to_parquet(str(tmp_path / "train.parquet"))
    steps = run(
        files,
        tmp_path,
        "lora_self_distillation",
        "teacher.max_prompt_length=16",
        f"{ACTOR}.ppo_mini_batch_size={PROMPTS}",
        f"{ACTOR}.optim.lr=1e-3",
        "trainer.total_training_steps=2",
        "trainer.total_epochs=2",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        MODEL=f"{files}/teacher",
        TRAIN_FILE=f"{tmp_path}/train.parquet",
    )
    assert steps[1]["distillation/kl"] > 1e-2
    assert steps[2]["distillation/kl"] < 0.8 * steps[1]["distillation/kl"]  # of the same prompts
    checkpoint, merged = tmp_path / "checkpoints" / "global_step_2" / "actor", tmp_path / "merged"
    command = ["merge", "--backend", "fsdp", "--local_dir", str(checkpoint), "--target_dir", str(merged)]
    monkeypatch.setattr(sys, "argv", ["verl.model_merger", *command])
    merge_checkpoint()
    base = AutoModelForCausalLM.from_pretrained(merged)
    for name, weight in AutoModelForCausalLM.from_pretrained(files / "teacher").state_dict().items():
        assert torch.equal(base.state_dict()[name], weight.bfloat16()), name  # in which VERL writes it
    adapter = PeftModel.from_pretrained(base, merged / "lora_adapter").state_dict()
    moved = [weight for name, weight in adapter.items() if "lora_B" in name]
    assert len(moved) == 7 and all(weight.abs().max() > 0 for weight in moved)  # of each linear layer


# ----------------------------------------------------------------------------------------------------------------------
# several turns, with a teacher that has a token of its own

CALL = '<tool_call>{"name": "calculate", "arguments": {"expression": "111111 * 1000001"}}</tool_call>'
SAID = "111111111111"


@one_thread()
def calling_student(path):
    """Writes a model to `path` that answers each question by the call of a tool, which is one token; its tokenizer."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([CALL])
    model = untrained_model(32, 1, len(tokenizer), tied=False, seed=1, tokenizer=tokenizer)
    prompts = tokenizer([question for question, _ in problems()[0][:128]], return_tensors="pt")["input_ids"]
    turn = torch.tensor(tokenizer(CALL + EOS)["input_ids"]).expand(len(prompts), -1)
    ids, labels = torch.cat([prompts, turn], 1), torch.cat([torch.full_like(prompts, -100), turn], 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    save_checkpoint(model, path, tokenizer)
    return tokenizer


@pytest.fixture(scope="module")
def several_turns_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("several_turns")


@pytest.fixture(scope="module")
def several_turns(files, several_turns_folder):
    """The teacher's tokenizer has a token of its own, on which it puts mass, and padding."""
    folder = several_turns_folder
    tokenizer = calling_student(folder / "student")
    tiny_model(folder / "teacher", hidden=TEACHER_HIDDEN, seed=2, vocab_size=len(tokenizer) + 6)
    tokenizer.add_tokens(["<added>"])
    tokenizer.save_pretrained(folder / "teacher")
    return run(
        files,
        folder,
        "multi_turn",
        "data.max_response_length=24",
        "teacher.vocab=shared",
        "teacher.dump_freq=1",
        f"teacher.dump_size={PROMPTS * SAMPLES}",
        f"{ACTOR}.policy_loss.distillation_entropy_threshold=1.0",
        f"{ACTOR}.ppo_mini_batch_size={PROMPTS}",
        "trainer.total_training_steps=3",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        STUDENT_MODEL=f"{folder}/student",
        TEACHER_MODEL=f"{folder}/teacher",
    )


def test_what_a_tool_says_is_no_part_of_the_loss(several_turns, several_turns_folder):
    lines = dumped(several_turns_folder / "checkpoints" / "token_kl", step=1)
    assert len(lines) == PROMPTS * SAMPLES
    begins, ends = 2, 2 + len(SAID)
    called = [line for line in lines if line["tokens"][:begins] == [CALL, EOS]]
    assert len(called) > 0.8 * len(lines)
    for line in called:
        assert "".join(line["tokens"][begins:ends]) == SAID
        assert line["kl"][begins:ends] == [None] * len(SAID)
        assert None not in line["kl"][:begins] + line["kl"][ends:]
        assert len(line["kl"]) > ends  # the student goes on
    kl, first = [value for line in lines for value in line["kl"] if value is not None], several_turns[1]
    assert first["distillation/teacher_payload_mb"] == pytest.approx(len(kl) * TEACHER_HIDDEN * 2 / 1024**2)
    assert first["distillation/kl"] == pytest.approx(sum(kl) / len(kl), rel=1e-3)
    assert first["training/num_turns/max"] == 4  # question, call, result, answer


def test_a_teacher_with_added_tokens_and_a_switch_between_the_kls(several_turns):
    steps = several_turns
    for metrics in steps.values():
        assert 0.005 < metrics["distillation/teacher_rest_mass"] < 0.1  # 6 entries of 265, untrained
        assert metrics["distillation/student_rest_mass"] == 0.0  # its embedding has no others
    # An untrained teacher is nearly uniform: above the threshold everywhere, where forward KL is the loss.
    assert steps[1]["distillation/teacher_entropy"] > 4.0
    assert steps[1]["distillation/loss"] == pytest.approx(steps[1]["distillation/forward_kl"], rel=1e-4)
    assert steps[1]["distillation/loss"] != pytest.approx(steps[1]["distillation/kl"], rel=1e-2)


# ----------------------------------------------------------------------------------------------------------------------
# what a run says of itself


def said(folder):
    """What the trainer said of its steps, in the output of its first start below `folder`."""
    return re.findall(r"step +\d+/\d+   .*", (folder / "0000.log").read_text(errors="replace"))


def assert_says_each_step(lines, steps, has_reward):
    for (step, metrics), line in zip(steps.items(), lines, strict=True):
        numbers = [f"step {step}/6"]
        if step > 0:
            numbers.append(f"KL {metrics['distillation/kl']:.4f}")
            numbers += [f"reward {metrics['critic/score/mean']:.3f}"] * has_reward
            numbers.append(f"{metrics['timing_s/step']:.1f} s")
        assert line.startswith("   ".join(numbers))
        assert (re.search(r"   \d+:\d\d:\d\d left", line) is not None) == (0 < step < 6)
        assert ("   held-out " in line) == (accuracy(metrics) is not None)


def test_a_run_says_how_it_goes_and_where_its_model_is(pure, pure_folder):
    *lines, last = said(pure_folder)
    assert_says_each_step(lines, pure, has_reward=False)
    assert last.startswith("step 6/6   done; ") and f"{pure_folder}/checkpoints/global_step_6/actor" in last


def test_a_hybrid_run_in_a_patched_verl_says_its_reward_too(hybrid, hybrid_folder):
    *lines, last = said(hybrid_folder)
    assert_says_each_step(lines, hybrid, has_reward=True)
    missing = f"step 6/6   done; no checkpoint of it in {hybrid_folder}/checkpoints: trainer.save_freq=N writes"
    assert last.startswith(missing)
