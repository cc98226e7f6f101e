"""Scoring never trusts the scorer: every way to misbehave becomes a counted record, at a bounded cost of time."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from unift.rewards import count_outcomes, score_groups
from unift.rewards.journal import ScoreError
from unift.rewards.pool import Scorer
from unift.types import Group, RewardError, Row, Sample, Score

ROW = Row("r0", "2+2?", ("think\n",), "4", "4", task="sums")
ZOO = "reward_zoo:score"
TIMEOUT = 0.8
START = 3.0  # seconds a busy machine may take to start or refill workers; it takes 0.1 on an idle one


@pytest.fixture(scope="module")
def shared() -> Iterator[Scorer]:
    with Scorer(ZOO, workers=2, timeout=TIMEOUT, wall_timeout=TIMEOUT, error_rate=1.0) as scorer:
        scorer.score([ROW], ["1"])
        yield scorer


def run(scorer: Scorer, texts: list[str]) -> tuple[list[object], dict[str, int], float]:
    """Values (or error strings), the change of the counts, seconds."""
    before, begin = dict(scorer.counts), time.monotonic()
    outcomes = scorer.score([ROW] * len(texts), texts)
    seconds = time.monotonic() - begin
    changed = {name: n - before[name] for name, n in scorer.counts.items() if n != before[name]}
    return [o.value if isinstance(o, Score) else o if o is None else str(o) for o in outcomes], changed, seconds


def gone(pid: int, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True  # its parent has yet to ask; it runs no more
        except OSError:
            return True
        time.sleep(0.05)
    return False


# ----------------------------------------------------------------------------------------------------------------- pool


def test_order_is_kept_over_chunks(shared: Scorer) -> None:
    texts = [str(i / 8) for i in range(251)]
    rows = [Row(f"r{i}", "", (), "", i) for i in range(251)]
    outcomes = shared.score(rows, texts, ["" for _ in texts])
    assert [o.value for o in outcomes if isinstance(o, Score)] == [i / 8 for i in range(251)]
    assert shared.score([], [], []) == []
    with pytest.raises(ValueError, match="2 completions"):
        shared.score([ROW], ["1", "2"], [""])


def test_bad_values_and_exceptions_are_counted_records(shared: Scorer) -> None:
    texts = ["1", "nan", "none", "text", "raise it", "quit now", "bool", "0.5", "abc"]
    values, counts, _ = run(shared, texts)
    assert counts == {"total": 9, "bad_values": 3, "exceptions": 3}
    assert [values[0], values[6], values[7]] == [1.0, 1.0, 0.5]
    assert values[1] == "bad value: returned float nan; expected a finite number"
    assert values[2] == "bad value: returned None; expected a finite number"
    assert str(values[4]).startswith("exception: ValueError: cannot read it (reward_zoo.py:")
    assert values[5] == "exception: SystemExit: now (reward_zoo.py:" + str(values[5]).rpartition(":")[2]
    assert 0.0 not in values


@pytest.mark.parametrize("order", ["spin", "sleep", "native"])
def test_one_hang_per_chunk_costs_one_timeout(shared: Scorer, order: str) -> None:
    texts = [str(float(i)) for i in range(64)]
    texts[5] = texts[40] = order
    values, counts, seconds = run(shared, texts)
    assert counts == {"total": 64, "timeouts": 2}
    assert [i for i, v in enumerate(values) if v == "timeout"] == [5, 40]
    assert all(v == float(i) for i, v in enumerate(values) if i not in (5, 40))
    assert seconds >= TIMEOUT - 0.1  # what is used before the first look does not count
    if order == "sleep":  # the others count CPU time, which lasts longer on a busy machine
        assert seconds < 2 * TIMEOUT


def test_hangs_in_one_chunk_are_spread() -> None:
    with Scorer(ZOO, workers=2, timeout=60.0, wall_timeout=0.6, error_rate=1.0) as scorer:
        scorer.score([ROW] * 2, ["1", "1"])
        values, counts, seconds = run(scorer, [*["sleep"] * 8, *["1"] * 8])
    assert values == ["timeout"] * 8 + [1.0] * 8 and counts["timeouts"] == 8
    assert seconds < 7 * 0.6  # one after the other would be 8, an even spread is 4


def test_slow_is_not_hung(shared: Scorer) -> None:
    """The deadline is for one completion: a chunk may take longer, and waiting in line is not work."""
    values, counts, seconds = run(shared, ["sleep 0.5"] * 4)
    assert values == [0.5] * 4 and counts == {"total": 4}
    assert seconds > TIMEOUT


@pytest.mark.parametrize("order", ["exit 3", "exit 0", "segfault"])
def test_death_is_a_crash_of_the_guilty_item_only(shared: Scorer, order: str) -> None:
    texts = [str(float(i)) for i in range(32)]
    texts[7] = texts[20] = order
    values, counts, seconds = run(shared, texts)
    assert counts == {"total": 32, "crashes": 2}
    assert [i for i, v in enumerate(values) if v == "crash"] == [7, 20]
    assert all(v == float(i) for i, v in enumerate(values) if i not in (7, 20))
    assert seconds < 10 * START


def test_crash_names_its_cause(shared: Scorer) -> None:
    outcomes = shared.score([ROW] * 2, ["exit 3", "segfault"])
    messages = [o.message for o in outcomes if isinstance(o, ScoreError)]
    assert messages == ["the worker died (exit code 3)", "the worker died (signal SIGSEGV)"]


def test_everything_at_once(shared: Scorer) -> None:
    texts = ["1", "spin", "raise", "exit 9", "nan", "0.5", "sleep", "segfault", "none", "0.25"] * 2
    values, counts, seconds = run(shared, texts)
    assert counts == {"total": 20, "timeouts": 4, "exceptions": 2, "crashes": 4, "bad_values": 4}
    assert [v for v in values if isinstance(v, float)] == [1.0, 0.5, 0.25] * 2
    assert seconds < 20 * TIMEOUT + START


def test_worker_that_dies_idle_is_replaced(shared: Scorer) -> None:
    shared.score([ROW] * 2, ["later", "later"])
    time.sleep(0.5)
    values, counts, seconds = run(shared, ["1", "2"])
    assert values == [1.0, 2.0] and counts == {"total": 2} and seconds < 3 * START


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs SIGSTOP")
def test_worker_that_takes_no_work_is_given_up() -> None:
    with Scorer(ZOO, workers=1, timeout=0.5) as scorer:
        pid = scorer.score([ROW], ["pid"])[0].value  # type: ignore[union-attr]
        os.kill(int(pid), signal.SIGSTOP)
        scorer.start_seconds = 1.0
        assert scorer.score([ROW], ["0.5"]) == [Score(0.5)]
        assert gone(int(pid))


def test_memory_limit() -> None:
    with Scorer(ZOO, workers=2, timeout=5.0, error_rate=1.0, memory_mb=200) as scorer:
        values, counts, _ = run(scorer, ["1", "allocate 1000", "2", "allocate 1", "3"])
        assert values == [1.0, "crash", 2.0, 0.25, 3.0] and counts == {"total": 5, "crashes": 1}
        outcome = scorer.score([ROW], ["allocate 1000"])[0]
        assert isinstance(outcome, ScoreError) and "out of memory (MemoryError" in outcome.message


def test_printing_breaks_nothing(shared: Scorer) -> None:
    assert run(shared, ["print", "1"])[0] == [1.0, 1.0]


def test_skipped_is_neither_error_nor_zero() -> None:
    with Scorer("reward_zoo:trl", workers=1, error_rate=0.0) as scorer:
        values, counts, _ = run(scorer, ["4", "skip", "5"])
        assert values == [1.0, None, 0.0] and counts == {"total": 3, "skipped": 1} and scorer.errors == 0


def test_fatal_above_the_rate_names_the_first() -> None:
    with Scorer(ZOO, workers=2, error_rate=0.1, window=20) as scorer:
        run(scorer, ["1"] * 10 + ["raise early"])  # in a call of its own: of two workers' errors either may come first
        run(scorer, ["nan"])  # 2 of 20: the rate, not above it
        with pytest.raises(RewardError) as caught:
            run(scorer, ["1", "raise late", "1"])
        text = str(caught.value)
        assert "3 of the last " in text and "2 exceptions, 1 bad values" in text and "10% of 20" in text
        assert "ValueError: cannot read early" in text and "'raise early'" in text and "'r0'" in text
    with Scorer(ZOO, workers=2, error_rate=0.1, window=20) as scorer:
        for _ in range(5):  # old errors leave the window
            run(scorer, ["1"] * 20 + ["nan"])


def test_fatal_rate_stops_a_call_full_of_hangs() -> None:
    begin = time.monotonic()
    with (
        Scorer(ZOO, workers=2, timeout=0.3, error_rate=0.1, window=20) as scorer,
        pytest.raises(RewardError, match="timeouts"),
    ):
        scorer.score([ROW] * 200, ["spin"] * 200)
    assert time.monotonic() - begin < 10 * START  # all of them would take 60 s of CPU time


def test_check() -> None:
    with Scorer(ZOO, workers=1) as scorer:
        row = Row("good", "", (), "right", None)
        check = scorer.check(row)
        assert (check.kind, check.demonstration, check.empty, check.warnings) == ("unift", Score(1.0), Score(0.0), ())
        assert scorer.counts["total"] == 0 and "demonstration 1, empty 0" in str(check)
    with Scorer("reward_zoo:never_full", workers=1) as scorer:
        assert "does not earn full reward: 0.5" in scorer.check(ROW).warnings[0]
    with Scorer("reward_zoo:always_one", workers=1) as scorer:
        assert "an empty completion earns 1" in scorer.check(ROW).warnings[0]


@pytest.mark.parametrize(
    ("spec", "solution", "message"),
    [
        ("reward_zoo:unknown", "1", "three accepted signatures"),
        ("reward_zoo:always_raises", "1", "failed on the row's own solution of row 'x': exception: KeyError: 'gold'"),
        (
            "reward_zoo:score",
            "spin",
            "timeout: no result after 0.5 s of CPU time; the limits are 0.5 s of CPU time and 5 s of wall clock. "
            "Make the function faster, or raise reward.timeout",
        ),
        ("reward_zoo:score", "exit 3", "crash: the worker died"),
        ("reward_zoo:score", "nan", "bad value: returned float nan"),
        (
            "auto",
            "1",
            "row 'x' has no task, so reward 'auto' has no scorer; name a reward function. Mend the rows or reward",
        ),
        ("nowhere:f", "1", "cannot import module 'nowhere'"),
    ],
)
def test_check_refuses(spec: str, solution: str, message: str) -> None:
    with Scorer(spec, workers=1, timeout=0.5) as scorer, pytest.raises(RewardError, match=message):
        scorer.check(Row("x", "", (), solution, None))


@pytest.mark.parametrize(
    ("source", "message"),
    [("import os; os._exit(4)", "exit code 4.* while importing"), ("while True: pass", "importing it took more than")],
)
def test_import_that_kills_or_hangs(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "bad.py").write_text(source)
    with Scorer(f"{tmp_path}/bad.py:score", workers=1) as scorer:
        scorer.start_seconds = 1.0 if "while" in source else 10.0
        with pytest.raises(RewardError, match=message):
            scorer.check(ROW)


def test_a_row_that_cannot_be_sent() -> None:
    with Scorer(ZOO, workers=1) as scorer, pytest.raises(RewardError, match="row columns must be plain data"):
        scorer.score([Row("x", "", (), "", None, extra={"f": lambda: 0})], ["1"])


def test_score_groups() -> None:
    rows = [Row("a", "", (), "", None), Row("b", "", (), "", None)]

    def group(row: int, *texts: str) -> Group:
        return Group(row, rows[row].id, [1], [], 0, 1, [Sample([1], [0.0], True, text) for text in texts])

    groups = [group(1, "1", "nan"), group(0, "hint", "exit 1")]
    with Scorer(ZOO, workers=2, error_rate=1.0) as scorer:
        score_groups(scorer, rows, groups, ["", "shown"])
        (one, nan), (hint, crash) = (g.samples for g in groups)
        assert one.score == Score(1.0) and one.error == ""
        assert nan.score is None and nan.error.startswith("bad value: ")
        assert hint.score is not None and hint.score.note == "shown"
        assert crash.score is None and crash.error == "crash"
        groups[0].row = 0
        with pytest.raises(ValueError, match="does not fit"):
            score_groups(scorer, rows, groups, ["", ""])


# ------------------------------------------------------------------------------------------------------------ processes


def test_workers_start_light_and_without_the_main_script(shared: Scorer) -> None:
    modules, main = shared.score([ROW] * 2, ["modules", "main"])
    assert isinstance(modules, Score) and modules.note == "" and modules.value == 0.0
    assert isinstance(main, Score) and "pytest" not in main.note


def test_close_leaves_no_process() -> None:
    scorer = Scorer(ZOO, workers=2)
    pids = {int(o.value) for o in scorer.score([ROW] * 8, ["pid"] * 8) if isinstance(o, Score)}
    assert pids and not gone(min(pids), 0.1)
    scorer.close()
    scorer.close()
    assert all(gone(pid, 1.0) for pid in pids)
    assert scorer.score([ROW], ["1"]) == [Score(1.0)]  # starts again
    scorer.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_children_of_a_hung_reward_are_killed(tmp_path: Path) -> None:
    with Scorer(ZOO, workers=1, timeout=5.0, wall_timeout=0.5, error_rate=1.0) as scorer:
        assert run(scorer, [f"spawn {tmp_path / 'pid'}"])[0] == ["timeout"]
    assert gone(int((tmp_path / "pid").read_text()))


def test_keyboard_interrupt_leaves_a_usable_scorer() -> None:
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts deaf to it
    with Scorer(ZOO, workers=2, timeout=30.0) as scorer:
        scorer.score([ROW], ["1"])
        timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
        begin = time.monotonic()
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            scorer.score([ROW] * 2, ["spin", "spin"])
        timer.join()
        assert scorer.score([ROW], ["1"]) == [Score(1.0)]
        assert time.monotonic() - begin < 2 * START
    signal.signal(signal.SIGINT, handler)


SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
from unift.rewards.pool import Scorer
from unift.types import Row
scorer = Scorer("reward_zoo:score", workers=2, timeout=100.0)
row = Row("x", "", (), "", None)
print(int(scorer.score([row], ["pid"])[0].value), flush=True)
{end}
"""


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_a_trainer_that_goes_takes_its_workers_along(tmp_path: Path, how: str) -> None:
    """Also without close(), without a __main__ guard, and when it is killed with a worker in an endless loop."""
    end = "" if how == "exit" else 'scorer.score([row, row], ["spin", "spin"])'
    (tmp_path / "train.py").write_text(SCRIPT.format(tests=str(Path(__file__).parents[1]), end=end))
    (tmp_path / "tmp").mkdir()
    trainer = subprocess.Popen(
        [sys.executable, str(tmp_path / "train.py")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
    )
    assert trainer.stdout is not None
    pid = int(trainer.stdout.readline())
    if how == "kill":
        time.sleep(0.3)
        trainer.kill()
    assert trainer.wait(15) == (0 if how == "exit" else -signal.SIGKILL)
    assert gone(pid)
    assert trainer.stdout.read() == ""  # the script ran once
    assert not list((tmp_path / "tmp").glob("unift-scores-*"))
    trainer.stdout.close()


def test_overhead_is_small(shared: Scorer) -> None:
    texts, rows = ["0.5"] * 256, [ROW] * 256
    times = [_timed(lambda: shared.score(rows, texts)) for _ in range(20)]
    assert min(times) < 0.1, f"{min(times) * 1000:.1f} ms for 256 trivial completions; 20 ms on a busy machine"
    assert math.isfinite(sum(times))


def _timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def test_error_rate_goes_on_where_a_checkpoint_left_it():
    """Ten good scores and two failures before the checkpoint: the first failure after it is one too many."""
    with Scorer(ZOO, workers=1, error_rate=0.1, window=20) as scorer:
        run(scorer, ["1"] * 10 + ["raise early", "nan"])
        stored = json.loads(json.dumps(scorer.recent))
    with Scorer(ZOO, workers=1, error_rate=0.1, window=20) as scorer:
        scorer.recall(stored)
        assert scorer.recent == stored and len(stored) == 12 and stored[:10] == [None] * 10
        with pytest.raises(RewardError, match=r"failed on 3 of the last 13 completions: 2 exceptions, 1 bad values"):
            run(scorer, ["raise late"])


def test_outcomes_of_groups_are_counted_as_the_scorer_counts():
    texts = ["1", "raise early", "nan", "exit 3", "0.5"]
    group = Group(0, ROW.id, [], [], 0, 0, [Sample([], [], True, text) for text in texts])
    with Scorer(ZOO, workers=1, timeout=TIMEOUT, error_rate=1.0) as scorer:
        score_groups(scorer, [ROW], [group], [""])
        assert count_outcomes([group]) == scorer.counts
        assert scorer.counts["total"] == 5 and scorer.errors == 3
    with Scorer("reward_zoo:trl", workers=1) as scorer:
        group.samples = [Sample([], [], True, text) for text in ["4", "skip"]]
        score_groups(scorer, [ROW], [group], [""])
        assert count_outcomes([group]) == scorer.counts and scorer.counts["skipped"] == 1
