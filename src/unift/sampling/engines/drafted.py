"""Sampling in-process with drafts: tokens that a completion may well have are checked several at a time.

A token is the inverse CDF of an addressed uniform, or the argmax. So a drafted token is accepted exactly when it is the token
that would have been drawn, and the samples are those of the native engine, up to the rounding of their log-probs; what is
saved are forwards. (A sampler without addressed draws has to reject at random: arXiv 2211.17192.) A draft comes from texts
that the request names: the row's solution, its earlier completions. On the CPU only.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np
import torch

from unift.model.attention.blocks import BlockLayout
from unift.model.limits import ROWS
from unift.model.policy import Policy
from unift.sampling.engines import native
from unift.sampling.engines.base import Request, Watch, batches, in_batches, unwatched
from unift.types import Sample

Tokens = list[int]
FIRST, MOST = 2, 16  # tokens of a row's first draft, and of any
WORTH = 0.7  # share of a forward's drafted tokens that must be accepted: below it, more is computed than is saved
LEAST, FAR = 2, 8  # tokens of a completion's end that a text is looked up by, at least and at most


def generate(
    policy: Policy,
    requests: Sequence[Request],
    max_tokens: int,
    temperature: float = 1.0,
    rows: int = ROWS,
    watch: Watch = unwatched,
) -> list[list[Sample]]:
    """As `Engine.generate`, with this policy; batches without drafts, or with pictures, as the native engine does
    them."""
    cut = batches(requests, rows, mixed=True)

    def run(batch: list[Request]) -> list[list[Sample]]:
        # A picture's tokens may stand in three dimensions, which this decode step does not know.
        drafted = policy.device.type == "cpu" and any(r.drafts for r in batch) and not any(r.shown for r in batch)
        return (run_batch if drafted else native.run_batch)(policy, batch, max_tokens, temperature)

    with policy.sampling(max_tokens * len(cut)):
        return in_batches(requests, cut, run, watch)


@torch.no_grad()
def run_batch(policy: Policy, requests: Sequence[Request], max_tokens: int, temperature: float) -> list[list[Sample]]:
    rows = DraftedRows(policy, requests, max_tokens, temperature)
    while rows.advance():
        pass
    return rows.samples()


class Texts:
    """Where a group's drafts come from. What ends a completion is never drafted: it is drawn after the last token before it."""

    def __init__(self, texts: Sequence[Tokens], stops: Collection[int] = ()) -> None:
        self.texts = [[*takewhile(lambda t: t not in stops, text)] for text in texts]
        self._after: dict[tuple[int, ...], list[tuple[Tokens, int]]] = {}  # LEAST tokens -> texts, and where they go on
        for text in self.texts:
            for end in range(LEAST, len(text)):
                self._after.setdefault(tuple(text[end - LEAST : end]), []).append((text, end))

    def draft(self, drawn: Tokens, most: int) -> Tokens:
        """``most`` tokens that may follow: those of the first text that begins with all of ``drawn``; where none does, those
        after the longest end of ``drawn``, LEAST tokens or more, in any text."""
        for text in self.texts:
            if len(text) > len(drawn) and text[: len(drawn)] == drawn:
                return text[len(drawn) : len(drawn) + most]
        best: Tokens = []
        longest = 0
        for text, end in self._after.get(tuple(drawn[-LEAST:]), ()):
            n = LEAST
            while n < min(FAR, end, len(drawn)) and text[end - 1 - n] == drawn[-1 - n]:
                n += 1
            if n > longest:
                longest, best = n, text[end : end + most]
        return best


@dataclass
class Patience:
    """Ever longer pauses while drafts do not come true: of a row, and of a whole batch."""

    misses: int = 0  # in a row
    pause: int = 0  # forwards until the next draft

    def wait(self) -> bool:
        """Whether this forward is a part of a pause."""
        self.pause -= (waits := self.pause > 0)
        return waits

    def learn(self, hit: bool) -> None:
        self.misses = 0 if hit else self.misses + 1
        self.pause = 2**self.misses - 1


