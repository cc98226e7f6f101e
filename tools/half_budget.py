"""Does a method reach UFT's final accuracy without hints in half of UFT's budget? Two tasks, several seeds, ablations.

    python tools/half_budget.py OUT [--seeds 10,11,12,13,14] [--workers 2]           about half an hour on two cores

UFT runs the recipe's steps; every other arm half of them (``quarter``: a quarter), with its whole schedule in them. The
target is UFT's mean final accuracy less one point. OUT gets a folder a run and ``table.md``; the command continues.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from unift.commands.compare import Job, run_many, train_job
from unift.config.resolve import resolve
from unift.intervals import interval
from unift.training.run.metrics import read_metrics

Run = tuple[dict[str, Any], list[dict[str, Any]]]  # result, metrics
EVERY = {"lock": 30, "countdown": 20}  # steps between evaluations
SLACK = 0.01  # below UFT's mean: one point of accuracy is 5 of 500 problems


@dataclass(frozen=True)
class Arm:
    method: str
    share: float  # of the recipe's steps
    settings: tuple[str, ...] = ()
    tasks: tuple[str, ...] = tuple(EVERY)


CONSTANT = "likelihood.schedule=constant"
ARMS = {
    "uft": Arm("uft", 1),
    "uft, half": Arm("uft", 0.5),
    "uft-whole, half": Arm("uft-whole", 0.5),
    "constant weight, half": Arm("uft-whole", 0.5, (CONSTANT,)),
    "constant weight, quarter": Arm("uft-whole", 0.25, (CONSTANT,), ("countdown",)),
    "whole, plain NLL, half": Arm("uft-whole", 0.5, (CONSTANT, "likelihood.rule=nll")),
    "whole, no hints, half": Arm("uft-whole", 0.5, (CONSTANT, "show.schedule=none")),
    "sft-rft, half": Arm("sft-rft", 0.5),
}


def job(task: str, name: str, seed: int, out: Path) -> Job:
    arm, steps = ARMS[name], resolve("uft", recipe=task).train.steps
    every = EVERY[task] if arm.share >= 0.5 else EVERY[task] // 2
    own = [f"train.steps={round(arm.share * steps)}", f"eval.every={every}", "save.every=0", *arm.settings]
    return train_job(arm.method, seed, task, out, own, f"{task}-{name.replace(', ', '-').replace(' ', '-')}")


def reached(metrics: Sequence[dict[str, Any]], target: float) -> dict[str, Any] | None:
    """The metrics of the first evaluation at or above the target."""
    return next((m for m in metrics if m.get("eval/test/accuracy", 0) >= target and m["step"]), None)


def lines(task: str, found: dict[tuple[str, str, int], Run], seeds: Sequence[int]) -> list[str]:
    uft = [found[task, "uft", s][0] for s in seeds]
    target = mean(r["test"]["accuracy"] for r in uft) - SLACK
    budget = {k: mean(r[k] for r in uft) for k in ("tokens_sampled", "tokens_trained", "seconds_training")}
    out = [
        f"{task}: target {100 * target:.1f} %; UFT's budget {budget['tokens_sampled'] / 1e6:.2f} M sampled tokens, "
        f"{budget['tokens_trained'] / 1e6:.2f} M trained tokens, {budget['seconds_training']:.0f} s of training on one core",
        "",
        "| arm | held-out % at its end | 95 % over seeds | each seed | sampled, trained tokens, seconds: share of UFT's "
        "| target reached after, share of UFT's sampled tokens |",
        "|---|---|---|---|---|---|",
    ]
    for name, arm in ARMS.items():
        if task not in arm.tasks:
            continue
        runs = [found[task, name, s] for s in seeds]
        values = [r["test"]["accuracy"] for r, _ in runs]
        low, high = interval(values) if len(values) > 1 else (float("nan"), float("nan"))
        used = [mean(r[k] for r, _ in runs) / budget[k] for k in budget]
        hits = [reached(m, target) for _, m in runs]
        shares = [h["tokens/sampled"] / budget["tokens_sampled"] for h in hits if h is not None]
        when = " ".join(f"{x:.2f}" for x in shares) + (
            f" (never in {hits.count(None)} of {len(hits)})" if None in hits else ""
        )
        each = " ".join(f"{100 * v:.1f}" for v in values)
        out.append(
            f"| {name} | {100 * mean(values):.1f} | {100 * low:.1f} to {100 * high:.1f} | {each} "
            f"| {', '.join(f'{u:.2f}' for u in used)} | {when} |"
        )
    return [*out, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", default="10,11,12,13,14")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    out, seeds = args.out, [int(s) for s in args.seeds.split(",")]
    keys = [(task, name, s) for s in seeds for task in EVERY for name, arm in ARMS.items() if task in arm.tasks]
    jobs = [job(*key, out) for key in keys]
    results = run_many(jobs, args.workers, lambda text: print(text, file=sys.stderr, flush=True))
    found = {k: (r, read_metrics(j.folder / "metrics.jsonl")) for k, j, r in zip(keys, jobs, results, strict=True)}
    text = "\n".join(line for task in EVERY for line in lines(task, found, seeds))
    (out / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
