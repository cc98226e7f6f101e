"""What a person sees: plain lines, the panel, the checks of the doctor."""

from __future__ import annotations

import io
import json
import sys

import pytest

from unift.commands import display
from unift.commands.display import Live, Quiet
from unift.config.resolve import resolve

STEP = {
    "reward": 0.25, "hint/fraction": 0.5, "tokens/per_second": 12345.6, "time/generate": 0.05, "time/score": 0.002,
    "time/update": 0.03,
}  # fmt: skip


def test_plain_lines_at_evaluations_and_at_the_end(capsys):
    with Live(every=1e9) as live:
        live.last = float("inf")
        live.update({"step": 0, "eval/test/accuracy": 0.1}, 100)
        for step in (1, 2):
            live.update({"step": step, "time/elapsed": 2.0 * step, **STEP}, 100)
        live.update({"step": 50, "time/elapsed": 100.0, "eval/test/accuracy": 0.5, **STEP}, 100)
        live.update({"step": 100, "time/elapsed": 200.0, **STEP}, 100)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 0/100  accuracy without hint 10.0 %"
    assert "step 50/100  reward 0.250  accuracy without hint 50.0 %  hint share 50 %  tokens/s 12,346" in lines[1]
    assert "time left 1 min 40 s  ms of a step generate 50 / score 2 / update 30" in lines[1]
    assert len(lines) == 3 and "accuracy without hint 50.0 %" in lines[2] and "time left 0 s" in lines[2]


def test_a_replayed_history_does_not_spoil_the_time_left(capsys):
    live = Live(every=0)
    for step in range(1, 91):  # a continued run reports its old lines at once
        live.update({"step": step, "time/elapsed": 3.0 * step}, 100)
    assert "time left 30 s" in capsys.readouterr().out.splitlines()[-1]


def test_supervised_steps_have_no_reward(capsys):
    Live(every=0).update({"step": 1, "hint/fraction": 1.0}, 10)
    assert capsys.readouterr().out == "step 1/10  hint share 100 %\n"


def test_quiet_prints_nothing(capsys):
    with Quiet() as quiet:
        quiet.update({"step": 1, **STEP}, 1)
    assert capsys.readouterr().out == ""


