"""The one loss, token by token. Everything here is elementwise on the chosen tokens' log-probs ``l``.

    L = - sum_t wp_t * surrogate(l_t) + sum_t wk_t * kl(l_t, l_ref_t) - sum_t we_t * H_t      (policy stream)
        - sum_t wl_t * l_t                                                                    (likelihood stream)

The weights w carry coefficient / Z with Z counted once over the whole optimizer batch, so micro-batches simply add up
(DESIGN section 1; UFT eq. 3.3). ``e_t = -dL/dl_t`` is the effective weight that the tests compare with closed forms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from unift.batch import PackedBatch
    from unift.config import Policy


def clipped_surrogate(l_S: Tensor, old_S: Tensor, a_S: Tensor, low: float, high: float, dual: float | None) -> Tensor:
    """PPO's clipped surrogate min(rho A, clip(rho, 1-low, 1+high) A), rho = exp(l - old) (arXiv 1707.06347, eq. 7).

    ``dual`` = c bounds the surrogate from below by c*A where A < 0 (dual clip, arXiv 1912.09729).
    Gradient at rho = 1 is A; 0 where the clip is active.
    """
    ratio_S = torch.exp(l_S - old_S)
    surrogate_S = torch.minimum(ratio_S * a_S, ratio_S.clamp(1 - low, 1 + high) * a_S)
    if dual is not None:
        surrogate_S = torch.where(a_S < 0, torch.maximum(surrogate_S, dual * a_S), surrogate_S)
    return surrogate_S


def reinforce(l_S: Tensor, a_S: Tensor) -> Tensor:
    """A * l: the score-function estimator without a ratio (Williams 1992)."""
    return a_S * l_S


def kl_penalty(l_S: Tensor, ref_S: Tensor, estimator: str) -> Tensor:
    """Per-token penalty towards the reference, d = ref - l (Schulman's estimators).

    k3 = exp(d) - d - 1: gradient on sampled tokens is that of the forward KL(ref || pi); e_t = exp(d) - 1.
    k2 = d^2 / 2: gradient of the reverse KL(pi || ref); e_t = d.
    """
    d_S = ref_S - l_S
    return d_S.square() / 2 if estimator == "k2" else torch.exp(d_S) - d_S - 1


def losses(l_S: Tensor, entropy_S: Tensor | None, batch: PackedBatch, policy: Policy, estimator: str) -> dict[str, Tensor]:
    """Scalar losses of both streams of a packed batch: ``policy`` (with ``kl`` and ``entropy`` inside) and ``likelihood``."""
    old_S = l_S.detach() if batch.old_S is None else batch.old_S
    if policy.loss == "reinforce":
        surrogate_S = reinforce(l_S, batch.advantage_S)
    else:
        surrogate_S = clipped_surrogate(l_S, old_S, batch.advantage_S, policy.low, policy.high, policy.dual_clip)
    out = {
        "policy": -(batch.policy_w_S * surrogate_S).sum(),
        "likelihood": -(batch.likelihood_w_S * l_S).sum(),
    }
    if batch.ref_S is not None:
        out["kl"] = (batch.kl_w_S * kl_penalty(l_S, batch.ref_S, estimator)).sum()
        out["policy"] = out["policy"] + out["kl"]
    if entropy_S is not None:
        out["entropy"] = (batch.entropy_w_S * entropy_S).sum()
        out["policy"] = out["policy"] - out["entropy"]
    return out
