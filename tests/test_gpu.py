"""What only a GPU can show: compiled flex_attention, recorded decode steps, and a whole run. `pytest -m gpu`."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import numpy as np
import pytest
import torch
from conftest import FakeTokenizer, close, gradients, packed_loss, random_tokens, settings
from plain import uft_loss

from unift.config.resolve import parse_overrides, resolve
from unift.config.sections import Model
from unift.model import attention, matmul, paths
from unift.model.attention import flex
from unift.model.load import load_policy
from unift.model.logprobs import logprobs
from unift.model.packs import COMPLETION, Item, Member, pack
from unift.model.policy import Policy
from unift.objectives.weights import weigh
from unift.sampling.engines import cuda_graph
from unift.sampling.engines.base import Request
from unift.sampling.engines.native import generate
from unift.training import loop
from unift.training.loop import train
from unift.training.run.metrics import read_metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch.cuda.is_available() is false"),
]
DEVICE = torch.device("cuda")


def model_of(width=64, heads=4, kv=2, dtype=torch.float32, vocabulary=300):
    """(policy on the shared-prefix path, plain twin), on the GPU."""
    import transformers as t

    torch.manual_seed(0)
    ids = {"vocab_size": vocabulary, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
    size = {"hidden_size": width, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": heads}
    config = t.LlamaConfig(**size, **ids, num_key_value_heads=kv, initializer_range=0.1)
    model = t.LlamaForCausalLM(config).to(DEVICE, dtype).eval()
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    attention.register()
    paths.check_shared(model, DEVICE)
    return Policy(model, FakeTokenizer(), DEVICE), plain


def items_of(rng):
    """Groups whose rows span several blocks of 128 tokens."""
    items = []
    for prompt, hint, lengths in ((150, 40, (90, 1, 70)), (20, 0, (200, 130)), (3, 300, (40,))):
        members = [Member([*random_tokens(rng, n - 1), 1], COMPLETION, float(rng.normal())) for n in lengths]
        items.append(Item(random_tokens(rng, prompt), random_tokens(rng, hint), members))
    return items


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("heads", "kv", "width"), [(4, 2, 16), (9, 3, 64), (8, 8, 128)])
def test_flex_attention(heads, kv, width, dtype):
    """The compiled kernel, values and gradients, against stock attention with copied prefixes; two lengths."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # the line that says that it is not used
        assert flex._agrees(heads, kv, width, dtype, DEVICE)


def test_loss_and_gradients(monkeypatch):
    used, attend = [], flex.attend
    monkeypatch.setattr(flex, "attend", lambda *a: (used.append(1), attend(*a))[1])
    shared, plain = model_of()
    used.clear()
    config = settings("uft", "likelihood.weight=0.3", "reference.kl=0")
    items = items_of(np.random.default_rng(7))
    loss, got = packed_loss(shared, items, config)
    assert used, "flex_attention was not used"
    expected = uft_loss(plain.cpu(), None, items, config)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    close([g.cpu() for g in got], gradients(plain), 1e-3)


def test_recorded_steps(monkeypatch):
    """The same tokens with recorded steps and without, rows of several lengths, caches that grow; and they are recorded."""
    recorded, record = [], cuda_graph.Recorded._record
    monkeypatch.setattr(cuda_graph.Recorded, "_record", lambda self: (recorded.append(record(self)), recorded[-1])[1])
    shared, _ = model_of(dtype=torch.float64)
    rng = np.random.default_rng(5)
    asked = [Request(random_tokens(rng, n), rng.random((6, 150))) for n in (7, 90, 33)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        usual, fixed = (generate(dataclasses.replace(shared, cuda_graphs=on), asked, 150, 0.9) for on in (False, True))
    assert len(recorded) > 1 and all(recorded)
    for a, b in zip((s for g in usual for s in g), (s for g in fixed for s in g), strict=True):
        assert a.tokens == b.tokens and np.allclose(a.logps, b.logps, atol=1e-9)


@pytest.mark.parametrize(
    ("dtype", "autocast", "bound"), [("float32", "none", 1e-5), ("float32", "all", 0.1), ("bfloat16", "none", 0.1)]
)
def test_sampler_against_trainer(dtype, autocast, bound):
    shared, _ = model_of(dtype=getattr(torch, dtype))
    shared = dataclasses.replace(shared, autocast=autocast)
    rng, config = np.random.default_rng(3), settings("uft", "reference.kl=0")
    asked = [Request(random_tokens(rng, n), rng.random((4, 100))) for n in (140, 9)]
    groups = generate(shared, asked, 100)
    items = [
        Item(r.prompt[:4], r.prompt[4:], [Member(s.tokens, COMPLETION, 1.0, s.logps) for s in g])
        for r, g in zip(asked, groups, strict=True)
    ]
    batch = pack(items, range(2), weigh(items, config), config).to(DEVICE)
    with torch.no_grad():
        l_S = logprobs(shared, batch)[0].double()
    assert (l_S - batch.sampler_S)[batch.role_S == COMPLETION].abs().max() < bound


MORE = ["model.autocast=none", "model.autocast=all", "model.cuda_graphs=false", "model.dtype=bfloat16"]
MORE += ["train.gradient_checkpointing=true", "train.offload_optimizer=true"]


@pytest.mark.parametrize("more", MORE)
def test_a_run_that_is_stopped_and_goes_on(tmp_path, monkeypatch, more):
    chosen = [
        "train.steps=4",
        "train.prompts=4",
        "eval.every=2",
        "save.every=1",
        "data.test_rows=8",
        "model.device=cuda",
        more,
    ]
    config, step = resolve("uft", recipe="lock", overrides=parse_overrides(chosen)), loop.one_step

    def stop_at(run, moment, *args):
        if moment.step == 2:
            raise KeyboardInterrupt
        return step(run, moment, *args)

    monkeypatch.setattr(loop, "one_step", stop_at)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path)
    monkeypatch.setattr(loop, "one_step", step)
    train(config, tmp_path)
    steps = [m for m in read_metrics(tmp_path / "metrics.jsonl") if "loss" in m]
    assert len(steps) == 4 and all(np.isfinite(m["loss"]) for m in steps)
    worst = max(m["sampling/sampling_logp_difference/max"] for m in steps)
    assert worst < (1 if "all" in more or "bfloat16" in more else 1e-4)


def test_a_model_on_the_cpu_before_it_costs_no_precision():
    """oneDNN on the CPU is chosen by a setting that CUDA reads as a leave to multiply in TF32."""
    try:
        matmul.route(True)
        load_policy(Model(path="embedded:lock", device="cuda"))
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        matmul.route(False)
