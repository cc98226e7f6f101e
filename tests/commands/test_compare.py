"""Comparisons: intervals, words that follow the numbers, runs in processes, pictures."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from unift.commands import compare
from unift.commands.compare import Job, jobs, plots, run_many, train_job, vary, write_report
from unift.commands.compare import budget as budgets
from unift.commands.compare.table import accuracy_of, reading, table
from unift.config.budget import Budget, parse
from unift.config.identity import to_yaml
from unift.config.resolve import parse_overrides, resolve
from unift.intervals import interval, wilson
from unift.types import ConfigError, UniftError


def result(method, seed, test, train=1.0, seen=0, completions=0, n=500):
    def part(share, n):
        low, high = wilson(share * n, n)
        return {"accuracy": share, "low": low, "high": high, "n": n}

    return {
        "method": method, "seed": seed, "steps": 10, "seconds": 60.0, "tokens_sampled": 1_500_000 if completions else 0,
        "tokens_trained": 900, "reward_seen": seen, "completions": completions, "base": part(0.0, n),
        "test": part(test, n), "train": part(train, 100),
    }  # fmt: skip


def three(uft, sft, rft, seen=100, fit=1.0):
    runs = [result("uft", s, v, seen=50_000, completions=100_000) for s, v in enumerate(uft)]
    runs += [result("sft", s, v, fit) for s, v in enumerate(sft)]
    return runs + [result("rft", s, v, 0.0, seen, 100_000) for s, v in enumerate(rft)]


# ---------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(("k", "n"), [(0, 500), (1, 10), (37, 100), (500, 500)])
def test_wilson_is_scipys(k, n):
    expected = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert wilson(k, n, z=stats.norm.ppf(0.975)) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-4)


@pytest.mark.parametrize("n", [8, 100, 128, 200, 300, 500, 1319])
def test_wilson_holds_the_share_itself(n):
    """Of none and of all right, too, where a bound is the share and rounding could leave it outside."""
    assert wilson(0, n)[0] == 0.0 and wilson(n, n)[1] == 1.0
    assert all(low <= k / n <= high for k in range(n + 1) for low, high in [wilson(k, n)])


def test_wilson_of_nothing_says_nothing():
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("n", [2, 3, 11, 31])
def test_interval_is_scipys_t(n):
    values = list(np.random.default_rng(n).uniform(0.45, 0.55, n))
    expected = stats.t.interval(0.95, n - 1, np.mean(values), stats.sem(values))
    assert interval(values) == pytest.approx(tuple(np.clip(expected, 0, 1)), abs=1e-3)


def test_interval_of_equal_seeds_keeps_the_uncertainty_of_the_rows():
    mean, low, high = accuracy_of([result("uft", s, 0.98) for s in range(3)])
    assert (low, high) == wilson(490, 500) and low < mean < high


def test_table_has_base_means_and_every_seed():
    text = table([result("sft", 1, 0.8), result("sft", 0, 0.9), result("rft", 0, 0.002, 0.0, 1, 1000)])
    lines = text.splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| base | - | 0.0 |")
    assert "| sft | 2 | 85.0 |" in lines[3] and "| 90.0 80.0 | 100.0 | 0 | 900 | 60 |" in lines[3]
    assert "| rft | 1 | 0.2 |" in lines[4] and "1.50 M" in lines[4]


# ---------------------------------------------------------------------------------------------- words


def test_reading_when_uft_wins():
    rft, sft, uft = reading(three([0.99, 0.992, 0.988], [0.83, 0.84, 0.82], [0.002, 0.0, 0.004]))
    assert "300 of its 300,000 completions (0.1 %) earned the reward, so it had almost nothing to learn from" in rft
    assert "100.0 % on its training rows" in sft and "83.0 % on held-out" in sft and "17 points better" in sft
    assert "99.0 %" in uft and "ahead of SFT by 16.0 points, intervals do not overlap (the best" in uft


def test_reading_when_uft_loses():
    rft, sft, uft = reading(three([0.5], [0.6], [0.9], seen=60_000, fit=0.6))
    assert "enough to learn from" in rft
    assert "no measurable gap" in sft
    assert (
        "NOT ahead: behind RFT by 40.0 points, intervals do not overlap" in uft
        and "NOT ahead: behind SFT by 10.0" in uft
    )


def test_reading_when_nothing_is_sure():
    assert "ahead of SFT by 1.0 points, but the intervals overlap" in reading(three([0.61], [0.6], [0.0]))[2]
    assert "level with SFT" in reading(three([0.6], [0.6], [0.0]))[2]
    assert "did not measurably leave the base" in reading(three([0.6], [0.6], [0.0], seen=50_000))[0]


def test_reading_names_the_best_rival_of_all():
    runs = [*three([0.9], [0.5], [0.0]), result("r3", 0, 0.95)]
    assert "NOT ahead: behind R3 by 5.0 points" in reading(runs)[2] and "ahead of SFT by 40.0" in reading(runs)[2]


def test_reading_of_one_method():
    assert reading([result("uft", 0, 0.5)]) == [
        "UFT: 50.0 % on held-out rows without hints; nothing else was trained beside it."
    ]
    assert reading([result("stage", 0, 0.5)]) == []


# ---------------------------------------------------------------------------------------------- processes

SCRIPT = """
import json, os, pathlib, sys
folder = pathlib.Path(sys.argv[1])
with open(folder / "started", "a") as f: f.write("x")
assert os.environ["OMP_NUM_THREADS"] == "1"
if not (folder / "mended").exists() and sys.argv[2] == "bad":
    sys.exit("error: rows.jsonl row 7 has no answer")
