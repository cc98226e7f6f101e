"""Ids of rows: draws, and what a run remembers of a row (its hint length), go by them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from unift.types import DataError, Row


def _content(row: Row) -> tuple[Any, ...]:
    return row.prompt, row.steps, row.ending, row.answer, row.images


class Names:
    """Ids given out so far, and the rule for a row whose id was there before."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.first: dict[str, int] = {}  # id: number of the row that has it
        self.copies: Counter[str] = Counter()

    def own(self, row: Row, number: int, rows: Callable[[int], Row]) -> str:
        """The id of row ``number``: its own, or ``<id>-2`` of a further copy. ``rows``: the row of a number.

        DataError where two different rows share an id.
        """
        name = row.id
        if name in self.first and _content(row) == _content(rows(self.first[name])):
            self.copies[name] += 1
            name = f"{name}-{self.copies[name] + 1}"
        if name in self.first:
            raise DataError(
                f"{self.source}, row {number}, column 'id': {name!r} is the id of row {self.first[name]}, too. Draws and what "
                "a run remembers of a row (its hint length) go by the id: give every row its own, or drop the column, and the "
                "content names them"
            )
        self.first[name] = number
        return name


def told_apart(rows: Sequence[Row], name: str = "rows") -> list[Row]:
    """Rows with an id of their own each: draws and what a run remembers of a row (its hint length) go by it. Further copies of
    the very same row are numbered, ``<id>-2``; DataError where two different rows share an id."""
    names = Names(name)
    own = [names.own(row, number, lambda n: rows[n - 1]) for number, row in enumerate(rows, start=1)]
    return [row if row.id == name else replace(row, id=name) for row, name in zip(rows, own, strict=True)]
