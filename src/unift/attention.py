"""Attention over shared prefixes, registered with transformers so that any softmax causal LM uses it unchanged.

A batch is one flat row of tokens (no padding in any linear layer). Here, and only here, tokens are gathered into padded
blocks: prefixes ``BP`` and, for each prefix, its members ``BGR`` (completions). A member token attends to its group's
whole prefix and to the member's own earlier tokens, which is what it would see in a sequence of its own.

Shapes: T flat tokens, B groups, P prefix length, G members a group, R member length, H query heads, K key/value heads,
D head width, N = B*G rows of a decode step, S cached member positions.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

NAME = "unift"


# What models hand to an attention function and what changes nothing here.
NEUTRAL = {"dropout", "scaling", "position_ids", "use_cache", "output_attentions", "output_hidden_states", "cache_position"}


class Layout(Protocol):
    @property
    def longest(self) -> float: ...  # tokens of the longest sequence, which an attention window must not cut

    def attend(self, layer: int, q_1HTD: Tensor, k_1KTD: Tensor, v_1KTD: Tensor, scale: float) -> Tensor: ...


_layout: ContextVar[Layout | None] = ContextVar("unift_layout", default=None)


@contextmanager
def layout(value: Layout):
    """Attention inside the block follows this layout."""
    token = _layout.set(value)
    try:
        yield value
    finally:
        _layout.reset(token)


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
    return active.attend(module.layer_idx, query, key, value, scale), None


def register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _forward)


def _block(x_1HTD: Tensor, index: Tensor) -> Tensor:
    """[1, H, T, D] gathered at an index of any shape [B, P] -> [B, P, H, D] moved to [B, H, P, D]."""
    _, h, _, d = x_1HTD.shape
    picked = x_1HTD[0].index_select(1, index.reshape(-1))  # [H, B*P, D]
    return picked.view(h, *index.shape, d).movedim(0, 1)


def _expand_heads(x: Tensor, heads: int) -> Tensor:
    """Key/value heads repeated to the query heads (grouped-query attention), [B, K, P, D] -> [B, H, P, D]."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


