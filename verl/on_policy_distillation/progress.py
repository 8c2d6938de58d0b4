# Copyright 2026 Bytedance Ltd. and/or its affiliates
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
"""How a run goes: one line a step, and a last line that says where the model is.

    step  3/15   KL 0.2854   3.5 s   0:00:59 left   held-out accuracy 97.2%

VERL's `Tracking` hands the metrics of every step to the loggers that ``trainer.logger`` names. `Progress` joins them,
whichever those are. The trainer is a Ray actor, so Ray puts the actor's name and process id before each line.
"""

import logging
import os
import re
import time
from collections import deque
from collections.abc import Mapping
from statistics import median_low
from typing import Any, Optional

from omegaconf import DictConfig, OmegaConf

__all__ = ["Pace", "Progress", "ShowsProgress", "last_line", "step_line", "with_progress"]

logger = logging.getLogger(__name__)

# VERL's main number for each data source that it validates on; a data source may have slashes of its own.
_MEAN_SCORE = re.compile(r"val-core/(?P<data_source>.*)/(?P<metric>acc|reward)/(?P<mean>mean@\d+)")
_STEPS_REMEMBERED = 20
_ACTOR = "actor_rollout_ref.actor"


class Pace:
    """What the rest of a run will take, by the medians of its last steps.

    A step's own seconds, those of a checkpoint and those of a validation are apart, as not every step has all three:
    each counts as often as it is still to come.

    Args:
        steps: the last step's number.
        test_freq: ``trainer.test_freq``.
        save_freq: ``trainer.save_freq``.
        has_end: whether VERL saves and validates after the last step whatever its number. Not where the epochs end
            before ``trainer.total_training_steps``.
    """

    def __init__(self, steps: int, test_freq: int, save_freq: int, has_end: bool = True):
        self._steps = steps
        self._has_end = has_end
        self._frequencies = {"step": 1, "save_checkpoint": save_freq, "testing": test_freq}
        self._seconds: dict[str, deque[float]] = {part: deque(maxlen=_STEPS_REMEMBERED) for part in self._frequencies}
        self._first_validation = 0.0

    def add(self, metrics: Mapping[str, Any]) -> None:
        took = {part: metrics[f"timing_s/{part}"] for part in self._seconds if f"timing_s/{part}" in metrics}
        if "step" in took:
            took["step"] -= took.get("save_checkpoint", 0.0)
        for part, seconds in took.items():
            self._seconds[part].append(seconds)

    def add_first_validation(self, seconds: float) -> None:
        """Of the one before training. It also warms up, so it counts only until there is another."""
        self._first_validation = seconds

    def left(self, step: int) -> Optional[float]:
        """Seconds after `step`; None after the last step, and before the first."""
        if step >= self._steps or not self._seconds["step"]:
            return None
        # The lower one: of two steps the first also warmed up.
        typical = {part: median_low(seconds) for part, seconds in self._seconds.items() if seconds}
        typical.setdefault("testing", self._first_validation)
        return sum(self._still_to_come(part, step) * seconds for part, seconds in typical.items())

    def _still_to_come(self, part: str, step: int) -> int:
        """VERL validates and saves at the multiples of a frequency, and at the end."""
        frequency = self._frequencies[part]
        if frequency <= 0:
            return 0
        at_the_end = self._has_end and self._steps % frequency != 0
        return self._steps // frequency - step // frequency + at_the_end


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def counted(step: int, steps: int) -> str:
    return f"step {step:{len(str(steps))}d}/{steps}"


def step_line(
    step: int, steps: int, metrics: Mapping[str, Any], seconds_left: Optional[float] = None, has_reward: bool = False
) -> str:
    """What of a step's `metrics` a person wants to see at once; what is not there is left out.

    Args:
        has_reward: whether the loss has one. VERL reports a score of 0 where there is none.
    """
    parts = [counted(step, steps)]
    if "distillation/kl" in metrics:
        parts.append(f"KL {metrics['distillation/kl']:.4f}")
    if has_reward and "critic/score/mean" in metrics:
        parts.append(f"reward {metrics['critic/score/mean']:.3f}")
    if "timing_s/step" in metrics:
        parts.append(f"{metrics['timing_s/step']:.1f} s")
    if seconds_left is not None:
        parts.append(f"{clock(seconds_left)} left")
    parts += held_out(metrics)
    return "   ".join(parts)


