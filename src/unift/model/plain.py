"""The plain path: log-probs of a pack by the model's own forward, one padded row for every sequence.

For models that the shared-prefix path does not reproduce (attention windows, soft caps, state spaces, ...). Attention,
head and whatever lies between are the model's own; unift only lays out the sequences and picks the positions. Same
values and gradients as the shared-prefix path up to rounding, where both fit; the prefix is computed once a member.

Rows are padded on the right: no real token sees the padding in a causal model, whether attention or recurrent. So there
is no attention mask either; with one, a window that holds nothing but padding would make NaN out of an empty softmax.

Shapes: N rows (sequences), L padded length, S loss positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from unift.model import vision
from unift.model.vision import accepts
from unift.rows import processor
from unift.types import Shown

if TYPE_CHECKING:
    from unift.model.packs import PackedBatch
CACHES = ("past_key_values", "cache", "cache_params")  # names that models give the argument of their cache


def forward(model: Any, tokens_NL: Tensor, first: int = 0, seen: vision.Seen | None = None) -> Tensor:
    """Logits [N, L - first, V] of right-padded rows from column ``first`` on. ``seen``: their pictures."""
    n, width = tokens_NL.shape
    known, more = accepts(model), {}
    if "position_ids" in known:
        more["position_ids"] = torch.arange(width, device=tokens_NL.device).expand(n, width)
    if first and "logits_to_keep" in known:
        more["logits_to_keep"] = width - first
    if seen is not None:
        parts = seen.alike(model)
        if len(parts) > 1:
            found = [forward(model, tokens_NL[own], first, seen.select(own)) for own in parts]
            return torch.cat(found)[torch.tensor([i for own in parts for i in own], device=tokens_NL.device).argsort()]
        more |= seen.arguments(model, tokens_NL)
    logits_NLV = model(input_ids=tokens_NL, use_cache=False, **more).logits
    return logits_NLV[:, logits_NLV.shape[1] - (width - first) :]


def pad(rows: Sequence[list[int]], device: Any, seen: vision.Seen | None = None) -> Tensor:
    """[N, L]: rows filled up with their own last token, because a padding token may have a meaning to the model; of ``seen`` the
    last that is no placeholder of a picture."""
    width, marks = max(map(len, rows)), frozenset[int]() if seen is None else seen.reader.placeholders
    last = [next((t for t in reversed(r) if t not in marks), r[-1]) for r in rows]
    return torch.tensor([[*r, *[t] * (width - len(r))] for r, t in zip(rows, last, strict=True)], device=device)


class Rows:
    """The sequences of a pack: each member with forwarded tokens behind a copy of its prefix, and the prefix alone where
    a group has none. Every loss position is read from exactly one row: those inside a prefix from the first row of
    their group, so a hint counts once."""

    def __init__(self, batch: PackedBatch) -> None:
        flat, stem = batch.tokens_T.tolist(), batch.layout.stem
        self.tokens: list[list[int]] = []
        self.shown: list[Shown | None] = []  # pictures of each row
        place: list[tuple[int, int]] = [(0, 0)] * len(flat)  # of each flat token: its row, its column there
        for number, (prefix, members) in enumerate(batch.layout.spans):
            first, head = len(self.tokens), flat[:stem] + flat[prefix.start : prefix.stop]
            for column, t in enumerate(prefix, start=stem):
                place[t] = first, column
            for own in (span for span in members if len(span)):
                for column, t in enumerate(own, start=len(head)):
                    place[t] = len(self.tokens), column
                self.tokens.append(head + flat[own.start : own.stop])
            if len(self.tokens) == first:
                self.tokens.append(head)
            own_pictures = batch.shown[number] if batch.shown else None
            self.shown += [own_pictures] * (len(self.tokens) - first)
        self.row_S = [place[t][0] for t in batch.at_S.tolist()]
        self.column_S = [place[t][1] for t in batch.at_S.tolist()]

    @property
    def total(self) -> int:
        """Tokens of the rows that carry a loss, without padding."""
        return sum(len(self.tokens[i]) for i in set(self.row_S))

    def chunks(self, budget: int) -> list[list[int]]:
        """Rows that are forwarded together: longest first, padded size within the budget or a single row."""
        used = set(self.row_S)
        chunks: list[list[int]] = []
        for i in sorted(used, key=lambda i: (-len(self.tokens[i]), i)):
            if chunks and (len(chunks[-1]) + 1) * len(self.tokens[chunks[-1][0]]) <= budget:
                chunks[-1].append(i)
            else:
                chunks.append([i])
        return chunks


def logprobs(
    model: Any, batch: PackedBatch, scale_S: Tensor, reader: processor.Reader | None = None
) -> tuple[Tensor, Tensor]:
    """(l_S, entropy_S) under softmax(scale * logits), float32 (float64 stays), in the order of the pack.

    A forward holds at most as many padded tokens as the pack has flat ones, which is what the token budget bounded.
    With several forwards, each is computed again in the backward pass, so that one at a time is in memory.
    """
    rows = Rows(batch)
    device = batch.tokens_T.device
    positions: dict[int, list[int]] = {}
    for s, row in enumerate(rows.row_S):
        positions.setdefault(row, []).append(s)
    chunks = rows.chunks(len(batch.tokens_T))
    parts: list[Tensor] = []
    order: list[int] = []
    for chunk in chunks:
        own = [s for i in chunk for s in positions[i]]
        order += own
        seen = vision.seen_by(reader, [rows.shown[i] for i in chunk])
        tokens_NL = pad([rows.tokens[i] for i in chunk], device, seen)
        first = min(rows.column_S[s] for s in own)
        local = {i: n for n, i in enumerate(chunk)}
        at = torch.tensor([[local[rows.row_S[s]], rows.column_S[s] - first] for s in own], device=device)
        index_S = torch.tensor(own, device=device)
        run = partial(forward, model, seen=seen)
        args = (run, tokens_NL, first, at, batch.target_S[index_S], scale_S[index_S])
        if len(chunks) > 1 and torch.is_grad_enabled():
            parts.append(checkpoint(_score, *args, use_reentrant=False, preserve_rng_state=False))  # type: ignore[arg-type]
        else:
            parts.append(_score(*args))
    both_2S = torch.cat(parts, dim=1)[:, torch.tensor(order, device=device).argsort()]
    return both_2S[0].clone(), both_2S[1].clone()  # no views: sharded weights are gathered again by a hook on each


def _score(
    run: Callable[..., Tensor], tokens_NL: Tensor, first: int, at_S2: Tensor, target_S: Tensor, scale_S: Tensor
) -> Tensor:
    """[2, S]: log-probs and entropies at (row, column - first)."""
    z_SV = run(tokens_NL, first)[at_S2[:, 0], at_S2[:, 1]]
    z_SV = z_SV if z_SV.dtype == torch.float64 else z_SV.float()
    logp_SV = torch.log_softmax(z_SV * scale_S[:, None].to(z_SV.dtype), dim=-1)
    entropy_S = -(logp_SV.exp() * logp_SV).sum(-1)
    return torch.stack([logp_SV.gather(1, target_S[:, None])[:, 0], entropy_S])


class Decoder:
    """Rows of equal length that grow by one token at a time. ``cached``: the model's own cache, else the whole rows are
    computed again for every token. No padding in either case."""

    def __init__(self, model: Any, cached: bool, seen: vision.Seen | None = None) -> None:
        self.model, self.cached, self.seen = model, cached, seen
        self.shift_N: Tensor | None = None  # of positions in three dimensions behind a prompt with pictures
        self.known = accepts(model)
        # A model's cache of its own text knows nothing of which pictures a token sees.
        self.name = None if vision.CROSS in self.known else next((n for n in CACHES if n in self.known), None)
        self.cache: Any = None
        self.tokens_NL: Tensor | None = None
        self.length = 0

    def start(self, tokens_NL: Tensor) -> Tensor:
        """Logits [N, V] after the prompts."""
        self.tokens_NL = tokens_NL
        return self._step(tokens_NL)

    def append(self, token_N: Tensor) -> Tensor:
        """Logits [N, V] after one more token each."""
        assert self.tokens_NL is not None
        self.tokens_NL = torch.cat([self.tokens_NL, token_N[:, None]], dim=1)
        return self._step(token_N[:, None] if self.cached else self.tokens_NL)

    def _step(self, tokens_NL: Tensor) -> Tensor:
        n, width = tokens_NL.shape
        if not self.cached:
            return forward(self.model, tokens_NL, width - 1, self.seen)[:, -1]
        assert self.name is not None
        more: dict[str, Any] = {} if self.cache is None else {self.name: self.cache}
        if "position_ids" in self.known:
            more["position_ids"] = torch.arange(self.length, self.length + width, device=tokens_NL.device).expand(
                n, width
            )
        if self.shift_N is not None:
            more["position_ids"] = (more["position_ids"] + self.shift_N[:, None]).expand(3, -1, -1)
        if self.seen is not None and self.cache is None:
            more |= self.seen.arguments(self.model, tokens_NL)
            if vision.spatial_rule(self.model) is not None:
                self.shift_N = more["position_ids"].amax((0, 2)) + 1 - width
        if "logits_to_keep" in self.known:
            more["logits_to_keep"] = 1
        out = self.model(input_ids=tokens_NL, use_cache=True, **more)
        self.cache = out[self.name]
        self.length += width
        return out.logits[:, -1]

    def select(self, index_N: Tensor) -> None:
        """Keep (or repeat) these rows."""
        assert self.tokens_NL is not None
        self.tokens_NL = self.tokens_NL[index_N]
        self.shift_N = None if self.shift_N is None else self.shift_N[index_N]
        self.seen = None if self.seen is None else self.seen.select(index_N.tolist())
        if self.cached:
            self.cache.reorder_cache(index_N)
