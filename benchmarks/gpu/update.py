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
"""Scoring and update of 8,192 tokens in VERL's own workers: ours, VERL's own top-k distillation, and plain PPO.

benchmarks/trainer_update.py measures; the student has the sizes of Qwen3-0.6B, the teacher those of Qwen3-4B, both with
random weights.
"""

import json
import tempfile
from pathlib import Path

import record
import trainer_update


def main() -> None:
    step = record.of_arguments(__doc__)
    step.require_verl()
    large = ["--models", "qwen3", "--tokens", "8192", "--repeats", "3"]
    small = ["--tokens", "64", "--sequences", "4", "--micro-batch", "4", "--vocab", "997", "--hidden", "32"]
    small += ["--layers", "1", "--repeats", "1"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "update.json"
        words = ["run", "pure", "verl_topk", "grpo", "--device", step.device, *step.choose(large, small)]
        trainer_update.run(trainer_update.arguments([*words, "--out", str(path)]))
        step.note(trainer_update=json.loads(path.read_text()))


if __name__ == "__main__":
    main()
