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
"""End to end: VERL's trainer, started as a user starts it, on real Ray, TransferQueue, FSDP2 and rollouts.

The pure runs are beside a VERL, the hybrid one is in a patched VERL without the package. Two of the three VERLs are
forks, with edits of their own where training runs (fork.py).
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time

import psutil
import pytest
import torch
from arithmetic import compute_score, make_split, problems, tiny_model, verl_rows
from conftest import ROOT, copy_unpatched_verl
from datasets import Dataset
from fork import make_fork
from metrics import accuracy, metric_files, next_metric_file, read_metrics, read_run
from progress import overrides_of
from transformers import AutoModelForCausalLM, AutoTokenizer

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
    topics = [row | {"ability": ("sums", "carries")[index % 2]} for index, row in enumerate(rows)]
    Dataset.from_list(topics).to_parquet(folder / "topics.parquet")
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
    """How a run is started with the VERL in the folder `verl`, and this package beside it."""
    return "verl.trainer.main_on_policy_distillation", {"PYTHONPATH": str(verl)}


def inside(verl):
    """... with the patched VERL in the folder `verl`, as if this package were not installed."""
    environment = {"VERL_USE_EXTERNAL_PLUGINS": "none", "VERL_USE_EXTERNAL_MODULES": "verl.plugin.cpu"}
    return "verl.trainer.main_ppo", {"PYTHONPATH": str(verl)} | environment


INSTALLED = ("verl.trainer.main_on_policy_distillation", {})


def trainer_command(files, folder, module, *overrides):
    return [
        *(sys.executable, "-m", module),
        *overrides_of("cpu"),
        f"actor_rollout_ref.model.path={files}/student",
        f"teacher.model.path={files}/teacher",
        f"data.train_files={files}/train.parquet",
        f"data.val_files={files}/test.parquet",
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


def start(files, folder, *overrides, verl=INSTALLED):
    """The trainer as a process group of its own, its metrics and its output in new files below `folder`."""
    metrics = next_metric_file(folder)
    module, settings = verl
    environment = os.environ | {
        "VERL_PLATFORM": "cpu",
        "VERL_FILE_LOGGER_PATH": str(metrics),
        "VERL_LOGGING_LEVEL": "ERROR",
    }
    environment |= settings
    with open(folder / f"{metrics.stem}.log", "wb") as log:
        return subprocess.Popen(
            trainer_command(files, folder, module, *overrides),
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def run(files, folder, *overrides, verl=INSTALLED):
    process = start(files, folder, *overrides, verl=verl)
    process.wait(timeout=400)
    log = sorted(folder.glob("*.log"))[-1].read_text(errors="replace")
    assert process.returncode == 0, log[-6000:]
    assert (FORKED in log) == (verl is not INSTALLED)
    return read_metrics(metric_files(folder)[-1])


PURE = (f"{ACTOR}.policy_loss.loss_mode=on_policy_distillation",)


@pytest.fixture(scope="module")
def pure_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pure")


@pytest.fixture(scope="module")
def pure(files, pure_folder, fork):
    """Six steps of the pure loss: no reward function, and VERL's default advantage estimator, which wants a critic."""
    dump = ("teacher.dump_freq=3", f"teacher.dump_size={PROMPTS * SAMPLES}")
    return run(files, pure_folder, *PURE, *dump, verl=beside(fork))


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


