"""The critic: a linear value head on the policy's own last hidden state (ReFT, arXiv 2401.08967). It shares the trunk, is
trained by the same optimizer, and its weights are in every checkpoint, never in the saved model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unift.packs import PackedBatch
from unift.policy import Policy, head_logprobs, scale_of


def new_critic(policy: Policy) -> nn.Linear:
    """Zero weights: it says 0 at first, whatever the seed."""
    head = nn.Linear(policy.embeddings.weight.shape[1], 1, device=policy.device, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def value(policy: Policy, hidden_SD: Tensor) -> Tensor:
    """V of the state before each target token, float32, [S]."""
    assert policy.critic is not None
    return policy.critic(hidden_SD.float())[:, 0]


def values(policy: Policy, batch: PackedBatch) -> Tensor:
    with policy.precision(sampling=False):
        hidden_TD = policy.hidden(batch.tokens_T, batch.positions_T, batch.layout)
    return value(policy, hidden_TD.index_select(0, batch.at_S))


def logprobs_and_values(policy: Policy, batch: PackedBatch, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(l_S, entropy_S, V_S) from one forward pass."""
    with policy.precision(sampling=False):
        hidden_TD = policy.hidden(batch.tokens_T, batch.positions_T, batch.layout)
    hidden_SD = hidden_TD.index_select(0, batch.at_S)
    l_S, entropy_S = head_logprobs(policy, hidden_SD, batch.target_S, scale_of(batch, temperature))
    return l_S, entropy_S, value(policy, hidden_SD)


def value_loss(v_S: Tensor, batch: PackedBatch, clip: float | None) -> Tensor:
    """sum_t w_t max((V - R)^2, (V_clip - R)^2), V_clip within ``clip`` of the value at sampling (as in PPO's code).

    w: 1/Z of the policy stream. Tokens without a return (nothing was sampled there) do not count.
    """
    on_S = ~batch.return_S.isnan()
    v, old, back = v_S[on_S].double(), batch.value_S[on_S], batch.return_S[on_S]
    error = (v - back).square()
    if clip is not None:
        error = torch.maximum(error, (old + (v - old).clamp(-clip, clip) - back).square())
    return (batch.policy_w_S[on_S] * error).sum()
