"""One answer out of several: by majority, by likelihood; ties, missing answers, and the whole way of `unift eval --vote`."""

from __future__ import annotations

import pytest

from unift.intervals import wilson
from unift.training.vote import Judged, answer_of, by_likelihood, by_majority, chosen
from unift.types import ConfigError, Row


def test_majority():
    assert by_majority(["a", "b", "b", "a", "b"]) == 1
    assert by_majority(["a", "b", "b", "a"]) == 0  # a tie: the earlier one
    assert by_majority([None, None, "b"]) == 2 and by_majority([None, None]) is None and by_majority([]) is None


def test_likelihood():
    assert by_likelihood([-2.0, -0.5, -0.5]) == 1 and by_likelihood([]) is None


def test_what_votes():
    """The answer at its place without spaces; a task without a mark votes with its whole text."""
    row, lock = Row("a", "1+1=", ("2",), "", "2", task="math"), Row("b", "ab>", (), "", "", task="lock")
    text = "so <answer> 1 / 2 </answer>"
    assert answer_of(row, text, "tags") == "1/2" and answer_of(row, "so 1/2", "tags") is None
    assert answer_of(row, "so \\boxed{7}", "boxed") == "7" and answer_of(lock, "Ha1b2.", "tags") == "Ha1b2."


def test_shares_of_rows():
    """Row 1: the majority is right and the likeliest wrong; row 2: the other way; row 3: no answer, and the likeliest wrong."""
    rows = [Row(str(i), "p", (), "", "", task="lock") for i in range(3)]
    groups = [
        [Judged(True, "x", -2.0), Judged(True, "x", -2.0), Judged(False, "y", -1.0)],
        [Judged(False, "x", -2.0), Judged(False, "x", -2.0), Judged(True, "y", -1.0)],
        [Judged(False, "", -2.0)] * 3,
    ]
    found = chosen(rows, groups, "tags")
    low, high = wilson(1, 3)
    assert found == {name: {"accuracy": 1 / 3, "low": low, "high": high} for name in ("vote@3", "rerank@3")}


def holds_three(completion, row):
    return float("3" in completion)


def test_a_vote_of_the_base():
    """End to end on the embedded base: no choice is above the best of the same samples, and pass@k is what it is without."""
    import unift

    more = {"data.train_rows": 4, "data.test_rows": 8, "threads": 1}
    found = unift.evaluate("embedded:lock", recipe="lock", reward=holds_three, samples=4, vote=True, **more)
    assert list(found.pass_at) == ["pass@1", "pass@2", "pass@4", "vote@4", "rerank@4"]
    assert 0 < found.pass_at["pass@1"]["accuracy"] < found.pass_at["pass@4"]["accuracy"]
    for name in ("vote@4", "rerank@4"):
        assert 0 < found.pass_at[name]["accuracy"] <= found.pass_at["pass@4"]["accuracy"]
    plain = unift.evaluate("embedded:lock", recipe="lock", reward=holds_three, samples=4, **more)
    assert {k: v for k, v in found.pass_at.items() if k.startswith("pass")} == plain.pass_at
    with pytest.raises(ConfigError, match="found samples=1"):
        unift.evaluate("embedded:lock", recipe="lock", samples=1, vote=True, **more)
