"""Attention of a decode step with several new tokens a row: a drafted stretch is checked in one forward."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from unift.model.attention.decode import DecodeLayout


@dataclass
class BlockLayout(DecodeLayout):
    """T flat tokens, of row ``row_T`` (of the N = B*G) at its own position ``at_T``; those of a row stand side by side, in order.

    Rows may have different numbers of tokens (W: the most of any), and none; only attention pads them. A token sees its
    row's positions up to its own, so what was written for a draft that was not accepted is hidden until it is written over.
    """

    row_T: Tensor = field(kw_only=True)
    at_T: Tensor = field(kw_only=True)
    slot_T: Tensor = field(init=False)  # where each token lies in [N, W]
    token_S: Tensor = field(init=False)  # the token of each of these S = N*W slots; 0 where there is none
    width: int = field(init=False)  # W
    beyond_S: Tensor = field(
        init=False
    )  # additive [B, 1, G, W, 1, positions]: 0, or -inf beyond the token's own position

    def __post_init__(self) -> None:
        (b, g), device = self.shape, self.row_T.device
        count_N = torch.bincount(self.row_T, minlength=b * g)
        within_T = torch.arange(len(self.row_T), device=device) - (count_N.cumsum(0) - count_N)[self.row_T]
        self.width = int(count_N.max())
        self.slot_T = self.row_T * self.width + within_T
        self.token_S = torch.zeros(b * g * self.width, dtype=torch.long, device=device)
        self.token_S[self.slot_T] = torch.arange(len(self.row_T), device=device)
        hidden = torch.arange(self.capacity, device=device) > self.at_T[self.token_S][:, None]
        _, values = next(iter(self.members.values()))
        mask = torch.zeros(hidden.shape, dtype=values.dtype, device=device).masked_fill_(hidden, -torch.inf)
        self.beyond_S = mask.view(b, 1, g, self.width, 1, self.capacity)

    def attend(self, layer: int, q_1HTD: Tensor, k_1KTD: Tensor, v_1KTD: Tensor, scale: float) -> Tensor:
        (b, g), (_, h, _, d), w = self.shape, q_1HTD.shape, self.width
        kv, rep = k_1KTD.shape[1], h // k_1KTD.shape[1]
        keys, values = self.members[layer]
        for cache, x_1KTD in ((keys, k_1KTD), (values, v_1KTD)):
            cache[self.row_T // g, :, self.row_T % g, self.at_T] = x_1KTD[0].transpose(0, 1).to(cache.dtype)
        k_BKDP, v_BKPD = self.prefix[layer]
        p = v_BKPD.shape[2]
        q_THD = q_1HTD[0].transpose(0, 1).to(values.dtype) * scale  # under autocast, rotary embeddings promote q
        q = q_THD.index_select(0, self.token_S).view(b, g, w, kv, rep, d).permute(0, 3, 1, 2, 4, 5).contiguous()
        to_prefix = q.view(b, kv, g * w * rep, d) @ k_BKDP
        if self.mask_B11P is not None:
            to_prefix += self.mask_B11P
        to_self = (q.view(b, kv, g, w * rep, d) @ keys.transpose(3, 4)).view(b, kv, g, w, rep, -1)
        to_self += self.beyond_S
        weights = torch.cat([to_prefix.view(b, kv, g, w, rep, p), to_self], dim=-1).softmax(-1)
        out = (weights[..., :p].reshape(b, kv, g * w * rep, p) @ v_BKPD).view(b, kv, g, w * rep, -1)
        out += weights[..., p:].reshape(b, kv, g, w * rep, -1) @ values
        out = out.view(b, kv, g, w, rep, -1).permute(0, 2, 3, 1, 4, 5).reshape(b * g * w, h, -1)
        return out.index_select(0, self.slot_T)[None]
