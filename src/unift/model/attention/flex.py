"""Attention of a packed row on a GPU: one call of PyTorch's flex_attention over the flat row, without any copy of a prefix.

What a token sees is told twice: by ``mask_mod`` for single pairs, and by blocks of 128 x 128 pairs that hold nothing (left
out), everything (not asked) or a part. The blocks follow from where the runs of tokens lie, so they are counted here on
the host, and the mask of all pairs, which would be as large as a score matrix, is never made.

flex_attention is compiled for the shapes at hand. Before a kind of heads is first used, the compiled function is held
against stock attention, values and gradients; where it fails or differs, stock attention is used and a line says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from unift.model.attention.packed import PackedLayout
BLOCK = 128  # flex_attention's own
LEAST_WIDTH = 16  # of a head, below which its kernels do not exist


def blocks(at: PackedLayout) -> tuple[np.ndarray, np.ndarray]:
    """Two bool arrays [query block, key block]: some pair of the block attends, and all of its pairs do."""
    n = -(-len(at.slot_T) // BLOCK)
    some, whole = np.zeros((n, n), dtype=bool), np.zeros((n, n), dtype=bool)
    lower, strictly = np.tri(n, dtype=bool), np.tri(n, k=-1, dtype=bool)

    def see(queries: range, keys: range) -> None:
        """These see those, as far as they come later or are the same."""
        if len(keys) and len(queries):
            outer = [slice(x.start // BLOCK, -(-x.stop // BLOCK)) for x in (queries, keys)]
            inner = [slice(-(-x.start // BLOCK), max(x.stop // BLOCK, -(-x.start // BLOCK))) for x in (queries, keys)]
            some[outer[0], outer[1]] |= lower[outer[0], outer[1]]
            whole[inner[0], inner[1]] |= strictly[inner[0], inner[1]]

    see(range(len(at.slot_T)), range(at.stem))
    for i, (prefix, members) in enumerate(at.spans):
        # What lies side by side and is seen by the same queries is one run: a block across its border may be seen whole.
        start = 0 if i == 0 else prefix.start
        see(range(prefix.start, members[-1].stop if members else prefix.stop), range(start, prefix.stop))
        for j, own in enumerate(members):
            see(own, range(start if j == 0 else own.start, own.stop))
    return some, whole


def owners(at: PackedLayout) -> tuple[np.ndarray, np.ndarray]:
    """int32 [T] each: a token's group, -1 for the stem, and which of its members it belongs to, -1 for the prefix."""
    group_T, member_T = np.full((2, len(at.slot_T)), -1, dtype=np.int32)
    for i, (prefix, members) in enumerate(at.spans):
        group_T[prefix.start : prefix.stop] = i
        for j, own in enumerate(members):
            group_T[own.start : own.stop], member_T[own.start : own.stop] = i, j
    return group_T, member_T


def block_mask(at: PackedLayout, device: torch.device) -> Any:
    """The BlockMask of a packed row. Runs lie one after the other: the stem, then of each group its prefix and its members."""
    from torch.nn.attention.flex_attention import BlockMask

    group_T, member_T = (torch.from_numpy(x).to(device) for x in owners(at))

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        group, member = group_T[k], member_T[k]
        return (q >= k) & ((group < 0) | (group == group_T[q])) & ((member < 0) | (member == member_T[q]))

    def listed(found: np.ndarray) -> tuple[Tensor, Tensor]:
        counts = torch.from_numpy(found.sum(1).astype(np.int32))[None, None]
        order = torch.from_numpy(np.argsort(~found, axis=1, kind="stable").astype(np.int32))[None, None]
        return counts.to(device), order.to(device)

    some, whole = blocks(at)
    length = len(at.slot_T)
    return BlockMask.from_kv_blocks(
        *listed(some & ~whole), *listed(whole), BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(length, length)
    )


def attend(q_1HTD: Tensor, k_1KTD: Tensor, v_1KTD: Tensor, at: PackedLayout, scale: float) -> Tensor:
    """[1, H, T, D], differentiable. All three in the precision of the values: rotary embeddings promote q and k."""
    q_1HTD, k_1KTD = q_1HTD.to(v_1KTD.dtype), k_1KTD.to(v_1KTD.dtype)
    if at.blocks is None:
        at.blocks = block_mask(at, q_1HTD.device)
    gqa = q_1HTD.shape[1] != k_1KTD.shape[1]
    run = _compiled() if q_1HTD.device.type == "cuda" else _eager()
    return run(q_1HTD, k_1KTD, v_1KTD, block_mask=at.blocks, scale=scale, enable_gqa=gqa)


def _eager() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


@cache
def _compiled() -> Callable:
    return torch.compile(_eager())


def fits(q_1HTD: Tensor, k_1KTD: Tensor, v_1KTD: Tensor) -> bool:
    """Whether attention of these heads goes through flex_attention. The first time for a kind of heads, it is tried."""
    width = q_1HTD.shape[-1]
    if q_1HTD.device.type != "cuda" or v_1KTD.shape[-1] != width or width < LEAST_WIDTH:
        return False
    if v_1KTD.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return _agrees(q_1HTD.shape[1], k_1KTD.shape[1], width, v_1KTD.dtype, q_1HTD.device)


@cache
def _agrees(heads: int, kv: int, width: int, dtype: torch.dtype, device: torch.device) -> bool:
    try:
        gap = difference(heads, kv, width, dtype, device)
        reason = f"its results differ by {gap:.3g}" if gap > (5e-3 if dtype == torch.float32 else 5e-2) else ""
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler, a driver or a kernel that is missing: stock attention does it
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
    if reason:
        text = f"flex_attention is not used on {device} ({reason}): attention copies every prefix for its completions"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    return not reason


def difference(heads: int, kv: int, width: int, dtype: torch.dtype, device: torch.device) -> float:
    """Largest difference between flex and stock attention, in values and gradients, relative to the largest number.

    Of two ragged rows of different lengths, since the second makes the compiler generalise over the length; the first has a stem.
    """
    from unift.model.attention.packed import make_layout, stock_attention

    worst, draw = 0.0, torch.Generator().manual_seed(0)
    for stem, lengths in ((140, (150, 70, 70)), (0, (90, 40, 300, 1))):
        ends = np.cumsum([stem, *lengths, 30, 200]).tolist()
        runs = [range(e - n, e) for e, n in zip(ends[1:], [*lengths, 30, 200], strict=True)]
        at = make_layout([runs[0], runs[-2]], [runs[1:-2], runs[-1:]], ends[-1], stem).to(device)
        shapes = [(1, n, ends[-1], width) for n in (heads, kv, kv, heads)]
        q, k, v, g = (torch.randn(shape, generator=draw).to(device, dtype) for shape in shapes)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            flex = attend(q, k, v, at, width**-0.5)
            rows = q[0].transpose(0, 1), k[0].transpose(0, 1), v[0].transpose(0, 1)
            stock = stock_attention(*rows, at, width**-0.5).transpose(0, 1)[None]
            pairs = [(flex, stock)]
            pairs += zip(torch.autograd.grad(flex, leaves, g), torch.autograd.grad(stock, leaves, g), strict=True)
        for a, b in pairs:
            worst = max(worst, (a - b).detach().abs().max().item() / b.detach().abs().max().item())
    return worst
