#!/usr/bin/env bash
# Applies 0001-on-policy-distillation.patch to a VERL, or removes it. See --help. scripts/apply_patch.py does the work.
set -euo pipefail
unset CDPATH

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
for python in ${PYTHON:+"$PYTHON"} python3 python; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null; then exec "$python" "$here/scripts/apply_patch.py" "$@"; fi
done
echo "apply_patch.sh: error: no Python 3.8 or later found; nothing was changed. Name one: PYTHON=/path/to/python $0" >&2
exit 1
