"""A hint that some members of a group alone have seen is supervised whatever becomes of their completions: from tokens to gradient."""

from __future__ import annotations

import pytest
import torch
from conftest import close, gradients, settings, tiny_policy
from plain import token_logprobs

from unift.credit.advantages import group_advantages
from unift.credit.members import items_of
from unift.model.logprobs import logprobs
from unift.objectives import loss as objectives
from unift.training.update import prepare
from unift.types import Group, Sample, Score

PROMPT, HINT = [3, 4], [5, 6, 7]
OWN = ([8, 1], [9, 9, 1], [2, 1])  # sampled tokens of the members; the first two have seen the hint


def group(*scores):
    hints = (HINT, HINT, [])
    samples = [
        Sample([*h, *own], [-1.0] * len(own), True, score=Score(float(s)), given=len(h))
        for h, own, s in zip(hints, OWN, scores, strict=True)
    ]
    return Group(0, f"row {scores}", PROMPT, [], 0, 5, samples)


def update(rules, *groups):
    """(loss, gradients, the policy's plain twin) of one optimizer batch, on the way that a step takes."""
    policy, plain = tiny_policy(torch.float64)
    items = items_of(groups, [group_advantages(g, rules) for g in groups], None, rules)
    total = 0.0
    (packs,) = prepare(policy, items, rules, None)
    for batch in packs:
        parts = objectives.losses(logprobs(policy, batch)[0], None, batch, rules)
        loss = parts["policy"] + parts["likelihood"]
        loss.backward()
        total += loss.item()
    return total, gradients(policy.model), plain


def plain_loss(plain, weight, pushed):
    """- weight mean(hint) - sum_j A_j sum(own_j) / Z, with separate sequences; ``pushed``: (A, index in OWN), Z their tokens."""
    hint = token_logprobs(plain, [[*PROMPT, *HINT]])[0][0][1:]
    loss, z = -weight * hint.mean(), sum(len(OWN[j]) for _, j in pushed)
    for a, j in pushed:
        shown = HINT if j < 2 else []
        l = token_logprobs(plain, [[*PROMPT, *shown, *OWN[j]]])[0][0]
        loss = loss - a * l[-len(OWN[j]) :].sum() / z
    return loss


MEMBERS = ("show.members=2", "sample.completions=3", "reference.kl=0", "likelihood.weight=0.5", "policy.entropy=0")


@pytest.mark.parametrize("budget", [4096, 6])
@pytest.mark.parametrize(
    ("more", "scores"),
    [
        ((), (0, 0, 0)),  # every advantage is 0
        ((), (1, 1, 1)),
        (("likelihood.gate=0",), (0, 0, 0)),  # a failed group, whose completions do not push
        (("policy.loss=none",), (0, 1, 0)),  # no completion ever pushes
        (("policy.off_policy=ratio",), (0, 0, 0)),  # the hint would push, too, but for its advantage of 0
    ],
)
def test_a_hint_of_some_members_without_a_push(more, scores, budget):
    rules = settings("uft", f"train.token_budget={budget}", "train.prompts=1", *MEMBERS, *more)
    loss, found, plain = update(rules, group(*scores))
    expected = plain_loss(plain, 0.5, [])
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-7) and loss > 0
    close(found, gradients(plain), 1e-6)


@pytest.mark.parametrize("budget", [4096, 6])
def test_beside_a_group_that_pushes(budget):
    """Two groups with one hint each: the likelihood is the mean over both, the push that of the second alone. Z of the policy
    counts every sampled token, those of the silent group, too."""
    rules = settings("uft", f"train.token_budget={budget}", "train.prompts=2", "credit.scale=none", *MEMBERS)
    _, found, plain = update(rules, group(0, 0, 0), group(1, 0, 0))
    thirds = [(2 / 3, 0), (-1 / 3, 1), (-1 / 3, 2)]
    plain_loss(plain, 0.5, [(a / 2, j) for a, j in thirds]).backward()  # A l has the gradient of A ratio at ratio 1
    close(found, gradients(plain), 1e-6)


def test_without_a_likelihood_nothing_of_a_silent_group_is_left():
    rules = settings("uft", "train.prompts=1", *MEMBERS, "likelihood.weight=0")
    policy, _ = tiny_policy(torch.float64)
    g = group(0, 0, 0)
    assert prepare(policy, items_of([g], [group_advantages(g, rules)], None, rules), rules, None) == [[]]
