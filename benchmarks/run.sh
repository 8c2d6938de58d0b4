#!/usr/bin/env bash
# Sets up .venv and the peers, measures, and writes benchmarks/results/*.json and benchmarks/RESULTS.md.
#
#   benchmarks/run.sh [options of benchmarks/linear_divergence.py]
#   benchmarks/run.sh --sparse [options of benchmarks/sparse_columns.py]
#   benchmarks/run.sh --payloads [options of benchmarks/payloads.py]
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
peers=$root/.benchmarks/peers
stamp=$peers/.peers.txt # a copy of what is installed; written last
python=$root/.venv/bin/python

install_peers() {
    if cmp -s "$root/benchmarks/peers.txt" "$stamp"; then
        return
    fi
    echo "benchmarks: installing the packages of benchmarks/peers.txt into .benchmarks/peers"
    rm -rf "$peers"
    "$python" -m pip --disable-pip-version-check --no-input -qq install --no-deps --target "$peers" \
        -r "$root/benchmarks/peers.txt"
    cp "$root/benchmarks/peers.txt" "$stamp"
}

"$root/scripts/bootstrap.sh"
cd "$root"
if [ "${1:-}" = --sparse ]; then
    shift
    "$python" benchmarks/sparse_columns.py "$@"
elif [ "${1:-}" = --payloads ]; then
    shift
    "$python" benchmarks/payloads.py "$@"
else
    install_peers
    "$python" benchmarks/linear_divergence.py "$@"
fi
"$python" benchmarks/render.py
