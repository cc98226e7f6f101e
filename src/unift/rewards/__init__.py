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
    "score_groups",
]
