"""The loop on real tasks, and its refusals: errors come before the model is loaded and lose nothing."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import time

import pytest
import torch

from unift.config.resolve import parse_overrides, resolve
from unift.files import publish_folder
from unift.model.load import locate
from unift.model.logprobs import logprobs
from unift.training import evaluate, update
from unift.training.loop import train
from unift.training.run import checkpoint, claim
from unift.training.run.metrics import read_metrics
from unift.types import ConfigError, DataError, NonFiniteError, Stopped, UniftError

TINY = [
    "train.steps=4",
    "train.prompts=4",
    "sample.completions=4",
    "data.train_rows=8",
    "data.test_rows=6",
    "threads=1",
]


def tiny(method: str = "uft", *more: str):
    return resolve(method, recipe="lock", overrides=parse_overrides([*TINY, *more]))


@pytest.fixture
def no_model(monkeypatch):
    """Fails the test if a model is loaded."""

    def load(*args):
        raise AssertionError("the model was loaded before the error")

    monkeypatch.setattr("unift.training.loop.load_policy", load)


@pytest.mark.parametrize("method", ["sft", "rft", "r3", "stage", "uft", "sft-rft"])
def test_every_preset_runs(tmp_path, method):
    result = train(tiny(method), tmp_path)
    assert result["test"]["n"] == 6 and result["steps"] == 4
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [0, 1, 2, 3, 4]
    assert all(math.isfinite(m["loss"]) for m in metrics[1:])


def test_several_updates_a_step(tmp_path):
    """uft-paper's shape in small: four updates a step, ratios other than 1 from the second on."""
    settings = ["train.updates=4", "train.prompts=8", "train.micro_prompts=2", "train.steps=3", "sample.max_tokens=16"]
    config = resolve(
        "uft-paper", recipe="lock", overrides=parse_overrides([*TINY, *settings, "train.lr=0.01", "reward.rule=unift"])
    )
    train(config, tmp_path)
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last["clip_ratio/low_mean"] >= 0 and "kl" in last


def test_saved_model_loads_plainly(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    train(tiny(), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    stored = torch.load(tmp_path / "checkpoints" / "step_000004" / "state.pt", weights_only=True)["weights"]
    own = dict(model.named_parameters())
    assert all(torch.equal(own[name], value) for name, value in stored.items())
    assert model.config._attn_implementation in ("sdpa", "eager")
    ids = tokenizer("abcd>", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > ids["input_ids"].shape[1]


def test_lora_run_saves_merged_weights(tmp_path):
    from transformers import AutoModelForCausalLM

    result = train(tiny("uft", "model.lora={rank: 4}", "train.lr=0.01"), tmp_path)
    assert result["steps"] == 4
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(locate("embedded:lock"))
    assert model.state_dict().keys() == base.state_dict().keys()
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, dict(base.named_parameters())[n])]
    assert changed and all("proj" in n for n in changed)


def test_other_settings_in_the_folder(tmp_path, no_model, monkeypatch):
    from unift.training.run import open_run

    open_run(tmp_path, tiny(), "same")
    (tmp_path / "metrics.jsonl").touch()  # the run has begun; before that, its settings may still be mended
    with pytest.raises(ConfigError, match=r"train.lr: 0.001 -> 0.5"):
        open_run(tmp_path, tiny("uft", "train.lr=0.5"), "same")
    with pytest.raises(DataError, match="training rows are not those"):
        open_run(tmp_path, tiny(), "other")
    open_run(tmp_path, tiny("uft", "save.every=7"), "same")


def test_foreign_folder(tmp_path, no_model):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="thesis.tex"):
        train(tiny(), tmp_path)


def test_prompt_that_does_not_fit(tmp_path, no_model):
    with pytest.raises(DataError, match=r"row 1 .*data.max_prompt is 9"):
        train(tiny("uft", "data.max_prompt=9"), tmp_path)
    assert not (tmp_path / "config.yaml").exists()


def test_missing_file(tmp_path, no_model):
    config = resolve(
        "uft", overrides=parse_overrides(["model.path=embedded:lock", f"data.train={tmp_path}/none.jsonl"])
    )
    with pytest.raises(DataError, match="none.jsonl"):
        train(config, tmp_path / "run")


def test_reward_that_raises_stops_before_training(tmp_path, no_model):
    (tmp_path / "bad.py").write_text("def score(completion, row):\n    raise ValueError('no such column')\n")
    with pytest.raises(UniftError, match="no such column"):
        train(tiny("uft", f"reward.function={tmp_path}/bad.py:score"), tmp_path / "run")


def test_non_finite_stops_with_the_batch_saved(tmp_path, monkeypatch):
    real = logprobs

    def poisoned(policy, batch, temperature):
        l_S, entropy_S = real(policy, batch, temperature)
        return (l_S * float("nan") if torch.is_grad_enabled() else l_S), entropy_S

    monkeypatch.setattr(update, "logprobs", poisoned)
    with pytest.raises(NonFiniteError, match="the loss is nan"):
        train(tiny(), tmp_path)
    dumps = list((tmp_path / "nonfinite").glob("*.pt"))
    assert len(dumps) == 1 and "tokens_T" in torch.load(dumps[0], weights_only=True)[0]


