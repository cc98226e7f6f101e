"""Who takes part: the completions of a group, its demonstration, what is supervised, and pairs of members that are compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from unift import rng
from unift.config import needs, words
from unift.config.sections import Rules, SampleFrom
from unift.config.words import LossName
from unift.model.packs import COMPLETION, DEMO, OWN, Item, Member, hint_of
from unift.rows.tokens import Encoded
from unift.types import ConfigError, Group, Score


def items_of(
    groups: Sequence[Group],
    advantages: Sequence[Sequence[float]],
    demos: Sequence[list[int]] | None,
    rules: Rules | None = None,
    address: tuple[object, ...] = (),
) -> list[Item]:
    """Groups with their advantages (aligned with ``group.samples``, then the demonstration where it is a member).

    ``demos``: whole solutions, where they carry a loss. ``rules``: who takes part (gate, own completions); None: all. A group
    whose row has no solution is its completions: no demonstration, and no gate that would trade them for one.
    """
    items: list[Item] = []
    for i, group in enumerate(groups):
        own_a = advantages[i][: len(group.samples)]
        samples = [(s, a) for s, a in zip(group.samples, own_a, strict=True) if s.tokens and s.score is not None]
        gate, own, push, as_member = None, None, True, False
        waits, weighed = False, True
        if rules is not None:
            weighed = rules.likelihood.weight > 0  # which a schedule may bring to 0
            gate, waits = rules.likelihood.gate if group.solved else None, rules.likelihood.buffer > 0
            own = rules.likelihood.keep if words.TOKENS[rules.likelihood.tokens].own else None
            push, as_member = words.LOSSES[rules.policy.loss].pushes, rules.sample.demonstration
        failed = gate is not None and fails(group, gate)
        supervised = gate is None or (failed and not waits)
        members: list[Member] = []
        if push and (not failed or waits):
            members = [Member(s.tokens, COMPLETION, a, s.logps, s.given) for s, a in samples]
        elif supervised and rules is not None and needs.own_hints(rules):
            members = [hint_of(s.tokens, s.given) for s, _ in samples if s.given]
        if own is not None and weighed:
            members += [Member(tokens, OWN) for tokens in chosen(group, own)]
        if demos is not None and group.solved and ((supervised and weighed) or as_member):
            a = advantages[i][len(group.samples)] if as_member else 0.0
            members.append(Member(demos[i][len(group.hint) :], DEMO, a))
        items.append(Item(group.prompt, group.hint, members, supervised, (*address, group.row_id)))
    return items


def cut_short(sample: SampleFrom, seed: int, step: int, row_id: str) -> bool:
    """Are only the first tokens of this row's completions wanted? A draw of (seed, step, row): the share ``full`` is not."""
    return sample.first is not None and float(rng.uniforms("full", seed, step, row_id, shape=1)[0]) >= sample.full


def first_steps(
    items: Sequence[Item],
    groups: Sequence[Group],
    encoded: Sequence[Encoded],
    rules: Rules,
    stops: Collection[int],
    address: tuple[int, int],
) -> list[Item]:
    """Items of which only the first tokens were wanted, as the planning mode of UPFT trains them (arXiv 2503.02875): the
    prompt asks for a first step (``encoded``: the groups' rows), and what ends the row's solution ends it too, unless one of
    the tokens ``stops`` does."""
    out: list[Item] = []
    for item, group, row in zip(items, groups, encoded, strict=True):
        if not cut_short(rules.sample, *address, group.row_id):
            out.append(item)
            continue
        ended = [
            replace(m, tokens=[*m.tokens, row.solution[-1]])
            if m.role == OWN and rules.sample.first_eos and m.tokens[-1] not in stops
            else m
            for m in item.members
        ]
        out.append(replace(item, prompt=row.instructed or item.prompt, members=ended))
    return out


def success_rate(group: Group) -> float:
    """Share of right completions among the scored ones; 0 without any."""
    right = [s.score.right for s in group.samples if s.score is not None]
    return sum(right) / len(right) if right else 0.0


def fails(group: Group, gate: float) -> bool:
    """At most the share ``gate`` of its completions is right. A group of which nothing could be scored is not known to."""
    return any(s.score is not None for s in group.samples) and success_rate(group) <= gate


def chosen(group: Group, which: words.KeepName) -> list[list[int]]:
    """Own completions that are supervised: ``all``, the ``right`` ones without repeats, or the first of those."""
    scored = [s for s in group.samples if s.tokens and s.score is not None]
    right = list(dict.fromkeys(tuple(s.tokens) for s in scored if s.score is not None and s.score.right))
    return [list(tokens) for tokens in KEEPS[which]([tuple(s.tokens) for s in scored], right)]


Texts = list[tuple[int, ...]]
KEEPS: Mapping[words.KeepName, Callable[[Texts, Texts], Texts]] = {  # (all, right ones without repeats) -> those kept
    "all": lambda everything, right: everything,
    "right": lambda everything, right: right,
    "one_right": lambda everything, right: right[:1],
}


def labelled(items: Sequence[Item], labels: Sequence[float | None]) -> list[Item]:
    """Items whose solution has the score of its row, where the row has one."""

    def of(m: Member, label: float | None) -> Member:
        return replace(m, label=label) if m.role == DEMO and label is not None else m

    return [
        replace(item, members=[of(m, label) for m in item.members]) for item, label in zip(items, labels, strict=True)
    ]


def paired(
    items: Sequence[Item], groups: Sequence[Group], rules: Rules, rejected: Sequence[list[int] | None]
) -> list[Item]:
    """Items whose members are pairs or carry scores. ``rejected[i]``: tokens of the row's rejected answer, if it has one.

    dpo, orpo: preferred are the solution (where it is a member) and right completions, rejected are the row's rejected answer
    and wrong completions, both without repeats; the n-th of one with the n-th of the other. What is left over is dropped.
    una: the solution with the row's rejected answer is a pair; without one it has its row's score, or 1; completions have their
    scores.
    """
    make = PAIRS[rules.policy.loss]
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
        members += [replace(m, label=1.0) if math.isnan(m.label) else m for m in good]
    good = [replace(m, label=math.nan) for m in good]  # of a pair, which is compared and not scored
    return members, good, worse


# (solutions, rejected answers, scored completions) -> (members with a label, preferred, rejected)
PAIRS: Mapping[LossName, Callable[[Members, Members, Scored, str], tuple[Members, Members, Members]]] = {
    "dpo": _dpo,
    "orpo": _dpo,
    "una": _una,
}


def _distinct(members: Sequence[Member]) -> list[Member]:
    first: dict[tuple[int, ...], Member] = {}
    for m in members:
        first.setdefault(tuple(m.tokens), m)
    return list(first.values())
