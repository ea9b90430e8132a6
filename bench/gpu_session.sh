#!/usr/bin/env bash
# What is measured on GPUs, in parts of at most ten minutes, so that rented time can be portioned.
# One JSON line a case is appended to FILE; all parts are done, in this order, where none is named.
#
#     bash bench/gpu_session.sh FILE [model] [memory] [resume-tests] [parallel] [checkpoint]
#                                    [bf16] [bf16-cheap] [fp8] [fp8-layers] [fp8-tests]
#                                    [fp8-torchao] [autotune]
#                                    [optimizer] [resume] [dpo] [trl] [torchtitan]
#
# A GPU that is much slower than its kind is told by bench/gpu_speed.py first; then nothing is done.
# Tests take SIGTERM for a wish to save and go on to the next, so a part that is out of time is
# killed. A case that fails or takes too long is named on standard error and the next one begins.
# The exit code is the number of cases that failed, 1 where the GPU is a slow one.
set -uo pipefail

lines=${1:?usage: bash bench/gpu_session.sh FILE [PART...]}
shift
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
    timeout --signal=KILL "$limit_s" "$@" >>"$lines"
    local code=$?
    echo "== exit code $code after $((SECONDS - started_s)) s" >&2
    [ "$code" = 0 ] || failed=$((failed + 1))
}

bench() {
    local limit_s=$1
    shift
    measure "$limit_s" "$python" -m sevenfold.workflow.cli bench "$@"
}

tests() {
    local limit_s=$1
    shift
    measure "$limit_s" "$python" -m pytest -q -o filterwarnings= --durations=5 "$@" >&2
}

# One process a GPU. torchrun's would live on, and keep their GPUs, when a part that is out of time
# is killed.
# shellcheck disable=SC2016
each_gpu='
    count=$(nvidia-smi --list-gpus | wc -l) code=0
    export WORLD_SIZE=$count LOCAL_WORLD_SIZE=$count MASTER_ADDR=127.0.0.1 MASTER_PORT=29511
    for ((rank = 0; rank < count; rank++)); do RANK=$rank LOCAL_RANK=$rank "$@" & done
    for job in $(jobs -p); do wait "$job" || code=$?; done
    exit "$code"'
preset=(--preset 7b)
lengths=(--length 512 --length 1024 --length 2048)
bf16=(--set pretrain.precision=bf16 --set pretrain.compile=default)
fp8=(--set pretrain.precision=fp8 --set pretrain.compile=default)
reliability=tests/gpu/test_reliability_gpu.py
memory="lack_of_memory or twenty_recoveries"

