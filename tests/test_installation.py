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
"""How the losses and the trainer's modules reach a VERL: beside any, by pip; or in its tree, by the patch."""

import importlib.util
import shutil
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, copy_unpatched_verl
from environments import environment_with_the_package, project_source, run, succeed

NAMES = ("on_policy_distillation", "hybrid_rl_distillation")
OUR_MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((ROOT / "verl").rglob("*.py"))
]
LOSS_FROM_THE_REGISTRY = """
import torch
import verl
from verl.trainer.ppo.core_algos import get_policy_loss_fn
assert get_policy_loss_fn("hybrid_rl_distillation").__name__ == "compute_hybrid_rl_distillation_loss"
student, teacher = torch.zeros(1, 1, 4), torch.tensor([[[0.0, 0.0, -torch.inf, -torch.inf]]])
loss, _, kl, _ = get_policy_loss_fn("on_policy_distillation")(
    None, None, None, torch.ones(1, 1), "token-mean", {"distillation_type": "forward_kl"},
    teacher_logits=teacher, student_logits=student,
)
print(f"loss {loss.item():.6f} from {verl.__file__}")
"""
# What a process may have loaded when it has only imported VERL: nothing of ours but the package itself, no trainer.
BARE_IMPORT = f"""
import sys
import verl
loaded = [name for name in sys.modules if name.startswith(("verl.trainer", "verl.workers", "verl.on_policy"))]
assert loaded == [], loaded
assert sorted(name for name in sys.modules if name in {OUR_MODULES!r}) == []
"""
# Every module of ours has a place, its parents are VERL's, and finding it loads none of them.
NAMES_RESOLVE = f"""
import importlib.util
from pathlib import Path
origins = {{name: importlib.util.find_spec(name) for name in {OUR_MODULES!r}}}
assert None not in origins.values(), origins
origins = {{name: spec.origin for name, spec in origins.items()}}
for name, origin in sorted(origins.items()):
    module = Path(origin).with_suffix("").as_posix().removesuffix("/__init__")
    assert module.endswith(name.removeprefix("verl").replace(".", "/")), origin
for name in ("verl.nothing", "verl.on_policy_distillation.nothing", "verl.trainer.config.teacher.teacher"):
    try:
        assert importlib.util.find_spec(name) is None, name
    except ModuleNotFoundError:
        pass
import verl.trainer.ppo.on_policy_distillation as losses
print("losses in", losses.__file__)
"""
# The modules named verl.* come from one VERL and from our folder.
ONE_VERL = """
import sys
places = {str(getattr(module, "__file__", None)).split("/verl/")[0] for name, module in sys.modules.items()
          if name == "verl" or name.startswith("verl.")}
places = {place.split("/verl_on_policy_distillation/files/")[0] for place in places}
print("places", *sorted(places))
"""


def snapshot(folder):
    """Path to content below `folder`, without what Python compiled."""
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def everything(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An environment that has this project by `pip install .`, and no VERL."""
    return environment_with_the_package(tmp_path_factory.mktemp("installed"))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder with an unpatched VERL in it."""
    folder = tmp_path_factory.mktemp("checkout")
    copy_unpatched_verl(folder)
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "verl"\nversion = "0.9.1"\n[tool.setuptools]\npackages = ["verl"]\n'
    )
    return folder


def pip_installed(environment, checkout):
    shutil.copytree(checkout / "verl", environment.site / "verl")
    return environment.site, {}


def editable(environment, checkout):
    environment.install(checkout, "-e")
    return checkout, {}


def only_on_pythonpath(environment, checkout):
    return checkout, {"PYTHONPATH": checkout}


@pytest.mark.parametrize("verl_is", [pip_installed, editable, only_on_pythonpath])
def test_beside_a_verl_that_is(verl_is, installed, checkout, tmp_path):
    environment = installed.copy(tmp_path / "environment")
    place, variables = verl_is(environment, checkout)
    before = snapshot(place / "verl")
    script = BARE_IMPORT + LOSS_FROM_THE_REGISTRY + NAMES_RESOLVE + ONE_VERL
    lines = succeed(environment.python, "-c", script, cwd=tmp_path, **variables).splitlines()
    assert f"loss 0.693147 from {place}/verl/__init__.py" in lines  # KL(uniform over 2 || uniform over 4) = log 2
    ours = environment.site / "verl_on_policy_distillation" / "files"
    assert f"losses in {ours}/trainer/ppo/on_policy_distillation.py" in lines
    assert f"places {' '.join(sorted({str(place), str(environment.site)}))}" in lines
    assert snapshot(place / "verl") == before


