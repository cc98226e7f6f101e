"""``unift train --dry-run``: the resolved settings, the batch arithmetic, a memory estimate and the hint schedule."""

from __future__ import annotations

from pathlib import Path

from unift.config import needs
from unift.config.identity import to_yaml
from unift.config.sections import Config
from unift.config.stages import stages
from unift.hints import schedules
from unift.model import limits
from unift.model.load import locate
from unift.rows.dataset import load
from unift.rows.tasks import make_rows
from unift.types import HANDED, ConfigError


def describe(config: Config, folder: Path) -> str:
    """Text for people. Reads what a run would read before the weights: rows of files, and the model's config.json.

    Raises UniftError for rows, a reward or a model that are not there or cannot be read.
    """
    parts = [to_yaml(config).rstrip(), f"run folder: {folder}", _rows(config), *_batches(config), _memory(config)]
    return "\n".join([*parts, *_schedule(config)])


def _rows(config: Config) -> str:
    """Rows of files are read; one row of a task is made; what lies on the Hub, or was handed over, is left alone."""
    data, rewards = config.data, config.reward.function
    for name in [rewards] if isinstance(rewards, str) else [reward.function for reward in rewards]:
        place = name.rpartition(":")[0]
        if place.endswith(".py") and not Path(place).expanduser().is_file():
            raise ConfigError(f"reward.function={name!r}: no such file (looked in {Path.cwd()})")
    if data.task:
        make_rows(data.task, 1, data.seed, "train", **data.options)
        return f"rows: made by the task {data.task}"
    elsewhere = [name for name in (data.train, data.test) if str(name).startswith("hf:") or name == HANDED]
    if elsewhere:
        return f"rows: {elsewhere[0]}, not looked at"
    found = load(config)
    return f"rows: {len(found.train)} for training, {len(found.test)} held out"


def _batches(config: Config) -> list[str]:
    lines = []
    for stage in stages(config):
        s = stage.rules
        g, n, u = s.sample.completions, s.train.prompts, s.train.updates
        sequences = n * max(g, 1)
        lines.append(
            f"steps {stage.start + 1}-{stage.stop} ({s.method}): {n} prompts x {g} completions = {sequences} sequences a step, "
            f"{u} update{'s' if u > 1 else ''} of {sequences // u}; {stage.total * u} updates in all"
        )
    return lines


def _memory(config: Config) -> str:
    """Weights, gradients and AdamW state exactly, from the shapes in config.json; activations as a rough bound."""
    shapes = limits.model_settings(locate(config.model.path))
    if not shapes:
        return "memory: not estimated (no config.json beside the model)"
    parameters, token = limits.parameters(shapes), limits.token_bytes(shapes, config.model.dtype)
    if parameters is None or token is None:
        return "memory: not estimated (config.json has no hidden_size, num_hidden_layers or vocab_size)"
    size = limits.BYTES[config.model.dtype]
    trained = parameters * size * 4 if config.model.lora is None else parameters * size
    copied = any(needs.reference(stage.rules) for stage in stages(config))
    reference = parameters * size if copied and config.model.lora is None else 0
    activations = config.train.token_budget * token
    gib = 2**30
    return (
        f"memory: {parameters / 1e6:.1f} M parameters; weights, gradients and AdamW {trained / gib:.2f} GiB, "
        f"reference {reference / gib:.2f} GiB, activations of a full micro-batch up to about {activations / gib:.2f} GiB "
        f"(train.token_budget={config.train.token_budget} lowers it)"
    )


def _schedule(config: Config) -> list[str]:
    lines = ["mean share of a 5-step solution shown:"]
    for stage in stages(config):
        n = stage.total
        marks = sorted({0, n // 10, n // 5, n // 4, n // 2, 3 * n // 5, 3 * n // 4, n - 1})
        for step in marks:
            share = schedules.expected_share(stage.rules.show, step, n)
            if share is None:
                lines.append(f"  step {stage.start + step + 1:>6} depends on each row's success")
                continue
            lines.append(f"  step {stage.start + step + 1:>6} {'#' * round(30 * share):<30} {100 * share:5.1f} %")
    return lines
