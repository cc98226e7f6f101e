"""The one loss, token by token. Everything here is elementwise on the chosen tokens' log-probs ``l``, or couples the
tokens of one sequence, or the sequences of one group; never more.

    L = - sum_t wp_t * surrogate(l_t) + sum_t wk_t * kl(l_t, l_ref_t) - sum_t we_t * H_t      (policy stream)
        - sum_t wl_t * g(l_t)                                                                 (likelihood stream)

The weights w carry coefficient / Z with Z counted once over the whole optimizer batch, so micro-batches simply add up
(UFT, arXiv 2505.16984, eq. 3.3). ``e_t = -dL/dl_t`` is the effective weight that the tests compare with closed forms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import softplus

from unift.config import words
from unift.config.sections import PolicyStream, Rules
from unift.model.packs import COMPLETION, PackedBatch
from unift.objectives.likelihood import sequence_sum, shaped, terms


@dataclass(frozen=True)
class Pushed:
    """What a surrogate may look at, [S]. ``own``: tokens that the policy sampled."""

    l: Tensor
    old: Tensor  # at the start of the step
    a: Tensor
    own: Tensor
    sequence: Tensor


def clipped_surrogate(l_S: Tensor, old_S: Tensor, a_S: Tensor, low: float, high: float, dual: float | None) -> Tensor:
    """PPO's clipped surrogate min(rho A, clip(rho, 1-low, 1+high) A), rho = exp(l - old) (arXiv 1707.06347, eq. 7).

    ``dual`` = c bounds the surrogate from below by c*A where A < 0 (dual clip, arXiv 1912.09729).
    Gradient at rho = 1 is A; 0 where the clip is active.
    """
    return _clip(torch.exp(l_S - old_S), a_S, low, high, dual)


def _clip(ratio_S: Tensor, a_S: Tensor, low: float, high: float, dual: float | None) -> Tensor:
    surrogate_S = torch.minimum(ratio_S * a_S, ratio_S.clamp(1 - low, 1 + high) * a_S)
    if dual is not None:
        surrogate_S = torch.where(a_S < 0, torch.maximum(surrogate_S, dual * a_S), surrogate_S)
    return surrogate_S


def importance_ratio(l_S: Tensor, old_S: Tensor, a_S: Tensor) -> Tensor:
    """rho A, rho = exp(l - old): PPO's surrogate without its clip. e = rho A."""
    return torch.exp(l_S - old_S) * a_S


def reinforce(l_S: Tensor, a_S: Tensor) -> Tensor:
    """A * l: the score-function estimator without a ratio (Williams 1992)."""
    return a_S * l_S


def clipped_importance(l_S: Tensor, old_S: Tensor, a_S: Tensor, low: float, high: float) -> Tensor:
    """CISPO (arXiv 2506.13585): sg(clip(rho, 1-low, 1+high)) A l. Every token keeps a gradient; e = clip(rho) A."""
    return torch.exp(l_S - old_S).clamp(1 - low, 1 + high).detach() * a_S * l_S


def sequence_ratio(t: Pushed, low: float, high: float, dual: float | None) -> Tensor:
    """GSPO (arXiv 2507.18071, eq. 5 and the token variant): s = exp(mean_t(l - old)) over the completion's own tokens,
    clipped as a whole; each token has the value of s and its own share of the gradient. e = s A where not clipped."""
    return _clip(_whole_ratio(t) * torch.exp(t.l - t.l.detach()), t.a, low, high, dual)


def _whole_ratio(t: Pushed) -> Tensor:
    d_S = torch.where(t.own, t.l.detach() - t.old, 0.0)
    count = sequence_sum(t.own.to(d_S.dtype), t.sequence).clamp(min=1)
    return (sequence_sum(d_S, t.sequence) / count)[t.sequence].exp()


def kl_penalty(l_S: Tensor, ref_S: Tensor, estimator: words.EstimatorName, clamp: float | None = None) -> Tensor:
    """Per-token penalty towards the reference, d = ref - l (Schulman's estimators).

    k3 = exp(d) - d - 1: gradient on sampled tokens is that of the forward KL(ref || pi); e_t = exp(d) - 1.
    k2 = d^2 / 2: gradient of the reverse KL(pi || ref); e_t = d.
    clamp: the penalty of a token is at most this, with no gradient beyond (verl and the official code of UFT clamp k3 to
    10, which d = 2.61 reaches).
    """
    penalty_S = ESTIMATORS[estimator](ref_S - l_S)
    return penalty_S if clamp is None else penalty_S.clamp(max=clamp)


ESTIMATORS: Mapping[words.EstimatorName, Callable[[Tensor], Tensor]] = {
    "k2": lambda d_S: d_S.square() / 2,
    "k3": lambda d_S: torch.exp(d_S) - d_S - 1,
}


