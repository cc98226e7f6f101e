"""``unift train --dry-run``: the resolved settings, the batch arithmetic, a memory estimate and the hint schedule."""

from __future__ import annotations

from pathlib import Path

import torch

from unift.config.identity import to_yaml
from unift.config.sections import Config
from unift.config.stages import stages
from unift.hints import schedules
from unift.model import limits, memory
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
    """The stage that takes most, from the shapes in config.json and the lengths that the settings allow."""
    shapes = limits.text_settings(config.model.path)
    if not shapes:
        return "memory: not estimated (no config.json beside the model)"
    numbers = limits.parameters(shapes)
    if numbers is None:
        return "memory: not estimated (config.json has no hidden_size, num_hidden_layers or vocab_size)"
    cpu = config.model.device == "cpu" or (config.model.device == "auto" and not torch.cuda.is_available())
    found: list[tuple[memory.Memory, memory.Work]] = []
    for stage in stages(config):
        work = memory.work_of(config, stage.rules)
        made = memory.estimate(shapes, config.model, stage.rules, work, config.log.gradients_every > 0, cpu)
        found += [] if made is None else [(made, work)]
    most, work = max(found, key=lambda pair: pair[0].peak)
    lengths = f"forwards of up to {work.pack} tokens (train.token_budget={config.train.token_budget} lowers it)"
    if work.rows:
        lengths += f", {work.rows} completions side by side"
    return f"memory: {numbers / 1e6:.1f} M parameters; {most.text()}\n  {lengths}"


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
