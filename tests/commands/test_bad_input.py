"""Bad input on the command line, as a person meets it: one clear line, exit code 2, no model loaded, nothing lost.

In this process, so that a test can forbid loading a model; ``unift`` itself turns the errors into lines.
"""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import sys
from pathlib import Path

import pytest
import torch

from unift.commands import cli, display
from unift.files import write_atomic
from unift.model.load import locate
from unift.rows.inspect import write_rows
from unift.rows.readers import read_rows
from unift.rows.tasks import make_rows
from unift.training.run import checkpoint
from unift.training.run.metrics import append_metrics, read_metrics
from unift.types import UniftError

GOOD = json.dumps(
    {"prompt": "abcd>", "steps": ["A", "a1", "b2", "c3", "d4"], "ending": ".", "task": "lock"}
    | {"answer": {"letters": "abcd", "keys": 10, "table_seed": 0}}
)
TINY = ["train.prompts=4", "sample.completions=4", "data.train_rows=8", "data.test_rows=4", "eval.every=0", "threads=1"]


@pytest.fixture
def unift(monkeypatch, capsys, tmp_path):
    """unift(*words) -> (exit code, what was printed to stderr), in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["unift", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        shown = capsys.readouterr().err
        return end.value.code or 0, shown

    return run


@pytest.fixture
def refused(unift, monkeypatch):
    """refused(*words) -> the message of a command that must fail before a model is loaded."""

    def load(*args):
        raise AssertionError("the model was loaded before the error")

    for user in ("training.loop", "training.evaluate", "commands.retention"):
        monkeypatch.setattr(f"unift.{user}.load_policy", load)

    def run(*words):
        code, said = unift(*words)
        assert code == 2 and "Traceback" not in said, said
        return said

    return run


def own(path, *more):
    return ("train", f"data.train={path}", "model.path=embedded:lock", "--run", "run", *more)


# ---------------------------------------------------------------------------------------------- files of rows


FILES = {
    "empty.jsonl": (b"", "empty.jsonl: the file is empty"),
    "blank.jsonl": (b"\n \n", "blank.jsonl holds no rows"),
    "bytes.jsonl": (
        GOOD.encode() + b"\n\xff\xfe\n",
        "bytes.jsonl, line 2: not UTF-8 text (byte 0xff at position 1). Save the file as UTF-8",
    ),
    "latin.jsonl": ('{"prompt": "é"}'.encode("latin-1"), "latin.jsonl, line 1: not UTF-8 text"),
    "torn.jsonl": (GOOD.encode() + b'\n{"prompt": ', "torn.jsonl, line 2: not valid JSON"),
    "deep.jsonl": (b"[" * 100_000, "deep.jsonl, line 1: "),
    "list.jsonl": (GOOD.encode() + b"\n[1, 2]\n", "list.jsonl, row 2: expected a mapping of columns, found list"),
    "first.jsonl": (b"[1, 2]\n", "first.jsonl, row 1: expected a mapping of columns, found list [1, 2]"),
    "text.jsonl": (b'"abc"\n', "text.jsonl, row 1: expected a mapping of columns, found str 'abc'"),
    "one.json": (GOOD.encode(), "one.json: expected a JSON list of rows, found dict"),
    "bytes.json": (b"[\xff]", "bytes.json cannot be read as json"),
    "rows.xlsx": (b"PK", "unknown kind of file '.xlsx'; expected .jsonl, .json, .parquet, .csv or .tsv"),
    "more.xlsx": (b"PK", "`unift data convert` reads what lies on the Hub"),
    "rows.txt.gz": (b"\x1f\x8b", "unknown kind of file '.txt.gz'"),
    "torn.jsonl.gz": (b"\x1f\x8b\x08\x00", "torn.jsonl.gz cannot be read: "),
    "plain.jsonl.gz": (GOOD.encode(), "plain.jsonl.gz cannot be read: Not a gzipped file"),
    "rows.csv": (b"prompt,answer\n1,2\n", "rows.csv, row 1, column 'steps': no worked solution"),
    "ragged.csv": (b"prompt,answer,steps\n1,2\n", "ragged.csv, line 2: 2 cells, the head has 3"),
    "quote.csv": (b'prompt,answer,steps\n"1"2,3,4\n', "quote.csv, line 2: cannot be read as a table"),
    "latin.csv": ("prompt,answer\né,2\n".encode("latin-1"), "latin.csv, line 2: not UTF-8 text"),
    "head.csv": (b"prompt,answer\n", "head.csv holds no rows"),
    "inner.jsonl": (b"[[1], [2]]", "inner.jsonl, row 1: expected a mapping of columns, found list [[1], [2]]"),
    "torn.parquet": (b"PAR1" + b"\0" * 99, "torn.parquet cannot be read as parquet"),
}


@pytest.mark.parametrize("name", FILES)
def test_malformed_files(refused, tmp_path, name):
    content, said = FILES[name]
    (tmp_path / name).write_bytes(content)
    assert said in refused(*own(name))
    assert not (tmp_path / "run").exists()


def test_missing_files_and_folders(refused, tmp_path):
    assert f"none.jsonl: no such file (looked in {tmp_path})" in refused(*own("none.jsonl"))
    (tmp_path / "folder.jsonl").mkdir()
    assert "folder.jsonl is a folder; expected a file of rows" in refused(*own("folder.jsonl"))
    (tmp_path / "good.jsonl").write_text(GOOD)
    assert "none.jsonl: no such file" in refused(*own("good.jsonl", "data.test=none.jsonl"))
    assert "1 problems of data.test='good.jsonl' also stand in data.train" in refused(
        *own("good.jsonl", "data.test=good.jsonl")
    )
    assert "data.format='foo' is unknown; expected auto, unift, verl" in refused(*own("good.jsonl", "data.format=foo"))
    assert "no rows: set data.train=FILE" in refused("train", "model.path=embedded:lock")


def test_rows_that_share_an_id(refused, tmp_path):
    """Draws, hint lengths and partitions go by the id: a repeated one would give two problems one length, silently."""
    rows = [json.loads(GOOD) | {"prompt": f"lock {n}:", "id": i} for n, i in enumerate((0, 7, 3, 7))]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said = refused(*own("rows.jsonl", "--method", "adaptive"))
    assert "rows.jsonl, row 4, column 'id': '7' is the id of row 2, too." in said and "give every row its own" in said


def test_copies_of_a_row_have_ids_of_their_own(tmp_path):
    """The same row again, named by its content or by the file, is numbered; written and read, copies keep their ids."""
    (tmp_path / "rows.jsonl").write_text("\n".join([GOOD, GOOD.replace("[", '["so ", '), GOOD, GOOD]))
    ids = [row.id for row in read_rows(str(tmp_path / "rows.jsonl"))]
    assert len(set(ids)) == 4 and ids[2:] == [f"{ids[0]}-2", f"{ids[0]}-3"]
    write_rows(read_rows(str(tmp_path / "rows.jsonl")), tmp_path / "again.jsonl")
    assert [row.id for row in read_rows(str(tmp_path / "again.jsonl"))] == ids
    named = json.dumps(json.loads(GOOD) | {"id": 0})
    (tmp_path / "named.jsonl").write_text(f"{named}\n{named}")
    assert [row.id for row in read_rows(str(tmp_path / "named.jsonl"))] == ["0", "0-2"]


def test_truncated_parquet(refused, tmp_path):
    write_rows(make_rows("lock", 200, 0, "train"), tmp_path / "rows.parquet")
    whole = (tmp_path / "rows.parquet").read_bytes()
    (tmp_path / "rows.parquet").write_bytes(whole[: len(whole) // 2])
    assert "rows.parquet cannot be read as parquet" in refused(*own("rows.parquet"))


ROWS = {
    "no prompt": (
        {"steps": ["a"], "answer": "1"},
        "row 2, column 'prompt': expected a text or a list of messages {role, content} with text in them, found nothing",
    ),
    "prompt is a number": ({"prompt": 3, "steps": ["a"], "answer": "1"}, "row 2, column 'prompt': expected"),
    "message without text": (
        {"prompt": [{"role": "user", "content": None}], "steps": ["a"], "answer": "1"},
        "row 2, column 'prompt'",
    ),
    "no steps": (
        {"prompt": "p", "answer": "1"},
        "row 2, column 'steps': no worked solution, which this method learns from",
    ),
    "null steps": ({"prompt": "p", "steps": None, "answer": "1"}, "row 2, column 'steps': no worked solution"),
    "empty steps": ({"prompt": "p", "steps": [], "answer": "1"}, "row 2, column 'steps': the solution is empty"),
    "white steps": (
        {"prompt": "p", "steps": [" ", "\n"], "answer": "1"},
        "row 2, column 'steps': the solution is empty",
    ),
    "steps of numbers": (
        {"prompt": "p", "steps": ["a", 3], "answer": "1"},
        "row 2, column 'steps': expected a list of texts, found ['a', 3]",
    ),
    "steps a mapping": (
        {"prompt": "p", "steps": {"a": "b"}, "answer": "1"},
        "row 2, column 'steps': expected a list of texts",
    ),
    "no answer": ({"prompt": "p", "steps": ["a"]}, "row 2, column 'answer': missing; the verifier needs it"),
    "ending a number": (
        {"prompt": "p", "steps": ["a"], "answer": "1", "ending": 3},
        "row 2, column 'ending': expected a text, found int 3",
    ),
    "half a character": (
        {"prompt": "p\ud800", "steps": ["a"], "answer": "1"},
        "row 2, column 'prompt': '\\ud800' is no character",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_malformed_rows(refused, tmp_path, name):
    record, said = ROWS[name]
    (tmp_path / "rows.jsonl").write_text(GOOD + "\n" + json.dumps(record) + "\n")
    assert f"error: rows.jsonl, {said}" in refused(*own("rows.jsonl"))


OTHER = {
    "verl hint is no prefix": (
        {"prompt": "p", "hint": ["a"], "answer": "b", "reward_model": {"ground_truth": 1}},
        "column 'answer': does not begin with the joined hint",
    ),
    "verl answer a number": (
        {"prompt": "p", "hint": ["a"], "answer": 3, "reward_model": {"ground_truth": 1}},
        "column 'answer': expected a text, found int 3",
    ),
    "verl reward_model a text": (
        {"prompt": "p", "hint": ["a"], "answer": "a", "reward_model": "rule"},
        "column 'reward_model.ground_truth': missing",
    ),
    "trl without answer": (
        {"prompt": "p", "completion": "c"},
        "column 'answer': missing; the verifier needs it (TRL rows may name it 'solution'; ",
    ),
    "trl completion of numbers": (
        {"prompt": "p", "completion": [1], "answer": "a"},
        "column 'completion': expected a text or a list of messages, found [1]",
    ),
    "gym without answer": ({"question": "q", "metadata": {}}, "column 'answer': missing"),
    "gym question a list": ({"question": [1], "answer": "a", "metadata": {}}, "column 'prompt': expected a text"),
    "unknown layout": (
        {"text": "x"},
        "column 'prompt': missing. Found columns ['text']; expected prompt, steps, answer",
    ),
}


@pytest.mark.parametrize("name", OTHER)
def test_malformed_rows_of_other_layouts(refused, tmp_path, name):
    record, said = OTHER[name]
    (tmp_path / "rows.jsonl").write_text(json.dumps(record) + "\n")
    assert f"error: rows.jsonl, row 1, {said}" in refused(*own("rows.jsonl", "--method", "rft"))


def test_single_step_solutions(refused, unift, tmp_path):
    """A hint of a one-step solution is all or nothing: refused where hints are graded and no row has a second step."""
    single = json.dumps(json.loads(GOOD) | {"steps": ["Aa1b2c3d4"]})
    (tmp_path / "rows.jsonl").write_text(single)
    for method in ("uft", "r3", "stage"):
        said = refused(*own("rows.jsonl", "--method", method))
        assert "rows.jsonl, column 'steps': every solution is a single step" in said and "use method sft or rft" in said
    (tmp_path / "mixed.jsonl").write_text(single + "\n" + GOOD)
    for path, method in (("rows.jsonl", "sft"), ("rows.jsonl", "rft"), ("mixed.jsonl", "uft")):
        with pytest.raises(AssertionError, match="the model was loaded"):  # nothing was refused
            unift(*own(path, "--method", method, "--run", f"{path}-{method}"))


def test_what_does_not_fit(refused, tmp_path):
    """Neither a prompt nor a hint is ever cut: a row whose prompt and solution do not fit is refused with its number."""
    longer = json.dumps(json.loads(GOOD) | {"steps": ["A"] + ["a1"] * 90})
    (tmp_path / "rows.jsonl").write_text(GOOD + "\n" + longer)
    said = refused(*own("rows.jsonl", "data.max_prompt=64"))
    assert (
        "row 2 (id " in said
        and "data.max_prompt is 64" in said
        and "never cuts a prompt or a hint: raise data.max_prompt" in said
    )


def test_completions_beyond_the_models_positions(refused):
    """The embedded base has 256 positions: refused with the room that is left, for training and for held-out rows."""
    said = refused("train", "--recipe", "lock", "sample.max_tokens=250", *TINY)
    assert "data.train, row 1: the prompt (6 tokens), its longest hint (11) and a completion (250)" in said
    assert "more than the 256 positions of the model. Lower sample.max_tokens to 239 or less" in said
    said = refused("train", "--recipe", "lock", "eval.max_tokens=251", *TINY)  # training rows are evaluated at the end
    assert "data.train, row 1: the prompt (6 tokens), its longest hint (0) and a completion (251)" in said
    said = refused("train", "--recipe", "lock", "eval.max_tokens=251", "eval.train_rows=0", *TINY)
    assert "data.test, row 1: the prompt (6 tokens), its longest hint (0) and a completion (251)" in said
    assert "Lower sample.max_tokens to 250 or less (of evaluations eval.max_tokens, where it is set)" in said


def test_line_separators_inside_texts_are_text(tmp_path):
    """U+2028, form feeds and a byte order mark: legal in JSON Lines, and what write_rows writes reads back."""
    from dataclasses import replace

    row = replace(make_rows("lock", 1, 0, "train")[0], prompt="a\u2028b\x0cc\x85>", id="x")
    write_rows([row, row], tmp_path / "rows.jsonl")
    again = read_rows(str(tmp_path / "rows.jsonl"))
    assert [r.prompt for r in again] == [row.prompt] * 2
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n")
    assert read_rows(str(tmp_path / "bom.jsonl"))[0].prompt == "abcd>"


# ---------------------------------------------------------------------------------------------- settings


SETTINGS = [
    ("train.lrr=1", "unknown setting 'train.lrr'; did you mean 'lr'?"),
    ("learning_rate=1", "unknown setting 'learning_rate'; did you mean 'train.lr'?"),
    ("threads=10000", "threads=10000: this machine has "),
    ("threads=1180591620717411303424", "setting 'threads': expected a whole number that fits 64 bits"),
    ("sample.temperature=1.0e-45", "setting 'sample.temperature': input should be greater than or equal to 0.001"),
    (
        "train.steps=abc",
        "setting 'train.steps': input should be a valid integer, unable to parse string as an integer; found 'abc'",
    ),
    ("train.steps=0", "setting 'train.steps': input should be greater than or equal to 1; found 0"),
    ("train.prompts=1.5", "setting 'train.prompts'"),
    ("train.lr=-1", "setting 'train.lr': input should be greater than 0; found -1"),
    ("train.lr=.nan", "setting 'train.lr'"),
    ("train.lr=.inf", "setting 'train.lr': input should be a finite number; found inf"),
    ("reward.timeout=.inf", "setting 'reward.timeout': input should be a finite number"),
    (
        "train=5",
        "setting 'train' is a section: set what is in it (train.steps, train.budget, train.prompts, ...); found 5",
    ),
    ("model=x", "setting 'model' is a section: set what is in it (model.path,"),
    ("train.lr.x=5", "setting 'train.lr': input should be a valid number; found {'x': 5}"),
    ("train.betas=[0.9, 1.5]", "setting 'train.betas.1': input should be less than 1; found 1.5"),
    ("train.betas=[0.9]", "setting 'train.betas"),
    ("train.updates=5", "train.prompts=32 does not divide into train.updates=5 equal updates; use a multiple of 5"),
    ("sample.completions=1", "every advantage would be 0"),
    ("reward.format_score=1", "setting 'reward.format_score'"),
    ("reward.memory_mb=-1", "setting 'reward.memory_mb'"),
    ("baselines=[foo]", "baselines: unknown method 'foo'"),
    (
        "log.trackers=[foo]",
        "setting 'log.trackers.0': input should be 'wandb', 'tensorboard' or 'trackio'; found 'foo'",
    ),
    ("data.options.lenght=3", "option 'lenght' of task 'lock' is unknown. Did you mean 'length'?"),
    ("data.options.length=abc", "option 'length' of lock: found 'abc', expected a whole number from 1 to 64"),
    ("data.task=lok", "task 'lok' is unknown. Did you mean 'lock'?"),
    ("model.device=gpu", "model.device='gpu' cannot be used"),
    ("model.device=cuda:99", "use auto, cpu or cuda:N"),
    ("model.path=nowhere", "model.path='nowhere' is neither a folder nor embedded:NAME"),
    ("model.path=embedded:lok", "no such base in the package. Known: countdown, jigsaw, lock"),
    ("reward.function=foo", "reward 'foo' is neither a built-in task"),
]


@pytest.mark.parametrize(("item", "said"), SETTINGS, ids=[s for s, _ in SETTINGS])
def test_settings(refused, item, said):
    assert said in refused("train", "--recipe", "lock", "--run", "run", item)


CONFIGS = {
    "none.yaml": (None, "config file 'none.yaml' does not exist"),
    "torn.yaml": (b"train: [\n", "torn.yaml is not valid YAML"),
    "list.yaml": (b"- 1\n", "list.yaml: expected a mapping of settings, found list"),
    "bytes.yaml": (b"\xff\xfe\xff", "config file 'bytes.yaml' cannot be read as UTF-8 text"),
    "section.yaml": (b"train: 3\n", "setting 'train' is a section"),
    "dots.yaml": (
        b"train.lr: 1\n",
        "unknown setting 'train.lr': a file or a mapping has sections in place of dots, train: {lr: 1}",
    ),
    "unknown_dots.yaml": (b"trian.lr: 1\n", "a file or a mapping has sections in place of dots, trian: {lr: 1}"),
    "foreign_dots.yaml": (b"actor_rollout_ref.rollout.n: 8\n", "did you mean 'sample.completions'?"),
    "case.yaml": (b"method: UFT\n", "unknown method 'UFT'; did you mean 'uft'?"),
    "unknown.yaml": (b"trian: {lr: 1}\n", "unknown setting 'trian'; did you mean 'train'?"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_files(refused, tmp_path, name):
    content, said = CONFIGS[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert said in refused("train", "--config", name)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.train=none.jsonl", "model.path=embedded:lock"], "none.jsonl: no such file (looked in "),
        (["data.train=good.jsonl", "data.test=none.jsonl", "model.path=embedded:lock"], "none.jsonl: no such file"),
        (["data.train=good.jsonl", "model.path=nowhere"], "model.path='nowhere' is neither a folder nor"),
        (["data.train=good.jsonl"], "without model.path: set model.path=FOLDER"),
        (["data.train=bad.jsonl", "model.path=embedded:lock"], "bad.jsonl, line 1: not valid JSON"),
        (["data.task=lok", "model.path=embedded:lock"], "task 'lok' is unknown"),
        (["--recipe", "lock", "data.options.lenght=3"], "option 'lenght' of task 'lock' is unknown"),
        (["--recipe", "lock", "reward.function=none.py:score"], "reward.function='none.py:score': no such file"),
    ],
)
def test_a_dry_run_says_what_is_missing(refused, tmp_path, words, said):
    (tmp_path / "good.jsonl").write_text(GOOD)
    (tmp_path / "bad.jsonl").write_text("{")
    assert said in refused("train", "--dry-run", *words)


def test_a_dry_run_counts_the_rows_of_files(unift, tmp_path, monkeypatch, capsys):
    (tmp_path / "good.jsonl").write_text(GOOD)
    monkeypatch.setattr(
        sys, "argv", ["unift", "train", "--dry-run", "data.train=good.jsonl", "model.path=embedded:lock"]
    )
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code and "rows: 1 for training, 0 held out; at most " in capsys.readouterr().out


def test_no_accuracy_without_held_out_rows(tmp_path, monkeypatch, capsys):
    """Neither on the way nor at the end, nor in the result, nor on the page; with eval.train_rows=0 none at all."""
    from unift.commands import report
    from unift.commands.compare.table import reading, table

    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.jsonl").write_text(GOOD)
    words = ["data.train=good.jsonl", "model.path=embedded:lock", "train.steps=2", "train.prompts=2", "eval.every=1"]
    words += ["sample.completions=2", "threads=1", "eval.train_rows=0", "--run", "run"]
    monkeypatch.setattr(sys, "argv", ["unift", "train", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    shown = capsys.readouterr().out
    assert not end.value.code and "held-out accuracy: not measured (set data.test)" in shown
    assert "accuracy without hint" not in shown and "0.0 %" not in shown and "evaluating" not in shown
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert "test" not in result and "train" not in result and result["base"] == {}
    page = report.write(tmp_path / "run", None).read_text()
    assert "Not known beyond the training rows (no data.test)" in page and "held-out accuracy, no hint" not in page
    assert "| uft | 1 | - | - | - | - |" in table([result]) and reading([result]) == []


def test_names_have_one_full_stop(refused):
    assert "error: unknown recipe 'lok'; did you mean 'lock'? Known: countdown, jigsaw, lock, smollm2." in refused(
        "train", "--recipe", "lok"
    )
    assert "error: unknown method 'zzzz'. Known: " in refused("train", "--method", "zzzz")


# ---------------------------------------------------------------------------------------------- models


def test_model_folders(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    said = refused("train", "--recipe", "lock", "model.path=empty")
    assert (
        "model.path='empty': the folder has no config.json, so it is no Hugging Face model. Expected config.json"
        in said
    )
    assert "is a file of an unknown kind; expected a folder or a .gguf file" in refused(
        "train", "--recipe", "lock", "model.path=notes.txt"
    )
    assert "model.path='empty': the folder has no config.json" in refused("eval", "empty")
    assert "split: found 'foo', expected train or test" in refused("eval", "embedded:lock", "--split", "foo")


@pytest.mark.parametrize(
    ("name", "said"), [("eos_token", "the tokenizer has no EOS token"), ("pad_token", "the tokenizer has no pad token")]
)
def test_tokenizer_without_eos_or_pad(refused, tmp_path, name, said):
    """A real model folder whose tokenizer lacks it, on the command line."""
    import shutil

    shutil.copytree(locate("embedded:lock"), tmp_path / "model")
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        path = tmp_path / "model" / file
        if path.is_file():
            kept = {k: v for k, v in json.loads(path.read_text()).items() if k != name}
            path.write_text(json.dumps(kept))
    message = refused("train", "--recipe", "lock", "model.path=model", *TINY)
    assert said in message and f"Set tokenizer.{name}" in message


def test_lora_targets_that_do_not_exist(unift):
    code, said = unift("train", "--recipe", "lock", "model.lora={rank: 4, targets: [nope]}", "--run", "run", *TINY)
    assert code == 2 and "model.lora.targets=['nope'] does not fit LlamaForCausalLM" in said


# ---------------------------------------------------------------------------------------------- rewards


REWARD = """
import time

