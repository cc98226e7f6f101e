"""Retention: mean log-probs against a plain forward, targets of both kinds of methods, and a run measured end to end."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import tiny_policy
from plain import token_logprobs

from unift.commands import retention
from unift.commands.settings import trained
from unift.config.resolve import parse_overrides, resolve
from unift.model import quantize
from unift.rows.dataset import Split
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


def test_rows_without_a_solution_have_no_likelihood(tmp_path):
    """Of a retention set, and of the run's own rows (data.solved): only solutions are measured, an ending or an EOS alone is none."""
    solved, bare = make_rows("lock", 6, 5, "test", length=5), make_rows("lock", 6, 6, "test", length=5)
    sets = {"solved": solved, "some": [*solved, *(replace(row, steps=()) for row in bare)]}
    sets["none"] = [replace(row, steps=()) for row in bare]
    files = {name: str(tmp_path / f"{name}.jsonl") for name in sets}
    for name, rows in sets.items():
        write_rows(rows, files[name])
    config = resolve("sft", recipe="lock", overrides=parse_overrides([*TINY, "data.solved=3"]))
    train(config, tmp_path / "run")
    result = retention.measure(tmp_path / "run", list(files.values()), config)
    whole, some, none = result["sets"]
    assert some["logp_before"] == pytest.approx(whole["logp_before"], abs=1e-6) and none["logp_before"] is None
    assert [s["before"]["n"] for s in result["sets"]] == [6, 12, 6] and result["targets_measured"] == 3
    text = retention.describe(result)
    assert text.count("log-prob of its solutions") == 2 and "after; it has no solutions" in text


def test_what_a_run_over_4_bits_saved_is_read_as_it_is(tmp_path):
    """Whole and dense: 4 bits without adapters are refused, and would be another model than the one that was trained."""
    config = resolve("uft", recipe="lock", overrides=parse_overrides([*TINY, "model.lora=4", "model.quantize=nf4"]))
    after = config.model.model_copy(update=trained(tmp_path))
    quantize.check(after, torch.device("cpu"))
    assert (after.path, after.lora, after.quantize) == (str(tmp_path / "model"), None, None)


def test_targets_of_a_sampled_method_are_its_right_completions(tmp_path):
    config = resolve(
        "uft", recipe="lock", overrides=parse_overrides([*TINY, "show.schedule=all", "save.rollouts=true"])
    )
    train(config, tmp_path)
    kind, pairs = retention.training_targets(tmp_path, config, Split([], []))
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
