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
"""The trainer path on VERL's real workers and FSDP2 engine, against a direct float64 Hugging Face computation.

VERL's actor and teacher workers run over one fixed batch in 1 and in 2 processes (gloo); here the same loss and every
parameter gradient are computed from the checkpoints, one sequence at a time, with formulas written out again.
"""

import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from arithmetic import tiny_model
from engine_process import DENSE
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from verl.on_policy_distillation.plan import payload_bytes

PURE = "actor_rollout_ref.actor.policy_loss.loss_mode=on_policy_distillation"
HYBRID = "actor_rollout_ref.actor.policy_loss.loss_mode=hybrid_rl_distillation"
LOSS = "actor_rollout_ref.actor.policy_loss"
MICRO = "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu"
NUM_SEQUENCES = 8


def sharpened(path, **kwargs):
    """An untrained checkpoint whose distributions are far from uniform, so that the divergences are of order one."""
    tiny_model(path, **kwargs)
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20.0)
    model.save_pretrained(path)
    return str(path)


def biased(path, seed):
    """An untrained checkpoint whose output layer has a bias that matters."""
    tiny_model(path)  # the tokenizer
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = PhiForCausalLM(PhiConfig(vocab_size=258, max_position_embeddings=128, **sizes))
    with torch.no_grad():
        model.lm_head.weight.mul_(20.0)
        model.lm_head.bias.normal_()
    model.save_pretrained(path)
    return str(path)


TRANSFORMED = {
    "gemma2": lambda sizes: Gemma2ForCausalLM(Gemma2Config(final_logit_softcapping=3.0, head_dim=8, **sizes)),
    "cohere": lambda sizes: CohereForCausalLM(CohereConfig(logit_scale=0.3, **sizes)),
    "granite": lambda sizes: GraniteForCausalLM(GraniteConfig(logits_scaling=4.0, **sizes)),
}


def transformed(path, family, seed):
    """An untrained checkpoint whose model does something to the logits after the product of its head."""
    tiny_model(path)  # the tokenizer
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 258, "max_position_embeddings": 128, "tie_word_embeddings": True}
    model = TRANSFORMED[family](sizes | {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257})
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20.0)
    model.save_pretrained(path)
    return str(path)


def make_batch(seed=0):
    rng = random.Random(seed)
    rows = []
    for _ in range(NUM_SEQUENCES):
        prompt = [rng.randrange(256) for _ in range(rng.randrange(1, 7))]
        response = [rng.randrange(256) for _ in range(rng.randrange(1, 6))]
        mask = [1] + [rng.randrange(2) for _ in response[1:]]  # zeros inside, as tool outputs have
        old_log_prob = [rng.uniform(-6, -4) for _ in response]
        advantage = [rng.uniform(-1, 1) for _ in response]
        ref_log_prob = [rng.uniform(-6, -4) for _ in response]
        rows.append(
            {
                "prompt": prompt,
                "response": response,
                "mask": mask,
                "old_log_prob": old_log_prob,
                "advantage": advantage,
                "ref_log_prob": ref_log_prob,
            }
        )
    return rows


def by_sequences(size):
    """The teacher's micro-batches, by sequences instead of by tokens."""
    settings = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": size, "max_token_len_per_gpu": "null"}
    return tuple(f"teacher.{key}={value}" for key, value in settings.items())


