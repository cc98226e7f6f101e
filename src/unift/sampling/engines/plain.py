"""Sampling by the model's own forward and cache: rows of equal prompt length together and without padding.

For models on the plain path. A model on the shared-prefix path gets its own attention back while it is sampled here, which
is slower than the native engine and knows nothing of it, so that each can be held against the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from unift.model import paths, vision
from unift.model.limits import ROWS
from unift.model.plain import Decoder
from unift.model.policy import Policy
from unift.sampling.engines.base import Request, Watch, batches, in_batches, unwatched
from unift.sampling.engines.draw import chooser, eos_ids
from unift.types import Sample


def generate(
    policy: Policy,
    requests: Sequence[Request],
    max_tokens: int,
    temperature: float = 1.0,
    rows: int = ROWS,
    watch: Watch = unwatched,
) -> list[list[Sample]]:
    """As `Engine.generate`, with this policy."""
    cut = batches(requests, rows, mixed=False)
    with own_attention(policy) as cached, policy.sampling(max_tokens * len(cut)):
        return in_batches(requests, cut, lambda batch: _run(policy, batch, max_tokens, temperature, cached), watch)


@contextmanager
def own_attention(policy: Policy) -> Iterator[bool]:
    """The model as it came, for a model on the shared-prefix path too; yields whether its own cache may be used."""
    if not policy.shared:
        yield policy.cached
        return
    model, kept = policy.base, vision.implementation(policy.base)
    vision.set_implementation(model, "sdpa" if getattr(model, "_supports_sdpa", False) else "eager")
    try:
        yield paths.check_plain(model, policy.device, policy.reader)
    finally:
        vision.set_implementation(model, kept)


@torch.no_grad()
def _run(
    policy: Policy, requests: Sequence[Request], max_tokens: int, temperature: float, cached: bool
) -> list[list[Sample]]:
    """One batch, whose prompts have the same length."""
    device, eos = policy.device, eos_ids(policy)
    counts = [r.samples for r in requests]
    g = max(counts)
    choose = chooser(policy, requests, g, max_tokens, temperature)
    decoder = Decoder(policy.base, cached, vision.seen_by(policy.reader, [r.shown for r in requests]))
    logits_NV = decoder.start(torch.tensor([r.prompt for r in requests], device=device))
    # From here on a row is a sample: its prompt's row again, and its place in the B*G grid of the uniforms.
    row_N = torch.tensor([i for i, n in enumerate(counts) for _ in range(n)], device=device)
    slot_N = torch.tensor([i * g + j for i, n in enumerate(counts) for j in range(n)], device=device)
    decoder.select(row_N)
    logits_NV = logits_NV[row_N]
    samples = {s: Sample([], [], False) for s in slot_N.tolist()}
    for t in range(max_tokens):
        token_N, logp_N = choose(logits_NV, slot_N, t)
        stop_N = torch.isin(token_N, eos)
        for slot, token, logp, stop in zip(
            slot_N.tolist(), token_N.tolist(), logp_N.tolist(), stop_N.tolist(), strict=True
        ):
            samples[slot].tokens.append(token)
            samples[slot].logps.append(logp)
            samples[slot].finished = stop
        live = (~stop_N).nonzero()[:, 0]
        if t + 1 == max_tokens or not len(live):
            break
        if len(live) < len(slot_N):
            decoder.select(live)
            token_N, slot_N = token_N[live], slot_N[live]
        logits_NV = decoder.append(token_N)
    return [[samples[i * g + j] for j in range(n)] for i, n in enumerate(counts)]
