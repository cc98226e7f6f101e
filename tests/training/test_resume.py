"""Kill it anywhere, it continues: the continued run is bitwise the run that was never killed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kills import Killed, killed

from unift.config.resolve import parse_overrides, resolve
from unift.files import publish_folder
from unift.training import loop, step
from unift.training.loop import train
from unift.training.run import checkpoint
from unift.training.run.metrics import read_metrics
from unift.training.run.rollouts import rollouts_path

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


def tiny(method: str = "uft", *more: str):
    return resolve(method, recipe="lock", overrides=parse_overrides([*TINY, *more]))


def outcome(folder: Path, steps: int = STEPS) -> tuple[bytes, list[dict], dict[str, bytes]]:
    """Everything of a run that must not depend on kills: weights and optimizer, metrics but for clocks, rollouts."""
    state = torch.load(folder / "checkpoints" / checkpoint.step_name(steps) / "state.pt", weights_only=True)
    flat = [t for t in state["weights"].values()]
    for entry in state["optimizer"]["state"].values():
        flat += [v for v in entry.values() if isinstance(v, torch.Tensor)]
    weights = b"".join(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in flat)
    metrics = [
        {k: v for k, v in m.items() if not k.startswith("time/") and k != "tokens/per_second"}
        for m in read_metrics(folder / "metrics.jsonl")
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
def test_every_step(whole, tmp_path, k, untrained):
    """Stop after step k, or inside step k+1 when its completions are sampled and scored but not trained on."""
    module, name = (step, "groups_of_step") if untrained else (loop, "one_step")
    with killed(module, name, k, after=untrained):
        train(tiny(), tmp_path)
    assert checkpoint.steps_saved(tmp_path)[-1] == k
    assert rollouts_path(tmp_path, k).exists() == untrained
    train(tiny(), tmp_path)
    assert outcome(tmp_path) == whole


def test_stored_rollouts_are_not_sampled_again(tmp_path, monkeypatch):
    """Completions that were paid for are read back, not drawn anew, when the same weights sampled them."""
    from unift.sampling import groups
    from unift.sampling.groups import completed
    from unift.training import evaluate

    monkeypatch.setattr(loop, "save", lambda *a: None)
    monkeypatch.setattr(loop, "finish", lambda run, base: {})
    train(tiny(), tmp_path)  # no checkpoint: the next attempt begins at step 0 again
    drawn = []
    real = completed

    def counting(engine, tokenizer, requests, *args):
        drawn.extend(r for r in requests if r.draws is not None)
        return real(engine, tokenizer, requests, *args)

    for module in (groups, evaluate):
        monkeypatch.setattr(module, "completed", counting)
    train(tiny(), tmp_path)
    assert drawn == []


@pytest.mark.parametrize("method", ["sft-rft", "stage"])
def test_phases_and_sparse_checkpoints(tmp_path, monkeypatch, method):
    """A checkpoint every 5 steps, phases with a new optimizer and a new reference: still bitwise."""
    settings = tiny(method, "save.every=5", *(["reference.kl=0.01"] if method == "stage" else []))
    train(settings, tmp_path / "whole")
    expected = outcome(tmp_path / "whole")
    real = loop.one_step
    for k in (3, 7, 11):

        def stop_at(run, moment, *args, k=k):
            if moment.step == k:
                raise Killed
            return real(run, moment, *args)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "one_step", stop_at)
            with pytest.raises(Killed):
                train(settings, tmp_path / "cut")
    train(settings, tmp_path / "cut")
    assert outcome(tmp_path / "cut") == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters(tmp_path, dtype):
    """A killed LoRA run, also with adapters on the tied embeddings: bitwise, and so is one that saves less often."""
    words = ["model.lora={rank: 4, targets: [q_proj, embed_tokens]}", f"model.dtype={dtype}", "train.lr=0.01",
             "train.steps=4", "train.prompts=2", "eval.every=0", "sample.max_tokens=12"]  # fmt: skip
    settings, seldom = tiny("uft", *words), tiny("uft", *words, "save.every=0")
    train(seldom, tmp_path / "whole")
    with killed(loop, "one_step", 2):
        train(settings, tmp_path / "cut")
    train(settings, tmp_path / "cut")
    assert outcome(tmp_path / "cut", 4) == outcome(tmp_path / "whole", 4)
    one, other = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("cut", "whole"))
    assert one == other


@pytest.mark.slow
def test_random_sigkill(tmp_path):
    """20 SIGKILLs, ten at random moments of a step and ten inside a save; all of them hit a run that goes on afterwards."""
    kills, steps = 20, 90
    words = [f"train.steps={steps}", "eval.every=10"]
    train(tiny("uft", *words), tmp_path / "whole")
    whole = outcome(tmp_path / "whole", steps)
    a_step = whole_seconds(tmp_path / "whole") / steps
    command = [sys.executable, "-m", "unift", "train", "--recipe", "lock", "--method", "uft", "--quiet"]
    command += ["--run", str(tmp_path / "run"), *TINY, *words]
    environment, draw, torn = os.environ | {"OMP_NUM_THREADS": "1"}, random.Random(0), 0
    saves = tmp_path / "run" / "checkpoints"
    for kill in range(kills):
        before = max(checkpoint.steps_saved(tmp_path / "run"), default=0)
        process = subprocess.Popen(command, env=environment)
        try:
            wait_for(process, lambda: max(checkpoint.steps_saved(tmp_path / "run"), default=0) > before)  # noqa: B023
            if kill % 2:
                wait_for(process, lambda: any(saves.glob(".step_*.tmp")))
                time.sleep(draw.uniform(0, 0.01))
            else:
                time.sleep(draw.uniform(0, 2 * a_step))
            assert process.poll() is None, "the run ended before it was killed: the test needs more steps"
        finally:
            process.kill()
            process.wait()
        torn += any(saves.glob(".*.tmp"))
    assert not (tmp_path / "run" / "result.json").exists()
    assert torn >= 3, f"only {torn} of {kills} kills fell into a save"
    subprocess.run(command, check=True, env=environment)
    assert outcome(tmp_path / "run", steps) == whole


def whole_seconds(folder: Path) -> float:
    return json.loads((folder / "result.json").read_text())["seconds"]


def wait_for(process: subprocess.Popen, happened: Callable[[], bool], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.001)


def test_kill_during_a_save(whole, tmp_path, monkeypatch):
    """A checkpoint that was half written does not count, and is swept away."""
    real, calls = publish_folder, []

    def torn(temporary, final):
        calls.append(final)
        if len(calls) == 5:
            raise Killed  # as a kill: the temporary folder stays behind
        real(temporary, final)

    with monkeypatch.context() as patch:
        patch.setattr("unift.training.run.checkpoint.publish_folder", torn)
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
