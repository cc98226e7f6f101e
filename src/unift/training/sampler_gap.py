"""Sampler and trainer that do not give a token the same probability: measured at every step, and corrected or refused.

A server in bfloat16, or with other kernels, samples from q where the trainer takes gradients of p. Without a correction the
policy gradient is that of other weights; with ``engine.overlap`` q has the weights of the step before. Truncated importance
sampling (TIS; Ionides 2008, and for this use Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
training") weighs every sampled token by min(p / q, cap).
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import Tensor

from unift.config.surroundings import Engine as Settings
from unift.config.words import LOSSES, LossName
from unift.model.packs import COMPLETION, PackedBatch
from unift.types import EngineError


def importance(batch: PackedBatch, l_S: Tensor, cap: float) -> Tensor:
    """min(p / q, cap) of the tokens that were sampled, 1 elsewhere, [S] without gradient. p: the policy at the start of the
    step; q: the sampler, by its recorded log-probs."""
    old_S = l_S.detach() if batch.old_S is None else batch.old_S
    own_S = batch.role_S == COMPLETION
    ratio_S = torch.exp(torch.where(own_S, old_S - batch.sampler_S, 0.0)).clamp(max=cap)
    return ratio_S.to(batch.policy_w_S.dtype)


def corrected(
    batch: PackedBatch, l_S: Tensor, loss: LossName, settings: Settings
) -> tuple[PackedBatch, dict[str, Tensor]]:
    """The pack as the policy stream takes it, for completions that other probabilities q drew than those of the trainer:

    - ``engine.gap`` "correct": sampled tokens weighed by `importance`, and the sum of these weights as ``importance``. A ratio
      stays one to the policy at the start of the step (decoupled PPO, arXiv 2110.00641; AReaL, arXiv 2505.24298);
    - else, with ``engine.overlap``: a loss with a ratio has q in its denominator, since there and only there it is an importance
      ratio whose clip bounds the distance to the sampler; a loss without one is weighed as above;
    - else the pack as it is.
    """
    if settings.overlap and settings.gap != "correct" and LOSSES[loss].ratio:
        start_S = l_S.detach() if batch.old_S is None else batch.old_S
        return replace(batch, old_S=torch.where(batch.role_S == COMPLETION, batch.sampler_S, start_S)), {}
    if settings.gap != "correct" and not settings.overlap:
        return batch, {}
    weight_S = importance(batch, l_S, settings.cap)
    total = weight_S[batch.role_S == COMPLETION].sum()
    return replace(batch, policy_w_S=batch.policy_w_S * weight_S), {"importance": total}


def check(mean: float, settings: Settings) -> None:
    """Before the optimizer steps: a mean difference [nats] above ``engine.gap_limit`` is a warning or an EngineError, as
    ``engine.gap`` says."""
    if mean <= settings.gap_limit or settings.gap == "correct":
        return
    older = "the last update moved them that far (lower train.lr), or " if settings.overlap else ""
    if settings.gap == "fail":
        raise EngineError(
            f"log-probs of sampler and trainer differ by {mean:.3g} nats a token (engine.gap_limit={settings.gap_limit:g}): "
            f"{older}the server has other weights or a lower precision. Nothing of this step reached the weights. Start the "
            "server in the trainer's dtype, correct for it (engine.gap=correct), or raise the limit"
        )
    warnings.warn(
        f"log-probs of sampler and trainer differ by more than engine.gap_limit={settings.gap_limit:g} nats a token "
        "(sampling/sampling_logp_difference/mean says by how much): gradients are those of another policy. engine.gap=correct "
        "weighs tokens for it",
        RuntimeWarning,
        stacklevel=2,
    )
