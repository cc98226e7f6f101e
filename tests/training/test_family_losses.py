"""The group policy-gradient family, mixed methods, token credit and the critic."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import close, make_items, packed_loss, settings, tiny_policy

from unift.config import needs
from unift.config.sections import Credit, Show
from unift.config.stages import Moment, Stage
from unift.credit import returns
from unift.credit.advantages import group_advantages, overlong, shaped_scores
from unift.credit.members import items_of
from unift.hints import schedules
from unift.model import critic
from unift.model.packs import COMPLETION, DEMO, HINT, Item, Member, pack
from unift.objectives import loss as objectives
from unift.objectives.likelihood import sequence_mean
from unift.objectives.weights import weigh
from unift.rows.dataset import Split, refill_rows
from unift.sampling.groups import equal_scores, hinted, replaceable
from unift.training import annealing
from unift.training.row_memory import RowMemory
from unift.types import Group, Sample, Score

OLD = np.log(0.20)


def leaf(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def fixed(*values):
    return torch.tensor(values, dtype=torch.float64)


def effective(loss, l):
    (grad,) = torch.autograd.grad(loss, l)
    return (-grad).tolist()


def weights_of(items, config, l=None, old=None, entropy=None):
    """The pack, and e_t of every supervised token with l a leaf (-1.3 everywhere unless given)."""
    batch = pack(items, range(len(items)), weigh(items, config), config)
    l = torch.full((len(batch.target_S),), -1.3).double() if l is None else torch.as_tensor(l).double()
    l.requires_grad_()
    batch = replace(batch, old_S=None if old is None else torch.as_tensor(old).double(), ref_S=None)
    parts = objectives.losses(l, entropy, batch, config)
    return batch, effective(parts["policy"] + parts["likelihood"], l)


ITEMS = [
    Item([3, 4], [], [Member([8, 9, 1], COMPLETION, 1.5), Member([8, 1], COMPLETION, -0.5)]),
    Item([3], [], [Member([4], COMPLETION, 0.7), Member([6, 6, 6, 1], COMPLETION, -0.7)]),
]
OWN = [1.5] * 3 + [-0.5] * 2 + [0.7] + [-0.7] * 4
LENGTHS = [3] * 3 + [2] * 2 + [1] + [4] * 4


def group(*scores, row_id="r", lengths=None):
    made = [Sample([5] * (lengths or {}).get(i, 2), [-1.0] * 2, True, score=Score(v)) for i, v in enumerate(scores)]
    return Group(0, row_id, [3, 4], [], 0, 5, made)


# ---------------------------------------------------------------------------------------------- uft-whole


def test_uft_whole_by_hand():
    """Hint and rest of two solutions, 5 tokens: e = .2/5 * pi / max(pi, .05); completions: A/Zc, Zc = 3, whatever l is."""
    items = [
        Item([3, 4], [5, 6], [Member([8, 1], COMPLETION, 1.5), Member([7, 1], DEMO)]),
        Item([3], [], [Member([9], COMPLETION, -0.5), Member([1], DEMO)]),
    ]
    batch, e = weights_of(
        items, settings("uft-whole"), l=torch.log(torch.tensor([0.5, 0.01, 0.3, 0.3, 0.05, 0.02, 0.6, 0.04]))
    )
    role = batch.role_S.tolist()
    assert role == [HINT, HINT, COMPLETION, COMPLETION, DEMO, DEMO, COMPLETION, DEMO]
    w = 0.2 / 5
    expected = [w, w * 0.2, 1.5 / 3, 1.5 / 3, w, w * 0.4, -0.5 / 3, w * 0.8]
    assert e == pytest.approx(expected, rel=1e-6)


def test_uft_whole_with_nll_on_the_hint_alone_is_uft():
    whole = settings("uft-whole", "likelihood.rule=nll", "likelihood.tokens=hint", "likelihood.weight=0.001")
    plain, apart = settings("uft"), {"method", "likelihood"}
    assert whole.model_dump(exclude=apart) == plain.model_dump(exclude=apart)
    items = [Item([3, 4], [5, 6], [Member([8, 1], COMPLETION, 1.5), Member([8, 2, 1], COMPLETION, -1.5)])]
    assert weights_of(items, whole)[1] == weights_of(items, plain)[1]


# ---------------------------------------------------------------------------------------------- reductions of the presets


@pytest.mark.parametrize(
    ("method", "z"),
    [
        ("rft", [10] * 10),
        ("dapo", [10] * 10),
        ("cispo", [10] * 10),
        ("reinforce++", [10] * 10),
        ("grpo", [4 * n for n in LENGTHS]),
        ("gspo", [4 * n for n in LENGTHS]),
        ("dr-grpo", [4 * 64] * 10),
        ("rloo", [4] * 10),
    ],
)
def test_effective_weights_at_ratio_one(method, z):
    """e = A/Z: all tokens (token_mean), a completion's length and the completions, a constant, the completions alone."""
    _, e = weights_of(ITEMS, settings(method, "reference.kl=0"))
    assert e == pytest.approx([a / n for a, n in zip(OWN, z, strict=True)])


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("grpo", (1.492402, -0.426401, -0.639601, -0.426401)),
        ("dapo", (1.492402, -0.426401, -0.639601, -0.426401)),
        ("dr-grpo", (0.7, -0.2, -0.3, -0.2)),
        ("rloo", (0.933333, -0.266667, -0.4, -0.266667)),
        ("srft", (0.1, -1, -1, -1)),
    ],
)
def test_f2_advantages(method, expected):
    config = settings(method)
    more = [] if method != "srft" else [0.1]
    assert group_advantages(group(1, 0.1, 0, 0.1), config) == pytest.approx([*expected, *more], abs=1e-6)


