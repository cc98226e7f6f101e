"""The family on models that take the plain path: the same losses, and a refusal where the trunk would have to be opened."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_policy
from test_family import loss_of, prepared

from unift.config.stages import stages
from unift.training.loop import check_path
from unift.types import ConfigError


@pytest.mark.parametrize("name", ["ppo", "reft", "neftune", "sft-adversarial", "ift"])
def test_methods_that_open_the_trunk_are_refused(name):
    from conftest import settings

    policy, plain = tiny_policy()
    policy.model, policy.why_plain = plain, "its attention window is short"
    with pytest.raises(ConfigError, match="needs (a critic|changed input embeddings).*window is short"):
        for phase in (stage.rules for stage in stages(settings(name))):
            check_path(policy, phase)
    check_path(policy, settings("luffy"))


@pytest.mark.parametrize("name", ["prefix-rft", "srft", "iw-sft", "gspo", "una", "discriminative"])
def test_packs_of_the_family_on_the_plain_path(name):
    """Given tokens inside members, two solutions in one group, sequence ratios: as on the shared-prefix path."""
    policy, packs, s = prepared(name, 0)
    loss, got = loss_of(policy, packs, s)
    _, policy.model = tiny_policy(torch.float64)
    assert not policy.shared
    other, expected = loss_of(policy, packs, s)
    assert other == pytest.approx(loss, rel=1e-5, abs=1e-8)
    worst = max((a - b).abs().max().item() for a, b in zip(got, expected, strict=True))
    assert worst < 1e-5 * max(b.abs().max().item() for b in expected)
