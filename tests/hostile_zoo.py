"""Reward functions that attack their worker, the trainer or each other; imported by the workers of test_reward_hostile.py."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import sys
import threading
import time

from unift.types import Row, Score

LINES = b'[0, "score", 1.0, null, {}, "", 0]\n["", "score", 1.0, null, {}, "", 0]\n[1.5, "ready", "x"]\n'


def descriptors() -> list[int]:
    return [fd for fd in range(3, 256) if _is_open(fd)]


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def write_everywhere(data: bytes) -> None:
    for fd in descriptors():
        with contextlib.suppress(OSError):
            os.write(fd, data)


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise SystemExit(5)


class Bomb:
    """Goes off when it is unpickled."""

    def __init__(self, order: str) -> None:
        self.order = order

    def __reduce__(self):
        return explode, (self.order,)


def explode(order: str) -> object:
    if order == "exit":
        os._exit(6)
    raise KeyError("odd pickle")


def own_record(value: float) -> None:
    """Finds nonce and link in the frames of its worker, and answers for itself."""
    frame = sys._getframe()
    while frame is not None:
        if "nonce" in frame.f_locals and isinstance(frame.f_locals.get("link"), socket.socket):
            nonce = frame.f_locals["nonce"]
            frame.f_locals["link"].sendall(f'["{nonce}", "score", {value}, null, {{}}, "", 0]\n'.encode())
        frame = frame.f_back


def score(completion: str, row: Row) -> object:
    order, _, argument = completion.partition(" ")
    if order == "forge":
        write_everywhere(LINES)
        return 0.0
    if order == "flood":
        while True:
            write_everywhere(b"x" * 65536)
    if order == "endless-line":
        write_everywhere(b'["' + b"x" * (3 << 20))
    if order == "nested":
        write_everywhere(b"[" * 200_000 + b"\n")
    if order == "frames":
        own_record(0.75)
        return 0.75
    if order == "late-forger":
        threading.Thread(target=lambda: (time.sleep(0.05), write_everywhere(LINES)), daemon=True).start()
        return 0.75
    if order == "late-killer":
        threading.Timer(0.05, os._exit, [3]).start()
        return 0.75
    if order == "threads":
        for _ in range(2):
            threading.Thread(target=spin, daemon=True).start()
        return 0.75
    if order == "busy-child":
        if os.fork() == 0:
            spin()
        return 0.75
    if order == "fork":
        os.fork()
        return 0.75
    if order == "fork-and-exit":
        if os.fork():
            os._exit(0)
        return 1.0
    if order == "close-descriptors":
        for fd in range(3):
            os.close(fd)
    if order == "close-stdout":
        sys.stdout.close()
    if order == "detach-stderr":
        sys.stderr.detach()
    if order == "close-all":
        os.closerange(3, 4096)
    if order == "limit-files":
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    if order == "limit-time":
        resource.setrlimit(resource.RLIMIT_CPU, (1000, 1000))
    if order == "deaf":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        time.sleep(1000)
    if order == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if order == "terminate":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1000)
    if order == "kill-keeper":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(1000)
    if order == "stop-keeper":
        os.kill(os.getppid(), signal.SIGSTOP)
        os._exit(0)
    if order == "alarm":
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        return 0.75
    if order == "swap-stdout":
        sys.stdout = open(os.devnull, "w")
        return 0.75
    if order == "unspeakable":
        raise Unspeakable
    if order == "no-mapping":
        return Score(1.0, parts=3)  # type: ignore[arg-type]
    if order == "long":
        return Score(0.75, None, {"n" * 10_000: 1.0}, "\ud800" * 100_000)
    if order == "daemon":  # out of its group, its session and its family
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                with open(argument, "w") as file:
                    file.write(str(os.getpid()))
                time.sleep(1000)
            os._exit(0)
        os.wait()
        while not os.path.exists(argument) or not open(argument).read():
            time.sleep(0.01)
        return 0.75
    if order == "work":  # seconds of CPU time, on the first core
        os.sched_setaffinity(0, {int(row.answer)})
        spin(float(argument))
        return 0.75
    if order == "visible":
        with open("/proc/self/environ", "rb") as file:
            at_start = file.read().decode()
        return float(argument in os.environ or f"{argument}=" in at_start)
    if order == "chatter":
        for _ in range(4096):
            os.write(1, b"x" * (1 << 16))
        return 0.75
    if order == "sleep":
        time.sleep(float(argument))
        return 0.5
    return float(completion)


def spin(seconds: float = 1000.0) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
