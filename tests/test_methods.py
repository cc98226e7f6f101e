"""Schedules, credit, objectives and reductions against methods.md (fixtures F1 to F4, sections 1.3 and 1.14)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unift import credit, hints, objectives, rng
from unift.batch import COMPLETION, Item, Member, pack, weigh
from unift.config import Credit, Show, parse_overrides, resolve

COSINE = Show(schedule="cosine", high=0.95, low=0.05, until=0.6)


def leaf(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def effective(loss, l):
    """e_t = -dL/dl_t."""
    (grad,) = torch.autograd.grad(loss, l)
    return (-grad).tolist()


# ---------------------------------------------------------------------------------------------- hints


def test_schedule_values():
    values = {1: 0.949975, 75: 0.818198, 150: 0.5, 225: 0.181802, 299: 0.050025, 300: 0.05, 301: 0.0}
    for t, p in values.items():
        assert hints.probability(COSINE, t - 1, 500) == pytest.approx(p, abs=5e-7)
    assert np.mean([hints.probability(COSINE, s, 500) for s in range(300)]) == pytest.approx(0.4985, abs=1e-6)


def test_separators():
    expected = {
        1: [0, 1],
        3: [0, 1, 2, 3],
        4: [0, 1, 2, 3, 4],
        5: [0, 1, 2, 3, 4, 5],
        9: [0, 2, 4, 5, 7, 9],
        12: [0, 2, 5, 7, 10, 12],
        107: [0, 21, 43, 64, 86, 107],
    }
    for n, cuts in expected.items():
        assert hints.separators(n, 5) == cuts


@pytest.mark.parametrize("t", [1, 75, 150, 299])
def test_draws_are_binomial(t):
    from scipy.stats import binom, chisquare

    n = 10_000
    k = np.array([hints.draw(COSINE, 0, t - 1, 500, f"row{i}", 9) for i in range(n)])
    p = hints.probability(COSINE, t - 1, 500)
    assert abs(k.mean() - 5 * p) < 3 * np.sqrt(5 * p * (1 - p) / n)
    expected = n * binom.pmf(np.arange(6), 5, p)
    often = expected >= 5
    seen = np.bincount(k, minlength=6)
    f_obs, f_exp = np.append(seen[often], seen[~often].sum()), np.append(expected[often], expected[~often].sum())
    if f_exp[-1] == 0:
        f_obs, f_exp = f_obs[:-1], f_exp[:-1]
    assert chisquare(f_obs, f_exp * f_obs.sum() / f_exp.sum()).pvalue > 1e-4


def test_no_hint_after_t_hint():
    assert all(hints.draw(COSINE, 0, step, 500, f"r{i}", 5) == 0 for step in range(300, 500, 7) for i in range(50))
    assert any(hints.draw(COSINE, 0, 299, 500, f"r{i}", 5) for i in range(200))


def test_draws_are_pure():
    """The same address gives the same draw, whatever was drawn before; another step, seed or row gives its own."""
    first = [hints.draw(COSINE, 3, s, 500, "a", 9) for s in range(200)]
    np.random.default_rng().random(5)
    assert [hints.draw(COSINE, 3, s, 500, "a", 9) for s in reversed(range(200))][::-1] == first
    assert [hints.draw(COSINE, 4, s, 500, "a", 9) for s in range(200)] != first
    assert [hints.draw(COSINE, 3, s, 500, "b", 9) for s in range(200)] != first
    assert rng.key("a", 1) != rng.key("a", "1")


@pytest.mark.parametrize("n_steps", [1, 3, 5, 9])
def test_staircase_has_equal_stages(n_steps):
    show = Show(schedule="staircase", until=0.6, cuts=5)
    k = [hints.draw(show, 0, s, 500, "r", n_steps) for s in range(500)]
    num = min(5, n_steps)
    lengths = [k[:300].count(v) for v in range(num + 1)]
    assert k == sorted(k, reverse=True) and max(lengths) - min(lengths) <= 1 and set(k[300:]) == {0}


def test_r3_is_uniform_at_every_step():
    show = Show(schedule="uniform", cuts=5)
    k = np.array([hints.draw(show, 0, 499, 500, f"r{i}", 9) for i in range(6000)])
    assert (abs(np.bincount(k, minlength=6) - 1000) < 4 * np.sqrt(1000 * 5 / 6)).all()


def test_rows_of_step():
    """Epochs are permutations laid end to end: nothing is dropped, and any step can be asked for alone."""
    rows = [r for step in range(15) for r in hints.rows_of_step(0, step, 4, 10)]
    assert all(sorted(rows[i : i + 10]) == list(range(10)) for i in range(0, 60, 10))
    assert hints.rows_of_step(0, 7, 4, 10) == rows[28:32]
    assert len(hints.rows_of_step(0, 0, 25, 10)) == 25


# ---------------------------------------------------------------------------------------------- credit


def test_fixture_f2():
    scores = [1, 0.1, 0, 0.1]
    table = {
        ("group_mean", "sample_std"): (1.492402, -0.426401, -0.639601, -0.426401),
        ("group_mean", "population_std"): (1.723277, -0.492365, -0.738547, -0.492365),
        ("group_mean", "none"): (0.7, -0.2, -0.3, -0.2),
        ("leave_one_out", "none"): (0.933333, -0.266667, -0.4, -0.266667),
    }
    for (baseline, scale), expected in table.items():
        got = credit.advantages(scores, Credit(baseline=baseline, scale=scale))
        assert got == pytest.approx(expected, abs=1e-6)


def test_equal_scores_are_exactly_zero():
    assert credit.advantages([0.1, 0.1, 0.1], Credit()) == [0.0, 0.0, 0.0]
    assert credit.advantages([], Credit()) == []


# ---------------------------------------------------------------------------------------------- objectives


@pytest.mark.parametrize(("a", "e"), [(1.0, 0.0), (-1.0, -1.25)])
def test_golden_ppo(a, e):
    """pi = .25, pi_old = .20: rho = 1.25 is clipped for A > 0 and not for A < 0."""
    l = leaf(np.log(0.25))
    s = objectives.clipped_surrogate(l, torch.tensor([0.2]).double().log(), torch.tensor([a]), 0.2, 0.2, None)
    assert effective(-s.sum(), l) == pytest.approx([e])


def test_golden_dapo_and_reinforce():
    l = leaf(np.log(0.25))
    s = objectives.clipped_surrogate(l, torch.tensor([0.2]).double().log(), torch.ones(1), 0.2, 0.28, None)
    assert effective(-s.sum(), l) == pytest.approx([1.25])
    assert effective(-objectives.reinforce(l, torch.tensor([2.0])).sum(), l) == pytest.approx([2.0])


def test_dual_clip_f4():
    l, a = leaf(np.log(5.0)), torch.tensor([-1.0]).double()
    s = objectives.clipped_surrogate(l, torch.zeros(1).double(), a, 0.2, 0.2, None)
    assert -s.item() == pytest.approx(5.0)
    s = objectives.clipped_surrogate(l, torch.zeros(1).double(), a, 0.2, 0.2, 3.0)
    assert -s.item() == pytest.approx(3.0) and effective(-s.sum(), l) == [0.0]


def test_kl_f3_and_golden():
    l, ref = leaf(-1.0, -2.0), torch.tensor([-1.5, -1.0]).double()
    assert objectives.kl_penalty(l, ref, "k3").tolist() == pytest.approx([0.106531, 0.718282], abs=1e-6)
    l = leaf(np.log(0.25))
    half = torch.tensor([0.5]).double().log()
    assert effective(objectives.kl_penalty(l, half, "k3").sum(), l) == pytest.approx([1.0])
    assert effective(objectives.kl_penalty(l, half, "k2").sum(), l) == pytest.approx([0.693147], abs=1e-6)


def settings(method, *more):
    return resolve(method, overrides=parse_overrides(["data.task=lock", *more]))


ITEMS = [
    Item([3, 4], [5, 6, 7], [Member([8, 9, 1], COMPLETION, 1.5), Member([8, 1], COMPLETION, -0.5)]),
    Item([3], [], [Member([4], COMPLETION, 0.7), Member([6, 6, 6, 1], COMPLETION, -0.7)]),
]


def weights_of(items, config):
    """e_t of every supervised token at ratio 1, by role, with l a leaf."""
    batch = pack(items, range(len(items)), weigh(items, config), config)
    l = torch.full((len(batch.target_S),), -1.3, dtype=torch.float64, requires_grad=True)
    parts = objectives.losses(l, None, batch, config.policy, "k3")
    (grad,) = torch.autograd.grad(parts["policy"] + parts["likelihood"], l)
    return batch, -grad


def test_effective_weights_of_uft():
    """COMPLETION: A/Z; HINT: beta/Z_hint whatever the reward; PROMPT: no loss position at all."""
    config = settings("uft", "likelihood.weight=0.25", "reference.kl=0")
    batch, e_S = weights_of(ITEMS, config)
    own = batch.role_S == COMPLETION
    expected = [1.5] * 3 + [-0.5] * 2 + [0.7] + [-0.7] * 4
    assert e_S[own].tolist() == pytest.approx([a / 10 for a in expected])
    assert e_S[~own].tolist() == pytest.approx([0.25 / 3] * 3)
    assert batch.target_S.tolist() == [5, 6, 7, 8, 9, 1, 8, 1, 4, 6, 6, 6, 1]
    assert float(batch.kl_w_S[~own].abs().sum()) == 0.0


def test_normalisers():
    """methods.md section 0: hints of 1 token (CE 2.0) and 9 tokens (CE 1.0) -> 1.5, 1.1, 5.5."""
    items = [Item([2], [3], []), Item([2], [4] * 9, [])]
    ce = [[2.0], [1.0] * 9]
    for norm, expected in (("microbatch_token_mean", 1.5), ("token_mean", 1.1), ("seq_mean_token_sum", 5.5)):
        more = ["train.micro_prompts=1"] if norm.startswith("micro") else []
        config = settings("uft", "likelihood.weight=1", f"likelihood.norm={norm}", *more)
        w = weigh(items, config).likelihood
        assert sum(x * sum(c) for x, c in zip(w, ce, strict=True)) == pytest.approx(expected)


def test_p_zero_is_rft_bit_for_bit():
    """Without a hint on any row, UFT's packed batch and loss are RFT's: every tensor equal."""
    bare = [Item(i.prompt, [], i.members) for i in ITEMS]
    (a, e_a), (b, e_b) = weights_of(bare, settings("uft")), weights_of(bare, settings("rft"))
    assert torch.equal(e_a, e_b)
    for name, value in vars(a).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value.nan_to_num(), getattr(b, name).nan_to_num()), name
    show = Show(schedule="cosine", high=0.0, low=0.0)
    assert all(hints.draw(show, 0, s, 100, "r", 5) == 0 for s in range(100))


def test_uniform_with_weight_zero_is_r3():
    a = weights_of(ITEMS, settings("uft", "show.schedule=uniform", "likelihood.weight=0"))
    b = weights_of(ITEMS, settings("r3"))
    assert torch.equal(a[1], b[1]) and torch.equal(a[0].target_S, b[0].target_S)
    uft, r3 = settings("uft", "show.schedule=uniform", "likelihood.weight=0"), settings("r3")
    for name in ("sample", "credit", "policy", "reference", "train"):
        assert getattr(uft, name) == getattr(r3, name)


def test_all_hint_and_no_completions_is_sft():
    """Only the hint's likelihood is left: the mean NLL of the span."""
    items = [Item([3, 4], [5, 6, 7], []), Item([3], [8, 9], [])]
    config = settings("uft", "show.schedule=all", "sample.completions=0", "likelihood.weight=1", "reference.kl=0")
    _, e_S = weights_of(items, config)
    assert e_S.tolist() == pytest.approx([1 / 5] * 5)


def test_equal_rewards_leave_the_likelihood_alone():
    quiet = [Item(i.prompt, i.hint, [Member(m.tokens, m.role, 0.0) for m in i.members]) for i in ITEMS]
    batch, e_S = weights_of(quiet, settings("uft", "reference.kl=0"))
    assert batch.target_S.tolist() == [5, 6, 7] and e_S.tolist() == pytest.approx([0.001 / 3] * 3)
