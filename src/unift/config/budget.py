"""A budget of a run: so many sampled or trained tokens, or seconds of training steps. Plain data and words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unift.types import ConfigError

KINDS = ("sampled", "trained", "tokens", "seconds")
MOST = 20  # times the method's own steps: where a step costs next to nothing, a budget says nothing
UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9}


@dataclass(frozen=True)
class Budget:
    """``amount`` tokens (sampled, trained, or "tokens": both added up), or seconds of training steps; evaluations and
    checkpoints are not counted."""

    kind: str
    amount: float

    def __str__(self) -> str:
        return f"{self.kind}={self.amount:g}"

    def used(self, result: Mapping[str, Any]) -> float:
        """Of a result, what it counts."""
        if self.kind == "tokens":
            return result["tokens_sampled"] + result["tokens_trained"]
        return result["seconds_training"] if self.kind == "seconds" else result[f"tokens_{self.kind}"]

    def counts(self, completions: int) -> bool:
        """Whether a step with so many completions a prompt can cost anything."""
        return self.kind != "sampled" or completions > 0


def parse(text: str, name: str = "--budget") -> Budget:
    """ "sampled=2M", "trained=500k", "tokens=1M" or "seconds=60". ``name``: of the option or setting, for messages."""
    found = re.fullmatch(r"\s*([a-z]+)\s*=\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([kmb]?)\s*", text.lower())
    try:
        if found is None or found[1] not in KINDS:
            raise ValueError
        amount = float(found[2]) * UNITS[found[3]]
        if not amount > 0:
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"{name} {text!r}: expected sampled=TOKENS, trained=TOKENS, tokens=TOKENS (both added up) or seconds=SECONDS, "
            "more than 0, as in sampled=2M"
        ) from None
    return Budget(found[1], amount)
