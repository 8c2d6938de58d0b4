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
"""Time and memory of divergences of two linear heads: ours, dense torch, TRL, Liger, VERL's top-k, and the floor.

    benchmarks/run.sh            all of it; see benchmarks/README.md

One process per implementation. Each waits for commands, and the parent asks one after another, so that only one runs
at a time and a slow minute of the machine hits all of them. Everything is forward plus backward, with gradients of
the student's hidden states and weight, of the mean over tokens.

Peak extra memory, on a processor, is the process's peak resident memory during a call (VmHWM, which is reset before
the call) less its resident memory before the call less the bytes of the gradients. Inputs are resident before. On CUDA
it is the same difference of what torch's allocator has handed out.

`verl_topk` is the loss that VERL itself distils with. It gets its teacher's top 64 ready-made, so that its time has no
product with the teacher's weight in it, and its value is not the exact one: the results give the gap.
"""

import argparse
import ctypes
import gc
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PEERS = ROOT / ".benchmarks" / "peers"

# (type, beta) as `linear_divergence` calls them. Peers name all three by one number, with the mixture
# beta T + (1 - beta) S as here: 0 is KL(T||S), 1 is KL(S||T).
TYPES = {"reverse_kl": 1.0, "forward_kl": 0.0, "gkd": 0.5}
TOP_K = 64  # of VERL's own loss
# Losses that are other numbers than ours on purpose.
NOT_OURS = ("verl_topk", "hybrid")
# Of the logits' standard deviation. Divergences of a few nats; no time below depends on it.
LOGIT_SCALE = 2.0
AGREEMENT = 1e-3  # relative; of the losses, and of the gradients' norms
CHECK_NOISE = 1e-5  # a norm below this is rounding
MEMORY_LEFT = 1 << 30  # bytes that no call may take from the rest of the machine


@dataclass(frozen=True)
class Sizes:
    vocab: int
    student_width: int
    teacher_width: int
    dtype: str
    device: str

    def random(self, seed: int, *shape: int, out: torch.Tensor | None = None) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        values = torch.empty(shape, device=self.device, dtype=getattr(torch, self.dtype)) if out is None else out
        return values.normal_(generator=generator)

    def weight(self, side: int, memory: int | None = None, make: bool = True) -> torch.Tensor:
        """Of the student (0) or the teacher (1), for logits of the standard deviation `LOGIT_SCALE`.

        memory: the file descriptor of what all processes share, so that each of them does not hold a copy; of the
        right size. `make` fills it.
        """
        width = (self.student_width, self.teacher_width)[side]
        values = None
        if memory is not None:
            shape, dtype = (self.vocab, width), getattr(torch, self.dtype)
            path = f"/proc/self/fd/{memory}"
            values = torch.from_file(path, shared=True, size=math.prod(shape), dtype=dtype).view(shape)
        if make:
            values = self.random(side, self.vocab, width, out=values).mul_(LOGIT_SCALE / width**0.5)
        return values

    def share_weights(self) -> list[int]:
        """Both weights in memory that belongs to no process; empty on devices."""
        if self.device != "cpu":
            return []
        memory = []
        for side, width in enumerate((self.student_width, self.teacher_width)):
            memory.append(os.memfd_create(f"weight{side}"))
            os.ftruncate(memory[side], self.vocab * width * getattr(torch, self.dtype).itemsize)
            self.weight(side, memory[side])
        return memory


class Inputs:
    """Of n tokens; the same numbers in every process. `memory` is what `Sizes.share_weights` returned."""

    def __init__(self, n: int, sizes: Sizes, memory: list[int]):
        self.student_hidden = sizes.random(10 + n, n, sizes.student_width).requires_grad_()
        self.teacher_hidden = sizes.random(20 + n, n, sizes.teacher_width)
        weights = [sizes.weight(side, memory[side] if memory else None, make=not memory) for side in (0, 1)]
        self.student_weight, self.teacher_weight = weights[0].requires_grad_(), weights[1]

    def gradients(self) -> list[torch.Tensor]:
        return [tensor.grad for tensor in (self.student_hidden, self.student_weight) if tensor.grad is not None]

    def drop_gradients(self) -> None:
        self.student_hidden.grad = self.student_weight.grad = None


# ----------------------------------------------------------------------------------------------------------------------
# implementations: each is made once per process and size, and returns the loss, or None, after its backward

Call = Callable[[str], torch.Tensor | None]


