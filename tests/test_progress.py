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
"""The trainer's line for each step and its last one. The lines of real runs are in test_trainer.py and test_heal.py."""

import metrics
import pytest
from omegaconf import OmegaConf

from verl.on_policy_distillation import progress
from verl.on_policy_distillation.progress import Pace, Progress, clock, last_line, step_line

STEP = {
    "distillation/kl": 0.25,
    "critic/score/mean": 0.5,
    "timing_s/step": 5.0,
    "timing_s/testing": 1.0,
    "val-core/task/acc/mean@1": 0.6,
}


def test_the_line_has_step_kl_seconds_time_left_and_accuracy():
    line = step_line(2, 12, STEP, 45.0)
    assert line == "step  2/12   KL 0.2500   5.0 s   0:00:45 left   held-out accuracy 60.0%"
    assert step_line(12, 12, STEP | {"distillation/kl": float("nan")}).startswith("step 12/12   KL nan   5.0 s   held")


def test_where_the_loss_has_a_reward_the_line_has_it():
    """Without a teacher, as in GRPO, it is all there is of the loss."""
    assert step_line(1, 2, STEP, 3.0, has_reward=True).startswith("step 1/2   KL 0.2500   reward 0.500   5.0 s")
    without_teacher = {"critic/score/mean": 0.5, "timing_s/step": 5.0}
    assert step_line(1, 2, without_teacher, 3.0, has_reward=True) == "step 1/2   reward 0.500   5.0 s   0:00:03 left"


def test_the_score_of_each_data_source_is_named_as_what_it_is():
    validated = {
        "val-core/openai/gsm8k/acc/best@4/mean": 0.9,
        "val-core/openai/gsm8k/acc/mean@4": 0.5,
        "val-core/math/reward/mean@1": -0.5,
        "val-aux/math/length/mean@1": 3.0,
    }
    expected = "step 0/9   held-out accuracy 50.0% (openai/gsm8k)   held-out reward -0.500 (math)"
    assert step_line(0, 9, validated) == expected
    assert metrics.MEAN_SCORE.pattern == progress._MEAN_SCORE.pattern  # the report reads the same


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00:00"), (59.7, "0:01:00"), (3661, "1:01:01"), (100 * 3600, "100:00:00")]
)
def test_time_is_hours_minutes_and_seconds(seconds, text):
    assert clock(seconds) == text


def test_time_left_counts_each_step_checkpoint_and_validation_that_is_still_to_come():
    """A run is replayed: what is left after a step is what the later ones then take."""
    steps, test_freq, save_freq = 11, 3, 4
    took = []
    for step in range(1, steps + 1):
        is_last = step == steps
        seconds = {"timing_s/step": 2.0}
        if step % save_freq == 0 or is_last:
            seconds = {"timing_s/step": 2.0 + 10.0, "timing_s/save_checkpoint": 10.0}
        if step % test_freq == 0 or is_last:
            seconds["timing_s/testing"] = 5.0
        took.append(seconds)
    pace = Pace(steps, test_freq, save_freq)
    assert pace.left(0) is None
    for step, seconds in enumerate(took, 1):
        pace.add(seconds)
        if 4 <= step < steps:  # from then on it has seen a checkpoint and a validation
            later = took[step:]
            assert pace.left(step) == sum(m["timing_s/step"] + m.get("timing_s/testing", 0.0) for m in later)
    assert pace.left(steps) is None


def test_the_first_validation_counts_until_there_is_another_and_a_slow_step_hardly():
    pace = Pace(5, 2, -1)
    pace.add_first_validation(100.0)
    pace.add({"timing_s/step": 30.0})
    assert pace.left(1) == 4 * 30.0 + 3 * 100.0  # after 2, 4 and 5
    pace.add({"timing_s/step": 3.0, "timing_s/testing": 7.0})
    assert pace.left(2) == 3 * 3.0 + 2 * 7.0


def test_where_the_epochs_end_first_nothing_is_saved_or_validated_at_the_end():
    pace = Pace(5, 2, 4, has_end=False)
    pace.add({"timing_s/step": 13.0, "timing_s/testing": 7.0, "timing_s/save_checkpoint": 10.0})
    assert pace.left(1) == 4 * 3.0 + 2 * 7.0 + 10.0  # validations after 2 and 4, a checkpoint after 4


def test_a_metric_that_is_no_number_ends_no_run(caplog, capsys):
    shown = Progress(5, Pace(5, -1, -1), has_reward=False)
    shown.log({"distillation/kl": None, "timing_s/step": 1.0}, 1)
    assert "step 1 has metrics that its line cannot show" in caplog.text
    shown.log({"distillation/kl": 0.5, "timing_s/step": 1.0}, 2)
    assert capsys.readouterr().out.startswith("step 2/5   KL 0.5000")


def run_in(folder, save_contents=("model", "optimizer", "extra"), strategy="fsdp2", lora_rank=0):
    actor = {"checkpoint": {"save_contents": list(save_contents)}, "strategy": strategy}
    return OmegaConf.create(
        {
            "trainer": {"default_local_dir": str(folder)},
            "actor_rollout_ref": {"actor": actor, "model": {"lora_rank": lora_rank}},
        }
    )


@pytest.fixture
def checkpoint(tmp_path):
    """As VERL leaves it."""
    (tmp_path / "global_step_5").mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    return tmp_path / "global_step_5"


def test_the_last_line_names_the_hugging_face_model(checkpoint):
    line = last_line(run_in(checkpoint.parent, ["hf_model"]), 5, 5, 5)
    assert line == f"step 5/5   done; the trained model: {checkpoint}/actor/huggingface"


@pytest.mark.parametrize(
    ("changes", "backend"),
    [
        ({}, "fsdp"),
        ({"strategy": "megatron"}, "megatron"),
        ({"save_contents": ["model", "hf_model"], "lora_rank": 8}, "fsdp"),
    ],
)
def test_the_last_line_has_the_command_that_makes_one(checkpoint, changes, backend):
    line = last_line(run_in(checkpoint.parent, **changes), 5, 5, 5)
    assert f"the last checkpoint: {checkpoint};" in line
    command = f"--backend {backend} --local_dir {checkpoint}/actor --target_dir {checkpoint}/merged"
    assert line.endswith(f"python -m verl.model_merger merge {command}")


@pytest.mark.parametrize("changes", [{"save_contents": ["optimizer"]}, {"strategy": "veomni"}])
def test_where_no_model_can_be_made_the_last_line_names_the_checkpoint(checkpoint, changes):
    assert last_line(run_in(checkpoint.parent, **changes), 5, 5, 5).endswith(f"the last checkpoint: {checkpoint}")


def test_without_a_checkpoint_the_last_line_says_how_to_have_one(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        line = last_line(run_in(folder), 5, 5, None)
        assert f"no checkpoint of it in {folder}: trainer.save_freq=N writes one" in line


def test_a_checkpoint_of_another_run_is_not_named(checkpoint):
    assert "no checkpoint of it" in last_line(run_in(checkpoint.parent, ["hf_model"]), 7, 7, None)


def test_a_checkpoint_before_the_last_step_is_named_with_its_step(checkpoint):
    line = last_line(run_in(checkpoint.parent, ["hf_model"]), 7, 9, 5)
    assert line.startswith("step 7/9   done; step 5 is the last that was saved; the trained model: ")
