"""Several processes, one run: what the loop exchanges with its twins. In a single process nothing here does anything.

torchrun and accelerate launch start the processes and number them in the environment (RANK, WORLD_SIZE, LOCAL_RANK).
Each holds the whole model and takes a share of the groups; process 0 alone writes files. Lists and numbers travel over
gloo, gradients over the backend of their device (NCCL on CUDA). Every wait has a deadline and says what it waits for;
a process that fails tells the others why before it leaves.
"""

from __future__ import annotations

import gc
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar, cast

from unift.types import ConfigError, UniftError

if TYPE_CHECKING:
    from torch import Tensor
T = TypeVar("T")
BUCKET_BYTES = 64 << 20  # gradients are summed in flat buffers of about this size
PARENT = "UNIFT_PARENT"  # process id, in the environment of a run that ends with the process that started it
END_SECONDS = 10.0  # for a process to end, or to answer, when asked
FAILED = "unift/failed"  # key of the first failure in the store that all processes see
BEAT = "unift/beat"  # keys of the signs of life there
BEAT_SECONDS = 1.0  # between two signs of life of a process; three of them missing and it counts as gone

_store: Any = None
_doing = "starting"  # what this process does, for the others' messages


def size() -> int:
    """Number of processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ["RANK"]) if size() > 1 else 0


def local_rank() -> int:
    """Number of this process among those of its machine: which GPU is its own."""
    return int(os.environ.get("LOCAL_RANK", "0")) if size() > 1 else 0


def first() -> bool:
    """True in the process that writes files and speaks to people."""
    return rank() == 0


def label() -> str:
    """``process 1: `` for messages; empty in a single process."""
    return f"process {rank()}: " if size() > 1 else ""


def wait_seconds() -> float:
    """For the slowest of the others, from UNIFT_WAIT_SECONDS. Raises ConfigError."""
    found = os.environ.get("UNIFT_WAIT_SECONDS", "1800")
    with suppress(ValueError):
        if 0 < float(found) < 1e9:
            return float(found)
    raise ConfigError(f"UNIFT_WAIT_SECONDS={found!r}: expected a number of seconds above 0, such as 1800")


def alone(what: str) -> None:
    """Refuse to run ``what`` under a launcher: every process would do all of it."""
    if size() > 1:
        found = f"{what} starts processes of its own; found {size()} of a launcher"
        raise ConfigError(f"{found}. Run it without the launcher")


# ---------------------------------------------------------------------------------------------- parent and child


def child_environment() -> dict[str, str]:
    """The environment for a run that shall not outlive this process, see `end_with_parent`."""
    return os.environ | {PARENT: str(os.getpid())}


def end_with_parent(every: float = 0.5) -> None:
    """In a process that was started with `child_environment`: once its parent is gone, however that ended, ask this one to
    stop (SIGTERM, so it is saved first) and kill it if it is still there after END_SECONDS."""
    expected = os.environ.pop(PARENT, "")  # not for children of its own
    if not expected.isdigit() or os.name != "posix":
        return

    def watch() -> None:
        while os.getppid() == int(expected):
            time.sleep(every)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(END_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="unift: parent", daemon=True).start()


# ---------------------------------------------------------------------------------------------- meeting and leaving


@contextmanager
def joined(cuda: bool = False) -> Generator[None, None, None]:
    """Meet the other processes, and part at the end. ``cuda``: gradients are on GPUs, one a process.

    An error in here is told to the others: their next exchange raises it, too.
    """
    if size() == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    own = not dist.is_initialized()
    if cuda:
        torch.cuda.set_device(local_rank())
    if own:
        # Its functions have the process group as a default value if there is one when they are defined: then the group
        # outlives its end, and a thread of it that lets go of a tensor aborts the process while Python is shut down.
        import torch.distributed.nn.functional  # pyright: ignore[reportUnusedImport]

        _meet(cuda)
    with _signs_of_life():
        try:
            yield
        except BaseException as error:
            _tell(error)  # and leave without farewell: the others must notice
            if own and not cuda:  # NCCL would wait for what the others have not begun
                _part()
            raise
        if own:
            gather("the end of the run", None)
            _part()


def _meet(cuda: bool) -> None:
    global _store
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous  # pyright: ignore[reportUnknownVariableType]

    deadline = timedelta(seconds=wait_seconds())
    try:
        store, number, total = next(iter(rendezvous("env://", timeout=deadline)))
        # A launcher that starts all anew after a failure may keep its store, with the addresses of those that are gone.
        _store = PrefixStore(f"unift/attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=_store, rank=number, world_size=total, timeout=deadline)
    except (RuntimeError, ValueError) as error:
        raise UniftError(
            f"process {rank()} did not meet the other {size() - 1} in {wait_seconds():g} s: {error}"
        ) from error


def _part() -> None:
    """End the process group, with its threads."""
    global _store
    import torch.distributed as dist

    dist.destroy_process_group()
    gc.collect()  # what lies in a circle may hold the group
    _store = None


@contextmanager
def _signs_of_life() -> Generator[None, None, None]:
    """While the block runs, the other processes can see that this one is there, and what it does."""
    if _store is None:
        yield
        return
    store, ended = _store.clone(), threading.Event()  # a connection of its own

    def beat() -> None:
        with suppress(RuntimeError):  # the store is gone, which the next exchange says better
            for number in count():
                store.set(f"{BEAT}/{rank()}", f"{number}|{os.getpid()} on {platform.node()}|{_doing}")
                if ended.wait(BEAT_SECONDS):
                    return

    thread = threading.Thread(target=beat, name="unift: sign of life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(BEAT_SECONDS)


def _beats(store: Any) -> dict[int, tuple[str, str, str]]:
    """Of every other process that is known: number of its last sign of life, process id and machine, what it does."""
    known = [n for n in range(size()) if n != rank() and store.check([f"{BEAT}/{n}"])]
    return {n: tuple(store.get(f"{BEAT}/{n}").decode().split("|", 2)) for n in known}


def _roll_call() -> tuple[list[str], list[str]]:
    """(processes without a sign of life, what each of the others does), in words. Takes three beats."""
    before = _in_time(_beats)
    if before is not None:
        time.sleep(3 * BEAT_SECONDS)
    after = _in_time(_beats)
    if before is None or after is None:
        return (["process 0, which keeps the addresses of all,"] if rank() else []), []
    gone = [f"process {n} ({after[n][1]})" for n in after if n in before and after[n][0] == before[n][0]]
    gone += [f"process {n}" for n in range(size()) if n != rank() and n not in after]
    there = [f"process {n} {after[n][2]}" for n in after if n not in before or after[n][0] != before[n][0]]
    return gone, there


def _in_time(ask: Callable[[Any], T]) -> T | None:
    """The store's answer. None where it is gone, or silent because its process is stopped: it is not asked again."""
    global _store
    store, answers = _store, list[T]()

    def asked() -> None:
        with suppress(RuntimeError):
            answers.append(ask(store))

    if store is not None:
        asking = threading.Thread(target=asked, name="unift: store", daemon=True)
        asking.start()
        asking.join(END_SECONDS)
    if not answers:
        _store = None
    return answers[0] if answers else None


