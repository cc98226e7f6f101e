"""Rows with pictures where weights are in shards: the updates are those of one process, whichever of them shows pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import shown_updates
import torch
import vision_zoo as zoo

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_processes import REWARD, launched
from test_sharding import assert_same, drawn, handed_on, sharded

import unift
from unift.config.resolve import parse_overrides, resolve
from unift.rows.inspect import write_rows
from unift.training.loop import train

pytestmark = [
    pytest.mark.dist,
    # transformers makes arrays of tensors in a way that numpy is about to give up, and asks models for what it renames
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

LORA, FROZEN, SHORT = {"adapters": True}, {"frozen": True}, {"words": ["train.token_budget=60"]}
CASES = {  # of `shown_updates.updates`: on the shared path, with positions in three dimensions, on the plain path
    "idefics3": {"family": "idefics3"},
    "idefics3-lora": {"family": "idefics3"} | LORA,
    "idefics3-frozen": {"family": "idefics3"} | FROZEN,
    "idefics3-lora-frozen": {"family": "idefics3"} | LORA | FROZEN,
    "idefics3-text": {"family": "idefics3", "text": True},  # no row shows a picture
    "idefics3-critic": {"family": "idefics3", "method": "ppo", "words": ["likelihood.weight=0"]},
    "idefics3-recomputed": {"family": "idefics3", "words": ["train.gradient_checkpointing=true"]},
    "qwen2_5_vl": {"family": "qwen2_5_vl"},
    "qwen2_5_vl-lora": {"family": "qwen2_5_vl"} | LORA,
    "gemma3": {"family": "gemma3"},
    "gemma3-lora": {"family": "gemma3"} | LORA,
    "mllama": {"family": "mllama"} | SHORT,
    "mllama-lora": {"family": "mllama"} | LORA,
    "paligemma": {"family": "paligemma", "words": ["train.token_budget=105"]},
    "idefics3-bfloat16": {"family": "idefics3", "dtype": "bfloat16", "words": ["train.token_budget=1"]},
}
# Norms of Gemma compute in float32, whatever the model's type; gradients of bfloat16 weights are summed in float32.
ROUNDED = {name: 1e-6 for name in ("gemma3", "gemma3-lora", "paligemma", "idefics3-bfloat16")}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Every case by two processes with shards."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "cases.json").write_text(json.dumps(CASES))
    script = str(Path(shown_updates.__file__))
    code, _, err = launched([script, str(folder / "cases.json")], 2, timeout=600, UNIFT_WAIT_SECONDS="60")
    assert code == 0, err
    return folder


@pytest.mark.parametrize("name", CASES)
def test_updates_are_those_of_one_process(two, name):
    """In float64, or bfloat16 with float32 copies as the shards, with packs that show pictures on one process alone. Gradients are measured against the largest of their weight; where that is rounding itself (biases of keys,
    which a softmax does not see), against the largest of all."""
    got, expected = torch.load(two / f"{name}.pt"), shown_updates.updates(**CASES[name])
    bound = ROUNDED.get(name, 1e-10)
    assert any(len(set(shown)) > 1 for shown in got["shown"]) or name == "idefics3-text", (
        "all passes show pictures, or none"
    )
    for kind in ("gradients", "weights"):
        a, b = got[kind], expected[kind]
        assert a.keys() == b.keys()
        least = 1e-6 * max(float(x.abs().max()) for x in b.values())
        for weight in b:
            rounded = kind == "weights" and b[weight].dtype == torch.bfloat16  # from the copies, which the shards are
            most = (2**-7 if rounded else bound) * max(float(b[weight].abs().max()), least)
            assert (a[weight] - b[weight]).abs().max() <= most, weight
    for x, y in zip(got["metrics"], expected["metrics"], strict=True):
        assert x == pytest.approx(y, rel=bound, abs=1e-2 * bound)
    trained = any("vis" in weight for weight in expected["weights"] if expected["gradients"][weight].any())
    assert trained == ("frozen" not in name and "text" not in name)


# ---------------------------------------------------------------------------------------------- runs

RUN = [
    "train.steps=3", "train.prompts=6", "train.updates=2", "sample.completions=3", "sample.max_tokens=5", "eval.max_tokens=4",
    "eval.every=0", "eval.train_rows=0", "save.every=1", "save.keep=9", "save.rollouts=true", "log.gradients_every=2",
    "train.token_budget=200", "train.lr=0.001", "likelihood.weight=0.1", "reference.kl=0.01", "show.until=0.5", "threads=1",
    "model.dtype=float64", "model.device=cpu", "data.max_prompt=200",
]  # fmt: skip
RUNS = {"idefics3": [], "lora": ["model.lora=2", "train.lr=0.01"], "gemma3": ["train.steps=2"]}


def rows():
    """With no picture, one and two."""
    found = zoo.rows(12, 2)
    for i, row in enumerate(found):
        n = (1, 0, 2)[i % 3]
        text = row["prompt"][0]["content"][-1]
        row |= {"prompt": [{"role": "user", "content": [{"type": "image"}] * n + [text]}], "images": row["images"][:n]}
    return unift.load_rows(found)


def varied(folder):
    """The model in the folder with no weight at 0: a bias of keys, which a softmax does not see, would stay at rounding."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder)
    torch.manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Settings of every run of RUNS."""
    folder = tmp_path_factory.mktemp("rows")
    write_rows(rows()[:8], folder / "train.jsonl")
    write_rows(rows()[8:], folder / "test.jsonl")
    (folder / "reward.py").write_text(REWARD)
    data = [
        f"data.train={folder}/train.jsonl",
        f"data.test={folder}/test.jsonl",
        f"reward.function={folder}/reward.py:score",
    ]
    families = {name: "gemma3" if name == "gemma3" else "idefics3" for name in RUNS}
    paths = {family: varied(zoo.saved(folder / family, family)) for family in set(families.values())}
    return {name: [*RUN, *data, f"model.path={paths[families[name]]}", *more] for name, more in RUNS.items()}


@pytest.fixture(scope="module")
def pairs(settings, tmp_path_factory):
    """Folders with every run: by one process, and by two with shards."""
    one = tmp_path_factory.mktemp("one")
    for name, items in settings.items():
        train(resolve("uft", overrides=parse_overrides(items)), one / name)
    cases = {name: ("uft", items) for name, items in settings.items()}
    return one, sharded(tmp_path_factory.mktemp("sharded"), cases, 2, recipe=None)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_in_shards_is_the_run_of_one_process(pairs, name):
    """Sampled, updated, evaluated; its model is whole and loads as any other."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    one, two = (root / name for root in pairs)
    steps, bound = 2 if name == "gemma3" else 3, ROUNDED.get(name, 1e-10)
    assert (two / "checkpoints" / "step_000001" / "shards").is_dir(), "nothing was sharded"
    assert_same(two, one, bound, steps=steps)
    assert all(drawn(two, step) == drawn(one, step) for step in range(steps))
    results = [json.loads((folder / "result.json").read_text()) for folder in (two, one)]
    assert all(results[0][k] == results[1][k] for k in ("base", "test", "tokens_sampled", "reward_seen"))
    for place in ("model", "checkpoints/step_000002/model"):
        got, expected = (
            AutoModelForImageTextToText.from_pretrained(folder / place, dtype=torch.float64).state_dict()
            for folder in (two, one)
        )
        assert got.keys() == expected.keys() and any("vis" in weight for weight in got)
        for weight, value in expected.items():
            assert (got[weight] - value).abs().max() <= bound * value.abs().max(), (place, weight)
    assert AutoProcessor.from_pretrained(two / "model").image_token


def test_a_run_goes_on_with_another_number_of_processes(settings, tmp_path):
    """One process, two, one: the rows, hints and tokens of a run that was never stopped."""
    items, run = [*settings["idefics3"], "model.shard=full"], tmp_path
    for step, n, run in handed_on(tmp_path, "uft", items, None, (1, 2, 1)):
        assert (run / "checkpoints" / f"step_{step + 1:06d}" / "shards").is_dir() == (n > 1)
        assert drawn(run, step) == drawn(tmp_path / "whole", step)
    assert_same(run, tmp_path / "whole", 1e-10)
