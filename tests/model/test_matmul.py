"""Where products go on the CPU, and packed weights while sampling: the same values, and nothing left behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import settings, tiny_policy
from torch import nn

from unift.config.sections import Lora
from unift.model import matmul
from unift.model.logprobs import logprobs
from unift.model.lora import adapt
from unift.model.packs import COMPLETION, Item, Member, pack
from unift.objectives.weights import weigh
from unift.sampling.engines.base import Request
from unift.sampling.engines.native import generate


@pytest.fixture(autouse=True)
def as_before():
    name, chosen = torch.get_float32_matmul_precision(), matmul._chosen
    yield
    torch.set_float32_matmul_precision(name)
    matmul._chosen = chosen


@pytest.fixture
def one_dnn(monkeypatch):
    """Products through oneDNN, and every layer counts as worth packing. Returns the rows of each packed product."""
    if matmul.route(True) != "oneDNN":
        pytest.skip("oneDNN is missing in this PyTorch, or is not exact in float32 on this processor")
    monkeypatch.setattr(matmul, "PACK_LEAST", 1)
    rows: list[int] = []
    multiply = matmul._multiply
    monkeypatch.setattr(matmul, "_multiply", lambda *a: (rows.append(a[-1].shape[-2]), multiply(*a))[1])
    return rows


def test_products_stay_float32():
    """Wherever float32 products are sent, they keep float32's precision; attention's small ones are left alone."""
    for wanted in (True, False, None):
        matmul.route(wanted)
        assert matmul.error() < 2e-6
        with matmul.small():
            assert torch.get_float32_matmul_precision() == "highest"
    assert matmul.route(False) == "default"


def test_what_was_set_for_a_model_on_the_cpu_is_taken_back():
    """A GPU reads the same global setting, and multiplies in fewer bits for it. A person's own setting stays."""
    if matmul.route(True) == "oneDNN":
        assert torch.get_float32_matmul_precision() == "medium"
    matmul.unroute()
    assert torch.get_float32_matmul_precision() == "highest"
    torch.set_float32_matmul_precision("high")
    matmul.unroute()
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.parametrize("shape", [(1, 24), (7, 24), (1, 1, 24), (2, 5, 24), (1, 300, 24), (1, 0, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_products(one_dnn, shape, bias):
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 50, bias=bias), torch.randn(shape)
    exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    with torch.no_grad(), matmul.packed(layer):
        got = layer(x)
        assert one_dnn == [shape[-2]]
    assert got.shape == exact.shape and got.dtype == torch.float32
    assert torch.allclose(got.double(), exact, atol=2e-6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        with matmul.packed(layer, bfloat16=True):
            half = layer(x)
    assert len(one_dnn) == 2 and half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), expected.float(), rtol=2**-7, atol=1e-3)


def test_nothing_is_left_behind(one_dnn):
    """After the block, and after an error in it, layers multiply by their own weights and have gradients."""
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(3, 8)
    for _ in range(2):
        before = model(x).detach()
        with pytest.raises(KeyError), torch.no_grad(), matmul.packed(model):
            assert torch.allclose(model(x), before, atol=1e-6)
            raise KeyError
        assert all("forward" not in layer.__dict__ for layer in model)
        model(x).sum().backward()
        assert model[0].weight.grad.abs().max() > 0
        with torch.no_grad():  # the next block sees the weights of its own time
            model[0].weight.mul_(3)
    assert len(one_dnn) == 4


def test_what_is_packed(one_dnn, monkeypatch):
    """Plain linear layers of one float width whose forward nobody else replaced, from a size and up to a total."""
    own, wide = nn.Linear(8, 8), nn.Linear(8, 8).double()
    taken = nn.Linear(8, 8)
    taken.forward = mine = lambda x: x
    kind = type("Kind", (nn.Linear,), {})(8, 8)
    model = nn.ModuleList([own, wide, taken, kind])
    with matmul.packed(model):
        assert ["forward" in m.__dict__ for m in model] == [True, False, True, False]
    assert taken.forward is mine
    for name, value in (("PACK_LEAST", 65), ("PACK_MOST", 63)):
        with monkeypatch.context() as patch:
            patch.setattr(matmul, name, value)
            with matmul.packed(own):
                assert "forward" not in own.__dict__
    matmul.route(False)
    with matmul.packed(own):
        assert "forward" not in own.__dict__


PLAIN = [("llama", True, False), ("llama", False, False), ("qwen2", True, False), ("gpt2", True, False)]
ADAPTED = [("llama", True, True), ("llama", False, True), ("qwen2", True, True)]


@pytest.mark.parametrize("kind, tie, lora", PLAIN + ADAPTED)
def test_sampler(one_dnn, kind, tie, lora):
    """Its log-probs are the trainer's, whatever the model, and its tokens those of the sampler that packs nothing."""
    policy, _ = tiny_policy(kind=kind, tie=tie)
    if lora:
        policy.model, policy.lora = adapt(policy.model, Lora(rank=4)), True
        with torch.no_grad():
            for name, parameter in policy.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.3)
    rng = np.random.default_rng(3)
    asked = [Request(rng.integers(2, 37, n).tolist(), rng.random((4, 12))) for n in (3, 9, 5)]
    groups = generate(policy, asked, 12)
    assert len(one_dnn) >= 12 and min(one_dnn) <= 12
    items = [
        Item(r.prompt[:1], r.prompt[1:], [Member(s.tokens, COMPLETION, 1.0, s.logps) for s in g])
        for r, g in zip(asked, groups, strict=True)
    ]
    batch = pack(items, range(3), weigh(items, settings()), settings())
    own = batch.role_S == COMPLETION
    assert (logprobs(policy, batch)[0].detach()[own] - batch.sampler_S[own]).abs().max() < 1e-5
    done = len(one_dnn)
    matmul.route(False)
    assert [[s.tokens for s in g] for g in generate(policy, asked, 12)] == [[s.tokens for s in g] for g in groups]
    assert len(one_dnn) == done
    matmul.route(True)  # which multiplies once, to check
    done = len(one_dnn)
    generate(policy, asked, 2)  # too short to pay for packing
    assert len(one_dnn) == done
