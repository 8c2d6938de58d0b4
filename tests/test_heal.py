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
"""The healing example: which layers go, what is left of the model, what is measured, and the whole script."""

import json
import math
import shutil
import subprocess
import sys

import heal
import pytest
import python_docs
import torch
from arithmetic import build_tokenizer, save_checkpoint, tiny_model
from conftest import ROOT
from drop_layers import drop_layers, evenly_spread, require_same
from heal import negative_log_likelihood, parse, passages, plain_template, prepare, split
from hydra.core.override_parser.overrides_parser import OverridesParser
from metrics import read_run
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

LAYERS, DROPPED = 5, [1, 3]


# ----------------------------------------------------------------------------------------------------------------------
# layers


def test_dropped_layers_are_evenly_spread_between_the_first_and_the_last():
    assert evenly_spread(28, 3) == [7, 14, 21]
    for layers in range(3, 41):
        for drop in range(1, layers - 1):
            dropped = evenly_spread(layers, drop)
            assert len(set(dropped)) == drop and 0 < min(dropped) and max(dropped) < layers - 1
            gaps = [b - a for a, b in zip([0, *dropped], [*dropped, layers], strict=True)]
            assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("drop", [0, 4, 6])
def test_the_first_and_the_last_layer_stay(drop):
    with pytest.raises(ValueError, match=f"--drop {drop} of 5 layers, .*choose 1 to 3"):
        evenly_spread(5, drop)


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": {},
    "qwen3": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2},  # the last three are sliding
    "gemma2": {"sliding_window": 3},  # every second is
    "smollm3": {"no_rope_layers": [1, 1, 0, 1, 1], "use_sliding_window": False},
    "gpt2": {},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48},
}


def random_model(family):
    torch.manual_seed(0)
    settings = SIZES | FAMILIES[family]
    if family == "gpt2":
        settings = {key: value for key, value in settings.items() if key not in ("intermediate_size", "head_dim")}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # so that each layer counts
    return model


def skip_layer(module, args, kwargs, output):
    """A hook that makes a layer hand on what it was given."""
    given = args[0] if args else kwargs["hidden_states"]
    return (given, *output[1:]) if isinstance(output, tuple) else given


def layers_of(model):
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == LAYERS)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_shortened_model_is_the_model_in_which_the_dropped_layers_do_nothing(family, tmp_path):
    input_ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    model, shortened = random_model(family), random_model(family)
    whole = model(input_ids=input_ids).logits
    for index in DROPPED:
        layers_of(model)[index].register_forward_hook(skip_layer, with_kwargs=True)
    expected = model(input_ids=input_ids).logits
    assert (expected - whole).abs().max() > 0.1 * whole.abs().max()

    drop_layers(shortened, DROPPED)
    torch.testing.assert_close(shortened(input_ids=input_ids).logits, expected)
    shortened.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert again.config.num_hidden_layers == LAYERS - len(DROPPED)
    torch.testing.assert_close(again(input_ids=input_ids).logits, expected)
    require_same(shortened, again, input_ids[:1])
    # With a cache, in which each layer finds its part by its number.
    for each in (shortened, again):
        options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
        cached, plain = (each.generate(input_ids, use_cache=use_cache, **options) for use_cache in (True, False))
        assert torch.equal(cached, plain)


def test_a_model_that_is_another_one_when_loaded_is_refused():
    model, other = random_model("llama"), random_model("llama")
    with torch.no_grad():
        layers_of(other)[2].mlp.down_proj.weight.mul_(2.0)
    with pytest.raises(ValueError, match="LlamaForCausalLM .* gives other logits .* cannot be dropped"):
        require_same(model, other, torch.tensor([[5, 6, 7]]))


def test_a_model_without_a_list_of_layers_is_refused():
    model = random_model("llama")
    model.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match="LlamaForCausalLM has no list of its 7 layers"):
        drop_layers(model, [2])


# ----------------------------------------------------------------------------------------------------------------------
# text


def test_held_out_passages_have_no_paragraph_that_is_learnt_from():
    learnt, held_out = split(passages(python_docs.reference()))
    assert len(held_out) == heal.HELD_OUT and len(learnt) >= heal.STEPS * heal.PROMPTS
    paragraphs = [{part for passage in found for part in passage.split("\n\n")} for found in (learnt, held_out)]
    assert not paragraphs[0] & paragraphs[1]
    assert all(len(passage) >= heal.PASSAGE for passage in learnt + held_out)


