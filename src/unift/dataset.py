"""The rows of a run: read or generated, checked for overlap, tokenised once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from unift import needs
from unift.config import Config, stages
from unift.encode import Encoded, encode_row, encode_rows
from unift.types import ConfigError, DataError, Row
from unift.words import SCHEDULES


@dataclass(frozen=True)
class Dataset:
    train: list[Row]
    test: list[Row]

    @property
    def fingerprint(self) -> str:
        """Content of the training rows; a checkpoint refuses another one."""
        digest = hashlib.sha256()
        for row in self.train:
            digest.update(json.dumps([row.id, row.prompt, row.steps, row.ending, row.answer], default=str).encode())
        return digest.hexdigest()[:16]


def load(config: Config) -> Dataset:
    """Rows of both splits. Raises DataError or ConfigError before any model is loaded."""
    data = config.data
    if data.task:
        from unift.tasks import make_rows

        train = make_rows(data.task, data.train_rows or 1000, data.seed, "train", **data.options)
        test = make_rows(data.task, data.test_rows or 200, data.seed, "test", **data.options)
    else:
        from unift.data import overlap, read_rows

        assert data.train is not None
        found = [stage.rules for stage in stages(config)]
        needs_steps = any(needs.solutions(s) for s in found)
        train = read_rows(data.train, format=data.format, limit=data.train_rows, need_steps=needs_steps)
        graded = [s.show.schedule for s in found if SCHEDULES[s.show.schedule].graded]
        if graded and all(len(row.steps) == 1 for row in train):
            raise DataError(
                f"{data.train}, column 'steps': every solution is a single step, so show.schedule={graded[0]} could only "
                "show all of it or nothing. Split the solutions into steps (a list of texts), or use method sft or rft"
            )
        test = (
            read_rows(data.test, format=data.format, split="test", limit=data.test_rows, need_steps=False)
            if data.test
            else []
        )
        shared = overlap(train, test)
        if shared:
            raise DataError(
                f"{len(shared)} problems of data.test={data.test!r} also stand in data.train={data.train!r}, "
                f"for example {shared[0]!r}: accuracy on them would not be held-out. Remove them from one side"
            )
    if not train:
        raise DataError("no training rows")
    return Dataset(train, test[: config.eval.rows] if config.eval.rows else test)


@dataclass(frozen=True)
class Split:
    """Rows with their tokens. ``rejected``: tokens of the answer that each row's solution is preferred to, where it has one."""

    rows: list[Row]
    encoded: list[Encoded]
    rejected: list[list[int] | None] = field(default_factory=list[list[int] | None])

    def first(self, n: int) -> Split:
        return Split(self.rows[:n], self.encoded[:n], self.rejected[:n])


@dataclass(frozen=True)
class Data:
    """Both splits of a run, and the fingerprint of the training rows."""

    train: Split
    test: Split
    fingerprint: str


def encode(tokenizer: Any, dataset: Dataset, config: Config) -> Data:
    """Tokenise both splits. DataError for a row that does not fit."""
    limit, texts = config.data.max_prompt, {s.rules.sample.instruction for s in stages(config)} - {None}
    if len(texts) > 1:
        raise ConfigError(
            f"sample.instruction has {len(texts)} values over the phases: {sorted(map(str, texts))}; use one"
        )
    train = encode_rows(tokenizer, dataset.train, limit, next(iter(texts), None))
    test = encode_rows(tokenizer, dataset.test, limit)
    columns = {name for stage in stages(config) if (name := stage.rules.sample.rejected)}
    rejected = encode_column(tokenizer, dataset.train, columns, limit)
    return Data(Split(dataset.train, train, rejected), Split(dataset.test, test), dataset.fingerprint)


def encode_column(tokenizer: Any, rows: Sequence[Row], columns: Iterable[str], limit: int) -> list[list[int] | None]:
    """Tokens of an answer that stands in a column of its own (+ EOS), per row; None where the row has none.

    It is tokenised with the prompt, as the solution is. DataError for anything but a text.
    """
    names = list(columns)
    if not names:
        return [None] * len(rows)
    if len(names) > 1:
        raise DataError(f"sample.rejected names several columns over the phases: {', '.join(sorted(names))}; use one")
    out: list[list[int] | None] = []
    for number, row in enumerate(rows, start=1):
        text = row.extra.get(names[0])
        if text is not None and (not isinstance(text, str) or not text):
            raise DataError(
                f"row {number} (id {row.id}), column {names[0]!r}: expected a text or nothing, found {text!r}"
            )
        other = None if text is None else replace(row, steps=(), ending=text)
        out.append(None if other is None else encode_row(tokenizer, other, limit, number).solution)
    if all(tokens is None for tokens in out):
        known = sorted({name for row in rows for name in row.extra})
        raise DataError(f"no row has a column {names[0]!r} (sample.rejected). Columns: {', '.join(known) or 'none'}")
    return out
