"""Attention of a packed row on the CPU by PyTorch's flash kernels, without copies of the stem or of a prefix.

A token's keys lie in up to three stretches: the stem, its group's prefix, the member's own tokens. Each stretch has its own
pass, in which all queries that read the same keys are rows of one product (with grouped-query heads, all query heads of a
key head too), and the passes are merged by their log-sum-exp:

    out = sum_i w_i out_i,   w_i = exp(lse_i - lse),   lse = log sum_i exp(lse_i)

The backward kernel takes any (out, lse): with the merged ones, its result for a stretch is that stretch's share of the whole
gradient (dS = P * (dO V' - rowsum(dO * out)), P = exp(S - lse)). Only q, k, v, out, lse are kept.

Numbers of half precision are widened to float32 here: the kernels' small products of bfloat16 take up to ten times as long
(docs/performance.md).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from unift.model import matmul
from unift.model.attention.packed import PackedLayout, expand_heads, sum_heads

NOTHING = 1e30  # log-sum-exp of a padded query: exp(score - this) = 0, so it takes no part in any gradient


class _Heads(NamedTuple):
    """Queries, keys and values [N, heads, rows, D] of one pass."""

    q: Tensor
    k: Tensor
    v: Tensor


def _forward(x: _Heads, causal: bool, scale: float, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Output [N, H, R, D] and log-sum-exp [N, H, R]."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(*x, 0.0, causal, attn_mask=mask, scale=scale)


def _backward(
    x: _Heads, given: tuple[Tensor, Tensor, Tensor], causal: bool, scale: float, mask: Tensor | None = None
) -> _Heads:
    """Gradients of q, k, v. given: of the output, the output itself, log-sum-exp."""
    back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    g, out, lse = given
    # The kernel reads the log-sum-exp in the memory order in which it returns it, heads innermost.
    lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
    return _Heads(*back(g, *x, out, lse, 0.0, causal, attn_mask=mask, scale=scale))


def _flat(x_NHRD: Tensor) -> Tensor:
    return x_NHRD.transpose(1, 2).reshape(-1, x_NHRD.shape[1], x_NHRD.shape[3])


def _merged(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Of the same queries over two stretches of keys: outputs [..., D] and log-sum-exps [...]."""
    lse = torch.logaddexp(a[1], b[1])
    wa, wb = ((x - lse).exp()[..., None].to(a[0].dtype) for x in (a[1], b[1]))
    return torch.addcmul(a[0] * wa, b[0], wb), lse


