"""Damaged files of a run folder: one clear line that names the file and what to do; nothing damaged passes for finished."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

from unift.commands import cli
from unift.commands.compare import jobs
from unift.commands.report.gather import read_run
from unift.training.run import read_result
from unift.training.run.metrics import read_metrics
from unift.training.run.rollouts import read_records, read_rollouts
from unift.types import UniftError

WORDS = ["train", "--recipe", "lock", "train.steps=2", "train.prompts=2", "sample.completions=2", "data.train_rows=4"]
WORDS += ["data.test_rows=2", "eval.every=0", "save.every=1", "save.rollouts=true", "threads=1", "--quiet"]


def command(monkeypatch, capsys, *words):
    """(exit code, stderr) of unift in this process."""
    monkeypatch.setattr(sys, "argv", ["unift", *map(str, words)])
    try:
        cli.main()
    except SystemExit as end:
        return end.code or 0, capsys.readouterr().err
    return 0, capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run folder with result, checkpoints and rollouts."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["unift", *WORDS, "--run", str(folder)])
        try:
            cli.main()
        except SystemExit as end:
            assert not end.code
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


RUBBISH = ["[1, 2]", "3", "null", '"text"', "{", "", "\x00\x01", "[" * 100_000]


@pytest.mark.parametrize("text", [*RUBBISH, "{}", '{"seconds": "soon"}', '{"seconds": 1, "test": [1]}'])
def test_a_damaged_result_is_not_finished(folder, text):
    (folder / "result.json").write_text(text)
    with pytest.raises(UniftError, match="result.json .*Delete it and run the same command"):
        read_result(folder)
    job = jobs.Job("uft", 0, folder, ["x"])
    (folder / jobs.COMMAND).write_text('["x"]')
    assert jobs._finished(job, jobs._asked(job)) is None
    run = read_run(folder)
    assert run.result is None and any("result.json" in remark for remark in run.remarks)


def test_what_the_message_says_is_enough(folder, monkeypatch, capsys):
    """The end of the run is done again, and comes to the same numbers."""
    before = read_result(folder)
    (folder / "result.json").write_text("[]")
    code, said = command(monkeypatch, capsys, *WORDS, "--run", folder)
    assert code == 2 and len(said.strip().splitlines()) == 1 and "expected an object" in said
    (folder / "result.json").unlink()
    code, said = command(monkeypatch, capsys, *WORDS, "--run", folder)
    assert code == 0, said
    after = read_result(folder)
    assert all(after[k] == before[k] for k in ("base", "test", "train", "steps", "tokens_sampled", "tokens_trained"))


@pytest.mark.parametrize("text", RUBBISH)
@pytest.mark.parametrize("name", ["environment.json", "config.yaml"])
def test_other_files(folder, monkeypatch, capsys, name, text):
    (folder / name).write_text(text)
    code, said = command(monkeypatch, capsys, *WORDS, "--run", folder)
    assert code == 2 and "Traceback" not in said and "se another" in said, said
    if name == "environment.json":
        assert f"{folder / name} " in said and len(said.strip().splitlines()) == 1


@pytest.mark.parametrize("text", ["{}", '{"data": 3}'])
def test_an_environment_without_the_fingerprint_of_the_rows(folder, monkeypatch, capsys, text):
    """The rows are not to blame."""
    (folder / "environment.json").write_text(text)
    code, said = command(monkeypatch, capsys, *WORDS, "--run", folder)
    assert code == 2 and "environment.json holds no fingerprint of the training rows: the run folder is damaged" in said


@pytest.mark.parametrize("line", ["[1]", "3", '{"reward": 1}', '{"step": "one"}', '{"step": true}'])
def test_metrics_that_are_none(folder, monkeypatch, capsys, line):
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text() + line + "\n")
    (folder / "result.json").unlink()
    code, said = command(monkeypatch, capsys, *WORDS, "--run", folder)
    assert code == 2 and f"{path}, line 4 holds no metrics of a step" in said
    with pytest.raises(UniftError, match="holds no metrics of a step"):
        read_run(folder)


def test_metrics_that_are_no_text(folder):
    (folder / "metrics.jsonl").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UniftError, match="metrics.jsonl cannot be read as text"):
        read_metrics(folder / "metrics.jsonl")


@pytest.mark.parametrize("name", ["state.pt", "trainer.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"\x80\x02rubbish", b"{}"])
def test_checkpoints(folder, monkeypatch, capsys, name, content):
    (folder / "result.json").unlink()
    for path in (folder / "checkpoints").glob("step_*"):
        (path / name).write_bytes(content)
    code, said = command(monkeypatch, capsys, *WORDS, "--run", folder)
    assert code == 2 and "checkpoints/step_000002" in said and "delete this folder" in said, said


@pytest.mark.parametrize("content", [b"", b"rubbish", "half"])
def test_rollouts(folder, content):
    path = folder / "rollouts" / "step_000001.jsonl.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(
        UniftError, match="step_000001.jsonl.gz cannot be read .*delete it, and the step is sampled again"
    ):
        read_rollouts(folder, 1)
    assert any(path.name in remark for remark in read_run(folder).remarks)


def test_training_and_the_report_read_the_same_rollouts(finished):
    """One reader: what the page shows are the samples that a continued run trains on."""
    _, groups = read_rollouts(finished, 1)
    stored = read_records(finished / "rollouts" / "step_000001.jsonl.gz")[1:]
    assert [[s.text for s in g.samples] for g in groups] == [[s["completion"] for s in r["samples"]] for r in stored]
    (shown,) = [step for step in read_run(finished, groups=99, samples=99).rollouts if step.number == 2]
    assert {c.text for g in shown.groups for c in g.completions} == {s.text for g in groups for s in g.samples}
    assert json.loads((finished / "result.json").read_text()) == read_result(finished)
