"""The example in plain PyTorch makes the library's updates: same rows, hints and draws, same weights after three steps."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from unift.config.resolve import parse_overrides, resolve
from unift.model.load import load_policy, load_tokenizer
from unift.training.loop import train
from unift.training.run.metrics import read_metrics
from unift.training.run.rollouts import read_rollouts

EXAMPLE = Path(__file__).parents[1] / "examples" / "minimal_loop.py"
ROWS, STEPS = 20, 4  # hints in the first three steps, none in the last
SHORT = {
    "prompts": 8,
    "warmup": 2,
    "until": 0.75,
    "low": 0.6,
    "kl": 0.1,
}  # of the example, and the same of the library:
SETTINGS = [
    f"train.steps={STEPS}", "train.prompts=8", "train.warmup=2", "show.until=0.75", "show.low=0.6", "reference.kl=0.1",
    f"data.train_rows={ROWS}", "data.test_rows=2", "eval.every=0", "save.every=0", "save.rollouts=true", "threads=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("minimal_loop", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=["float64", "float32"])
def both(request, example, tmp_path_factory):
    """(precision, base weights, the library's, the example's, rewards of both, run folder)"""
    dtype = request.param
    config = resolve("uft", recipe="lock", overrides=parse_overrides([*SETTINGS, f"model.dtype={dtype}"]))
    folder = tmp_path_factory.mktemp(dtype)
    train(config, folder)
    (saved,) = (folder / "checkpoints").glob("step_*")
    theirs = torch.load(saved / "state.pt")["weights"]
    rewards = [r["reward"] for r in read_metrics(folder / "metrics.jsonl")[1 : STEPS + 1]]
    tokenizer = load_tokenizer(config.model)
    model = example.AutoModelForCausalLM.from_pretrained(str(example.BASE), dtype=getattr(torch, dtype))
    base = copy.deepcopy(model.state_dict())
    rows = example.make_rows("lock", ROWS, 0, "train", length=5)
    means = example.train(example.Settings(steps=STEPS, **SHORT), rows, model, tokenizer)
    own = {n: p.detach() for n, p in model.named_parameters()}
    return dtype, base, theirs, own, (rewards, means), folder


def norm(tensors):
    return float(torch.cat([t.double().flatten() for t in tensors]).norm())


def test_it_trains_on_something(both):
    """Hints, completions with and without a reward in one group, and weights that move."""
    _, base, _, own, (rewards, _), folder = both
    _, groups = read_rollouts(folder, 0)
    assert any(len({s.score.value for s in g.samples}) > 1 for g in groups)
    assert any(g.hint for g in groups) and not any(g.hint for g in read_rollouts(folder, STEPS - 1)[1])
    assert 0 < rewards[0] < 1 and norm(own[n] - base[n] for n in own) > 0.01 * norm(own.values())


def test_same_updates(both):
    """Largest difference of a weight relative to the largest weight, and of all weights relative to the way they went.

    Adam divides a gradient by its own size, so entries that are nothing but rounding move by a full step: that is what is
    left in float32. In float64 transformers still computes its norms in float32.
    """
    dtype, base, theirs, own, (rewards, means), _ = both
    assert own.keys() == theirs.keys()
    assert means == pytest.approx(rewards, abs=1e-12)
    worst = max(float((own[n] - theirs[n]).abs().max()) for n in own)
    way = norm(theirs[n] - base[n] for n in own)
    apart = norm(own[n] - theirs[n] for n in own) / way
    print(
        f"{dtype}: worst {worst:.1e}, largest {max(float(t.abs().max()) for t in theirs.values()):.2f}, apart {apart:.1e}"
    )
    assert worst < {"float64": 1e-6, "float32": 1e-3}[dtype] * max(float(t.abs().max()) for t in theirs.values())
    assert apart < {"float64": 1e-5, "float32": 1e-2}[dtype]


def test_same_hints_rows_and_completions(both, example):
    """The example's own draws, step by step, are those in the library's rollouts."""
    dtype, *_, folder = both
    settings, rows = example.Settings(steps=STEPS, **SHORT), example.make_rows("lock", ROWS, 0, "train", length=5)
    for step in range(STEPS):
        _, groups = read_rollouts(folder, step)
        for group in groups:
            assert rows[group.row].id == group.row_id
            assert example.cuts_shown(settings, step, rows[group.row]) == group.cuts


def test_greedy_sampling_is_the_librarys(example):
    """Without a hint and without draws: the first tokens of the untrained base."""
    from unift.sampling.engines.base import Request
    from unift.sampling.engines.native import generate

    config = resolve("uft", recipe="lock", overrides=parse_overrides(SETTINGS))
    tokenizer = load_tokenizer(config.model)
    policy = load_policy(config.model, tokenizer, 64)
    model = example.AutoModelForCausalLM.from_pretrained(str(example.BASE), dtype=torch.float32)
    prompts = [example.tokens_of(tokenizer, row)[0] for row in example.make_rows("lock", 6, 0, "test", length=5)]
    theirs = [group[0].tokens for group in generate(policy, [Request(p, None) for p in prompts], 16)]
    assert example.sample(model, prompts, None, 16, tokenizer.eos_token_id) == theirs


def test_advantages_of_the_example(example):
    """Closed form: one right of two has +-1/sqrt(2) / (std = 1/sqrt(2)); equal scores have exactly none."""
    assert example.advantages(np.array([1.0, 0.0])) == pytest.approx(np.array([0.5, -0.5]) / (np.sqrt(0.5) + 1e-6))
    assert not example.advantages(np.array([0.1, 0.1, 0.1])).any()


def test_it_imports_none_of_the_training_code():
    text = EXAMPLE.read_text(encoding="utf-8")
    imported = {line.split()[1] for line in text.splitlines() if line.startswith(("from unift", "import unift"))}
    assert imported == {"unift", "unift.rows.tasks", "unift.rows.tasks.lock", "unift.types"}
    assert "from unift import rng\n" in text and len(text.splitlines()) <= 200
