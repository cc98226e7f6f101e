"""The next step's completions are drawn while this step trains: by which weights, corrected how, and over kills."""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import close, gradients, tiny_policy

sys.path.insert(0, str(Path(__file__).parents[1]))

from fake_vllm import apart
from kills import Killed, killed
from plain import token_logprobs
from test_processes import REWARD, launched, words
from test_resume import outcome, wait_for

from unift.config.resolve import parse_overrides, resolve
from unift.config.surroundings import Engine, Model
from unift.files import publish_folder
from unift.model.load import load_policy
from unift.model.packs import COMPLETION, Item, Member
from unift.sampling.ahead import Drawing
from unift.training import loop, step, update
from unift.training.loop import train
from unift.training.run import checkpoint
from unift.training.run.metrics import read_metrics
from unift.training.run.rollouts import read_rollouts
from unift.types import ConfigError, EngineError, UniftError

STEPS, GAP = 5, "sampling/sampling_logp_difference/mean"
TINY = [
    f"train.steps={STEPS}", "train.prompts=4", "train.lr=2e-3", "train.warmup=0", "sample.completions=4", "data.train_rows=12",
    "data.test_rows=4", "eval.every=3", "eval.train_rows=0", "save.every=1", "save.keep=20", "save.rollouts=true",
    "log.gradients_every=0", "threads=1", "engine.kind=vllm", "engine.overlap=true", "engine.gap_limit=9",
]  # fmt: skip


def tiny(url, *more, method="uft"):
    return resolve(
        method, recipe="lock", overrides=parse_overrides([*TINY, f"engine.url={url}", "engine.timeout=20", *more])
    )


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with apart(tmp_path_factory.mktemp("served") / "model", seconds=0.02) as found:
        yield found


