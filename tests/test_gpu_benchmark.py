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
"""benchmarks/gpu/run.sh: a dry run of every step on this processor, and what is recorded of steps that do not end well.

The dry run takes most of a core's minute: steps import VERL in processes of their own. It trains nothing through Ray:
of the step `trainer` it composes the configuration.
"""

import json
import os
import resource
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from metrics import next_metric_file

sys.path += [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "gpu")]

import engine  # noqa: E402
import record  # noqa: E402
import render  # noqa: E402
import steps  # noqa: E402
import trainer  # noqa: E402
import trainer_update  # noqa: E402

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu")
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu" / "run.sh", "--dry-run", "--out", out],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    return done, {path.stem: json.loads(path.read_text()) for path in out.iterdir()}


def written(folder, found):
    for name, step in found.items():
        (folder / f"{name}.json").write_text(json.dumps(step))
    return folder


def test_every_step_runs_at_small_sizes(dry_run):
    done, found = dry_run
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [(line[0], line[3]) for line in lines] == [(step.name, "ok") for step in steps.STEPS]
    assert list(found) and set(found) == {step.name for step in steps.STEPS}
    for name, step in found.items():
        assert (step["step"], step["status"], step["is_dry_run"]) == (name, "ok", True)
        assert {"device", "torch", "triton", "driver"} <= set(step["machine"])
        assert 0 < step["seconds"] < step["limit_s"]


def test_the_rows_say_what_was_measured(dry_run):
    _, found = dry_run
    assert [row["is_right"] for row in found["products"]["rows"]] == [True] * 3
    assert len(found["kernel"]["rows"]) == 5 and all(row["is_right"] for row in found["kernel"]["rows"])
    bandwidth = found["bandwidth"]["rows"]
    assert {row["kind"] for row in bandwidth} == {"reverse_kl", "forward_kl", "gkd", "skew_reverse_kl"}
    assert all("error" in row or row["gigabytes_per_s"] > 0 for row in bandwidth)
    head, *sweep = found["head"]["rows"]
    assert {row["implementation"] for row in head["linear_divergence"]["rows"]} == {"floor", "ours"}
    assert len(sweep) == 2 * 2 * 3 and all(row["seconds"] > 0 for row in sweep)
    assert set(found["update"]["trainer_update"]["medians"]) == {"pure", "verl_topk", "grpo"}
    compared = {row["case"]: row for row in found["engine"]["rows"] if "against" in row}
    assert compared.keys() == {"tied", "tied, bfloat16"}
    for name, row in compared.items():
        assert row["against"] == "dense_tied" and row["is_right"], row
        assert "bfloat16" in name or row["gradient_error"] < 1e-5  # a processor's bound, not a device's
    assert all(row["gradient_norm"] > 0 for row in found["engine"]["rows"])
    first, *others = found["engine"]["rows"]
    assert 0 < first["after_start_mb"] <= first["peak_mb"]  # a processor's later cases take what earlier ones left
    assert all({"after_start_mb", "after_update_mb", "peak_mb"} <= row.keys() for row in others)
    composed = {row["machine"]: row for row in found["trainer"]["rows"]}
    assert {name: row["rollout"] for name, row in composed.items()} == {
        "cpu": "hf",
        "gpu": "vllm",
        "gpu_without_vllm": "hf",
    }
    assert all((row["steps"], row["loss"]) == (4, "on_policy_distillation") for row in composed.values())


def test_a_step_that_lacks_a_package_says_so(tmp_path, monkeypatch):
    path = tmp_path / "step.json"
    step = record.Record(path, is_dry_run=True)
    step.require_verl()
    step.require("pytest")
    assert "skipped" not in step.facts
    with pytest.raises(SystemExit, match="^0$"):
        step.require("no_such_package")
    assert json.loads(path.read_text())["skipped"] == "no_such_package is not installed: pip install no_such_package"
    with monkeypatch.context() as only:
        only.delitem(sys.modules, "verl", raising=False)
        only.setattr(sys, "path", [str(ROOT)])  # its folder `verl` is not VERL
        with pytest.raises(SystemExit, match="^0$"):
            step.require_verl()
    assert json.loads(path.read_text())["skipped"] == record.VERL_NEEDED


def test_a_step_that_does_without_verl_finds_this_repository_s_files_alone(tmp_path):
    steps.hide_verl(tmp_path)
    program = "import sys, verl.on_policy_distillation.roofline; print(sys.modules.keys() & {'ray', 'verl.protocol'})"
    environment = steps.environment(is_dry_run=True, before=[tmp_path])
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("set()\n", 0), done.stderr


def test_every_case_of_the_engine_comes_after_what_it_is_compared_with():
    overrides = {"lora": ["rank"], "lora_hybrid": [], "dense_lora": ["rank", "dense"], "dense_lora_hybrid": []}
    cases = engine.cases(overrides, "cuda")
    assert len(cases) == len({case.name for case in cases}) == 8
    for index, case in enumerate(cases):
        assert "trainer.device=cuda" in case.overrides
        assert case.is_rounded == ("teacher.payload_dtype=bfloat16" in case.overrides)
        if case.reference is None:
            assert not case.is_rounded and case.name.startswith("dense_")
        else:
            reference = next(other for other in cases[:index] if other.name == case.reference)
            assert not reference.is_rounded
            assert reference.name.removeprefix("dense_") == case.name.split(",")[0].removeprefix("dense_")


