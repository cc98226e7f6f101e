"""The embedded base of the jigsaw and its recipe: small, the script's own processor, what it knows, and a run on pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import script

import unift
from unift.config.resolve import resolve
from unift.config.sections import Model
from unift.model.load import load_policy, load_tokenizer, locate
from unift.rows.processor import reader_of
from unift.rows.tasks import get_task, make_rows
from unift.rows.tokens import encode_rows
from unift.sampling.engines.base import Request
from unift.sampling.engines.choose import in_process
from unift.sampling.groups import completed

score = get_task("jigsaw").score
KINDS = ("colour", "shape", "half")
SMALL = {
    "train.steps": 2,
    "train.prompts": 4,
    "sample.completions": 4,
    "data.train_rows": 12,
    "data.test_rows": 8,
    "eval.train_rows": 4,
    "threads": 1,
}


@pytest.fixture(scope="module")
def tool():
    return script(Path(__file__).parents[2] / "tools" / "make_jigsaw_base.py")


@pytest.fixture(scope="module")
def base():
    model = Model(path="embedded:jigsaw", device="cpu")
    return load_policy(model, load_tokenizer(model))


def greedy(base, rows):
    """Texts, one a row."""
    encoded = encode_rows(base.tokenizer, rows, 128)
    requests = [Request(list(e.prompt), None, shown=e.shown) for e in encoded]
    return [group[0].text for group in completed(in_process(base), base.tokenizer, requests, 12)]


def test_size_and_tokens(base, tool):
    """At most 5 MB; no text of the task has an unknown token, and every one comes back whole."""
    assert sum(f.stat().st_size for f in locate("embedded:jigsaw").iterdir()) < 5_000_000
    for kind in (*KINDS, "jigsaw"):
        for row in make_rows("jigsaw", 20, 0, "test", kind=kind):
            text = row.prompt + row.solution
            ids = base.tokenizer(text)["input_ids"]
            assert base.tokenizer.decode(ids) == text and base.tokenizer.unk_token_id not in ids
            assert ids == tool.words_and_characters()(text)["input_ids"]
            assert len(base.tokenizer(row.solution)["input_ids"]) < resolve("uft", recipe="jigsaw").sample.max_tokens


@pytest.mark.parametrize("size", [(2, 2), (3, 3), (2, 3)], ids=str)
def test_the_script_trains_on_what_the_processor_makes(size, tool, monkeypatch):
    """Pixels and prompts of the pool are those of the processor for the same pictures as files."""
    from unift.rows import processor as processors
    from unift.rows.tasks import jigsaw

    monkeypatch.setattr(tool, "POOL", 3)
    _, processor = tool.make(*size)
    processors.attach(processor.tokenizer, processor)
    reader = reader_of(processor.tokenizer)
    for kind in tool.SHARES:
        pixels, prompts, answers = tool.pool(kind, *size)
        options = {"rows": size[0], "cols": size[1], "square": True, "kind": kind}
        rows = [jigsaw.make(tool.SEED, i, **options) for i in range(3)]
        made = reader.tensors(tuple(row.images for row in rows))
        assert torch.allclose(made["pixel_values"].flatten(0, 1), pixels.flatten(0, 1), atol=1e-6)
        assert bool(made["pixel_attention_mask"].all())
        assert prompts == [reader.expand(row.prompt, row.images, "") for row in rows]
        if kind == "jigsaw":  # the form alone: permutations that have nothing to do with the picture
            assert all(score(a, row).parts["format"] == 1.0 for a, row in zip(answers, rows, strict=True))
        else:
            assert answers == [row.solution for row in rows]


def test_knows_the_older_tasks_and_the_form_alone(base):
    """Of the older tasks more than half above chance; of the jigsaw permutations, right by luck."""
    for kind, chance in zip(KINDS, (1 / 6, 1 / 3, 1 / 2), strict=True):
        rows = make_rows("jigsaw", 100, 1, "test", kind=kind)
        right = sum(score(text, row).right for text, row in zip(greedy(base, rows), rows, strict=True)) / len(rows)
        assert right > (1 + chance) / 2, kind
    rows = make_rows("jigsaw", 100, 1, "test")
    found = [score(text, row) for text, row in zip(greedy(base, rows), rows, strict=True)]
    assert sum(f.parts["format"] for f in found) >= 90
    assert sum(f.right for f in found) <= 15  # 1 in 24 on average


@pytest.mark.parametrize("method", ["sft", "uft"])
def test_two_steps_of_the_recipe(method, tmp_path):
    how = {k: v for k, v in SMALL.items() if method != "sft" or not k.startswith("sample")}
    found = unift.train(method, recipe="jigsaw", run=tmp_path / "run", quiet=True, **how)
    assert found.result["steps"] == 2 and found.metrics[0]["forward"] == "shared"
    from safetensors.torch import load_file

    old, new = (load_file(f / "model.safetensors") for f in (locate("embedded:jigsaw"), tmp_path / "run" / "model"))
    moved = {name for name in new if not torch.equal(old[name].to(new[name].dtype), new[name])}
    assert any("vision_model" in name for name in moved) and any("text_model" in name for name in moved)
