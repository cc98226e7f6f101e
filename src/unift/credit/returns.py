"""Credit that spreads over the tokens of a completion or over the whole batch: a KL in the reward, a critic, whitening.

Group statistics are in ``advantages.py``. What comes out is an advantage for each token, fixed before anything is packed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from unift import processes
from unift.config.sections import Rules
from unift.config.words import BASELINES, INTOS
from unift.credit.advantages import advantages
from unift.model.divide import Part, divide
from unift.model.packs import COMPLETION, DEMO, Item, PackedBatch, cut, pack

Tokens = list[list[list[float]]]  # item, member, sampled token


def kl_in_reward(rules: Rules) -> float:
    """Weight of the KL that is taken off each token's reward; 0 where it is a term of the loss."""
    return rules.reference.kl if INTOS[rules.reference.into].reward else 0.0


def active(rules: Rules) -> bool:
    word = BASELINES[rules.credit.baseline]
    spreads = rules.credit.whiten or word.critic or word.solution or kl_in_reward(rules) != 0
    return rules.sample.completions > 0 and spreads


def gae(rewards_N: Sequence[float] | np.ndarray, values_N: Sequence[float], gamma: float, lam: float) -> np.ndarray:
    """Generalised advantages (arXiv 1506.02438, eq. 16): delta_t = r_t + gamma V_{t+1} - V_t, V = 0 after the end,
    A_t = sum_k (gamma lam)^k delta_{t+k}. The return of a token is A_t + V_t."""
    r, v = np.asarray(rewards_N, dtype=np.float64), np.asarray(values_N, dtype=np.float64)
    delta = r + gamma * np.append(v[1:], 0.0) - v
    out, tail = np.zeros_like(delta), 0.0
    for t in range(len(delta) - 1, -1, -1):
        tail = delta[t] + gamma * lam * tail
        out[t] = tail
    return out


def whitened(values: Sequence[np.ndarray], epsilon: float) -> list[np.ndarray]:
    """Mean 0 and std 1 (of a sample, n - 1, as in verl) over all tokens (REINFORCE++, arXiv 2501.03262; ReFT). All equal:
    exactly 0."""
    flat = np.concatenate(list(values)) if values else np.zeros(0)
    if not flat.size or (flat == flat[0]).all():
        return [np.zeros_like(v) for v in values]
    return [(v - flat.mean()) / (flat.std(ddof=1) + epsilon) for v in values]


def measured(
    of: Callable[[PackedBatch], Tensor], items: Sequence[Item], rules: Rules, everywhere: bool = False
) -> Tokens:
    """``of`` (log-probs, values: one number a loss position) at every sampled token of every completion, no gradient.

    Each process measures its share, and all get the whole. ``everywhere``: each measures all, as it must where a pass is one of
    all processes (sharded weights).
    """
    parts = divide(items, None, rules)
    costs = [p.item.tokens_forwarded for p in parts]
    own = [parts[i] for i in (range(len(parts)) if everywhere else sorted(processes.balanced_share(costs)))]
    found = _measured(of, own, rules)
    out: Tokens = [[[] for _ in item.members] for item in items]
    for share in [found] if everywhere else processes.gather("what credit measures", found):
        for (i, j), values in share.items():
            out[i][j] = values
    return out


def _measured(
    of: Callable[[PackedBatch], Tensor], parts: Sequence[Part], rules: Rules
) -> dict[tuple[int, int], list[float]]:
    """By item and member, of these parts."""
    out: dict[tuple[int, int], list[float]] = {}
    divided = [p.item for p in parts]
    for which in cut(divided, rules.train.token_budget, rules):
        batch = pack(divided, which, None, rules)
        if batch is None:
            continue
        with torch.no_grad():
            values = of(batch).double().tolist()
        rows = zip(values, batch.role_S.tolist(), batch.item_S.tolist(), batch.member_S.tolist(), strict=True)
        for value, role, b, j in rows:
            if role == COMPLETION:
                part = parts[which[b]]
                out.setdefault((part.source, part.members[j]), []).append(value)
    return out


def spread(
    items: Sequence[Item],
    scores: Sequence[Sequence[float]],
    rules: Rules,
    ref: Tokens | None = None,
    values: Tokens | None = None,
) -> list[Item]:
    """Items with their token credit. ``scores[i]``: of the completions of item i, in order.

    With beta = reference.kl and d_t = l_t - l_ref,t under the sampling policy (k1), where the KL goes into the reward:
      group baselines: the score of a completion is r - beta sum_t d_t (RLOO, arXiv 2402.14740), beside a demonstration's 1;
      none:            A_t = r - beta sum_{k >= t} d_k (REINFORCE++);
      critic:          r_t = -beta d_t, plus r on the last token, then GAE (ReFT, arXiv 2401.08967).
    Then whitening over all tokens of the step, where asked for.
    """
    c, beta, word = rules.credit, kl_in_reward(rules), BASELINES[rules.credit.baseline]
    members = [list(item.members) for item in items]
    places: list[tuple[int, int]] = []
    credits: list[np.ndarray] = []
    returns: list[list[float] | None] = []
    for i, item in enumerate(items):
        own = [(j, m) for j, m in enumerate(item.members) if m.role == COMPLETION]
        if not own:  # nothing was scored, or a gate gave the completions up for the solution
            continue
        drift = [np.zeros(len(m.tokens) - m.given) for _, m in own]
        if beta and ref is not None:
            drift = [np.asarray(m.logps) - np.asarray(ref[i][j]) for j, m in own]
        grouped = None
        if word.grouped:
            total = [r - beta * float(d.sum()) for r, d in zip(scores[i], drift, strict=True)]
            demo = next((j for j, m in enumerate(item.members) if m.role == DEMO and rules.sample.demonstration), None)
            grouped = advantages(total if demo is None else [*total, 1.0], c)
            if demo is not None:
                members[i][demo] = replace(members[i][demo], advantage=grouped[-1])
        for n, (j, _) in enumerate(own):
            places.append((i, j))
            back: list[float] | None = None
            if word.critic:
                assert values is not None
                reward = -beta * drift[n]
                reward[-1] += scores[i][n]
                a = gae(reward, values[i][j], c.gamma, c.lam)
                back = (a + np.asarray(values[i][j])).tolist()
            elif grouped is not None:
                a = np.full(len(drift[n]), grouped[n])
            else:
                a = scores[i][n] - beta * drift[n][::-1].cumsum()[::-1]
            credits.append(a)
            returns.append(back)
    if c.whiten:
        credits = whitened(credits, c.epsilon)
    for (i, j), a, back in zip(places, credits, returns, strict=True):
        old = values[i][j] if values is not None else None
        members[i][j] = replace(members[i][j], advantage=a.tolist(), returns=back, values=old)
    return [replace(item, members=m) for item, m in zip(items, members, strict=True)]