def test_a_wrong_gradient_is_not_right():
    exact = {"loss": 1.0, "gradients": {"weight": torch.tensor([1.0, -2.0])}}
    near = {"loss": 1.01, "gradients": {"weight": torch.tensor([1.0, -1.95])}}
    wrong = {"loss": 1.01, "gradients": {"weight": torch.tensor([1.0, -1.8])}}
    case = engine.Case("tied, bfloat16", [], "dense_tied", is_rounded=True)
    assert engine.compare(case, near, exact)["is_right"]
    found = engine.compare(case, wrong, exact)
    assert not found["is_right"] and found["gradient_error"] == pytest.approx(0.1)
    assert not engine.compare(case, exact, exact)["is_right"]  # nothing was rounded


@pytest.fixture
def memory_limit():
    """A meter on a processor limits its process, which here goes on."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    yield
    resource.setrlimit(resource.RLIMIT_DATA, before)


@pytest.mark.parametrize("device", DEVICES)
def test_a_case_s_memory_is_what_it_adds(device, memory_limit):
    def megabytes(count):
        return torch.ones(count * 10**6, dtype=torch.uint8, device=device)

    before = megabytes(100)  # of another case
    result, found = engine.metered(lambda: megabytes(64), lambda started: len(started) + len(megabytes(128)), device)
    assert result == (64 + 128) * 10**6 and len(before) == 100 * 10**6
    expected = {"after_start_mb": 64, "after_update_mb": 64, "peak_mb": 64 + 128}
    assert found == pytest.approx(expected, abs=8)  # a process has other pages too


def test_memory_on_cuda_is_without_what_torch_keeps_of_freed_tensors(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 3)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 5)
    assert trainer_update.resident_bytes("cuda") == 3


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_compared_on_the_processor(device):
    from engine_process import full_gradients

    module = torch.nn.Linear(2, 1, bias=False, device=device)
    module(torch.tensor([[1.0, -2.0]], device=device)).sum().backward()
    gradient = full_gradients(module)["weight"]
    module.weight.grad.zero_()
    assert gradient.device.type == "cpu" and gradient.tolist() == [[1.0, -2.0]]


def test_only_what_another_case_is_compared_with_is_kept(tmp_path, monkeypatch):
    alive, seen = weakref.WeakValueDictionary(), []

    def updated(case, batch, device):
        seen.append(set(alive))
        alive[case.name] = gradient = torch.ones(1)
        return {"gradients": {"weight": gradient}}, {"loss": 1.0}

    def compare(case, result, reference):
        assert reference["gradients"]["weight"] is alive[case.reference]
        return {"is_right": True}

    monkeypatch.setattr(engine, "updated", updated)
    monkeypatch.setattr(engine, "compare", compare)
    step = record.Record(tmp_path / "engine.json", is_dry_run=True)
    engine.measure(step, engine.cases({name: [] for name in ("a", "dense_a", "b", "dense_b")}, "cpu"), [])
    assert len(seen) == 8 and seen[2:] == [{"dense_a", "dense_b"}] * 6
    assert [row.get("is_right") for row in step.facts["rows"]] == [None] * 2 + [True] * 6


def log_step(path, number, kl):
    data = {"distillation/kl": kl, "timing_s/gen": 2.0, "actor/lr": 0.1}
    with open(path, "a") as file:
        file.write(json.dumps({"step": number, "data": data}) + "\n")


def test_the_trainer_s_steps_are_recorded_while_it_runs_and_where_it_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "POLL_SECONDS", 0.01)
    path, metrics = tmp_path / "trainer.json", next_metric_file(tmp_path)
    step = record.Record(path, is_dry_run=True)
    with pytest.raises(SystemExit, match="training failed"), trainer.recorded(step, tmp_path):
        log_step(metrics, 1, kl=1.9)
        deadline = time.monotonic() + 30
        while not (rows := json.loads(path.read_text())["rows"]) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert rows == [{"step": 1, "kl": 1.9, "phases": {"gen": 2.0}}]  # a kill would now leave it
        log_step(metrics, 2, kl=0.6)
        (tmp_path / "train.log").write_text("".join(f"line {number}\n" for number in range(50)))
        sys.exit("training failed")
    found = json.loads(path.read_text())
    assert [(row["step"], row["kl"]) for row in found["rows"]] == [(1, 1.9), (2, 0.6)]
    assert found["log_last_lines"] == [f"line {number}" for number in range(10, 50)]


def test_a_kill_leaves_no_half_of_a_json(tmp_path):
    path = tmp_path / "step.json"
    step = record.Record(path, is_dry_run=True)
    with open(path) as before:
        step.add(number=1)
        assert json.load(before) == {"rows": []}  # nothing is written into a file that was whole
    assert json.loads(path.read_text()) == {"rows": [{"number": 1}]}


@pytest.mark.parametrize("kls", [[1.9, 0.6, 0.3, None], [1.9, 0.6, 0.3], [0.3, 0.6, 0.3, 0.3]])
def test_the_trainer_s_kl_has_to_be_there_and_to_fall(kls):
    trainer.require_falling([1.9, 0.6, 0.3, 0.4])
    with pytest.raises(SystemExit, match="KL"):
        trainer.require_falling(kls)


def test_the_jsons_become_tables(dry_run, tmp_path):
    _, found = dry_run
    text = render.gpu(written(tmp_path, found))
    assert set(render.GPU_PARTS) == set(found)  # no step is left out
    assert "A dry run" in text and "Not measured" not in text and "predicted" not in text
    floor, ours = (
        next(row["seconds"][0] for row in found["head"]["rows"][0]["linear_divergence"]["rows"] if row["kind"] == kind)
        for kind in ("all", "gkd")
    )
    verdict = "reached" if ours / floor <= 1.5 else "missed"
    assert f"| gkd in at most × 1.5 the bare products | {ours / floor:.2f} | {verdict} |" in text
    for row in found["bandwidth"]["rows"]:
        assert f"| {row['kind']}, {row['rows']} rows |" in text
    for title in ("pure distillation", "VERL's own top-64 distillation", "GRPO"):
        assert f"| {title} |" in text


def test_a_step_that_failed_is_shown_with_its_last_line(dry_run, tmp_path):
    _, found = dry_run
    broken = {"rows": [], "status": "failed", "last_lines": ["so far", "ValueError: why it failed"]}
    text = render.gpu(written(tmp_path, {"bandwidth": found["bandwidth"] | broken}))
    assert "| bandwidth | failed |" in text and "- bandwidth: ValueError: why it failed" in text


def test_what_engine_and_trainer_measured_is_shown():
    memory = {"after_start_mb": 12.0, "after_update_mb": 34.0, "peak_mb": 56.0}
    errors = {"against": "dense_tied", "loss_error": 1e-6, "gradient_error": 2e-3, "bound": 1e-4}
    rows = [
        {"case": "dense_tied", **memory},
        {"case": "tied", **memory, **errors, "is_right": False},
        {"case": "fsdp1", "error": "RuntimeError: no broadcast", "is_right": False},
    ]
    text = render.gpu_engine({"rows": rows})
    assert "| tied (wrong) | 1.0e-06 | 2.0e-03 | 1.0e-04 | 12 | 34 | 56 |" in text
    assert "| fsdp1 | RuntimeError: no broadcast |" in text and "| dense_tied |" not in text
    rows = [
        {"step": 1, "kl": 1.9, "phases": {"gen": 2.0}},
        {"step": 2, "kl": None, "phases": {"gen": 1.5, "score": 0.5}},
    ]
    text = render.gpu_trainer({"is_dry_run": False, "machine_overrides": "gpu", "rows": rows})
    for line in ("|  | step 1 | step 2 |", "| KL, nats | 1.9 | — |", "| gen, s | 2 | 1.5 |", "| score, s | — | 0.5 |"):
        assert line in text


def test_without_jsons_there_are_predictions_that_say_so(tmp_path):
    text = render.gpu(tmp_path)
    assert text.startswith("Not measured: no CUDA device was at hand.")
    rows = [line for line in text.splitlines() if line.startswith("| H_s")]
    assert len(rows) == 6 and all(row.count("(predicted)") == 3 for row in rows)


def script(folder: Path, name: str, body: str) -> Path:
    path = folder / f"{name}.py"
    path.write_text(f"import json, sys, time\nout = sys.argv[sys.argv.index('--out') + 1]\n{body}\n")
    return path


def test_a_step_that_does_not_end_well_is_recorded_and_stops_no_other(tmp_path):
    bodies = {
        "fails": "json.dump({'rows': [1]}, open(out, 'w')); print('log\\n' * 40); raise ValueError('why it failed')",
        "hangs": "json.dump({'rows': [2], 'log_last_lines': ['here']}, open(out, 'w')); print('so far', flush=True)\n"
        "time.sleep(600)",
        "skips": "json.dump({'rows': [], 'skipped': 'no VERL'}, open(out, 'w'))",
        "works": "json.dump({'rows': [3], 'log_last_lines': ['all is well']}, open(out, 'w'))",
    }
    all_steps = [steps.Step(name, script(tmp_path, name, body), 3.0) for name, body in bodies.items()]
    assert not steps.run(all_steps, tmp_path / "out", is_dry_run=True)
    found = {name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in bodies}
    assert [found[name]["status"] for name in bodies] == ["failed", "timeout", "skipped", "ok"]
    assert "ValueError: why it failed" in found["fails"]["last_lines"][-1]
    assert found["fails"]["last_lines"].count("log") == 40  # as many as progress.py shows
    assert found["hangs"]["last_lines"] == ["so far"] and found["hangs"]["log_last_lines"] == ["here"]
    assert "log_last_lines" not in found["works"]
    assert [found[name]["rows"] for name in bodies] == [[1], [2], [], [3]]  # what there was stays
