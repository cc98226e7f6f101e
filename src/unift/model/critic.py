"""The critic: a linear value head on the policy's own last hidden state (ReFT, arXiv 2401.08967). It shares the trunk, is
trained by the same optimizer, and its weights are in every checkpoint, never in the saved model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unift.model.logprobs import head_logprobs, scale_of
from unift.model.packs import PackedBatch
from unift.model.policy import Policy


def new_critic(policy: Policy) -> nn.Linear:
    """Zero weights: it says 0 at first, whatever the seed. Where weights are sharded, one that has its shards already."""
    head = policy.root.critic if policy.root is not None else None
    if head is None:
        width = policy.head.weight.shape[1]  # V reads what the head reads
        dtype = torch.promote_types(policy.head.weight.dtype, torch.float32)
        head = nn.Linear(width, 1, device=policy.device, dtype=dtype)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def value(policy: Policy, hidden_SD: Tensor) -> Tensor:
    """V of the state before each target token, [S], in float32 (float64 beside a float64 model)."""
    assert policy.critic is not None
    return policy.critic(hidden_SD.to(policy.critic.weight.dtype))[:, 0].clone()  # no view, as in `plain.logprobs`


def values(policy: Policy, batch: PackedBatch) -> Tensor:
    return policy.run(lambda: value(policy, _hidden(policy, batch)))


def logprobs_and_values(policy: Policy, batch: PackedBatch, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(l_S, entropy_S, V_S) from one forward pass."""

    def both() -> tuple[Tensor, Tensor, Tensor]:
        hidden_SD = _hidden(policy, batch)
        l_S, entropy_S = head_logprobs(policy, hidden_SD, batch.target_S, scale_of(batch, temperature))
        return l_S, entropy_S, value(policy, hidden_SD)

    return policy.run(both)


def _hidden(policy: Policy, batch: PackedBatch) -> Tensor:
    """Last hidden states [S, D] before each target token."""
    with policy.precision(sampling=False):
        hidden_TD = policy.hidden(batch.tokens_T, batch.positions_T, batch.layout, view=policy.view(batch))
    return hidden_TD.index_select(0, batch.at_S)
