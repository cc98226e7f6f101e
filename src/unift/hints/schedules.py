"""How much of the solution is shown: one entry of SCHEDULES a word. Pure functions of (seed, step, row id) and of what is
known about the row.

Steps count from 0 in the code; the paper's t is ``step + 1`` (UFT, arXiv 2505.16984, eq. B.1, with the official code's
counter: the two agree, the last hinted step is t = T_hint with p = low). One draw serves a whole group, so a group's
baseline compares completions of one problem only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unift import rng
from unift.config import words
from unift.types import ConfigError

if TYPE_CHECKING:
    from unift.config.sections import Show
Span = tuple[float, float]  # what is known about a row: its share twice, or the interval that its share is drawn from


@dataclass(frozen=True)
class At:
    """A row in a step. ``step`` counts from 0 within the stage of ``total`` steps; whole without a budget."""

    seed: int
    step: float
    total: int
    row: str


@dataclass(frozen=True)
class Seen:
    """What a group told about its row: the share shown, and the share of right completions."""

    shown: float
    success: float


@dataclass(frozen=True)
class Schedule:
    """A rule has a chance, or an interval, or counts cuts itself; the first of ``cuts``, ``chance`` decides a draw of cuts."""

    chance: Callable[[Show, At, Span], float] | None = None  # p of every cut, or the share shown
    between: Callable[[Show, At, Span], Span] | None = None  # the share is uniform in here
    cuts: Callable[[Show, At, int], int] | None = None  # of ``num``, where the rule counts them itself
    expected: Callable[[Show, At, Span], float] | None = None  # mean share, where it is none of the above
    learns: Callable[[Show, Span, Seen], Span] | None = None  # what is known about the row after a group
    first: Callable[[Show], Span] = lambda show: (show.high, show.high)  # before any


def cosine(show: Show, at: At, span: Span) -> float:
    """p(t) = low + (high - low)/2 (1 + cos(pi t / T_hint)), t <= T_hint (UFT, eq. B.1); a last step that is no whole one
    (train.budget) has t = T_hint."""
    angle = min(math.pi * (at.step + 1) / hinted_steps(show, at.total), math.pi)
    return show.low + (show.high - show.low) / 2 * (1 + math.cos(angle))


def window(show: Show, at: At, span: Span) -> Span:
    """Lower end from high to low by a cosine, upper end at high (Prefix-RFT, arXiv 2507.01679)."""
    t, t_hint = at.step + 1, max(hinted_steps(show, at.total), 1)
    return show.low + (show.high - show.low) / 2 * (1 + math.cos(math.pi * min(t / t_hint, 1.0))), show.high


def any_cut(show: Show, at: At, num: int) -> int:
    """Every cut is as likely, the empty and the full one included (R3, arXiv 2402.05808)."""
    return int(rng.generator("hint", at.seed, at.step, at.row).integers(0, num + 1))


def staircase(show: Show, at: At, num: int) -> int:
    """Equal stages of T_hint / (num + 1) steps: the last one ends at T_hint whatever num is. Floored, as in the official code
    of UFT: k = num - floor(t / floor(T_hint / (num + 1))), t = step + 1, not below 0."""
    if show.stages == "floored":
        length = max(hinted_steps(show, at.total) // (num + 1), 1)
        return max(num - int((at.step + 1) // length), 0)
    return num - min(num, int(at.step * (num + 1) // hinted_steps(show, at.total)))


def adapted(show: Show, span: Span, seen: Seen) -> Span:
    """p + rate (target - success), within [0, 1]: rises while fewer than the target succeed."""
    p = min(max(span[0] + show.rate * (show.target - seen.success), 0.0), 1.0)
    return p, p


def bisected(show: Show, span: Span, seen: Seen) -> Span:
    """Success below the target: lo = shown; else hi = shown, lo = 0 (AdaBack, arXiv 2506.18110)."""
    return (seen.shown, span[1]) if seen.success < show.target else (0.0, seen.shown)


SCHEDULES: Mapping[words.ScheduleName, Schedule] = {
    "none": Schedule(chance=lambda show, at, span: 0.0),
    "all": Schedule(chance=lambda show, at, span: 1.0, cuts=lambda show, at, num: num),
    "constant": Schedule(chance=lambda show, at, span: show.high),
    "cosine": Schedule(chance=cosine),
    "uniform": Schedule(between=lambda show, at, span: (0.0, 1.0), cuts=any_cut),
    "staircase": Schedule(cuts=staircase, expected=lambda show, at, span: staircase(show, at, show.cuts) / show.cuts),
    "window": Schedule(between=window),
    "adaptive": Schedule(chance=lambda show, at, span: span[0], between=lambda show, at, span: span, learns=adapted),
    "bisection": Schedule(between=lambda show, at, span: span, learns=bisected, first=lambda show: (0.0, 1.0)),
}


def hinted_steps(show: Show, total: int) -> int:
    """T_hint: the number of steps, from the first, that may show a hint."""
    word = words.SCHEDULES[show.schedule]
    if word.ends:
        return round(show.until * total)
    return total if word.shows else 0


def known(show: Show, span: Span | None) -> Span:
    """What is known about a row, at first the schedule's own beginning."""
    return span or SCHEDULES[show.schedule].first(show)


