"""The family on the demo's task, from the runs of `unift compare` in one folder: the table of docs/family.md and a curve a page.

    unift compare --methods all --budget seconds=80 --seeds 1 --run FOLDER
    unift compare --methods uft,sft,... --budget seconds=80 --seeds 3 --run FOLDER      # more seeds of some
    python tools/family_pages.py FOLDER

    python tools/family_pages.py FOLDER --run uft,orpo --seeds 3      # these alone; the other rows of the table stay

Pictures go to docs/family.png and docs/methods/curves, the table between the markers of docs/family.md, with every finished
run of the folder; a method page without its picture gets one. --run trains methods first, with seconds of the processor in
the place of the clock's, so that a machine with other work gives a run what a quiet one does; uft must be among the runs,
and family.png, which shows all methods, is left as it is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from unift.commands.compare import budget as budgets
from unift.commands.compare import plots, run_many, train_job
from unift.commands.compare.table import Result, by_method, table
from unift.config.budget import parse
from unift.training.run.metrics import read_metrics

DOCS = Path(__file__).resolve().parents[1] / "docs"
BEGIN, END = "<!-- family -->\n", "\n<!-- /family -->"
BUDGET = "seconds=80"
PROCESSOR = "import sys, time; time.perf_counter = time.process_time; from unift.commands.cli import main; main()"
Runs = Sequence[Sequence[dict[str, Any]]]


def train(methods: Sequence[str], seeds: int, folder: Path) -> None:
    """The runs, one at a time; ``seconds`` of their budget and results are the processor's."""
    jobs = [train_job(m, s, "lock", folder, [f"train.budget={BUDGET}"]) for s in range(seeds) for m in methods]
    jobs = [replace(j, command=[j.command[0], "-c", PROCESSOR, *j.command[3:]]) for j in jobs]
    run_many(jobs, 1, lambda text: print(text, file=sys.stderr, flush=True))


def picture(method: str, runs: Runs, uft: Runs, path: Path) -> None:
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
    axis.set(xlim=(0, 100), ylim=(-3, 103), xlabel="share of the budget, %", ylabel="held-out, %")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def embed(page: Path, method: str) -> None:
    """A page has its curve before the section with the command."""
    text, link = page.read_text(), f"![Held-out accuracy of {method} on the lock](curves/{method}.png)"
    if link in text:
        return
    head, mark, tail = text.partition("## Command")
    note = f"## Curve\n\n{link}\n\nOn the demo's task under one budget: [family](../family.md).\n\n"
    page.write_text(head + note + mark + tail)


def merged(old: str, new: str) -> str:
    """The old table with the lines of the new one in the places of their methods', the best first."""
    head, body = old.split("\n")[:3], old.split("\n")[3:]
    fresh = new.split("\n")[3:]

    def name(line: str) -> str:
        return line.split("|")[1].strip()

    kept = [line for line in body if name(line) not in set(map(name, fresh))]
    return "\n".join([*head, *sorted(kept + fresh, key=lambda line: (-float(line.split("|")[3]), name(line)))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--run", default="", help="comma-separated methods")
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    folder: Path = args.folder
    if args.run:
        train(args.run.split(","), args.seeds, folder)
    results: list[Result] = [json.loads(path.read_text()) for path in sorted(folder.glob("*-seed*/result.json"))]
    groups = by_method(results)
    order = sorted(groups, key=lambda m: -sum(r["test"]["accuracy"] for r in groups[m]) / len(groups[m]))
    page = DOCS / "family.md"
    text = page.read_text()
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    body = table([r for m in order for r in groups[m]])
    page.write_text(text[:start] + (merged(text[start:end], body) if args.run else body) + text[end:])
    (DOCS / "methods" / "curves").mkdir(exist_ok=True)
    metrics = {m: [read_metrics(folder / f"{m}-seed{r['seed']}" / "metrics.jsonl") for r in groups[m]] for m in order}
    if not args.run:
        plots.curves(metrics, DOCS / "family.png", "Same base, same rows: mean and range over seeds")
    for method in order:
        picture(method, metrics[method], metrics["uft"], DOCS / "methods" / "curves" / f"{method}.png")
        embed(DOCS / "methods" / f"{method}.md", method)
    print(body, budgets.note(parse(BUDGET), results), sep="\n\n")


if __name__ == "__main__":
    main()
