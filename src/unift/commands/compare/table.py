"""Results of runs as numbers and words: a table, a reading in plain language. No torch, no files."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from unift.commands.compare.budget import shares
from unift.config.budget import Budget
from unift.intervals import interval, wilson

Result = dict[str, Any]  # result.json of a run


def accuracy_of(runs: Sequence[Result]) -> tuple[float, float, float]:
    """(mean held-out accuracy, low, high). 95 %: Student's t over seeds, and never narrower than Wilson's over rows.

    All seeds answer the same rows, so equal accuracies on every seed are no proof of an exact number.
    """
    values = [r["test"]["accuracy"] for r in runs]
    low, high = wilson(mean(values) * runs[0]["test"]["n"], runs[0]["test"]["n"])
    if len(values) > 1:
        below, above = interval(values)
        low, high = min(low, below), max(high, above)
    return mean(values), low, high


def by_method(results: Sequence[Result]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for r in results:
        groups.setdefault(r["method"], []).append(r)
    return {method: sorted(runs, key=lambda r: r["seed"]) for method, runs in groups.items()}


def tokens(runs: Sequence[Result], name: str) -> str:
    """Mean count of the runs, in millions from ten thousand on."""
    count = mean(r[name] for r in runs)
    return f"{count / 1e6:.2f} M" if count >= 1e4 else f"{count:.0f}"


def table(results: Sequence[Result], budget: Budget | None = None) -> str:
    """Markdown: one line a method. Accuracy in %, without hints; means over seeds; 95 % intervals (`accuracy_of`).

    ``budget``: of every run; a column says which share of it was used, in %."""
    head = [
        *("method", "seeds", "held-out %", "95 % interval", "each seed", "training rows %"),
        *("tokens sampled", "tokens trained", "seconds"),
    ]
    used = shares(budget, results) if budget else {}
    head += ["used %"] if budget else []
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    base = next((r["base"] for r in results if r.get("base")), None)
    if base:
        span = f"{100 * base['low']:.1f} to {100 * base['high']:.1f}"
        lines.append(f"| base | - | {100 * base['accuracy']:.1f} | {span} |" + " - |" * (len(head) - 4))
    for method, runs in by_method(results).items():
        measured = [r for r in runs if r.get("test")]
        held_out, each = "- | -", "-"
        if measured:
            accuracy, low, high = accuracy_of(measured)
            held_out = f"{100 * accuracy:.1f} | {100 * low:.1f} to {100 * high:.1f}"
            each = " ".join(f"{100 * r['test']['accuracy']:.1f}" for r in measured)
        fits, seconds = [r["train"]["accuracy"] for r in runs if r.get("train")], mean(r["seconds"] for r in runs)
        fit = f"{100 * mean(fits):.1f}" if fits else "-"
        lines.append(
            f"| {method} | {len(runs)} | {held_out} | {each} | {fit} "
            f"| {tokens(runs, 'tokens_sampled')} | {tokens(runs, 'tokens_trained')} | {seconds:.0f} |"
            + (f" {100 * used[method]:.1f} |" if budget else "")
        )
    return "\n".join(lines)


def reading(results: Sequence[Result]) -> list[str]:
    """A line each for RFT, SFT and UFT, computed from the numbers and true whichever way they fall."""
    groups = by_method([r for r in results if r.get("test")])
    lines = []
    if "rft" in groups:
        lines.append(_read_rft(groups["rft"]))
    if "sft" in groups:
        lines.append(_read_sft(groups["sft"]))
    main = next((m for m in ("uft", "uft-paper") if m in groups), None)
    if main:
        lines.append(_read_uft(main, groups))
    return lines


def _name(method: str) -> str:
    return method.upper() if len(method) <= 3 else method


def _percent(share: float) -> str:
    """Small shares keep a digit that is not 0."""
    return f"{100 * share:.1f} %" if share == 0 or share >= 0.001 else f"{100 * share:.1g} %"


def _read_rft(runs: Sequence[Result]) -> str:
    accuracy, low, _ = accuracy_of(runs)
    head = f"RFT: {_percent(accuracy)} on held-out rows"
    seen, sampled = (sum(r.get(name, 0) for r in runs) for name in ("reward_seen", "completions"))
    if not sampled:
        return f"{head}; {seen:,} of its completions earned the reward."
    base = next((r["base"] for r in runs if r.get("base")), None)
    moved = base is None or low > base["high"]
    earned = f"{seen:,} of its {sampled:,} completions ({_percent(seen / sampled)}) earned the reward"
    if moved:
        return f"{head}; {earned}, which was enough to learn from."
    if seen / sampled < 0.01:
        return f"{head}; {earned}, so it had almost nothing to learn from."
    return f"{head}; {earned}, yet it did not measurably leave the base."


def _read_sft(runs: Sequence[Result]) -> str:
    accuracy, _, high = accuracy_of(runs)
    if not all(r.get("train") for r in runs):
        return f"SFT: {_percent(accuracy)} on held-out rows; its training rows were not evaluated."
    fit, n = mean(r["train"]["accuracy"] for r in runs), runs[0]["train"]["n"]
    head = f"SFT: {_percent(fit)} on its training rows (n = {n}), {_percent(accuracy)} on held-out rows"
    if fit > high:
        return f"{head}: it knows its rows {100 * (fit - accuracy):.0f} points better than the problem behind them."
    return f"{head}, no measurable gap."


def _read_uft(main: str, groups: dict[str, list[Result]]) -> str:
    """Against the best of all other methods; and against SFT, where SFT is not the best."""
    accuracy, low, high = accuracy_of(groups[main])
    head = f"{_name(main)}: {_percent(accuracy)} on held-out rows without hints"
    rivals = {m: accuracy_of(runs) for m, runs in groups.items() if m != main}
    if not rivals:
        return f"{head}; nothing else was trained beside it."

    def against(name: str) -> str:
        other, other_low, other_high = rivals[name]
        lead = 100 * (accuracy - other)
        if abs(lead) < 0.05:
            return f"level with {_name(name)}"
        apart = low > other_high or high < other_low
        sure = "intervals do not overlap" if apart else "but the intervals overlap"
        return f"{'ahead of' if lead > 0 else 'NOT ahead: behind'} {_name(name)} by {abs(lead):.1f} points, {sure}"

    best = max(rivals, key=lambda m: rivals[m][0])
    verdicts = [against(best) + (" (the best of the others)" if len(rivals) > 1 else "")]
    if best != "sft" and "sft" in rivals:
        verdicts.append(against("sft"))
    return f"{head}; {'; '.join(verdicts)}."
