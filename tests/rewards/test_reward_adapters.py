"""Reward functions of the three signatures become one, and what is no reward is an error."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
import reward_zoo
import torch

from unift.rewards.adapters import BadValue, adapt, load_reward
from unift.types import RewardError, Row, Score

ROW = Row("r0", "2+2?", ("think\n",), "4", "4", task="sums")


def test_unift_signature_gets_hint_and_keeps_parts() -> None:
    score = adapt(reward_zoo.score)("hint", ROW, "abc")
    assert score == Score(1.0, True, {"length": 3.0}, "abc")
    assert adapt(reward_zoo.score).kind == "unift"


def test_options_reach_only_those_who_name_them() -> None:
    def score(completion: str, row: Row, *, format_score: float = 0.0, rule: str = "unift") -> float:
        return format_score if rule == "paper" else -1.0

    assert adapt(score, format_score=0.1, rule="paper")("", ROW) == Score(0.1)
    assert adapt(reward_zoo.always_one, format_score=0.1)("", ROW) == Score(1.0)


def test_verls_dict_may_hold_scalars_of_arrays() -> None:
    """A comparison in numpy or torch is no bool; it says as much."""

    def compute_score(data_source: str, solution_str: str, ground_truth: str) -> dict[str, Any]:
        right = np.array(["4"]) == solution_str
        return {
            "score": 0.5,
            "acc": right[0],
            "share": np.float32(0.25),
            "tensor": torch.tensor(2),
            "shape": np.zeros(3),
        }

    reward = adapt(compute_score)
    assert reward("4", ROW) == Score(0.5, True, {"acc": 1.0, "share": 0.25, "tensor": 2.0})
    assert reward("5", ROW).correct is False


def test_trl_signature() -> None:
    reward = adapt(reward_zoo.trl)
    assert reward.kind == "TRL"
    assert [reward(text, ROW) for text in ("4", "5", "skip")] == [Score(1.0), Score(0.0), None]
    chat = Row("c", ({"role": "user", "content": "2+2?"},), (), "4", "4")
    assert reward("4", chat) == Score(1.0)
    for text in ("wrong length", "no list"):
        with pytest.raises(BadValue, match="list"):
            reward(text, ROW)
    assert adapt(reward_zoo.trl_async)("abc", ROW) == Score(3.0)
    red = Row("c", "", (), "", None, extra={"colour": "red"})
    assert adapt(reward_zoo.trl_wants_column)("", red) == Score(1.0)
    with pytest.raises(RewardError, match="column 'colour'.*answer"):
        adapt(reward_zoo.trl_wants_column)("", ROW)


def test_verl_signature() -> None:
    reward = adapt(reward_zoo.compute_score)
    assert reward.kind == "verl"
    assert reward("4", ROW) == Score(1.0)
    row = Row("v", "", (), "4", "4", extra={"data_source": "dict", "extra_info": {"index": 7}})
    assert reward("5", row) == Score(-1.0, False, {"acc": 0.0, "index": 7.0})
    assert reward("4", row).right  # type: ignore[union-attr]
    with pytest.raises(BadValue, match="key 'score'"):
        reward("4", Row("v", "", (), "4", "4", extra={"data_source": "empty dict"}))


@pytest.mark.parametrize("text", ["nan", "inf", "none", "text", "list", "parts", "complex"])
def test_bad_values_are_not_rewards(text: str) -> None:
    with pytest.raises(BadValue, match="expected"):
        adapt(reward_zoo.score)(text, ROW)


def test_numbers_of_other_libraries_become_plain() -> None:
    import numpy as np

    def score(completion: str, row: Row) -> object:
        number: Any = np.float32(0.5)
        return Score(number, np.bool_(True), {"x": np.int64(1)}) if completion else np.float64(0.25)  # type: ignore

    full = adapt(score)("x", ROW)
    assert full == Score(0.5, True, {"x": 1.0})
    assert full is not None and type(full.value) is float and type(full.correct) is bool
    assert adapt(score)("", ROW) == Score(0.25)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "reward_zoo:unknown",
            r"\(text, truth\).*three accepted[\s\S]*completion, row[\s\S]*completions[\s\S]*data_source",
        ),
        ("reward_zoo:needs_more", "'model' has no default"),
        ("reward_zoo:trl_ids", "no completion_ids"),
        ("reward_zoo:NOT_A_FUNCTION", "is int 3; expected a function"),
        ("reward_zoo:scor", "has no 'scor'; it has .*score"),
        ("no_such_module:f", "cannot import module 'no_such_module'"),
        ("no/such/file.py:f", "there is no file .*no/such/file.py"),
        ("no_such_task", "neither a built-in task .* nor module:function"),
        ("reward_zoo:", "expected module:function"),
    ],
)
def test_what_cannot_be_loaded_says_why(spec: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        load_reward(spec)


def test_file_with_a_neighbour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "zoo_neighbour.py").write_text("VALUE = 0.75\n")
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom zoo_neighbour import VALUE\n"
        "@dataclass\nclass Held:\n    x: float\n"
        "def score(completion, row): return Held(VALUE).x\n"
    )
    assert load_reward(f"{tmp_path}/mine.py:score")("", ROW) == Score(0.75)
    (tmp_path / "broken.py").write_text("x = 1\nraise OSError('no licence')\n")
    with pytest.raises(RewardError, match=r"broken\.py \(OSError: no licence \(broken\.py:2\)\)"):
        load_reward(f"{tmp_path}/broken.py:score")


def test_built_in_task_and_auto() -> None:
    tasks = pytest.importorskip("unift.rows.tasks")
    row = tasks.make_rows("countdown", 1, seed=0, split="train")[0]
    for spec in ("countdown", "auto"):
        assert load_reward(spec)(row.solution, row).right  # type: ignore[union-attr]
    with pytest.raises(RewardError, match="no task"):
        load_reward("auto")("", Row("x", "", (), "", None))


def test_none_is_a_forgotten_return_unless_the_annotation_names_it() -> None:
    def forgotten(completion: str, row: Row) -> float:
        return None  # type: ignore[return-value]

    def silent(completion: str, row: Row) -> None:
        return None

    def either(completion: str, row: Row) -> float | None:
        return float(completion) if completion else None

    def older(solution_str: str, ground_truth: str) -> Optional[float]:
        return None if solution_str else 1.0

    older.__annotations__["return"] = Optional[float]
    for function in (forgotten, silent):
        with pytest.raises(BadValue, match="returned None"):
            adapt(function)("1", ROW)
    assert [adapt(either)(text, ROW) for text in ("", "0.5")] == [None, Score(0.5)]
    assert [adapt(older)(text, ROW) for text in ("", "x")] == [Score(1.0), None]


def test_a_score_of_many_parts_is_refused() -> None:
    def score(completion: str, row: Row) -> Score:
        return Score(1.0, parts={str(i): 0.0 for i in range(int(completion))})

    assert len(adapt(score)("100", ROW).parts) == 100  # type: ignore[union-attr]
    with pytest.raises(BadValue, match="101 parts; expected at most 100"):
        adapt(score)("101", ROW)
