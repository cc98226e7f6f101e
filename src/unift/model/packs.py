"""Items -> packed tensors. Each item is a prefix (prompt + hint, once) and its members: the completions, and the rest of
the demonstration where the whole solution is supervised. The last token of a member is only ever a target, so it is not
forwarded. What all prompts of a pack begin with lies before the items, once (the stem).

Shapes: T forwarded tokens, S loss positions (one per supervised token), D width of the embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unift.config import needs, words
from unift.config.sections import Rules
from unift.model.attention.packed import PackedLayout, make_layout
from unift.types import Shown

# Tokens of a stem, and tokens that it saves in a row: below either it is not worth its passes of attention.
STEM_LEAST, STEM_SAVES = 8, 64
# OWN: a sampled completion that is supervised like a demonstration. A member with the role HINT: see `hint_of`.
COMPLETION, HINT, DEMO, OWN = 1, 2, 3, 4


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
    part: bool = False  # of a divided group, which was looked at as a whole
    shown: Shown | None = None  # the pictures whose placeholders the prompt has

    @property
    def tokens_forwarded(self) -> int:
        return len(self.prompt) + len(self.hint) + sum(len(m.tokens) - 1 for m in self.members)


@dataclass(frozen=True)
class ItemWeights:
    """Weights of an item's tokens, coefficient / Z: ``policy[j]`` of member j's, ``likelihood`` of the hint and the
    demonstration, ``own[j]`` of a member that is supervised by itself; of the entropy bonus, ``entropy_hint`` and
    ``entropy[j]``; ``given`` of the tokens of a hint that only some members have seen, in each of them."""

    policy: Sequence[float]
    likelihood: float
    own: Sequence[float]
    entropy_hint: float
    entropy: Sequence[float]
    given: float = 0.0


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
    shown: Sequence[Shown | None] = ()  # pictures of each group; empty where none has any
    filler: bool = False  # keeps other processes company: no loss, and no part of any count

    def to(self, device: Any) -> PackedBatch:
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, layout=self.layout.to(device), **moved)


def silent(item: Item, rules: Rules) -> bool:
    """True when the completions of this item cannot move the policy: all advantages 0, no KL, no entropy bonus."""
    pulled = rules.reference.kl != 0 and not words.INTOS[rules.reference.into].reward
    quiet = not pulled and rules.policy.entropy == 0 and not words.LOSSES[rules.policy.loss].sequences
    quiet = quiet and not words.BASELINES[rules.credit.baseline].critic
    return quiet and not any(np.any(m.advantage) for m in item.members if m.role == COMPLETION)


def hint_of(tokens: Sequence[int], given: int) -> Member:
    """Of a completion that does not push, the hint which it alone has seen: that much of it is still supervised."""
    return Member(list(tokens[:given]), HINT, given=given)


def carrying(item: Item, rules: Rules) -> list[tuple[int, Member]]:
    """(index, member) of the members that can carry a loss: of a silent item's completions no more than their own hints."""
    members = list(enumerate(item.members))
    if item.part or not silent(item, rules):
        return members
    shown = item.supervised and needs.own_hints(rules)
    hinted = [(j, hint_of(m.tokens, m.given if shown else 0) if m.role == COMPLETION else m) for j, m in members]
    return [(j, m) for j, m in hinted if m.tokens]


