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
"""The quickstart's data, tokenizer, reward and checkpoints. The full-size training is too slow to be tested here."""

import json

import arithmetic
import pytest
import torch
from arithmetic import (
    DATA_SOURCE,
    EOS,
    HELD_OUT,
    IGNORE,
    PAD,
    VOCAB_SIZE,
    answers_with,
    build_tokenizer,
    compute_score,
    encode,
    evaluate,
    learning_rate,
    make,
    make_split,
    problems,
    tiny_model,
    train,
    untrained_model,
    without_carry,
)
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer


def test_train_and_held_out_problems_are_disjoint_and_cover_the_task():
    taught, held_out = problems()
    assert len(held_out) == HELD_OUT
    assert not set(taught) & set(held_out)
    assert len(set(taught) | set(held_out)) == 90 * 90


def test_every_answer_is_the_sum():
    for question, answer in sum(problems(), []):
        assert eval(question.rstrip("=")) == int(answer)


def test_problems_are_a_function_of_the_seed():
    assert problems(3) == problems(3)
    assert problems(3) != problems(4)


@pytest.mark.parametrize(
    "question, answer", [("47+38=", "75"), ("41+38=", "79"), ("95+15=", "00"), ("99+91=", "80"), ("90+10=", "00")]
)
def test_without_carry_adds_each_column_on_its_own(question, answer):
    assert without_carry(question) == answer


def test_split_is_written_in_verls_format(tmp_path):
    make_split(tmp_path / "test.parquet", [("12+34=", "46")])
    assert Dataset.from_parquet(str(tmp_path / "test.parquet")).to_list() == [
        {
            "data_source": DATA_SOURCE,
            "prompt": [{"role": "user", "content": "12+34="}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "46"},
            "extra_info": {"split": "test", "index": 0},
        }
    ]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.mark.parametrize("text", ["12+34=", "46", "\n", " two  spaces\t", "æøå 数", ""])
def test_saved_tokenizer_has_one_token_a_byte_and_round_trips(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_special_tokens_are_single_tokens_outside_the_bytes(tokenizer):
    assert len(tokenizer) == VOCAB_SIZE
    assert tokenizer(f"46{EOS}{PAD}")["input_ids"][2:] == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert {tokenizer.eos_token_id, tokenizer.pad_token_id} == {256, 257}
    assert tokenizer.decode([256, 257], skip_special_tokens=True) == ""


def test_chat_template_makes_the_prompt_the_question(tokenizer):
    chat = [{"role": "user", "content": "12+34="}]
    assert tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) == "12+34="
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert ids == tokenizer("12+34=")["input_ids"]
    answered = chat + [{"role": "assistant", "content": "46"}]
    assert tokenizer.apply_chat_template(answered, tokenize=False) == f"12+34=46{EOS}"


@pytest.mark.parametrize("solution", ["46", " 46\n", f"46{EOS}", f"46{EOS}{PAD}{PAD}", f"{PAD}46{EOS}7"])
def test_compute_score_of_a_right_answer(solution):
    assert compute_score(DATA_SOURCE, solution, "46", extra_info={"index": 1}, anything_else=None) == 1.0


@pytest.mark.parametrize("solution", ["", EOS, "47", "046", "4 6", "46.", "460", "\ufffd46", "46=46", f"{EOS}46"])
def test_compute_score_of_a_wrong_answer(solution):
    assert compute_score(DATA_SOURCE, solution, "46") == 0.0


def test_compute_score_refuses_another_task():
    with pytest.raises(ValueError, match="gsm8k"):
        compute_score("openai/gsm8k", "46", "46")


def test_encode_labels_the_answer_and_its_end_only():
    input_ids, labels = encode([("12+34=", "46"), ("99+99=", "198")])
    assert input_ids.shape == labels.shape == (2, 10)
    assert (labels[:, :6] == IGNORE).all()
    assert build_tokenizer().decode(input_ids[0]) == f"12+34=46{EOS}{PAD}"
    assert labels[0, 6:].tolist() == input_ids[0, 6:9].tolist() + [IGNORE]
    assert torch.equal(labels[1, 6:], input_ids[1, 6:])