(folder / "result.json").write_text(sys.argv[3])
"""


def fake(folder: Path, method: str, seed: int, kind: str = "good") -> Job:
    own = folder / f"{method}-seed{seed}"
    text = json.dumps(result(method, seed, 0.5))
    return Job(method, seed, own, [sys.executable, "-S", "-c", SCRIPT, str(own), kind, text])


def test_failure_is_reported_and_what_is_earned_is_kept(tmp_path):
    jobs = [fake(tmp_path, "sft", 0), fake(tmp_path, "uft", 0, "bad"), fake(tmp_path, "rft", 0)]
    said: list[str] = []
    with pytest.raises(
        UniftError, match=r"1 of 3 runs failed(.|\n)*uft seed 0 \(exit code 1\)(.|\n)*row 7 has no answer"
    ):
        run_many(jobs, 2, said.append)
    assert len(said) == 3 and sum("failed" in line for line in said) == 1
    (jobs[1].folder / "mended").touch()
    assert [r["method"] for r in run_many(jobs, 2, said.append)] == ["sft", "uft", "rft"]
    assert [(j.folder / "started").read_text() for j in jobs] == ["x", "xx", "x"]
    assert sum("finished before" in line for line in said) == 2


def test_the_others_are_shown_when_one_fails(tmp_path, monkeypatch, capsys):
    """Table and files of the runs that ended, with a line that says that some are missing; then the failure."""
    kinds = iter(["good", "bad", "good", "good"])
    monkeypatch.setattr(compare, "train_job", lambda m, seed, *_: fake(tmp_path, m, seed, next(kinds)))
    with pytest.raises(UniftError, match="1 of 4 runs failed") as error:
        compare.compare_methods(compare.Plan(["sft", "uft"], 2, "lock", tmp_path, [], 2))
    assert [(r["method"], r["seed"]) for r in error.value.results] == [("sft", 0), ("sft", 1), ("uft", 1)]
    shown, kept = capsys.readouterr().out, (tmp_path / "table.md").read_text()
    for text in (shown, kept):
        assert "Not complete: 1 of 4 runs failed" in text
        assert "| sft | 2 |" in text and "| uft | 1 |" in text
    assert len(json.loads((tmp_path / "compare.json").read_text())) == 3 and (tmp_path / "curves.png").is_file()
    (tmp_path / "uft-seed0" / "mended").touch()
    kinds = iter(["good", "bad", "good", "good"])
    assert "| uft | 2 |" in compare.compare_methods(compare.Plan(["sft", "uft"], 2, "lock", tmp_path, [], 2))[0]
    assert "Not complete" not in (tmp_path / "table.md").read_text()


def test_sft_that_was_made_to_sample_is_noted(tmp_path, monkeypatch, capsys):
    """One number of completions for all methods makes sft another method: said before the runs and below their table."""
    monkeypatch.setattr(compare, "train_job", lambda m, seed, *_: fake(tmp_path, m, seed))
    for settings, times in ((["sample.completions=2"], 1), ([], 0)):
        compare.compare_methods(compare.Plan(["sft", "uft"], 1, "lock", tmp_path, settings, 2))
        note = "note: sft samples nothing by its preset; with sample.completions=2 it also learns from the reward"
        assert capsys.readouterr().out.count(note) == times
        assert (tmp_path / "table.md").read_text().count(note) == times


def test_nothing_to_show_when_all_fail(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "train_job", lambda m, seed, *_: fake(tmp_path, m, seed, "bad"))
    with pytest.raises(UniftError, match="2 of 2 runs failed"):
        compare.compare_methods(compare.Plan(["sft"], 2, "lock", tmp_path, [], 2))
    assert "|" not in capsys.readouterr().out and not (tmp_path / "table.md").exists()


def test_a_result_of_another_command_is_not_taken(tmp_path):
    job = fake(tmp_path, "sft", 0)
    run_many([job], 1)
    changed = Job(job.method, job.seed, job.folder, [*job.command, "train.lr=1"])
    run_many([changed], 1)
    assert (job.folder / "started").read_text() == "xx"
    refused = Job(job.method, job.seed, job.folder, [sys.executable, "-S", "-c", "raise SystemExit(2)"])
    for _ in range(2):  # the result that lies there is not its own, the second time neither
        with pytest.raises(UniftError, match="exit code 2"):
            run_many([refused], 1)


def test_a_result_on_other_rows_is_not_taken(tmp_path):
    """The very same command, but a file that it names has changed: in place, with its size and time, or a folder's."""
    file, other = tmp_path / "rows.jsonl", tmp_path / "more"
    other.mkdir()
    file.write_text('{"prompt": "1"}')
    job = replace(fake(tmp_path, "sft", 0), inputs=[str(file), str(other)])
    started = job.folder / "started"
    for times, change in enumerate(
        (lambda: None, lambda: file.write_text('{"prompt": "2"}'), (other / "x").touch), start=1
    ):
        change()
        for _ in range(2):
            run_many([job], 1)
            assert started.read_text() == "x" * times


