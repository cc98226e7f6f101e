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
    if show.schedule in ("cosine", "staircase"):
        return round(show.until * total)
    return 0 if show.schedule == "none" else total


def probability(show: Show, step: int, total: int) -> float:
    """p(t) of UFT eq. B.1 for cosine; the chance of a cut for the others, where they have one.

    cosine: low + (high - low)/2 * (1 + cos(pi * t / T_hint)) while t <= T_hint, then exactly 0.
    """
    t, t_hint = step + 1, hinted_steps(show, total)
    if show.schedule == "cosine":
        if t > t_hint:
            return 0.0
        return show.low + (show.high - show.low) / 2 * (1 + math.cos(math.pi * t / t_hint))
    return {"none": 0.0, "all": 1.0, "constant": show.high, "uniform": 0.5}.get(show.schedule, math.nan)


def draw(show: Show, seed: int, step: int, total: int, row_id: str, n_steps: int) -> int:
    """k, the number of cuts shown: 0..min(cuts, n_steps)."""
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
    p = probability(show, step, total)
    if show.draw == "rounded":
        return round(num * p)
    return int((rng.uniforms("hint", seed, step, row_id, shape=num) < p).sum())


def expected_share(show: Show, step: int, total: int, n_steps: int = 5) -> float:
    """E[k] / num at this step, for plots and dry runs."""
    num = min(show.cuts, n_steps)
    if step + 1 > hinted_steps(show, total) or num == 0:
        return 0.0
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
