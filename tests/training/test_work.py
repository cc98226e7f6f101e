"""A gate on work instead of seconds: tokens forwarded and floating-point operations of a fixed batch.

Every count has a closed form, so a pass that comes back (a second head product, a copied prefix, a row decoded after its
end) fails here by an exact number, on any machine. N: weights of the trunk's matrices; V x W: the head.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import VOCAB, random_tokens, settings, tiny_policy
from torch.utils.flop_counter import FlopCounterMode

from unift.model.logprobs import logprobs
from unift.model.packs import COMPLETION, Item, Member, pack
from unift.objectives import loss as objectives
from unift.objectives.weights import weigh
from unift.sampling.engines import native
from unift.sampling.engines.base import Request
from unift.sampling.engines.native import generate

MATRICES = (torch.ops.aten.mm, torch.ops.aten.addmm)


@pytest.fixture
def policy():
    return tiny_policy()[0]


def matrix_flops(work):
    """Operations of the products with weight matrices (attention's own products are batched and not among them)."""
    with FlopCounterMode(display=False) as counter:
        work()
    counts = counter.get_flop_counts()["Global"]
    return sum(counts.get(op, 0) for op in MATRICES)


def trunk_weights(policy):
    return sum(m.weight.numel() for m in policy.trunk.modules() if isinstance(m, torch.nn.Linear))


def forwarded(policy, work):
    """Tokens that pass the trunk, call by call."""
    seen = []
    handle = policy.trunk.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    work()
    handle.remove()
    return seen


def batch_of(config, advantages=(1.0, -1.0)):
    rng = np.random.default_rng(3)
    members = [Member(random_tokens(rng, 7), COMPLETION, a) for a in advantages * 4]
    items = [Item(random_tokens(rng, 20), random_tokens(rng, 10), members) for _ in range(2)]
    return pack(items, range(2), weigh(items, config), config)


def update(policy, batch, config):
    l_S, _ = logprobs(policy, batch)
    losses = objectives.losses(l_S, None, batch, config)
    (losses["policy"] + losses["likelihood"]).backward()


def test_update(policy):
    """Prefix once a group, the last token of a completion never, the head at supervised positions only: forward 2,
    backward 4 operations a weight and token."""
    config = settings("uft", "reference.kl=0", "likelihood.weight=0.1")
    batch = batch_of(config)
    tokens, positions = 2 * (30 + 8 * 6), 2 * (10 + 8 * 7)
    assert forwarded(policy, lambda: update(policy, batch, config)) == [tokens]
    head = positions * VOCAB * policy.head.in_features
    expected = 6 * (trunk_weights(policy) * tokens + head)
    assert matrix_flops(lambda: update(policy, batch, config)) == expected


def test_logits_made_again_cost_one_product_more(policy, monkeypatch):
    config = settings("uft", "reference.kl=0", "likelihood.weight=0.1")
    batch = batch_of(config)
    kept = matrix_flops(lambda: update(policy, batch, config))
    monkeypatch.setattr("unift.model.logprobs.KEEP", 0)
    again = matrix_flops(lambda: update(policy, batch, config))
    assert again - kept == 2 * 2 * (10 + 8 * 7) * VOCAB * policy.head.in_features


def test_silent_groups_cost_their_prefix(policy):
    config = settings("uft", "reference.kl=0", "likelihood.weight=0.1")
    batch = batch_of(config, advantages=(0.0, 0.0))
    assert forwarded(policy, lambda: update(policy, batch, config)) == [2 * 30]


def test_sampling(policy, monkeypatch):
    """Every prefix once, then one token a row and step, and the head once a group or row; no step after the last token."""
    monkeypatch.setattr(native, "eos_ids", lambda policy: torch.tensor([-1]))  # nothing ends early
    rng = np.random.default_rng(5)
    asked = [Request(random_tokens(rng, n), rng.random((4, 9))) for n in (11, 5, 8)]
    run = lambda: generate(policy, asked, 9)  # noqa: E731
    assert forwarded(policy, run) == [11 + 5 + 8] + [12] * 8
    head = (3 + 12 * 8) * VOCAB * policy.head.in_features
    assert matrix_flops(run) == 2 * (trunk_weights(policy) * (24 + 12 * 8) + head)


def test_finished_rows_are_dropped(policy):
    """Rows decoded in a step are at most 1.25 times the live ones, rounded to whole groups (native._compact)."""
    rng = np.random.default_rng(6)
    asked = [Request(random_tokens(rng, 6), rng.random((1, 40))) for _ in range(32)]
    lengths: list[int] = []
    seen = forwarded(policy, lambda: lengths.extend(len(g[0].tokens) for g in generate(policy, asked, 40)))
    live = [sum(n > t + 1 for n in lengths) for t in range(len(seen) - 1)]
    assert min(lengths) < 20 and all(rows * 0.8 <= max(n, 1) for rows, n in zip(seen[1:], live, strict=True))
