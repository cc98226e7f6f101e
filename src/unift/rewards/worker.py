"""The worker's side of scoring: load the reward, then a record for each item. Imports must stay light.

A worker is a fork of the keeper (``keeper.py``), alone in its session, with its standard streams, one socket to the
trainer and nothing else that is open. Everything that it says is checked in ``journal.py``. A nonce keeps a record from
being taken for another item's, but not from a reward that reads the frames of this process: it finds the nonces of the
whole batch, and can forge the records of the items that were sent with its own.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import resource
import signal
import socket
import struct
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unift.rewards.adapters import BadValue, Options, Reward, described
from unift.rewards.journal import CLEAN, LITTERED, SPOILED
from unift.rewards.spec import Part, load_parts
from unift.types import RewardError, Row

Item = tuple[str, Row, str]  # completion, row, hint
# What a lowered limit takes away from the items after it: descriptors, memory, time, processes, what it may write.
_NAMED = ("NOFILE", "AS", "DATA", "CPU", "NPROC", "FSIZE")
_LIMITS = tuple(getattr(resource, f"RLIMIT_{name}") for name in _NAMED if hasattr(resource, f"RLIMIT_{name}"))
HEAD = struct.Struct(">Q")  # length of what follows, the pickle of a Batch
Batch = list[tuple[str, bytes]]  # nonces and pickles
_encode = json.JSONEncoder(allow_nan=False).encode  # made once: json.dumps makes one a record


@dataclass(frozen=True)
class Setup:
    """What a worker needs to know to load the reward. memory_mb: MiB, see Scorer."""

    parts: tuple[Part, ...]
    summed: bool  # the parts are weighted and added up; else there is one, as it is
    options: Options
    memory_mb: int | None


def frame(batch: Batch) -> bytes:
    """What the trainer sends: first a Setup alone, then Items."""
    body = pickle.dumps(batch, protocol=5)
    return HEAD.pack(len(body)) + body


def serve(link: socket.socket) -> None:
    """Answer everything in its order with one record, which is out before the next one begins."""
    _begin_streams()
    reward: Reward | None = None
    before = _State.now()
    while (batch := _receive(link)) is not None:
        for nonce, payload in batch:
            if reward is None:
                reward, record = _load(payload)
                before = _State.now()
            else:
                record = _score(reward, payload, before)
                if os.getpid() != before.pid:
                    os._exit(0)  # a copy that the reward made of this process and that came back from the reward
            text = _encode([nonce, *record]).encode() + b"\n"
            try:
                link.sendall(text)
            except OSError:
                os._exit(1)  # the reward closed the link, or the trainer did
            if reward is None or record[-1] == SPOILED:
                return


def _receive(link: socket.socket) -> Batch | None:
    """None at the end."""
    data = _exactly(link, HEAD.size)
    body = data and _exactly(link, *HEAD.unpack(data))
    return pickle.loads(body) if body else None


def _exactly(link: socket.socket, size: int) -> bytearray | None:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        try:
            got = link.recv_into(view)
        except OSError:
            return None
        if not got:
            return None
        view = view[got:]
    return data


def _load(payload: bytes) -> tuple[Reward | None, tuple[Any, ...]]:
    try:
        setup: Setup = pickle.loads(payload)
        reward = load_parts(setup.parts, setup.summed, setup.options)
        if setup.memory_mb is not None:
            _limit_memory(setup.memory_mb)
        return reward, ("ready", reward.kind)
    except RewardError as error:
        return None, ("unloadable", str(error))
    except BaseException as error:
        return None, ("unloadable", f"a scoring worker could not begin ({described(error)})")


def _score(reward: Reward, payload: bytes, before: _State) -> tuple[Any, ...]:
    """The record of one item, all but its nonce."""
    try:
        completion, row, hint = pickle.loads(payload)
    except BaseException as error:
        text = f"the row cannot be read in a scoring worker ({described(error)}); row columns must be plain data"
        return "exception", text, SPOILED
    record = _attempt(reward, completion, row, hint)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    changed = before.changed()
    if changed:
        text = f"the reward {changed}; a reward must leave its worker as it found it"
        return "exception", text, SPOILED
    if record[0] == "crash":
        return (*record, SPOILED)  # whatever was hoarded stays in this process
    return (*record, LITTERED if before.littered() else CLEAN)


def _attempt(reward: Reward, completion: str, row: Row, hint: str) -> tuple[Any, ...]:
    try:
        score = reward(completion, row, hint)
        if score is None:
            return ("skipped",)
        return "score", score.value, score.correct, dict(score.parts), score.note
    except BadValue as error:
        return "bad value", str(error)
    except MemoryError as error:
        return "crash", f"out of memory ({described(error)})"
    except BaseException as error:
        return "exception", described(error)


# ------------------------------------------------------------------------------------------ the process, before and after


@dataclass(frozen=True)
class _State:
    """What a reward could change under the feet of the items after it."""

    pid: int
    files: tuple[Any, ...]  # what the three standard descriptors are
    streams: tuple[Any, ...]
    limits: tuple[Any, ...]
    threads: int

    @staticmethod
    def now() -> _State:
        streams = (sys.stdin, sys.stdout, sys.stderr)
        return _State(os.getpid(), _files(), streams, _limits(), threading.active_count())

    def changed(self) -> str:
        """What is no longer as it was, in words; "" if nothing is. Streams that were only exchanged are put back."""
        with contextlib.suppress(Exception):
            signal.setitimer(signal.ITIMER_REAL, 0)  # an alarm that was left running would hit a later item
        if _files() != self.files or any(_closed(stream) for stream in self.streams):
            return "closed or exchanged a standard stream"
        sys.stdin, sys.stdout, sys.stderr = self.streams
        if _limits() != self.limits:
            return "changed a resource limit of its process"
        return ""

    def littered(self) -> bool:
        """Whether threads or child processes are left, which can fail or use up time while later items are scored."""
        return threading.active_count() > self.threads or _has_children()


def _closed(stream: Any) -> bool:
    try:
        return bool(stream.closed)
    except ValueError:  # its buffer was taken away
        return True


def _files() -> tuple[Any, ...]:
    found: list[Any] = []
    for descriptor in range(3):
        try:
            status = os.fstat(descriptor)
            found.append((status.st_dev, status.st_ino))
        except OSError:
            found.append(None)
    return tuple(found)


def _limits() -> tuple[Any, ...]:
    return tuple(map(resource.getrlimit, _LIMITS))


def _has_children() -> bool:
    if not hasattr(os, "waitid"):  # an older macOS; waitpid would take the exit status away from its owner
        return False
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except OSError:  # there is none
        return False
    return True


def _begin_streams() -> None:
    """Text that shows up line by line and never fails to be encoded."""

    def opened(descriptor: int, mode: str) -> Any:
        raw = io.FileIO(descriptor, mode, closefd=False)
        buffer = io.BufferedReader(raw) if mode == "r" else io.BufferedWriter(raw)
        return io.TextIOWrapper(buffer, encoding="utf-8", errors="backslashreplace", line_buffering=True)

    sys.stdin, sys.stdout, sys.stderr = opened(0, "r"), opened(1, "w"), opened(2, "w")
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr


def _limit_memory(mebibytes: int) -> None:
    held = 0
    with contextlib.suppress(OSError):
        held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limit = held + (mebibytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
