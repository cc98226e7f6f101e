"""Steps of the sampler are fit to be recorded as CUDA graphs, shown without a GPU: each does the same work at the same
addresses, none would wait for a device, and each call of the recorder does one step. The recording itself is tested in
tests/test_gpu.py."""

from __future__ import annotations

import contextlib
import dataclasses
import types
import warnings

import numpy as np
import pytest
import torch
from conftest import tiny_policy
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from unift.sampling.engines import cuda_graph, native
from unift.sampling.engines.base import Request
from unift.sampling.engines.native import generate

RNG = np.random.default_rng(5)


def requests(lengths=(7, 12, 1, 9), g=5, length=150):
    asked = [Request(RNG.integers(3, 20, n).tolist(), RNG.random((g, length))) for n in lengths]
    return [*asked, Request(RNG.integers(3, 20, 4).tolist(), None)]  # one greedy


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize(("block", "look"), [(1, 1), (32, 16), (150, 150)])
def test_sizes_of_the_caches_change_nothing(monkeypatch, kind, block, look):
    """Caches that grow by every token, as usual, and never; rows dropped at once, late, and never. All of it at once is what
    a GPU does. Prefixes of several lengths, a greedy row."""
    policy, _ = tiny_policy(kind=kind)
    asked = requests()
    usual = generate(policy, asked, 150, 0.9)
    monkeypatch.setattr(native, "BLOCK", block)
    monkeypatch.setattr(native, "_look", lambda _: look)
    other = generate(policy, asked, 150, 0.9)
    lengths = [len(s.tokens) for g in usual for s in g]
    assert min(lengths) < 16 and max(lengths) > 64  # rows are dropped, caches grow
    for group_a, group_b in zip(usual, other, strict=True):
        for a, b in zip(group_a, group_b, strict=True):
            assert a.tokens == b.tokens and a.finished == b.finished
            assert np.allclose(a.logps, b.logps, atol=1e-5)


def rows_of(policy, length=40):
    asked = [Request(r.prompt, RNG.random((5, length))) for r in requests()[:2]]
    with torch.no_grad():
        return native.Rows(policy, asked, length, 1.0)


def test_every_step_is_the_same():
    """Same operations on tensors of the same shapes and places, whatever the number of tokens before."""
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen[-1].append((func, [tuple(x.shape) for x in args if isinstance(x, torch.Tensor)]))
            return func(*args, **(kwargs or {}))

    rows = rows_of(tiny_policy()[0])
    kept = {n: x.data_ptr() for n, x in vars(rows).items() if isinstance(x, torch.Tensor)}
    caches = [x.data_ptr() for pair in rows.state.members.values() for x in pair]
    for _ in range(3):
        seen.append([])
        with torch.no_grad(), Watch():
            rows.step()
    assert len(seen[0]) > 50 and seen[0] == seen[1] == seen[2]
    assert kept == {n: x.data_ptr() for n, x in vars(rows).items() if isinstance(x, torch.Tensor)}
    assert caches == [x.data_ptr() for pair in rows.state.members.values() for x in pair]


def test_no_step_waits_for_the_device():
    """Tensors without numbers: whatever asks for one, raises."""
    policy, _ = tiny_policy()
    rows, mode = rows_of(policy), FakeTensorMode(allow_non_fake_inputs=True)
    fake = lambda x: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x  # noqa: E731
    for name, value in vars(rows).items():
        setattr(rows, name, fake(value))
    for name in ("prefix", "members"):
        setattr(rows.state, name, {n: tuple(fake(x) for x in pair) for n, pair in getattr(rows.state, name).items()})
    rows.state.mask_B11P, rows.state.filled_1 = fake(rows.state.mask_B11P), fake(rows.state.filled_1)
    with mode, torch.no_grad():
        model = type(policy.model)(policy.model.config)
        rows.policy = dataclasses.replace(policy, model=model)
        rows.step()
        with pytest.raises(DataDependentOutputException):
            int(rows.state.filled_1)


class Device:
    """Stand-ins for CUDA's streams and graphs. While a step is recorded it is not done; a replay does it."""

    def __init__(self, monkeypatch, refuse=False):
        self.done, self.recorded, self.recording = 0, 0, False
        stream = types.SimpleNamespace(wait_stream=lambda _: None)
        nothing = lambda *_, **__: contextlib.nullcontext()  # noqa: E731
        for name, value in {
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": nothing,
            "graph_pool_handle": lambda: None,
            "CUDAGraph": lambda: types.SimpleNamespace(replay=self.step),
            "graph": self.record,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        self.refuse = refuse

    @contextlib.contextmanager
    def record(self, *_, **__):
        self.recording = True
        yield
        self.recording = False
        self.recorded += 1

    def step(self):
        if self.recording and self.refuse:
            self.recording = False
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        self.done += not self.recording


@pytest.mark.parametrize("shapes", [[40], [5, 30, 9], [1, 1, 8], [2, 2, 2]])
def test_each_call_does_one_step(monkeypatch, shapes):
    device = Device(monkeypatch)
    run, calls, left = cuda_graph.Recorded(device.step), 0, sum(shapes)
    for n in shapes:
        for _ in range(n):
            run(left)
            calls, left = calls + 1, left - 1
            assert device.done == calls
        run.forget()
    assert device.recorded == sum(n > 1 and sum(shapes[i:]) > cuda_graph.PAYS for i, n in enumerate(shapes))


def test_a_step_that_cannot_be_recorded(monkeypatch):
    device = Device(monkeypatch, refuse=True)
    run = cuda_graph.Recorded(device.step)
    with pytest.warns(RuntimeWarning, match=r"not recorded as CUDA graphs \(operation not permitted .* capturing\)"):
        run(20)
        run(19)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.forget()
        for left in range(18, 0, -1):
            run(left)
    assert device.done == 20 and device.recorded == 0