class _Groups:
    """Passes over the groups of a row: prefixes over themselves, members over their prefix and over themselves."""

    def __init__(self, at: PackedLayout, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, scale: float) -> None:
        self.at, self.scale, self.heads, self.kv = at, scale, q_THD.shape[1], k_TKD.shape[1]
        q, k, v = (at.rows(x, at.prefix_BP) for x in (q_THD, k_TKD, v_TKD))
        self.prefix = _Heads(q, expand_heads(k, self.heads), expand_heads(v, self.heads))
        self.mask = at.padding(q)
        if at.member_BGR is None:
            return
        self.index = at.member_BGR.flatten(0, 1)
        q, *kv = (at.rows(x, self.index) for x in (q_THD, k_TKD, v_TKD))
        self.to_prefix = _Heads(self._fold(q), k, v)
        self.own = _Heads(q, *(expand_heads(x, self.heads) for x in kv))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Output [T', H, D] and log-sum-exp [T', H] of the tokens behind the stem, over their group's keys."""
        out, lse = _forward(self.prefix, True, self.scale)
        outs, lses = [_flat(out)], [_flat(lse[..., None])]
        if self.at.member_BGR is not None:
            o, l = _forward(self.to_prefix, False, self.scale, self.mask)
            o, l = self._unfold(o), self._unfold(l[..., None])[..., 0]
            out, lse = _merged((o, l), _forward(self.own, True, self.scale))
            outs.append(_flat(out))
            lses.append(_flat(lse[..., None]))
        slot = self.at.slot_T[self.at.stem :]
        return torch.cat(outs).index_select(0, slot), torch.cat(lses).index_select(0, slot)[..., 0]

    def backward(self, g_THD: Tensor, out_THD: Tensor, lse_TH: Tensor) -> list[Tensor]:
        """Gradients of q, k, v at the tokens behind the stem, from these stretches."""
        given = self._given(self.at.prefix_BP, 0, g_THD, out_THD, lse_TH)
        d = _backward(self.prefix, given, True, self.scale)
        parts = [[d.q], [sum_heads(d.k, self.kv)], [sum_heads(d.v, self.kv)]]
        if self.at.member_BGR is not None:
            g, out, lse = self._given(self.index, self.at.prefix_BP.numel(), g_THD, out_THD, lse_TH)
            folded = self._fold(g), self._fold(out), self._fold(lse[..., None])[..., 0]
            d1 = _backward(self.to_prefix, folded, False, self.scale, self.mask)
            d2 = _backward(self.own, (g, out, lse), True, self.scale)
            parts[0].append(d2.q.add_(self._unfold(d1.q)))
            parts[1][0], parts[2][0] = parts[1][0] + d1.k, parts[2][0] + d1.v
            parts[1].append(sum_heads(d2.k, self.kv))
            parts[2].append(sum_heads(d2.v, self.kv))
        slot = self.at.slot_T[self.at.stem :]
        return [torch.cat([_flat(x) for x in part]).index_select(0, slot) for part in parts]

    def _given(
        self, index: Tensor, first: int, g_THD: Tensor, out_THD: Tensor, lse_TH: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        g, lse = self.at.rows_or(g_THD, index, first), self.at.rows_or(lse_TH[..., None], index, first, NOTHING)
        return g, self.at.rows(out_THD, index), lse[..., 0]

    def _fold(self, x: Tensor) -> Tensor:
        """[B*G, H, R, D] -> [B, K, H/K*G*R, D]: every query that reads the same keys."""
        b, g, r = self.at.member_BGR.shape  # type: ignore[union-attr]
        x = x.reshape(b, g, self.kv, -1, r, x.shape[-1]).permute(0, 2, 3, 1, 4, 5)
        return x.reshape(b, self.kv, -1, x.shape[-1])

    def _unfold(self, x: Tensor) -> Tensor:
        """The inverse of _fold."""
        b, g, r = self.at.member_BGR.shape  # type: ignore[union-attr]
        x = x.reshape(b, x.shape[1], -1, g, r, x.shape[-1]).permute(0, 3, 1, 2, 4, 5)
        return x.reshape(b * g, -1, r, x.shape[-1])


class _Stem:
    """Passes over the stem: of its own tokens, and of all tokens behind it."""

    def __init__(self, stem: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, scale: float) -> None:
        self.stem, self.scale, self.heads, self.kv = stem, scale, q_THD.shape[1], k_TKD.shape[1]
        q, k, v = (x[:stem].transpose(0, 1)[None] for x in (q_THD, k_TKD, v_TKD))
        self.own = _Heads(q, expand_heads(k, self.heads), expand_heads(v, self.heads))
        self.behind = _Heads(self._fold(q_THD[stem:]), k, v)

    def forward(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(output [S, H, D], log-sum-exp [S, H]) of the stem, and [T', H, D], [T', H] of the others over the stem's keys."""
        (o, l), (o_behind, l_behind) = _forward(self.own, True, self.scale), _forward(self.behind, False, self.scale)
        return (_flat(o), l[0].T), (self._unfold(o_behind), self._unfold(l_behind[..., None])[..., 0])

    def backward(self, g_THD: Tensor, out_THD: Tensor, lse_TH: Tensor) -> tuple[list[Tensor], Tensor]:
        """Gradients of q, k, v at the stem; and of q [T', H, D] behind it, from the stem's keys."""
        s = self.stem
        g, out, lse = (x[None, :s].transpose(1, 2) for x in (g_THD, out_THD, lse_TH))
        own = _backward(self.own, (g, out, lse), True, self.scale)
        folded = self._fold(g_THD[s:]), self._fold(out_THD[s:]), self._fold(lse_TH[s:, :, None])[..., 0]
        d = _backward(self.behind, folded, False, self.scale)
        k, v = sum_heads(own.k, self.kv) + d.k, sum_heads(own.v, self.kv) + d.v
        return [_flat(x) for x in (own.q, k, v)], self._unfold(d.q)

    def _fold(self, x_THD: Tensor) -> Tensor:
        """[T', H, D] -> [1, K, H/K*T', D]."""
        x = x_THD.unflatten(1, (self.kv, -1)).permute(1, 2, 0, 3)
        return x.reshape(1, self.kv, -1, x.shape[-1])

    def _unfold(self, x: Tensor) -> Tensor:
        """The inverse of _fold."""
        x = x[0].unflatten(1, (self.heads // self.kv, -1)).permute(2, 0, 1, 3)
        return x.reshape(x.shape[0], self.heads, -1)


class FlashAttention(torch.autograd.Function):
    """Attention of a packed row, [T, H, D]; the head of the file says how."""

    @staticmethod
    def forward(ctx, q_THD, k_TKD, v_TKD, at, scale):
        kind, ctx.kinds = v_TKD.dtype, [x.dtype for x in (q_THD, k_TKD, v_TKD)]
        wide = torch.float32 if kind in (torch.bfloat16, torch.float16) else kind
        q, k, v = (x.to(wide) for x in (q_THD, k_TKD, v_TKD))  # under autocast, rotary embeddings promote q and k
        out, lse = _Groups(at, q, k, v, scale).forward()
        if at.stem:
            (stem, stem_lse), behind = _Stem(at.stem, q, k, v, scale).forward()
            out, lse = _merged((out, lse), behind)
            out, lse = torch.cat([stem, out]), torch.cat([stem_lse, lse])
        ctx.save_for_backward(q_THD, k_TKD, v_TKD, out, lse)
        ctx.at, ctx.scale = at, scale
        return out.to(kind)

    @staticmethod
    @matmul.small()
    def backward(ctx, g_THD):
        q, k, v, out, lse = ctx.saved_tensors
        q, k, v, g = (x.to(out.dtype) for x in (q, k, v, g_THD))
        grads, at = _Groups(ctx.at, q, k, v, ctx.scale).backward(g, out, lse), ctx.at
        if at.stem:
            stem, d_q = _Stem(at.stem, q, k, v, ctx.scale).backward(g, out, lse)
            grads[0] += d_q
            grads = [torch.cat(pair) for pair in zip(stem, grads, strict=True)]
        return *(x.to(kind) for x, kind in zip(grads, ctx.kinds, strict=True)), None, None
