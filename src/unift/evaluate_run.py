"""``unift eval``: accuracy of any model on a split, in one paragraph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from unift import dataset, evaluate, processes
from unift import policy as policies
from unift.config import Config, evaluation_tokens, longest
from unift.evaluate import Draws, Judge
from unift.limits import check_positions
from unift.rewards import open_scorer
from unift.types import ConfigError


def evaluate_split(config: Config, split: str, samples: int) -> str:
    """Greedy accuracy, and pass@k from ``samples`` completions a row, as text. Nothing is written."""
    if split not in ("train", "test"):
        raise ConfigError(f"--split: found {split!r}, expected train or test")
    with processes.joined(policies.pick_device(config.model.device).type == "cuda"):
        return _evaluate(config, split, samples)


def _evaluate(config: Config, split: str, samples: int) -> str:
    tokenizer = policies.load_tokenizer(config.model)
    data = dataset.encode(tokenizer, dataset.load(config), config)
    check_positions(config, data)
    asked = data.test if split == "test" else data.train
    if not asked.rows:
        raise ConfigError("there are no test rows: set data.test=FILE, or use --split train")
    with open_scorer(config.reward) as scorer:
        policy = policies.load(config.model, tokenizer, longest(config))
        judge = Judge(policy, scorer, evaluation_tokens(config))
        a = evaluate.greedy(judge, asked)
        lines = [f"{split}, greedy, no hint: {_percent(asdict(a))} of {a.n} rows"]
        if not policy.shared:
            lines.insert(0, f"forward: {policy.path}")
        if samples:
            curve = evaluate.pass_curve(judge, asked, Draws(samples, config.seed))
            lines += [f"{name}: {_percent(v)}" for name, v in curve.items()]
    return "\n".join(lines)


def _percent(a: Mapping[str, float]) -> str:
    return f"{100 * a['accuracy']:.2f} % [{100 * a['low']:.2f}, {100 * a['high']:.2f}]"
