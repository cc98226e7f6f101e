"""A packed row of training or prefill: where each token lies, and its attention by stock operations.

A row is [stem, groups]: the tokens that all prompts of the row begin with (a system prompt, solved examples) lie once at its
start, and a group's prefix is what comes after them. Without a stem a row is its groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa


def expand_heads(x: Tensor, heads: int) -> Tensor:
    """Key/value heads repeated to the query heads (grouped-query attention), [B, K, P, D] -> [B, H, P, D]."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def sum_heads(x: Tensor, heads: int) -> Tensor:
    """The transpose of expand_heads: gradients of repeated heads added up, [B, H, P, D] -> [B, K, P, D]."""
    return x if x.shape[1] == heads else x.unflatten(1, (heads, -1)).sum(2)


@dataclass
class PackedLayout:
    """Training and prefill. Index tensors are int64 into the flat row; padded slots point at token 0 and are masked."""

    prefix_BP: Tensor  # P: what a prefix has beyond the stem
    member_BGR: Tensor | None  # None: prefixes only (prefill)
    slot_T: Tensor  # where each flat token's output lies in [all prefix slots, all member slots, the stem]
    prefix_len_B: Tensor
    stem: int = 0  # leading tokens of the row, which every group begins with
    spans: list[tuple[range, list[range]]] = field(
        default_factory=list
    )  # of each group in the flat row: prefix, members
    longest: float = 0  # of the run; 0: of this layout
    keep: bool = False  # keep keys [B, K, D, P] and values [B, K, P, D] of the prefixes for decoding
    cache: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _masks: dict[torch.dtype, Tensor | None] = field(default_factory=dict)  # what every layer shares, made once
    _filled: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    blocks: Any = None  # flex_attention's mask; the same for every layer, made by the first

    def __post_init__(self) -> None:
        if not self.longest:
            (b, p), self.longest = self.prefix_BP.shape, int(self.prefix_len_B.max())
            past = self.slot_T[self.stem :]
            past = past[past >= b * p] - b * p
            if self.member_BGR is not None and len(past):
                _, g, r = self.member_BGR.shape
                self.longest = max(self.longest, int((self.prefix_len_B[past // (g * r)] + past % r).max()) + 1)
            self.longest += self.stem

    def to(self, device: Any) -> PackedLayout:
        move = lambda x: None if x is None else x.to(device)  # noqa: E731
        tensors = self.prefix_BP.to(device), move(self.member_BGR), self.slot_T.to(device), self.prefix_len_B.to(device)
        return PackedLayout(*tensors, stem=self.stem, spans=self.spans, longest=self.longest)

    def cached(self, x_TKD: Tensor) -> Tensor:
        """Keys or values [B, K, stem + P, D] of whole prefixes, as decoding reads them."""
        rows_BKPD = self.rows(x_TKD, self.prefix_BP)
        if not self.stem:
            return rows_BKPD
        stem_KSD = x_TKD[: self.stem].transpose(0, 1)
        return torch.cat([stem_KSD.expand(len(rows_BKPD), -1, -1, -1), rows_BKPD], dim=2)

    def cached_padding(self, like: Tensor) -> Tensor | None:
        """As ``padding``, of what ``cached`` gives."""
        mask = self.padding(like)
        return mask if mask is None or not self.stem else torch.nn.functional.pad(mask, (self.stem, 0))

    def rows(self, x_THD: Tensor, index: Tensor) -> Tensor:
        """[T, H, D] gathered at [N, P] -> [N, H, P, D], a view of rows that were copied whole."""
        return x_THD.index_select(0, index.reshape(-1)).view(*index.shape, *x_THD.shape[1:]).transpose(1, 2)

    def padding(self, like: Tensor) -> Tensor | None:
        """Additive [B, 1, 1, P]: -inf at prefix padding; None where no prefix has any."""
        if like.dtype not in self._masks:
            p, device = self.prefix_BP.shape[1], self.prefix_BP.device
            hidden_BP = torch.arange(p, device=device) >= self.prefix_len_B[:, None]
            mask_BP = torch.zeros(hidden_BP.shape, dtype=like.dtype, device=device).masked_fill_(hidden_BP, -torch.inf)
            self._masks[like.dtype] = mask_BP[:, None, None] if bool(hidden_BP.any()) else None
        return self._masks[like.dtype]

    def rows_or(self, x_THD: Tensor, index: Tensor, first: int, fill: float = 0.0) -> Tensor:
        """As ``rows``, with ``fill`` in padded slots. ``first``: number of the slot index[0, 0] in ``slot_T``'s counting."""
        n = index.numel()
        if first not in self._filled:
            at = ((self.slot_T >= first) & (self.slot_T < first + n)).nonzero()[:, 0]
            self._filled[first] = at, self.slot_T[at] - first
        at, slots = self._filled[first]
        if len(at) == n:
            return self.rows(x_THD, index)
        block = x_THD.new_full((n, *x_THD.shape[1:]), fill).index_copy_(0, slots, x_THD.index_select(0, at))
        return block.view(*index.shape, *x_THD.shape[1:]).transpose(1, 2)


def make_layout(
    prefixes: Sequence[range], members: Sequence[Sequence[range]], total: int, stem: int = 0
) -> PackedLayout:
    """Index tensors of a flat row of ``total`` tokens: which slots are whose, and where each token's attention output will lie.

    stem: its leading tokens, which belong to every group; prefixes and members lie behind them.
    """
    b, p = len(prefixes), max(len(r) for r in prefixes)
    g = max((len(m) for m in members), default=0)
    r = max((len(x) for m in members for x in m), default=0)
    prefix_BP = torch.zeros(b, p, dtype=torch.long)
    member_BGR = torch.zeros(b, g, r, dtype=torch.long) if r else None
    slot_T = torch.empty(total, dtype=torch.long)
    slot_T[:stem] = torch.arange(stem) + b * p + b * g * r
    for i, span in enumerate(prefixes):
        prefix_BP[i, : len(span)] = torch.arange(span.start, span.stop)
        slot_T[span.start : span.stop] = torch.arange(i * p, i * p + len(span))
        for j, own in enumerate(members[i]):
            if member_BGR is not None and len(own):
                member_BGR[i, j, : len(own)] = torch.arange(own.start, own.stop)
                first = b * p + (i * g + j) * r
                slot_T[own.start : own.stop] = torch.arange(first, first + len(own))
    lengths_B = torch.tensor([len(s) for s in prefixes])
    spans = [(p, list(m)) for p, m in zip(prefixes, members, strict=True)]
    return PackedLayout(prefix_BP, member_BGR, slot_T, lengths_B, stem, spans)


def stock_attention(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, at: PackedLayout, scale: float) -> Tensor:
    """Attention of a packed row by stock operations, with a copy of the whole prefix for every member. [T, H, D]."""
    heads, width, s, p = q_THD.shape[1], v_TKD.shape[-1], at.stem, at.prefix_BP.shape[1]
    k_BHSD, v_BHSD = (expand_heads(at.cached(x), heads) for x in (k_TKD, v_TKD))
    # Right padding: a causal mask already hides it from every real query.
    causal = torch.ones(p, s + p, dtype=torch.bool, device=q_THD.device).tril(s) if s else None
    q_BHPD = at.rows(q_THD, at.prefix_BP)
    o_BHPD = sdpa(q_BHPD, k_BHSD, v_BHSD, attn_mask=causal, is_causal=not s, scale=scale)
    out = [o_BHPD.transpose(1, 2).reshape(-1, heads, width)]
    if at.member_BGR is not None:
        b, g, r = at.member_BGR.shape
        rows = at.member_BGR.view(b * g, r)
        q, k, v = at.rows(q_THD, rows), at.rows(k_TKD, rows), at.rows(v_TKD, rows)
        shared = [x[:, None].expand(-1, g, -1, -1, -1).flatten(0, 1) for x in (k_BHSD, v_BHSD)]
        k = torch.cat([shared[0], expand_heads(k, heads)], dim=2)
        v = torch.cat([shared[1], expand_heads(v, heads)], dim=2)
        prefix_BS = torch.arange(s + p, device=q.device) < at.prefix_len_B[:, None] + s
        causal_RR = torch.ones(r, r, dtype=torch.bool, device=q.device).tril()
        seen = prefix_BS[:, None, None].expand(b, g, r, s + p), causal_RR.expand(b, g, r, r)
        o = sdpa(q, k, v, attn_mask=torch.cat(seen, dim=-1).reshape(b * g, 1, r, s + p + r), scale=scale)
        out.append(o.transpose(1, 2).reshape(-1, heads, width))
    if s:
        q, k, v = (x[:s].transpose(0, 1)[None] for x in (q_THD, k_TKD, v_TKD))
        o = sdpa(q, expand_heads(k, heads), expand_heads(v, heads), is_causal=True, scale=scale)
        out.append(o[0].transpose(0, 1))
    return torch.cat(out).index_select(0, at.slot_T)
