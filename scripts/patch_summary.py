"""The text of PATCH_SUMMARY.txt, for scripts/make_patch.py. Every number and every key in it is counted or read."""

import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "apply_patch.py"
GUIDE = ROOT / "PATCH_README.md"
PRESET = ROOT / "verl" / "trainer" / "config" / "policy_loss" / "on_policy_distillation.yaml"
WIDTH = 120


class SummaryError(Exception):
    """What has to be written before the page can be."""


# What a user gets besides the patch, in the order of reading.
PACKAGE = {
    "apply_patch.sh": "applies, checks and removes the patch",
    "README.md": "what this is, two commands, first configuration",
    "PATCH_README.md": "installation, usage, configuration, troubleshooting",
    "ON_POLICY_DISTILLATION.md": "the technical document",
    "examples/on_policy_distillation/README.md": "quickstart, own data, troubleshooting",
    "tests/test_on_policy_distillation.py": "tests of the losses; python FILE runs a part without pytest",
}

TEMPLATE = """\
EXACT ON-POLICY DISTILLATION FOR VERL: THE PATCH ON ONE PAGE
Written by scripts/make_patch.py; do not edit.

For VERL {releases}, and the development branch ({branch}) as far as PATCH_README.md says.

PACKAGE                                           size  lines
{package}

QUICK START
  ./apply_patch.sh                     into the VERL that Python imports; a directory as argument: into that one
  ./apply_patch.sh --check             what would happen
  ./apply_patch.sh --reverse           takes it out again, byte for byte
  git apply 0001-on-policy-distillation.patch        by hand, in a checkout; git am makes a commit of it
Then add to a VERL command that runs PPO or GRPO:
  actor_rollout_ref.actor.policy_loss.loss_mode=on_policy_distillation teacher.model.path=PATH_OF_THE_TEACHER

CONFIGURATION, below actor_rollout_ref.actor.policy_loss (with loss_mode=on_policy_distillation or
hybrid_rl_distillation); the teacher.* group is in verl/trainer/config/teacher/teacher.yaml
{keys}

NEW FILES in verl/ ({new_lines} lines)
{new}

CHANGED FILES in verl/ (+{added} -{removed} lines)
{changed}
and, where they are VERL's own, its four trainer/config/_generated_*.yaml (scripts/generated.patch)
"""


def file_rows(counts):
    """A row for each row of PATCH_README.md's tables, a file's or a directory's, with the lines of all its files."""
    told = dict(re.findall(r"^\| `(verl/\S+)` \| (.*) \|$", GUIDE.read_text(encoding="utf-8"), flags=re.MULTILINE))
    rows = {}
    for name, pair in counts.items():
        path = next((path for path in told if name == path or path[-1] == "/" and name.startswith(path)), None)
        if path is None:
            raise SummaryError(f"{GUIDE.name}: the tables of files have no row for `{name}`")
        rows[path] = [sum(both) for both in zip(rows.get(path, (0, 0)), pair, strict=True)]
    return column(
        hanging(f"  {path[5:]:<51} {f'+{added}':>5} {f'-{removed}' if removed else '':<3}", told[path])
        for path, (added, removed) in rows.items()
    )


def configuration_keys():
    """(key, default, comment above) of the keys of the two losses."""
    pattern = r"^((?:# .*\n)+)([a-z]\w*): (\S+)$"
    found = re.findall(pattern, PRESET.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [(key, default, comment.replace("# ", "").replace("\n", " ").strip()) for comment, key, default in found]


def supported(name):
    """What scripts/apply_patch.py says that the patch is for: "RELEASES" or "BRANCH", as one string."""
    return re.search(rf'^SUPPORTED_{name} = "(.*)"$', SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)[1]


def package_row(name, content, what):
    return f"  {name:<42} {f'{len(content) / 1024:.0f} KB':>7} {content.count(10):>6,}  {what}"


def hanging(head, text):
    """`text` beside `head`, in as many lines as it takes."""
    return textwrap.fill(text, WIDTH, initial_indent=f"{head} ", subsequent_indent=" " * (len(head) + 1))


def column(rows):
    return "\n".join(row.rstrip() for row in rows)


def build_summary(patch, counts, created):
    """The page, as bytes. `counts`: (added, removed) lines by file; `created`: the files that are new."""
    new = {name: pair for name, pair in counts.items() if name in created}
    changed = {name: pair for name, pair in counts.items() if name not in created}
    what = f"{len(new)} new and {len(changed)} changed files"
    package = [package_row("0001-on-policy-distillation.patch", patch, what)]
    package += [package_row(name, (ROOT / name).read_bytes(), what) for name, what in PACKAGE.items()]
    page = TEMPLATE.format(
        releases=supported("RELEASES").replace(" ", " and "),
        branch=supported("BRANCH"),
        package=column(package),
        keys=column(hanging(f"  {key:<25} {default:<11}", comment) for key, default, comment in configuration_keys()),
        new_lines=f"{sum(added for added, _ in new.values()):,}",
        new=file_rows(new),
        added=sum(added for added, _ in changed.values()),
        removed=sum(removed for _, removed in changed.values()),
        changed=file_rows(changed),
    )
    return page.encode("utf-8")
