"""Engines behind one protocol: native, plain, and a server over HTTP (here one that speaks vLLM's routes, with every fault)."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from fake_vllm import Fake
from typer.testing import CliRunner

from unift.commands import serve
from unift.commands.cli import app
from unift.commands.doctor import engine as doctor
from unift.config.resolve import resolve
from unift.config.surroundings import Engine as Settings
from unift.config.surroundings import Model
from unift.model.load import load_policy, save_pretrained
from unift.model.logprobs import logprobs
from unift.model.packs import COMPLETION, Item, Member, pack
from unift.objectives.weights import weigh
from unift.rows import dataset
from unift.rows.tasks import make_rows
from unift.sampling.engines.base import Draws, Request
from unift.sampling.engines.choose import open_engine
from unift.sampling.groups import completed
from unift.training.loop import train
from unift.training.run.checkpoint import fingerprint
from unift.training.sampler_gap import check
from unift.training.update import losses_of
from unift.types import ConfigError, EngineError

TIMEOUT = 2.0


@pytest.fixture
def policy():
    return load_policy(Model(path="embedded:lock", device="cpu"))


def settings(fake=None, **other):
    return Settings(kind="vllm", url=fake.url if fake else "http://127.0.0.1:9", timeout=TIMEOUT, **other)


def asked(policy, n=4, g=3, width=16):
    rows = make_rows("lock", n, 0, "train", length=5)
    prompts = [policy.tokenizer(r.prompt, add_special_tokens=False).input_ids for r in rows]
    return [Request(p, Draws(("test", i), g, g, width)) for i, p in enumerate(prompts)]


# ---------------------------------------------------------------------------------------------- the protocol


@pytest.mark.parametrize("kind", ["native", "plain"])
def test_engines_of_this_process_draw_the_same_tokens(policy, tmp_path, kind):
    """Same addresses, same tokens; log-probs up to rounding; and rows ``first`` to ``first + n`` of a larger draw."""
    requests = asked(policy)
    with open_engine(Settings(), policy, tmp_path, 64) as engine:
        usual = engine.generate(requests, 16, 0.8)
    with open_engine(Settings(kind=kind), policy, tmp_path, 64) as engine:
        engine.sync(policy, lambda: pytest.fail("an engine without a copy has no version"))
        got = engine.generate(requests, 16, 0.8)
        part = engine.generate(
            [Request(r.prompt, Draws(r.draws.address, 2, 3, 16, first=1)) for r in requests], 16, 0.8
        )
    for group, other, last in zip(usual, got, part, strict=True):
        assert [s.tokens for s in group] == [s.tokens for s in other]
        assert [s.tokens for s in last] == [s.tokens for s in group[1:]]
        for s, o in zip(group, other, strict=True):
            assert np.allclose(s.logps, o.logps, atol=1e-5)


def test_a_served_model_completes_as_the_policy_does(policy, tmp_path):
    """Greedy tokens and log-probs of the server's own copy equal the native engine's, before and after a change of the
    weights; the version is the weights' own, and the prefix cache is emptied once a change."""
    greedy = [Request(r.prompt, None) for r in asked(policy)]
    with Fake(tmp_path / "served") as fake, open_engine(settings(fake), policy, tmp_path, 64) as engine:
        with open_engine(Settings(), policy, tmp_path, 64) as own:
            for change in (0.0, 0.1):
                with torch.no_grad():
                    for p in policy.parameters():
                        p += change * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
                for _ in range(2):  # the second time nothing has to travel
                    engine.sync(policy, lambda: fingerprint(policy))
                assert fake.version.endswith(fingerprint(policy))
                for mine, theirs in zip(own.generate(greedy, 16), engine.generate(greedy, 16), strict=True):
                    assert mine[0].tokens == theirs[0].tokens and mine[0].finished == theirs[0].finished
                    assert np.allclose(mine[0].logps, theirs[0].logps, atol=1e-5)
        assert fake.resets == 2
        again = [completed(engine, policy.tokenizer, asked(policy), 16, 0.7) for _ in range(2)]
    assert again[0] == again[1]
    assert not list((tmp_path / "engine").glob("**/*")), "weights are left behind"


