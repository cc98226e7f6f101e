"""Several processes, one run: the update does not depend on their number, and nothing hangs."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from unift import processes
from unift.config.resolve import parse_overrides, resolve
from unift.training.loop import train
from unift.training.run import checkpoint
from unift.training.run.metrics import read_metrics
from unift.training.run.rollouts import read_rollouts, rollouts_path
from unift.types import ConfigError

REWARD = '''
import os

def score(completion, row):
    """Depends on every letter, so that most groups have an advantage."""
    return sum((i + 3) * ord(c) for i, c in enumerate(completion)) % 5 / 4

def fails_elsewhere(completion, row):
    if os.environ.get("RANK") == "1" and completion not in ("", row.solution):
        raise ValueError("no such column")
    return score(completion, row)
'''
TINY = [
    "train.steps=6", "train.prompts=6", "sample.completions=4", "sample.max_tokens=12", "data.train_rows=12",
    "data.test_rows=7", "eval.every=2", "eval.samples=2", "save.every=2", "save.keep=9", "save.rollouts=true",
    "log.gradients_every=2", "threads=1", "show.until=0.5",
]  # fmt: skip
PAPER = [*TINY, "train.updates=2", "reference.kl=0.01", "train.token_budget=120"]
NOISE = ("sampling/", "time/", "tokens/per_second")  # rounding itself, and clocks


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    file = tmp_path_factory.mktemp("reward") / "reward.py"
    file.write_text(REWARD)
    return str(file)


@pytest.mark.parametrize("text", ["30m", "", "0", "-5", "nan", "inf", "1e12"])
def test_a_deadline_that_is_none_is_one_line(text, monkeypatch):
    monkeypatch.setenv("UNIFT_WAIT_SECONDS", text)
    with pytest.raises(ConfigError, match=f"UNIFT_WAIT_SECONDS={text!r}: expected a number of seconds above 0"):
        processes.wait_seconds()
    monkeypatch.setenv("UNIFT_WAIT_SECONDS", "12.5")
    assert processes.wait_seconds() == 12.5
    monkeypatch.delenv("UNIFT_WAIT_SECONDS")
    assert processes.wait_seconds() == 1800


def test_a_deadline_is_read_where_several_meet(tmp_path):
    """The package is imported and works without it; a launched process says what is wrong before it meets the others."""
    code = "from unift import processes\nprocesses.gather('x', 1)\nwith processes.joined():\n    print('alone')"
    alone = {**os.environ, "UNIFT_WAIT_SECONDS": "30m"}
    done = subprocess.run([sys.executable, "-c", code], env=alone, capture_output=True, text=True)
    assert done.stdout.strip() == "alone", done.stderr
    launched = alone | {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = subprocess.run([sys.executable, "-c", code.split("\n", 2)[0] + "\nprocesses.joined().__enter__()"],
                          env=launched, capture_output=True, text=True)  # fmt: skip
    assert "ConfigError: UNIFT_WAIT_SECONDS='30m'" in done.stderr


def single(folder, method, items):
    train(resolve(method, recipe="lock", overrides=parse_overrides(items)), folder)
    return folder


def environment(**more):
    # A process of the tests must never be taken for one of a launcher.
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return clean | {"OMP_NUM_THREADS": "1"} | more


def launched(arguments, n=2, timeout=180, **variables):
    """torchrun with n processes: (exit code, stdout, stderr)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment(**variables))
    return done.returncode, done.stdout, done.stderr


def words(folder, method, items):
    return ["-m", "unift", "train", "--quiet", "--recipe=lock", f"--method={method}", f"run={folder}", *items]


def weights(folder, step=6):
    return torch.load(folder / "checkpoints" / checkpoint.step_name(step) / "state.pt", weights_only=True)["weights"]


