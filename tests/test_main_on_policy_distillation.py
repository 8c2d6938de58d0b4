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
"""The command line of verl.trainer.main_on_policy_distillation: what it composes, and what it starts."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from verl.on_policy_distillation import hydra_source
from verl.trainer import main_on_policy_distillation as entry
from verl.trainer import main_ppo

VERL_CONFIG = Path(main_ppo.__file__).parent / "config"
POLICY_LOSS = "actor_rollout_ref.actor.policy_loss"
USER_YAML = """
hydra: {searchpath: [SEARCHPATH]}
defaults: [ppo_trainer, _self_]
actor_rollout_ref: {actor: {policy_loss: {hybrid_lambda_rl: 0.25, hybrid_lambda_distill: 0.5}}}
teacher: {model: {path: of the YAML}, dump_freq: 3}
"""


@pytest.fixture(autouse=True)
def hydra_as_it_was():
    """Other tests compose VERL's configuration as it is."""
    Plugins.instance()  # registers Hydra's own sources
    types = dict(SourcesRegistry.instance().types)
    yield
    SourcesRegistry.instance().types = types
    GlobalHydra.instance().clear()


def command_line(monkeypatch, capsys, *arguments):
    """The configuration that the entry point composes from its arguments."""
    monkeypatch.setattr(sys, "argv", ["main_on_policy_distillation", "--cfg", "job", *map(str, arguments)])
    entry.main()
    return OmegaConf.create(capsys.readouterr().out)


def patched_directory(folder):
    """VERL's directory with the lines that the patch adds to it."""
    shutil.copytree(VERL_CONFIG, folder)
    actor, trainer = folder / "actor" / "actor.yaml", folder / "ppo_trainer.yaml"
    entries = "defaults:\n\n  - _self_\n  - ../policy_loss@policy_loss: on_policy_distillation\n\n"
    actor.write_text(entries + actor.read_text())
    queue = "  - transfer_queue@transfer_queue"
    assert queue in trainer.read_text()
    trainer.write_text(trainer.read_text().replace(queue, f"  - teacher@teacher: teacher\n\n{queue}"))
    shutil.copytree(ROOT / "verl" / "trainer" / "config", folder, dirs_exist_ok=True)
    return folder


def composed(directory, name, *overrides):
    with initialize_config_dir(config_dir=str(directory), version_base=None):
        return compose(name, overrides=list(overrides))


@pytest.mark.parametrize("name", ["ppo_trainer", "ppo_megatron_trainer"])
def test_the_configuration_is_that_of_a_patched_verl(name, tmp_path, monkeypatch, capsys):
    overrides = ["teacher.model.path=somewhere", f"{POLICY_LOSS}.distillation_type=gkd"]
    expected = composed(patched_directory(tmp_path / "config"), name, *overrides)
    found = command_line(monkeypatch, capsys, "--config-name", name, *overrides)
    assert OmegaConf.to_container(found) == OmegaConf.to_container(expected)
    assert found.teacher.model.path == "somewhere"


def test_a_patched_directory_gets_nothing_twice(tmp_path, monkeypatch, capsys):
    directory = patched_directory(tmp_path / "config")
    expected = composed(directory, "ppo_trainer")
    found = command_line(monkeypatch, capsys, "--config-path", directory)
    assert OmegaConf.to_container(found) == OmegaConf.to_container(expected)


@pytest.mark.parametrize("searchpath", ["pkg://verl.trainer.config", f"file://{VERL_CONFIG}", "none: a copy"])
def test_our_defaults_then_the_users_yaml_then_the_command_line(searchpath, tmp_path, monkeypatch, capsys):
    text = USER_YAML.replace("SEARCHPATH", searchpath)
    if searchpath.startswith("none"):
        shutil.copytree(VERL_CONFIG, tmp_path, dirs_exist_ok=True)
        text = text.replace(f"hydra: {{searchpath: [{searchpath}]}}\n", "")
    (tmp_path / "mine.yaml").write_text(text)
    arguments = ["--config-path", tmp_path, "--config-name", "mine", f"{POLICY_LOSS}.hybrid_lambda_distill=0.75"]
    found = command_line(monkeypatch, capsys, *arguments, "teacher.dump_freq=4")
    policy_loss = found.actor_rollout_ref.actor.policy_loss
    assert policy_loss.hybrid_rl_loss_mode == "vanilla" and found.teacher.dump_size == 16  # ours
    assert policy_loss.hybrid_lambda_rl == 0.25 and found.teacher.model.path == "of the YAML"
    assert policy_loss.hybrid_lambda_distill == 0.75 and found.teacher.dump_freq == 4


