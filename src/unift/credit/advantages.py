"""What each completion of a group is worth: scores -> advantages. Statistics of the group only; credit that spreads over
tokens (a critic, a KL in the reward, whitening over a batch) is in ``returns.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from unift.config.words import BASELINES, BaselineName

if TYPE_CHECKING:
    from unift.config.sections import Credit, Rules
    from unift.types import Group
RULES: Mapping[BaselineName, Callable[[np.ndarray], np.ndarray]] = {  # scores [G] -> advantages [G] before scaling
    "group_mean": lambda r: r - r.mean(),
    "leave_one_out": lambda r: (r - r.mean()) * r.size / (r.size - 1),
    "sign": lambda r: np.where(r >= 1, 1.0, -1.0),
    "none": np.copy,
    "critic": np.copy,  # until ``returns`` spreads them over the tokens
    "partition": np.copy,  # until ``discriminative`` does
}


def advantages(scores_G: list[float], credit: Credit) -> list[float]:
    """Advantages of one group, float64.

    group_mean:    A_i = r_i - mean(r)                      (Dr.GRPO, arXiv 2503.20783; GRPO before scaling)
    leave_one_out: A_i = r_i - mean_{j != i}(r_j)           (RLOO, arXiv 2402.14740)
    sign:          A_i = 1 for a right completion (1 in ``scores_G``), -1 for a wrong one (SRFT, arXiv 2506.19767)
    scale: of these differences: divided by (std(r) + epsilon), sample (n-1) or population std (GRPO, arXiv 2402.03300). The
    other baselines take no difference, and a std that may be 0 where r is not.
    positive: factor of the positive ones, last.

    With group_mean and leave_one_out, a group whose scores are all equal has exactly zero advantage: decided by
    equality, not by a small std.
    """
    r = np.asarray(scores_G, dtype=np.float64)
    if r.size == 0:
        return []
    word = BASELINES[credit.baseline]
    if word.compares and (r == r[0]).all():
        return [0.0] * r.size
    a = RULES[credit.baseline](r)
    if credit.scale != "none" and word.compares and r.size > 1:
        a /= r.std(ddof=1 if credit.scale == "sample_std" else 0) + credit.epsilon
    if credit.positive != 1:
        a = np.where(a > 0, credit.positive * a, a)
    return a.tolist()


def overlong(length: int, max_tokens: int, buffer: int) -> float:
    """DAPO's soft penalty (arXiv 2503.14476, eq. 13): 0 up to max_tokens - buffer, then linearly to -1 at max_tokens."""
    return -max(0.0, (length - (max_tokens - buffer)) / buffer) if buffer else 0.0


def shaped_scores(group: Group, rules: Rules) -> list[float]:
    """What the samples are worth before any baseline: the verifier's score and the penalty on length. Where verdicts count:
    1 or 0, and a right one is worth nothing once the penalty is all that it can be."""
    verdicts, out = BASELINES[rules.credit.baseline].verdicts, list[float]()
    for s in group.samples:
        if s.score is not None:
            penalty = overlong(s.sampled, rules.sample.max_tokens, rules.credit.overlong)
            out.append(float(s.score.right and penalty > -1) if verdicts else s.score.value + penalty)
    return out


def group_advantages(group: Group, rules: Rules) -> list[float]:
    """Advantages of a group's samples, then of the demonstration where it is a member (score 1)."""
    as_member = [1.0] if rules.sample.demonstration and group.solved else []
    return advantages([*shaped_scores(group, rules), *as_member], rules.credit)
