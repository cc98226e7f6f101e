"""One budget for several methods: sampled tokens, trained tokens or seconds of training, turned into a number of steps.

Schedules (hints, learning rate, phases) are functions of step / steps, so a method must know its steps before it begins.
A probe runs the method's whole schedule in a small share of its steps, and its mean cost of a step gives the rest. What a
run then really used is in the table beside the budget, since a cost may change with what the model learns.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from unift.config.sections import Config
from unift.config.stages import stages
from unift.types import ConfigError

FOLDER = "probes"
KINDS = ("sampled", "trained", "seconds")
PROBE_SHARE, PROBE_STEPS = 0.05, 20  # of the method's own steps, and at least so many
MOST = 20  # times the method's own steps: where a step costs next to nothing, a budget says nothing
UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9}


@dataclass(frozen=True)
class Budget:
    """``amount`` tokens (sampled, trained), or seconds of training steps; evaluations and checkpoints are not counted."""

    kind: str
    amount: float

    def __str__(self) -> str:
        return f"{self.kind}={self.amount:g}"

    def used(self, result: dict[str, Any]) -> float:
        return result["seconds_training"] if self.kind == "seconds" else result[f"tokens_{self.kind}"]


def parse(text: str) -> Budget:
    """ "sampled=2M", "trained=500k" or "seconds=60"."""
    found = re.fullmatch(r"\s*([a-z]+)\s*=\s*([0-9.]+(?:e[0-9]+)?)\s*([kmb]?)\s*", text.lower())
    try:
        if found is None or found[1] not in KINDS:
            raise ValueError
        amount = float(found[2]) * UNITS[found[3]]
        if not amount > 0:
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"--budget {text!r}: expected sampled=TOKENS, trained=TOKENS or seconds=SECONDS, more than 0, as in sampled=2M"
        ) from None
    return Budget(found[1], amount)


def probe_steps(config: Config) -> int:
    """Steps of the probe: a share of the method's, with a step for every phase."""
    least = max([PROBE_STEPS, *(round(2 / phase.share) for phase in config.phases)])
    return min(config.train.steps, max(round(PROBE_SHARE * config.train.steps), least))


def steps_for(budget: Budget, probe: dict[str, Any], own: int) -> int:
    """Steps that use up the budget at the probe's mean cost of a step.

    ``own``: the method's own steps. They stay where a step costs nothing (supervised methods sample no tokens), and
    MOST times them is the limit.
    """
    cost = budget.used(probe) / probe["steps"]
    if cost <= 0:
        return own
    return min(max(round(budget.amount / cost), 1), MOST * own)


def probe(settings: Sequence[str], config: Config) -> list[str]:
    """Settings of the probe: few steps, and evaluations at its end only."""
    return [*settings, f"train.steps={probe_steps(config)}", "eval.every=0", "save.every=0"]


def spend(budget: Budget, cost: dict[str, Any], config: Config) -> list[str]:
    """Settings that make a run use up the budget. It is evaluated as often as it would have been."""
    own, every = config.train.steps, config.eval.every
    steps = steps_for(budget, cost, own)
    stages(config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})}))  # fits phases?
    return [f"train.steps={steps}", f"eval.every={max(round(every * steps / own), 1) if every else 0}"]


def note(budget: Budget, results: Sequence[dict[str, Any]]) -> str:
    """A sentence that names the methods whose runs used more or less than they were given."""
    used: dict[str, list[float]] = {}
    for r in results:
        used.setdefault(r["method"], []).append(budget.used(r) / budget.amount)
    means = {m: sum(shares) / len(shares) for m, shares in used.items()}
    far = [f"{m} {100 * share:.0f} %" for m, share in means.items() if not 0.9 <= share <= 1.1]
    text = f"Budget of a run: {budget}. "
    return text + (f"Used, where not within 10 %: {', '.join(far)}." if far else "All runs used it within 10 %.")
