"""The step that the benchmarks time is unift's own: it runs, and forwards each prefix once. So do its ablations."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def common(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("common")


def test_a_step_of_the_benchmarks(common):
    """2 groups of G = 3, prefix 9, 4 tokens each: (9 + 3 * 3) * 2 tokens forwarded, 24 sampled, both parts timed."""
    model, tokenizer = common.model_3m()
    step = common.Unift(model, tokenizer, common.Shape(9, 0, 4, 2, 3)).step([[5] * 9, [7] * 9])
    assert step["forwarded"] == 36 and step["sampled"] == 24
    assert step["gap"] < 1e-5 and step["seconds"] >= step["generate"] > 0


def test_ablations(common):
    """Each technique can be switched off, and the step is the same: only without a shared prefix are there more tokens."""
    ablation = importlib.import_module("ablation")
    model, tokenizer = common.model_3m()
    side = common.Unift(model, tokenizer, common.Shape(9, 0, 4, 2, 3))
    for name in ablation.NAMES:
        with ablation.without(name, side):
            step = side.step([[5] * 9, [7] * 9])
        assert step["forwarded"] == (72 if name == "shared prefix in training" else 36) and step["gap"] < 1e-5, name