CASES = {
    "reverse_kl": (PURE, f"{MICRO}=4"),
    "dense": (PURE, f"{MICRO}=4", DENSE),
    "dense_packed": (PURE, f"{MICRO}=4", DENSE, "actor_rollout_ref.model.use_remove_padding=True"),
    "dense_hybrid": (HYBRID, f"{MICRO}=4", DENSE, f"{LOSS}.hybrid_lambda_rl=0.7", f"{LOSS}.hybrid_lambda_distill=0.3"),
    "micro_batch_1": (PURE, f"{MICRO}=1", *by_sequences(1)),
    "dynamic": (
        PURE,
        "actor_rollout_ref.actor.use_dynamic_bsz=True",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16",
        "teacher.max_token_len_per_gpu=16",
    ),
    "gkd_tempered": (
        PURE,
        f"{MICRO}=4",
        f"{LOSS}.distillation_type=gkd",
        f"{LOSS}.distillation_beta=0.3",
        f"{LOSS}.distillation_temperature=1.7",
        "actor_rollout_ref.rollout.temperature=0.6",  # logits reach the loss divided by it; it must not matter
    ),
    "forward_kl_seq_mean": (
        PURE,
        f"{MICRO}=2",
        *by_sequences(2),
        f"{LOSS}.distillation_type=forward_kl",
        "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean",
    ),
    "logits_payload": (PURE, f"{MICRO}=4", "teacher.payload=logits"),
    "packed": (PURE, f"{MICRO}=4", "actor_rollout_ref.model.use_remove_padding=True"),
    "gradient_checkpointing": (PURE, f"{MICRO}=4", "actor_rollout_ref.model.enable_gradient_checkpointing=True"),
    "bf16_payload": (PURE, f"{MICRO}=4", "teacher.payload_dtype=bfloat16"),
    "hybrid": (HYBRID, f"{MICRO}=4", f"{LOSS}.hybrid_lambda_rl=0.7", f"{LOSS}.hybrid_lambda_distill=0.3"),
    "hybrid_1_1": (HYBRID, f"{MICRO}=4"),
    "hybrid_packed": (
        HYBRID,
        f"{MICRO}=2",
        f"{LOSS}.hybrid_lambda_rl=0.7",
        f"{LOSS}.hybrid_lambda_distill=0.3",
        "actor_rollout_ref.model.use_remove_padding=True",
    ),
    "hybrid_entropy": (
        HYBRID,
        f"{MICRO}=4",
        "actor_rollout_ref.actor.entropy_coeff=0.1",
        "actor_rollout_ref.rollout.temperature=0.6",
        f"{LOSS}.distillation_temperature=1.7",
    ),
    "dense_hybrid_entropy": (
        HYBRID,
        f"{MICRO}=4",
        DENSE,
        "actor_rollout_ref.actor.entropy_coeff=0.1",
        "actor_rollout_ref.rollout.temperature=0.6",
        f"{LOSS}.distillation_temperature=1.7",
    ),
    "hybrid_only_rl": (HYBRID, f"{MICRO}=4", DENSE, f"{LOSS}.hybrid_lambda_distill=0"),
    "hybrid_only_distill": (HYBRID, f"{MICRO}=4", DENSE, f"{LOSS}.hybrid_lambda_rl=0"),
    "vanilla": (f"{LOSS}.loss_mode=vanilla", f"{MICRO}=4"),
}
WITH_ENTROPY_AND_KL = (
    "actor_rollout_ref.actor.entropy_coeff=0.1",
    "actor_rollout_ref.actor.use_kl_loss=True",
    "actor_rollout_ref.actor.kl_loss_coef=0.2",
)
CASES |= {
    "hybrid_half_rl": (HYBRID, f"{MICRO}=4", f"{LOSS}.hybrid_lambda_rl=0.5", *WITH_ENTROPY_AND_KL),
    "vanilla_entropy_and_kl": (f"{LOSS}.loss_mode=vanilla", f"{MICRO}=4", *WITH_ENTROPY_AND_KL),
}
# Half of each sequence's tokens, a clamp, and a switch between the KLs.
CHOICE = {"fraction": 0.5, "clamp": 7.0, "threshold": 2.7}
CHOSEN = (
    f"{LOSS}.distillation_token_selection=top_entropy",
    f"{LOSS}.distillation_keep_fraction={CHOICE['fraction']}",
    f"{LOSS}.distillation_loss_max_clamp={CHOICE['clamp']}",
    f"{LOSS}.distillation_entropy_threshold={CHOICE['threshold']}",
)
WEIGHTED = (HYBRID, f"{MICRO}=4", f"{LOSS}.hybrid_lambda_rl=0.7", f"{LOSS}.hybrid_lambda_distill=0.3")
# At the fourth step 0.3 is left of a weight of 0.6 that falls in six steps, and nothing of one that falls in three.
FADING = (HYBRID, f"{LOSS}.hybrid_lambda_distill=0.6", f"{LOSS}.hybrid_lambda_distill_schedule=linear", f"{MICRO}=2")
CASES |= {
    "faded": (*FADING, f"{LOSS}.hybrid_lambda_distill_steps=6", f"{LOSS}.hybrid_lambda_rl=0.7"),
    "faded_out": (*FADING, f"{LOSS}.hybrid_lambda_distill_steps=3"),
    "chosen": (PURE, f"{MICRO}=4", *CHOSEN),
    "chosen_micro_batch_1": (PURE, f"{MICRO}=1", *CHOSEN),
    "chosen_hybrid": (*WEIGHTED, *CHOSEN),
    "dense_chosen_hybrid": (*WEIGHTED, *CHOSEN, DENSE),
}
BF16 = "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=bf16"  # VERL's default
LORA = ("actor_rollout_ref.model.lora_rank=4", "actor_rollout_ref.model.lora_alpha=8")


