"""What every task is made of: the record that describes it and the few helpers all of them share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from unift.types import ConfigError, DataError, Row, Score, closest

RULES = ("unift", "paper")


@dataclass(frozen=True)
class Task:
    """A family of problems with a verifier, and (unless its problems come from a file) a generator with solutions.

    ``make(seed, index, **options) -> Row`` is pure: the same arguments give the same row on every machine.
    ``score(completion, row, *, hint="", format_score=0.0, rule="unift", answer="tags") -> Score`` never raises on any
    completion.
    ``canonical(row)`` is equal for two rows that pose the same problem; train and test are kept apart by it.
    """

    name: str
    make: Callable[..., Row]
    score: Callable[..., Score]
    canonical: Callable[[Row], Hashable]
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])  # every option of ``make`` with its default
    marked: bool = True  # whether ``answer`` says where the answer stands; without it the whole text is the answer


def is_mapping(value: object) -> TypeGuard[Mapping[str, Any]]:
    """Whether a value of JSON or of a row is a mapping: isinstance knows no types of keys and values."""
    return isinstance(value, Mapping)


def is_list(value: object) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def is_list_or_tuple(value: object) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    return isinstance(value, (list, tuple))


def nearest(word: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` plus the full list, for messages about an unknown name."""
    known = sorted(known)
    close = closest(word, known)
    guess = f" Did you mean {close!r}?" if close else ""
    return f"{guess} Known: {', '.join(known) or 'none'}."


_content = json.JSONEncoder(sort_keys=True, ensure_ascii=False, default=str).encode  # made once: a third of its time


def content_id(prompt: Any, steps: Iterable[str], ending: str, answer: Any) -> str:
    """Row.id of a row that names none: 12 hex digits of blake2b over its content."""
    text = _content([prompt, list(steps), ending, answer])
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()


def build_row(
    task: str, prompt: str, steps: Iterable[str], ending: str, answer: Any, extra: Mapping[str, Any] | None = None
) -> Row:
    """A Row of this task whose id is the hash of its content."""
    steps = tuple(steps)
    row_id = content_id(prompt, steps, ending, answer)
    return Row(id=row_id, prompt=prompt, steps=steps, ending=ending, answer=answer, task=task, extra=dict(extra or {}))


def verdict(correct: bool, parsable: bool, format_score: float, note: str = "", answered: bool = True) -> Score:
    """1.0 for a right answer, ``format_score`` for a wrong one that can be read, else 0.0.

    answered: whether an answer stands where the rule looks for it; part "no_answer" counts those without.
    """
    value = 1.0 if correct else float(format_score) if parsable else 0.0
    parts = {"correct": float(correct), "format": float(parsable), "no_answer": float(not answered)}
    return Score(value, correct, parts, note)


def check_rule(rule: str, answer: str = "tags") -> None:
    """ConfigError for an unknown rule, or an answer that the official rules would not look for."""
    if rule not in RULES:
        raise ConfigError(f"answer rule {rule!r} is unknown.{nearest(str(rule), RULES)}")
    if rule == "paper" and answer != "tags":
        raise ConfigError(f"reward.rule=paper reads answer tags, found reward.answer={answer!r}; set it to tags.")


def field_of(row: Row, name: str) -> Any:
    """Field ``name`` of ``row.answer``; DataError if the answer is not a mapping that has it."""
    if not is_mapping(row.answer) or name not in row.answer:
        found = sorted(map(str, row.answer)) if is_mapping(row.answer) else type(row.answer).__name__
        raise DataError(
            f"row {row.id!r} (task {row.task!r}), column 'answer': expected a mapping with {name!r}, found {found}."
        )
    return row.answer[name]


def span(name: str, value: Any, least: int, most: int | None = None) -> tuple[int, int]:
    """An option that is a whole number or a pair (low, high), as a pair; ConfigError outside [least, most]."""
    pair = (value, value) if isinstance(value, int) else tuple(value) if is_list_or_tuple(value) else ()
    if len(pair) != 2 or any(isinstance(v, bool) or not isinstance(v, int) for v in pair):
        raise ConfigError(f"option {name!r}: found {value!r}, expected a whole number or a pair [low, high].")
    low, high = pair
    if not least <= low <= high or (most is not None and high > most):
        limit = f"{least} <= low <= high" + (f" <= {most}" if most is not None else "")
        raise ConfigError(f"option {name!r}: found {value!r}, expected {limit}.")
    return low, high
