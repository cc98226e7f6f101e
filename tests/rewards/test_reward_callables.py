"""Rewards given as Python objects, and several at once: they reach the workers, or a message says what to do."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import reward_zoo

from unift.config.surroundings import Reward, WeightedReward
from unift.rewards import count_outcomes, open_scorer, score_groups
from unift.rewards.identity import describe
from unift.rewards.journal import ScoreError
from unift.rewards.pool import Scorer
from unift.rewards.spec import import_path, parts_of
from unift.types import Group, RewardError, Row, Sample, Score

ROW = Row("r0", "2+2?", (), "4", "4")


def run_script() -> list[Any]:
    script = Path(__file__).parents[1] / "callable_script.py"
    done = subprocess.run(
        [sys.executable, str(script), str(Path(__file__).parents[2] / "src")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def script() -> list[Any]:
    return run_script()


def test_rewards_of_a_script_reach_the_workers(script: list[Any]) -> None:
    values = script[2]
    assert {name: found[0] for name, found in values.items()} == {
        "plain": 2.0, "trl": 4.25, "verl": 8.0, "partial": 12.0, "lambda": 2.0, "closure": 16.0, "object": 20.0,
        "method": 25.0, "list": 2.0 + 0.5 * 4.25,
    }  # fmt: skip
    assert values["plain"][3], "scored by another process"
    assert values["list"][2] == {"plain": 2.0, "trl": 4.25}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file", r"the global 'FILE' \(a _io.TextIOWrapper\) cannot be copied.*Build it inside the function"),
        ("lock", r"its argument 'scale' \(a _thread.lock\) cannot be copied"),
        ("helper", r"the global 'unsendable': the global 'LOCK' \(a _thread.lock\) cannot be copied"),
        ("model", r"the global 'MODEL'.* cannot be copied: a tensor on a GPU.*Build it inside"),
        ("large", r"is 65 MiB when sent.*above 64 MiB.*its argument 'scale'"),
        ("unknown", r"found the signature <lambda>\(text\); the three accepted"),
    ],
)
def test_what_cannot_be_sent_is_named(script: list[Any], name: str, message: str) -> None:
    assert re.search(message, script[3][name], re.DOTALL), script[3][name]


def test_descriptions_are_stable_and_tell_apart(script: list[Any]) -> None:
    again = run_script()
    assert script[:2] == again[:2]
    texts = list(script[0].values()) + script[1]
    assert len(set(texts)) == len(texts)
    assert re.fullmatch(r"__main__\.plain@[0-9a-f]{12}", script[0]["plain"])
    assert script[0]["list"] == f"1*{script[0]['plain']} + 0.5*{script[0]['trl']}"


def test_a_description_follows_code_and_values_not_layout() -> None:
    def defined(text: str, **outside: Any) -> Any:
        names = {"__name__": "cell", **outside}
        exec(text, names)
        return names["f"]

    base = "def f(completion, row):\n    return A * g(completion)\ndef g(x):\n    return float(x) if x in {'1', '2'} else 0.0\n"
    one = describe(defined(base, A=1))
    assert describe(defined("\n\n# a comment\n" + base, A=1)) == one
    assert describe(defined(base, A=2)) != one
    assert describe(defined(base.replace("0.0", "0.5"), A=1)) != one
    logged = "logger = logging.getLogger('mine')\n" + base.replace("    ", "    logger.debug('x')\n    ", 1)
    two = describe(defined(logged, A=1, logging=logging))
    logging.getLogger("born.meanwhile")  # a logger leads to all others
    assert describe(defined(logged, A=1, logging=logging)) == two != one
    assert describe("math") == "math"


def test_importable_functions_travel_by_name() -> None:
    assert import_path(reward_zoo.trl) == "reward_zoo:trl"
    assert import_path(reward_zoo.score) == "reward_zoo:score"
    part = parts_of(reward_zoo.trl)[0][0]
    assert (part.spec, part.payload) == ("reward_zoo:trl", None)
    with Scorer(reward_zoo.trl, workers=1) as scorer:
        assert scorer.score([ROW] * 2, ["4", "skip"]) == [Score(1.0), None]


def test_a_module_that_workers_cannot_import_travels_along(tmp_path: Path) -> None:
    (tmp_path / "hidden_rewards.py").write_text(
        "K = 3\ndef g(x): return K * float(x)\ndef f(completion, row): return g(completion)\n"
    )
    spec = importlib.util.spec_from_file_location("hidden_rewards", tmp_path / "hidden_rewards.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["hidden_rewards"] = module
    try:
        spec.loader.exec_module(module)
        with Scorer(module.f, workers=1) as scorer:
            assert scorer.score([ROW], ["2"]) == [Score(6.0)]
    finally:
        del sys.modules["hidden_rewards"]


# ------------------------------------------------------------------------------------------------------------ several


def test_several_rewards_are_a_weighted_sum() -> None:
    """1 * [text is the answer] + .2 * length; the third has weight 0 and is only watched."""
    rewards = [
        ("reward_zoo:trl", 1.0),
        {"function": "reward_zoo:trl_async", "weight": 0.25},
        ("reward_zoo:always_one", 0),
    ]
    with Scorer(rewards, workers=1) as scorer:
        right, wrong, skipped = scorer.score([ROW] * 3, ["4", "57", "skip"])
    assert right == Score(1.25, True, {"trl": 1.0, "trl_async": 1.0, "always_one": 1.0})
    assert wrong == Score(0.5, False, {"trl": 0.0, "trl_async": 2.0, "always_one": 1.0})
    assert skipped == Score(1.0, True, {"trl_async": 4.0, "always_one": 1.0})  # the others count


def test_correct_is_of_the_first_that_says_so() -> None:
    def length(completion: str, row: Row) -> float:
        return float(len(completion))

    def verdict(completion: str, row: Row) -> Score:
        return Score(0.0, completion == "yes", {"inner": 0.5}, "why")

    def other(completion: str, row: Row) -> Score:
        return Score(0.0, completion != "yes")

    with Scorer([(length, 0.5), (verdict, 1.0), (other, 1.0)], workers=1) as scorer:
        yes, no = scorer.score([ROW] * 2, ["yes", "no"])
    assert yes == Score(1.5, True, {"length": 3.0, "verdict": 0.0, "verdict/inner": 0.5, "other": 0.0}, "verdict: why")
    assert isinstance(no, Score) and not no.right


def test_a_completion_to_which_none_applies_takes_no_part() -> None:
    group = Group(0, ROW.id, [], [], 0, 0, [Sample([], [], True, text) for text in ("skip", "4")])
    rewards = ["reward_zoo:trl", "reward_zoo:trl", ("reward_zoo:always_one", 0.0)]
    with Scorer(rewards, workers=1, error_rate=0.0) as scorer:
        score_groups(scorer, [ROW], [group], [""])
        assert scorer.counts == {
            "total": 2,
            "timeouts": 0,
            "crashes": 0,
            "exceptions": 0,
            "bad_values": 0,
            "skipped": 1,
        }
        assert count_outcomes([group]) == scorer.counts
    assert (group.samples[0].score, group.samples[0].error) == (None, "")
    assert group.samples[1].score == Score(2.0, True, {"trl": 1.0, "trl#2": 1.0, "always_one": 1.0})


def test_one_that_fails_fails_the_completion() -> None:
    with Scorer(["reward_zoo:always_one", "reward_zoo:trl"], workers=1, error_rate=1.0) as scorer:
        (outcome,) = scorer.score([ROW], ["wrong length"])
    assert isinstance(outcome, ScoreError)
    assert str(outcome) == "bad value: trl: returned 2 values for 1 completion; expected a list of 1"

    def large(completion: str, row: Row) -> float:
        return 1e308

    with Scorer([(large, 10.0)], workers=1, error_rate=1.0) as scorer:
        assert (
            str(scorer.score([ROW], [""])[0])
            == "bad value: returned values whose weighted sum is inf; expected a finite number"
        )


def test_settings_name_several() -> None:
    settings = Reward.model_validate(
        {"function": ["reward_zoo:trl", {"function": "reward_zoo:always_one", "weight": 0.5}]}
    )
    assert settings.function == [
        WeightedReward(function="reward_zoo:trl"),
        WeightedReward(function="reward_zoo:always_one", weight=0.5),
    ]
    with open_scorer(settings, []) as scorer:
        check = scorer.check(Row("x", "", (), "4", "4"))
        assert check.kind == "TRL+unift" and check.demonstration == Score(1.5, True, {"trl": 1.0, "always_one": 1.0})
        assert check.reward == "1 * reward_zoo:trl + 0.5 * reward_zoo:always_one"
        assert check.empty is not None and not check.empty.right
    with open_scorer(settings, [], lambda completion, row: 0.125) as scorer:
        assert scorer.score([ROW], [""]) == [Score(0.125)]


@pytest.mark.parametrize(
    "reward",
    [[], 3, None, [3], [("math", "much")], [("math", float("nan"))], [("math", True)], [{"function": "math", "w": 1}]],
)
def test_what_is_no_reward(reward: Any) -> None:
    with pytest.raises(RewardError, match="expected"):
        Scorer(reward)
