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
stamp=$venv/.bootstrap-stamp             # hash of what .venv was made from; written last
packages_stamp=$venv/.bootstrap-packages # hash of the requirements that are installed
unfinished=$venv/.bootstrap-unfinished   # there while pip installs: after a cut, what is installed is unknown
wheels=$venv/.pristine                   # VERL's own wheel; scripts/make_patch.py looks here too

say() { echo "bootstrap: $*"; }
die() { echo "bootstrap: error: $*" >&2; exit 1; }
hash_of() { if command -v sha256sum >/dev/null; then cat "$@" | sha256sum; else cat "$@" | shasum -a 256; fi; }
is_supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' >/dev/null 2>&1; }
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --no-input -qq "$@"; } # -qq still prints errors
pinned() { grep -E "^$1==[^ ;]+$" "$requirements" || die "$requirements has no line $1==VERSION"; }
is_at() { [ -e "$1" ] && [ "$(cat "$1")" = "$2" ]; }

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        is_supported "$PYTHON" || die "PYTHON=$PYTHON is not a Python 3.10, 3.11 or 3.12 that runs"
        echo "$PYTHON"
        return
    fi
    local candidate
    for candidate in python3.11 python3.12 python3.10 python3; do
        # Run it: a name on PATH may be a shim without an interpreter behind it.
        is_supported "$candidate" && echo "$candidate" && return
    done
    die "no Python 3.10, 3.11 or 3.12 found; install one or name it: PYTHON=/path/to/python scripts/bootstrap.sh"
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
    if is_at "$packages_stamp" "$wanted"; then return; fi
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

# From the wheel that is kept, so that the installed VERL and the one the patch is made against are the same.
install_verl() {
    local verl wheel
    verl=$(pinned verl)
    if ! ls "$wheels/${verl/==/-}"-*.whl >/dev/null 2>&1; then
        say "fetching the wheel of $verl"
        rm -rf "$wheels" "$wheels.new"
        pip download --no-deps --only-binary :all: -d "$wheels.new" "$verl"
        mv "$wheels.new" "$wheels"
    fi
    wheel=$(ls "$wheels/${verl/==/-}"-*.whl)
    # pip leaves behind what it did not install: the files of a patch, for one.
    rm -rf "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/verl"
    pip install --force-reinstall --no-deps "$wheel"
}

main() {
    local wanted
    case "${1:-}" in "" | --check) ;; *) die "unknown argument $1; there is only --check" ;; esac
    wanted=$(hash_of "$requirements" "$root/pyproject.toml")
    if [ -x "$venv/bin/python" ] && is_at "$stamp" "$wanted"; then return; fi
    [ "${1:-}" != --check ] || die ".venv is behind scripts/requirements.txt or pyproject.toml; run scripts/bootstrap.sh"
    rm -f "$stamp"
    make_venv
    install_packages
    install_verl
    pip install -e "$root" --no-deps --no-build-isolation
    echo "$wanted" >"$stamp"
    say "ready: .venv/bin/python"
}

main "$@"
