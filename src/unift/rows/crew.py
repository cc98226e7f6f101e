"""Lines of a large file, read and checked by helper processes: one core makes about 30,000 rows of 500 bytes a second.

A helper is started anew (``python -c``), so that nothing of the caller's runs in it or is open in it, gets chunks of lines at its
standard input and gives what `examined` makes of them. It ends with its input. Helpers only make it faster: what one that is gone,
or stands still, was to do is done in this process.
"""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

from unift.rows.files import json_line
from unift.rows.readers import ended, read_record
from unift.rows.store import Part, Unfit, part_of
from unift.types import Row, UniftError

CHUNK = 2**20  # bytes of lines that a helper gets at a time
MOST = 8  # helpers: this process takes a fifteenth of a helper's time for each of its rows
WAIT_SECONDS = 300.0  # for a chunk, which takes .1 s
_START = "import sys; sys.path[:] = {path!r}; from unift.rows.crew import serve; serve()"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Reading:
    """How the lines of a file are read."""

    name: str  # of the file, for messages
    layout: str
    marked: bool  # rows whose ending was written end with the mark of their own solution (`tasks.format.all_marked`)


@dataclass(frozen=True)
class Chunk:
    """Lines that follow each other, with their numbers in the file; blank ones are left out."""

    lines: list[tuple[int, bytes]]
    row: int  # number of the first one's row
    reading: Reading


def examined(chunk: Chunk) -> Part:
    """The rows of a chunk, checked. Raises DataError for the first one that is not usable."""
    how = chunk.reading

    def rows() -> Iterator[tuple[Row, bool]]:
        for number, (at, line) in enumerate(chunk.lines, start=chunk.row):
            yield read_record(json_line(line, how.name, at), how.name, number, how.layout)

    return part_of(ended(rows(), how.marked), is_json=True)


def chunks(lines: Iterable[tuple[int, bytes]], reading: Reading) -> Iterator[Chunk]:
    """All lines in chunks of about CHUNK bytes."""
    held: list[tuple[int, bytes]] = []
    size, row = 0, 1
    for number, line in lines:
        held.append((number, line))
        size += len(line)
        if size >= CHUNK:
            yield Chunk(held, row, reading)
            held, size, row = [], 0, row + len(held)
    if held:
        yield Chunk(held, row, reading)


def mapped(todo: Iterable[Chunk], helpers: int) -> Iterator[Part]:
    """`examined` of each, in their order, and its first error in that order. helpers: with fewer than two, here."""
    if helpers < 2:
        yield from map(examined, todo)
        return
    crew = [_Helper() for _ in range(helpers)]
    idle: queue.SimpleQueue[_Helper] = queue.SimpleQueue()
    for helper in crew:
        idle.put(helper)

    def ask(chunk: Chunk) -> Part:
        helper = idle.get()
        try:
            return helper.ask(chunk)
        finally:
            idle.put(helper)

    pool = ThreadPoolExecutor(helpers)
    try:
        waiting: deque[Future[Part]] = deque()
        for chunk in todo:
            waiting.append(pool.submit(ask, chunk))
            if len(waiting) > helpers + 2:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for helper in crew:
            helper.end()


# ---------------------------------------------------------------------------------------------- both ends


class _Helper:
    def __init__(self) -> None:
        words = [sys.executable, "-c", _START.format(path=sys.path)]
        # A session of its own: an interrupt of the terminal is for this process to act on.
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=-1, start_new_session=True
        )
        self._over = False

    def ask(self, chunk: Chunk) -> Part:
        found = None if self._over else self._exchange(chunk)
        if found is None:
            return examined(chunk)
        if isinstance(found, BaseException):
            raise found
        return found

    def _exchange(self, chunk: Chunk) -> Part | UniftError | Unfit | None:
        """None where the helper is gone."""
        process = self._process
        if process.stdin is None or process.stdout is None:
            return None
        limit = threading.Timer(WAIT_SECONDS, process.kill)
        limit.daemon = True
        limit.start()
        try:
            _write(process.stdin, chunk)
            return _read(process.stdout)
        except (OSError, EOFError, ValueError, pickle.UnpicklingError):
            self.end()
            return None
        finally:
            limit.cancel()

    def end(self) -> None:
        self._over = True
        self._process.kill()
        self._process.wait()
        for end in (self._process.stdin, self._process.stdout):
            with suppress(OSError, ValueError):  # a thread may be at it: its read ends with the process
                if end is not None:
                    end.close()


def _write(file: IO[bytes], what: Any) -> None:
    pickle.dump(what, file, protocol=pickle.HIGHEST_PROTOCOL)
    file.flush()


def _read(file: IO[bytes]) -> Any:
    """What this process and its own helper tell each other; raises EOFError at the end."""
    return pickle.load(file)


def serve() -> None:
    """In a helper: chunks from standard input, parts or errors to standard output, until the input ends."""
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)  # whatever prints does not print into the answers
        while True:
            try:
                chunk: Chunk = _read(sys.stdin.buffer)
            except EOFError:
                return
            try:
                _write(out, examined(chunk))
            except (UniftError, Unfit) as error:
                _write(out, error)