def assert_same_run(folder, expected, bound, drawn):
    """Weights within ``bound`` of the largest of their tensor; metrics and results within rounding; tokens of the
    first ``drawn`` steps identical."""
    a, b = weights(folder), weights(expected)
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() <= bound * b[name].abs().max(), name
    start = weights(expected, 2)
    assert any((b[name] - start[name]).abs().max() > 100 * bound * b[name].abs().max() for name in b), (
        "nothing was learned"
    )
    left, right = (read_metrics(x / "metrics.jsonl") for x in (folder, expected))
    assert [m["step"] for m in left] == [m["step"] for m in right] == list(range(7))
    for x, y in zip(left, right, strict=True):
        x, y = ({k: v for k, v in m.items() if not k.startswith(NOISE)} for m in (x, y))
        assert x.keys() == y.keys()
        for told in ("forward", "answer"):
            assert x.pop(told, None) == y.pop(told, None)
        for name in x:
            assert x[name] == pytest.approx(y[name], rel=max(100 * bound, 1e-9), abs=1e-3 * bound), (y["step"], name)
    assert any(m["grad/policy_norm"] > 0 for m in right if "grad/policy_norm" in m)
    for step in range(drawn):
        stored = [read_rollouts(x, step) for x in (folder, expected)]
        one, two = (
            [[(g.row_id, g.cuts, s.tokens, s.score) for s in g.samples] for g in groups] for _, groups in stored
        )
        assert one == two and len(one) == 6
    one, two = (json.loads((x / "result.json").read_text()) for x in (folder, expected))
    for name in ("base", "test", "train", "scorer", "tokens_sampled", "tokens_trained", "reward_seen"):
        assert one[name] == two[name]


@pytest.fixture(scope="module")
def pair(tmp_path_factory, reward):
    """UFT with a KL reference, two updates a step and several packs an update: (one process, two processes)."""
    root, items = tmp_path_factory.mktemp("pair"), [*PAPER, f"reward.function={reward}:score"]
    code, out, err = launched(words(root / "two", "uft", items))
    assert code == 0, err
    return single(root / "one", "uft", items), root / "two"


@pytest.mark.dist
def test_two_processes_are_one_run(pair):
    one, two = pair
    assert_same_run(two, one, 1e-5, drawn=1)
    assert {p.name for p in two.iterdir()} == {p.name for p in one.iterdir()}, (
        "the second process wrote files of its own"
    )


@pytest.mark.dist
def test_two_processes_in_float64_with_phases(tmp_path, reward):
    """In float64 rounding hides nothing. Phases: the reference of the second one is read back from a checkpoint."""
    items = [*TINY, "model.dtype=float64", f"reward.function={reward}:score", "train.prompts=6"]
    items += ["reference.kl=0.01", "credit.scale=none"]
    code, out, err = launched(words(tmp_path / "two", "sft-rft", items))
    assert code == 0, err
    single(tmp_path / "one", "sft-rft", items)
    assert_same_run(tmp_path / "two", tmp_path / "one", 1e-10, drawn=0)


