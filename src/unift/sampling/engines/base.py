"""What an engine is: it takes the weights, completes prompts, and is closed. Nothing else in the package knows which one runs.

A request names its random numbers by address (see ``rng``), so that an engine may draw from uniforms (the engines of this
process do) or seed a sampler of its own; either way the same address gives the same completion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from unift import rng
from unift.types import Sample, Shown

if TYPE_CHECKING:
    from unift.model.policy import Policy
SEEDS = 2**62  # seeds lie below it, so that seed + sample fits 64 bits

Watch = Callable[[int], Any]  # told the number of requests that are done


def unwatched(done: int) -> None:
    """The watch of whoever has nobody to tell."""


@dataclass(frozen=True)
class Draws:
    """The random numbers of ``n`` samples of a prompt: rows ``first`` to ``first + n`` of the float64 uniforms
    [of, width] at ``address``. ``width``: the most tokens that a sample may have."""

    address: tuple[object, ...]
    n: int
    of: int
    width: int
    first: int = 0

    def uniforms(self) -> np.ndarray:
        """float64 [n, width] in [0, 1)."""
        return rng.uniforms(*self.address, shape=(self.of, self.width))[self.first : self.first + self.n]

    def seed(self) -> int:
        """Of the first sample; sample j has this + j."""
        return rng.key(*self.address) % SEEDS + self.first


@dataclass(frozen=True)
class Request:
    """A prompt (with its hint), token ids, and the draws of its samples: by address, or float64 uniforms [G, max_tokens] given
    outright (engines of this process only). None: one greedy completion."""

    prompt: list[int]
    draws: Draws | np.ndarray | None
    shown: Shown | None = None  # the pictures whose placeholders the prompt has
    # Completions, or texts with parts of one, that may well come: a hint for speed alone.
    drafts: Sequence[list[int]] = ()

    @property
    def samples(self) -> int:
        """G, the number of completions."""
        if self.draws is None:
            return 1
        return self.draws.n if isinstance(self.draws, Draws) else len(self.draws)

    def uniforms(self) -> np.ndarray | None:
        """float64 [G, max_tokens]; None for a greedy request."""
        return self.draws.uniforms() if isinstance(self.draws, Draws) else self.draws


class Engine(Protocol):
    """Whoever completes prompts. Every process of a run has one and calls ``sync`` together with the others."""

    def sync(self, policy: Policy, version: Callable[[], str]) -> None:
        """Sample from these weights from now on. ``version`` names them: equal names, equal weights. An engine without a copy
        of the weights need not ask for it. Collective: every process calls it, with requests or without.

        Raises EngineError where the weights did not arrive.
        """
        ...

    def sampling(self) -> AbstractContextManager[None]:
        """Around one stretch of sampling, in which weights that are sharded over the processes are whole. Collective."""
        ...

    def generate(
        self, requests: Sequence[Request], max_tokens: int, temperature: float = 1.0, watch: Watch = unwatched
    ) -> list[list[Sample]]:
        """Samples of every request, in order: token ids, with what ended the completion as the last one, and their log-probs
        under softmax(logits / temperature) of the weights of the last ``sync``, nothing cut off. Texts are left empty.

        Raises EngineError where an answer is missing, late, or from other weights. With engine.overlap, which is for engines
        beside this process, another thread calls it while the trainer trains; no two calls overlap, and no `sync`.
        """
        ...

    def close(self) -> None:
        """Let go of whatever is held. Whoever started a server ends it."""
        ...


@dataclass
class InProcess:
    """An engine without a copy: it samples with the policy itself, by ``run``."""

    run: Callable[..., list[list[Sample]]]
    policy: Policy | None = None

    def sync(self, policy: Policy, version: Callable[[], str]) -> None:
        self.policy = policy

    def sampling(self) -> AbstractContextManager[None]:
        return nullcontext() if self.policy is None else self.policy.whole()

    def generate(
        self, requests: Sequence[Request], max_tokens: int, temperature: float = 1.0, watch: Watch = unwatched
    ) -> list[list[Sample]]:
        return self.run(self.policy, requests, max_tokens, temperature, watch=watch)

    def close(self) -> None:
        self.policy = None


def batches(requests: Sequence[Request], rows: int, mixed: bool) -> list[list[int]]:
    """Indices of requests that are sampled side by side, at most ``rows`` samples: longest prompt first, so that little is
    padded. ``mixed``: prompts of several lengths may go together."""
    order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].prompt), i))
    found: list[list[int]] = []
    width = 0
    for i in order:
        width = max(width, requests[i].samples)
        fits = mixed or not found or len(requests[i].prompt) == len(requests[found[-1][0]].prompt)
        if not found or not fits or (len(found[-1]) + 1) * width > rows:
            found.append([])
            width = requests[i].samples
        found[-1].append(i)
    return found


def in_batches(
    requests: Sequence[Request],
    cut: Sequence[Sequence[int]],
    run: Callable[[list[Request]], Sequence[list[Sample]]],
    watch: Watch,
) -> list[list[Sample]]:
    """Samples of every request, in order, batch by batch (`batches`); ``watch`` is told after each."""
    results: list[list[Sample]] = [[] for _ in requests]
    for batch in cut:
        for i, samples in zip(batch, run([requests[i] for i in batch]), strict=True):
            results[i] = samples
        watch(sum(map(bool, results)))
    return results
