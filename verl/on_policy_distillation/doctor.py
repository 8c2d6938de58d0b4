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
"""Verify that on-policy distillation works in the VERL that Python imports: about ten seconds, most of them imports.

    python -m verl.on_policy_distillation.doctor            registry, losses, imports, configuration
    python -m verl.on_policy_distillation.doctor --losses   import, registry and losses alone
    python TREE/verl/on_policy_distillation/doctor.py --tree TREE
                                                            the VERL in TREE, which need not be importable

The losses are compared with closed forms in float64 on random logits. Nothing is written, and neither a GPU nor a model
is needed, but the Python has to have the packages that VERL imports.

Exit status: 0 all is well; 1 a check failed; 3 a package is missing, so that something could not be checked.
"""

import sys

if __name__ == "__main__" and not __package__:
    del sys.path[0]  # this folder, whose modules would hide others of their name: signal, for one

import argparse  # noqa: E402
import importlib  # noqa: E402
import logging  # noqa: E402
import warnings  # noqa: E402
from pathlib import Path  # noqa: E402

__all__ = ["main"]

OK, FAILED, NOT_CHECKED = 0, 1, 3

# They import all of our modules but the Triton kernel, which needs an accelerator, and the CPU platform, which changes
# VERL.
MODULES = [
    "verl.trainer.ppo.on_policy_distillation",
    "verl.trainer.ppo.v1.trainer_base",
    "verl.workers.engine_workers",
    "verl.on_policy_distillation.trainer",
    "verl.on_policy_distillation.worker",
    "verl.trainer.main_on_policy_distillation",
]
LOSSES = {
    "on_policy_distillation": "compute_on_policy_distillation_loss",
    "hybrid_rl_distillation": "compute_hybrid_rl_distillation_loss",
}
OVERRIDES = [
    "actor_rollout_ref.actor.policy_loss.loss_mode=hybrid_rl_distillation",
    "actor_rollout_ref.actor.policy_loss.distillation_type=gkd",
    "actor_rollout_ref.actor.policy_loss.distillation_beta=0.5",
    "teacher.model.path=teacher",
]
SEQUENCES, TOKENS, VOCAB = 4, 16, 1024
TOLERANCE = 1e-5  # of the loss and of the largest gradient entry, for float32 logits


class CheckFailed(Exception):
    """What is wrong, for the user."""


def require(condition, message):
    if not condition:
        raise CheckFailed(message)


def verl_folder():
    import verl

    return Path(verl.__file__).resolve().parent


def is_patched():
    """Whether our files are in VERL's own folder, with the patch's few lines; or beside VERL, with none."""
    return Path(__file__).resolve().is_relative_to(verl_folder())


def import_losses():
    importlib.import_module("verl.trainer.ppo.on_policy_distillation")
    return "verl.trainer.ppo.on_policy_distillation"


def check_registry():
    """Before any import of ours: training imports VERL alone."""
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    for name, function in LOSSES.items():
        if name not in POLICY_LOSS_REGISTRY:
            importlib.import_module("verl.trainer.ppo.on_policy_distillation")  # says why, if that is why
            raise CheckFailed(f"{name} is not registered when verl.trainer.ppo.core_algos is imported")
        require(POLICY_LOSS_REGISTRY[name].__name__ == function, f"{name} is registered as another function")
    return ", ".join(LOSSES)


def check_imports():
    for name in MODULES:
        importlib.import_module(name)
    from verl.on_policy_distillation.checks import require_torch

    require_torch()
    return f"{Path(__file__).resolve().parents[1]}, {'in VERL: patched' if is_patched() else 'beside VERL: no patch'}"


def check_trainer():
    """Whoever starts the training gives the trainer its teacher."""
    import inspect

    from verl.on_policy_distillation.trainer import task_runner_class
    from verl.trainer import main_ppo

    if is_patched():
        require("with_teacher" in inspect.getsource(main_ppo), "verl/trainer/main_ppo.py lacks the patch's lines")
        return "python -m verl.trainer.main_ppo"
    task_runner_class(main_ppo.TaskRunnerV1)
    return "python -m verl.trainer.main_on_policy_distillation"


def check_configuration():
    """The trainer's configuration, as its command line composes it, with the new keys in the dataclasses."""
    from dataclasses import fields

    from hydra import compose, initialize_config_dir

    from verl.on_policy_distillation import hydra_source
    from verl.on_policy_distillation.config import TeacherConfig
    from verl.utils.config import omega_conf_to_dataclass

    if not is_patched():
        hydra_source.install()
    with initialize_config_dir(config_dir=str(verl_folder() / "trainer" / "config"), version_base=None):
        config = compose("ppo_trainer", overrides=OVERRIDES)
    # Making the teacher's dataclass would look for the teacher's checkpoint.
    unknown = set(config.teacher) - {"_target_"} - {field.name for field in fields(TeacherConfig)}
    require(not unknown, f"TeacherConfig lacks {sorted(unknown)} of teacher.yaml")
    require(config.teacher.model.path == "teacher", "teacher.model.path cannot be set")
    policy_loss = omega_conf_to_dataclass(config.actor_rollout_ref.actor.policy_loss)
    require(policy_loss.distillation_beta == 0.5, "policy_loss.distillation_beta does not reach the dataclass")
    return "teacher.*, policy_loss.distillation_*"