def cut_back(source, target, step):
    """The run as it was right after the checkpoint of ``step``."""
    shutil.copytree(source, target)
    for path in [*target.glob("checkpoints/step_*"), *target.glob("rollouts/step_*")]:
        if int(path.name[5:11]) >= step + (path.parent.name == "checkpoints"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (target / "result.json").unlink()
    shutil.rmtree(target / "model")
    return target


@pytest.mark.dist
def test_one_process_continues_a_run_of_two(pair, tmp_path, reward):
    one, two = pair
    cut = cut_back(two, tmp_path / "run", 2)
    assert checkpoint.steps_saved(cut) == [2]
    single(cut, "uft", [*PAPER, f"reward.function={reward}:score"])
    assert_same_run(cut, one, 1e-5, drawn=1)


@pytest.mark.dist
def test_two_processes_continue_a_run_of_one(pair, tmp_path, reward):
    """Also from rollouts that were sampled and not trained on."""
    one, _ = pair
    cut = cut_back(one, tmp_path / "run", 4)
    shutil.copy(rollouts_path(one, 4), rollouts_path(cut, 4))
    stamp = rollouts_path(cut, 4).stat().st_mtime_ns
    code, out, err = launched(words(cut, "uft", [*PAPER, f"reward.function={reward}:score"]))
    assert code == 0, err
    assert rollouts_path(cut, 4).stat().st_mtime_ns == stamp, "stored groups were sampled again"
    assert_same_run(cut, one, 1e-5, drawn=1)


# ---------------------------------------------------------------------------------------------- failures


def started(folder, items, rank, port, **variables):
    """One process without a launcher, so that nobody ends the others when one fails."""
    own = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    command = [sys.executable, *words(folder, "uft", items)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(**own, **variables)
    )


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.dist
def test_an_error_of_one_process_ends_all_with_its_message(tmp_path, reward):
    items, port = [*TINY, f"reward.function={reward}:fails_elsewhere", "reward.error_rate=0.02"], free_port()
    both = [started(tmp_path / "run", items, rank, port) for rank in (0, 1)]
    errors = [p.communicate(timeout=120)[1] for p in both]
    assert [p.returncode for p in both] == [2, 2]
    assert "error: process 1: reward" in errors[1] and "no such column" in errors[1]
    assert "error: process 0: another process ended the run. process 1: reward" in errors[0]
    assert "no such column" in errors[0] and "Traceback" not in errors[0] + errors[1]


@pytest.mark.dist
@pytest.mark.parametrize(
    ("victim", "number", "shard"),
    [
        (1, signal.SIGSTOP, "none"),
        (1, signal.SIGSTOP, "full"),
        (1, signal.SIGKILL, "full"),
        (0, signal.SIGSTOP, "full"),
    ],
    ids=["stopped", "stopped in shards", "killed in shards", "stopped first"],
)
def test_a_process_that_is_gone_is_named_in_time(tmp_path, reward, victim, number, shard):
    """After its first steps: the other says who is gone and what it waited for, and ends. The first process keeps the store
    that they would ask, so there is nobody to ask once it is stopped."""
    items, port = [*TINY, f"reward.function={reward}:score", "train.steps=4000", f"model.shard={shard}"], free_port()
    both = [started(tmp_path / "run", items, rank, port, UNIFT_WAIT_SECONDS="12") for rank in (0, 1)]
    try:
        until = time.monotonic() + 100
        while len(read_metrics(tmp_path / "run" / "metrics.jsonl")) < 2:
            assert time.monotonic() < until and both[0].poll() is None
            time.sleep(0.1)
        both[victim].send_signal(number)
        began = time.monotonic()
        error = both[1 - victim].communicate(timeout=100)[1]
        took = time.monotonic() - began
    finally:
        for process in both:
            process.kill()
            process.wait()
            for stream in (process.stdout, process.stderr):
                stream.close()
    assert both[1 - victim].returncode == 2
    who = (
        f"process 1 ({both[1].pid} on {platform.node()})" if victim else "process 0, which keeps the addresses of all,"
    )
    waited = r"\d+" if number == signal.SIGKILL else "12"
    said = f"error: process {1 - victim}: waited {waited} s for the other processes at [^:]+: {re.escape(who)} gave no sign"
    assert re.search(said, error), error
    assert took < (12 if number == signal.SIGSTOP else 0) + 25  # three signs of life, and questions to a silent store


def launcher_children(launcher):
    """Process ids of what a launcher started, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if int((path / "stat").read_text().rpartition(")")[2].split()[1]) == launcher:
                own = dict(x.split("=", 1) for x in (path / "environ").read_text().split("\0") if "=" in x)
                found[int(own["RANK"])] = int(path.name)
        except (OSError, KeyError):
            continue
    return found


@pytest.mark.dist
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes by /proc")
def test_a_launcher_starts_a_run_again_after_a_kill(tmp_path, reward):
    """torchrun keeps its store when it starts all processes anew; the run goes on from its checkpoint."""
    items = [*TINY, f"reward.function={reward}:score", "train.steps=40", "eval.every=0", "model.shard=full"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=1", "--nproc-per-node=2"]
    process = subprocess.Popen(
        [*command, *words(tmp_path / "run", "uft", items)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(UNIFT_WAIT_SECONDS="30"),
    )  # fmt: skip
    try:
        until = time.monotonic() + 100
        while not checkpoint.steps_saved(tmp_path / "run"):
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.1)
        victim = launcher_children(process.pid)[1]
        os.kill(victim, signal.SIGKILL)
        out = process.communicate(timeout=150)[0]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, out
    assert f"process 1 ({victim} on {platform.node()}) gave no sign of life" in out
    assert [m["step"] for m in read_metrics(tmp_path / "run" / "metrics.jsonl")] == list(range(41))
    assert (tmp_path / "run" / "result.json").is_file()


FSDP_FILE = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
mixed_precision: 'no'
num_machines: 1
num_processes: 2
machine_rank: 0
rdzv_backend: static
same_network: true
main_training_function: main
fsdp_config:
  fsdp_version: 2
  fsdp_reshard_after_forward: true
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_offload_params: {offload}
"""


@pytest.mark.dist
def test_the_fsdp_file_of_accelerate(tmp_path, reward):
    """accelerate launch with its FSDP config file shards; what the file asks for beside that is refused by name."""
    items = [*TINY, f"reward.function={reward}:score", "train.steps=2", "eval.every=0", "eval.samples=0"]
    found = {}
    for offload in ("false", "true"):
        (tmp_path / "fsdp.yaml").write_text(FSDP_FILE.format(offload=offload))
        command = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={tmp_path / 'fsdp.yaml'}"]
        command += [f"--main_process_port={free_port()}", *words(tmp_path / offload, "uft", items)]
        found[offload] = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment())
    assert found["false"].returncode == 0, found["false"].stderr
    assert (tmp_path / "false" / "checkpoints" / "step_000002" / "shards" / ".metadata").is_file()
    assert found["true"].returncode != 0 and not (tmp_path / "true").exists()
    assert "error: process 0: accelerate's config file asks for weights in CPU memory" in found["true"].stderr