def test_a_text_that_is_too_short_is_refused(tmp_path):
    model = tiny_model(tmp_path / "model", layers=LAYERS)
    (tmp_path / "text").write_text("\n\n".join(f"{number} " + "word " * 200 for number in range(63)))
    with pytest.raises(ValueError, match="63 passages of 600 characters, and 64 are needed: .*--text"):
        prepare(tmp_path, model, 3, str(tmp_path / "text"))


def test_prompts_that_are_too_long_when_read_again_do_not_count(tmp_path, monkeypatch):
    model = tiny_model(tmp_path / "model", layers=LAYERS)
    # A token is a byte, and cuts the first passage within a letter; what stands for the half has a token more.
    texts = ["\N{EURO SIGN}" * 700, *(f"{number} " + "word " * 200 for number in range(63))]
    (tmp_path / "text").write_text("\n\n".join(texts))
    monkeypatch.setattr(heal, "MAX_PROMPT_TOKENS", heal.PROMPT_TOKENS)
    with pytest.raises(ValueError, match="31 passages to learn from .* 32 tokens .*, and 32 are needed: .*--text"):
        prepare(tmp_path, model, 3, str(tmp_path / "text"))
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize("begins", [False, True])
def test_the_template_reads_a_prompt_as_the_tokenizer_reads_a_text(begins):
    tokenizer = build_tokenizer()
    if begins:
        tokenizer.bos_token = tokenizer.eos_token
        special = [(tokenizer.bos_token, tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{tokenizer.bos_token} $A", special_tokens=special
        )
    text = 'a "text" of\n  two lines {{ x }}'
    chat, template = [{"role": "user", "content": text}], plain_template(tokenizer)
    read = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=True, return_dict=False)
    assert read == tokenizer(text)["input_ids"]
    assert len(read) == len(text) + begins
    override = OverridesParser.create().parse_override(f"key={heal.quoted(template)}")
    assert override.value() == template


def test_arguments_may_come_in_any_order(tmp_path):
    for line in ("M F --drop 2 a=1 +b=2", "--drop 2 M F a=1 +b=2", "M F a=1 --drop 2 +b=2"):
        arguments = parse(line.split())
        assert (arguments.model, arguments.out.name, arguments.drop) == ("M", "F", 2)
        assert arguments.rest == ["a=1", "+b=2"]
    assert parse(["M", "a=1"]).out == ROOT / "runs" / "heal"
    assert parse([str(tmp_path)]).model == str(tmp_path)
    with pytest.raises(SystemExit):
        parse([str(tmp_path / "missing")])


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("M trainer.total_training_steps=20", "trainer.total_training_steps=20: give the number of steps with --steps"),
        ("M F a=1 ++trainer.total_training_steps=20", "give the number of steps with --steps"),
        ("M --steps 0", "--steps: 0: give a whole number above 0"),
        ("M --steps=-3", "--steps: -3: give a whole number above 0"),
    ],
)
def test_steps_are_given_in_one_way_and_there_is_one_at_least(line, error, capsys):
    with pytest.raises(SystemExit):
        parse(line.split())
    assert error in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# the run


@pytest.fixture
def shell_script(tmp_path):
    """heal.sh with a bootstrap.sh that says that it was there, and fails."""
    script, bootstrap = tmp_path / "examples" / "heal" / "heal.sh", tmp_path / "scripts" / "bootstrap.sh"
    for path in (script, bootstrap):
        path.parent.mkdir(parents=True)
    shutil.copy(ROOT / "examples" / "on_policy_distillation" / "heal.sh", script)
    bootstrap.write_text("#!/bin/sh\necho bootstrap; exit 3\n")
    bootstrap.chmod(0o755)
    return lambda line: subprocess.run([str(script), *line.split()], capture_output=True, text=True)


@pytest.mark.parametrize("line", ["-h", "--help", "M F --help"])
def test_help_needs_no_installation(shell_script, line):
    done = shell_script(line)
    assert (done.returncode, done.stderr) == (0, "")
    first, *others = done.stdout.splitlines()
    assert first.startswith("Drops a few layers") and others[-1].endswith("the rest is heal.py.")
    assert f"(default: {heal.DROP})" in done.stdout and f"(default: {heal.STEPS})" in done.stdout


@pytest.mark.parametrize("line", ["", "--drop 2 M", "-x"])
def test_without_a_model_nothing_is_installed(shell_script, line):
    done = shell_script(line)
    assert (done.returncode, done.stdout) == (2, "") and "MODEL comes first" in done.stderr


def test_with_a_model_what_it_needs_is_installed(shell_script):
    done = shell_script("M --drop 2")
    assert (done.returncode, done.stdout) == (3, "bootstrap\n")


