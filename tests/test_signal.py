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
"""What teachers say is found by row id, in one step and on one rank, or not at all."""

import pytest
import torch

from verl.on_policy_distillation.output_projection import OutputProjection
from verl.on_policy_distillation.signal import NO_ROW, HiddenStates, Logits, RowIds, SignalStore


def put(store, row_ids):
    ids = row_ids.new(3)
    store.put(ids, SAMPLES)
    return ids


SAMPLES = [torch.randn(3, 4), torch.randn(0, 4), torch.randn(2, 4)]  # the second has no token of the loss


def test_rows_come_back_in_the_order_that_is_asked_for():
    store = SignalStore()
    ids = put(store, RowIds(rank=1))
    assert ids.dtype == torch.int64 and ids.shape == (3,)
    assert torch.equal(store.get(ids[[2, 1, 0]], "cpu"), torch.cat([SAMPLES[2], SAMPLES[0]]))
    assert torch.equal(store.get(ids[:1], "cpu"), SAMPLES[0])
    assert store.get(ids[1:2], "cpu").shape == (0, 4)


def test_ids_never_repeat():
    store, row_ids = SignalStore(), RowIds(rank=0)
    first = put(store, row_ids)
    store.release()
    assert not set(first.tolist()) & set(put(store, row_ids).tolist())


def test_ranks_that_hold_the_same_samples_give_the_same_ids_and_others_do_not():
    one, same, other = RowIds(rank=3), RowIds(rank=3), RowIds(rank=4)
    assert torch.equal(one.new(3), same.new(3))
    assert not set(one.new(3).tolist()) & set(other.new(3).tolist())


def test_a_stale_id_is_an_error():
    store = SignalStore()
    ids = put(store, RowIds(rank=0))
    store.release()
    with pytest.raises(KeyError, match="3 of 3 samples have no teacher signal in this process .row 0."):
        store.get(ids, "cpu")


def test_an_id_of_another_rank_is_an_error():
    ours, theirs = SignalStore(), SignalStore()
    ids, others = put(ours, RowIds(rank=0)), put(theirs, RowIds(rank=1))
    with pytest.raises(KeyError, match="1 of 2 samples have no teacher signal"):
        ours.get(torch.stack((ids[0], others[0])), "cpu")


def test_samples_may_come_in_any_order_and_in_parts():
    store, ids = SignalStore(), RowIds(rank=0).new(3)
    store.put(ids[[2, 0]], [SAMPLES[2], SAMPLES[0]])
    store.put(ids[1:2], SAMPLES[1:2])
    assert torch.equal(store.get(ids, "cpu"), torch.cat(SAMPLES))


def test_bytes_are_those_of_the_rows():
    store = SignalStore()
    ids = put(store, RowIds(rank=0))
    assert store.num_bytes(ids).tolist() == [3 * 4 * 4, 0, 2 * 4 * 4]


def test_samples_that_only_keep_ranks_in_step_are_not_kept():
    store, ids = SignalStore(), RowIds(rank=0).new(2)
    store.put(torch.cat((ids[:1], torch.tensor([NO_ROW]))), SAMPLES[:2])
    assert store.num_bytes(ids).tolist() == [3 * 4 * 4, 0] and store.counts(ids).tolist() == [3, 0]


def test_logits_of_a_signal():
    values = torch.randn(5, 4)
    assert torch.equal(Logits(values).logits().rows(torch.tensor([4, 0])), values[[4, 0]])
    weight, bias = torch.randn(7, 4), torch.randn(7)
    projection = OutputProjection(weight, bias, scale=0.5, softcap=2.0)
    source = HiddenStates(values, lambda: projection).logits()
    expected = 2.0 * torch.tanh(0.5 * (values @ weight.T + bias) / 2.0)
    torch.testing.assert_close(source.rows(torch.arange(5)), expected)
