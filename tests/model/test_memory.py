"""The memory estimate: its parts against what models and optimizers really hold, its sum against the peak of a process."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import saved_bytes, settings, tiny_policy

from unift.config.sections import Lora
from unift.model import architecture, checkpointing, lora, memory
from unift.model.packs import COMPLETION, Item, Member, pack
from unift.objectives.weights import weigh
from unift.training.optimizer import make_optimizer

FOLDER = Path(__file__).parents[2] / "benchmarks"
WORK = memory.Work(1000, 900, 16, 100, 50, 8)


def made(*words, shapes=None, work=WORK, measured=False, cpu=False):
    rules = settings("uft", *words)
    shapes = shapes or tiny_policy()[0].model.config.to_dict()
    built = architecture.from_shapes(shapes, rules.model)
    assert built is not None
    return memory.estimate(built, rules.model, rules, work, measured, cpu)


def held(tensors):
    return sum(x.nbytes for x in tensors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("copies", ["true", "false"])
def test_weights_gradients_and_state_are_those_of_an_optimizer(dtype, copies, recwarn):
    policy, _ = tiny_policy()
    policy.model.to(getattr(torch, dtype))
    rules = settings("uft", f"model.dtype={dtype}", f"train.master_weights={copies}")
    optimizer = make_optimizer(policy, rules.train)
    for p in policy.parameters():
        p.sum().backward()
    optimizer.step()
    found = made(f"model.dtype={dtype}", f"train.master_weights={copies}")
    last = policy.model.config.hidden_size * 8  # the estimate leaves out the last norm
    assert found.weights == pytest.approx(held(policy.parameters()), abs=last)
    assert found.gradients == pytest.approx(held([p.grad for p in policy.parameters()]), abs=last)
    state = [v for s in optimizer.state.values() for v in s.values() if v.ndim]
    assert found.optimizer == pytest.approx(held(state), abs=2 * last)


def test_adapters_are_counted():
    policy, _ = tiny_policy()
    model = lora.adapt(policy.model, Lora(rank=3))
    own = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert architecture.adapters(policy.model.config.to_dict(), 3) == own
    assert made("model.lora=3").gradients == 4 * own and made("model.lora=3").reference == 0
    assert made("reference.kl=0").reference == 0 < made().reference


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("on", [False, True])
def test_activations_are_what_the_graph_keeps(kind, on):
    """Distinct storages that the backward pass of a pack will read, without weights, logits and masks: within 15 %; with
    checkpointing they are fewer, since the estimate holds the one layer that is computed again."""
    policy, _ = tiny_policy(kind=kind)
    config, shapes = settings("uft"), policy.model.config.to_dict()
    items = [Item([3] * 40, [5] * 10, [Member([2 + j % 30] * 60, COMPLETION, 1.0) for j in range(4)])]
    batch = pack(items, [0], weigh(items, config), config)
    checkpointing.use(policy.model, on)
    seen = saved_bytes(policy, batch)
    t, width = len(batch.tokens_T), shapes["hidden_size"]
    work = memory.Work(t, len(batch.target_S), 0, 50, 60, 4)
    expected = memory.activations(shapes, config.model, work, on)
    # What the backward pass itself makes, and the layer that is computed again, are not kept by the forward.
    expected -= t * 4 * (3 * architecture.inner(shapes) + 2 * width)
    if on:
        q, kv = architecture.heads(shapes)
        expected -= t * (24 * width + 4 * (2 * q + 2 * kv + 4 * architecture.inner(shapes)))
    assert seen == pytest.approx(expected, rel=0.15)


def test_what_settings_save():
    base = made("model.autocast=none")
    assert made("train.gradient_checkpointing=true").activations < 0.7 * base.activations
    assert made("train.optimizer=adamw_8bit").optimizer < 0.3 * base.optimizer
    away = made("train.offload_optimizer=true")
    assert away.optimizer == 0 and away.host == 12 * architecture.parameters(tiny_policy()[0].model.config.to_dict())
    assert made(measured=True).streams == 2 * base.gradients and base.streams == 0
    assert made(cpu=True).peak > made().peak, "the CPU's allocator keeps what sampling freed"


def test_a_step_is_no_longer_than_the_settings_allow():
    words = "data.max_prompt=100 sample.max_tokens=50 sample.completions=4 train.prompts=6 train.updates=2".split()
    work = memory.work_of(settings("uft", *words), settings("uft", *words))
    assert work == memory.Work(3 * 300, 800, 24, 100, 50, 4)
    small = settings("uft", *words, "train.token_budget=120")
    assert memory.work_of(small, small).pack == 150, "a prompt with one completion is never divided"
    served = settings("uft", *words, "engine.kind=vllm")
    assert memory.work_of(served, served) == memory.Work(3 * 300, 800, 0, 100, 50, 4), "a server holds keys and values"
    assert made(work=memory.work_of(served, served)).cache == 0 < made(work=work).cache
    supervised = settings("sft", "data.max_prompt=100", "train.prompts=6")
    assert memory.work_of(supervised, supervised) == memory.Work(600, 600, 0, 100, supervised.sample.max_tokens, 0)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 3, 4, 6], ids=["3m", "60m", "60m bfloat16", "135m"])
def test_the_estimate_is_within_a_quarter_of_the_peak(number, monkeypatch):
    """Peak resident set of a process that makes two steps, for three sizes."""
    monkeypatch.syspath_prepend(FOLDER)
    benchmark = importlib.import_module("memory")
    name, shape, words = benchmark.ESTIMATES[number]
    call = [sys.executable, str(FOLDER / "memory.py"), "--child-estimate", name, json.dumps(vars(shape)), words]
    out = subprocess.run(call, capture_output=True, text=True, check=True)
    peak = json.loads(out.stdout.strip().splitlines()[-1])["peak_mib"]
    estimate = benchmark.estimated(name, shape, words)["estimate_mib"]
    assert 0.75 < estimate / peak < 1.25, (estimate, peak)