def test_a_run_names_the_files_that_decide_it(tmp_path):
    for name in ("a.jsonl", "b.jsonl", "r.py"):
        (tmp_path / name).touch()
    words = [
        f'data.train="{tmp_path}/a.jsonl"',
        f"data.test={tmp_path}/b.jsonl",
        f"reward.function={tmp_path}/r.py:score",
    ]
    assert train_job("uft", 0, None, tmp_path, words).inputs == [
        f"{tmp_path}/{n}" for n in ("a.jsonl", "b.jsonl", "r.py")
    ]
    assert train_job("uft", 0, "lock", tmp_path, ["train.steps=3", "data.train=hf:owner/name"]).inputs == []


def test_no_result_is_a_failure_and_so_is_no_program(tmp_path):
    with pytest.raises(UniftError, match="exit code 0, but no result.json"):
        run_many([Job("sft", 0, tmp_path / "a", [sys.executable, "-S", "-c", ""])], 1)
    with pytest.raises(UniftError, match="cannot start sft seed 0"):
        run_many([Job("sft", 0, tmp_path / "b", ["/no/such/program"])], 1)


def test_interrupted_ends_its_processes(tmp_path, monkeypatch):
    started = []

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "time", SimpleNamespace(sleep=interrupt, monotonic=time.monotonic))
    monkeypatch.setattr(jobs, "_start", lambda job, old=jobs._start: started.append(old(job)) or started[-1])
    with pytest.raises(KeyboardInterrupt):
        run_many([Job("sft", 0, tmp_path / "a", [sys.executable, "-S", "-c", "import time; time.sleep(60)"])], 1)
    assert started[0][0].wait(10) != 0


