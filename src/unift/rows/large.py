"""Sources of rows that are too large for memory: opened from the cache of ``store.py``, into which their first start reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

from unift import processes
from unift.rows import crew, pictures, store
from unift.rows.files import is_one_list, json_line, numbered_lines, streamed, streams
from unift.rows.readers import check_steps, ended, layout_of, read_record, read_records, read_rows, with_written_ending
from unift.rows.tasks.format import all_marked
from unift.types import DataError, Row

PER_HELPER = 32 * 2**20  # bytes of a file for each process that reads it: 2 s of work, .5 s of starting
PART = 1000  # rows that are looked at together


def open_rows(
    path: str, *, format: str = "auto", split: str | None = None, limit: int | None = None, need_steps: bool = True
) -> Sequence[Row]:
    """As `read_rows`, but rows of a large source (`rows.store.LARGE`) stay on disk, in the cache of `rows.store`: JSON Lines,
    Parquet and what ``datasets`` saved (``hf:FOLDER``)."""
    hub = path.startswith("hf:")
    source = Path(path.removeprefix("hf:")).expanduser()
    if hub and (source / "dataset_dict.json").is_file():
        source /= split or "train"
    if not large(source, hub) or (limit is not None and limit < 1):
        return read_rows(path, format=format, split=split, limit=limit, need_steps=need_steps)

    def records() -> Iterator[Any]:
        return islice(_saved(source, split or "train") if hub else streamed(path), limit)

    def parts() -> Iterator[store.Part]:
        lines = not hub and source.suffix != ".parquet" and not is_one_list(source)
        if lines:
            return _of_lines(path, source, format, limit)
        return _of_records(records, path, format, source.suffix in (".jsonl", ".ndjson", ".gz"))

    settings: list[Any] = [format, split, limit, hub]
    if pictures.stand_in(next(records(), None)):  # whose paths are relative to the folder
        settings.append(str(source.parent.absolute()))
    kept = store.stored(source, settings, parts, path)
    if kept is not None and kept.facts.pictures and len(settings) == 4:  # the first row had none
        kept = store.stored(source, [*settings, str(source.parent.absolute())], parts, path)
    if kept is None or not len(kept):
        return read_rows(path, format=format, split=split, limit=limit, need_steps=need_steps)
    if need_steps and kept.facts.without_steps is not None:
        number = kept.facts.without_steps
        check_steps(kept[number - 1], f"{path}, row {number}", need_steps)
    return kept


def large(source: Path, hub: bool = False) -> bool:
    """Is it a source of rows that can be read row by row, and too large to be kept in memory?"""
    if hub:
        return (source / "state.json").is_file() and sum(f.stat().st_size for f in source.iterdir()) > store.LARGE
    return source.is_file() and streams(source) and source.stat().st_size > store.LARGE


def _of_lines(path: str, source: Path, format: str, limit: int | None) -> Iterator[store.Part]:
    """All rows of JSON Lines, by as many processes as pay."""

    def lines() -> Iterator[tuple[int, bytes]]:
        return islice(numbered_lines(source, path), limit)

    first = next(lines(), None)
    if first is None:
        return iter(())
    layout = layout_of(json_line(first[1], path, first[0]), path, format)
    read = (
        read_record(json_line(line, path, at), path, number, layout)
        for number, (at, line) in enumerate(lines(), start=1)
    )
    marked = all_marked(with_written_ending(read), path)  # ends at the first solution that marks no answer
    helpers = min(crew.cores() // processes.size(), crew.MOST, source.stat().st_size // PER_HELPER)
    return crew.mapped(crew.chunks(lines(), crew.Reading(path, layout, marked)), helpers)


def _of_records(records: Callable[[], Iterable[Any]], path: str, format: str, is_json: bool) -> Iterator[store.Part]:
    marked = all_marked(with_written_ending(read_records(records(), path, format)), path)
    rows = ended(read_records(records(), path, format), marked)
    while batch := list(islice(rows, PART)):
        yield store.part_of(batch, is_json)


def _saved(folder: Path, split: str) -> Iterator[Any]:
    """Rows of a folder that datasets saved, from its Arrow files."""
    import datasets  # pyright: ignore[reportMissingTypeStubs]

    try:
        found = pictures.packed_columns(cast(Any, datasets).load_from_disk(str(folder)))
    except Exception as error:  # the library raises many kinds; all mean that the rows could not be had
        raise DataError(
            f"hf:{folder} (split {split!r}) could not be loaded: {type(error).__name__}: {error}"
        ) from error
    for batch in found.iter(batch_size=PART):
        names = list(batch)
        yield from (dict(zip(names, values, strict=True)) for values in zip(*batch.values(), strict=True))
