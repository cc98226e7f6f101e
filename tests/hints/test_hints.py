"""Schedules and draws against UFT, arXiv 2505.16984, eq. B.1, and their purity."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from unift.config.sections import Show
from unift.hints import schedules
from unift.hints.schedules import At
from unift.rows.dataset import rows_of_step
from unift.rows.tokens import separators
from unift.types import ConfigError

COSINE = Show(schedule="cosine", high=0.95, low=0.05, until=0.6, cuts=5)
SEPARATORS = {
    1: [0, 1],
    3: [0, 1, 2, 3],
    4: [0, 1, 2, 3, 4],
    5: [0, 1, 2, 3, 4, 5],
    9: [0, 2, 4, 5, 7, 9],
    12: [0, 2, 5, 7, 10, 12],
    107: [0, 21, 43, 64, 86, 107],
}


def many(show, step, n, n_steps=9, total=500, seed=0):
    return np.array([schedules.draw(show, At(seed, step, total, f"row{i}"), n_steps) for i in range(n)])


# ---------------------------------------------------------------------------------------------- schedule


@pytest.mark.parametrize(
    ("t", "p"), [(1, 0.949975), (75, 0.818198), (150, 0.5), (225, 0.181802), (299, 0.050025), (300, 0.05), (301, 0.0)]
)
def test_schedule_values(t, p):
    """p(t) of UFT's eq. B.1 with steps from 1; here they count from 0."""
    assert schedules.probability(COSINE, t - 1, 500) == pytest.approx(p, abs=5e-7)


def test_schedule_is_the_papers_formula():
    """eq. B.1 counts t from 0: low + (high - low)/2 (1 + cos((t+1) pi / T_hint)) for t < T_hint."""
    for t in range(500):
        paper = 0.05 + 0.45 * (1 + np.cos((t + 1) * np.pi / 300)) if t < 300 else 0.0
        assert schedules.probability(COSINE, t, 500) == pytest.approx(paper, abs=1e-15)
    assert np.mean([schedules.probability(COSINE, s, 500) for s in range(300)]) == pytest.approx(0.4985, abs=1e-6)


def test_a_step_that_is_no_whole_one_never_shows_more_than_those_before():
    """train.budget: steps begin anywhere within T_hint, where t may be beyond it."""
    for total in (1, 2, 10, 500):
        t_hint = schedules.hinted_steps(COSINE, total)
        p = [schedules.probability(COSINE, x, total) for x in np.arange(0, t_hint, 0.1)]
        assert p == sorted(p, reverse=True) and p[-1] == pytest.approx(0.05)


def test_last_hinted_step():
    """t = T_hint = 300 is step 299; from step 300 on the chance is exactly 0, not p_low."""
    assert schedules.hinted_steps(COSINE, 500) == 300
    assert many(COSINE, 299, 300).any()
    assert all(not many(COSINE, step, 40).any() for step in range(300, 500, 7))
    assert {schedules.probability(COSINE, s, 500) for s in range(300, 500)} == {0.0}


@pytest.mark.parametrize(("n_steps", "expected"), SEPARATORS.items())
def test_separators(n_steps, expected):
    assert separators(n_steps, 5) == expected


@pytest.mark.parametrize("cuts", [1, 2, 5, 8])
def test_separators_are_increasing_and_complete(cuts):
    for n in range(1, 130):
        sep = separators(n, cuts)
        assert len(sep) == min(cuts, n) + 1 and (sep[0], sep[-1]) == (0, n)
        assert all(a < b for a, b in zip(sep, sep[1:]))
    assert separators(0, cuts) == [0]


# ---------------------------------------------------------------------------------------------- draws


@pytest.mark.parametrize(("t", "n_steps"), [(1, 9), (75, 5), (150, 107), (150, 3), (299, 12)])
def test_draws_are_binomial(t, n_steps):
    """k ~ Binomial(min(5, S), p(t)): mean within 3 sigma, chi-square above 1e-4, 10,000 draws."""
    from scipy.stats import binom, chisquare

    n, num, p = 10_000, min(5, n_steps), schedules.probability(COSINE, t - 1, 500)
    k = many(COSINE, t - 1, n, n_steps)
    assert abs(k.mean() - num * p) < 3 * np.sqrt(num * p * (1 - p) / n)
    expected, seen = n * binom.pmf(np.arange(num + 1), num, p), np.bincount(k, minlength=num + 1)
    assert len(seen) == num + 1
    rare = expected < 5
    if rare.any():
        expected = np.append(expected[~rare], expected[rare].sum())
        seen = np.append(seen[~rare], seen[rare].sum())
    assert chisquare(seen, expected).pvalue > 1e-4


def test_draws_differ_between_seeds_steps_and_rows():
    """Shares of equal draws are those of independent draws, so no part of the address is ignored."""
    a = many(COSINE, 149, 4000)
    for b in (many(COSINE, 149, 4000, seed=1), many(COSINE, 150, 4000), np.roll(a, 1)):
        equal = np.mean(a == b)  # sum of squared Binomial(5, 1/2) probabilities: 252/1024
        assert equal == pytest.approx(252 / 1024, abs=4 * np.sqrt(0.19 / 4000))


