"""The scripts of examples/cluster, end to end on this CPU: gloo in place of NCCL, a server that speaks vLLM's routes in place of
vLLM, and stand-ins for `srun` and `scontrol` that do what SLURM's do (tests/fake_slurm.py)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unift.rows.inspect import write_rows
from unift.rows.tasks import make_rows
from unift.training.run import checkpoint
from unift.training.run.metrics import read_metrics

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(
        any(shutil.which(name) is None for name in ("bash", "setsid", "pkill", "curl", "seq")),
        reason="bash, setsid, pkill, curl or seq is missing",
    ),
]
FOLDER = Path(__file__).parents[1] / "examples" / "cluster"
LIMIT = 600  # seconds that a script may take
# What a laptop needs; everything else is the files' own.
SMALL = [
    "model.path=embedded:lock", "model.device=cpu", "train.steps=5", "train.prompts=6", "train.lr=1e-3",
    "sample.completions=4", "sample.max_tokens=12", "eval.every=0", "eval.rows=6", "save.every=100",
    "save.rollouts=true", "reward.workers=1", "threads=1", "engine.timeout=60",
]  # fmt: skip
GAP = "sampling/sampling_logp_difference/mean"


@pytest.fixture
def place(tmp_path):
    """The folder as a user copies it, with rows beside the files, and programs that stand in for those of a cluster."""
    folder = tmp_path / "cluster"
    shutil.copytree(FOLDER, folder)
    for split in ("train", "test"):
        write_rows(make_rows("lock", 16, 0, split, length=5), folder / f"{split}.jsonl")
    programs = tmp_path / "bin"
    programs.mkdir()
    here = Path(__file__).parent
    for name, words in {
        "srun": f"{here / 'fake_slurm.py'} srun",
        "scontrol": f"{here / 'fake_slurm.py'} scontrol",
        "vllm-python": f"{here / 'fake_vllm.py'}",
    }.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        (programs / name).chmod(0o755)
    return folder


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(place, **more):
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    programs = place.parent / "bin"
    own = {
        "PATH": f"{programs}:{clean['PATH']}",
        "PYTHON": sys.executable,
        "VLLM_PYTHON": str(programs / "vllm-python"),
        "OMP_NUM_THREADS": "1",
        "LENGTH": "64",
        "FAKE_SLURM": str(place.parent / "slurm.json"),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return clean | own | more


def started(place, script, config, **variables):
    words = ["bash", str(place / script), str(place / config), str(place.parent / "run"), *SMALL]
    words += ["model.autocast=none"]  # what is left of the gap is then float32's
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(place, **variables),
        start_new_session=True, cwd=place.parent,
    )  # fmt: skip


def ended(process, place):
    """(exit status, what it said and the server's log)."""
    try:
        said, _ = process.communicate(timeout=LIMIT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    log = place.parent / "run.server.log"
    return process.returncode, said + (log.read_text() if log.exists() else "")


def reached(place, step, process):
    """Wait until so many steps are logged, or the script has ended."""
    file, end = place.parent / "run" / "metrics.jsonl", time.monotonic() + LIMIT
    while time.monotonic() < end and process.poll() is None:
        if file.exists() and len(file.read_text().splitlines()) > step:
            return
        time.sleep(0.1)


def asked(place):
    """What scontrol was asked to queue again."""
    file = place.parent / "slurm.json"
    return json.loads(file.read_text()) if file.exists() else []


def left_over(place):
    """Processes that still name this test's folder."""
    found = subprocess.run(["pgrep", "-f", str(place.parent / "run")], capture_output=True, text=True)
    return found.stdout.split()


def assert_whole(place, shards, gap):
    """All steps, sampled by weights that the trainer had: log-probs differ by ``gap`` at most (rounding)."""
    run = place.parent / "run"
    metrics = read_metrics(run / "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(6)) and (run / "result.json").is_file()
    assert all(m[GAP] < gap for m in metrics[1:]), "the server did not sample with the weights of the step"
    assert any(m["grad/norm"] > 0 for m in metrics[1:])
    last = run / "checkpoints" / checkpoint.step_name(5)
    assert (last / "shards").is_dir() == shards
    assert left_over(place) == []


SLURM = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node[1-2]", "GPUS": "2", "SERVER_GPUS": "1"}


def test_two_nodes_stop_and_go_on(place):
    """1 process beside the server on the first node and 2 on the second. USR1, which SLURM sends before the time limit: the
    step is finished and saved, the job is queued again, and its next start goes on to the end."""
    first = started(place, "slurm.sbatch", "two_nodes.yaml", **SLURM | {"SLURM_JOB_ID": str(free_port() % 10000)})
    reached(place, 1, first)
    first.send_signal(signal.SIGUSR1)
    code, said = ended(first, place)
    assert code == 0, said
    assert "it was asked to stop; the job is queued again" in said and len(asked(place)) == 1, said
    saved = checkpoint.steps_saved(place.parent / "run")
    assert len(saved) == 1 and 1 <= saved[0] < 5, said
    assert left_over(place) == []
    number = str(free_port() % 10000)
    again = started(
        place, "slurm.sbatch", "two_nodes.yaml", **SLURM | {"SLURM_JOB_ID": number, "SLURM_RESTART_COUNT": "1"}
    )
    code, said = ended(again, place)
    assert code == 0 and len(asked(place)) == 1, said
    assert_whole(place, shards=True, gap=1e-5)
    calls = [json.loads(line) for line in (place.parent / "slurm.json.srun").read_text().splitlines()]
    assert [call["nodes"] for call in calls] == [["127.0.0.1"], ["127.0.0.1", "localhost"]] * 2


def test_a_server_that_is_lost_queues_the_job_again(place):
    number = str(free_port() % 10000)
    process = started(place, "slurm.sbatch", "two_nodes.yaml", **SLURM | {"SLURM_JOB_ID": number})
    reached(place, 1, process)
    served = subprocess.run(
        ["pgrep", "-f", f"fake_vllm.py.*{place.parent}"], capture_output=True, text=True
    ).stdout.split()
    assert len(served) == 1
    os.kill(int(served[0]), signal.SIGKILL)
    code, said = ended(process, place)
    assert code == 0 and "the server was lost; the job is queued again" in said and asked(place) == [number], said
    assert "went away" in said or "refuses connections" in said
    assert left_over(place) == []


def test_a_mistake_does_not_queue_the_job_again(place):
    (place / "test.jsonl").unlink()
    code, said = ended(started(place, "slurm.sbatch", "two_nodes.yaml", **SLURM), place)
    assert code not in (0, 130) and asked(place) == [], said
    assert "test.jsonl" in said and "does not exist" in said
    assert left_over(place) == []


def test_one_node(place):
    """2 processes beside the server. TERM (or Ctrl-C): saved, exit status 130; the same line goes on to the end."""
    variables = {"GPUS": "3", "SERVER_GPUS": "1", "PORT": str(free_port())}
    first = started(place, "one_node.sh", "one_node.yaml", **variables)
    reached(place, 1, first)
    first.send_signal(signal.SIGTERM)
    code, said = ended(first, place)
    assert code == 130, said
    saved = checkpoint.steps_saved(place.parent / "run")
    assert len(saved) == 1 and 1 <= saved[0] < 5, said
    assert left_over(place) == []
    code, said = ended(started(place, "one_node.sh", "one_node.yaml", **variables), place)
    assert code == 0, said
    assert_whole(place, shards=False, gap=0.05)  # bfloat16 beside float32


def test_a_server_that_does_not_start(place):
    (place.parent / "bin" / "vllm-python").write_text("#!/bin/sh\necho no such module >&2\nexit 3\n")
    variables = {"GPUS": "3", "SERVER_GPUS": "1", "PORT": str(free_port())}
    code, said = ended(started(place, "one_node.sh", "one_node.yaml", **variables), place)
    assert code == 1 and "the server ended" in said and "no such module" in said, said
    assert left_over(place) == []


def test_accelerate_takes_its_file(place):
    """The FSDP file as it stands, with two processes: shards, on the settings of one GPU."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(place / "accelerate_fsdp.yaml")]
    command += ["--num_processes=2", f"--main_process_port={free_port()}", "-m", "unift", "train", "--quiet"]
    command += [f"--config={place / 'one_gpu.yaml'}", f"run={place.parent / 'run'}", *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=environment(place))
    assert done.returncode == 0, done.stderr
    assert (place.parent / "run" / "checkpoints" / checkpoint.step_name(5) / "shards").is_dir()
