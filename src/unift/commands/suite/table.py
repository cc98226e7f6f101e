"""Accuracies of a suite's columns with intervals, as numbers and as tables. No torch at import."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from unift.commands.suite.columns import Problems
from unift.intervals import wilson

Record = Mapping[str, Any]
Measured = Mapping[str, float]


def measured(problems: Problems, records: Mapping[str, Sequence[Record]], samples: int, seed: int) -> dict[str, Any]:
    """Result of a suite from the records of its columns."""
    columns = {name: _column(problems.titles[name], found, samples, seed) for name, found in records.items()}
    return {
        "columns": columns,
        "average": average(list(columns.values())),
        "missing": list(problems.missing),
        "notes": list(problems.notes),
    }


def _column(title: str, records: Sequence[Record], samples: int, seed: int) -> dict[str, Any]:
    """Greedy accuracy with Wilson's interval, pass@k with a bootstrap's, and what became of all answers."""
    n, greedy = len(records), [r["greedy"] for r in records]
    right = sum(a["right"] for a in greedy)
    low, high = wilson(right, n)
    found: dict[str, Any] = {"title": title, "accuracy": right / n, "low": low, "high": high, "n": n}
    if samples:
        from unift.training.evaluate import Answers, curve

        found["pass@k"] = curve([sum(a["right"] for a in r["samples"]) for r in records], Answers(samples, seed))
    found["no_answer"] = sum(bool(a.get("no_answer")) for a in greedy) / n
    found["cut"] = sum(not a["finished"] for a in greedy) / n
    found["tokens"] = mean(a["tokens"] for a in greedy)
    found["failed_scores"] = sum("error" in a for r in records for a in (r["greedy"], *r["samples"]))
    return found


def average(columns: Sequence[Measured]) -> dict[str, float]:
    """Mean of the columns, each with the same weight. 95 % interval from the columns' own, which are independent: the
    distances to their limits add up in squares (MOVER; Zou and Donner 2008, for a sum of shares)."""
    k, middle = len(columns), mean(c["accuracy"] for c in columns)
    below = math.sqrt(sum((c["accuracy"] - c["low"]) ** 2 for c in columns)) / k
    above = math.sqrt(sum((c["high"] - c["accuracy"]) ** 2 for c in columns)) / k
    return {"accuracy": middle, "low": max(middle - below, 0.0), "high": min(middle + above, 1.0)}


def text_of(result: Mapping[str, Any]) -> str:
    """Markdown of one model: a line a column, in %, and what was left out."""
    columns: Mapping[str, Mapping[str, Any]] = result["columns"]
    ks = list(next(iter(columns.values())).get("pass@k", {}))
    head = ["column", "rows", "greedy %", "95 % interval", *ks, "no answer %", "cut %", "failed scores"]
    lines = [line(head), line(["---"] * len(head))]
    for c in columns.values():
        passed = [shown(c["pass@k"][k]) for k in ks]
        shares = [f"{100 * c[name]:.1f}" for name in ("no_answer", "cut")]
        lines.append(line([c["title"], str(c["n"]), *_both(c), *passed, *shares, str(c["failed_scores"])]))
    lines.append(line(["average", "", *_both(result["average"]), *[""] * (len(ks) + 3)]))
    notes = [f"No rows, left out: {', '.join(result['missing'])}."] if result["missing"] else []
    notes += [f"{note}." for note in result["notes"]]
    return "\n".join([*lines, "", *notes]).rstrip()


def _both(a: Measured) -> list[str]:
    return [f"{100 * a['accuracy']:.2f}", f"{100 * a['low']:.2f} to {100 * a['high']:.2f}"]


def shown(a: Measured) -> str:
    return f"{100 * a['accuracy']:.2f} [{100 * a['low']:.1f}, {100 * a['high']:.1f}]"


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