def test_draws_are_pure():
    """Any order, any process: the same hints. So with workers, and after a resume."""
    calls = [(step, f"row{i}") for step in (0, 7, 149, 298, 299, 300) for i in range(9)]
    draw = lambda c: schedules.draw(COSINE, At(3, c[0], 500, c[1]), 9)  # noqa: E731
    forward = [draw(c) for c in calls]
    assert [draw(c) for c in reversed(calls)][::-1] == forward
    np.random.seed(5)
    assert [draw(c) for c in calls] == forward
    code = (
        "import json, sys; from unift.hints import schedules as hints; from unift.config.sections import Show; "
        f"show = Show.model_validate_json({COSINE.model_dump_json()!r}); "
        "print(json.dumps([hints.draw(show, hints.At(3, s, 500, r), 9) for s, r in json.load(sys.stdin)]))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(calls), capture_output=True, text=True, check=True
    )
    assert json.loads(out.stdout) == forward


def test_r3_is_uniform_at_every_step():
    """0..num equally likely, T_hint or not: also at the first and at the last of 500 steps."""
    from scipy.stats import chisquare

    show = Show(schedule="uniform", cuts=5)
    for step in (0, 299, 300, 499):
        seen = np.bincount(many(show, step, 3000, 9), minlength=6)
        assert len(seen) == 6 and chisquare(seen).pvalue > 1e-4
    assert set(many(show, 499, 200, 2)) == {0, 1, 2}


@pytest.mark.parametrize("total", [500, 97])
@pytest.mark.parametrize("n_steps", [1, 2, 3, 5, 9])
def test_staircase_has_equal_stages(n_steps, total):
    """From the whole solution down to nothing, one cut at a time, stages equal up to one step for every num."""
    show = Show(schedule="staircase", until=0.6, cuts=5)
    num, t_hint = min(5, n_steps), round(0.6 * total)
    k = [schedules.draw(show, At(0, s, total, "r"), n_steps) for s in range(total)]
    lengths = [k[:t_hint].count(v) for v in range(num + 1)]
    assert k == sorted(k, reverse=True) and k[0] == num and k[t_hint - 1] == 0 and set(k[t_hint:]) == {0}
    assert sum(lengths) == t_hint and max(lengths) - min(lengths) <= 1


def test_fixed_schedules():
    for step in (0, 42, 99):
        assert not many(Show(schedule="none"), step, 20, total=100).any()
        assert set(many(Show(schedule="all"), step, 20, 9, 100)) == {5}
        assert set(many(Show(schedule="constant", high=1.0), step, 20, 3, 100)) == {3}
        assert not many(Show(schedule="constant", high=0.0), step, 20, total=100).any()
    assert set(many(Show(schedule="all"), 0, 5, n_steps=0)) == {0}
    k = many(Show(schedule="constant", high=0.3), 99, 4000, 9, 100)
    assert abs(k.mean() - 1.5) < 3 * np.sqrt(5 * 0.3 * 0.7 / 4000)


def test_rounded_draw_is_the_rounded_mean():
    show = COSINE.model_copy(update={"draw": "rounded"})
    for t, k in ((1, 5), (75, 4), (150, 2), (225, 1), (299, 0)):  # 5 p(t) = 4.75, 4.09, 2.5, 0.91, 0.25
        assert set(many(show, t - 1, 5)) == {k}


def test_two_point_draws_are_the_neighbours_of_the_mean():
    """k is floor or ceil of 5 p(t), and its mean is 5 p(t): the only such law."""
    show = COSINE.model_copy(update={"draw": "two_point"})
    for t, low in ((1, 4), (75, 4), (150, 2), (225, 0), (299, 0)):  # 5 p(t) = 4.75, 4.09, 2.5, 0.91, 0.25
        k, mean = many(show, t - 1, 4000), 5 * schedules.probability(COSINE, t - 1, 500)
        share = mean - low  # of the upper one
        assert set(k) == {low, low + 1}
        assert abs((k - low).mean() - share) < 4 * np.sqrt(share * (1 - share) / 4000)
    assert set(many(show, 149, 50, n_steps=0)) == {0}
    assert set(many(Show(schedule="constant", draw="two_point", high=1.0), 3, 50, 3, 100)) == {3}


@pytest.mark.parametrize("draw", ["binomial", "two_point", "rounded"])
@pytest.mark.parametrize("schedule", ["none", "all", "constant", "uniform", "cosine", "staircase"])
def test_expected_share_is_the_mean_of_the_draws(schedule, draw):
    """What --dry-run and the plots show is E[k] / num of what is drawn."""
    show = Show(schedule=schedule, draw=draw, high=0.9, low=0.1, until=0.5, cuts=5)
    for step in (0, 17, 49, 50, 99):
        share = many(show, step, 1500, 9, 100) / 5
        assert (
            abs(share.mean() - schedules.expected_share(show, step, 100, 9))
            <= 3.5 * share.std() / np.sqrt(1500) + 1e-12
        )


# ---------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize(("prompts", "n_rows"), [(4, 10), (3, 9), (7, 3), (1, 5)])
def test_rows_of_step_are_epochs_laid_end_to_end(prompts, n_rows):
    """Every epoch holds every row once; the last partial batch is filled from the next epoch, nothing is dropped."""
    steps = 6 * n_rows
    flat = [r for step in range(steps) for r in rows_of_step(0, step, prompts, range(n_rows))]
    assert len(flat) == steps * prompts
    epochs = [flat[i : i + n_rows] for i in range(0, len(flat), n_rows)]
    assert all(sorted(e) == list(range(n_rows)) for e in epochs)
    assert len({tuple(e) for e in epochs}) > 1


def test_rows_of_step_are_pure():
    order = [rows_of_step(0, step, 4, range(10)) for step in range(9)]
    assert [rows_of_step(0, step, 4, range(10)) for step in reversed(range(9))][::-1] == order
    assert order != [rows_of_step(1, step, 4, range(10)) for step in range(9)]


def test_no_rows():
    with pytest.raises(ConfigError, match="no training rows"):
        rows_of_step(0, 0, 4, range(0))
