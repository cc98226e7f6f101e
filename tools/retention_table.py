"""What four methods forget while they learn: SFT, SFT on own right completions, RFT and UFT on two tasks of Countdown.

    python tools/retention_table.py OUT [--seeds 3] [--steps 120] [--workers 2]

pairs   two numbers from 16 to 90, from the embedded base, which solves 18 % of them
threes  three numbers from 1 to 15, from a UFT run of 60 steps, since the base itself never solves one

All runs of a task have the same base, rows, steps and learning rate. Retained: problems of two numbers from 1 to 15, which
are part of what the base was made of. OUT gets a folder a run, each with ``retention.json``, and ``table.md``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unift.commands.compare import Job, run_many, train_job

METHODS = ("sft", "rollout-sft", "rft", "uft")
OPTIONS = {
    "pairs": "{numbers: 2, values: [16, 90], targets: [10, 99], style: short}",
    "threes": "{numbers: 3, values: [1, 15], targets: [10, 99], style: short}",
}
RETAINED = ("numbers=2", "values=[1, 15]", "targets=[10, 99]", "style=short")
COMMON = ["train.lr=4.0e-4", "train.betas=[0.9, 0.99]", "train.warmup=10", "train.decay=constant", "eval.every=0", "save.every=0",
          "save.rollouts=true"]  # fmt: skip


def unift(*words: str) -> list[str]:
    return [sys.executable, "-m", "unift", *words]


def base_of(task: str, out: Path) -> list[str]:
    """Settings that name the model a task begins from; made here where it is a run."""
    if task == "pairs":
        return []
    warm = train_job("uft", 100, "countdown", out, [*COMMON, "train.steps=60"], "warm")
    run_many([warm], 1)
    return [f"model.path={warm.folder / 'model'}"]


def measure(run: Path, rows: Path) -> dict[str, Any]:
    subprocess.run(unift("eval", str(run), "--retention", str(rows), "threads=1"), check=True, capture_output=True)
    return json.loads((run / "retention.json").read_text())


def mean_of(values: Sequence[float], digits: int = 1) -> str:
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def line(task: str, method: str, runs: Sequence[dict[str, Any]]) -> str:
    share = lambda key: [100 * r[key]["accuracy"] for r in runs]  # noqa: E731
    sets = [r["retention"]["sets"][0] for r in runs]
    nll = [r["retention"]["nll_of_targets_under_base"] for r in runs]
    moved = [s["logp_after"] - s["logp_before"] for s in sets]
    lost = [100 * s["forgotten"] for s in sets]
    known = [x for x in nll if x is not None]
    return (
        f"| {task} | {method} | {share('base')[0]:.1f} -> {mean_of(share('test'))} | {100 * sets[0]['before']['accuracy']:.1f} -> "
        f"{mean_of([100 * s['after']['accuracy'] for s in sets])} | {mean_of(lost)} "
        f"| {mean_of(moved, 3)} | {mean_of(known, 2) if known else '-'} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    rows = out / "retained.jsonl"
    options = [word for pair in RETAINED for word in ("--option", pair)]
    subprocess.run(unift("data", "make", "countdown", str(rows), "--n", "150", *options), check=True)
    jobs: list[tuple[str, Job]] = []
    for task, chosen in OPTIONS.items():
        base = base_of(task, out)
        for seed in range(args.seeds):
            for method in METHODS:
                own = [*COMMON, f"data.options={chosen}", f"train.steps={args.steps}", *base]
                jobs.append((task, train_job(method, seed, "countdown", out, own, f"{task}-{method}")))
    results = run_many([job for _, job in jobs], args.workers, lambda text: print(text, flush=True))
    table: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for (task, job), result in zip(jobs, results, strict=True):
        table.setdefault((task, job.method), []).append(result | {"retention": measure(job.folder, rows)})
    lines = [
        "| task | method | held-out % | retained % | forgotten, points "
        "| change of the retained solutions' log-prob, nats a token | NLL of the targets under the base |",
        "|---|---|---|---|---|---|---|",
        *(line(task, method, runs) for (task, method), runs in table.items()),
    ]
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