@dataclass
class Row:
    """A completion while it is sampled."""

    texts: Texts
    tokens: Tokens
    logps: list[float]
    ended: bool  # by EOS; or there is no such sample
    block: int = FIRST  # tokens to draft next
    patience: Patience = field(default_factory=Patience)

    def draft(self, room: int) -> Tokens:
        return [] if self.patience.wait() or room <= 0 else self.texts.draft(self.tokens, min(self.block, room))

    def take(self, draft: Tokens, drawn: Tokens, logps: list[float], stops: set[int]) -> int:
        """``drawn``: the token after the last one, then after each drafted one; they count up to the first that the draft does
        not have. Returns how many drafted ones were accepted."""
        accepted = 0
        while accepted < len(draft) and draft[accepted] == drawn[accepted]:
            accepted += 1
        self.tokens += drawn[: accepted + 1]
        self.logps += logps[: accepted + 1]
        self.ended = drawn[accepted] in stops
        if draft:
            self.block = min(2 * self.block, MOST) if accepted == len(draft) else max(accepted, 1)
            self.patience.learn(accepted > 0)
        return accepted


class DraftedRows(native.Rows):
    """The rows of a batch, each as far as its accepted drafts have brought it."""

    def __init__(self, policy: Policy, requests: Sequence[Request], max_tokens: int, temperature: float) -> None:
        super().__init__(policy, requests, max_tokens, temperature)
        self.stops = set(self.eos.tolist())
        texts = [Texts(r.drafts, self.stops) for r in requests]
        first = zip(self.token_N.tolist(), self.logps_NL[:, 0].tolist(), self.done_N.tolist(), strict=True)
        self.rows = [Row(texts[i // self.grid.shape[1]], [t], [p], over) for i, (t, p, over) in enumerate(first)]
        self.patience = Patience()
        self.work: dict[str, int] = dict.fromkeys(("forwards", "forwarded", "drafted", "accepted"), 0)

    def advance(self) -> bool:
        """One forward of all rows that go on. False where none does."""
        open_N = np.array([self._open(self.rows[s]) for s in self.slot_N.tolist()])
        if not open_N.any():
            return False
        self.drop(open_N.reshape(self.state.shape))
        drafts, worked = not self.patience.wait(), dict(self.work)
        going: list[tuple[Row, Tokens]] = []
        flat: list[tuple[int, int, int]] = []  # row of the present state, position, token
        for n, slot in enumerate(self.slot_N.tolist()):
            row = self.rows[slot]
            if self._open(row):
                drawn = len(row.tokens)
                draft = row.draft(self.max_tokens - drawn - 1) if drafts else []
                going.append((row, draft))
                flat += [(n, drawn - 1 + j, token) for j, token in enumerate([row.tokens[-1], *draft])]
        row_T, at_T, token_T = torch.tensor(flat, device=self.policy.device).unbind(1)
        self._reach(int(at_T.max()))
        s = self.state
        layout = BlockLayout(s.prefix, s.mask_B11P, s.members, s.shape, s.filled_1, row_T=row_T, at_T=at_T)
        logits_TV = self.policy.logits(self.policy.hidden(token_T, self.start_N[row_T] + at_T, layout))
        drawn_T, logp_T = self.choose(logits_TV, self.slot_N[row_T], at_T + 1)
        drawn, logps, first = drawn_T.tolist(), logp_T.double().tolist(), 0
        for row, draft in going:
            last = first + len(draft) + 1
            accepted = row.take(draft, drawn[first:last], logps[first:last], self.stops)
            self._count(drafted=len(draft), accepted=accepted)
            first = last
        self._count(forwards=1, forwarded=len(flat))
        drafted, accepted = (self.work[name] - worked[name] for name in ("drafted", "accepted"))
        if drafted:
            self.patience.learn(accepted >= WORTH * drafted)
        return True

    def _open(self, row: Row) -> bool:
        return not row.ended and len(row.tokens) < self.max_tokens

    def _reach(self, position: int) -> None:
        """Room for a position in the caches."""
        capacity = self.state.capacity
        if position >= capacity:
            self.state.grow(min(max(position + 1, capacity + native.BLOCK), self.max_tokens))

    def _count(self, **more: int) -> None:
        for name, n in more.items():
            self.work[name] += n

    def samples(self) -> list[list[Sample]]:
        found = [[self.rows[s] for s in self.grid[i, :count]] for i, count in enumerate(self.counts)]
        return [[Sample(r.tokens, r.logps, r.ended) for r in rows] for rows in found]
