"""Rows that outgrow memory: read once, kept in an Arrow file, taken from it one by one.

The first start reads the source in one pass, checks every row as rows in memory are checked (``crew.py``: by several processes
where it is large), and writes four files into a cache folder: ``rows.arrow``, ``facts.json``, which holds what a start asks of
all rows at once (their number, their fingerprint, the first row without a solution or an answer, the longest rows), and two
with a number a row (hash of the problem, whether there is a solution). The folder's
name is a hash of the source's bytes, of the settings that change what is read and of the code that reads, so that nothing stale
is found.
Later starts read the facts alone. Rows, ids and the fingerprint are those of the same source read into memory.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import secrets
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar, cast, overload

import numpy as np

from unift.files import feed, files_of, publish_folder, writing
from unift.rows import pictures
from unift.rows.ids import Names
from unift.types import DataError, Row

LARGE = 32 * 2**20  # bytes of a source above which its rows stay on disk: about 20,000 rows of 1.5 KB
BATCH = 64  # rows that are read from disk together
LONGEST = 1000  # rows, the longest by characters, that are tokenised before a run starts
RECENT = 1024  # items that are kept once they were made: what a step asks for more than once

T = TypeVar("T")


class Lazy(Sequence[T], Generic[T]):
    """Items that are made when they are asked for; the most recent are kept. Slices are lazy, too."""

    def __init__(self, make: Callable[[int], T], indices: range) -> None:
        self._make, self._indices = make, indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Lazy[T]: ...
    def __getitem__(self, index: int | slice) -> T | Lazy[T]:
        if isinstance(index, slice):
            return Lazy(self._make, self._indices[index])
        return self._make(self._indices[index])


def lazily(make: Callable[[int], T], n: int) -> Lazy[T]:
    """``[make(0), ..., make(n - 1)]``, each made at its first use and again once it was forgotten."""
    return Lazy(lru_cache(maxsize=RECENT)(make), range(n))


@dataclass(frozen=True)
class Facts:
    """What one pass over all rows finds. Row numbers count from 1; None where there is no such row."""

    rows: int
    fingerprint: str
    without_steps: int | None
    without_answer: int | None
    tasks: list[str]
    columns: list[str]  # of Row.extra, with a value in at least one row
    longest: list[int]  # indices of the longest rows by characters, ascending
    pictures: bool = False  # whether any row has one
    renamed: dict[str, str] = field(default_factory=dict[str, str])  # index: id of a further copy of a row


class StoredRows(Lazy[Row]):
    """Rows of an Arrow file. ``problems_N``: a 64-bit hash of every row's problem (`rows.tasks.canonical`), on disk; ``solved``:
    indices of the rows with a worked solution."""

    def __init__(self, folder: Path) -> None:
        import pyarrow as pa  # pyright: ignore[reportMissingTypeStubs]

        self.facts = Facts(**json.loads((folder / "facts.json").read_text(encoding="utf-8")))
        # Read, not mapped: pages of a mapped file count as memory of the process once they were touched.
        reader = cast(Any, pa).ipc.open_file(cast(Any, pa).OSFile(str(folder / "rows.arrow")))
        self._problems, self._solved = folder / "problems.npy", folder / "solved.npy"
        n = self.facts.rows
        held = (reader.num_record_batches, len(self.problems_N), len(np.load(self._solved)))
        if n and held != (-(-n // BATCH), n, n):
            raise ValueError(f"{folder} is not whole")
        renamed = {int(index): name for index, name in self.facts.renamed.items()}

        @lru_cache(maxsize=8)
        def batch(number: int) -> Any:
            return reader.get_batch(number).column(0)

        def make(index: int) -> Row:
            row = _unpacked(batch(index // BATCH)[index % BATCH].as_py())
            return replace(row, id=renamed[index]) if index in renamed else row

        super().__init__(lru_cache(maxsize=RECENT)(make), range(self.facts.rows))

    @property
    def problems_N(self) -> np.ndarray:
        return np.load(self._problems, mmap_mode="r")

    @property
    def solved(self) -> Sequence[int]:
        whole = range(self.facts.rows)
        return (
            whole if self.facts.without_steps is None else cast("Sequence[int]", np.flatnonzero(np.load(self._solved)))
        )


def problem_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


_lenient = json.JSONEncoder(default=str).encode
_strict = json.JSONEncoder().encode


def digest_row(digest: Any, row: Row) -> None:
    """Feed a row's content to the fingerprint of its data set."""
    digest.update(_lenient(_content(row)).encode())


def _content(row: Row) -> list[Any]:
    """What the fingerprint sees of a row; of a picture what it holds."""
    found = [row.id, row.prompt, row.steps, row.ending, row.answer]
    return [*found, [one.digest for one in row.images]] if row.images else found