part() {
    case $1 in
    model) tests 400 tests/gpu/test_model_gpu.py ;;
    memory) tests 300 $reliability -k "$memory" ;;
    resume-tests) tests 590 $reliability -k "not ($memory)" ;;
    # C09, E04, A08, A09: the processes take a GPU each where there are several. Each compiles for the
    # better part of a minute, so most tests run at once.
    parallel) tests 590 tests/unit/train/test_parallel.py -n 12 ;;
    checkpoint) bench 590 checkpoint "${preset[@]}" --steps 4 --length 512 "${bf16[@]}" ;;
    bf16) bench 590 pretrain "${preset[@]}" --steps 6 "${lengths[@]}" "${bf16[@]}" ;;
    # On an H100 19,737 tok/s and 74.6 GiB at 4 rows.
    fp8)
        for rows in 4 2; do
            bench 200 pretrain "${preset[@]}" --steps 3 --length 2048 "${fp8[@]}" \
                --set pretrain.micro_batch=$rows
        done
        ;;
    # Predicted: 12,300 tok/s and 66.0 GiB.
    bf16-cheap)
        bench 200 pretrain "${preset[@]}" --steps 3 --length 2048 "${bf16[@]}" \
            --set pretrain.micro_batch=4 --set pretrain.recompute=cheap
        ;;
    # Then with more tile sizes tried out by Inductor.
    fp8-layers)
        measure 120 "$python" bench/fp8_layers.py fp8
        TORCHINDUCTOR_MAX_AUTOTUNE_POINTWISE=1 measure 120 "$python" bench/fp8_layers.py fp8
        ;;
    fp8-tests) tests 300 tests/gpu -k fp8 ;;
    fp8-torchao)
        bench 590 pretrain "${preset[@]}" --steps 3 --length 2048 "${fp8[@]}" \
            --set pretrain.precision=fp8_torchao
        ;;
    autotune)
        bench 590 pretrain "${preset[@]}" --steps 6 --length 2048 "${bf16[@]}" \
            --set pretrain.compile=max-autotune
        ;;
    optimizer) bench 300 optimizer "${preset[@]}" "${bf16[@]}" ;;
    # Predicted: 46 s from the weights' making to the first step, compiled code being cached.
    resume)
        bench 590 resume "${preset[@]}" --length 2048 "${fp8[@]}" --set pretrain.micro_batch=4 \
            --set pretrain.tokens_per_batch=8192
        ;;
    # On an H100 14.2 pairs/s with rows of one context and 14.5 with the preset's of two, bf16; 21.2
    # and, on another, 21.6 in FP8.
    dpo)
        local one=(--set dpo.data.max_length=2048
            --set 'dpo.train.contexts=[{length: 2048, until: 1.0}]')
        for precision in bf16 fp8; do
            bench 150 dpo "${preset[@]}" --steps 2 --set dpo.train.precision=$precision
            bench 150 dpo "${preset[@]}" --steps 2 --set dpo.train.precision=$precision "${one[@]}"
        done
        ;;
    # With TRL 1.16 installed, its steps as long as ours. On an H100 14.6 and 3.96 pairs/s.
    trl)
        measure 400 "$python" bench/peers/trl_peer.py dpo "${preset[@]}" --steps 2 --micro-batch 1 \
            --set dpo.train.precision=bf16
        ;;
    # On two GPUs or more, with torchtitan 0.2.2 installed: the preset's way, torchtitan and the ratio,
    # then ours set to what torchtitan does. On two H200s, a GPU: 13,049, 12,268 and (predicted)
    # 12,250 tok/s in bf16; 18,709, 16,976 and 17,536 in FP8.
    torchtitan)
        local rows=(--set pretrain.tokens_per_batch=65536 --set pretrain.micro_batch=8)
        local like=("${rows[@]}" --set pretrain.weights=fp32 --set pretrain.optimizer.kind=adamw
            --set pretrain.mask_documents=false --set kernels.cce=false)
        local flags alike
        for precision in bf16 fp8; do
            flags=() alike=bf16
            [ $precision = bf16 ] || flags=(--fp8) alike=fp8_torchao
            bench 250 pretrain "${preset[@]}" --steps 5 --length 2048 "${rows[@]}" \
                --set pretrain.compile=default --set pretrain.precision=$precision
            OURS=$lines measure 250 bash -c "$each_gpu" each_gpu "$python" \
                bench/peers/torchtitan_peer.py pretrain "${preset[@]}" --steps 5 "${rows[@]}" \
                --micro-batch 8 "${flags[@]}"
            bench 250 pretrain "${preset[@]}" --steps 5 --length 2048 "${like[@]}" \
                --set pretrain.compile=default --set pretrain.precision=$alike
        done
        ;;
    *)
        echo "no part '$1'; the first lines of this file list them" >&2
        exit 2
        ;;
    esac
}

[ $# -gt 0 ] || set -- model memory resume-tests parallel checkpoint bf16 bf16-cheap fp8 fp8-layers \
    fp8-torchao autotune optimizer resume dpo
measure 60 "$python" bench/gpu_speed.py
[ "$failed" = 0 ] || exit 1
for name in "$@"; do
    part "$name"
done

echo "== $failed cases failed" >&2
exit "$failed"