def odd(completion):
    return sum(map(ord, completion)) % 20 == 0

def raises(completion, row):
    if odd(completion) and completion:
        raise ValueError("odd text")
    return 0.0

def hangs(completion, row):
    if odd(completion) and completion:
        time.sleep(100)
    return 0.0

def nan(completion, row):
    return float("nan") if odd(completion) and completion else 0.0

def none(completion, row):
    return None if odd(completion) and completion else 0.0

def wrong_length(prompts, completions, **columns):
    return [0.0, 0.0] if odd(completions[0]) and completions[0] else [0.0]
"""


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        ("raises", "exceptions"),
        ("hangs", "timeouts"),
        ("nan", "bad_values"),
        ("none", "bad_values"),
        ("wrong_length", "bad_values"),
    ],
)
def test_rewards_that_fail_sometimes_and_too_often(unift, tmp_path, capsys, function, kind):
    """Counted in the metrics and shown at the end while below the rate; above it the run stops, and says what happened."""
    (tmp_path / "mine.py").write_text(REWARD)
    words = [
        "train",
        "--recipe",
        "lock",
        "train.steps=2",
        f"reward.function=mine.py:{function}",
        "reward.timeout=0.3",
        *TINY,
    ]
    words += ["train.prompts=8", "sample.max_tokens=12"]
    code, said = unift(*words, "reward.error_rate=1", "--run", "run", "--quiet")
    assert code == 0, said
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    failed = json.loads((tmp_path / "run" / "result.json").read_text())["scorer"]
    assert last[f"reward/{kind}"] > 0 and failed["train"][kind] == last[f"reward/{kind}"]
    shown = display.summary({"scorer": failed})
    assert f"in training: {failed['train'][kind]} {kind.replace('_', ' ')}, of {failed['train']['total']}" in shown
    code, said = unift(*words, "reward.error_rate=0", "--run", "strict", "--quiet")
    assert code == 2 and f"mine.py:{function}' failed on 1 of the last" in said and "raise reward.error_rate" in said


def test_a_start_that_failed_does_not_claim_the_folder(unift, tmp_path):
    """The mended command may use the folder of the attempt that never measured anything; a run's folder stays refused."""
    (tmp_path / "mine.py").write_text(
        "def bad(completion, row): raise ValueError('x')\ndef good(completion, row): return 0.0\n"
    )
    words = ["train", "--recipe", "lock", "train.steps=1", "--run", "run", "--quiet", *TINY]
    code, said = unift(*words, "reward.function=mine.py:bad")
    assert code == 2 and "exception: ValueError: x" in said
    code, said = unift(*words, "reward.function=mine.py:good")
    assert code == 0, said
    code, said = unift(*words, "reward.function=mine.py:good", "train.lr=0.5")
    assert (
        code == 2
        and "run holds a run with other settings:\n  train.lr: 0.001 -> 0.5" in said
        and "Use another run folder" in said
    )


