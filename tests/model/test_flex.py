"""Packed rows through flex_attention: its blocks, its values and gradients, and what happens where it does not work.

PyTorch refuses gradients of flex_attention on the CPU, although its uncompiled form has them; the refusal is lifted here, so
that all but the compiled kernel is held to the other paths. The kernel is held to stock attention where it runs, once for
every kind of heads (``flex.difference``), and by tests/test_gpu.py.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import close, gradients, make_items, packed_loss, settings, tiny_policy
from plain import uft_loss
from test_attention import CASES, layout_of
from torch.nn.attention import flex_attention as stock

from unift.model.attention import flex
from unift.model.attention.packed import stock_attention

# The cases of the other path, and rows of several blocks: prefixes that start and end within a block, and at its edge.
ROWS = CASES | {
    "blocks": ([300, 1, 129], [[140, 60, 1], [400], [3, 260]]),
    "block edges": ([256, 128], [[128, 128, 256], [127, 1]]),
    "many": ([130], [[50] * 8]),
    "a stem of blocks": ([300, 1, 129], [[140, 60, 1], [400], [3, 260]], 330),
    "runs side by side": ([100], [[300, 20]], 60),
    "a stem at the edge": ([256, 128], [[128, 128, 256], [127, 1]], 128),
}


@pytest.fixture
def gradients_on_cpu(monkeypatch):
    monkeypatch.setattr(stock, "_validate_device", lambda *_: None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without")
        yield


def copied(q, k, v, at, scale):
    return stock_attention(*(x[0].transpose(0, 1) for x in (q, k, v)), at, scale).transpose(0, 1)[None]


@pytest.mark.parametrize("case", list(ROWS))
@pytest.mark.parametrize("kv", [1, 4])
def test_same_as_copied_prefixes(gradients_on_cpu, case, kv):
    at, total = layout_of(*ROWS[case])
    draw = torch.Generator().manual_seed(1)
    new = lambda h: torch.randn(1, h, total, 16, generator=draw, dtype=torch.float64)  # noqa: E731
    inputs, g, results = [new(4), new(kv), new(kv)], new(4), []
    for path in (flex.attend, copied):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = path(*leaves, at, 0.3)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, g)])
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() < 1e-12
    assert results[0][0].abs().max() > 0.1 and results[0][2].abs().max() > 0.01


@pytest.mark.parametrize("case", list(ROWS))
def test_blocks_are_those_of_all_pairs(case):
    """Found from the runs, they are what PyTorch finds by asking the mask for every pair."""
    at, total = layout_of(*ROWS[case])
    ours = flex.block_mask(at, torch.device("cpu"))
    theirs = stock.create_block_mask(ours.mask_mod, None, None, total, total, device="cpu", BLOCK_SIZE=flex.BLOCK)
    n = -(-total // flex.BLOCK)
    pairs = torch.zeros(n * flex.BLOCK, n * flex.BLOCK, dtype=torch.bool)
    index = torch.arange(total)
    pairs[:total, :total] = ours.mask_mod(None, None, index[:, None], index[None])
    counts = pairs.view(n, flex.BLOCK, n, flex.BLOCK).sum((1, 3))
    some, whole = flex.blocks(at)
    assert torch.equal(torch.from_numpy(some), counts > 0)
    assert torch.equal(torch.from_numpy(whole), counts == flex.BLOCK**2)
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert ours.sparsity() == pytest.approx(theirs.sparsity())


@pytest.mark.parametrize("stem", [0, 5])
def test_pairs_are_those_of_sequences_of_their_own(stem):
    """The mask itself, against a count: a token sees the stem, its prefix, its own earlier tokens and itself."""
    prefixes, members = ROWS["ragged"]
    at, total = layout_of(prefixes, members, stem)
    mask, index = flex.block_mask(at, torch.device("cpu")).mask_mod, torch.arange(total)
    seen = mask(None, None, index[:, None], index[None]).sum(1).tolist()
    expected = list(range(1, stem + 1))
    for p, lengths in zip(prefixes, members, strict=True):
        expected += range(stem + 1, stem + p + 1)
        for n in lengths:
            expected += range(stem + p + 1, stem + p + n + 1)
    assert seen == expected


def test_loss_and_gradients_of_a_model(gradients_on_cpu, monkeypatch):
    """A whole model through it equals the plain twin; rows of several blocks."""
    policy, plain = tiny_policy()
    monkeypatch.setattr(flex, "fits", lambda *_: True)
    called = []
    monkeypatch.setattr(flex, "_eager", lambda: lambda *a, **k: (called.append(1), stock.flex_attention(*a, **k))[1])
    config = settings("uft", "likelihood.weight=0.3", "reference.kl=0")
    items = make_items((4, 16, 2), (60, 0, 3))
    loss, got = packed_loss(policy, items, config)
    assert len(called) == policy.base.config.num_hidden_layers
    expected = uft_loss(plain, None, items, config)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    close(got, gradients(plain), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_trial_before_the_first_use(gradients_on_cpu, dtype):
    assert flex.difference(4, 2, 16, dtype, torch.device("cpu")) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_the_trial_finds_a_wrong_mask(gradients_on_cpu, monkeypatch):
    right = flex.owners

    def wrong(at):
        group_T, member_T = right(at)
        return group_T, member_T.clip(max=1)  # the third member of a group is taken for the second

    monkeypatch.setattr(flex, "owners", wrong)
    assert flex.difference(4, 2, 16, torch.float32, torch.device("cpu")) > 0.05


def test_where_it_does_not_work_stock_attention_is_used(monkeypatch):
    """One line says so, once."""
    monkeypatch.setattr(flex, "attend", lambda *_: 1 / 0)
    flex._agrees.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"flex_attention is not used on cpu \(division by zero\)"):
        assert not flex._agrees(4, 2, 16, torch.float32, torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not flex._agrees(4, 2, 16, torch.float32, torch.device("cpu"))
    flex._agrees.cache_clear()


def test_the_cpu_has_its_own_path():
    q, k = torch.zeros(1, 4, 8, 16), torch.zeros(1, 2, 8, 16)
    assert not flex.fits(q, k, k)


@pytest.mark.slow
def test_compiled_once_for_all_lengths():
    """The compiled function, which on the CPU has no gradients: equal to stock attention, and after the second length no
    row makes it compile again."""
    counters = torch._dynamo.utils.counters["stats"]
    run, graphs = flex._compiled(), []
    for case in ("blocks", "many", "block edges", "many"):
        at, total = layout_of(*ROWS[case])
        q, k, v = (torch.randn(1, h, total, 16) for h in (4, 2, 2))
        with torch.no_grad():
            out = run(q, k, v, block_mask=flex.block_mask(at, q.device), scale=0.3, enable_gqa=True)
        assert (out - copied(q, k, v, at, 0.3)).abs().max() < 1e-5
        graphs.append(counters["unique_graphs"])
    assert graphs[1:] == [graphs[1]] * 3
