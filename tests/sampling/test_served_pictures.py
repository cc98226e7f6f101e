"""Rows with pictures and a server: what goes there, what comes back, and what is noticed when the two sides differ."""

from __future__ import annotations

import base64
import io
import json
import threading
import time

import numpy as np
import pytest
import torch
import vision_zoo as zoo
from conftest import char_tokenizer
from engine_twins import agree_over_a_change
from fake_vllm import Fake
from PIL import Image
from safetensors.torch import load_file

import unift
from unift.commands.doctor import engine as doctor
from unift.config.resolve import resolve
from unift.config.surroundings import Engine as Settings
from unift.config.surroundings import Model
from unift.model.load import load_policy, save_pretrained
from unift.rows import dataset
from unift.rows.pictures import as_url, opened, picture
from unift.rows.readers import rows_of
from unift.rows.tokens import encode_rows
from unift.sampling.engines import pictures, served
from unift.sampling.engines.base import Draws, Request
from unift.sampling.engines.choose import open_engine
from unift.training.run.checkpoint import fingerprint
from unift.training.run.metrics import read_metrics
from unift.types import EngineError

LENGTH = 160


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return zoo.saved(tmp_path_factory.mktemp("base"))


@pytest.fixture
def policy(base):
    return load_policy(Model(path=base, device="cpu"))


def settings(fake, **other):
    return Settings(kind="vllm", url=fake.url, timeout=10.0, **other)


def encoded(policy, n=3, pictures=2):
    return encode_rows(policy.tokenizer, rows_of(zoo.rows(n, pictures)), 400)


def test_a_server_sees_what_the_policy_sees(policy, base, tmp_path):
    """Prompts with no, one and two pictures, with and without a hint: greedy tokens and log-probs equal the native engine's before
    and after a change of all weights, tower included; a picture travels once a group."""
    rows = [e for n in (0, 1, 2) for e in encoded(policy, 2, n)]
    asked = [Request(e.prompt + e.solution[:k], None, e.shown) for e in rows for k in (0, 3)]
    with Fake(tmp_path / "served", length=LENGTH, model=base) as fake:
        with (
            open_engine(settings(fake), policy, tmp_path, LENGTH) as engine,
            open_engine(Settings(), policy, tmp_path, LENGTH) as own,
        ):
            before, after = agree_over_a_change(policy, engine, own, asked, 8, 1e-5)
            fake.pictures.clear()
            group = [Request(e.prompt, Draws(("group", i), 5, 5, 8), e.shown) for i, e in enumerate(rows)]
            assert [len(g) for g in engine.generate(group, 8, 0.9)] == [5] * 6
            assert sorted(len(urls) for urls in fake.pictures) == [1, 1, 2, 2]
    assert [x.logps for x in before] != [x.logps for x in after]


FAULTS = {
    "old": "does not say which prompt it completed",
    "no pictures": r"HTTP 400, .*At most 0 image\(s\).* Does vLLM serve this model with that many pictures",
    "other processor": "completed a prompt of {more} tokens, 8 of them places of pictures; here it has {n}, 8 of them .* at token",
}


@pytest.mark.parametrize("mode", FAULTS)
def test_a_server_that_sees_something_else_is_found_out(policy, base, tmp_path, mode):
    """By the first prompt of a run as by the doctor, both before anything is trained."""
    e = encoded(policy)[0]
    says = FAULTS[mode].format(n=len(e.prompt), more=len(e.prompt) + 2)
    with Fake(tmp_path / "served", mode, length=LENGTH, model=base) as fake:
        with open_engine(settings(fake), policy, tmp_path, LENGTH) as engine:
            engine.sync(policy, lambda: fingerprint(policy))
            with pytest.raises(EngineError, match=says):
                engine.generate([Request(e.prompt, None, e.shown)], 4)
        run = config(fake, base, tmp_path)
        data = dataset.encode(policy.tokenizer, dataset.Dataset(rows_of(zoo.rows(3, 2)), []), run)
        with pytest.raises(EngineError, match=says):
            doctor.check(run, policy.tokenizer, data)


