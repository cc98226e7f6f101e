"""What a worker reports, and how the trainer reads it: untrusted bytes in, a checked value or BadRecord out.

A record is one line of JSON, ``[nonce, what, ...]``. The nonce is drawn by the trainer for every item and is known to the
worker alone, so a record is for an item that the worker holds or it is none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeGuard, TypeVar

from unift.types import Score

LINE_BYTES = 1 << 20  # no honest record is longer
NOTE_CHARS, MESSAGE_CHARS, NAME_CHARS, PARTS = 1000, 2000, 200, 100
COUNT_OF = {"timeout": "timeouts", "crash": "crashes", "exception": "exceptions", "bad value": "bad_values"}
COUNTS = ("total", *COUNT_OF.values(), "skipped")
CLEAN, LITTERED, SPOILED = 0, 1, 2  # the worker after an item: as before; threads or children are left; not to be used


@dataclass(frozen=True)
class ScoreError:
    """Why a completion has no score. ``str()`` is what Sample.error holds."""

    kind: str  # "timeout", "crash", "exception" or "bad value"
    message: str
    completion: str = ""
    row_id: str = ""

    def __str__(self) -> str:
        return self.kind if self.kind in ("timeout", "crash") else f"{self.kind}: {self.message}"


Outcome = Score | ScoreError | None  # None: no reward applies


def is_list(value: object) -> TypeGuard[list[Any]]:
    """``isinstance``, for a value of unknown origin: its elements may be anything, and are to be checked."""
    return isinstance(value, list)


def is_mapping(value: object) -> TypeGuard[Mapping[Any, Any]]:
    """As `is_list`."""
    return isinstance(value, Mapping)


def class_of(value: object) -> type[Any]:
    """``type``, for a value of unknown origin."""
    return type(value)


class BadRecord(ValueError):
    """The worker sent what no honest worker sends."""


@dataclass(frozen=True)
class Ready:
    kind: str  # "task", "unift", "TRL" or "verl"; joined by "+" where several are added up


@dataclass(frozen=True)
class Unloadable:
    message: str


@dataclass(frozen=True)
class Scored:
    outcome: Outcome
    state: int  # CLEAN, LITTERED or SPOILED


R = TypeVar("R")


def read_record(line: bytes, nonce: str, *due: type[R]) -> R:
    """One line, without its end. Raises BadRecord unless it is a record of a kind that is due, for ``nonce``, with every
    field as it must be."""
    record = _read(line, nonce)
    if isinstance(record, due):
        return record
    raise BadRecord("a record out of turn")


def _read(line: bytes, nonce: str) -> Ready | Unloadable | Scored:
    try:
        record = _decode(line.decode())
    except (ValueError, RecursionError, MemoryError):
        raise BadRecord("a line that is no record") from None
    if not is_list(record) or len(record) < 3 or record[0] != nonce:
        raise BadRecord("a record for no item that it holds")
    match record[1:]:
        case ["ready", str(kind)] if len(kind) <= NAME_CHARS:
            return Ready(kind)
        case ["unloadable", str(message)]:
            return Unloadable(_whole(message[:MESSAGE_CHARS]))
        case ["skipped", state] if _is_state(state):
            return Scored(None, state)
        case ["score", value, correct, parts, str(note), state] if is_mapping(parts) and _is_state(state):
            return Scored(_score(value, correct, parts, note), state)
        case [("exception" | "bad value" | "crash") as kind, str(message), state] if _is_state(state):
            return Scored(ScoreError(kind, _whole(message[:MESSAGE_CHARS])), state)
        case _:
            raise BadRecord("a record of no known form")


def _score(value: Any, correct: Any, parts: Mapping[str, Any], note: str) -> Score:
    if not (correct is None or isinstance(correct, bool)) or len(parts) > PARTS or len(note) > NOTE_CHARS:
        raise BadRecord("a score of no known form")
    if any(len(name) > NAME_CHARS for name in parts):
        raise BadRecord("a score of no known form")
    return Score(_finite(value), correct, {_whole(name): _finite(part) for name, part in parts.items()}, _whole(note))


def _whole(text: str) -> str:
    """With a question mark for each half of a surrogate pair, which JSON can spell and no file in UTF-8 holds."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _finite(number: Any) -> float:
    if isinstance(number, float) and math.isfinite(number):
        return number
    raise BadRecord("a score that is not a finite number")


def _is_state(state: Any) -> TypeGuard[int]:
    return type(state) is int and CLEAN <= state <= SPOILED


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


_decode = json.JSONDecoder(parse_constant=_refuse).decode  # made once: json.loads makes one a line
