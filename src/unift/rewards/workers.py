"""The trainer's hands on its scoring workers: start and kill them, send them items, read what they say, see how they end,
how much time they use and which variables of the environment they see.

Nothing here waits for a worker: what it does not take is kept, what it says is read as it comes. Results are text that
`journal.read_record` checks; nothing that a worker sends is unpickled.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import select
import socket
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from unift.rewards.journal import LINE_BYTES, BadRecord, Ready, Scored, Unloadable, read_record
from unift.rewards.keeper import ANSWER, REQUEST
from unift.rewards.worker import Batch, frame
from unift.types import RewardError

STOP_SECONDS = 2.0  # for the keeper to end; it needs GRACE_SECONDS at most unless it was stopped
_START = "import sys; sys.path[:] = {path!r}; from unift.rewards.keeper import main; main({fd})"
_PROC = Path("/proc")

# Which variables of the environment a scoring worker sees: all but those that look like secrets.
_PARTS = r"PASSWORD|PASSWD|PASSPHRASE|SECRET|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY"  # anywhere in the name
_WORDS = r"TOKENS?|KEYS?|PASS|PWD|PW|AUTH|PAT|CREDS?|COOKIES?|JWT|BEARER|DSN|WEBHOOKS?"  # between underscores
_SECRET = re.compile(rf"{_PARTS}|(?:^|_)(?:{_WORDS})\d*(?:_|$)|(?:TOKEN|KEY)\d*$")
_LOGIN_IN_URL = re.compile(r"\w+://[^/\s:@]*:[^/\s@]+@")
_PLACES = ("PWD", "OLDPWD")  # working directories


class KeeperGone(Exception):
    """The process that starts workers died, or does not answer. Its workers die with it."""


# ------------------------------------------------------------------------------------------------------------ used time


@dataclass(frozen=True)
class Usage:
    """Seconds so far. ``queued``: ready to run while other processes had the CPU (0 where the system does not tell)."""

    clock: float
    cpu: float
    queued: float = 0.0
    stopped: bool = False  # by a signal

    def since(self, begin: Usage) -> Usage:
        """What was used since ``begin``; never negative (a child that leaves takes its time along)."""
        queued = max(0.0, self.queued - begin.queued)
        return Usage(self.clock - begin.clock, max(0.0, self.cpu - begin.cpu), queued, self.stopped)


def usage_of(pid: int) -> Usage:
    """Of the process and of its living and awaited children. Where the system tells nothing, the clock counts as CPU.

    A child whose own parent has left is not counted.
    """
    clock = time.monotonic()
    if (_PROC / "self/stat").exists():
        cpu, queued, stopped = _from_proc(pid)
        return Usage(clock, cpu, queued, stopped)
    with contextlib.suppress(Exception):
        import psutil

        process = psutil.Process(pid)
        times = [p.cpu_times() for p in (process, *process.children(recursive=True))]
        cpu = sum(t.user + t.system + getattr(t, "children_user", 0) + getattr(t, "children_system", 0) for t in times)
        return Usage(clock, cpu, stopped=process.status() == psutil.STATUS_STOPPED)
    return Usage(clock, clock)


def _from_proc(pid: int) -> tuple[float, float, bool]:
    cpu, queued, stopped = 0.0, 0.0, False
    seen: set[int] = set()
    todo = [pid]
    while todo:
        one = todo.pop()
        if one in seen:
            continue
        seen.add(one)
        folder = _PROC / str(one)
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            cpu += sum(int(ticks) for ticks in fields[11:15]) / os.sysconf("SC_CLK_TCK")
            stopped = stopped or (one == pid and fields[0] in "Tt")
        with contextlib.suppress(OSError, ValueError, IndexError):
            queued += int((folder / "schedstat").read_text().split()[1]) / 1e9
        with contextlib.suppress(OSError, ValueError):
            for thread in (folder / "task").iterdir():
                todo += [int(child) for child in (thread / "children").read_text().split()]
    return cpu, queued, stopped


# ----------------------------------------------------------------------------------------------------------- one worker


@dataclass(eq=False)
class Worker:
    """A worker as the trainer sees it."""

    pid: int
    link: socket.socket
    pending: deque[tuple[str, int]] = field(
        default_factory=deque[tuple[str, int]]
    )  # (nonce, index) of items that it holds, in order
    setup: str = ""  # nonce of the setup
    ready: bool = False  # the reward is loaded
    begin: Usage | None = None  # at the first look after the item at work began
    since: float = field(default_factory=time.monotonic)  # when that began, as far as the trainer knows
    pace: float = 1.0  # seconds an item, of those that were sent together last
    scored: int = 0
    littered: bool = False  # items before this one left threads or children in it
    closed_at: float | None = None  # when its link closed
    unsent: bytes = b""
    heard: bytes = b""
    _sent: tuple[float, int] = (0.0, 1)  # when, how many

    @property
    def idle(self) -> bool:
        return self.ready and not self.pending and self.closed_at is None

    def used(self) -> Usage:
        """For the item at work, but for what was used before the first call of this."""
        now = usage_of(self.pid)
        self.begin = self.begin or now
        used = now.since(self.begin)
        return Usage(now.clock - self.since, used.cpu, used.queued, now.stopped)

    def begin_with(self, setup: bytes) -> None:
        self.setup = _nonce()
        self._send([(self.setup, setup)])

    def hand(self, items: Sequence[tuple[int, bytes]]) -> None:
        """Items by index and pickle. What does not fit into the socket goes with `push`."""
        batch = [(_nonce(), payload) for _, payload in items]
        self.pending.extend((nonce, index) for (nonce, _), (index, _) in zip(batch, items))
        self._sent = (time.monotonic(), len(batch))
        self._send(batch)

    def _send(self, batch: Batch) -> None:
        self.begin, self.since = None, time.monotonic()
        self.unsent += frame(batch)
        self.push()

    def push(self) -> None:
        with contextlib.suppress(OSError):  # full, or closed: hearing it tells
            while self.unsent:
                self.unsent = self.unsent[self.link.send(self.unsent[:LINE_BYTES]) :]

    def hear(self) -> Ready | Unloadable | tuple[int, Scored] | None:
        """The next record, with the index of its item; None if there is none yet.

        Raises BadRecord for whatever is not the record that is due. Sets ``closed_at`` at the end of the link.
        """
        while b"\n" not in self.heard:
            try:
                data = self.link.recv(1 << 16)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self.closed_at = self.closed_at or time.monotonic()
                break
            self.heard += data
            if len(self.heard) > LINE_BYTES:
                raise BadRecord("a line without end")
        if self.heard and self.ready and not self.pending:
            raise BadRecord("a record for no item that it holds")
        line, end, rest = self.heard.partition(b"\n")
        if not end:
            return None
        self.heard = rest
        if not self.ready:
            return read_record(line, self.setup, Ready, Unloadable)
        nonce, index = self.pending[0]
        record = read_record(line, nonce, Scored)
        self.pending.popleft()
        self.scored += 1
        self.begin, self.since = None, time.monotonic()
        if not self.pending:
            self.pace = (self.since - self._sent[0]) / self._sent[1]
        return index, record


def _nonce() -> str:
    return secrets.token_hex(16)


# ---------------------------------------------------------------------------------------------------------- all of them


class Keeper:
    """A running keeper. environment: what it and its workers see. Raises KeeperGone wherever it does not do its part."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        if not hasattr(os, "fork") or not sys.executable:
            raise RewardError(
                "scoring needs a POSIX system and a Python interpreter that can be started (sys.executable)"
            )
        self.control, theirs = socket.socketpair()
        with theirs:
            code = _START.format(path=[entry or os.getcwd() for entry in sys.path], fd=theirs.fileno())
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=dict(environment),
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self.workers: list[Worker] = []
        self.ended: dict[int, int] = {}  # pid -> exit code, minus the signal; not yet asked for
        self._heard = b""
        self._stop = weakref.finalize(self, _stop, os.getpid(), self.process, self.control)

    def start(self, payload: bytes, seconds: float) -> Worker:
        """A new worker that has been sent its setup."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            try:
                socket.send_fds(self.control, [REQUEST.pack(b"S", 0)], [theirs.fileno()])
            except OSError:
                ours.close()
                raise KeeperGone from None
            deadline, pid = time.monotonic() + seconds, None
            while pid is None:
                if time.monotonic() > deadline:
                    ours.close()
                    raise KeeperGone
                pid = self._listen(max(0.0, deadline - time.monotonic()))
        worker = Worker(pid, ours)
        self.workers.append(worker)
        worker.begin_with(payload)
        return worker

    def drop(self, worker: Worker) -> None:
        """Kill it, whatever it does, and forget it."""
        if worker in self.workers:
            self.workers.remove(worker)
        self.ended.pop(worker.pid, None)
        worker.link.close()
        with contextlib.suppress(OSError):  # gone: its workers are, too
            self.control.sendall(REQUEST.pack(b"K", worker.pid))

    def wait(self, seconds: float) -> None:
        """Until something is heard of, at most so long. Sends what is unsent; takes note of workers that ended."""
        poll = select.poll()  # select() refuses descriptors above 1023
        poll.register(self.control, select.POLLIN)
        links: dict[int, Worker] = {}
        for worker in self.workers:
            if worker.closed_at is None:
                poll.register(worker.link, select.POLLIN | (select.POLLOUT if worker.unsent else 0))
                links[worker.link.fileno()] = worker
        events = dict(poll.poll(seconds * 1000))
        for descriptor, worker in links.items():
            if events.get(descriptor, 0) & select.POLLOUT:
                worker.push()
        if self.control.fileno() not in events:
            return
        while self._ready(0.0):
            self._listen(0.0)

    def close(self) -> None:
        """End all workers: at once if they score, after a moment for their exit handlers if they are idle."""
        for worker in list(self.workers):
            if worker.idle:
                worker.link.close()
            else:
                self.drop(worker)
        self.workers.clear()
        self._stop()

    def _ready(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def _listen(self, seconds: float) -> int | None:
        """Read one answer: the pid of a new worker, else None. Takes note of a worker that ended."""
        if not self._ready(seconds):
            return None
        try:
            data = self.control.recv(ANSWER.size - len(self._heard))
        except OSError:
            data = b""
        if not data:
            raise KeeperGone
        self._heard += data
        if len(self._heard) < ANSWER.size:
            return None
        what, pid, code = ANSWER.unpack(self._heard)
        self._heard = b""
        if what == b"P":
            return pid
        if any(worker.pid == pid for worker in self.workers):  # else it was dropped; its number may come back
            self.ended[pid] = code
        return None


def _stop(owner: int, process: subprocess.Popen[bytes], control: socket.socket) -> None:
    """Also at the end of an interpreter that did not close its scorer."""
    if os.getpid() != owner:  # a fork of the trainer: the keeper is not its own
        return
    with contextlib.suppress(OSError):
        control.shutdown(socket.SHUT_RDWR)  # seen at the other end even while a fork of the trainer holds a copy
    control.close()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# ------------------------------------------------------------------------------------------------------ the environment


def is_secret(name: str, value: str = "") -> bool:
    """Whether the name has the look of a token, key, password or credential, or the value is a URL with a password."""
    return (_SECRET.search(name.upper()) is not None and name not in _PLACES) or bool(_LOGIN_IN_URL.search(value))


def visible(environment: Mapping[str, str], named: Iterable[str] = ()) -> dict[str, str]:
    """The environment without secrets, except those that are named."""
    named = frozenset(named)
    return {name: value for name, value in environment.items() if name in named or not is_secret(name, value)}
