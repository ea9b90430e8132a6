#!/usr/bin/env bash
# Everything a change must pass: ruff, mypy, then the tests. Options go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/setup_environment.sh
. scripts/setup_environment.sh
sevenfold_setup dev
export OMP_NUM_THREADS=1
status=0
"$PYTHON" -m ruff check src scripts tests configs || status=1
"$PYTHON" -m ruff format --check src scripts tests configs || status=1
"$PYTHON" -m mypy || status=1
# In the folders' order, so that the demo, one file of minutes, does not begin when all else is done.
"$PYTHON" -m pytest tests/ -v -n 2 --dist loadfile --no-loadscope-reorder "$@" || status=$?
exit "$status"
