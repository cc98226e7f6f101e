"""The command line, in processes of its own: help is quick to import, mistakes are one clear line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

TINY = [
    "train.steps=3",
    "train.prompts=4",
    "sample.completions=4",
    "data.train_rows=8",
    "data.test_rows=6",
    "threads=1",
]


def unift(*words, cwd=None):
    return subprocess.run([sys.executable, "-m", "unift", *words], capture_output=True, text=True, cwd=cwd)


def test_help_does_not_import_torch():
    code = (
        "import sys; from unift.commands import cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    shown = unift("--help").stdout
    assert all(
        verb in shown for verb in ("train", "eval", "compare", "report", "theory", "merge", "data", "show", "doctor")
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "train.lrr=1"], "did you mean 'lr'"),
        (["train", "model.path=/nowhere", "data.task=lock"], "neither a folder nor embedded"),
        (["train", "--method", "utf"], "did you mean 'uft'"),
        (["train", "--config", "none.yaml"], "does not exist"),
        (["train", "data.train=none.jsonl", "model.path=embedded:lock"], "no such file"),
        (["show", "utf"], "did you mean 'uft'"),
        (["data", "inspect", "none.jsonl"], "no such file"),
    ],
)
def test_mistakes(words, said, tmp_path):
    done = unift(*words, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_methods_prints_the_family():
    from unift.config.packaged import preset_names

    done = unift("methods")
    assert done.returncode == 0, done.stderr
    names = {line.split("|")[1].split(",")[0].strip() for line in done.stdout.splitlines()[2:]}
    assert names == set(preset_names())


def test_dry_run_trains_nothing(tmp_path):
    done = unift("train", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0 and "32 prompts x 8 completions = 256 sequences" in done.stdout
    assert "95.0 %" in done.stdout and not list(tmp_path.iterdir())


def test_train_eval_and_data(tmp_path):
    run = tmp_path / "run"
    done = unift("train", "--recipe", "lock", "--run", str(run), *TINY)
    assert done.returncode == 0, done.stderr
    assert "run folder" in done.stdout and json.loads((run / "result.json").read_text())["steps"] == 3
    assert "note: No completion has earned the reward in 3 steps" in done.stdout, "what the report says, too"
    done = unift("eval", str(run), "--samples", "4")
    assert done.returncode == 0 and "pass@4" in done.stdout, done.stderr
    done = unift("data", "make", "lock", str(tmp_path / "rows.jsonl"), "--n", "12")
    assert done.returncode == 0, done.stderr
    assert json.loads(unift("data", "inspect", str(tmp_path / "rows.jsonl")).stdout)["rows"] == 12
    done = unift("data", "convert", str(tmp_path / "rows.jsonl"), str(tmp_path / "rows.parquet"))
    assert done.returncode == 0, done.stderr
    own = [f"data.train={tmp_path}/rows.parquet", "model.path=embedded:lock", "train.steps=2", "train.prompts=4"]
    done = unift("train", "--quiet", "--run", str(tmp_path / "own"), *own)
    assert done.returncode == 0, done.stderr


def test_an_interrupted_verb_says_what_became_of_the_work(monkeypatch, capsys):
    from unift.commands import cli

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("unift.commands.methods.table", interrupted)
    monkeypatch.setattr(sys, "argv", ["unift", "methods"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr().err
    assert end.value.code == 130 and said == "stopped: what was saved is kept; the same command continues\n"
