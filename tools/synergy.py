"""Five ways of combining SFT and RL, by difficulty for the base (arXiv 2507.07562), on the jigsaw and on Countdown.

    python tools/synergy.py OUT [--tasks jigsaw,countdown] [--seeds 3] [--steps N] [--workers 1]

    sft, rft       alone                                      interleaved   RL, and SFT on rows that failed
    sft-rft        two stages                                 progressive   RL after a prefix of the solution that shrinks
    data-mixing    RL, then SFT on given and own solutions    merged        the mean of the weights of sft and rft

Every run of a task starts from the same weights, which solve a part of the problems: a short SFT of the embedded base on rows
of another seed. Problems are easy, medium or hard by what those weights reach in 16 samples: half of them right or more, less,
at most two.
All runs have the same rows, prompts a step and number of steps. OUT gets a folder a run and ``table.md``; what was interrupted
continues.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean

import numpy as np

from unift import rng
from unift.commands.compare import Job, run_many, train_job
from unift.config.resolve import parse_overrides, resolve
from unift.config.sections import Config
from unift.rows.inspect import write_rows
from unift.rows.tasks import make_rows
from unift.types import Row

TRAINED = ("sft", "rft", "sft-rft", "interleaved", "progressive", "data-mixing")
ARMS = (*TRAINED, "merged")
QUICK = ("eval.every=0", "save.every=0", "eval.train_rows=0")
SAMPLES = 16  # of the start, a problem
BINS = ("easy", "medium", "hard")
OTHER = 1000  # seed of the rows that the start is made with
INVERSE = {"+": "-", "-": "+", "*": "/", "/": "*"}


@dataclass(frozen=True)
class Study:
    """A task's recipe, steps of the short SFT that makes the start, steps and settings of all other runs."""

    recipe: str
    start: int
    steps: int  # before plain RL has nothing left to learn
    settings: tuple[str, ...] = ()
    long: bool = False  # solutions are given in a longer form than the start's own
    test: int = 400  # held-out problems

    @property
    def config(self) -> Config:
        return resolve("rft", recipe=self.recipe, overrides=parse_overrides(list(self.settings)))


STUDIES = {
    "jigsaw": Study("jigsaw", 46, 24),
    "countdown": Study("countdown", 60, 60, ("data.options.numbers=[2, 3]", "sample.max_tokens=40"), long=True),
}


@dataclass(frozen=True)
class Order:
    """What the command line asks for."""

    out: Path
    seeds: Sequence[int]
    steps: int | None  # None: the study's own
    workers: int
    more: tuple[str, ...] = ()  # settings, key=value
    test: int | None = None  # problems
    arms: Sequence[str] = field(default=ARMS)


# ---------------------------------------------------------------------------------------------- rows


def checked(step: str) -> str:
    """A line of Countdown and its proof: ``7-4=3`` is followed by ``3+4=7``."""
    left, value = step.strip().split("=")
    sign = next(s for s in INVERSE if s in left)
    a, b = left.split(sign)
    return f"{step}{value}{INVERSE[sign]}{b}={a}\n"


def rows_of(study: Study, split: str, count: int) -> list[Row]:
    data = study.config.data
    rows = make_rows(str(data.task), count, 0, split, **data.options)
    if not study.long or split == "test":
        return rows
    return [replace(row, steps=tuple(map(checked, row.steps))) for row in rows]


def rows_settings(study: Study, folder: Path) -> tuple[str, ...]:
    """Where the training rows are: the recipe's own, or a file of the longer solutions."""
    if not study.long:
        return ()
    file = folder / "long.jsonl"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(rows_of(study, "train", study.config.data.train_rows or 1000), file)
    return ("data.task=null", f"data.train={file}")


# ---------------------------------------------------------------------------------------------- runs


def start_job(study: Study, folder: Path) -> Job:
    own = [*QUICK, f"train.steps={study.start}", f"data.seed={OTHER}", "train.decay=constant"]
    own += [word for word in study.settings if word.startswith("data.")]
    return train_job("sft", 0, study.recipe, folder, own, "start")


def jobs_of(study: Study, order: Order, folder: Path) -> list[Job]:
    own = [*QUICK, *rows_settings(study, folder), f"model.path={folder / 'start-seed0' / 'model'}"]
    own += [f"train.steps={order.steps or study.steps}", "train.decay=constant", *study.settings, *order.more]
    wanted = [arm for arm in TRAINED if arm in order.arms or (arm in ("sft", "rft") and "merged" in order.arms)]
    return [train_job(arm, seed, study.recipe, folder, own) for seed in order.seeds for arm in wanted]


def merged(folder: Path, seed: int) -> None:
    from unift.commands.merge import Mixing, merge

    out = folder / f"merged-seed{seed}" / "model"
    if not out.is_dir():
        runs = [str(folder / f"{arm}-seed{seed}") for arm in ("sft", "rft")]
        merge(str(folder / "start-seed0"), runs, out, Mixing("linear", [0.5, 0.5]))


# ---------------------------------------------------------------------------------------------- answers

Judged = list[dict[str, float]]  # a problem: share of right answers, mean length in tokens


def judged(study: Study, run: Path, count: int, samples: int = 0) -> Judged:
    """Answers of a run's model to the test problems, without hints: greedy, or ``samples`` a problem; kept in its folder."""
    file = run / f"answers-{count}-{samples}.json"
    if not file.is_file():
        file.write_text(json.dumps(_judged(study, run / "model", count, samples)))
    return json.loads(file.read_text())


