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
"""The planner: against real models, a real scoring, and measured memory; and its advice against itself."""

import json
import logging
import os
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from arithmetic import tiny_model
from peft import LoraConfig, get_peft_model
from test_checks import make_config
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from verl.on_policy_distillation import memory
from verl.on_policy_distillation.checks import prepare
from verl.on_policy_distillation.divergence import CHUNK_ELEMENTS, chunks
from verl.on_policy_distillation.plan import (
    GIB,
    KEYS,
    Model,
    Settings,
    advise,
    main,
    model_of,
    payload_bytes,
    plan,
    read_model,
)
from verl.on_policy_distillation.roofline import ACCELERATORS, Chunking, buffer_bytes, chunking_for

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
PURE = "actor_rollout_ref.actor.policy_loss.loss_mode=on_policy_distillation"
H100 = ACCELERATORS["H100"]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
# About the sizes of Qwen3-1.7B and Qwen3-32B.
STUDENT = Model("student", 1_720_000_000, 1_720_000_000, 50_000_000, 1_200_000, 28, 2048, 151_936, 2048, True)
TEACHER = Model("teacher", 32_800_000_000, 32_800_000_000, 488_000_000, 1, 64, 5120, 151_936, 2048, False)
SETTINGS = Settings(
    devices=8,
    devices_per_node=8,
    batch=256,
    rollouts=4,
    prompt=1024,
    response=8192,
    micro_tokens=16_384,
    teacher_tokens=65_536,
    host_memory=1000.0 * GIB,
)


# ----------------------------------------------------------------------------------------------------------------------
# against what is real


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_model(tied, tmp_path):
    config = LlamaConfig(vocab_size=99, num_key_value_heads=2, tie_word_embeddings=tied, **SIZES)
    model = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        sizes = read_model(str(path))
        assert sizes.parameters == sizes.active == sum(p.numel() for p in model.parameters())
        assert sizes.largest_layer == sum(p.numel() for p in model.model.layers[0].parameters())
        assert sizes.head == model.lm_head.weight.numel()
        assert (sizes.layers, sizes.width, sizes.vocab, sizes.cache_width) == (3, 32, 99, 2 * 2 * 8)
        assert sizes.is_tied is tied


def test_an_adapter_has_the_parameters_that_peft_gives_it():
    model = AutoModelForCausalLM.from_config(config := LlamaConfig(vocab_size=99, num_key_value_heads=2, **SIZES))
    adapted = get_peft_model(model, LoraConfig(r=5, target_modules="all-linear"))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert model_of(config, "").adapter * 5 == trained


def test_a_token_goes_through_the_experts_that_are_chosen():
    config = MixtralConfig(vocab_size=99, num_key_value_heads=2, num_local_experts=6, num_experts_per_tok=2, **SIZES)
    sizes = model_of(config, "")
    idle = 3 * 4 * 3 * 32 * 48  # layers, experts that are not chosen, three matrices of each
    assert sizes.active == sizes.parameters - idle


def test_bytes_of_a_token():
    """Those of real scorings are compared in test_engine.py and test_teachers.py."""
    assert payload_bytes("hidden_states", 5120, 151_936, 0) == 2 * 5120
    assert payload_bytes("hidden_states", 5120, 151_936, 0, 4) == 4 * 5120
    assert payload_bytes("logits", 5120, 151_936, 0, 4) == 4 * 151_936
    assert payload_bytes("topk", 5120, 151_936, 64) == 64 * 4 + 65 * 4


def test_the_heads_buffers_are_what_a_process_was_measured_to_take():
    """Within a fifth: blocks of the cache, per-token results and the allocator come on top of the two sides' logits."""
    results = json.loads((RESULTS / "linear_divergence_cpu.json").read_text())
    vocab = results["sizes"]["vocab"]
    rows = [row for row in results["rows"] if row["implementation"] == "ours"]
    assert rows
    for row in rows:
        chunk = next(iter(chunks(row["n"], vocab, CHUNK_ELEMENTS))).stop
        predicted = buffer_bytes(vocab, Chunking(chunk, chunk), weight_bytes=4)
        assert all(predicted <= measured <= 1.2 * predicted for measured in row["extra_bytes"])


# ----------------------------------------------------------------------------------------------------------------------
# the phases


def parts(settings, place, name, teachers=(TEACHER,), student=STUDENT):
    phases = plan(student, teachers, settings, H100).phases
    return next(phase for phase in phases if (phase.place, phase.name) == (place, name)).parts


