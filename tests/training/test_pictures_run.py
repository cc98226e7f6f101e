"""Runs on rows with pictures: end to end, resumed, with adapters or a frozen tower, in two processes; the report shows them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import vision_zoo as zoo

import unift
from unift.training.run import checkpoint
from unift.training.run.metrics import read_metrics

ROWS = zoo.rows(10, 2)
TINY = {
    "train.steps": 4,
    "train.prompts": 2,
    "sample.completions": 3,
    "sample.max_tokens": 6,
    "eval.max_tokens": 4,
    "train.lr": 1e-3,
    "save.every": 1,
    "save.keep": 9,
    "save.rollouts": True,
    "threads": 1,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return zoo.saved(tmp_path_factory.mktemp("base"))


def run(method, base, folder, on_step=None, **more):
    how = TINY | {key.replace("__", "."): value for key, value in more.items()}
    if method == "sft":
        how = {k: v for k, v in how.items() if not k.startswith("sample")}
    return unift.train(
        method, model=base, train=ROWS[:6], test=ROWS[6:], run=folder, on_step=on_step, quiet=True, **how
    )


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model" / "model.safetensors")


def moved(folder, base):
    """Names of the weights that a run has changed."""
    old, new = load(base), load(folder / "model")
    return {name for name in old if not torch.equal(old[name], new[name])}


def load(folder):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("method", ["uft", "rft", "sft", "ppo", "dpo"])
def test_methods_train_tower_and_text(method, base, tmp_path):
    found = run(method, base, tmp_path / "run", reward=lambda completion, row, hint: len(completion) % 2)
    assert found.result["test"]["n"] == 4 and found.metrics[0]["forward"] == "shared"
    gaps = [m.get("sampling/sampling_logp_difference/max", 0.0) for m in found.metrics[1:]]
    assert max(gaps) < 1e-4, "the sampler and the trainer see the same pictures"
    names = moved(tmp_path / "run", base)
    assert any("vision_model" in n for n in names) and any("text_model" in n for n in names)
    assert any("connector" in n for n in names)


def test_saved_model_answers_as_the_run_did(base, tmp_path):
    """Processor and model of the saved folder, by transformers alone."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    found = run("uft", base, tmp_path / "run")
    folder = tmp_path / "run" / "model"
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert model.config.text_config._attn_implementation != "unift"
    row = ROWS[6]
    text = processor.apply_chat_template(row["prompt"], add_generation_prompt=True)
    inputs = processor(text=text, images=row["images"], return_tensors="pt")
    with torch.no_grad():
        logp = model(**inputs).logits[0, -1].log_softmax(-1)
    again = unift.evaluate(folder, ROWS[6:], **{"eval.max_tokens": 4})
    assert again.greedy.accuracy == found.result["test"]["accuracy"]
    assert torch.isfinite(logp).all()
    loaded, _ = found.model()
    assert type(loaded) is type(model)


@pytest.mark.parametrize("stop", [1, 3])
def test_a_stopped_run_continues_bit_for_bit(base, tmp_path, stop):
    run("uft", base, tmp_path / "whole")
    run("uft", base, tmp_path / "parts", on_step=lambda step, metrics: step == stop)
    assert not (tmp_path / "parts" / "result.json").exists()
    run("uft", base, tmp_path / "parts")
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    clocks = ("time", "second")
    one, two = (
        [
            {k: v for k, v in m.items() if not any(c in k for c in clocks)}
            for m in read_metrics(tmp_path / n / "metrics.jsonl")
        ]
        for n in ("whole", "parts")
    )
    assert one == two


def test_a_changed_picture_is_other_data(base, tmp_path):
    run("sft", base, tmp_path / "run", on_step=lambda step, metrics: step == 2)
    changed = [dict(row) for row in ROWS[:6]]
    changed[3] = changed[3] | {"images": [changed[3]["images"][0], zoo.noise(999)]}
    with pytest.raises(unift.UniftError, match="other"):
        how = {k: v for k, v in TINY.items() if not k.startswith("sample")}
        unift.train("sft", model=base, train=changed, test=ROWS[6:], run=tmp_path / "run", quiet=True, **how)


