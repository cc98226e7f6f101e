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
from typing import Any, NamedTuple

import torch

from unift.commands.settings import trained
from unift.config.resolve import parse_overrides, read_yaml, resolve, validate
from unift.config.sections import Config, Model
from unift.config.stages import evaluation_tokens, stages
from unift.config.words import TOKENS
from unift.files import write_atomic
from unift.model.limits import check_positions
from unift.model.load import load_policy, load_tokenizer
from unift.model.logprobs import logprobs
from unift.model.packs import DEMO, Item, Member, cut, pack
from unift.model.policy import Policy
from unift.objectives.weights import weigh
from unift.rewards import open_scorer
from unift.rows import dataset
from unift.rows.dataset import Split
from unift.rows.readers import read_rows
from unift.rows.tasks.format import check_answers
from unift.rows.tokens import encode_rows
from unift.sampling.engines.choose import in_process
from unift.training import evaluate
from unift.training.evaluate import Judge
from unift.training.run.rollouts import read_rollouts
from unift.types import ConfigError, Shown, UniftError

MAX_TARGETS = 2000  # training targets whose likelihood under the base is measured


@dataclass(frozen=True)
class Retained:
    """One retention set. Accuracies are greedy and without hints; log-probs are means over the tokens of the solutions (nats), None
    where no row has one."""

    name: str
    before: evaluate.Accuracy
    after: evaluate.Accuracy
    logp_before: float | None
    logp_after: float | None

    @property
    def forgotten(self) -> float:
        return self.before.accuracy - self.after.accuracy


class Pair(NamedTuple):
    """What is measured: token ids of a context and of a target behind it, and the pictures that the context shows."""

    context: list[int]
    target: list[int]
    shown: Shown | None = None


@torch.no_grad()
def mean_logprob(policy: Policy, pairs: Sequence[Pair], budget: int) -> float:
    """Mean log-prob, in nats, of all target tokens of (context, target) pairs of token ids, untempered."""
    settings = validate({"likelihood": {"tokens": "demo", "weight": 1.0}})
    items = [Item(p.context, [], [Member(p.target, DEMO)], shown=p.shown) for p in pairs if p.target]
    if not items:
        raise UniftError("there is no target to measure: every solution is empty")
    weights, total, n = weigh(items, settings), 0.0, 0
    for which in cut(items, budget, settings):
        batch = pack(items, which, weights, settings)
        assert batch is not None
        l_S, _ = logprobs(policy, batch.to(policy.device))
        total, n = total + float(l_S.double().sum()), n + len(l_S)
    return total / n


def solutions(split: Split) -> list[Pair]:
    """Those of the rows that have one: what follows the prompt of any other row is no solution."""
    return _pairs(split, split.solved)


def _pairs(split: Split, indices: Sequence[int]) -> list[Pair]:
    return [Pair(e.prompt, e.solution, e.shown) for e in (split.encoded[i] for i in indices)]


def training_targets(folder: Path, config: Config, train: Split) -> tuple[str, list[Pair]]:
    """(what they are, (context, target) pairs) of a run: its solutions where they are supervised as a whole, otherwise
    the right completions among the stored rollouts, after the prompt and hint that they were sampled from."""
    found, encoded = stages(config), train.encoded
    if any(TOKENS[stage.rules.likelihood.tokens].demo for stage in found):
        return "solutions", _pairs(train, train.solved[:MAX_TARGETS])
    pairs: list[Pair] = []
    for step in range(found[-1].stop):
        stored = read_rollouts(folder, step)
        for group in stored[1] if stored else []:
            shown = encoded[group.row].shown if encoded else None
            right = [s.tokens for s in group.samples if s.score is not None and s.score.right]
            pairs += [Pair(group.prompt + group.hint, tokens, shown) for tokens in right]
        if len(pairs) >= MAX_TARGETS:
            break
    return "right completions", pairs[:MAX_TARGETS]


