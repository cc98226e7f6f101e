"""What fine-tuning forgets (arXiv 2506.23508): other tasks before and after, and how far the training targets were from
the base.

F_k = accuracy_k(before) - accuracy_k(after) for every retention set k, and the change of the mean log-prob of its
solutions, which moves long before the accuracy does. The predictor of forgetting is the mean negative log-likelihood of
the training targets under the base: targets that the base finds unlikely pull harder on everything else.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from unift import checkpoint, dataset, evaluate
from unift import config as configuration
from unift import policy as policies
from unift.batch import DEMO, Item, Member, cut, pack, weigh
from unift.config import Config
from unift.data import read_rows
from unift.encode import Encoded, encode_rows
from unift.policy import Policy
from unift.rewards import Scorer
from unift.tasks import answer_rule
from unift.types import ConfigError, Row, UniftError

MAX_TARGETS = 2000  # training targets whose likelihood under the base is measured


@dataclass(frozen=True)
class Kept:
    """One retention set. Accuracies are greedy and without hints; log-probs are means over the solutions' tokens (nats)."""

    name: str
    before: evaluate.Accuracy
    after: evaluate.Accuracy
    logp_before: float
    logp_after: float

    @property
    def forgotten(self) -> float:
        return self.before.accuracy - self.after.accuracy


@torch.no_grad()
def mean_logprob(policy: Policy, pairs: Sequence[tuple[list[int], list[int]]], budget: int) -> float:
    """Mean log-prob, in nats, of all target tokens of (context, target) pairs of token ids, untempered."""
    settings = configuration.validate({"likelihood": {"tokens": "demo", "weight": 1.0}})
    items = [Item(context, [], [Member(target, DEMO)]) for context, target in pairs if target]
    if not items:
        raise UniftError("there is no target to measure: every solution is empty")
    weights, total, n = weigh(items, settings), 0.0, 0
    for which in cut(items, budget):
        batch = pack(items, which, weights, settings)
        assert batch is not None
        l_S, _ = policies.logprobs(policy, batch.to(policy.device))
        total, n = total + float(l_S.double().sum()), n + len(l_S)
    return total / n


def training_targets(
    folder: Path, config: Config, encoded: Sequence[Encoded]
) -> tuple[str, list[tuple[list[int], list[int]]]]:
    """(what they are, (context, target) pairs) of a run: its solutions where they are supervised as a whole, otherwise
    the right completions among the stored rollouts, after the prompt and hint that they were sampled from."""
    spans = configuration.plan(config)
    if any(settings.likelihood.tokens == "demo" for _, _, settings in spans):
        return "solutions", [(e.prompt, e.solution) for e in encoded][:MAX_TARGETS]
    pairs: list[tuple[list[int], list[int]]] = []
    for step in range(spans[-1][1]):
        stored = checkpoint.read_rollouts(folder, step)
        for group in stored[1] if stored else []:
            pairs += [
                (group.prompt + group.hint, s.tokens) for s in group.samples if s.score is not None and s.score.right
            ]
        if len(pairs) >= MAX_TARGETS:
            break
    return "right completions", pairs[:MAX_TARGETS]


def measure(folder: Path, files: Sequence[str], config: Config, max_tokens: int | None = None) -> dict[str, Any]:
    """Retention of the finished run in ``folder`` on the rows of ``files``; also written to ``folder/retention.json``.

    Raises ConfigError where the run is unfinished, DataError where rows do not load.
    """
    if not (folder / "model").is_dir():
        raise ConfigError(f"{folder} holds no finished run (no model/). Continue it first")
    tokenizer = policies.load_tokenizer(config.model)
    sets = [(f, read_rows(f, need_steps=False)) for f in files]
    encoded = [encode_rows(tokenizer, rows, config.data.max_prompt) for _, rows in sets]
    data = dataset.load(config)
    kind, targets = training_targets(folder, config, dataset.encode(tokenizer, data, config)[0])
    length = max_tokens or config.eval.max_tokens or max(s.sample.max_tokens for _, _, s in configuration.plan(config))
    r = config.reward
    limits = {"workers": r.workers, "timeout": r.timeout, "error_rate": r.error_rate, "memory_mb": r.memory_mb}
    answer = answer_rule(data.train, r.answer, r.rule)
    with Scorer("auto", rule=r.rule, answer=answer, **limits) as scorer:
        after_model = config.model.model_copy(update={"path": str(folder / "model"), "gguf": None, "lora": None})
        before, nll = _one_model(config.model, tokenizer, scorer, sets, encoded, length, config, targets)
        after, _ = _one_model(after_model, tokenizer, scorer, sets, encoded, length, config, [])
    kept = [Kept(f, b[0], a[0], b[1], a[1]) for (f, _), b, a in zip(sets, before, after, strict=True)]
    result = {
        "method": config.method,
        "targets": kind,
        "targets_measured": len(targets),
        "nll_of_targets_under_base": nll,
        "forgotten": sum(k.forgotten for k in kept) / len(kept),
        "sets": [asdict(k) | {"forgotten": k.forgotten} for k in kept],
    }
    checkpoint.write_atomic(folder / "retention.json", json.dumps(result, indent=1))
    return result


def _one_model(
    model: configuration.Model,
    tokenizer: Any,
    scorer: Scorer,
    sets: Sequence[tuple[str, list[Row]]],
    encoded: Sequence[list[Encoded]],
    length: int,
    config: Config,
    targets: Sequence[tuple[list[int], list[int]]],
) -> tuple[list[tuple[evaluate.Accuracy, float]], float | None]:
    """(accuracy and mean log-prob of every set, mean NLL of the targets) under one model, loaded and dropped here."""
    policy = policies.load(model, tokenizer)
    budget = config.train.token_budget
    found = []
    for (_, rows), own in zip(sets, encoded, strict=True):
        accuracy = evaluate.greedy(policy, scorer, rows, own, length)
        found.append((accuracy, mean_logprob(policy, [(e.prompt, e.solution) for e in own], budget)))
    return found, -mean_logprob(policy, targets, budget) if targets else None


def describe(result: dict[str, Any]) -> str:
    """Text for people."""
    percent = lambda a: f"{100 * a['accuracy']:.1f} % [{100 * a['low']:.1f}, {100 * a['high']:.1f}]"  # noqa: E731
    lines = []
    for k in result["sets"]:
        lines.append(
            f"{k['name']} ({k['before']['n']} rows): {percent(k['before'])} before, {percent(k['after'])} after; "
            f"log-prob of its solutions {k['logp_before']:.3f} -> {k['logp_after']:.3f} nats a token"
        )
    lines.append(f"forgotten, mean over sets: {100 * result['forgotten']:.1f} points")
    nll = result["nll_of_targets_under_base"]
    lines.append(
        f"training targets ({result['targets']}, {result['targets_measured']}) under the base: "
        + (f"{nll:.3f} nats a token" if nll is not None else "none were found (save.rollouts=false, or no reward)")
    )
    return "\n".join(lines)
