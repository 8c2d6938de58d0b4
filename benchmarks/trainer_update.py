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
"""One update of VERL's real actor worker at a large vocabulary: pure distillation, and a GRPO step beside it.

``measure KIND`` runs in a process of its own and prints one JSON line; ``run`` starts one process per kind, lets them
take turns, and writes the medians. Kinds:

- ``pure``: pure distillation;
- ``grpo``: what GRPO does with the same batch, without a reference policy: old log-probs, then the update;
- ``verl_topk``: VERL's own ``forward_kl_topk``, k = 64, whose teacher scores elsewhere: its entries are made up here,
  and its time is in no number;
- ``routed_2``, ``routed_4``: pure distillation from so many teachers of the same size, each sample from one of them;
- ``mixed_2``, ``mixed_4``: ... from their mixture;
- ``topk``: pure, with the teacher's 64 largest probabilities and the rest;
- ``self``: pure, from the initial student;
- ``self_lora``: a LoRA of the student, from its base.

A step here is what a trainer does after the rollout and before the next: the teacher's pass (or the old log-probs), and
the update. Generation is left out: it is the same for all. Extra memory is the peak resident memory of the update less
what is resident before it. It includes the gradients, which every step allocates anew and which are the same in all
kinds; the optimizer's state is there since the first step. With ``--device cuda`` memory is what torch has allocated
there, and the models are those of bfloat16 training; ``--models qwen3`` gives them the sizes of Qwen3 0.6B and 4B.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from linear_divergence import TOP_K, LineProcess, machine, meter, resident

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("pure", "grpo")
TEACHERS = ("pure", "routed_2", "routed_4", "mixed_2", "mixed_4", "topk", "self", "self_lora")
SIZES = ("tokens", "sequences", "micro_batch", "teacher_micro_batch", "vocab", "hidden", "layers")
PASSED_ON = (*SIZES, "device", "models")
# Of Qwen3-0.6B and Qwen3-4B (their config.json); both have tied embeddings.
QWEN3 = {
    "student": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "teacher": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
}
POLICY_LOSS = "actor_rollout_ref.actor.policy_loss"
PROMPT_TOKENS = 16
# In place of what tests/engine_process.py sets for a processor: VERL's defaults.
BFLOAT16 = [
    "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=bf16",
    "teacher.fsdp_config.model_dtype=bf16",
    "teacher.payload_dtype=bfloat16",
]
ON_CUDA = ["trainer.device=cuda", *BFLOAT16]
# VERL's own distillation without rewards, from one teacher on one GPU of its own.
VERL_TOPK = [
    "distillation.enabled=True",
    "distillation.n_gpus_per_node=1",
    "distillation.nnodes=1",
    "distillation.teacher_models.teacher_model.model_path=elsewhere",
    "distillation.teacher_models.teacher_model.inference.name=vllm",
    "distillation.teacher_models.teacher_model.inference.tensor_model_parallel_size=1",
    "distillation.distillation_loss.loss_mode=forward_kl_topk",
    f"distillation.distillation_loss.topk={TOP_K}",
    "distillation.distillation_loss.use_task_rewards=False",
    "distillation.distillation_loss.use_policy_gradient=False",
]


def make_models(folder: Path, args: argparse.Namespace) -> dict[str, str]:
    """Paths by name; made by whoever comes first."""
    from arithmetic import tiny_model

    if args.models == "qwen3":
        return {name: qwen3(folder / name, size, args) for name, size in QWEN3.items()}
    size = {"hidden": args.hidden, "layers": args.layers, "vocab_size": args.vocab}
    names = ("student", "teacher", "teacher_1", "teacher_2", "teacher_3")
    return {name: tiny_model(folder / name, **size, seed=seed) for seed, name in enumerate(names)}


def qwen3(path: Path, size: dict[str, int], args: argparse.Namespace) -> str:
    """A random checkpoint, in bfloat16; made on the device, where billions of random numbers take no time."""
    from arithmetic import tiny_model
    from transformers import Qwen3Config, Qwen3ForCausalLM

    if not path.exists():
        tiny_model(path)  # the tokenizer
        config = Qwen3Config(
            vocab_size=args.vocab, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, **size
        )
        torch.manual_seed(len(path.name))
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(args.device):
            Qwen3ForCausalLM(config).save_pretrained(path)
        torch.set_default_dtype(torch.float32)
    return str(path)


def teacher_overrides(kind: str, models: dict[str, str]) -> list[str]:
    name, _, number = kind.partition("_")
    if name == "self":
        adapter = ["actor_rollout_ref.model.lora_rank=16"] if number else []
        return ["teacher.model.path=self", *adapter]
    if name == "topk":
        return [f"teacher.model.path={models['teacher']}", "teacher.payload=topk", "teacher.topk=64"]
    if name == "pure":
        return [f"teacher.model.path={models['teacher']}"]
    paths = [path for teacher, path in models.items() if teacher != "student"][: int(number)]
    several = [f"+teacher.models.t{index}.path={path}" for index, path in enumerate(paths)]
    return [*several, *(["teacher.routing_key=data_source"] if name == "routed" else [])]


def overrides(kind: str, models: dict[str, str], args: argparse.Namespace) -> list[str]:
    common = [
        f"actor_rollout_ref.model.path={models['student']}",
        f"actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu={args.micro_batch}",
        f"actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu={args.micro_batch}",
        "actor_rollout_ref.actor.optim.lr=1e-6",
        "actor_rollout_ref.model.enable_gradient_checkpointing=True",
        "actor_rollout_ref.model.use_remove_padding=True",
    ]
    if args.device == "cuda":
        common += ON_CUDA
    if kind == "grpo":
        return [*common, f"{POLICY_LOSS}.loss_mode=vanilla"]
    if kind == "verl_topk":
        return [*common, f"{POLICY_LOSS}.loss_mode=vanilla", *VERL_TOPK]
    loss = [f"{POLICY_LOSS}.loss_mode=on_policy_distillation"]
    batches = ["teacher.use_dynamic_bsz=False", f"teacher.micro_batch_size_per_gpu={args.teacher_micro_batch}"]
    return [*common, *loss, *batches, *teacher_overrides(kind, models)]


def make_rows(kind: str, args: argparse.Namespace) -> list[dict]:
    import random

    rng = random.Random(0)
    draw = lambda length: [rng.randrange(256) for _ in range(length)]
    length = args.tokens // args.sequences
    return [
        {
            "prompt": draw(PROMPT_TOKENS),
            "response": draw(length),
            "mask": [1] * length,
            "old_log_prob": [-10.0] * length,
            "advantage": [rng.uniform(-1, 1)] * length,
            "ref_log_prob": [-10.0] * length,
            **({"data_source": f"t{index % int(kind[-1])}"} if kind.startswith("routed") else {}),
        }
        for index in range(args.sequences)
    ]


VERL_TOPK_FLAGS = {"distillation_use_topk": True, "distillation_only": True}  # its trainer's


def verl_topk_actor(config):
    """VERL's actor with its own distillation."""
    from verl.workers.engine_workers import ActorRolloutRefWorker

    actor = ActorRolloutRefWorker(
        config=config.actor_rollout_ref, role="actor", distillation_config=config.distillation
    )
    actor.init_model()
    return actor


