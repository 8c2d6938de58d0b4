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
"""Rollout backend ``hf``: Hugging Face ``generate`` behind VERL's rollout-server interface, for small models on a CPU.

The three classes VERL expects of a backend, and the generation itself:

- :class:`HFReplica` (driver) starts one server per training rank;
- :class:`ServerAdapter` (training rank) hands the actor's new weights to that server after every step;
- :class:`HFServer` (Ray actor) collects the requests of the agent loops and generates them in batches;
- :func:`generate_batch` is a plain function of model, prompts and uniform numbers.

Only what VERL's synchronous trainer needs is supported: text, full weights, no aborting of requests in flight.
"""

import asyncio
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any, Generator, Optional

import numpy as np
import ray
import torch
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from verl.utils.config import omega_conf_to_dataclass
from verl.utils.model import get_hf_auto_model_class
from verl.workers.config import HFModelConfig, RolloutConfig
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutMode, RolloutReplica, TokenOutput

# Requests of one training step arrive one by one; a batch starts once none has arrived for this long.
_QUIET_SECONDS = 0.02


@dataclass(frozen=True)
class SamplingParams:
    """What one ``generate`` call shares over its batch; requests are grouped by it."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1

    @classmethod
    def from_request(cls, request: dict[str, Any], max_tokens: int) -> "SamplingParams":
        """Reads the dictionary of an agent loop. ``max_tokens`` is the limit of a request that names none itself."""
        request = {key: value for key, value in request.items() if value is not None}
        request.pop("logprobs", None)
        if (penalty := request.pop("repetition_penalty", 1.0)) != 1.0:
            raise NotImplementedError(f"rollout 'hf' has no repetition penalty, got {penalty}")
        if "max_new_tokens" in request:
            request.setdefault("max_tokens", request.pop("max_new_tokens"))
        unknown = request.keys() - cls.__dataclass_fields__.keys()
        if unknown:
            raise NotImplementedError(f"rollout 'hf' does not support the sampling parameters {sorted(unknown)}")
        params = cls(**{"max_tokens": max_tokens, **request})
        if params.max_tokens < 1 or params.temperature < 0 or not 0 < params.top_p <= 1:
            raise ValueError(f"invalid sampling parameters: {params}")
        return params

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


class _Sampler(LogitsProcessor):
    """Chooses each next token itself, and leaves ``generate`` no choice but to take it.

    ``generate`` would sample from torch's global generator, so a request's tokens would depend on the batch it
    happened to share. Here each row inverts its own uniform numbers through its cumulative distribution. Seeing the
    logits and the choice together, it also records the log-probability of the token without keeping any logits:
    under ``softmax(logits / temperature)``, before top-k and top-p, which is what the actor computes too.
    """

    def __init__(self, params: SamplingParams, uniforms: torch.Tensor):
        self.params = params
        self.uniforms = uniforms  # (batch, max_tokens) float64
        self.filters = LogitsProcessorList()
        if params.top_k > 0:
            self.filters.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            self.filters.append(TopPLogitsWarper(params.top_p))
        self.log_probs: list[torch.Tensor] = []  # one (batch,) float32 a step

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """(batch, length), (batch, vocab) -> (batch, vocab): 0 at the chosen token, -inf elsewhere."""
        temperature = 1.0 if self.params.greedy else self.params.temperature
        log_probs = torch.log_softmax(scores.float() / temperature, dim=-1)
        tokens = log_probs.argmax(-1, keepdim=True) if self.params.greedy else self._sample(input_ids, log_probs)
        self.log_probs.append(log_probs.gather(-1, tokens).squeeze(-1))
        return torch.full_like(scores, -torch.inf).scatter_(-1, tokens, 0.0)

    def _sample(self, input_ids: torch.LongTensor, log_probs: torch.FloatTensor) -> torch.LongTensor:
        """(batch, vocab) log-probabilities -> (batch, 1) tokens."""
        probs = self.filters(input_ids, log_probs).softmax(-1, dtype=torch.float64)
        cumulative = probs.cumsum(-1)
        step = len(self.log_probs)
        threshold = self.uniforms[:, step : step + 1] * cumulative[:, -1:]
        # right=True steps over tokens of probability zero, whose cumulative value equals their predecessor's.
        return torch.searchsorted(cumulative, threshold, right=True).clamp_(max=probs.shape[-1] - 1)


@torch.inference_mode()
def generate_batch(
    model: PreTrainedModel,
    prompts: list[list[int]],
    params: SamplingParams,
    uniforms: torch.Tensor,
    eos_token_ids: list[int],
) -> list[tuple[list[int], list[float]]]:
    """Generates one response to each prompt.

    Args:
        model: A causal language model on the CPU.
        prompts: ``batch`` lists of token ids, of any lengths.
        params: Shared by the batch.
        uniforms: (batch, params.max_tokens) float64 in [0, 1), the randomness of each response; unused when greedy.
        eos_token_ids: A response ends with the first of these, which is part of it; empty to ignore ends.

    Returns:
        For each prompt the token ids of the response and, for each of them, its log-probability.
    """
    longest = max(map(len, prompts))
    input_ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, longest - len(prompt) :] = 1

    sampler = _Sampler(params, uniforms)
    sequences = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        generation_config=GenerationConfig(
            max_new_tokens=params.max_tokens,
            do_sample=False,
            eos_token_id=eos_token_ids or None,
            pad_token_id=0,  # masked before the prompt, cut off after the end
        ),
        logits_processor=LogitsProcessorList([sampler]),
    )
    responses = sequences[:, longest:].tolist()
    log_probs = torch.stack(sampler.log_probs, dim=-1).tolist()
    lengths = [_response_length(response, set(eos_token_ids)) for response in responses]
    return [(tokens[:n], lps[:n]) for tokens, lps, n in zip(responses, log_probs, lengths, strict=True)]


def _response_length(tokens: list[int], eos_token_ids: set[int]) -> int:
    """Number of tokens up to and including the first end."""
    return next((i + 1 for i, token in enumerate(tokens) if token in eos_token_ids), len(tokens))


@dataclass
class _Request:
    prompt_ids: list[int]
    params: SamplingParams
    uniforms: np.ndarray  # (max_tokens,) float64
    result: asyncio.Future  # of (token ids, log-probs)


def group_requests(requests: list[_Request], max_batch_size: int) -> list[list[_Request]]:
    """Batches that share their sampling parameters, prompts of similar length together so that little is padding."""
    by_params = defaultdict(list)
    for request in requests:
        by_params[request.params].append(request)
    batches = []
    for group in by_params.values():
        group.sort(key=lambda request: len(request.prompt_ids))
        batches += [group[i : i + max_batch_size] for i in range(0, len(group), max_batch_size)]
    return batches


class HFServer:
    """Ray actor that generates for all agent loops, many requests at a time.

    A request's tokens depend on ``rollout.seed``, the replica, the step of the weights, the prompt, and how many times
    this prompt was asked for under these weights; not on the requests it is batched with. With one replica, the set of
    responses a step draws for a prompt is therefore reproducible (up to rounding, which padding can move), although
    requests arrive in any order. With several replicas VERL's load balancer decides who serves what by timing.
    """

    def __init__(self, config: RolloutConfig, model_config: HFModelConfig, replica_rank: int):
        self.config = config
        self.replica_rank = replica_rank
        self.model = _build_model(model_config)
        self.eos_token_ids = [] if config.ignore_eos else _eos_token_ids(model_config)
        self.max_length = config.max_model_len or model_config.hf_config.max_position_embeddings
        self.global_steps: Optional[int] = None  # None until the first weights arrive
        self.times_asked: Counter = Counter()
        self.waiting: list[_Request] = []
        self.model_lock = asyncio.Lock()  # one batch at a time, and no new weights in the middle of one
        self.batching: Optional[asyncio.Task] = None

    async def generate(
        self,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        request_id: str,
        image_data: Optional[list[Any]] = None,
        video_data: Optional[list[Any]] = None,
    ) -> TokenOutput:
        """Token in, token out: VERL's rollout-server interface."""
        if image_data or video_data:
            raise NotImplementedError("rollout 'hf' generates from text only")
        if self.global_steps is None:
            raise RuntimeError("rollout 'hf' was asked to generate before it received any weights")
        prompt_ids = list(prompt_ids)
        params = SamplingParams.from_request(sampling_params, self._max_tokens(len(prompt_ids)))
        request = _Request(prompt_ids, params, self._draw_uniforms(prompt_ids, params), asyncio.Future())
        self.waiting.append(request)
        if self.batching is None or self.batching.done():
            self.batching = asyncio.create_task(self._generate_waiting())

        global_steps = self.global_steps
        token_ids, log_probs = await request.result
        return TokenOutput(
            token_ids=token_ids,
            log_probs=log_probs if sampling_params.get("logprobs") else None,
            stop_reason="completed",
            extra_fields={"global_steps": global_steps},
        )

    def _max_tokens(self, prompt_length: int) -> int:
        """What VERL's servers allow a request that sets no limit: the response length, within the model's context."""
        budget = self.config.prompt_length + self.config.response_length - prompt_length
        max_tokens = min(self.config.response_length, budget, self.max_length - prompt_length)
        if max_tokens < 1:
            raise ValueError(f"a prompt of {prompt_length} tokens leaves no room for a response")
        return max_tokens

    def _draw_uniforms(self, prompt_ids: list[int], params: SamplingParams) -> np.ndarray:
        """(max_tokens,) float64 in [0, 1), as documented on the class."""
        times_asked = self.times_asked[tuple(prompt_ids)]
        self.times_asked[tuple(prompt_ids)] += 1
        seed = [self.config.seed, self.replica_rank, self.global_steps, times_asked, *prompt_ids]
        return np.random.default_rng(seed).random(params.max_tokens)

    async def _generate_waiting(self) -> None:
        """Generates until nobody waits. Requests that arrive meanwhile form the next batches."""
        while self.waiting:
            await self._wait_for_quiet()
            requests, self.waiting = self.waiting, []
            for batch in group_requests(requests, self.config.max_num_seqs):
                await self._generate_and_answer(batch)

    async def _wait_for_quiet(self) -> None:
        seen = 0
        while len(self.waiting) > seen:
            seen = len(self.waiting)
            await asyncio.sleep(_QUIET_SECONDS)

    async def _generate_and_answer(self, batch: list[_Request]) -> None:
        prompts = [request.prompt_ids for request in batch]
        uniforms = torch.from_numpy(np.stack([request.uniforms for request in batch]))
        try:
            async with self.model_lock:
                results = await asyncio.to_thread(
                    generate_batch, self.model, prompts, batch[0].params, uniforms, self.eos_token_ids
                )
        except Exception as error:
            for request in batch:
                request.result.set_exception(error)
            return
        for request, result in zip(batch, results, strict=True):
            request.result.set_result(result)

    async def update_weights(self, weights: dict[str, torch.Tensor], global_steps: Optional[int]) -> None:
        """Takes over the actor's full state dict."""
        async with self.model_lock:
            load_weights(self.model, weights)
            self.global_steps = global_steps or 0
            self.times_asked.clear()