def _tell(error: BaseException) -> None:
    text = label() + (str(error) if isinstance(error, UniftError) else f"{type(error).__name__}: {error}")
    _in_time(lambda store: store.compare_set(FAILED, "", text))  # the first failure is the cause of the others


def _told() -> str:
    return _in_time(lambda store: store.get(FAILED).decode() if store.check([FAILED]) else "") or ""


@contextmanager
def _waiting(what: str, ours: Callable[[RuntimeError], bool] = lambda error: True) -> Generator[None, None, None]:
    """``ours``: whether an error comes from the exchange."""
    global _doing
    began, _doing = time.monotonic(), f"waits at {what}"
    try:
        yield
    except RuntimeError as error:
        if not ours(error):
            raise
        raise UniftError(_why(what, time.monotonic() - began, str(error).splitlines()[0])) from error
    _doing = f"works on what follows {what}"


def _why(what: str, waited: float, said: str) -> str:
    """One line on an exchange that failed: the cause that another process told, or who is missing."""
    cause = _told()
    gone, there = _roll_call() if not cause else ([], [])
    again = "The same command continues from the last checkpoint"
    if gone:
        missing = f"{' and '.join(gone)} gave no sign of life: killed, stopped, or its machine is gone"
        return f"waited {waited:.0f} s for the other processes at {what}: {missing}. {again}"
    cause = cause or _told()  # meanwhile
    if cause:
        return f"another process ended the run. {cause}"
    if waited > 0.9 * wait_seconds():
        return (
            f"waited {waited:.0f} s for the other processes at {what}, and one of them hangs, or is that much slower: "
            f"{'; '.join(there)}. UNIFT_WAIT_SECONDS sets the deadline. {again}"
        )
    return f"the connection to another process broke at {what} ({said}). {again}"


