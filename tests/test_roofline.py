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
"""The roofline of the head against its formulas, written out anew, and against the table that it replaces."""

import math
import sys

import pytest

from verl.on_policy_distillation.roofline import (
    ACCELERATORS,
    HEAD_MEMORY,
    INSTRUCTIONS,
    TILE,
    Accelerator,
    Chunking,
    accelerator_named,
    buffer_bytes,
    chunking_for,
    head_cost,
    main,
)

V, N, H_T = 151936, 8192, 5120
H100 = ACCELERATORS["H100"]
# Numbers under which no kernel waits for its instructions, 700 TFLOP/s and 3 TB/s: those of the review's table.
REVIEW = Accelerator("review", 700e12 / 0.7, 1e20, 3.0e12 / 0.9, 1e12, 80e9)
# What a reading of the code predicted for one product a chunk, KLs: (rows, H_s): from, to; x the products.
PREDICTED = {
    (216, 2048): (1.98, 2.05),
    (512, 2048): (1.36, 1.42),
    (1024, 2048): (1.19, 1.26),
    (2048, 2048): (1.19, 1.25),
    (216, 4096): (2.04, 2.09),
    (512, 4096): (1.33, 1.37),
    (1024, 4096): (1.12, 1.16),
    (2048, 4096): (1.12, 1.16),
}


def seconds_of_table(rows, width, flops=700e12, bandwidth=3.0e12, kernel_bytes=18):
    """Chunk by chunk, 16-bit weights, one product with the hidden states for each chunk."""
    total = 0.0
    for start in range(0, N, rows):
        r = min(rows, N - start)
        tiled = math.ceil(r / 256) * 256
        for h in (width, H_T):  # logits
            total += max(2 * tiled * V * h / flops, (2 * V * h + 2 * r * h + 4 * r * V) / bandwidth)
        total += max(2 * tiled * V * width / flops, (2 * V * width + 2 * r * V + 4 * r * width) / bandwidth)
        total += max(2 * r * V * width / flops, (8 * V * width + 2 * r * V + 2 * r * width) / bandwidth)
        total += kernel_bytes * r * V / bandwidth
    return total


@pytest.mark.parametrize(("rows", "width"), PREDICTED)
def test_seconds_are_those_of_the_formula_and_of_the_table(rows, width):
    cost = head_cost(N, V, width, (H_T,), Chunking(rows, rows), REVIEW)
    floor = 2 * N * V * (3 * width + H_T) / 700e12
    assert cost.floor_seconds == pytest.approx(floor)
    # The table leaves out that the weight's gradient is set to zero, scaled and rounded: 18 bytes of each entry.
    ends = 18 * V * width / 3.0e12
    assert cost.parts["its ends"] == pytest.approx(ends)
    assert cost.seconds == pytest.approx(seconds_of_table(rows, width) + ends)
    low, high = PREDICTED[rows, width]
    assert low - 0.005 <= (cost.seconds - ends) / floor <= high + 0.005  # the table is rounded to two digits


def test_the_mixtures_read_both_sides_once_more():
    kl, gkd = (head_cost(N, V, 2048, (H_T,), Chunking(1024, 1024), REVIEW, kind=kind) for kind in ("reverse_kl", "gkd"))
    assert gkd.seconds - kl.seconds == pytest.approx(8 * N * V / 3.0e12)
    assert kl.parts["divergence"] == pytest.approx(18 * N * V / 3.0e12)


@pytest.mark.parametrize("kind", INSTRUCTIONS)
def test_a_kernel_is_as_slow_as_what_it_waits_for(kind):
    cost = head_cost(N, V, 2048, (H_T,), Chunking(1024, 1024), H100, kind=kind)
    memory = {"gkd": 26, "skew_reverse_kl": 26}.get(kind, 18) * N * V / H100.bandwidth
    issue = INSTRUCTIONS[kind] * N * V / H100.issue
    assert cost.parts["divergence"] == pytest.approx(max(memory, issue))