def dumped(folder):
    return [json.loads(line) for file in folder.glob("step_3.rank*.jsonl") for line in file.read_text().splitlines()]


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
    overrides = (*PURE, f"{ACTOR}.ppo_mini_batch_size={PROMPTS}", *top_k)
    process = start(files, tmp_path, *overrides)
    deadline = time.monotonic() + 300
    while 5 not in read_run(tmp_path):
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "0000.log").read_text()[-4000:]
        time.sleep(0.1)
    storage_unit_of(metric_files(tmp_path)[-1]).kill()
    began = time.monotonic()
    assert process.wait(timeout=60) != 0
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
        row["seen_by_the_teacher"] = [*other, *row["prompt"]]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "train.parquet"))
    steps = run(
        files,
        tmp_path,
        *PURE,
        f"actor_rollout_ref.model.path={files}/teacher",
        "teacher.prompt_key=seen_by_the_teacher",
        "teacher.max_prompt_length=11",
        "teacher.payload_dtype=float32",
        "teacher.fsdp_config.model_dtype=fp32",
        f"data.train_files={tmp_path}/train.parquet",
        "data.shuffle=False",
        "actor_rollout_ref.rollout.calculate_log_probs=True",
        f"{ACTOR}.optim.lr=0",
        "trainer.total_training_steps=2",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
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
        "teacher.dump_freq=3",
        f"teacher.dump_dir={hybrid_folder}/dump",
        f"teacher.dump_size={PROMPTS * SAMPLES}",
        f"{ACTOR}.policy_loss.loss_mode=hybrid_rl_distillation",
        f"{ACTOR}.policy_loss.hybrid_lambda_rl=0.5",
        f"{ACTOR}.policy_loss.hybrid_lambda_distill=0.5",
        f"{ACTOR}.policy_loss.hybrid_lambda_distill_schedule=linear",
        f"{ACTOR}.policy_loss.hybrid_lambda_distill_steps=20",
        f"{ACTOR}.policy_loss.distillation_type=gkd",
        f"{ACTOR}.policy_loss.distillation_beta=0.5",
        f"{ACTOR}.use_kl_loss=True",
        "algorithm.adv_estimator=grpo",
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
    *PURE,
    "+teacher.models.other.route=sums",
    "+teacher.models.own.path=self",
    "+teacher.models.own.route=carries",
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
    topics = (f"data.train_files={files}/topics.parquet", "teacher.routing_key=ability")
    return run(files, several_folder, *SEVERAL, *topics)


def test_each_topic_is_learnt_from_its_teacher(several):
    assert several[1]["distillation/own/kl"] == pytest.approx(0.0, abs=2e-3)  # the student, but for 16 bits
    assert several[1]["distillation/other/kl"] > 0.05
    assert several[3]["distillation/other/kl"] < several[1]["distillation/other/kl"]
    for step in (1, 2, 3):
        assert 0.5 <= several[step]["distillation/kept_tokens"] < 0.8  # half of each sequence, rounded up
        assert several[step]["distillation/clamped_tokens"] == 0.0
        shares = {name: several[step][f"distillation/{name}/share"] for name in ("own", "other")}
        assert sum(shares.values()) == pytest.approx(1.0) and 0.2 < shares["own"] < 0.8
        weighted = sum(shares[name] * several[step][f"distillation/{name}/kl"] for name in shares)
        assert several[step]["distillation/kl"] == pytest.approx(weighted, rel=2e-2, abs=1e-3)


def test_the_moving_teacher_is_in_the_checkpoint(several, several_folder):
    [file] = several_folder.glob("checkpoints/global_step_3/actor/teacher_world_size_1_rank_0.pt")
    state = torch.load(file, weights_only=True)
    assert state["own"]["updates"] == 3


def test_a_row_without_a_teacher_ends_the_run_before_any_model_is_loaded(files, tmp_path):
    process = start(files, tmp_path, *SEVERAL, "teacher.routing_key=data_source")
    assert process.wait(timeout=120) != 0
    log = (tmp_path / "0000.log").read_text(errors="replace")
    assert "row 0 has data_source=" in log and "teacher.models has the routes ['carries', 'sums']" in log
    assert "model engine initialized" not in log


def test_a_teacher_with_added_tokens_and_a_switch_between_the_kls(files, tmp_path):
    """The teacher's tokenizer has a token of its own, on which it puts mass, and padding."""
    teacher = tmp_path / "teacher"
    tiny_model(teacher, hidden=TEACHER_HIDDEN, seed=2, vocab_size=264)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.add_tokens(["<added>"])
    tokenizer.save_pretrained(teacher)
    steps = run(
        files,
        tmp_path,
        *PURE,
        f"teacher.model.path={teacher}",
        "teacher.vocab=shared",
        f"{ACTOR}.policy_loss.distillation_entropy_threshold=1.0",
        "trainer.total_training_steps=3",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
    )
    for metrics in steps.values():
        assert 0.005 < metrics["distillation/teacher_rest_mass"] < 0.1  # 6 entries of 264, untrained
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
    assert last.startswith(f"step 6/6   done; no checkpoint in {hybrid_folder}/checkpoints: trainer.save_freq=N writes")
