"""What a person should notice in a run's numbers, in plain words. Each line states its figure; none guesses a cause."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unift.commands.report.charts import series
from unift.commands.report.diagnosis import GOOD, MOST, PLAIN, WATCH, at_end, best_evaluation, causes, latest, percent
from unift.commands.report.gather import RunData


def findings(run: RunData) -> list[tuple[str, str]]:
    """(kind, sentence) of each finding, the outcome first."""
    held = [(WATCH, cause.text) for cause in causes(run)]
    return [f for f in [_outcome(run), *held, *details(run)] if f is not None]


def details(run: RunData) -> list[tuple[str, str]]:
    """What the first screen (`diagnosis`) does not say."""
    return [f for f in [*_learning(run), *_update(run), *_speed(run)] if f is not None]


def _outcome(run: RunData) -> tuple[str, str] | None:
    now, base = latest(run), run.base
    if now is None or base is None:
        return (
            PLAIN,
            "There are no held-out rows (data.test), so what was learned beyond the training rows is not known.",
        )
    after, step = now
    gain = 100 * (after["accuracy"] - base["accuracy"])
    text = (
        f"Accuracy on {after['n']} held-out rows, without a hint: {percent(base['accuracy'])} before, "
        f"{percent(after['accuracy'])} after {step:,} steps ({gain:+.1f} points). "
    )
    if after["low"] > base["high"]:
        return GOOD, text + "The 95 % intervals do not overlap: this is a gain, not noise."
    if after["high"] < base["low"]:
        return WATCH, text + "The 95 % intervals do not overlap: the model got worse."
    return PLAIN, text + "The 95 % intervals overlap: with so many rows this is no measured change."


def _learning(run: RunData) -> list[tuple[str, str] | None]:
    found: list[tuple[str, str] | None] = []
    best = best_evaluation(run)
    if best is not None and len(series(run.metrics, "eval/test/accuracy")[0]) > 2:
        found.append(
            (WATCH, f"The best evaluation, {percent(best[0])} at step {best[1]:,}, is beyond the interval of the last one. "
             "checkpoints/best names the best of the checkpoints that were saved.")
        )  # fmt: skip
    flat, wrong, right = (at_end(run, n) for n in ("frac_reward_zero_std", "groups/all_wrong", "groups/all_right"))
    if flat is not None and wrong is not None and right is not None and flat > MOST:
        cause = (
            "mostly since every completion was right" if right > wrong else "mostly since every completion was wrong"
        )
        done = right > wrong and right > MOST
        found.append(
            (PLAIN if done else WATCH, f"In the last tenth of the steps {percent(flat)} of the groups had equal scores and so "
             f"no advantage, {cause}.")
        )  # fmt: skip
    hint = at_end(run, "hint/fraction")
    sampled = at_end(run, "reward") is not None
    if hint is not None and sampled and run.result and hint > 0.02:
        found.append((PLAIN, f"Hints were still shown at the end ({percent(hint)} of the solution on average): "
                             "the reward curve includes their help, the held-out accuracy does not."))  # fmt: skip
    return found


def _update(run: RunData) -> list[tuple[str, str] | None]:
    found: list[tuple[str, str] | None] = []
    x, cosine = series(run.metrics, "grad/cosine")
    own, other = series(run.metrics, "grad/policy_norm")[1], series(run.metrics, "grad/hint_norm")[1]
    if len(cosine) and len(own) == len(other) == len(cosine):
        both = (own > 0) & (other > 0)
        if both.sum() >= 3:
            against = float(np.mean(cosine[both] < 0))
            found.append(
                (PLAIN, f"The gradients of reward and hints pulled against each other (cosine below 0) in {percent(against)} of "
                 f"{both.sum()} measured steps where both were at work; mean cosine {np.mean(cosine[both]):+.2f}.")
            )  # fmt: skip
    return found


def _speed(run: RunData) -> list[tuple[str, str] | None]:
    spent = time_spent(run.metrics)
    if not spent:
        return []
    total = sum(spent.values())
    parts = sorted(spent.items(), key=lambda p: -p[1])[:3]
    text = "Time went to " + ", ".join(f"{name} {percent(s / total)}" for name, s in parts)
    shared = series(run.metrics, "tokens/shared_ratio")[1]
    if len(shared) and shared.mean() > 0.005:
        text += (
            f"; computing prompt and hint once a group saved {percent(float(shared.mean()))} of the tokens of an update"
        )
    return [(PLAIN, text + ".")]


PARTS = ("generate", "score", "reference", "update", "save", "wait")
OTHER = "other in a step"
BETWEEN = "evaluations and checkpoints"


def time_spent(metrics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of each part over the whole run, only parts that took any; the rest of a step and between steps apart."""
    spent = {part: float(series(metrics, f"time/{part}")[1].sum()) for part in PARTS}
    steps = float(series(metrics, "time/step")[1].sum())
    elapsed = series(metrics, "time/elapsed")[1]
    spent[OTHER] = steps - sum(spent.values())
    spent[BETWEEN] = float(elapsed[-1]) - steps if len(elapsed) else 0.0
    whole = sum(max(s, 0.0) for s in spent.values())
    return {part: s for part, s in spent.items() if whole and s > 0.001 * whole}
