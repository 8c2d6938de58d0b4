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
"""The parts of ``verl.plugin.cpu`` that need neither Ray nor a process group."""

import asyncio
import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("the CPU platform would also reach the other tests of this session", allow_module_level=True)

# VERL reads it while it is imported.
os.environ["VERL_PLATFORM"] = "cpu"

from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import verl  # noqa: E402, F401
from verl.plugin.platform import get_platform  # noqa: E402

if get_platform().device_name != "cpu":
    pytest.skip("this process has already chosen another platform", allow_module_level=True)

from verl.plugin.cpu import rollout  # noqa: E402
from verl.plugin.cpu.rollout import SamplingParams, generate_batch, group_requests, load_weights  # noqa: E402
from verl.workers.config import HFModelConfig, RolloutConfig  # noqa: E402

VOCAB = 98
EOS = 97
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16]]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # initial weights give nearly uniform tokens, which would hide mistakes
        parameter.data.mul_(4.0)
    model.generation_config = GenerationConfig()
    return model


@pytest.fixture(scope="module")
def model_config(model, tmp_path_factory):
    """VERL's own configuration of a checkpoint on disk."""
    path = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:EOS]
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>").save_pretrained(path)
    model.save_pretrained(path)
    return HFModelConfig(path=str(path), override_config={"attn_implementation": "sdpa"})


def uniforms_for(prompts, params, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).random((len(prompts), params.max_tokens)))


@torch.no_grad()
def plain_log_probs(model, prompt, response, temperature):
    """(response length, vocab) from one forward pass without cache or padding."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / temperature, dim=-1)


class TestPlatform:
    def test_is_chosen_and_complete(self):
        platform = get_platform()
        assert platform.is_available() and not platform.is_platform_available()
        assert platform.ray_resource_options(1) == {"num_gpus": 1}
        assert torch.ones(2).to(platform.current_device()).device.type == "cpu"

    def test_device_module_has_the_memory_calls(self):
        device = get_platform().device_module
        device.empty_cache()
        device.synchronize()
        free, total = device.mem_get_info()
        assert 0 < free <= total
        assert 0 < device.memory_allocated() <= total and device.max_memory_allocated() > 0

    def test_device_module_has_the_rng_calls(self):
        device = get_platform().device_module
        state = device.get_rng_state()
        first = torch.rand(3)
        device.set_rng_state(state)
        torch.testing.assert_close(torch.rand(3), first, rtol=0, atol=0)

    def test_torch_itself_stays_unpatched(self):
        assert not hasattr(torch.cpu, "memory_allocated")

    def test_flops_counter_knows_the_device(self):
        from verl.utils.flops_counter import get_device_flops

        assert 0 < get_device_flops("T") < float("inf")


class TestRegistration:
    def test_importing_verl_imports_no_worker(self):
        code = "import sys, verl; sys.exit(any(m.startswith('verl.workers') for m in sys.modules))"
        assert subprocess.run([sys.executable, "-c", code], env=os.environ.copy()).returncode == 0

    def test_rollout(self):
        from verl.workers.rollout.base import get_rollout_class
        from verl.workers.rollout.replica import get_rollout_replica_class

        assert get_rollout_class("hf") is rollout.ServerAdapter
        assert get_rollout_replica_class("hf") is rollout.HFReplica

    def test_engines(self):
        from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead

        assert EngineRegistry.get_engine_cls("language_model", "fsdp2") is FSDPEngineWithLMHead
        assert issubclass(EngineRegistry.get_engine_cls("value_model", "fsdp2"), FSDPEngineWithLMHead)
        with pytest.raises(ValueError, match="No engine registered"):
            EngineRegistry.get_engine_cls("language_model", "fsdp")


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    """A world of one, made by the call VERL's workers make."""
    from verl.utils.distributed import initialize_global_process_group_ray

    os.environ["DIST_INIT_METHOD"] = f"file://{tmp_path_factory.mktemp('dist')}/store"
    initialize_global_process_group_ray(timeout_second=None)
    yield
    torch.distributed.destroy_process_group()
    del os.environ["DIST_INIT_METHOD"]


class TestEngine:
    @pytest.mark.parametrize("forward_only", [False, True])
    @pytest.mark.parametrize("model_type", ["language_model", "value_model"])
    def test_is_built_on_the_cpu(self, process_group, model_config, model_type, forward_only):
        from verl.trainer.config import CheckpointConfig
        from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig
        from verl.workers.engine import EngineRegistry

        class Engine(EngineRegistry.get_engine_cls(model_type, "fsdp2")):
            """As another module would derive it, for a teacher for instance."""

        engine = Engine(
            model_config=dataclasses.replace(model_config, model_type=model_type, use_remove_padding=False),
            engine_config=FSDPEngineConfig(
                strategy="fsdp2",
                forward_only=forward_only,
                model_dtype="fp32",
                mixed_precision={"param_dtype": "fp32"},
                use_torch_compile=False,
            ),
            optimizer_config=FSDPOptimizerConfig(lr=1e-3, total_training_steps=1),
            checkpoint_config=CheckpointConfig(),
        )
        engine.initialize()
        assert torch.distributed.get_backend() == "gloo"
        assert {parameter.device.type for parameter in engine.module.parameters()} == {"cpu"}
        assert (engine.optimizer is None) == forward_only
        with torch.no_grad():
            output = engine.module(input_ids=torch.tensor([PROMPTS[0]]), use_cache=False).logits
        assert output.shape == (1, len(PROMPTS[0]), VOCAB if model_type == "language_model" else 1)