@contextmanager
def exchanging(what: str) -> Generator[None, None, None]:
    """Work in which a library exchanges tensors with the other processes: its failure gets the same words as one of ours,
    everything else that goes wrong in the block stays what it is."""
    with _waiting(what, _of_the_network) if size() > 1 else nullcontext():
        yield


def _of_the_network(error: RuntimeError) -> bool:
    """Is it an exchange that failed? gloo raises plain RuntimeErrors that name one of its files."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "/gloo/" in str(error) or "gloo::" in str(error)


# ---------------------------------------------------------------------------------------------- exchanging


def gather(what: str, value: T) -> list[T]:
    """The values of all processes, in their order. ``what`` is what a message calls it."""
    if size() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * size()
    with _waiting(what):
        dist.all_gather_object(values, value)  # pyright: ignore[reportUnknownMemberType]
    return [*values[: rank()], value, *values[rank() + 1 :]]


def lead(what: str, do: Callable[[], T]) -> T:
    """The result of ``do``, which only the first process runs while the others wait; its UniftError is everyone's."""
    if size() == 1:
        return do()
    import torch.distributed as dist

    box: list[Any] = [None, None]
    if first():
        try:
            box[0] = do()
        except UniftError as error:
            box[1] = error
    with _waiting(what):
        dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def agree(what: str, value: Any) -> None:
    """Raise UniftError unless all processes hold the same value."""
    for number, other in enumerate(values := gather(what, value)):
        if other != values[0]:
            raise UniftError(
                f"{what}: process {number} has {other!r}, process 0 has {values[0]!r}; they must be the same"
            )


def sums(what: str, values: Sequence[float]) -> list[float]:
    """Each number summed over the processes (float64)."""
    if size() == 1:
        return list(values)
    return [sum(column) for column in zip(*gather(what, [float(v) for v in values]))]


def add_up(what: str, tensors: Sequence[Tensor]) -> None:
    """Sum each tensor over the processes, in place, bit for bit the same everywhere.

    They travel in flat buckets; 16-bit ones as float32, so that the sum is rounded once.
    """
    if size() == 1:
        return
    import torch
    import torch.distributed as dist

    bucket: list[Tensor] = []

    def flush() -> None:
        flat = torch.cat([t.flatten() for t in bucket])
        flat = flat.float() if flat.element_size() < 4 else flat
        with _waiting(what):
            dist.all_reduce(flat)  # pyright: ignore[reportUnknownMemberType]
        parts = cast("Sequence[Tensor]", flat.split([t.numel() for t in bucket]))  # pyright: ignore[reportUnknownMemberType]
        for tensor, part in zip(bucket, parts):
            tensor.copy_(part.view_as(tensor))
        bucket.clear()

    for tensor in tensors:
        full = sum(t.nbytes for t in bucket) + tensor.nbytes > BUCKET_BYTES
        if bucket and (full or tensor.dtype != bucket[0].dtype):
            flush()
        bucket.append(tensor)
    if bucket:
        flush()


# ---------------------------------------------------------------------------------------------- shares of the work


def share(n: int) -> range:
    """Indices of this process's part of ``n`` things that cost about the same: every size-th one."""
    return range(rank(), n, size())


def interleave(parts: Sequence[Sequence[T]]) -> list[T]:
    """The things that `share` dealt out, in their first order. ``parts``: one list a process, their lengths may differ."""
    return [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]


def balanced(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Indices in ``parts`` lists of about equal cost: the dearest first, each to the list that has least so far.

    The largest part costs at most 4/3 of the best possible (Graham 1969).
    """
    loads = [0.0] * parts
    dealt: list[list[int]] = [[] for _ in range(parts)]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        least = min(range(parts), key=lambda p: (loads[p], len(dealt[p])))
        loads[least] += costs[i]
        dealt[least].append(i)
    return [sorted(part) for part in dealt]


def balanced_share(costs: Sequence[float]) -> list[int]:
    """Indices of this process's part of things with these costs."""
    return balanced(costs, size())[rank()]
