"""The optimizers: equal where they must be, float32 copies of bfloat16 weights, and state that is kept exactly."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from conftest import tiny_policy

from unift.config import words
from unift.config.resolve import parse_overrides, resolve
from unift.config.sections import Train
from unift.model.load import load_policy
from unift.training.loop import train
from unift.training.optimizer import MAKERS, MasterWeights, gradient_type, make_optimizer, no_gradient
from unift.training.run.metrics import read_metrics
from unift.types import ConfigError, Stopped

EIGHT_BIT = importlib.util.find_spec("bitsandbytes") or importlib.util.find_spec("torchao")
INSTALLED = [n for n in words.OPTIMIZERS if n != "adamw_8bit" or EIGHT_BIT]
LR = 1e-6


def gradients(parameters, steps):
    """The same gradients for every model, of sizes that differ from weight to weight and step to step."""
    draw = torch.Generator().manual_seed(1)
    return [[torch.randn(p.shape, generator=draw) * 10.0**-k for p in parameters] for k in range(steps)]


def stepped(policy, optimizer, grads):
    for step in grads:
        for p, g in zip(policy.parameters(), step, strict=True):
            p.grad = g.to(gradient_type(p))
        optimizer.step()
    return [p.detach().clone() for p in policy.parameters()]


def train_settings(name="adamw_fused", lr=LR, **more):
    return Train(optimizer=name, lr=lr, **more)


def bfloat16_policy():
    """Weights in bfloat16, and a float32 policy with the same numbers."""
    policy, _ = tiny_policy()
    other, _ = tiny_policy()
    policy.model.to(torch.bfloat16)
    other.model.load_state_dict({n: v.float() for n, v in policy.model.state_dict().items()})
    return policy, other


@pytest.mark.parametrize("name", INSTALLED)
def test_small_updates_of_bfloat16_weights_are_not_lost(name, recwarn):
    """300 updates of 1e-6: the copies are those of float32 training bit for bit, each weight is its copy rounded once, and no
    warning is given. Without copies, most weights stay where they are."""
    policy, exact = bfloat16_policy()
    grads = gradients(exact.parameters(), 3) * 100
    optimizer = make_optimizer(policy, train_settings(name))
    before = [p.detach().clone() for p in policy.parameters()]
    moved, expected = (
        stepped(policy, optimizer, grads),
        stepped(exact, make_optimizer(exact, train_settings(name)), grads),
    )
    assert not [w for w in recwarn if "bfloat16" in str(w.message)]
    for p, got, want in zip(policy.parameters(), moved, expected, strict=True):
        assert p.dtype == torch.bfloat16 and torch.equal(optimizer.state[p]["master"], want)
        assert torch.equal(got, want.bfloat16())
    share = sum(int((a != b).sum()) for a, b in zip(before, moved, strict=True)) / sum(p.numel() for p in before)
    assert share > 0.1
    lost, _ = bfloat16_policy()
    with pytest.warns(RuntimeWarning, match="rounds an update of train.lr=1e-06 away"):
        plain = make_optimizer(lost, train_settings("adamw_fused", master_weights=False))
    stuck = stepped(lost, plain, grads)
    assert sum(int((a != b).sum()) for a, b in zip(before, stuck, strict=True)) < 0.1 * share * sum(
        p.numel() for p in before
    )


def test_many_small_gradients_add_up():
    """1,024 micro-batches of 2^-10 beside one of 1: a bfloat16 sum would stay at 1."""
    policy, _ = bfloat16_policy()
    make_optimizer(policy, train_settings())
    p = policy.parameters()[0]
    assert no_gradient(p).dtype == torch.float32
    for size in [1.0] + [2.0**-10] * 1024:
        (p.sum() * size).backward()
    assert p.grad.dtype == torch.float32 and float(p.grad.flatten()[0]) == 2.0


@pytest.mark.parametrize("name", INSTALLED)
def test_copies_elsewhere_change_nothing(name):
    """Every weight stepped through a copy, as with CPU offload: the numbers of the optimizer itself."""
    a, b = tiny_policy()[0], tiny_policy()[0]
    grads = gradients(a.parameters(), 4)
    settings_ = train_settings(name, lr=1e-3)
    optimizer = make_optimizer(b, settings_)
    matrix = matrices(b)
    apart = MasterWeights(
        a.parameters(), lambda own: MAKERS[name](own, matrix, settings_), 1e-3, lambda p: True, torch.device("cpu")
    )
    for x, y in zip(stepped(a, apart, grads), stepped(b, optimizer, grads), strict=True):
        assert torch.equal(x, y)


def matrices(policy):
    ends = {id(policy.embeddings.weight), id(policy.head.weight)}
    return [p.ndim == 2 and id(p) not in ends for p in policy.parameters()]


@pytest.mark.parametrize("name", INSTALLED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_through_a_file_exactly(name, dtype, tmp_path):
    """Four steps, or two, a save into a file, a load into new objects and two more: the same numbers, copies included."""
    made = train_settings(name, lr=1e-3)
    whole, first, second = (tiny_policy()[0] for _ in range(3))
    for policy in (whole, first, second):
        policy.model.to(dtype)
    grads = gradients(whole.parameters(), 4)
    expected = stepped(whole, rated(make_optimizer(whole, made)), grads)
    early = rated(make_optimizer(first, made))
    stepped(first, early, grads[:2])
    torch.save(
        {"weights": [p.detach() for p in first.parameters()], "optimizer": early.state_dict()}, tmp_path / "s.pt"
    )
    stored = torch.load(tmp_path / "s.pt", weights_only=True)
    late = rated(make_optimizer(second, made))
    with torch.no_grad():
        for p, w in zip(second.parameters(), stored["weights"], strict=True):
            p.copy_(w)
    late.load_state_dict(stored["optimizer"])
    got = stepped(second, rated(late), grads[2:])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def rated(optimizer):
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    return optimizer


def test_copies_are_made_of_the_weights_as_they_are_at_the_first_step():
    """A stage begins with a new optimizer, and then its weights are read from the checkpoint."""
    policy, _ = bfloat16_policy()
    optimizer = make_optimizer(policy, train_settings())
    with torch.no_grad():
        for p in policy.parameters():
            p.fill_(0.5)
    got = stepped(policy, optimizer, [[torch.zeros(p.shape) for p in policy.parameters()]])
    assert all(torch.equal(p, torch.full_like(p, 0.5)) for p in got)


def test_fused_and_plain_adamw_in_float64():
    a, b = tiny_policy(torch.float64)[0], tiny_policy(torch.float64)[0]
    grads = gradients(a.parameters(), 5)
    made = [stepped(p, make_optimizer(p, train_settings(n)), grads) for p, n in ((a, "adamw"), (b, "adamw_fused"))]
    for x, y in zip(*made, strict=True):
        assert torch.allclose(x, y, rtol=1e-12, atol=1e-15)


def test_muon_steps_matrices_by_an_orthogonal_step():
    """Every singular value of the first step of a matrix is about the same; its size is .2 sqrt(larger side) lr (arXiv
    2502.16982, eq. 4). Embeddings, which the head shares, and norms take AdamW's step of size lr."""
    policy, _ = tiny_policy()
    made = train_settings("muon", lr=1e-3)
    optimizer = rated(make_optimizer(policy, made))
    before = {n: p.detach().clone() for n, p in policy.named_parameters()}
    stepped(policy, optimizer, gradients(policy.parameters(), 1))
    for name, p in policy.named_parameters():
        step = (before[name] - p.detach()) / 1e-3
        if p.ndim == 2 and "embed" not in name:
            values = torch.linalg.svdvals(step) / (0.2 * max(p.shape) ** 0.5)
            assert values.min() > 0.3 and values.max() < 1.5, name
        else:
            assert torch.allclose(step.abs(), torch.ones_like(step), atol=2e-3), name


