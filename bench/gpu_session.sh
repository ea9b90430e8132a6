#!/usr/bin/env bash
# Everything that is measured on one H100, in order; one JSON line a case is appended to FILE.
#
#     bash bench/gpu_session.sh FILE
#
# A case that fails or takes too long is named on standard error and the next one begins. The exit
# code is the number of cases that failed.
set -uo pipefail

lines=${1:?usage: bash bench/gpu_session.sh FILE}
lines=$(realpath "$lines")
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH}
failed=0

# measure SECONDS COMMAND...: do it, append its standard output to FILE.
measure() {
    local limit_s=$1 started_s=$SECONDS
    shift
    echo "== $*" >&2
    timeout --kill-after=30 "$limit_s" "$@" >>"$lines"
    local code=$?
    echo "== exit code $code after $((SECONDS - started_s)) s" >&2
    [ "$code" = 0 ] || failed=$((failed + 1))
}

bench() {
    local limit_s=$1
    shift
    measure "$limit_s" "$python" -m sevenfold.workflow.cli bench "$@"
}

echo "== tests/gpu" >&2
timeout --kill-after=30 900 "$python" -m pytest tests/gpu -q >&2 || failed=$((failed + 1))

lengths=(--length 512 --length 1024 --length 2048)
bf16=(--set pretrain.precision=bf16)
fp8=(--set pretrain.precision=fp8)
bench 900 pretrain --preset 7b --steps 6 "${lengths[@]}" "${bf16[@]}" --set pretrain.compile=default
bench 1200 pretrain --preset 7b --steps 6 "${lengths[@]}" "${bf16[@]}" --set pretrain.compile=max-autotune
bench 900 pretrain --preset 7b --steps 6 "${lengths[@]}" "${fp8[@]}" --set pretrain.compile=default
bench 300 optimizer --preset 7b "${bf16[@]}"
bench 600 checkpoint --preset 7b --steps 4 "${bf16[@]}"
bench 600 resume --preset 7b "${bf16[@]}"

echo "== $failed cases failed" >&2
exit "$failed"
