"""Score completions in worker processes that are killed at a deadline.

A call is cut into one chunk per worker. The worker appends one line per scored item to the chunk's journal (a file),
with its clock; the journal is the only way results come back. So when a worker hangs or dies, the parent knows which
item it was at and since when: that item is the guilty one, what was scored before stays, the rest goes to others.

pebble keeps the processes (start, kill, refill). Workers come from a fork server: forking the trainer is not safe
(torch threads), spawning an interpreter for every refill is slow.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from pebble import ProcessExpired, ProcessPool

from unift.rewards.adapters import described
from unift.rewards.journal import COUNT_OF, COUNTS, Job, Outcome, ScoreError
from unift.rewards.worker import Item, Setup, begin_worker, pool_context, work
from unift.types import RewardError, Row, Score

START_SECONDS = 60.0  # for a worker to start, and again to import the reward (math libraries take seconds)
STOP_SECONDS = 20.0
ATTEMPTS = 3  # of a chunk whose worker died before it scored anything
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Check:
    """What the start-up check found. ``warnings`` is empty when all is well."""

    reward: str
    kind: str  # "task", "unift", "TRL" or "verl"
    seconds: float  # until both were scored, the start of a worker and the import included
    demonstration: Score | None
    empty: Score | None
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        def shown(score: Score | None) -> str:
            return "does not apply" if score is None else f"{score.value:g}"

        head = (
            f"reward {self.reward} ({self.kind}): demonstration {shown(self.demonstration)}, empty {shown(self.empty)}"
        )
        return "\n".join([f"{head}, {self.seconds:.1f} s", *(f"warning: {text}" for text in self.warnings)])


class Scorer:
    """A pool of scoring workers; use it as a context manager, from one thread.

    spec: what `load_reward` takes. workers: processes. timeout: seconds of wall clock for one completion.
    error_rate: above this share of failed scores among the last ``window`` the run stops with a RewardError (while
    fewer were scored, the missing ones count as good). memory_mb: address space, in MiB, that a worker may take on top
    of what it holds once the reward is loaded; None = no limit. format_score, rule, answer: for rewards that name them.
    """

    def __init__(
        self,
        spec: str,
        *,
        workers: int = 2,
        timeout: float = 5.0,
        error_rate: float = 0.1,
        format_score: float = 0.0,
        rule: str = "unift",
        window: int = 200,
        memory_mb: int | None = None,
        answer: str = "tags",
    ) -> None:
        if workers < 1 or timeout <= 0 or window < 1:
            raise RewardError(
                f"found workers={workers}, timeout={timeout}, window={window}; all three must be positive"
            )
        place, colon, function = spec.rpartition(":")
        if colon and place.endswith(".py"):
            spec = f"{Path(place).expanduser().resolve()}:{function}"
        self.spec, self.workers, self.timeout, self.error_rate = spec, workers, timeout, error_rate
        self.start_seconds = START_SECONDS
        self.counts: dict[str, int] = dict.fromkeys(COUNTS, 0)
        self.answer = answer
        self._setup = Setup(spec, format_score, rule, memory_mb, answer)
        self._window: deque[ScoreError | None] = deque(maxlen=window)
        self._pool: ProcessPool | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._pids: set[int] = set()  # of workers whose process group may still have members
        self._kind = ""

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def errors(self) -> int:
        """Failed scores so far: timeouts, crashes, exceptions and bad values. Skipped ones are not failures."""
        return sum(self.counts[name] for name in COUNT_OF.values())

    @property
    def recent(self) -> list[list[str] | None]:
        """What the error rate is taken over, oldest first, as JSON: None, or the fields of a failure."""
        return [e and [e.kind, e.message, e.completion, e.row_id] for e in self._window]

    def recall(self, recent: Sequence[Sequence[str] | None]) -> None:
        """Put back what ``recent`` gave: a run that continues is as near to its error rate as it was."""
        self._window.clear()
        self._window.extend(None if entry is None else ScoreError(*entry) for entry in recent)

    def score(
        self, rows: Sequence[Row], completions: Sequence[str], hints: Sequence[str] | None = None
    ) -> list[Outcome]:
        """Outcomes in the order given. A failure is a ScoreError; None is a TRL-style reward's "does not apply".

        Raises RewardError when failures exceed the rate or the reward cannot be loaded.
        """
        hints = [""] * len(rows) if hints is None else hints
        if not len(rows) == len(completions) == len(hints):
            raise ValueError(f"found {len(rows)} rows, {len(completions)} completions, {len(hints)} hints; want equal")
        return self._run(list(zip(completions, rows, hints)), count=True)

    def check(self, row: Row) -> Check:
        """Load the reward in a worker; score the row's own solution and an empty text. Not counted.

        Raises RewardError when it cannot be loaded, or raises, hangs, dies or returns a bad value on either.
        """
        begin = time.monotonic()
        texts = {"the row's own solution": row.solution, "an empty completion": ""}
        outcomes = self._run([(text, row, "") for text in texts.values()], count=False)
        for name, outcome in zip(texts, outcomes):
            if isinstance(outcome, ScoreError):
                raise RewardError(
                    f"reward {self.spec!r} failed on {name} of row {row.id!r}: {outcome.kind}: {outcome.message}. "
                    "Any text can turn up in training; mend the function so that it returns a number for it"
                )
        full, empty = (outcome if isinstance(outcome, Score) else None for outcome in outcomes)
        warnings = []
        if full is None:
            warnings.append(f"the reward does not apply to the demonstration of row {row.id!r} (it returned None)")
        elif not full.right:
            note = f" ({full.note})" if full.note else ""
            warnings.append(f"the demonstration of row {row.id!r} does not earn full reward: {full.value:g}{note}")
        if empty is not None and (empty.right or (full is not None and empty.value >= full.value)):
            warnings.append(f"an empty completion earns {empty.value:g}, no less than the demonstration")
        return Check(self.spec, self._kind, time.monotonic() - begin, full, empty, tuple(warnings))

    def close(self) -> None:
        """Kill the workers. A later `score` starts new ones."""
        self._stop_pool()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    # ---------------------------------------------------------------------------------------------- chunks of one call

    def _run(self, items: list[Item], *, count: bool) -> list[Outcome]:
        outcomes: list[Outcome] = [None] * len(items)
        jobs: list[Job] = []
        try:
            jobs += self._submit(items, range(len(items)), attempt=1)
            moved, restarted = time.monotonic(), False
            while jobs:
                wait(
                    [job.future for job in jobs],
                    timeout=min(POLL_SECONDS, self.timeout / 4),
                    return_when=FIRST_COMPLETED,
                )
                for job in list(jobs):
                    over = job.future.done()  # asked before reading, so that nothing written is missed
                    settled = job.read()
                    if job.unloadable:
                        raise RewardError(job.unloadable)
                    if job.kind:
                        self._kind = job.kind
                    if job.pid:
                        self._pids.add(job.pid)
                    rest, guilty = self._judge(job, over)
                    if guilty is not None:
                        settled.append((rest[0], guilty))
                        rest = rest[1:]
                    for index, outcome in settled:
                        if isinstance(outcome, ScoreError):
                            completion, row, _ = items[index]
                            outcome = ScoreError(outcome.kind, outcome.message, completion, row.id)
                        outcomes[index] = outcome
                        if count:
                            self._tally(outcome)
                    if job.over:
                        jobs.remove(job)
                        job.close()
                        jobs += self._submit(items, rest, attempt=1 if settled or job.scored else job.attempt + 1)
                    if settled or job.over or job.stage != "queued":
                        moved = time.monotonic()  # hung workers are waited for by their own deadline
                if time.monotonic() - moved > self.start_seconds:
                    self._stop_pool()  # once: a worker killed at a bad moment can hold pebble's lock
                    if restarted:
                        raise RewardError(f"waited {self.start_seconds:g} s, twice, for a scoring worker to start")
                    moved, restarted = time.monotonic(), True
                    stuck, jobs = jobs, []
                    for job in stuck:
                        job.close()
                        jobs += self._submit(items, job.indices, job.attempt)
        except BaseException:
            self._stop_pool()  # what still runs belongs to a call that is gone
            raise
        finally:
            for job in jobs:
                job.close()
            self._reap()
        return outcomes

    def _judge(self, job: Job, over: bool) -> tuple[list[int], ScoreError | None]:
        """Items still to be scored and, where there is one, the failure of the first of them. Sets ``job.over``."""
        rest, late = job.indices[job.scored :], time.monotonic() - job.since
        if not rest:
            job.over = True
            return [], None
        if over:
            job.over = True
            error = job.future.exception()
            if job.retired or isinstance(error, BrokenProcessPool):
                if job.attempt >= ATTEMPTS and not job.scored:
                    raise RewardError(f"the pool of scoring workers broke {ATTEMPTS} times ({error}) for {self.spec!r}")
                return rest, None
            if not isinstance(error, ProcessExpired):
                raise RewardError(
                    f"the scoring worker itself failed on {self.spec!r}: {described(error) if error else job}"
                )
            died = f"the worker died ({_exit_text(error.exitcode)})"
            return self._died(job, rest, died)
        if job.stage == "scoring" and late > self.timeout:
            self._kill(job)
            return rest, ScoreError("timeout", f"no result after {self.timeout:g} s")
        if job.stage == "loading" and late > self.start_seconds:
            self._kill(job)
            raise RewardError(f"reward {self.spec!r}: importing it took more than {self.start_seconds:g} s")
        if job.pid and not _alive(job.pid):
            job.dead_since = job.dead_since or time.monotonic()
            if time.monotonic() - job.dead_since > 0.5:  # pebble has not noticed: it overlooks exit code 0
                self._kill(job)
                return self._died(job, rest, "the worker left (exit code 0)")
        return rest, None

    def _died(self, job: Job, rest: list[int], died: str) -> tuple[list[int], ScoreError | None]:
        if job.stage == "scoring":
            return rest, ScoreError("crash", died)
        if job.attempt >= ATTEMPTS:
            where = f"importing reward {self.spec!r}" if job.stage == "loading" else "starting"
            raise RewardError(f"{died} while {where}, {ATTEMPTS} times; run the import by hand to see why")
        return rest, None

    def _kill(self, job: Job) -> None:
        job.over = True
        job.future.cancel()  # pebble kills the worker and refills the pool

    def _submit(self, items: list[Item], indices: Sequence[int], attempt: int) -> list[Job]:
        """Spread these items over the workers: one job each."""
        jobs: list[Job] = []
        size = -(-len(indices) // self.workers)
        for start in range(0, len(indices), size or 1):
            part = list(indices[start : start + size])
            try:
                payload = pickle.dumps([items[index] for index in part], protocol=5)  # a row shared by items goes once
            except Exception as error:
                raise RewardError(
                    f"rows {items[part[0]][1].id!r}.. cannot be sent to a scoring worker ({described(error)}); "
                    "row columns must be plain data"
                ) from error
            handle, journal = tempfile.mkstemp(dir=self._journals())
            try:
                try:
                    future = self._ready_pool().schedule(work, args=(self._setup, payload, journal))
                except RuntimeError:  # it broke since it was asked: a worker died while idle
                    future = self._ready_pool().schedule(work, args=(self._setup, payload, journal))
            except BaseException:
                os.close(handle)
                raise
            jobs.append(Job(future, part, journal, handle, attempt))
        return jobs

    def _tally(self, outcome: Outcome) -> None:
        failure = outcome if isinstance(outcome, ScoreError) else None
        self.counts["total"] += 1
        self.counts["skipped"] += outcome is None
        if failure is not None:
            self.counts[COUNT_OF[failure.kind]] += 1
        self._window.append(failure)
        if failure is None:
            return
        failures = [entry for entry in self._window if entry is not None]
        size = self._window.maxlen or 1
        if len(failures) <= self.error_rate * size:
            return
        kinds = {name: sum(COUNT_OF[f.kind] == name for f in failures) for name in COUNT_OF.values()}
        listed = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in kinds.items() if number)
        first = failures[0]
        text = first.completion if len(first.completion) <= 400 else f"{first.completion[:400]}..."
        raise RewardError(
            f"reward {self.spec!r} failed on {len(failures)} of the last {len(self._window)} completions: {listed}. "
            f"Allowed: {self.error_rate:.0%} of {size}. First: {first.kind}: {first.message}, on row {first.row_id!r}, "
            f"completion {text!r}. Mend the function; if some failures are expected, raise reward.error_rate"
        )

    # ------------------------------------------------------------------------------------------------------- processes

    def _ready_pool(self) -> ProcessPool:
        if self._pool is not None and not self._pool.active:
            self._stop_pool()
        if self._pool is None:
            self._pool = ProcessPool(
                max_workers=self.workers, initializer=begin_worker, initargs=(self._journals(),), context=pool_context()
            )
        return self._pool

    def _journals(self) -> str:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="unift-scores-", ignore_cleanup_errors=True)
        return self._folder.name

    def _stop_pool(self) -> None:
        pool, self._pool = self._pool, None
        if pool is None:
            return
        stopper = threading.Thread(target=_stop, args=(pool,), daemon=True)  # pebble's join has no deadline of its own
        stopper.start()
        stopper.join(STOP_SECONDS)
        if stopper.is_alive():
            print(f"unift: scoring workers did not stop within {STOP_SECONDS:g} s; left behind", file=sys.stderr)
        self._reap()

    def _reap(self) -> None:
        """Kill what dead workers started themselves (a reward may run programs); they share the worker's group."""
        for pid in [pid for pid in self._pids if not _alive(pid)]:
            self._pids.discard(pid)
            with contextlib.suppress(OSError):
                os.killpg(pid, signal.SIGKILL)


def _alive(pid: int) -> bool:
    if os.name == "nt":  # signal 0 is not a question there
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _exit_text(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"signal {signal.Signals(-code).name}"
    return f"signal {-code}"


def _stop(pool: ProcessPool) -> None:
    pool.stop()
    pool.join()
