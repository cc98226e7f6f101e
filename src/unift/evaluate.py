"""Accuracy without hints: greedy, and pass@k from samples, with intervals. Correct means the verifier's verdict, never
the reward (format credit does not count, trap 33)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unift import processes, rng
from unift.encode import Encoded
from unift.engines.native import Request, generate
from unift.policy import Policy
from unift.rewards import Scorer
from unift.summary import wilson
from unift.types import Row, Sample


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


def complete(
    policy: Policy, requests: Sequence[Request], max_tokens: int, temperature: float = 1.0
) -> list[list[Sample]]:
    groups = generate(policy, requests, max_tokens, temperature)
    flat = [s for g in groups for s in g]
    texts = policy.tokenizer.batch_decode([s.tokens for s in flat], skip_special_tokens=True)
    for sample, text in zip(flat, texts, strict=True):
        sample.text = text
    return groups


def verdicts(scorer: Scorer, rows: Sequence[Row], groups: Sequence[Sequence[Sample]]) -> list[list[bool]]:
    """Right or not, per row and sample. A scorer's failure counts as not right, and the scorer counts it."""
    flat_rows = [row for row, group in zip(rows, groups, strict=True) for _ in group]
    texts = [s.text for group in groups for s in group]
    results = scorer.score(flat_rows, texts, [""] * len(texts))
    right = iter(bool(getattr(r, "right", False)) for r in results)
    return [[next(right) for _ in group] for group in groups]


def _judged(
    policy: Policy,
    scorer: Scorer,
    rows: Sequence[Row],
    requests: Sequence[Request],
    max_tokens: int,
    temperature: float = 1.0,
) -> list[list[bool]]:
    """Sample and judge: right or not, per row and sample. Each process takes its share of the rows; all get the whole."""
    own = processes.share(len(rows))
    groups = complete(policy, [requests[i] for i in own], max_tokens, temperature)
    right = verdicts(scorer, [rows[i] for i in own], groups)
    return processes.interleave(processes.gather("an evaluation", right))


def greedy(
    policy: Policy, scorer: Scorer, rows: Sequence[Row], encoded: Sequence[Encoded], max_tokens: int
) -> Accuracy:
    """Greedy accuracy without a hint."""
    right = sum(v[0] for v in _judged(policy, scorer, rows, [Request(e.prompt, None) for e in encoded], max_tokens))
    return Accuracy(right / max(len(rows), 1), *wilson(right, len(rows)), len(rows))


def pass_curve(
    policy: Policy,
    scorer: Scorer,
    rows: Sequence[Row],
    encoded: Sequence[Encoded],
    max_tokens: int,
    samples: int,
    seed: int,
    temperature: float = 1.0,
) -> dict[str, dict[str, float]]:
    """pass@1, 2, 4, ... ``samples``: mean over rows with a bootstrap interval (95 %, over rows)."""
    requests = [
        Request(e.prompt, rng.uniforms("eval", seed, row.id, shape=(samples, max_tokens)))
        for row, e in zip(rows, encoded, strict=True)
    ]
    counts = [sum(v) for v in _judged(policy, scorer, rows, requests, max_tokens, temperature)]
    ks = sorted({2**i for i in range(samples.bit_length()) if 2**i <= samples} | {samples})
    draws = rng.generator("bootstrap", seed).integers(0, len(rows), (1000, len(rows)))
    curve = {}
    for k in ks:
        values = np.array([pass_at_k(samples, c, k) for c in counts])
        low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
        curve[f"pass@{k}"] = {"accuracy": float(values.mean()), "low": float(low), "high": float(high)}
    return curve
