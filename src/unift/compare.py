"""Several methods, several seeds, one task: runs in processes of their own, a table with intervals, a plot, a reading."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from unift.types import UniftError


@dataclass(frozen=True)
class Job:
    method: str
    seed: int
    folder: Path
    command: list[str]


def command(method: str, seed: int, recipe: str, folder: Path, settings: Sequence[str]) -> list[str]:
    """``unift train`` of one run with one thread."""
    own = folder / f"{method}-seed{seed}"
    start = [sys.executable, "-m", "unift", "train", "--quiet", "--recipe", recipe, "--method", method, "--run", str(own)]
    return [*start, *settings, f"seed={seed}", "threads=1"]


def run_many(jobs: Sequence[Job], workers: int, say: Callable[[str], None] = lambda text: None) -> list[dict[str, Any]]:
    """Results in the order of the jobs. A finished run is reused. Raises UniftError naming the runs that failed."""
    failed: list[str] = []

    def one(job: Job) -> dict[str, Any] | None:
        result = job.folder / "result.json"
        if not result.is_file():
            job.folder.mkdir(parents=True, exist_ok=True)
            with open(job.folder / "log.txt", "ab") as log:
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                code = subprocess.run(job.command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment).returncode
            if code or not result.is_file():
                tail = (job.folder / "log.txt").read_text(errors="replace").strip().splitlines()[-3:]
                failed.append(f"{job.method} seed {job.seed} (exit code {code}): " + " | ".join(tail))
                return None
        found = json.loads(result.read_text())
        say(f"{job.method} seed {job.seed}: {100 * found['test']['accuracy']:.1f} % held-out, {found['seconds']:.0f} s")
        return found

    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(one, jobs))
    if failed:
        raise UniftError(
            f"{len(failed)} of {len(jobs)} runs failed; the others are kept, the same command repeats only these:\n  "
            + "\n  ".join(failed)
        )
    return [r for r in results if r is not None]


def compare_methods(
    methods: Sequence[str], seeds: int, recipe: str, folder: Path, settings: Sequence[str], workers: int
) -> str:
    """The whole comparison; returns table, reading and the path of the plot as text."""
    from unift.config import preset_text, recipe_text

    recipe_text(recipe)
    for method in methods:
        preset_text(method)
    jobs = [
        Job(m, seed, folder / f"{m}-seed{seed}", command(m, seed, recipe, folder, settings))
        for seed in range(seeds)
        for m in methods
    ]
    results = run_many(jobs, workers, say=lambda text: print(text, flush=True))
    plot = write_report(folder, results)
    return "\n".join([table(results), "", *reading(results), "", f"plot: {plot}", f"folder: {folder}"])


# ---------------------------------------------------------------------------------------------- numbers


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % t-interval of a mean over seeds, clipped to [0, 1]."""
    # Two-sided 95 % quantiles of Student's t for 1..9 degrees of freedom.
    quantiles = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
    n, m = len(values), mean(values)
    sd = (sum((v - m) ** 2 for v in values) / (n - 1)) ** 0.5
    half = (quantiles[n - 2] if n <= 10 else 2.0) * sd / n**0.5
    return max(0.0, m - half), min(1.0, m + half)


