#!/usr/bin/env bash
# Resume a stage from its latest checkpoint, then go on with the rest.
# Usage: resume_pipeline.sh pretrain|sft|dpo|lora [--run DIR] [--preset NAME] ...
set -euo pipefail
case "${1:-}" in
    pretrain | sft | dpo | lora) stage="$1" ;;
    *)
        echo "usage: resume_pipeline.sh pretrain|sft|dpo|lora [options of 'sevenfold run']" >&2
        exit 2
        ;;
esac
shift
# shellcheck source=scripts/setup_environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup_environment.sh"
sevenfold_setup
exec "$PYTHON" -m sevenfold.workflow.cli run --from "$stage" "$@"
