"""One budget for several methods: every run goes on until it has used it (``train.budget``), and a sentence says how well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from unift.config.budget import Budget


def shares(budget: Budget, results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """By method, the mean share of the budget that its runs used; 1 is all of it."""
    used: dict[str, list[float]] = {}
    for r in results:
        used.setdefault(r["method"], []).append(budget.used(r) / budget.amount)
    return {method: sum(values) / len(values) for method, values in used.items()}


def note(budget: Budget, results: Sequence[dict[str, Any]]) -> str:
    """A sentence that names the methods whose runs used more or less than they were given."""
    far = [f"{m} {100 * share:.0f} %" for m, share in shares(budget, results).items() if not 0.9 <= share <= 1.1]
    text = f"Budget of a run: {budget}. "
    return text + (f"Used, where not within 10 %: {', '.join(far)}." if far else "All runs used it within 10 %.")