def _build_model(model_config: HFModelConfig) -> PreTrainedModel:
    """The model with random weights, in float32; the actor's arrive before the first request."""
    auto_class = get_hf_auto_model_class(hf_config=model_config.hf_config)
    model = auto_class.from_config(model_config.hf_config, trust_remote_code=model_config.trust_remote_code)
    # ``generate`` fills what a request leaves open from here: a checkpoint's own temperature, top-k, penalties.
    model.generation_config = GenerationConfig()
    return model.float().eval()


def _eos_token_ids(model_config: HFModelConfig) -> list[int]:
    """The ends known to the tokenizer and to the checkpoint's generation config."""
    ids = {model_config.tokenizer.eos_token_id}
    if model_config.generation_config is not None:
        configured = model_config.generation_config.eos_token_id
        ids.update(configured if isinstance(configured, list) else [configured])
    return sorted(ids - {None})


def load_weights(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> None:
    """Loads a full state dict, in which only tied copies may be missing."""
    result = model.load_state_dict(weights, strict=False)
    tied = set(model.all_tied_weights_keys)
    missing = [name for name in result.missing_keys if name not in tied]
    if missing or result.unexpected_keys:
        raise ValueError(f"weights do not fit the model: {missing=}, unexpected={result.unexpected_keys}")


def _server_name(replica_rank: int) -> str:
    return f"hf_server_{replica_rank}"


class ServerAdapter(BaseRollout):
    """The training rank's side: sends new weights to its replica's server."""

    def __init__(self, config, model_config, device_mesh, replica_rank: int = -1):
        super().__init__(config, model_config, device_mesh)
        self.replica_rank = torch.distributed.get_rank() if replica_rank == -1 else replica_rank

    async def resume(self, tags: list[str]) -> None:
        """Nothing was released: trainer and server each keep their own copy of a small model."""

    async def release(self) -> None:
        """Nothing to release, see :meth:`resume`."""

    async def update_weights(
        self,
        weights: Generator[tuple[str, torch.Tensor], None, None],
        wire_format: str = "named_tensors",
        global_steps: Optional[int] = None,
        peft_config: Optional[dict] = None,
        **kwargs,
    ) -> None:
        """Args: see :class:`BaseRollout`. All ranks must call it, since the generator gathers sharded tensors."""
        if wire_format != "named_tensors" or peft_config is not None:
            raise NotImplementedError("rollout 'hf' takes full weights only; with LoRA, set model.lora.merge=True")
        server = ray.get_actor(_server_name(self.replica_rank))
        # .cpu(): the trainer may sit on an accelerator, the server never does.
        await server.update_weights.remote({name: tensor.detach().cpu() for name, tensor in weights}, global_steps)


class HFReplica(RolloutReplica):
    """One server for one training rank. It never gives up its memory, so sleeping and waking have nothing to do."""

    async def launch_servers(self) -> None:
        if self.rollout_mode != RolloutMode.HYBRID:
            raise NotImplementedError("rollout 'hf' only serves the policy being trained (hybrid mode)")
        if self.world_size != 1:
            raise ValueError(
                "rollout 'hf' does not split a model: set rollout.tensor_model_parallel_size, data_parallel_size and "
                f"pipeline_model_parallel_size to 1, got {self.world_size} ranks per replica"
            )
        node_id = await self.workers[0].__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())
        server: ActorHandle = (
            ray.remote(HFServer)
            .options(
                name=_server_name(self.replica_rank),
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node_id, soft=False),
                max_concurrency=self.max_concurrency,
            )
            .remote(self.config, omega_conf_to_dataclass(self.model_config), self.replica_rank)
        )
        self.servers = [server]
        self._server_handle = server
        self._server_address = _server_name(self.replica_rank)  # a name for the load balancer; there is no HTTP

    async def sleep(self) -> None:
        return None

    async def wake_up(self) -> None:
        return None

    async def clear_kv_cache(self) -> None:
        return None

    async def release_kv_cache(self) -> None:
        return None

    async def resume_kv_cache(self) -> None:
        return None

    async def abort_all_requests(self, reject_request: bool = False) -> None:
        raise NotImplementedError("rollout 'hf' cannot abort requests: use trainer.v1.trainer_mode=sync")

    async def resume_generation(self) -> None:
        raise NotImplementedError("rollout 'hf' cannot abort requests: use trainer.v1.trainer_mode=sync")