def closed_form(kind, beta, student, teacher):
    """The divergence of each position, (sequences, tokens), from its definition."""
    import torch

    log_s, log_t = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    log_m = torch.log(beta * log_t.exp() + (1 - beta) * log_s.exp())

    def kl(log_p, log_q):
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    return {
        "reverse_kl": lambda: kl(log_s, log_t),
        "forward_kl": lambda: kl(log_t, log_s),
        "gkd": lambda: beta * kl(log_t, log_m) + (1 - beta) * kl(log_s, log_m),
        "skew_reverse_kl": lambda: kl(log_s, log_m),
    }[kind]()


def loss_errors(kind, beta):
    """Relative errors of the pure loss, of its gradient, and of the hybrid loss at ratio 1, where RL is -advantage."""
    import torch

    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    random = torch.Generator().manual_seed(0)
    student = torch.randn(SEQUENCES, TOKENS, VOCAB, generator=random).mul(2).requires_grad_()
    teacher = torch.randn(SEQUENCES, TOKENS, VOCAB, generator=random).mul(2)
    mask = (torch.arange(TOKENS) < torch.tensor([TOKENS, 9, 1, 5]).unsqueeze(1)).float()
    advantages = torch.randn(SEQUENCES, TOKENS, generator=random)
    log_prob = -torch.rand(SEQUENCES, TOKENS, generator=random)
    config = {"distillation_type": kind, "distillation_beta": beta}

    exact = student.detach().double().requires_grad_()
    divergence = (closed_form(kind, beta, exact, teacher.double()) * mask).sum() / mask.sum()
    (exact_gradient,) = torch.autograd.grad(divergence, exact)
    hybrid = divergence - (advantages.double() * mask).sum() / mask.sum()

    logits = {"student_logits": student, "teacher_logits": teacher}
    loss = get_policy_loss_fn("on_policy_distillation")(None, None, None, mask, "token-mean", config, **logits)[0]
    (gradient,) = torch.autograd.grad(loss, student)
    both = get_policy_loss_fn("hybrid_rl_distillation")(
        log_prob, log_prob.clone(), advantages, mask, "token-mean", config, **logits
    )[0]
    return {
        "loss": abs(loss.item() - divergence.item()) / divergence.item(),
        "gradient": ((gradient - exact_gradient).abs().max() / exact_gradient.abs().max()).item(),
        "hybrid loss": abs(both.item() - hybrid.item()) / abs(hybrid.item()),
    }


def check_losses():
    worst = 0.0
    for kind, beta in [("reverse_kl", 1.0), ("forward_kl", 0.0), ("gkd", 0.3), ("skew_reverse_kl", 0.3)]:
        for quantity, error in loss_errors(kind, beta).items():
            # `not <=`: NaN fails too.
            require(error <= TOLERANCE, f"{kind}: the {quantity} is off by {error:.1e} from its closed form")
            worst = max(worst, error)
    return f"4 divergences, values and gradients; largest relative error {worst:.0e}"


def require_verl_of(tree):
    found = verl_folder().parent
    require(tree is None or found == tree, f"this Python imports the VERL in {found} instead of the one in {tree}")


def is_ours(module_name):
    return (module_name or "verl").split(".")[0] == "verl"


def run_check(name, check, tree):
    """Print one line; OK, FAILED or NOT_CHECKED."""
    try:
        require_verl_of(tree)
        print(f"verify: {name:<13} ok: {check()}")
        return OK
    except ModuleNotFoundError as error:
        if is_ours(error.name):
            print(f"verify: {name:<13} FAILED: {error}")
            return FAILED
        print(
            f"verify: {name:<13} not checked: {sys.executable} has no module {error.name!r}, which VERL's trainer "
            'needs: pip install "verl[verl-core]==VERSION", with the version of your VERL, brings all of these'
        )
        return NOT_CHECKED
    except Exception as error:  # whatever goes wrong in VERL's own imports is for the user to read
        print(f"verify: {name:<13} FAILED: {type(error).__name__}: {error}")
        return FAILED


def main(arguments=None):
    """Run the checks, print a line for each, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tree", type=Path, help="directory that has verl/ in it; without it, the VERL Python finds")
    parser.add_argument("--losses", action="store_true", help="check the losses alone")
    options = parser.parse_args(arguments)
    tree = options.tree.resolve() if options.tree is not None else None
    if tree is not None:
        if not (tree / "verl" / "__init__.py").is_file():
            parser.error(f"{tree} has no verl/__init__.py in it")
        sys.dont_write_bytecode = True  # what is verified stays as it is
        sys.path.insert(0, str(tree))
    # VERL's imports report every backend and accelerator that is not there.
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    checks = {"registry": check_registry, "losses": check_losses}
    if options.losses:  # in a VERL that does not import them by itself
        checks = {"import": import_losses, **checks}
    else:
        checks |= {"imports": check_imports, "trainer": check_trainer, "configuration": check_configuration}
    results = [run_check(name, check, tree) for name, check in checks.items()]
    return FAILED if FAILED in results else max(results)


if __name__ == "__main__":
    sys.exit(main())