@pytest.mark.dist
def test_compare_refuses_a_launcher(tmp_path):
    code, out, err = launched(["-m", "unift", "compare", f"--run-folder={tmp_path}"])
    assert code != 0 and "unift compare starts processes of its own; found 2 of a launcher" in err


SCRIPT = r"""
import os
import sys
import torch
from unift import processes
from unift.types import UniftError

def gloo():
    names = (open(f"/proc/self/task/{t}/comm").read() for t in os.listdir("/proc/self/task")) if sys.platform == "linux" else ()
    return [n for n in names if "gloo" in n]

processes.BUCKET_BYTES = 100
rank = processes.rank()
with processes.joined():
    assert gloo() or sys.platform != "linux"
    import torch._dynamo  # as an optimizer does: functions of torch take the process group as a default value, and keep it
    shapes, types = [(3,), (40,), (2, 5), (), (7,), (0,), (30,)], [torch.float32] * 3 + [torch.float64] * 2 + [torch.bfloat16] * 2
    tensors = [torch.full(s, 1.0 + 10 * i + rank, dtype=t) for i, (s, t) in enumerate(zip(shapes, types))]
    tensors[2] = tensors[2].t().contiguous().t()  # not contiguous
    before = [t.clone() for t in tensors]
    processes.add_up("a test", tensors)
    for old, new, shape, kind in zip(before, tensors, shapes, types):
        assert new.shape == shape and new.dtype == kind and torch.equal(new, old * 2 + (1 if rank == 0 else -1)), (old, new)
    assert processes.sums("numbers", [0.1, rank]) == [0.2, 1]
    assert processes.gather("values", f"v{rank}") == ["v0", "v1"]
    assert processes.interleave(processes.gather("parts", [i * i for i in processes.share(7)])) == [i * i for i in range(7)]
    assert processes.lead("work", lambda: ["only", rank]) == ["only", 0]
    def refuse():
        assert rank == 0
        raise UniftError("no room")
    for raising in (lambda: processes.lead("work", refuse), lambda: processes.agree("numbers", rank)):
        try:
            raising()
        except UniftError as error:
            sys.stdout.write(f"{rank}: {error}\n")  # one write a line: two processes share the pipe
            sys.stdout.flush()
        else:
            raise AssertionError("no error")
assert not gloo(), "a thread that is left may abort the process while Python is shut down"
"""


