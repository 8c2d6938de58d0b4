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
"""The report, from metrics and token dumps to one HTML page; and what is shown of a training, and how that ends."""

import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time

import metrics
import numpy as np
import progress
import pytest
import report
import screenshot
import torch
from arithmetic import VOCAB_SIZE, build_tokenizer, untrained_model
from conftest import ROOT
from generations import TOP, kl_divergence, score_generation, write_generations

from verl.utils.logger import LocalLogger

EXAMPLE = ROOT / "examples" / "on_policy_distillation"

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


def write_metrics(path, run=METRICS):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"step": step, "data": data}) + "\n" for step, data in run.items()))


@pytest.fixture
def make_report(tmp_path, monkeypatch):
    """Calls report.py with arguments, and returns its page."""

    def call(*arguments):
        out = tmp_path / "report.html"
        monkeypatch.setattr(sys, "argv", ["report.py", "--out", str(out), *map(str, arguments)])
        report.main()
        return out.read_text(encoding="utf-8")

    return call


def test_columns_have_the_steps_that_have_them():
    assert list(report.column(METRICS, "distillation/kl").items()) == [(1, 0.5), (2, 0.25)]
    assert list(report.column(METRICS, "val-core/task/acc/mean@1").items()) == [(0, 0.4), (2, 0.6)]


def test_a_metric_that_was_not_finite_is_a_gap_in_its_line(tmp_path):
    write_metrics(tmp_path / "run.jsonl", {1: {"kl": 0.5}, 2: {"kl": None}, 3: {"kl": 0.1}})
    values = report.column(metrics.read_metrics(tmp_path / "run.jsonl"), "kl")
    assert list(values.index) == [1, 2, 3] and math.isnan(values[2]) and list(values[[1, 3]]) == [0.5, 0.1]


def test_phases_of_a_step_add_up_to_it():
    assert report.phase_seconds(METRICS) == {"gen": 2.0, "teacher": 0.5, "other": 1.5}
    assert report.phase_seconds({0: METRICS[0]}) == {}


def test_a_run_is_a_file_or_a_folder_with_or_without_a_name(tmp_path):
    path = tmp_path / "mine" / "metrics" / "0000.jsonl"
    write_metrics(path)
    paths = report.named_paths([str(tmp_path / "mine"), f"a b={path}"])
    assert paths == {"mine": tmp_path / "mine", "a b": path}
    assert [report.read_file_or_folder(path) for path in paths.values()] == [METRICS, METRICS]
    with pytest.raises(ValueError, match="no metrics"):
        report.read_file_or_folder(tmp_path / "nothing")


def test_a_run_is_read_from_what_its_console_said(tmp_path, capsys):
    """VERL's own console logger, in an actor of Ray's; there is more in such a file."""
    run = METRICS | {
        3: {"distillation/kl": np.float64(0.125), "val-core/a b:c/acc/mean@1": 1, "timing_s/step": math.nan}
    }
    for step, data in run.items():
        LocalLogger().log(data, step)
    lines = capsys.readouterr().out.splitlines()
    (tmp_path / "train.log").write_text(
        "step  1/3   KL 0.5   3.0 s\n" + "".join(f"\x1b[36m(TaskRunnerV1 pid=7)\x1b[0m {line}\n" for line in lines)
    )
    assert report.read_file_or_folder(tmp_path / "train.log") == run | {3: run[3] | {"timing_s/step": None}}