@pytest.mark.parametrize(("vocab", "width"), [(151936, 4096), (262144, 2304), (50257, 8192)])
def test_the_weights_gradient_waits_for_memory_below_a_number_of_tokens_that_no_width_moves(vocab, width):
    """8 V H / bandwidth = 2 g V H / flops at g = 4 flops / bandwidth: about 933 on the review's H100."""
    crossing = 4 * 700e12 / 3.0e12
    assert crossing == pytest.approx(933, abs=1)

    def product(group):
        return head_cost(group, vocab, width, (width,), Chunking(group, group), REVIEW).parts["gradient of weight"]

    # Far below it the accumulator alone, far above it the arithmetic alone.
    accumulator, arithmetic = 8 * vocab * width / 3.0e12, 2 * vocab * width / 700e12
    assert accumulator < product(128) < 1.1 * accumulator
    assert product(2048) == pytest.approx(2048 * arithmetic)
    assert product(round(0.9 * crossing)) > 0.9 * crossing * arithmetic


def test_gradients_of_a_group_go_into_one_product():
    chunk, group = (
        head_cost(N, V, 2048, (H_T,), chunking, REVIEW).parts for chunking in (Chunking(512, 512), Chunking(512, 2048))
    )
    assert group["gradient of weight"] == pytest.approx(N * 2 * V * 2048 / 700e12)  # no longer waits for memory
    assert chunk["gradient of weight"] == pytest.approx(16 * (8 * V * 2048 + 2 * 512 * V + 2 * 512 * 2048) / 3.0e12)
    assert group["teacher logits"] == chunk["teacher logits"]


def test_float32_weights_have_float32_gradients_that_are_not_rounded():
    parts = head_cost(N, V, 2048, (H_T,), Chunking(256, 256), REVIEW, weight_bytes=4).parts
    assert parts["divergence"] == pytest.approx((2 * 8 + 4) * N * V / 3.0e12)
    assert parts["its ends"] == pytest.approx(12 * V * 2048 / 3.0e12)


def test_the_hybrid_loss_projects_twice_and_reads_both_sides_once_more():
    pure, hybrid = (
        head_cost(N, V, 2048, (H_T,), Chunking(1024, 1024), REVIEW, is_hybrid=is_hybrid) for is_hybrid in (False, True)
    )
    logits = pure.parts["student logits"] + pure.parts["teacher logits"]
    assert hybrid.seconds - pure.seconds == pytest.approx(logits + 8 * N * V / 3.0e12)
    assert hybrid.floor_seconds - pure.floor_seconds == pytest.approx(2 * N * V * (2048 + H_T) / 700e12)


def test_buffers():
    assert buffer_bytes(V, Chunking(1024, 1024)) == V * 1024 * 10
    assert buffer_bytes(V, Chunking(512, 2048)) == V * (8 * 512 + 2 * 2048)
    assert buffer_bytes(V, Chunking(512, 512), weight_bytes=4) == V * 8 * 512  # gradients lie over the logits
    # A micro-batch that is smaller than a chunk takes what it needs.
    assert head_cost(100, V, 64, (64,), Chunking(512, 2048), H100).extra_bytes == V * 100 * 10


@pytest.mark.parametrize("accelerator", ACCELERATORS.values(), ids=ACCELERATORS)
@pytest.mark.parametrize("weight_bytes", [2, 4])
@pytest.mark.parametrize(("vocab", "student", "teacher"), [(V, 2048, H_T), (V, 4096, H_T), (262144, 1152, 2304)])
def test_no_other_choice_within_the_memory_is_faster(accelerator, weight_bytes, vocab, student, teacher):
    chosen = chunking_for(N, vocab, student, teacher, weight_bytes, accelerator)
    assert buffer_bytes(vocab, chosen, weight_bytes) <= HEAD_MEMORY
    assert chosen.rows % TILE == 0 and chosen.group % chosen.rows == 0

    def seconds(chunking):
        return head_cost(N, vocab, student, (teacher,), chunking, accelerator, weight_bytes=weight_bytes).seconds

    for rows in range(128, 2049, 128):
        for group in (rows, 2 * rows, 3 * rows, 4 * rows) if weight_bytes == 2 else (rows,):
            if buffer_bytes(vocab, Chunking(rows, group), weight_bytes) <= HEAD_MEMORY:
                assert seconds(chosen) <= seconds(Chunking(rows, group)) * 1.01


