"""The settings of one step: weights that change over a run, as pure functions of the step and of its own groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from unift import hints, words
from unift.config import Config, Phase
from unift.types import Group

S = TypeVar("S", bound=Config | Phase)


def entropy(groups: Sequence[Group]) -> float:
    """Mean entropy of the policy over the sampled tokens, estimated without bias by the mean of -log pi of the samples.

    Known before anything is packed, so it depends neither on the cut into micro-batches nor on the process count.
    """
    logps = [l for g in groups for s in g.samples for l in s.logps]
    return -sum(logps) / len(logps) if logps else 0.0


def likelihood_weight(settings: Config | Phase, step: int, total: int) -> float:
    """constant; cosine: from weight to final over the first share ``until`` of the steps (CHORD's mu); hint: weight
    times p(t) / high, which falls and ends with the hints."""
    return ANNEALINGS[settings.likelihood.schedule](settings, step, total)


def _cosine(settings: Config | Phase, step: int, total: int) -> float:
    s = settings.likelihood
    done = min(step / max(s.until * total, 1), 1.0)
    return s.final + (s.weight - s.final) / 2 * (1 + math.cos(math.pi * done))


def _hint(settings: Config | Phase, step: int, total: int) -> float:
    return settings.likelihood.weight * hints.probability(settings.show, step, total) / settings.show.high


ANNEALINGS: Mapping[words.AnnealingName, Callable[[Config | Phase, int, int], float]] = {
    "constant": lambda settings, step, total: settings.likelihood.weight,
    "cosine": _cosine,
    "hint": _hint,
}


def at(settings: S, step: int, total: int, groups: Sequence[Group]) -> S:
    """Settings with this step's numbers in place of their schedules. ``step`` counts from 0 within the phase."""
    likelihood, credit = settings.likelihood, settings.credit
    weight, positive = likelihood_weight(settings, step, total), credit.positive
    if likelihood.entropy or credit.positive_entropy:
        h = entropy(groups)
        weight *= math.exp(likelihood.entropy * h)
        positive *= math.exp(credit.positive_entropy * h)
    if (weight, positive) == (likelihood.weight, credit.positive):
        return settings
    return settings.model_copy(
        update={
            "likelihood": likelihood.model_copy(update={"weight": weight}),
            "credit": credit.model_copy(update={"positive": positive}),
        }
    )


def one_update(settings: S) -> S:
    return settings.model_copy(update={"train": settings.train.model_copy(update={"updates": 1, "epochs": 1})})
