"""Models that the shared-prefix path does not reproduce: chosen when loaded, and the same numbers by their own forward."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import (
    VOCAB,
    FakeTokenizer,
    close,
    gradients,
    make_items,
    packed_loss,
    random_tokens,
    settings,
    tiny_policy,
)
from kills import killed
from plain import uft_loss
from test_packed import naive

from unift.config.resolve import parse_overrides, resolve
from unift.config.stages import longest
from unift.model import attention, paths, plain
from unift.model.load import load_policy, load_tokenizer
from unift.model.logprobs import logprobs
from unift.model.packs import pack
from unift.model.policy import Policy
from unift.objectives.weights import weigh
from unift.sampling.engines.base import Request
from unift.sampling.engines.choose import generate
from unift.training import loop
from unift.training.loop import train
from unift.training.run.metrics import read_metrics
from unift.types import ConfigError

CPU = torch.device("cpu")
LONGEST = 60
IDS = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZE |= {"num_key_value_heads": 2, "initializer_range": 0.1}


def tiny_config(kind, vocabulary=VOCAB):
    """Small models of each sort, with windows below the lengths of the tests."""
    import transformers as t

    one = {"vocab_size": vocabulary, **IDS}
    state = {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "initializer_range": 0.3}
    heads = {"expand": 2, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8}
    caps = {"final_logit_softcapping": 1.5, "attn_logit_softcapping": 1.0}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    make = {
        "mistral": lambda: t.MistralConfig(**one, **SIZE, sliding_window=6),
        "mistral-long": lambda: t.MistralConfig(**one, **SIZE, sliding_window=LONGEST),
        "gemma2": lambda: t.Gemma2Config(**one, **SIZE, head_dim=8, sliding_window=6, **caps),
        "granite": lambda: t.GraniteConfig(**one, **SIZE, logits_scaling=4.0, attention_multiplier=0.3),
        "gpt-oss": lambda: t.GptOssConfig(**one, **SIZE, head_dim=8, sliding_window=LONGEST, **experts),
        "mamba": lambda: t.MambaConfig(**one, **state),
        "mamba2": lambda: t.Mamba2Config(**one, **state, **heads),
        "lfm2": lambda: t.Lfm2Config(**one, **SIZE, full_attn_idxs=[1]),
        "rwkv": lambda: t.RwkvConfig(**one, hidden_size=32, num_hidden_layers=4, intermediate_size=48, rescale_every=2),
        "bert": lambda: t.BertConfig(**one, **SIZE),
        "gpt2": lambda: t.GPT2Config(**one, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.1),
    }
    return make[kind]()


def tiny_model(kind, dtype=torch.float32, seed=0, vocabulary=VOCAB):
    from transformers import AutoModelForCausalLM

    attention.register()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, vocabulary)).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and "dt_proj" not in name:  # the initial time steps of Mamba stand in a bias
                parameter.normal_(0, 0.1)
    return model


def chosen(kind, dtype=torch.float32, seed=0, setting="auto"):
    """(policy, model with the same weights that nothing has touched)."""
    model = tiny_model(kind, dtype, seed)
    stock = copy.deepcopy(model)
    policy = Policy(model, FakeTokenizer(), CPU)
    paths.choose(policy, setting, LONGEST)
    return policy, stock


def both_paths(kind="llama", dtype=torch.float64, seed=0):
    """A model of the shared-prefix tests, sent down the plain path, and itself on the shared-prefix path."""
    shared, stock = tiny_policy(dtype, kind, seed=seed)
    policy = Policy(stock, FakeTokenizer(), CPU)
    paths.choose(policy, "plain", LONGEST)
    return policy, shared


# ---------------------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("gpt2", ""),
        ("mistral-long", ""),
        ("mistral", "attention window of 6 tokens cuts sequences of up to 60"),
        ("gemma2", "attention window of 6"),
        ("granite", "more than a product between its last hidden states and its logits"),
        ("gpt-oss", "uses s_aux"),
        ("mamba", "does not let its attention be replaced"),
        ("lfm2", "layers of other kinds .conv."),
    ],
)
def test_the_path_and_why(kind, why):
    policy, stock = chosen(kind)
    assert policy.shared == (not why)
    if why:
        with pytest.raises(ConfigError, match=why):
            paths.check_shared(copy.deepcopy(stock), CPU, LONGEST)
        assert policy.path.startswith(f"plain ({type(stock).__name__}: ") and policy.cached
        with pytest.raises(ConfigError, match=f"model.forward=shared does not fit: .*{why}.*Use model.forward=auto"):
            chosen(kind, setting="shared")
    else:
        assert policy.path == "shared"
    assert copy.deepcopy(policy.model).config._attn_implementation == policy.model.config._attn_implementation


@pytest.mark.parametrize(("kind", "why"), [("gemma2", "more than a product"), ("lfm2", "shared-prefix path differ")])
def test_logits_tell_what_the_config_does_not(monkeypatch, kind, why):
    """Soft caps of an untrained model, and tokens mixed by a convolution inside a model that lets attention be replaced."""
    monkeypatch.setattr(paths, "obstacle", lambda model, longest: "")
    with pytest.raises(paths.Misfit, match=why):
        paths.check_shared(tiny_model(kind), CPU, LONGEST)


def test_window_is_watched_while_training():
    """A sequence longer than the window stops the shared-prefix path, whatever was promised at load."""
    policy, stock = chosen("mistral-long")
    items, config = make_items(), settings("uft", "likelihood.weight=0.3", "reference.kl=0")
    loss, got = packed_loss(policy, items, config)
    expected = uft_loss(stock, None, items, config)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    close(got, gradients(stock), 1e-5)
    with pytest.raises(NotImplementedError, match="sliding_window"):
        generate(policy, [Request([5] * LONGEST, None)], 3)


@pytest.mark.parametrize("setting", ["auto", "shared", "plain"])
def test_a_weight_that_is_not_finite_is_named(setting):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **IDS, **SIZE)).eval()
    attention.register()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    said = (
        "weights of LlamaForCausalLM are damaged: model.layers.1.mlp.up_proj.weight holds numbers that are not finite"
    )
    with pytest.raises(ConfigError, match=said):
        paths.choose(Policy(model, FakeTokenizer(), CPU), setting, LONGEST)


def test_not_causal():
    with pytest.raises(ConfigError, match="BertLMHeadModel is no causal language model"):
        chosen("bert")


def test_rwkv_keeps_its_weights():
    """Outside of training mode RWKV would rescale its weights in place, and a saved model would be wrong."""
    policy, stock = chosen("rwkv")
    logprobs(policy, pack(make_items(), range(3), weigh(make_items(), settings()), settings()))
    assert all(torch.equal(a, b) for a, b in zip(policy.model.parameters(), stock.parameters(), strict=True))
    assert not policy.cached


# ---------------------------------------------------------------------------------------------- loss and gradients


# Of the loss and of the largest gradient. RMSNorm (in Llama and its kin), Mamba's state and so on are computed in float32
# whatever the dtype is; GPT-2 is float64 throughout.
BOUND = {"gpt2": 1e-12, "gemma2": 1e-5, "mamba": 1e-5, "mamba2": 1e-5}


@pytest.mark.parametrize("demo", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_same_as_the_shared_path(kind, demo):
    """Float64 on both paths: loss, gradients, entropies, KL, log-probs token by token."""
    (policy, shared), (reference, shared_reference) = both_paths(kind), both_paths(kind, seed=1)
    bound = BOUND.get(kind, 1e-6)
    assert policy.path == "plain (model.forward=plain)" and shared.shared
    words = ["reference.kl=0.05", "policy.entropy=0.02", "sample.temperature=0.5", "likelihood.weight=0.3"]
    config = settings("uft", *words, *(["likelihood.tokens=demo"] if demo else []))
    items = make_items(members=(4, 4, 1, 0), hints=(0, 1, 6, 5), demo=demo)
    loss, got = packed_loss(policy, items, config, reference=reference)
    other, expected = packed_loss(shared, items, config, reference=shared_reference)
    assert loss == pytest.approx(other, rel=bound)
    close(got, expected, bound)
    small, cut_up = packed_loss(policy, items, config, budget=1, reference=reference)
    assert small == pytest.approx(other, rel=bound)
    close(cut_up, expected, bound)
    batch = pack(items, range(4), weigh(items, config), config)
    for a, b in zip(logprobs(policy, batch, 0.5), logprobs(shared, batch, 0.5), strict=True):
        assert torch.allclose(a, b, rtol=bound, atol=bound)


@pytest.mark.parametrize("kind", ["gpt2", "mistral", "gemma2", "granite", "mamba", "mamba2"])
def test_loss_and_gradients(kind):
    """Against padded copies through the untouched model."""
    # The twin masks its padding; Gemma 2 in float64 makes NaN of an attention window with nothing in it.
    dtype = torch.float32 if kind == "gemma2" else torch.float64
    policy, stock = chosen(kind, dtype, setting="plain" if kind == "gpt2" else "auto")
    assert not policy.shared
    config = settings("uft", "likelihood.weight=0.3", "reference.kl=0", "policy.entropy=0.02", "sample.temperature=0.5")
    items = make_items(members=(4, 3, 1, 0), hints=(0, 1, 6, 5))
    loss, got = packed_loss(policy, items, config)
    expected = uft_loss(stock, None, items, config)
    expected.backward()
    bound = BOUND.get(kind, 1e-6)
    assert loss == pytest.approx(expected.item(), rel=bound)
    close(got, gradients(stock), bound)


def test_rows_of_a_pack():
    """Every member behind its own prefix without its last token; one-token members and hints need no row of their own;
    a forward is never larger than the pack."""
    config = settings("uft", "likelihood.weight=0.3")
    items = make_items(members=(3, 0, 1), hints=(2, 4, 0))
    batch = pack(items, range(3), weigh(items, config), config)
    rows = plain.Rows(batch)
    prefixes = [i.prompt + i.hint for i in items]
    members = [prefixes[0] + m.tokens[:-1] for m in items[0].members if len(m.tokens) > 1]
    assert rows.tokens == [*members, prefixes[1], prefixes[2]]
    read = [rows.tokens[r][c] for r, c in zip(rows.row_S, rows.column_S, strict=True)]
    assert read == batch.tokens_T[batch.at_S].tolist()
    assert rows.total == sum(map(len, rows.tokens))
    chunks = rows.chunks(len(batch.tokens_T))
    assert len(chunks) > 1 and sorted(i for c in chunks for i in c) == list(range(len(rows.tokens)))
    assert all(len(c) * max(len(rows.tokens[i]) for i in c) <= len(batch.tokens_T) for c in chunks)


def test_both_streams_apart():
    """Two backward passes through the same recomputed forwards, as the gradient metrics take them."""
    policy, shared = both_paths("gpt2")
    items, config = make_items(), settings("uft", "likelihood.weight=0.3")
    batch = pack(items, range(3), weigh(items, config), config)
    w_S = torch.linspace(-1, 1, len(batch.target_S), dtype=torch.float64)
    found = []
    for p in (policy, shared):
        l_S, _ = logprobs(p, batch)
        first = torch.autograd.grad((w_S * l_S).sum(), p.parameters(), retain_graph=True)
        found.append([*first, *torch.autograd.grad((w_S.square() * l_S).sum(), p.parameters())])
    close(found[0], found[1], 1e-12)


# ---------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "gemma2", "mamba", "mamba2", "rwkv"])
def test_sampler_equals_the_naive_one(kind):
    """With the model's cache and without, many rows side by side or few, the tokens are those of one row at a time."""
    if kind == "llama":
        policy, _ = both_paths(dtype=torch.float32)
        stock = copy.deepcopy(policy.model)
    else:
        policy, stock = chosen(kind, setting="plain")
    assert policy.cached == (kind != "rwkv")
    rng = np.random.default_rng(3)
    asked = [Request(random_tokens(rng, n), rng.random((g, 12))) for n, g in ((9, 3), (4, 2), (9, 1), (9, 3))]
    expected = [naive(policy.model if kind == "rwkv" else stock, r, 12, 0.8) for r in asked]
    for cached, rows in ((policy.cached, 256), (policy.cached, 1), (False, 256)):
        policy.cached = cached
        got = generate(policy, asked, 12, 0.8, rows=rows)
        assert [[s.tokens for s in g] for g in got] == expected
    flat = [(r, s) for r, g in zip(asked, got, strict=True) for s in g]
    assert {s.finished for _, s in flat} == {True, False}
    for r, s in flat:
        assert s.finished == (s.tokens[-1] == 1)
        with torch.no_grad():
            logp = (
                policy.model(input_ids=torch.tensor([r.prompt + s.tokens]))
                .logits[0, len(r.prompt) - 1 : -1]
                .div(0.8)
                .log_softmax(-1)
            )
        l = logp.gather(1, torch.tensor(s.tokens)[:, None])[:, 0]
        assert torch.allclose(l, torch.tensor(s.logps), atol=1e-5)