@pytest.fixture(scope="module")
def whole(tmp_path_factory, url):
    """The run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(tiny(url), folder)
    return folder


# ---------------------------------------------------------------------------------------------- by which weights


def weights_at(folder, finished):
    return load_policy(Model(path=str(folder / "checkpoints" / checkpoint.step_name(finished) / "model"), device="cpu"))


def test_a_step_trains_on_what_the_weights_before_it_drew(whole):
    """Step t + 1 holds the fingerprint of the weights that step t began with, and its log-probs are theirs by the model's own
    forward; those of its own weights are not."""
    for t in range(2, STEPS):
        drawn_by, groups = read_rollouts(whole, t)
        older, newer = (weights_at(whole, n) for n in (t - 1, t))
        assert drawn_by == checkpoint.fingerprint(older) != checkpoint.fingerprint(newer)
        apart = []
        for policy in (older, newer):
            policy.base.set_attn_implementation("eager")
            rows = [(g.prompt + g.hint, s) for g in groups for s in g.samples]
            with torch.no_grad():
                found, _ = token_logprobs(policy.base, [p + s.tokens for p, s in rows])
            own = [l[len(p) - 1 :].tolist() for l, (p, _) in zip(found, rows, strict=True)]
            apart.append(
                max(abs(a - b) for l, (_, s) in zip(own, rows, strict=True) for a, b in zip(l, s.logps, strict=True))
            )
        assert apart[0] < 1e-5 and apart[1] > 1e-3
    metrics = read_metrics(whole / "metrics.jsonl")[1:]
    assert [m["sampling/staleness"] for m in metrics] == [0.0] + [1.0] * (STEPS - 1)
    assert metrics[0][GAP] < 1e-5 and all(m[GAP] > 1e-4 for m in metrics[1:])


def test_clocks_decide_nothing(whole, url, tmp_path, monkeypatch):
    """The same numbers when every drawing is over before the step goes on to train."""
    real = Drawing.begin

    def at_once(self, *args):
        real(self, *args)
        self.wait()

    monkeypatch.setattr(Drawing, "begin", at_once)
    train(tiny(url), tmp_path)
    assert outcome(tmp_path, STEPS) == outcome(whole, STEPS)


def test_the_first_step_of_a_stage_is_drawn_by_its_own_weights(url, tmp_path):
    """Nothing is drawn for a stage without completions, nor over its end."""
    items = [i for i in TINY if not i.startswith("sample.completions")]  # each phase as it is
    reward = tmp_path / "reward.py"
    reward.write_text(REWARD)  # every group has an advantage, so every step an update
    items += [f"engine.url={url}", f"reward.function={reward}:score"]
    train(resolve("sft-rft", recipe="lock", overrides=parse_overrides(items)), tmp_path / "run")
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")[1:]
    assert [m.get("sampling/staleness") for m in metrics] == [None, None, 0.0, 1.0, 1.0]
    assert metrics[2][GAP] < 1e-5 < metrics[3][GAP]


def test_groups_that_are_replaced_are_drawn_by_the_newest_weights(url, tmp_path):
    """With sample.refill the next step begins to be drawn after it; killed before the update, the run goes on as it would have."""
    items = ["sample.refill=2", "eval.every=0", "train.steps=4", "sample.completions=2"]
    train(tiny(url, *items), tmp_path / "whole")
    assert any(g.discarded for t in range(1, 4) for g in read_rollouts(tmp_path / "whole", t)[1])
    with killed(step, "groups_of_step", 2, after=True):
        train(tiny(url, *items, "save.every=2"), tmp_path / "cut")
    train(tiny(url, *items, "save.every=2"), tmp_path / "cut")
    assert outcome(tmp_path / "cut", 4) == outcome(tmp_path / "whole", 4)


def test_the_wait_is_gone(url, tmp_path):
    """Where a completion takes .3 s, a step in line waits for it and a step that was drawn ahead does not, once it trains as long."""
    items = ["eval.every=0", "save.every=0", "train.prompts=2"]
    with apart(tmp_path / "served", seconds=0.3) as slow:
        train(tiny(slow, *items, "engine.overlap=false"), tmp_path / "in line")
        real = update.apply

        def longer(*args):
            time.sleep(0.4)
            return real(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(update, "apply", longer)
            train(tiny(slow, *items), tmp_path / "ahead")
    waits = [
        [m["time/generate"] for m in read_metrics(tmp_path / n / "metrics.jsonl")[2:]] for n in ("in line", "ahead")
    ]
    ahead = [m["time/ahead"] for m in read_metrics(tmp_path / "ahead" / "metrics.jsonl")[2:]]
    assert min(waits[0]) > 0.3 and min(ahead) > 0.3
    assert sum(waits[1]) < 0.5 * sum(waits[0])


# ---------------------------------------------------------------------------------------------- kills


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("place", ["drawn", "scored", "updated", "saving"])
def test_a_kill_loses_nothing_and_repeats_nothing(whole, url, tmp_path, monkeypatch, k, place):
    """In step k + 1: once its completions are there, once they are scored and the next ones are under way, after the update and
    before the checkpoint, and inside the save of the checkpoint."""

    def torn(temporary, final):
        if final.name == checkpoint.step_name(k + 1):
            assert (temporary / checkpoint.AHEAD).is_file()
            raise Killed
        publish_folder(temporary, final)

    if place == "saving":
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr("unift.training.run.checkpoint.publish_folder", torn)
            train(tiny(url), tmp_path)
    else:
        module, name = (step, "groups_of_step") if place == "scored" else (loop, "one_step")
        with killed(module, name, k, after=place != "drawn"):
            train(tiny(url), tmp_path)
    assert checkpoint.steps_saved(tmp_path)[-1] == k
    train(tiny(url), tmp_path)
    assert outcome(tmp_path, STEPS) == outcome(whole, STEPS)


def test_without_stored_rollouts_and_with_sparse_checkpoints(whole, url, tmp_path):
    """What was drawn ahead is in the checkpoint also where no rollouts are kept; steps since then are drawn again, alike."""
    settings = tiny(url, "save.rollouts=false", "save.every=2")
    with killed(loop, "one_step", 3):
        train(settings, tmp_path)
    train(settings, tmp_path)
    assert outcome(tmp_path, STEPS)[:2] == outcome(whole, STEPS)[:2]


def test_a_checkpoint_without_what_was_drawn_is_damaged(url, tmp_path):
    train(tiny(url, "train.steps=3", "eval.every=0"), tmp_path)
    for path in (tmp_path / "result.json", tmp_path / "checkpoints" / checkpoint.step_name(2) / checkpoint.AHEAD):
        path.unlink()
    assert not (tmp_path / "checkpoints" / checkpoint.step_name(3) / checkpoint.AHEAD).exists()  # no step after it
    shutil.rmtree(tmp_path / "checkpoints" / checkpoint.step_name(3))
    with pytest.raises(UniftError, match="ahead.jsonl.gz cannot be read .*delete this folder"):
        train(tiny(url, "train.steps=3", "eval.every=0"), tmp_path)


@pytest.mark.slow
def test_random_sigkill(url, tmp_path):
    """SIGKILLs at random moments of a step and inside a save, with the next step under way; the server lives on."""
    kills, steps = 6, 24
    items = [*TINY, f"engine.url={url}", f"train.steps={steps}", "eval.every=7"]
    train(tiny(url, f"train.steps={steps}", "eval.every=7"), tmp_path / "whole")
    command = [sys.executable, "-m", "unift", "train", "--recipe", "lock", "--method", "uft", "--quiet"]
    command += ["--run", str(tmp_path / "run"), *items, "engine.timeout=20"]
    environment, draw, saves = os.environ | {"OMP_NUM_THREADS": "1"}, random.Random(0), tmp_path / "run" / "checkpoints"
    for kill in range(kills):
        before = max(checkpoint.steps_saved(tmp_path / "run"), default=0)
        process = subprocess.Popen(command, env=environment)
        try:
            wait_for(process, lambda: max(checkpoint.steps_saved(tmp_path / "run"), default=0) > before, 300)  # noqa: B023
            if kill % 2:
                wait_for(process, lambda: any(saves.glob(".step_*.tmp")))
            time.sleep(draw.uniform(0, 0.02 if kill % 2 else 0.5))
            assert process.poll() is None, "the run ended before it was killed: the test needs more steps"
        finally:
            process.kill()
            process.wait()
    assert not (tmp_path / "run" / "result.json").exists()
    subprocess.run(command, check=True, env=environment)
    assert outcome(tmp_path / "run", steps) == outcome(tmp_path / "whole", steps)


# ---------------------------------------------------------------------------------------------- failures and signals


def test_a_failure_of_the_drawing_is_told_at_the_next_step(whole, url, tmp_path):
    """With its cause, and the same command goes on where a server does its work."""
    asked = 4 + 3 * 4  # for the evaluation before the steps, and for three steps
    with apart(tmp_path / "served", "fails", asked + 1) as bad:
        with pytest.raises(EngineError, match=r"drawing the completions of step 4 ahead: .*EngineCore encountered"):
            train(tiny(bad), tmp_path / "run")
    assert 0 < checkpoint.steps_saved(tmp_path / "run")[-1] < STEPS
    train(tiny(url), tmp_path / "run")
    assert outcome(tmp_path / "run", STEPS) == outcome(whole, STEPS)


def test_two_interrupts_end_a_run_whose_server_hangs(tmp_path, at_a_terminal):
    with apart(tmp_path / "served", "stalls", 4 + 2 * 4) as bad:
        command = [sys.executable, "-m", "unift", "train", "--recipe", "lock", "--method", "uft", "--quiet"]
        command += ["--run", str(tmp_path / "run"), *TINY, f"engine.url={bad}", "engine.timeout=300"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            wait_for(process, lambda: 1 in checkpoint.steps_saved(tmp_path / "run"))
            time.sleep(1.0)  # the next step is under way, and waits for its completions
            began = time.monotonic()
            for _ in range(2):  # two that come while the first is not handled yet count as one
                process.send_signal(signal.SIGINT)
                time.sleep(3.0)
            out, _ = process.communicate(timeout=90)
        finally:
            process.kill()
            process.communicate()
    assert process.returncode not in (0, None) and "Fatal" not in out and "Traceback" not in out, out
    assert time.monotonic() - began < 60


def test_a_run_that_ends_leaves_no_thread_behind(url, tmp_path, monkeypatch):
    """The drawing is told to end at its next answer."""

    def broken(*args):
        raise Killed

    monkeypatch.setattr(update, "apply", broken)
    with pytest.raises(Killed):
        train(tiny(url), tmp_path)
    end = time.monotonic() + 10
    while any(t.name == "unift: ahead" for t in threading.enumerate()):
        assert time.monotonic() < end
        time.sleep(0.02)


# ---------------------------------------------------------------------------------------------- several processes


@pytest.mark.dist
def test_two_processes_draw_ahead_as_one(url, tmp_path):
    """Each its own part, and none exchanges anything meanwhile; one process goes on from what two have drawn."""
    reward = tmp_path / "reward.py"
    reward.write_text(REWARD)
    items = [*TINY, f"engine.url={url}", "engine.timeout=20", f"reward.function={reward}:score", "eval.every=2"]
    items += ["model.dtype=float64"]
    settings = resolve("uft", recipe="lock", overrides=parse_overrides(items))
    train(settings, tmp_path / "one")
    code, _, err = launched(words(tmp_path / "two", "uft", items))
    assert code == 0, err
    tokens = lambda folder, t: [[s.tokens for s in g.samples] for g in read_rollouts(folder, t)[1]]  # noqa: E731
    one, two = (read_metrics(tmp_path / n / "metrics.jsonl")[1:] for n in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a["sampling/staleness"] == b["sampling/staleness"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-6)
    assert all(tokens(tmp_path / "one", t) == tokens(tmp_path / "two", t) for t in range(2))
    drawn = tmp_path / "two" / "checkpoints" / checkpoint.step_name(3) / checkpoint.AHEAD
    assert drawn.is_file()
    (tmp_path / "two" / "result.json").unlink()
    for t in range(4, STEPS + 1):
        (tmp_path / "two" / "checkpoints" / checkpoint.step_name(t) / "trainer.json").unlink()
    stored = tokens(tmp_path / "two", 3)
    (tmp_path / "two" / "rollouts" / "step_000003.jsonl.gz").unlink()
    train(settings, tmp_path / "two")
    assert tokens(tmp_path / "two", 3) == stored


# ---------------------------------------------------------------------------------------------- the correction

PROMPT, HINT = [5, 6, 7], [8, 9]
TOKENS = ([10, 11, 12, 13], [14, 15, 16])
SCORES = (1.0, -0.5)
APART = ([0.05, 0.5, -0.3, 0.9], [-0.4, 0.1, 0.7])  # log p - log q


def by_hand(loss, model, q, low, high, cap, correct):
    """Gradients of -sum_t f(l_t) / Z written down from the papers, on the plain model."""
    logps, _ = token_logprobs(model, [PROMPT + HINT + t for t in TOKENS])
    total = 0.0
    for l_all, a, q_t in zip(logps, SCORES, q, strict=True):
        l = l_all[len(PROMPT + HINT) - 1 :]
        rho = torch.exp(l - torch.tensor(q_t, dtype=torch.float64))
        if correct:  # the policy at the start of the step is this one, so its own ratio is 1
            terms = rho.detach().clamp(max=cap) * a * torch.exp(l - l.detach())
        elif loss == "clip":
            terms = torch.minimum(rho * a, rho.clamp(1 - low, 1 + high) * a)
        elif loss == "ratio":
            terms = rho * a
        elif loss == "cispo":
            terms = rho.clamp(1 - low, 1 + high).detach() * a * l
        elif loss == "gspo":
            s = torch.exp((l - torch.tensor(q_t, dtype=torch.float64)).mean().detach())
            whole = s * torch.exp(l - l.detach())
            terms = torch.minimum(whole * a, whole.clamp(1 - low, 1 + high) * a)
        else:
            terms = rho.detach().clamp(max=cap) * a * l
        total = total + terms.sum()
    model.zero_grad()
    (-total / sum(map(len, TOKENS))).backward()
    return gradients(model)


@pytest.mark.parametrize("loss", ["clip", "ratio", "cispo", "gspo", "reinforce"])
@pytest.mark.parametrize("gap", ["warn", "correct"])
def test_the_recorded_logprobs_are_the_denominator(tmp_path, loss, gap):
    """From tokens to gradients, in float64: in the only update of a step, and in the second one of two."""
    policy, plain = tiny_policy(torch.float64)
    with torch.no_grad():
        logps, _ = token_logprobs(plain, [PROMPT + HINT + t for t in TOKENS])
    own = [l[len(PROMPT + HINT) - 1 :].tolist() for l in logps]
    q = [[p - d for p, d in zip(*pair, strict=True)] for pair in zip(own, APART, strict=True)]
    members = [Member(t, COMPLETION, a, logps=list(l)) for t, a, l in zip(TOKENS, SCORES, q, strict=True)]
    engine = Engine(kind="vllm", overlap=True, gap=gap, cap=1.5, gap_limit=9)
    more = [
        f"policy.loss={loss}",
        "reference.kl=0",
        "train.prompts=2",
        "train.updates=2",
        "data.task=lock",
        "model.dtype=float64",
    ]
    rules = resolve("rft", overrides=parse_overrides([*more, "train.clip_norm=1e9", "policy.norm=token_mean"]))
    items = [Item(PROMPT, HINT, members)] * 2
    low, high = rules.policy.low, rules.policy.high
    expected = by_hand(loss, plain, q, low, high, 1.5, gap == "correct")
    ignored = by_hand(loss, plain, own, low, high, 1.5, gap == "correct")
    with pytest.raises(AssertionError):
        close(expected, ignored, 0.1)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    for packs in update.prepare(policy, items, rules, None):
        found = update.apply(policy, optimizer, packs, rules, update.Order(0.0, False, tmp_path / "dump", engine))
        close([p.grad for p in policy.parameters()], expected, 5e-6)  # norms multiply in float32
        drift = [abs(d) for ds in APART for d in ds]
        assert found[GAP] == pytest.approx(sum(drift) / len(drift))  # of the second update, too
        weighed = gap == "correct" or loss == "reinforce"
        mean = sum(min(math.exp(d), 1.5) for ds in APART for d in ds) / len(drift)
        assert found.get("sampling/importance_sampling_ratio/mean") == (pytest.approx(mean) if weighed else None)


# ---------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("method", "items", "says"),
    [
        (
            "uft",
            ["engine.kind=native"],
            "engine.kind=native draws them with this process's own weights",
        ),
        ("uft", ["engine.kind=auto", "engine.url=http://127.0.0.1:8000"], "Use engine.kind=vllm"),
        ("uft", ["train.budget=sampled=1M"], "engine.overlap=true with train.budget"),
        ("adaptive", [], "show.schedule=adaptive follows those scores"),
        ("adaback", [], "show.schedule=bisection follows those scores"),
        ("dpo", ["sample.completions=4"], "policy.loss=dpo compares whole sequences"),
        ("discriminative", [], "sample.source=reference draws them from the model that the phase began with"),
    ],
)
def test_what_cannot_be_drawn_ahead_is_refused(method, items, says):
    with pytest.raises(ConfigError, match=says):
        tiny("http://127.0.0.1:9", *items, method=method)


def test_phases_without_completions_have_nothing_to_refuse():
    assert tiny("http://127.0.0.1:9", "sample.completions=0", method="sft").engine.overlap