def every_loss_and_head(name, *overrides):
    """`name` is the pure loss with the fused head."""
    losses = {name: (PURE, f"{MICRO}=4", *overrides), f"{name}_hybrid": (HYBRID, f"{MICRO}=4", *overrides)}
    return losses | {f"dense_{loss}": (*case, DENSE) for loss, case in losses.items()}


BF16_CASES = every_loss_and_head("bf16", BF16)
TIED = every_loss_and_head("tied")
LORA_CASES = every_loss_and_head("lora", *LORA)
BIAS = every_loss_and_head("bias")
PADDED = every_loss_and_head("padded_teacher")


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def run_workers(folder, name, cases, batch, world_size, script="engine_process.py"):
    """Results per case from `world_size` processes of VERL's workers."""
    spec, out = folder / f"{name}.spec.pt", folder / f"{name}.out.pt"
    torch.save({"cases": cases, "batch": batch}, spec)
    environment = os.environ | {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    command = [sys.executable, str(Path(__file__).with_name(script)), str(spec), str(out)]
    processes = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(output[-4000:] for output in outputs)
    return torch.load(out, weights_only=False)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "student": sharpened(folder / "student", hidden=32, layers=2, seed=1),
        "teacher": sharpened(folder / "teacher", hidden=64, layers=1, seed=2),
        "tied_student": sharpened(folder / "tied_student", hidden=32, layers=1, tied=True, seed=3),
        "tied_teacher": sharpened(folder / "tied_teacher", hidden=64, layers=1, tied=True, seed=4),
        "biased_student": biased(folder / "biased_student", seed=6),
        "biased_teacher": biased(folder / "biased_teacher", seed=7),
        **{
            f"{family}_{side}": transformed(folder / f"{family}_{side}", family, seed)
            for family in TRANSFORMED
            for side, seed in (("student", 8), ("teacher", 9))
        },
        "padded_teacher": sharpened(folder / "padded_teacher", hidden=64, layers=1, vocab_size=320, seed=5),
    }


def with_models(cases, student, teacher):
    paths = (f"actor_rollout_ref.model.path={student}", f"teacher.model.path={teacher}")
    return {name: [*case, *(paths if "vanilla" not in name else paths[:1])] for name, case in cases.items()}


@pytest.fixture(scope="module")
def batch():
    return make_batch()


@pytest.fixture(scope="module")
def one_rank(checkpoints, batch, tmp_path_factory):
    cases = (
        with_models(CASES | BF16_CASES, checkpoints["student"], checkpoints["teacher"])
        | with_models(TIED, checkpoints["tied_student"], checkpoints["tied_teacher"])
        | with_models(PADDED, checkpoints["student"], checkpoints["padded_teacher"])
        | with_models(LORA_CASES, checkpoints["student"], checkpoints["teacher"])
        | with_models(BIAS, checkpoints["biased_student"], checkpoints["biased_teacher"])
    )
    for family in TRANSFORMED:
        overrides = {family: (PURE, f"{MICRO}=4"), f"{family}_hybrid": (HYBRID, f"{MICRO}=4")}
        overrides[f"dense_{family}_hybrid"] = (*overrides[f"{family}_hybrid"], DENSE)
        cases |= with_models(overrides, checkpoints[f"{family}_student"], checkpoints[f"{family}_teacher"])
    return run_workers(tmp_path_factory.mktemp("one_rank"), "one", cases, batch, world_size=1)


@pytest.fixture(scope="module")
def two_ranks(checkpoints, batch, tmp_path_factory):
    names = ("reverse_kl", "dynamic", "forward_kl_seq_mean", "hybrid", "chosen", "chosen_hybrid", "faded")
    cases = with_models({name: CASES[name] for name in names}, checkpoints["student"], checkpoints["teacher"])
    return run_workers(tmp_path_factory.mktemp("two_ranks"), "two", cases, batch, world_size=2)


# ----------------------------------------------------------------------------------------------------------------------
# the reference


