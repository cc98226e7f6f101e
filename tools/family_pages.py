"""The family on the demo's task, from the runs of `unift compare` in one folder: the table of docs/family.md and a curve a page.

    unift compare --methods all --budget seconds=80 --seeds 1 --run FOLDER
    unift compare --methods uft,sft,... --budget seconds=80 --seeds 3 --run FOLDER      # more seeds of some
    python tools/family_pages.py FOLDER

    unift compare --recipe lock --methods uft,orpo,... --seeds 3 --run OTHER
    python tools/family_pages.py OTHER --steps              # the second table: the recipe's steps, whatever they cost

Pictures go to docs/family.png and docs/methods/curves, the table between the markers of docs/family.md, with every finished
run of the folder; a method page without its picture gets one. --steps leaves family.png and the curve of uft as they are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pages

from unift.commands.compare import budget as budgets
from unift.commands.compare import plots
from unift.commands.compare.table import Result, by_method, table
from unift.config.budget import parse
from unift.training.run.metrics import read_metrics

DOCS = Path(__file__).resolve().parents[1] / "docs"
Runs = Sequence[Sequence[dict[str, Any]]]


def picture(method: str, runs: Runs, uft: Runs, path: Path, of: str) -> None:
    """Held-out accuracy without hints of every seed, and in grey the mean of UFT's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(4.6, 2.1), constrained_layout=True)
    grid, name = np.linspace(0, 100, 101), "eval/test/accuracy"
    if method != "uft":
        axis.plot(
            grid, 100 * plots.over_seeds(uft, name, grid).mean(0), color="#999999", lw=1.2, ls=(0, (4, 3)), label="uft"
        )
    for seed in runs:
        x, y = plots.series(seed, name)
        axis.plot(x, 100 * y, color="#0072B2", lw=1.6, label=method if seed is runs[0] else None)
    axis.set(xlim=(0, 100), ylim=(-3, 103), xlabel=f"share of the {of}, %", ylabel="held-out, %")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def embed(page: Path, method: str, under: str) -> None:
    """A page has its curve before the section with the command."""
    text, link = page.read_text(), f"![Held-out accuracy of {method} on the lock](curves/{method}.png)"
    if link in text:
        return
    head, mark, tail = text.partition("## Command")
    note = f"## Curve\n\n{link}\n\nOn the demo's task {under}: [family](../family.md).\n\n"
    page.write_text(head + note + mark + tail)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", action="store_true")
    args = parser.parse_args()
    folder: Path = args.folder
    under, of = ("over the recipe's steps", "steps") if args.steps else ("under one budget", "budget")
    results: list[Result] = [json.loads(path.read_text()) for path in sorted(folder.glob("*-seed*/result.json"))]
    groups = by_method(results)
    order = sorted(groups, key=lambda m: -sum(r["test"]["accuracy"] for r in groups[m]) / len(groups[m]))
    body = table([r for m in order for r in groups[m]])
    pages.put(DOCS / "family.md", "steps" if args.steps else "family", body)
    (DOCS / "methods" / "curves").mkdir(exist_ok=True)
    metrics = {m: [read_metrics(folder / f"{m}-seed{r['seed']}" / "metrics.jsonl") for r in groups[m]] for m in order}
    if not args.steps:
        plots.curves(metrics, DOCS / "family.png", "Same base, same rows: mean and range over seeds")
    for method in order:
        if not (args.steps and method == "uft"):
            picture(method, metrics[method], metrics["uft"], DOCS / "methods" / "curves" / f"{method}.png", of)
            embed(DOCS / "methods" / f"{method}.md", method, under)
    print(body, *([] if args.steps else [budgets.note(parse("seconds=80"), results)]), sep="\n\n")


if __name__ == "__main__":
    main()