@pytest.mark.parametrize("kind", ["mistral", "mamba"])
def test_greedy_equals_generate(kind):
    policy, stock = chosen(kind)
    rng = np.random.default_rng(5)
    asked = [Request(random_tokens(rng, n), None) for n in (12, 5, 9)]
    for request, (sample,) in zip(asked, generate(policy, asked, 15), strict=True):
        out = stock.generate(torch.tensor([request.prompt]), max_new_tokens=15, do_sample=False)[
            0, len(request.prompt) :
        ]
        assert sample.tokens == out.tolist()


# ---------------------------------------------------------------------------------------------- whole runs

RUN = ["train.steps=4", "train.prompts=4", "sample.completions=4", "data.train_rows=8", "data.test_rows=6", "threads=1"]
RUN += [
    "save.every=1",
    "save.keep=9",
    "log.gradients_every=2",
    "reference.kl=0.01",
    "eval.every=2",
    "data.max_prompt=32",
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders with an untrained model and the lock task's tokenizer."""
    tokenizer = load_tokenizer(resolve("uft", recipe="lock").model)
    folders = {}
    for kind in ("mistral", "mamba"):
        folders[kind] = tmp_path_factory.mktemp(kind)
        model = tiny_model(kind, vocabulary=len(tokenizer))
        model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(folders[kind])
        tokenizer.save_pretrained(folders[kind])
    return folders


def run_of(folder, *more):
    return resolve("uft", recipe="lock", overrides=parse_overrides([f"model.path={folder}", *RUN, *more]))


def outcome(folder):
    state = torch.load(folder / "checkpoints" / "step_000004" / "state.pt", weights_only=True)["weights"]
    metrics = [
        {k: v for k, v in m.items() if not k.startswith("time/") and k != "tokens/per_second"}
        for m in read_metrics(folder / "metrics.jsonl")
    ]
    return {n: p.numpy().tobytes() for n, p in state.items()}, metrics


@pytest.mark.parametrize("kind", ["mistral", "mamba"])
def test_run_and_resume(saved, tmp_path, kind):
    """A run that is stopped inside step 3 and continued is the run that was never stopped; what it saves loads plainly."""
    from transformers import AutoModelForCausalLM

    config = run_of(saved[kind])
    result = train(config, tmp_path / "whole")
    assert result["test"]["n"] == 6 and result["tokens_sampled"] > 0
    weights, metrics = outcome(tmp_path / "whole")
    assert metrics[0]["forward"].startswith(f"plain ({'Mamba' if kind == 'mamba' else 'Mistral'}ForCausalLM: ")
    assert metrics[1]["kl"] < 1e-9 < metrics[-1]["kl"]
    assert max(m["sampling/sampling_logp_difference/max"] for m in metrics[1:]) < 1e-4
    assert all(m["tokens/shared_ratio"] < 0.2 for m in metrics[1:])
    with killed(loop, "one_step", 2, error=KeyboardInterrupt):
        train(config, tmp_path / "cut")
    train(config, tmp_path / "cut")
    assert outcome(tmp_path / "cut") == (weights, metrics)
    again = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "model").named_parameters())
    assert all(again[n].detach().numpy().tobytes() == value for n, value in weights.items())


