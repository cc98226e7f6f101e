"""The process that forks scoring workers, tells how they end, and ends with the trainer. It runs none of the user's code.

It is started anew (``python -c``), so nothing of the trainer is open in it and its environment is what the trainer gives
it; forking it is safe (one thread) and fast, which forking the trainer is not. Workers write to a pipe that it reads:
the first bytes reach the trainer's standard error, the rest is dropped, however much it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import struct
import sys
import time
from pathlib import Path
from types import FrameType

from unift.rewards.worker import serve

REQUEST = struct.Struct(">cI")  # b"S" 0 and a socket: start a worker at it; b"K" pid: kill that worker
ANSWER = struct.Struct(">cIi")  # b"P" pid 0: the worker that was asked for; b"X" pid code: this one ended
GRACE_SECONDS = 0.3  # for workers to leave by themselves at the end
LOOK_SECONDS = 1.0  # between looks at whether the trainer is alive (its end closes the control socket, but for copies)
OUTPUT_BYTES = 64 << 10
_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36  # prctl(2), Linux


def main(control_fd: int) -> None:
    """Keep workers until the control socket closes. Returns in the keeper at the end, and in each worker at its end."""
    link = _keep(socket.socket(fileno=control_fd))
    if link is not None:
        serve(link)


def _keep(control: socket.socket) -> socket.socket | None:
    """In a worker: its link to the trainer. In the keeper: None, when all is over."""
    trainer = os.getppid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a signal to everything of the job is for the trainer to act on
    _prctl(_SET_CHILD_SUBREAPER, 1)  # what a reward starts and abandons becomes a child of this process
    wake, woken = socket.socketpair()
    for end in (wake, woken):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, _ignore)  # SIG_IGN would reap the workers, and their ends would be unknown
    signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
    printed, printing = os.pipe()
    output = _Output(printed)
    workers: set[int] = set()
    while os.getppid() == trainer:
        ready, _, _ = select.select([control, wake, printed], [], [], LOOK_SECONDS)
        if printed in ready:
            output.forward()
        if wake in ready:
            wake.recv(4096)
        for pid, code in _reap(workers):
            _send(control, b"X", pid, code)
        if control not in ready:
            continue
        request, descriptors, _, _ = socket.recv_fds(control, REQUEST.size, 1)
        if not request:
            break
        operation, pid = REQUEST.unpack(request)
        if operation == b"K":
            if pid in workers:
                _kill(pid)
            continue
        with socket.socket(fileno=descriptors[0]) as link:
            child = os.fork()
            if child == 0:
                signal.set_wakeup_fd(-1)
                for end in (control, wake, woken):
                    end.close()
                os.close(printed)
                return _become_worker(link.detach(), printing)
        workers.add(child)
        _send(control, b"P", child, 0)
    _end(workers, output)
    return None


def _ignore(number: int, frame: FrameType | None) -> None:
    """A signal that is to be noticed by the wake-up descriptor alone."""


def _become_worker(link: int, printing: int) -> socket.socket:
    os.setsid()  # what the reward starts can be killed with it, and has no terminal
    _prctl(_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for standard in (1, 2):
        os.dup2(printing, standard)
    os.close(printing)
    return socket.socket(fileno=link)


def _reap(workers: set[int]) -> list[tuple[int, int]]:
    """(pid, exit code or minus the signal) of workers that ended. What they left running is killed."""
    ended: list[tuple[int, int]] = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if pid == 0:
            break
        if pid in workers:
            workers.discard(pid)
            _kill_group(pid)
            ended.append((pid, os.waitstatus_to_exitcode(status)))
    if ended:
        _kill_strays(workers)
    return ended


def _kill(pid: int) -> None:
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)
    _kill_group(pid)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)


def _kill_strays(workers: set[int]) -> None:
    """Children of this process that are no workers: what a reward started in a session of its own and abandoned."""
    with contextlib.suppress(OSError, ValueError):
        for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            if int(child) not in workers:
                with contextlib.suppress(OSError):
                    os.kill(int(child), signal.SIGKILL)


def _end(workers: set[int], output: _Output) -> None:
    """Workers whose link is closed leave by themselves; the others are killed after a short while."""
    deadline = time.monotonic() + GRACE_SECONDS
    while workers and time.monotonic() < deadline:
        output.forward(0.005)
        _reap(workers)
    for pid in list(workers):
        _kill(pid)
    while workers and time.monotonic() < deadline + GRACE_SECONDS:
        time.sleep(0.002)
        _reap(workers)
    _kill_strays(workers)
    output.forward(0)


class _Output:
    """What workers print. Never waits for the one who reads standard error."""

    def __init__(self, pipe: int) -> None:
        self.pipe, self.left = pipe, OUTPUT_BYTES

    def forward(self, seconds: float = 0.0) -> None:
        """Read once, waiting at most so long."""
        if not select.select([self.pipe], [], [], seconds)[0]:
            return
        data = os.read(self.pipe, OUTPUT_BYTES)
        if self.left >= 0:
            _show(data[: self.left])
            self.left -= len(data)
            if self.left < 0:
                _show(b"\nunift: the reward prints more than 64 KiB; the rest is not shown\n")


def _show(data: bytes) -> None:
    with contextlib.suppress(OSError, ValueError):
        for begin in range(0, len(data), select.PIPE_BUF):
            if select.select([], [2], [], 0)[1]:  # a pipe that is ready takes so much without waiting
                os.write(2, data[begin : begin + select.PIPE_BUF])


def _send(control: socket.socket, what: bytes, pid: int, code: int) -> None:
    with contextlib.suppress(OSError):
        control.sendall(ANSWER.pack(what, pid, code))


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
