"""The rules of one step: weights that change over a run, as pure functions of the step and of its own groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from unift.config import words
from unift.config.sections import Rules
from unift.hints import schedules
from unift.types import Group


def entropy(groups: Sequence[Group]) -> float:
    """Mean entropy of the policy that sampled, over the sampled tokens, estimated without bias by the mean of -log pi of these.

    Known before anything is packed, so it depends neither on the cut into micro-batches nor on the process count.
    """
    logps = [l for g in groups for s in g.samples for l in s.logps]
    return -sum(logps) / len(logps) if logps else 0.0


def likelihood_weight(rules: Rules, step: float, total: int) -> float:
    """constant; cosine: from weight to final over the first share ``until`` of the steps (CHORD's mu); hint: weight
    times p(t) / high, which falls and ends with the hints."""
    return ANNEALINGS[rules.likelihood.schedule](rules, step, total)


def _cosine(rules: Rules, step: float, total: int) -> float:
    s = rules.likelihood
    done = min(step / max(s.until * total, 1), 1.0)
    return s.final + (s.weight - s.final) / 2 * (1 + math.cos(math.pi * done))


def _hint(rules: Rules, step: float, total: int) -> float:
    high = rules.show.high
    return rules.likelihood.weight * schedules.probability(rules.show, step, total) / high if high else 0.0


ANNEALINGS: Mapping[words.AnnealingName, Callable[[Rules, float, int], float]] = {
    "constant": lambda rules, step, total: rules.likelihood.weight,
    "cosine": _cosine,
    "hint": _hint,
}


def at(rules: Rules, step: float, total: int, groups: Sequence[Group]) -> Rules:
    """Settings with this step's numbers in place of their schedules. ``step`` counts from 0 within the phase."""
    likelihood, credit = rules.likelihood, rules.credit
    weight, positive = likelihood_weight(rules, step, total), credit.positive
    if likelihood.entropy or credit.positive_entropy:
        h = entropy(groups)
        weight *= math.exp(likelihood.entropy * h)
        positive *= math.exp(credit.positive_entropy * h)
    if (weight, positive) == (likelihood.weight, credit.positive):
        return rules
    return rules.model_copy(
        update={
            "likelihood": likelihood.model_copy(update={"weight": weight}),
            "credit": credit.model_copy(update={"positive": positive}),
        }
    )


def one_update(rules: Rules) -> Rules:
    return rules.model_copy(update={"train": rules.train.model_copy(update={"updates": 1, "epochs": 1})})
