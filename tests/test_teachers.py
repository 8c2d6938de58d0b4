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
"""Several teachers on VERL's real workers and FSDP2 engine, against a direct float64 Hugging Face computation.

As test_engine.py, whose pieces are used. Which teacher speaks for a sample, and with what weight, is written out again.
"""

import pytest
import torch
from test_buckets import bucketed
from test_engine import (
    HYBRID,
    LOSS,
    MICRO,
    PURE,
    by_sequences,
    divergence,
    make_batch,
    response_logits,
    run_workers,
    sharpened,
)
from transformers import AutoModelForCausalLM

from verl.on_policy_distillation.plan import payload_bytes

NAMES = ("maths", "code", "chat")
ROUTED = ("teacher.routing_key=data_source",)
GKD = (f"{LOSS}.distillation_type=gkd", f"{LOSS}.distillation_beta=0.3", f"{LOSS}.distillation_temperature=1.7")
TOP_K = ("teacher.payload=topk", "teacher.topk=7")
WEIGHTS = ("+teacher.models.maths.weight=1", "+teacher.models.code.weight=3", "+teacher.models.chat.weight=0.5")


def the_route(row):
    return {row["data_source"]: 1.0}


def the_weights(row):
    return {"maths": 1 / 4.5, "code": 3 / 4.5, "chat": 0.5 / 4.5}


def two_on_a_route(row):
    return {"maths": 0.25, "code": 0.75} if row["data_source"] == "maths" else {"chat": 1.0}


def its_own(row):
    return {name: weight / sum(row["weights"].values()) for name, weight in row["weights"].items()}


# name: (overrides, weights of a sample's teachers, (divergence, beta, temperature))
PLAIN, TEMPERED = ("reverse_kl", 1.0, 1.0), ("gkd", 0.3, 1.7)
CASES = {
    "equal": ((PURE, f"{MICRO}=4"), lambda row: dict.fromkeys(NAMES, 1 / 3), PLAIN),
    "mixture": ((PURE, f"{MICRO}=4", *WEIGHTS, *GKD), the_weights, TEMPERED),
    "mixture_micro_batch_1": ((PURE, f"{MICRO}=1", *by_sequences(1), *WEIGHTS, *GKD), the_weights, TEMPERED),
    "mixture_of_logits": ((PURE, f"{MICRO}=4", *WEIGHTS, *GKD, "teacher.payload=logits"), the_weights, TEMPERED),
    "mixture_hybrid": ((HYBRID, f"{MICRO}=4", f"{LOSS}.hybrid_lambda_rl=0", *WEIGHTS, *GKD), the_weights, TEMPERED),
    "routed": ((PURE, f"{MICRO}=4", *ROUTED), the_route, PLAIN),
    "routed_micro_batch_2": ((PURE, f"{MICRO}=2", *by_sequences(2), *ROUTED), the_route, PLAIN),
    "routed_dynamic": (
        (
            PURE,
            *ROUTED,
            "actor_rollout_ref.actor.use_dynamic_bsz=True",
            "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16",
            "teacher.max_token_len_per_gpu=16",
        ),
        the_route,
        PLAIN,
    ),
    "routed_hybrid": ((HYBRID, f"{MICRO}=4", f"{LOSS}.hybrid_lambda_rl=0", *ROUTED, *GKD), the_route, TEMPERED),
    "both": (
        (
            PURE,
            f"{MICRO}=4",
            *by_sequences(4),
            *ROUTED,
            *GKD,
            "+teacher.models.code.route=maths",
            "+teacher.models.code.weight=3",
        ),
        two_on_a_route,
        TEMPERED,
    ),
    "top_k": ((PURE, f"{MICRO}=4", *GKD, *TOP_K), lambda row: dict.fromkeys(NAMES, 1 / 3), TEMPERED),
    "routed_top_k": ((HYBRID, f"{MICRO}=4", f"{LOSS}.hybrid_lambda_rl=0", *ROUTED, *TOP_K), the_route, PLAIN),
    "sample_weights": ((PURE, f"{MICRO}=4", "teacher.weights_key=weights", *GKD), its_own, TEMPERED),
}
TWO_RANKS = ("top_k", "routed_top_k", "mixture", "routed", "routed_dynamic", "both", "routed_hybrid", "sample_weights")


def make_rows():
    rows = make_batch(seed=5)
    # With two ranks, the second has no sample of "chat"; and nobody asks "code" with its own name in "both".
    sources = ("chat", "maths", "maths", "maths", "chat", "maths", "chat", "maths")
    weights = ({"maths": 2.0}, {"maths": 1.0, "chat": 1.0}, {"code": 0.5, "chat": 1.5}, {"maths": 1.0, "code": 2.0})
    for index, row in enumerate(rows):
        row["data_source"], row["weights"] = sources[index], weights[index % 4]
    return rows


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "student": sharpened(folder / "student", hidden=32, layers=2, seed=1),
        "maths": sharpened(folder / "maths", hidden=64, layers=1, seed=2),
        "code": sharpened(folder / "code", hidden=32, layers=1, tied=True, seed=3),
        "chat": sharpened(folder / "chat", hidden=48, layers=1, vocab_size=320, seed=5),  # padded for its devices
    }


