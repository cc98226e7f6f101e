"""The study of ``theory.py`` over heights and branchings: medians, fits, table, figure and what they do not say."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unift import rng
from unift.commands import theory
from unift.commands.theory import METHODS, Floats

HEIGHTS = (2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 30, 40, 50, 60)
FIT_FROM = 10  # heights below are not yet in the asymptotic regime
RFT_LEAVES = 2.0**40  # RFT is drawn up to trees of this many leaves; beyond, its line only continues
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
RESAMPLES = 2000

CAVEATS = (
    "(a) The likelihood term is not what makes UFT polynomial: with beta = 0 it is polynomial as well, and the bound of "
    "theorem 4.3 still holds as beta goes to 0. What does it is starting from states of the annotated path. R3, which "
    "only resets (ordinary rollouts, no rollout per action), is polynomial too and, at these step sizes, cheaper.",
    "(b) SFT on the one annotated path solves this deterministic tree with zero reward queries. The figure is no "
    "argument against SFT.",
    "(c) The budget that theorem 4.3 guarantees is larger than B^H/4 until H is near 50 (B = 2). The curves are the "
    "practical algorithm (constant step size, stopped at the first policy that is good enough, with its pass@1 known "
    "rather than estimated), not the guarantee. For short trees (left of the crossover) RFT is the cheaper one.",
    "(d) There is later theory with other assumptions: 'Provable Benefit of Curriculum in Transformer Tree-Reasoning "
    "Post-Training' (arXiv 2511.07372) compares direct and curriculum post-training through the coverage of the next "
    "stage by the last, ||pi*/pi_ref||_inf.",
)


def study(
    branchings: Sequence[int],
    heights: Sequence[int],
    seeds: Sequence[int],
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Every method on every tree. JSON-ready: settings, one cell a (method, B, H) with the queries of each seed, fits."""
    started = time.perf_counter()
    cells: list[dict[str, Any]] = []
    for branching in branchings:
        for height in heights:
            for method in METHODS:
                if method.name == "rft" and float(branching) ** height > RFT_LEAVES:
                    continue
                found = theory.queries(method, branching, height, seeds)
                cells.append(
                    {
                        "method": method.name,
                        "branching": branching,
                        "height": height,
                        "median": float(np.median(found)),
                        "quantiles": dict(
                            zip(map(str, QUANTILES), np.quantile(found, QUANTILES, method="nearest").tolist())
                        ),
                        "queries": found.tolist(),
                    }
                )
        progress(f"B = {branching} done after {time.perf_counter() - started:.0f} s")
    trees = [
        {
            "branching": b,
            "height": h,
            "lower_bound": theory.lower_bound(b, h),
            "exhaustive": theory.exhaustive(b, h),
            "guarantee": theory.guarantee(b, h),
            "sft_steps": theory.sft_steps(b, h),
        }
        for b in branchings
        for h in heights
    ]
    settings = {
        "branchings": list(branchings),
        "heights": list(heights),
        "seeds": list(seeds),
        "eta": theory.ETA,
        "group": theory.GROUP,
        "rewards": [theory.WIN, theory.LOSE],
        "target": theory.TARGET,
        "betas": {m.name: m.beta for m in METHODS},
    }
    seconds = round(time.perf_counter() - started, 1)
    result = {"settings": settings, "seconds": seconds, "cells": cells, "trees": trees, "caveats": list(CAVEATS)}
    result["fits"] = [f for b in branchings for m in METHODS if (f := fit(result, m.name, b)) is not None]
    result["crossovers"] = {str(b): crossover(result, b) for b in branchings}
    return result


def curve(result: dict[str, Any], method: str, branching: int) -> tuple[list[int], Floats]:
    """(heights, queries [heights, S]) of a method, in order of height."""
    found = [c for c in result["cells"] if c["method"] == method and c["branching"] == branching]
    found.sort(key=lambda c: c["height"])
    return [c["height"] for c in found], np.array([c["queries"] for c in found])


