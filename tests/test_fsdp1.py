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
"""The student's head under FSDP1, whose weights are views of one flat parameter per unit.

VERL's engine wants a GPU for `strategy=fsdp` (it has FSDP1 broadcast the parameters, which torch refuses on a CPU), so
here torch's FSDP1 wraps a model as VERL's engine does, and the head gets its tasks directly.
"""

import functools
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from test_engine import free_port
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from verl.on_policy_distillation.divergence import DivergenceSpec
from verl.on_policy_distillation.engine_fsdp import end_at_output_layer, output_layer_logits, reshard_root
from verl.on_policy_distillation.head import LinearLogits, divergence_of_head, tokens_of_head
from verl.on_policy_distillation.output_projection import LogitTransform

VOCAB, LENGTH, TOKENS = 97, 12, 6
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def student() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **SIZES))
    end_at_output_layer(model)
    return model


def output_function(kind: str, rank: int):
    """What the engine asks of the head, for TOKENS tokens in the middle of the sequence of `rank`."""
    random = torch.Generator().manual_seed(1 + rank)
    weight = torch.randn(VOCAB, 16, generator=torch.Generator().manual_seed(0))
    teacher = LinearLogits(torch.randn(TOKENS, 16, generator=random), weight)
    token_weights = torch.rand(TOKENS, generator=random)
    labels = torch.randint(VOCAB, (TOKENS,), generator=random)

    def columns(hidden: torch.Tensor, layer: torch.nn.Module) -> dict[str, torch.Tensor]:
        head = output_layer_logits(hidden[3 : 3 + TOKENS], layer, LogitTransform())
        if kind == "pure":
            tokens = divergence_of_head(head, teacher, DivergenceSpec(), token_weights)
            return {"weighted": token_weights * tokens.divergence}
        policy = tokens_of_head(head, teacher, DivergenceSpec(), labels, 0.7)
        return {"log_prob": policy.log_prob, "entropy": policy.entropy, "divergence": policy.tokens.divergence}

    return columns


def sum_of_outputs(model: torch.nn.Module, kind: str, rank: int) -> torch.Tensor:
    """Of everything that the head's columns give a gradient to, for the sequence of `rank`."""
    sequence = torch.randint(VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(rank))
    columns = model(sequence, output_function=output_function(kind, rank))
    return sum(column.sum() for column in columns.values())


POLICIES = {  # VERL's two: by the layers' class, or by size, which gives the output layer a unit of its own
    "layers": functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer}),
    "size": functools.partial(size_based_auto_wrap_policy, min_num_params=3000),
}


def wrapped(model: torch.nn.Module, use_orig_params: bool, policy_name: str) -> FullyShardedDataParallel:
    policy = POLICIES[policy_name]
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=use_orig_params
    )


def join(rank: int, world_size: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=60))


class Ranks:
    """Processes of one gloo group that serve all tests of a size: their imports take longer than any case does."""

    def __init__(self, size: int):
        spawn, port = multiprocessing.get_context("spawn"), free_port()
        self.is_broken = False
        self.processes = [
            ProcessPoolExecutor(1, mp_context=spawn, initializer=join, initargs=(rank, size, port))
            for rank in range(size)
        ]

    def run(self, function: Callable[..., None], *args) -> None:
        """`function(rank, size, *args)` in each; its error is raised here."""
        size = len(self.processes)
        results = [process.submit(function, rank, size, *args) for rank, process in enumerate(self.processes)]
        try:
            for result in results:
                result.result(timeout=300)
        except BaseException:
            self.is_broken = True  # a rank may wait for one that has failed
            raise

    def end(self) -> None:
        for process in self.processes:
            process.shutdown(wait=not self.is_broken, cancel_futures=True)


@pytest.fixture(scope="module")
def ranks():
    """The ranks of a group, by its size; made when they are first asked for."""
    made: dict[int, Ranks] = {}

    def of(size: int) -> Ranks:
        if size not in made or made[size].is_broken:
            made[size] = Ranks(size)
        return made[size]

    yield of
    for group in made.values():
        group.end()


def train_one_step(rank: int, world_size: int, kind: str, use_orig_params: bool, policy: str) -> None:
    """In each process: a step of FSDP1 moves every parameter as a step of the plain model over all sequences does."""
    plain, model = student(), student()
    before = [parameter.detach().clone() for parameter in plain.parameters()]
    sharded = wrapped(model, use_orig_params, policy)
    assert isinstance(model.lm_head, FullyShardedDataParallel) == (policy == "size")
    optimizers = [torch.optim.SGD(module.parameters(), lr=1.0) for module in (plain, sharded)]
    for other in range(world_size):
        (sum_of_outputs(plain, kind, other) / world_size).backward()
    sum_of_outputs(sharded, kind, rank).backward()
    for optimizer in optimizers:
        optimizer.step()
    with FullyShardedDataParallel.summon_full_params(sharded):
        for start, expected, actual in zip(before, plain.parameters(), sharded.parameters(), strict=True):
            assert not torch.equal(start, expected)
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize("kind", ["pure", "hybrid"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_is_that_of_the_plain_model(policy, kind, use_orig_params, ranks):
    ranks(2).run(train_one_step, kind, use_orig_params, policy)


def let_go_of_the_root(rank: int, world_size: int, policy: str) -> None:
    """In each process: what a forward leaves gathered is let go of, and gathered again for the next."""
    model = wrapped(student(), use_orig_params=False, policy_name=policy).eval()
    sequence = torch.randint(VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(rank))

    def gathered_bytes() -> int:
        return model._handle.flat_param._full_param_padded.untyped_storage().nbytes()

    with torch.no_grad():
        first = model(sequence).logits
        is_sharded = world_size > 1  # by itself a rank has the weights whole, and there is nothing to let go of
        assert not is_sharded or gathered_bytes() > 0
        for _ in range(2):  # it may be asked for what is done
            reshard_root(model)
            assert not is_sharded or gathered_bytes() == 0
        torch.testing.assert_close(model(sequence).logits, first, rtol=0, atol=0)


@pytest.mark.parametrize(("policy", "size"), [("layers", 1), ("layers", 2), ("size", 2)])
def test_after_a_forward_the_root_s_weights_are_let_go_of(policy, size, ranks):
    ranks(size).run(let_go_of_the_root, policy)