def ours(x: Inputs, chunking: tuple[int, int] | None = None) -> Call:
    """`chunking`: (rows, group) in place of what the head chooses."""
    from verl.on_policy_distillation.head import linear_divergence
    from verl.on_policy_distillation.roofline import Chunking

    heads = x.student_hidden, x.student_weight, x.teacher_hidden, x.teacher_weight
    chosen = Chunking(*chunking) if chunking else None

    def call(kind):
        loss = linear_divergence(*heads, distillation_type=kind, beta=TYPES[kind], chunking=chosen).loss
        loss.backward()
        return loss

    return call


def hybrid(x: Inputs, chunking: tuple[int, int] | None = None) -> Call:
    """Ours for losses that are not known before the forward: log-prob, entropy and divergence, and their backward."""
    from verl.on_policy_distillation.head import linear_token_divergence
    from verl.on_policy_distillation.roofline import Chunking

    heads = x.student_hidden, x.student_weight, x.teacher_hidden, x.teacher_weight
    labels = torch.arange(len(x.student_hidden), device=x.student_hidden.device) % len(x.student_weight)

    def call(kind):
        found = linear_token_divergence(
            *heads, labels, distillation_type=kind, beta=TYPES[kind], chunking=Chunking(*chunking) if chunking else None
        )
        loss = (found.tokens.divergence - found.log_prob).mean()
        loss.backward()
        return loss

    return call


def dense(x: Inputs) -> Call:
    """All logits at once, and autograd."""

    def log_softmax(hidden, weight):
        return torch.log_softmax((hidden @ weight.T).float(), -1)

    def kl(log_p, log_q):
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    def divergence(kind):
        log_s = log_softmax(x.student_hidden, x.student_weight)
        with torch.no_grad():
            log_t = log_softmax(x.teacher_hidden, x.teacher_weight)
        if kind == "reverse_kl":
            return kl(log_s, log_t)
        if kind == "forward_kl":
            return kl(log_t, log_s)
        beta = TYPES[kind]
        log_m = (beta * log_t.exp() + (1 - beta) * log_s.exp()).log()
        return beta * kl(log_t, log_m) + (1 - beta) * kl(log_s, log_m)

    def call(kind):
        loss = divergence(kind)
        loss.backward()
        return loss

    return call


