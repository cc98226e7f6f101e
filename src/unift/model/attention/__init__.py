"""Attention over shared prefixes, registered with transformers so that any softmax causal LM uses it unchanged.

A batch is one flat row of tokens (no padding in any linear layer). Here, and only here, tokens are gathered into padded
blocks: prefixes ``BP`` and, for each prefix, its members ``BGR`` (completions). A member token attends to its group's
whole prefix and to the member's own earlier tokens, which is what it would see in a sequence of its own. What all prefixes
begin with may lie before them once, as the stem.

Shapes: T flat tokens, B groups, P prefix length, G members a group, R member length, H query heads, K key/value heads,
D head width, N = B*G rows of a decode step, S cached member positions.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias

from torch import Tensor

from unift.model import matmul
from unift.model.attention import flex
from unift.model.attention.decode import DecodeLayout
from unift.model.attention.flash import FlashAttention
from unift.model.attention.packed import PackedLayout, stock_attention

NAME = "unift"


# What models hand to an attention function and what changes nothing here.
NEUTRAL = {
    "dropout",
    "scaling",
    "position_ids",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "cache_position",
}


Layout: TypeAlias = "PackedLayout | DecodeLayout"
_layout: ContextVar[Layout | None] = ContextVar("unift_layout", default=None)


@contextmanager
def layout(value: Layout):
    """Attention inside the block follows this layout."""
    token = _layout.set(value)
    try:
        yield value
    finally:
        _layout.reset(token)


def current() -> Layout | None:
    """The layout of the block that is running; None outside of any."""
    return _layout.get()


def _forward(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any):
    active = _layout.get()
    if active is None:
        raise RuntimeError("unift attention was called outside of attention.layout(...)")
    if attention_mask is not None:
        raise NotImplementedError("its attention takes a mask of the model's own making")
    for name, given in kwargs.items():
        if given is None or name in NEUTRAL or (name == "is_causal" and given):
            continue
        if name == "sliding_window" and given >= active.longest:
            continue
        raise NotImplementedError(f"its attention uses {name}")
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    with matmul.small(query.device.type == "cpu"):
        if isinstance(active, DecodeLayout):
            return active.attend(module.layer_idx, query, key, value, scale), None
        return attend(active, module.layer_idx, query, key, value, scale), None


def attend(at: PackedLayout, layer: int, q_1HTD: Tensor, k_1KTD: Tensor, v_1KTD: Tensor, scale: float) -> Tensor:
    """Attention of a packed row, [1, T, H, D], by the quickest way that its device and heads allow."""
    q, k, v = (x[0].transpose(0, 1) for x in (q_1HTD, k_1KTD, v_1KTD))
    if at.keep:
        k_BKPD, v_BKPD = (at.cached(x.to(v.dtype)) for x in (k, v))
        at.cache[layer] = k_BKPD.transpose(2, 3).contiguous(), v_BKPD.contiguous()
    if at.member_BGR is not None and flex.fits(q_1HTD, k_1KTD, v_1KTD):
        return flex.attend(q_1HTD, k_1KTD, v_1KTD, at, scale).transpose(1, 2)
    path = FlashAttention.apply if q.device.type == "cpu" and q.shape[-1] == v.shape[-1] else stock_attention
    return path(q, k, v, at, scale)[None]  # type: ignore[index]


def register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _forward)