def most_uncertain(entropy_S: Tensor, sequence_S: Tensor, share: float) -> Tensor:
    """True at the ``share`` of each sequence's tokens with the highest entropy (at least one; ties: the earlier token).

    Prefix-RFT (arXiv 2507.01679). Counted per sequence: its code ranks a whole micro-batch, which depends on the cut.
    """
    keep_S = torch.zeros_like(sequence_S, dtype=torch.bool)
    for number in range(int(sequence_S.max()) + 1 if len(sequence_S) else 0):
        at = torch.nonzero(sequence_S == number)[:, 0]
        if not len(at):
            continue
        n = max(1, round(share * len(at)))
        keep_S[at[torch.argsort(entropy_S[at], descending=True, stable=True)[:n]]] = True
    return keep_S


Function = Callable[[Pushed, "PolicyStream"], Tensor]


def _clipped(t: Pushed, p: PolicyStream) -> Tensor:
    return clipped_surrogate(t.l, t.old, t.a, p.low, p.high, p.dual_clip)


# Losses of whole sequences are in SEQUENCES.
LOSSES: Mapping[words.LossName, Function] = {
    "clip": _clipped,
    "ratio": lambda t, p: importance_ratio(t.l, t.old, t.a),
    "reinforce": lambda t, p: reinforce(t.l, t.a),
    "cispo": lambda t, p: clipped_importance(t.l, t.old, t.a, p.low, p.high),
    "gspo": lambda t, p: sequence_ratio(t, p.low, p.high, p.dual_clip),
    "none": lambda t, p: reinforce(t.l, t.a),  # nothing has a weight
}

# Tokens of the solution that stand in a group and share its advantage.
OFF_POLICY: Mapping[words.OffPolicyName, Function] = {
    "reinforce": lambda t, p: reinforce(t.l, t.a),  # discriminative fine-tuning
    "ratio": _clipped,  # as if sampled, rho from the start of the step (Prefix-RFT)
    "shaped": lambda t, p: t.a * shaped(t.l, p.threshold),  # A pi / (pi + gamma) (LUFFY)
    "probability": lambda t, p: t.a * t.l.exp(),  # A pi, the ratio to an expert whose density is taken as 1 (SRFT)
}


def surrogate(l_S: Tensor, old_S: Tensor, entropy_S: Tensor | None, batch: PackedBatch, policy: PolicyStream) -> Tensor:
    """What every token's policy weight multiplies."""
    tokens = _pushed(l_S, old_S, batch)
    out_S = LOSSES[policy.loss](tokens, policy)
    if policy.off_policy == "none":
        return out_S
    off_S = ~tokens.own & (batch.policy_w_S != 0)
    other_S = OFF_POLICY[policy.off_policy](tokens, policy)
    if policy.off_policy_top < 1:
        if entropy_S is None:
            raise ValueError("policy.off_policy_top needs the entropies")
        keep_S = off_S.clone()
        keep_S[off_S] = most_uncertain(entropy_S.detach()[off_S], batch.sequence_S[off_S], policy.off_policy_top)
        other_S = torch.where(keep_S, other_S, 0.0)
    return torch.where(off_S, other_S, out_S)


def _pushed(l_S: Tensor, old_S: Tensor, batch: PackedBatch) -> Pushed:
    return Pushed(l_S, old_S, batch.advantage_S, batch.role_S == COMPLETION, batch.sequence_S)


def ratios(l_S: Tensor, batch: PackedBatch, policy: PolicyStream) -> Tensor:
    """pi / pi_old of every token as the policy's loss clips it: the token's own, or that of its completion (gspo)."""
    old_S = l_S.detach() if batch.old_S is None else batch.old_S
    if words.LOSSES[policy.loss].whole:
        return _whole_ratio(_pushed(l_S, old_S, batch))
    return torch.exp(l_S - old_S)


def losses(l_S: Tensor, entropy_S: Tensor | None, batch: PackedBatch, rules: Rules) -> dict[str, Tensor]:
    """Scalar losses of both streams of a packed batch: ``policy`` (with ``kl`` and ``entropy`` inside) and ``likelihood``.

    ``rules``: the settings of the method; its policy stream, its likelihood and its KL penalty count here."""
    policy, likelihood, kl = rules.policy, rules.likelihood, rules.reference
    old_S = l_S.detach() if batch.old_S is None else batch.old_S
    if words.LOSSES[policy.loss].sequences:
        pushed = -sequence_loss(l_S, batch, policy)
    else:
        pushed = (batch.policy_w_S * surrogate(l_S, old_S, entropy_S, batch, policy)).sum()
    g_S = l_S
    if likelihood.rule != "nll":
        g_S = terms(l_S, old_S, batch.ref_S, batch.sequence_S, batch.likelihood_w_S != 0, likelihood)
    out = {"policy": -pushed, "likelihood": -(batch.likelihood_w_S * g_S).sum()}
    if batch.ref_S is not None and bool(batch.kl_w_S.any()):
        out["kl"] = (batch.kl_w_S * kl_penalty(l_S, batch.ref_S, kl.estimator, kl.clamp)).sum()
        out["policy"] = out["policy"] + out["kl"]
    if entropy_S is not None and policy.entropy:
        out["entropy"] = (batch.entropy_w_S * entropy_S).sum()
        out["policy"] = out["policy"] - out["entropy"]
    return out


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


