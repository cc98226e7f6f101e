"""unift from Python: what a notebook or a script meets."""

from __future__ import annotations

import doctest
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import unift
from unift.commands import api
from unift.rows.inspect import write_rows
from unift.rows.tasks import make_rows
from unift.types import ConfigError, DataError, Row, UniftError

SMALL = {"train.prompts": 2, "sample.max_tokens": 16, "sample.completions": 4, "threads": 1, "eval.every": 0}


def mappings(n, split="train"):
    rows = make_rows("lock", n, 0, split, length=5)
    return [
        {"id": r.id, "prompt": r.prompt, "steps": list(r.steps), "ending": r.ending, "answer": r.answer, "task": r.task}
        for r in rows
    ]


def small(folder, *, steps=3, **more):
    given = {"model": "embedded:lock", "train": mappings(6), "test": mappings(4, "test"), "quiet": True} | more
    return unift.train("uft", run=folder, **given, **SMALL, **{"train.steps": steps})


def test_import_is_light():
    """No torch, transformers or pydantic until something needs them."""
    code = "import sys, unift; unift.__version__; print([m for m in ('torch', 'transformers', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there():
    for name in unift.__all__:
        assert getattr(unift, name) is not None and name in dir(unift)
    with pytest.raises(AttributeError, match="trian"):
        unift.trian  # noqa: B018


@pytest.mark.parametrize("module", [api, unift], ids=["api", "unift"])
def test_doctests(module):
    found = doctest.testmod(module)
    assert found.failed == 0 and (module is unift or found.attempted >= 6)


def test_a_run_and_what_is_in_it(tmp_path):
    run = small(tmp_path / "run")
    assert run.result["steps"] == 3 and [m["step"] for m in run.metrics] == [0, 1, 2, 3]
    groups = run.rollouts(1)
    assert len(groups) == 2 and all(len(g.samples) == 4 for g in groups)
    model, tokenizer = run.model()
    assert model.config.vocab_size == len(tokenizer)
    assert run.report().is_file() and run.config.train.steps == 3
    assert unift.load_run(tmp_path / "run").result == run.result
    with pytest.raises(unift.UniftError, match="no rollouts of step 9"):
        run.rollouts(9)
    with pytest.raises(ConfigError, match="no run folder"):
        unift.load_run(tmp_path)


