"""Attention of a decode step over cached prefixes and cached members."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class DecodeLayout:
    """One new token for each of the B*G rows. The prefix cache is read per group, never copied G times.

    A step reads all S cached positions, with the empty ones hidden, and where it writes is a number on the device: every step
    does the same work at the same addresses until ``grow`` or ``select``. So it can be recorded (``engines.cuda_graph``), and on
    the CPU products of one shape are 5 to 15 % faster than those of a shape that changes with every token.
    """

    prefix: dict[int, tuple[Tensor, Tensor]]  # layer -> keys [B, K, D, P] (products read rows), values [B, K, P, D]
    mask_B11P: Tensor | None  # additive: 0, or -inf at prefix padding; None where there is no padding
    members: dict[
        int, tuple[Tensor, Tensor]
    ]  # layer -> keys, values [B, K, G, S, D]; zeros where nothing is written yet
    shape: tuple[int, int]  # B, G
    filled_1: Tensor  # int64 [1]: positions written
    hidden_S: Tensor = field(init=False)  # additive: 0, or -inf beyond the position of this step; made by ``begin``

    @property
    def capacity(self) -> int:
        return next(iter(self.members.values()))[1].shape[3]

    @property
    def longest(self) -> float:
        return next(iter(self.prefix.values()))[1].shape[2] + self.capacity

    def begin(self) -> None:
        """Before a step."""
        _, values = next(iter(self.members.values()))
        beyond_S = torch.arange(self.capacity, device=values.device) > self.filled_1
        self.hidden_S = torch.zeros_like(beyond_S, dtype=values.dtype).masked_fill_(beyond_S, -torch.inf)

    def end(self) -> None:
        """After a step."""
        self.filled_1 += 1

    def attend(self, layer: int, q_1HTD: Tensor, k_1KTD: Tensor, v_1KTD: Tensor, scale: float) -> Tensor:
        (b, g), (_, h, _, d) = self.shape, q_1HTD.shape
        kv, q_1HTD = k_1KTD.shape[1], q_1HTD.to(v_1KTD.dtype)  # under autocast, rotary embeddings promote q and k
        keys, values = self.members[layer]
        for cache, x_1KTD in ((keys, k_1KTD), (values, v_1KTD)):
            x_BKGD = x_1KTD.view(kv, b, g, -1).transpose(0, 1)
            cache.index_copy_(3, self.filled_1, x_BKGD[:, :, :, None].to(cache.dtype))
        k_BKDP, v_BKPD = self.prefix[layer]
        p, rep = v_BKPD.shape[2], h // kv
        q = q_1HTD.view(kv, rep, b, g, d).permute(2, 0, 3, 1, 4).reshape(b, kv, g * rep, d) * scale
        to_prefix = q @ k_BKDP
        if self.mask_B11P is not None:
            to_prefix += self.mask_B11P
        to_prefix = to_prefix.view(b, kv, g, rep, p)
        to_self = q.view(b, kv, g, rep, d) @ keys.transpose(3, 4)
        to_self += self.hidden_S
        weights = torch.cat([to_prefix, to_self], dim=-1).softmax(-1)
        out = (weights[..., :p].reshape(b, kv, g * rep, p) @ v_BKPD).view(b, kv, g, rep, -1)
        out += weights[..., p:] @ values
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
            None if self.mask_B11P is None else self.mask_B11P[groups],
            {n: (members(k), members(v)) for n, (k, v) in self.members.items()},
            (b, g),
            self.filled_1,
        )

    def grow(self, capacity: int) -> None:
        """Room for more member positions."""
        for n, pair in self.members.items():
            new = [x.new_zeros(*x.shape[:3], capacity, x.shape[4]) for x in pair]
            for x, y in zip(pair, new, strict=True):
                y[:, :, :, : x.shape[3]] = x
            self.members[n] = (new[0], new[1])
