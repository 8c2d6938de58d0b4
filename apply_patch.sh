#!/usr/bin/env bash
# Applies 0001-on-policy-distillation.patch to a VERL 0.9 tree. See --help.
set -euo pipefail

patch_file=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)/0001-on-policy-distillation.patch

usage() {
    cat <<'HELP'
Usage: ./apply_patch.sh [TARGET]

Adds on-policy distillation to the VERL 0.9 in TARGET, a directory with verl/ in it: a checkout, an unpacked source
tree or a site-packages directory. Without TARGET: the VERL that Python imports (PYTHON=... names the Python;
otherwise python3).

Either the whole patch is applied or nothing is changed. A tree that has it already is left as it is.
HELP
}

die() { echo "apply_patch.sh: error: $*" >&2; exit 1; }

installed_verl() {
    "${PYTHON:-python3}" -c '
import importlib.util, os, sys
spec = importlib.util.find_spec("verl")
if spec is None or not spec.origin:
    sys.exit(1)
print(os.path.dirname(os.path.dirname(os.path.realpath(spec.origin))))
' 2>/dev/null || die "${PYTHON:-python3} has no VERL; name its directory: ./apply_patch.sh TARGET"
}

# git apply skips, without a word, every path outside the directory it is run in when that is inside a work tree:
# git must not find a repository above TARGET.
git_apply() (
    cd "$target"
    unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE GIT_PREFIX
    export GIT_CEILING_DIRECTORIES=${PWD%/*}
    git -c core.autocrlf=false apply --whitespace=nowarn "$@" "$patch_file"
)

# git apply checks every hunk before it writes, but finds out only while writing that it may not.
check_writable() {
    local file directory
    while IFS=$'\t' read -r _ _ file; do
        directory=$target/$(dirname "$file")
        while [ ! -d "$directory" ]; do directory=$(dirname "$directory"); done
        [ -w "$directory" ] || die "$directory is not writable; nothing was changed"
    done < <(git_apply --numstat)
}

case "${1:-}" in
-h | --help) usage; exit 0 ;;
-*) usage >&2; die "unknown option $1" ;;
esac
[ $# -le 1 ] || die "one TARGET at most; see --help"
[ -s "$patch_file" ] || die "$patch_file is missing"
command -v git >/dev/null || die "git is needed"

target=${1:-$(installed_verl)}
[ -f "$target/verl/__init__.py" ] || die "$target has no verl/__init__.py in it: not a VERL tree"
target=$(cd "$target" && pwd -P)
version=$(cat "$target/verl/version/version" 2>/dev/null || echo unknown)

if git_apply --check --reverse 2>/dev/null; then
    echo "$target has the patch already; nothing to do"
    exit 0
fi
git_apply --check || die "the patch is made for VERL 0.9.1 and does not apply to $target (version $version);
nothing was changed"
check_writable
git_apply
echo "patched VERL $version in $target"
echo "try it:  cd $(printf %q "$target") && ${PYTHON:-python3} -c 'import verl.trainer.ppo.on_policy_distillation'"
printf 'undo it: cd %q && GIT_CEILING_DIRECTORIES=%q git apply --reverse %q\n' "$target" "${target%/*}" "$patch_file"
