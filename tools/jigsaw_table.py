"""What five ways of learning the jigsaw forget of older tasks, over training and at equal accuracy (arXiv 2506.23508).

    python tools/jigsaw_table.py OUT [--seeds 3] [--rates 3e-4,1e-3] [--steps 400] [--until 0.9] [--workers 2]

    sft       solutions in the form that the base knows            rft          exact reward, 8 completions a prompt
    foreign   the same solutions as bare digits                    rollout-sft  SFT on own right completions
    uft       hints and reward

All runs have the same base, rows and batch; a run ends where its held-out accuracy reaches ``--until``. At every evaluation the
older tasks (colour, shape, half; 100 held-out problems each) are measured with the weights of that step. OUT gets a folder a run
with ``older.json``, then ``table.md`` and ``forgetting.png``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import unift
from unift.commands.retention import Pair, mean_logprob
from unift.config.sections import Config, Model
from unift.model.load import load_policy, load_tokenizer
from unift.rewards import open_scorer
from unift.rows.dataset import Split
from unift.rows.tasks import make_rows
from unift.rows.tokens import encode_rows
from unift.sampling.engines.choose import in_process
from unift.training import evaluate
from unift.training.run import checkpoint

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {}),
    "foreign": ("sft", {"data.options": {"form": "foreign"}}),
    "rft": ("rft", {"sample.completions": 8}),
    "rollout-sft": ("rollout-sft", {"sample.completions": 8}),
    "uft": ("uft", {"sample.completions": 8}),
}
OLDER, PROBLEMS, EVERY, ANSWER = ("colour", "shape", "half"), 100, 10, 12
LEVEL = 0.8  # accuracy on the jigsaw at which runs are compared; a run that never reaches it, at its end
COMMON = {
    "train.decay": "constant",
    "train.warmup": 5,
    "eval.every": EVERY,
    "eval.train_rows": 0,
    "save.every": EVERY,
    "save.keep": 999,
    "threads": 1,
}


def one(folder: Path, variant: str, rate: float, seed: int, steps: int, until: float) -> None:
    """Train until the accuracy is reached, then measure the older tasks at every checkpoint."""
    method, own = VARIANTS[variant]
    reached = lambda step, metrics: metrics.get("eval/test/accuracy", 0.0) >= until  # noqa: E731
    given = COMMON | own | {"train.lr": rate, "train.steps": steps, "seed": seed}
    run = unift.train(method, recipe="jigsaw", run=folder, on_step=reached, quiet=True, **given)
    exact = {m["step"]: m["eval/test/accuracy"] for m in run.metrics if "eval/test/accuracy" in m}
    if exact[max(exact)] < until and max(checkpoint.steps_saved(folder)) < steps:
        sys.exit(f"{folder}: stopped by a signal; the same command continues")
    found = measured(folder, run.config, exact)
    (folder / "older.json").write_text(json.dumps({"points": found, **targets(run.config)}, indent=1))


def measured(folder: Path, config: Config, exact: Mapping[int, float]) -> list[dict[str, Any]]:
    """Accuracy and log-prob of the older tasks' solutions at step 0 and every checkpoint."""
    tokenizer = load_tokenizer(config.model)
    policy = load_policy(config.model, tokenizer)
    rows = {kind: make_rows("jigsaw", PROBLEMS, 1, "test", kind=kind) for kind in OLDER}
    sets = {kind: Split(own, encode_rows(tokenizer, own, config.data.max_prompt)) for kind, own in rows.items()}
    points: list[dict[str, Any]] = []
    with open_scorer(config.reward, rows[OLDER[0]]) as scorer:
        judge = evaluate.Judge(policy, in_process(policy), scorer, ANSWER)
        for step in [0, *checkpoint.steps_saved(folder)]:
            if step:
                checkpoint.restore(folder, step, policy, None)
            pairs = [Pair(e.prompt, e.solution, e.shown) for s in sets.values() for e in s.encoded]
            kept = {kind: evaluate.accuracy(evaluate.greedy(judge, split)).accuracy for kind, split in sets.items()}
            logp = mean_logprob(policy, pairs, config.train.token_budget)
            points.append({"step": step, "exact": exact.get(step), "older": kept, "logp": logp})
    return points


def targets(config: Config) -> dict[str, float]:
    """NLL of given solutions in this run's form under the base, in nats: of a token and of a whole solution."""
    tokenizer = load_tokenizer(config.model)
    policy = load_policy(Model(path=config.model.path), tokenizer)
    rows = make_rows("jigsaw", PROBLEMS, 0, "train", **config.data.options)
    pairs = [Pair(e.prompt, e.solution, e.shown) for e in encode_rows(tokenizer, rows, config.data.max_prompt)]
    nll = -mean_logprob(policy, pairs, config.train.token_budget)
    return {"nll": nll, "nll_whole": nll * sum(len(p.target) for p in pairs) / len(pairs)}


# ---------------------------------------------------------------------------------------------- table and figure


def mean_of(values: Sequence[float], digits: int = 0) -> str:
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def kept_at(points: Sequence[Mapping[str, Any]], level: float) -> float:
    """Mean accuracy on the older tasks where the jigsaw's first reaches ``level``, linear between evaluations; of a run that
    never does, at its end."""
    known = [(p["exact"], statistics.mean(p["older"].values())) for p in points if p["exact"] is not None]
    for (low, before), (high, after) in itertools.pairwise(known):
        if high >= level:
            return before + (after - before) * (level - low) / (high - low)
    return known[-1][1]