def test_uninstalling_leaves_nothing(installed, checkout, tmp_path):
    environment = installed.copy(tmp_path / "environment")
    environment.pip("uninstall", "--yes", "verl-on-policy-distillation")
    shutil.copytree(checkout / "verl", environment.site / "verl")
    before = everything(environment.folder)
    environment.install(project_source(tmp_path / "source"))
    succeed(environment.python, "-c", "import verl_on_policy_distillation", cwd=tmp_path)
    assert everything(environment.folder) != before
    environment.pip("uninstall", "--yes", "verl-on-policy-distillation")
    assert everything(environment.folder) == before


def test_of_two_verls_the_imported_one_counts(installed, checkout, tmp_path):
    environment = installed.copy(tmp_path / "environment")
    pip_installed(environment, checkout)
    # Our files are in the environment, and so is the other VERL: nothing of that one may have been loaded.
    script = "import verl.on_policy_distillation\n" + LOSS_FROM_THE_REGISTRY + "import sys\n"
    script += "files = [str(getattr(module, '__file__', '')) for module in sys.modules.values()]\n"
    script += f"assert not [file for file in files if file.startswith({str(environment.site / 'verl')!r} + '/')]\n"
    lines = succeed(environment.python, "-c", script, cwd=tmp_path, PYTHONPATH=checkout).splitlines()
    assert f"loss 0.693147 from {checkout}/verl/__init__.py" in lines


def test_the_files_of_a_patched_verl_win(installed, checkout, tmp_path):
    shutil.copytree(checkout / "verl", tmp_path / "verl")
    shutil.copytree(ROOT / "verl", tmp_path / "verl", dirs_exist_ok=True)
    registry = tmp_path / "verl" / "trainer" / "ppo" / "core_algos.py"
    registry.write_text(registry.read_text() + "\nfrom verl.trainer.ppo import on_policy_distillation  # noqa\n")
    # What the tree lacks stays lacking: no mixture of two versions.
    (tmp_path / "verl" / "on_policy_distillation" / "hydra_source.py").unlink()
    script = (
        LOSS_FROM_THE_REGISTRY
        + ONE_VERL
        + (
            "import importlib.util, verl.plugin.cpu\n"
            "assert importlib.util.find_spec('verl.on_policy_distillation.hydra_source') is None\n"
            "from verl.utils.config import validate_config\n"
            "assert not hasattr(validate_config, '__wrapped__')  # its main_ppo has a teacher\n"
            "print('places', sys.modules['verl.plugin.cpu'].__file__)\n"
        )
    )
    variables = {"PYTHONPATH": tmp_path, "VERL_PLATFORM": "cpu", "VERL_USE_EXTERNAL_MODULES": "verl.plugin.cpu"}
    lines = succeed(installed.python, "-c", script, cwd="/", **variables).splitlines()
    assert f"loss 0.693147 from {tmp_path}/verl/__init__.py" in lines
    assert f"places {tmp_path}" in lines and f"places {tmp_path}/verl/plugin/cpu/__init__.py" in lines


CPU = """
import sys, verl
from verl.utils.device import get_device_name
assert get_device_name() == "cpu"
from verl.workers.rollout.base import _ROLLOUT_REGISTRY
assert _ROLLOUT_REGISTRY[("hf", "async")] == "verl.plugin.cpu.rollout.ServerAdapter"
from verl.trainer.ppo.core_algos import get_policy_loss_fn
get_policy_loss_fn("on_policy_distillation")
"""


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {
            "VERL_USE_EXTERNAL_MODULES": "verl_on_policy_distillation,verl.plugin.cpu",
            "VERL_USE_EXTERNAL_PLUGINS": "none",
        },
    ],
    ids=["plugin", "external_modules"],
)
def test_the_cpu_platform_beside_an_unpatched_verl(variables, installed, checkout):
    succeed(installed.python, "-c", CPU, cwd="/", PYTHONPATH=checkout, VERL_PLATFORM="cpu", **variables)


def test_importing_the_package_first_is_as_good(installed, checkout):
    script = "import verl_on_policy_distillation\n" + CPU
    variables = {"PYTHONPATH": checkout, "VERL_PLATFORM": "cpu", "VERL_USE_EXTERNAL_PLUGINS": "none"}
    succeed(installed.python, "-c", script, cwd="/", **variables)


HYDRA_APPLICATION = """
import sys
import hydra
from hydra.core.plugins import Plugins
from hydra._internal.sources_registry import SourcesRegistry

@hydra.main(config_path="conf", config_name="ppo_trainer", version_base=None)
def main(config):
    assert dict(config) == {"actor": {"rate": 2}, "mine": 1}, config
    loaded = [name for name in sys.modules if name.split(".")[0] in ("verl", "verl_on_policy_distillation")]
    assert loaded == [], loaded
    known = list(Plugins.instance().class_name_to_class)
    known += [source.__module__ for source in SourcesRegistry.instance().types.values()]
    assert [name for name in known if "verl" in name] == []
    print("ran")

main()
"""


