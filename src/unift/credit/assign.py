"""Scored groups -> items: who takes part, and what every member or token is worth. The last stop before packing."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from unift.config import needs
from unift.config.sections import Rules
from unift.config.words import BASELINES, LOSSES
from unift.credit import discriminative, returns
from unift.credit.advantages import group_advantages, shaped_scores
from unift.credit.members import first_steps, items_of, labelled, paired
from unift.model import critic
from unift.model.logprobs import logprobs
from unift.model.packs import Item, PackedBatch
from unift.model.policy import Policy
from unift.rows.dataset import Split
from unift.types import Group

LogProbs = Callable[[PackedBatch], Tensor]


@dataclass(frozen=True)
class Models:
    """What credit may measure with. ``partition``: u of a row (discriminative), which moves on here."""

    policy: Policy
    reference: LogProbs | None
    partition: MutableMapping[str, float]


def credited(
    groups: Sequence[Group], split: Split, rules: Rules, models: Models, address: tuple[int, int]
) -> list[Item]:
    """``split``: the training rows (``group.row`` is the index). ``address``: (seed, step).

    Credit that needs log-probs or values of the sampled tokens measures them here, once, over all items of the step.
    """
    policy = models.policy
    demos = [split.encoded[g.row].solution for g in groups] if needs.demonstrations(rules) else None  # of solved rows
    made = items_of(groups, [group_advantages(g, rules) for g in groups], demos, rules, address)
    made = [replace(item, shown=split.encoded[g.row].shown) for item, g in zip(made, groups, strict=True)]
    if rules.sample.first is not None:
        made = first_steps(made, groups, [split.encoded[g.row] for g in groups], rules, policy.end_ids, address)
    if LOSSES[rules.policy.loss].sequences:
        scored = made if rules.sample.label is None else labelled(made, [split.labels[g.row] for g in groups])
        return paired(scored, groups, rules, [split.rejected[g.row] for g in groups])
    if not returns.active(rules):
        return made

    def logps(batch: PackedBatch) -> Tensor:
        return logprobs(policy, batch.to(policy.device), rules.sample.temperature)[0]

    together = policy.root is not None
    if BASELINES[rules.credit.baseline].solution:
        return discriminative.spread(made, rules, returns.measured(logps, made, rules, together), models.partition)
    ref = None
    if returns.kl_in_reward(rules):
        reference = models.reference
        if reference is None:
            raise ValueError(f"method {rules.method} compares with the reference, and none was given")
        ref = returns.measured(lambda b: reference(b.to(policy.device)), made, rules, together)
    values = None
    if policy.critic is not None:
        values = returns.measured(lambda b: critic.values(policy, b.to(policy.device)), made, rules, together)
    return returns.spread(made, [shaped_scores(g, rules) for g in groups], rules, ref, values)
