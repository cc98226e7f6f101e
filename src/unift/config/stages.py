"""A run in time: its stages, the moment of a step, and the lengths that follow from all stages."""

from __future__ import annotations

from dataclasses import dataclass

from unift.config.sections import Config, Rules
from unift.types import ConfigError


@dataclass(frozen=True)
class Stage:
    """A stretch of a run with one method: its steps ``start`` to ``stop`` - 1, counted from 0 over the run."""

    start: int
    stop: int
    rules: Rules

    @property
    def total(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Moment:
    """A step of a run: what its random draws are addressed by. ``step`` counts from 0 over the run. ``position``: where the
    schedules are, in the steps that stages count; None where that is the step itself (no train.budget)."""

    seed: int
    step: int
    stage: Stage
    position: float | None = None

    @property
    def rules(self) -> Rules:
        return self.stage.rules

    @property
    def within(self) -> float:
        """Steps since the stage began, which its schedules count by; whole without a budget."""
        return (self.step if self.position is None else self.position) - self.stage.start


def stages(config: Config) -> list[Stage]:
    """The run in its stages: one, unless there are phases."""
    if not config.phases:
        return [Stage(0, config.train.steps, config)]
    shares = sum(phase.share for phase in config.phases)
    if abs(shares - 1) > 1e-3:
        raise ConfigError(f"the shares of the phases add up to {shares:g}, expected 1")
    found: list[Stage] = []
    done, start = 0.0, 0
    for phase in config.phases:
        done += phase.share
        stop = round(config.train.steps * done / shares)
        if stop <= start:
            raise ConfigError(f"phase {phase.method!r} would have no step of train.steps={config.train.steps}")
        found.append(Stage(start, stop, phase))
        start = stop
    return found


def evaluation_tokens(config: Config) -> int:
    """Length limit of a completion in evaluations: eval.max_tokens, else the longest that a stage samples."""
    return config.eval.max_tokens or max(stage.rules.sample.max_tokens for stage in stages(config))


def longest(config: Config) -> int:
    """Tokens of the longest sequence that a run can forward: prompt with its whole solution as hint, then a completion."""
    completions = [stage.rules.sample.max_tokens for stage in stages(config)]
    return config.data.max_prompt + max([*completions, config.eval.max_tokens or 0])