@dataclass
class PackedLayout:
    """Training and prefill. Index tensors are int64 into the flat row; padded slots point at token 0 and are masked."""

    prefix_BP: Tensor
    member_BGR: Tensor | None  # None: prefixes only (prefill)
    slot_T: Tensor  # where each flat token's output lies in [all prefix slots, all member slots]
    prefix_len_B: Tensor
    longest: float = 0  # of the run; 0: of this layout
    keep: bool = False  # keep keys and values of the prefixes for decoding
    cache: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _mask: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.longest:
            (b, p), self.longest = self.prefix_BP.shape, int(self.prefix_len_B.max())
            past = self.slot_T[self.slot_T >= b * p] - b * p
            if self.member_BGR is not None and len(past):
                _, g, r = self.member_BGR.shape
                self.longest = int((self.prefix_len_B[past // (g * r)] + past % r).max()) + 1

    def to(self, device: Any) -> PackedLayout:
        move = lambda x: None if x is None else x.to(device)  # noqa: E731
        return PackedLayout(
            self.prefix_BP.to(device), move(self.member_BGR), self.slot_T.to(device), self.prefix_len_B.to(device), self.longest
        )

    def _member_mask(self) -> Tensor:
        """[B*G, 1, R, P+R]: the group's prefix without padding, then the member's own past and present."""
        if self._mask is None:
            assert self.member_BGR is not None
            b, g, r = self.member_BGR.shape
            p, device = self.prefix_BP.shape[1], self.prefix_BP.device
            prefix_BP = torch.arange(p, device=device) < self.prefix_len_B[:, None]
            causal_RR = torch.ones(r, r, dtype=torch.bool, device=device).tril()
            self._mask = torch.cat(
                [prefix_BP[:, None, None].expand(b, g, r, p), causal_RR.expand(b, g, r, r)], dim=-1
            ).reshape(b * g, 1, r, p + r)
        return self._mask

    def attend(self, layer: int, q_1HTD: Tensor, k_1KTD: Tensor, v_1KTD: Tensor, scale: float) -> Tensor:
        heads, width = q_1HTD.shape[1], v_1KTD.shape[-1]
        k_BKPD, v_BKPD = _block(k_1KTD, self.prefix_BP), _block(v_1KTD, self.prefix_BP)
        if self.keep:
            self.cache[layer] = (k_BKPD.contiguous(), v_BKPD.contiguous())
        k_BHPD, v_BHPD = _expand_heads(k_BKPD, heads), _expand_heads(v_BKPD, heads)
        # Right padding: a causal mask already hides it from every real query.
        o_BHPD = sdpa(_block(q_1HTD, self.prefix_BP), k_BHPD, v_BHPD, is_causal=True, scale=scale)
        out = o_BHPD.transpose(1, 2).reshape(-1, heads, width)
        if self.member_BGR is not None:
            b, g, r = self.member_BGR.shape
            rows = self.member_BGR.view(b * g, r)
            q, k, v = _block(q_1HTD, rows), _block(k_1KTD, rows), _block(v_1KTD, rows)
            shared = [x[:, None].expand(-1, g, -1, -1, -1).flatten(0, 1) for x in (k_BHPD, v_BHPD)]
            k = torch.cat([shared[0], _expand_heads(k, heads)], dim=2)
            v = torch.cat([shared[1], _expand_heads(v, heads)], dim=2)
            o = sdpa(q, k, v, attn_mask=self._member_mask(), scale=scale)
            out = torch.cat([out, o.transpose(1, 2).reshape(-1, heads, width)])
        return out.index_select(0, self.slot_T)[None]  # [1, T, H, D]


@dataclass
class DecodeLayout:
    """One new token for each of the B*G rows. The prefix cache is read per group, never copied G times."""

    prefix: dict[int, tuple[Tensor, Tensor]]  # layer -> keys, values [B, K, P, D]
    mask_B11P: Tensor  # additive: 0, or -inf at prefix padding
    members: dict[int, tuple[Tensor, Tensor]]  # layer -> keys, values [B, K, G, S, D], filled up to ``filled``
    shape: tuple[int, int]  # B, G
    filled: int = 0

    @property
    def longest(self) -> float:
        return self.mask_B11P.shape[-1] + self.filled + 1

    def attend(self, layer: int, q_1HTD: Tensor, k_1KTD: Tensor, v_1KTD: Tensor, scale: float) -> Tensor:
        (b, g), (_, h, _, d) = self.shape, q_1HTD.shape
        kv = k_1KTD.shape[1]
        keys, values = self.members[layer]
        t = self.filled + 1
        keys[:, :, :, t - 1] = k_1KTD.view(kv, b, g, -1).transpose(0, 1)
        values[:, :, :, t - 1] = v_1KTD.view(kv, b, g, -1).transpose(0, 1)
        k_BKPD, v_BKPD = self.prefix[layer]
        p, rep = k_BKPD.shape[2], h // kv
        q = q_1HTD.view(kv, rep, b, g, d).permute(2, 0, 3, 1, 4).reshape(b, kv, g * rep, d) * scale
        to_prefix = (q @ k_BKPD.transpose(2, 3) + self.mask_B11P).view(b, kv, g, rep, p)
        to_self = q.view(b, kv, g, rep, d) @ keys[:, :, :, :t].transpose(3, 4)
        weights = torch.cat([to_prefix, to_self], dim=-1).softmax(-1)
        out = (weights[..., :p].reshape(b, kv, g * rep, p) @ v_BKPD).view(b, kv, g, rep, -1)
        out = out + weights[..., p:] @ values[:, :, :, :t]
        return out.permute(0, 2, 1, 3, 4).reshape(1, b * g, h, -1)

    def select(self, groups: Tensor, slots_BG: Tensor) -> DecodeLayout:
        """Keep these groups, and in each these slots (finished rows dropped)."""
        b, g = slots_BG.shape
        pick = slots_BG[:, None, :, None, None]

        def members(x: Tensor) -> Tensor:
            x = x[groups]
            return x.gather(2, pick.expand(b, x.shape[1], g, x.shape[3], x.shape[4]))

        return DecodeLayout(
            {n: (k[groups], v[groups]) for n, (k, v) in self.prefix.items()},
            self.mask_B11P[groups],
            {n: (members(k), members(v)) for n, (k, v) in self.members.items()},
            (b, g),
            self.filled,
        )

    def grow(self, capacity: int) -> None:
        """Room for more member positions."""
        for n, pair in self.members.items():
            new = [x.new_zeros(*x.shape[:3], capacity, x.shape[4]) for x in pair]
            for x, y in zip(pair, new, strict=True):
                y[:, :, :, : self.filled] = x[:, :, :, : self.filled]
            self.members[n] = (new[0], new[1])
