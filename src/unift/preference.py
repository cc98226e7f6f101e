"""Losses of whole sequences on the implicit reward r = beta sum_t (l_t - l_ref,t): pairs (DPO) and scores (UNA).

A pair or a score needs only numbers of its own sequences, so these are sums over items like every other loss here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import softplus

from unift.config import PolicyStream, Rules
from unift.packs import COMPLETION, DEMO, Item, Member, PackedBatch
from unift.types import ConfigError, Group, Score
from unift.words import LossName


def label(
    items: Sequence[Item], groups: Sequence[Group], rules: Rules, rejected: Sequence[list[int] | None]
) -> list[Item]:
    """Items whose members are pairs or carry scores. ``rejected[i]``: tokens of the row's rejected answer, if it has one.

    dpo: preferred are the solution (where it is a member) and right completions, rejected are the row's rejected answer
    and wrong completions, both without repeats; the n-th of one with the n-th of the other. What is left over is dropped.
    una: the solution with the row's rejected answer is a pair; without one it has score 1; completions have their scores.
    """
    make = LOSSES[rules.policy.loss]
    out: list[Item] = []
    for item, group, bad in zip(items, groups, rejected, strict=True):
        scored = [s.score for s in group.samples if s.tokens and s.score is not None]
        own = list(zip((m for m in item.members if m.role == COMPLETION), scored, strict=True))
        good = [m for m in item.members if m.role == DEMO]
        worse = [Member(bad[len(item.hint) :], DEMO)] if bad is not None else []
        members, good, worse = make(good, worse, own, group.row_id)
        for n, (better, other) in enumerate(zip(good, worse, strict=False)):
            members += [replace(better, pair=n, advantage=1.0), replace(other, pair=n, advantage=-1.0)]
        out.append(replace(item, members=members))
    return out


Members = list[Member]
Scored = list[tuple[Member, Score]]


def _dpo(good: Members, worse: Members, own: Scored, row: str) -> tuple[Members, Members, Members]:
    right, wrong = [m for m, s in own if s.right], [m for m, s in own if not s.right]
    return [], good + _distinct(right), worse + _distinct(wrong)


def _una(good: Members, worse: Members, own: Scored, row: str) -> tuple[Members, Members, Members]:
    for _, s in own:
        if not 0 <= s.value <= 1:
            raise ConfigError(f"policy.loss=una needs scores from 0 to 1, found {s.value:g} (row {row})")
    members = [replace(m, label=s.value) for m, s in own]
    if not worse:
        members += [replace(m, label=1.0) for m in good]
    return members, good, worse


# (solutions, rejected answers, scored completions) -> (members with a label, preferred, rejected)
LOSSES: Mapping[LossName, Callable[[Members, Members, Scored, str], tuple[Members, Members, Members]]] = {
    "dpo": _dpo,
    "una": _una,
}


def _distinct(members: Sequence[Member]) -> list[Member]:
    first: dict[tuple[int, ...], Member] = {}
    for m in members:
        first.setdefault(tuple(m.tokens), m)
    return list(first.values())


def loss(l_S: Tensor, batch: PackedBatch, policy: PolicyStream) -> Tensor:
    """sum over pairs of (w + w') * -log sigmoid(r - r')   (DPO, arXiv 2305.18290, eq. 7; UNA on pairs)
    + sum over scored sequences of w * (sigmoid(r) - s)^2    (UNA, arXiv 2408.15339; UFT of 2410.21438 with s = 1).

    w: 1 / (number of sequences in the optimizer batch), so pairs count as the two sequences that they are.
    e on every token of a scored sequence: -2 (sigmoid(r) - s) sigmoid(r) (1 - sigmoid(r)) beta w.
    """
    if batch.ref_S is None:
        raise ValueError(f"policy.loss={policy.loss} needs log-probs under the reference")
    on_S = batch.policy_w_S != 0
    if not bool(on_S.any()):
        return l_S.sum() * 0.0
    _, owner = batch.sequence_S[on_S].unique(return_inverse=True)
    n = int(owner.max()) + 1
    drift = (l_S.double() - batch.ref_S)[on_S]
    r_N = policy.beta * drift.new_zeros(n).index_add(0, owner, drift)
    first_N = torch.full((n,), len(owner), device=owner.device).scatter_reduce(
        0, owner, torch.arange(len(owner), device=owner.device), "amin"
    )
    w_N, sign_N, label_N = (x[on_S][first_N] for x in (batch.policy_w_S, batch.advantage_S, batch.label_S))
    pair_N, item_N = batch.pair_S[on_S][first_N], batch.item_S[on_S][first_N]
    key_N = item_N * (int(pair_N.max()) + 2) + pair_N  # one number a pair of an item
    better, other = ((pair_N >= 0) & (side * sign_N > 0) for side in (1, -1))
    up, down = (torch.nonzero(s)[:, 0][torch.argsort(key_N[s])] for s in (better, other))
    paired = ((w_N[up] + w_N[down]) * softplus(r_N[down] - r_N[up])).sum()
    scored = ~label_N.isnan()
    return paired + (w_N[scored] * (torch.sigmoid(r_N[scored]) - label_N[scored]).square()).sum()
