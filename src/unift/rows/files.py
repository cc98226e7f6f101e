"""Records of a file: JSON Lines, a JSON list, Parquet, CSV and TSV, each but Parquet also gzipped. Errors name file and line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from unift.rows.tasks.base import is_list, is_mapping
from unift.types import DataError

KINDS = ".jsonl, .json, .parquet, .csv or .tsv (.gz behind it: gzipped)"
NESTED = (
    "prompt",
    "steps",
    "hint",
    "completion",
    "answer",
    "metadata",
    "reward_model",
    "extra_info",
)  # may be JSON in a cell


def records(path: str) -> list[Any]:
    """What the file holds, as it stands: one entry a row. Raises DataError."""
    file = Path(path).expanduser()
    if file.is_dir():
        raise DataError(f"{path} is a folder; expected a file of rows, {KINDS}")
    if not file.is_file():
        raise DataError(f"{path}: no such file (looked in {Path.cwd()})")
    if file.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    kind = Path(file.name.removesuffix(".gz")).suffix if file.suffix == ".gz" else file.suffix
    if kind == ".parquet" and file.suffix != ".gz":
        return _parquet(file, path)
    if kind not in _TEXTS:
        found = file.suffix if file.suffix != ".gz" else f"{kind}.gz"
        raise DataError(
            f"{path}: unknown kind of file {found!r}; expected {KINDS}. Or make one: `unift data convert` reads what lies "
            "on the Hub or in a folder that datasets saved (hf:NAME) and writes .jsonl or .parquet"
        )
    return _TEXTS[kind](_content(file, path).removeprefix(b"\xef\xbb\xbf"), path)


def streams(file: Path) -> bool:
    """Can `streamed` read it? The other kinds are read whole."""
    return Path(file.name.removesuffix(".gz")).suffix in (".jsonl", ".ndjson") or file.suffix == ".parquet"


def streamed(path: str) -> Iterator[Any]:
    """As `records` of a file of JSON Lines or Parquet, one by one. A .jsonl file that is one list is read whole."""
    file = Path(path).expanduser()
    if file.suffix == ".parquet":
        yield from _parquet_rows(file, path)
    elif is_one_list(file):
        yield from records(path)
    else:
        yield from (json_line(line, path, number) for number, line in numbered_lines(file, path))


def is_one_list(file: Path) -> bool:
    """Does a .jsonl file hold one JSON list of rows?"""
    return next((line for _, line in numbered_lines(file, str(file))), b"").lstrip().startswith(b"[")


def numbered_lines(file: Path, path: str) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line without its end) of a text, gzipped or not; blank lines are left out. path: for messages."""
    try:
        with file.open("rb") as raw, gzip.open(raw) if raw.peek(2).startswith(b"\x1f\x8b") else raw as lines:
            for number, line in enumerate(lines, start=1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    yield number, line.removesuffix(b"\n")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def json_line(line: bytes, path: str, number: int) -> Any:
    try:
        return json.loads(_utf8(line, path, number))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {number}: not valid JSON ({error.msg} at column {error.colno})") from None
    except (RecursionError, ValueError) as error:
        raise DataError(f"{path}, line {number}: cannot be read as JSON ({error})") from None


def _parquet_rows(file: Path, path: str) -> Iterator[Any]:
    import pyarrow.parquet as pq  # pyright: ignore[reportMissingTypeStubs]

    try:
        for batch in cast(Any, pq).ParquetFile(file).iter_batches(batch_size=1000):
            yield from batch.to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as parquet: {error}") from error


def _content(file: Path, path: str) -> bytes:
    """The bytes, unpacked where they are gzip's, whatever the name says."""
    try:
        content = file.read_bytes()
        return gzip.decompress(content) if content.startswith(b"\x1f\x8b") or file.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _parquet(file: Path, path: str) -> list[Any]:
    import pyarrow.parquet as pq  # pyright: ignore[reportMissingTypeStubs]

    try:
        return cast(Any, pq).read_table(file).to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as parquet: {error}") from error


def _json_list(content: bytes, path: str) -> list[Any]:
    try:
        found = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as json: {error}") from error
    if not is_list(found):
        raise DataError(f"{path}: expected a JSON list of rows, found {type(found).__name__}")
    return found


def _json_lines(content: bytes, path: str) -> list[Any]:
    """Lines end at \\n alone: JSON texts may hold the other characters that str.splitlines takes for line ends. A file that is
    one JSON list of rows, on one line or on many, is read as that."""
    found: list[Any] = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            found.append(json.loads(_utf8(line, path, number)))
        except json.JSONDecodeError as error:
            rows = _whole_list(content) if not found else None
            if rows is not None:
                return rows
            raise DataError(f"{path}, line {number}: not valid JSON ({error.msg} at column {error.colno})") from None
        except (RecursionError, ValueError) as error:
            raise DataError(f"{path}, line {number}: cannot be read as JSON ({error})") from None
    if len(found) == 1 and is_list(found[0]) and found[0] and all(is_mapping(record) for record in found[0]):
        return found[0]
    return found


def _whole_list(content: bytes) -> list[Any] | None:
    """The rows of a JSON list over several lines; None if it is none."""
    if not content.lstrip().startswith(b"["):
        return None
    try:
        found = json.loads(content.decode("utf-8"))
    except (RecursionError, ValueError):
        return None
    return found if is_list(found) else None


def _utf8(line: bytes, path: str, number: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = f"byte 0x{line[error.start]:02x} at position {error.start + 1}"
        raise DataError(f"{path}, line {number}: not UTF-8 text ({bad}). Save the file as UTF-8") from None


def _table(content: bytes, path: str, delimiter: str) -> list[Any]:
    """A table with a head. Cells are texts, empty ones missing; a list or mapping is written as JSON."""
    found: list[Any] = []
    lines = [_utf8(line, path, number) for number, line in enumerate(content.split(b"\n"), start=1)]
    reader = csv.reader(io.StringIO("\n".join(lines), newline=""), delimiter=delimiter, strict=True)
    try:
        csv.field_size_limit(2**31 - 1)
        head = next(reader, list[str]())
        for row in reader:
            if not row:
                continue
            if len(row) != len(head):
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(row)} cells, the head has {len(head)}. Put cells that hold "
                    f"{delimiter!r}, quotes or line ends into quotes"
                )
            found.append({name: _cell(name, text) for name, text in zip(head, row, strict=True)})
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: cannot be read as a table ({error})") from None
    return found


def _cell(column: str, text: str) -> Any:
    if not text:
        return None
    if column in NESTED and text[0] in "[{":
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return text
        # A text may look like JSON: messages are mappings, steps are texts, an answer with fields is a mapping.
        inner: type = str if column in ("steps", "hint") else dict
        if is_mapping(value) or (is_list(value) and value and all(isinstance(v, inner) for v in value)):
            return value
    return text


_TEXTS: Mapping[str, Callable[[bytes, str], list[Any]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_list,
    ".csv": lambda content, path: _table(content, path, ","),
    ".tsv": lambda content, path: _table(content, path, "\t"),
}
