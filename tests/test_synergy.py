"""The command that combines SFT and RL five ways: proofs that are true, bins, intervals, and a small run of the whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import script

from unift.config.resolve import parse_overrides, resolve
from unift.rows.tasks import get_task


@pytest.fixture(scope="module")
def tool():
    return script(Path(__file__).parents[1] / "tools" / "synergy.py")


def test_the_longer_solutions_are_true_and_right(tool):
    """Each line of arithmetic holds, every second one undoes the one before, and the answer is judged right."""
    study = tool.STUDIES["countdown"]
    for row in tool.rows_of(study, "train", 30):
        lines = "".join(row.steps).split()
        assert len(lines) == 2 * (len(row.answer["numbers"]) - 1)
        for line in lines:
            left, right = line.split("=")
            assert eval(left) == int(right)  # digits and one sign, made by the task
        for step, proof in zip(lines[::2], lines[1::2], strict=True):
            assert proof.split("=")[1] == next(step.split(s)[0] for s in tool.INVERSE if s in step)
        assert get_task("countdown").score(row.solution, row).right


def test_lengths_fit(tool):
    """The longest solution and its end have no more tokens than a completion may have."""
    from unift.model.load import load_tokenizer

    study = tool.STUDIES["countdown"]
    tokenizer = load_tokenizer(study.config.model)
    longest = max(len(tokenizer(row.solution)["input_ids"]) for row in tool.rows_of(study, "train", 500))
    assert longest + 1 <= study.config.sample.max_tokens


@pytest.mark.parametrize("arm", ["sft", "rft", "sft-rft", "interleaved", "progressive", "data-mixing"])
@pytest.mark.parametrize("task", ["jigsaw", "countdown"])
def test_every_run_begins_with_the_same_weights_and_steps(tool, task, arm, tmp_path):
    study = tool.STUDIES[task]
    order = tool.Order(tmp_path, range(2), 12, 1)
    jobs = [job for job in tool.jobs_of(study, order, tmp_path / task) if job.method == arm]
    assert [job.seed for job in jobs] == [0, 1]
    words = [word for word in jobs[0].command if "=" in word]
    config = resolve(arm, recipe=study.recipe, overrides=parse_overrides(words))
    assert config.model.path == str(tmp_path / task / "start-seed0" / "model")
    assert config.train.steps == 12 and config.train.decay == "constant"


@pytest.mark.parametrize(
    ("share", "name"), [(0.0, "hard"), (2 / 16, "hard"), (3 / 16, "medium"), (7 / 16, "medium"), (0.5, "easy")]
)
def test_bins(tool, share, name):
    assert tool.bin_of(share) == name


def test_differences_are_paired(tool):
    """A difference that is the same for every seed and problem has no width; one that is noise holds zero."""
    run = lambda values: [{"right": v, "tokens": 1.0} for v in values]  # noqa: E731
    assert tool.against([run([1, 1]), run([1, 1])], [run([0, 0]), run([0, 0])]) == (100.0, 100.0, 100.0)
    middle, low, high = tool.against([run([1, 0, 1, 0])], [run([0, 1, 0, 1])])
    assert middle == 0 and low < 0 < high


def test_the_table_counts_by_bin(tool):
    run = [{"right": 1.0, "tokens": 4.0}, {"right": 0.0, "tokens": 8.0}, {"right": 0.0, "tokens": 10.0}]
    text = tool.table("lock", {"rft": [run]}, run, ["easy", "hard", "hard"])
    assert "easy, % (n = 1) | hard, % (n = 2) | all" in text and "medium" not in text
    assert "| rft | 100.0 | 0.0 | 33.3 (33.3) | - | 4.0 / 9.0 |" in text


def test_one_command(tool, monkeypatch, tmp_path, capsys):
    """Two trainings, a merge, answers and the table; the same command again trains nothing and says the same."""
    study = replace(tool.STUDIES["countdown"], start=2, test=6)
    monkeypatch.setitem(tool.STUDIES, "countdown", study)
    words = [str(tmp_path), "--tasks", "countdown", "--arms", "rft,merged", "--seeds", "1", "--steps", "1"]
    tool.main([*words, "train.prompts=2", "sample.completions=2", "data.train_rows=8"])
    first = (tmp_path / "table.md").read_text()
    assert capsys.readouterr().out.strip() == first.strip()
    names = [line.split("|")[1].strip() for line in first.splitlines() if line.startswith("| ")]
    assert names == ["run", "start", "rft", "merged"]
    merged = tmp_path / "countdown" / "merged-seed0" / "model" / "model.safetensors"
    before = merged.stat().st_mtime_ns
    tool.main([*words, "train.prompts=2", "sample.completions=2", "data.train_rows=8"])
    assert (tmp_path / "table.md").read_text() == first and merged.stat().st_mtime_ns == before