def fit(result: dict[str, Any], method: str, branching: int) -> dict[str, Any] | None:
    """Growth of the median for H >= 10, by least squares; None with fewer than 3 such heights.

    RFT: slope of log_B(queries) per level (1 = multiplied by B with each level). The others: slope of log(queries)
    against log(H) (the exponent of a polynomial). 95 % interval: seeds resampled, 2000 times.
    """
    heights, queries = curve(result, method, branching)
    keep = [i for i, h in enumerate(heights) if h >= FIT_FROM]
    if len(keep) < 3:
        return None
    x = np.array([heights[i] for i in keep], dtype=float)
    exponential = method == "rft"
    if not exponential:
        x = np.log(x)
    queries = queries[keep]
    seeds = queries.shape[1]
    pick = rng.generator("theory-fit", method, branching).integers(seeds, size=(RESAMPLES, len(keep), seeds))
    resampled = np.median(np.take_along_axis(queries[None], pick, axis=2), axis=2)  # [RESAMPLES, heights]
    medians = np.concatenate([np.median(queries, axis=1)[None], resampled])
    y = np.log(medians) / (math.log(branching) if exponential else 1.0)
    slopes = (y - y.mean(1, keepdims=True)) @ (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    low, high = np.quantile(slopes[1:], [0.025, 0.975])
    return {
        "method": method,
        "branching": branching,
        "kind": "log_B per level" if exponential else "log-log",
        "heights": [heights[i] for i in keep],
        "slope": float(slopes[0]),
        "low": float(low),
        "high": float(high),
    }


def crossover(result: dict[str, Any], branching: int) -> int | None:
    """The smallest height of the grid from which on UFT (beta = 0) has the smaller median; None if it never has."""
    rft_heights, rft = curve(result, "rft", branching)
    uft_heights, uft = curve(result, "uft-0", branching)
    first = None
    for height, row in zip(rft_heights, rft):
        cheaper = np.median(uft[uft_heights.index(height)]) < np.median(row)
        first = (height if first is None else first) if cheaper else None
    return first


# ---------------------------------------------------------------------------------------------- table


def number(x: float) -> str:
    """16384 -> 16,384; 2.25 stays; from a million on two digits: 2.7e11."""
    if x >= 1e6:
        mantissa, exponent = f"{x:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def table(result: dict[str, Any]) -> str:
    """Markdown: a table for each branching, the fits, the crossovers and the caveats."""
    cells = {(c["method"], c["branching"], c["height"]): c for c in result["cells"]}
    seeds = len(result["settings"]["seeds"])
    lines = [
        f"Reward queries until pass@1 >= {theory.TARGET}, median over {seeds} seeds (10 % to 90 % quantile). SFT: gradient steps, "
        "0 reward queries."
    ]
    for branching in result["settings"]["branchings"]:
        labels = [m.label for m in METHODS]
        head = ["H", *labels, f"{branching}^H/4", "exhaustive", "guarantee", "SFT steps"]
        lines += [
            "",
            f"**B = {branching}**",
            "",
            "| " + " | ".join(head) + " |",
            "|---" + "|---:" * (len(head) - 1) + "|",
        ]
        for tree in (t for t in result["trees"] if t["branching"] == branching):
            row = [str(tree["height"])]
            for method in METHODS:
                cell = cells.get((method.name, branching, tree["height"]))
                if cell is None:
                    row.append("-")
                else:
                    q = cell["quantiles"]
                    row.append(f"{number(cell['median'])} ({number(q['0.1'])} to {number(q['0.9'])})")
            row += [number(tree[k]) for k in ("lower_bound", "exhaustive", "guarantee")] + [str(tree["sft_steps"])]
            lines.append("| " + " | ".join(row) + " |")
    lines += ["", f"Growth of the medians for H >= {FIT_FROM} (95 % interval, seeds resampled):", ""]
    label = {m.name: m.label for m in METHODS}
    for f in result["fits"]:
        text = f"{f['slope']:.2f} [{f['low']:.2f}, {f['high']:.2f}]"
        law = f"queries ~ {f['branching']}^({text} H)" if f["method"] == "rft" else f"queries ~ H^{text}"
        lines.append(
            f"- B = {f['branching']}, {label[f['method']]}: {law}, H = {f['heights'][0]} to {f['heights'][-1]}"
        )
    lines += ["", "Where UFT (beta = 0) becomes cheaper than RFT:", ""]
    for branching, height in result["crossovers"].items():
        where = f"from H = {height} on" if height else "not among these heights"
        lines.append(f"- B = {branching}: {where}")
    return "\n".join([*lines, "", "What the figure does not say:", "", *(f"- {c}" for c in result["caveats"])])


# ---------------------------------------------------------------------------------------------- figure

COLOURS = {"rft": "#555555", "r3": "#CC79A7", "uft-0": "#56B4E9", "uft": "#0072B2"}  # those of ``compare/plots.py``
MARKS = {"rft": "s", "r3": "^", "uft-0": "o", "uft": "o"}
TOP = 1e12


def figure(result: dict[str, Any], path: Path) -> None:
    """One panel a branching, log-log: a power of H is a straight line, B^H bends upwards."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, ScalarFormatter

    branchings = result["settings"]["branchings"]
    width = 1.2 + 4.1 * len(branchings)
    chart, axes = plt.subplots(
        1, len(branchings), figsize=(width, 5.6), sharey=True, squeeze=False, constrained_layout=True
    )
    handles: dict[str, Any] = {}
    for axis, branching in zip(axes[0], branchings):
        heights = np.array(result["settings"]["heights"], dtype=float)
        fine = np.linspace(heights.min(), heights.max(), 400)
        fine = fine[fine * math.log(branching) < math.log(TOP) + 3]
        bound = np.exp(fine * math.log(branching)) / 4
        (handles["lower bound for RFT, $B^H/4$"],) = axis.plot(fine, bound, color="#777777", lw=1.2, ls=(0, (4, 2)))
        (handles["exhaustive search, $(B^H+1)/2$"],) = axis.plot(fine, 2 * bound + 0.5, color="#777777", lw=1.2, ls=":")
        for method in METHODS:
            x, queries = curve(result, method.name, branching)
            low, mid, high = np.quantile(queries, [0.1, 0.5, 0.9], axis=1)
            colour = COLOURS[method.name]
            axis.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
            face = "white" if method.name == "uft-0" else colour
            style = {"color": colour, "marker": MARKS[method.name], "ms": 4.5, "mfc": face, "lw": 1.8}
            (handles[method.label],) = axis.plot(x, mid, **style)
        sft = {"color": "#D55E00", "lw": 1.8, "ls": (0, (1, 1))}
        handles["SFT on the annotated path: 0 queries (drawn at 1)"] = axis.axhline(1, **sft)
        _annotate(axis, result, branching)
        axis.set(xscale="log", yscale="log", ylim=(0.6, TOP), xlim=(heights.min() / 1.06, heights.max() * 1.06))
        ticks = [h for h in (2, 3, 4, 6, 10, 20, 30, 60) if heights.min() <= h <= heights.max()]
        axis.xaxis.set_major_locator(FixedLocator(ticks))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set(xlabel="height H of the tree", title=f"B = {branching} actions a node")
        axis.title.set_fontsize(11)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("reward queries until pass@1 reaches 1/2")
    order = [m.label for m in METHODS] + [k for k in handles if k not in {m.label for m in METHODS}]
    columns = 4 if len(branchings) > 1 else 2
    lines = [handles[k] for k in order]
    chart.legend(lines, order, loc="outside lower center", ncols=columns, frameon=False, fontsize=9.5)
    chart.suptitle(
        f"One rewarded leaf in $B^H$: starts on the annotated path make the cost polynomial in H "
        f"(median, and 10 to 90 % of {len(result['settings']['seeds'])} seeds)",
        fontsize=12,
    )
    chart.savefig(path, dpi=100)
    plt.close(chart)


def _annotate(axis: Any, result: dict[str, Any], branching: int) -> None:
    """Fitted exponents and the guarantee as text; the guarantee is far above every curve and gets no line."""
    fits = {f["method"]: f for f in result["fits"] if f["branching"] == branching}
    lines = [f"fitted for $H \\geq {FIT_FROM}$:"] if fits else []
    for name, text in (("rft", "RFT"), ("uft-0", "UFT, beta = 0"), ("uft", "UFT, beta = 0.001"), ("r3", "R3")):
        if name in fits:
            power = (
                f"{branching}^{{{fits[name]['slope']:.2f}\\,H}}"
                if name == "rft"
                else f"H^{{{fits[name]['slope']:.2f}}}"
            )
            lines.append(f"{text} ~ ${power}$")
    tree = max((t for t in result["trees"] if t["branching"] == branching), key=lambda t: t["height"])
    mantissa, exponent = number(tree["guarantee"]).split("e")
    lines += ["", f"UFT at H = {tree['height']} is guaranteed"]
    lines += [f"within ${mantissa}\\cdot 10^{{{exponent}}}$, about $H^5$", "(theorem 4.3, not drawn)"]
    axis.text(0.03, 0.98, "\n".join(lines), transform=axis.transAxes, va="top", fontsize=9, linespacing=1.35)


def run(
    out: Path,
    branchings: Sequence[int],
    heights: Sequence[int],
    seeds: Sequence[int],
    progress: Callable[[str], None] = lambda text: None,
) -> str:
    """Study, then write ``theory.json``, ``table.md`` and ``theory.png`` into ``out``; returns the table."""
    result = study(branchings, heights, seeds, progress)
    out.mkdir(parents=True, exist_ok=True)
    text = table(result)
    (out / "theory.json").write_text(json.dumps(result) + "\n")
    (out / "table.md").write_text(text + "\n")
    figure(result, out / "theory.png")
    return text