@dataclass(frozen=True)
class Sequences:
    """What a loss of whole sequences may look at, [N]: sums over the tokens of a sequence, and how many they are."""

    l: Tensor
    size: Tensor
    ref: Tensor | None  # None unless the word says that it is needed


@dataclass(frozen=True)
class Compared:
    """``r`` [N]: what sequences are compared by; ``weight``: of a comparison; ``gain`` [N]: what the preferred one adds."""

    r: Tensor
    weight: float
    gain: Tensor


NEAR_ONE = 2.0**-24  # log of the largest float32 below 1, times -1: odds of a probability of 1 are infinite


def log_odds(mean_N: Tensor) -> Tensor:
    """log(p / (1 - p)) with log p = the mean of a sequence's log-probs (ORPO, arXiv 2403.07691, eqs. 3 and 4).

    Log p is at most -2^-24, with no gradient beyond. The derivative is 1 / (1 - p)."""
    m_N = mean_N.clamp(max=-NEAR_ONE)
    return m_N - torch.log(-torch.expm1(m_N))


def _implicit(s: Sequences, policy: PolicyStream) -> Compared:
    if s.ref is None:
        raise ValueError(f"policy.loss={policy.loss} needs log-probs under the reference")
    return Compared(policy.beta * (s.l - s.ref), 1.0, torch.zeros_like(s.l))


def _odds(s: Sequences, policy: PolicyStream) -> Compared:
    mean = s.l / s.size
    return Compared(log_odds(mean), policy.beta, mean)


SEQUENCES: Mapping[words.LossName, Callable[[Sequences, PolicyStream], Compared]] = {
    "dpo": _implicit,
    "una": _implicit,
    "orpo": _odds,
}


def sequence_loss(l_S: Tensor, batch: PackedBatch, policy: PolicyStream) -> Tensor:
    """sum over pairs of (w + w') * -log sigmoid(r - r')   (DPO, arXiv 2305.18290, eq. 7; UNA on pairs)
    or of (w + w') * (-mean_t l_t of the preferred - beta log sigmoid(r - r')), r the log odds (ORPO, arXiv 2403.07691, eq. 6)
    + sum over scored sequences of w * (sigmoid(r) - s)^2    (UNA, arXiv 2408.15339; UFT of 2410.21438 with s = 1).

    w: 1 / (number of sequences in the optimizer batch), so pairs count as the two sequences that they are.
    e on every token of a scored sequence: -2 (sigmoid(r) - s) sigmoid(r) (1 - sigmoid(r)) beta w.
    """
    on_S = batch.policy_w_S != 0
    if not bool(on_S.any()):
        return l_S.sum() * 0.0
    _, owner = cast("tuple[Tensor, Tensor]", batch.sequence_S[on_S].unique(return_inverse=True))  # pyright: ignore[reportUnknownMemberType]
    n = int(owner.max()) + 1

    def summed(x: Tensor) -> Tensor:
        return x.new_zeros(n).index_add(0, owner, x)

    l = l_S.double()[on_S]
    ref_N = None if batch.ref_S is None else summed(batch.ref_S.double()[on_S])
    found = SEQUENCES[policy.loss](Sequences(summed(l), summed(torch.ones_like(l)), ref_N), policy)
    r_N = found.r
    first_N = torch.full((n,), len(owner), device=owner.device).scatter_reduce(
        0, owner, torch.arange(len(owner), device=owner.device), "amin"
    )
    w_N, sign_N, label_N = (x[on_S][first_N] for x in (batch.policy_w_S, batch.advantage_S, batch.label_S))
    pair_N, item_N = batch.pair_S[on_S][first_N], batch.item_S[on_S][first_N]
    key_N = item_N * (int(pair_N.max()) + 2) + pair_N  # one number a pair of an item
    better, other = ((pair_N >= 0) & (side * sign_N > 0) for side in (1, -1))
    up, down = (torch.nonzero(s)[:, 0][torch.argsort(key_N[s])] for s in (better, other))
    paired = ((w_N[up] + w_N[down]) * (found.weight * softplus(r_N[down] - r_N[up]) - found.gain[up])).sum()
    scored = ~label_N.isnan()
    return paired + (w_N[scored] * (torch.sigmoid(r_N[scored]) - label_N[scored]).square()).sum()
