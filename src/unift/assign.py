"""Scored groups -> items: who takes part, and what every member or token is worth. The last stop before packing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from unift import credit, critic, needs, partition, preference, returns
from unift import policy as policies
from unift.config import Rules
from unift.encode import Encoded
from unift.members import first_steps, items_of
from unift.memory import RowMemory
from unift.packs import Item, PackedBatch
from unift.policy import Policy
from unift.types import Group
from unift.words import BASELINES, LOSSES

Score = Callable[[PackedBatch], Tensor]  # log-probs of a pack


def items(
    groups: Sequence[Group],
    encoded: Sequence[Encoded],
    rejected: Sequence[list[int] | None],
    rules: Rules,
    policy: Policy,
    reference: Score | None,
    memory: RowMemory,
    address: tuple[int, int],
) -> list[Item]:
    """``encoded`` and ``rejected``: of the rows (``group.row`` is the index). ``address``: (seed, step).

    Credit that needs log-probs or values of the sampled tokens measures them here, once, over all items of the step.
    ``memory.partition`` moves on where the method keeps one.
    """
    demos = [encoded[g.row].solution for g in groups] if needs.demonstrations(rules) else None
    made = items_of(groups, [credit.group_advantages(g, rules) for g in groups], demos, rules, address)
    if rules.sample.first is not None:
        instructed = [encoded[g.row].instructed for g in groups]
        made = first_steps(made, groups, instructed, rules, policy.tokenizer.eos_token_id, address)
    if LOSSES[rules.policy.loss].sequences:
        return preference.label(made, groups, rules, [rejected[g.row] for g in groups])
    if not returns.active(rules):
        return made

    def logps(batch: PackedBatch) -> Tensor:
        return policies.logprobs(policy, batch.to(policy.device), rules.sample.temperature)[0]

    if BASELINES[rules.credit.baseline].solution:
        return partition.spread(made, rules, returns.measured(logps, made, rules), memory.partition)
    ref = None
    if returns.kl_in_reward(rules):
        assert reference is not None
        ref = returns.measured(lambda b: reference(b.to(policy.device)), made, rules)
    values = None
    if policy.critic is not None:
        values = returns.measured(lambda b: critic.values(policy, b.to(policy.device)), made, rules)
    return returns.spread(made, [credit.shaped_scores(g, rules) for g in groups], rules, ref, values)
