"""The step that the benchmarks time is unift's own: it runs, and forwards each prefix once. So do its ablations."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def common(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("common")


def test_a_step_of_the_benchmarks(common):
    """2 groups of G = 3, prefix 9, 4 tokens each: (9 + 3 * 3) * 2 tokens forwarded, 24 sampled, both parts timed."""
    model, tokenizer = common.model_3m()
    step = common.Unift(model, tokenizer, common.Shape(9, 0, 4, 2, 3)).step([[5] * 9, [7] * 9])
    assert step["forwarded"] == 36 and step["sampled"] == 24
    assert step["gap"] < 1e-5 and step["seconds"] >= step["generate"] > 0


def test_ablations(common):
    """Each technique can be switched off, and the step is the same: only without a shared prefix are there more tokens."""
    ablation = importlib.import_module("ablation")
    model, tokenizer = common.model_3m()
    side = common.Unift(model, tokenizer, common.Shape(9, 0, 4, 2, 3))
    for name in ablation.NAMES:
        with ablation.without(name, side):
            step = side.step([[5] * 9, [7] * 9])
        assert step["forwarded"] == (72 if name == "shared prefix in training" else 36) and step["gap"] < 1e-5, name


def test_the_measurements_of_a_gpu(common, monkeypatch):
    """On the CPU, where its variants are the same thing: every number is there."""
    gpu = importlib.import_module("gpu")
    monkeypatch.setitem(gpu.SIZES, "3m", (4, 256, 688, 256, 256, 128))
    found = gpu.measure("3m", common.Shape(9, 0, 4, 2, 3), 1, size=128)
    assert [r["variant"] for r in found["rows"]] == list(gpu.VARIANTS)
    for r in found["rows"]:
        assert r["mfu"] > 0 and r["gap"] < 0.1
        assert r["of_roofline"] == pytest.approx(r["tokens_per_second"]["median"] / found["roofline_tokens_per_second"])


def test_the_work_of_a_gpu_step(common):
    """One layer of width 2 with inner width 3 and 5 tokens of vocabulary, counted by hand."""
    gpu = importlib.import_module("gpu")
    gpu.SIZES["hand"] = (1, 2, 3, 2, 2, 5)
    work = gpu.work("hand", common.Shape(prefix=4, hint=0, completion=3, groups=1, g=2))
    trunk, head = 4 * 2 * 2 + 3 * 2 * 3, 5 * 2
    pairs = 4 * 4 / 2 + 2 * (3 * 4 + 3 * 3 / 2)  # causal halves counted
    assert work["update"] == 6 * trunk * (4 + 2 * 2) + 6 * head * 2 * 3 + 3.5 * 4 * 2 * pairs
    assert work["prefill"] == 2 * trunk * 4
    assert work["read"] == 2 * (2 * (trunk + head) + 4 * 2 * (4 + 2 * 3 / 2))


def test_the_random_model_has_the_sizes_of_smollm2(common, smollm):
    """As many numbers as SmolLM2-135M, layer by layer; one token a character, and an end that cannot be sampled."""
    from transformers import AutoConfig

    with torch.device("meta"):
        model, tokenizer = common.model_135m_random()
    config = AutoConfig.from_pretrained(smollm.parent, gguf_file=smollm.name)
    for name in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    ):
        assert getattr(model.config, name) == getattr(config, name), name
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert tokenizer("ab c")["input_ids"] == [67, 68, 2, 69] and tokenizer.eos_token_id == config.vocab_size
