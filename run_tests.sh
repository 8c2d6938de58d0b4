#!/usr/bin/env bash
# Makes or updates .venv, then runs the tests in it. Arguments go to pytest: ./run_tests.sh -k divergence
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
scripts/bootstrap.sh
# Without it, the tests that need it are skipped and say so.
.venv/bin/python -c 'import reasoning_gym' 2>/dev/null ||
    .venv/bin/python -m pip --disable-pip-version-check -q install -r examples/on_policy_distillation/headline_requirements.txt ||
    echo "run_tests: reasoning-gym could not be installed (see above); the tests of its tasks are skipped"
# Two files of tests at a time, of one thread each: -n 0 runs one after the other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec .venv/bin/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder "$@"
