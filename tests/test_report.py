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
"""The report: from metrics and token dumps to one HTML page."""

import json
import re
import sys

import pytest
import report
import torch
from arithmetic import VOCAB_SIZE, build_tokenizer, untrained_model
from generations import TOP, score_generation, write_generations
from progress import clock, seconds_left, step_line

METRICS = {
    0: {"val-core/task/acc/mean@1": 0.4},
    1: {"distillation/kl": 0.5, "timing_s/step": 3.0, "timing_s/gen": 2.0, "timing_s/teacher": 0.5},
    2: {
        "distillation/kl": 0.25,
        "distillation/student_entropy": 0.7,
        "timing_s/step": 5.0,
        "timing_s/gen": 2.0,
        "timing_s/teacher": 0.5,
        "timing_s/testing": 1.0,
        "val-core/task/acc/mean@1": 0.6,
    },
}


def record(**changes):
    entry = {
        "prompt": "1+2=",
        "tokens": ["<", "3"],
        "kl": [2.0, 0.0],
        "teacher_top": [[["3", 0.9], ["<", 0.1]]] * 2,
        "student_top": [[["<", 0.6]]] * 2,
        "score": 1.0,
    }
    return entry | changes


def write_metrics(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"step": step, "data": data}) + "\n" for step, data in METRICS.items()))


def test_columns_have_the_steps_that_have_them():
    assert report.column(METRICS, "distillation/kl") == ([1, 2], [0.5, 0.25])
    assert report.accuracies(METRICS) == ([0, 2], [0.4, 0.6])


def test_phases_of_a_step_add_up_to_it():
    assert report.phase_seconds(METRICS) == {"gen": 2.0, "teacher": 0.5, "other": 1.5}
    assert report.phase_seconds({0: METRICS[0]}) == {}


def test_a_run_is_a_file_or_a_folder_with_or_without_a_name(tmp_path):
    path = tmp_path / "mine" / "metrics" / "0000.jsonl"
    write_metrics(path)
    assert report.read_named_run(str(tmp_path / "mine")) == ("mine", METRICS)
    assert report.read_named_run(f"a b={path}") == ("a b", METRICS)
    with pytest.raises(ValueError, match="no metrics"):
        report.read_named_run(str(tmp_path / "nothing"))


@pytest.mark.parametrize("changes, message", [({"kl": [1.0]}, "one entry for each token"), ({"score": 0}, None)])
def test_a_dump_is_checked_as_it_is_read(tmp_path, changes, message):
    write_generations(tmp_path / "step_3.jsonl", [record(**changes)])
    if message is None:
        assert report.read_generations(tmp_path / "step_3.jsonl") == [record(**changes)]
    else:
        with pytest.raises(ValueError, match=message):
            report.read_generations(tmp_path / "step_3.jsonl")


def test_a_dump_without_a_field_is_refused(tmp_path):
    entry = record()
    del entry["teacher_top"]
    write_generations(tmp_path / "dump.jsonl", [entry])
    with pytest.raises(ValueError, match="line 1: teacher_top is missing"):
        report.read_generations(tmp_path / "dump.jsonl")


def test_tokens_are_escaped_coloured_by_their_kl_and_explained():
    text = report.generations({"before": [record()]})
    first, second = re.findall(
        r'<span class="token" style="background:rgba\(220,60,30,([\d.]+)\)" title="([^"]*)"', text
    )
    assert (first[0], second[0]) == ("1.00", "0.00")
    assert first[1].startswith("KL 2.0000\nteacher: &#x27;3&#x27; 90.0%")
    assert ">&lt;</span>" in text and "<<" not in text


def test_a_token_that_is_not_in_the_loss_has_no_colour():
    entry = record(kl=[None, 1.0], teacher_top=[None, [["3", 0.9]]], student_top=[None, [["3", 0.8]]])
    text = report.generations({"step 3": [entry]})
    assert 'title="not in the loss">&lt;</span>' in text and text.count("background:rgba") == 1


def test_the_page_is_one_file_with_its_pictures(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    write_metrics(tmp_path / "metrics.jsonl")
    write_generations(tmp_path / "after.jsonl", [record()])
    arguments = ["--out", str(tmp_path / "report.html"), f"mine={tmp_path}/metrics.jsonl"]
    arguments += ["--generations", f"after={tmp_path}/after.jsonl"]
    monkeypatch.setattr(sys, "argv", ["report.py", *arguments])
    report.main()
    page = (tmp_path / "report.html").read_text()
    # No run has the teacher's top-1 agreement; the other four pictures are there.
    assert page.count("data:image/svg+xml;base64,") == 4
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "report.html" in capsys.readouterr().out


def test_without_matplotlib_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        report.import_pyplot()


def test_scored_generations_have_the_reports_format(tmp_path):
    student, teacher = (untrained_model(32, 1, VOCAB_SIZE, tied=False, seed=seed).eval() for seed in (0, 1))
    entry = score_generation("12+34=", student, teacher, build_tokenizer(), max_new_tokens=4, scorer=lambda _: 0.5)
    write_generations(tmp_path / "dump.jsonl", [entry])
    assert report.read_generations(tmp_path / "dump.jsonl") == [entry]
    assert entry["score"] == 0.5 and 1 <= len(entry["tokens"]) <= 4
    assert all(kl > 0 for kl in entry["kl"])
    assert all(len(top) == TOP for top in entry["teacher_top"] + entry["student_top"])
    # Greedy: what was said is what the student found most likely.
    assert [top[0][0] for top in entry["student_top"]] == entry["tokens"]


def test_a_student_that_is_its_teacher_has_no_kl():
    model = untrained_model(32, 1, VOCAB_SIZE, tied=False, seed=0).eval()
    entry = score_generation("12+34=", model, model, build_tokenizer(), max_new_tokens=4)
    assert entry["kl"] == [0.0] * len(entry["tokens"]) and entry["score"] is None
    assert torch.is_grad_enabled()


def test_progress_says_step_kl_accuracy_seconds_and_time_left():
    assert seconds_left(METRICS, 1, 11) == pytest.approx(30.0)
    assert seconds_left(METRICS, 2, 12) == pytest.approx(45.0)
    assert seconds_left(METRICS, 0, 12) is None and seconds_left(METRICS, 2, 2) is None
    line = step_line(2, 12, METRICS[2], seconds_left(METRICS, 2, 12))
    assert line == "step   2/12   KL 0.2500   5.0 s   held-out accuracy 60.0%   0:45 min left"
    assert clock(61) == "1:01 min"
