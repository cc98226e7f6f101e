#!/usr/bin/env bash
# All measurements of record, about an hour on two idle cores; then the tables of docs/performance.md.
#   PYTHON=path/to/python-with-trl benchmarks/record.sh "what else ran"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=src
python=${PYTHON:-python} note=${1:-nothing else ran}

"$python" benchmarks/roofline.py
for model in 3m 135m; do
  threads=1
  [ "$model" = 3m ] || threads=2
  for shape in short countdown knights math; do
    "$python" benchmarks/vs_trl.py --model "$model" --shape "$shape" --threads "$threads" --save --note "$note"
  done
  "$python" benchmarks/precision.py --model "$model" --shape short --threads "$threads" --note "$note"
  "$python" benchmarks/rounding.py --model "$model"
done
"$python" benchmarks/vs_trl.py --model 3m --shape knights --checkpointing --save --note "$note"
"$python" benchmarks/ablation.py --note "$note"
"$python" benchmarks/ablation.py --model 135m --threads 2 --repeats 3 --note "$note"
"$python" benchmarks/scaling.py
"$python" benchmarks/memory.py
"$python" benchmarks/tables.py
