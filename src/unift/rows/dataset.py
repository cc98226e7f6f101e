"""The rows of a run: read or generated, checked for overlap, tokenised once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from unift import rng
from unift.config import needs
from unift.config.sections import Config, Rules
from unift.config.stages import stages
from unift.config.surroundings import Data as DataSettings
from unift.config.words import SCHEDULES
from unift.rows import pictures
from unift.rows.store import Lazy, StoredRows, digest_row, lazily
from unift.rows.tokens import Encoded, check_tokenizer, encode_row, encode_rows, encode_with
from unift.types import HANDED, ConfigError, DataError, Row


@dataclass(frozen=True)
class Dataset:
    """Rows of both splits: in memory, or `store.StoredRows` where they come from a large file."""

    train: Sequence[Row]
    test: Sequence[Row]

    @property
    def fingerprint(self) -> str:
        """Content of the training rows; a checkpoint refuses another one."""
        if isinstance(self.train, StoredRows):
            return self.train.facts.fingerprint
        digest = hashlib.sha256()
        for row in self.train:
            digest_row(digest, row)
        return digest.hexdigest()[:16]


def load(config: Config, handed: Mapping[str, list[Row]] | None = None, only: str | None = None) -> Dataset:
    """Rows of both splits. Raises DataError or ConfigError before any model is loaded.

    handed: "train" and "test" rows of a Python caller, where data.train and data.test say so. only: this split, to be
    evaluated: nothing else is read, and its rows need no solution.
    """
    data, handed = config.data, handed or {}
    if data.task:
        from unift.rows.tasks import make_rows

        train = _solved(make_rows(data.task, data.train_rows or 1000, data.seed, "train", **data.options), data)
        test = make_rows(data.task, data.test_rows or 200, data.seed, "test", **data.options)
    elif only is not None:
        rows = _split(config, "train" if only == "train" else "test", handed, False)
        return Dataset(rows, []) if only == "train" else Dataset([], rows[: config.eval.rows])
    else:
        from unift.rows.inspect import overlap

        found = [stage.rules for stage in stages(config)]
        needs_steps = any(needs.solutions(s) for s in found)
        train = _solved(_split(config, "train", handed, needs_steps and data.solved == "all"), data)
        if needs_steps and len(train) and not len(solved_rows(train)):
            raise DataError(
                f"{named(data.train)}, column 'steps': no row has a worked solution, which method {config.method} learns from. "
                "Use method rft, or give some rows a solution"
            )
        graded = [s.show.schedule for s in found if SCHEDULES[s.show.schedule].graded]
        if graded and len(train) and all(len(row.steps) <= 1 for row in train):  # some row has a step, see above
            raise DataError(
                f"{data.train}, column 'steps': every solution is a single step, so show.schedule={graded[0]} could only "
                "show all of it or nothing. Split the solutions into steps (a list of texts), or use method sft or rft"
            )
        test: Sequence[Row] = _split(config, "test", handed, False) if data.test else []
        shared = overlap(train, test)
        if shared:
            raise DataError(
                f"{len(shared)} problems of data.test={data.test!r} also stand in data.train={data.train!r}, "
                f"for example {shared[0]!r}: accuracy on them would not be held-out. Remove them from one side"
            )
    if not train:
        raise DataError("no training rows")
    return Dataset(train, test[: config.eval.rows] if config.eval.rows else test)


def _solved(rows: Sequence[Row], data: DataSettings) -> Sequence[Row]:
    """The rows, of which the first ``data.solved`` alone keep their solution where that is a number."""
    if not isinstance(data.solved, int):
        return rows
    if isinstance(rows, StoredRows):
        raise ConfigError(
            f"data.solved={data.solved} takes solutions from rows in memory, and those of {data.train} stay on disk: write "
            "them without their solutions and use data.solved=some, or set data.train_rows"
        )
    return [row if i < data.solved else replace(row, steps=()) for i, row in enumerate(rows)]


def _split(
    config: Config, split: Literal["train", "test"], handed: Mapping[str, list[Row]], steps: bool
) -> Sequence[Row]:
    """Rows of data.train or data.test: handed over, or read."""
    from unift.rows.large import open_rows
    from unift.rows.readers import check_steps
    from unift.rows.tasks.format import check_answers

    data, reward = config.data, config.reward.function
    path, limit = (data.train, data.train_rows) if split == "train" else (data.test, data.test_rows)
    if path is None:
        raise ConfigError(f"no rows: set data.{split}=FILE")
    if path != HANDED:
        hub_split = None if split == "train" else "test"
        rows = open_rows(path, format=data.format, split=hub_split, limit=limit, need_steps=steps)
        check_answers(rows, reward, f"{path}, row")
        return rows
    if split not in handed:
        raise DataError(
            f"the {split} rows of this run were handed over from Python and are in no file: pass them again with "
            f"unift.train({split}=...) or unift.evaluate(model, rows), or set data.{split}=FILE"
        )
    rows = handed[split][:limit]
    check_answers(rows, reward, f"{split} row")
    return [check_steps(row, f"{split} row {n}", steps) for n, row in enumerate(rows, start=1)]


@dataclass(frozen=True)
class Split:
    """Rows with their tokens. ``rejected``: tokens of the answer that each row's solution is preferred to, where it has one.

    ``looked_at``: indices of the rows that are checked before a run starts. All of them in memory; of rows on disk the
    longest, and every other row at its first use (`Encodings`). ``labels``: the score of each row's solution, where it has one.
    ``solved``: indices of the training rows with a worked solution.
    """

    rows: Sequence[Row]
    encoded: Sequence[Encoded]
    rejected: Sequence[list[int] | None] = field(default_factory=list[list[int] | None])
    labels: Sequence[float | None] = field(default_factory=list[float | None])
    solved: Sequence[int] = field(default_factory=list[int])

    def trained(self, rules: Rules) -> Sequence[int]:
        """Indices of the rows that a stage trains on: all, or those with a solution where it learns from nothing else."""
        return self.solved if needs.only_solved(rules) else range(len(self.rows))

    def first(self, n: int) -> Split:
        return Split(self.rows[:n], self.encoded[:n], self.rejected[:n], self.labels[:n])

    @property
    def looked_at(self) -> Sequence[int]:
        return self.rows.facts.longest if isinstance(self.rows, StoredRows) else range(len(self.rows))


class Encodings(Lazy[Encoded]):
    """Tokens of rows on disk, made at their first use. ``checks`` see the index and the tokens of each then: what a start
    asks of every row in memory."""

    def __init__(self, encode: Callable[[int], Encoded], n: int) -> None:
        self.checks: list[Callable[[int, Encoded], None]] = []

        def checked(index: int) -> Encoded:
            made = encode(index)
            for check in self.checks:
                check(index, made)
            return made

        recent = lazily(checked, n)
        super().__init__(recent.__getitem__, range(n))


@dataclass(frozen=True)
class Data:
    """Both splits of a run, and the fingerprint of the training rows."""

    train: Split
    test: Split
    fingerprint: str


def named(path: str | None) -> str:
    """The file of rows as messages about them name it; nothing for generated ones."""
    return "rows handed over" if path == HANDED else path or ""


def encode(tokenizer: Any, dataset: Dataset, config: Config) -> Data:
    """Tokenise both splits. DataError for a row that does not fit."""
    limit, texts = config.data.max_prompt, {s.rules.sample.instruction for s in stages(config)} - {None}
    if len(texts) > 1:
        raise ConfigError(
            f"sample.instruction has {len(texts)} values over the phases: {sorted(map(str, texts))}; use one"
        )
    if pictures.shown_by(dataset.train) or pictures.shown_by(dataset.test):
        _check_pictures(config)
    train = _encoded(tokenizer, dataset.train, limit, next(iter(texts), None), named(config.data.train))
    test = _encoded(tokenizer, dataset.test, limit, None, named(config.data.test))
    columns = {name for stage in stages(config) if (name := stage.rules.sample.rejected)}
    rejected = encode_column(tokenizer, dataset.train, columns, limit)
    labels = label_column(dataset.train, {name for stage in stages(config) if (name := stage.rules.sample.label)})
    split = Split(dataset.train, train, rejected, labels, solved_rows(dataset.train))
    return Data(split, Split(dataset.test, test), dataset.fingerprint)


def solved_rows(rows: Sequence[Row]) -> Sequence[int]:
    """Indices of the rows with a worked solution."""
    if isinstance(rows, StoredRows):
        return rows.solved
    return [i for i, row in enumerate(rows) if row.steps]


def _check_pictures(config: Config) -> None:
    """ConfigError for settings that rows with pictures do not go with."""
    for stage in stages(config):
        inputs = stage.rules.inputs
        if inputs.noise != "none" or inputs.own > 0:
            raise ConfigError(
                f"method {stage.rules.method} changes input embeddings, by which a model finds the places of pictures: rows with "
                "pictures cannot be trained with it. Use another method (inputs.noise=none, inputs.own=0)"
            )


def _encoded(
    tokenizer: Any, rows: Sequence[Row], limit: int, instruction: str | None, source: str
) -> Sequence[Encoded]:
    """Tokens of all rows; of rows on disk, at first use. Then the longest by characters are tried at once: a row that does
    not fit ``limit`` is, but for unusual texts, among them."""
    if not isinstance(rows, StoredRows):
        return encode_rows(tokenizer, rows, limit, instruction, source)
    check_tokenizer(tokenizer)
    made = Encodings(lambda i: encode_with(tokenizer, rows[i], limit, instruction, i + 1, source), len(rows))
    for index in rows.facts.longest:
        made[index]
    return made


def encode_column(
    tokenizer: Any, rows: Sequence[Row], columns: Iterable[str], limit: int
) -> Sequence[list[int] | None]:
    """Tokens of an answer that stands in a column of its own (+ EOS), per row; None where the row has none.

    It is tokenised with the prompt, as the solution is. DataError for anything but a text; of rows on disk at first use.
    """
    names = list(columns)
    if len(names) > 1:
        raise DataError(f"sample.rejected names several columns over the phases: {', '.join(sorted(names))}; use one")

    def encode(index: int) -> list[int] | None:
        row, number = rows[index], index + 1
        text = row.extra.get(names[0]) if names else None
        if text is not None and (not isinstance(text, str) or not text):
            raise DataError(
                f"row {number} (id {row.id}), column {names[0]!r}: expected a text or nothing, found {text!r}"
            )
        other = None if text is None else replace(row, steps=(), ending=text)
        return None if other is None else encode_row(tokenizer, other, limit, number).solution

    on_disk = isinstance(rows, StoredRows)
    out = lazily(encode if names else lambda index: None, len(rows)) if on_disk else list(map(encode, range(len(rows))))
    if not names:
        return out
    if names[0] not in rows.facts.columns if on_disk else all(tokens is None for tokens in out):
        known = rows.facts.columns if on_disk else sorted({name for row in rows for name in row.extra})
        raise DataError(f"no row has a column {names[0]!r} (sample.rejected). Columns: {', '.join(known) or 'none'}")
    return out


def label_column(rows: Sequence[Row], columns: Iterable[str]) -> list[float | None]:
    """The score of each row's solution, from a column of its own; true is 1 and false 0, None where the row has none. Nothing
    without a column. Of rows on disk every score is read at once, and kept."""
    names = list(columns)
    if not names:
        return []
    if len(names) > 1:
        raise DataError(f"sample.label names several columns over the phases: {', '.join(sorted(names))}; use one")
    out: list[float | None] = []
    for number, row in enumerate(rows, start=1):
        value = row.extra.get(names[0])
        if value is not None and (not isinstance(value, (bool, int, float)) or not 0 <= value <= 1):
            raise DataError(
                f"row {number} (id {row.id}), column {names[0]!r}: expected a score from 0 to 1, true, false or nothing, "
                f"found {value!r}"
            )
        out.append(None if value is None else float(value))
    if all(value is None for value in out):
        known = sorted({name for row in rows for name in row.extra})
        raise DataError(f"no row has a column {names[0]!r} (sample.label). Columns: {', '.join(known) or 'none'}")
    return out


def rows_of_step(seed: int, step: int, prompts: int, pool: Sequence[int]) -> list[int]:
    """Row indices of a step, out of ``pool``: epochs of independent permutations laid end to end, cut into batches. Nothing is
    dropped.

    A pure function, so a resumed run sees the rows that it would have seen.
    """
    n_rows = len(pool)
    if n_rows < 1:
        raise ConfigError("no training rows")
    first = step * prompts
    rows: list[int] = []
    while len(rows) < prompts:
        epoch, offset = divmod(first + len(rows), n_rows)
        order = rng.generator("rows", seed, epoch).permutation(n_rows)
        rows += order[offset : offset + prompts - len(rows)].tolist()
    return [int(pool[i]) for i in rows]


def refill_rows(seed: int, step: int, attempt: int, n: int, pool: Sequence[int]) -> list[int]:
    """Rows of ``pool`` that take the place of ``n`` groups without signal: a fresh permutation for each attempt of a step."""
    order: list[int] = rng.generator("refill", seed, step, attempt).permutation(len(pool)).tolist()
    return [int(pool[order[i % len(order)]]) for i in range(n)]
