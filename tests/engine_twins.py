"""An engine beside the native one, as its plain twin: equal greedy completions, before and after a change of all weights."""

from __future__ import annotations

import numpy as np
import torch

from unift.training.run.checkpoint import fingerprint


def change(policy):
    """Move every weight by a third of its spread."""
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.3 * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))


def agree_over_a_change(policy, engine, own, asked, tokens, atol):
    """Tokens of both engines are the same and log-probs within ``atol``; the engine's samples [prompts], before and after."""
    found = []
    for moved in (False, True):
        if moved:
            change(policy)
        engine.sync(policy, lambda: fingerprint(policy))
        mine, theirs = own.generate(asked, tokens), engine.generate(asked, tokens)
        assert [s[0].tokens for s in mine] == [s[0].tokens for s in theirs]
        for a, b in zip(mine, theirs, strict=True):
            assert np.allclose(a[0].logps, b[0].logps, atol=atol)
        found.append([s[0] for s in theirs])
    return found