def test_where_nothing_has_metrics_the_keys_that_keep_them_are_named(tmp_path, make_report):
    (tmp_path / "train.log").write_text("Total steps: 15\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "checkpoints").mkdir()
    for name in ("train.log", "empty.jsonl", "checkpoints"):
        with pytest.raises(SystemExit, match=r"trainer\.logger=\[console,file\]"):
            make_report(tmp_path / name)


def test_a_path_may_have_an_equals_sign(tmp_path, make_report):
    """Hydra names folders so."""
    pytest.importorskip("matplotlib")
    write_metrics(tmp_path / "lr=1e-5" / "run.jsonl", {1: {"distillation/kl": 0.5}})
    write_generations(tmp_path / "lr=1e-5" / "dump.jsonl", [record()])
    folder = tmp_path / "lr=1e-5"
    page = make_report(
        *(f"{folder}/run.jsonl", f"mine={folder}/run.jsonl"),
        *("--generations", f"{folder}/dump.jsonl", f"after={folder}/dump.jsonl"),
    )
    assert "Runs: run, mine<" in page and "<h3>dump</h3>" in page and "<h3>after</h3>" in page


def test_an_argument_that_is_no_path_in_either_reading_is_refused(tmp_path, make_report):
    with pytest.raises(SystemExit, match="there is neither lr=1/run.jsonl nor 1/run.jsonl"):
        make_report("lr=1/run.jsonl")


def test_two_runs_or_dumps_of_one_name_are_refused(tmp_path, make_report):
    for folder in ("a", "b"):
        write_metrics(tmp_path / folder / "metrics.jsonl")
        write_generations(tmp_path / folder / "step_3.rank0.jsonl", [record()])
    runs = [f"{tmp_path}/{folder}/metrics.jsonl" for folder in "ab"]
    dumps = [f"{tmp_path}/{folder}/step_3.rank0.jsonl" for folder in "ab"]
    with pytest.raises(SystemExit, match="a/metrics.jsonl and .*b/metrics.jsonl are both named 'metrics'.*NAME=PATH"):
        make_report(*runs)
    with pytest.raises(SystemExit, match=r"both named 'step_3\.rank0'"):
        make_report(runs[0], "--generations", *dumps)


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


@pytest.mark.parametrize(
    "changes",
    [{"tokens": 2}, {"kl": ["2.0", 0.0]}, {"prompt": None}, {"student_top": [[["<"]], [["<", 0.6]]]}, {"score": "1"}],
    ids=lambda changes: next(iter(changes)),
)
def test_a_dump_with_something_else_in_a_field_is_refused(tmp_path, changes):
    write_generations(tmp_path / "dump.jsonl", [record(), record(**changes)])
    with pytest.raises(ValueError, match=f"dump.jsonl, line 2: {next(iter(changes))} is "):
        report.read_generations(tmp_path / "dump.jsonl")


def test_a_file_of_another_kind_is_refused_with_its_line(tmp_path, make_report):
    run, dump, half, other = (tmp_path / f"{name}.jsonl" for name in ("run", "dump", "half", "other"))
    write_metrics(run)
    write_generations(dump, [record()])
    half.write_text(dump.read_text() + dump.read_text()[:40])
    other.write_bytes(b"PAR1\xff\n[]\n")
    with pytest.raises(SystemExit, match="dump.jsonl, line 1: a metrics file of VERL has 'step' and 'data'"):
        make_report(dump)
    with pytest.raises(SystemExit, match="other.jsonl, line 1: cut off, or the file is no metrics file of VERL"):
        make_report(other)
    with pytest.raises(SystemExit, match="run.jsonl, line 1: prompt is missing, so the file is no token dump"):
        make_report(run, "--generations", run)
    with pytest.raises(SystemExit, match="half.jsonl, line 2: cut off, or the file is no token dump"):
        make_report(run, "--generations", half)
    half.write_text("[]\n")
    with pytest.raises(SystemExit, match="half.jsonl, line 1: no JSON object"):
        make_report(run, "--generations", half)


def test_a_dump_without_sequences_is_read(tmp_path):
    """The trainer makes the file before it has something to write."""
    (tmp_path / "dump.jsonl").write_text("")
    assert report.read_generations(tmp_path / "dump.jsonl") == []


def test_tokens_are_escaped_coloured_by_their_kl_and_explained():
    text = report.page({}, {"before": [record()]})
    first, second = re.findall(
        r'<span class="token" style="background:rgba\(220,60,30,([\d.]+)\)" title="([^"]*)"', text
    )
    assert (first[0], second[0]) == ("1.00", "0.00")
    assert first[1].startswith("KL 2.0000\nteacher: &#39;3&#39; 90.0%")
    assert ">&lt;</span>" in text and "<<" not in text


def test_a_token_that_is_not_in_the_loss_has_no_colour():
    entry = record(kl=[None, 1.0], teacher_top=[None, [["3", 0.9]]], student_top=[None, [["3", 0.8]]])
    text = report.page({}, {"step 3": [entry]})
    assert 'title="not in the loss">&lt;</span>' in text and text.count("background:rgba") == 1


def test_what_is_not_finite_is_full_red_and_leaves_the_scale_to_the_others(tmp_path):
    kls = [2.0, 1.0, math.nan, math.inf]
    entry = record(tokens=["a", "b", "c", "d"], kl=kls, teacher_top=[[["3", 0.9]]] * 4, student_top=[[["<", 0.6]]] * 4)
    write_generations(tmp_path / "dump.jsonl", [entry])
    text = report.page({}, {"step 3": report.read_generations(tmp_path / "dump.jsonl")})
    assert re.findall(r"rgba\(220,60,30,([^)]*)\)", text) == ["1.00", "0.50", "1.00", "1.00"]
    assert 'title="KL nan\n' in text and 'title="KL inf\n' in text
    assert "full red: 2.000 nats, and 2 that are not finite" in text


def test_a_long_sequence_can_be_wrapped():
    text = report.page({}, {"a": [record(prompt="so  many words")]})
    assert text.count("</span><wbr>") == 2
    assert ">so  many words<" in text  # a line may end at an ordinary space, which the style keeps
    assert "overflow-wrap: anywhere" in text and "min-width: 0" in text
    assert "white-space: break-spaces" in text


def test_the_page_is_one_file_with_its_pictures(tmp_path, make_report, capsys):
    pytest.importorskip("matplotlib")
    write_metrics(tmp_path / "metrics.jsonl")
    write_generations(tmp_path / "after.jsonl", [record()])
    page = make_report(f"mine={tmp_path}/metrics.jsonl", "--generations", f"after={tmp_path}/after.jsonl")
    assert page.count("data:image/svg+xml;base64,") == 4
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "report.html" in capsys.readouterr().out
    assert "teacher.dump_freq" not in page


def test_the_page_says_which_pictures_it_lacks_and_why(tmp_path, make_report):
    pytest.importorskip("matplotlib")
    write_metrics(tmp_path / "mine.jsonl")
    page = make_report(tmp_path / "mine.jsonl")
    assert re.findall("<li>(.*?)</li>", page) == ["Same most likely token: <code>distillation/top1_agreement</code>"]
    assert "No tokens: <code>teacher.dump_freq=N</code>" in page and "<code>--generations TITLE=FILE</code>" in page
    write_metrics(tmp_path / "mine.jsonl", {1: {"distillation/kl": None}})
    page = make_report(tmp_path / "mine.jsonl")
    assert "data:image" not in page
    assert "<li>Held-out accuracy: <code>val-core/&lt;data source&gt;/&lt;metric&gt;/mean@&lt;n&gt;</code></li>" in page
    assert "<code>distillation/kl</code>" in page


def test_every_data_source_of_validation_has_its_picture(tmp_path, make_report):
    pytest.importorskip("matplotlib")
    validated = {
        "val-core/openai/gsm8k/acc/best@4/mean": 0.9,
        "val-core/openai/gsm8k/acc/mean@4": 0.5,
        "val-core/math/reward/mean@1": -0.5,
        "val-aux/math/length/mean@1": 3.0,
    }
    write_metrics(tmp_path / "mine.jsonl", {0: validated})
    page = make_report(tmp_path / "mine.jsonl")
    assert re.findall('<img alt="([^"]*)"', page) == ["Held-out accuracy: openai/gsm8k", "Held-out reward: math"]
    assert metrics.accuracy(validated) == 0.5


def test_without_matplotlib_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        report.import_pyplot()


@pytest.mark.parametrize("module", ["jinja2", "pandas"])
def test_without_what_comes_with_verl_it_says_so(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match=f"report.py needs {module}, .*: pip install {module}"):
        runpy.run_path(str(EXAMPLE / "report.py"))


def test_names_of_runs_and_dumps_are_escaped(tmp_path, make_report):
    pytest.importorskip("matplotlib")
    write_metrics(tmp_path / "run.jsonl", {1: {"distillation/kl": None, "val-core/<i>/acc/mean@1": 0.5}})
    write_generations(tmp_path / "dump.jsonl", [record(prompt="<script>")])
    page = make_report(f"<b>={tmp_path}/run.jsonl", "--generations", f"<u>={tmp_path}/dump.jsonl")
    assert not re.search("<(i|b|u|script)>", page)
    assert all(f"&lt;{name}&gt;" in page for name in ("i", "b", "u", "script"))


def test_without_a_browser_a_screenshot_says_so(tmp_path, monkeypatch):
    (tmp_path / "report.html").write_text(report.page({}, {"before": [record()]}), encoding="utf-8")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["screenshot.py", str(tmp_path / "report.html"), str(tmp_path / "out.png")])
    with pytest.raises(SystemExit, match=r"no browser on PATH \(chromium, .*\): apt-get install chromium"):
        screenshot.main()