def test_at_the_start_the_largest_teacher_is_whole_on_one_device():
    larger = replace(TEACHER, name="larger", parameters=3 * TEACHER.parameters)
    start = parts(SETTINGS, "device", "start", teachers=(TEACHER, larger))
    assert start["larger: weights, whole, while it is loaded"] == 2 * 3 * TEACHER.parameters
    assert start["student: optimizer"] == 8 * STUDENT.parameters / 8
    without_advice = [one for one in advise(STUDENT, (larger,), SETTINGS, H100) if one.settings is None]
    assert [one.phase.name for one in without_advice] == ["start"]
    names = [(phase.place, phase.name) for phase in plan(STUDENT, (), SETTINGS, H100).phases]
    assert ("device", "start") not in names  # the student is its own teacher


def test_the_students_shard():
    p = STUDENT.parameters
    update = parts(SETTINGS, "device", "update, layers")
    assert update["student: float32 weights"] == update["student: gradients"] == 4 * p / 8
    assert update["student: optimizer"] == 8 * p / 8
    two = parts(replace(SETTINGS, fsdp_size=2), "device", "update, layers")
    assert two["student: optimizer"] == 8 * p / 2
    lora = parts(replace(SETTINGS, lora_rank=16), "device", "update, layers")
    assert lora["student: optimizer"] == 8 * 16 * STUDENT.adapter / 8
    assert lora["student: float32 weights"] == 4 * p / 8
    assert "a layer's gradients" not in lora


def test_what_is_offloaded_moves_from_the_device_to_the_host():
    offloaded = replace(SETTINGS, param_offload=True, optimizer_offload=True)
    for phase in ("rollout", "scoring"):
        before, after = parts(SETTINGS, "device", phase), parts(offloaded, "device", phase)
        assert sum(before.values()) - sum(after.values()) == (4 + 8) * STUDENT.parameters / 8
    update = [parts(settings, "device", "update, layers") for settings in (SETTINGS, offloaded)]
    assert update[0] == update[1]
    host = [sum(parts(settings, "host", "scoring and update").values()) for settings in (SETTINGS, offloaded)]
    assert host[1] - host[0] == 12 * STUDENT.parameters  # all eight shards are on the one node

    resident = replace(SETTINGS, weights="resident")
    host = [sum(parts(settings, "host", "scoring and update").values()) for settings in (resident, SETTINGS)]
    assert host[1] - host[0] == 2 * TEACHER.parameters
    for phase in ("rollout", "scoring", "update, layers", "update, output layer"):
        before, after = parts(SETTINGS, "device", phase), parts(resident, "device", phase)
        assert sum(after.values()) - sum(before.values()) == 2 * TEACHER.parameters / 8


def test_a_node_keeps_what_the_teachers_said_of_its_share_of_the_batch():
    tokens = 256 * 4 * 8192

    def said(settings, teachers=(TEACHER,), phase="scoring and update"):
        found = parts(settings, "host", phase, teachers)
        return sum(size for name, size in found.items() if KEYS["payload"] in name or "hidden states" in name)

    assert said(SETTINGS) == tokens * 2 * 5120
    assert said(replace(SETTINGS, devices=16)) == tokens * 2 * 5120 / 2
    assert said(replace(SETTINGS, payload="logits", payload_bytes=4)) == tokens * 4 * 151_936
    # Of two teachers a sample is scored by one, or by both.
    small = replace(TEACHER, name="small", width=1024)
    assert said(SETTINGS, (TEACHER, small)) == tokens * 2 * 5120
    assert said(replace(SETTINGS, teachers_per_token=2), (TEACHER, small)) == tokens * 2 * (5120 + 1024)
    # A top-k is taken of all hidden states at the end of a scoring.
    topk = replace(SETTINGS, payload="topk", topk=64)
    assert said(topk, phase="update") == tokens * (4 * 64 + 4 * 65)
    assert said(topk, phase="scoring") == tokens * (4 * 64 + 4 * 65 + 2 * 5120)


def test_a_scoring_holds_two_layers_and_a_micro_batch_of_the_largest_teacher():
    small = replace(TEACHER, name="small", largest_layer=1000, width=1024)
    scoring = parts(SETTINGS, "device", "scoring", (small, TEACHER))
    assert scoring["teacher: gathered weights"] == 2 * (2 * 488_000_000 + 151_936 * 5120)
    assert scoring[f"teacher: activations of {KEYS['teacher_tokens']}=65,536"] == 34 * 65_536 * 5120
    assert not any("small" in name for name in scoring)
    logits = parts(replace(SETTINGS, payload="logits"), "device", "scoring")
    assert logits["teacher: logits of a micro-batch"] == 2 * 2 * 65_536 * 151_936


