"""A group that is larger than the token budget becomes several: the same prefix, each with some of its members.

The weights of an update are counted before (1/Z over the whole optimizer batch), so losses and gradients of the parts add up
to those of the group; the price is the prefix, which every part computes again. What belongs together stays together: the
hint and the demonstration behind it are one sequence, a preferred and a rejected answer are compared with each other, and
changes of the inputs are drawn for a whole group. Completions meet each other in their advantages alone, which are fixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from unift.config import needs
from unift.config.sections import Rules
from unift.model.packs import DEMO, Item, ItemWeights, carrying


@dataclass(frozen=True)
class Part:
    """Members ``members`` (indices) of group ``source`` as an item of its own; a group that fits is its only part."""

    item: Item
    weights: ItemWeights | None
    source: int
    members: Sequence[int]


def divide(items: Sequence[Item], weights: Sequence[ItemWeights] | None, rules: Rules) -> list[Part]:
    """Parts of all groups, in their order; each forwards at most train.token_budget tokens, or what cannot be divided.

    ``weights`` of the items; None: every completion is to be measured, whether it can move the policy or not.
    """
    parts: list[Part] = []
    for i, item in enumerate(items):
        own = None if weights is None else weights[i]
        if item.tokens_forwarded <= rules.train.token_budget:
            parts.append(Part(item, own, i, range(len(item.members))))
        else:
            parts += _parts(item, own, i, rules)
    return parts


def _parts(item: Item, weights: ItemWeights | None, source: int, rules: Rules) -> list[Part]:
    left = list(range(len(item.members)))
    if weights is not None:
        kept = dict(carrying(item, rules))
        item, left = replace(item, members=[kept.get(j, m) for j, m in enumerate(item.members)]), list(kept)
    room = rules.train.token_budget - len(item.prompt) - len(item.hint)
    bins = _filled(item, _units(item, left, rules), room) or [[]]
    # The hint's own loss is counted once, in the part with the demonstration that continues it.
    first = next((n for n, own in enumerate(bins) if any(item.members[j].role == DEMO for j in own)), 0)
    bins.insert(0, bins.pop(first))
    alone = len(bins) == 1
    return [_part(item, weights, source, sorted(own), alone or n == 0, alone) for n, own in enumerate(bins)]


def _units(item: Item, left: Sequence[int], rules: Rules) -> list[list[int]]:
    """Members that no part may hold without each other."""
    if needs.changed_inputs(rules):
        return [list(left)] if left else []
    likelihood = rules.likelihood.tokens != "none"
    units: dict[tuple[str, int], list[int]] = {}
    for j in left:
        m = item.members[j]
        key = ("solution", 0) if m.role == DEMO and likelihood else ("pair", m.pair) if m.pair >= 0 else ("member", j)
        units.setdefault(key, []).append(j)
    return list(units.values())


def _filled(item: Item, units: Sequence[Sequence[int]], room: int) -> list[list[int]]:
    """Units -> parts, the longest first, each into the first part that has room for it."""
    sizes = [sum(len(item.members[j].tokens) - 1 for j in unit) for unit in units]
    bins: list[tuple[int, list[int]]] = []
    for n in sorted(range(len(units)), key=lambda n: (-sizes[n], n)):
        place = next((b for b, (used, _) in enumerate(bins) if used + sizes[n] <= room), None)
        if place is None:
            bins.append((sizes[n], list(units[n])))
        else:
            bins[place] = bins[place][0] + sizes[n], [*bins[place][1], *units[n]]
    return [own for _, own in bins]


def _part(item: Item, weights: ItemWeights | None, source: int, members: list[int], hinted: bool, whole: bool) -> Part:
    made = replace(item, members=[item.members[j] for j in members], part=not whole)
    if not hinted:
        made = replace(made, prompt=item.prompt + item.hint, hint=[])
    if weights is None:
        return Part(made, None, source, members)
    policy, own, entropy = ([values[j] for j in members] for values in (weights.policy, weights.own, weights.entropy))
    return Part(made, replace(weights, policy=policy, own=own, entropy=entropy), source, members)