def surrogate(config, a, l, old):
    """e of the tokens of one completion, times Z."""
    n = len(l)
    item = Item([3], [], [Member([5] * n, COMPLETION, a)])
    one = settings(config, "reference.kl=0", "policy.norm=seq_mean_token_sum", "policy.entropy=0")
    return weights_of([item], one, l, old)[1]


@pytest.mark.parametrize(("a", "e"), [(1.0, 1.25), (-1.0, -1.25)])
def test_golden_dapo(a, e):
    assert surrogate("dapo", a, [np.log(0.25)], [OLD]) == pytest.approx([e])


def test_golden_cispo():
    """pi/pi_old = 1.25: clipped at 1.2 but never without gradient; rho = 3 at high .28: 1.28 where PPO gives 0."""
    for high, l, old, e in (
        (0.2, np.log(0.25), OLD, 1.2),
        (0.28, np.log(3.0), 0.0, 1.28),
        (4.0, np.log(3.0), 0.0, 3.0),
    ):
        s = objectives.clipped_importance(x := leaf(l), fixed(old), fixed(1.0), 1.0, high)
        assert effective(-s.sum(), x) == pytest.approx([e])
    assert surrogate("cispo", -1.0, [np.log(0.01)], [0.0]) == pytest.approx([-0.01])


def test_golden_gspo():
    """log-ratios (.1, -.2, .4): s = 1.105171 for every token; above 1 + high the whole completion loses its gradient."""
    old, l = [-1.0, -1.0, -1.0], [-0.9, -1.2, -0.6]
    one = Item([3], [], [Member([5] * 3, COMPLETION, 1.0)])
    free = settings("gspo", "policy.high=1", "policy.norm=seq_mean_token_mean")
    assert weights_of([one], free, l, old)[1] == pytest.approx([1.105171 / 3] * 3, abs=1e-6)
    assert weights_of([one], settings("gspo"), l, old)[1] == [0.0] * 3
    down = Item([3], [], [Member([5] * 3, COMPLETION, -1.0)])
    assert weights_of([down], settings("gspo"), l, old)[1] == pytest.approx([-1.105171 / 3] * 3, abs=1e-6)
    beside = [one, Item([3], [], [Member([5, 5], COMPLETION, 1.0)])]  # another completion does not enter the mean
    _, e = weights_of(beside, free, [*l, -3.0, -3.0], [*old, -3.0, -3.0])
    assert e == pytest.approx([1.105171 / 6] * 3 + [1 / 4] * 2, abs=1e-6)


