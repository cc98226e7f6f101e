"""Rules of the likelihood stream: what takes the place of log pi. The loss is - sum_t w_t g(l_t), so e_t = w_t g'(l_t).

Weights are detached: only `ratio`, `shaped` and `tail` differentiate more than ``l``. Golden values: methods.md section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unift.settings import Likelihood


def probability(l_S: Tensor) -> Tensor:
    """DFT, arXiv 2508.05629 eq. 9: sg(pi) l, the SFT gradient without its 1/pi. e = pi."""
    return l_S.detach().exp() * l_S


def uncertainty(l_S: Tensor) -> Tensor:
    """CHORD's phi, arXiv 2508.11408: sg(pi (1 - pi)) l; largest at pi = 1/2. e = pi (1 - pi)."""
    p_S = l_S.detach().exp()
    return p_S * (1 - p_S) * l_S


def trust(l_S: Tensor, threshold: float) -> Tensor:
    """TrSFT of TRAPO, arXiv 2512.17636: NLL above the threshold alpha, linear in pi below. e = pi / max(pi, alpha)."""
    p_S = l_S.detach().exp()
    return p_S / p_S.clamp(min=threshold) * l_S


def shaped(l_S: Tensor, threshold: float) -> Tensor:
    """LUFFY's shaping, arXiv 2504.14945: pi / (pi + gamma). e = gamma pi / (pi + gamma)^2, largest at pi = gamma."""
    p_S = l_S.exp()
    return p_S / (p_S + threshold)


def ratio(l_S: Tensor, old_S: Tensor, clip: float) -> Tensor:
    """PSFT, arXiv 2508.17784: min(rho, 1 + clip) with rho = pi / pi_old; PPO's surrogate at A = 1. e = rho or 0."""
    return torch.exp(l_S - old_S).clamp(max=1 + clip)


def importance(l_S: Tensor, ref_S: Tensor, sequence_S: Tensor, scope: str, clip: float) -> Tensor:
    """iw-SFT, arXiv 2507.12856: sg(min(exp(d), clip)) l, d = l - l_ref of the token, or its mean over the sequence."""
    d_S = (l_S - ref_S).detach()
    if scope == "sequence":
        d_S = sequence_mean(d_S, sequence_S)
    return d_S.exp().clamp(max=clip) * l_S


def divergence(l_S: Tensor, ref_S: Tensor | None, rule: str, beta: float) -> Tensor:
    """phi(x) of the implicit reward x = beta (l - l_ref) (after arXiv 2507.00018; see docs/methods/sft-pearson.md).

    total_variation: x, so e = beta whatever the reference: SFT. pearson: x - x^2/4, constant from x = 2 on;
    e = beta (1 - x/2). hellinger: x / (1 + x), continued by its tangent below x = -1/2; e = beta / (1 + x)^2.
    """
    if rule == "total_variation":
        return beta * l_S
    assert ref_S is not None
    x_S = beta * (l_S - ref_S)
    if rule == "pearson":
        y_S = x_S.clamp(max=2)
        return y_S - y_S.square() / 4
    y_S = x_S.clamp(min=-0.5)
    return y_S / (1 + y_S) + 4 * (x_S - y_S)


def tail(l_S: Tensor, sequence_S: Tensor, gamma: float) -> Tensor:
    """IFT, arXiv 2405.11870, as in its code: each token's loss times the discounted sum of the losses from it on.

        c = -l,  w_t = sum_{i >= t} gamma^(i-t) c_i / n, scaled so that sum_t w_t = n;  g_t = - w_t c_t

    Differentiated through w: with that, later tokens, which stand in more of the sums, pull harder, as in eq. 21.
    gamma = 0 is SFT by definition (w = 1). A sequence without any loss keeps w = 1.
    """
    if gamma == 0 or not len(l_S):
        return l_S
    order = torch.argsort(sequence_S, stable=True)
    counts: list[int] = [n for n in torch.bincount(sequence_S).tolist() if n]
    parts: list[Tensor] = []
    for c in torch.split(-l_S[order], counts):
        n = len(c)
        i = torch.arange(n, device=c.device, dtype=c.dtype)
        decay_NN = torch.triu(gamma ** (i[None] - i[:, None]).clamp(min=0))
        w = decay_NN @ c / n
        total = w.sum()
        parts.append(-(n * w / total) * c if float(total.detach()) > 0 else -c)
    out = torch.empty_like(l_S)
    return out.index_copy(0, order, torch.cat(parts))


def sequence_sum(x_S: Tensor, sequence_S: Tensor) -> Tensor:
    """Sum over each sequence, one entry a sequence number."""
    n = int(sequence_S.max()) + 1 if len(sequence_S) else 0
    return x_S.new_zeros(n).index_add(0, sequence_S, x_S)


def sequence_mean(x_S: Tensor, sequence_S: Tensor) -> Tensor:
    """Mean over its sequence, at every token."""
    count = sequence_sum(torch.ones_like(x_S), sequence_S)
    return (sequence_sum(x_S, sequence_S) / count.clamp(min=1))[sequence_S]


def terms(
    l_S: Tensor, old_S: Tensor, ref_S: Tensor | None, sequence_S: Tensor, on_S: Tensor, settings: Likelihood
) -> Tensor:
    """g(l) of every token. ``on_S``: tokens that carry a weight; others (completions) get 0 and do not count in means."""
    rule = settings.rule
    if rule == "nll":
        return l_S
    if ref_S is None and rule in ("importance", "pearson", "hellinger"):
        raise ValueError(f"likelihood.rule={rule} needs log-probs under the reference")
    l, old, sequence = l_S[on_S], old_S[on_S], sequence_S[on_S]
    ref = None if ref_S is None else ref_S[on_S]
    if rule == "probability":
        g = probability(l)
    elif rule == "uncertainty":
        g = uncertainty(l)
    elif rule == "trust":
        g = trust(l, settings.threshold)
    elif rule == "shaped":
        g = shaped(l, settings.threshold)
    elif rule == "ratio":
        g = ratio(l, old, settings.clip)
    elif rule == "importance":
        assert ref is not None
        g = importance(l, ref, sequence, settings.scope, settings.clip)
    elif rule == "tail":
        g = tail(l, sequence, settings.gamma)
    else:
        g = divergence(l, ref, rule, settings.beta)
    return torch.zeros_like(l_S, dtype=g.dtype).masked_scatter(on_S, g)