def test_learning_rate_warms_up_stays_and_decays_to_zero():
    peak = arithmetic.LEARNING_RATE
    assert learning_rate(1, None) == pytest.approx(peak / arithmetic.WARM_UP_STEPS)
    assert learning_rate(500, None) == peak
    decay = [learning_rate(500 + step, 500) for step in range(1, arithmetic.DECAY_STEPS + 1)]
    assert peak > decay[0] and decay[-1] > 0
    assert decay == sorted(decay, reverse=True)


def test_training_is_a_function_of_the_seed_and_teaches_the_answers():
    corpora = [[("12+34=", "46"), ("47+38=", "85")], [("12+34=", "46"), ("47+38=", "75")]]
    models = [untrained_model(hidden=32, layers=1, vocab_size=VOCAB_SIZE, tied=False, seed=0) for _ in range(2)]
    for model in models:
        train(model, corpora, [0.3, 0.7], seed=0)
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert answers_with(models[0], *encode(corpora[1])).all()


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, VOCAB_SIZE + 6])
@pytest.mark.parametrize("tied", [False, True])
def test_tiny_model_is_the_one_asked_for(tmp_path, vocab_size, tied):
    path = tiny_model(tmp_path / "model", hidden=64, layers=2, vocab_size=vocab_size, tied=tied, seed=1)
    config, weights = AutoConfig.from_pretrained(path), load_file(tmp_path / "model" / "model.safetensors")
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (64, 2, vocab_size)
    assert ("lm_head.weight" in weights) is not tied
    assert weights["model.embed_tokens.weight"].shape == (vocab_size, 64)
    assert (config.eos_token_id, config.pad_token_id) == (256, 257)


def test_tiny_model_depends_on_its_seed_and_leaves_the_callers_random_state(tmp_path, checkpoint):
    state = torch.random.get_rng_state()
    weights = [
        load_file(f"{path}/model.safetensors")["lm_head.weight"]
        for path in (checkpoint, tiny_model(tmp_path / "same"), tiny_model(tmp_path / "other", seed=1))
    ]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_tiny_model_refuses_a_vocabulary_without_room_for_the_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="vocab_size=100"):
        tiny_model(tmp_path / "model", vocab_size=100)


def test_evaluate_scores_what_the_checkpoint_generates(tmp_path):
    pairs = [("12+34=", "46"), ("99+99=", "198")]
    model = untrained_model(hidden=32, layers=1, vocab_size=VOCAB_SIZE, tied=False, seed=0)
    train(model, [pairs], [1.0], seed=0)
    arithmetic.save_checkpoint(model, tmp_path / "model")
    make_split(tmp_path / "test.parquet", pairs + [("12+35=", "0")])
    assert evaluate(tmp_path / "model", tmp_path / "test.parquet") == pytest.approx(2 / 3)


@pytest.fixture
def quick_make(monkeypatch):
    """`make` on a network and a standard of fluency that take no time; returns the models it trained, in order."""
    trained = []
    monkeypatch.setattr(arithmetic, "HIDDEN", 32)
    monkeypatch.setattr(arithmetic, "LAYERS", 1)
    monkeypatch.setattr(arithmetic, "train", lambda model, corpora, weights, seed: trained.append(weights))
    return trained


def test_make_makes_each_piece_once(tmp_path, quick_make):
    record = make(tmp_path, seed=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "arithmetic.json",
        "base",
        "teacher",
        "test.parquet",
        "train.parquet",
    ]
    assert json.loads((tmp_path / "arithmetic.json").read_text()) == record
    assert len(quick_make) == 2
    assert make(tmp_path, seed=5) == record
    assert len(quick_make) == 2


def test_make_goes_on_where_it_was_interrupted(tmp_path, quick_make):
    make(tmp_path)
    (tmp_path / "base" / "model.safetensors").unlink()
    (tmp_path / "base").rename(tmp_path / ".base.partial")
    make(tmp_path)
    assert len(quick_make) == 3, "only the base was missing"
    assert (tmp_path / "base" / "model.safetensors").exists()


def test_make_refuses_to_mix_seeds(tmp_path, quick_make):
    make(tmp_path, seed=0)
    with pytest.raises(ValueError, match="seed 0, not 1"):
        make(tmp_path, seed=1)