def test_overlong_penalty():
    """DAPO: 0 up to max - buffer, -1/2 half way, -1 at the limit; it lowers the score before the baseline."""
    assert [overlong(n, 20, 4) for n in (1, 16, 18, 20)] == [0, 0, -0.5, -1]
    assert overlong(20, 20, 0) == 0
    config = settings("dapo", "sample.max_tokens=10", "credit.overlong=4", "credit.scale=none")
    g = group(1, 1, lengths={0: 4, 1: 8})
    assert shaped_scores(g, config) == [1.0, 0.5]
    assert group_advantages(g, config) == pytest.approx([0.25, -0.25])


def test_refill_rows_are_pure_and_their_own():
    first = refill_rows(0, 3, 1, 4, range(10))
    assert first == refill_rows(0, 3, 1, 4, range(10)) and len(set(first)) == 4
    assert len({tuple(refill_rows(*a, 4, range(10))) for a in ((0, 3, 1), (0, 3, 2), (0, 4, 1), (1, 3, 1))}) == 4
    assert len(refill_rows(0, 0, 1, 7, range(3))) == 7
    assert equal_scores(group(0, 0)) and not equal_scores(group(0, 1))


@pytest.mark.parametrize("solved", [True, False])
def test_refill_leaves_what_teaches(solved):
    """A group with nothing right has a signal where the solution is a member with score 1, and where a gate supervises it."""
    for name, *scores in (("wrong", 0, 0), ("right", 1, 1), ("mixed", 0, 1), ("unscored",)):
        g = replace(group(*scores), solved=solved)
        kept = {
            "dapo": name == "mixed",
            "luffy": name == "mixed" or (name == "wrong" and solved),
            "relift": name == "mixed" or (name == "wrong" and solved),
        }
        for method, expected in kept.items():
            rules = settings(method, "sample.refill=1")
            assert replaceable(g, rules) is not expected, (method, name)
            moved = np.any(group_advantages(g, rules)) if scores else False
            gated = rules.likelihood.gate is not None and name == "wrong" and solved
            assert expected == bool(moved or gated), (method, name)


# ---------------------------------------------------------------------------------------------- token credit


def test_gae():
    """r = (0, 1), V = (.3, .6), gamma 1, lambda .95 (arXiv 1506.02438, eq. 16)."""
    assert returns.gae([0, 1], [0.3, 0.6], 1, 0.95).tolist() == pytest.approx([0.68, 0.40])
    assert returns.gae([0, 1], [0.3, 0.6], 0.95, 1).tolist() == pytest.approx([0.65, 0.40])
    assert returns.gae([0, 1], [0.3, 0.6], 1, 1).tolist() == pytest.approx([0.7, 0.4])  # R - V


def credited(method, scores, drift, *more, values=None):
    """Advantages a token of one group; ``drift``: l - l_ref of every sampled token."""
    members = [Member([5] * len(d), COMPLETION, 0.0, [-1.0] * len(d)) for d in drift]
    config = settings(method, *more)
    ref = [[(-1.0 - np.asarray(d)).tolist() for d in drift]]
    (item,) = returns.spread([Item([3], [], members)], [scores], config, ref, values)
    return item.members


