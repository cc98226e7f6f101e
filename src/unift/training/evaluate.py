"""Accuracy without hints: greedy, and pass@k from samples, with intervals. Correct means the verifier's verdict, never
the reward (format credit does not count, docs/traps.md 33)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from unift import processes, rng
from unift.config.sections import Config
from unift.config.stages import evaluation_tokens, longest
from unift.intervals import wilson
from unift.model.limits import check_positions, longest_context, use_threads
from unift.model.load import load_policy, load_tokenizer, pick_device
from unift.model.policy import Policy
from unift.rewards import open_scorer
from unift.rewards.pool import Scorer
from unift.rows import dataset
from unift.rows.dataset import Split
from unift.rows.tasks.format import answer_rule
from unift.sampling.engines.base import Draws, Engine, Request
from unift.sampling.engines.choose import open_engine
from unift.sampling.groups import completed
from unift.training.run import checkpoint
from unift.training.vote import Judged, chosen
from unift.types import ConfigError, Given, Row, Sample


@dataclass(frozen=True)
class Accuracy:
    """Share of rows solved, Wilson interval, and the number of rows."""

    accuracy: float
    low: float
    high: float
    n: int


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased chance that k of n samples hold a right one: 1 - C(n-right, k)/C(n, k) (arXiv 2107.03374, eq. 1)."""
    if n - right < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - right + 1, n + 1)))


@dataclass(frozen=True)
class Judge:
    """Who answers, and by which engine; who judges, the length limit of an answer in tokens, and who watches: f(rows done,
    rows)."""

    policy: Policy
    engine: Engine
    scorer: Scorer
    max_tokens: int
    watch: Callable[[int, int], Any] = lambda done, total: None


@dataclass(frozen=True)
class Answers:
    """Sampled answers a row."""

    samples: int
    seed: int
    temperature: float = 1.0


def verdicts(scorer: Scorer, rows: Sequence[Row], groups: Sequence[Sequence[Sample]]) -> list[list[bool]]:
    """Right or not, per row and sample. A scorer's failure counts as not right, and the scorer counts it."""
    flat_rows = [row for row, group in zip(rows, groups, strict=True) for _ in group]
    texts = [s.text for group in groups for s in group]
    results = scorer.score(flat_rows, texts, [""] * len(texts))
    right = iter(bool(getattr(r, "right", False)) for r in results)
    return [[next(right) for _ in group] for group in groups]


def _judged(judge: Judge, split: Split, requests: Sequence[Request], temperature: float = 1.0) -> list[list[Judged]]:
    """Sample and judge every row. Each process takes its share of the rows; all get the whole."""
    own = processes.share(len(split.rows))
    asked = [requests[i] for i in own]
    judge.engine.sync(judge.policy, partial(checkpoint.fingerprint, judge.policy))
    watch = lambda done: judge.watch(done, len(own))  # noqa: E731
    groups = completed(judge.engine, judge.policy.tokenizer, asked, judge.max_tokens, temperature, watch)
    right = verdicts(judge.scorer, [split.rows[i] for i in own], groups)
    judged = [
        [Judged(v, s.text, float(np.mean(s.logps)) if s.logps else -np.inf) for v, s in zip(of, group, strict=True)]
        for of, group in zip(right, groups, strict=True)
    ]
    return processes.interleave(processes.gather("an evaluation", judged))


def greedy(judge: Judge, split: Split) -> list[bool]:
    """Whether the greedy answer without a hint is right, row by row."""
    return [v[0].right for v in _judged(judge, split, [Request(e.prompt, None, e.shown) for e in split.encoded])]


def accuracy(right: Sequence[bool]) -> Accuracy:
    n = len(right)
    return Accuracy(sum(right) / max(n, 1), *wilson(sum(right), n), n)


def draws_of(row: Row, answers: Answers, max_tokens: int) -> Draws:
    """The random numbers of a row's sampled answers in evaluations."""
    return Draws(("eval", answers.seed, row.id), answers.samples, answers.samples, max_tokens)


