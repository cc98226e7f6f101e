"""Several sampled answers to a row, one of them given: by majority, or the one that the model finds likeliest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from unift.intervals import wilson
from unift.rows.tasks import get_task, task_names
from unift.rows.tasks.answer import extract_answer
from unift.types import Row


@dataclass(frozen=True)
class Judged:
    """A sampled completion: whether it is right, its text, and the mean log-prob of its tokens."""

    right: bool
    text: str
    logp: float


def answer_of(row: Row, text: str, place: str) -> str | None:
    """What a completion votes for: its answer without spaces, at ``place``; the whole text for tasks whose answer has no mark.

    None: no answer was found, and the completion has no vote. Answers are compared as text: 1/2 and 0.5 are two."""
    marked = row.task not in task_names() or get_task(row.task).marked
    found = extract_answer(text, place) if marked else text
    return "".join(found.split()) or None if found else None


def by_majority(answers: Sequence[str | None]) -> int | None:
    """Index of the first sample with the most frequent answer (self-consistency, arXiv 2203.11171; ReFT, arXiv 2401.08967);
    on a tie that of the earlier sample. None without any answer."""
    votes = Counter(a for a in answers if a is not None)  # keeps the order in which answers came
    return answers.index(max(votes, key=lambda a: votes[a])) if votes else None


def by_likelihood(logps: Sequence[float]) -> int | None:
    """Index of the sample with the highest mean log-prob; on a tie the earlier one. None without samples."""
    return max(range(len(logps)), key=lambda i: logps[i]) if logps else None


def chosen(rows: Sequence[Row], groups: Sequence[Sequence[Judged]], place: str) -> dict[str, dict[str, float]]:
    """ "vote@K" and "rerank@K": share of rows whose chosen sample is right, with a Wilson interval. K: samples a row."""
    k = max(map(len, groups), default=0)
    picked = {
        f"vote@{k}": [
            by_majority([answer_of(row, s.text, place) for s in g]) for row, g in zip(rows, groups, strict=True)
        ],
        f"rerank@{k}": [by_likelihood([s.logp for s in g]) for g in groups],
    }
    out: dict[str, dict[str, float]] = {}
    for name, indices in picked.items():
        right = sum(g[i].right for g, i in zip(groups, indices, strict=True) if i is not None)
        low, high = wilson(right, len(groups))
        out[name] = {"accuracy": right / max(len(groups), 1), "low": low, "high": high}
    return out