def test_a_folder_for_weights_keeps_what_is_not_the_engines(policy, tmp_path):
    """engine.folder may be a place that others use, /dev/shm say."""
    place = tmp_path / "shm"
    place.mkdir()
    (place / "precious").write_text("of someone else")
    (place / "weights-0a0a0a0a-1").mkdir()  # of another run that is just sending
    with Fake(tmp_path / "served") as fake:
        with open_engine(settings(fake, folder=str(place)), policy, tmp_path, 64) as engine:
            engine.sync(policy, lambda: fingerprint(policy))
            (place / f".weights-{engine.own}-2.tmp").mkdir()  # of a write that failed
        assert sorted(p.name for p in place.iterdir()) == ["precious", "weights-0a0a0a0a-1"]
        with open_engine(settings(fake, folder=str(tmp_path / "new")), policy, tmp_path, 64) as engine:
            engine.sync(policy, lambda: fingerprint(policy))
        assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------------------------- faults

BEFORE = {
    "html": "no JSON, so no vLLM server",
    "paused": "is paused",
}
FAULTS = {
    "stalls": "gave no answer for 2 s",
    "paused": "it is paused",
    "dies": "went away|refuses connections",
    "fails": "HTTP 500, .*EngineCore encountered an issue",
    "restarts": "by weights default, expected",
    "too few": "2 completions of a prompt, expected 3",
    "nonsense": "an answer of an unknown form",
    "cut": "cut after 1 of 16 tokens|of 1 tokens",
}