def test_settings_are_checked_before_anything_runs(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.stepz.*steps"):
        compare.compare_methods(compare.Plan(["uft"], 1, "lock", tmp_path / "x", ["train.stepz=3"], 1))
    with pytest.raises(ConfigError, match="nothing to compare"):
        compare.compare_methods(compare.Plan([""], 1, "lock", tmp_path / "x", [], 1))
    assert not (tmp_path / "x").exists()


def test_completions_come_from_the_settings(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps({"seconds": 1.0}))
    c = resolve("rft", recipe="lock", overrides={"train": {"steps": 7, "prompts": 4}, "sample": {"completions": 3}})
    (tmp_path / "config.yaml").write_text(to_yaml(c))
    assert jobs._read(tmp_path)["completions"] == 7 * 4 * 3


# ---------------------------------------------------------------------------------------------- pictures


def metrics(method: str, seed: int, steps: int = 60) -> list[dict]:
    noise = np.random.default_rng(seed)
    lines: list[dict] = [{"step": 0, "eval/test/accuracy": 0.0}]
    for step in range(1, steps + 1):
        line = {"step": step, "hint/fraction": max(0.0, 0.95 - step / steps * 1.5)}
        if method != "sft":
            line["reward"] = float(np.clip(step / steps + noise.normal(0, 0.1), 0, 1))
        if step % 10 == 0:
            line["eval/test/accuracy"] = 1 / (1 + math.exp(6 - 10 * step / steps - seed / 3))
        lines.append(line)
    return lines


def test_report_writes_its_three_files(tmp_path):
    results = [result(m, s, 0.5) for m in ("sft", "rft", "uft", "mine") for s in range(2)]
    for r in results[:-1]:  # one run without metrics
        folder = tmp_path / f"{r['method']}-seed{r['seed']}"
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, metrics(r["method"], r["seed"]))) + "\n")
    path = write_report(tmp_path, results)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000
    assert json.loads((tmp_path / "compare.json").read_text()) == results
    assert "| uft | 2 |" in (tmp_path / "table.md").read_text()


def test_curves_without_anything_to_draw(tmp_path):
    plots.curves({"uft": [[]], "sft": []}, tmp_path / "a.png", "nothing")
    plots.curves({"uft": [[{"step": 0, "eval/test/accuracy": 0.1}]]}, tmp_path / "b.png", "a point")
    assert (tmp_path / "a.png").stat().st_size and (tmp_path / "b.png").stat().st_size


def test_smoothing_keeps_a_level_curve_level():
    assert plots.smooth(np.ones(20), 9) == pytest.approx(np.ones(20))
    assert plots.smooth(np.array([1.0, 2.0]), 9).shape == (2,)
    assert plots.smooth(np.array([]), 9).shape == (0,)


def test_a_phase_without_reward_draws_no_reward():
    lines = [{"step": s, **({"reward": 1.0} if s > 5 else {})} for s in range(1, 11)]
    (row,) = plots.over_seeds([lines, []], "reward", np.linspace(0, 100, 11))
    assert np.isnan(row[:6]).all() and (row[6:] == 1).all()


def test_hint_schedule(tmp_path):
    plots.hint_schedule(resolve("uft", recipe="lock").show, 100, tmp_path / "s.png")
    assert (tmp_path / "s.png").stat().st_size > 5_000


def released(lock, seconds):
    """Whether the process that holds the file is gone within so many seconds; its number may stay as a zombie's."""
    import fcntl

    until = time.monotonic() + seconds
    with open(lock) as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > until:
                    return False
                time.sleep(0.1)


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["compare SIGTERM", "compare SIGINT", "demo SIGTERM", "compare SIGKILL"])
def test_a_signal_to_the_parent_ends_its_runs(tmp_path, at_a_terminal, kind):
    """Real runs in processes of their own, each known by the lock of its folder; only the parent gets the signal."""
    verb, name = kind.split()
    words = ["compare", "--methods=sft,rft", "--seeds=1"] if verb == "compare" else ["train", "baselines=[sft]"]
    folders = [tmp_path / f"{m}-seed0" for m in (("sft", "rft") if verb == "compare" else ("sft",))]
    command = [sys.executable, "-m", "unift", *words, f"--run={tmp_path}", "train.steps=100000", "eval.every=0"]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    children = []
    try:
        until = time.monotonic() + 150
        while not all((f / "metrics.jsonl").is_file() for f in folders):
            assert parent.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        children = [int((f / ".lock").read_text().split()[0]) for f in folders]
        assert parent.pid not in children
        for child in children:
            os.kill(child, 0)  # it runs
        parent.send_signal(getattr(signal, name))
        out, _ = parent.communicate(timeout=60)
        assert parent.returncode == (-signal.SIGKILL if name == "SIGKILL" else 130), out
        assert "leaked" not in out
        for folder in folders:  # killed, it leaves them to end by themselves
            assert released(folder / ".lock", 30 if name == "SIGKILL" else 0)
    finally:
        parent.kill()
        parent.wait()
        for child in children:
            try:
                os.kill(child, signal.SIGKILL)
            except ProcessLookupError:
                pass