def test_another_hydra_application_notices_nothing(installed, checkout, tmp_path):
    """Even one whose configuration has the names of VERL's, in an environment that has both."""
    (tmp_path / "conf" / "actor").mkdir(parents=True)
    (tmp_path / "conf" / "ppo_trainer.yaml").write_text("defaults: [actor: actor, _self_]\nmine: 1\n")
    (tmp_path / "conf" / "actor" / "actor.yaml").write_text("rate: 2\n")
    (tmp_path / "application.py").write_text(HYDRA_APPLICATION)
    command = (installed.python, tmp_path / "application.py", f"hydra.run.dir={tmp_path}/out")
    assert "ran" in succeed(*command, cwd=tmp_path, PYTHONPATH=checkout)


def doctor(environment, **variables):
    return run(environment.python, "-m", "verl_on_policy_distillation", cwd="/", **variables)


def test_the_doctor_says_that_verl_is_missing(installed):
    done = doctor(installed)
    assert done.returncode == 1 and "verl          FAILED: this Python finds no VERL" in done.stdout, done.stdout


def test_the_doctor_says_that_plugins_are_off(installed, checkout):
    done = doctor(installed, PYTHONPATH=checkout, VERL_USE_EXTERNAL_PLUGINS="none")
    assert done.returncode == 1, done.stdout
    assert f"verl          ok: 0.9.1, {checkout}/verl" in done.stdout
    assert "VERL_USE_EXTERNAL_PLUGINS=none switches this plugin off: unset it" in done.stdout


def test_a_plugin_that_fails_says_so_and_the_doctor_too(installed, checkout, tmp_path):
    environment = installed.copy(tmp_path / "environment")
    broken = environment.site / "verl_on_policy_distillation" / "files" / "plugin" / "after_import.py"
    broken.write_text("raise RuntimeError('out of order')\n")
    done = run(environment.python, "-c", "import verl", cwd="/", PYTHONPATH=checkout)
    assert done.returncode == 0 and "RuntimeError: out of order" in done.stderr
    assert "verl-on-policy-distillation: could not attach to VERL: RuntimeError: out of order" in done.stderr
    done = doctor(environment, PYTHONPATH=checkout)
    assert done.returncode == 1
    assert "modules       FAILED: could not attach to VERL: RuntimeError: out of order" in done.stdout


def test_losses_that_cannot_be_imported_say_so(installed, checkout, tmp_path):
    environment = installed.copy(tmp_path / "environment")
    files = environment.site / "verl_on_policy_distillation" / "files"
    broken = files / "trainer" / "ppo" / "on_policy_distillation.py"
    broken.write_text("raise RuntimeError('out of order')\n")
    script = "from verl.trainer.ppo.core_algos import get_policy_loss_fn; get_policy_loss_fn('vanilla')"
    done = run(environment.python, "-c", script, cwd="/", PYTHONPATH=checkout)
    assert done.returncode == 0 and "RuntimeError: out of order" in done.stderr
    assert "so its policy losses are not registered: RuntimeError: out of order" in done.stderr
    done = doctor(environment, PYTHONPATH=checkout)
    assert done.returncode == 1 and "registry      FAILED: RuntimeError: out of order" in done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_main_ppo_of_an_unpatched_verl_refuses_at_start(name, installed, checkout):
    done = run(
        *(installed.python, "-m", "verl.trainer.main_ppo", "actor_rollout_ref.actor.strategy=fsdp2"),
        f"actor_rollout_ref.actor.policy_loss.loss_mode={name}",
        cwd="/",
        PYTHONPATH=checkout,
    )
    assert done.returncode != 0 and "ray init" not in done.stdout + done.stderr
    assert f"loss_mode={name} needs a teacher" in done.stderr and "apply_patch.sh" in done.stderr
    assert "python -m verl.trainer.main_on_policy_distillation" in done.stderr


def test_the_loss_tests_run_in_a_checkout_without_pytest(tmp_path):
    (tmp_path / "pytest.py").write_text("raise ImportError('no pytest here')\n")
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (checkout / "verl").symlink_to(Path(importlib.util.find_spec("verl").origin).parent)
    start = time.monotonic()
    script = ROOT / "tests" / "test_on_policy_distillation.py"
    done = run(sys.executable, script, PYTHONPATH=tmp_path, cwd=checkout)
    assert done.returncode == 0 and "\n0 failed, " in f"\n{done.stdout}", done.stdout + done.stderr
    assert time.monotonic() - start < 60
