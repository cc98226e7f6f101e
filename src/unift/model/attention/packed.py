"""A packed row of training or prefill: where each token lies, and its attention by stock operations or, on the CPU, by
PyTorch's own flash kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from unift.model import matmul


def expand_heads(x: Tensor, heads: int) -> Tensor:
    """Key/value heads repeated to the query heads (grouped-query attention), [B, K, P, D] -> [B, H, P, D]."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def sum_heads(x: Tensor, heads: int) -> Tensor:
    """The transpose of expand_heads: gradients of repeated heads added up, [B, H, P, D] -> [B, K, P, D]."""
    return x if x.shape[1] == heads else x.unflatten(1, (heads, -1)).sum(2)


@dataclass
class PackedLayout:
    """Training and prefill. Index tensors are int64 into the flat row; padded slots point at token 0 and are masked."""

    prefix_BP: Tensor
    member_BGR: Tensor | None  # None: prefixes only (prefill)
    slot_T: Tensor  # where each flat token's output lies in [all prefix slots, all member slots]
    prefix_len_B: Tensor
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
            past = self.slot_T[self.slot_T >= b * p] - b * p
            if self.member_BGR is not None and len(past):
                _, g, r = self.member_BGR.shape
                self.longest = int((self.prefix_len_B[past // (g * r)] + past % r).max()) + 1

    def to(self, device: Any) -> PackedLayout:
        move = lambda x: None if x is None else x.to(device)  # noqa: E731
        tensors = self.prefix_BP.to(device), move(self.member_BGR), self.slot_T.to(device), self.prefix_len_B.to(device)
        return PackedLayout(*tensors, spans=self.spans, longest=self.longest)

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

    def rows_or_zero(self, x_THD: Tensor, index: Tensor, first: int) -> Tensor:
        """As ``rows``, with zeros in padded slots. ``first``: number of the slot index[0, 0] in ``slot_T``'s counting."""
        n = index.numel()
        if first not in self._filled:
            at = ((self.slot_T >= first) & (self.slot_T < first + n)).nonzero()[:, 0]
            self._filled[first] = at, self.slot_T[at] - first
        at, slots = self._filled[first]
        if len(at) == n:
            return self.rows(x_THD, index)
        block = x_THD.new_zeros(n, *x_THD.shape[1:]).index_copy_(0, slots, x_THD.index_select(0, at))
        return block.view(*index.shape, *x_THD.shape[1:]).transpose(1, 2)


def make_layout(prefixes: Sequence[range], members: Sequence[Sequence[range]], total: int) -> PackedLayout:
    """Index tensors of a flat row: which slots are whose, and where each token's attention output will lie."""
    b, p = len(prefixes), max(len(r) for r in prefixes)
    g = max((len(m) for m in members), default=0)
    r = max((len(x) for m in members for x in m), default=0)
    prefix_BP = torch.zeros(b, p, dtype=torch.long)
    member_BGR = torch.zeros(b, g, r, dtype=torch.long) if r else None
    slot_T = torch.empty(total, dtype=torch.long)
    for i, span in enumerate(prefixes):
        prefix_BP[i, : len(span)] = torch.arange(span.start, span.stop)
        slot_T[span.start : span.stop] = torch.arange(i * p, i * p + len(span))
        for j, own in enumerate(members[i]):
            if member_BGR is not None and len(own):
                member_BGR[i, j, : len(own)] = torch.arange(own.start, own.stop)
                first = b * p + (i * g + j) * r
                slot_T[own.start : own.stop] = torch.arange(first, first + len(own))
    lengths_B = torch.tensor([len(s) for s in prefixes])
    return PackedLayout(
        prefix_BP, member_BGR, slot_T, lengths_B, [(p, list(m)) for p, m in zip(prefixes, members, strict=True)]
    )


def stock_attention(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, at: PackedLayout, scale: float) -> Tensor:
    """Attention of a packed row by stock operations, with a copy of the prefix for every member. [T, H, D]."""
    heads, width = q_THD.shape[1], v_TKD.shape[-1]
    k_BHPD, v_BHPD = (expand_heads(at.rows(x, at.prefix_BP), heads) for x in (k_TKD, v_TKD))
    # Right padding: a causal mask already hides it from every real query.
    o_BHPD = sdpa(at.rows(q_THD, at.prefix_BP), k_BHPD, v_BHPD, is_causal=True, scale=scale)
    out = o_BHPD.transpose(1, 2).reshape(-1, heads, width)
    if at.member_BGR is not None:
        b, g, r = at.member_BGR.shape
        rows, p = at.member_BGR.view(b * g, r), at.prefix_BP.shape[1]
        q, k, v = at.rows(q_THD, rows), at.rows(k_TKD, rows), at.rows(v_TKD, rows)
        shared = [x[:, None].expand(-1, g, -1, -1, -1).flatten(0, 1) for x in (k_BHPD, v_BHPD)]
        k = torch.cat([shared[0], expand_heads(k, heads)], dim=2)
        v = torch.cat([shared[1], expand_heads(v, heads)], dim=2)
        prefix_BP = torch.arange(p, device=q.device) < at.prefix_len_B[:, None]
        causal_RR = torch.ones(r, r, dtype=torch.bool, device=q.device).tril()
        mask = torch.cat([prefix_BP[:, None, None].expand(b, g, r, p), causal_RR.expand(b, g, r, r)], dim=-1)
        o = sdpa(q, k, v, attn_mask=mask.reshape(b * g, 1, r, p + r), scale=scale)
        out = torch.cat([out, o.transpose(1, 2).reshape(-1, heads, width)])
    return out.index_select(0, at.slot_T)


class FlashAttention(torch.autograd.Function):
    """Attention of a packed row on the CPU without copies of the prefix: members attend to their group's prefix in one
    product (all members and, with grouped-query heads, all query heads of a key head folded into rows), to themselves
    in another, and the two are merged by their log-sum-exp:

        out = w1 * out1 + w2 * out2,   w = exp(lse - lse_total),   lse_total = log(exp(lse1) + exp(lse2))

    The backward kernel takes any (out, lse): with the merged ones, its result for either part is that part's share of
    the whole gradient (dS = P * (dO V' - rowsum(dO * out)), P = exp(S - lse_total)). Only q, k, v, out, lse are kept.
    """

    @staticmethod
    def forward(ctx, q_THD, k_TKD, v_TKD, at, scale):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        heads, q_THD = q_THD.shape[1], q_THD.to(v_TKD.dtype)
        k_TKD = k_TKD.to(v_TKD.dtype)  # under autocast, rotary embeddings promote q and k
        q, k, v = FlashAttention._prefix(q_THD, k_TKD, v_TKD, at)
        o_BHPD, lse_BHP = flash(q, expand_heads(k, heads), expand_heads(v, heads), 0.0, True, scale=scale)
        out, saved = o_BHPD.transpose(1, 2).reshape(-1, heads, v.shape[-1]), [lse_BHP]
        if at.member_BGR is not None:
            own = FlashAttention._members(q_THD, k_TKD, v_TKD, at)
            folded = FlashAttention._fold(own[0], at, k.shape[1])
            o1, lse1 = flash(folded, k, v, 0.0, False, attn_mask=at.padding(q), scale=scale)
            o2, lse2 = flash(*own, 0.0, True, scale=scale)
            o1, lse1 = FlashAttention._unfold(o1, at), FlashAttention._unfold(lse1[..., None], at)[..., 0]
            lse = torch.logaddexp(lse1, lse2)
            w1, w2 = ((x - lse).exp()[..., None].to(o1.dtype) for x in (lse1, lse2))
            o = torch.addcmul(o1 * w1, o2, w2)
            out = torch.cat([out, o.transpose(1, 2).reshape(-1, heads, v.shape[-1])])
            saved.append(lse)
        out = out.index_select(0, at.slot_T)
        ctx.save_for_backward(q_THD, k_TKD, v_TKD, out, *saved)
        ctx.at, ctx.scale = at, scale
        return out

    @staticmethod
    @matmul.small()
    def backward(ctx, g_THD):
        back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        q_THD, k_TKD, v_TKD, out_THD, *saved = ctx.saved_tensors
        at, scale, heads, kv = ctx.at, ctx.scale, q_THD.shape[1], k_TKD.shape[1]
        q, k, v = FlashAttention._prefix(q_THD, k_TKD, v_TKD, at)
        g, o = at.rows_or_zero(g_THD, at.prefix_BP, 0), at.rows(out_THD, at.prefix_BP)
        wide = expand_heads(k, heads), expand_heads(v, heads)
        dq, dk, dv = back(g, q, *wide, o, saved[0], 0.0, True, scale=scale)
        parts = [[dq], [sum_heads(dk, kv)], [sum_heads(dv, kv)]]
        if at.member_BGR is not None:
            own = FlashAttention._members(q_THD, k_TKD, v_TKD, at)
            b, groups, r = at.member_BGR.shape
            index = at.member_BGR.view(b * groups, r)
            g, o = at.rows_or_zero(g_THD, index, at.prefix_BP.numel()), at.rows(out_THD, index)
            lse, fold = saved[1], lambda x: FlashAttention._fold(x, at, kv)
            dq1, dk1, dv1 = back(
                fold(g),
                fold(own[0]),
                k,
                v,
                fold(o),
                FlashAttention._lse(fold(lse[..., None])[..., 0]),
                0.0,
                False,
                attn_mask=at.padding(q),
                scale=scale,
            )
            dq2, dk2, dv2 = back(g, *own, o, FlashAttention._lse(lse), 0.0, True, scale=scale)
            parts[0].append(dq2.add_(FlashAttention._unfold(dq1, at)))
            parts[1][0], parts[2][0] = parts[1][0] + dk1, parts[2][0] + dv1
            parts[1].append(sum_heads(dk2, kv))
            parts[2].append(sum_heads(dv2, kv))
        flat = []
        for part in parts:
            rows = [x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3]) for x in part]
            flat.append((torch.cat(rows) if len(rows) > 1 else rows[0]).index_select(0, at.slot_T))
        return *flat, None, None

    @staticmethod
    def _prefix(q, k, v, at):
        return tuple(at.rows(x, at.prefix_BP) for x in (q, k, v))

    @staticmethod
    def _members(q, k, v, at):
        index, heads = at.member_BGR.flatten(0, 1), q.shape[1]
        return at.rows(q, index), expand_heads(at.rows(k, index), heads), expand_heads(at.rows(v, index), heads)

    @staticmethod
    def _fold(x, at, kv):
        """[B*G, H, R, D] -> [B, K, H/K*G*R, D]: every query that reads the same keys."""
        b, g, r = at.member_BGR.shape
        x = x.reshape(b, g, kv, -1, r, x.shape[-1]).permute(0, 2, 3, 1, 4, 5)
        return x.reshape(b, kv, -1, x.shape[-1])

    @staticmethod
    def _unfold(x, at):
        """The inverse of _fold."""
        b, g, r = at.member_BGR.shape
        x = x.reshape(b, x.shape[1], -1, g, r, x.shape[-1]).permute(0, 3, 1, 2, 4, 5)
        return x.reshape(b * g, -1, r, x.shape[-1])

    @staticmethod
    def _lse(x):
        """[B, H, P] in the memory order in which the forward kernel returns it (heads innermost)."""
        return x.transpose(1, 2).contiguous().transpose(1, 2)