def test_a_child_that_ignores_the_request_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "END_SECONDS", 0.3)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE)
    child.stdout.readline()
    child.stdout.close()
    jobs.end([child])
    assert child.returncode == -signal.SIGKILL


def test_of_many_methods_the_best_have_names(tmp_path):
    runs = {f"m{i}": [[{"step": 1, "eval/test/accuracy": i / 20}]] for i in range(15)} | {
        "rft": [[{"step": 1, "eval/test/accuracy": 0.0}]]
    }
    runs |= {"uft": [[{"step": 1, "reward": 0.5}]]}
    assert (
        plots.told_apart(runs) == [f"m{i}" for i in range(6, 15)] + ["rft", "uft"]
        and len(plots.told_apart(runs)) == plots.MOST
    )
    few = {k: runs[k] for k in ("m1", "uft")}
    assert plots.told_apart(few) == ["m1", "uft"]
    plots.curves(runs, tmp_path / "many.png", "many")
    assert (tmp_path / "many.png").stat().st_size > 5000


# ---------------------------------------------------------------------------------------------- one budget


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        ("sampled=2M", "sampled", 2e6),
        ("trained=500k", "trained", 5e5),
        ("tokens=3M", "tokens", 3e6),
        ("seconds=1.5", "seconds", 1.5),
        (" Sampled = 1e6 ", "sampled", 1e6),
    ],
)
def test_budgets_are_read(text, kind, amount):
    assert parse(text) == Budget(kind, amount)


@pytest.mark.parametrize(
    "text", ["2M", "token=2M", "sampled=", "sampled=0", "seconds=-3", "sampled=2 X", "sampled=1.2.3"]
)
def test_a_budget_that_cannot_be_read_says_what_is_expected(text):
    with pytest.raises(ConfigError, match="expected sampled=TOKENS"):
        parse(text)


def spent(steps, sampled=0, trained=0, seconds=0.0, method="uft"):
    return {
        "method": method,
        "steps": steps,
        "tokens_sampled": sampled,
        "tokens_trained": trained,
        "seconds_training": seconds,
    }


def test_the_note_names_who_used_more_or_less():
    limit = Budget("sampled", 1000)
    even = [spent(5, sampled=950), spent(5, sampled=1050, method="rft")]
    assert budgets.note(limit, even) == "Budget of a run: sampled=1000. All runs used it within 10 %."
    assert "rft 150 %" in budgets.note(limit, [*even, spent(5, sampled=1950, method="rft")])


def test_the_table_has_the_share_of_the_budget_that_each_method_used():
    runs = [result("uft", s, 0.5) | {"tokens_sampled": 900 + 100 * s} for s in (0, 1)]
    runs.append(result("sft", 0, 0.5) | {"tokens_sampled": 0, "tokens_trained": 1300})
    head, rule, base, uft, sft = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table(runs, Budget("sampled", 1000)).split("\n")
    )
    assert head[-1] == "used %" and {len(line) for line in (head, rule, base, uft, sft)} == {10}
    assert (base[-1], uft[-1], sft[-1]) == ("-", "95.0", "0.0")
    assert "used %" not in table(runs)


def test_compare_under_a_budget(tmp_path):
    small = ["data.train_rows=8", "data.test_rows=8", "train.prompts=4", "sample.max_tokens=8", "train.steps=20"]
    with pytest.raises(ConfigError, match="keep one"):
        compare.compare_methods(compare.Plan(["uft"], 1, "lock", tmp_path / "a", small, 2, "sampled=1k"))
    folder = tmp_path / "b"
    text, _ = compare.compare_methods(compare.Plan(["uft", "rft"], 1, "lock", folder, small[:-1], 2, "sampled=4k"))
    runs = {r["method"]: r for r in json.loads((folder / "compare.json").read_text())}
    assert runs["uft"]["tokens_sampled"] == pytest.approx(4000, rel=0.05)
    assert runs["rft"]["tokens_sampled"] == pytest.approx(4000, rel=0.05)
    assert "Budget of a run: sampled=4000. All runs used it within 10 %." in text
    written = (folder / "table.md").read_text()
    assert "Budget of a run" in written and "| used % |" in written.split("\n")[0]
    assert runs["uft"]["seconds"] > runs["uft"]["seconds_training"] > 0


# ---------------------------------------------------------------------------------------------- one setting at a time