@pytest.mark.parametrize("lora", [None, 4])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_tower_is_trained_or_not(base, tmp_path, lora, frozen):
    run("uft", base, tmp_path / "run", model__lora=lora, model__freeze_vision=frozen)
    names = moved(tmp_path / "run", base)
    assert any("text_model" in n for n in names)
    assert any("vision_model" in n or "connector" in n for n in names) != frozen
    if lora:  # adapters alone load on the base with peft, and give the saved model
        from peft import PeftModel
        from transformers import AutoModelForImageTextToText

        wrapped = PeftModel.from_pretrained(
            AutoModelForImageTextToText.from_pretrained(base), tmp_path / "run" / "adapter"
        )
        merged, saved = wrapped.merge_and_unload().state_dict(), load(tmp_path / "run" / "model")
        assert all(torch.allclose(merged[n], saved[n], atol=1e-6) for n in saved)


def test_freezing_a_model_of_text_is_an_error(tmp_path):
    with pytest.raises(unift.UniftError, match="takes no pictures"):
        unift.train("rft", recipe="lock", run=tmp_path, quiet=True, **{"model.freeze_vision": True, "train.steps": 1})


def test_the_report_shows_the_pictures(base, tmp_path):
    found = run("uft", base, tmp_path / "run")
    stored = found.rollouts(1)
    assert len(stored) == 2
    kept = sorted((tmp_path / "run" / "pictures").glob("*.png"))
    assert 4 <= len(kept) <= 12  # two a row, each once
    page = found.report().read_text(encoding="utf-8")
    assert page.count('<img alt="picture" src="data:image/png;base64,') >= 4
    assert "img-src data:" in page


def test_a_model_on_the_plain_path_trains_on_pictures(tmp_path):
    """Gemma 3 attends in both directions over a picture."""
    base = zoo.saved(tmp_path / "base", "gemma3")
    found = run("uft", base, tmp_path / "run", train__steps=2, data__max_prompt=200)
    forward = found.metrics[0]["forward"]
    assert forward.startswith("plain (Gemma3ForConditionalGeneration: ") and "differ" in forward
    assert max(m["sampling/sampling_logp_difference/max"] for m in found.metrics[1:]) < 1e-4
    assert any("vision_tower" in name for name in moved(tmp_path / "run", base))


def test_a_loaded_model_comes_with_its_processor(tmp_path):
    model, processor = zoo.idefics3()
    how = {k: v for k, v in TINY.items() if not k.startswith("sample")} | {"train.steps": 1}
    found = unift.train("sft", model=model, tokenizer=processor, train=ROWS[:4], run=tmp_path, quiet=True, **how)
    assert found.result["steps"] == 1


def test_doctor_and_a_dry_run_know_the_model(base, tmp_path, capsys, monkeypatch):
    from transformers import AutoModelForImageTextToText

    from unift.commands.cli import main
    from unift.rows.inspect import write_rows

    write_rows(unift.load_rows(ROWS[:6]), tmp_path / "train.jsonl")
    words = [f"data.train={tmp_path}/train.jsonl", f"model.path={base}", "sample.max_tokens=40", "threads=1"]
    for command in (["train", "--method", "uft", "--dry-run", *words], ["doctor", "--method", "uft", *words]):
        monkeypatch.setattr(sys, "argv", ["unift", *command])
        with contextlib.suppress(SystemExit):
            main()
        text = capsys.readouterr().out
        if "--dry-run" in command:
            numbers = AutoModelForImageTextToText.from_pretrained(base).num_parameters()
            assert f"memory: {numbers / 1e6:.1f} M parameters" in text, "tower and connector are counted"
    assert "the model has 512 positions" in text
    with pytest.raises(unift.UniftError, match="more than the 512 positions"):
        unift.train("uft", model=base, train=ROWS[:4], run=tmp_path / "run", quiet=True, **{"sample.max_tokens": 500})


@pytest.mark.dist
def test_two_processes_make_the_update_of_one(base, tmp_path):
    from unift.rows.inspect import write_rows

    for name, rows in (("train", ROWS[:6]), ("test", ROWS[6:])):
        write_rows(unift.load_rows(rows), tmp_path / f"{name}.jsonl")
    words = [f"{k}={json.dumps(v)}" for k, v in TINY.items()]
    words += [f"data.train={tmp_path}/train.jsonl", f"data.test={tmp_path}/test.jsonl", f"model.path={base}"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    for n in (1, 2):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", "-m", "unift"]
        command = [*launch, "train", "--method", "uft", f"run={tmp_path}/run{n}", *words]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    one, two = (torch.load(tmp_path / f"run{n}" / "checkpoints" / checkpoint.step_name(1) / "state.pt") for n in (1, 2))
    for name, w in one["weights"].items():
        assert torch.allclose(w, two["weights"][name], atol=2e-5), name
    assert Path(tmp_path / "run2" / "result.json").is_file()