def test_damaged_and_impossible_run_folders(refused, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "cannot create the run folder file (File exists). Name another one with --run" in refused(
        "train", "--recipe", "lock", "--run", "file"
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("{}")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert "run holds a run with other settings" in refused("train", "--recipe", "lock", "--run", "run")
    from unift.config.identity import to_yaml
    from unift.config.resolve import resolve

    (tmp_path / "run" / "config.yaml").write_text(to_yaml(resolve("uft", recipe="lock")))
    assert "the run folder is damaged. Use another one" in refused("train", "--recipe", "lock", "--run", "run")


def test_a_learning_rate_that_blows_up(unift, tmp_path):
    """A really non-finite loss, from real settings: stopped with the batch on disk, before the weights are saved."""
    words = ["train.lr=1e38", "train.steps=4", "train.warmup=0", "save.every=1", "--run", "run", "--quiet"]
    code, said = unift("train", "--recipe", "lock", *words, *TINY)
    assert code == 2 and "is nan. The run stops before this reaches the weights" in said
    (dump,) = (tmp_path / "run" / "nonfinite").iterdir()
    assert str(dump.relative_to(tmp_path)) in said and "tokens_T" in torch.load(dump, weights_only=True)[0]


# ---------------------------------------------------------------------------------------------- verbs of data


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("make", "lock", "x.jsonl", "--n", "0"), "Invalid value for '--n'"),
        (("make", "lock", "x.jsonl", "--split", "foo"), "split 'foo' is unknown. Known: test, train"),
        (("make", "lock", "x.csv"), "unknown kind of file '.csv'; expected .jsonl or .parquet"),
        (("make", "lock", "no/x.jsonl"), "there is no folder no; create it first"),
        (("make", "math", "x.jsonl"), "task 'math' has no generator"),
        (("make", "lock", "x.jsonl", "--option", "lenght=3"), "Did you mean 'length'?"),
        (("make", "lock", "x.jsonl", "--option", "letters=1", "--option", "length=2"), "different train problems"),
        (("inspect", "none.jsonl"), "no such file"),
        (("inspect", "none.jsonl", "--limit", "-1"), "Invalid value for '--limit'"),
        (("convert", "none.jsonl", "x.csv"), "expected .jsonl or .parquet"),
    ],
)
def test_data_verbs(refused, tmp_path, words, said):
    assert said in refused("data", *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--budget", "2M"), "--budget '2M': expected sampled=TOKENS, trained=TOKENS, tokens=TOKENS (both"),
        (("--budget", "seconds=0"), "more than 0"),
        (("--budget", "sampled=1M", "train.steps=5"), "--budget chooses train.steps, which is also set; keep one"),
        (("--methods", "uft,sftt"), "did you mean 'sft'?"),
        (("--methods", ","), "name a method"),
    ],
)
def test_comparisons(refused, tmp_path, words, said):
    assert said in refused("compare", "--run", str(tmp_path / "runs"), *words)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- a full disk


