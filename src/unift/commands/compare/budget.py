"""One budget for several methods: every run goes on until it has used it (``train.budget``), and a sentence says how well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from unift.config.budget import Budget


def note(budget: Budget, results: Sequence[dict[str, Any]]) -> str:
    """A sentence that names the methods whose runs used more or less than they were given."""
    used: dict[str, list[float]] = {}
    for r in results:
        used.setdefault(r["method"], []).append(budget.used(r) / budget.amount)
    means = {m: sum(shares) / len(shares) for m, shares in used.items()}
    far = [f"{m} {100 * share:.0f} %" for m, share in means.items() if not 0.9 <= share <= 1.1]
    text = f"Budget of a run: {budget}. "
    return text + (f"Used, where not within 10 %: {', '.join(far)}." if far else "All runs used it within 10 %.")
