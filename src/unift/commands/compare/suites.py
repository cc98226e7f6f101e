"""A comparison on a suite of problem sets: the base and every run are judged in processes of their own; the paper's table."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unift.commands.compare.jobs import Job
from unift.commands.compare.table import Result, accuracy_of
from unift.commands.suite.columns import SUITES, read_problems
from unift.commands.suite.table import average, line, shown
from unift.config.identity import to_yaml
from unift.config.sections import Config
from unift.config.stages import evaluation_tokens
from unift.files import write_atomic

METHODS = "sft,rft,sft-rft,r3,uft"  # of the paper's table, beside the base


@dataclass(frozen=True)
class SuitePlan:
    """``data``: files and folders of rows; ``samples`` a row for pass@k; ``rows``: the first so many of each column."""

    suite: str
    data: Sequence[str]
    samples: int = 0
    rows: int | None = None


def check_suite(plan: SuitePlan) -> None:
    """Raise what the evaluation would raise about its rows, before anything is trained."""
    read_problems(plan.suite, plan.data, plan.rows)


def judge(
    plan: SuitePlan,
    folder: Path,
    configs: Mapping[str, Config],
    results: Sequence[Result],
    run: Callable[[Sequence[Job]], object],
) -> list[str]:
    """Judge the base and the finished runs; lines for people. Files: suite.json and suite.md in the folder.
    ``run`` does the jobs, each of which leaves a ``result.json`` in its folder.

    All answers have one length limit, the largest of the methods, and one rule, that of the first method's settings where
    all agree, else unift's own: methods that grade by the paper's rule in training are compared with others here.
    """
    first = next(iter(configs.values()))
    rules = {c.reward.rule for c in configs.values()}
    most = max(evaluation_tokens(c) for c in configs.values())
    shared = [f"eval.max_tokens={most}", f"reward.rule={rules.pop() if len(rules) == 1 else 'unift'}", "threads=1"]
    base = folder / "base"
    base.mkdir(parents=True, exist_ok=True)
    write_atomic(base / "settings.yaml", to_yaml(first))
    asked = [("base", 0, base, [first.model.path, "--config", str(base / "settings.yaml")])]
    for result in results:
        own = folder / f"{result['method']}-seed{result['seed']}"
        asked.append((result["method"], result["seed"], own, [str(own)]))
    jobs = [_job(plan, method, seed, own, words, shared) for method, seed, own, words in asked]
    run(jobs)
    found: dict[str, list[dict[str, Any]]] = {}
    for job in jobs:
        found.setdefault(job.method, []).append(json.loads((job.folder / "result.json").read_text(encoding="utf-8")))
    text = compared(found, plan.suite)
    left = found["base"][0]
    notes = [f"No rows, left out: {', '.join(left['missing'])}."] if left["missing"] else []
    notes += [f"{note}." for note in left["notes"]]
    how = f"Greedy answers of at most {most} tokens without hints, % right with 95 % intervals; {shared[1]}."
    write_atomic(folder / "suite.json", json.dumps(found, indent=1))
    write_atomic(folder / "suite.md", "\n".join([text, "", how, *notes, ""]))
    return [text, "", how, *notes, ""]


def _job(plan: SuitePlan, method: str, seed: int, run: Path, words: Sequence[str], settings: Sequence[str]) -> Job:
    out = run / "suite"
    command = [sys.executable, "-m", "unift", "eval", *words, "--suite", plan.suite, "--out", str(out)]
    command += [word for place in plan.data for word in ("--data", place)]
    command += ["--samples", str(plan.samples), *(["--rows", str(plan.rows)] if plan.rows else []), *settings]
    return Job(method, seed, out, command, plan.data)


def compared(results: Mapping[str, Sequence[Mapping[str, Any]]], suite: str) -> str:
    """Markdown in the shape of the paper's table 2: a line a method, a column a problem set, in % with 95 % intervals.

    results: of each method, one a seed. Means over seeds; intervals as `compare.table.accuracy_of` has them.
    """
    named = {c.name: c.title for c in SUITES[suite]}
    there = [name for name in named if any(name in r["columns"] for runs in results.values() for r in runs)]
    head = ["method", "seeds", *(named[name] for name in there), "average"]
    lines = [line(head), line(["---"] * len(head))]
    for method, runs in results.items():
        cells = [over_seeds(runs, name) for name in there]
        cells_shown = [shown(c) if c else "-" for c in cells]
        whole = average([c for c in cells if c]) if all(cells) else None
        lines.append(line([method, str(len(runs)), *cells_shown, shown(whole) if whole else "-"]))
    return "\n".join(lines)


def over_seeds(runs: Sequence[Mapping[str, Any]], column: str) -> dict[str, float] | None:
    """Mean accuracy of a column over seeds with its interval; None where a seed lacks it."""
    if not all(column in r["columns"] for r in runs):
        return None
    middle, low, high = accuracy_of([{"test": r["columns"][column]} for r in runs])
    return {"accuracy": middle, "low": low, "high": high}