def top_of_a_teacher(input_ids: torch.Tensor, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """The fields that VERL's teacher would have sent: of each token, TOP_K entries and their log-probs."""
    lengths = input_ids.offsets().diff().tolist()
    generator = torch.Generator().manual_seed(0)
    log_probs = [torch.randn(n, TOP_K, generator=generator).log_softmax(-1) - 0.05 for n in lengths]
    ids = [(torch.randint(args.vocab, (n, 1), generator=generator) + torch.arange(TOP_K)) % args.vocab for n in lengths]
    fields = {"teacher_logprobs": log_probs, "teacher_ids": ids}
    return {name: torch.nested.as_nested_tensor(rows, layout=torch.jagged) for name, rows in fields.items()}


def resident_bytes(device: str) -> int:
    """Of this process; on CUDA what its tensors take, without what torch keeps there of freed ones."""
    return torch.cuda.memory_allocated() if device == "cuda" else resident("VmRSS")


class Step:
    """VERL's workers in this process, and one step of a kind on one fixed batch."""

    def __init__(self, kind: str, args: argparse.Namespace):
        from engine_process import compose_config, local_batch, make_actor

        config = compose_config(overrides(kind, make_models(Path(args.folder), args), args))
        self._batch, self._sequences = local_batch(make_rows(kind, args), 0, 1), args.sequences
        if kind == "verl_topk":
            self._actor, self._update_flags = verl_topk_actor(config), VERL_TOPK_FLAGS
            self._batch.update(top_of_a_teacher(self._batch["input_ids"], args))
        else:
            self._actor, _, self._update_flags = make_actor(config, is_dense=False)
        self._scores_first = kind != "verl_topk"
        self._device = args.device
        self.after_start = resident_bytes(self._device)

    def _flags(self, **flags):
        from verl.utils import tensordict_utils as tu

        data = self._batch.clone()
        tu.assign_non_tensor(data, **({"temperature": 1.0, "calculate_entropy": False, "compute_loss": False} | flags))
        return data

    def prepare(self):
        """What the teacher says, or the old log-probs: the forward that comes before the update."""
        if not self._scores_first:
            return None
        if hasattr(self._actor, "teachers"):
            return self._actor.score(self._flags())
        return self._actor.compute_log_prob(self._flags())

    def update(self, prepared) -> None:
        data = self._flags(
            mini_batch_size=self._sequences, epochs=1, global_batch_size=self._sequences, **self._update_flags
        )
        if hasattr(self._actor, "teachers"):
            data["teacher_row"] = prepared["teacher_row"]
        self._actor.update_actor(data)


def measure_once(step: Step, device: str) -> dict[str, float]:
    with meter(device) as preparing:
        prepared = step.prepare()
    with meter(device) as updating:
        step.update(prepared)
    return {
        "prepare_s": preparing.seconds,
        "update_s": updating.seconds,
        "step_s": preparing.seconds + updating.seconds,
        "update_extra_mb": updating.peak / 1e6,
        "before_update_mb": updating.before / 1e6,
        "after_start_mb": step.after_start / 1e6,
        "after_update_mb": resident_bytes(device) / 1e6,
    }


def serve(kind: str, args: argparse.Namespace) -> None:
    """One measurement per line on stdin, as JSON on stdout, after a first step that is thrown away."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples" / "on_policy_distillation")]
    out, sys.stdout = sys.stdout, sys.stderr  # VERL prints
    step = Step(kind, args)
    measure_once(step, args.device)
    print("ready", file=out, flush=True)
    for _ in sys.stdin:
        print(json.dumps(measure_once(step, args.device)), file=out, flush=True)


def start(kind: str, port: int, args: argparse.Namespace) -> LineProcess:
    # Large models are made once.
    folder = Path(args.folder) / ("qwen3" if args.models == "qwen3" else kind)
    command = [sys.executable, __file__, "serve", kind, "--folder", str(folder)]
    for name in PASSED_ON:
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    environment = os.environ | {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "MALLOC_MMAP_THRESHOLD_": "1048576",  # freed tensors go back to the system, so that peaks are peaks
    }
    if args.device == "cpu":
        environment["VERL_PLATFORM"] = "cpu"
    with open(log_path(kind, args), "w") as log:
        return LineProcess(command, environment, stderr=log)


def log_path(kind: str, args: argparse.Namespace) -> Path:
    return Path(args.folder) / f"{kind}.log"


def run(args: argparse.Namespace) -> None:
    processes: dict[str, LineProcess] = {}
    args.folder = tempfile.mkdtemp(prefix="trainer_update_")
    for port, kind in enumerate(args.kinds, start=29600):
        processes[kind] = start(kind, port, args)  # one after the other: starting is work too
        if processes[kind].read_line().strip() != "ready":
            raise RuntimeError(f"{kind} did not start: {log_path(kind, args).read_text()[-3000:]}")
    samples: dict[str, list[dict[str, float]]] = {kind: [] for kind in args.kinds}
    for _ in range(args.repeats):
        for kind in args.kinds:
            samples[kind].append(json.loads(processes[kind].answer("")))
            print(kind, samples[kind][-1], file=sys.stderr, flush=True)
    for process in processes.values():
        process.stop()
    shutil.rmtree(args.folder)
    medians = {
        kind: {name: statistics.median(sample[name] for sample in of_kind) for name in of_kind[0]}
        for kind, of_kind in samples.items()
    }
    sizes = {name: getattr(args, name) for name in SIZES}
    result = {
        "machine": machine(args.device, torch.get_num_threads()),
        "sizes": sizes,
        "repeats": args.repeats,
        "medians": medians,
        "samples": samples,
    }
    text = json.dumps(result, indent=2)
    if args.out:
        Path(args.out).write_text(text + "\n")
    print(text)


def arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "serve"))
    parser.add_argument("kinds", nargs="*", default=list(KINDS), help="default: pure grpo; `teachers` are all others")
    parser.add_argument("--folder", default="trainer_update", help="serve: where the models go; must not exist")
    parser.add_argument("--tokens", type=int, default=4096, help="response tokens of the batch")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--micro-batch", type=int, default=16, help="sequences; the default is the whole batch")
    parser.add_argument("--teacher-micro-batch", type=int, default=4, help="sequences")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", choices=("tiny", "qwen3"), default="tiny", help="tiny: of --hidden and --layers")
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out")
    args = parser.parse_args(words)
    args.kinds = list(TEACHERS) if args.kinds == ["teachers"] else args.kinds
    return args


def main() -> None:
    args = arguments(sys.argv[1:])
    if args.command == "serve":
        serve(args.kinds[0], args)
    else:
        run(args)


if __name__ == "__main__":
    main()
