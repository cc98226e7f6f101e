"""What a final answer can be, once it is read: plain data that `reading` makes and `equality` compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from unift.rows.tasks.formula import Tree


class Unreadable(ValueError):
    """The text as a whole is no answer of a kind that can be compared; says why."""


@dataclass(frozen=True)
class Quantity:
    tree: Tree
    unit: str = ""  # in one spelling; "" where none is written


@dataclass(frozen=True)
class Several:
    """A list, whose order means nothing, as in "x = 1 or x = -3"."""

    items: tuple[Any, ...]


@dataclass(frozen=True)
class Members:
    """A set in braces."""

    items: tuple[Any, ...]


@dataclass(frozen=True)
class Bracketed:
    """A point or an interval; only its brackets tell (2, 5) and [2, 5] apart."""

    left: str
    items: tuple[Any, ...]
    right: str


@dataclass(frozen=True)
class Union:
    parts: tuple[Any, ...]


@dataclass(frozen=True)
class Matrix:
    rows: tuple[tuple[Quantity, ...], ...]


@dataclass(frozen=True)
class Named:
    """x = 3, f(x) = 2x + 1: a name and what it is. The name is "" for words such as "the area"."""

    name: str
    value: Any
    equation: Tree | None = None  # left minus right, where both are formulas


@dataclass(frozen=True)
class Relation:
    """An equation ("="), an inequality (">", ">=") or "!=" between left minus right and 0.

    ``value``: the right side of m + n = 5 or f(2) = 5, which says what the left side is worth and asks nobody to solve it.
    """

    sign: str
    tree: Tree
    value: Any = None


@dataclass(frozen=True)
class Approximate:
    """A value written exactly and, after an "approximately" sign, rounded."""

    exact: Quantity
    rounded: Quantity


@dataclass(frozen=True)
class Ratio:
    parts: tuple[Tree, ...]


@dataclass(frozen=True)
class Time:
    hour: int
    rest: str  # minutes, and seconds where there are some
    half: str  # "am", "pm" or ""


@dataclass(frozen=True)
class Based:
    """Digits in a number base other than the one that is understood."""

    digits: str
    base: int


@dataclass(frozen=True)
class Words:
    text: str


@dataclass(frozen=True)
class Choice:
    """A letter of a multiple choice with what stands there; ``values``: every reading of that."""

    letter: str
    values: tuple[Any, ...]


Reading = Any  # one of the classes above
Read = Callable[[str], tuple[Reading, ...]]  # reads a part of a text, one level deeper


def one(text: str, again: Read) -> Reading:
    """The first reading of a part: formulas before words."""
    return again(text)[0]