@pytest.mark.skipif(not EIGHT_BIT, reason="neither bitsandbytes nor torchao is installed")
def test_eight_bits_stay_near_adamw():
    """Large weights keep their moments in 8 bits: after ten steps within a tenth of a step from AdamW, not equal to it."""
    torch.manual_seed(0)
    start, grads = torch.randn(128, 256), [torch.randn(128, 256) for _ in range(10)]
    found = []
    for name in ("adamw", "adamw_8bit"):
        p = torch.nn.Parameter(start.clone())
        optimizer = MAKERS[name]([p], [False], train_settings(name, lr=1e-3))
        for g in grads:
            p.grad = g
            optimizer.step()
        found.append(p.detach())
        sizes = sum(getattr(v, "codes", v).nbytes for v in optimizer.state[p].values() if torch.is_tensor(v) and v.ndim)
        assert (sizes < 3 * p.numel()) == (name == "adamw_8bit")
    gap = (found[0] - found[1]).abs().mean() / (found[0] - start).abs().mean()
    assert 0 < gap < 0.1


def test_an_optimizer_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None)
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    for name, text in (("adamw_8bit", "needs bitsandbytes .*pip install bitsandbytes"), ("muon", "needs torch 2.9")):
        with pytest.raises(ConfigError, match=text):
            train(tiny(f"train.optimizer={name}"), tmp_path / name)
        assert not (tmp_path / name).exists()