@pytest.mark.parametrize("sides", [2, 6, 8])
@pytest.mark.parametrize("accelerator", [ACCELERATORS["H100"], ACCELERATORS["L40S"]], ids=["H100", "L40S"])
def test_a_frozen_head_s_chunks_are_chosen_without_its_gradient(accelerator, sides):
    """A LoRA's. A group of small chunks still helps the product of the hidden states' gradient."""
    sizes = 16_384, 262_144, 2048, 2048
    trained, frozen = (
        head_cost(*sizes[:3], sizes[3:], Chunking(160, 640), accelerator, is_frozen=is_frozen)
        for is_frozen in (False, True)
    )
    of_weight = trained.parts["gradient of weight"] + trained.parts["its ends"]
    assert frozen.seconds == pytest.approx(trained.seconds - of_weight)
    assert frozen.floor_seconds == pytest.approx(trained.floor_seconds * (3 * 2048) / (4 * 2048))
    chosen = chunking_for(*sizes, 2, accelerator, sides, is_frozen=True)
    assert buffer_bytes(262_144, chosen, sides=sides) <= HEAD_MEMORY

    def seconds(chunking):
        return head_cost(*sizes[:3], sizes[3:], chunking, accelerator, is_frozen=True).seconds

    for rows in (64, 128, 160, 224, 256, 512):
        for group in (rows, 2 * rows, 4 * rows):
            if buffer_bytes(262_144, Chunking(rows, group), sides=sides) <= HEAD_MEMORY:
                assert seconds(chosen) <= seconds(Chunking(rows, group)) * 1.01


def test_a_head_whose_tile_does_not_fit_takes_fewer_rows():
    chosen = chunking_for(N, 1_000_000, 2048, 2048, 2, H100, memory=1 << 29)
    assert 1 <= chosen.rows < TILE
    assert buffer_bytes(1_000_000, chosen) <= 1 << 29
    most = (1 << 29) // buffer_bytes(1_000_000, Chunking(1, 1))
    for choice in (Chunking(most, most), Chunking(32, 128)):
        sizes = N, 1_000_000, 2048, (2048,)
        assert head_cost(*sizes, chosen, H100).seconds <= head_cost(*sizes, choice, H100).seconds
    assert chunking_for(N, 10**9, 2048, 2048, 2, H100, memory=1 << 29) == Chunking(1, 1)  # more than there is


def test_a_mixture_of_large_vocabularies_collects_gradients_of_small_chunks():
    """Eight chunks of logits are alive at once, so that no tile fits; the weight's gradient still gets one."""
    sizes = N, 262_144, 2048, 2048, 2, H100
    chosen = chunking_for(*sizes, sides=8)
    assert chosen.rows < TILE <= chosen.group
    assert buffer_bytes(262_144, chosen, sides=8) <= HEAD_MEMORY
    costs = {c: head_cost(N, 262_144, 2048, (2048, 2048), c, H100).seconds for c in (chosen, Chunking(180, 180))}
    assert costs[chosen] < 0.9 * costs[Chunking(180, 180)]


def test_an_accelerator_is_known_by_its_name():
    for name, key in {
        "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA H200": "H200",
        "NVIDIA A100-SXM4-80GB": "A100",
        "NVIDIA L40S": "L40S",
        "NVIDIA B200": "B200",
    }.items():
        assert accelerator_named(name) is ACCELERATORS[key]
    assert accelerator_named("a device of tomorrow") is ACCELERATORS["H100"]


def test_the_command_says_that_it_predicts_and_what_it_would_choose(monkeypatch, capsys):
    sizes = {"--vocab": V, "--student-width": 2048, "--teacher-width": H_T, "--tokens": N}
    monkeypatch.setattr(sys, "argv", ["roofline", *(str(part) for pair in sizes.items() for part in pair)])
    main()
    text = capsys.readouterr().out
    assert "Predicted" in text and "not measured" in text
    chosen = chunking_for(N, V, 2048, H_T, 2, H100)
    [line] = [line for line in text.splitlines() if line.endswith("chosen")]
    assert line.split()[:2] == [f"{chosen.rows:,}", f"{chosen.group:,}"]
