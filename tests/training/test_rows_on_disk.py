"""A run on rows that stay on disk is, bit for bit, the run on the same rows in memory; rows are checked at first use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unift.config.resolve import parse_overrides, resolve
from unift.model import limits
from unift.model.load import load_tokenizer
from unift.rows import dataset, store
from unift.rows.inspect import write_rows
from unift.rows.tasks import make_rows
from unift.training.loop import train
from unift.training.run.metrics import read_metrics
from unift.types import ConfigError, DataError

RUN = ["train.steps=3", "train.prompts=3", "sample.completions=2", "eval.every=0", "save.rollouts=true", "threads=1"]


def settings(folder: Path, *more: str):
    own = [
        f"data.train={folder / 'train.jsonl'}",
        f"data.test={folder / 'test.jsonl'}",
        "data.task=null",
        "model.path=embedded:lock",
    ]
    return resolve("uft", recipe="lock", overrides=parse_overrides([*RUN, *own, *more]))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNIFT_CACHE", str(tmp_path / "cache"))
    write_rows(make_rows("lock", 40, 0, "train"), tmp_path / "train.jsonl")
    write_rows(make_rows("lock", 5, 0, "test"), tmp_path / "test.jsonl")
    return tmp_path


def test_a_run_on_disk_is_the_run_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for where, size in (("memory", 2**30), ("disk", 0)):
        monkeypatch.setattr(store, "LARGE", size)
        train(settings(folder), folder / where)
        steps = [
            {k: v for k, v in m.items() if not k.startswith(("time/", "memory/"))}
            for m in read_metrics(folder / where / "metrics.jsonl")
        ]
        weights = (folder / where / "model" / "model.safetensors").read_bytes()
        identity = json.loads(next((folder / where / "checkpoints").glob("step_*/trainer.json")).read_text())["data"]
        found.append((weights, identity, steps))
    memory, disk = found
    assert disk[0] == memory[0] and disk[1] == memory[1]
    assert [{k: v for k, v in m.items() if "per_second" not in k} for m in disk[2]] == [
        {k: v for k, v in m.items() if "per_second" not in k} for m in memory[2]
    ]
    assert list((folder / "cache").glob("*/rows.arrow"))  # the second run had its rows on disk


def test_a_row_is_tokenised_at_its_first_use_and_checked_then(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LARGE", 0)
    monkeypatch.setattr(store, "LONGEST", 2)
    config = settings(folder)
    tokenizer = load_tokenizer(config.model)
    rows = dataset.load(config)
    calls: list[str] = []
    original = dataset.encode_with
    monkeypatch.setattr(dataset, "encode_with", lambda *a: calls.append(a[1].id) or original(*a))
    data = dataset.encode(tokenizer, rows, config)
    assert sorted(set(calls)) == sorted(
        r.id for split in (rows.train, rows.test) for r in (split[i] for i in longest(split))
    )
    monkeypatch.setattr(limits, "positions", lambda _: 10**6)
    limits.check_positions(config, data)
    monkeypatch.setattr(limits, "_check_context", refuse)
    unseen = next(i for i in range(40) if i not in longest(rows.train))
    with pytest.raises(DataError, match=rf"data.train, row {unseen + 1}: refused"):
        data.train.encoded[unseen]


def longest(rows) -> list[int]:
    return rows.facts.longest


def refuse(where: str, *_: int) -> None:
    raise DataError(f"{where}: refused")


def test_the_longest_rows_are_refused_before_a_model_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LARGE", 0)
    monkeypatch.setattr(store, "LONGEST", 1)
    lines = (folder / "train.jsonl").read_text().splitlines()
    row = json.loads(lines[17])
    lines[17] = json.dumps(row | {"id": "long", "steps": [*row["steps"], row["steps"][-1] * 400]})
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"train.jsonl, row 18 \(id long\): prompt and solution take"):
        train(settings(folder, "data.max_prompt=200"), folder / "run")


def test_rows_on_disk_without_answers_are_refused_at_the_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LARGE", 0)
    lines = (folder / "train.jsonl").read_text().splitlines()
    lines[30] = json.dumps(json.loads(lines[30]) | {"answer": None, "id": "bare"})
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises((DataError, ConfigError), match=r"row 31, column 'answer': missing"):
        dataset.load(settings(folder))