def test_the_users_directory_comes_first(tmp_path, monkeypatch, capsys):
    """A file of the user's replaces ours, as it replaces VERL's."""
    (tmp_path / "mine.yaml").write_text(USER_YAML.replace("SEARCHPATH", "pkg://verl.trainer.config"))
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "teacher.yaml").write_text("model: {path: null}\ndump_freq: -1\n")
    found = command_line(monkeypatch, capsys, "--config-path", tmp_path, "--config-name", "mine")
    assert found.teacher == {"model": {"path": "of the YAML"}, "dump_freq": 3}


@pytest.mark.parametrize("path", ["config", "./config", "../trainer/config"])
def test_a_relative_config_path_is_relative_to_main_ppo(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = command_line(monkeypatch, capsys, f"--config-path={path}", "--config-name=ppo_trainer")
    assert found.teacher.dump_size == 16


def test_groups_of_ours_can_be_chosen_and_listed():
    hydra_source.install()
    source = SourcesRegistry.instance().resolve("pkg")("test", "pkg://verl.trainer.config")
    assert {"actor", "teacher", "policy_loss"} <= set(source.list("", None))
    assert source.list("policy_loss", None) == ["on_policy_distillation"] and source.list("teacher", None) == [
        "teacher"
    ]
    assert "config" not in source.list("", None)  # our files, not our folder


def test_misspelt_overrides_are_refused_before_hydra(monkeypatch):
    def refuse(overrides):
        assert overrides == ["teacher.modle.path=x"]
        raise SystemExit("misspelt")

    monkeypatch.setattr(entry, "refuse_misspelt_overrides", refuse)
    monkeypatch.setattr(sys, "argv", ["main", "teacher.modle.path=x"])
    with pytest.raises(SystemExit, match="misspelt"):
        entry.main()


@pytest.fixture
def calls(monkeypatch):
    """What `run` calls, in order, instead of doing it."""
    calls = []

    def record(owner, name, result=None):
        def called(*arguments, **keywords):
            calls.append((name, arguments, keywords))
            return result

        monkeypatch.setattr(owner, name, called)

    record(entry, "prepare")
    for name in ("auto_set_device", "validate_config", "run_ppo"):
        record(main_ppo, name)
    monkeypatch.setattr(main_ppo, "TaskRunnerV1", main_ppo.TaskRunnerV1)  # put back at the end
    trainer = SimpleNamespace(task_runner_class=lambda runner: ("with a teacher", runner))
    monkeypatch.setitem(sys.modules, "verl.on_policy_distillation.trainer", trainer)
    return calls


@pytest.mark.parametrize("loss_mode", ["on_policy_distillation", "hybrid_rl_distillation", "vanilla"])
def test_the_trainer_of_any_loss_runs_in_our_runner(loss_mode, calls):
    """Which gives it a teacher where the loss asks for one (test_classes.py)."""
    hydra_source.install()
    config = composed(VERL_CONFIG, "ppo_trainer", f"{POLICY_LOSS}.loss_mode={loss_mode}")
    runner = main_ppo.TaskRunnerV1
    entry.run(config)
    assert [name for name, _, _ in calls] == ["prepare", "auto_set_device", "validate_config", "run_ppo"]
    assert calls[-1] == ("run_ppo", (config,), {"task_runner_class": ("with a teacher", runner)})


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([f"{POLICY_LOSS}.loss_mode=on_policy_destillation"], "is not registered: did you mean on_policy_distillation"),
        (["teacher.model.path=somewhere"], "teacher.model.path=somewhere has no effect with .*loss_mode=vanilla"),
    ],
)
def test_a_loss_that_is_misspelt_or_left_out_is_refused(overrides, said, monkeypatch):
    """In an unpatched VERL nothing else would look: another loss is main_ppo's."""
    hydra_source.install()
    monkeypatch.setattr(main_ppo, "run_ppo", lambda *_, **__: pytest.fail("the run started"))
    with pytest.raises(ValueError, match=said):
        entry.run(composed(VERL_CONFIG, "ppo_trainer", *overrides))


def test_a_patched_main_ppo_does_it_by_itself(calls, monkeypatch):
    monkeypatch.setattr(main_ppo, "__file__", entry.__file__)
    hydra_source.install()
    config = composed(VERL_CONFIG, "ppo_trainer", f"{POLICY_LOSS}.loss_mode=on_policy_distillation")
    entry.run(config)
    assert "prepare" not in [name for name, _, _ in calls]
    assert calls[-1] == ("run_ppo", (config,), {"task_runner_class": main_ppo.TaskRunnerV1})