# ---------------------------------------------------------------------------------------------- runs


def tiny(*more, method="uft"):
    words_ = (
        "train.steps=4 train.prompts=4 sample.completions=4 data.train_rows=8 data.test_rows=2 threads=1 save.every=2"
    )
    return resolve(method, recipe="lock", overrides=parse_overrides([*words_.split(), *more]))


@pytest.mark.parametrize("how", [["train.optimizer=muon"], ["model.dtype=bfloat16"], ["train.offload_optimizer=true"]])
def test_a_run_that_is_stopped_goes_on_exactly(how, tmp_path):
    """Stopped after step 2 of 4 and continued: metrics and weights of the run that was not stopped, in two phases too."""
    config = tiny("train.lr=0.001", "log.gradients_every=2", *how)
    train(config, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(config, tmp_path / "parts", report=lambda record, total: record["step"] == 2)
    train(config, tmp_path / "parts")
    whole, parts = (
        [{k: v for k, v in m.items() if not k.startswith(("time/", "tokens/per"))} for m in read_metrics(p)]
        for p in (tmp_path / n / "metrics.jsonl" for n in ("whole", "parts"))
    )
    assert json.dumps(whole) == json.dumps(parts)
    ends = [
        torch.load(tmp_path / n / "checkpoints/step_000004/state.pt", weights_only=True) for n in ("whole", "parts")
    ]
    assert equal(*ends)
    state = ends[0]["optimizer"]["state"]
    masters = [s["master"] for s in state.values() if "master" in s]
    assert len(masters) == (len(state) if "bfloat16" in how[0] else 0)
    assert all(m.dtype == torch.float32 for m in masters)
    loaded = load_policy(config.model.model_copy(update={"path": str(tmp_path / "whole" / "model")}))
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16 if masters else torch.float32}


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_phases_with_copies(tmp_path):
    """A second phase begins with new copies, of the weights that the first one left; killed between them or not."""
    words_ = ["model.dtype=bfloat16", "train.lr=0.001"]
    train(tiny(*words_, method="sft-rft"), tmp_path / "whole")
    with pytest.raises(Stopped):
        train(tiny(*words_, method="sft-rft"), tmp_path / "parts", report=lambda record, total: record["step"] == 1)
    train(tiny(*words_, method="sft-rft"), tmp_path / "parts")
    ends = [
        torch.load(tmp_path / n / "checkpoints/step_000004/state.pt", weights_only=True) for n in ("whole", "parts")
    ]
    assert equal(*ends)