def _judged(study: Study, model: Path, count: int, samples: int) -> Judged:
    from unift.config.sections import Model
    from unift.config.stages import evaluation_tokens
    from unift.model.limits import use_threads
    from unift.model.load import load_policy, load_tokenizer
    from unift.rewards import open_scorer
    from unift.rows.tokens import encode_rows
    from unift.sampling.engines.base import Request
    from unift.sampling.engines.choose import in_process
    from unift.sampling.groups import completed
    from unift.training.evaluate import Answers, draws_of, verdicts

    use_threads(1)
    config, where = study.config, Model(path=str(model))
    tokenizer = load_tokenizer(where)
    policy, length = load_policy(where, tokenizer), evaluation_tokens(config)
    rows = rows_of(study, "test", count)
    requests = [
        Request(e.prompt, draws_of(row, Answers(samples, 0), length) if samples else None, e.shown)
        for row, e in zip(rows, encode_rows(tokenizer, rows, config.data.max_prompt), strict=True)
    ]
    engine = in_process(policy)
    engine.sync(policy, lambda: 0)
    groups = completed(engine, tokenizer, requests, length)
    with open_scorer(config.reward, rows) as scorer:
        right = verdicts(scorer, rows, groups)
    return [
        {"right": mean(map(float, of)), "tokens": mean(float(len(s.tokens)) for s in group)}
        for of, group in zip(right, groups, strict=True)
    ]


def bin_of(share: float) -> str:
    return "hard" if share <= 1 / 8 else "medium" if share < 1 / 2 else "easy"


# ---------------------------------------------------------------------------------------------- table


def against(runs: Sequence[Judged], plain: Sequence[Judged]) -> tuple[float, float, float]:
    """Mean difference of accuracy, seeds paired, in points, with a 95 % bootstrap interval over seeds and problems."""
    gap = np.array(
        [[a["right"] - b["right"] for a, b in zip(x, y, strict=True)] for x, y in zip(runs, plain, strict=True)]
    )
    draws = rng.generator("synergy", "bootstrap")
    seeds, problems = gap.shape
    means = [gap[draws.integers(0, seeds, seeds)][:, draws.integers(0, problems, problems)].mean() for _ in range(2000)]
    low, high = np.quantile(means, [0.025, 0.975])
    return 100 * float(gap.mean()), 100 * float(low), 100 * float(high)


def line(name: str, runs: Sequence[Judged], bins: Sequence[str], plain: Sequence[Judged] | None) -> str:
    def over(key: str, which: str | None) -> list[float]:
        return [mean(a[key] for a, b in zip(run, bins, strict=True) if which in (None, b)) for run in runs]

    known = [b for b in BINS if b in bins]
    shares = [over("right", b) for b in (*known, None)]
    cells = [f"{100 * mean(s):.1f}" for s in shares[:-1]]
    cells.append(f"{100 * mean(shares[-1]):.1f} ({' '.join(f'{100 * s:.1f}' for s in shares[-1])})")
    cells.append("-" if plain is None else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*against(runs, plain)))
    cells.append(" / ".join(f"{mean(over('tokens', b)):.1f}" for b in known))
    return f"| {name} | {' | '.join(cells)} |"


def table(task: str, found: Mapping[str, Sequence[Judged]], start: Judged, bins: Sequence[str]) -> str:
    known = [b for b in BINS if b in bins]
    head = ["run", *(f"{b}, % (n = {bins.count(b)})" for b in known), "all, % (each seed)"]
    head += ["against rft, points [95 %]", f"tokens of an answer, {' / '.join(known)}"]
    lines = [
        f"{task}: {len(bins)} held-out problems, greedy, no hint",
        "",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
    ]
    lines.append(line("start", [start], bins, None))
    plain = found.get("rft")
    lines += [line(arm, runs, bins, None if arm == "rft" else plain) for arm, runs in found.items()]
    return "\n".join(lines) + "\n"


def run(task: str, order: Order) -> str:
    study, folder = STUDIES[task], order.out / task
    count = order.test or study.test

    def say(text: str) -> None:
        print(f"{task}: {text}", file=sys.stderr, flush=True)

    run_many([start_job(study, folder)], 1, say)
    share = judged(study, folder / "start-seed0", count, SAMPLES)
    bins = [bin_of(a["right"]) for a in share]
    say(", ".join(f"{bins.count(b)} {b}" for b in BINS))
    run_many(jobs_of(study, order, folder), order.workers, say)
    if "merged" in order.arms:
        for seed in order.seeds:
            merged(folder, seed)
    found = {arm: [judged(study, folder / f"{arm}-seed{s}", count) for s in order.seeds] for arm in order.arms}
    return table(task, found, judged(study, folder / "start-seed0", count), bins)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", default=",".join(STUDIES))
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of every run")
    parser.add_argument("--test", type=int, help="held-out problems")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("settings", nargs="*", help="key=value, for every run")
    args = parser.parse_intermixed_args(words)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    arms = [arm for arm in ARMS if arm in args.arms.split(",")]
    order = Order(
        args.out.absolute(), range(args.seeds), args.steps, args.workers, tuple(args.settings), args.test, arms
    )
    text = "\n".join(run(task, order) for task in args.tasks.split(","))
    (order.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
