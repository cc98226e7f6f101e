"""Scoring in worker processes that can be killed: a scorer is never trusted, and an exception is never a reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from unift.rewards.journal import COUNT_OF, COUNTS, ScoreError
from unift.rewards.pool import Scorer
from unift.rows.tasks.format import answer_rule
from unift.types import HANDED, Group, RewardError, Row, Score

if TYPE_CHECKING:
    from unift.config.sections import Reward as RewardSettings


def open_scorer(reward: RewardSettings, rows: Sequence[Row], handed: Any = None) -> Scorer:
    """The scorer that the settings describe.

    rows: of the training split; they decide the place of the answer where reward.answer=auto. ``handed``: a callable
    of a Python caller, or a list of them with weights, in place of what the settings name.
    """
    if handed is None and isinstance(reward.function, str) and reward.function.startswith(HANDED):
        raise RewardError(
            f"the reward of this run was handed over from Python ({reward.function}): pass it again with "
            "unift.train(reward=...) or unift.evaluate(..., reward=...), or set reward.function=file.py:function"
        )
    return Scorer(
        handed if handed is not None else reward.function,
        workers=reward.workers,
        timeout=reward.timeout,
        wall_timeout=reward.wall_timeout,
        error_rate=reward.error_rate,
        format_score=reward.format_score,
        rule=reward.rule,
        memory_mb=reward.memory_mb,
        answer=answer_rule(rows, reward.answer, reward.rule),
        environment=reward.environment,
    )


def count_outcomes(groups: Sequence[Group]) -> dict[str, int]:
    """What became of the completions of scored groups, named as in ``Scorer.counts``."""
    counts = dict.fromkeys(COUNTS, 0)
    for sample in (s for group in groups for s in group.samples):
        counts["total"] += 1
        if sample.score is None:
            counts[COUNT_OF[sample.error.split(":")[0]] if sample.error else "skipped"] += 1
    return counts


def score_groups(scorer: Scorer, rows: Sequence[Row], groups: Sequence[Group], hint_texts: Sequence[str]) -> None:
    """Fill ``score`` or ``error`` of every sample from its text.

    rows: the dataset (``group.row`` is the index into it). hint_texts: one per group. A sample to which no reward
    applies keeps ``score`` None and ``error`` "".
    """
    if len(groups) != len(hint_texts):
        raise ValueError(f"found {len(groups)} groups and {len(hint_texts)} hint texts; want one text per group")
    for group in groups:
        if not 0 <= group.row < len(rows) or rows[group.row].id != group.row_id:
            found = repr(rows[group.row].id) if 0 <= group.row < len(rows) else f"only {len(rows)} rows"
            raise ValueError(f"group of row {group.row} ({group.row_id!r}) does not fit the rows: found {found}")
    samples = [(sample, rows[group.row], hint) for group, hint in zip(groups, hint_texts) for sample in group.samples]
    outcomes = scorer.score([row for _, row, _ in samples], [s.text for s, _, _ in samples], [h for _, _, h in samples])
    for (sample, _, _), outcome in zip(samples, outcomes):
        sample.score = outcome if isinstance(outcome, Score) else None
        sample.error = str(outcome) if isinstance(outcome, ScoreError) else ""
