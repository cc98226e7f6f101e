"""Scoring in worker processes that can be killed: a scorer is never trusted, and an exception is never a reward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unift.rewards.adapters import ACCEPTED, BadValue, Reward, adapt, as_score, load_reward
from unift.rewards.groups import count_outcomes, score_groups
from unift.rewards.identity import describe
from unift.rewards.pool import Check, Scorer
from unift.rewards.records import ScoreError

if TYPE_CHECKING:
    from unift.settings import Reward as RewardSettings  # at run time workers would have to import it, too

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
    "describe",
    "load_reward",
    "open_scorer",
    "score_groups",
]


def open_scorer(reward: RewardSettings, function: Any = None) -> Scorer:
    """The scorer that the settings describe. function: a callable or a list of them in place of what they name."""
    return Scorer(
        reward.function if function is None else function,
        workers=reward.workers,
        timeout=reward.timeout,
        wall_timeout=reward.wall_timeout,
        error_rate=reward.error_rate,
        format_score=reward.format_score,
        rule=reward.rule,
        memory_mb=reward.memory_mb,
        environment=reward.environment,
    )
