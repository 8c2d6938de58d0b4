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
"""The example of a training loop of one's own: against dense logits, and as a user starts it, without VERL."""

import os
import re
import subprocess
import sys
from pathlib import Path

import custom_trainer
import torch
from conftest import ROOT

NEEDED = {"buckets", "divergence", "head", "mixture", "roofline"}
# Prints what of VERL's name the example has imported, and whether Ray.
RUN = f"""
import runpy, sys
runpy.run_path({str(ROOT / "examples" / "on_policy_distillation" / "custom_trainer.py")!r}, run_name="__main__")
print(sorted(name for name in sys.modules if name.split(".")[0] in ("verl", "ray")))
"""


def dense_kl(student, teachers, sequences, is_predicting):
    """The mean of KL(S || sum_k w_k T_k), from the models' whole logits, in float64."""

    def log_probs(model):
        return model(sequences).logits[:, :-1][is_predicting].double().log_softmax(-1)

    ours = log_probs(student)
    with torch.no_grad():
        target = sum(w * log_probs(t).exp() for w, t in zip(custom_trainer.TEACHER_WEIGHTS, teachers, strict=True))
    return (ours.exp() * (ours - target.log())).sum(-1).mean()


def test_loss_and_gradients_are_those_of_dense_logits():
    student = custom_trainer.make_model(0, width=32, is_tied=True)
    teachers = [custom_trainer.make_model(1, width=48), custom_trainer.make_model(2, width=64)]
    sequences, is_predicting = custom_trainer.generate(student, torch.randint(2, 64, (64, 4)), tokens=8)
    assert not is_predicting[:, :3].any() and is_predicting[:, 3].all()
    lengths = is_predicting.sum(1)
    ended = lengths < is_predicting.shape[1] - 3
    assert ended.any()  # or the padding after an end is not tried
    assert (sequences[ended, 3 + lengths[ended]] == custom_trainer.END).all()  # the last one that is learnt
    found = []
    for loss in (custom_trainer.distillation_loss, dense_kl):
        value = loss(student, teachers, sequences, is_predicting)
        student.zero_grad()
        value.backward()
        found.append([value.detach(), *(parameter.grad.clone() for parameter in student.parameters())])
    assert found[0][0] > 0.1
    for ours, dense in zip(*found, strict=True):
        assert (ours - dense).abs().max() < 1e-5
    assert all(parameter.grad is None for teacher in teachers for parameter in teacher.parameters())


def test_it_runs_without_verl_and_the_kl_falls(tmp_path):
    for path in Path(torch.__file__).parents[1].iterdir():
        if not path.name.startswith(("verl", "ray")):
            (tmp_path / path.name).symlink_to(path)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    done = subprocess.run([sys.executable, "-S", "-c", RUN], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kls = [float(value) for value in re.findall(r"^step +\d+/12   KL (\S+)$", done.stdout, flags=re.MULTILINE)]
    assert len(kls) == 12
    assert sum(kls[-3:]) / 3 < 0.7 * kls[0]
    ours = "verl.on_policy_distillation"
    names = sorted(["verl", ours, *(f"{ours}.{name}" for name in NEEDED)])
    assert done.stdout.splitlines()[-1] == str(names)
