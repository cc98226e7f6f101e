"""Scoring in worker processes that can be killed: a scorer is never trusted, and an exception is never a reward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unift.rewards.adapters import (
    ACCEPTED,
    BadValue,
    Reward,
    adapt,
    as_score,
    load_reward,
)
from unift.rewards.pool import Check, ScoreError, Scorer, count_outcomes, score_groups
from unift.types import HANDED, RewardError

if TYPE_CHECKING:
    from unift.settings import Reward as RewardSettings

__all__ = [
    "ACCEPTED",
    "BadValue",
    "Check",
    "Reward",
    "ScoreError",
    "Scorer",
    "adapt",
    "as_score",
    "count_outcomes",
    "load_reward",
    "open_scorer",
    "score_groups",
]


def open_scorer(reward: RewardSettings, handed: Any = None) -> Scorer:
    """The scorer that the settings describe. ``handed``: a function of a Python caller, where they say that there is one."""
    if handed is None and str(reward.function).startswith(HANDED):
        raise RewardError(
            f"the reward of this run was handed over from Python ({reward.function}): pass it again with "
            "unift.train(reward=...), or set reward.function=file.py:function"
        )
    return Scorer(
        handed if handed is not None else reward.function,
        workers=reward.workers,
        timeout=reward.timeout,
        error_rate=reward.error_rate,
        format_score=reward.format_score,
        rule=reward.rule,
        memory_mb=reward.memory_mb,
    )