def response_logits(model, row):
    """(response length, vocab) logits that predict the response, from the sequence alone, without padding."""
    sequence = torch.tensor([row["prompt"] + row["response"]])
    logits = model(sequence).logits[0]
    return logits[len(row["prompt"]) - 1 : -1]


def divergence(student, teacher, kind, beta, temperature):
    """(tokens,) float64, by the definitions."""
    vocab = min(student.shape[-1], teacher.shape[-1])
    s, t = (torch.softmax(logits[:, :vocab] / temperature, -1) for logits in (student, teacher))

    def kl(p, q):
        return (p * (p.log() - q.log())).sum(-1)

    if kind == "reverse_kl":
        return kl(s, t)
    if kind == "forward_kl":
        return kl(t, s)
    m = beta * t + (1 - beta) * s
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


def entropy(logits):
    log_p = torch.log_softmax(logits, -1)
    return -(log_p.exp() * log_p).sum(-1)


def chosen(student, teacher, mask, fraction, clamp, threshold):
    """What the tokens of a sequence contribute, (tokens,) float64; zero where the mask is."""
    reverse, forward = (divergence(student, teacher, kind, None, 1.0) for kind in ("reverse_kl", "forward_kl"))
    values = torch.where(entropy(teacher) > threshold, forward, reverse)
    supervised = [t for t in range(len(mask)) if mask[t]]
    count = -(-int(2 * fraction * len(supervised)) // 2)  # of whole or half numbers, rounded up
    kept = sorted(supervised, key=lambda t: -entropy(student)[t].item())[:count]
    factor = torch.zeros(len(mask), dtype=torch.float64)
    factor[kept] = len(supervised) / count
    return factor * torch.where(values > clamp, clamp, values)


def direct(
    student_path, teacher_path, batch, kind="reverse_kl", beta=1.0, temperature=1.0, reduce="token-mean", choice=None
):
    """Loss and gradients by name, float64."""
    student = AutoModelForCausalLM.from_pretrained(student_path, attn_implementation="eager").double().eval()
    teacher = AutoModelForCausalLM.from_pretrained(teacher_path, attn_implementation="eager").double().eval()
    sums, counts = [], []
    for row in batch:
        with torch.no_grad():
            target = response_logits(teacher, row)
        mask = torch.tensor(row["mask"], dtype=torch.float64)
        logits = response_logits(student, row)
        values = divergence(logits, target, kind, beta, temperature) * mask
        sums.append((values if choice is None else chosen(logits, target, mask, **choice)).sum())
        counts.append(mask.sum())
    if reduce == "token-mean":
        loss = sum(sums) / sum(counts)
    else:  # seq-mean-token-mean
        loss = sum(total / count for total, count in zip(sums, counts, strict=True)) / len(sums)
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in student.named_parameters()}


def assert_same_gradients(got, expected, tolerance):
    assert got.keys() == expected.keys()
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        error = (got[name].double() - gradient.double()).abs().max().item()
        assert error <= tolerance * scale, f"{name}: {error} > {tolerance} * {scale}"


def assert_same_update(fused, dense, tolerance):
    """Of two heads: loss, metrics and every gradient."""
    assert fused["loss"] == pytest.approx(dense["loss"], rel=tolerance)
    assert fused["metrics"].keys() == dense["metrics"].keys()
    for name in ("kl", "forward_kl", "student_entropy", "teacher_entropy", "top1_agreement", "loss"):
        name = f"distillation/{name}"
        assert fused["metrics"][name] == pytest.approx(dense["metrics"][name], rel=tolerance), name
    assert_same_gradients(fused["gradients"], dense["gradients"], tolerance)


def assert_rounded_update(rounded, exact, loss_tolerance, gradient_tolerance):
    """In 16 bits, and in float32."""
    assert rounded["loss"] != exact["loss"]  # or nothing was rounded
    assert rounded["loss"] == pytest.approx(exact["loss"], rel=loss_tolerance)
    assert_same_gradients(rounded["gradients"], exact["gradients"], gradient_tolerance)


REFERENCES = {
    "reverse_kl": {},
    "dense": {},
    "dense_packed": {},
    "gkd_tempered": {"kind": "gkd", "beta": 0.3, "temperature": 1.7},
    "forward_kl_seq_mean": {"kind": "forward_kl", "reduce": "seq-mean-token-mean"},
    "logits_payload": {},
    "chosen": {"choice": CHOICE},
}


