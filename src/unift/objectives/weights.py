"""1/Z: the weight of every token, counted once over a whole optimizer batch, so that the loss is a plain sum over packs.

L = - sum_s (coefficient_s / Z_s) sum_t g_s(log pi_t)          (UFT, arXiv 2505.16984, eq. 3.3; docs/methods.md)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from unift.config import needs, words
from unift.config.sections import Rules
from unift.model.packs import COMPLETION, DEMO, OWN, Item, ItemWeights, Member


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


def _in_policy(member: Member, rules: Rules) -> int:
    """Tokens of a member that push with the group's advantage."""
    if member.role == COMPLETION:
        return len(member.tokens) - (0 if rules.policy.off_policy != "none" else member.given)
    return len(member.tokens) if member.role == DEMO and needs.solution_pushes(rules) else 0


def weigh(items: Sequence[Item], rules: Rules) -> list[ItemWeights]:
    """Normalisers of one optimizer batch. Hints count once a group: the G copies share it, their mean is the same."""
    likelihood, kind = rules.likelihood, words.TOKENS[rules.likelihood.tokens]
    micro, max_tokens = rules.train.micro_prompts, rules.sample.max_tokens
    completions = [[_in_policy(m, rules) for m in item.members] for item in items]
    supervised: list[list[int]] = []
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
    policy = policy if share == 1 else [[share * w for w in pushed] for pushed in policy]
    out: list[ItemWeights] = []
    entropy = _entropy(items, policy, rules)
    for item, pushed, shares, counts, h in zip(items, policy, unit, supervised, entropy, strict=True):
        own = [likelihood.weight * x if n else 0.0 for x, n in zip(shares, counts, strict=True)]
        copies = sum(1 for m in item.members if m.given)  # of a hint that so many members alone have seen
        out.append(ItemWeights(pushed, own[0], own[1:], h[0], h[1:], own[0] / max(copies, 1)))
    return out


def _entropy(items: Sequence[Item], policy: list[list[float]], rules: Rules) -> list[list[float]]:
    """Weights of the entropy bonus: of an item's hint, then of its members; on completions they default to the policy's."""
    p = rules.policy
    if not p.entropy:
        return [[0.0] * (1 + len(item.members)) for item in items]
    if p.entropy_tokens == "completions" and p.entropy_norm is None:
        return [[0.0, *(p.entropy * w for w in pushed)] for pushed in policy]
    lengths = [_with_loss(item, rules) if p.entropy_tokens == "all" else _sampled(item) for item in items]
    counts = Counts(lengths, rules.sample.max_tokens, rules.train.micro_prompts)
    return [[p.entropy * w for w in row] for row in NORMS[p.entropy_norm or p.norm](counts)]


def _sampled(item: Item) -> list[int]:
    """Sampled tokens: none of the hint, then of every member."""
    return [0, *(len(m.tokens) - m.given if m.role == COMPLETION else 0 for m in item.members)]


def _with_loss(item: Item, rules: Rules) -> list[int]:
    """Tokens that any stream acts on: of the hint, then of every member."""
    kind, pushes = words.TOKENS[rules.likelihood.tokens], needs.solution_pushes(rules)
    supervised = item.supervised and rules.likelihood.weight > 0

    def of(m: Member) -> int:
        if m.role == COMPLETION:
            return len(m.tokens) - (0 if pushes or (kind.alone and supervised) else m.given)
        if m.role == DEMO:
            return len(m.tokens) if pushes or (kind.demo and supervised) else 0
        return len(m.tokens) if rules.likelihood.weight > 0 else 0

    return [len(item.hint) if kind.hint and supervised else 0, *map(of, item.members)]


def policy_weight(rules: Rules) -> float:
    share = rules.policy.weight
    return 1.0 - rules.likelihood.weight if isinstance(share, str) else share
