"""A run while it goes: what was opened once, what changes within a stage, and what was counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from unift.config.budget import MOST, parse
from unift.config.sections import Config
from unift.config.stages import Stage, evaluation_tokens, stages
from unift.model.policy import Policy
from unift.rewards.journal import COUNTS
from unift.rewards.pool import Scorer
from unift.rows.dataset import Data
from unift.sampling.ahead import Drawing
from unift.sampling.engines.base import Engine
from unift.training.reference import Reference
from unift.training.row_memory import RowMemory

Metrics = dict[str, Any]
Report = Callable[[Metrics, int], Any]  # (metrics of a step, steps of the run); a true result asks the run to stop
Watch = Callable[[str, int, int], Any]  # (what is evaluated, rows done, rows), while an evaluation goes on


def silent(metrics: Metrics, total: int) -> None:
    """The report of whoever wants none."""


def unwatched(what: str, done: int, total: int) -> None:
    """The same of evaluations."""


@dataclass
class Progress:
    """What a run has counted so far. It is in every checkpoint, so it survives kills."""

    tokens_sampled: int = 0
    tokens_trained: int = 0
    seconds: float = 0.0  # evaluations included
    training: float = 0.0
    best: float = -1.0  # accuracy of the best evaluation whose step has a checkpoint
    best_step: int = 0
    position: float = 0.0  # where the schedules are, in steps (train.budget alone)
    starts: list[int] = field(default_factory=list[int])  # steps done before each stage that has begun
    completions: int = 0
    seen: int = 0  # completions that earned the reward
    tested: dict[str, Any] = field(default_factory=dict[str, Any])  # after the last step: Accuracy on all held-out rows
    scored: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))  # outcomes of training completions
    judged: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))  # outcomes in evaluations

    def counters(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name not in ("scored", "judged")}

    def recall(self, counters: Mapping[str, Any], scored: Mapping[str, int], judged: Mapping[str, int]) -> None:
        """Go on from what a checkpoint holds."""
        for name, value in counters.items():
            setattr(self, name, value)
        self.scored |= scored
        self.judged |= judged


@dataclass
class Run:
    """What a run opens once. Of all this only ``progress`` and ``done`` change."""

    config: Config
    folder: Path
    policy: Policy
    engine: Engine
    scorer: Scorer
    data: Data
    report: Report
    track: Report
    watch: Watch = unwatched
    progress: Progress = field(default_factory=Progress)
    done: int = 0  # steps that the last checkpoint holds
    saving: float = 0.0  # seconds of the checkpoint after the last step, which the next step's metrics report

    def __post_init__(self) -> None:
        self.stages = stages(self.config)
        self.total = self.stages[-1].stop
        budget = self.config.train.budget
        self.budget = None if budget is None else parse(budget, "train.budget")
        self.eval_tokens = evaluation_tokens(self.config)

    def left(self) -> list[Stage]:
        """Stages with steps still to do; where none has, the last one, whose weights are evaluated and saved all the same."""
        return [stage for stage in self.stages if stage.stop > self.position] or self.stages[-1:]

    @property
    def position(self) -> float:
        """Where the schedules are: the steps done, or with a budget its share that is used, in steps."""
        return self.done if self.budget is None else self.progress.position

    def start_of(self, stage: Stage) -> int:
        """Steps done before the stage."""
        if self.budget is None:
            return stage.start
        number, starts = self.stages.index(stage), self.progress.starts
        return starts[number] if number < len(starts) else self.done

    def used(self) -> float:
        """Tokens that the budget counts, so far; 0 without one, or with one of seconds."""
        if self.budget is None or self.budget.kind == "seconds":
            return 0
        return self.budget.used(vars(self.progress))

    def expected(self) -> int:
        """Steps of the whole run; with a budget, by what they have cost so far."""
        if self.budget is None or not self.position:
            return self.total
        return max(self.done, round(self.done * self.total / self.position))

    def advance(self, stage: Stage, cost: float) -> bool:
        """Count a step that cost so much of the budget; whether the stage is over.

        A stage whose steps can cost nothing (no sampling under a budget of sampled tokens) has its own steps; the others
        share the budget in the proportion of theirs. The last step is the one that ends nearest to the budget.
        """
        self.done += 1
        if self.budget is None:
            return self.done >= stage.stop
        counted = [s for s in self.stages if self.budget.counts(s.rules.sample.completions)]
        moved = 1.0
        if stage in counted:
            moved = sum(s.total for s in counted) * cost / self.budget.amount
        at = self.progress.position + moved
        last = stage is self.stages[-1] and stage in counted
        over = at + (moved / 2 if last else 0.0) >= stage.stop
        over = over or self.done - self.start_of(stage) >= MOST * stage.total
        self.progress.position = max(at, stage.stop) if over else at
        return over

    def place(self, stage: Stage) -> float | None:
        """The position of the next step's `Moment`."""
        return None if self.budget is None else max(self.position, float(stage.start))


@dataclass
class State:
    """What changes from step to step within a stage, beside the weights."""

    optimizer: torch.optim.Optimizer
    reference: Reference | None
    memory: RowMemory = field(default_factory=RowMemory)
    ahead: Drawing | None = None  # the next step's completions, with engine.overlap


class Clock:
    """Seconds of the parts of a step, as ``time/<name>``."""

    def __init__(self) -> None:
        self.began = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[f"time/{name}"] = self.laps.get(f"time/{name}", 0.0) + now - self.last
        self.last = now

    def total(self) -> float:
        return time.perf_counter() - self.began
