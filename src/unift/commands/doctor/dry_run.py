"""``unift train --dry-run``: the resolved settings, the batch arithmetic, a memory estimate and the hint schedule."""

from __future__ import annotations

from pathlib import Path

import torch

from unift.config.identity import to_yaml
from unift.config.sections import Config
from unift.config.stages import stages
from unift.hints import schedules
from unift.model import architecture, limits, memory
from unift.model.load import load_tokenizer
from unift.rows.dataset import encode, load
from unift.types import HANDED, ConfigError


def describe(config: Config, folder: Path) -> str:
    """Text for people. Does what a run does before it reads the weights: rows are read or made, tokenised and checked against the
    model's positions. What lies on the Hub, or was handed over, is left alone.

    Raises UniftError for rows, a reward or a model that are not there, cannot be read or do not fit.
    """
    _check_rewards(config)
    rows, longest = _rows(config)
    parts = [to_yaml(config).rstrip(), f"run folder: {folder}", rows, *_batches(config), _memory(config, longest)]
    return "\n".join([*parts, *_schedule(config)])


def _check_rewards(config: Config) -> None:
    rewards = config.reward.function
    for name in [rewards] if isinstance(rewards, str) else [reward.function for reward in rewards]:
        place = name.rpartition(":")[0]
        if place.endswith(".py") and not Path(place).expanduser().is_file():
            raise ConfigError(f"reward.function={name!r}: no such file (looked in {Path.cwd()})")


def _rows(config: Config) -> tuple[str, int | None]:
    """Text, and tokens of prompt and solution of the longest training row that a start looks at; None for rows elsewhere."""
    places = (config.data.train, config.data.test)
    elsewhere = [name for name in places if str(name).startswith("hf:") or name == HANDED]
    if elsewhere and not config.data.task:
        return f"rows: {elsewhere[0]}, not looked at", None
    found = load(config)
    data = encode(load_tokenizer(config.model), found, config)
    limits.check_positions(config, data)
    train, test, known = len(found.train), len(found.test), len(data.train.solved)
    made = f", made by the task {config.data.task}" if config.data.task else ""
    solved = "" if known == train else f", {known} of them with a solution"
    looked = (data.train.encoded[i] for i in data.train.looked_at)
    longest = max(max(len(e.prompt), len(e.instructed or [])) + len(e.solution) for e in looked)
    lengths = f"at most {longest} tokens of prompt and solution"
    return f"rows: {train} for training{solved}, {test} held out{made}; {lengths}", longest


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


def _memory(config: Config, longest: int | None) -> str:
    """The stage that takes most, from the model's class and the ``longest`` row, or what the settings allow."""
    built = architecture.of(config.model)
    if built is None:
        return "memory: not estimated (the model's config has no hidden_size, num_hidden_layers or vocab_size)"
    cpu = config.model.device == "cpu" or (config.model.device == "auto" and not torch.cuda.is_available())
    found: list[tuple[memory.Memory, memory.Work]] = []
    for stage in stages(config):
        work = memory.work_of(config, stage.rules, longest)
        measured = config.log.gradients_every > 0
        found.append((memory.estimate(built, config.model, stage.rules, work, measured, cpu), work))
    most, work = max(found, key=lambda pair: pair[0].peak)
    lengths = f"forwards of up to {work.pack} tokens (train.token_budget={config.train.token_budget} lowers it)"
    if work.rows:
        lengths += f", {work.rows} completions side by side"
    trained = "" if built.trained == built.numbers else f", {built.trained / 1e6:.1f} M of them trained"
    return f"memory: {built.numbers / 1e6:.1f} M parameters{trained}; {most.text()}\n  {lengths}"


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
