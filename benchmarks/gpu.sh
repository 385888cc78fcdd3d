#!/usr/bin/env bash
# Everything that needs a CUDA device, in one call of less than nine minutes: the tests of the
# kernels, compiled; the tiles that were tried; and all benchmarks. Writes gpu.json, one file with
# all numbers, and gpu.md, their table, into benchmarks/results/ or the folder given.
#
#     benchmarks/gpu.sh [FOLDER]
#     benchmarks/gpu.sh experiments [FOLDER]
#
# The second form continues the paper's Table 1 and Figure 1 with the preset gpu for nine minutes,
# and the other experiments after them; call it again until all are done. Tables go to
# benchmarks/results/paper/ or the folder given, checkpoints to experiments-out/; FROBDECAY_DATA
# names the directory of the data.
#
# Needs torch for CUDA and what `pip install '.[test]'` brings; installs nothing. A part that fails
# or takes too long is reported, and the others run all the same.
set -uo pipefail
mode=all
[[ ${1:-} == experiments ]] && mode=experiments && shift
default=$(dirname "$0")/results
[[ $mode == experiments ]] && default+=/paper
folder=$(realpath -m "${1:-"$default"}")
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HYPOTHESIS_MAX_EXAMPLES=10
unset TRITON_INTERPRET
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$folder"
failed=()

part() { # name, seconds, command …
    local name=$1 seconds=$2 begin=$SECONDS
    shift 2
    echo "== $name"
    if ! timeout --kill-after=5 "$seconds" "$@"; then
        failed+=("$name")
        echo "!! $name failed, or took more than $seconds s"
    fi
    echo "== $name: $((SECONDS - begin)) s"
}

"$python" - <<'PY' || exit 1
import sys
import torch

if not torch.cuda.is_available():
    sys.exit("expected a CUDA device, found none")
print(torch.cuda.get_device_name(), "torch", torch.__version__)
PY

if [[ $mode == experiments ]]; then
    for name in compression why tensors distillation translation language lora; do
        left=$((540 - SECONDS))
        ((left > 20)) || break
        part "$name" "$left" "$python" -m benchmarks.experiments "$name" --preset gpu --workers 6
        cp -f "experiments-out/$name-gpu".{json,md,png} "$folder" 2>/dev/null
    done
    echo "$SECONDS s; not done: ${failed[*]:-none}"
    exit $((${#failed[@]} > 0))
fi

# Most of the tests' time is compilation, so they share the cores if pytest-xdist is there.
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 8)
mapfile -t tests < <(grep -l 'mark\.cuda' tests/test_*.py)
part tests 160 "$python" -m pytest -q -m cuda -p no:cacheprovider "${workers[@]}" "${tests[@]}"

part gpu 120 "$python" -m benchmarks.gpu --budget 100 --json "$work/1-tiles.json"
part penalty 80 "$python" -m benchmarks.penalty --device cuda --compile --seconds 0.5 \
    --json "$work/2-penalty.json"
number=3
for name in step forward init; do
    if [[ -f benchmarks/$name.py ]]; then
        part "$name" 45 "$python" -m "benchmarks.$name" --device cuda --seconds 0.2 \
            --json "$work/$number-$name.json"
    fi
    number=$((number + 1))
done

shopt -s nullglob
reports=("$work"/*.json)
if ((${#reports[@]})); then
    "$python" -m benchmarks.gpu --merge "${reports[@]}" \
        --json "$folder/gpu.json" --table "$folder/gpu.md" || failed+=(merge)
    cat "$folder/gpu.md"
fi
echo "$SECONDS s in all; failed: ${failed[*]:-none}"
((${#failed[@]} == 0))