def stem_of(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts begin with and a forward of them computes once; 0 where that would not pay.

    The last token of a prompt stays its own: what it predicts belongs to the group.
    """
    first, last = min(prompts), max(prompts)  # what these two begin with, all others do
    most = min(map(len, prompts)) - 1
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), most)
    n = min(same, most)
    return n if n >= STEM_LEAST and n * (len(prompts) - 1) >= STEM_SAVES else 0


def _stem(items: Sequence[Item], rules: Rules) -> int:
    """As `stem_of`. What is done to input embeddings is drawn for each item, and pictures lie where its own prompt has them."""
    if needs.changed_inputs(rules) or any(i.shown for i in items):
        return 0
    return stem_of([i.prompt for i in items])


def cut(items: Sequence[Item], budget: int, rules: Rules) -> list[list[int]]:
    """Indices of items per micro-batch, longest first, so that a pack's tokens stay within the budget. An item that is larger
    goes alone; ``divide`` makes parts of it before.
    """
    stem = _stem(items, rules) if items else 0
    sizes = [i.tokens_forwarded for i in items]
    packs: list[list[int]] = []
    used = 0
    for i in sorted(range(len(items)), key=lambda i: (-sizes[i], i)):
        saved = stem * len(packs[-1]) if packs else 0  # by a stem of the pack, which may be too small to have one
        if packs and used + sizes[i] - (saved if saved >= STEM_SAVES else 0) <= budget:
            packs[-1].append(i)
            used += sizes[i]
        else:
            packs.append([i])
            used = sizes[i]
    return packs


NUMBER = {  # columns of a number a loss position, and what stands there unless it is said
    "advantage": 0.0,
    "policy_w": 0.0,
    "likelihood_w": 0.0,
    "kl_w": 0.0,
    "entropy_w": 0.0,
    "sampler": math.nan,
    "label": math.nan,
    "return": math.nan,
    "value": math.nan,
}
WHOLE = ("at", "target", "role", "item", "member", "sequence", "pair")  # columns of whole numbers


@dataclass
class _FlatRow:
    """A flat row under construction: its tokens, the spans of prefixes and members, and a column for each thing that is
    known about a loss position. A column becomes the tensor of its name in PackedBatch."""

    stem: int = 0  # tokens at its start that all prompts begin with
    tokens: list[int] = field(default_factory=list[int])
    positions: list[int] = field(default_factory=list[int])
    prefixes: list[range] = field(default_factory=list[range])
    members: list[list[range]] = field(default_factory=list[list[range]])
    sequences: int = 0
    columns: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in (*WHOLE, *NUMBER)})

    def extend(self, tokens: Sequence[int], position: int) -> range:
        """Lay tokens down, from this position of their sequence on; returns where they lie."""
        start = len(self.tokens)
        self.tokens += tokens
        self.positions += range(position, position + len(tokens))
        return range(start, len(self.tokens))

    def sequence(self) -> int:
        self.sequences += 1
        return self.sequences - 1

    def supervise(self, at: Sequence[int], targets: Sequence[int], **values: Any) -> None:
        """Loss positions ``at`` with their targets. A value is one for all of them or a list."""
        for name, value in {"pair": -1, **NUMBER, **values}.items():
            self.columns[name] += value if isinstance(value, list) else [value] * len(targets)
        self.columns["at"] += at
        self.columns["target"] += targets


def pack(
    items: Sequence[Item], which: Sequence[int], weights: Sequence[ItemWeights] | None, rules: Rules
) -> PackedBatch | None:
    """One micro-batch of the items ``which``. None when nothing in it carries a loss.

    ``weights``: of all items. None: every completion is packed without weights, to measure something at its tokens.
    """
    flat = _FlatRow(_stem([items[i] for i in which], rules))
    flat.extend(items[which[0]].prompt[: flat.stem], 0)
    for b, i in enumerate(which):
        item = items[i]
        zeros = [0.0] * len(item.members)
        if weights is None:
            _pack_item(flat, b, item, list(enumerate(item.members)), ItemWeights(zeros, 0.0, zeros, 0.0, zeros), rules)
        else:
            _pack_item(flat, b, item, carrying(item, rules), weights[i], rules)
    if not flat.columns["target"]:
        return None
    # float64: a few numbers per target token; sums of losses then hardly depend on the cut into micro-batches.
    types = dict.fromkeys(WHOLE, torch.long) | dict.fromkeys(NUMBER, torch.float64)
    columns: dict[str, Any] = {f"{n}_S": torch.tensor(v, dtype=types[n]) for n, v in flat.columns.items()}
    return PackedBatch(
        tokens_T=torch.tensor(flat.tokens),
        positions_T=torch.tensor(flat.positions),
        layout=make_layout(flat.prefixes, flat.members, len(flat.tokens), flat.stem),
        shown=[items[i].shown for i in which] if any(items[i].shown for i in which) else (),
        **columns,
    )


def _pack_item(
    flat: _FlatRow, number: int, item: Item, members: Sequence[tuple[int, Member]], weight: ItemWeights, rules: Rules
) -> None:
    shown = needs.own_hints(rules)
    prefix = flat.extend(item.prompt[flat.stem :] + item.hint, flat.stem)
    flat.prefixes.append(prefix)
    flat.members.append([])
    solution = flat.sequence()  # of the hint and the demonstration, which are one
    if item.hint and weight.likelihood:
        first = prefix.start + len(item.prompt) - flat.stem - 1
        at = range(first, first + len(item.hint))
        values = {"sequence": solution, "likelihood_w": weight.likelihood, "entropy_w": weight.entropy_hint}
        flat.supervise(at, item.hint, role=HINT, item=number, member=-1, **values)
    for j, m in members:
        span = flat.extend(m.tokens[:-1], flat.stem + len(prefix))
        flat.members[-1].append(span)
        at = [prefix.stop - 1, *span]
        mine, own = {"item": number, "member": j}, flat.sequence()
        if m.role == DEMO:
            pushed = (
                _pushed(m, weight.policy[j], own) | {"advantage": m.advantage} if needs.solution_pushes(rules) else {}
            )
            sequence = solution if weight.likelihood else own
            values = pushed | {"sequence": sequence, "likelihood_w": weight.likelihood, "entropy_w": weight.entropy[j]}
            flat.supervise(at, m.tokens, role=DEMO, **mine, **values)
        elif m.role == HINT:
            entropy_w = weight.entropy[j] if rules.policy.entropy_tokens == "all" else 0.0
            values = {"sequence": own, "likelihood_w": weight.given, "entropy_w": entropy_w}
            flat.supervise(at, m.tokens, role=HINT, **mine, **values)
        elif m.role == OWN:
            values = {"sequence": own, "likelihood_w": weight.own[j], "entropy_w": weight.entropy[j]}
            flat.supervise(at, m.tokens, role=OWN, **mine, **values)
        else:
            n = m.given
            if n and (needs.solution_pushes(rules) or (shown and weight.likelihood)):
                values = _given(m, weight.policy[j], own, rules) | {
                    "likelihood_w": weight.given if shown else 0.0,
                    "entropy_w": weight.entropy[j] if rules.policy.entropy_tokens == "all" else 0.0,
                }
                flat.supervise(at[:n], m.tokens[:n], role=HINT, **mine, **values)
            flat.supervise(
                at[n:],
                m.tokens[n:],
                role=COMPLETION,
                **mine,
                **_sampled(m, weight.policy[j], weight.entropy[j], own, rules),
            )


def _pushed(m: Member, w: float, sequence: int) -> dict[str, Any]:
    return {"policy_w": w, "pair": m.pair, "label": m.label, "sequence": sequence}


def _given(m: Member, w: float, sequence: int, rules: Rules) -> dict[str, Any]:
    """A given token has one advantage: the member's first."""
    if not needs.solution_pushes(rules):
        return {"sequence": sequence}
    a = m.advantage[0] if isinstance(m.advantage, list) else m.advantage
    return _pushed(m, w, sequence) | {"advantage": a}


def _sampled(m: Member, w: float, entropy_w: float, sequence: int, rules: Rules) -> dict[str, Any]:
    kl = 0.0 if words.INTOS[rules.reference.into].reward else rules.reference.kl * w
    sampler = list(m.logps) if m.logps is not None else [math.nan] * (len(m.tokens) - m.given)
    values = {"advantage": m.advantage, "kl_w": kl, "entropy_w": entropy_w, "sampler": sampler}
    if m.returns is not None and m.values is not None:
        values |= {"return": m.returns, "value": m.values}
    return _pushed(m, w, sequence) | values
