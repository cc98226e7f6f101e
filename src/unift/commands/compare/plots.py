"""Pictures of runs (matplotlib, files only)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from unift.config.sections import Show
# Okabe and Ito's colours, told apart with any colour vision; a method keeps its colour in every picture.
COLOURS = {
    "uft": "#0072B2",
    "sft": "#D55E00",
    "rft": "#555555",
    "sft-rft": "#009E73",
    "r3": "#CC79A7",
    "stage": "#56B4E9",
    "uft-paper": "#E69F00",
}
SPARE = ("#8C564B", "#17BECF", "#7F3C8D", "#BCBD22", "#E377C2", "#2CA02C", "#A05000", "#5254A3")  # methods of one's own
MOST = 11  # methods drawn in a colour of their own; of more: uft, sft, rft and the best
HINTED = ("uft", "uft-paper", "stage", "r3")  # the first of these in the picture shows its hint share

Metrics = Sequence[Mapping[str, Any]]


def colour_of(method: str, methods: Sequence[str]) -> str:
    others = [m for m in methods if m not in COLOURS]
    return COLOURS.get(method) or SPARE[others.index(method) % len(SPARE)]


def series(metrics: Metrics, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(share of the run in %, value) of the lines that have this metric; lengths are equal, maybe 0."""
    total = max((m["step"] for m in metrics), default=0) or 1
    points = [(100 * m["step"] / total, m[name]) for m in metrics if m.get(name) is not None]
    return np.array([p[0] for p in points]), np.array([p[1] for p in points], dtype=float)


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Centred moving mean; near the ends over what is there, so that a level curve stays level."""
    if not len(values):
        return values
    width = max(1, min(width, len(values)))
    window = np.ones(width)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def over_seeds(runs: Sequence[Metrics], name: str, grid: np.ndarray, share: float = 0.0) -> np.ndarray:
    """[runs with this metric, len(grid)]: each interpolated to the grid, smoothed over ``share`` of its points.

    NaN outside a run's own points: a method whose first phase has no reward draws nothing there.
    """
    found = [(x, smooth(y, round(share * len(y)))) for x, y in (series(m, name) for m in runs) if len(x)]
    return np.array([np.interp(grid, x, y, left=np.nan, right=np.nan) for x, y in found])


def told_apart(runs: Mapping[str, Sequence[Metrics]]) -> list[str]:
    """The methods with a colour and a name: all, or the best MOST where there are more."""
    if len(runs) <= MOST:
        return list(runs)
    ends = {
        m: [y[-1] for _, y in (series(x, "eval/test/accuracy") for x in seeds) if len(y)] for m, seeds in runs.items()
    }
    first = sorted(runs, key=lambda m: (m not in ("uft", "sft", "rft"), -float(np.mean(ends[m])) if ends[m] else 0.0))[
        :MOST
    ]
    return [m for m in runs if m in first]


def curves(runs: Mapping[str, Sequence[Metrics]], path: Path, title: str) -> None:
    """Left: held-out accuracy without hints over the run. Right: reward while training. Mean and range over seeds.

    runs: method -> one list of metrics lines per seed. x is the share of each run's own steps, since methods differ in
    their number of steps. A method without evaluations, or without rewards, is left out of that panel. Of many methods the
    best have names and the others are thin and grey.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), constrained_layout=True)
    grid = np.linspace(0, 100, 201)
    methods = told_apart(runs)
    handles: dict[str, Any] = {}
    for method, seeds in runs.items():
        named = method in methods
        colour, label = (colour_of(method, methods), method) if named else ("#C4C4C4", "others")
        for axis, name, unit, share in ((left, "eval/test/accuracy", 100, 0.0), (right, "reward", 1, 0.03)):
            stack = unit * over_seeds(seeds, name, grid, share)
            if not len(stack):
                continue
            width, front = (2.4, 4) if method == "uft" else (1.8, 3) if named else (0.8, 2)
            (line,) = axis.plot(grid, stack.mean(0), color=colour, lw=width, zorder=front)
            if len(stack) > 1:
                axis.fill_between(grid, stack.min(0), stack.max(0), color=colour, alpha=0.15, lw=0)
            if axis is left and named:
                final = np.mean([100 * y[-1] for _, y in (series(m, name) for m in seeds) if len(y)])
                label = f"{method} ({final:.0f} %)"
            handles[label] = line
    hinted = next((m for m in HINTED if m in runs), None)
    if hinted is not None:
        shown = over_seeds(runs[hinted], "hint/fraction", grid, 0.03)
        if len(shown):
            (line,) = right.plot(grid, shown.mean(0), color="#777777", lw=1.2, ls=(0, (4, 3)))
            handles[f"share of the solution shown by {hinted}"] = line
    left.set(ylabel="accuracy, %", ylim=(-3, 103), title="accuracy on held-out problems, no hint")
    right.set(ylabel="mean reward", ylim=(-0.03, 1.03), title="reward while training, hints included")
    for axis in (left, right):
        axis.set(xlim=(0, 100), xlabel="share of the run's steps, %")
        axis.title.set_fontsize(11)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    if handles:
        columns = min(len(handles), 8 if len(handles) <= 8 else 6)
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=10
        )
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def hint_schedule(show: Show, steps: int, path: Path) -> None:
    """The mean share of a solution of ``show.cuts`` steps that is shown, over a run of ``steps`` steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from unift.hints import schedules

    figure, axis = plt.subplots(figsize=(7, 3.2), constrained_layout=True)
    shares = [schedules.expected_share(show, step, steps, show.cuts) for step in range(steps)]
    percent = [math.nan if share is None else 100 * share for share in shares]
    axis.plot(range(1, steps + 1), percent, color=COLOURS["uft"], lw=2)
    axis.set(xlabel="step", ylabel="solution shown, %", ylim=(-3, 103), xlim=(1, max(steps, 2)))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
    plt.close(figure)
