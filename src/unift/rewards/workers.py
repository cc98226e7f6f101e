"""The trainer's hands on its scoring workers: start and kill them, send them items, read what they say, see how they end.

Nothing here waits for a worker: what it does not take is kept, what it says is read as it comes. Results are text that
`records.read_record` checks; nothing that a worker sends is unpickled.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field

from unift.rewards.keeper import ANSWER, REQUEST
from unift.rewards.records import LINE_BYTES, NONCE_BYTES, BadRecord, Ready, Scored, Unloadable, read_record
from unift.rewards.usage import Usage, usage_of
from unift.rewards.worker import frame
from unift.types import RewardError

STOP_SECONDS = 2.0  # for the keeper to end; it needs GRACE_SECONDS at most unless it was stopped
_START = "import sys; sys.path[:] = {path!r}; from unift.rewards.keeper import main; main({fd})"


class KeeperGone(Exception):
    """The process that starts workers died, or does not answer. Its workers die with it."""


@dataclass(eq=False)
class Worker:
    """A worker as the trainer sees it."""

    pid: int
    link: socket.socket
    nonce: str = ""
    item: int | None = None  # index of the item that it holds
    ready: bool = False  # the reward is loaded
    begin: Usage | None = None  # at the first look after it got what it works on
    since: float = field(default_factory=time.monotonic)  # when it got that
    scored: int = 0
    littered: bool = False  # items before this one left threads or children in it
    closed_at: float | None = None  # when its link closed
    unsent: bytes = b""
    heard: bytes = b""

    @property
    def idle(self) -> bool:
        return self.ready and self.item is None and self.closed_at is None

    def used(self) -> Usage:
        """Since it got its item, but for what it used before the first call of this."""
        now = usage_of(self.pid)
        self.begin = self.begin or now
        used = now.since(self.begin)
        return Usage(now.clock - self.since, used.cpu, used.queued, now.stopped)

    def send(self, payload: bytes, item: int | None) -> None:
        """Hand over a pickle and take note of the item; what does not fit into the socket goes with `push`."""
        self.nonce, self.item, self.begin, self.since = secrets.token_hex(NONCE_BYTES // 2), item, None, time.monotonic()
        self.unsent += frame(self.nonce, payload)
        self.push()

    def push(self) -> None:
        with contextlib.suppress(OSError):  # full, or closed: hearing it tells
            while self.unsent:
                self.unsent = self.unsent[self.link.send(self.unsent[:LINE_BYTES]) :]

    def hear(self) -> Ready | Unloadable | Scored | None:
        """What it says, if a record is complete. Raises BadRecord. Sets ``closed_at`` at the end of the link."""
        while b"\n" not in self.heard:
            try:
                data = self.link.recv(1 << 16)
            except BlockingIOError:
                return None
            except OSError:
                data = b""
            if not data:
                self.closed_at = self.closed_at or time.monotonic()
                return None
            self.heard += data
            if len(self.heard) > LINE_BYTES:
                raise BadRecord("a line without end")
        line, _, rest = self.heard.partition(b"\n")
        self.heard = b""
        if rest:
            raise BadRecord("more than one record for one item")
        if self.ready and self.item is None:
            raise BadRecord("a record for no item that it holds")
        return read_record(line, self.nonce)


class Keeper:
    """A running keeper. environment: what it and its workers see. Raises KeeperGone wherever it does not do its part."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        if not hasattr(os, "fork") or not sys.executable:
            raise RewardError("scoring needs a POSIX system and a Python interpreter that can be started (sys.executable)")
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
        worker.send(payload, None)
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
