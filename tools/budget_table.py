"""How well every preset keeps a budget, from the runs of `unift compare --budget` in one folder: the table of docs/family.md.

    unift compare --methods all --seeds 1 --recipe lock --budget tokens=40k --run FOLDER \\
      train.prompts=16 sample.max_tokens=8 data.test_rows=8 eval.train_rows=0 eval.every=0 save.every=0
    python tools/budget_table.py FOLDER

Presets without a finished run are named below the table. "A step": the largest step's share of the budget; a run ends within
half of that (`train.budget`).
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pages

from unift.commands.compare import budget as budgets
from unift.commands.compare.table import Result, by_method
from unift.config.budget import Budget, parse
from unift.config.packaged import preset_names
from unift.training.run.metrics import read_metrics

PAGE = Path(__file__).resolve().parents[1] / "docs" / "family.md"


def budget_of(folder: Path) -> Budget:
    """That of the folder's runs, which all have the same."""
    import yaml

    found = {yaml.safe_load(p.read_text())["train"]["budget"] for p in folder.glob("*-seed*/config.yaml")}
    if len(found) != 1 or None in found:
        raise SystemExit(f"{folder}: expected runs of one train.budget, found {sorted(map(str, found))}")
    return parse(found.pop(), "train.budget")


def largest_step(budget: Budget, metrics: list[dict[str, Any]]) -> float:
    """Share of the budget that the dearest step of a run has used."""
    if budget.kind == "seconds":
        return max(m["time/step"] for m in metrics if m["step"]) / budget.amount
    counts = [{f"tokens_{kind}": m[f"tokens/{kind}"] for kind in ("sampled", "trained")} for m in metrics if m["step"]]
    used = [0.0, *(budget.used(count) for count in counts)]
    return max(after - before for before, after in pairwise(used)) / budget.amount


def table(budget: Budget, results: list[Result], folder: Path) -> str:
    """Markdown: a line a preset, in the order of their names, and below it the presets that are missing."""
    lines = ["| preset | steps | tokens sampled | tokens trained | a step, % | used % |", "|---" * 6 + "|"]
    used, groups = budgets.shares(budget, results), by_method(results)
    for method, runs in groups.items():
        dearest = max(
            largest_step(budget, read_metrics(folder / f"{method}-seed{r['seed']}" / "metrics.jsonl")) for r in runs
        )
        counts = (
            f"{sum(r[name] for r in runs) / len(runs):,.0f}" for name in ("steps", "tokens_sampled", "tokens_trained")
        )
        lines.append(f"| {method} | {' | '.join(counts)} | {100 * dearest:.1f} | {100 * used[method]:.1f} |")
    missing = [name for name in preset_names() if name not in groups]
    return "\n".join(
        [*lines, "", budgets.note(budget, results), *([f"Not run: {', '.join(missing)}."] if missing else [])]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*-seed*/result.json"))]
    body = table(budget_of(folder), results, folder)
    pages.put(PAGE, "budget", body)
    print(body)


if __name__ == "__main__":
    main()
