"""Score completions in worker processes that are never trusted.

A worker says what became of an item before it begins the next, so that a hang, a crash or a forged record costs the item
that was at work and nothing else. What is defended against, each at the price of one counted error:

- a function that never returns, in Python, in C or asleep: time is limited (below); only SIGKILL is used, so what it
  does about other signals does not matter, nor how it ends its process;
- one that writes to descriptors that it finds, forks and returns, closes its streams or its link, lowers its limits of
  resources, prints without end: each item has a nonce, every record is checked (`journal.py`), nothing is unpickled,
  and a worker that is not as it was after an item is replaced;
- what it leaves behind: threads and processes that disturb later items (a failure after those were left is tried again
  in a new worker), programs that it started (they end with their worker, also out of a session of their own on Linux);
- the end of the trainer, however it comes: workers end with it; the environment holds no secrets (`workers.py`).

What is not: within its process a function can read the nonce and report for its own completion, which is no more than
returning a value; one that reads its worker's own frames finds the nonces of its batch-mates, too, and can forge their
records; it can change the modules of its worker and so the values of later completions there. It runs as the
same user as the trainer, without a sandbox: it can read that user's files, use the network and signal the trainer. Give
``memory_mb`` against one that takes all memory; a disk that it fills or a fork bomb is not held back.
"""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from unift.rewards.adapters import Options, described
from unift.rewards.journal import (
    COUNT_OF,
    COUNTS,
    LITTERED,
    SPOILED,
    BadRecord,
    Outcome,
    Ready,
    ScoreError,
    Unloadable,
)
from unift.rewards.spec import label_of, parts_of
from unift.rewards.worker import Item, Setup
from unift.rewards.workers import Keeper, KeeperGone, Worker, visible
from unift.types import RewardError, Row, Score

START_SECONDS = 60.0  # for a worker to start, and of CPU time to import the reward (math libraries take seconds)
START_WALL = 3.0  # times START_SECONDS: wall clock to import the reward
WALL = 10.0  # times the limit of CPU time, unless wall_timeout says otherwise
ATTEMPTS = 3  # to start a worker, or the process that starts them
POLL_SECONDS = 0.05
TOGETHER_SECONDS = 0.005  # of work are sent to a worker at once
EXIT_SECONDS = 1.0  # between the end of a worker's link and word of how it ended
OUTSIDE = (-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)  # ends that come from outside more often than from a reward


