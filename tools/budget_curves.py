"""Held-out accuracy over the share of the budget that is used, one line a run: the figure of docs/smollm2.md.

    python tools/budget_curves.py OUT.png --tokens 80000 "sft=RUN" "uft at 1e-5=OTHER RUN" ...

Runs are folders of `unift train`; the share is of sampled and trained tokens, added up. A name with "~" before it is drawn dashed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from unift.training.run.metrics import read_metrics


def curve(run: Path, tokens: int) -> tuple[list[float], list[float]]:
    """Share of the budget and accuracy, in %, at every evaluation."""
    points = []
    for m in read_metrics(run / "metrics.jsonl"):
        if m.get("eval/test/accuracy") is not None:
            used = (m.get("tokens/sampled") or 0) + (m.get("tokens/trained") or 0)
            points.append((100 * used / tokens, 100 * m["eval/test/accuracy"]))
    return [x for x, _ in points], [y for _, y in points]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", nargs="+", help="name=folder")
    parser.add_argument("--tokens", type=int, required=True, help="the budget")
    a = parser.parse_args()
    figure, axes = plt.subplots(figsize=(7.5, 4.2))
    for word in a.runs:
        name, _, folder = word.rpartition("=")
        x, y = curve(Path(folder), a.tokens)
        style, name = ("--", name[1:]) if name.startswith("~") else ("-", name)
        axes.plot(x, y, style, marker="o", ms=3, lw=1.6, label=f"{name} ({y[-1]:.0f} %)")
    axes.set(xlabel=f"share of the budget of {a.tokens:,} tokens, %", ylabel="accuracy on held-out problems, %")
    axes.set(xlim=(0, 101), ylim=(0, 1.25 * axes.get_ylim()[1]))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", ncols=2, frameon=False)
    figure.tight_layout()
    figure.savefig(a.out, dpi=130)


if __name__ == "__main__":
    main()