@pytest.mark.parametrize(
    "theirs, says",
    [
        ([5, 9, 9, 9, 6], "5 tokens, 3 of them places of pictures; here it has 4, 2 of them .* at token 3"),
        ([5, 9, 9], "3 tokens, 2 of them places of pictures; here it has 4, 2 of them .* at token 3"),
        ([7, 9, 9, 6], "4 tokens, 2 of them places of pictures; here it has 4, 2 of them .* at token 0"),
        (None, "does not say"),
    ],
)
def test_two_prompts_that_differ_are_told_with_both_numbers(theirs, says):
    pictures.check("URL", [5, 9, 9, 6], [5, 9, 9, 6], {9})
    with pytest.raises(EngineError, match=says):
        pictures.check("URL", theirs, [5, 9, 9, 6], {9})


def test_the_doctor_tries_prompts_with_pictures(policy, base, tmp_path):
    """Also where the first rows have none; weights of the tower that stay behind are seen."""
    rows = [*rows_of(zoo.rows(3, 0)), *rows_of(zoo.rows(2, 2))]
    for mode, ok in (("", True), ("keeps tower", False)):
        with Fake(tmp_path / f"served {mode}", mode, length=LENGTH, model=base) as fake:
            run = config(fake, base, tmp_path)
            fine, text = doctor.check(
                run, policy.tokenizer, dataset.encode(policy.tokenizer, dataset.Dataset(rows, []), run)
            )
        assert fine is ok and "behind prompts with pictures" in text, text


def config(fake, base, folder):
    engine = {"kind": "vllm", "url": fake.url, "timeout": 10.0, "gap_limit": 1e-4}
    sizes = {"model": {"path": base}, "data": {"train": "rows.jsonl"}, "sample": {"max_tokens": 8}}
    return resolve(method="uft", overrides={"run": str(folder / "run"), "engine": engine, "threads": 1, **sizes})


def trained(fake, base, folder, **more):
    how = {
        "train.steps": 4,
        "train.prompts": 2,
        "train.lr": 1e-2,
        "train.warmup": 0,
        "sample.completions": 3,
        "threads": 1,
    }
    how |= {"sample.max_tokens": 8, "eval.max_tokens": 4, "engine.kind": "vllm", "engine.timeout": 10.0}
    rows = zoo.rows(10, 2)
    how |= {"engine.url": fake.url, "engine.gap": "fail", "engine.gap_limit": 1e-4} | more
    return unift.train(
        "uft",
        model=base,
        train=rows[:6],
        test=rows[6:],
        run=folder,
        quiet=True,
        reward=lambda completion, row, hint: len(completion) % 2,
        **how,
    )


def gaps(folder):
    found = read_metrics(folder / "metrics.jsonl")
    return [m["sampling/sampling_logp_difference/max"] for m in found if m["step"] > 0]


@pytest.mark.parametrize("frozen", [False, True])
def test_a_run_trains_the_tower_and_samples_from_it(base, tmp_path, frozen):
    with Fake(tmp_path / "served", length=LENGTH, model=base) as fake:
        trained(fake, base, tmp_path / "run", **{"model.freeze_vision": frozen})
        assert fake.pictures
    assert len(gaps(tmp_path / "run")) == 4 and max(gaps(tmp_path / "run")) < 1e-4
    old, new = (load_file(f / "model.safetensors") for f in (tmp_path / "served", tmp_path / "run" / "model"))
    assert frozen is not any(not torch.equal(old[n], new[n]) for n in old if "vision_model" in n)


def test_a_tower_that_stays_behind_stops_the_run(base, tmp_path):
    with Fake(tmp_path / "served", "keeps tower", length=LENGTH, model=base) as fake:
        with pytest.raises(EngineError, match="engine.gap_limit=0.0001"):
            trained(fake, base, tmp_path / "run")
    assert 1 <= len(gaps(tmp_path / "run")) < 4  # the first step has the weights that the server began with


# ---------------------------------------------------------------------------------------------- what travels


