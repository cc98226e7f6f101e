"""Line charts as inline SVG that takes its colours from the page, so that one file reads well in light and in dark."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unift.commands.compare.plots import smooth
from unift.commands.report.markup import Html, tag

Metrics = Sequence[Mapping[str, Any]]
POINTS = 400  # of a line; longer runs are averaged over equal stretches of steps

# Placeholders that matplotlib writes into the SVG -> what the page's style sheet defines.
TEXT, FAINT, GRID = "#010101", "#020202", "#030303"
COLOURS = {f"c{i}": f"#0404{i:02d}" for i in range(1, 10)}
NAMES = {TEXT: "currentColor", FAINT: "var(--faint)", GRID: "var(--grid)"} | {
    v: f"var(--{k})" for k, v in COLOURS.items()
}

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "unift",
    "font.size": 8.5,
    "text.color": TEXT,
    "axes.edgecolor": GRID,
    "axes.labelcolor": FAINT,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "path.simplify": True,
}


@dataclass(frozen=True)
class Line:
    label: str
    colour: str  # c1 ... c9
    x: np.ndarray
    y: np.ndarray
    raw: bool = False  # draw the points faintly and their moving mean on top
    dashed: bool = False
    marker: bool = False
    low: np.ndarray | None = None  # a band around the line
    high: np.ndarray | None = None


def series(metrics: Metrics, name: str, unit: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """(finished steps, values) where this metric is a finite number; lengths are equal, maybe 0."""
    found = [(m["step"], m[name]) for m in metrics if isinstance(m.get(name), (int, float))]
    x, y = np.array([p[0] for p in found], dtype=float), unit * np.array([p[1] for p in found], dtype=float)
    finite = np.isfinite(y)
    return x[finite], y[finite]


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS points: means of stretches of equal length."""
    if len(x) <= POINTS:
        return x, y
    edges = np.linspace(0, len(x), POINTS + 1).astype(int)[:-1]
    counts = np.diff([*edges, len(x)])
    return np.add.reduceat(x, edges) / counts, np.add.reduceat(y, edges) / counts


@dataclass(frozen=True)
class Look:
    """Of a chart, beside its lines."""

    unit: str = ""
    note: str = ""
    total: float | None = None  # right end of the x axis; None: the last point
    xlabel: str = "step"
    limits: tuple[float, float] | None = None  # of the y axis at least
    log: bool = False  # if all values are positive and span more than a factor of 30
    stacked: bool = False  # areas on top of each other; the lines share their x
    marks: Sequence[float] = ()  # x of vertical lines, where a phase begins


def chart(title: str, lines: Sequence[Line], look: Look) -> Html | None:
    """A figure with its legend as text above it; None without a point to draw."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    lines = [line for line in lines if len(line.x)]
    if not lines:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(3.9, 2.1), layout="constrained")
        FigureCanvasSVG(figure)
        axis = figure.add_subplot()
        if look.stacked:
            thinned = [thin(line.x, line.y) for line in lines]
            colours = [COLOURS[line.colour] for line in lines]
            axis.stackplot(thinned[0][0], [y for _, y in thinned], colors=colours, alpha=0.75, lw=0)
        else:
            for line in lines:
                _draw(axis, line)
        values = np.concatenate([line.y for line in lines])
        if look.log and (values > 0).all() and values.max() > 30 * values.min():
            axis.set_yscale("log")
        elif look.stacked:
            axis.set_ylim(bottom=0)
        elif look.limits is not None:
            bands = [b for line in lines for b in (line.low, line.high) if b is not None]
            values = np.concatenate([values, *bands])
            low, high = min(look.limits[0], values.min()), max(look.limits[1], values.max())
            room = 0.04 * (high - low) or 1.0
            axis.set_ylim(low - room, high + room)
        right = look.total or max(line.x.max() for line in lines)
        axis.set_xlim(min(min(line.x.min() for line in lines), 0 if right > 1 else right - 1), right)
        for mark in look.marks:
            axis.axvline(mark, color=FAINT, lw=0.9, ls=(0, (2, 2)))
        axis.set_xlabel(look.xlabel)
        axis.tick_params(length=0)
        axis.locator_params(axis="x", nbins=6, integer=True)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    legend = [tag("span", tag("i", cls=f"key {line.colour}" + " dash" * line.dashed), line.label) for line in lines]
    heading = [tag("strong", title), f" ({look.unit})" if look.unit else None, tag("span", legend, cls="legend")]
    description = f"{title}: " + ", ".join(f"{line.label} ends at {line.y[-1]:.4g}" for line in lines)
    caption = tag("p", look.note, cls="note") if look.note else None
    drawn = _inline(file.getvalue(), description)
    return tag("figure", tag("figcaption", heading), drawn, caption)


def _draw(axis: Any, line: Line) -> None:
    colour, style = COLOURS[line.colour], (0, (4, 2.5)) if line.dashed else "-"
    x, y = thin(line.x, line.y)
    if line.low is not None and line.high is not None:
        low, high = thin(line.x, line.low)[1], thin(line.x, line.high)[1]
        axis.fill_between(x, low, high, color=colour, alpha=0.16, lw=0)
    if line.raw and len(x) > 20:
        axis.plot(x, y, color=colour, lw=0.7, alpha=0.3)
        y = smooth(y, max(3, round(0.04 * len(y))))
    axis.plot(x, y, color=colour, lw=1.7, ls=style, marker="o" if line.marker or len(x) == 1 else None, ms=3)


def _inline(svg: str, description: str) -> Html:
    """matplotlib's file as an element of a page: no prologue, no metadata, fluid width, colours of the page, and
    identifiers that no other picture on the page has."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.S)
    for placeholder, name in NAMES.items():
        svg = svg.replace(placeholder, name)
    own = f"f{hashlib.sha256((description + svg).encode()).hexdigest()[:10]}-"
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{own}{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{own}", svg)
    head, body = svg.split(">", 1)
    box = re.search(r'viewBox="([^"]+)"', head)
    assert box is not None  # matplotlib always writes one
    start = tag("svg", viewBox=box[1], role="img", aria_label=description).removesuffix("></svg>")
    body = re.sub(r"\s*\n\s*", "\n", body)
    return Html(f'{start} xmlns:xlink="http://www.w3.org/1999/xlink">{body}')
