"""How much time a process and its children took: of a CPU, and of waiting for one."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


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