def test_kl_in_the_reward():
    """RLOO: off a completion's score, then leave-one-out. REINFORCE++: each token bears the KL still to come."""
    drift = [[0.5, 0.1], [0.2]]
    got = credited("rloo", [1.0, 0.0], drift, "reference.kl=0.1")
    r = np.array([1 - 0.06, -0.02])
    assert [m.advantage for m in got] == [pytest.approx([r[0] - r[1]] * 2), pytest.approx([r[1] - r[0]])]
    got = credited("reinforce++", [1.0, 0.0], drift, "reference.kl=0.1", "credit.whiten=false")
    assert [m.advantage for m in got] == [pytest.approx([0.94, 0.99]), pytest.approx([-0.02])]


def test_whitening_is_over_all_tokens_of_the_step():
    got = [x for m in credited("reinforce++", [1.0, 0.0], [[0.5, 0.1], [0.2]], "reference.kl=0.1") for x in m.advantage]
    raw = np.array([0.94, 0.99, -0.02])
    assert got == pytest.approx(((raw - raw.mean()) / (raw.std(ddof=1) + 1e-6)).tolist())
    flat = returns.whitened([np.full(3, 0.1), np.full(2, 0.1)], 1e-6)
    assert all((v == 0).all() for v in flat)


def test_ppo_rewards_and_returns():
    """r_t = -beta d_t with the score on the last token; return = A + V; whitening comes last."""
    values = [[[0.3, 0.6], [0.1]]]
    more = ("reference.kl=0.1", "credit.whiten=false")
    first, second = credited("ppo", [1.0, 0.0], [[0.5, 0.1], [0.2]], *more, values=values)
    expected = returns.gae([-0.05, 0.99], [0.3, 0.6], 1.0, 0.95)
    assert first.advantage == pytest.approx(expected.tolist())
    assert first.returns == pytest.approx((expected + [0.3, 0.6]).tolist()) and first.values == [0.3, 0.6]
    assert second.advantage == pytest.approx([-0.12]) and second.returns == pytest.approx([-0.02])


def test_value_loss():
    """max of the plain and the clipped squared error, weighed as the policy stream; no gradient once the clip holds."""
    item = Item([3], [], [Member([5, 6], COMPLETION, [0.5, 0.5], returns=[1.0, 0.0], values=[0.0, 0.0])])
    config = settings("ppo")
    batch = pack([item], [0], weigh([item], config), config)
    v = leaf(0.5, 0.1)  # moved by .5 towards its return (clip .2 active), and by .1 away from it
    loss = objectives.value_loss(v, batch, 0.2)
    assert loss.item() == pytest.approx((max(0.5**2, 0.8**2) + 0.1**2) / 2)
    assert effective(loss, v) == pytest.approx([0.0, -0.1])
    assert objectives.value_loss(v, batch, None).item() == pytest.approx((0.25 + 0.01) / 2)


def test_measured_log_probs_are_the_sampler_s():
    """Numbers read back per member, in order, whatever the packs."""
    policy, _ = tiny_policy()
    items = make_items()
    from unift.model.logprobs import logprobs

    config = settings("rloo")
    got = returns.measured(lambda b: logprobs(policy, b)[0], items, config)
    small = config.model_copy(update={"train": config.train.model_copy(update={"token_budget": 1})})
    other = returns.measured(lambda b: logprobs(policy, b)[0], items, small)
    for item, a, b in zip(items, got, other, strict=True):
        for m, x, y in zip(item.members, a, b, strict=True):
            assert len(x) == len(m.tokens) and x == pytest.approx(y, abs=1e-5)
    batch = pack(items, [1], weigh(items, config), config)
    l_S = logprobs(policy, batch)[0]
    assert l_S[batch.member_S == 2].tolist() == pytest.approx(got[1][2], abs=1e-5)


