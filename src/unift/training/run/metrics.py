"""Numbers of a step, and ``metrics.jsonl``: one JSON object a line, the last of which a kill may tear."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unift.config.sections import Rules
from unift.files import write_atomic, writing
from unift.types import Group, UniftError


def merged(parts: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Metrics of a step from those of its updates: means, and sums of tokens and of skipped updates."""
    found: dict[str, Any] = {k: float(np.mean([p[k] for p in parts if k in p])) for k in parts[0]}
    for name in {"tokens/forwarded", "tokens/supervised", "grad/skipped"} & found.keys():
        found[name] = sum(p[name] for p in parts)
    return found


def group_metrics(groups: Sequence[Group], rules: Rules) -> dict[str, Any]:
    """What the groups show: hints (of rows that have a solution, where there are any), reward, groups without signal by cause,
    lengths."""
    hinted = [g for g in groups if g.solved] or groups
    shown = [g.cuts / g.cuts_total if g.cuts_total else 0.0 for g in hinted]
    found: dict[str, Any] = {
        "hint/fraction": float(np.mean(shown)),
        "hint/tokens": float(np.mean([len(g.hint) for g in hinted])),
    }
    if rules.sample.completions == 0:
        return found
    scores = [[s.score.value for s in g.samples if s.score is not None] for g in groups]
    rewards = [r for group in scores for r in group]
    samples = [s for g in groups for s in g.samples]
    ended = [len(s.tokens) for s in samples if s.finished]
    found |= {
        "reward": float(np.mean(rewards)) if rewards else 0.0,
        "reward_std": float(np.mean([np.std(g) for g in scores if g])) if rewards else 0.0,
        "frac_reward_zero_std": float(np.mean([len(set(g)) <= 1 for g in scores])),
        "groups/all_right": float(np.mean([bool(g) and min(g) >= 1 for g in scores])),
        "groups/all_wrong": float(np.mean([bool(g) and max(g) < 1 for g in scores])),
        "completions/mean_length": float(np.mean([len(s.tokens) for s in samples])) if samples else 0.0,
        "completions/clipped_ratio": float(np.mean([not s.finished for s in samples])) if samples else 0.0,
        "completions/mean_terminated_length": float(np.mean(ended)) if ended else 0.0,
    }
    answers = [s.score.parts["no_answer"] for s in samples if s.score is not None and "no_answer" in s.score.parts]
    if answers:  # verifiers that look for an answer say whether there was one
        found["completions/no_answer"] = float(np.mean(answers))
    by_hint: dict[int, list[float]] = {}
    for group, values in zip(groups, scores, strict=True):
        if rules.show.unit == "cuts":
            by_hint.setdefault(group.cuts, []).extend(values)
    if not all(g.solved for g in groups):
        found["groups/without_solution"] = float(np.mean([not g.solved for g in groups]))
        for name, solved in (("with_solution", True), ("without_solution", False)):
            values = [r for g, own in zip(groups, scores, strict=True) if g.solved == solved for r in own]
            found |= {f"reward/{name}": float(np.mean(values))} if values else {}
    return found | {f"reward/by_hint/{k}": float(np.mean(v)) for k, v in sorted(by_hint.items()) if v}


def append_metrics(path: Path, metrics: dict[str, Any]) -> None:
    with writing(path.name, path.parent), open(path, "a", encoding="utf-8") as handle:
        handle.write(json.dumps(metrics) + "\n")


def read_metrics(path: Path, up_to: int | None = None) -> list[dict[str, Any]]:
    """Complete lines with step <= ``up_to``; a line torn by a kill is left out.

    Raises UniftError for a file that is no text, and for a line that is whole and yet no metrics of a step.
    """
    if not path.is_file():
        return []
    records = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UniftError(
            f"{path} cannot be read as text ({error}): the run folder is damaged. Use another one"
        ) from None
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            break
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise UniftError(
                f"{path}, line {number} holds no metrics of a step: expected an object with a whole 'step', found "
                f"{record!r:.40}. Delete the line, or use another run folder"
            )
        if up_to is None or record["step"] <= up_to:
            records.append(record)
    return records


def rewind_metrics(path: Path, step: int) -> list[dict[str, Any]]:
    """Forget what was logged after ``step``: those steps run again."""
    records = read_metrics(path, step)
    write_atomic(path, "".join(json.dumps(r) + "\n" for r in records))
    return records
