"""A choice of stored rollouts: few steps, few groups, few completions, so that the page stays small."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from unift import config as configuration
from unift import credit
from unift.config import Config, Credit


@dataclass(frozen=True)
class Completion:
    text: str
    tokens: int
    finished: bool  # ended by itself, not at the length limit
    value: float | None  # None: the scorer failed
    correct: bool | None
    parts: Mapping[str, float]
    note: str
    error: str
    advantage: float | None  # None: no score, or settings that this version does not accept
    times: int = 1  # completions of the group with this very text and verdict


@dataclass(frozen=True)
class Group:
    row_id: str
    prompt: str
    hint: str
    cuts: int
    cuts_total: int
    completions: Sequence[Completion]  # the chosen ones, different from each other
    size: int  # completions in the group
    kind: str


@dataclass(frozen=True)
class Step:
    number: int  # as in metrics.jsonl: finished steps, from 1
    groups: Sequence[Group]
    size: int  # groups in the step


KINDS = ("mixed scores", "scorer failed", "all the same, wrong", "all the same, right")


def choose(
    folder: Path, config: Config | None, steps: int, groups: int, samples: int, remarks: list[str]
) -> tuple[list[Step], int]:
    """(at most ``steps`` steps spread evenly over those stored, the number stored). Unreadable ones become remarks."""
    paths = sorted((folder / "rollouts").glob("step_*.jsonl.gz"))
    numbers = {p: int(p.name[5:].split(".")[0]) for p in paths if p.name[5:].split(".")[0].isdigit()}
    paths = list(numbers)
    picked = [paths[i] for i in sorted({round(x) for x in np.linspace(0, len(paths) - 1, min(steps, len(paths)))})]
    found = []
    for path in picked:
        try:
            found.append(_step(path, numbers[path], config, groups, samples))
        except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
            remarks.append(f"rollouts/{path.name} was left out: it cannot be read ({error!r}).")
    return found, len(paths)


def _step(path: Path, step: int, config: Config | None, groups: int, samples: int) -> Step:
    rule = _credit(config, step)
    found: list[Group] = []
    with gzip.open(path, "rt", encoding="utf-8") as handle:
        next(handle)
        found.extend(_group(json.loads(line), rule) for line in handle)
    queues = [[g for g in found if g.kind == kind] for kind in KINDS]
    picked: list[Group] = []
    while len(picked) < groups and any(queues):  # one of each kind before a second of any
        picked += [q.pop(0) for q in queues if q]
    return Step(step + 1, [_fewer(g, samples) for g in picked[:groups]], len(found))


def _credit(config: Config | None, step: int) -> Credit | None:
    if config is None:
        return None
    return next((s.rules.credit for s in configuration.stages(config) if s.start <= step < s.stop), None)


def _group(record: Mapping[str, Any], rule: Credit | None) -> Group:
    samples = record["samples"]
    scored = [s for s in samples if s["score"]]
    values = [float(s["score"]["value"]) for s in scored]
    # As in the loop: a sample whose scorer failed takes no part in its group's statistics.
    advantages = iter(credit.advantages(values, rule) if rule else [None] * len(values))
    merged: dict[tuple[Any, ...], Completion] = {}
    for s in samples:
        score = s["score"] or {}
        one = Completion(
            text=str(s["completion"]),
            tokens=len(s["tokens"]),
            finished=bool(s["finished"]),
            value=score.get("value"),
            correct=score.get("correct"),
            parts=score.get("parts") or {},
            note=str(score.get("note") or ""),
            error=str(s["error"] or ""),
            advantage=next(advantages) if s["score"] else None,
        )
        key = (one.text, one.finished, one.value, one.correct, one.error)
        before = merged.get(key)
        merged[key] = replace(before, times=before.times + 1) if before else one
    return Group(
        row_id=str(record["row_id"]),
        prompt=str(record["prompt"]),
        hint=str(record["hint"]),
        cuts=int(record["cuts"]),
        cuts_total=int(record["cuts_total"]),
        completions=list(merged.values()),
        size=len(samples),
        kind=_kind(samples, values),
    )


def _kind(samples: Sequence[Mapping[str, Any]], values: Sequence[float]) -> str:
    if len(set(values)) > 1:
        return KINDS[0]
    if len(values) < len(samples):
        return KINDS[1]
    return KINDS[3] if values and values[0] >= 1 else KINDS[2]


def _fewer(group: Group, limit: int) -> Group:
    """The best, the worst and a failed one come first; then in the order of the file. Shown from best to worst."""
    ranked = sorted(group.completions, key=lambda c: (c.value is None, -(c.value or 0.0)))
    scored = [c for c in ranked if c.value is not None]
    failed = [c for c in ranked if c.value is None]
    wanted = [*scored[:1], *scored[1:][-1:], *failed[:1], *group.completions]
    keep: list[Completion] = []
    for one in wanted:
        if not any(one is other for other in keep):
            keep.append(one)
    keep = keep[:limit]
    return replace(group, completions=[c for c in ranked if any(c is k for k in keep)])
