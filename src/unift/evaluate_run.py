"""``unift eval``: accuracy of any model on a split, in one paragraph."""

from __future__ import annotations

from unift import dataset, evaluate, processes
from unift import policy as policies
from unift.config import Config, longest
from unift.rewards import Scorer
from unift.tasks import answer_rule
from unift.types import ConfigError


def evaluate_split(config: Config, split: str, samples: int) -> str:
    """Greedy accuracy, and pass@k from ``samples`` completions a row, as text. Nothing is written."""
    if split not in ("train", "test"):
        raise ConfigError(f"--split: found {split!r}, expected train or test")
    with processes.joined(policies.pick_device(config.model.device).type == "cuda"):
        return _evaluate(config, split, samples)


def _evaluate(config: Config, split: str, samples: int) -> str:
    tokenizer = policies.load_tokenizer(config.model)
    data = dataset.load(config)
    rows = data.test if split == "test" else data.train
    if not rows:
        raise ConfigError("there are no test rows: set data.test=FILE, or use --split train")
    encoded = dataset.encode(tokenizer, data, config)[1 if split == "test" else 0]
    r = config.reward
    max_tokens = config.eval.max_tokens or max(
        [config.sample.max_tokens, *(p.sample.max_tokens for p in config.phases)]
    )
    limits = {"workers": r.workers, "timeout": r.timeout, "error_rate": r.error_rate, "memory_mb": r.memory_mb}
    answer = answer_rule(data.train, r.answer, r.rule)
    with Scorer(r.function, rule=r.rule, answer=answer, **limits) as scorer:
        policy = policies.load(config.model, tokenizer, longest(config))
        a = evaluate.greedy(policy, scorer, rows, encoded, max_tokens)
        lines = [
            f"{split}, greedy, no hint: {100 * a.accuracy:.2f} % [{100 * a.low:.2f}, {100 * a.high:.2f}] of {a.n} rows"
        ]
        if not policy.shared:
            lines.insert(0, f"forward: {policy.path}")
        if samples:
            curve = evaluate.pass_curve(policy, scorer, rows, encoded, max_tokens, samples, config.seed)
            lines += [
                f"{name}: {100 * v['accuracy']:.2f} % [{100 * v['low']:.2f}, {100 * v['high']:.2f}]"
                for name, v in curve.items()
            ]
    return "\n".join(lines)
