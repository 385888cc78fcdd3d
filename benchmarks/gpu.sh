#!/usr/bin/env bash
# Everything that needs a CUDA device. The modes print as they go and write gpu.json and gpu.md into
# benchmarks/results/ (on a CPU out/), or the folder given by --out, as each part ends:
#
#     benchmarks/gpu.sh smoke            # is it right there: under 100 s
#     benchmarks/gpu.sh measure          # how fast: under 240 s
#     benchmarks/gpu.sh tune             # what other tiles would do
#     benchmarks/gpu.sh experiments      # the paper's tables, nine minutes a call
#     benchmarks/gpu.sh experiments compression:small:5 why:small:3    # name, preset and seeds of some
#     benchmarks/gpu.sh smoke --device cpu    # the same code in small, without a device
#
# Needs torch for CUDA and what `pip install '.[test]'` brings; installs nothing. FROBDECAY_DATA
# names the directory of the experiments' data, FROBDECAY_OUT where their tables go, and
# FROBDECAY_SECONDS how long they may take; FROBDECAY_WORKERS of them run side by side.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET
[[ ${1:-} != experiments ]] && exec "$python" -m benchmarks.gpu "$@"

shift
folder=${FROBDECAY_OUT:-benchmarks/results/paper}
mkdir -p "$folder"
runs=() options=()
for word; do
    if [[ $word == -* || ${#options[@]} != 0 ]]; then options+=("$word"); else runs+=("$word"); fi
done
((${#runs[@]})) || runs=(
    compression:gpu:3 pretraining:half:3 pretraining:large:3 translation:gpu:3
    why:gpu:3 tensors:gpu:3 distillation:gpu:3 language:gpu:3 lora:gpu:3
    compression:small:5 why:small:3 warmup:small:5 compression:fashion:5 pretraining:gpu:3
    pretraining:small:3 pretraining:smallhalf:3 causal:cpu:3 carryover:cpu:3
)
failed=()
for run in "${runs[@]}"; do
    left=$((${FROBDECAY_SECONDS:-540} - SECONDS))
    ((left > 20)) || break
    IFS=: read -r name preset seeds <<<"$run"
    there=()
    case $run in
        pretraining:* | causal:* | *:small:* | *:fashion:*) there=(--device cuda --graph) ;;
        *:cpu:*) there=(--device cuda) ;;
    esac
    timeout --kill-after=5 "$left" "$python" -m benchmarks.experiments "$name" --preset "$preset" \
        --seeds "$seeds" --workers "${FROBDECAY_WORKERS:-8}" "${there[@]}" "${options[@]}" || failed+=("$run")
    cp -f "experiments-out/$name-$preset".{json,md,png} "$folder" 2>/dev/null
done
echo "$SECONDS s; not done: ${failed[*]:-none}"
((${#failed[@]} == 0))
