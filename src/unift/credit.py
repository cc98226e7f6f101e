"""What each completion of a group is worth: scores -> advantages. Statistics never leave the group."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from unift.config import Credit


def advantages(scores_G: list[float], credit: Credit) -> list[float]:
    """Advantages of one group, float64.

    group_mean:    A_i = r_i - mean(r)                      (Dr.GRPO, arXiv 2503.20783; GRPO before scaling)
    leave_one_out: A_i = r_i - mean_{j != i}(r_j)           (RLOO, arXiv 2402.14740)
    scale: divided by (std(r) + epsilon), sample (n-1) or population std (GRPO, arXiv 2402.03300).

    A group whose scores are all equal has exactly zero advantage: decided by equality, not by a small std.
    """
    r = np.asarray(scores_G, dtype=np.float64)
    if r.size == 0:
        return []
    if credit.baseline != "none" and (r == r[0]).all():
        return [0.0] * r.size
    if credit.baseline == "group_mean":
        a = r - r.mean()
    elif credit.baseline == "leave_one_out":
        a = (r - r.mean()) * r.size / (r.size - 1)
    else:
        a = r.copy()
    if credit.scale != "none" and r.size > 1:
        a /= r.std(ddof=1 if credit.scale == "sample_std" else 0) + credit.epsilon
    return a.tolist()
