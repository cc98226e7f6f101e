"""Kill it anywhere, it continues: the continued run is bitwise the run that was never killed (DESIGN promise 4)."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from unift import checkpoint
from unift.config import parse_overrides, resolve
from unift.loop import Run, train

STEPS = 12
TINY = [
    f"train.steps={STEPS}",
    "train.prompts=4",
    "sample.completions=4",
    "data.train_rows=12",
    "data.test_rows=8",
    "eval.every=4",
    "save.every=1",
    "save.keep=20",
    "save.rollouts=true",
    "log.gradients_every=2",
    "threads=1",
]


class Killed(Exception):
    pass


def tiny(method: str = "uft", *more: str):
    return resolve(method, recipe="lock", overrides=parse_overrides([*TINY, *more]))


def outcome(folder: Path) -> tuple[bytes, list[dict], dict[str, bytes]]:
    return outcome_of(folder, STEPS)


def outcome_of(folder: Path, steps: int) -> tuple[bytes, list[dict], dict[str, bytes]]:
    """Everything of a run that must not depend on kills: weights and optimizer, metrics but for clocks, rollouts."""
    state = torch.load(folder / "checkpoints" / checkpoint.step_name(steps) / "state.pt", weights_only=True)
    flat = [t for t in state["weights"].values()]
    for entry in state["optimizer"]["state"].values():
        flat += [v for v in entry.values() if isinstance(v, torch.Tensor)]
    weights = b"".join(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in flat)
    metrics = [
        {k: v for k, v in m.items() if not k.startswith("time/") and k != "tokens/per_second"}
        for m in checkpoint.read_metrics(folder / "metrics.jsonl")
    ]
    rollouts = {p.name: p.read_bytes() for p in sorted((folder / "rollouts").glob("*"))}
    return weights, metrics, rollouts


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    train(tiny(), folder)
    return outcome(folder)


@pytest.mark.parametrize("k", range(1, STEPS))
@pytest.mark.parametrize("untrained", [False, True], ids=["trained", "sampled-only"])
def test_every_step(whole, tmp_path, monkeypatch, k, untrained):
    """Stop after step k, or inside step k+1 when its completions are sampled and scored but not trained on."""
    real, sampled = Run.step, Run._groups

    def stop_at(self, step, *args):
        if step == k and not untrained:
            raise Killed
        return real(self, step, *args)

    def stop_after_sampling(self, step, *args):
        groups = sampled(self, step, *args)
        if step == k and untrained:
            raise Killed
        return groups

    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", stop_at)
        patch.setattr(Run, "_groups", stop_after_sampling)
        with pytest.raises(Killed):
            train(tiny(), tmp_path)
    assert checkpoint.steps_saved(tmp_path)[-1] == k
    assert checkpoint.rollouts_path(tmp_path, k).exists() == untrained
    train(tiny(), tmp_path)
    assert outcome(tmp_path) == whole


def test_stored_rollouts_are_not_sampled_again(tmp_path, monkeypatch):
    """Completions that were paid for are read back, not drawn anew, when the same weights sampled them."""
    from unift import evaluate, loop

    monkeypatch.setattr(Run, "_save", lambda *a: None)
    monkeypatch.setattr(Run, "_finish", lambda self, base: {})
    train(tiny(), tmp_path)  # no checkpoint: the next attempt begins at step 0 again
    drawn = []
    real = evaluate.complete

    def counting(policy, requests, *args):
        drawn.extend(r for r in requests if r.uniforms_GL is not None)
        return real(policy, requests, *args)

    monkeypatch.setattr(loop.evaluate, "complete", counting)
    train(tiny(), tmp_path)
    assert drawn == []


@pytest.mark.parametrize("method", ["sft-rft", "stage"])
def test_phases_and_sparse_checkpoints(tmp_path, monkeypatch, method):
    """A checkpoint every 5 steps, phases with a new optimizer and a new reference: still bitwise."""
    settings = tiny(method, "save.every=5", *(["reference.kl=0.01"] if method == "stage" else []))
    train(settings, tmp_path / "whole")
    expected = outcome(tmp_path / "whole")
    real = Run.step
    for k in (3, 7, 11):
        def stop_at(self, step, *args, k=k):
            if step == k:
                raise Killed
            return real(self, step, *args)

        with monkeypatch.context() as patch:
            patch.setattr(Run, "step", stop_at)
            with pytest.raises(Killed):
                train(settings, tmp_path / "cut")
    train(settings, tmp_path / "cut")
    assert outcome(tmp_path / "cut") == expected


@pytest.mark.slow
def test_random_sigkill(whole, tmp_path):
    """20 SIGKILLs at random moments, saves included, then one attempt to the end."""
    begin = [sys.executable, "-m", "unift", "train", "--recipe", "lock", "--method", "uft", "--quiet", *TINY, "--run"]
    command = [*begin, str(tmp_path / "run")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    subprocess.run([*begin, str(tmp_path / "timing")], check=True, env=environment)
    length = time.monotonic() - began
    draw = random.Random(0)
    for _ in range(20):
        process = subprocess.Popen(command, env=environment)
        try:
            process.wait(timeout=draw.uniform(0.5 * length, 1.05 * length))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        if (tmp_path / "run" / "result.json").exists():
            break
    subprocess.run(command, check=True, env=environment)
    assert outcome(tmp_path / "run") == whole


def test_kill_during_a_save(whole, tmp_path, monkeypatch):
    """A checkpoint that was half written does not count, and is swept away."""
    real, calls = checkpoint.publish_folder, []

    def torn(temporary, final):
        calls.append(final)
        if len(calls) == 5:
            raise Killed  # as a kill: the temporary folder stays behind
        real(temporary, final)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "publish_folder", torn)
        with pytest.raises(Killed):
            train(tiny(), tmp_path)
    left = list((tmp_path / "checkpoints").glob(".*.tmp"))
    assert left and checkpoint.steps_saved(tmp_path)[-1] == 4
    train(tiny(), tmp_path)
    assert outcome(tmp_path) == whole
    assert not list((tmp_path / "checkpoints").glob(".*.tmp"))


def test_torn_metrics_line(whole, tmp_path):
    train(tiny(), tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 12, "rew')
    (tmp_path / "result.json").unlink()
    train(tiny(), tmp_path)
    assert outcome(tmp_path) == whole


def test_finished_run_is_not_repeated(tmp_path):
    first = train(tiny(), tmp_path)
    stamp = (tmp_path / "metrics.jsonl").stat().st_mtime_ns
    assert train(tiny(), tmp_path) == json.loads(json.dumps(first))
    assert (tmp_path / "metrics.jsonl").stat().st_mtime_ns == stamp