def trl(x: Inputs) -> Call:
    """What trl.DistillationTrainer computes its loss with."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def call(kind):
        heads = x.student_hidden, x.student_weight, None, x.teacher_hidden, x.teacher_weight, None
        per_token, _ = ChunkedDivergenceFunction.apply(*heads, TYPES[kind])
        loss = per_token.mean()
        loss.backward()
        return loss

    return call


def liger(x: Inputs, compiled: bool = True) -> Call:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    # Without its cross-entropy term the labels only say which tokens count: all.
    labels = torch.zeros(len(x.student_hidden), dtype=torch.long, device=x.student_hidden.device)

    def call(kind):
        function = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=TYPES[kind], compiled=compiled
        )
        loss = function(x.student_hidden, x.student_weight, x.teacher_hidden, x.teacher_weight, labels)
        loss.backward()
        return loss

    return call


def liger_eager(x: Inputs) -> Call:
    return liger(x, compiled=False)


def verl_topk(x: Inputs) -> Call:
    """VERL's `forward_kl_topk`, as its FSDP engine calls it: on the logits of the whole micro-batch.

    The teacher's entries are there beforehand: VERL's teacher scores in a vLLM of its own, on other GPUs. So neither
    its time nor its product is measured.
    """
    from types import SimpleNamespace

    from verl.trainer.distillation.fsdp.losses import compute_forward_kl_topk
    from verl.workers.config import DistillationLossConfig

    # As VERL's YAML has it: no clamps.
    settings = {"loss_mode": "forward_kl_topk", "topk": TOP_K, "use_policy_gradient": False}
    loss_config = DistillationLossConfig(**settings, log_prob_min_clamp=None, loss_max_clamp=None)
    config = SimpleNamespace(distillation_loss=loss_config)  # all that it reads of a DistillationConfig

    def top_of(hidden):
        return torch.log_softmax((hidden @ x.teacher_weight.T).float(), -1).topk(TOP_K)

    log_probs, ids = (torch.cat(parts) for parts in zip(*map(top_of, x.teacher_hidden.split(64)), strict=True))
    teacher_log_probs, teacher_ids = (torch.nested.as_nested_tensor([t], layout=torch.jagged) for t in (log_probs, ids))
    device, dtype = x.student_hidden.device.type, x.student_weight.dtype

    def call(kind):
        assert kind == "forward_kl"
        # VERL's engine calls the loss under autocast for 16-bit parameters, and without for float32.
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            logits = (x.student_hidden @ x.student_weight.T).unsqueeze(0)
            columns = compute_forward_kl_topk(logits, teacher_log_probs, teacher_ids, config, "thd")
            loss = (
                columns["distillation_losses"].clamp_min(0.0).mean()
            )  # (1, n); VERL's clamp, and its mean over tokens
        loss.backward()
        return loss

    return call


def floor(x: Inputs) -> Call:
    """The bare products, three of the student's and one of the teacher's, into memory that is made before.

    On a processor in the chunks that ours takes. On CUDA all tokens at once, where the size of a chunk decides whether
    a product waits for memory, and is a part of what is measured.
    """
    from verl.on_policy_distillation import divergence
    from verl.on_policy_distillation.divergence import chunks

    hidden, weight = x.student_hidden.detach(), x.student_weight.detach()
    n, vocab = len(hidden), len(weight)
    rows = [slice(0, n)] if hidden.is_cuda else list(chunks(n, vocab, divergence.CHUNK_ELEMENTS))
    # Of 16-bit factors, ours takes the sums in float32 where the device hands them out.
    wide = {"out_dtype": torch.float32} if hidden.is_cuda and hidden.dtype != torch.float32 else {}
    logits = hidden.new_empty((rows[0].stop, vocab), dtype=torch.float32 if wide else hidden.dtype)
    gradient = torch.randn_like(logits, dtype=hidden.dtype)
    grad_hidden = hidden.new_empty((rows[0].stop, hidden.shape[1]), dtype=logits.dtype)

    def call(kind):
        grad_weight = torch.zeros_like(weight, dtype=logits.dtype)
        for chunk in rows:
            z, g, size = logits[: chunk.stop - chunk.start], gradient[: chunk.stop - chunk.start], chunk
            torch.mm(hidden[size], weight.T, **wide, out=z)
            torch.mm(x.teacher_hidden[size], x.teacher_weight.T, **wide, out=z)
            torch.mm(g, weight, **wide, out=grad_hidden[: len(g)])
            torch.addmm(grad_weight, g.T, hidden[size], **wide, out=grad_weight)

    return call


IMPLEMENTATIONS = {
    "floor": floor,
    "ours": ours,
    "hybrid": hybrid,
    "dense": dense,
    "trl": trl,
    "liger": liger,
    "liger_eager": liger_eager,
    "verl_topk": verl_topk,
}
# `liger` is with its defaults, compiled. Without compilation it takes several times the memory.
DEFAULTS = [name for name in IMPLEMENTATIONS if name not in ("liger_eager", "hybrid")]


# ----------------------------------------------------------------------------------------------------------------------
# one process


def resident(field: str) -> int:
    """VmRSS (now), VmHWM (the most since it was reset) or VmData (that could be resident) in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def limit_memory() -> None:
    """A call that needs more than the machine has left fails; else the kernel would end some process of its choice."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (resident("VmData") + available - MEMORY_LEFT, hard))


class ProcessMeter:
    """Seconds and peak memory of a call on a processor; `before` it, the bytes that are resident."""

    def __enter__(self):
        limit_memory()
        # What the heap keeps for later would else be memory that a call uses and that does not count.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM = VmRSS
        self.before, self._start = resident("VmRSS"), time.perf_counter()
        return self

    def __exit__(self, *_):
        self.seconds = time.perf_counter() - self._start
        self.peak = resident("VmHWM") - self.before


class CudaMeter:
    """The same on CUDA."""

    def __enter__(self):
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._events[0].record()
        return self

    def __exit__(self, *_):
        self._events[1].record()
        torch.cuda.synchronize()
        self.seconds = self._events[0].elapsed_time(self._events[1]) / 1e3
        self.peak = torch.cuda.max_memory_allocated() - self.before


def meter(device: str) -> ProcessMeter | CudaMeter:
    return CudaMeter() if device == "cuda" else ProcessMeter()


def measure(call: Call, x: Inputs, kind: str) -> dict:
    gc.collect()
    with meter(x.student_hidden.device.type) as measured:
        loss = call(kind)
    # The floor keeps no gradient, but it makes the weight's.
    gradients = x.gradients()
    size = sum(g.numel() * g.element_size() for g in gradients) if gradients else x.student_weight.nbytes
    result = {"seconds": measured.seconds, "extra_bytes": measured.peak - size}
    if loss is not None:
        result |= {"loss": loss.item(), "gradient_norms": [g.float().norm().item() for g in gradients]}
    x.drop_gradients()
    if x.student_hidden.is_cuda:
        torch.cuda.empty_cache()  # the other processes need it
    return result


def serve(name: str, threads: int) -> None:
    """Answers one JSON line on stdout for each on stdin."""
    torch.set_num_threads(threads)
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print
    x: Inputs | None = None
    call: Call | None = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if "inputs" in command:
                x = call = None
                gc.collect()
                n, sizes, memory = command["inputs"]
                x = Inputs(n, Sizes(**sizes), memory)
                call = IMPLEMENTATIONS[name](x)
                reply = {}
            elif x is None or call is None:
                reply = {"error": "there are no inputs"}
            else:
                reply = measure(call, x, command["kind"])
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
            if x is not None:
                x.drop_gradients()
        replies.write(json.dumps(reply) + "\n")


class LineProcess:
    """A process that answers one line on stdout for each on stdin; `options` are of `subprocess.Popen`."""

    def __init__(self, command: list[str], environment: dict[str, str], **options):
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, **options
        )
        assert self._process.stdin is not None and self._process.stdout is not None  # both are pipes
        self._stdin, self._stdout = self._process.stdin, self._process.stdout

    def read_line(self) -> str:
        """Empty if the process has ended."""
        return self._stdout.readline()

    def answer(self, line: str) -> str:
        self._stdin.write(line + "\n")
        return self.read_line()

    def stop(self, timeout: float | None = None) -> None:
        self._stdin.close()
        self._process.wait(timeout)


class Worker(LineProcess):
    def __init__(self, name: str, threads: int, memory: list[int]):
        # VERL looks for an accelerator when it is imported; the torch code measured here is the same on any platform.
        environment = {"VERL_PLATFORM": "cpu"} | os.environ
        # This tree's files, also where neither they nor VERL are installed; the peers for themselves alone.
        peers = [str(PEERS)] if name.startswith(("trl", "liger")) else []
        inherited = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
        environment["PYTHONPATH"] = os.pathsep.join([*peers, str(ROOT), *inherited])
        command = [sys.executable, __file__, "--worker", name, "--threads", str(threads)]
        super().__init__(command, environment, pass_fds=memory)

    def ask(self, **command) -> dict:
        try:
            line = self.answer(json.dumps(command))
        except BrokenPipeError:
            line = ""
        return json.loads(line) if line else {"error": "the process ended (out of memory?)"}


# ----------------------------------------------------------------------------------------------------------------------
# all of them


def machine(device: str, threads: int) -> dict:
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    facts = {"device": name, "cores": os.cpu_count(), "threads": threads, "load": round(os.getloadavg()[0], 2)}
    facts |= {"python": platform.python_version(), "torch": torch.__version__}
    facts |= {"date": datetime.now(timezone.utc).strftime("%Y-%m-%d")}
    for name in ("trl", "liger_kernel"):
        found = next(iter(metadata.distributions(name=name, path=[str(PEERS)])), None)
        facts[name] = found.version if found else None
    return facts


def disagreement(reply: dict, reference: dict) -> str | None:
    """How a result differs from ours by more than `AGREEMENT`."""
    pairs = [("loss", reply["loss"], reference["loss"])]
    for name, mine, true in zip(
        ("hidden gradient", "weight gradient"), reply["gradient_norms"], reference["gradient_norms"], strict=True
    ):
        pairs.append((f"norm of the {name}", mine, true))
    wrong = [f"{n} {a:.6g}, ours {b:.6g}" for n, a, b in pairs if abs(a - b) > max(AGREEMENT * abs(b), CHECK_NOISE)]
    return "; ".join(wrong) or None


def kinds_of(name: str, kinds: list[str]) -> list[str]:
    """What is asked of an implementation: of the floor, which does not depend on the type, one call for all."""
    if name == "floor":
        return ["all"]
    return [kind for kind in kinds if name != "verl_topk" or kind == "forward_kl"]


class Table:
    """What has been measured at one number of tokens: rows by (implementation, type)."""

    def __init__(self, n: int, workers: dict[str, Worker]):
        self.n, self._workers = n, workers
        self.rows: dict[tuple[str, str], dict] = {}

    def warm_up(self, sizes: dict, memory: list[int], kinds: list[str]) -> None:
        """One call each that is not counted, and whose results are compared."""
        references: dict[str, dict] = {}
        for name, worker in self._workers.items():
            reply = worker.ask(inputs=[self.n, sizes, memory])
            for kind in kinds_of(name, kinds):
                result = reply if "error" in reply else worker.ask(kind=kind)
                row = {"implementation": name, "kind": kind, "n": self.n, "seconds": [], "extra_bytes": []}
                row |= {key: result[key] for key in ("error", "loss", "gradient_norms") if key in result}
                if name == "ours" and "error" not in result:
                    references[kind] = result
                elif name == "verl_topk" and "loss" in result and kind in references:
                    row |= {"exact": references[kind]["loss"]}
                elif name not in NOT_OURS and "loss" in result and kind in references:
                    row |= {"disagreement": disagreement(result, references[kind])}
                self.rows[name, kind] = row
                say(f"n={self.n} {name} {kind} warm-up: {describe(result)} {row.get('disagreement') or ''}")

    def round(self) -> None:
        """One call each of those that work."""
        for (name, kind), row in self.rows.items():
            if "error" in row:
                continue
            result = self._workers[name].ask(kind=kind)
            if "error" in result:
                row["error"] = result["error"]
                continue
            row["seconds"].append(round(result["seconds"], 4))
            row["extra_bytes"].append(result["extra_bytes"])

    def say(self) -> None:
        for (name, kind), row in self.rows.items():
            if row["seconds"]:
                middle = {key: statistics.median(row[key]) for key in ("seconds", "extra_bytes")}
                say(f"n={self.n} {name} {kind}: {describe(middle)}")


def describe(result: dict) -> str:
    if "error" in result:
        return result["error"]
    return f"{result['seconds']:.3f} s, {result['extra_bytes'] / 1e6:.0f} MB"


def command_line(script: str, words: Sequence[str]) -> str:
    """What was called, less where the results went."""
    words = list(words)
    if "--output" in words:
        at = words.index("--output")
        del words[at : at + 2]
    return " ".join([script, *words])


def say(text: str) -> None:
    print(text, flush=True)


def write(path: Path, facts: dict, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")


def run(options: argparse.Namespace) -> None:
    this_run: dict = {"command": command_line("benchmarks/run.sh", options.words)}
    this_run["machine"] = machine(options.device, options.threads)
    heads = Sizes(options.vocab, options.student_width, options.teacher_width, options.dtype, options.device)
    memory, sizes = heads.share_weights(), asdict(heads)
    path = options.output
    # A size that is not measured now stays as it was measured, if that was with the same inputs.
    before: dict = json.loads(path.read_text()) if path.exists() else {"sizes": sizes, "runs": {}, "rows": []}
    kept = [row for row in before["rows"] if before["sizes"] == sizes and row["n"] not in options.tokens]
    runs = {str(row["n"]): before["runs"][str(row["n"])] for row in kept}
    workers = {name: Worker(name, options.threads, memory) for name in options.implementations}
    tables = []
    try:
        for n, repeats in zip(options.tokens, options.repeats, strict=True):
            tables.append(table := Table(n, workers))
            runs[str(n)] = this_run
            table.warm_up(sizes, memory, options.types)
            for _ in range(repeats):
                table.round()
                write(path, {"runs": runs, "sizes": sizes}, kept + [row for t in tables for row in t.rows.values()])
            table.say()
    finally:
        for worker in workers.values():
            worker.stop(timeout=60)
    say(f"wrote {path.name}")


def arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="cuda: benchmarks/gpu/run.sh")
    parser.add_argument("--tokens", type=int, nargs="+", help="default: 512 2048; on CUDA 8192")
    parser.add_argument("--repeats", type=int, nargs="+", help="timed calls, one number or one per --tokens; default 5")
    parser.add_argument("--types", nargs="+", default=list(TYPES), choices=list(TYPES))
    parser.add_argument("--implementations", nargs="+", default=DEFAULTS, choices=list(IMPLEMENTATIONS))
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--student-width", type=int, help="H_s; default 512, on CUDA 2048")
    parser.add_argument("--teacher-width", type=int, help="H_t; default 1024, on CUDA 5120")
    parser.add_argument("--dtype", help="default float32, on CUDA bfloat16")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, default=RESULTS / "linear_divergence_cpu.json")
    options = parser.parse_args(words)
    options.words = words
    is_cuda = options.device == "cuda"
    options.tokens = options.tokens or ([8192] if is_cuda else [512, 2048])
    options.repeats = options.repeats or [5]
    if len(options.repeats) == 1:
        options.repeats *= len(options.tokens)
    options.student_width = options.student_width or (2048 if is_cuda else 512)
    options.teacher_width = options.teacher_width or (5120 if is_cuda else 1024)
    options.dtype = options.dtype or ("bfloat16" if is_cuda else "float32")
    return options


if __name__ == "__main__":
    parsed = arguments(sys.argv[1:])
    if parsed.worker:
        serve(parsed.worker, parsed.threads)
    else:
        run(parsed)
