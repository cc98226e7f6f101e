"""What a run remembers about its rows between steps. Plain numbers, in every checkpoint (JSON keeps float64 exactly).

It changes only at the end of a step, as a function of that step's groups: a run that is killed in between reads the old
memory and comes to the same new one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from unift.config.sections import Likelihood, SampleFrom, Show
from unift.config.words import SCHEDULES
from unift.credit.members import fails, success_rate
from unift.hints import schedules
from unift.types import Group


@dataclass
class RowMemory:
    """``hints``: (low, high) of a row's hint length. ``waiting``: indices of gated rows, oldest first.
    ``partition``: u of a row (discriminative), log domain. ``last``: what followed a row's prompt in its last group, tokens."""

    hints: dict[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])
    waiting: list[int] = field(default_factory=list[int])
    partition: dict[str, float] = field(default_factory=dict[str, float])
    last: dict[str, list[list[int]]] = field(default_factory=dict[str, list[list[int]]])

    def dump(self) -> dict[str, Any]:
        return {
            "hints": {k: list(v) for k, v in self.hints.items()},
            "waiting": self.waiting,
            "partition": self.partition,
            "last": self.last,
        }

    @classmethod
    def load(cls, stored: Mapping[str, Any] | None) -> RowMemory:
        stored = stored or {}
        pairs = {k: (v[0], v[1]) for k, v in stored.get("hints", {}).items()}
        partition, last = dict(stored.get("partition", {})), dict(stored.get("last", {}))
        return cls(pairs, list(stored.get("waiting", [])), partition, last)

    def see(self, groups: Sequence[Group], show: Show) -> None:
        """Hint lengths after a step, in the order of the groups (a row may come twice)."""
        if not SCHEDULES[show.schedule].follows:
            return
        for group in groups:
            if not group.solved or not any(s.score is not None for s in group.samples):
                continue  # there is nothing to show, or every scorer failed: nothing was learnt about the row
            shown = group.cuts / group.cuts_total if group.cuts_total else 0.0
            seen = schedules.Seen(shown, success_rate(group))
            self.hints[group.row_id] = schedules.advance(show, self.hints.get(group.row_id), seen)

    def mean_share(self, groups: Sequence[Group], show: Show) -> float:
        """Mean of the rows' expected shares (adaptive, bisection), before this step moves them."""
        states = [schedules.known(show, self.hints.get(g.row_id)) for g in groups if g.solved]
        return sum(low + high for low, high in states) / (2 * len(states)) if states else 0.0

    def collect(self, groups: Sequence[Group], likelihood: Likelihood) -> list[int]:
        """Gated rows join the queue; once it holds ``buffer`` rows, so many are taken from its head, else none."""
        if likelihood.gate is None or not likelihood.buffer:
            return []
        self.waiting += [g.row for g in groups if g.solved and fails(g, likelihood.gate)]
        if len(self.waiting) < likelihood.buffer:
            return []
        taken, self.waiting = self.waiting[: likelihood.buffer], self.waiting[likelihood.buffer :]
        return taken

    def keep(self, groups: Sequence[Group], sample: SampleFrom) -> None:
        """The completions that ``sample.draft=last`` needs when their row comes again, without repeats."""
        if sample.draft != "last":
            return
        for group in groups:
            texts = {tuple(group.hint + s.tokens) for s in group.samples}
            self.last[group.row_id] = [list(t) for t in sorted(texts)]

    def drafts(self, group: Group, solution: list[int], sample: SampleFrom) -> list[list[int]]:
        """Texts that may come after the group's prompt, the likelier ones first."""
        if sample.draft == "none":
            return []
        return [*self.last.get(group.row_id, []), solution]
