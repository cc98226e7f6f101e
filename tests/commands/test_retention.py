"""Retention: mean log-probs against a plain forward, targets of both kinds of methods, and a run measured end to end."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import tiny_policy
from plain import token_logprobs

from unift.commands import retention
from unift.config.resolve import parse_overrides, resolve
from unift.rows.inspect import write_rows
from unift.rows.tasks import make_rows
from unift.training.loop import train
from unift.types import ConfigError

TINY = [
    "train.steps=4",
    "train.prompts=4",
    "sample.completions=4",
    "data.train_rows=8",
    "data.test_rows=6",
    "threads=1",
]


def test_mean_logprob_is_that_of_plain_sequences():
    policy, plain = tiny_policy(torch.float64)
    pairs = [([3, 4, 5], [6, 7, 1]), ([3], [9]), ([8, 8], [5, 4, 3, 2, 1]), ([4, 4], [])]
    logps, _ = token_logprobs(plain, [c + t for c, t in pairs])
    expected = torch.cat([l[len(c) - 1 :] for l, (c, _) in zip(logps, pairs, strict=True)]).mean().item()
    for budget in (1, 7, 10**6):
        assert retention.mean_logprob(policy, [retention.Pair(*p) for p in pairs], budget) == pytest.approx(
            expected, abs=1e-7
        )  # RMSNorm computes in fp32


def test_run_is_measured_against_its_base(tmp_path):
    """SFT on the lock makes its own rows likelier: kept negative there; the base's numbers are those before training."""
    rows = tmp_path / "lock.jsonl"
    write_rows(make_rows("lock", 8, 0, "train", length=5), rows)
    settings = [*TINY, "train.steps=30", "train.lr=0.001"]
    config = resolve("sft", recipe="lock", overrides=parse_overrides(settings))
    train(config, tmp_path / "run")
    result = retention.measure(tmp_path / "run", [str(rows)], config)
    (kept,) = result["sets"]
    assert kept["logp_after"] > kept["logp_before"] + 0.1
    assert kept["forgotten"] == kept["before"]["accuracy"] - kept["after"]["accuracy"]
    # The retention rows are the training rows here, so the predictor is minus their log-prob under the base.
    assert result["targets"] == "solutions" and result["targets_measured"] == 8
    assert result["nll_of_targets_under_base"] == pytest.approx(-kept["logp_before"], abs=1e-5)
    assert json.loads((tmp_path / "run" / "retention.json").read_text()) == result
    assert "before" in retention.describe(result)


def test_targets_of_a_sampled_method_are_its_right_completions(tmp_path):
    config = resolve(
        "uft", recipe="lock", overrides=parse_overrides([*TINY, "show.schedule=all", "save.rollouts=true"])
    )
    train(config, tmp_path)
    kind, pairs = retention.training_targets(tmp_path, config, [])
    from unift.training.run.rollouts import read_rollouts

    expected = [
        (g.prompt + g.hint, s.tokens)
        for step in range(4)
        for g in read_rollouts(tmp_path, step)[1]
        for s in g.samples
        if s.score.right
    ]
    assert kind == "right completions" and [(p.context, p.target) for p in pairs] == expected and pairs


def test_unfinished_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no finished run"):
        retention.measure(tmp_path, ["x.jsonl"], resolve("uft", recipe="lock"))
