#!/usr/bin/env bash
# One node: a vLLM server on the last SERVER_GPUS of its GPUS, training on the others. The same line continues a run.
#
#   VLLM_PYTHON=/path/to/vllm-env/bin/python ./one_node.sh CONFIG.yaml RUN_FOLDER [key=value ...]
#
# Ctrl-C or SIGTERM: the step is finished and saved first; a second one ends all at once.
set -euo pipefail
config=${1:?usage: one_node.sh CONFIG.yaml RUN_FOLDER [key=value ...]}
run=${2:?usage: one_node.sh CONFIG.yaml RUN_FOLDER [key=value ...]}
shift 2
: "${VLLM_PYTHON:?set VLLM_PYTHON to the interpreter of the environment that holds vLLM}"
python=${PYTHON:-python} gpus=${GPUS:-8} server_gpus=${SERVER_GPUS:-2} port=${PORT:-8000}
length=${LENGTH:-4096} patience=${START_SECONDS:-1800}
trainers=$((gpus - server_gpus))
((trainers > 0 && server_gpus > 0)) || { echo "one_node.sh: GPUS=$gpus leaves nothing beside SERVER_GPUS=$server_gpus" >&2; exit 2; }

model=$("$python" -c 'import sys, yaml; print(yaml.safe_load(open(sys.argv[1]))["model"]["path"])' "$config")
for word in "$@"; do
    case $word in model.path=*) model=${word#*=} ;; esac
done
url=http://127.0.0.1:$port log=$run.server.log
mkdir -p "$(dirname "$run")"

# Sessions of their own: Ctrl-C reaches this script alone, which says who stops, and in which order.
CUDA_VISIBLE_DEVICES=$(seq -s, "$trainers" $((gpus - 1))) setsid "$python" -m unift serve "$model" \
    --python "$VLLM_PYTHON" --data-parallel "$server_gpus" --length "$length" --samples 256 --port "$port" \
    --folder "$run.served" >>"$log" 2>&1 &
server=$! trainer='' stopped=0

finish() {
    if [[ -n $trainer ]]; then kill -KILL -- "-$trainer" 2>/dev/null || true; fi
    kill -TERM "$server" 2>/dev/null || true
    for _ in {1..50}; do kill -0 "$server" 2>/dev/null || break; sleep 0.2; done
    kill -KILL -- "-$server" 2>/dev/null || true
}
stop() { # once to the processes themselves: torchrun would kill them 30 s after it was asked
    ((stopped == 0)) || exit 130
    stopped=1
    [[ -n $trainer ]] || exit 130
    pkill -TERM -P "$trainer" || true
}
trap finish EXIT
trap stop INT TERM

until curl --noproxy '*' -fs -o /dev/null "$url/health"; do
    kill -0 "$server" 2>/dev/null || { tail -n 20 "$log" >&2; echo "one_node.sh: the server ended, see $log" >&2; exit 1; }
    ((SECONDS < patience)) || { echo "one_node.sh: no server at $url after $patience s, see $log" >&2; exit 1; }
    sleep 1
done

CUDA_VISIBLE_DEVICES=$(seq -s, 0 $((trainers - 1))) setsid "$python" -m torch.distributed.run --standalone \
    --nproc-per-node "$trainers" -m unift train --config "$config" "run=$run" "engine.url=$url" "$@" &
trainer=$!
code=0
while :; do # a trap ends `wait` early
    wait "$trainer" && code=0 || code=$?
    kill -0 "$trainer" 2>/dev/null || break
done
trainer=''
((stopped == 0 || code == 0)) || code=130
exit "$code"