def test_the_command_line_does_the_same(tmp_path):
    """Same settings, same numbers; rows in a file and rows in a list are the same rows."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, mappings(6))))
    words = [f"{k}={v}" for k, v in {**SMALL, "train.steps": 3}.items()]
    command = [sys.executable, "-m", "unift", "train", "--quiet", "--method", "uft", "--run", str(tmp_path / "a")]
    subprocess.run([*command, "model.path=embedded:lock", f"data.train={rows}", *words], check=True, timeout=120)
    b = small(tmp_path / "b", test=None)
    a = unift.load_run(tmp_path / "a")
    assert [m["loss"] for m in a.metrics[1:]] == [m["loss"] for m in b.metrics[1:]]
    assert a.result["train"] == b.result["train"]


def test_on_step_stops_and_the_same_call_continues(tmp_path):
    whole = small(tmp_path / "whole")
    seen = []
    part = small(tmp_path / "part", on_step=lambda step, metrics: seen.append((step, metrics["loss"])) or step == 2)
    assert part.result is None and [s for s, _ in seen] == [1, 2]
    rest = small(tmp_path / "part")
    assert [m["loss"] for m in rest.metrics[1:]] == [m["loss"] for m in whole.metrics[1:]]
    assert rest.result["test"] == whole.result["test"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_first(tmp_path, number, at_a_terminal):
    """Steps since the last checkpoint are not lost, and the interpreter goes on."""
    started = threading.Event()

    def kill():
        started.wait(60)
        time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=kill, daemon=True).start()
    run = small(tmp_path, steps=400, on_step=lambda step, metrics: started.set(), **{"save.every": 0})
    done = len(run.metrics) - 1
    assert run.result is None and 1 <= done < 400
    assert (tmp_path / "checkpoints" / f"step_{done:06d}").is_dir()


def test_a_loaded_model_stays_as_it_is(tmp_path):
    """Training starts from a copy in the run folder, so the run goes on without the model."""
    import torch

    model, tokenizer = small(tmp_path / "first").model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    implementation = model.config._attn_implementation
    part = small(tmp_path / "run", model=model, tokenizer=tokenizer, on_step=lambda step, metrics: step == 1)
    assert part.result is None
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.config._attn_implementation == implementation
    rest = small(tmp_path / "run", model=str(tmp_path / "run" / "base"))
    assert rest.result["steps"] == 3
    again = small(tmp_path / "again", model=model, tokenizer=tokenizer)
    assert [m["loss"] for m in again.metrics[1:]] == [m["loss"] for m in rest.metrics[1:]]
    with pytest.raises(ConfigError, match="needs its tokenizer"):
        small(tmp_path / "other", model=model)


def test_rows_of_many_kinds():
    rows = mappings(3)
    expected = unift.load_rows(rows)
    assert all(isinstance(r, Row) for r in expected) and unift.load_rows(expected) == expected
    assert unift.load_rows(iter(rows)) == expected
    datasets = pytest.importorskip("datasets")
    flat = [{"prompt": "1 + 1 =", "steps": [" 2"], "answer": "2", "id": "a"}]
    assert unift.load_rows(datasets.Dataset.from_list(flat)) == unift.load_rows(flat)
    pandas = pytest.importorskip("pandas")
    assert unift.load_rows(pandas.DataFrame(flat)) == unift.load_rows(flat)
    gaps = [flat[0], {"prompt": "2 + 2 =", "wanted": 3}]  # NaN in the frame
    assert (
        unift.load_rows(pandas.DataFrame(gaps))[1].answer is None
        and not unift.load_rows(pandas.DataFrame(gaps))[1].steps
    )
    for bad, said in (
        ({"prompt": "x"}, "expected a list of mappings, found dict"),
        ([3], "row 1"),
        ([], "holds no rows"),
        (datasets.DatasetDict(train=datasets.Dataset.from_list(flat)), "found DatasetDict of 'train': hand over one"),
    ):
        with pytest.raises(DataError, match=said):
            unift.load_rows(bad)


def test_prompts_alone_and_a_reward_of_ones_own(tmp_path):
    """TRL's prompt-only data sets: no answer and no solution, columns that the reward names."""
    rows = [{"prompt": r["prompt"], "wanted": i} for i, r in enumerate(mappings(6))]

    def wants(completions, wanted, **columns):
        return [float(w) for w in wanted]

    given = {"model": "embedded:lock", "train": rows, "quiet": True}
    run = unift.train("rft", reward=wants, run=tmp_path / "own", **given, **SMALL, **{"train.steps": 2})
    assert {s.score.value for g in run.rollouts(1) for s in g.samples} <= {float(i) for i in range(6)}
    assert unift.evaluate(tmp_path / "own", rows, reward=wants).greedy.accuracy == pytest.approx(5 / 6)
    (tmp_path / "mine.py").write_text("def score(completion, row):\n    return float(row.extra['wanted'])\n")
    by_name = {"model": "embedded:lock", "train": rows[:4], "reward": f"{tmp_path / 'mine.py'}:score", "workers": 1}
    few = SMALL | {"train.steps": 1, "eval.train_rows": 2}
    found = unift.compare("rft", seeds=1, run=tmp_path / "several", test=rows[4:], **by_name, **few)
    assert found.results[0]["steps"] == 1
    with pytest.raises(DataError, match="train row 1, column 'answer': missing"):
        unift.train("rft", run=tmp_path / "verifier", **given, **SMALL)


def test_a_recipe_with_rows_of_its_own_task(tmp_path):
    """They are what the recipe's model knows. For any other rows a model is asked for."""
    settings = SMALL | {"train.steps": 1, "quiet": True, "recipe": "lock"}
    run = unift.train(train=mappings(6), run=tmp_path / "run", **settings)
    assert run.result["steps"] == 1 and run.config.model.path == "embedded:lock"
    other = str(run.folder / "model")  # named in a file of settings, it is the one that is trained
    again = unift.train(train=mappings(6), run=tmp_path / "again", config={"model": {"path": other}}, **settings)
    assert again.config.model.path == other
    foreign = [{"prompt": "1 + 1 =", "steps": [" 2"], "answer": "2", "task": "math"}]
    with pytest.raises(ConfigError, match="pass model=FOLDER"):
        unift.train(train=foreign, run=tmp_path / "other", **settings)