def test_panel_on_a_terminal(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with Live() as live:
        live.update({"step": 30, "time/elapsed": 60.0, "eval/test/accuracy": 0.5, **STEP}, 100)
    shown = terminal.getvalue()
    assert "30/100" in shown and "accuracy without hint" in shown and "2 min 20 s" in shown


def test_parts_of_a_step_and_the_shared_prefix():
    metrics = STEP | {"step": 1, "time/reference": 0.02, "time/save": 0.0004, "tokens/shared_ratio": 0.456}
    shown = display.fields(metrics, 10, None, None)
    assert shown["ms of a step"] == "generate 50 / score 2 / reference 20 / update 30 / save 0"
    assert shown["saved by shared prefix"] == "46 %"
    assert display.split(metrics, 0.02) == "generate 50 / reference 20 / update 30"  # 2 % of 102 ms is 2.05 ms


@pytest.mark.parametrize(("seconds", "text"), [(-1, "0 s"), (59.4, "59 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")])
def test_duration(seconds, text):
    assert display.duration(seconds) == text


# ---------------------------------------------------------------------------------------------- doctor


def of(checks):
    return {c.name: c for c in checks}


def test_doctor_passes_on_the_demo(tmp_path):
    from unift.commands.doctor import diagnose

    overrides = {"run": str(tmp_path / "run"), "data": {"train_rows": 20, "test_rows": 20}, "threads": 1}
    checks = of(diagnose(resolve("uft", recipe="lock", overrides=overrides)))
    assert [c for c in checks.values() if not c.ok] == []
    assert {
        "packages",
        "device",
        "model",
        "tokenizer",
        "forward",
        "precision",
        "rows",
        "lengths",
        "room",
        "reward",
        "disk",
    } == set(checks)
    assert "20 of 20 demonstrations" in checks["reward"].text and "20 for training, 20 held out" in checks["rows"].text
    assert not (tmp_path / "run").exists()


def test_doctor_says_what_to_do(tmp_path):
    from unift.commands.doctor import diagnose

    reward = tmp_path / "mean.py"
    reward.write_text("def score(completion, row):\n    return 0.0\n")
    overrides = {
        "data": {"train_rows": 5, "test_rows": 5},
        "reward": {"function": f"{reward}:score"},
        "sample": {"max_tokens": 2},
        "model": {"device": "cpu"},
        "threads": 4096,
    }
    checks = of(diagnose(resolve("uft", recipe="lock", overrides=overrides)))
    assert not checks["device"].ok and "Set threads=" in checks["device"].text
    assert not checks["room"].ok and "Set sample.max_tokens=" in checks["room"].text
    assert not checks["reward"].ok and "accepts 0 of 5" in checks["reward"].text
    short = of(diagnose(resolve("uft", recipe="lock", overrides={"data": {"train_rows": 3, "max_prompt": 3}})))
    assert not short["lengths"].ok and "raise data.max_prompt" in short["lengths"].text


def test_doctor_goes_on_without_a_model(tmp_path):
    from unift.commands.doctor import diagnose

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    overrides = {"model": {"path": str(tmp_path)}, "data": {"train_rows": 3, "test_rows": 3}}
    checks = of(diagnose(resolve("uft", recipe="lock", overrides=overrides)))
    assert not checks["model"].ok and "holds no weights" in checks["model"].text
    assert checks["rows"].ok and checks["reward"].ok


def test_doctor_lists_targets_that_are_compared_as_text(tmp_path):
    """By row and with the reason; and it says where the answers stand. A mismatch is a fault that names the remedy."""
    from unift.commands.doctor import try_reward
    from unift.types import Row

    golds = ["42", "2, 4, \\ldots, 2n"]
    rows = [Row(f"r{i}", "q", (f"it is \\boxed{{{gold}}}",), "", gold, "math") for i, gold in enumerate(golds)]
    check, _ = try_reward(resolve("sft", recipe="lock"), rows)
    assert check.ok and "answers stand in boxed (reward.answer=auto)" in check.text
    assert "1 targets cannot be read" in check.text and "row 2" in check.text and "ellipsis" in check.text
    check, _ = try_reward(resolve("sft", recipe="lock", overrides={"reward": {"answer": "hash"}}), rows)
    assert not check.ok and "reward.answer=boxed accepts 2" in check.text


def test_doctor_reads_rows_as_train_does(tmp_path):
    """A file may use a task's name with answers of its own, and repeat a problem in other words."""
    from unift.commands.doctor import load_rows
    from unift.rows.dataset import load

    row = {"prompt": "1+1=", "steps": ["2"], "answer": "2", "task": "countdown"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"prompt": "2+2="}))
    overrides = {"data": {"train": str(tmp_path / "rows.jsonl")}, "model": {"path": "embedded:lock"}}
    config = resolve("sft", overrides=overrides)
    check, data = load_rows(config)
    assert check.ok, check.text
    assert data == load(config)


# ---------------------------------------------------------------------------------------------- evaluations


def test_evaluations_are_announced_and_go_on_visibly(capsys):
    live = Live(every=0)
    live.watch("training rows", 0, 300)
    live.watch("training rows", 256, 300)
    live.watch("training rows", 300, 300)
    assert capsys.readouterr().out.splitlines() == [
        "evaluating training rows: 0 of 300",
        "evaluating training rows: 256 of 300",
    ]
    patient = Live(every=1e9)
    patient.last = float("inf")
    patient.watch("held-out rows", 256, 300)
    Quiet().watch("held-out rows", 0, 300)
    assert capsys.readouterr().out == ""


def test_the_failures_of_the_end_and_of_the_page_are_the_same():
    from types import SimpleNamespace

    from unift.commands.report.diagnosis import _errors
    from unift.rewards.journal import COUNTS

    assert set(display.FAILURES) == set(COUNTS) - {"total", "skipped"}
    counts = {"total": 5000, "skipped": 3, "timeouts": 1200, "crashes": 0, "exceptions": 1, "bad_values": 0}
    said = _errors(SimpleNamespace(result={"scorer": {"train": counts}}, metrics=[])).text
    assert display.failures(counts) == "1,200 timeouts, 1 exceptions" and display.failures(counts) in said
    assert _errors(SimpleNamespace(result={"scorer": {"train": {"total": 9, "skipped": 2}}}, metrics=[])) is None