def test_a_report_without_tokens_has_no_screenshot(tmp_path):
    (tmp_path / "report.html").write_text(report.page({}, {}), encoding="utf-8")
    with pytest.raises(ValueError, match="report.html has no coloured tokens: make it with report.py --generations"):
        screenshot.only_tokens(tmp_path / "report.html")


@pytest.mark.skipif(not any(map(shutil.which, screenshot.BROWSERS)), reason="no browser on PATH")
def test_a_screenshot_has_the_colours_of_the_tokens_and_nothing_below_them(tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "report.html").write_text(report.page({}, {"before": [record()]}), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["screenshot.py", str(tmp_path / "report.html"), str(tmp_path / "out.png")])
    screenshot.main()
    with image.open(tmp_path / "out.png") as picture:
        colours = {colour: count for count, colour in picture.convert("RGB").getcolors()}
        assert picture.width == 2 * 880 and picture.height < 1000
    red = sum(count for (r, g, b), count in colours.items() if abs(r - 220) + abs(g - 60) + abs(b - 30) < 12)
    assert 200 < red < 0.01 * picture.width * picture.height  # one token of the two


@pytest.mark.parametrize("path", ["README.md", "examples/on_policy_distillation/README.md"])
def test_the_pages_show_the_screenshot(path):
    image = pytest.importorskip("PIL.Image")
    [(alternative, name)] = re.findall(r"!\[([^]]+)\]\(([^)]*report\.png)\)", (ROOT / path).read_text(encoding="utf-8"))
    file = (ROOT / path).parent / name
    assert len(alternative) > 20 and file.stat().st_size < 200_000
    with image.open(file) as picture:
        assert picture.width == screenshot.DENSITY * screenshot.WIDTH and picture.mode == "P"


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