def test_run_with_adapters(saved, tmp_path):
    """LoRA: the reference is the model with its adapters off, so the first step's KL is exactly 0."""
    train(run_of(saved["mistral"], "model.lora={rank: 4}", "train.lr=0.01"), tmp_path)
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert metrics[1]["kl"] == 0 and metrics[-1]["kl"] > 0


def test_adapters_that_do_not_fit(saved):
    with pytest.raises(
        ConfigError, match="model.lora.targets='all-linear' does not fit MambaForCausalLM.*model.lora.targets"
    ):
        load_policy(run_of(saved["mamba"], "model.lora={rank: 4}").model)


def test_plain_and_shared_runs_agree(tmp_path):
    """The demo's own base on both paths: the same tokens are sampled, the losses agree to rounding."""
    found = {}
    for path in ("shared", "plain"):
        config = resolve("uft", recipe="lock", overrides=parse_overrides([*RUN, f"model.forward={path}"]))
        train(config, tmp_path / path)
        found[path] = read_metrics(tmp_path / path / "metrics.jsonl")
    for a, b in zip(found["shared"][1:], found["plain"][1:], strict=True):
        assert a["tokens/sampled"] == b["tokens/sampled"] and a["reward"] == b["reward"]
        for name in ("loss", "kl", "grad/norm", "grad/cosine", "entropy"):
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-6), name