class FileLimit:
    """No file of this process may grow beyond ``size`` bytes: writes fail in the kernel, as they do on a full disk."""

    def __init__(self, size):
        self.size = size

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *exception):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@pytest.mark.parametrize("kilobytes", [100, 500], ids=["safetensors", "torch"])
def test_checkpoint_that_cannot_be_written(unift, tmp_path, kilobytes):
    """The file system refuses the write itself, inside safetensors (model) or torch (state). The same command continues."""
    words = ["train", "--recipe", "lock", "train.steps=3", "save.every=1", "--run", "run", "--quiet", *TINY]
    small = locate("embedded:lock") / "model.safetensors"
    assert (small.stat().st_size > 1000 * kilobytes) == (kilobytes == 100)
    with FileLimit(1000 * kilobytes):
        code, said = unift(*words)
    assert code == 2 and "could not write the checkpoint of step 1 in run/checkpoints" in said
    assert "MiB are free there. Free space and run the same command again" in said
    assert checkpoint.steps_saved(tmp_path / "run") == [] and not list((tmp_path / "run" / "checkpoints").iterdir())
    code, said = unift(*words)
    assert code == 0, said
    unift(*words[:-2], "--quiet", *TINY, "--run", "whole")
    states = [
        torch.load(tmp_path / f / "checkpoints" / "step_000003" / "state.pt", weights_only=True)
        for f in ("run", "whole")
    ]
    assert all(torch.equal(states[0]["weights"][n], v) for n, v in states[1]["weights"].items())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_device():
    with pytest.raises(UniftError, match="could not write full in /dev: .*No space left on device"):
        append_metrics(Path("/dev/full"), {"step": 1})