def test_what_a_student_never_says_adds_nothing_to_its_kl():
    log_s, log_t = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5]]).log(), torch.tensor([0.5, 0.5]).log()
    log_t = torch.stack([log_t, torch.tensor([1.0, 0.0]).log(), torch.tensor([1.0, 0.0]).log()])
    assert kl_divergence(log_s, log_t).tolist() == pytest.approx([math.log(2), 0.0, math.inf])
    assert kl_divergence(torch.full((1, 2), math.nan), log_t[:1]).isnan().all()  # not hidden


# What a driver prints, with Ray's names before it or without, and what of it is shown.
OUTPUT = """
(TaskRunnerV1 pid=11) step:1 - distillation/kl:0.5 - timing_s/step:2.0
(TaskRunnerV1 pid=11) step 1/9   KL 0.5000   2.0 s   0:00:16 left
(WorkerDict pid=12, ip=10.0.0.2) Total steps: 9
(TaskRunnerV1 pid=11, ip=10.0.0.2) step 2/9   reward 0.250   2.0 s
step 9/9   done; the trained model: /checkpoints
(TaskRunnerV1 pid=11) step 3/9   KL"""
SHOWN = """
a   step 1/9   KL 0.5000   2.0 s   0:00:16 left
a   step 2/9   reward 0.250   2.0 s
a   step 9/9   done; the trained model: /checkpoints
"""


