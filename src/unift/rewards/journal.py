"""What comes back from a scoring worker: outcomes, and the parent's view of a chunk, as far as its journal tells."""

from __future__ import annotations

import contextlib
import json
import os
import time
from concurrent.futures import Future
from dataclasses import dataclass, field

from unift.types import Score

COUNT_OF = {"timeout": "timeouts", "crash": "crashes", "exception": "exceptions", "bad value": "bad_values"}
COUNTS = ("total", *COUNT_OF.values(), "skipped")


@dataclass(frozen=True)
class ScoreError:
    """Why a completion has no score. ``str()`` is what Sample.error holds."""

    kind: str  # "timeout", "crash", "exception" or "bad value"
    message: str
    completion: str = ""
    row_id: str = ""

    def __str__(self) -> str:
        return self.kind if self.kind in ("timeout", "crash") else f"{self.kind}: {self.message}"


Outcome = Score | ScoreError | None  # None: a TRL-style reward said that it does not apply


@dataclass
class Job:
    """A chunk on its way, as far as its journal tells."""

    future: Future[None]
    indices: list[int]
    journal: str
    handle: int
    attempt: int
    stage: str = "queued"  # then "loading", "scoring"
    pid: int = 0
    since: float = field(default_factory=time.monotonic)  # begin of the stage, or of the item being scored
    scored: int = 0
    kind: str = ""
    unloadable: str = ""
    retired: bool = False
    over: bool = False
    dead_since: float = 0.0
    tail: bytes = b""

    def read(self) -> list[tuple[int, Outcome]]:
        """What came in since the last time."""
        settled: list[tuple[int, Outcome]] = []
        while data := os.read(self.handle, 1 << 20):
            self.tail += data
        *lines, self.tail = self.tail.split(b"\n")  # a last line without its end was cut off by a kill
        for line in lines:
            self.since, what, *rest = json.loads(line)
            if what == "pid":
                self.stage, self.pid = "loading", rest[0]
            elif what == "ready":
                self.stage, self.kind = "scoring", rest[0]
            elif what == "unloadable":
                self.unloadable = rest[0]
            elif what == "retired":
                self.retired = True
            else:
                outcome: Outcome = Score(*rest) if what == "score" else None
                if what not in ("score", "skipped"):
                    outcome = ScoreError(what, rest[0])
                settled.append((self.indices[self.scored], outcome))
                self.scored += 1
        return settled

    def close(self) -> None:
        if self.handle >= 0:
            os.close(self.handle)
            self.handle = -1
            with contextlib.suppress(OSError):
                os.unlink(self.journal)