def pass_curve(judge: Judge, split: Split, answers: Answers, place: str | None = None) -> dict[str, dict[str, float]]:
    """pass@1, 2, 4, ... ``answers.samples``: mean over rows with a bootstrap interval (95 %, over rows).

    ``place``: of the answer; then also what the same samples reach as a vote and by their likelihood."""
    requests = [
        Request(e.prompt, draws_of(row, answers, judge.max_tokens), e.shown)
        for row, e in zip(split.rows, split.encoded, strict=True)
    ]
    groups = _judged(judge, split, requests, answers.temperature)
    found = curve([sum(s.right for s in group) for group in groups], answers)
    return found | (chosen(split.rows, groups, place) if place is not None else {})


def curve(counts: Sequence[int], answers: Answers) -> dict[str, dict[str, float]]:
    """pass@1, 2, 4, ... of rows with so many right samples each: mean with a bootstrap interval (95 %, over rows); Wilson's
    where all rows are alike, of which a bootstrap would claim to be sure."""
    samples, n = answers.samples, len(counts)
    ks = sorted({2**i for i in range(samples.bit_length()) if 2**i <= samples} | {samples})
    picks = rng.generator("bootstrap", answers.seed).integers(0, n, (1000, n))
    found: dict[str, dict[str, float]] = {}
    for k in ks:
        values = np.array([pass_at_k(samples, c, k) for c in counts])
        low, high = np.quantile(values[picks].mean(1), [0.025, 0.975])
        if np.ptp(values) == 0:
            low, high = wilson(float(values.sum()), n)
        found[f"pass@{k}"] = {"accuracy": float(values.mean()), "low": float(low), "high": float(high)}
    return found


@dataclass(frozen=True)
class Evaluation:
    """Accuracy of a model on a split, without hints. ``pass_at``: "pass@k", "vote@k" or "rerank@k" -> accuracy, low, high.
    ``forward``: which path."""

    split: str
    greedy: Accuracy
    pass_at: Mapping[str, Mapping[str, float]]
    forward: str

    def __str__(self) -> str:
        lines = [f"{self.split}, greedy, no hint: {_percent(asdict(self.greedy))} of {self.greedy.n} rows"]
        if self.forward.startswith("plain"):
            lines.insert(0, f"forward: {self.forward}")
        return "\n".join([*lines, *(f"{name}: {_percent(v)}" for name, v in self.pass_at.items())])


def evaluate_split(
    config: Config, split: str, samples: int, given: Given | None = None, vote: bool = False
) -> Evaluation:
    """Greedy accuracy, and pass@k from ``samples`` completions a row; ``vote``: one answer chosen of them, too. Nothing is
    written."""
    if samples < 0:
        raise ConfigError(f"samples={samples}: expected completions a row for pass@k, or 0 for greedy answers alone")
    if vote and samples < 2:
        raise ConfigError(
            f"a vote needs several samples a row: found samples={samples}; use --samples K with K of 2 or more"
        )
    if split not in ("train", "test"):
        raise ConfigError(f"split: found {split!r}, expected train or test")
    use_threads(config.threads)
    with processes.joined(pick_device(config.model.device).type == "cuda"):
        return _evaluate(config, split, samples, given or Given(), vote)


def _evaluate(config: Config, split: str, samples: int, given: Given, vote: bool) -> Evaluation:
    tokenizer = load_tokenizer(config.model)
    data = dataset.encode(tokenizer, dataset.load(config, given.rows, only=split), config)
    check_positions(config, data)
    asked = data.test if split == "test" else data.train
    if not asked.rows:
        raise ConfigError("there are no test rows: set data.test=FILE, or use --split train")
    solved = data.train.rows or asked.rows  # those whose solutions show where an answer stands
    with open_scorer(config.reward, solved, given.reward) as scorer:
        policy = load_policy(config.model, tokenizer, longest(config))
        place = answer_rule(solved, config.reward.answer, config.reward.rule) if vote else None
        with open_engine(config.engine, policy, Path(config.run or "runs"), longest_context(config, data)) as engine:
            judge = Judge(policy, engine, scorer, evaluation_tokens(config))
            answered = accuracy(greedy(judge, asked))
            curve = pass_curve(judge, asked, Answers(samples, config.seed), place) if samples else {}
    return Evaluation(split, answered, curve, policy.path)


def _percent(a: Mapping[str, float]) -> str:
    return f"{100 * a['accuracy']:.2f} % [{100 * a['low']:.2f}, {100 * a['high']:.2f}]"