def files():
    """(name, bytes of a file, is it sent as it is): every kind that a plain reader and `opened` may read differently."""
    plain = zoo.noise(0, 24, 16)
    clear = plain.convert("RGBA")
    clear.putalpha(Image.fromarray(np.arange(24 * 16, dtype=np.uint8).reshape(16, 24)))
    turned = Image.Exif()
    turned[0x0112] = 6
    upright = Image.Exif()
    upright[0x0112] = 1
    kinds = {
        "png": (plain, "PNG", {}, True),
        "jpeg": (plain, "JPEG", {}, True),
        "upright": (plain, "JPEG", {"exif": upright}, True),
        "turned": (plain, "JPEG", {"exif": turned}, False),
        "turned png": (plain, "PNG", {"exif": turned}, False),
        "see-through": (clear, "PNG", {}, False),
        "palette": (plain.quantize(16), "PNG", {"transparency": 3}, False),
        "grey": (plain.convert("L"), "PNG", {}, False),
        "cmyk": (plain.convert("CMYK"), "JPEG", {}, False),
        "webp": (plain, "WEBP", {"lossless": True}, True),
    }
    for name, (image, kind, how, same) in kinds.items():
        out = io.BytesIO()
        image.save(out, format=kind, **how)
        yield pytest.param(out.getvalue(), same, id=name)


@pytest.mark.parametrize("data, same", list(files()))
def test_a_picture_travels_with_its_very_pixels(data, same):
    """Whoever opens the URL plainly gets what the trainer's processor gets; a file that is such already is not packed anew."""
    found = picture(data, "row 1")
    head, _, text = as_url(found).partition(",")
    sent = base64.b64decode(text, validate=True)
    image = Image.open(io.BytesIO(sent))
    assert head == f"data:image/{image.format.lower()};base64" and image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.asarray(opened(found)))
    assert (sent == data) is same


def test_threads_that_open_pictures_leave_pillows_limit_as_it_was(monkeypatch):
    """It is one for all threads, and calls to a server are made in several: here the second begins while the first is at it."""
    data, limit, real = zoo.png(zoo.noise(0)), Image.MAX_IMAGE_PIXELS, Image.open

    def slowly(file):
        time.sleep(0.2)
        return real(file)

    monkeypatch.setattr(Image, "open", slowly)
    threads = [threading.Thread(target=picture, args=(data, "row 1")) for _ in range(2)]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    assert limit is not None and limit == Image.MAX_IMAGE_PIXELS


# PaliGemma's and Mllama's processors put a token before the text, too: there the server's answer tells the two apart.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
@pytest.mark.parametrize("family", [*zoo.SHARED, "gemma3"])
def test_a_prompt_is_kept_with_one_place_a_picture(family):
    """Before and behind the pictures it is, token for token, the prompt that the model gets."""
    policy, _, _ = zoo.policy(family)
    place = policy.tokenizer.convert_tokens_to_ids(policy.reader.token)
    for e in encoded(policy, 2):
        short, own = list(e.shown.unexpanded), e.prompt
        assert short.count(place) == 2 and e.shown.prompt == len(own)
        first, last = short.index(place), len(short) - short[::-1].index(place)
        assert short[:first] == own[:first] and short[last:] == own[len(own) - len(short) + last :]


def experts(folder):
    """The folder of a model of text whose experts are one tensor in memory."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    tokenizer, small = char_tokenizer(), {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        **sizes, **small, vocab_size=len(tokenizer), num_key_value_heads=2, shared_expert_intermediate_size=16
    )
    Qwen2MoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", ["idefics3", "llava", "gemma3", "mllama", "experts"])
def test_weights_travel_under_the_names_of_a_saved_model(family, tmp_path):
    """Llava's and others' are called otherwise in memory, experts are one tensor there. Tied weights travel, too."""
    made = experts(tmp_path / "base") if family == "experts" else zoo.saved(tmp_path / "base", family)
    policy = load_policy(Model(path=made, device="cpu"))
    save_pretrained(policy, tmp_path / "saved")
    saved, sent = load_file(tmp_path / "saved" / "model.safetensors"), served.state(policy)
    assert saved.keys() <= sent.keys() and all(torch.equal(saved[name], sent[name]) for name in saved)
    assert {name.rpartition("lm_head")[1] for name in sent.keys() - saved.keys()} <= {"lm_head"}
    served.write_model(policy, tmp_path / "served")
    assert load_file(tmp_path / "served" / "model.safetensors").keys() == sent.keys()
    assert json.loads((tmp_path / "served" / "config.json").read_text())["tie_word_embeddings"] is False