@torch.no_grad()
def direct_nll(path, texts):
    """Token by token, from the probabilities in float64."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).double().eval(), AutoTokenizer.from_pretrained(path)
    values = []
    for text in texts:
        ids = tokenizer(text)["input_ids"][: heal.SCORED_TOKENS]
        probabilities = model(input_ids=torch.tensor([ids])).logits[0].softmax(-1)
        values += [-math.log(probabilities[place, token]) for place, token in enumerate(ids[1:])]
    return sum(values) / len(values)


def test_the_negative_log_likelihood_is_a_mean_over_tokens(tmp_path):
    path = tiny_model(tmp_path / "model", seed=3)
    texts = ["a", "short", "and a longer one, of more tokens"]
    assert negative_log_likelihood(path, texts) == pytest.approx(direct_nll(path, texts), rel=1e-5)


def test_a_training_that_ended_before_its_last_step_is_an_error(tmp_path, monkeypatch):
    """As VERL ends it, without an error, where the epochs are at an end or a folder has had more steps."""

    def train(folder, command, environment):
        (said,) = [argument for argument in command if argument.startswith("trainer.total_epochs=")]
        assert "trainer.total_training_steps=40" in command
        assert int(said.partition("=")[2]) >= 40  # as an epoch may be of one step
        (folder / "checkpoints" / "global_step_30" / "actor" / "huggingface").mkdir(parents=True)

    monkeypatch.setattr(heal, "train", train)
    model = tiny_model(tmp_path / "model", layers=LAYERS)
    with pytest.raises(ValueError, match="ended without .*global_step_40.*--steps"):
        heal.run(parse([model, str(tmp_path / "out"), "--steps", "40"]))
    assert not (tmp_path / "out" / "results.json").exists()


def language_model(path, seed=0):
    """A model that has learnt the frequencies of the text's characters and a little more, in a few seconds."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            max_position_embeddings=256,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    ids = torch.tensor(tokenizer(python_docs.reference()[:100_000])["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        starts = torch.randint(len(ids) - 64, (16,)).tolist()
        batch = torch.stack([ids[start : start + 64] for start in starts])
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    save_checkpoint(model, path)
    return path


def test_the_whole_script_heals(tmp_path, monkeypatch, capsys):
    model, out = language_model(tmp_path / "model"), tmp_path / "out"
    rate = "actor_rollout_ref.actor.optim.lr=2e-3"
    # In this process, which has imported what the script needs. The signals are pytest's.
    monkeypatch.setattr(heal, "end_with_trainers", lambda: None)
    monkeypatch.setattr(sys, "argv", ["heal.py", str(model), str(out), "--steps", "2", rate])
    heal.main()
    printed = capsys.readouterr().out
    results, record = (json.loads((out / name).read_text()) for name in ("results.json", "heal.json"))
    assert results["dropped"] == [1, 2, 3] and "without layers 1, 2, 3 (counted from 0)" in printed
    assert [row["step"] for row in results["steps"]] == [1, 2]
    lines = [line for line in printed.splitlines() if line.startswith("step ")]
    for row, line in zip(results["steps"], lines[:2], strict=True):
        assert line.startswith(f"step {row['step']}/2   KL {row['kl']:.4f}   ")
    assert lines[2:] == [f"step 2/2   done; the trained model: {out / results['checkpoint']}"]
    assert [row["kl"] for row in results["steps"]] == [step["distillation/kl"] for step in read_run(out).values()]

    paths = {"student before": out / "student", "student after": out / results["checkpoint"], "teacher": model}
    held_out = results["held_out"]
    for name, path in paths.items():
        nll = direct_nll(path, record["held_out"])
        assert held_out[name]["nll"] == pytest.approx(nll, rel=1e-4)
        assert held_out[name]["perplexity"] == pytest.approx(math.exp(nll), rel=1e-3)
        assert f"{held_out[name]['nll']:.3f}" in printed
    before, after, teacher = (held_out[name]["nll"] for name in ("student before", "student after", "teacher"))
    assert teacher < before and after < (before + teacher) / 2
    assert "after" in (out / "report.html").read_text()

    for said in ([], ["--steps", "2", rate], ["--drop", "3"]):
        assert heal.run(parse([str(model), str(out), *said])) == results  # shown, not done again
    for said in (["--drop", "2"], ["--steps", "8"], [rate, "data.seed=1"], ["--text", str(model / "config.json")]):
        with pytest.raises(ValueError, match="choose another folder"):
            heal.run(parse([str(model), str(out), *said]))
