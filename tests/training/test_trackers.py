"""Trackers through accelerate: a real TensorBoard run is read back, and a missing one stops before a model is loaded."""

from __future__ import annotations

import importlib.util

import pytest

from unift.config.resolve import resolve
from unift.training import loop
from unift.types import ConfigError

TINY = {
    "train": {"steps": 2, "prompts": 4},
    "sample": {"completions": 4},
    "data": {"train_rows": 8, "test_rows": 6},
    "threads": 1,
}


def settings(tracker, **more):
    return resolve("uft", recipe="lock", overrides=TINY | {"log": {"trackers": [tracker]}} | more)


def test_tensorboard_gets_every_step_and_the_result(tmp_path):
    pytest.importorskip("tensorboard", reason="the package tensorboard is missing")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = loop.train(settings("tensorboard"), tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / "unift"))
    events.Reload()
    assert [e.step for e in events.Scalars("reward")] == [1, 2]
    assert events.Scalars("eval/test/accuracy")[0].step == 0
    (final,) = events.Scalars("result/test/accuracy")
    assert final.value == pytest.approx(result["test"]["accuracy"]) and final.step == 2
    assert "step" not in events.Tags()["scalars"]


def test_a_missing_tracker_names_its_package(tmp_path):
    missing = [name for name in ("trackio", "wandb", "tensorboard") if importlib.util.find_spec(name) is None]
    if not missing:
        pytest.skip("trackio, wandb and tensorboard are all installed here: nothing is missing")
    with pytest.raises(ConfigError, match=f"{missing[0]} is not installed. Install it with `pip install {missing[0]}`"):
        loop.train(
            settings(missing[0], model={"path": "/nowhere"}), tmp_path / "run"
        )  # it would fail on the model next
    with pytest.raises(ConfigError, match="log.trackers"):
        loop.train(settings("tensorbord"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
