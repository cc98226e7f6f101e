"""Several runs as a page: the table with intervals, the curves of all methods, and each run in short."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

import numpy as np

from unift.commands import display
from unift.commands.compare.plots import COLOURS, over_seeds, series
from unift.commands.compare.table import accuracy_of, reading
from unift.commands.report import cards, sections, words
from unift.commands.report.charts import Line, Look, chart
from unift.commands.report.diagnosis import percent
from unift.commands.report.gather import RunData
from unift.commands.report.markup import Content, Html, document, fold, footer, table, tag

RUNS = 24  # with curves of their own; later ones are in the table and the shared curves only
NAMED = ("uft", "sft", "sft-rft", "r3", "uft-paper", "stage", "rft")  # c1 ... c7, the hues of plots.COLOURS
SPARE = 2  # more hues, c8 and c9; others take those of methods that are not there
assert set(NAMED) == set(COLOURS)


def comparison_page(name: str, runs: Sequence[RunData]) -> str:
    methods = list(dict.fromkeys(run.arm for run in runs))
    colours = {m: _colour(m, methods) for m in methods}
    blocks = [
        tag("h1", f"Comparison: {name}", " ", _badge(runs)),
        tag("p", _lead(runs, methods), cls="lead"),
        tag(
            "section",
            tag("h2", "What came out"),
            _bars(runs, methods),
            _table(runs, methods),
            _readings(runs),
            id="numbers",
        ),
        tag("section", tag("h2", "Curves"), sections.grid(_curves(runs, methods, colours)), id="curves"),
        tag("section", tag("h2", "Runs"), [_run(run) for run in runs[:RUNS]], _beyond(runs), id="runs"),
    ]
    remarks: list[Content] = [f"{run.name}: {remark}" for run in runs for remark in run.remarks]
    return document(f"Comparison: {name}", blocks, footer(name, remarks))


def _badge(runs: Sequence[RunData]) -> Html:
    done = sum(bool(run.result) for run in runs)
    return tag("span", f"{done} of {len(runs)} runs finished", cls="badge good" if done == len(runs) else "badge watch")


def _lead(runs: Sequence[RunData], methods: Sequence[str]) -> str:
    seeds = sorted({run.settings.get("seed", 0) for run in runs})
    first = runs[0]
    model, what = (first.settings.get("model") or {}).get("path", "one model"), words.subject(first.settings)
    return (
        f"{', '.join(methods)} on {what} from {model}; {len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'}, "
        f"{len(runs)} runs. Methods may differ in their number of steps: curves are over the share of a run's own steps."
    )


def _colour(method: str, methods: Sequence[str]) -> str:
    if method in NAMED:
        return f"c{NAMED.index(method) + 1}"
    free = [*range(8, 8 + SPARE), *(i for i, name in enumerate(NAMED, 1) if name not in methods)]
    others = [m for m in methods if m not in NAMED]
    return f"c{free[others.index(method) % len(free)]}"


# ---------------------------------------------------------------------------------------------- numbers


def _measured(runs: Sequence[RunData], method: str) -> list[dict[str, Any]]:
    return [dict(r.result) for r in runs if r.arm == method and r.result and r.result.get("test")]


def _bars(runs: Sequence[RunData], methods: Sequence[str]) -> Html | None:
    base = next((run.base for run in runs if run.base), None)
    rows = [sections.bar("base", base, True)] if base else []
    for method in methods:
        results = _measured(runs, method)
        if results:
            accuracy, low, high = accuracy_of(results)
            rows.append(sections.bar(method, {"accuracy": accuracy, "low": low, "high": high}))
    if not rows:
        return None
    note = (
        "Accuracy on held-out rows without hints, mean over seeds. Bar: 95 % interval, Student's t over seeds and never narrower "
        "than Wilson's over rows."
    )
    return Html(tag("div", rows, cls="bars") + tag("p", note, cls="note"))


def _table(runs: Sequence[RunData], methods: Sequence[str]) -> Html | None:
    rows: list[list[Content]] = []
    for method in methods:
        results = [dict(r.result) for r in runs if r.arm == method and r.result]
        measured = _measured(runs, method)
        each = " ".join(f"{100 * r['test']['accuracy']:.1f}" for r in measured) or "-"
        fits = [r["train"]["accuracy"] for r in results if r.get("train")]
        row: list[Content] = [method, f"{len(results)}", each, percent(mean(fits)) if fits else "-"]
        for name, text in (
            ("tokens_sampled", words.count),
            ("tokens_trained", words.count),
            ("seconds", display.duration),
        ):
            values = [float(r[name]) for r in results if name in r]
            row.append(text(mean(values)) if values else "-")
        rows.append(row)
    head = ["method", "seeds", "held-out % of each seed", "training rows", "tokens sampled", "tokens trained", "time"]
    return table(head, rows, numeric=range(3, 7))


def _readings(runs: Sequence[RunData]) -> Html | None:
    results = [dict(r.result) | {"method": r.arm} for r in runs if r.result and r.result.get("test")]
    return tag("ul", [tag("li", line) for line in reading(results)], cls="findings") if results else None


# ---------------------------------------------------------------------------------------------- curves


def _curves(runs: Sequence[RunData], methods: Sequence[str], colours: dict[str, str]) -> list[Html]:
    several = any(sum(r.arm == m for r in runs) > 1 for m in methods)
    shade = "Mean over seeds; shaded: their range." if several else ""
    found: list[Html | None] = []
    options: dict[str, Any]
    for name, title, unit, options in (
        ("eval/test/accuracy", "Accuracy without hint", 100.0, {"unit": "%", "limits": (0, 100)}),
        ("reward", "Reward while training, hints included", 1.0, {"limits": (0, 1)}),
        ("hint/fraction", "Share of the solution that is shown", 100.0, {"unit": "%", "limits": (0, 100)}),
        ("entropy", "Entropy", 1.0, {"unit": "nats", "limits": (0, 0)}),
    ):
        share = 0.0 if name == "eval/test/accuracy" else 0.03
        lines = [_mean_line(runs, m, name, unit, colours[m], share) for m in methods]
        drawn = [line for line in lines if line is not None]
        found.append(chart(title, drawn, Look(total=100, xlabel="share of the run's steps, %", note=shade, **options)))
    return [c for c in found if c is not None]


def _mean_line(runs: Sequence[RunData], method: str, name: str, unit: float, colour: str, share: float) -> Line | None:
    """Mean and range over the seeds, where every one of them has the metric."""
    metrics = [r.metrics for r in runs if r.arm == method and len(series(r.metrics, name)[0])]
    grid = np.linspace(0, 100, 201)
    values = unit * over_seeds(metrics, name, grid, share)
    if not len(values):
        return None
    inside = np.isfinite(values).all(0)
    x, values = grid[inside], values[:, inside]
    band = (values.min(0), values.max(0)) if len(values) > 1 else (None, None)
    return Line(method, colour, x, values.mean(0), low=band[0], high=band[1])


# ---------------------------------------------------------------------------------------------- each run


def _run(run: RunData) -> Html:
    kind, text = words.state(run)
    test = (run.result or {}).get("test")
    outcome = f"{percent(test['accuracy'])} held-out, {text}" if test else text
    charts = [sections.accuracy_chart(run), sections.reward_chart(run), sections.hint_chart(run)]
    return fold(
        [run.name, tag("small", outcome)],
        tag("p", words.sentence(run)),
        sections.readings(run),
        sections.grid(c for c in charts if c is not None),
        cards.rollouts(run, cards.PAGE // RUNS),
        tag("p", "All of it: ", tag("code", f"unift report {run.folder}"), cls="note"),
    )


def _beyond(runs: Sequence[RunData]) -> Html | None:
    if len(runs) <= RUNS:
        return None
    text = f"{len(runs) - RUNS} more runs are in the table and the curves above only, to keep this page small."
    return tag("p", text, cls="note")
