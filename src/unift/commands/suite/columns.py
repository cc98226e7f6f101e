"""The columns of a suite of problem sets, and their rows from local files. No torch.

The released layout of UFT (arXiv 2505.16984) is ``FOLDER/<name>/test.parquet``; a row's ``data_source`` says which column it
belongs to, so one file may hold rows of several. Columns stand in the order of the paper's table 2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from unift.rows.files import records
from unift.rows.readers import rows_of
from unift.rows.tasks.base import content_id, nearest
from unift.types import ConfigError, DataError, Row

FILES = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")  # each but Parquet also with .gz


@dataclass(frozen=True)
class Column:
    """A set of problems. ``levels``: of those rows that name one, only these belong to it."""

    name: str
    title: str
    sources: tuple[str, ...]
    levels: tuple[str, ...] = ()

    def holds(self, row: Row) -> bool:
        """Whether the row belongs here, by its data_source, or by its task where it has none."""
        level = str(row.extra.get("level") or "").removeprefix("Level ")
        return source_of(row) in self.sources and (not self.levels or not level or level in self.levels)


MATH = ("DigitalLearningGmbH/MATH-lighteval", "lighteval/MATH")
SUITES: Mapping[str, tuple[Column, ...]] = {
    "uft": (
        Column("math", "MATH(3,4,5)", MATH, ("3", "4", "5")),
        Column("aime", "AIME", ("aime",)),
        Column("amc", "AMC", ("amc",)),
        Column("countdown", "Countdown", ("countdown",)),
        Column("logic", "Logic", ("kk_logic", "knights")),
        Column("math500", "MATH500", ("math500",)),
        Column("minerva", "Minerva", ("minerva",)),
        Column("olympiad", "Olympiad", ("olympiad_bench",)),
        Column("gsm8k", "GSM8K", ("openai/gsm8k", "gsm8k")),
    )
}


def source_of(row: Row) -> str:
    return str(row.extra.get("data_source") or row.task)


def columns_of(suite: str) -> tuple[Column, ...]:
    """The columns of a suite by its name. ConfigError for an unknown one."""
    if suite not in SUITES:
        raise ConfigError(f"--suite {suite!r} is unknown.{nearest(suite, SUITES)}")
    return SUITES[suite]


@dataclass(frozen=True)
class Problems:
    """Rows by column, in the suite's order; columns without rows are left out. ``notes``: what was left out, in words."""

    columns: Mapping[str, list[Row]]
    titles: Mapping[str, str]
    missing: Sequence[str] = ()
    notes: Sequence[str] = field(default_factory=tuple)


def key(row: Row) -> str:
    """What tells rows of a suite apart: the id, and the content of prompt and answer."""
    return f"{row.id}:{content_id(row.prompt, (), '', row.answer)}"


def read_problems(suite: str, places: Sequence[str | Path], limit: int | None = None) -> Problems:
    """The rows of a suite from files and folders. ``limit``: the first so many of each column.

    A file is read whatever its name; in a folder every file of rows but those named ``train``. A problem that stands in
    several files counts once. Raises DataError for a place that is not there, and where no row belongs to a column.
    """
    columns = columns_of(suite)
    found: dict[str, dict[str, Row]] = {c.name: {} for c in columns}
    other: Counter[str] = Counter()
    twice = 0
    files = _files(places)
    for file in files:
        for row in rows_of(records(str(file)), str(file), need_steps=False):
            column = next((c for c in columns if c.holds(row)), None)
            if column is None:
                other[_described(row)] += 1
            elif row.answer is None:
                raise DataError(f"{file}, row of id {row.id!r}, column 'answer': missing; the verifier needs it")
            else:
                twice += key(row) in found[column.name]
                found[column.name].setdefault(key(row), row)
    rows = {name: list(by_key.values())[:limit] for name, by_key in found.items() if by_key}
    if not rows:
        sources = ", ".join(source for c in columns for source in c.sources)
        seen = ", ".join(f"{n} of {source}" for source, n in other.items()) or "none"
        raise DataError(
            f"suite {suite!r} is empty: no row of {', '.join(map(str, files))} belongs to it. A row's data_source says "
            f"where it belongs; expected one of {sources}; found rows: {seen}"
        )
    titles = {c.name: c.title for c in columns}
    notes = [f"{n:,} rows of {source} belong to no column and were left out" for source, n in other.items()]
    notes += [f"{twice:,} rows stand in more than one file and count once"] if twice else []
    return Problems(rows, titles, [titles[c.name] for c in columns if c.name not in rows], notes)


def _described(row: Row) -> str:
    level = row.extra.get("level")
    return repr(source_of(row)) + (f" ({level})" if level and source_of(row) in MATH else "")


def _files(places: Sequence[str | Path]) -> list[Path]:
    if not places:
        raise ConfigError(
            "--suite needs the problems: --data FOLDER (FOLDER/<name>/test.parquet as released, or other files of rows)"
        )
    found: list[Path] = []
    for place in map(Path, places):
        if not place.exists():
            raise DataError(f"--data {place}: no such file or folder (looked in {Path.cwd()})")
        inside = sorted(p for p in place.rglob("*") if _is_rows(p)) if place.is_dir() else [place]
        if not inside:
            raise DataError(
                f"--data {place}: the folder holds no file of rows ({', '.join(FILES)}) but those named train"
            )
        found += inside
    return found


def _is_rows(path: Path) -> bool:
    name = path.name.removesuffix(".gz")
    hidden = path.name.startswith(".")
    return path.is_file() and not hidden and Path(name).suffix in FILES and Path(name).stem.lower() != "train"
