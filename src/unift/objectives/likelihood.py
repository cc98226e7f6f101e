"""Rules of the likelihood stream: what takes the place of log pi. The loss is - sum_t w_t g(l_t), so e_t = w_t g'(l_t).

Weights are detached: only `ratio`, `shaped` and `tail` differentiate more than ``l``. A rule is a function of RULES under
its word, which ``words.RULES`` describes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from unift.config import words
from unift.config.sections import Likelihood


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


def total_variation(l_S: Tensor, beta: float) -> Tensor:
    """phi(x) = x of the implicit reward x = beta (l - l_ref) (after arXiv 2507.00018; docs/methods/sft-pearson.md): e = beta
    whatever the reference, which is SFT."""
    return beta * l_S


def pearson(l_S: Tensor, ref_S: Tensor, beta: float) -> Tensor:
    """phi(x) = x - x^2/4, constant from x = 2 on; x as in `total_variation`. e = beta (1 - x/2)."""
    y_S = (beta * (l_S - ref_S)).clamp(max=2)
    return y_S - y_S.square() / 4


def hellinger(l_S: Tensor, ref_S: Tensor, beta: float) -> Tensor:
    """phi(x) = x / (1 + x), continued by its tangent below x = -1/2; x as in `total_variation`. e = beta / (1 + x)^2."""
    x_S = beta * (l_S - ref_S)
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


@dataclass(frozen=True)
class Supervised:
    """What a rule may look at: the tokens that carry a weight, [S]. ``ref`` is None unless the word says it is needed."""

    l: Tensor
    old: Tensor  # at the start of the step
    ref: Tensor | None
    sequence: Tensor

    @property
    def drift_base(self) -> Tensor:
        if self.ref is None:
            raise ValueError("this likelihood rule needs log-probs under the reference")
        return self.ref


Function = Callable[[Supervised, Likelihood], Tensor]
RULES: Mapping[words.RuleName, Function] = {
    "nll": lambda t, s: t.l,
    "probability": lambda t, s: probability(t.l),
    "uncertainty": lambda t, s: uncertainty(t.l),
    "trust": lambda t, s: trust(t.l, s.threshold),
    "shaped": lambda t, s: shaped(t.l, s.threshold),
    "ratio": lambda t, s: ratio(t.l, t.old, s.clip),
    "importance": lambda t, s: importance(t.l, t.drift_base, t.sequence, s.scope, s.clip),
    "total_variation": lambda t, s: total_variation(t.l, s.beta),
    "pearson": lambda t, s: pearson(t.l, t.drift_base, s.beta),
    "hellinger": lambda t, s: hellinger(t.l, t.drift_base, s.beta),
    "tail": lambda t, s: tail(t.l, t.sequence, s.gamma),
}


def terms(
    l_S: Tensor, old_S: Tensor, ref_S: Tensor | None, sequence_S: Tensor, on_S: Tensor, settings: Likelihood
) -> Tensor:
    """g(l) of every token. ``on_S``: tokens that carry a weight; others (completions) get 0 and do not count in means."""
    if settings.rule == "nll":  # every token is its own term
        return l_S
    ref = None if ref_S is None else ref_S[on_S]
    g = RULES[settings.rule](Supervised(l_S[on_S], old_S[on_S], ref, sequence_S[on_S]), settings)
    return torch.zeros_like(l_S, dtype=g.dtype).masked_scatter(on_S, g)