def test_critic_shares_the_trunk_and_starts_at_zero():
    policy, _ = tiny_policy()
    policy.critic = critic.new_critic(policy)
    config = settings("ppo")
    items = [Item([3, 4], [], [Member([5, 6], COMPLETION, [1.0, 1.0], returns=[1.0, 1.0], values=[0.0, 0.0])])]
    batch = pack(items, [0], weigh(items, config), config)
    l_S, _, v_S = critic.logprobs_and_values(policy, batch, 1.0)
    assert v_S.tolist() == [0.0, 0.0] and torch.equal(v_S, critic.values(policy, batch))
    torch.nn.init.constant_(policy.critic.weight, 0.1)
    objectives.value_loss(critic.values(policy, batch), batch, 0.2).backward()
    assert policy.critic.weight.grad.abs().sum() > 0 and policy.embeddings.weight.grad.abs().sum() > 0
    assert [n for n, _ in policy.named_parameters()][-2:] == ["critic.weight", "critic.bias"]


# ---------------------------------------------------------------------------------------------- solution tokens in a group


def hybrid(given=10, more=2, a=0.5):
    tokens = [*range(5, 5 + given), *range(20, 20 + more)]
    return Item([3, 4], [], [Member([7, 1], COMPLETION, -a), Member(tokens, COMPLETION, a, given=given)])


def test_prefix_rft_keeps_the_most_uncertain_fifth():
    """Prefix-RFT, arXiv 2507.01679: of the prefix only its 20% of highest entropy, tokens 3 and 6 of
    (.1,.9,.3,2,.05,.5,1.2,0,.7,.2); e = A / max_len."""
    config = settings("prefix-rft")
    h = [9.0, 9.0, 0.1, 0.9, 0.3, 2, 0.05, 0.5, 1.2, 0, 0.7, 0.2, 9.0, 9.0]
    batch, e = weights_of([hybrid()], config, entropy=fixed(*h))
    assert batch.role_S.tolist() == [1, 1] + [HINT] * 10 + [1, 1]
    z = 2 * 64
    expected = [-0.5 / z] * 2 + [0.5 / z if t in (3, 6) else 0.0 for t in range(10)] + [0.5 / z] * 2
    assert e == pytest.approx(expected)


def test_prefix_rft_without_prefix_is_dr_grpo():
    config, plain = settings("prefix-rft"), settings("dr-grpo")
    items = make_items()
    policy, _ = tiny_policy()
    bare = [Item(i.prompt + i.hint, [], i.members) for i in items]
    loss, got = packed_loss(policy, bare, config)
    expected, other = packed_loss(policy, bare, plain)
    assert loss == expected and all(torch.equal(a, b) for a, b in zip(got, other, strict=True))


def test_a_frozen_prefix_carries_no_loss():
    """off_policy none: the prefix is context (R3, BREAD); with likelihood.tokens=hint it counts once a group."""
    batch, e = weights_of([hybrid()], settings("dr-grpo"))
    assert (batch.role_S == COMPLETION).all() and e == pytest.approx([-0.5 / 128] * 2 + [0.5 / 128] * 2)
    twice = Item([3], [], [hybrid(given=3).members[1], hybrid(given=3).members[1]])
    config = settings("uft", "reference.kl=0", "likelihood.weight=0.6")
    batch, e = weights_of([twice], config)
    hint = batch.role_S == HINT
    assert int(hint.sum()) == 6 and torch.tensor(e)[hint].tolist() == pytest.approx([0.6 / 3 / 2] * 6)


def test_hybrid_gradient_equals_the_plain_sequence():
    """Given tokens inside a member are what they are in a sequence of their own: same log-probs as hint + completion."""
    from unift.model.logprobs import logprobs

    policy, _ = tiny_policy()
    config = settings("prefix-rft", "policy.off_policy_top=1")
    inside = Item([3, 4], [], [Member([5, 6, 7, 8, 1], COMPLETION, 1.0, given=3)])
    outside = Item([3, 4], [5, 6, 7], [Member([8, 1], COMPLETION, 1.0)])
    one = pack([inside], [0], weigh([inside], config), config)
    two_config = settings("uft", "likelihood.weight=1")
    two = pack([outside], [0], weigh([outside], two_config), two_config)
    assert torch.allclose(logprobs(policy, one)[0], logprobs(policy, two)[0], atol=1e-6)
    assert one.target_S.tolist() == two.target_S.tolist()


