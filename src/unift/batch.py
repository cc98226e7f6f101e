"""Scored groups -> packed tensors. All per-token weights are decided here, so that the loss is data.

Each group is a prefix (prompt + hint, once) and its members: the completions, and the rest of the demonstration where
the whole solution is supervised. The last token of a member is only ever a target, so it is not forwarded.

Shapes: T forwarded tokens, S loss positions (one per supervised token), B groups, G members, P and R padded lengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unift import words
from unift.attention import PackedLayout
from unift.config import Rules
from unift.types import Group

COMPLETION, HINT, DEMO, OWN = 1, 2, 3, 4  # OWN: a sampled completion that is supervised like a demonstration


@dataclass(frozen=True)
class Member:
    tokens: list[int]
    role: int
    advantage: float | list[float] = 0.0  # one for the member, or one a sampled token
    logps: list[float] | None = None  # under the sampler, of the sampled tokens
    given: int = 0  # leading tokens that come from the solution: a hint that this member alone has seen
    pair: int = -1  # members of one item with the same number: preferred (advantage > 0) and rejected
    label: float = math.nan  # score in [0, 1] of a whole sequence (una)
    returns: list[float] | None = None  # what the critic should say at each sampled token,
    values: list[float] | None = None  # and what it said when the completion was sampled


@dataclass(frozen=True)
class Item:
    """One group ready to be packed. ``supervised``: the likelihood stream is on for its hint and demonstration.

    ``address`` names the group for draws that belong to it (noise on its input embeddings).
    """

    prompt: list[int]
    hint: list[int]
    members: list[Member]
    supervised: bool = True
    address: tuple[object, ...] = ()

    @property
    def tokens_forwarded(self) -> int:
        return len(self.prompt) + len(self.hint) + sum(len(m.tokens) - 1 for m in self.members)


@dataclass(frozen=True)
class PackedBatch:
    tokens_T: Tensor
    positions_T: Tensor
    layout: PackedLayout
    at_S: Tensor  # flat index whose hidden state predicts the target
    target_S: Tensor
    role_S: Tensor
    item_S: Tensor  # index of the group inside this pack
    member_S: Tensor  # index of the member inside its group; -1 for the hint
    advantage_S: Tensor
    policy_w_S: Tensor  # 1/Z on completions, 0 elsewhere
    likelihood_w_S: Tensor  # weight/Z on hint or demo, 0 elsewhere
    kl_w_S: Tensor
    entropy_w_S: Tensor
    sampler_S: Tensor  # log-prob under the sampler; NaN where nothing was sampled
    sequence_S: Tensor  # which sequence of this pack; a hint and its demonstration are one
    pair_S: Tensor  # number of a preference pair inside its item; -1: none
    label_S: Tensor
    return_S: Tensor  # NaN without a critic
    value_S: Tensor
    old_S: Tensor | None = None  # log-prob at the start of the step; None: this update is the first, ratio = 1
    ref_S: Tensor | None = None
    delta_TD: Tensor | None = None  # added to the input embeddings
    inputs_fixed: bool = False  # no gradient through the input embeddings

    def to(self, device: Any) -> PackedBatch:
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, layout=self.layout.to(device), **moved)


def items_of(
    groups: Sequence[Group],
    advantages: Sequence[Sequence[float]],
    demos: Sequence[list[int]] | None,
    rules: Rules | None = None,
    address: tuple[object, ...] = (),
) -> list[Item]:
    """Groups with their advantages (aligned with ``group.samples``, then the demonstration where it is a member).

    ``demos``: whole solutions, where they carry a loss. ``rules``: who takes part (gate, own completions); None: all.
    """
    items = []
    for i, group in enumerate(groups):
        own_a = advantages[i][: len(group.samples)]
        samples = [(s, a) for s, a in zip(group.samples, own_a, strict=True) if s.tokens and s.score is not None]
        gate, own, push, as_member = None, None, True, False
        waits = False
        if rules is not None:
            gate, waits = rules.likelihood.gate, rules.likelihood.buffer > 0
            own = rules.likelihood.keep if words.TOKENS[rules.likelihood.tokens].own else None
            push, as_member = words.LOSSES[rules.policy.loss].pushes, rules.sample.demonstration
        failed = gate is not None and fails(group, gate)
        supervised = gate is None or (failed and not waits)
        members = []
        if push and (not failed or waits):
            members = [Member(s.tokens, COMPLETION, a, s.logps, s.given) for s, a in samples]
        if own is not None:
            members += [Member(tokens, OWN) for tokens in kept(group, own)]
        if demos is not None and (supervised or as_member):
            a = advantages[i][len(group.samples)] if as_member else 0.0
            members.append(Member(demos[i][len(group.hint) :], DEMO, a))
        items.append(Item(group.prompt, group.hint, members, supervised, (*address, group.row_id)))
    return items


def success_rate(group: Group) -> float:
    """Share of right completions among the scored ones; 0 without any."""
    right = [s.score.right for s in group.samples if s.score is not None]
    return sum(right) / len(right) if right else 0.0


def fails(group: Group, gate: float) -> bool:
    """At most the share ``gate`` of its completions is right. A group of which nothing could be scored is not known to."""
    return any(s.score is not None for s in group.samples) and success_rate(group) <= gate


def kept(group: Group, which: words.KeepName) -> list[list[int]]:
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


# ---------------------------------------------------------------------------------------------- normalisers


@dataclass(frozen=True)
class Counts:
    """What a normaliser may count, over one optimizer batch. ``items[i]``: tokens of each sequence of item i."""

    items: Sequence[Sequence[int]]
    max_tokens: int
    micro: int | None

    @property
    def sequences(self) -> int:
        return sum(1 for item in self.items for n in item if n)

    @property
    def tokens(self) -> int:
        return sum(map(sum, self.items))


def _alike(of: Callable[[Counts], Callable[[int], float]]) -> Callable[[Counts], list[list[float]]]:
    """A normaliser that looks at a sequence's length and at the counts of the whole batch."""

    def weights(counts: Counts) -> list[list[float]]:
        weight = of(counts)
        return [[weight(n) if n else 0.0 for n in item] for item in counts.items]

    return weights


