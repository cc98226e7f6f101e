"""An evaluation of a run: it judges as the run did, on the rows that it is given."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import char_tokenizer, saved_llama
from typer.testing import CliRunner

import unift
from unift.rows.inspect import write_rows
from unift.rows.tasks import make_rows
from unift.types import ConfigError

SMALL = {"train.prompts": 2, "sample.max_tokens": 16, "sample.completions": 4, "threads": 1, "eval.every": 0}


def small(folder, **more):
    return unift.train("uft", run=folder, quiet=True, **more, **SMALL, **{"train.steps": 1})


def _boxed(folder, name, numbers):
    rows = [
        {
            "prompt": f"{n} + 1 =",
            "steps": [f"{n} and\n", "1\n", f"\\boxed{{{n + 1}}}"],
            "answer": str(n + 1),
            "task": "math",
        }
        for n in numbers
    ]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def test_an_evaluation_looks_for_answers_where_the_run_did(tmp_path):
    """reward.answer=auto is decided by solutions: those of the run's training rows, which an evaluation does not read, or of the
    rows that are evaluated. The reward here says which place it was given."""
    model = saved_llama(tmp_path / "model", char_tokenizer())
    (tmp_path / "place.py").write_text("def score(completion, row, answer):\n    return float(answer == 'boxed')\n")
    train, test = _boxed(tmp_path, "train.jsonl", range(6)), _boxed(tmp_path, "test.jsonl", range(10, 14))
    bare = [{"prompt": "7 + 7 =", "answer": "14", "task": "math"}]
    reward = f"{tmp_path / 'place.py'}:score"
    run = small(tmp_path / "run", model=model, train=train, test=test, reward=reward)
    assert run.result["test"]["accuracy"] == 1
    for found in (
        unift.evaluate(run),
        unift.evaluate(run, bare),
        unift.evaluate(run.folder, split="train"),
        unift.evaluate(model, test, reward=reward, **{"eval.max_tokens": 8}),
    ):
        assert found.greedy.accuracy == 1
    command = [sys.executable, "-m", "unift", "eval", str(run.folder)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert shown.startswith("test, greedy, no hint: 100.00 %"), shown
    elsewhere = unift.evaluate(run, **{"reward.answer": "tags"})
    assert elsewhere.greedy.accuracy == 0


def test_rows_of_ones_own_take_the_place_of_generated_ones(tmp_path):
    """Also by name, of a run on a built-in task: `unift eval RUN data.test=FILE`."""
    run = small(tmp_path / "run", recipe="lock", **{"data.train_rows": 4})
    write_rows(make_rows("lock", 3, 7, "test", length=5), tmp_path / "own.jsonl")
    assert unift.evaluate(run, **{"data.test": str(tmp_path / "own.jsonl")}).greedy.n == 3
    with pytest.raises(ConfigError, match="found rows and split='train'"):
        unift.evaluate(run, make_rows("lock", 2, 0, "test"), split="train")
    with pytest.raises(ConfigError, match="samples=-1"):
        unift.evaluate(run, samples=-1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--retention", "x.jsonl", "--samples", "4", "--suite", "uft"], "leave out --suite, --samples"),
        (["--retention", "x.jsonl", "--split", "train"], "leave out --split"),
        (["--suite", "uft", "--data", "x", "--split", "train"], "--vote and --split are of a run's own rows"),
        (["--suite", "uft", "--data", "x", "--vote"], "--vote and --split are of a run's own rows"),
    ],
)
def test_options_without_effect_are_refused(words, said):
    from unift.commands.cli import app

    done = CliRunner().invoke(app, ["eval", "embedded:lock", *words])
    assert isinstance(done.exception, ConfigError) and said in str(done.exception)
