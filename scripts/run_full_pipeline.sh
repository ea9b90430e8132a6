#!/usr/bin/env bash
# From text to an aligned, gated model: sets itself up, then runs all stages.
# Options go to `sevenfold run`: --preset 7b, --run DIR, --from STAGE, --until STAGE, --workers N,
# --force "reason".
set -euo pipefail
# shellcheck source=scripts/setup_environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup_environment.sh"
sevenfold_setup
exec "$PYTHON" -m sevenfold.workflow.cli run "$@"