def stored(source: Path, settings: Sequence[Any], parts: Callable[[], Iterable[Part]], name: str) -> StoredRows | None:
    """The rows of ``source``, from the cache, or in ``parts`` that are put there. None where JSON cannot hold them as they are
    (times, bytes, tuples in a column), so that they must be read into memory.

    settings: whatever else decides what is read. name: of the source, for messages. Raises DataError as reading does. A folder of
    the cache that is damaged is made anew.
    """
    folder = cache() / _key(source, settings)
    kept = _opened(folder)
    if kept is not None:
        return kept
    with writing("the cache of rows (UNIFT_CACHE=FOLDER moves it)", cache()):
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Machines may share it.
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        try:
            if not _build(temporary, parts(), name):
                return None
            try:
                publish_folder(temporary, folder, over=False)
            except OSError:  # another process was faster: its folder holds the same, and may be in use
                if _opened(folder) is None:
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return StoredRows(folder)


def _opened(folder: Path) -> StoredRows | None:
    """The rows of a folder of the cache; None where it is not there, or not whole."""
    try:
        return StoredRows(folder)
    except (OSError, ValueError, TypeError):  # of files, of JSON, Arrow and numpy, of Facts
        return None


def cache() -> Path:
    """The folder of stored rows; the environment's UNIFT_CACHE, or the user's cache folder."""
    own, general = os.environ.get("UNIFT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own).expanduser() if own else Path(general or Path.home() / ".cache") / "unift" / "rows"


def _key(source: Path, settings: Sequence[Any]) -> str:
    """Content of the source (a file, or all files of a folder), the settings, and the code that reads."""
    digest = hashlib.sha256(json.dumps(list(settings)).encode())
    for path in (*sorted(Path(__file__).parent.rglob("*.py")), *files_of(source)):
        digest.update(feed(digest.update, path).to_bytes(8, "little"))
    return digest.hexdigest()[:32]


# ---------------------------------------------------------------------------------------------- one row


def _packed(row: Row) -> tuple[str, str]:
    """(the row as JSON, what `digest_row` feeds to the fingerprint: the same text but for its last entries)."""
    content = _strict(_content(row))
    files = f", {_strict([pictures.as_json(one) for one in row.images])}" if row.images else ""
    return f"{content[:-1]}, {_strict(row.task)}, {_strict(row.extra)}{files}]", content


def _unpacked(text: str) -> Row:
    found: list[Any] = json.loads(text)
    shown: list[str] = found.pop(5) if len(found) > 7 else []
    files: list[Any] = found.pop() if shown else []
    name, prompt, steps, ending, answer, task, extra = found
    prompt = prompt if isinstance(prompt, str) else tuple(prompt)
    images = tuple(pictures.of_json(digest, value) for digest, value in zip(shown, files, strict=True))
    return Row(name, prompt, tuple(steps), ending, answer, task, extra, images)


# ---------------------------------------------------------------------------------------------- the pass


class Unfit(Exception):
    """A row that JSON changes or cannot hold."""


@dataclass(frozen=True)
class Part:
    """Some rows in their order, as they are stored, and what is asked of all rows together."""

    texts: list[str]
    contents_N: array[int]  # characters of a text that are of the row's content, which the fingerprint sees
    ids_N: array[int]  # 64-bit hashes
    problems_N: array[int]
    characters_N: array[int]
    solved_N: array[int]  # 1: the row has a worked solution
    without_answer: int | None  # index in this part of the first such row
    tasks: set[str]
    columns: set[str]
    pictures: bool = False  # whether any row has one


def part_of(rows: Iterable[Row], is_json: bool) -> Part:
    """is_json: the rows come from JSON, so that every one survives being written. Raises Unfit for a row that does not."""
    from unift.rows.tasks import canonical

    made = Part([], array("Q"), array("Q"), array("Q"), array("Q"), array("B"), None, set(), set())
    without_answer = None
    shown = False
    for index, row in enumerate(rows):
        try:
            text, content = _packed(row)
        except (TypeError, ValueError):
            raise Unfit from None
        if not is_json and (back := _unpacked(text)) != row and repr(back) != repr(row):  # NaN is unequal to itself
            raise Unfit
        made.texts.append(text)
        made.contents_N.append(len(content))
        made.ids_N.append(problem_hash(row.id))
        made.problems_N.append(problem_hash(canonical(row)))
        made.characters_N.append(sum(map(len, row.steps)) + len(row.ending) + _characters(row))
        made.solved_N.append(bool(row.steps))
        if row.answer is None and without_answer is None:
            without_answer = index
        made.tasks.add(row.task)
        shown |= bool(row.images)
        for column, value in row.extra.items():
            if value is not None:
                made.columns.add(column)
    return replace(made, without_answer=without_answer, pictures=shown)


def _build(folder: Path, parts: Iterable[Part], name: str) -> bool:
    """Write the four files. False where a row does not survive being written."""
    import pyarrow as pa  # pyright: ignore[reportMissingTypeStubs]

    arrow, seen = cast(Any, pa), _Seen()
    folder.mkdir()
    schema = arrow.schema([("row", arrow.large_string())])
    try:
        with arrow.OSFile(str(folder / "rows.arrow"), "wb") as sink, arrow.ipc.new_file(sink, schema) as writer:
            for texts in _batches(seen.look(parts)):
                writer.write_batch(arrow.record_batch([arrow.array(texts, arrow.large_string())], schema=schema))
    except Unfit:
        return False
    np.save(folder / "problems.npy", np.frombuffer(seen.problems, dtype=np.uint64))
    np.save(folder / "solved.npy", np.frombuffer(seen.solved, dtype=np.uint8))
    _write(folder, seen.facts())
    renamed = told_apart_on_disk(StoredRows(folder), np.frombuffer(seen.ids, dtype=np.uint64), name)
    if renamed:
        _write(folder, replace(seen.facts(), renamed=renamed))
        digest = hashlib.sha256()
        for row in StoredRows(folder):
            digest_row(digest, row)
        _write(folder, replace(seen.facts(), renamed=renamed, fingerprint=digest.hexdigest()[:16]))
    return True


def _write(folder: Path, facts: Facts) -> None:
    (folder / "facts.json").write_text(json.dumps(asdict(facts)), encoding="utf-8")


def _batches(parts: Iterable[Sequence[str]]) -> Iterator[list[str]]:
    """BATCH texts each, whatever the sizes of the parts."""
    left: list[str] = []
    for texts in parts:
        left += texts
        whole = len(left) - len(left) % BATCH
        yield from (left[i : i + BATCH] for i in range(0, whole, BATCH))
        left = left[whole:]
    if left:
        yield left


class _Seen:
    """Facts while the parts go by: 17 bytes a row."""

    def __init__(self) -> None:
        self.n = 0
        self.ids, self.problems, self.solved = array("Q"), array("Q"), array("B")
        self.digest = hashlib.sha256()
        self.without_answer: int | None = None
        self.tasks, self.columns = set[str](), set[str]()
        self.pictures = False
        self.longest: list[tuple[int, int]] = []  # a heap of (characters, index)

    def look(self, parts: Iterable[Part]) -> Iterator[list[str]]:
        for part in parts:
            for text, characters in zip(part.texts, part.contents_N, strict=True):
                self.digest.update(f"{text[: characters - 1]}]".encode("ascii"))
            self.ids += part.ids_N
            self.problems += part.problems_N
            self.solved += part.solved_N
            if self.without_answer is None and part.without_answer is not None:
                self.without_answer = self.n + part.without_answer + 1
            self.tasks |= part.tasks
            self.pictures |= part.pictures
            self.columns |= part.columns
            for index, characters in enumerate(part.characters_N, start=self.n):
                self._weigh(characters, index)
            self.n += len(part.texts)
            yield part.texts

    def _weigh(self, characters: int, index: int) -> None:
        if len(self.longest) < LONGEST:
            heapq.heappush(self.longest, (characters, index))
        elif characters > self.longest[0][0]:
            heapq.heapreplace(self.longest, (characters, index))

    def facts(self) -> Facts:
        lacking = self.solved.index(0) + 1 if 0 in self.solved else None
        found = self.digest.hexdigest()[:16], lacking, self.without_answer
        lists = sorted(self.tasks), sorted(self.columns), sorted(index for _, index in self.longest)
        return Facts(self.n, *found, *lists, pictures=self.pictures)


def _characters(row: Row) -> int:
    return len(row.prompt) if isinstance(row.prompt, str) else sum(len(m["content"]) for m in row.prompt)


def _among(value: int, ascending: np.ndarray) -> bool:
    at = int(np.searchsorted(ascending, np.uint64(value)))
    return at < len(ascending) and int(ascending[at]) == value


def told_apart_on_disk(rows: Sequence[Row], hashes_N: np.ndarray, name: str) -> dict[str, str]:
    """The rule of `ids.told_apart` for rows on disk: index -> new id of every further copy. Only rows whose ids have the
    same hash are read."""
    values, counts = np.unique(hashes_N, return_counts=True)
    twice = values[counts > 1]
    if not len(twice):
        return {}
    names, renamed = Names(name), dict[str, str]()
    for index in map(int, np.flatnonzero(np.isin(hashes_N, twice))):
        row = rows[index]
        own = names.own(row, index + 1, lambda number: rows[number - 1])
        if own != row.id:
            if _among(problem_hash(own), values):
                raise DataError(f"{name}, row {index + 1}, column 'id': {own!r} names a copy and another row, too")
            renamed[str(index)] = own
    return renamed