# ---------------------------------------------------------------------------------------------- what a person sees


def test_length_of_a_run():
    config = settings("uft", "data.max_prompt=100", "sample.max_tokens=20")
    assert longest(config) == 120
    assert longest(settings("uft", "data.max_prompt=100", "sample.max_tokens=20", "eval.max_tokens=50")) == 150


def test_one_line_says_so(saved, capsys):
    from unift.commands.display import Live
    from unift.commands.doctor import diagnose
    from unift.training.evaluate import evaluate_split

    text = str(evaluate_split(run_of(saved["mistral"]), "test", 2))
    assert text.startswith("forward: plain (MistralForCausalLM: ") and "of 6 rows" in text and "pass@2" in text
    by_name = {c.name: c for c in diagnose(run_of(saved["mistral"]))}
    assert by_name["forward"].ok and "plain (MistralForCausalLM: its attention window of 6" in by_name["forward"].text
    by_name = {c.name: c for c in diagnose(run_of(saved["mistral"], "model.forward=shared"))}
    assert not by_name["forward"].ok and "model.forward=auto" in by_name["forward"].text
    with Live() as display:
        display.update({"step": 0, "base": {}, "forward": "plain (MistralForCausalLM: because)"}, 5)
        display.update({"step": 1}, 5)
    assert capsys.readouterr().out.count("forward: plain (MistralForCausalLM: because)") == 1
    with Live() as display:
        display.update({"step": 0, "base": {}, "forward": "shared"}, 5)
    assert "forward" not in capsys.readouterr().out
