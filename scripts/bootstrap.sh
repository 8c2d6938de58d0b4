#!/usr/bin/env bash
# Makes .venv: the packages of scripts/requirements.txt, VERL as its wheel has it, and this repository beside it
# (pip install -e .).
#
#   scripts/bootstrap.sh          make or update; when nothing changed it returns at once
#   scripts/bootstrap.sh --check  change nothing; exit 1 when a run would have something to do
#
# PYTHON=... names the Python (3.10 to 3.12) that a new .venv is made with.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
requirements=$root/scripts/requirements.txt

# What runs leave in .venv. A run that is cut short anywhere is repaired by the next one.
stamp=$venv/.bootstrap-stamp           # hash of what .venv was made from; written last
unfinished=$venv/.bootstrap-unfinished # there while pip installs packages: after a cut, what is installed is unknown

say() { echo "bootstrap: $*"; }
die() { echo "bootstrap: error: $*" >&2; exit 1; }
hash_of() { if command -v sha256sum >/dev/null; then cat "$@" | sha256sum; else cat "$@" | shasum -a 256; fi; }
is_supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' >/dev/null 2>&1; }
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --no-input -qq "$@"; } # -qq still prints errors

find_python() {
    local candidates=(python3.11 python3.12 python3.10 python3) candidate
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        # Run it: a name on PATH may be a shim without an interpreter behind it.
        is_supported "$candidate" && echo "$candidate" && return
    done
    die "no Python 3.10 to 3.12 that runs: ${candidates[*]}. Name one: PYTHON=/path/to/python scripts/bootstrap.sh"
}

site_packages() { "$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])'; }

make_venv() {
    if [ -e "$unfinished" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        local python
        python=$(find_python)
        say "making .venv with $("$python" --version)"
        "$python" -m venv --clear "$venv" || die "$python -m venv failed (Debian and Ubuntu have it in python3-venv)"
    fi
    is_supported "$venv/bin/python" || die "$venv has a Python other than 3.10 to 3.12; remove it and run again"
}

install_packages() {
    local torch
    torch=$(grep -E '^torch==[^ ;]+$' "$requirements") || die "$requirements has no line torch==VERSION"
    : >"$unfinished"
    # torch first and alone: nothing that depends on it may then choose another build.
    say "installing $torch"
    pip install "$torch"
    say "installing the packages of scripts/requirements.txt"
    pip install -r "$requirements"
    rm "$unfinished"
}

# From the wheel that the patch is made against; whatever else is in VERL's folder, such as a patch's files, goes.
install_verl() {
    local wheel
    wheel=$("$venv/bin/python" "$root/scripts/make_patch.py" --wheel)
    rm -rf "$(site_packages)/verl"
    pip install --force-reinstall --no-deps "$wheel"
}

# Python looks for garbage whenever 700 objects have been made. A fifth of the time that it takes to import VERL, which
# each process of a run does, goes into that; with 20,000 nearly none does.
collect_garbage_less_often() {
    echo 'import gc; gc.set_threshold(20_000, 10, 10)' >"$(site_packages)/collect_garbage_less_often.pth"
}

main() {
    local wanted
    case "${1:-}" in "" | --check) ;; *) die "unknown argument $1; there is only --check" ;; esac
    wanted=$(hash_of "$requirements" "$root/pyproject.toml" "$root/scripts/bootstrap.sh")
    if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then return; fi
    [ "${1:-}" != --check ] || die ".venv is behind requirements.txt or bootstrap.sh in scripts, or pyproject.toml; run scripts/bootstrap.sh"
    rm -f "$stamp"
    make_venv
    install_packages
    install_verl
    pip install -e "$root" --no-deps --no-build-isolation
    collect_garbage_less_often
    echo "$wanted" >"$stamp"
    say "ready: .venv/bin/python"
}

main "$@"
