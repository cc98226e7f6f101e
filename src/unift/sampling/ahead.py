"""Completions of the next step, drawn by a server while this step trains (``engine.overlap``).

Step t trains on what the weights at the beginning of step t - 1 have drawn, whatever the clock says; the first step of a stage
on what its own weights drew. So the numbers of a run do not depend on who is ready first, and the sampler is never more than
one step behind. What the older weights drew cannot be drawn again once they are gone: it is part of a checkpoint.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

from unift import processes
from unift.config.stages import Moment
from unift.sampling.engines.base import Engine
from unift.sampling.groups import complete
from unift.types import Group, UniftError


@dataclass
class Drawing:
    """``groups``: of the whole step, of which this process's share gets its completions here. ``weights``: the fingerprint
    of those that draw."""

    step: int
    weights: str
    groups: list[Group]
    seconds: float = 0.0  # that the drawing took, beside everything else
    thread: threading.Thread | None = None
    failed: list[BaseException] = field(default_factory=list[BaseException])

    def begin(self, engine: Engine, tokenizer: Any, moment: Moment) -> None:
        """Ask the engine, in a thread of its own. Until `wait` returns, nobody may sync the engine or ask it for anything else;
        nothing is exchanged with other processes there."""

        def draw() -> None:
            began = time.perf_counter()
            try:
                complete(engine, tokenizer, {i: self.groups[i] for i in self._places()}, moment)
            except BaseException as error:
                self.failed.append(error)
            self.seconds = time.perf_counter() - began

        # A daemon: whoever ends the run does not wait for a server.
        self.thread = threading.Thread(target=draw, name="unift: ahead", daemon=True)
        self.thread.start()

    def wait(self) -> list[Group]:
        """The groups, once they are complete in all processes, which call this together: the first one syncs the engine for all of
        them. The engine has deadlines of its own. Raises what went wrong in the thread."""
        thread, self.thread = self.thread, None
        if thread is not None:
            thread.join()
        for error in self.failed:
            if isinstance(error, UniftError):
                raise type(error)(f"drawing the completions of step {self.step + 1} ahead: {error}") from error
            raise error
        if thread is not None:
            processes.gather("what was drawn ahead", None)
        return self.groups

    def share(self) -> list[Group]:
        """This process's groups, once they are complete."""
        groups = self.wait()
        return [groups[i] for i in self._places()]

    def _places(self) -> range:
        return processes.share(len(self.groups))
