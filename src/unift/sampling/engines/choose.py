"""Which engine a run samples with (``engine.kind``), opened and closed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from unift.config.surroundings import Engine as Settings
from unift.model.limits import ROWS
from unift.model.policy import Policy
from unift.sampling.engines import drafted, plain
from unift.sampling.engines.base import Engine, InProcess, Request, Watch, unwatched
from unift.types import ConfigError, Sample


def generate(
    policy: Policy,
    requests: Sequence[Request],
    max_tokens: int,
    temperature: float = 1.0,
    rows: int = ROWS,
    watch: Watch = unwatched,
) -> list[list[Sample]]:
    """By the engine of this process that fits the policy's path; ``rows``: so many samples at most side by side."""
    run = drafted.generate if policy.shared else plain.generate
    return run(policy, requests, max_tokens, temperature, rows, watch)


def in_process(policy: Policy) -> Engine:
    """The engine of this process that fits the policy's path, with its weights."""
    return InProcess(generate, policy)


@contextmanager
def open_engine(settings: Settings, policy: Policy, folder: Path, longest: int) -> Iterator[Engine]:
    """The engine of a run. ``folder``: of the run, where weights for a server lie unless ``engine.folder`` says another.
    ``longest``: tokens of the longest context, prompt and completion together.

    Raises ConfigError where the engine does not fit the model, EngineError where a server is not there or does not fit.
    """
    engine = OPENERS[settings.kind](settings, policy, folder, longest)
    try:
        yield engine
    finally:
        engine.close()


def _native(settings: Settings, policy: Policy, folder: Path, longest: int) -> Engine:
    if not policy.shared:
        raise ConfigError(
            f"engine.kind=native samples on the shared-prefix path; this model takes the plain one: {policy.why_plain}. "
            "Use engine.kind=auto"
        )
    return InProcess(drafted.generate, policy)


def _vllm(settings: Settings, policy: Policy, folder: Path, longest: int) -> Engine:
    from unift.sampling.engines.vllm import connect

    return connect(settings, folder, longest)


OPENERS: dict[str, Callable[[Settings, Policy, Path, int], Engine]] = {
    "auto": lambda settings, policy, folder, longest: in_process(policy),
    "native": _native,
    "plain": lambda settings, policy, folder, longest: InProcess(plain.generate, policy),
    "vllm": _vllm,
}
