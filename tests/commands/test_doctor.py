"""The doctor's look at the reward, where some or all rows have no worked solution."""

from __future__ import annotations

import json

import pytest

from unift.commands.doctor import find_model, try_reward
from unift.config.resolve import parse_overrides, resolve
from unift.rows.dataset import load

BARE = {"prompt": "1 + 1 =", "answer": "2", "task": "math"}
SOLVED = {"prompt": "1 + 2 =", "steps": ["one\n", "two\n"], "answer": "3", "task": "math"}


@pytest.mark.parametrize(
    ("method", "words", "rows", "said"),
    [
        ("uft", ["data.solved=20"], None, "accepts 20 of 20 demonstrations"),  # the others keep the ending of theirs
        ("rft", [], [BARE, BARE | {"prompt": "1+1"}], "accepts 0 of 0 demonstrations"),
        ("uft", ["data.solved=some"], [BARE, SOLVED], "accepts 1 of 1 demonstrations"),
    ],
)
def test_a_demonstration_is_asked_of_rows_that_have_one(tmp_path, method, words, rows, said):
    recipe = "lock" if rows is None else None
    if rows is not None:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = [*words, f"data.train={tmp_path / 'rows.jsonl'}", "model.path=embedded:countdown"]
    config = resolve(method, recipe=recipe, overrides=parse_overrides(words))
    check, _ = try_reward(config, load(config).train)
    assert check.ok and said in check.text, check.text


def test_a_wrong_demonstration_and_a_paid_empty_text_are_still_found(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (BARE, SOLVED)))
    (tmp_path / "r.py").write_text("def score(completion, row):\n    return 0.0 if completion else 1.0\n")
    words = [f"data.train={tmp_path / 'rows.jsonl'}", "model.path=embedded:countdown", "data.solved=some"]
    words += [f"reward.function={tmp_path / 'r.py'}:score"]
    config = resolve("uft", overrides=parse_overrides(words))
    check, _ = try_reward(config, load(config).train)
    assert not check.ok and "does not earn full reward: 0" in check.text and "an empty completion earns 1" in check.text


def test_numbers_of_a_gguf_file_are_the_models(smollm):
    """Of its class, tied embeddings once: 134,515,008 as published, not what the size of the file allows."""
    config = resolve("uft", recipe="smollm2")
    check, found = find_model(config)
    assert found == (smollm.parent, 134_515_008) and "134.52 M parameters" in check.text