@pytest.fixture(scope="module")
def batch():
    return make_rows()


def results_of(checkpoints, batch, folder, names, ranks):
    models = [f"+teacher.models.{name}.path={checkpoints[name]}" for name in NAMES]
    student = f"actor_rollout_ref.model.path={checkpoints['student']}"
    cases = {name: [*CASES[name][0], student, *models] for name in names}
    return run_workers(folder, f"ranks{ranks}", cases, batch, world_size=ranks)


@pytest.fixture(scope="module")
def one_rank(checkpoints, batch, tmp_path_factory):
    return results_of(checkpoints, batch, tmp_path_factory.mktemp("one"), CASES, 1)


@pytest.fixture(scope="module")
def two_ranks(checkpoints, batch, tmp_path_factory):
    return results_of(checkpoints, batch, tmp_path_factory.mktemp("two"), TWO_RANKS, 2)


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").double().eval()


@pytest.fixture(scope="module")
def reference(checkpoints, batch):
    """Of a case: the loss, the gradients, and each teacher's (share of the tokens, mean KL), float64."""
    models = {name: load(path) for name, path in checkpoints.items()}
    vocab = 258  # the student's, and the least

    def direct(name):
        _, weights_of, (kind, beta, temperature) = CASES[name]
        student = models["student"]
        student.zero_grad()
        losses, kls = [], {teacher: [] for teacher in NAMES}
        for row in batch:
            logits, mask = response_logits(student, row), torch.tensor(row["mask"]) != 0
            mixture = 0
            for teacher, weight in weights_of(row).items():
                with torch.no_grad():
                    target = response_logits(models[teacher], row)[:, :vocab]
                mixture = mixture + weight * torch.softmax(target / temperature, -1)
                kls[teacher].append(divergence(logits.detach(), target, "reverse_kl", 1.0, temperature)[mask])
            sides = logits, temperature * mixture.log()
            if "top_k" in name:
                ids = mixture.topk(7).indices
                sides = [temperature * bucketed(side, ids, temperature) for side in sides]
            losses.append(divergence(*sides, kind, beta, temperature)[mask])
        loss = torch.cat(losses).mean()
        loss.backward()
        tokens = {teacher: torch.cat(found) if found else torch.empty(0) for teacher, found in kls.items()}
        count = len(torch.cat(losses))
        teachers = {name: (len(kl) / count, kl.sum().item() / count) for name, kl in tokens.items()}
        return loss.item(), {name: p.grad.clone() for name, p in student.named_parameters()}, teachers

    return {name: direct(name) for name in CASES}


def assert_is(result, expected):
    loss, gradients, teachers = expected
    metrics = {name: value for name, value in result["metrics"].items()}
    assert metrics["distillation/loss"] == pytest.approx(loss, rel=2e-5)
    assert gradients.keys() == result["gradients"].keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(result["gradients"][name].double(), gradient, rtol=2e-4, atol=2e-6, msg=name)
    for name, (share, kl) in teachers.items() if f"distillation/{NAMES[0]}/kl" in metrics else ():
        assert metrics[f"distillation/{name}/share"] == pytest.approx(share, rel=1e-6, abs=1e-9)
        assert metrics[f"distillation/{name}/kl"] == pytest.approx(kl, rel=2e-5, abs=1e-9)


def test_each_teacher_has_its_metrics_unless_only_a_top_k_of_the_mixture_is_kept(one_rank, two_ranks):
    for name, result in [*one_rank.items(), *two_ranks.items()]:
        found = {f"distillation/{teacher}/{key}" for teacher in NAMES for key in ("kl", "share")}
        assert found.isdisjoint(result["metrics"]) if "top_k" in name else found <= result["metrics"].keys()


def test_a_top_k_is_as_large_as_it_says(one_rank, batch):
    tokens = sum(sum(row["mask"]) for row in batch)
    token = 7 * 4 + 8 * 4  # int32 ids, and the log-probs of these and of the rest
    assert one_rank["top_k"]["payload"][-1] == tokens * token
    assert token == payload_bytes("topk", width=64, vocab=258, topk=7)  # what the planner counts with


@pytest.mark.parametrize("name", CASES)
def test_the_mixture_that_a_sample_asks_for_on_one_rank(name, one_rank, reference):
    assert_is(one_rank[name], reference[name])


@pytest.mark.parametrize("name", TWO_RANKS)
def test_the_mixture_that_a_sample_asks_for_on_two_ranks(name, two_ranks, reference):
    assert_is(two_ranks[name], reference[name])
