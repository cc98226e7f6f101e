"""Rows of whole files: written, compared with each other, counted."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from unift.rows import pictures
from unift.rows.store import StoredRows, problem_hash
from unift.rows.tasks import canonical
from unift.rows.tasks.format import contradictions, partly_marked
from unift.types import DataError, Picture, Row, UniftError


def _record(row: Row, written: Callable[[Picture], Any] = pictures.as_json) -> dict[str, Any]:
    prompt = row.prompt if isinstance(row.prompt, str) else [dict(m) for m in row.prompt]
    steps = list(row.steps) or None  # an empty list reads as a solution that was lost
    own = {"id": row.id, "prompt": prompt, "steps": steps, "ending": row.ending, "answer": row.answer}
    shown = {"images": [written(found) for found in row.images]} if row.images else {}
    return own | {"task": row.task} | shown | dict(row.extra)


def write_rows(rows: Sequence[Row], path: str | Path) -> None:
    """unift's layout, .jsonl or .parquet. The file appears whole or not at all."""
    from unift.files import write_atomic

    path = Path(path)
    check_writable(path)
    write_atomic(path, _json_lines(rows, path) if path.suffix == ".jsonl" else _parquet(rows, path))


def _json_lines(rows: Sequence[Row], path: Path) -> str:
    lines: list[str] = []
    for number, row in enumerate(rows, start=1):
        try:
            lines.append(json.dumps(_record(row), ensure_ascii=False) + "\n")
        except (TypeError, ValueError) as error:  # dates, bytes
            raise DataError(
                f"{path}, row {number}: JSON cannot hold it ({error}). Write .parquet, or drop the column"
            ) from None
    return "".join(lines)


def _parquet(rows: Sequence[Row], path: Path) -> bytes:
    """With every column that any of the rows has."""
    import io

    import pyarrow  # pyright: ignore[reportMissingTypeStubs]
    import pyarrow.parquet as parquet  # pyright: ignore[reportMissingTypeStubs]

    pa, pq, buffer, column = cast(Any, pyarrow), cast(Any, parquet), io.BytesIO(), ""
    records = [_record(row, pictures.as_value) for row in rows]
    made: dict[str, Any] = {}
    try:
        for column in dict.fromkeys(name for record in records for name in record):
            made[column] = pa.array([record.get(column) for record in records])
            pq.write_table(pa.table({column: made[column][:1]}), io.BytesIO())  # an empty mapping has no type
        pq.write_table(pa.table(made), buffer)
    except (pa.ArrowException, OverflowError) as error:
        said = str(error).partition("\n")[0]
        raise DataError(
            f"{path}, column {column!r}: a Parquet column cannot hold its values ({said}). Write .jsonl"
        ) from None
    return buffer.getvalue()


def check_writable(path: Path) -> None:
    """Before time is spent on rows that could not be kept."""
    if path.suffix not in (".jsonl", ".parquet"):
        raise UniftError(f"{path}: unknown kind of file {path.suffix!r}; expected .jsonl or .parquet")
    if not path.parent.is_dir():
        raise UniftError(f"{path}: there is no folder {path.parent}; create it first")
    if path.is_dir():
        raise UniftError(f"{path} is a folder; expected the name of a file")


def overlap(train: Sequence[Row], test: Sequence[Row]) -> list[str]:
    """Ids of test rows that pose a problem of the training rows."""
    if not test:
        return []
    if isinstance(train, StoredRows):
        problems = [problem_hash(canonical(row)) for row in test]
        shared = np.isin(np.array(problems, dtype=np.uint64), train.problems_N)
        return [row.id for row, known in zip(test, shared, strict=True) if known]
    seen = {canonical(row) for row in train}
    return [row.id for row in test if canonical(row) in seen]


def inspect(rows: Sequence[Row]) -> dict[str, Any]:
    """Counts for people: rows that lack something, steps, lengths in characters, repeated problems, one example."""
    counts = sorted(len(r.steps) for r in rows)
    few = len(set(counts)) <= 10  # derivations have dozens of lengths, which nobody reads
    steps = dict(Counter(counts)) if few else [counts[0], counts[len(counts) // 2], counts[-1]]
    lengths = sorted(len(r.solution) for r in rows)
    faulty = contradictions(rows)
    digest = hashlib.sha256("".join(r.id for r in rows).encode()).hexdigest()[:12]
    return {
        "rows": len(rows),
        "without answer": sum(r.answer is None for r in rows),
        "without solution": sum(not r.steps for r in rows),
        "solution ends with another answer": len(faulty),
        **(
            {"of these, the first": [f"row {n}: {other}, not {row.answer}" for n, row, other in faulty[:5]]}
            if faulty
            else {}
        ),
        **({"faulty": partly} if (partly := partly_marked(rows)) else {}),
        "ids": digest,
        "tasks": dict(Counter(r.task for r in rows)),
        "steps per row" if few else "steps per row (min, median, max)": steps,
        "solution characters (min, median, max)": [lengths[0], lengths[len(lengths) // 2], lengths[-1]],
        "repeated problems": len(rows) - len({canonical(r) for r in rows}),
        "example": _record(rows[0], lambda found: f"{found.path or 'bytes'} ({found.digest[:12]})"),
    }