class TestGenerate:
    @pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
    def test_log_probs_agree_with_a_plain_forward(self, model, temperature):
        params = SamplingParams(max_tokens=6, temperature=temperature)
        results = generate_batch(model, PROMPTS, params, uniforms_for(PROMPTS, params), [])
        for prompt, (tokens, log_probs) in zip(PROMPTS, results, strict=True):
            expected = plain_log_probs(model, prompt, tokens, temperature)[range(len(tokens)), tokens]
            torch.testing.assert_close(torch.tensor(log_probs), expected, rtol=0, atol=1e-4)

    def test_greedy_equals_a_plain_argmax_loop(self, model):
        params = SamplingParams(max_tokens=6, temperature=0)
        results = generate_batch(model, PROMPTS, params, uniforms_for(PROMPTS, params), [])
        for prompt, (tokens, log_probs) in zip(PROMPTS, results, strict=True):
            expected = []
            for _ in range(params.max_tokens):
                expected.append(plain_log_probs(model, prompt, expected + [0], 1.0)[-1].argmax().item())
            assert tokens == expected
            reference = plain_log_probs(model, prompt, tokens, 1.0)[range(len(tokens)), tokens]
            torch.testing.assert_close(torch.tensor(log_probs), reference, rtol=0, atol=1e-4)

    def test_samples_follow_the_distribution(self, model):
        """The frequencies of 20,000 first tokens against the probabilities of a plain forward pass."""
        params, n = SamplingParams(max_tokens=1, temperature=1.3), 20_000
        results = generate_batch(model, [PROMPTS[0]] * n, params, uniforms_for(range(n), params), [])
        frequencies = torch.bincount(torch.tensor([tokens[0] for tokens, _ in results]), minlength=VOCAB) / n
        probabilities = plain_log_probs(model, PROMPTS[0], [0], params.temperature)[0].exp()
        standard_error = (probabilities * (1 - probabilities) / n).sqrt()
        assert ((frequencies - probabilities).abs() <= 5 * standard_error + 1e-4).all()

    @pytest.mark.parametrize("params", [SamplingParams(4, top_k=3), SamplingParams(4, top_p=0.3)], ids=["k", "p"])
    def test_top_k_and_top_p_restrict_tokens_but_not_log_probs(self, model, params):
        prompts = PROMPTS * 8
        results = generate_batch(model, prompts, params, uniforms_for(prompts, params), [])
        for prompt, (tokens, log_probs) in zip(prompts, results, strict=True):
            full = plain_log_probs(model, prompt, tokens, 1.0)
            torch.testing.assert_close(torch.tensor(log_probs), full[range(len(tokens)), tokens], rtol=0, atol=1e-4)
            more_likely = full > full[range(len(tokens)), tokens].unsqueeze(-1) + 1e-4
            if params.top_k > 0:
                assert (more_likely.sum(-1) < params.top_k).all()
            else:
                assert ((full.exp() * more_likely).sum(-1) <= params.top_p + 1e-4).all()

    def test_a_response_does_not_depend_on_its_batch(self, model):
        params = SamplingParams(max_tokens=6)
        uniforms = uniforms_for(PROMPTS, params)
        together = generate_batch(model, PROMPTS, params, uniforms, [])
        alone = [generate_batch(model, [p], params, uniforms[i : i + 1], [])[0] for i, p in enumerate(PROMPTS)]
        assert [tokens for tokens, _ in together] == [tokens for tokens, _ in alone]

    def test_a_response_ends_with_the_first_eos(self, model):
        params = SamplingParams(max_tokens=8)
        prompts = PROMPTS * 4
        uniforms = uniforms_for(prompts, params)
        endless = generate_batch(model, prompts, params, uniforms, [])
        eos = [endless[0][0][3], endless[1][0][1]]
        ended = generate_batch(model, prompts, params, uniforms, eos)
        assert any(len(tokens) < params.max_tokens for tokens, _ in ended)
        for (tokens, log_probs), (all_tokens, all_log_probs) in zip(ended, endless, strict=True):
            end = next((i for i, token in enumerate(all_tokens) if token in eos), params.max_tokens - 1) + 1
            assert tokens == all_tokens[:end]
            torch.testing.assert_close(log_probs, all_log_probs[:end], rtol=0, atol=1e-4)

    def test_generation_stops_when_all_responses_ended(self, model):
        params = SamplingParams(max_tokens=40, temperature=0)
        first = generate_batch(model, PROMPTS[:1], params, uniforms_for(PROMPTS[:1], params), [])[0][0][0]
        steps = []
        hook = model.register_forward_hook(lambda *_: steps.append(1))
        results = generate_batch(model, PROMPTS[:1], params, uniforms_for(PROMPTS[:1], params), [first])
        hook.remove()
        assert results[0][0] == [first] and len(steps) == 1


