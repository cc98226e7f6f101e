"""Runs under a budget: what is used, where the schedules are, and runs that are killed on the way."""

from __future__ import annotations

import json

import pytest
import torch

from unift.config.budget import MOST
from unift.config.packaged import preset_names
from unift.config.resolve import parse_overrides, resolve
from unift.training.loop import train
from unift.training.run.metrics import read_metrics
from unift.types import ConfigError, Stopped

TINY = [
    "train.steps=40", "train.prompts=4", "sample.max_tokens=8", "data.train_rows=8", "threads=1",
    "data.test_rows=4", "eval.every=10", "save.every=3", "eval.train_rows=0", "train.lr=1e-3",
]  # fmt: skip
TIMES = ("time/", "tokens/per_second")


def settings(method, budget, *more):
    few = [] if method.startswith("sft") else ["sample.completions=2"]  # it would make SFT sample, too
    return resolve(method, recipe="lock", overrides=parse_overrides([*TINY, *few, f"train.budget={budget}", *more]))


def numbers(folder):
    return [{k: v for k, v in m.items() if not k.startswith(TIMES)} for m in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("method", "budget"),
    [("uft", "sampled=1500"), ("uft", "trained=2k"), ("uft", "tokens=4k"), ("sft", "tokens=2k"), ("sft", "trained=2k")],
)
def test_a_run_ends_nearest_to_its_budget_at_the_end_of_its_schedules(tmp_path, method, budget):
    config = settings(method, budget, "train.decay=linear", "train.warmup=0")
    result = train(config, tmp_path / "run")
    kind, amount = budget.split("=")
    kinds = ("sampled", "trained") if kind == "tokens" else (kind,)
    used = [sum(m[f"tokens/{k}"] for k in kinds) for m in numbers(tmp_path / "run")[1:]]
    wanted = float(amount.replace("k", "000"))
    largest = max(b - a for a, b in zip([0, *used], used, strict=False))
    assert abs(sum(result[f"tokens_{k}"] for k in kinds) - wanted) <= largest / 2 + 1e-9, "the last step is the nearest"
    metrics = numbers(tmp_path / "run")[1:]
    assert result["steps"] == len(metrics) != config.train.steps
    # Learning rate and hints are at the share of the budget that was used before the step.
    for before, m in zip([0.0, *used], metrics, strict=False):
        assert m["lr"] == pytest.approx(1e-3 * (1 - before / wanted), rel=1e-6)
    if method == "uft":
        assert metrics[0]["hint/prob"] > 0.9 and metrics[-1]["hint/prob"] == 0.0
    points = [m["step"] for m in metrics if "eval/test/accuracy" in m]
    assert len(points) == 4 and points[-1] == result["steps"], "40 steps of schedule, evaluated every 10"


@pytest.mark.slow
@pytest.mark.parametrize("method", preset_names())
def test_every_preset_keeps_a_budget_of_tokens(tmp_path, method):
    """Also those that train several times on a group, sample until a group carries signal, buffer rows or see no reward."""
    result = train(settings(method, "tokens=12k", "eval.every=0", "train.prompts=16", "data.train_rows=16"), tmp_path)
    used = [m["tokens/sampled"] + m["tokens/trained"] for m in numbers(tmp_path)[1:]]
    largest = max(b - a for a, b in zip([0, *used], used, strict=False))
    missed = abs(result["tokens_sampled"] + result["tokens_trained"] - 12_000)
    assert missed <= largest / 2 + 1e-9 and missed <= 1_200


def test_a_phase_that_costs_nothing_has_its_own_steps(tmp_path):
    """SFT samples no token: a third of the 40 steps, and the budget is RFT's."""
    result = train(settings("sft-rft", "sampled=4000"), tmp_path)
    metrics = numbers(tmp_path)[1:]
    own = sum(m["tokens/sampled"] == 0 for m in metrics)
    assert own == round(0.333 * 40) and result["tokens_sampled"] == pytest.approx(4000, rel=0.1)
    assert metrics[own - 1]["budget/schedule"] == pytest.approx(own / 40)


def test_a_method_that_costs_nothing_keeps_its_own_steps(tmp_path):
    assert train(settings("sft", "sampled=1000", "train.steps=6"), tmp_path)["steps"] == 6


def test_a_budget_beyond_all_bounds_ends(tmp_path):
    assert train(settings("sft", "trained=1e12", "train.steps=2", "save.every=0"), tmp_path)["steps"] == 2 * MOST


@pytest.mark.parametrize("stop", [1, 4, 8])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, stop):
    """Also across the boundary of phases, whose reference is of the checkpoint where the second began."""
    config = settings("sft-rft", "trained=4000")
    whole = train(config, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(config, tmp_path / "torn", report=lambda m, total: m["step"] == stop)
    again = train(config, tmp_path / "torn")
    assert numbers(tmp_path / "torn") == numbers(tmp_path / "whole")
    same = ("steps", "tokens_sampled", "tokens_trained", "completions", "test")
    assert {k: again[k] for k in same} == {k: whole[k] for k in same}
    one, two = (
        torch.load(sorted((tmp_path / n / "checkpoints").glob("step_*"))[-1] / "state.pt") for n in ("whole", "torn")
    )
    assert all(torch.equal(one["weights"][n], two["weights"][n]) for n in one["weights"])


def test_seconds_are_the_steps_own(tmp_path):
    result = train(settings("uft", "seconds=2", "eval.every=0"), tmp_path)
    steps = [m["time/step"] for m in read_metrics(tmp_path / "metrics.jsonl")[1:]]
    assert abs(result["seconds_training"] - 2) <= max(steps)


def test_a_budget_that_cannot_be_read_is_refused_before_anything():
    with pytest.raises(ConfigError, match="train.budget '2M': expected sampled=TOKENS"):
        settings("uft", "2M")


def test_completions_are_counted(tmp_path):
    result = train(settings("rft", "sampled=800"), tmp_path)
    assert (
        result["completions"]
        == result["steps"] * 4 * 2
        == json.loads((tmp_path / "result.json").read_text())["completions"]
    )
