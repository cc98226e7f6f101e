"""Discriminative fine-tuning: the solution against what the model began with would have said (arXiv 2502.18679).

    L_i = - s(y_i) + tau log E_{y' ~ P0}[exp(s(y') / tau) / P0(y')]

s is the log-prob of a sequence under the policy: its sum over the tokens, or its mean. The mean has no density to divide by:
there the expectation is of exp(s / tau) alone. The expectation of a row is estimated over time by one number u_i, its
logarithm, which is kept with the run. Given u, the gradient is a plain sum: +1 on the solution's s, minus a detached weight
on each negative's. So this is a credit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import replace

import numpy as np

from unift.config import words
from unift.config.sections import Rules
from unift.credit.returns import Tokens
from unift.model.packs import COMPLETION, DEMO, Item

SEQUENCE_LOGPS: Mapping[words.SequenceLogpName, Callable[[Sequence[float]], float]] = {
    "sum": lambda l_N: float(np.sum(l_N)),
    "mean": lambda l_N: float(np.mean(l_N)),
}


def advance(
    u: float, s_J: Sequence[float], logp0_J: Sequence[float], tau: float, momentum: float
) -> tuple[float, list[float]]:
    """(new u, weights of the negatives), of the exponents x_j = s_j / tau - log P0_j; log P0 is 0 where s is a mean.

    u <- log((1 - momentum) e^u + momentum mean_j e^x_j),  weight_j = exp(x_j - u) / J. All in log space.
    """
    x = np.asarray(s_J, dtype=np.float64) / tau - np.asarray(logp0_J)
    newest = float(np.logaddexp.reduce(x)) - np.log(len(x)) + np.log(momentum)
    u = newest if momentum == 1 else float(np.logaddexp(np.log1p(-momentum) + u, newest))
    return u, (np.exp(x - u) / len(x)).tolist()


def spread(items: Sequence[Item], rules: Rules, l: Tokens, state: MutableMapping[str, float]) -> list[Item]:
    """Items whose solution has credit 1 and whose negatives have minus their weight, both times the number of sequences
    of the item: a mean over sequences is then the paper's mean over rows.

    ``l``: log-probs of the completions' tokens under the policy. log P0 is their log-prob under the sampler, which is the
    model that the phase began with, at temperature 1. ``state``: u by row id, moved on here.
    """
    c, out = rules.credit, []
    of_sequence, divided = SEQUENCE_LOGPS[c.sequence_logp], words.SEQUENCE_LOGPS[c.sequence_logp].density
    for i, item in enumerate(items):
        negatives = [j for j, m in enumerate(item.members) if m.role == COMPLETION]
        if not negatives:
            out.append(replace(item, members=[replace(m, advantage=1.0) for m in item.members]))
            continue
        row = str(item.address[-1])
        logp0_J = [float(np.sum(item.members[j].logps or [])) if divided else 0.0 for j in negatives]
        s_J = [of_sequence(l[i][j]) for j in negatives]
        state[row], weights = advance(state.get(row, 0.0), s_J, logp0_J, c.tau, c.momentum)
        size, members = len(negatives) + 1, list(item.members)
        for j, w in zip(negatives, weights, strict=True):
            members[j] = replace(members[j], advantage=-size * w)
        out.append(replace(item, members=[replace(m, advantage=float(size)) if m.role == DEMO else m for m in members]))
    return out
