"""What is done to the input embeddings of a packed forward: noise, a worst-case direction, or the model's own guesses.

Each puts ``delta_TD`` on a pack, which the forward adds to the embeddings; everything after that is untouched. Sampling
and evaluation never see it. One item of a supervised phase is one sequence, so draws and norms are per item and depend
neither on the cut into micro-batches nor on the order of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from unift import rng
from unift.config import words
from unift.config.sections import Inputs, Rules
from unift.model.logprobs import CHUNK, logprobs
from unift.model.packs import Item, PackedBatch
from unift.model.policy import Policy
from unift.objectives import loss as objectives


def perturbed(policy: Policy, batch: PackedBatch, items: Sequence[Item], rules: Rules) -> list[PackedBatch]:
    """The packs that take the place of ``batch`` (two for adversarial training: the clean one, and the perturbed one)."""
    if rules.inputs.own > 0:
        delta_TD = own_guesses(policy, batch, rules.inputs.own)
        return [replace(batch, delta_TD=delta_TD, inputs_fixed=True)]
    if not words.NOISES[rules.inputs.noise].drawn:
        delta_TD = worst_case(policy, batch, rules)
        copy = rules.inputs.copy_weight
        return [
            batch,
            replace(
                batch,
                delta_TD=delta_TD,
                policy_w_S=copy * batch.policy_w_S,
                likelihood_w_S=copy * batch.likelihood_w_S,
                entropy_w_S=copy * batch.entropy_w_S,
            ),
        ]
    return [replace(batch, delta_TD=noise(policy, batch, items, rules.inputs))]


def owner_T(batch: PackedBatch) -> Tensor:
    """Index of the item that each forwarded token belongs to."""
    out_T = torch.empty_like(batch.tokens_T)
    for b, (prefix, members) in enumerate(batch.layout.spans):
        for span in (prefix, *members):
            out_T[span.start : span.stop] = b
    return out_T


def no_delta(policy: Policy, batch: PackedBatch) -> Tensor:
    """Zeros [T, width] for what is added to the input embeddings, in their precision."""
    table = policy.embeddings.weight
    return torch.zeros(len(batch.tokens_T), table.shape[1], dtype=table.dtype, device=table.device)


def noise(policy: Policy, batch: PackedBatch, items: Sequence[Item], inputs: Inputs) -> Tensor:
    """uniform: alpha / sqrt(L d) * U(-1, 1) (NEFTune, arXiv 2310.05914). gaussian: N(0, mean(e^2) / SNR) (the channel
    of R-SFLLM, arXiv 2407.11654). L: tokens of the item that are forwarded; numbers are addressed by the item."""
    owner, delta_TD = owner_T(batch), no_delta(policy, batch)
    with torch.no_grad():  # by the module: it may scale its rows, or hold an adapter
        embedded_TD = policy.run(lambda: policy.embeddings(batch.tokens_T))
    for b, item in enumerate(items):
        at = torch.nonzero(owner == b)[:, 0]
        values = NOISES[inputs.noise](rng.generator("noise", *item.address), embedded_TD[at], inputs.scale)
        delta_TD[at] = torch.from_numpy(values).to(delta_TD)
    return delta_TD


def _uniform(draw: np.random.Generator, embedded_LD: Tensor, scale: float) -> np.ndarray:
    n, width = embedded_LD.shape
    return (2 * draw.random((n, width)) - 1) * scale / math.sqrt(n * width)


def _gaussian(draw: np.random.Generator, embedded_LD: Tensor, scale: float) -> np.ndarray:
    power = float(embedded_LD.double().square().mean())
    return draw.standard_normal(tuple(embedded_LD.shape)) * math.sqrt(power / scale)


NOISES: Mapping[words.NoiseName, Callable[[np.random.Generator, Tensor, float], np.ndarray]] = {
    "uniform": _uniform,
    "gaussian": _gaussian,
}


def worst_case(policy: Policy, batch: PackedBatch, rules: Rules) -> Tensor:
    """eps * g / |g| for each item, g the gradient of its loss on its embeddings: the first-order worst perturbation of
    norm eps (arXiv 1605.07725, eq. 5; the jammer of R-SFLLM)."""
    delta_TD = no_delta(policy, batch).requires_grad_()
    with torch.enable_grad():
        probe = replace(batch, delta_TD=delta_TD)
        l_S, _ = logprobs(policy, probe, rules.sample.temperature)
        parts = objectives.losses(l_S, None, probe, rules)
        (g_TD,) = torch.autograd.grad(parts["policy"] + parts["likelihood"], delta_TD)
    owner = owner_T(batch)
    norm_B = torch.zeros(int(owner.max()) + 1, dtype=torch.float64, device=owner.device)
    norm_B = norm_B.index_add(0, owner, g_TD.double().square().sum(1)).sqrt()
    scale_T = torch.where(norm_B > 0, rules.inputs.scale / norm_B.clamp(min=1e-300), 0.0)[owner]
    return (g_TD.double() * scale_T[:, None]).to(delta_TD.dtype)


@torch.no_grad()
def own_guesses(policy: Policy, batch: PackedBatch, share: float) -> Tensor:
    """share * (E[g_i] - E[y_i]) at every supervised token that is forwarded, g_i the greedy prediction in its place
    (IFT's temporal residual connection, arXiv 2405.11870 eq. 17). One extra forward pass."""
    return policy.run(lambda: _own_guesses(policy, batch, share))


def _own_guesses(policy: Policy, batch: PackedBatch, share: float) -> Tensor:
    with policy.precision(sampling=False):
        hidden = policy.hidden(batch.tokens_T, batch.positions_T, batch.layout)
    delta_TD = no_delta(policy, batch)
    following = _place_of_targets(batch)
    for part in range(0, len(batch.at_S), CHUNK):
        rows = slice(part, part + CHUNK)
        place = following[rows]
        forwarded = place >= 0
        if not bool(forwarded.any()):
            continue
        guess = policy.draw(policy.logits(hidden[batch.at_S[rows][forwarded]]), lambda z_NK: z_NK.argmax(-1))
        delta_TD[place[forwarded]] = share * (
            policy.embeddings(guess) - policy.embeddings(batch.target_S[rows][forwarded])
        )
    return delta_TD


def _place_of_targets(batch: PackedBatch) -> Tensor:
    """Flat index of every target where it is an input itself; -1 for a last token, which is not forwarded.

    The targets of one sequence follow each other, so a target's place is the position that predicts the next one.
    """
    place = torch.full_like(batch.at_S, -1)
    order = torch.argsort(batch.sequence_S, stable=True)
    here, after = order[:-1], order[1:]
    same = batch.sequence_S[here] == batch.sequence_S[after]
    place[here[same]] = batch.at_S[after[same]]
    return place