def test_what_the_trainer_says_of_its_steps_is_shown_and_all_is_kept(tmp_path, capsys):
    (tmp_path / "train.log").write_text("step 8/9   of an earlier start\n")
    progress.train(tmp_path, ["printf", "%s", OUTPUT], label="a   ")
    first, shown = capsys.readouterr().out.split("\n", 1)
    assert first.startswith("a   training with VERL") and "train.log" in first
    assert "\n" + shown == SHOWN  # the last line is not whole
    assert (tmp_path / "train.log").read_text() == "step 8/9   of an earlier start\n" + OUTPUT


def test_a_line_is_shown_once_it_is_whole(tmp_path):
    with open(tmp_path / "log", "w") as output, open(tmp_path / "log") as log:
        seen = []
        for part in ("one\ntw", "", "o\n", "three\n"):
            output.write(part)
            output.flush()
            seen.append(progress.whole_lines(log))
    assert seen == [["one\n"], [], ["two\n"], ["three\n"]]


def trainer(pid_file, before=""):
    """A command that writes its process id, and then does as little as a trainer that waits."""
    return ["sh", "-c", f"{before} echo $$ > {pid_file}.part; mv {pid_file}.part {pid_file}; exec sleep 60"]


def read_pid(path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return int(path.read_text())


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("before", ["", "trap '' TERM;"], ids=["ends", "will not end"])
def test_a_trainer_does_not_outlive_an_error_of_its_progress(tmp_path, monkeypatch, before):
    pids = []

    def fail(*_):
        pids.append(read_pid(tmp_path / "pid"))
        raise RuntimeError("of any kind")

    monkeypatch.setattr(progress, "follow", fail)
    monkeypatch.setattr(progress, "SECONDS_TO_END", 0.5)
    with pytest.raises(RuntimeError, match="of any kind"):
        progress.train(tmp_path, trainer(tmp_path / "pid", before))
    assert not is_running(*pids)


def end(command, pid_files, number):
    """Send signal `number` to `command` once the `pid_files` are there. Returns which still run, and the output."""
    process = subprocess.Popen(command, cwd=EXAMPLE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    pids = [read_pid(path) for path in pid_files]
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    running = [pid for pid in pids if is_running(pid)]
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    assert process.returncode == 128 + number, output
    return running, output


# Two trainers at a time, as headline.py has them; the third must not start.
IN_THREADS = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from progress import end_with_trainers, train

folder = Path(sys.argv[1])
end_with_trainers()
with ThreadPoolExecutor(2) as pool:
    list(pool.map(lambda name: train(folder / name, [*sys.argv[2:-1], sys.argv[-1].replace("NAME", name)]), "abc"))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.skipif(signal.getsignal(signal.SIGINT) is signal.SIG_IGN, reason="in the background SIGINT is ignored")
def test_trainers_do_not_outlive_a_signal_to_their_progress(tmp_path, number):
    command = [sys.executable, "-c", IN_THREADS, str(tmp_path), *trainer(tmp_path / "NAME.pid")]
    running, output = end(command, [tmp_path / "a.pid", tmp_path / "b.pid"], number)
    assert not running
    assert not (tmp_path / "c.pid").exists()
    assert "Traceback" not in output and "training failed" not in output