def test_luffy_golden():
    """A = +1, gamma = .1, pi = .25: e = .204082; own tokens keep the ratio; none on the solution, and no clip."""
    item = Item([3], [], [Member([5], COMPLETION, -1.0), Member([6, 1], DEMO, 1.0)])
    l = [np.log(0.25)] * 3
    for old in (None, [OLD] * 3):
        _, e = weights_of([item], settings("luffy", "policy.norm=seq_mean_token_sum", "policy.entropy=0"), l, old)
        assert e == pytest.approx([(-1.0 if old is None else -1.25) / 2, 0.204082 / 2, 0.204082 / 2], abs=1e-6)
    assert group_advantages(group(0, 0, 0, 0, 0, 0, 0), settings("luffy")) == pytest.approx([-1 / 8] * 7 + [7 / 8])


def test_srft_weights():
    """Four terms. H = 0/.5/2: w_SFT = .5/.303265/.067668, w_RL = .1/.164872/.738906 (SRFT, arXiv 2506.19767)."""
    for h, sft, rl in ((0.0, 0.5, 0.1), (0.5, 0.303265, 0.164872), (2.0, 0.067668, 0.738906)):
        g = group(1, 0)
        for s in g.samples:
            s.logps = [-h, -h]
        now = annealing.at(settings("srft"), 3, 10, [g])
        assert (now.likelihood.weight, now.credit.positive) == (
            pytest.approx(sft, abs=1e-6),
            pytest.approx(rl, abs=1e-6),
        )
        a = group_advantages(g, now)
        items = items_of([g], [a], [[6, 1]], now)
        l = [np.log(0.25)] * 6
        batch, e = weights_of(items, now, l)
        assert batch.role_S.tolist() == [1, 1, 1, 1, DEMO, DEMO]
        demo = sft / 2 + rl * 0.25 / 6  # NLL over 2 tokens, A pi over the 6 of the policy stream
        assert e == pytest.approx([rl / 6] * 2 + [-1 / 6] * 2 + [demo] * 2, abs=1e-6)


# ---------------------------------------------------------------------------------------------- gates, buffers, mixtures


def gated(method, *groups):
    config = settings(method)
    groups = [replace(g, row=i, row_id=f"r{i}") for i, g in enumerate(groups)]
    a = [group_advantages(g, config) for g in groups]
    return config, groups, items_of(groups, a, [[6, 7, 1]] * len(groups), config)


def test_hpt_gates_each_prompt():
    """All wrong: the solution instead of the completions. One right: RL alone, as in a batch without the other."""
    config, _, items = gated("hpt", group(0, 0, 0), group(1, 0, 0))
    assert [m.role for m in items[0].members] == [DEMO] and [m.role for m in items[1].members] == [COMPLETION] * 3
    batch, e = weights_of(items, config)
    assert torch.tensor(e)[batch.role_S == DEMO].tolist() == pytest.approx([1 / 3] * 3)
    _, alone = weights_of(items[1:], config)
    assert torch.tensor(e)[batch.role_S == COMPLETION].tolist() == pytest.approx(alone)


def test_hpt_extremes_are_sft_and_rl():
    policy, _ = tiny_policy()
    config, _, items = gated("hpt", group(0, 0), group(0, 0))
    _, got = packed_loss(policy, items, replace_entropy(config))
    _, sft = packed_loss(policy, [Item(i.prompt, [], [Member([6, 7, 1], DEMO)]) for i in items], settings("sft"))
    close(got, sft, 1e-6)


