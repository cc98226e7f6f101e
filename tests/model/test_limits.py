"""Threads, positions and memory: against the model itself, and the same for whoever asks."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import settings

from unift.commands import doctor
from unift.commands.doctor import dry_run, speed
from unift.model import limits, memory
from unift.model.load import load_policy, load_tokenizer, locate
from unift.rows import dataset
from unift.rows.crew import cores
from unift.types import ConfigError, DataError


@pytest.mark.parametrize("base", ["lock", "countdown"])
def test_parameters_from_shapes_are_those_of_the_model(base):
    config = settings("uft", f"model.path=embedded:{base}")
    found = limits.parameters(limits.model_settings(locate(config.model.path)))
    model = load_policy(config.model).base
    own = sum(p.numel() for p in model.parameters())  # tied weights once
    assert abs(found - own) <= model.config.hidden_size, "all but the last norm"


def lock(*items):
    config = settings("uft", "data.train_rows=6", "data.test_rows=4", *items)
    return config, dataset.encode(load_tokenizer(config.model), dataset.load(config), config)


@pytest.mark.parametrize("most", [100, 239, 240, 256])
def test_doctor_and_train_agree_on_the_room(most):
    config, data = lock(f"sample.max_tokens={most}", "show.schedule=none" if most == 256 else "seed=0")
    room = doctor.room(config, data)
    try:
        limits.check_positions(config, data)
    except DataError as error:
        assert not room.ok and room.text == str(error)
    else:
        assert room.ok


def test_the_edge_of_the_room():
    """Each context is counted token by token: the largest limit that fits is one below the first that does not."""
    config, data = lock("sample.max_tokens=1", "eval.max_tokens=1")
    longest = max(len(e.prompt) + e.step_ends[-1] for e in data.train.encoded)
    room = 256 - longest
    for most in (room, room + 1):
        config, data = lock(f"sample.max_tokens={most}", "eval.max_tokens=1")
        if most == room:
            limits.check_positions(config, data)
        else:
            with pytest.raises(DataError, match="more than the 256 positions"):
                limits.check_positions(config, data)


def test_dry_run_and_speed_count_the_same_activations():
    config = settings("uft", "train.token_budget=4096")
    shapes = limits.model_settings(locate(config.model.path))
    token = memory.token_bytes(shapes, config.model, False)
    assert f"activations {memory.size(4096 * token)}" in dry_run._memory(config)
    tokens, why = speed.budget(config, free=2 * 4096 * token)
    assert tokens == 4096 and f"{token / 1024:,.0f} KiB" in why


@pytest.mark.parametrize("text", ["[1]", "{", "3", "\x00"])
def test_a_damaged_config_json(tmp_path, text):
    shutil.copytree(locate("embedded:lock"), tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="config.json .*fetch the model again"):
        limits.model_settings(tmp_path / "model")
    assert json.loads((locate("embedded:lock") / "config.json").read_text()) == limits.model_settings(
        locate("embedded:lock")
    )


def test_threads():
    limits.use_threads(1)
    limits.use_threads(None)
    with pytest.raises(ConfigError, match=f"threads=10000000: this machine has {cores()} cores"):
        limits.use_threads(10_000_000)
    import torch

    assert torch.get_num_threads() == 1