def test_an_update_holds_saved_activations_and_the_head_or_a_layer():
    saved = f"saved activations of {KEYS['micro_tokens']}=16,384"
    output, layers = (parts(SETTINGS, "device", f"update, {name}") for name in ("output layer", "layers"))
    assert output[saved] == layers[saved] == 2 * 16_384 * 2048 * 28
    assert output["head: buffers"] == buffer_bytes(151_936, chunking_for(16_384, 151_936, 2048, 5120, 2, H100))
    assert output["head: float32 gradient of its weight"] == 4 * 151_936 * 2048
    rows = chunking_for(16_384, 151_936, 2048, 5120, 2, H100).rows
    lora = parts(replace(SETTINGS, lora_rank=16), "device", "update, output layer")
    assert lora["head: buffers"] == buffer_bytes(151_936, Chunking(rows, rows)) < output["head: buffers"]
    assert output["teachers' output projections"] == 2 * 151_936 * 5120
    assert output["what the teachers said"] == 16_384 * 2 * 5120
    assert layers["activations of a layer, and their gradients"] == 2 * 34 * 16_384 * 2048
    assert layers["gathered weights"] == 2 * (2 * 50_000_000 + 151_936 * 2048)  # the tied embedding stays
    untied = parts(SETTINGS, "device", "update, layers", student=replace(STUDENT, is_tied=False))
    assert untied["gathered weights"] == 2 * 2 * 50_000_000
    # Each of a mixture's teachers has its projection there, of routed ones the largest.
    mixed = parts(replace(SETTINGS, teachers_per_token=2), "device", "update, output layer", (TEACHER, TEACHER))
    assert mixed["teachers' output projections"] == 2 * 2 * 151_936 * 5120
    # A top-k needs none.
    top_k = parts(replace(SETTINGS, payload="topk"), "device", "update, output layer")
    assert "teachers' output projections" not in top_k


def test_seconds_of_scoring_are_arithmetic_or_the_transfer_of_weights():
    body = 2 * (TEACHER.parameters - 2 * TEACHER.head) + 2 * 9216 * TEACHER.width * TEACHER.layers
    arithmetic = 256 * 4 * 9216 / 8 * body / H100.flops()
    assert plan(STUDENT, [TEACHER], SETTINGS, H100).seconds["scoring"] == pytest.approx(arithmetic)
    # With a link of a tenth, it waits for the shard that each of 19 micro-batches of 7 sequences brings anew.
    slow = replace(H100, sheet_link=H100.sheet_link / 100)
    waiting = plan(STUDENT, [TEACHER], SETTINGS, slow).seconds["scoring"]
    assert waiting == pytest.approx(19 * 2 * TEACHER.parameters / 8 / slow.link)
    resident = replace(SETTINGS, weights="resident")
    assert plan(STUDENT, [TEACHER], resident, slow).seconds["scoring"] == pytest.approx(arithmetic)


def test_seconds_of_an_update_are_four_forwards_and_the_head():
    """Forward, its repetition, two products in the backward; three of four where only an adapter trains."""
    body = 2 * (STUDENT.parameters - STUDENT.head) + 2 * 9216 * STUDENT.width * STUDENT.layers
    forward = 256 * 4 * 9216 / 8 * body / H100.flops()
    full = plan(STUDENT, [TEACHER], SETTINGS, H100).seconds["update"]
    lora = plan(STUDENT, [TEACHER], replace(SETTINGS, lora_rank=16), H100).seconds["update"]
    # The head's floor, of 128 sequences a device.
    products = 2 * 128 * 8192 * STUDENT.vocab / H100.flops()
    assert 4 * forward + products * (3 * 2048 + 5120) < full < 4 * forward + 1.5 * products * (3 * 2048 + 5120)
    assert 3 * forward + products * (2 * 2048 + 5120) < lora < 3 * forward + 1.5 * products * (2 * 2048 + 5120)


# ----------------------------------------------------------------------------------------------------------------------
# advice


TOO_LARGE = {
    "rollout": ({"rollout_share": 0.95}, "device", KEYS["rollout_share"]),
    "rollout_engine": ({"rollout_share": 0.02}, "engine", KEYS["rollout_share"]),
    "scoring": ({"teacher_tokens": 1_000_000}, "device", KEYS["teacher_tokens"]),
    "update": ({"micro_tokens": 500_000}, "device", KEYS["micro_tokens"]),
    "resident": ({"weights": "resident", "devices": 1, "devices_per_node": 1}, "device", KEYS["weights"]),
    "logits": ({"payload": "logits", "host_memory": 200.0 * GIB}, "host", KEYS["payload"]),
    "batch": ({"host_memory": 100.0 * GIB}, "host", KEYS["batch"]),
}