def test_values_are_split_outside_of_brackets_and_quotes():
    assert vary.values_of("1, 2,5") == ["1", "2", "5"]
    assert vary.values_of("[.9,.95],[.9,.99]") == ["[.9,.95]", "[.9,.99]"]
    assert vary.values_of('{a: 1, b: [2,3]},"x,]y",null') == ["{a: 1, b: [2,3]}", '"x,]y"', "null"]


def test_every_value_is_an_arm_and_keys_move_alone_or_together():
    found = vary.arms(["uft", "stage"], ["show.cuts=1,2", "a.b=x,y; c.d=5,6"])
    assert [(a.name, a.settings) for a in found if a.method == "uft"] == [
        ("uft", ()),
        ("uft-show.cuts=1", ("show.cuts=1",)),
        ("uft-show.cuts=2", ("show.cuts=2",)),
        ("uft-a.b=x", ("a.b=x", "c.d=5")),
        ("uft-a.b=y", ("a.b=y", "c.d=6")),
    ]
    assert len(found) == 10


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("show.cuts", "'show.cuts'"),
        ("=1,2", "'=1,2'"),
        ("show.cuts=1,,2", "'show.cuts=1,,2'"),
        ("; ", "'; '"),
        ("a.b=1,2; c.d=1", "'a.b': 2, 'c.d': 1"),
        ("show.cuts=1,1", "uft-show.cuts=1"),
    ],
)
def test_what_cannot_be_varied_is_said(text, found):
    with pytest.raises(ConfigError, match=re.escape(found)):
        vary.arms(["uft"], [text])


def test_the_methods_own_value_is_no_second_arm():
    found = vary.arms(["uft"], ["show.cuts=3,5", "likelihood.weight=0.2,0.5"])
    configs = {a.name: resolve("uft", recipe="lock", overrides=parse_overrides(a.settings)) for a in found}
    assert [a.name for a in vary.without_copies(found, configs)] == [
        "uft",
        "uft-show.cuts=3",
        "uft-likelihood.weight=0.5",
    ]
    assert vary.value_in(configs["uft"], "likelihood.weight") == "0.2"
    assert vary.value_in(resolve("sft-rft", recipe="lock"), "phases.0.share") == "0.333"


def test_varied_settings_become_a_table_and_a_figure(tmp_path):
    """Numbers ascend with the unchanged value among them, words keep their order, and what is apart says so."""
    found = vary.arms(["uft"], ["show.cuts=10,1", "show.schedule=uniform"])
    configs = {"uft": resolve("uft", recipe="lock")}
    ends = {"uft": 0.9, "uft-show.cuts=10": 0.92, "uft-show.cuts=1": 0.2, "uft-show.schedule=uniform": 0.9}
    results = [result(name, seed, end + 0.01 * seed) for name, end in ends.items() for seed in range(3)]
    groups = vary.panels(found, configs, results)
    assert [(value, own) for value, own, _ in groups["show.cuts"]] == [("1", False), ("5", True), ("10", False)]
    assert [value for value, _, _ in groups["show.schedule"]] == ["cosine", "uniform"]
    plot, lines = compare.write_varied(tmp_path, groups, results)
    rows = lines[0].splitlines()
    assert "| show.cuts | 1 | 21.0 |" in rows[2] and "| -70.0, apart |" in rows[2] and "| 20.0 21.0 22.0 |" in rows[2]
    assert "| 5 | 91.0 |" in rows[3] and "| unchanged |" in rows[3]
    assert "| 10 | 93.0 |" in rows[4] and "| +2.0 |" in rows[4]
    assert plot.read_bytes()[:4] == b"\x89PNG" and (tmp_path / "table.md").read_text().startswith("| setting |")
    assert {r["method"] for r in json.loads((tmp_path / "compare.json").read_text())} == set(ends)


def test_varied_runs_keep_their_names(tmp_path):
    """`run_many` gives results the names of their jobs, also those that were finished before."""
    job = replace(fake(tmp_path, "uft", 0), method="uft-show.cuts=1")
    for _ in range(2):
        assert [r["method"] for r in run_many([job], 1)] == ["uft-show.cuts=1"]
    assert (job.folder / "started").read_text() == "x"


def test_a_varied_setting_is_checked_before_anything_runs(tmp_path):
    with pytest.raises(ConfigError, match=r"show\.cutz.*did you mean .cuts"):
        compare.compare_methods(compare.Plan(["uft"], 1, "lock", tmp_path, vary=["show.cutz=1,2"]))
    assert not list(tmp_path.iterdir())