def share(show: Show, at: At, span: Span | None = None) -> float:
    """u in [0, 1], the share of the solution to show, where a hint may end after any token. ``span``: see `known`."""
    rule = SCHEDULES[show.schedule]
    if at.step >= hinted_steps(show, at.total):
        return 0.0
    if rule.between is not None:
        low, high = rule.between(show, at, known(show, span))
        return low + (high - low) * float(rng.uniforms("share", at.seed, at.step, at.row, shape=1)[0])
    if rule.chance is None:
        raise ConfigError(f"show.schedule={show.schedule} counts cuts: use show.unit=cuts")
    return rule.chance(show, at, known(show, span))


def draw(show: Show, at: At, n_steps: int, span: Span | None = None) -> int:
    """k, the number of cuts shown: 0..min(cuts, n_steps). ``span``: see `known`."""
    rule, num = SCHEDULES[show.schedule], min(show.cuts, n_steps)
    if at.step >= hinted_steps(show, at.total) or num == 0:
        return 0
    if rule.cuts is not None:
        return rule.cuts(show, at, num)
    if rule.chance is None:
        return round(num * share(show, at, span))
    p = rule.chance(show, at, known(show, span))
    if show.draw == "rounded":
        return round(num * p)
    if show.draw == "two_point":  # the least spread that whole numbers of mean num * p can have
        return min(int(num * p + rng.uniforms("hint", at.seed, at.step, at.row, shape=1)[0]), num)
    return int((rng.uniforms("hint", at.seed, at.step, at.row, shape=num) < p).sum())


def probability(show: Show, step: float, total: int, span: Span | None = None) -> float:
    """p(t) of UFT eq. B.1 for cosine; the chance of a cut, or the mean share shown, for the others. After T_hint exactly 0.

    A schedule that follows a row's success needs the row's ``span``; without one, its value at the first step.
    """
    rule, at, span = SCHEDULES[show.schedule], At(0, step, total, ""), known(show, span)
    if step >= hinted_steps(show, total):
        return 0.0
    if rule.expected is not None:
        return rule.expected(show, at, span)
    if rule.between is not None:
        low, high = rule.between(show, at, span)
        return (low + high) / 2
    if rule.chance is None:
        raise ValueError(f"the schedule {show.schedule!r} says nowhere how much it shows")
    return rule.chance(show, at, span)


def expected_share(show: Show, step: int, total: int, n_steps: int = 5) -> float | None:
    """E[k] / num at this step, for plots and dry runs; None where it depends on the rows."""
    rule, num = SCHEDULES[show.schedule], min(show.cuts, n_steps)
    if rule.learns is not None:
        return None
    if step >= hinted_steps(show, total) or num == 0:
        return 0.0
    if rule.expected is not None or (rule.between is None and show.draw == "rounded"):
        return draw(show, At(0, step, total, ""), n_steps) / num
    return probability(show, step, total)


def advance(show: Show, span: Span | None, seen: Seen) -> Span:
    """What is known about a row after a group of it."""
    learns = SCHEDULES[show.schedule].learns
    return known(show, span) if learns is None else learns(show, known(show, span), seen)