def held_out(metrics: Mapping[str, Any]) -> list[str]:
    """The accuracy of each data source that was validated on, or its reward; they are named if there are several."""
    matches = {name: match for name in metrics if (match := _MEAN_SCORE.fullmatch(name))}
    found = []
    for name, match in matches.items():
        is_accuracy = match["metric"] == "acc"
        score = f"accuracy {metrics[name]:.1%}" if is_accuracy else f"reward {metrics[name]:.3f}"
        found.append(f"held-out {score}" + (f" ({match['data_source']})" if len(matches) > 1 else ""))
    return found


def last_line(config: DictConfig, step: int, steps: int, saved: Optional[int]) -> str:
    """Where the model of a run that ended at `step` is, or what makes one of it.

    Args:
        saved: the last step that the run wrote or, if it wrote none, resumed from. Other checkpoints in its folder are
            those of other runs.
    """
    folder = os.path.abspath(os.path.expanduser(config.trainer.default_local_dir))
    checkpoint = os.path.join(folder, f"global_step_{saved}")
    done = f"{counted(step, steps)}   done; "
    if saved is None or not os.path.isdir(checkpoint):
        return f"{done}no checkpoint of it in {folder}: trainer.save_freq=N writes one every N steps and after the last"
    if saved != step:
        done += f"step {saved} is the last that was saved; "
    actor = os.path.join(checkpoint, "actor")
    contents = OmegaConf.select(config, f"{_ACTOR}.checkpoint.save_contents", default=[])
    has_lora = OmegaConf.select(config, "actor_rollout_ref.model.lora_rank", default=0) > 0
    if "hf_model" in contents and not has_lora:  # VERL would save a LoRA's layers under names that only PEFT knows
        return f"{done}the trained model: {os.path.join(actor, 'huggingface')}"
    backend = {"fsdp": "fsdp", "fsdp2": "fsdp", "megatron": "megatron"}.get(config.actor_rollout_ref.actor.strategy)
    if "model" not in contents or backend is None:
        return f"{done}the last checkpoint: {checkpoint}"
    return (
        f"{done}the last checkpoint: {checkpoint}; a Hugging Face model of it: python -m verl.model_merger merge "
        f"--backend {backend} --local_dir {actor} --target_dir {os.path.join(checkpoint, 'merged')}"
    )


class Progress:
    """One of the loggers of VERL's `Tracking`; prints `step_line`."""

    def __init__(self, steps: int, pace: Pace, has_reward: bool):
        self._steps = steps
        self._pace = pace
        self._has_reward = has_reward
        self._began = time.monotonic()

    def log(self, data: Mapping[str, Any], step: int) -> None:
        if "timing_s/step" in data:
            self._pace.add(data)
        else:  # VERL makes its loggers right before the validation that it does first
            self._pace.add_first_validation(time.monotonic() - self._began)
        try:
            print(step_line(step, self._steps, data, self._pace.left(step), self._has_reward), flush=True)
        except (
            TypeError,
            ValueError,
        ) as error:  # no metric of a fork, whatever it is, ends a run for the sake of a line
            logger.warning(f"step {step} has metrics that its line cannot show: {error}")


class ShowsProgress:
    """Mixed into a trainer class of VERL's."""

    config: DictConfig
    total_training_steps: int
    steps_per_epoch: int
    global_steps: int
    has_reward = True  # whether its loss has one
    _saved_step: Optional[int] = None

    @property
    def logger(self) -> Any:
        return self._tracking

    @logger.setter
    def logger(self, tracking: Any) -> None:
        """VERL sets it once, when it has loaded the checkpoint that it resumes from."""
        steps, trainer = self._last_step(), self.config.trainer
        pace = Pace(steps, trainer.test_freq, trainer.save_freq, has_end=steps == self.total_training_steps)
        self._saved_step = self.global_steps or None
        tracking.logger["progress"] = Progress(steps, pace, self.has_reward)
        self._tracking = tracking

    def fit(self, agent_loop_manager: Any) -> None:
        super().fit(agent_loop_manager)  # type: ignore[misc]
        if not self.config.trainer.get("val_only", False):
            steps = self._last_step()
            step = min(self.global_steps - 1, steps)
            print(last_line(self.config, step, steps, self._saved_step), flush=True)

    def _save_checkpoint(self) -> None:
        super()._save_checkpoint()  # type: ignore[misc]
        self._saved_step = self.global_steps

    def _last_step(self) -> int:
        """The epochs may end before the steps do."""
        return min(self.total_training_steps, self.steps_per_epoch * self.config.trainer.total_epochs)


def with_progress(trainer_cls: type) -> type:
    """`trainer_cls`, printing how it goes."""
    if issubclass(trainer_cls, ShowsProgress):
        return trainer_cls
    return type(trainer_cls.__name__, (ShowsProgress, trainer_cls), {})
