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
"""A teacher alone on VERL's FSDP2 engine: what it says, how it is loaded, and what a scoring leaves behind."""

import pytest
import torch
from test_engine import by_sequences, make_batch, run_workers, sharpened
from transformers import AutoModelForCausalLM

from verl.on_policy_distillation.output_projection import OutputProjection
from verl.on_policy_distillation.teachers import Projections

RESIDENT = "teacher.weights=resident"
# name: (overrides, checkpoint)
CASES = {
    "untied": ((), "untied"),
    "untied_resident": ((RESIDENT,), "untied"),
    "by_sequences": (by_sequences(2), "untied"),
    "kept": (("teacher.fsdp_config.reshard_after_forward=False",), "untied"),
    "tied": ((), "tied"),
    "tied_resident": ((RESIDENT,), "tied"),
    "tied_logits": (("teacher.payload=logits",), "tied"),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "untied": sharpened(folder / "untied", hidden=64, layers=2, seed=2),
        "tied": sharpened(folder / "tied", hidden=32, layers=1, tied=True, seed=3),
    }


@pytest.fixture(scope="module")
def batch():
    return make_batch(seed=9)


@pytest.fixture(scope="module")
def results(checkpoints, batch, tmp_path_factory):
    """Of each case, what each of two ranks has."""
    cases = {name: [*case, f"teacher.model.path={checkpoints[path]}"] for name, (case, path) in CASES.items()}
    folder = tmp_path_factory.mktemp("workers")
    return run_workers(folder, "scoring", cases, batch, world_size=2, script="scoring_process.py")


@pytest.mark.parametrize("name", CASES)
def test_it_says_what_the_model_says(name, results, checkpoints, batch):
    model = AutoModelForCausalLM.from_pretrained(checkpoints[CASES[name][1]], attn_implementation="eager").double()
    for rank, result in enumerate(results[name]):
        rows = []
        for row in batch[rank::2]:
            with torch.no_grad():
                output = model(torch.tensor([row["prompt"] + row["response"]]), output_hidden_states=True)
            said = output.logits if name == "tied_logits" else output.hidden_states[-1]
            rows.append(said[0, len(row["prompt"]) - 1 : -1][torch.tensor(row["mask"]) != 0])
        torch.testing.assert_close(result["rows"].double(), torch.cat(rows), rtol=2e-4, atol=2e-5)
        if name != "tied_logits":
            assert torch.equal(result["projection"], model.get_output_embeddings().weight.float())


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_resident_weights_say_the_same_bit_for_bit(name, results):
    for offloaded, resident in zip(results[name], results[f"{name}_resident"], strict=True):
        assert offloaded["offloads"] == {"UnpinnedOffload"} and resident["offloads"] == {"NoneType"}
        assert torch.equal(offloaded["rows"], resident["rows"])


@pytest.mark.parametrize("name", CASES)
def test_nothing_of_what_it_says_stays_with_the_engine_s_outputs(name, results):
    for result in results[name]:
        assert len(result["rows"]) > 0
        assert not [shape for shape in result["outputs"] if len(shape) > 1], result["outputs"]


@pytest.mark.parametrize("name", CASES)
def test_a_scoring_leaves_no_gathered_weights_at_the_root(name, results):
    """The root's are those of no layer. A layer's are, where a user has asked for them to be kept."""
    for result in results[name]:
        assert any(".layers." in parameter for parameter in result["gathered"]) == (name == "kept")
        assert not any(".norm." in parameter for parameter in result["gathered"])


@pytest.mark.parametrize("name", CASES)
def test_one_rank_reads_the_checkpoint_for_all(name, results):
    """But a tied teacher that runs its own head, which VERL has every rank load whole."""
    is_meta = [result["is_meta"] for result in results[name]]
    assert is_meta == ([False, False] if name == "tied_logits" else [False, True])


def projections(resident):
    read = {name: OutputProjection(torch.randn(3, 2), None) for name in ("a", "b", "c")}
    calls = []

    def reader(name):
        return lambda: calls.append(name) or read[name]

    return Projections({name: reader(name) for name in read}, resident), read, calls


def test_projections_are_on_the_device_from_their_first_use_to_the_end_of_the_update():
    store, _, calls = projections(resident=3)
    assert calls == ["a", "b", "c"] and store.on_device == ()
    for name in ("a", "c", "a"):
        store.get(name)
    assert store.on_device == ("c", "a")
    store.leave()
    assert store.on_device == () and calls == ["a", "b", "c"]


def test_no_more_projections_are_on_the_device_than_a_sample_needs():
    store, _, _ = projections(resident=2)
    for name in ("a", "b", "a", "c"):
        store.get(name)
    assert store.on_device == ("a", "c")


def test_on_a_cpu_there_is_one_copy_of_a_projection():
    store, read, _ = projections(resident=1)
    for name, projection in read.items():
        assert store.get(name).weight.data_ptr() == projection.weight.data_ptr()