def test_atomic_files_keep_their_old_content(tmp_path):
    write_atomic(tmp_path / "latest", "step_000001")
    with (
        FileLimit(1000),
        pytest.raises(UniftError, match="could not write .*latest: File too large. Nothing written before is lost"),
    ):
        write_atomic(tmp_path / "latest", "x" * 5000)
    assert (tmp_path / "latest").read_text() == "step_000001" and len(list(tmp_path.iterdir())) == 1


def test_disk_errors_that_nothing_else_caught(monkeypatch, capsys):
    """The last resort of the command line: a full disk is a line, any other OSError stays a traceback."""
    for number, code in ((errno.ENOSPC, 2), (errno.EIO, None)):

        def app(number=number):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(cli, "app", app)
        with pytest.raises(SystemExit if code else OSError) as end:
            cli.main()
        if code:
            assert end.value.code == code and "the disk is full" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- numbers, damaged models


@pytest.mark.parametrize("apart", [0, 1], ids=["plain", "streams measured"])
@pytest.mark.parametrize(
    "items",
    [
        ["likelihood.weight=1e30"],
        ["reference.kl=1e28", "train.updates=2", "train.lr=0.01"],
        ["reward.function=huge.py:score", "credit.scale=none"],
    ],
    ids=["likelihood", "kl", "reward"],
)
def test_a_gradient_whose_norm_overflows(unift, tmp_path, items, apart):
    """Every entry is finite, the sum of squares is not: named, with the batch on disk."""
    (tmp_path / "huge.py").write_text(
        "def score(completion, row):\n    return 1e25 * (sum(map(ord, completion)) % 7)\n"
    )
    words = [
        *TINY,
        f"log.gradients_every={apart}",
        "show.schedule=constant",
        "train.warmup=0",
        "--run",
        "run",
        "--quiet",
    ]
    code, said = unift("train", "--recipe", "lock", "train.steps=2", *words, *items)
    assert code == 2 and len(said.strip().splitlines()) == 1, said
    told = re.search(
        r"the norm of the gradient is inf, though every entry is finite \(the largest, (\S+), is of ", said
    )
    assert told and float(told[1]) > 1e19, said  # a norm of float32 overflows from there
    (dump,) = (tmp_path / "run" / "nonfinite").iterdir()
    assert str(dump.relative_to(tmp_path)) in said and "tokens_T" in torch.load(dump, weights_only=True)[0]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("left", [0, 7, 300])
def test_a_model_folder_that_is_cut_short(unift, tmp_path, name, left):
    import shutil

    shutil.copytree(locate("embedded:lock"), tmp_path / "model")
    path = tmp_path / "model" / name
    path.write_bytes(path.read_bytes()[:left])
    for words in (["train", "--recipe", "lock", "model.path=model", "--quiet", *TINY], ["eval", "model", *TINY[2:4]]):
        code, said = unift(*words)
        assert code == 2 and said.startswith("error: ") and len(said.strip().splitlines()) == 1, said
        assert "model" in said and "fetch the model again" in said
