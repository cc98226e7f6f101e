"""How much of the solution is shown: schedules and draws, as pure functions of (seed, step, row id).

Steps count from 0 in the code; the paper's t is ``step + 1`` (UFT eq. B.1 with the official code's counter: the two
agree, the last hinted step is t = T_hint with p = low). One draw serves a whole group, so a group's baseline compares
completions of one problem only.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from unift import rng
from unift.types import ConfigError

if TYPE_CHECKING:
    from unift.config import Show


def separators(n_steps: int, cuts: int) -> list[int]:
    """sep[k] = round(k * S / num), num = min(cuts, S): a hint of k cuts is the first sep[k] of the S steps.

    Python's banker's rounding, as the official code (UFT section B): S=9, cuts=5 -> [0, 2, 4, 5, 7, 9].
    """
    if n_steps < 1:
        return [0]
    num = min(cuts, n_steps)
    return [round(k * n_steps / num) for k in range(num)] + [n_steps]


def hinted_steps(show: Show, total: int) -> int:
    """T_hint: the number of steps, from the first, that may show a hint."""
    if show.schedule in ("cosine", "staircase", "window"):
        return round(show.until * total)
    return 0 if show.schedule == "none" else total


def probability(show: Show, step: int, total: int) -> float:
    """p(t) of UFT eq. B.1 for cosine; the chance of a cut, or the mean share shown, for the others, where they have one.

    cosine: low + (high - low)/2 * (1 + cos(pi * t / T_hint)) while t <= T_hint, then exactly 0.
    """
    t, t_hint = step + 1, hinted_steps(show, total)
    if show.schedule == "window":
        return (show.high + window_floor(show, step, total)) / 2 if t <= t_hint else 0.0
    if show.schedule == "cosine":
        if t > t_hint:
            return 0.0
        return show.low + (show.high - show.low) / 2 * (1 + math.cos(math.pi * t / t_hint))
    return {"none": 0.0, "all": 1.0, "constant": show.high, "uniform": 0.5}.get(show.schedule, math.nan)


def window_floor(show: Show, step: int, total: int) -> float:
    """Lower end of the window: from high to low by a cosine (Prefix-RFT, arXiv 2507.01679)."""
    t, t_hint = step + 1, max(hinted_steps(show, total), 1)
    return show.low + (show.high - show.low) / 2 * (1 + math.cos(math.pi * min(t / t_hint, 1.0)))


def share(show: Show, seed: int, step: int, total: int, row_id: str, state: tuple[float, float] | None = None) -> float:
    """u in [0, 1], the share of the solution's steps to show, for schedules with a continuous length.

    window: u ~ Uniform(floor(t), high). uniform: U(0, 1). adaptive: the row's own p. bisection: U(lo, hi) of the row's
    interval (AdaBack, arXiv 2506.18110). ``state``: (p, p) or (lo, hi) of the row; None: not seen yet.
    """
    if step + 1 > hinted_steps(show, total):
        return 0.0
    low, high = state or initial_state(show)
    if show.schedule == "window":
        low, high = window_floor(show, step, total), show.high
    elif show.schedule == "uniform":
        low, high = 0.0, 1.0
    elif show.schedule not in ("adaptive", "bisection"):
        return probability(show, step, total)
    return low + (high - low) * float(rng.uniforms("share", seed, step, row_id, shape=1)[0])


def initial_state(show: Show) -> tuple[float, float]:
    return (0.0, 1.0) if show.schedule == "bisection" else (show.high, show.high)


def advance(show: Show, state: tuple[float, float] | None, shown: float, success: float) -> tuple[float, float]:
    """The row's next state after a group that saw the share ``shown`` and succeeded at the rate ``success``.

    adaptive: p + rate (target - success), within [0, 1]: rises while fewer than the target succeed.
    bisection: success below the target: lo = shown; else hi = shown, lo = 0 (AdaBack).
    """
    low, high = state or initial_state(show)
    if show.schedule == "adaptive":
        p = min(max(low + show.rate * (show.target - success), 0.0), 1.0)
        return p, p
    return (shown, high) if success < show.target else (0.0, shown)


def draw(
    show: Show, seed: int, step: int, total: int, row_id: str, n_steps: int, state: tuple[float, float] | None = None
) -> int:
    """k, the number of cuts shown: 0..min(cuts, n_steps). ``state``: the row's own, for adaptive and bisection."""
    num = min(show.cuts, n_steps)
    t, t_hint = step + 1, hinted_steps(show, total)
    if t > t_hint or num == 0:
        return 0
    if show.schedule == "all":
        return num
    if show.schedule == "uniform":  # R3: every cut is as likely, the empty and the full one included
        return int(rng.generator("hint", seed, step, row_id).integers(0, num + 1))
    if show.schedule == "staircase":
        # Equal stages of T_hint/(num+1) steps: the last rung ends at T_hint whatever num is (trap 13).
        return num - min(num, (t - 1) * (num + 1) // t_hint)
    if show.schedule in ("window", "bisection"):
        return round(num * share(show, seed, step, total, row_id, state))
    p = (state or initial_state(show))[0] if show.schedule == "adaptive" else probability(show, step, total)
    if show.draw == "rounded":
        return round(num * p)
    return int((rng.uniforms("hint", seed, step, row_id, shape=num) < p).sum())


def expected_share(show: Show, step: int, total: int, n_steps: int = 5) -> float:
    """E[k] / num at this step, for plots and dry runs."""
    num = min(show.cuts, n_steps)
    if step + 1 > hinted_steps(show, total) or num == 0:
        return 0.0
    if show.schedule in ("adaptive", "bisection"):
        return math.nan  # it depends on the rows
    if show.schedule == "staircase" or (show.schedule in ("cosine", "constant") and show.draw == "rounded"):
        return draw(show, 0, step, total, "", n_steps) / num
    return probability(show, step, total)


def rows_of_step(seed: int, step: int, prompts: int, n_rows: int) -> list[int]:
    """Row indices of a step: epochs of independent permutations laid end to end, cut into batches. Nothing is dropped.

    A pure function, so a resumed run sees the rows that it would have seen.
    """
    if n_rows < 1:
        raise ConfigError("no training rows")
    first = step * prompts
    rows: list[int] = []
    while len(rows) < prompts:
        epoch, offset = divmod(first + len(rows), n_rows)
        order = rng.generator("rows", seed, epoch).permutation(n_rows)
        rows += order[offset : offset + prompts - len(rows)].tolist()
    return rows


def refill_rows(seed: int, step: int, attempt: int, n: int, n_rows: int) -> list[int]:
    """Rows that take the place of ``n`` groups without signal: a fresh permutation for each attempt of a step."""
    order = rng.generator("refill", seed, step, attempt).permutation(n_rows).tolist()
    return [order[i % n_rows] for i in range(n)]