@pytest.mark.parametrize("case", REFERENCES)
def test_loss_and_every_gradient_equal_a_direct_computation(case, one_rank, checkpoints, batch):
    loss, gradients = direct(checkpoints["student"], checkpoints["teacher"], batch, **REFERENCES[case])
    assert one_rank[case]["loss"] == pytest.approx(loss, rel=1e-5)
    assert_same_gradients(one_rank[case]["gradients"], gradients, tolerance=1e-5)


def test_tied_embeddings_give_the_same_gradients(one_rank, checkpoints, batch):
    loss, gradients = direct(checkpoints["tied_student"], checkpoints["tied_teacher"], batch)
    assert one_rank["tied"]["loss"] == pytest.approx(loss, rel=1e-5)
    assert_same_gradients(one_rank["tied"]["gradients"], gradients, tolerance=1e-5)


def test_a_padded_teacher_vocabulary_is_cut_to_the_shared_prefix(one_rank, checkpoints, batch):
    loss, gradients = direct(checkpoints["student"], checkpoints["padded_teacher"], batch)
    assert one_rank["padded_teacher"]["loss"] == pytest.approx(loss, rel=1e-5)
    assert_same_gradients(one_rank["padded_teacher"]["gradients"], gradients, tolerance=1e-5)


def test_bf16_payload_is_within_its_rounding(one_rank):
    exact, rounded = one_rank["reverse_kl"], one_rank["bf16_payload"]
    assert rounded["payload"][:2] == (torch.bfloat16, 64)
    assert rounded["loss"] == pytest.approx(exact["loss"], rel=2e-2)
    assert rounded["loss"] != exact["loss"]  # or the payload was not rounded at all
    assert_same_gradients(rounded["gradients"], exact["gradients"], tolerance=2e-2)


def test_nothing_that_a_teacher_says_leaves_its_process(one_rank):
    """What `score` returns goes to TransferQueue, and with it into its checkpoints: two numbers of each sample."""
    for name, result in one_rank.items():
        if result["payload"] is not None:
            each = (torch.int64, (NUM_SEQUENCES,))
            assert result["sent"] == {"teacher_row": each, "teacher_bytes": each}, name


def test_the_payload_holds_the_tokens_of_the_loss_only(one_rank, checkpoints, batch):
    num_tokens = sum(sum(row["mask"]) for row in batch)
    assert num_tokens < sum(len(row["mask"]) for row in batch)  # some are masked
    vocab = AutoModelForCausalLM.from_pretrained(checkpoints["teacher"]).config.vocab_size
    for case, width in (("reverse_kl", 64), ("logits_payload", vocab)):  # 64: the teacher's hidden size
        num_bytes = num_tokens * width * 4
        payload = "logits" if width == vocab else "hidden_states"  # what the planner counts with
        assert num_bytes == num_tokens * payload_bytes(payload, 64, vocab, topk=0, number_bytes=4)
        assert one_rank[case]["payload"] == (torch.float32, width, num_bytes, num_bytes)


@pytest.mark.parametrize("case", ["reverse_kl", "gkd_tempered", "hybrid_entropy", "packed", "chosen"])
def test_a_forward_without_a_backward_gives_the_same_loss_and_its_columns(case, one_rank):
    forward = one_rank[case]["forward_only"]
    assert forward["loss"] == pytest.approx(one_rank[case]["loss"], rel=1e-6)
    assert {"divergence", "reverse_kl", "forward_kl", "student_entropy", "teacher_entropy"} <= set(forward["columns"])


@pytest.mark.parametrize("case", ["micro_batch_1", "dynamic", "packed", "gradient_checkpointing"])
def test_gradients_do_not_depend_on_how_the_batch_is_split(case, one_rank):
    assert one_rank[case]["loss"] == pytest.approx(one_rank["reverse_kl"]["loss"], rel=1e-6)
    assert_same_gradients(one_rank[case]["gradients"], one_rank["reverse_kl"]["gradients"], tolerance=1e-6)


