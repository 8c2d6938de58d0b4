#!/usr/bin/env bash
# Makes or updates .venv, then runs the tests in it. Arguments go to pytest: ./run_tests.sh -k divergence
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
scripts/bootstrap.sh
exec .venv/bin/python -m pytest tests "$@"
