"""Every preset on a real language model: SmolLM2-135M, two steps on Countdown rows. Minutes; the tiny twin is test_family.py."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from unift.config.packaged import preset_names
from unift.config.resolve import parse_overrides, resolve
from unift.config.sections import Model
from unift.config.stages import stages
from unift.model.load import load_policy, save_pretrained
from unift.training.loop import train

pytestmark = pytest.mark.slow

# A score that a model which solves nothing still earns now and then, so that every stream has something to say.
REWARD = """
def reward(prompts, completions, **columns):
    return [float(sum(map(ord, c)) % 2) for c in completions]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, smollm):
    """SmolLM2 as a plain folder, which loads faster than its GGUF file, and a reward."""
    path = tmp_path_factory.mktemp("smollm")
    save_pretrained(load_policy(Model(path=str(smollm), device="cpu")), path / "model")
    (path / "reward.py").write_text(REWARD)
    return path


@pytest.mark.parametrize("name", preset_names())
def test_two_steps(tmp_path, folder, name):
    own = resolve(name, overrides={"data": {"task": "lock"}})
    steps = max([2, *(round(2 / p.share) for p in own.phases)])
    small = [
        f"model.path={folder / 'model'}", f"reward.function={folder / 'reward.py'}:reward", "data.task=countdown",
        "data.options={numbers: 3, style: short}", "data.train_rows=8", "data.test_rows=4", f"train.steps={steps}", "train.prompts=4",
        "train.lr=1e-5", "train.warmup=0", "train.token_budget=2048", "sample.max_tokens=12", "eval.every=0", "save.every=0",
    ]  # fmt: skip
    small += ["train.updates=2"] if any(stage.rules.train.updates > 1 for stage in stages(own)) else []
    small += ["train.micro_prompts=2"] if any(stage.rules.train.micro_prompts for stage in stages(own)) else []
    small += ["likelihood.buffer=2"] if own.likelihood.buffer else []
    config = resolve(name, overrides=parse_overrides(small))
    result = train(config, tmp_path / "run")
    assert result["steps"] == steps and result["test"]["n"] == 4
    lines = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [m[k] for m in lines[1:] for k in ("loss", "grad/norm")]
    assert losses and all(map(math.isfinite, losses))
    trained, base = (load_file(p / "model.safetensors") for p in (tmp_path / "run" / "model", folder / "model"))
    assert trained.keys() == base.keys()
    assert any(not torch.equal(trained[n], base[n]) for n in base), "two steps left the weights as they were"
