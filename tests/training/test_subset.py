"""Evaluations of a run: a subset while it trains, all held-out rows before and after, the last weights judged once."""

from __future__ import annotations

import json

import pytest

from unift.config.resolve import parse_overrides, resolve
from unift.intervals import wilson
from unift.training import loop
from unift.training.evaluate import evaluate_split
from unift.training.loop import train
from unift.training.run.metrics import read_metrics
from unift.types import Stopped

STEPS, ROWS, FEW = 60, 24, 5


def config(*more):
    words = [
        f"train.steps={STEPS}",
        f"data.test_rows={ROWS}",
        f"eval.subset={FEW}",
        "eval.every=20",
        "eval.train_rows=3",
    ]
    words += ["data.train_rows=40", "save.every=20", "threads=1", *more]
    return resolve("sft", recipe="lock", overrides=parse_overrides(words))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("subset")
    return folder, train(config(), folder)


def alone(folder, rows):
    """The accuracy that `unift eval` measures of what the run saved, on the first so many held-out rows."""
    words = {"model.path": str(folder / "model")} if folder else {}
    items = [f"eval.rows={rows}", "eval.subset=null", *(f"{name}={value}" for name, value in words.items())]
    return evaluate_split(config(*items), "test", 0).greedy


def test_the_subset_is_the_first_rows(run):
    folder, result = run
    points = {m["step"]: m for m in read_metrics(folder / "metrics.jsonl") if "eval/test/accuracy" in m}
    assert sorted(points) == [0, 20, 40, 60]
    for step, where in ((0, None), (60, folder)):
        few, whole = alone(where, FEW), alone(where, ROWS)
        assert points[step]["eval/test/accuracy"] == few.accuracy
        assert (points[step]["eval/test/low"], points[step]["eval/test/high"]) == (few.low, few.high)
        assert result["base" if step == 0 else "test"] == whole.__dict__ and whole.n == ROWS
    right = round(points[40]["eval/test/accuracy"] * FEW)
    assert points[40]["eval/test/low"] == wilson(right, FEW)[0]
    assert result["test"]["accuracy"] > result["base"]["accuracy"], "else the subset could be of either"


def test_every_row_is_judged_once(run):
    """Before, at steps 20 and 40, at the end, and the training rows."""
    _, result = run
    assert result["scorer"]["eval"]["total"] == ROWS + FEW + FEW + ROWS + 3


def test_stopped_between_the_last_step_and_the_result(run, tmp_path, monkeypatch):
    """What was measured after the last step is in its checkpoint, and is not measured again."""
    with pytest.raises(Stopped):
        train(config(), tmp_path, report=lambda metrics, total: metrics["step"] == STEPS)
    asked = []
    real = loop.announced
    monkeypatch.setattr(loop, "announced", lambda run, what, split: asked.append(what) or real(run, what, split))
    result = train(config(), tmp_path)
    assert asked == ["training rows"]
    clocks = ("seconds", "seconds_training")
    strip = lambda r: json.loads(json.dumps({k: v for k, v in r.items() if k not in clocks}))  # noqa: E731
    assert strip(result) == strip(run[1])
