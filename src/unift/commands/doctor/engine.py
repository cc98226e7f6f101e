"""Does the server of ``engine.url`` sample from the trainer's weights, also after they changed? Tried, not asked."""

from __future__ import annotations

import tempfile
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from unift.config.sections import Config
    from unift.model.policy import Policy
    from unift.rows.dataset import Data, Split
    from unift.rows.tokens import Encoded
    from unift.sampling.engines.base import Engine

TOKENS, SAMPLES, TEMPERATURE = 16, 2, 0.7
CHANGE = 0.05  # of a weight's own spread, added to every weight


def check(config: Config, tokenizer: Any, data: Data) -> tuple[bool, str]:
    """(is it fine, what was found): completions before and after a change of all weights, against the trainer's log-probs."""
    from unift.config.stages import longest
    from unift.model.limits import longest_context
    from unift.model.load import load_policy
    from unift.sampling.engines.choose import open_engine

    policy = load_policy(config.model, tokenizer, longest(config))
    asked = _asked(data.train)
    with (
        tempfile.TemporaryDirectory() as place,
        open_engine(config.engine, policy, Path(place), longest_context(config, data)) as engine,
    ):
        before = gap(policy, engine, asked, config)
        _change(policy)
        after = gap(policy, engine, asked, config)
    shown = " behind prompts with pictures" if any(e.shown for e in asked) else ""
    said = f"log-probs of server and trainer{shown} differ by {before:.2g} nats a token, {after:.2g} after all weights were changed"
    if max(before, after) > config.engine.gap_limit:
        todo = "Serve the model in the trainer's dtype from a folder that unift serve made, or set engine.gap=correct"
        return config.engine.gap == "correct", f"{config.engine.url}: {said}. {todo}"
    return True, f"{config.engine.url}: {said}"


def _asked(split: Split) -> list[Encoded]:
    """Two rows, with pictures where any of those that are looked at has some."""
    shown = (i for i in split.looked_at if split.rows[i].images)
    return [split.encoded[i] for i in list(islice(shown, 2)) or range(min(2, len(split.rows)))]


def gap(policy: Policy, engine: Engine, rows: list[Encoded], config: Config) -> float:
    """Mean |log-prob here - log-prob of the engine| of a few sampled tokens, nats."""
    from unift.model.logprobs import logprobs
    from unift.model.packs import COMPLETION, Item, Member, pack
    from unift.objectives.weights import weigh
    from unift.sampling.engines.base import Draws, Request
    from unift.training.run.checkpoint import fingerprint

    engine.sync(policy, partial(fingerprint, policy))
    asked = [Request(e.prompt, Draws(("doctor", i), SAMPLES, SAMPLES, TOKENS), e.shown) for i, e in enumerate(rows)]
    groups = engine.generate(asked, TOKENS, TEMPERATURE)
    items = [
        Item(e.prompt, [], [Member(s.tokens, COMPLETION, 1.0, s.logps) for s in g], shown=e.shown)
        for e, g in zip(rows, groups, strict=True)
    ]
    batch = pack(items, range(len(items)), weigh(items, config), config)
    assert batch is not None, "members with an advantage are packed"
    batch = batch.to(policy.device)
    with torch.no_grad():
        l_S = logprobs(policy, batch, TEMPERATURE)[0]
    own_S = batch.role_S == COMPLETION
    return float((l_S[own_S] - batch.sampler_S[own_S]).abs().mean())


@torch.no_grad()
def _change(policy: Policy) -> None:
    torch.manual_seed(0)
    for p in policy.parameters():
        p += CHANGE * float(p.std(correction=0)) * torch.randn_like(p)
