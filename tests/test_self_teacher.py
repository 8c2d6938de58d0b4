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
"""The student as its own teacher on VERL's real workers and FSDP2 engine, against float64 Hugging Face computations.

The "updates" of self_process.py multiply all weights by a constant, so what any teacher has after each is known.
"""

import pytest
import torch
from self_process import FAILS, GROWTH, STEP, UPDATES
from test_engine import LORA, LOSS, MICRO, PURE, divergence, make_batch, response_logits, run_workers, sharpened
from test_routing import config_of
from transformers import AutoModelForCausalLM

from verl.on_policy_distillation.checks import validate
from verl.on_policy_distillation.self_teacher import Moving, ShadowWeights

SELF = (PURE, f"{MICRO}=2", "teacher.model.path=self")
HYBRID = (f"{LOSS}.loss_mode=hybrid_rl_distillation", f"{LOSS}.hybrid_lambda_rl=0")
EMA, REFRESH = "teacher.ema=0.9", "teacher.refresh_freq=2"
SCALE = 8 / 4  # of LORA: alpha / rank


def frozen(student):
    return [1.0] * UPDATES


def averaged(student):
    values, value = [], 1.0 if student[0] > 1 else 0.0
    for current in student:
        value = 0.9 * value + 0.1 * current
        values.append(value)
    return values


def refreshed(student):
    return [1.0, student[1], student[1]]


# name: (overrides, checkpoint, what the teacher's weights are after each update, in units of the initial student's)
CASES = {
    "frozen": ((*SELF, FAILS), "student", frozen),
    "packed": ((*SELF, "actor_rollout_ref.model.use_remove_padding=True"), "student", frozen),
    "offloaded": ((*SELF, "actor_rollout_ref.actor.fsdp_config.param_offload=True"), "student", frozen),
    "tied": (SELF, "tied", frozen),
    "hybrid": ((*SELF, *HYBRID), "student", frozen),
    "ema": ((*SELF, EMA, FAILS), "student", averaged),
    "refreshed": ((*SELF, REFRESH), "student", refreshed),
    "top_k": ((*SELF, "teacher.payload=topk", "teacher.topk=258"), "student", frozen),
}
LORA_CASES = {
    "lora": ((*SELF, *LORA), lambda student: [0.0] * UPDATES),
    "lora_hybrid": ((*SELF, *LORA, *HYBRID), lambda student: [0.0] * UPDATES),
    "lora_ema": ((*SELF, *LORA, EMA), averaged),
    "lora_top_k": ((*SELF, *LORA, "teacher.payload=topk", "teacher.topk=258"), lambda student: [0.0] * UPDATES),
}
TWO_RANKS = ("frozen", "ema", "tied", "lora", "lora_ema")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "student": sharpened(folder / "student", hidden=32, layers=2, seed=1),
        "tied": sharpened(folder / "tied", hidden=32, layers=1, tied=True, seed=3),
    }


@pytest.fixture(scope="module")
def batch():
    return make_batch(seed=7)


def results_of(checkpoints, batch, folder, ranks, names):
    cases = {name: (case[0], checkpoints[case[1]]) for name, case in CASES.items()}
    cases |= {name: (case[0], checkpoints["student"]) for name, case in LORA_CASES.items()}
    cases = {name: [*cases[name][0], f"actor_rollout_ref.model.path={cases[name][1]}"] for name in names}
    return run_workers(folder, "self", cases, batch, world_size=ranks, script="self_process.py")


@pytest.fixture(scope="module")
def one_rank(checkpoints, batch, tmp_path_factory):
    return results_of(checkpoints, batch, tmp_path_factory.mktemp("one"), 1, [*CASES, *LORA_CASES])


@pytest.fixture(scope="module")
def two_ranks(checkpoints, batch, tmp_path_factory):
    return results_of(checkpoints, batch, tmp_path_factory.mktemp("two"), 2, TWO_RANKS)


def scaled(path, factor):
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


def supervised_logits(model, rows):
    found = [response_logits(model, row)[torch.tensor(row["mask"]) != 0] for row in rows]
    return torch.cat(found)


def assert_said(said, expected, case):
    """As distributions: a top-k of all entries has lost the common offset."""
    if "top_k" in case:
        said, expected = said.log_softmax(-1), expected.log_softmax(-1)
    torch.testing.assert_close(said.double(), expected, rtol=2e-4, atol=2e-4)


