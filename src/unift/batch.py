"""Scored groups -> packed tensors. All per-token weights are decided here, so that the loss is data.

Each group is a prefix (prompt + hint, once) and its members: the completions, and the rest of the demonstration where
the whole solution is supervised. The last token of a member is only ever a target, so it is not forwarded.

Shapes: T forwarded tokens, S loss positions (one per supervised token), B groups, G members, P and R padded lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from unift.attention import PackedLayout
from unift.config import Config, Phase
from unift.types import Group

COMPLETION, HINT, DEMO = 1, 2, 3


@dataclass(frozen=True)
class Member:
    tokens: list[int]
    role: int
    advantage: float = 0.0
    logps: list[float] | None = None  # under the sampler


@dataclass(frozen=True)
class Item:
    """One group ready to be packed. ``policy_on``: its completions push the policy (False when that is exactly zero)."""

    prompt: list[int]
    hint: list[int]
    members: list[Member]

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
    old_S: Tensor | None = None  # log-prob at the start of the step; None: this update is the first, ratio = 1
    ref_S: Tensor | None = None

    def to(self, device: Any) -> PackedBatch:
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, layout=self.layout.to(device), **moved)


def items_of(groups: Sequence[Group], advantages: Sequence[Sequence[float]], demos: Sequence[list[int]] | None) -> list[Item]:
    """Groups with their advantages (aligned with ``group.samples``). ``demos``: whole solutions, where supervised."""
    items = []
    for i, group in enumerate(groups):
        members = [
            Member(s.tokens, COMPLETION, a, s.logps)
            for s, a in zip(group.samples, advantages[i], strict=True)
            if s.tokens and s.score is not None
        ]
        if demos is not None:
            members.append(Member(demos[i][len(group.hint) :], DEMO))
        items.append(Item(group.prompt, group.hint, members))
    return items


# ---------------------------------------------------------------------------------------------- normalisers


def _unit_weights(lengths: Sequence[Sequence[int]], norm: str, max_tokens: int, micro: int | None) -> list[list[float]]:
    """1/Z of every token of each sequence, sequences listed per item (methods.md section 0, aggregators).

    Z is counted over all the items given, which is one optimizer batch; so the cut into micro-batches cannot matter.
    microbatch_token_mean reproduces the official code: token mean inside each run of ``micro`` items, then the mean
    over those runs (a run without such tokens dilutes).
    """
    sequences = sum(1 for item in lengths for n in item if n)
    tokens = sum(map(sum, lengths))
    if norm == "microbatch_token_mean":
        assert micro is not None
        runs = [lengths[i : i + micro] for i in range(0, len(lengths), micro)]
        totals = [max(sum(map(sum, run)), 1) for run in runs]
        return [[1.0 / (len(runs) * totals[i // micro])] * len(item) for i, item in enumerate(lengths)]
    weight = {
        "token_mean": lambda n: 1.0 / tokens,
        "seq_mean_token_mean": lambda n: 1.0 / (sequences * n),
        "seq_mean_token_sum": lambda n: 1.0 / sequences,
        "seq_mean_token_sum_norm": lambda n: 1.0 / (sequences * max_tokens),
    }[norm]
    return [[weight(n) if n else 0.0 for n in item] for item in lengths]


@dataclass(frozen=True)
class Weights:
    """Per-token weights of every item: ``policy[i][j]`` for member j, ``hint[i]`` and ``demo[i]``."""

    policy: list[list[float]]
    likelihood: list[float]


def weigh(items: Sequence[Item], settings: Config | Phase) -> Weights:
    """Normalisers of one optimizer batch. Hints count once a group: the G copies share it, their mean is the same."""
    kind, norms = settings.likelihood.tokens, (settings.policy.norm, settings.likelihood.norm)
    micro, max_tokens = settings.train.micro_prompts, settings.sample.max_tokens
    completions = [[len(m.tokens) if m.role == COMPLETION else 0 for m in item.members] for item in items]
    supervised = []
    for item in items:
        n = len(item.hint) if kind != "none" else 0
        if kind == "demo":
            n += sum(len(m.tokens) for m in item.members if m.role == DEMO)
        supervised.append([n])
    likelihood = _unit_weights(supervised, norms[1], max_tokens, micro)
    return Weights(
        _unit_weights(completions, norms[0], max_tokens, micro),
        [settings.likelihood.weight * w[0] if n[0] else 0.0 for w, n in zip(likelihood, supervised, strict=True)],
    )


# ---------------------------------------------------------------------------------------------- packing


def without_signal(item: Item, settings: Config | Phase) -> bool:
    """True when the completions of this item cannot move the policy: all advantages 0, no KL, no entropy bonus."""
    quiet = settings.reference.kl == 0 and settings.policy.entropy == 0
    return quiet and all(m.advantage == 0 for m in item.members if m.role == COMPLETION)


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


def pack(items: Sequence[Item], which: Sequence[int], weights: Weights, settings: Config | Phase) -> PackedBatch | None:
    """One micro-batch of the items ``which``. None when nothing in it carries a loss."""
    tokens: list[int] = []
    positions: list[int] = []
    prefixes: list[range] = []
    members: list[list[range]] = []
    columns: dict[str, list[Any]] = {n: [] for n in ("at", "target", "role", "item", "member", "a", "p", "l", "k", "e", "s")}

    def supervise(at: Sequence[int], targets: Sequence[int], role: int, item: int, member: int, **values: Any) -> None:
        n = len(targets)
        for name, value in {"role": role, "item": item, "member": member, **values}.items():
            columns[name] += value if isinstance(value, list) else [value] * n
        columns["at"] += at
        columns["target"] += targets

    blank = {"a": 0.0, "p": 0.0, "l": 0.0, "k": 0.0, "e": 0.0, "s": float("nan")}
    for b, i in enumerate(which):
        item = items[i]
        silent = without_signal(item, settings)
        kept = [(j, m) for j, m in enumerate(item.members) if not (silent and m.role == COMPLETION)]
        prefix = item.prompt + item.hint
        start = len(tokens)
        tokens += prefix
        positions += range(len(prefix))
        prefixes.append(range(start, start + len(prefix)))
        likelihood = weights.likelihood[i]
        if item.hint and likelihood:
            first = start + len(item.prompt) - 1
            at = range(first, first + len(item.hint))
            supervise(at, item.hint, HINT, b, -1, **blank | {"l": likelihood})
        members.append([])
        for j, m in kept:
            begin = len(tokens)
            tokens += m.tokens[:-1]
            positions += range(len(prefix), len(prefix) + len(m.tokens) - 1)
            members[-1].append(range(begin, len(tokens)))
            at = [start + len(prefix) - 1, *range(begin, len(tokens))]
            if m.role == DEMO:
                supervise(at, m.tokens, DEMO, b, j, **blank | {"l": likelihood})
            else:
                w = weights.policy[i][j]
                kl, entropy = settings.reference.kl * w, settings.policy.entropy * w
                sampler = list(m.logps) if m.logps is not None else [float("nan")] * len(m.tokens)
                values = {"a": m.advantage, "p": w, "k": kl, "e": entropy, "s": sampler}
                supervise(at, m.tokens, COMPLETION, b, j, **blank | values)
    if not columns["target"]:
        return None
    # float64: a few numbers per target token; sums of losses then hardly depend on the cut into micro-batches.
    col = lambda name, dtype=torch.float64: torch.tensor(columns[name], dtype=dtype)  # noqa: E731
    return PackedBatch(
        torch.tensor(tokens),
        torch.tensor(positions),
        make_layout(prefixes, members, len(tokens)),
        *(col(n, torch.long) for n in ("at", "target", "role", "item", "member")),
        *(col(n) for n in ("a", "p", "l", "k", "e", "s")),
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
    return PackedLayout(prefix_BP, member_BGR, slot_T, torch.tensor([len(s) for s in prefixes]))
