"""What runs under one budget of tokens reach on the way: the two tables and the figure of docs/smollm2.md.

    python tools/budget_curves.py FOLDER [--page docs/smollm2.md] [--figure docs/smollm2.png] ["sft at 1e-5=RUN" ...]

FOLDER: runs as `unift compare` leaves them, METHOD-seedN; all that are finished are read. Further runs, named, become dashed
lines of the figure. Accuracy is that on held-out problems; intervals as in the tables of `unift compare`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
import pages

from unift.commands.compare.table import accuracy_of
from unift.config.budget import parse
from unift.config.resolve import read_yaml
from unift.training.run.metrics import read_metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).resolve().parents[1] / "docs"
QUARTERS = (25, 50, 75, 100)
COUNTS = {"tokens_sampled": "tokens/sampled", "tokens_trained": "tokens/trained"}  # of a result, of a line of metrics


@dataclass(frozen=True)
class Ran:
    """A finished run. ``shares``, ``percent``: used share of the budget and accuracy, in %, at every evaluation."""

    result: dict[str, Any]
    shares: Sequence[float]
    percent: Sequence[float]

    def at(self, quarter: int) -> float:
        """Accuracy at the evaluation that is nearest to this share."""
        return min(zip(self.shares, self.percent, strict=True), key=lambda point: abs(point[0] - quarter))[1]


def read(folder: Path) -> Ran:
    """Raises FileNotFoundError for a run that is not finished."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    budget = parse(read_yaml(str(folder / "config.yaml"))["train"]["budget"])
    points = [
        (
            100 * budget.used({key: m.get(name, 0) for key, name in COUNTS.items()}) / budget.amount,
            100 * m["eval/test/accuracy"],
        )
        for m in read_metrics(folder / "metrics.jsonl")
        if m.get("eval/test/accuracy") is not None
    ]
    return Ran(result, [x for x, _ in points], [y for _, y in points])


def by_method(folder: Path) -> dict[str, list[Ran]]:
    """Finished runs of every method, by seed; the best method first."""
    found: dict[str, list[Ran]] = {}
    for path in folder.glob("*-seed*/result.json"):
        ran = read(path.parent)
        found.setdefault(ran.result["method"], []).append(ran)
    runs = {name: sorted(own, key=lambda r: r.result["seed"]) for name, own in found.items()}
    return dict(sorted(runs.items(), key=lambda pair: -accuracy_of([r.result for r in pair[1]])[0]))


def totals(runs: Mapping[str, Sequence[Ran]]) -> str:
    """Markdown: a line a method, means over seeds; seconds of training of each seed."""
    head = [
        "method",
        "held-out %",
        "95 % interval",
        "each seed",
        "training rows %",
        "sampled",
        "trained",
        "steps",
        "seconds",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, own in runs.items():
        results = [r.result for r in own]
        accuracy, low, high = (100 * x for x in accuracy_of(results))
        cells = [
            name,
            f"{accuracy:.1f}",
            f"{low:.1f} to {high:.1f}",
            " ".join(f"{100 * r['test']['accuracy']:.1f}" for r in results),
            f"{100 * mean(r['train']['accuracy'] for r in results):.1f}",
            f"{mean(r['tokens_sampled'] for r in results):,.0f}",
            f"{mean(r['tokens_trained'] for r in results):,.0f}",
            f"{mean(r['steps'] for r in results):.0f}",
            " ".join(f"{r['seconds_training']:.0f}" for r in results),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def quarters(runs: Mapping[str, Sequence[Ran]]) -> str:
    """Markdown: accuracy at quarters of the budget, mean and each seed."""
    lines = ["| method | " + " | ".join(f"{q} %" for q in QUARTERS) + " |", "|---" * (len(QUARTERS) + 1) + "|"]
    for name, own in runs.items():
        cells = [
            f"{mean(r.at(q) for r in own):.1f}" + (f" ({' '.join(f'{r.at(q):.1f}' for r in own)})" if own[1:] else "")
            for q in QUARTERS
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(runs: Mapping[str, Sequence[Ran]], others: Mapping[str, Ran], out: Path) -> None:
    """The mean over seeds at quarters, with a dot a seed; further runs dashed."""
    drawn, axes = plt.subplots(figsize=(7.5, 4.4))
    for name, own in runs.items():
        start = mean(r.percent[0] for r in own)
        means = [start, *(mean(r.at(q) for r in own) for q in QUARTERS)]
        seeds = f", {len(own)} seeds" if own[1:] else ""
        (line,) = axes.plot([0, *QUARTERS], means, lw=1.8, label=f"{name} ({means[-1]:.0f} %{seeds})")
        for r in own:
            axes.plot(QUARTERS, [r.at(q) for q in QUARTERS], "o", ms=3, color=line.get_color())
    for name, r in others.items():
        axes.plot(r.shares, r.percent, "--", marker="o", ms=3, lw=1.3, label=f"{name} ({r.percent[-1]:.0f} %)")
    axes.set(xlabel="share of the budget of tokens, %", ylabel="accuracy on held-out problems, %")
    axes.set(xlim=(0, 101), ylim=(0, 1.3 * axes.get_ylim()[1]))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", ncols=2, frameon=False)
    drawn.tight_layout()
    drawn.savefig(out, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("others", nargs="*", help="name=folder of a run")
    parser.add_argument("--page", type=Path, default=DOCS / "smollm2.md")
    parser.add_argument("--figure", type=Path, default=DOCS / "smollm2.png")
    a = parser.parse_args()
    runs = by_method(a.folder)
    if not runs:
        raise SystemExit(f"{a.folder} holds no finished run (METHOD-seedN/result.json)")
    others = {name: read(Path(folder)) for name, _, folder in (word.rpartition("=") for word in a.others)}
    for name, body in (("totals", totals(runs)), ("quarters", quarters(runs))):
        pages.put(a.page, name, body)
        print(body, end="\n\n")
    figure(runs, others, a.figure)


if __name__ == "__main__":
    main()