def test_no_server_and_wrong_servers_are_told_apart(policy, tmp_path):
    with (
        pytest.raises(EngineError, match="refuses connections: no server listens there"),
        open_engine(settings(), policy, tmp_path, 64),
    ):
        pass
    for mode, says in BEFORE.items():
        with Fake(tmp_path / mode, mode, after=-1) as fake, pytest.raises(EngineError, match=says):
            with open_engine(settings(fake), policy, tmp_path, 64):
                pass
    with Fake(tmp_path / "short", length=20) as fake:
        with pytest.raises(EngineError, match="takes 20 tokens .* needs 64: it would cut"):
            with open_engine(settings(fake), policy, tmp_path, 64):
                pass
        config = json.loads((fake.folder / "config.json").read_text())
        (fake.folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
        with pytest.raises(EngineError, match="embeddings and head are tied"):
            with open_engine(settings(fake), policy, tmp_path, 20):
                pass


@pytest.mark.parametrize("mode", FAULTS)
def test_every_fault_is_named_before_its_deadline(policy, tmp_path, mode):
    with Fake(tmp_path / "served", mode) as fake, open_engine(settings(fake), policy, tmp_path, 64) as engine:
        engine.sync(policy, lambda: fingerprint(policy))
        began = time.monotonic()
        with pytest.raises(EngineError, match=FAULTS[mode]):
            engine.generate(asked(policy), 16, 0.7)
        assert time.monotonic() - began < TIMEOUT + 5


def test_a_cache_that_is_not_emptied_is_an_error(policy, tmp_path):
    with Fake(tmp_path / "served", "cache stays") as fake, open_engine(settings(fake), policy, tmp_path, 64) as engine:
        with pytest.raises(EngineError, match="could not empty its prefix cache"):
            engine.sync(policy, lambda: fingerprint(policy))


def test_what_a_server_cannot_do_is_refused(policy, tmp_path):
    with Fake(tmp_path / "served") as fake, open_engine(settings(fake), policy, tmp_path, 64) as engine:
        with pytest.raises(EngineError, match="before it was given weights"):
            engine.generate(asked(policy), 16)
        engine.sync(policy, lambda: "1")
        with pytest.raises(ConfigError, match=r"sample.temperature=0.001"):
            engine.generate(asked(policy), 16, 0.001)
        with pytest.raises(EngineError, match="take more than the 64"):
            engine.generate(asked(policy), 60)


# ---------------------------------------------------------------------------------------------- a run


def config(tmp_path, fake, **other):
    engine = {"kind": "vllm", "url": fake.url, "timeout": 5.0, **other.pop("engine", {})}
    over = {
        "run": str(tmp_path / "run"),
        "engine": engine,
        "train": {"steps": 4, "prompts": 4, "lr": 1e-2, "warmup": 0},
        "eval": {"every": 0, "train_rows": 0},
        "save": {"every": 1, "rollouts": True},
        "data": {"test_rows": 8, "train_rows": 16},
        "log": {"gradients_every": 0},
        "threads": 1,
        **other,
    }
    return resolve(recipe="lock", method="uft", overrides=over)


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [m for m in lines if m["step"] > 0]


GAP = "sampling/sampling_logp_difference/mean"


def test_a_run_samples_from_the_weights_it_has_just_trained(tmp_path):
    with Fake(tmp_path / "served") as fake:
        train(config(tmp_path, fake), tmp_path / "run")
        assert fake.resets >= 4
    gaps = [m[GAP] for m in metrics(tmp_path / "run")]
    assert len(gaps) == 4 and max(gaps) < 1e-5


@pytest.mark.parametrize("mode", ["keeps head", "keeps weights"])
def test_weights_that_do_not_arrive_stop_the_run(tmp_path, mode):
    """Without the head under its own name, or with no weights at all, the gap shows it; engine.gap=fail ends the run."""
    strict = {"gap": "fail", "gap_limit": 1e-3}
    with Fake(tmp_path / "served", mode) as fake, pytest.raises(EngineError, match="engine.gap_limit=0.001"):
        train(config(tmp_path, fake, engine=strict), tmp_path / "run")
    assert 1 <= len(metrics(tmp_path / "run")) < 4  # the first step has the weights that the server began with


def test_a_run_goes_on_after_its_server_died(tmp_path):
    """The run ends with the cause, its checkpoint stays, and the same command with another server ends as if nothing had
    been."""
    with Fake(tmp_path / "whole") as fake:
        usual = train(config(tmp_path, fake, run=str(tmp_path / "usual")), tmp_path / "usual")
    with Fake(tmp_path / "served", "dies", after=2 + 8 + 4) as fake:
        with pytest.raises(EngineError, match="went away|refuses connections"):
            train(config(tmp_path, fake), tmp_path / "run")
    done = len(metrics(tmp_path / "run"))
    assert 0 < done < 4
    with Fake(tmp_path / "second") as fake:
        result = train(config(tmp_path, fake), tmp_path / "run")
    assert result["test"] == usual["test"]
    same = ("reward", "loss", "grad/norm", GAP)
    for one, other in zip(metrics(tmp_path / "run"), metrics(tmp_path / "usual"), strict=True):
        assert [one[k] for k in same] == [other[k] for k in same]


# ---------------------------------------------------------------------------------------------- the gap


@pytest.mark.parametrize("cap", [2.0, 0.9])
def test_truncated_importance_weights_from_tokens_to_gradient(policy, cap):
    """e_t = min(p / q, cap) A / Z of every sampled token, with p by the model's own forward in float64 and q as recorded; hint and
    demonstration are as they were."""
    base = load_policy(Model(path="embedded:lock", device="cpu", dtype="float64", forward="plain")).base
    prompt, hint, members, scores = [5, 6, 7], [8, 9], [[10, 11, 12], [13, 14]], (1.0, -0.5)
    apart = [[0.3, -0.2, 1.5], [-0.9, 0.8]]  # log p - log q
    own = []
    for tokens in members:
        with torch.no_grad():
            logits = base(input_ids=torch.tensor([prompt + hint + tokens])).logits[0].double()
        own.append(torch.log_softmax(logits[4:-1], -1)[range(len(tokens)), tokens].tolist())
    recorded = [[p - d for p, d in zip(*pair, strict=True)] for pair in zip(own, apart, strict=True)]
    rules = resolve(recipe="lock", method="uft", overrides={"reference": {"kl": 0.0}})
    parts = zip(members, scores, recorded, strict=True)
    items = [Item(prompt, hint, [Member(t, COMPLETION, a, q) for t, a, q in parts])]
    batch = pack(items, [0], weigh(items, rules), rules)
    l_S = logprobs(policy, batch)[0].detach().requires_grad_()
    made = losses_of(l_S, torch.zeros_like(l_S), None, batch, rules, Settings(gap="correct", cap=cap))
    (e_S,) = torch.autograd.grad(-made["policy"], l_S)
    expected = [min(math.exp(d), cap) * a / 5 for a, ds in zip(scores, apart, strict=True) for d in ds]
    own_S = batch.role_S == COMPLETION
    assert np.allclose(e_S[own_S], expected, rtol=1e-4) and not bool(e_S[~own_S].any())
    free = losses_of(l_S, torch.zeros_like(l_S), None, batch, rules, Settings())
    assert torch.equal(free["likelihood"], made["likelihood"]) and not torch.equal(free["policy"], made["policy"])


def test_gap_says_or_stops(policy):
    check(0.1, Settings(gap="fail"))
    check(9.0, Settings(gap="correct"))
    with pytest.warns(RuntimeWarning, match="differ by more than engine.gap_limit=0.1"):
        check(0.11, Settings())
    with pytest.raises(EngineError, match="differ by 0.11 nats"):
        check(0.11, Settings(gap="fail"))
    with pytest.raises(ConfigError, match="engine.gap=correct weighs tokens one by one"):
        resolve(recipe="lock", method="dpo", overrides={"engine": {"gap": "correct"}})


# ---------------------------------------------------------------------------------------------- serve, doctor


def test_doctor_tries_the_pair(policy, tmp_path):
    for mode, ok in (("", True), ("keeps weights", False), ("keeps head", False)):
        with Fake(tmp_path / f"served {mode}", mode) as fake:
            run = config(tmp_path, fake, engine={"gap_limit": 1e-3})
            data = dataset.encode(policy.tokenizer, dataset.load(run, None), run)
            fine, text = doctor.check(run, policy.tokenizer, data)
        assert fine is ok, text


def test_the_line_of_serve(tmp_path, capsys):
    """It is printed and nothing written; each flag that a run depends on is in it."""
    from unift.commands.cli import app

    folder = tmp_path / "served"
    words = [
        "serve",
        "embedded:lock",
        "--python",
        "/x/python",
        "--length",
        "96",
        "--cpu",
        "--print",
        "--folder",
        str(folder),
    ]
    app(words, standalone_mode=False)
    line = " ".join(capsys.readouterr().out.split())
    assert line.startswith("VLLM_SERVER_DEV_MODE=1 ") and "/x/python -m vllm.entrypoints.openai.api_server" in line
    for flag in ("--max-model-len 96", "--logprobs-mode processed_logprobs", "--enable-scale-out", "--host 127.0.0.1",
                 "--generation-config vllm", "--no-enable-chunked-prefill --max-num-batched-tokens 96"):  # fmt: skip
        assert flag in line
    assert not folder.exists()
    with pytest.raises(ConfigError, match="heads of 16 numbers"):
        serve.make_folder(serve.Order("embedded:lock", folder, "python", 96, 8, 8000, "float32", True, False))
    with pytest.raises(ConfigError, match="is no interpreter"):
        serve.start(serve.Order("embedded:lock", folder, "/nowhere/python", 96, 8, 8000, "float32", False, False))


def test_serve_replaces_a_served_model_and_nothing_else(policy, tmp_path):
    """--folder with the model itself, or any folder of one's own, would be removed."""
    model = tmp_path / "model"
    save_pretrained(policy, model)
    kept = {p.name: p.read_bytes() for p in model.iterdir()}
    for folder in (model, tmp_path, model / "config.json"):
        order = serve.Order(str(model), folder, "python", 96, 8, 8000, "float32", False, False)
        with pytest.raises(ConfigError, match="holds files that are no served model"):
            serve.make_folder(order)
    assert {p.name: p.read_bytes() for p in model.iterdir()} == kept
    (tmp_path / "empty").mkdir()
    for _ in range(2):
        serve.make_folder(replace(order, folder=tmp_path / "empty"))
        served = load_policy(Model(path=str(tmp_path / "empty"), device="cpu"))
        assert not served.base.config.tie_word_embeddings
        for name, w in policy.base.state_dict().items():
            assert torch.equal(served.base.state_dict()[name], w)
    assert not list(tmp_path.glob(".*"))


def test_copies_and_parts_of_a_server(tmp_path):
    words = ["serve", "embedded:lock", "--print", "--folder", str(tmp_path / "served"), "--host", "10.0.0.5"]
    made = {}
    for more in ([], ["--data-parallel", "4"], ["--tensor-parallel", "2"]):
        out = CliRunner().invoke(app, [*words, *more])
        assert out.exit_code == 0, out.output
        made[tuple(more)] = out.output.split()
        assert made[tuple(more)][made[tuple(more)].index("--host") + 1] == "10.0.0.5"
    alone, copies, parts = made.values()
    assert copies == [*alone, "--data-parallel-size", "4"] and parts == [*alone, "--tensor-parallel-size", "2"]
