"""Advantages: fixture F2 of methods.md and its identities."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unift.config.sections import Credit
from unift.credit.advantages import advantages

F2 = [1, 0.1, 0, 0.1]
TABLE = {
    ("group_mean", "sample_std"): (1.492402, -0.426401, -0.639601, -0.426401),
    ("group_mean", "population_std"): (1.723277, -0.492365, -0.738547, -0.492365),
    ("group_mean", "none"): (0.7, -0.2, -0.3, -0.2),
    ("leave_one_out", "none"): (0.933333, -0.266667, -0.4, -0.266667),
}
EVERY = [
    Credit(baseline=b, scale=s)
    for b in ("group_mean", "leave_one_out")
    for s in ("sample_std", "population_std", "none")
]
scores = st.lists(st.floats(-5, 5), min_size=2, max_size=9)


@pytest.mark.parametrize(("kind", "expected"), TABLE.items())
def test_f2(kind, expected):
    got = advantages(F2, Credit(baseline=kind[0], scale=kind[1]))
    assert got == pytest.approx(expected, abs=5e-7)


def test_epsilon_stands_beside_the_std():
    """(r - mean) / (std + 1e-6) by default, as in UFT's official code."""
    r = np.array(F2)
    assert advantages(F2, Credit()) == ((r - r.mean()) / (r.std(ddof=1) + 1e-6)).tolist()
    assert advantages(F2, Credit(epsilon=1.0)) == pytest.approx(((r - r.mean()) / (r.std(ddof=1) + 1)).tolist())


def test_one_format_score_looks_like_a_right_answer():
    """docs/traps.md 3: (.1, 0, 0, 0) gives (1.5, -.5, -.5, -.5), which is why format_score is 0 by default."""
    assert advantages([0.1, 0, 0, 0], Credit()) == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-4)


@given(scores)
def test_leave_one_out_is_its_definition(r):
    got = advantages(r, Credit(baseline="leave_one_out", scale="none"))
    expected = [x - np.mean(r[:i] + r[i + 1 :]) for i, x in enumerate(r)]
    assert got == pytest.approx(expected, abs=1e-9)


@given(scores, st.sampled_from(EVERY))
def test_group_advantages_add_up_to_zero(r, credit):
    a = advantages(r, credit)
    assert abs(sum(a)) < 1e-6 * max(1.0, max(map(abs, a)))


@pytest.mark.parametrize("credit", EVERY, ids=lambda c: f"{c.baseline}-{c.scale}")
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3, 1e9])
def test_equal_scores_are_exactly_zero(value, credit):
    """By equality: the mean of three 0.1 is not 0.1 in floating point."""
    for n in (2, 3, 7):
        assert advantages([value] * n, credit) == [0.0] * n


def test_group_of_one():
    """docs/traps.md 21: a single completion is its own baseline and earns nothing; never its raw reward."""
    for credit in EVERY:
        assert advantages([1.0], credit) == [0.0]
    assert advantages([0.7], Credit(baseline="none", scale="none")) == [0.7]
    assert advantages([], Credit()) == []


def test_no_baseline():
    assert advantages(F2, Credit(baseline="none", scale="none")) == F2
    assert advantages([1.0, 1.0], Credit(baseline="none", scale="none")) == [1.0, 1.0]


@pytest.mark.parametrize("baseline", ["none", "sign", "critic", "partition"])
def test_only_a_difference_is_scaled(baseline):
    """Three right completions without a baseline are worth 1 each, not 1 / epsilon; the default scale is the sample std."""
    assert advantages([1.0, 1.0, 1.0], Credit(baseline=baseline)) == [1.0] * 3
