"""Sampling in-process: each prompt+hint is prefilled once for its group, keys and values lie in preallocated caches,
finished rows are dropped, and every sample draws from its own addressed random numbers.

The same attention, trunk and head as training, so a sampled token's log-prob is the trainer's up to rounding. For models on
the shared-prefix path; the others have the plain engine.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from unift.model import vision
from unift.model.attention.decode import DecodeLayout
from unift.model.attention.packed import PackedLayout, make_layout
from unift.model.limits import ROWS
from unift.model.packs import stem_of
from unift.model.policy import Policy
from unift.sampling.engines import cuda_graph
from unift.sampling.engines.base import Request, Watch, batches, in_batches, unwatched
from unift.sampling.engines.draw import chooser, eos_ids
from unift.types import Sample

BLOCK = 32  # cached member positions added at a time
LOOK = 16  # on a GPU, steps between two looks at which rows have ended


def generate(
    policy: Policy,
    requests: Sequence[Request],
    max_tokens: int,
    temperature: float = 1.0,
    rows: int = ROWS,
    watch: Watch = unwatched,
) -> list[list[Sample]]:
    """As `Engine.generate`, with this policy. ``watch`` is told after every batch."""
    cut = batches(requests, rows, mixed=True)
    with policy.sampling(max_tokens * len(cut)):  # outside of the loop: weights made for it are kept until it ends
        return in_batches(requests, cut, lambda batch: run_batch(policy, batch, max_tokens, temperature), watch)


class Rows:
    """The rows of a batch while they are sampled, on the shared-prefix path: B groups of G rows.

    All that a step reads and writes lies on the device and stays at its address until ``drop`` or ``grow``, and a step never
    waits for the device, so that it can be recorded.
    """

    def __init__(self, policy: Policy, requests: Sequence[Request], max_tokens: int, temperature: float) -> None:
        self.policy, self.max_tokens, self.eos = policy, max_tokens, eos_ids(policy)
        self.counts = [r.samples for r in requests]
        device, b, g = policy.device, len(requests), max(self.counts)
        self.choose = chooser(policy, requests, g, max_tokens, temperature)
        logits_BV, layout, shift_B = self._prefill(requests)
        some = next(iter(layout.cache.values()))[1]
        capacity = min(self._block(0), max_tokens)
        members = {
            n: (
                k.new_zeros(b, k.shape[1], g, capacity, k.shape[2]),
                v.new_zeros(b, v.shape[1], g, capacity, v.shape[3]),
            )
            for n, (k, v) in layout.cache.items()
        }
        filled_1 = torch.zeros(1, dtype=torch.long, device=device)
        self.state = DecodeLayout(layout.cache, layout.cached_padding(some), members, (b, g), filled_1)
        # slot_N: each live row's place in the original B*G grid. A slot without a sample counts as done.
        self.grid = np.arange(b * g).reshape(b, g)
        self.slot_N = torch.arange(b * g, device=device)
        self.done_N = torch.tensor([j >= n for n in self.counts for j in range(g)], device=device)
        self.start_N = (layout.stem + layout.prefix_len_B + shift_B).repeat_interleave(g)
        self.token_N = torch.zeros(b * g, dtype=torch.long, device=device)
        self.tokens_NL = torch.zeros(b * g, max_tokens, dtype=torch.long, device=device)
        self.logps_NL = torch.zeros(b * g, max_tokens, dtype=torch.float64, device=device)
        self.length_N = torch.zeros(b * g, dtype=torch.long, device=device)  # of the rows that ended; 0: not ended
        self._draw(logits_BV.repeat_interleave(g, 0))

    def _prefill(self, requests: Sequence[Request]) -> tuple[Tensor, PackedLayout, Tensor | int]:
        """Every prefix once (what all begin with, once for all), no padding in the linear layers: logits [B, V] after it, its
        keys and values, and what the positions behind it are shifted by, [B] (`vision.View`)."""
        device, prompts = self.policy.device, [r.prompt for r in requests]
        stem = 0 if any(r.shown for r in requests) else stem_of(prompts)
        flat, positions, spans = prompts[0][:stem], list(range(stem)), list[range]()
        for prompt in prompts:
            spans.append(range(len(flat), len(flat) + len(prompt) - stem))
            flat += prompt[stem:]
            positions += range(stem, len(prompt))
        layout = make_layout(spans, [[] for _ in requests], len(flat), stem).to(device)
        layout.keep = True
        place = torch.tensor(flat, device=device), torch.tensor(positions, device=device)
        shown = [r.shown for r in requests]
        view = vision.view(self.policy.base, self.policy.reader, *place, layout.spans, shown)
        hidden = self.policy.hidden(*place, layout, view=view)
        logits = self.policy.logits(hidden[torch.tensor([s.stop - 1 for s in spans], device=device)])
        return logits, layout, 0 if view is None else view.shift_B

    def step(self) -> None:
        """Forward of the last tokens, and a draw of the next."""
        self.state.begin()
        logits_NV = self.policy.logits(self.policy.hidden(self.token_N, self.start_N + self.state.filled_1, self.state))
        self.state.end()
        self._draw(logits_NV)

    def _draw(self, logits_NV: Tensor) -> None:
        drawn_1 = self.state.filled_1  # tokens drawn before this one: all of them are in the caches by now
        at = self.slot_N, drawn_1
        token_N, logp_N = self.choose(logits_NV, *at)
        stop_N = (token_N[:, None] == self.eos).any(1)
        self.tokens_NL[at], self.logps_NL[at] = token_N, logp_N.double()  # of done rows too: cut off at the end
        length_N = torch.where(stop_N & ~self.done_N, drawn_1 + 1, self.length_N[self.slot_N])
        self.length_N[self.slot_N] = length_N
        self.done_N |= stop_N
        self.token_N.copy_(token_N)

    def live(self) -> np.ndarray:
        """bool [B, G]: rows that have not ended. Waits for the device."""
        return ~self.done_N.view(self.state.shape).cpu().numpy()

    def drop(self, live_BG: np.ndarray) -> bool:
        """Drop rows that have ended, where that saves enough. Returns whether it did."""
        kept = _compact(live_BG)
        if kept is None:
            return False
        groups, slots = (torch.from_numpy(x).to(self.policy.device) for x in kept)
        flat_N = (groups[:, None] * self.state.shape[1] + slots).flatten()
        self.state = self.state.select(groups, slots)
        rows = self.token_N, self.slot_N, self.start_N, self.done_N
        self.token_N, self.slot_N, self.start_N, self.done_N = (x[flat_N] for x in rows)
        return True

    def _block(self, capacity: int) -> int:
        """Positions to add: few on the CPU, which computes all of them; on a GPU, whose steps are recorded anew, twice as many."""
        return BLOCK if self.policy.device.type == "cpu" else max(capacity, 2 * BLOCK)

    def grow(self, filled: int) -> bool:
        """Room for one more position than ``filled``. Returns whether the caches were too small for it."""
        capacity = self.state.capacity
        if filled < capacity:
            return False
        self.state.grow(min(capacity + self._block(capacity), self.max_tokens))
        return True

    def samples(self) -> list[list[Sample]]:
        tokens, logps, lengths = self.tokens_NL.tolist(), self.logps_NL.tolist(), self.length_N.tolist()
        drawn, found = int(self.state.filled_1) + 1, []
        for i, count in enumerate(self.counts):
            ends = [lengths[s] or drawn for s in self.grid[i, :count]]
            rows = zip(self.grid[i, :count], ends, strict=True)
            found.append([Sample(tokens[s][:n], logps[s][:n], lengths[s] > 0) for s, n in rows])
        return found


def _look(device: torch.device) -> int:
    """Steps between two looks at which rows have ended. Each waits for the device, which otherwise runs ahead."""
    return 1 if device.type == "cpu" else LOOK


@torch.no_grad()
def run_batch(policy: Policy, requests: Sequence[Request], max_tokens: int, temperature: float) -> list[list[Sample]]:
    rows = Rows(policy, requests, max_tokens, temperature)
    recorded = cuda_graph.Recorded(rows.step) if policy.device.type == "cuda" and policy.cuda_graphs else None
    look = _look(policy.device)
    for drawn in range(1, max_tokens):
        changed = False
        if (drawn - 1) % look == 0:
            live = rows.live()
            if not live.any():
                break
            changed = rows.drop(live)
        changed |= rows.grow(drawn - 1)
        if recorded is None:
            rows.step()
            continue
        if changed:
            recorded.forget()
        recorded(max_tokens - drawn)
    return rows.samples()


def _compact(live_BG: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Groups and, in each, slots to keep; None while too little would be saved. Ragged groups keep some done slots."""
    b, g = live_BG.shape
    groups = np.flatnonzero(live_BG.any(1))
    width = int(live_BG.sum(1).max())
    if len(groups) * width > 0.8 * b * g:
        return None
    slots = np.argsort(~live_BG[groups], axis=1, kind="stable")[:, :width]
    return groups, slots