def test_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    real = publish_folder

    def full(temporary, final):
        if final.name == "step_000003":
            raise OSError(28, "No space left on device")
        real(temporary, final)

    config = tiny("uft", "save.every=1", "save.keep=9")
    with monkeypatch.context() as patch:
        patch.setattr("unift.training.run.checkpoint.publish_folder", full)
        with pytest.raises(UniftError, match="No space left"):
            train(config, tmp_path)
    assert checkpoint.steps_saved(tmp_path) == [1, 2]
    assert train(config, tmp_path)["steps"] == 4


def test_best_names_the_best_checkpoint_that_there_is(tmp_path, monkeypatch):
    """An evaluation between two checkpoints may be better than both; the best of those that were saved stays."""
    right = iter([2, 4, 10, 18, 8, 6, 9])

    def greedy(judge, split):
        number = next(right)
        return [True] * number + [False] * (20 - number)

    monkeypatch.setattr(evaluate, "greedy", greedy)
    items = ["train.steps=6", "eval.every=1", "save.every=2", "save.keep=1", "eval.train_rows=0"]
    train(tiny("sft", *items), tmp_path)
    checkpoints = tmp_path / "checkpoints"
    assert (checkpoints / "best").read_text() == "step_000002"
    assert checkpoint.steps_saved(tmp_path) == [2, 6]


def test_a_copy_of_a_checkpoint_is_none_of_the_run(tmp_path):
    """Whoever keeps one under another name does not stop the run from going on."""
    config = tiny("sft", "save.every=2")
    with pytest.raises(Stopped):
        train(config, tmp_path, report=lambda m, total: m["step"] == 2)
    kept = tmp_path / "checkpoints" / "step_000002.before"
    shutil.copytree(tmp_path / "checkpoints" / "step_000002", kept)
    assert train(config, tmp_path)["steps"] == 4 and kept.is_dir()


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_out_of_memory_is_told_and_the_run_goes_on(tmp_path, device):
    """With less of it: a smaller budget of tokens is no other run. The CPU's error is a real one."""

    def short(*args):
        if device == "cpu":
            return torch.empty(2**50)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")

    config, more = tiny("uft", "save.every=1"), ("train.token_budget=64", "train.gradient_checkpointing=true")
    with pytest.MonkeyPatch.context() as patch:
        real, calls = update.apply, []

        def apply(*args):
            calls.append(1)
            return short() if len(calls) == 3 else real(*args)

        patch.setattr(update, "apply", apply)
        with pytest.raises(UniftError, match="memory ran out: .* train.token_budget below 16384"):
            train(config, tmp_path)
    assert checkpoint.steps_saved(tmp_path)[-1] == 2
    assert train(tiny("uft", "save.every=1", *more), tmp_path)["steps"] == 4


def test_learning_rate():
    t = tiny("sft", "train.warmup=2", "train.decay=cosine", "train.lr=1.0").train
    assert update.learning_rate(t, 0, 6) == 0.5 and update.learning_rate(t, 1, 6) == 1.0
    assert update.learning_rate(t, 2, 6) == 1.0
    assert update.learning_rate(t, 4, 6) == pytest.approx(0.5)
    assert update.learning_rate(t, 1.9, 6) == 1.0, "with a budget a step may begin anywhere; train.lr is the highest"


def test_gradients_of_both_streams_are_logged_and_change_nothing(tmp_path):
    """Measuring the streams apart gives the gradient of the sum: same norm as in one backward pass."""
    train(tiny("uft", "log.gradients_every=1"), tmp_path / "a")
    train(tiny("uft", "log.gradients_every=0"), tmp_path / "b")
    a, b = (read_metrics(tmp_path / x / "metrics.jsonl")[1] for x in "ab")
    assert -1 <= a["grad/cosine"] <= 1 and a["grad/hint_norm"] > 0
    assert a["grad/norm"] == pytest.approx(b["grad/norm"], rel=1e-5)


def writer(folder, *more):
    command = [
        sys.executable,
        "-m",
        "unift",
        "train",
        "--quiet",
        "--recipe=lock",
        "--method=uft",
        f"--run={folder}",
        *TINY,
        *more,
    ]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_one_writer_at_a_time(tmp_path):
    """The second is refused with the first one's process id; a killed one leaves no lock, and its workers hold none."""
    long = ["train.steps=100000", "save.every=1"]
    first = writer(tmp_path, *long)
    try:
        until = time.monotonic() + 120
        while not checkpoint.steps_saved(tmp_path):
            assert first.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        before = (tmp_path / "config.yaml").read_bytes()
        second = writer(tmp_path, *long)
        _, error = second.communicate(timeout=120)
        assert second.returncode == 2
        assert f"error: another process trains in {tmp_path}: process {first.pid} on " in error
        assert first.poll() is None and (tmp_path / "config.yaml").read_bytes() == before
    finally:
        first.kill()
        first.wait()
        first.stderr.close()
    with claim(tmp_path):  # at once, although the scoring workers of the killed one may still be ending
        pass


@pytest.mark.parametrize(
    ("paid", "said"), [("1.0", "an empty completion earns 1, no less than"), ("float(bool(completion))", "")]
)
def test_a_reward_that_pays_for_nothing_is_told(tmp_path, capsys, paid, said):
    """It would train without a word, and learn to say nothing."""
    (tmp_path / "r.py").write_text(f"def score(completion, row):\n    return {paid}\n")
    train(tiny("rft", "train.steps=1", f"reward.function={tmp_path / 'r.py'}:score"), tmp_path / "run")
    err = capsys.readouterr().err
    assert f"note: {said}" in err if said else "note:" not in err