def settings_of_run(run: str, words: Sequence[str]) -> Config:
    """Those of a run folder, with what ``words`` (key=value) change. ConfigError where it is no run folder."""
    file = Path(run) / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"--retention compares a run with its base; {run!r} is no run folder (no config.yaml)")
    return resolve(None, file=read_yaml(file), overrides=parse_overrides(words))


def measure(folder: Path, files: Sequence[str], config: Config, max_tokens: int | None = None) -> dict[str, Any]:
    """Retention of the finished run in ``folder`` on the rows of ``files``; also written to ``folder/retention.json``.

    Raises ConfigError where the run is unfinished, DataError where rows do not load.
    """
    if not (folder / "model").is_dir():
        raise ConfigError(f"{folder} holds no finished run (no model/). Continue it first")
    tokenizer = load_tokenizer(config.model)
    sets: list[Split] = []
    for file in files:
        rows = read_rows(file, need_steps=False)
        check_answers(rows, "auto", f"{file}, row")
        encoded = encode_rows(tokenizer, rows, config.data.max_prompt)
        sets.append(Split(rows, encoded, solved=dataset.solved_rows(rows)))
    data = dataset.encode(tokenizer, dataset.load(config), config)
    check_positions(config, data)
    kind, targets = training_targets(folder, config, data.train)
    length = max_tokens or evaluation_tokens(config)

    def under(model: Model) -> tuple[Policy, Judge]:
        policy = load_policy(model, tokenizer)
        return policy, Judge(policy, in_process(policy), scorer, length)

    with open_scorer(config.reward.model_copy(update={"function": "auto"}), data.train.rows) as scorer:
        after_model = config.model.model_copy(update=trained(folder))
        policy, judge = under(config.model)
        before = _measured(judge, sets, config.train.token_budget)
        nll = -mean_logprob(policy, targets, config.train.token_budget) if targets else None
        del policy, judge  # one model at a time
        after = _measured(under(after_model)[1], sets, config.train.token_budget)
    retained = [Retained(f, b[0], a[0], b[1], a[1]) for f, b, a in zip(files, before, after, strict=True)]
    result = {
        "method": config.method,
        "targets": kind,
        "targets_measured": len(targets),
        "nll_of_targets_under_base": nll,
        "forgotten": sum(k.forgotten for k in retained) / len(retained),
        "sets": [asdict(k) | {"forgotten": k.forgotten} for k in retained],
    }
    write_atomic(folder / "retention.json", json.dumps(result, indent=1))
    return result


def _measured(judge: Judge, sets: Sequence[Split], budget: int) -> list[tuple[evaluate.Accuracy, float | None]]:
    """Accuracy and mean log-prob of the solutions of every set."""
    found: list[tuple[evaluate.Accuracy, float | None]] = []
    for split in sets:
        accuracy, pairs = evaluate.accuracy(evaluate.greedy(judge, split)), solutions(split)
        found.append((accuracy, mean_logprob(judge.policy, pairs, budget) if pairs else None))
    return found


def describe(result: dict[str, Any]) -> str:
    """Text for people."""
    percent = lambda a: f"{100 * a['accuracy']:.1f} % [{100 * a['low']:.1f}, {100 * a['high']:.1f}]"  # noqa: E731
    lines = []
    for k in result["sets"]:
        logps = "it has no solutions"
        if k["logp_before"] is not None:
            logps = f"log-prob of its solutions {k['logp_before']:.3f} -> {k['logp_after']:.3f} nats a token"
        lines.append(
            f"{k['name']} ({k['before']['n']} rows): {percent(k['before'])} before, {percent(k['after'])} after; {logps}"
        )
    lines.append(f"forgotten, mean over sets: {100 * result['forgotten']:.1f} points")
    nll = result["nll_of_targets_under_base"]
    lines.append(
        f"training targets ({result['targets']}, {result['targets_measured']}) under the base: "
        + (f"{nll:.3f} nats a token" if nll is not None else "none were found (save.rollouts=false, or no reward)")
    )
    return "\n".join(lines)