def test_relift_buffer():
    """Failed rows wait, oldest first; a full buffer is emptied by one batch; nothing of it is supervised before."""
    config, groups, items = gated("relift", group(0, 0), group(1, 0), group(0, 0))
    assert all(m.role == COMPLETION for i in items for m in i.members) and not any(i.supervised for i in items[:2])
    small = config.likelihood.model_copy(update={"buffer": 3})
    memory = RowMemory()
    assert memory.collect(groups, small) == [] and memory.waiting == [0, 2]
    unknown = replace(groups[0], samples=[Sample([5], [-1.0], True, error="timeout")])
    assert memory.collect([unknown], small) == [] and memory.waiting == [0, 2]  # nothing was learnt about the row
    again = RowMemory.load(memory.dump())
    assert again == memory and again.collect(groups, small) == [0, 2, 0] and again.waiting == [2]
    _, e = weights_of(items, config)
    assert e == pytest.approx([0, 0, 0, 0, 0.5 / 64, 0.5 / 64, -0.5 / 64, -0.5 / 64, 0, 0, 0, 0])


def test_two_arms_with_zero_advantages_are_sft():
    """Interleaving (arXiv 2507.07562) whose RL part has no signal leaves the SFT update alone."""
    policy, _ = tiny_policy()
    config, groups, items = gated("interleaved", group(0, 0), group(0, 0))
    loss, grads = packed_loss(policy, items, replace_entropy(config))
    assert loss == 0 and not any(g.any() for g in grads)


def replace_entropy(config):
    return config.model_copy(update={"policy": config.policy.model_copy(update={"entropy": 0.0})})


def test_chord_mu():
    """(1 - mu) GRPO + mu SFT; mu from .9 to .05 by a cosine over 40 % of the steps, then constant; phi = pi (1 - pi)."""
    config = settings("chord", "policy.norm=token_mean")
    mu = [annealing.at(config, s, 500, []).likelihood.weight for s in (0, 100, 200, 499)]
    assert mu == pytest.approx([0.9, 0.475, 0.05, 0.05])
    item = Item([3], [], [Member([5, 6], COMPLETION, 1.0), Member([7, 1], DEMO)])
    now = annealing.at(config, 100, 500, [])
    _, e = weights_of([item], now, [np.log(0.25)] * 4)
    assert e == pytest.approx([0.525 / 2] * 2 + [0.475 * 0.1875 / 2] * 2)


def test_likelihood_can_follow_the_hint():
    config = settings("uft", "likelihood.schedule=hint", "likelihood.weight=0.2")
    w = [annealing.at(config, s, 500, []).likelihood.weight for s in (0, 149, 299, 300)]
    assert w == pytest.approx([0.2 * 0.949975 / 0.95, 0.2 * 0.5 / 0.95, 0.2 * 0.05 / 0.95, 0.0], abs=1e-6)
    assert annealing.at(settings("uft"), 7, 500, []) == settings("uft")


# ---------------------------------------------------------------------------------------------- hint lengths a row


def test_bisection_is_adaback():
    """pass / fail / pass at .6, .3, .45 from [0, 1] -> [0, .6], [.3, .6], [0, .45] (AdaBack, arXiv 2506.18110)."""
    show, state = settings("adaback").show, None
    for shown, success, expected in ((0.6, 1.0, (0, 0.6)), (0.3, 0.0, (0.3, 0.6)), (0.45, 1.0, (0, 0.45))):
        state = schedules.advance(show, state, schedules.Seen(shown, success))
        assert state == pytest.approx(expected)
    u = [schedules.share(show, schedules.At(0, s, 300, "r"), (0.2, 0.4)) for s in range(300)]
    assert 0.2 <= min(u) < 0.22 and 0.38 < max(u) < 0.4 and np.mean(u) == pytest.approx(0.3, abs=0.01)


