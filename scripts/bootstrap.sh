#!/usr/bin/env bash
# Makes .venv with the packages of scripts/requirements.txt and a VERL that has 0001-on-policy-distillation.patch.
#
#   scripts/bootstrap.sh          make or update; when nothing changed it returns at once
#   scripts/bootstrap.sh --check  change nothing; exit 1 when a run would have something to do
#
# PYTHON=... names the Python (3.10 to 3.12) that a new .venv is made with.
# When the patch changes, VERL's installed directory is replaced by that of its wheel plus the patch: edits made
# inside .venv are lost then, so export them before (scripts/make_patch.py --hunks-from).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
requirements=$root/scripts/requirements.txt
patch_file=$root/0001-on-policy-distillation.patch

# What runs leave in .venv. A run that is cut short anywhere is repaired by the next one.
stamp=$venv/.bootstrap-stamp             # hash of requirements and patch; written last
packages_stamp=$venv/.bootstrap-packages # hash of the requirements that are installed
unfinished=$venv/.bootstrap-unfinished   # there while pip installs: after a cut, what is installed is unknown
wheels=$venv/.pristine                   # VERL's own wheel; scripts/make_patch.py looks here too
stage=$venv/.bootstrap-stage             # VERL is unpacked and patched here, then takes the installed one's place

say() { echo "bootstrap: $*"; }
die() { echo "bootstrap: error: $*" >&2; exit 1; }

hash_of() {
    if command -v sha256sum >/dev/null; then
        cat "$@" | sha256sum
    else
        cat "$@" | shasum -a 256
    fi
}

is_supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' >/dev/null 2>&1; }

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        is_supported "$PYTHON" || die "PYTHON=$PYTHON is not a Python 3.10, 3.11 or 3.12 that runs"
        echo "$PYTHON"
        return
    fi
    local candidate
    for candidate in python3.11 python3.12 python3.10 python3; do
        # Run it: a name on PATH may be a shim without an interpreter behind it.
        if is_supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    die "no Python 3.10, 3.11 or 3.12 found; install one or name it: PYTHON=/path/to/python scripts/bootstrap.sh"
}

# -qq: errors are still printed.
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --no-input -qq "$@"; }

pinned() {
    grep -E "^$1==[^ ;]+$" "$requirements" || die "$requirements has no line $1==VERSION"
}

make_venv() {
    if [ ! -e "$unfinished" ] && "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        is_supported "$venv/bin/python" || die "$venv has a Python other than 3.10 to 3.12; remove it and run again"
        return
    fi
    local python
    python=$(find_python)
    say "making .venv with $("$python" --version)"
    "$python" -m venv --clear "$venv" || die "$python -m venv failed (Debian and Ubuntu have it in python3-venv)"
}

install_packages() {
    local wanted torch
    wanted=$(hash_of "$requirements")
    if [ -e "$packages_stamp" ] && [ "$(cat "$packages_stamp")" = "$wanted" ]; then
        return
    fi
    torch=$(pinned torch)
    rm -f "$packages_stamp"
    : >"$unfinished"
    # torch first and alone: nothing that depends on it may then choose another build.
    say "installing $torch"
    pip install "$torch"
    say "installing the packages of scripts/requirements.txt"
    pip install -r "$requirements"
    echo "$wanted" >"$packages_stamp"
    rm -f "$unfinished"
}

# Kept, so that a changed patch needs no network.
fetch_verl_wheel() {
    local verl=$1
    if ls "$wheels/${verl/==/-}"-*.whl >/dev/null 2>&1; then
        return
    fi
    say "fetching the wheel of $verl"
    rm -rf "$wheels" "$wheels.new"
    pip download --no-deps --only-binary :all: -d "$wheels.new" "$verl"
    mv "$wheels.new" "$wheels"
}

# git apply skips, without a word, every path outside the directory it is run in when that is inside a work tree.
# The stage is (.venv lies in the repository), so git must not find the repository above it.
apply_with_git() (
    cd "$1"
    unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE GIT_PREFIX
    export GIT_CEILING_DIRECTORIES=${PWD%/*}
    git -c core.autocrlf=false apply --whitespace=nowarn "$patch_file"
)

apply_with_patch() (
    cd "$1"
    patch -p1 --forward --batch --no-backup-if-mismatch --quiet <"$patch_file" >&2
)

apply_patch_to() {
    if command -v git >/dev/null; then
        say "applying ${patch_file##*/}"
        apply_with_git "$1"
    elif command -v patch >/dev/null; then
        say "applying ${patch_file##*/} with patch, as there is no git"
        apply_with_patch "$1"
    else
        die "neither git nor patch found; install one of them"
    fi || die "${patch_file##*/} does not apply to $(pinned verl)"
}

check_new_files() {
    local file files
    files=$(awk '/^--- \/dev\/null$/ { getline; sub(/^\+\+\+ b\//, ""); print }' "$patch_file")
    [ -n "$files" ] || die "${patch_file##*/} has no new file in it"
    while IFS= read -r file; do
        [ -f "$1/$file" ] || die "${patch_file##*/} was applied, but $file is not there"
    done <<<"$files"
}

patch_verl() {
    local site verl
    verl=$(pinned verl)
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    fetch_verl_wheel "$verl"
    rm -rf "$stage"
    "$venv/bin/python" -m zipfile -e "$wheels/${verl/==/-}"-*.whl "$stage"
    apply_patch_to "$stage"
    check_new_files "$stage"
    rm -rf "${site:?}/verl"
    mv "$stage/verl" "$site/verl"
    rm -rf "$stage"
}

is_current() { [ -x "$venv/bin/python" ] && [ -e "$stamp" ] && [ "$(cat "$stamp")" = "$1" ]; }

main() {
    local wanted
    [ -s "$patch_file" ] || die "$patch_file is missing; scripts/make_patch.py writes it"
    case "${1:-}" in
    "" | --check) ;;
    *) die "unknown argument $1; there is only --check" ;;
    esac
    wanted=$(hash_of "$requirements" "$patch_file")
    if is_current "$wanted"; then
        return
    fi
    [ "${1:-}" != --check ] || die ".venv is behind the requirements or the patch; run scripts/bootstrap.sh"
    rm -f "$stamp"
    make_venv
    install_packages
    patch_verl
    echo "$wanted" >"$stamp"
    say "ready: .venv/bin/python"
}

main "$@"