def _by_microbatch(counts: Counts) -> list[list[float]]:
    """As the official code of UFT: token mean inside each run of ``micro`` items, then the mean over those runs (a run
    without such tokens dilutes)."""
    lengths, micro = counts.items, counts.micro
    if micro is None:
        raise ValueError("norm microbatch_token_mean needs train.micro_prompts")
    runs = [lengths[i : i + micro] for i in range(0, len(lengths), micro)]
    totals = [max(sum(map(sum, run)), 1) for run in runs]
    return [[1.0 / (len(runs) * totals[i // micro])] * len(item) for i, item in enumerate(lengths)]


def _token_mean(counts: Counts) -> Callable[[int], float]:
    tokens = counts.tokens
    return lambda n: 1.0 / tokens


def _token_sum(counts: Counts) -> Callable[[int], float]:
    most = counts.max_tokens
    return lambda n: 1.0 / most


def _sequence_mean(of: Callable[[int, int], int]) -> Callable[[Counts], Callable[[int], float]]:
    """1 / (sequences * of(length, max_tokens))."""

    def begin(counts: Counts) -> Callable[[int], float]:
        sequences, most = counts.sequences, counts.max_tokens
        return lambda n: 1.0 / (sequences * of(n, most))

    return begin


# 1/Z of every token of each sequence, sequences listed per item. Z is counted over all the items of one optimizer batch, so
# the cut into micro-batches cannot matter.
NORMS: Mapping[words.NormName, Callable[[Counts], list[list[float]]]] = {
    "token_mean": _alike(_token_mean),
    "seq_mean_token_mean": _alike(_sequence_mean(lambda n, most: n)),
    "seq_mean_token_sum": _alike(_sequence_mean(lambda n, most: 1)),
    "seq_mean_token_sum_norm": _alike(_sequence_mean(lambda n, most: most)),
    "token_sum_norm": _alike(_token_sum),
    "microbatch_token_mean": _by_microbatch,
}


@dataclass(frozen=True)
class Weights:
    """Per-token weights of every item: ``policy[i][j]`` for member j, ``likelihood[i]`` for hint and demonstration,
    ``own[i][j]`` for a member that is supervised by itself, ``entropy[i]`` for the hint, then every member."""

    policy: list[list[float]]
    likelihood: list[float]
    own: list[list[float]]
    entropy: list[list[float]]


def _solution_pushes(rules: Rules) -> bool:
    """Do tokens of the solution push with the group's advantage, too?"""
    return rules.policy.off_policy != "none" or words.LOSSES[rules.policy.loss].sequences


def _in_policy(member: Member, rules: Rules) -> int:
    """Tokens of a member that push with the group's advantage."""
    if member.role == COMPLETION:
        return len(member.tokens) - (0 if rules.policy.off_policy != "none" else member.given)
    return len(member.tokens) if member.role == DEMO and _solution_pushes(rules) else 0


def weigh(items: Sequence[Item], rules: Rules) -> Weights:
    """Normalisers of one optimizer batch. Hints count once a group: the G copies share it, their mean is the same."""
    likelihood, kind = rules.likelihood, words.TOKENS[rules.likelihood.tokens]
    micro, max_tokens = rules.train.micro_prompts, rules.sample.max_tokens
    completions = [[_in_policy(m, rules) for m in item.members] for item in items]
    supervised = []
    for item in items:
        n = len(item.hint) if kind.hint else 0
        if kind.demo:
            n += sum(len(m.tokens) for m in item.members if m.role == DEMO)
        if kind.alone:
            n += max((m.given for m in item.members), default=0)
        supervised.append([n if item.supervised else 0, *(len(m.tokens) if m.role == OWN else 0 for m in item.members)])
    unit = NORMS[likelihood.norm](Counts(supervised, max_tokens, micro))
    policy = NORMS[rules.policy.norm](Counts(completions, max_tokens, micro))
    share = policy_weight(rules)
    scaled = [
        [likelihood.weight * x if k else 0.0 for x, k in zip(w, n)] for w, n in zip(unit, supervised, strict=True)
    ]
    pushed = policy if share == 1 else [[share * w for w in row] for row in policy]
    return Weights(pushed, [row[0] for row in scaled], [row[1:] for row in scaled], _entropy(items, pushed, rules))


def _entropy(items: Sequence[Item], pushed: list[list[float]], rules: Rules) -> list[list[float]]:
    """Weights of the entropy bonus: of an item's hint, then of its members; on completions they default to the policy's."""
    p = rules.policy
    if not p.entropy:
        return [[0.0] * (1 + len(item.members)) for item in items]
    if p.entropy_tokens == "completions" and p.entropy_norm is None:
        return [[0.0, *(p.entropy * w for w in row)] for row in pushed]
    lengths = [_with_loss(item, rules) if p.entropy_tokens == "all" else _sampled(item) for item in items]
    counts = Counts(lengths, rules.sample.max_tokens, rules.train.micro_prompts)
    return [[p.entropy * w for w in row] for row in NORMS[p.entropy_norm or p.norm](counts)]


def _sampled(item: Item) -> list[int]:
    """Sampled tokens: none of the hint, then of every member."""
    return [0, *(len(m.tokens) - m.given if m.role == COMPLETION else 0 for m in item.members)]


def _with_loss(item: Item, rules: Rules) -> list[int]:
    """Tokens that any stream acts on: of the hint, then of every member."""
    kind, pushes = words.TOKENS[rules.likelihood.tokens], _solution_pushes(rules)
    supervised = item.supervised and rules.likelihood.weight > 0
    of = {
        COMPLETION: lambda m: len(m.tokens) - (0 if pushes or (kind.alone and supervised) else m.given),
        DEMO: lambda m: len(m.tokens) if pushes or (kind.demo and supervised) else 0,
        OWN: lambda m: len(m.tokens) if rules.likelihood.weight > 0 else 0,
    }
    return [len(item.hint) if kind.hint and supervised else 0, *(of[m.role](m) for m in item.members)]


def policy_weight(rules: Rules) -> float:
    share = rules.policy.weight
    return 1.0 - rules.likelihood.weight if isinstance(share, str) else share


# ---------------------------------------------------------------------------------------------- packing


def without_signal(item: Item, rules: Rules) -> bool:
    """True when the completions of this item cannot move the policy: all advantages 0, no KL, no entropy bonus."""
    pulled = rules.reference.kl != 0 and not words.INTOS[rules.reference.into].reward
    quiet = not pulled and rules.policy.entropy == 0 and not words.LOSSES[rules.policy.loss].sequences
    quiet = quiet and not words.BASELINES[rules.credit.baseline].critic
    return quiet and not any(np.any(m.advantage) for m in item.members if m.role == COMPLETION)


def cut(items: Sequence[Item], budget: int) -> list[list[int]]:
    """Indices of items per micro-batch, longest first, so that a pack's padded size stays within the token budget.

    Groups are never split; one that is larger than the budget goes alone.
    """
    order = sorted(range(len(items)), key=lambda i: (-items[i].tokens_forwarded, i))
    packs: list[list[int]] = []
    for i in order:
        if packs and sum(items[j].tokens_forwarded for j in packs[-1]) + items[i].tokens_forwarded <= budget:
            packs[-1].append(i)
        else:
            packs.append([i])
    return packs


def pack(items: Sequence[Item], which: Sequence[int], weights: Weights, rules: Rules) -> PackedBatch | None:
    """One micro-batch of the items ``which``. None when nothing in it carries a loss."""
    tokens: list[int] = []
    positions: list[int] = []
    prefixes: list[range] = []
    members: list[list[range]] = []
    names = ("at", "target", "role", "item", "member", "a", "p", "l", "k", "e", "s", "q", "pair", "y", "r", "v")
    columns: dict[str, list[Any]] = {n: [] for n in names}

    def supervise(at: Sequence[int], targets: Sequence[int], role: int, item: int, member: int, **values: Any) -> None:
        n = len(targets)
        for name, value in {**blank, "role": role, "item": item, "member": member, **values}.items():
            columns[name] += value if isinstance(value, list) else [value] * n
        columns["at"] += at
        columns["target"] += targets

    blank: dict[str, Any] = {**dict.fromkeys("aplke", 0.0), **dict.fromkeys("syrv", math.nan), "q": 0, "pair": -1}
    sequences = 0
    outside = _solution_pushes(rules)
    shown = words.TOKENS[rules.likelihood.tokens].alone
    to_loss = not words.INTOS[rules.reference.into].reward
    for b, i in enumerate(which):
        item = items[i]
        silent = without_signal(item, rules)
        kept = [(j, m) for j, m in enumerate(item.members) if not (silent and m.role == COMPLETION)]
        prefix = item.prompt + item.hint
        start = len(tokens)
        tokens += prefix
        positions += range(len(prefix))
        prefixes.append(range(start, start + len(prefix)))
        likelihood, solution = weights.likelihood[i], sequences
        sequences += 1
        if item.hint and likelihood:
            first = start + len(item.prompt) - 1
            at = range(first, first + len(item.hint))
            supervise(at, item.hint, HINT, b, -1, l=likelihood, e=weights.entropy[i][0], q=solution)
        members.append([])
        copies = sum(1 for _, m in kept if m.given)
        for j, m in kept:
            begin = len(tokens)
            tokens += m.tokens[:-1]
            positions += range(len(prefix), len(prefix) + len(m.tokens) - 1)
            members[-1].append(range(begin, len(tokens)))
            at = [start + len(prefix) - 1, *range(begin, len(tokens))]
            w, h = weights.policy[i][j], weights.entropy[i][1 + j]
            pushed = {"p": w, "pair": m.pair, "y": m.label, "q": sequences}
            sequences += 1
            if m.role == DEMO:
                own = pushed | {"a": m.advantage} if outside else {}
                q = solution if likelihood else sequences - 1
                supervise(at, m.tokens, DEMO, b, j, **own | {"l": likelihood, "e": h, "q": q})
            elif m.role == OWN:
                supervise(at, m.tokens, OWN, b, j, l=weights.own[i][j], e=h, q=sequences - 1)
            else:
                n = m.given
                if n and (outside or (shown and likelihood)):  # a given token has one advantage: the member's first
                    a = m.advantage[0] if isinstance(m.advantage, list) else m.advantage
                    push = pushed | {"a": a} if outside else {"q": sequences - 1}
                    push |= {
                        "l": likelihood / copies if shown else 0.0,
                        "e": h if rules.policy.entropy_tokens == "all" else 0.0,
                    }
                    supervise(at[:n], m.tokens[:n], HINT, b, j, **push)
                kl = rules.reference.kl * w if to_loss else 0.0
                sampler = list(m.logps) if m.logps is not None else [math.nan] * (len(m.tokens) - n)
                values = {"a": m.advantage, "k": kl, "e": h, "s": sampler}
                if m.returns is not None and m.values is not None:
                    values |= {"r": m.returns, "v": m.values}
                supervise(at[n:], m.tokens[n:], COMPLETION, b, j, **pushed | values)
    if not columns["target"]:
        return None
    # float64: a few numbers per target token; sums of losses then hardly depend on the cut into micro-batches.
    whole = {"at", "target", "role", "item", "member", "q", "pair"}
    col = {n: torch.tensor(v, dtype=torch.long if n in whole else torch.float64) for n, v in columns.items()}
    return PackedBatch(
        tokens_T=torch.tensor(tokens),
        positions_T=torch.tensor(positions),
        layout=make_layout(prefixes, members, len(tokens)),
        at_S=col["at"],
        target_S=col["target"],
        role_S=col["role"],
        item_S=col["item"],
        member_S=col["member"],
        advantage_S=col["a"],
        policy_w_S=col["p"],
        likelihood_w_S=col["l"],
        kl_w_S=col["k"],
        entropy_w_S=col["e"],
        sampler_S=col["s"],
        sequence_S=col["q"],
        pair_S=col["pair"],
        label_S=col["y"],
        return_S=col["r"],
        value_S=col["v"],
    )


def make_layout(prefixes: Sequence[range], members: Sequence[Sequence[range]], total: int) -> PackedLayout:
    """Index tensors of a flat row: which slots are whose, and where each token's attention output will lie."""
    b, p = len(prefixes), max(len(r) for r in prefixes)
    g = max((len(m) for m in members), default=0)
    r = max((len(x) for m in members for x in m), default=0)
    prefix_BP = torch.zeros(b, p, dtype=torch.long)
    member_BGR = torch.zeros(b, g, r, dtype=torch.long) if r else None
    slot_T = torch.empty(total, dtype=torch.long)
    for i, span in enumerate(prefixes):
        prefix_BP[i, : len(span)] = torch.arange(span.start, span.stop)
        slot_T[span.start : span.stop] = torch.arange(i * p, i * p + len(span))
        for j, own in enumerate(members[i]):
            if member_BGR is not None and len(own):
                member_BGR[i, j, : len(own)] = torch.arange(own.start, own.stop)
                first = b * p + (i * g + j) * r
                slot_T[own.start : own.stop] = torch.arange(first, first + len(own))
    lengths_B = torch.tensor([len(s) for s in prefixes])
    return PackedLayout(
        prefix_BP, member_BGR, slot_T, lengths_B, [(p, list(m)) for p, m in zip(prefixes, members, strict=True)]
    )
