"""Discriminative fine-tuning: the solution against what the model began with would have said (arXiv 2502.18679).

    L_i = - s(y_i) + tau log E_{y' ~ P0}[exp(s(y') / tau) / P0(y')]

The expectation of a row is estimated over time by one number u_i, its logarithm, which is kept with the run. Given u, the
gradient is a plain sum: +1 on the solution's score, minus a detached weight on each negative's. So this is a credit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import replace

import numpy as np

from unift.config.sections import Rules
from unift.config.words import ScoreName
from unift.credit.returns import Tokens
from unift.model.packs import COMPLETION, DEMO, Item


def score(l_N: Sequence[float], ref_N: Sequence[float] | None, kind: ScoreName) -> float:
    """s of a sequence: sum of l - l_ref (ratio), or mean of l (mean; no reference)."""
    return SCORES[kind](l_N, ref_N)


def _ratio(l_N: Sequence[float], ref_N: Sequence[float] | None) -> float:
    if ref_N is None:
        raise ValueError("credit.score=ratio needs log-probs under the reference")
    return float(np.sum(l_N) - np.sum(ref_N))


SCORES: Mapping[ScoreName, Callable[[Sequence[float], Sequence[float] | None], float]] = {
    "ratio": _ratio,
    "mean": lambda l_N, ref_N: float(np.mean(l_N)),
}


def advance(
    u: float, s_J: Sequence[float], logp0_J: Sequence[float], tau: float, momentum: float
) -> tuple[float, list[float]]:
    """(new u, weights of the negatives): u <- log((1 - momentum) e^u + momentum mean_j exp(s_j / tau - log P0_j)),
    weight_j = exp(s_j / tau - log P0_j - u) / J. All in log space."""
    x_J = np.asarray(s_J) / tau - np.asarray(logp0_J)
    newest = float(np.logaddexp.reduce(x_J)) - np.log(len(x_J)) + np.log(momentum)
    u = newest if momentum == 1 else float(np.logaddexp(np.log1p(-momentum) + u, newest))
    return u, (np.exp(x_J - u) / len(x_J)).tolist()


def spread(
    items: Sequence[Item], rules: Rules, l: Tokens, ref: Tokens | None, state: MutableMapping[str, float]
) -> list[Item]:
    """Items whose solution has credit 1 and whose negatives have minus their weight, both times the number of sequences
    of the item: a mean over sequences is then the paper's mean over rows. ``state``: u by row id, moved on here."""
    c, out = rules.credit, []
    for i, item in enumerate(items):
        negatives = [j for j, m in enumerate(item.members) if m.role == COMPLETION]
        if not negatives:
            out.append(replace(item, members=[replace(m, advantage=1.0) for m in item.members]))
            continue
        row = str(item.address[-1])
        s_J = [score(l[i][j], ref[i][j] if ref is not None else None, c.score) for j in negatives]
        logp0_J = [float(np.sum(item.members[j].logps or [])) for j in negatives]
        state[row], weights = advance(state.get(row, 0.0), s_J, logp0_J, c.tau, c.momentum)
        size, members = len(negatives) + 1, list(item.members)
        for j, w in zip(negatives, weights, strict=True):
            members[j] = replace(members[j], advantage=-size * w)
        out.append(replace(item, members=[replace(m, advantage=float(size)) if m.role == DEMO else m for m in members]))
    return out
