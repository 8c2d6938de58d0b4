#!/usr/bin/env python3
"""Verify that the VERL in a directory has the patch and that it works: takes about ten seconds, most of them imports.

    python3 scripts/verify_patch.py TREE            imports, registry, configuration, losses
    python3 scripts/verify_patch.py --losses TREE   the losses alone: for a VERL that has the pip package, not the patch

TREE is the directory that has verl/ in it. The losses are compared with closed forms in float64 on random logits.
Nothing is written, no GPU and no model is needed, but the Python has to have the packages that VERL imports.

Exit status: 0 all is well; 1 a check failed; 3 a package is missing, so that something could not be checked.
"""

import argparse
import importlib
import logging
import sys
import warnings
from pathlib import Path

OK, FAILED, NOT_CHECKED = 0, 1, 3

# They import all new modules but the Triton kernel, which CUDA alone needs, and the CPU plugin, which changes VERL.
MODULES = [
    "verl.trainer.ppo.on_policy_distillation",
    "verl.trainer.ppo.v1.trainer_base",
    "verl.workers.engine_workers",
    "verl.workers.teacher_worker",
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


def check_registry(tree):
    """Before any import of ours: training imports VERL alone."""
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    for name, function in LOSSES.items():
        require(get_policy_loss_fn(name).__name__ == function, f"{name} is registered as another function")
    return ", ".join(LOSSES)


def check_imports(tree):
    for name in MODULES:
        importlib.import_module(name)
    return f"{tree / 'verl'}"


def check_configuration(tree):
    """The trainer's configuration, as its command line composes it, with the new keys in VERL's dataclasses."""
    from dataclasses import fields

    from hydra import compose, initialize_config_dir

    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.config.teacher import TeacherConfig

    with initialize_config_dir(config_dir=str(tree / "verl" / "trainer" / "config"), version_base=None):
        config = compose("ppo_trainer", overrides=OVERRIDES)
    # Making the teacher's dataclass would look for the teacher's checkpoint.
    unknown = set(config.teacher) - {"_target_"} - {field.name for field in fields(TeacherConfig)}
    require(not unknown, f"TeacherConfig lacks {sorted(unknown)} of teacher.yaml")
    require(config.teacher.model.path == "teacher", "teacher.model.path cannot be set")
    policy_loss = omega_conf_to_dataclass(config.actor_rollout_ref.actor.policy_loss)
    require(policy_loss.distillation_beta == 0.5, "policy_loss.distillation_beta does not reach VERL's dataclass")
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


def check_losses(tree):
    worst = 0.0
    for kind, beta in [("reverse_kl", 1.0), ("forward_kl", 0.0), ("gkd", 0.3), ("skew_reverse_kl", 0.3)]:
        for quantity, error in loss_errors(kind, beta).items():
            # `not <=`: NaN fails too.
            require(error <= TOLERANCE, f"{kind}: the {quantity} is off by {error:.1e} from its closed form")
            worst = max(worst, error)
    return f"4 divergences, values and gradients; largest relative error {worst:.0e}"


def import_and_check_losses(tree):
    importlib.import_module("verl.trainer.ppo.on_policy_distillation")
    return check_losses(tree)


def verl_comes_from(tree):
    import verl

    found = Path(verl.__file__).resolve().parent.parent
    require(found == tree, f"this Python imports the VERL in {found} instead of the one in {tree}")


def is_ours(module_name):
    return (module_name or "verl").split(".")[0] == "verl"


def run_check(name, check, tree):
    """Print one line; OK, FAILED or NOT_CHECKED."""
    try:
        verl_comes_from(tree)
        print(f"verify: {name:<13} ok: {check(tree)}")
        return OK
    except ModuleNotFoundError as error:
        if is_ours(error.name):
            print(f"verify: {name:<13} FAILED: {error}")
            return FAILED
        print(f"verify: {name:<13} not checked: {sys.executable} has no module {error.name!r}")
        return NOT_CHECKED
    except Exception as error:  # whatever goes wrong in VERL's own imports is for the user to read
        print(f"verify: {name:<13} FAILED: {type(error).__name__}: {error}")
        return FAILED


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tree", type=Path, metavar="TREE", help="directory that has verl/ in it")
    parser.add_argument("--losses", action="store_true", help="check the losses alone")
    arguments = parser.parse_args()
    tree = arguments.tree.resolve()
    if not (tree / "verl" / "__init__.py").is_file():
        parser.error(f"{tree} has no verl/__init__.py in it")

    sys.dont_write_bytecode = True  # what is verified stays as it is
    sys.path.insert(0, str(tree))
    # VERL's imports report every backend and accelerator that is not there.
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    if arguments.losses:
        checks = {"losses": import_and_check_losses}
    else:
        checks = {
            "registry": check_registry,
            "losses": check_losses,
            "imports": check_imports,
            "configuration": check_configuration,
        }
    results = [run_check(name, check, tree) for name, check in checks.items()]
    return FAILED if FAILED in results else max(results)


if __name__ == "__main__":
    sys.exit(main())