def check(name, result, checkpoints, batch, ranks):
    _, path, teacher_of = CASES[name]
    student = [GROWTH**number for number in range(1, UPDATES + 1)]
    for number, factor in enumerate(teacher_of(student)):
        with torch.no_grad():
            expected = supervised_logits(scaled(checkpoints[path], factor), batch[0::ranks])
        assert_said(result["said"][number], expected, name)
    model = scaled(checkpoints[path], student[-1])
    with torch.no_grad():
        target = supervised_logits(scaled(checkpoints[path], teacher_of(student)[-1]), batch)
    loss = divergence(supervised_logits(model, batch), target, "reverse_kl", 1.0, 1.0).mean()
    loss.backward()
    if ranks == 1:
        assert result["losses"][-1] == pytest.approx(loss.item(), rel=1e-3)
    gradients = dict(model.named_parameters())
    assert gradients.keys() == result["gradients"].keys()
    for parameter, gradient in result["gradients"].items():
        torch.testing.assert_close(gradient.double(), gradients[parameter].grad, rtol=2e-3, atol=2e-5, msg=parameter)


@pytest.mark.parametrize("name", CASES)
def test_the_teacher_has_the_weights_it_should_on_one_rank(name, one_rank, checkpoints, batch):
    check(name, one_rank[name], checkpoints, batch, 1)


@pytest.mark.parametrize("name", [name for name in TWO_RANKS if name in CASES])
def test_the_teacher_has_the_weights_it_should_on_two_ranks(name, two_ranks, checkpoints, batch):
    check(name, two_ranks[name], checkpoints, batch, 2)


def check_lora(name, result, checkpoints, batch, ranks):
    """The base, with the adapter B A of the teacher's B merged into it."""
    student = [STEP * number for number in range(1, UPDATES + 1)]
    for number, filling in enumerate(LORA_CASES[name][1](student)):
        model = scaled(checkpoints["student"], 1.0)
        weights = dict(model.named_parameters())
        with torch.no_grad():
            for adapter, a in result["adapters"].items():
                if ".lora_A" not in adapter:
                    continue
                target = adapter.removeprefix("base_model.model.").split(".lora_A")[0] + ".weight"
                b = torch.full((weights[target].shape[0], a.shape[0]), filling, dtype=torch.float64)
                weights[target].add_(SCALE * b @ a.double())
            expected = supervised_logits(model, batch[0::ranks])
        assert_said(result["said"][number], expected, name)


@pytest.mark.parametrize("name", ["lora", "lora_hybrid"])
def test_with_lora_the_student_learns_from_its_base(name, one_rank, checkpoints, batch):
    """Of the adapters' gradients: those of the second matrix, from those of the merged weight."""
    result, model = one_rank[name], scaled(checkpoints["student"], 1.0)
    with torch.no_grad():
        target = supervised_logits(model, batch)
        weights, merged = dict(model.named_parameters()), {}
        for adapter, a in result["adapters"].items():
            if ".lora_A" in adapter:
                weight = adapter.removeprefix("base_model.model.").split(".lora_A")[0] + ".weight"
                merged[weight] = adapter, a.double()
                b = torch.full((weights[weight].shape[0], a.shape[0]), STEP * UPDATES, dtype=torch.float64)
                weights[weight].add_(SCALE * b @ a.double())
    loss = divergence(supervised_logits(model, batch), target, "reverse_kl", 1.0, 1.0).mean()
    loss.backward()
    assert result["losses"][-1] == pytest.approx(loss.item(), rel=1e-3)
    for weight, (adapter, a) in merged.items():
        found = result["gradients"][adapter.replace("lora_A", "lora_B")].double()
        torch.testing.assert_close(found, SCALE * weights[weight].grad @ a.T, rtol=2e-3, atol=2e-5, msg=weight)


@pytest.mark.parametrize("name", LORA_CASES)
def test_with_lora_the_teacher_is_the_base_or_follows_the_adapter_on_one_rank(name, one_rank, checkpoints, batch):
    check_lora(name, one_rank[name], checkpoints, batch, 1)


@pytest.mark.parametrize("name", [name for name in TWO_RANKS if name in LORA_CASES])
def test_with_lora_the_teacher_is_the_base_or_follows_the_adapter_on_two_ranks(name, two_ranks, checkpoints, batch):
    check_lora(name, two_ranks[name], checkpoints, batch, 2)


def test_scoring_leaves_the_student_bit_for_bit_also_when_it_fails(one_rank, two_ranks):
    for results in (one_rank, two_ranks):
        assert all(all(result["same"]) for result in results.values())


def test_what_is_kept_beside_the_student_s_weights(one_rank, two_ranks, checkpoints):
    """Nothing for a base, the adapters for a moving one, one copy of the weights otherwise: each rank its shards."""
    whole = sum(4 * parameter.numel() for parameter in scaled(checkpoints["student"], 1.0).parameters())
    adapters = sum(4 * value.numel() for value in one_rank["lora"]["adapters"].values())
    assert one_rank["lora"]["shadow_bytes"] == one_rank["lora_top_k"]["shadow_bytes"] == 0
    assert one_rank["lora_ema"]["shadow_bytes"] == adapters < whole / 5
    assert one_rank["frozen"]["shadow_bytes"] == one_rank["ema"]["shadow_bytes"] == whole
    assert whole / 2 <= two_ranks["frozen"]["shadow_bytes"] <= 0.51 * whole


