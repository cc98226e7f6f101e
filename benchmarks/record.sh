#!/usr/bin/env bash
# All measurements of record, about 40 minutes on two idle cores; then the tables of docs/performance.md.
#   PYTHON=path/to/python-with-trl benchmarks/record.sh "what else ran"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=src
python=${PYTHON:-python} note=${1:-nothing else ran}

"$python" benchmarks/roofline.py
for model in 3m 135m; do
  for shape in short countdown knights math; do
    "$python" benchmarks/vs_trl.py --model "$model" --shape "$shape" --save --note "$note"
  done
  "$python" benchmarks/vs_trl.py --model "$model" --shape short --checkpointing --save --note "$note"
  "$python" benchmarks/rounding.py --model "$model"
  "$python" benchmarks/precision.py --model "$model" --shape short --note "$note"
done
"$python" benchmarks/memory.py
"$python" benchmarks/scaling.py
"$python" benchmarks/ablation.py --note "$note"
"$python" benchmarks/tables.py
