"""The worker's side of scoring: how a worker process starts, and how it scores a chunk. Imports must stay light."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unift.rewards.adapters import BadValue, Reward, described, load_reward
from unift.types import RewardError, Row

Item = tuple[str, Row, str]  # completion, row, hint


@dataclass(frozen=True)
class Setup:
    """What a worker needs to know to load the reward. memory_mb: MiB, see Scorer."""

    spec: str
    format_score: float
    rule: str
    memory_mb: int | None
    answer: str = "tags"


# ------------------------------------------------------------------------------------------------- starting the workers

_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_BASE: Any = multiprocessing.get_context(_METHOD)
_MAIN_LOCK = threading.Lock()


class _Process(_BASE.Process):
    """A process that does not import the parent's main script: that may load torch, or train without a guard."""

    @staticmethod
    def _Popen(process: Any) -> Any:
        with _hidden_main():
            return _BASE.Process._Popen(process)


class _Context(type(_BASE)):
    Process = _Process


def pool_context() -> Any:
    """Processes come from a fork server with the imports done (a refill takes milliseconds) or are spawned."""
    if _METHOD == "forkserver":
        _BASE.set_forkserver_preload([__name__, "pebble"])
    return _Context()


@contextlib.contextmanager
def _hidden_main() -> Iterator[None]:
    """multiprocessing names the main script to its children by these two attributes."""
    main = sys.modules["__main__"]
    with _MAIN_LOCK:
        spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
        main.__spec__ = None
        main.__file__ = None
        try:
            yield
        finally:
            main.__spec__ = spec
            if file is None:
                del main.__file__
            else:
                main.__file__ = file


# ---------------------------------------------------------------------------------------------------- inside the worker

_LOADED: dict[Setup, Reward] = {}


def begin_worker(journals: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # pebble's handler would wait for a C call that never returns
    with contextlib.suppress(OSError, AttributeError):
        os.setpgid(0, 0)  # so that what the reward starts can be killed with it
    threading.Thread(target=_die_with_parent, args=(journals,), daemon=True).start()


def _die_with_parent(journals: str) -> None:
    """A trainer that was killed must not leave workers behind in an endless loop, nor its folder of journals."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        shutil.rmtree(journals, ignore_errors=True)
        with contextlib.suppress(OSError, AttributeError):
            os.killpg(os.getpid(), signal.SIGKILL)
        os._exit(1)


def work(setup: Setup, payload: bytes, journal: str) -> None:
    """Score the items of one chunk, one journal line each. Lines: [clock, what, ...]."""
    handle = os.open(journal, os.O_WRONLY | os.O_APPEND)

    def write(*record: Any) -> None:
        os.write(handle, json.dumps((time.monotonic(), *record)).encode() + b"\n")

    try:
        write("pid", os.getpid())
        try:
            if setup not in _LOADED:
                _LOADED[setup] = load_reward(
                    setup.spec, format_score=setup.format_score, rule=setup.rule, answer=setup.answer
                )
                if setup.memory_mb is not None:
                    _limit_memory(setup.memory_mb)
            items: list[Item] = pickle.loads(payload)
        except RewardError as error:
            return write("unloadable", str(error))
        except Exception as error:
            return write("unloadable", f"reward {setup.spec!r}: a worker could not begin ({described(error)})")
        reward = _LOADED[setup]
        write("ready", reward.kind)
        for completion, row, hint in items:
            record = _attempt(reward, completion, row, hint)
            write(*record)
            if record[0] == "crash":  # whatever was hoarded stays in this process: take a new one
                write("retired")
                os._exit(1)
    finally:
        os.close(handle)


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


def _limit_memory(mebibytes: int) -> None:
    import resource

    held = 0
    with contextlib.suppress(OSError):
        held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limit = held + (mebibytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
