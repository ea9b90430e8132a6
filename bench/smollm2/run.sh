#!/usr/bin/env bash
# Does it work? SmolLM2-135M-Instruct through SFT, DPO and LoRA, judged before and after each.
#
#     bash bench/smollm2/run.sh MODEL DATA FOLDER [FLAGS...]
#
# MODEL: its Hugging Face folder (convert.py makes one of a GGUF). DATA: a folder with pretrain/, sft/,
# eval/ and safety/ as configs/smollm2.yaml names them. FOLDER is made for the run. FLAGS, such as
# --set sft.train.duration='{steps: 2}', go to every command. Gates that refuse are gone past, and the
# records say so: the table shows what each stage gained and what it cost. It is printed at the end.
set -euo pipefail

model=$(realpath "${1:?usage: bash bench/smollm2/run.sh MODEL DATA FOLDER [FLAGS...]}")
data=$(realpath "${2:?DATA is missing}")
mkdir -p "${3:?FOLDER is missing}"
folder=$(realpath "$3")
here=$(cd "$(dirname "$0")" && pwd)
flags=("${@:4}")
python=${PYTHON:-python}
export PYTHONPATH=$here/../../src${PYTHONPATH:+:$PYTHONPATH}

cd "$folder"
ln -sfn "$data" data
"$python" "$here/preferences.py" "$data" >preferences.jsonl
run=(--run run)
[ -f run/run.json ] || run+=(--preset smollm2)
sevenfold() {
    echo "== $1, $SECONDS s" >&2
    "$python" -m sevenfold.workflow.cli "$@" "${run[@]}" "${flags[@]}" || return
    run=(--run run)
}
judge() {
    sevenfold evaluate "$1"
    sevenfold check "$1" || [ $? = 3 ]
}
force=(--force "the table shows what each stage gained and what it cost")
sevenfold sft --start-from "$model" "${force[@]}"
judge sft
sevenfold dpo "${force[@]}"
judge dpo
sevenfold lora "${force[@]}"
judge lora
"$python" -m sevenfold.workflow.cli report run >&2
echo "== done, $SECONDS s" >&2
"$python" "$here/table.py" run
