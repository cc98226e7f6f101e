"""A jammed link for embeddings (after R-SFLLM, arXiv 2407.11654): channel, worst jammer, linear receiver.

    y = e + j + n,  j ~ N(0, Q),  n ~ N(0, s2 I),  received = W y,  W = R (R + C)^-1

R = E[e e'] of the embeddings that are sent, C what the receiver believes of the disturbance: s2 I without protection, s2 I + Q
where it has sensed the jammer's directions. Everything in float64; D is the width of an embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SCENARIOS = ("no link", "no jammer", "no protection", "protected")
JAMMERS = ("worst", "barrage")


@dataclass(frozen=True)
class Link:
    receiver_DD: Tensor
    spread_DD: Tensor  # a root of the covariance of j + n: of spread @ spread'

    def through(self, e_ND: Tensor, draw: np.random.Generator) -> Tensor:
        """What is received of the embeddings [..., D]; differentiable in them. Numbers come from ``draw``."""
        white = torch.from_numpy(draw.standard_normal(tuple(e_ND.shape)))
        return ((e_ND.double() + white @ self.spread_DD.T) @ self.receiver_DD.T).to(e_ND.dtype)


def receiver(r_DD: Tensor, believed_DD: Tensor) -> Tensor:
    """The linear filter of least mean squared error, R (R + C)^-1."""
    return torch.linalg.solve(r_DD + believed_DD, r_DD).T  # both are symmetric


def error(r_DD: Tensor, w_DD: Tensor, disturbance_DD: Tensor) -> float:
    """Mean squared error of one embedding: tr[(I - W) R (I - W)'] + tr[W (Q + s2 I) W']."""
    rest = torch.eye(len(r_DD), dtype=r_DD.dtype) - w_DD
    return float(torch.trace(rest @ r_DD @ rest.T) + torch.trace(w_DD @ disturbance_DD @ w_DD.T))


def jamming(kind: str, g_ND: Tensor, power: float) -> Tensor:
    """Q with trace ``power``: all in the first eigenvector of E[g g'] (worst), g the loss's gradient at the embeddings, or
    equal in all directions (barrage)."""
    width = g_ND.shape[-1]
    if kind == "barrage":
        return torch.eye(width, dtype=torch.float64) * power / width
    g = g_ND.reshape(-1, width).double()
    first = torch.linalg.eigh(g.T @ g).eigenvectors[:, -1]
    return torch.outer(first, first) * power


def make_link(scenario: str, kind: str, e_ND: Tensor, g_ND: Tensor, snr_db: float, jammer_db: float) -> Link | None:
    """The link of a scenario, None for "no link". ``snr_db``: signal over noise; ``jammer_db``: jammer over signal.

    e, g: embeddings that are sent and the loss's gradient at them, [..., D]."""
    if scenario not in SCENARIOS or kind not in JAMMERS:
        raise ValueError(f"found {scenario!r} and {kind!r}, expected one of {SCENARIOS} and one of {JAMMERS}")
    if scenario == "no link":
        return None
    e = e_ND.reshape(-1, e_ND.shape[-1]).double()
    r_DD, identity = e.T @ e / len(e), torch.eye(e.shape[1], dtype=torch.float64)
    signal = float(torch.trace(r_DD))
    noise_DD = identity * signal / e.shape[1] / 10 ** (snr_db / 10)
    q_DD = jamming(kind, g_ND, signal * 10 ** (jammer_db / 10)) * (scenario != "no jammer")
    believed_DD = noise_DD + q_DD if scenario == "protected" else noise_DD
    values, vectors = torch.linalg.eigh(noise_DD + q_DD)
    return Link(receiver(r_DD, believed_DD), vectors * values.clamp(min=0).sqrt())