def test_a_moving_teacher_is_saved_and_resumed_with_the_run_and_a_frozen_one_needs_no_file(one_rank, two_ranks):
    for ranks, results in ((1, one_rank), (2, two_ranks)):
        for name, result in results.items():
            is_moving = name in ("ema", "refreshed", "lora_ema")
            files = [f"teacher_world_size_{ranks}_rank_{rank}.pt" for rank in range(ranks)]
            resumed = dict(result["resumed"])
            refusal = resumed.pop("refusal")
            assert resumed == {"files": files if is_moving else [], "same": True}, name
            assert ("has the moving teachers []" in refusal) == is_moving and refusal, name


def test_a_checkpoint_of_another_model_is_an_error():
    weights = ShadowWeights(torch.nn.Linear(2, 3))
    with pytest.raises(RuntimeError, match="another model or number of ranks"):
        weights.load_state_dict(ShadowWeights(torch.nn.Linear(2, 4)).state_dict())


def test_an_exchange_that_fails_half_way_is_undone(monkeypatch):
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    weights = ShadowWeights(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2.0)
    before = [parameter.clone() for parameter in module.parameters()]
    shards = ShadowWeights._shards

    def some(self):
        for number, shard in enumerate(shards(self)):
            if number == 2 and some.fails:
                some.fails = False
                raise RuntimeError("out of memory")
            yield shard

    some.fails = True
    monkeypatch.setattr(ShadowWeights, "_shards", some)
    with pytest.raises(RuntimeError, match="out of memory"), weights.in_place():
        pytest.fail("it has no weights in place")
    assert not some.fails and all(map(torch.equal, module.parameters(), before))


def test_an_average_keeps_tiny_steps():
    """A thousand steps of a few 1e-6 in float32, against float64; 16 bits would keep none of them."""
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(module.weight, 1.0)
    weights, expected = ShadowWeights(module), 1.0
    for number in range(1, 1001):
        with torch.no_grad():
            module.weight.fill_(1.0 + 1e-5 * number)
        weights.follow(Moving(ema=0.99))
        expected = 0.99 * expected + 0.01 * (1.0 + 1e-5 * number)
    assert weights.state_dict()["values"]["weight"].item() == pytest.approx(expected, abs=1e-5)


@pytest.fixture(scope="module")
def paths(checkpoints):
    return {"student": checkpoints["student"]}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["teacher.payload=logits"], "teacher.payload=logits with teacher.model.path=self"),
        (["teacher.ema=1.5"], "teacher.ema=1.5: set it between 0 and 1"),
        (["teacher.ema=0"], "teacher.ema=0: set it between 0 and 1"),
        (["teacher.refresh_freq=0"], "teacher.refresh_freq=0: set it to a whole number"),
        (["teacher.refresh_freq=1.5"], "teacher.refresh_freq=1.5: set it to a whole number"),
        (["teacher.ema=0.9", "teacher.refresh_freq=2"], "leave one of them out"),
        (["actor_rollout_ref.actor.strategy=fsdp"], "strategy=fsdp with teacher.model.path=self"),
        (
            ["teacher.ema=0.9", "actor_rollout_ref.actor.fsdp_config.model_dtype=bfloat16"],
            "teacher.ema=0.9 with actor_rollout_ref.actor.fsdp_config.model_dtype=bfloat16",
        ),
        (
            ["teacher.ema=0.9", "actor_rollout_ref.actor.fsdp_config.model_dtype=bogus"],
            "actor_rollout_ref.actor.fsdp_config.model_dtype=bogus is not a dtype",
        ),
        (["actor_rollout_ref.model.lora_adapter_path=x"], "lora_adapter_path=x with lora_rank=0"),
        (["+teacher.models.a.weight=1", "+teacher.models.b.weight=2"], "2 teachers have path=self"),
    ],
)
def test_what_does_not_go_with_it_is_refused(paths, overrides, said):
    validate(config_of(paths, "teacher.model.path=self"))
    with pytest.raises(ValueError, match=said):
        validate(config_of(paths, "teacher.model.path=self", *overrides))


@pytest.mark.parametrize("moving", ["teacher.ema=0.9", "teacher.refresh_freq=2"])
def test_a_teacher_of_its_own_does_not_move(paths, moving):
    with pytest.raises(ValueError, match="moves a teacher that is the student: set teacher.model.path=self"):
        validate(config_of(paths, f"teacher.model.path={paths['student']}", moving))