@pytest.mark.parametrize("case", TOO_LARGE)
def test_advice_names_a_key_and_a_value_that_fits(case):
    changes, place, key = TOO_LARGE[case]
    settings = replace(SETTINGS, **changes)
    teacher = TEACHER if case != "resident" else replace(TEACHER, parameters=36_000_000_000)
    advice = [one for one in advise(STUDENT, [teacher], settings, H100) if one.phase.place == place]
    assert advice
    for one in advice:
        if case != "resident":  # which keeps the weights on the one device in every phase
            assert list(one.changes) == [key]
        after = {phase[:2] for phase in plan(STUDENT, [teacher], one.settings, H100).too_large}
        assert one.phase[:2] not in after
    assert key in {name for one in advice for name in one.changes}


def test_the_mildest_value_that_fits_is_taken():
    [one] = advise(STUDENT, [TEACHER], replace(SETTINGS, rollout_share=0.95), H100)
    a_percent_more = replace(one.settings, rollout_share=one.settings.rollout_share + 0.01)
    assert plan(STUDENT, [TEACHER], a_percent_more, H100).too_large


def test_nothing_is_advised_where_nothing_helps():
    [one, *_] = advise(replace(STUDENT, parameters=10**12), [TEACHER], SETTINGS, H100)
    assert one.settings is None and one.changes == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_tokens": 9215}, f"{KEYS['micro_tokens']}=9215 is less than the longest sequence, 9216"),
        ({"teacher_tokens": 100}, f"{KEYS['teacher_tokens']}=100 is less"),
        ({"devices": 12}, f"12 devices with {KEYS['devices_per_node']}=8: give whole nodes"),
        ({"rollout_share": 1.5}, f"{KEYS['rollout_share']}=1.5"),
        ({"fsdp_size": 3}, f"{KEYS['fsdp_size']}=3 does not divide 8 devices"),
        ({"rollout_tp": 3}, f"{KEYS['rollout_tp']}=3 does not divide 8 devices"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_their_key(changes, message):
    with pytest.raises(ValueError) as error:
        replace(SETTINGS, **changes)
    assert message in str(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# the command, and the trainer's start


def command(folder, *more):
    batch = ["--gpus", "1", "--batch", "4", "--prompt-length", "16", "--response-length", "16"]
    return ["--student", str(folder), "--teacher", str(folder / "config.json"), *batch, *more]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    LlamaConfig(vocab_size=99, num_key_value_heads=2, **SIZES).save_pretrained(path)
    return path


def test_the_command_prints_what_fits_and_what_does_not(folder, capsys):
    assert main(command(folder)) == 0
    text = capsys.readouterr().out
    assert "not measurements" in text and "DOES NOT FIT" not in text
    assert all(key in text for key in (KEYS["rollout_share"], KEYS["micro_tokens"], KEYS["teacher_tokens"]))
    assert main(command(folder, "--gpu-memory", "4")) == 1
    text = capsys.readouterr().out
    assert "DOES NOT FIT" in text and f"does not fit: set {KEYS['rollout_share']}=" in text


@pytest.mark.parametrize("document", ["README.md", "ON_POLICY_DISTILLATION.md"])
def test_commands_of_the_documents_run(folder, document):
    """With a model that is here in place of theirs, and a device that holds it."""
    text = (Path(__file__).resolve().parents[1] / document).read_text().replace("\\\n", " ")
    [line] = [line for line in text.splitlines() if "-m verl.on_policy_distillation.plan" in line]
    arguments = shlex.split(line)[3:]
    for option in ("--student", "--teacher"):
        arguments[arguments.index(option) + 1] = str(folder)
    assert main(arguments) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--gpus", "0"], "--gpus: 0: pass a whole number above 0"),
        (["--student", "/nowhere"], "student=/nowhere does not exist"),
        (["--micro", "8"], f"{KEYS['micro_tokens']}=8 is less"),
    ],
)
def test_the_command_refuses(folder, change, message, capsys):
    with pytest.raises(SystemExit):
        main(command(folder, *change))
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    student, teacher = tiny_model(folder / "student"), tiny_model(folder / "teacher", hidden=64, seed=1)
    return f"actor_rollout_ref.model.path={student}", f"teacher.model.path={teacher}"