@pytest.mark.parametrize("method", ["train", "compare"])
def test_a_file_of_a_recipes_own_task(tmp_path, method):
    """A file is taken as rows that are handed over are, by every verb; the recipe's model is no other's."""
    own, foreign = tmp_path / "own.jsonl", tmp_path / "foreign.jsonl"
    write_rows([*unift.load_rows(mappings(6))], own)
    foreign.write_text(json.dumps({"prompt": "1 + 1 =", "steps": [" 2"], "answer": "2", "task": "math"}) + "\n")
    settings = SMALL | {"train.steps": 1, "recipe": "lock"}
    if method == "train":
        cli = [f"data.train={own}", "data.task=null", "--recipe", "lock", "--dry-run"]
        shown = subprocess.run([sys.executable, "-m", "unift", "train", *cli], capture_output=True, text=True)
        assert shown.returncode == 0 and "path: embedded:lock" in shown.stdout, shown.stderr
        with pytest.raises(ConfigError, match="without model.path"):
            unift.train(train=foreign, run=tmp_path / "run", **settings)
        with pytest.raises(DataError, match="no such file"):
            unift.train(train=tmp_path / "none.jsonl", run=tmp_path / "run", **settings)
    else:
        found = unift.compare(
            "rft", train=own, test=mappings(4, "test"), seeds=1, workers=1, run=tmp_path / "runs", **settings
        )
        assert found.run("rft").config.model.path == "embedded:lock"
        with pytest.raises(ConfigError, match="without model.path"):
            unift.compare("rft", train=foreign, test=mappings(4, "test"), seeds=1, run=tmp_path / "runs", **settings)


def test_rollouts_that_were_not_kept(tmp_path):
    """The recipe of the demo keeps none: the error says which setting does."""
    settings = SMALL | {"train.steps": 1, "quiet": True, "recipe": "lock", "train": mappings(6)}
    run = unift.train("rft", run=tmp_path / "rft", **settings)
    with pytest.raises(UniftError, match="save.rollouts=false; train into another folder with save.rollouts=true"):
        run.rollouts(1)
    with pytest.raises(UniftError, match="steps count from 1, and the run has made 1"):
        run.rollouts(2)
    settings |= {"save.rollouts": True, "sample.completions": 0}
    kept = unift.train("sft", run=tmp_path / "sft", **settings)
    with pytest.raises(UniftError, match="'sft' samples nothing"):
        kept.rollouts(1)


def test_rows_that_were_handed_over_are_asked_for_again(tmp_path):
    small(tmp_path, on_step=lambda step, metrics: step == 1)
    command = [sys.executable, "-m", "unift", "train", "--quiet", "--config", str(tmp_path / "config.yaml")]
    done = subprocess.run([*command, "--run", str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "were handed over from Python" in done.stderr and "Traceback" not in done.stderr


def test_evaluate(tmp_path):
    run = small(tmp_path)
    bare = [{k: v for k, v in r.items() if k not in ("steps", "ending")} for r in mappings(4, "test")]
    found = unift.evaluate(run.folder / "model", bare, samples=2, **{"sample.max_tokens": 16})
    assert found.greedy.n == 4 and set(found.pass_at) == {"pass@1", "pass@2"}
    assert found.greedy.accuracy == run.result["test"]["accuracy"]
    model, tokenizer = run.model()
    assert unift.evaluate(model, bare, tokenizer=tokenizer, **{"sample.max_tokens": 16}).greedy == found.greedy
    with pytest.raises(ConfigError, match="split"):
        unift.evaluate("embedded:lock", recipe="lock", split="dev")


def test_compare(tmp_path):
    rows, settings = mappings(6), {**SMALL, "train.steps": 2}
    del settings["threads"]
    found = unift.compare(
        ["sft", "rft"], seeds=1, run=tmp_path, train=rows, test=mappings(4, "test"), model="embedded:lock",
        **(settings | {"train.prompts": 2}),
    )  # fmt: skip
    assert {r["method"] for r in found.results} == {"sft", "rft"} and "| rft | 1 |" in str(found)
    assert found.run("rft").result["steps"] == 2 and found.report().is_file()
    with pytest.raises(ConfigError, match="name the reward"):
        unift.compare("sft", reward=lambda completion, row: 1.0)
