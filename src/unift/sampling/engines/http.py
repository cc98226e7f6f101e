"""Asking a server: several calls side by side, a deadline on every wait, and errors that name the cause.

Calls run in daemon threads and the caller waits for their answers, so that a server that accepts a connection and then says
nothing cannot hold a run, nor its end.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from unift.types import ConfigError, EngineError

LANES = 64  # calls that are under way at a time
LOOK = 2.0  # seconds between two looks at a server that is waited for
PROBE = 2.0  # seconds that a probe may take, once something is wrong
SHOWN = 300  # characters of an answer that a message shows
AGAIN = "The same command continues from the last checkpoint"


@dataclass(frozen=True)
class Call:
    """``what`` is what a message calls it: "while it <what>". ``refused``: what a message adds where the server refuses."""

    what: str
    path: str
    # Of a POST; None: a GET. A function where it is large, called when it is sent.
    body: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None
    refused: str = ""


@dataclass
class Server:
    """``timeout``: seconds without any answer after which whoever waits gives up."""

    url: str
    timeout: float
    client: Any = field(default_factory=lambda: _client())

    def ask(self, call: Call, timeout: float | None = None) -> Any:
        """The answer, JSON; {} for an empty one."""
        return self.ask_all([call], lambda index, answer: None, timeout)[0]

    def ask_all(
        self, calls: Sequence[Call], seen: Callable[[int, Any], Any], timeout: float | None = None
    ) -> list[Any]:
        """The answers, in order. ``seen`` is told (index, answer) of each as it comes, and may refuse it by an exception.

        Raises EngineError at the first failure, and once nothing has come for ``timeout`` seconds.
        """
        left: queue.SimpleQueue[int] = queue.SimpleQueue()
        come: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
        over, limit = threading.Event(), timeout or self.timeout
        for index in range(len(calls)):
            left.put(index)

        def lane() -> None:
            with self._session() as session:
                while not over.is_set():
                    try:
                        index = left.get_nowait()
                    except queue.Empty:
                        return
                    try:
                        come.put((index, self._send(session, calls[index], limit), None))
                    except BaseException as error:
                        come.put((index, None, error))

        for _ in range(min(LANES, len(calls))):
            threading.Thread(target=lane, name="unift: engine", daemon=True).start()
        answers: list[Any] = [None] * len(calls)
        try:
            for _ in calls:
                index, answer, error = self._next(come, calls, limit)
                if error is not None:
                    self._fail(error, calls[index])
                answers[index] = answer
                seen(index, answer)
        finally:
            over.set()
        return answers

    def _next(self, come: queue.SimpleQueue[Any], calls: Sequence[Call], limit: float) -> Any:
        """The next answer, or EngineError at the deadline."""
        began, paused = time.monotonic(), False
        while True:
            rest = began + limit - time.monotonic()
            if rest <= 0:
                break
            try:
                return come.get(timeout=min(rest, LOOK))
            except queue.Empty:
                paused = self._probe("/is_paused").get("is_paused") is True
        what = f"{self.url} gave no answer for {limit:g} s while it {calls[0].what}"
        if paused:
            raise EngineError(f"{what}: it is paused (someone sent /pause). Send POST {self.url}/resume. {AGAIN}")
        alive = self._probe("/health").get("status") == 200
        raise EngineError(
            f"{what}. It still says that it is healthy: it is only slow (raise engine.timeout), or its worker hangs (see "
            f"its log). {AGAIN}"
            if alive
            else f"{what}, nor does it answer /health: its process hangs or was stopped. End it and start it again "
            f"(unift serve). {AGAIN}"
        )

    # ------------------------------------------------------------------------------------------ one call

    def _session(self) -> Any:
        session = self.client.Session()
        session.trust_env = False  # a proxy of the environment is not for a server beside the run
        return session

    def _send(self, session: Any, call: Call, limit: float) -> Any:
        method = "GET" if call.body is None else "POST"
        wait = (min(limit, 10.0), limit + LOOK)
        body = call.body() if callable(call.body) else call.body
        answer = session.request(method, self.url + call.path, json=body, timeout=wait)
        if answer.status_code != 200:
            raise EngineError(self._refused(answer, call))
        if not answer.content:
            return {}
        try:
            return answer.json()
        except ValueError:
            raise EngineError(
                f"{self.url}{call.path} answered {_short(answer.text)!r} while it {call.what}: that is no JSON, so no vLLM "
                "server. Look at engine.url"
            ) from None

    def _refused(self, answer: Any, call: Call) -> str:
        said = _short(answer.text)
        if answer.status_code == 404:
            return (
                f"{self.url} has no route {call.path} ({said}): vLLM needs VLLM_SERVER_DEV_MODE=1 and --enable-scale-out. "
                "`unift serve` sets them"
            )
        if answer.status_code >= 500:
            return f"{self.url} failed while it {call.what}: HTTP {answer.status_code}, {said}. See its log. {AGAIN}"
        return f"{self.url} refused a call while it {call.what}: HTTP {answer.status_code}, {said}{call.refused}"

    def _fail(self, error: BaseException, call: Call) -> NoReturn:
        if isinstance(error, EngineError):
            raise error
        errors = self.client.exceptions
        if isinstance(error, errors.Timeout):
            raise EngineError(
                f"{self.url} gave no answer in time while it {call.what}: its process hangs or was stopped. {AGAIN}"
            ) from error
        if isinstance(error, errors.ConnectionError):
            if "refused" in str(error).lower():
                raise EngineError(
                    f"{self.url} refuses connections: no server listens there. Start it (unift serve), wait for its line "
                    "'Application startup complete', or set engine.url"
                ) from error
            raise EngineError(
                f"{self.url} went away while it {call.what} ({_short(str(error))}): it has ended, was killed, or cannot be "
                f"reached. See its log, and start it again (unift serve). {AGAIN}"
            ) from error
        if isinstance(error, errors.RequestException):
            raise EngineError(f"{self.url} cannot be asked ({_short(str(error))}). Look at engine.url") from error
        raise error

    def _probe(self, path: str) -> dict[str, Any]:
        """The answer of a quick GET with its ``status``; {} where there is none."""
        try:
            with self._session() as session:
                answer = session.get(self.url + path, timeout=PROBE)
                found = answer.json() if answer.content else {}
        except (ValueError, self.client.exceptions.RequestException):
            return {}
        return {**found, "status": answer.status_code} if isinstance(found, dict) else {}


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _client() -> Any:
    """The module ``requests``, which is needed for servers only."""
    try:
        import requests
    except ImportError:
        raise ConfigError(
            "engine.kind=vllm speaks HTTP by requests, which is missing: pip install 'unift[vllm]'"
        ) from None
    return requests