class TestSamplingParams:
    def test_reads_what_the_agent_loop_sends(self):
        sent = dict(temperature=0, top_p=1.0, top_k=-1, repetition_penalty=1.0, logprobs=True)
        assert SamplingParams.from_request(sent, max_tokens=8) == SamplingParams(8, temperature=0)
        assert SamplingParams.from_request({"max_new_tokens": 3}, max_tokens=8).max_tokens == 3

    @pytest.mark.parametrize("request_", [{"repetition_penalty": 1.1}, {"min_p": 0.1}])
    def test_refuses_what_it_would_ignore(self, request_):
        with pytest.raises(NotImplementedError):
            SamplingParams.from_request(request_, max_tokens=8)

    @pytest.mark.parametrize("request_", [{"max_tokens": 0}, {"temperature": -1}, {"top_p": 0}])
    def test_refuses_invalid_values(self, request_):
        with pytest.raises(ValueError):
            SamplingParams.from_request(request_, max_tokens=8)


def make_server(model_config):
    """The server without its Ray actor."""
    config = RolloutConfig(name="hf", prompt_length=16, response_length=6, tensor_model_parallel_size=1)
    return rollout.HFServer(config, model_config, replica_rank=0)


async def serve(model, model_config, prompts):
    """Asks for all prompts at once. Returns the set of responses to each prompt, and the sizes of the batches."""
    server = make_server(model_config)
    await server.update_weights(model.state_dict(), global_steps=3)
    sizes = []
    server.model.register_forward_hook(lambda _module, _args, output: sizes.append(len(output.logits)))
    outputs = await asyncio.gather(*(server.generate(prompt, {"logprobs": True}, "id") for prompt in prompts))
    responses = {}
    for prompt, output in zip(prompts, outputs, strict=True):
        assert len(output.log_probs) == len(output.token_ids) and output.extra_fields["global_steps"] == 3
        responses.setdefault(tuple(prompt), set()).add(tuple(output.token_ids))
    return responses, set(sizes)


class TestBatching:
    def test_groups_share_parameters_and_respect_the_limit(self):
        train, validation = SamplingParams(8), SamplingParams(8, temperature=0)
        requests = [
            rollout._Request([0] * (i % 4 + 1), validation if i % 3 == 0 else train, None, None) for i in range(20)
        ]
        batches = group_requests(requests, max_batch_size=6)
        assert sorted(id(r) for batch in batches for r in batch) == sorted(map(id, requests))
        for batch in batches:
            assert len(batch) <= 6 and len({request.params for request in batch}) == 1
            lengths = [len(request.prompt_ids) for request in batch]
            assert lengths == sorted(lengths)

    def test_concurrent_requests_share_a_batch_and_are_reproducible(self, model, model_config):
        first, sizes = asyncio.run(serve(model, model_config, PROMPTS + PROMPTS))
        again, _ = asyncio.run(serve(model, model_config, (PROMPTS + PROMPTS)[::-1]))
        assert sizes == {8}
        assert first == again
        assert any(len(responses) == 2 for responses in first.values())  # the same prompt draws anew

    def test_a_failure_reaches_every_request(self, model, model_config):
        async def ask():
            server = make_server(model_config)
            await server.update_weights(model.state_dict(), global_steps=0)
            requests = [server.generate([VOCAB], {}, "id") for _ in range(3)]  # a token the model does not have
            return await asyncio.wait_for(asyncio.gather(*requests, return_exceptions=True), timeout=10)

        assert [type(result) for result in asyncio.run(ask())] == [IndexError] * 3

    def test_nothing_is_generated_before_the_first_weights(self, model_config):
        with pytest.raises(RuntimeError, match="before it received any weights"):
            asyncio.run(make_server(model_config).generate([1], {}, "id"))

    def test_max_tokens_leave_room_for_the_prompt(self, model_config):
        server = make_server(model_config)
        assert [server._max_tokens(length) for length in (3, 16, 20)] == [6, 6, 2]
        with pytest.raises(ValueError, match="no room"):
            server._max_tokens(22)

    def test_ends_come_from_the_checkpoint(self, model_config):
        assert EOS in make_server(model_config).eos_token_ids


class TestWeights:
    def test_loads_a_full_state_dict(self, model):
        other = LlamaForCausalLM(model.config)
        load_weights(other, model.state_dict())
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], tensor, rtol=0, atol=0)

    def test_only_a_tied_copy_may_be_missing(self, model):
        weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
        with pytest.raises(ValueError, match="lm_head.weight"):
            load_weights(LlamaForCausalLM(model.config), weights)
        tied = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "tie_word_embeddings": True}))
        load_weights(tied, weights)
        torch.testing.assert_close(tied.lm_head.weight, weights["model.embed_tokens.weight"], rtol=0, atol=0)

    def test_refuses_weights_of_another_model(self, model):
        with pytest.raises(ValueError, match="unexpected"):
            load_weights(LlamaForCausalLM(model.config), {**model.state_dict(), "extra.weight": torch.zeros(1)})