@pytest.mark.dist
def test_exchanges(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    code, out, err = launched([str(tmp_path / "script.py")])
    assert code == 0, err
    told = "numbers: process 1 has 1, process 0 has 0; they must be the same"
    assert sorted(out.split("\n")) == ["", "0: no room", f"0: {told}", "1: no room", f"1: {told}"]


# ---------------------------------------------------------------------------------------------- arithmetic, one process


@pytest.mark.parametrize("n", [0, 1, 2, 5, 12])
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_shares_lie_together_again(monkeypatch, n, parts):
    monkeypatch.setenv("WORLD_SIZE", str(parts))
    dealt = []
    for rank in range(parts):
        monkeypatch.setenv("RANK", str(rank))
        dealt.append([f"thing {i}" for i in processes.share(n)])
    assert processes.interleave(dealt) == [f"thing {i}" for i in range(n)]
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_balanced_parts(parts):
    """A partition whose largest part is within 4/3 - 1/(3m) of what no partition can beat."""
    for seed in range(20):
        costs = np.random.default_rng(seed).integers(1, 500, 40).tolist()
        dealt = processes.balanced(costs, parts)
        assert sorted(i for part in dealt for i in part) == list(range(40)) and all(
            part == sorted(part) for part in dealt
        )
        least = max(sum(costs) / parts, *costs)
        assert max(sum(costs[i] for i in part) for part in dealt) <= (4 / 3 - 1 / (3 * parts)) * math.ceil(least)
    assert processes.balanced([5, 1], 3) == [[0], [1], []]
    assert processes.balanced([7, 6, 5, 4], 2) == [[0, 3], [1, 2]]


def test_a_single_process_exchanges_nothing(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")  # some clusters set it for every job: alone it means nothing
    assert (processes.size(), processes.rank(), processes.first(), processes.label()) == (1, 0, True, "")
    tensor = torch.tensor([1.5])
    processes.add_up("nothing", [tensor])
    assert tensor.item() == 1.5 and processes.gather("x", 3) == [3] and processes.sums("x", [1.5]) == [1.5]
    assert processes.balanced_share([3, 9, 1]) == [0, 1, 2] and processes.lead("x", lambda: 7) == 7
    with processes.joined():
        assert not torch.distributed.is_initialized()


def test_a_gpu_for_each_process(monkeypatch):
    from unift.model.load import pick_device
    from unift.types import ConfigError

    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda") == torch.device("cuda", 1) and pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="each takes its own"):
        pick_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="no GPU is left for process 2 of this machine: found 2"):
        pick_device("cuda")


# ---------------------------------------------------------------------------------------------- parent and child

PARENT = """
import subprocess, sys, time
from unift import processes
subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=processes.child_environment())
time.sleep(60)
"""
CHILD = """
import signal, sys, time
from unift import processes
processes.END_SECONDS = 0.3
{before}
processes.end_with_parent(0.05)
print("up", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("before", ["", "signal.signal(signal.SIGTERM, signal.SIG_IGN)"], ids=["asked", "killed"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_ends_with_its_parent(number, before):
    """The child alone holds the pipe once its parent is killed: the end of the pipe is the end of the child."""
    command = [sys.executable, "-c", PARENT, CHILD.format(before=before)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert parent.stdout.readline() == b"up\n"
        parent.send_signal(number)
        parent.wait()
        ready, _, _ = select.select([parent.stdout], [], [], 20)
        assert ready and parent.stdout.read() == b""
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()


def test_a_process_of_its_own_outlives_whoever_started_it(monkeypatch):
    """Only what was started for it ends with its parent, and the wish is not handed on to children of its own."""
    import threading

    before = threading.active_count()
    monkeypatch.delenv(processes.PARENT, raising=False)
    processes.end_with_parent()
    assert threading.active_count() == before
    monkeypatch.setenv(processes.PARENT, str(os.getppid()))
    processes.end_with_parent(60)
    assert threading.active_count() == before + 1 and processes.PARENT not in os.environ
