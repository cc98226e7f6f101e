"""Scoring in worker processes that can be killed: a scorer is never trusted, and an exception is never a reward."""

from unift.rewards.adapters import (
    ACCEPTED,
    BadValue,
    Reward,
    adapt,
    as_score,
    load_reward,
)
from unift.rewards.pool import Check, ScoreError, Scorer, count_outcomes, score_groups
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


def open_scorer(reward: RewardSettings) -> Scorer:
    """The scorer that the settings describe."""
    return Scorer(
        reward.function,
        workers=reward.workers,
        timeout=reward.timeout,
        error_rate=reward.error_rate,
        format_score=reward.format_score,
        rule=reward.rule,
        memory_mb=reward.memory_mb,
    )
