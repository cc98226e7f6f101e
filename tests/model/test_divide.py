"""A group larger than the token budget is divided: the update of every method is the one of the whole group, in float64."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch
from conftest import settings

from unift.config import needs
from unift.config.packaged import preset_names
from unift.config.stages import Moment, stages
from unift.credit import assign
from unift.model import critic
from unift.model.divide import divide
from unift.model.load import load_policy, load_tokenizer
from unift.model.logprobs import logprobs
from unift.model.packs import COMPLETION, DEMO, HINT, Item, Member, pack
from unift.objectives.weights import weigh
from unift.rows import dataset
from unift.sampling.engines.choose import in_process
from unift.sampling.groups import complete, hinted
from unift.training import annealing
from unift.training.optimizer import make_optimizer
from unift.training.update import Order, apply, prepare
from unift.types import Score

MODEL = ["model.dtype=float64", "data.train_rows=8", "data.test_rows=2", "sample.max_tokens=24"]
WHOLE = 10**6


@cache
def models():
    """(policy, another policy as the reference, encoded rows) of the embedded lock base in float64."""
    config = settings("uft", *MODEL)
    policy, reference = load_policy(config.model), load_policy(config.model)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=draw, dtype=p.dtype))
    return policy, reference, dataset.encode(load_tokenizer(config.model), dataset.load(config), config)


def groups_of(rules, stage, policy, split):
    """Real completions of all rows, with scores at random; in the middle of the stage, so that hints are partial."""
    moment = Moment(0, stage.start + stage.total // 4, stage)
    known = {row.id: (0.3, 0.9) for row in split.rows} if rules.show.schedule in ("adaptive", "bisection") else {}
    groups = hinted(range(len(split.rows)), split, moment, known)
    if rules.sample.completions:
        complete(in_process(policy), policy.tokenizer, dict(enumerate(groups)), moment)
        rng = np.random.default_rng(5)
        for group in groups:
            group.samples = [replace(s, score=Score(float(rng.integers(0, 2)))) for s in group.samples]
    return moment, groups


def update_of(rules, items, budget, policy, score, folder):
    """(metrics, gradients) of a step of two epochs: the second compares with the log-probs at the start of the step."""
    train = {"token_budget": budget, "updates": 1, "epochs": 2, "clip_norm": None, "prompts": len(items)}
    rules = rules.model_copy(update={"train": rules.train.model_copy(update=train)})
    found = []
    for packs in prepare(policy, items, rules, score):
        order = Order(0.0, False, folder / "x.pt")
        metrics = apply(policy, make_optimizer(policy, rules.train), packs, rules, order)
        found.append((metrics, [p.grad.clone() for p in policy.parameters()], packs))
    return found


def cases():
    return [(name, n) for name in preset_names() for n in range(len(stages(settings(name))))]


@pytest.mark.parametrize(("method", "number"), cases(), ids=lambda x: str(x))
def test_the_update_of_divided_groups(method, number, tmp_path):
    policy, reference, data = models()
    config = settings(method, *MODEL)
    stage = stages(config)[number]
    rules = stage.rules
    policy = replace(policy, critic=None)
    policy.critic = critic.new_critic(policy) if needs.critic(rules) else None
    score = (lambda b: logprobs(reference, b, rules.sample.temperature)[0]) if needs.reference(rules) else None
    moment, groups = groups_of(rules, stage, policy, data.train)
    rules = annealing.at(rules, moment.within, stage.total, groups)
    credit = partial(assign.credited, groups, data.train)
    items = credit(rules, assign.Models(policy, score, {}), (0, 0))
    small = max(len(i.prompt) + len(i.hint) for i in items) + 20
    divided = rules.model_copy(update={"train": rules.train.model_copy(update={"token_budget": small})})
    again = credit(divided, assign.Models(policy, score, {}), (0, 0))
    for a, b in zip(items, again, strict=True):  # credit that is measured does not depend on the budget either
        for m, n in zip(a.members, b.members, strict=True):
            assert np.allclose(m.advantage, n.advantage, rtol=1e-6, atol=1e-9)
    whole, parts = (update_of(rules, items, b, policy, score, tmp_path) for b in (WHOLE, small))
    for (m, g, packs), (n, h, more) in zip(whole, parts, strict=True):
        assert len(packs) <= len(more)
        assert {k: v for k, v in m.items() if k != "tokens/forwarded"} == pytest.approx(
            {k: v for k, v in n.items() if k != "tokens/forwarded"}, rel=1e-6, abs=1e-9
        )
        scale = max(float(x.abs().max()) for x in g)
        worst = max(float((x - y).abs().max()) for x, y in zip(g, h, strict=True))
        # transformers' norms compute in float32 inside, whatever the model's type
        assert worst <= 1e-6 * scale, f"gradients differ by {worst / scale:.1e}"
    if sum(m.role == COMPLETION for m in items[0].members) > 2:
        made = divide(items, weigh(items, divided), divided)
        assert len(made) > len(items), "nothing was divided"
        undivided = [p for p in made if len(p.members) > 1 and p.item.members[0].pair < 0]
        assert all(p.item.tokens_forwarded <= small for p in undivided)


def rules_of(budget, method="uft", *more):
    return settings(method, f"train.token_budget={budget}", *more)


def spread(item, rules):
    """(indices of the members, has the hint's loss) of each part."""
    return [(list(p.members), bool(p.item.hint)) for p in divide([item], weigh([item], rules), rules)]


def test_longest_first_into_the_first_part_with_room():
    """Prefix 5, room 20: completions forward 15, 9, 9, 4 tokens; a group that fits stays what it is, bit for bit."""
    lengths = (5, 10, 16, 10)
    members = [Member([7] * n, COMPLETION, 1.0) for n in lengths]
    item = Item([3, 4], [5, 6, 7], members)
    assert spread(item, rules_of(25)) == [([0, 2], True), ([1, 3], False)]
    assert spread(item, rules_of(13)) == [([2], True), ([1], False), ([3], False), ([0], False)]
    assert spread(item, rules_of(1)) == spread(item, rules_of(13)), "what cannot be divided goes alone"
    rules = rules_of(item.tokens_forwarded)
    (whole,) = divide([item], weigh([item], rules), rules)
    assert whole.item is item


def test_the_hint_is_with_the_demonstration_that_continues_it():
    members = [*(Member([7] * n, COMPLETION, 1.0) for n in (12, 9)), Member([8, 8, 1], DEMO)]
    item = Item([3, 4], [5, 6], members)
    for method in ("uft-whole", "srft"):
        found = spread(item, rules_of(15, method))
        assert sum(hint for _, hint in found) == 1 and found[0][1] and 2 in found[0][0]


def test_pairs_and_drawn_inputs_stay_together():
    pairs = [Member([7] * 9, DEMO, 1.0 - 2 * (j % 2), pair=j // 2) for j in range(4)]
    assert spread(Item([3], [], pairs), rules_of(17, "dpo")) == [([0, 1], False), ([2, 3], False)]
    noise = rules_of(4, "sft", "inputs.noise=uniform")
    assert len(divide([Item([3], [4], [Member([7] * 9, DEMO)])], None, noise)) == 1


def test_a_silent_group_keeps_its_hint_alone():
    """All advantages 0: no completion is forwarded, and the hint's loss stays; a part with advantage 0 is not silent."""
    still = Item([3, 4], [5, 6], [Member([7] * 9, COMPLETION, 0.0) for _ in range(3)])
    rules = rules_of(12, "uft", "reference.kl=0")
    (part,) = divide([still], weigh([still], rules), rules)
    assert part.item.members == [] and part.item.hint == [5, 6]
    moving = replace(still, members=[*still.members, Member([7] * 9, COMPLETION, 1.0)])
    parts = divide([moving], weigh([moving], rules), rules)
    packs = [pack([p.item], [0], [p.weights], rules) for p in parts]
    assert len(parts) == 4 and all(b is not None and (b.role_S == COMPLETION).sum() == 9 for b in packs)
    assert sum(int((b.role_S == HINT).sum()) for b in packs) == 2


def test_a_hint_that_some_members_have_seen_is_shared_by_all_of_them():
    """Three of four completions begin with two given tokens: each carries a third of their weight, in whatever part."""
    given = [Member([5, 6, 7, 7, 1], COMPLETION, 1.0, [-1.0] * 3, given=2) for _ in range(3)]
    item = Item([3, 4], [], [*given, Member([9, 9, 1], COMPLETION, -1.0)])
    for budget in (WHOLE, 7):
        rules = rules_of(budget, "uft", "show.members=3")
        parts = divide([item], weigh([item], rules), rules)
        packs = [pack([p.item], [0], [p.weights], rules) for p in parts]
        shown = torch.cat([b.likelihood_w_S[b.role_S == HINT] for b in packs])
        assert shown.tolist() == pytest.approx([rules.likelihood.weight / 2 / 3] * 6)