@dataclass(frozen=True)
class Check:
    """What the start-up check found. ``warnings`` is empty when all is well."""

    reward: str
    kind: str  # "task", "unift", "TRL" or "verl"; joined by "+" where several are added up
    seconds: float  # until both were scored, the start of a worker and the import included
    demonstration: Score | None  # None: the reward does not apply to it, or the row has none
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

    reward: text, a callable or a list of them with weights (`spec.py`). workers: processes.

    timeout: seconds of CPU time for one completion, of the worker and what it starts, so that a busy machine fails
    nobody. wall_timeout: seconds of wall clock for one completion, against sleep; 10 * timeout where it is None. Time in
    which the worker waits for a CPU does not count, where the system tells it (Linux).

    error_rate: above this share of failed scores among the last ``window`` the run stops with a RewardError (while
    fewer were scored, the missing ones count as good). memory_mb: address space, in MiB, that a worker may take on top
    of what it holds once the reward is loaded; None = no limit. environment: names of variables that workers see although
    they look like secrets. format_score, rule, answer: for rewards that name them.
    """

    def __init__(
        self,
        reward: Any,
        *,
        workers: int = 2,
        timeout: float = 5.0,
        wall_timeout: float | None = None,
        error_rate: float = 0.1,
        format_score: float = 0.0,
        rule: str = "unift",
        window: int = 200,
        memory_mb: int | None = None,
        answer: str = "tags",
        environment: Iterable[str] = (),
    ) -> None:
        wall = WALL * timeout if wall_timeout is None else wall_timeout
        if workers < 1 or timeout <= 0 or wall <= 0 or window < 1:
            raise RewardError(
                f"found workers={workers}, timeout={timeout}, wall_timeout={wall}, window={window}; "
                "all must be positive"
            )
        parts, summed = parts_of(reward)
        self.spec, self.workers, self.timeout, self.wall = label_of(parts, summed), workers, timeout, wall
        self.error_rate, self.environment = error_rate, tuple(environment)
        self.start_seconds = START_SECONDS
        self.counts: dict[str, int] = dict.fromkeys(COUNTS, 0)
        self.answer = answer
        setup = Setup(parts, summed, Options(format_score=format_score, rule=rule, answer=answer), memory_mb)
        self._setup = pickle.dumps(setup, protocol=5)
        self._window: deque[ScoreError | None] = deque(maxlen=window)
        self._keeper: Keeper | None = None
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
        """Outcomes in the order given. A failure is a ScoreError; None means that no reward applies.

        Raises RewardError when failures exceed the rate or the reward cannot be loaded.
        """
        hints = [""] * len(rows) if hints is None else hints
        if not len(rows) == len(completions) == len(hints):
            raise ValueError(f"found {len(rows)} rows, {len(completions)} completions, {len(hints)} hints; want equal")
        return self._run(list(zip(completions, rows, hints)), count=True)

    def check(self, row: Row) -> Check:
        """Load the reward in a worker; score the row's own solution, where it has one, and an empty text. Not counted.

        Raises RewardError when it cannot be loaded, or raises, hangs, dies or returns a bad value on either.
        """
        begin = time.monotonic()
        demonstrated = bool(row.solution.strip())
        texts = {"the row's own solution": row.solution} if demonstrated else {}
        texts["an empty completion"] = ""
        outcomes = self._run([(text, row, "") for text in texts.values()], count=False)
        for name, outcome in zip(texts, outcomes):
            if isinstance(outcome, ScoreError):
                raise RewardError(
                    f"reward {self.spec!r} failed on {name} of row {row.id!r}: {outcome.kind}: {outcome.message}. "
                    f"{_advice(outcome)}"
                )
        scores = [outcome if isinstance(outcome, Score) else None for outcome in outcomes]
        full, empty = scores[0] if demonstrated else None, scores[-1]
        warnings: list[str] = []
        if demonstrated and full is None:
            warnings.append(f"the reward does not apply to the demonstration of row {row.id!r} (it returned None)")
        elif full is not None and not full.right:
            note = f" ({full.note})" if full.note else ""
            warnings.append(f"the demonstration of row {row.id!r} does not earn full reward: {full.value:g}{note}")
        if empty is not None and (empty.right or (full is not None and empty.value >= full.value)):
            compared = ", no less than the demonstration" if full is not None else ""
            warnings.append(f"an empty completion earns {empty.value:g}{compared}")
        return Check(self.spec, self._kind, time.monotonic() - begin, full, empty, tuple(warnings))

    def close(self) -> None:
        """End the workers. A later `score` starts new ones."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.close()

    # ------------------------------------------------------------------------------------------------------ one call

    def _run(self, items: Sequence[Item], *, count: bool) -> list[Outcome]:
        call = _Call(items, self._tally if count else lambda _: None)
        try:
            while call.left:
                try:
                    self._hand_out(call)
                    self._keeper_now().wait(min(POLL_SECONDS, self.timeout / 4))
                    self._hear(call)
                    self._judge(call)
                except KeeperGone:
                    self._bury(call)
        except BaseException:
            self.close()  # what still runs belongs to a call that is gone
            raise
        return call.outcomes

    def _keeper_now(self) -> Keeper:
        if self._keeper is None:
            self._keeper = Keeper(visible(os.environ, self.environment))
        return self._keeper

    def _hand_out(self, call: _Call) -> None:
        """Give every idle worker its next item; start workers that are missing."""
        keeper = self._keeper_now()
        if call.doubtful and not call.todo and not any(worker.pending for worker in keeper.workers):
            for worker in [worker for worker in keeper.workers if worker.scored or worker.littered]:
                keeper.drop(worker)  # it is tried again in a new worker, while nothing else runs
            call.todo.append(call.doubtful.popleft())
        wanted = min(self.workers, len(call.todo) + sum(bool(worker.pending) for worker in keeper.workers))
        while len(keeper.workers) < wanted:
            keeper.start(self._setup, self.start_seconds)
        for worker in keeper.workers:
            if worker.idle and call.todo:  # quick ones together, so that the way there and back counts for little
                share = -(-len(call.todo) // self.workers)
                number = max(1, min(share, int(TOGETHER_SECONDS / worker.pace)))
                indices = [call.todo.popleft() for _ in range(number)]
                worker.hand([(index, call.payload(index)) for index in indices])

    def _hear(self, call: _Call) -> None:
        keeper = self._keeper_now()
        for worker in list(keeper.workers):
            try:
                while (said := worker.hear()) is not None:
                    if isinstance(said, Unloadable):
                        raise RewardError(said.message)
                    if isinstance(said, Ready):
                        worker.ready, self._kind, call.failed_starts = True, said.kind, 0
                        continue
                    index, scored = said
                    worker.littered = worker.littered or scored.state == LITTERED
                    if scored.state == SPOILED:
                        self._give_up(call, worker)
                    call.settle(index, scored.outcome)
                    if scored.state == SPOILED:
                        break
            except BadRecord as error:
                # Not its fault if something was left in the worker, or if an earlier item answers twice.
                self._fail(call, worker, "crash", f"the worker sent {error}", again=worker.scored > 0)

    def _judge(self, call: _Call) -> None:
        """What becomes of workers that ended, closed their link or are over their time."""
        keeper, now = self._keeper_now(), time.monotonic()
        for worker in list(keeper.workers):
            code = keeper.ended.get(worker.pid)
            if code is not None and worker.closed_at is None:
                continue  # it may have said something before: that is heard first
            if code is not None:
                again = worker.littered or code in OUTSIDE
                self._fail(call, worker, "crash", f"the worker died ({_exit_text(code)})", again)
            elif worker.closed_at is not None:
                if now - worker.closed_at > EXIT_SECONDS:
                    message = "the worker closed its link to the trainer"
                    self._fail(call, worker, "crash", message, worker.littered)
            elif now - worker.since >= POLL_SECONDS and (worker.pending or not worker.ready):
                self._time(call, worker)

    def _time(self, call: _Call, worker: Worker) -> None:
        used = worker.used()
        if used.stopped:
            self._fail(call, worker, "crash", "the worker was stopped by a signal", again=True)
        elif not worker.ready:
            if used.cpu > self.start_seconds or used.clock - used.queued > START_WALL * self.start_seconds:
                raise RewardError(f"reward {self.spec!r}: importing it took more than {self.start_seconds:g} s")
        elif used.cpu > self.timeout or used.clock - used.queued > self.wall:
            over = f"{self.timeout:g} s of CPU time" if used.cpu > self.timeout else f"{self.wall:g} s of wall clock"
            limits = f"the limits are {self.timeout:g} s of CPU time and {self.wall:g} s of wall clock"
            self._fail(call, worker, "timeout", f"no result after {over}; {limits}", worker.littered)

    def _fail(self, call: _Call, worker: Worker, kind: str, message: str, again: bool) -> None:
        """Give up a worker. Its item is an error, or is tried once more where the fault may be another's."""
        guilty = worker.pending.popleft()[1] if worker.pending else None
        self._give_up(call, worker)
        if guilty is not None:
            call.fail(guilty, ScoreError(kind, message), again)
        elif not worker.ready:
            call.failed_starts += 1
            if call.failed_starts >= ATTEMPTS:
                raise RewardError(
                    f"{message} while importing reward {self.spec!r}, {ATTEMPTS} times; run the import by hand to see why"
                )

    def _give_up(self, call: _Call, worker: Worker) -> None:
        """End a worker; the items that it has yet to begin go to others."""
        self._keeper_now().drop(worker)
        call.todo.extendleft(index for _, index in reversed(worker.pending))
        worker.pending.clear()

    def _bury(self, call: _Call) -> None:
        """The keeper is gone, and its workers with it. Whose fault it was shows when the items are tried one by one."""
        keeper, self._keeper = self._keeper, None
        if keeper is None:
            return
        busy = [worker.pending.popleft()[1] for worker in keeper.workers if worker.pending]
        for worker in keeper.workers:
            call.todo.extendleft(index for _, index in reversed(worker.pending))
        keeper.close()
        call.failed_starts = 0 if busy else call.failed_starts + 1
        if call.failed_starts >= ATTEMPTS:
            raise RewardError(
                f"waited {self.start_seconds:g} s, {ATTEMPTS} times, for a scoring worker to start; "
                f"the process that starts them ended or does not answer (reward {self.spec!r})"
            )
        for index in busy:
            call.fail(index, ScoreError("crash", "the process that starts the workers ended"), again=True)

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


class _Call:
    """The items of one call on their way."""

    def __init__(self, items: Sequence[Item], tally: Callable[[Outcome], None]) -> None:
        self.items, self.tally = items, tally
        self.outcomes: list[Outcome] = [None] * len(items)
        self.left = len(items)
        self.todo = deque(range(len(items)))
        self.doubtful: deque[int] = deque()  # to be tried once more, alone in a new worker
        self.tried: set[int] = set()  # those that were doubtful
        self.failed_starts = 0  # since a worker was ready

    def payload(self, index: int) -> bytes:
        try:
            return pickle.dumps(self.items[index], protocol=5)
        except Exception as error:
            raise RewardError(
                f"row {self.items[index][1].id!r} cannot be sent to a scoring worker ({described(error)}); "
                "row columns must be plain data"
            ) from error

    def settle(self, index: int, outcome: Outcome) -> None:
        if isinstance(outcome, ScoreError):
            completion, row, _ = self.items[index]
            outcome = ScoreError(outcome.kind, outcome.message, completion, row.id)
        self.outcomes[index] = outcome
        self.left -= 1
        self.tally(outcome)

    def fail(self, index: int, error: ScoreError, again: bool) -> None:
        if again and index not in self.tried:
            self.tried.add(index)
            self.doubtful.append(index)
        else:
            self.settle(index, error)


def _advice(failure: ScoreError) -> str:
    """What to do about a reward that failed its check at the start."""
    if failure.message.startswith("RewardError: "):  # unift's own word on the row, not the function's
        return "Mend the rows or reward.function"
    if failure.kind == "timeout":
        return "Make the function faster, or raise reward.timeout (CPU time) or reward.wall_timeout"
    return "Any text can turn up in training; mend the function so that it returns a number for it"


def _exit_text(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return f"signal {signal.Signals(-code).name}"
    return f"signal {-code}"