def test_chosen_tokens_do_not_depend_on_how_the_batch_is_split(one_rank):
    split, whole = one_rank["chosen_micro_batch_1"], one_rank["chosen"]
    assert split["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert_same_gradients(split["gradients"], whole["gradients"], tolerance=1e-6)
    for name, value in whole["metrics"].items():
        if name.startswith("distillation/"):
            assert split["metrics"][name] == pytest.approx(value, rel=1e-6), name


def test_metrics_of_chosen_tokens_are_shares_of_the_global_batch(one_rank, two_ranks, batch):
    counts = [sum(row["mask"]) for row in batch]
    for result in (one_rank["chosen_micro_batch_1"], one_rank["chosen_hybrid"], two_ranks["chosen"]):
        kept = sum(-(-count // 2) for count in counts) / sum(counts)
        assert result["metrics"]["distillation/kept_tokens"] == pytest.approx(kept)
        assert 0.0 < result["metrics"]["distillation/clamped_tokens"] < kept
        assert result["metrics"]["distillation/kl"] == pytest.approx(
            one_rank["reverse_kl"]["metrics"]["distillation/kl"]
        )


def assert_is_sum(result, parts, results):
    """Loss and gradients: those of `parts`, names of `results`, each times its weight."""
    loss = sum(weight * results[name]["loss"] for name, weight in parts.items())
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    expected = {
        parameter: sum(weight * results[name]["gradients"][parameter] for name, weight in parts.items())
        for parameter in result["gradients"]
    }
    assert_same_gradients(result["gradients"], expected, tolerance=1e-5)


def test_hybrid_adds_the_loss_of_the_chosen_tokens(one_rank):
    parts, hybrid = {"vanilla": 0.7, "chosen": 0.3}, one_rank["chosen_hybrid"]
    assert_is_sum(hybrid, parts, one_rank)


@pytest.mark.parametrize("case", ["reverse_kl", "dynamic", "forward_kl_seq_mean", "hybrid", "chosen", "chosen_hybrid"])
def test_two_ranks_equal_one(case, one_rank, two_ranks):
    reference = one_rank["reverse_kl" if case == "dynamic" else case]
    assert two_ranks[case]["loss"] == pytest.approx(reference["loss"], rel=1e-5)
    assert_same_gradients(two_ranks[case]["gradients"], reference["gradients"], tolerance=1e-5)


def test_metrics_are_means_over_the_global_batch(one_rank, two_ranks, checkpoints, batch):
    """Micro-batches and ranks hold different numbers of tokens; a mean of their means would be wrong."""
    reverse, _ = direct(checkpoints["student"], checkpoints["teacher"], batch)
    forward, _ = direct(checkpoints["student"], checkpoints["teacher"], batch, kind="forward_kl")
    for result in (one_rank["micro_batch_1"], one_rank["forward_kl_seq_mean"], one_rank["hybrid"], two_ranks["hybrid"]):
        assert result["metrics"]["distillation/kl"] == pytest.approx(reverse, rel=1e-5)
        assert result["metrics"]["distillation/forward_kl"] == pytest.approx(forward, rel=1e-5)


def test_an_output_layer_with_a_bias(one_rank, checkpoints, batch):
    loss, gradients = direct(checkpoints["biased_student"], checkpoints["biased_teacher"], batch)
    assert one_rank["bias"]["loss"] == pytest.approx(loss, rel=1e-5)
    assert gradients["lm_head.bias"].abs().max() > 0.0
    assert_same_gradients(one_rank["bias"]["gradients"], gradients, tolerance=1e-5)


@pytest.mark.parametrize("family", TRANSFORMED)
def test_capped_and_scaled_logits(family, one_rank, checkpoints, batch):
    loss, gradients = direct(checkpoints[f"{family}_student"], checkpoints[f"{family}_teacher"], batch)
    assert one_rank[family]["loss"] == pytest.approx(loss, rel=1e-5)
    assert_same_gradients(one_rank[family]["gradients"], gradients, tolerance=1e-5)


def test_an_adapted_student_has_gradients_at_its_adapters_only(one_rank):
    names = one_rank["lora"]["gradients"].keys()
    assert names and all("lora_" in name for name in names)


@pytest.mark.parametrize(
    ("fused", "dense"),
    [
        ("reverse_kl", "dense"),
        ("hybrid", "dense_hybrid"),
        ("hybrid_packed", "dense_hybrid"),
        ("chosen_hybrid", "dense_chosen_hybrid"),
        ("hybrid_entropy", "dense_hybrid_entropy"),
        ("padded_teacher", "dense_padded_teacher"),
        ("padded_teacher_hybrid", "dense_padded_teacher_hybrid"),
        ("tied", "dense_tied"),
        ("tied_hybrid", "dense_tied_hybrid"),
        ("lora", "dense_lora"),
        ("lora_hybrid", "dense_lora_hybrid"),
        ("bias", "dense_bias"),
        ("bias_hybrid", "dense_bias_hybrid"),
        ("gemma2_hybrid", "dense_gemma2_hybrid"),
        ("cohere_hybrid", "dense_cohere_hybrid"),
        ("granite_hybrid", "dense_granite_hybrid"),
    ],
)
def test_a_fused_head_gives_the_dense_heads_loss_metrics_and_gradients(fused, dense, one_rank):
    assert_same_update(one_rank[fused], one_rank[dense], tolerance=1e-5)


@pytest.mark.parametrize("kind", ["", "_hybrid"])
def test_a_fused_head_in_bfloat16_is_as_near_to_float32_as_the_dense_one(kind, one_rank):
    exact = one_rank["hybrid_1_1" if kind else "reverse_kl"]
    for name in (f"bf16{kind}", f"dense_bf16{kind}"):
        assert_rounded_update(one_rank[name], exact, loss_tolerance=2e-2, gradient_tolerance=3e-2)


def test_a_sequence_without_tokens_of_the_loss_on_one_of_two_ranks(checkpoints, batch, tmp_path):
    """VERL fills batches up with such sequences."""
    empty = batch[3] | {"mask": [0] * len(batch[3]["mask"])}
    padded = [*batch[:3], empty, *batch[4:]]
    cases = with_models(
        {"pure": (PURE, f"{MICRO}=1"), "hybrid": (HYBRID, f"{MICRO}=1")}, checkpoints["student"], checkpoints["teacher"]
    )
    one, two = (run_workers(tmp_path, f"{size}", cases, padded, world_size=size) for size in (1, 2))
    for name in cases:
        assert two[name]["loss"] == pytest.approx(one[name]["loss"], rel=1e-5)
        assert two[name]["metrics"].keys() == one[name]["metrics"].keys()
        assert_same_gradients(two[name]["gradients"], one[name]["gradients"], tolerance=1e-5)


def test_hybrid_without_distillation_is_vanilla_exactly(one_rank):
    hybrid, vanilla = one_rank["hybrid_only_rl"], one_rank["vanilla"]
    assert hybrid["loss"] == vanilla["loss"]
    for name, gradient in vanilla["gradients"].items():
        assert torch.equal(hybrid["gradients"][name], gradient), name


def test_hybrid_without_rl_is_the_pure_loss(one_rank):
    hybrid, pure = one_rank["hybrid_only_distill"], one_rank["dense"]
    assert hybrid["loss"] == pure["loss"]
    for name, gradient in pure["gradients"].items():
        assert torch.equal(hybrid["gradients"][name], gradient), name


def test_hybrid_is_the_weighted_sum(one_rank):
    parts = {"vanilla": 0.7, "reverse_kl": 0.3}
    loss = sum(weight * one_rank[name]["loss"] for name, weight in parts.items())
    assert one_rank["hybrid"]["loss"] == pytest.approx(loss, rel=1e-5)
    expected = {
        parameter: sum(weight * one_rank[name]["gradients"][parameter] for name, weight in parts.items())
        for parameter in one_rank["hybrid"]["gradients"]
    }
    assert_same_gradients(one_rank["hybrid"]["gradients"], expected, tolerance=1e-5)


def test_a_weight_that_falls_is_that_of_the_step_in_every_micro_batch_and_on_every_rank(one_rank, two_ranks):
    for faded in (one_rank["faded"], two_ranks["faded"]):
        assert_is_sum(faded, {"vanilla": 0.7, "reverse_kl": 0.3}, one_rank)
        assert faded["metrics"]["distillation/lambda_distill"] == pytest.approx(0.3)
    assert_is_sum(one_rank["faded_out"], {"vanilla": 1.0}, one_rank)
    assert one_rank["faded_out"]["metrics"]["distillation/lambda_distill"] == 0.0


def test_the_weight_of_rl_leaves_entropy_bonus_and_reference_kl_alone(one_rank):
    """RL's weight is 0.5; the two other terms keep their own coefficients, as in VERL's run without distillation."""
    parts = {"vanilla_entropy_and_kl": 1.0, "vanilla": -0.5, "reverse_kl": 1.0}
    hybrid = one_rank["hybrid_half_rl"]
    assert_is_sum(hybrid, parts, one_rank)
    assert {"kl_loss", "actor/entropy_loss"} <= hybrid["metrics"].keys()
