"""A reward function that means harm costs one counted error: no traceback, no forged score, no hang."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import hostile_zoo
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_rewards import gone

from unift.rewards.journal import BadRecord, Ready, Scored, ScoreError, Unloadable, read_record
from unift.rewards.pool import Scorer
from unift.rewards.workers import is_secret, visible
from unift.types import RewardError, Row, Score

ROW = Row("r0", "2+2?", (), "4", "0")
ZOO = "hostile_zoo:score"
NONCE = "0123456789abcdef"


@pytest.fixture(scope="module")
def shared() -> Iterator[Scorer]:
    with Scorer(ZOO, workers=1, timeout=2.0, wall_timeout=0.6, error_rate=1.0) as scorer:
        yield scorer


def outcome_of(scorer: Scorer, order: str, after: str = "0.125") -> Score | ScoreError | None:
    """Of one order among honest items, whose scores must be their own."""
    honest = ["0.5", "0.25"], [after, "0.375", "1.0"]
    outcomes = scorer.score([ROW] * 6, [*honest[0], order, *honest[1]])
    values = [o.value if isinstance(o, Score) else str(o) for o in outcomes]
    assert values[:2] + values[3:] == [0.5, 0.25, 0.5 if after.startswith("sleep") else 0.125, 0.375, 1.0]
    return outcomes[2]


@pytest.mark.parametrize(
    ("order", "error"),
    [
        ("forge", "crash: the worker sent a record for no item that it holds"),
        ("flood", "crash: the worker sent a line without end"),
        ("endless-line", "crash: the worker sent a line without end"),
        ("nested", "crash: the worker sent a line that is no record"),
        ("fork-and-exit", "crash: the worker died (exit code 0)"),
        ("close-descriptors", "exception: the reward closed or exchanged a standard stream"),
        ("close-stdout", "exception: the reward closed or exchanged a standard stream"),
        ("detach-stderr", "exception: the reward closed or exchanged a standard stream"),
        ("close-all", "crash: the worker died (exit code 1)"),
        ("limit-files", "exception: the reward changed a resource limit"),
        ("limit-time", "exception: the reward changed a resource limit"),
        ("deaf", "timeout: no result after 0.6 s of wall clock; the limits are 2 s of CPU time and 0.6 s of wall"),
        ("stop", "crash: the worker was stopped by a signal"),
        ("terminate", "crash: the worker died (signal SIGTERM)"),
        ("kill-keeper", "crash: the process that starts the workers ended"),
        ("unspeakable", "crash: the worker died (exit code 5)"),
        ("no-mapping", "exception: TypeError"),
    ],
)
def test_it_costs_one_error_with_its_cause(shared: Scorer, order: str, error: str) -> None:
    before, begin = dict(shared.counts), time.monotonic()
    outcome = outcome_of(shared, order)
    assert isinstance(outcome, ScoreError)
    assert f"{outcome.kind}: {outcome.message}".startswith(error)
    changed = {name: n - before[name] for name, n in shared.counts.items() if n != before[name]}
    assert changed["total"] == 6 and sum(changed.values()) == 7
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize(
    ("order", "after"),
    [
        ("fork", "0.125"),  # the copy that comes back scores nothing
        ("frames", "0.125"),  # it can speak for itself, as it could by returning
        ("late-forger", "sleep 0.3"),
        ("late-killer", "sleep 0.3"),
        ("alarm", "sleep 0.3"),
        ("swap-stdout", "0.125"),
        ("long", "0.125"),
    ],
)
def test_what_it_leaves_behind_harms_nobody(shared: Scorer, order: str, after: str) -> None:
    outcome = outcome_of(shared, order, after)
    assert isinstance(outcome, Score) and outcome.value == 0.75
    assert len(outcome.note) <= 1000 and all(len(name) <= 200 for name in outcome.parts)


@pytest.mark.parametrize("order", ["threads", "busy-child"])
def test_what_burns_time_in_the_background_is_not_charged_to_others(order: str) -> None:
    with Scorer(ZOO, workers=1, timeout=0.3, wall_timeout=20.0, error_rate=0.0) as scorer:
        outcomes = scorer.score([ROW] * 3, [order, "sleep 0.6", "1.0"])
    assert [o.value for o in outcomes if isinstance(o, Score)] == [0.75, 0.5, 1.0]


def test_a_keeper_that_was_stopped_is_replaced() -> None:
    with Scorer(ZOO, workers=1, timeout=2.0, wall_timeout=0.5, error_rate=1.0) as scorer:
        assert scorer.score([ROW], ["1"]) == [Score(1.0)]
        scorer.start_seconds = 1.5
        begin = time.monotonic()
        outcomes = scorer.score([ROW] * 3, ["0.5", "stop-keeper", "0.25"])
        assert [str(o) if isinstance(o, ScoreError) else o for o in outcomes] == [Score(0.5), "crash", Score(0.25)]
        assert time.monotonic() - begin < 30


def test_it_ends_at_once_whatever_a_worker_ignores() -> None:
    scorer = Scorer(ZOO, workers=2, timeout=50.0, error_rate=1.0)
    scorer.score([ROW], ["1"])
    previous = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            try:
                scorer.score([ROW] * 2, ["deaf", "deaf"])
            finally:
                begin = time.monotonic()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    scorer.close()
    assert time.monotonic() - begin < 2.0


def test_above_the_rate_it_is_a_reward_error() -> None:
    with Scorer(ZOO, workers=1, error_rate=0.05, window=20) as scorer, pytest.raises(RewardError, match="2 crashes"):
        scorer.score([ROW] * 4, ["1", "forge", "forge", "1"])


@pytest.mark.parametrize(("order", "error"), [("raise", "exception: the row cannot be read"), ("exit", "crash")])
def test_a_row_that_unpickles_oddly(shared: Scorer, order: str, error: str) -> None:
    odd = Row("odd", "", (), "", "0", extra={"x": hostile_zoo.Bomb(order)})
    one, two, three = shared.score([ROW, odd, ROW], ["0.5", "0.25", "0.125"])
    assert (one, three) == (Score(0.5), Score(0.125))
    assert str(two).startswith(error)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a subreaper")
def test_a_daemon_ends_with_its_worker(tmp_path: Path) -> None:
    with Scorer(ZOO, workers=1, timeout=5.0) as scorer:
        assert scorer.score([ROW], [f"daemon {tmp_path / 'pid'}"]) == [Score(0.75)]
        pid = int((tmp_path / "pid").read_text())
        assert not gone(pid, 0.1)
    assert gone(pid)


# ------------------------------------------------------------------------------------------------------------ busy machine


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs to choose a core")
def test_a_busy_machine_fails_nobody() -> None:
    """A fifth of one core: .3 s of CPU time last about 1.5 s, longer than both limits."""
    core = min(os.sched_getaffinity(0))
    spawn = multiprocessing.get_context("spawn")
    others = [spawn.Process(target=_occupy, args=(core,)) for _ in range(4)]
    try:
        for other in others:
            other.start()
        with Scorer(ZOO, workers=1, timeout=0.6, wall_timeout=1.0, error_rate=1.0) as scorer:
            time.sleep(1.0)
            begin = time.monotonic()
            row = Row("r", "", (), "", str(core))
            right, hung = scorer.score([row] * 2, ["work 0.3", "work 100"])
            assert right == Score(0.75)
            assert time.monotonic() - begin > 1.0
            assert isinstance(hung, ScoreError) and hung.message.startswith("no result after 0.6 s of CPU time")
    finally:
        for other in others:
            other.kill()
            other.join()


def _occupy(core: int) -> None:
    os.sched_setaffinity(0, {core})
    hostile_zoo.spin(60)


# ------------------------------------------------------------------------------------------------------------ records


def test_honest_records_are_read() -> None:
    assert read_record(f'["{NONCE}", "ready", "task"]'.encode(), NONCE, Ready) == Ready("task")
    assert read_record(f'["{NONCE}", "unloadable", "why"]'.encode(), NONCE, Unloadable) == Unloadable("why")
    line = f'["{NONCE}", "score", 0.5, true, {{"a": 1.0}}, "n", 1]'.encode()
    assert read_record(line, NONCE, Scored) == Scored(Score(0.5, True, {"a": 1.0}, "n"), 1)
    assert read_record(f'["{NONCE}", "skipped", 0]'.encode(), NONCE, Scored) == Scored(None, 0)
    crash = read_record(f'["{NONCE}", "crash", "m", 2]'.encode(), NONCE, Scored)
    assert crash == Scored(ScoreError("crash", "m"), 2)
    with pytest.raises(BadRecord, match="out of turn"):
        read_record(line, NONCE, Ready, Unloadable)


def test_half_a_surrogate_pair_reaches_no_file():
    """JSON can spell it, UTF-8 cannot: rollouts and logs could not be written."""
    bad = chr(92) + "ud800"
    line = f'["{NONCE}", "score", 0.5, true, {{"a{bad}": 1.0}}, "n{bad}", 0]'.encode()
    assert read_record(line, NONCE, Scored) == Scored(Score(0.5, True, {"a?": 1.0}, "n?"), 0)
    assert read_record(f'["{NONCE}", "unloadable", "{bad}"]'.encode(), NONCE, Unloadable) == Unloadable("?")
    failed = read_record(f'["{NONCE}", "exception", "m{bad}", 0]'.encode(), NONCE, Scored)
    assert failed == Scored(ScoreError("exception", "m?"), 0)


@pytest.mark.parametrize(
    "rest",
    [
        '"score", NaN, null, {}, "", 0',
        '"score", Infinity, null, {}, "", 0',
        '"score", 1e999, null, {}, "", 0',
        '"score", true, null, {}, "", 0',
        '"score", 1, null, {}, "", 0',
        f'"score", 1{"0" * 5000}, null, {{}}, "", 0',
        '"score", "1.0", null, {}, "", 0',
        '"score", 1.0, 1, {}, "", 0',
        '"score", 1.0, null, [], "", 0',
        '"score", 1.0, null, {"a": null}, "", 0',
        '"score", 1.0, null, {"a": NaN}, "", 0',
        '"score", 1.0, null, {}, null, 0',
        f'"score", 1.0, null, {{}}, "{"x" * 1001}", 0',
        '"score", 1.0, null, {}, ""',
        '"score", 1.0, null, {}, "", 0, 0',
        '"score", 1.0, null, {}, "", 3',
        '"score", 1.0, null, {}, "", true',
        '"skipped", 0.0',
        '"timeout", "m", 0',
        '"crash", null, 0',
        '"ready", ["x"]',
        '"other", 0',
    ],
)
def test_forged_records_are_refused(rest: str) -> None:
    with pytest.raises(BadRecord):
        read_record(f'["{NONCE}", {rest}]'.encode(), NONCE, Ready, Unloadable, Scored)


@given(st.binary(max_size=200) | st.text('[]{}",:0123456789.eE-+ntrufalsINy \\', max_size=200).map(str.encode))
def test_no_line_does_anything_but_be_refused(line: bytes) -> None:
    with pytest.raises(BadRecord):
        read_record(line, NONCE, Ready, Unloadable, Scored)


# ------------------------------------------------------------------------------------------------------------ environment


@pytest.mark.parametrize(
    "name",
    """HF_TOKEN HUGGING_FACE_HUB_TOKEN WANDB_API_KEY OPENAI_API_KEY OPENAI_KEY AWS_SECRET_ACCESS_KEY AWS_ACCESS_KEY_ID
    GITHUB_PAT GITHUBTOKEN PGPASSWORD MYSQL_PWD DB_PASS SMTP_PASSWD GOOGLE_APPLICATION_CREDENTIALS SSH_AUTH_SOCK
    npm_config__auth my_secret SENTRY_DSN API_KEY_2 TOKEN KEY SESSION_COOKIE SLACK_WEBHOOK_URL AZURE_CLIENT_SECRET""".split(),
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    """PATH HOME PWD OLDPWD LANG PYTHONPATH TOKENIZERS_PARALLELISM OMP_NUM_THREADS CUDA_VISIBLE_DEVICES HF_HOME USER
    KEYBOARD_LAYOUT LD_LIBRARY_PATH VIRTUAL_ENV PYTORCH_CUDA_ALLOC_CONF AUTHOR TERM MASTER_PORT""".split(),
)
def test_names_of_no_secrets(name: str) -> None:
    assert not is_secret(name)


def test_a_url_with_a_password_is_a_secret() -> None:
    given = {"INDEX": "https://me:pw@host/x", "PROXY": "http://host:80", "X_TOKEN": "1", "Y_TOKEN": "2"}
    assert visible(given, ["X_TOKEN"]) == {"PROXY": "http://host:80", "X_TOKEN": "1"}


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_workers_do_not_see_secrets_unless_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ZOO_API_KEY", "ZOO_TOKEN", "ZOO_HOME"):
        monkeypatch.setenv(name, "x")
    with Scorer(ZOO, workers=1, environment=["ZOO_TOKEN"]) as scorer:
        names = ["visible ZOO_API_KEY", "visible ZOO_TOKEN", "visible ZOO_HOME"]
        assert [o.value for o in scorer.score([ROW] * 3, names) if isinstance(o, Score)] == [0.0, 1.0, 1.0]


# ------------------------------------------------------------------------------------------------------------ the trainer

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from unift.rewards.pool import Scorer
from unift.types import Row
row = Row("x", "", (), "", None)
with Scorer("hostile_zoo:score", workers=2, timeout=100.0) as scorer:
    print(scorer.score([row], ["chatter"])[0].value, flush=True)
    scorer.score([row, row], ["deaf", "deaf"])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_without_warnings_and_prints_are_cut(tmp_path: Path, number: signal.Signals) -> None:
    """A quarter of a GiB is printed; the trainer's own standard output stays clean."""
    (tmp_path / "train.py").write_text(SCRIPT.format(tests=str(Path(__file__).parents[1])))
    with open(tmp_path / "err", "w") as err_file:
        trainer = subprocess.Popen(
            [sys.executable, "-W", "always", str(tmp_path / "train.py")],
            stdout=subprocess.PIPE,
            stderr=err_file,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == "0.75\n"
    time.sleep(0.3)
    begin = time.monotonic()
    trainer.send_signal(number)
    assert trainer.communicate(timeout=20)[0] == ""
    assert time.monotonic() - begin < 5
    assert trainer.returncode == -number
    err = (tmp_path / "err").read_text()
    assert len(err) < 100_000 and "prints more than 64 KiB" in err
    assert not any(word in err for word in ("leaked", "resource_tracker", "semaphore", "Warning"))
    assert ("Traceback" in err) == (number == signal.SIGINT)  # the interpreter's own, of KeyboardInterrupt