HUGE = f"data.train_batch_size={1 << 40}"  # x 32 tokens x 128 bytes: 4 PiB


def test_a_trainer_that_starts_says_how_much_the_payload_takes(models, caplog):
    prepare(make_config(PURE, *models))
    assert "host memory" not in caplog.text
    with caplog.at_level(logging.WARNING):
        prepare(make_config(PURE, *models, HUGE))
    assert f"If all responses become as long as they may: teacher.payload=hidden_states of {HUGE} x " in caplog.text
    assert f"is {(1 << 40) * 32 * 128 / GIB:.1f} GiB of host memory on each of 1 node(s)" in caplog.text
    assert "lower data.train_batch_size" in caplog.text


def test_a_payload_that_is_sure_to_exceed_the_machine_is_refused(models, caplog, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    exact = (PURE, *models, HUGE, "actor_rollout_ref.rollout.ignore_eos=True")
    with pytest.raises(ValueError, match="GiB of host memory"):
        prepare(make_config(*exact))
    prepare(make_config(*exact, "trainer.nnodes=2"))  # the other node may be larger
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")
    prepare(make_config(*exact))
    assert caplog.text.count("If all responses become as long as they may") == 2


def test_a_top_k_is_counted_with_the_hidden_states_that_it_is_taken_of(models, caplog):
    prepare(make_config(PURE, *models, HUGE, "teacher.payload=topk", "teacher.topk=7"))
    assert f"is {(1 << 40) * 32 * 128 / GIB:.1f} GiB" in caplog.text
    assert "teacher.payload=topk (hidden states, until their top-k is taken)" in caplog.text


@pytest.mark.parametrize(("more", "token"), [((), 128 + 64), (("teacher.routing_key=data_source",), 128)])
def test_of_several_teachers_those_of_a_sample_are_counted(more, token, models, caplog):
    """Hidden sizes 64 and 32: the second is the student, as its own teacher."""
    two = f"+teacher.models.a.path={models[1].partition('=')[2]}", "+teacher.models.b.path=self"
    prepare(make_config(PURE, models[0], *two, HUGE, *more))
    assert f"is {(1 << 40) * 32 * token / GIB:.1f} GiB" in caplog.text


def test_the_trainers_configuration_is_read(models):
    config = make_config(
        PURE,
        *models,
        "trainer.n_gpus_per_node=4",
        "trainer.nnodes=2",
        "data.train_batch_size=64",
        "actor_rollout_ref.rollout.n=2",
        "actor_rollout_ref.rollout.gpu_memory_utilization=0.4",
        "actor_rollout_ref.rollout.name=vllm",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=2",
        "actor_rollout_ref.actor.use_dynamic_bsz=True",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=128",
        "actor_rollout_ref.actor.fsdp_config.param_offload=True",
        "teacher.use_dynamic_bsz=True",
        "teacher.max_token_len_per_gpu=256",
        "teacher.payload_dtype=float32",
        "actor_rollout_ref.actor.policy_loss.distillation_beta=0.5",
    )
    assert memory.settings_of(config) == Settings(
        devices=8,
        devices_per_node=4,
        batch=64,
        rollouts=2,
        prompt=32,
        response=32,
        micro_tokens=128,
        teacher_tokens=256,
        topk=0,
        payload_bytes=4,
        rollout_tp=2,
        rollout_share=0.4,
        param_offload=True,
        kind="gkd",
    )
    by_sequences = make_config(PURE, *models, "teacher.micro_batch_size_per_gpu=3", "teacher.use_dynamic_bsz=False")
    assert memory.settings_of(by_sequences).teacher_tokens == 3 * 64


def test_a_device_that_is_too_small_is_warned_of(models, caplog, tmp_path, monkeypatch):
    """A machine with a device is one whose driver has its tool; here the tool says one of 3 GiB."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 3072'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    prepare(make_config(PURE, *models))
    assert "rollout may not fit: " in caplog.text and f"Consider {KEYS['rollout_share']}=0." in caplog.text
    caplog.clear()
    prepare(make_config(PURE, *models, "trainer.device=cpu"))
    assert "may not fit" not in caplog.text
    tool.write_text("#!/bin/sh\nexit 9\n")  # no device
    prepare(make_config(PURE, *models))
    assert "may not fit" not in caplog.text


def test_no_memory_is_known_where_the_kernel_does_not_say():
    assert memory.host_memory("MemTotal") >= memory.host_memory("MemAvailable") > 0
    assert memory.host_memory("NoSuchEntry") is None
