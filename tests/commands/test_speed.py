"""``unift doctor --speed``: finite rates, recommendations that name real settings, and no setting left behind."""

from __future__ import annotations

import json
import re
import time

import pytest
import torch
from conftest import settings

from unift.commands.doctor import speed
from unift.types import ConfigError


def test_checks_recommend_settings_and_leave_torch_alone(monkeypatch):
    monkeypatch.setattr(speed, "_rate", lambda work, amount: (work(), 100.0)[1])
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    found = {check.name: check.text for check in speed.checks(settings())}
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == before
    assert "threads=" in found["threads"] and "model.autocast=none" in found["precision"]
    assert "train.token_budget=" in found["token budget"]


def test_rates_are_of_work_that_was_done():
    rates = speed.measure(1)
    assert all(x > 0 for x in vars(rates).values())


def test_rates_of_a_gpu():
    """Its code on the CPU: three lines, finite rates, and settings that exist."""
    torch.manual_seed(0)
    found = {c.name: c.text for c in speed.gpu_checks(settings(), torch.device("cpu"), 2**30, size=64)}
    numbers = [
        float(x) for x in re.findall(r"[0-9.]*[0-9]", found["speed"].replace("float32", "").replace("bfloat16", ""))
    ]
    assert len(numbers) == 4 and numbers[2] > 0 and numbers[3] > 0
    assert "model.autocast=" in found["precision"] and "train.token_budget=" in found["token budget"]


def test_a_rate_waits_for_its_device():
    """The time is counted until the device is done, not until it is asked."""
    done = []
    rate = speed._rate(lambda: None, 1.0, 0.02, wait=lambda: (time.sleep(0.01), done.append(1)))
    assert done and rate * 1e9 <= 100


def test_budget_grows_with_memory_and_shrinks_with_the_model(tmp_path):
    sizes = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 100,
        "vocab_size": 10,
        "num_attention_heads": 4,
    }
    config = settings("uft", f"model.path={tmp_path}")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no config could be read"):
        speed.budget(config, 2**30)
    budgets = []
    for layers in (2, 8):
        (tmp_path / "config.json").write_text(json.dumps(sizes | {"num_hidden_layers": layers}))
        budgets.append([speed.budget(config, free)[0] for free in (2**26, 2**28)])
    (a, b), (c, d) = budgets
    assert b == 4 * a and d == 4 * c and a > c  # powers of two of tokens, proportional to memory
    layer = 2 * (4 + 8) * 64 + 4 * (
        4 * 64 + 4 * 100
    )  # norms in two precisions; inputs of the products, queries, keys, values
    token = 2 * layer + 4 * (3 * 100 + 2 * 64) + (4 + 8) * 64  # and one layer's backward pass, the last norm
    assert a * token <= 2**26 / 2 < 2 * a * token
