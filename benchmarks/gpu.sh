#!/usr/bin/env bash
# Everything that needs a CUDA device. The modes print as they go and write gpu.json and gpu.md into
# benchmarks/results/ (on a CPU out/), or the folder given by --out, as each part ends:
#
#     benchmarks/gpu.sh smoke            # is it right there: under 100 s
#     benchmarks/gpu.sh measure          # how fast: under 240 s
#     benchmarks/gpu.sh tune             # what other tiles would do
#     benchmarks/gpu.sh experiments      # the paper's tables with the preset gpu, nine minutes a call
#     benchmarks/gpu.sh smoke --device cpu    # the same code in small, without a device
#
# Needs torch for CUDA and what `pip install '.[test]'` brings; installs nothing. FROBDECAY_DATA
# names the directory of the experiments' data, FROBDECAY_OUT where their tables go.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET
[[ ${1:-} != experiments ]] && exec "$python" -m benchmarks.gpu "$@"

shift
folder=${FROBDECAY_OUT:-benchmarks/results/paper}
mkdir -p "$folder"
failed=()
for name in compression why tensors distillation translation language lora; do
    left=$((540 - SECONDS))
    ((left > 20)) || break
    timeout --kill-after=5 "$left" "$python" -m benchmarks.experiments "$name" --preset gpu --workers 6 "$@" ||
        failed+=("$name")
    cp -f "experiments-out/$name-gpu".{json,md,png} "$folder" 2>/dev/null
done
echo "$SECONDS s; not done: ${failed[*]:-none}"
((${#failed[@]} == 0))