def _by_method(results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for r in results:
        groups.setdefault(r["method"], []).append(r)
    return groups


def _interval_of(runs: Sequence[dict[str, Any]]) -> tuple[float, float, float]:
    """(accuracy, low, high): over seeds when there are several, else Wilson's over rows."""
    values = [r["test"]["accuracy"] for r in runs]
    low, high = interval(values) if len(values) > 1 else (runs[0]["test"]["low"], runs[0]["test"]["high"])
    return mean(values), low, high


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: one line a method. Accuracy in %, without hints, on held-out rows; 95 % intervals."""
    base = results[0]["base"]
    lines = [
        "| method | held-out % | 95 % interval | each seed | training rows % | tokens sampled | tokens trained | seconds |",
        "|---|---|---|---|---|---|---|---|",
        f"| base | {100 * base['accuracy']:.1f} | {100 * base['low']:.1f} to {100 * base['high']:.1f} | | | | | |",
    ]
    for method, runs in _by_method(results).items():
        accuracy, low, high = _interval_of(runs)
        each = " ".join(f"{100 * r['test']['accuracy']:.1f}" for r in sorted(runs, key=lambda r: r["seed"]))
        fit, sampled, trained, seconds = (
            mean(values)
            for values in zip(
                *((r["train"]["accuracy"], r["tokens_sampled"], r["tokens_trained"], r["seconds"]) for r in runs), strict=True
            )
        )
        lines.append(
            f"| {method} | {100 * accuracy:.1f} | {100 * low:.1f} to {100 * high:.1f} | {each} | {100 * fit:.1f} "
            f"| {sampled / 1e6:.2f} M | {trained / 1e6:.2f} M | {seconds:.0f} |"
        )
    return "\n".join(lines)


def reading(results: Sequence[dict[str, Any]]) -> list[str]:
    """Three lines in plain language, computed from the numbers, whichever way they fall."""
    groups = _by_method(results)
    lines = []
    if "rft" in groups:
        runs = groups["rft"]
        accuracy = mean(r["test"]["accuracy"] for r in runs)
        seen, sampled = sum(r["reward_seen"] for r in runs), sum(r["scorer"]["total"] for r in runs)
        rate = seen / max(sampled, 1)
        why = "so it had almost nothing to learn from" if rate < 0.01 else "which was enough to learn from"
        lines.append(f"RFT reaches {100 * accuracy:.1f} %: {seen} of its {sampled:,} completions were right, {why}.")
    if "sft" in groups:
        runs = groups["sft"]
        accuracy, fit = (mean(r[part]["accuracy"] for r in runs) for part in ("test", "train"))
        gap = "fits its rows better than it generalises" if fit - accuracy > 0.05 else "generalises as well as it fits"
        lines.append(f"SFT solves {100 * fit:.1f} % of its training rows and {100 * accuracy:.1f} % of the held-out ones: it {gap}.")
    if "uft" in groups:
        accuracy, low, _ = _interval_of(groups["uft"])
        rivals = {m: _interval_of(groups[m]) for m in ("sft", "rft") if m in groups}
        if not rivals:
            return [*lines, f"UFT reaches {100 * accuracy:.1f} % without hints."]
        name, (best, _, best_high) = max(rivals.items(), key=lambda item: item[1][0])
        lead = 100 * (accuracy - best)
        if lead > 0:
            sure = "the intervals do not overlap" if low > best_high else "but the intervals overlap"
            lines.append(f"UFT reaches {100 * accuracy:.1f} % without hints, {lead:.1f} points ahead of {name.upper()}; {sure}.")
        else:
            lines.append(f"UFT reaches {100 * accuracy:.1f} % without hints and is not ahead: {name.upper()} is {-lead:.1f} points better.")
    return lines


def write_report(folder: Path, results: Sequence[dict[str, Any]]) -> Path:
    """compare.json, table.md and curves.png in the folder; returns the path of the picture."""
    from unift.checkpoint import read_metrics, write_atomic
    from unift.plots import curves

    write_atomic(folder / "compare.json", json.dumps(list(results), indent=1))
    write_atomic(folder / "table.md", "\n".join([table(results), "", *reading(results), ""]))
    runs: dict[str, list[list[dict[str, Any]]]] = {}
    for r in results:
        metrics = read_metrics(folder / f"{r['method']}-seed{r['seed']}" / "metrics.jsonl")
        runs.setdefault(r["method"], []).append(metrics)
    path = folder / "curves.png"
    curves(runs, path, "Same base, same rows; accuracy without hints on held-out problems")
    return path
