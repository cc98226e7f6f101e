"""Several methods, or several values of a method's settings, several seeds, one task: runs in processes of their own, a table
with intervals, a plot, a reading."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from unift.commands.compare import suites, vary
from unift.commands.compare.jobs import Job, RunsFailed, on_signals, run_many, train_job
from unift.commands.compare.suites import SuitePlan, check_suite
from unift.commands.compare.table import Result, by_method, reading, table
from unift.config.budget import Budget, parse
from unift.types import ConfigError

__all__ = ["DEFAULT", "Job", "Plan", "RunsFailed", "compare_methods", "run_many", "train_job", "write_report"]
DEFAULT = "sft,rft,sft-rft,r3,stage,uft"  # methods, where none are named


@dataclass(frozen=True)
class Plan:
    """A comparison. ``settings``: key=value words for every run. ``budget``: "sampled=2M", "trained=2M", "tokens=4M"
    (both added up) or "seconds=60". ``suite``: problem sets that the base and every run are judged on afterwards.
    ``vary``: "key=value,value", settings of the methods that are changed one at a time (`compare.vary`)."""

    methods: Sequence[str]
    seeds: int
    recipe: str | None
    folder: Path
    settings: Sequence[str] = ()
    workers: int = 2
    budget: str | None = None
    suite: SuitePlan | None = None
    vary: Sequence[str] = ()


def compare_methods(plan: Plan) -> tuple[str, list[Result]]:
    """The whole comparison; returns (table, reading and the path of the plot as text; results). Settings are checked first.
    If some runs fail, the table of the others is printed before RunsFailed is raised.

    With a budget, every run goes on until it has used it (``train.budget``).
    """
    from unift.commands.compare import budget as budgets
    from unift.commands.settings import of_recipes_task
    from unift.config.packaged import preset_names
    from unift.config.resolve import parse_overrides, resolve
    from unift.config.unread import sampling_by_hand

    recipe, folder, settings, workers, seeds = plan.recipe, plan.folder, plan.settings, plan.workers, plan.seeds
    limit = parse(plan.budget) if plan.budget else None
    methods = list(dict.fromkeys(m.strip() for m in plan.methods if m.strip()))
    methods = preset_names() if methods == ["all"] else methods
    if not methods or seeds < 1:
        raise ConfigError(
            f"nothing to compare: found methods {methods} and seeds={seeds}; name a method, 1 seed or more"
        )
    over = parse_overrides(settings)
    if limit and "steps" in over.get("train", {}):
        raise ConfigError("--budget chooses train.steps, which is also set; keep one")
    file = of_recipes_task(recipe, {}, over)
    if plan.vary and plan.suite:
        raise ConfigError("--vary changes settings, --suite compares methods on problem sets: leave one out")
    arms = vary.arms(methods, plan.vary)
    configs = {
        arm.name: resolve(arm.method, recipe=recipe, file=file, overrides=parse_overrides([*settings, *arm.settings]))
        for arm in arms
    }
    arms = vary.without_copies(arms, configs)
    changed = [
        f"note: {line}" for line in dict.fromkeys(line for c in configs.values() for line in sampling_by_hand(c))
    ]
    for config in configs.values():
        if not (config.data.task or config.data.test or plan.suite):
            raise ConfigError("a comparison needs held-out rows: set data.test=FILE, or name a suite (--suite uft)")
    if plan.suite:
        check_suite(plan.suite)
    stop = threading.Event()  # not an exception: that could fall between the birth of a child and its being known

    def say(text: str) -> None:
        print(text, flush=True)

    for line in changed:
        say(line)
    with on_signals(lambda number, frame: stop.set()):
        own = [f"train.budget={limit}"] if limit else []
        jobs = [
            train_job(arm.method, seed, recipe, folder, [*settings, *own, *arm.settings], arm.name)
            for seed in range(seeds)
            for arm in arms
        ]
        failure = None
        try:
            results = run_many(jobs, workers, say, stop)
        except RunsFailed as error:
            results, failure = error.results, error
            if not results:
                raise
        judged: list[str] = []
        if plan.suite:
            judged = suites.judge(
                plan.suite,
                folder,
                configs,
                results,
                lambda jobs: run_many(jobs, workers, lambda t: say(f"suite {t}"), stop),
            )
    notes = (
        [f"**Not complete: {len(jobs) - len(results)} of {len(jobs)} runs failed and are missing here.**"]
        if failure
        else []
    )
    notes += [budgets.note(limit, results)] if limit else []
    notes += changed
    if plan.vary:
        plot, found = write_varied(folder, vary.panels(arms, configs, results), results, notes)
    else:
        plot = write_report(folder, results, notes, limit)
        found = [table(results, limit), "", *notes, *reading(results), "", *judged]
    places = [f"plot: {plot}", f"folder: {folder}  (as a page: unift report {folder})"]
    text = "\n".join([*found, *places])
    if failure:
        say(text)
        raise failure
    return text, results


# ---------------------------------------------------------------------------------------------- files


def write_report(
    folder: Path, results: Sequence[Result], notes: Sequence[str] = (), budget: Budget | None = None
) -> Path:
    """compare.json, table.md and curves.png in the folder; returns the path of the picture.

    Curves come from ``metrics.jsonl`` of ``<method>-seed<seed>``; a run without one is in the table only.
    """
    from unift.commands.compare.plots import curves
    from unift.files import write_atomic
    from unift.training.run.metrics import read_metrics

    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "compare.json", json.dumps(list(results), indent=1))
    write_atomic(folder / "table.md", "\n".join([table(results, budget), "", *notes, *reading(results), ""]))
    runs = {
        method: [read_metrics(folder / f"{method}-seed{r['seed']}" / "metrics.jsonl") for r in group]
        for method, group in by_method(results).items()
    }
    path = folder / "curves.png"
    temporary = path.with_name(".curves.png")
    curves(runs, temporary, "Same base, same rows: mean and range over seeds")
    os.replace(temporary, path)
    return path


def write_varied(
    folder: Path, panels: Mapping[str, Sequence[vary.Line]], results: Sequence[Result], notes: Sequence[str] = ()
) -> tuple[Path, list[str]]:
    """compare.json, table.md and ablations.png in the folder; the path of the picture, and the lines of the table."""
    from unift.files import write_atomic

    folder.mkdir(parents=True, exist_ok=True)
    lines = [vary.table(panels), "", *notes]
    write_atomic(folder / "compare.json", json.dumps(list(results), indent=1))
    write_atomic(folder / "table.md", "\n".join([*lines, ""]))
    path = folder / "ablations.png"
    vary.figure(panels, path)
    return path, lines