def test_adaptive_length_settles_where_the_target_succeeds():
    """A row that succeeds with chance p ends near p = 1/2, from either side, and never leaves [0, 1]."""
    show = settings("adaptive").show
    for start in (0.0, 1.0):
        state = (start, start)
        for _ in range(60):
            state = schedules.advance(show, state, schedules.Seen(0.0, state[0]))
        assert state[0] == pytest.approx(0.5, abs=0.01)
    assert schedules.advance(show, None, schedules.Seen(0.0, 0.0)) == (1.0, 1.0)
    assert schedules.advance(show, (0.05, 0.05), schedules.Seen(0.0, 1.0)) == (0.0, 0.0)
    k = [schedules.draw(show, schedules.At(0, s, 100, "r"), 9, (0.3, 0.3)) for s in range(100)]
    assert np.mean(k) == pytest.approx(1.5, abs=0.35)


def test_memory_moves_only_the_rows_that_were_seen():
    show = settings("adaptive").show
    memory = RowMemory()
    memory.see([group(1, 1, row_id="a"), group(0, 0, row_id="b"), group(1, 0, row_id="c")], show)
    assert memory.hints == {"a": (0.75, 0.75), "b": (1.0, 1.0), "c": (0.95, 0.95)}
    memory.see([replace(group(1, row_id="a"), samples=[Sample([5], [-1.0], True, error="timeout")])], show)
    assert memory.hints["a"] == (0.75, 0.75) and RowMemory.load(memory.dump()) == memory
    memory.see([group(1, 1, row_id="a")], settings("uft").show)
    assert memory.hints["a"] == (0.75, 0.75)


def test_window_of_prefix_rft():
    """u ~ U(low(t), .95): low from .95 to 0 by a cosine over the run."""
    show = settings("prefix-rft").show
    low = {step: schedules.window(show, schedules.At(0, step, 1000, ""), (0.0, 1.0))[0] for step in (0, 499, 999)}
    assert low == {0: pytest.approx(0.95, abs=1e-4), 499: pytest.approx(0.475), 999: pytest.approx(0)}
    for step in (0, 499, 999):
        u = [schedules.share(show, schedules.At(0, step, 1000, f"r{i}")) for i in range(2000)]
        assert low[step] <= min(u) and max(u) <= 0.95 and np.mean(u) == pytest.approx((low[step] + 0.95) / 2, abs=0.02)


def test_hints_in_tokens_never_reach_the_ending():
    from unift.rows.tokens import Encoded

    e = Encoded([3], list(range(10, 20)), [0, 3, 7])
    rows = [type("R", (), {"id": f"r{i}"})() for i in range(50)]
    config = settings("prefix-rft")
    groups = hinted(range(50), Split(rows, [e] * 50), Moment(0, 0, Stage(0, 1000, config)), {})
    assert {g.cuts_total for g in groups} == {7} and {len(g.hint) for g in groups} == {
        6
    }  # floor(u * 7), u in [.95, .95]
    later = hinted(range(50), Split(rows, [e] * 50), Moment(0, 999, Stage(0, 1000, config)), {})
    assert min(len(g.hint) for g in later) == 0 and max(len(g.hint) for g in later) == 6


# ---------------------------------------------------------------------------------------------- what a method needs


def test_needs():
    assert (
        needs.reference(settings("iw-sft"))
        and needs.reference(settings("rloo"))
        and not needs.reference(settings("dapo"))
    )
    assert needs.old(settings("psft")) and needs.old(settings("gspo")) and not needs.old(settings("rft"))
    assert needs.critic(settings("ppo")) and not needs.critic(settings("grpo"))
    assert (
        not needs.verifier(settings("upft"))
        and needs.verifier(settings("rollout-sft"))
        and not needs.verifier(settings("sft"))
    )
    assert (
        needs.solutions(settings("luffy"))
        and needs.solutions(settings("hpt"))
        and not needs.solutions(settings("upft"))
    )


def test_means_of_sequences():
    x = fixed(1, 2, 3, 10)
    assert sequence_mean(x, torch.tensor([0, 1, 0, 1])).tolist() == [2, 6, 2, 6]
    assert math.isclose(float(objectives.most_uncertain(x, torch.zeros(4, dtype=torch.long), 0.3).sum()), 1)
    assert Credit().positive == 1 and Show().members is None