def line(variant: str, rate: float, runs: Sequence[Mapping[str, Any]]) -> str:
    """The last point of each run, which is where it reached the accuracy or its last step."""
    first, last = runs[0]["points"][0], [run["points"][-1] for run in runs]
    kinds = " | ".join(
        f"{100 * first['older'][k]:.0f} -> {mean_of([100 * p['older'][k] for p in last])}" for k in OLDER
    )
    moved = [p["logp"] - first["logp"] for p in last]
    matched = mean_of([100 * kept_at(run["points"], LEVEL) for run in runs])
    exact, steps = [100 * (p["exact"] or 0) for p in last], [float(p["step"]) for p in last]
    return (
        f"| {variant} | {rate:g} | {mean_of(steps)} | {mean_of(exact)} | {kinds} | {matched} | {mean_of(moved, 2)} "
        f"| {statistics.mean(run['nll_whole'] for run in runs):.1f} |"
    )


def table(found: Mapping[tuple[str, float], Sequence[Mapping[str, Any]]]) -> str:
    head = f"| run | lr | steps | exact % | colour % | shape % | half % | mean at {100 * LEVEL:.0f} % exact "
    head += "| change of the older solutions' log-prob, nats a token | NLL of a given solution under the base, nats |"
    return "\n".join([head, "|" + "---|" * 10, *(line(v, r, runs) for (v, r), runs in found.items())]) + "\n"


def figure(found: Mapping[tuple[str, float], Sequence[Mapping[str, Any]]], file: Path) -> None:
    """A column a rate. Above: accuracy on the jigsaw (whole line) and on the older tasks (dashed) over steps; below: the older
    tasks' over the jigsaw's, a line a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rates = sorted({rate for _, rate in found})
    fig, axes = pyplot.subplots(2, len(rates), figsize=(5 * len(rates), 7.5), sharey=True, squeeze=False)
    for over_steps, over_new, rate in zip(*axes, rates, strict=True):
        for color, variant in enumerate(VARIANTS):
            for number, run in enumerate(found.get((variant, rate), [])):
                known = [p for p in run["points"] if p["exact"] is not None]
                steps = [p["step"] for p in known]
                old = [100 * statistics.mean(p["older"].values()) for p in known]
                new = [100 * p["exact"] for p in known]
                how = {"color": f"C{color}", "alpha": 0.8, "label": variant if not number else None}
                over_steps.plot(steps, new, **how)
                over_steps.plot(steps, old, linestyle="--", **(how | {"label": None}))
                over_new.plot(new, old, marker=".", **how)
        over_steps.set(xlabel="steps", title=f"learning rate {rate:g}")
        over_new.set(xlabel="jigsaw, exact %")
        over_new.legend()
    axes[0][0].set_ylabel("jigsaw (whole), older tasks (dashed), %")
    axes[1][0].set_ylabel("older tasks, mean %")
    fig.tight_layout()
    fig.savefig(file, dpi=110, bbox_inches="tight")
    pyplot.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", default="3e-4,1e-3")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--until", type=float, default=0.9)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="only the table and figure, of the runs that are finished")
    parser.add_argument("--one", nargs=3, metavar=("VARIANT", "RATE", "SEED"), help="a single run, into OUT")
    args = parser.parse_args()
    if args.one:
        one(args.out, args.one[0], float(args.one[1]), int(args.one[2]), args.steps, args.until)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    runs = [
        (variant, float(rate), seed)
        for seed in range(args.seeds)
        for rate in args.rates.split(",")
        for variant in args.variants.split(",")
    ]
    if args.table:
        runs = [run for run in runs if (folder_of(args.out, *run) / "older.json").is_file()]
    else:
        run_all(args, runs)
    found: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for variant, rate, seed in runs:
        told = json.loads((folder_of(args.out, variant, rate, seed) / "older.json").read_text())
        found.setdefault((variant, rate), []).append(told)
    (args.out / "table.md").write_text(table(found))
    figure(found, args.out / "forgetting.png")
    print(table(found))


def run_all(args: argparse.Namespace, runs: Sequence[tuple[str, float, int]]) -> None:
    """Every run in a process of its own, ``args.workers`` at a time; what was interrupted continues."""
    waiting, active = list(runs), list[subprocess.Popen[bytes]]()
    while waiting or active:
        while waiting and len(active) < args.workers:
            chosen = waiting.pop(0)
            folder = folder_of(args.out, *chosen)
            if not (folder / "older.json").is_file():
                words = [
                    str(folder),
                    "--steps",
                    str(args.steps),
                    "--until",
                    str(args.until),
                    "--one",
                    *map(str, chosen),
                ]
                active.append(subprocess.Popen([sys.executable, __file__, *words]))
        if active and active.pop(0).wait():
            sys.exit("a run failed; its message stands above")


def folder_of(out: Path, variant: str, rate: float, seed: int) -> Path:
    return out / f"{variant}-{rate:g}-seed{seed}"


if __name__ == "__main__":
    main()
