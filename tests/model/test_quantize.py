"""A base in 4 bits below adapters: the same function and gradients as its unpacked weights, saved as an ordinary model."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from unift.config.resolve import parse_overrides, resolve
from unift.model import architecture, lora, memory, quantize
from unift.model.load import load_policy, load_tokenizer
from unift.model.logprobs import logprobs
from unift.model.packs import COMPLETION, Item, Member, pack
from unift.training.loop import train
from unift.types import ConfigError

# A GPU where there is one. bitsandbytes multiplies on the CPU, too, which unift does not offer: its packed CPU kernels
# have no gradient. The tests take its plain ones there.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
installed = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason=f"bitsandbytes is not installed (and torch.cuda.is_available() is {torch.cuda.is_available()})",
)
ITEMS = [
    "train.steps=2", "train.prompts=2", "train.lr=0.01", "data.train_rows=6", "data.test_rows=2", "eval.every=0",
    "sample.max_tokens=8", "sample.completions=4", "model.lora=4", "model.quantize=nf4", "reference.kl=0.01",
]  # fmt: skip


def settings(*items: str):
    return resolve("uft", recipe="lock", overrides=parse_overrides([*ITEMS, f"model.device={DEVICE}", *items]))


REWARD = """
def score(completion, row):
    return sum((i + 3) * ord(c) for i, c in enumerate(completion)) % 5 / 4
"""


@pytest.fixture
def offered(monkeypatch):
    if DEVICE == "cpu":
        from bitsandbytes.nn import Linear4bit

        made = Linear4bit.__init__

        def without_packed_kernels(self, *args, **kwargs):
            made(self, *args, **kwargs)
            self.support_avx512bf16_for_cpu = False

        monkeypatch.setattr(quantize, "DEVICES", ("cuda", "cpu"))
        monkeypatch.setattr(Linear4bit, "__init__", without_packed_kernels)


def scores(policy, config):
    """Log-probs of two completions of a prompt, by the path that trains: [S]."""
    members = [Member([5, 9, 4, 11, 1], COMPLETION, 1.0), Member([7, 3, 3, 1], COMPLETION, -1.0)]
    batch = pack([Item(list(range(2, 22)), [6, 8], members)], [0], None, config)
    assert batch is not None
    return logprobs(policy, batch.to(policy.device), 1.0)[0]


@installed
@pytest.mark.gpu
def test_the_base_multiplies_by_its_unpacked_weights(offered):
    """Logits on unift's path and gradients of the adapters are those of a dense model with the unpacked weights."""
    config = settings()
    torch.manual_seed(0)
    policy = load_policy(config.model, load_tokenizer(config.model))
    assert policy.shared and len(quantize.packed(policy.base)) == 7 * policy.base.config.num_hidden_layers
    for p in policy.parameters():  # adapters begin at zero: they must count
        torch.nn.init.normal_(p, std=0.1)
    dense_config = settings("model.quantize=null")
    torch.manual_seed(0)
    twin = load_policy(dense_config.model, policy.tokenizer)
    names = dict(twin.base.named_parameters())
    with torch.no_grad():
        for name, layer in quantize.packed(policy.base).items():
            before = names[f"{name}.weight"].clone()
            names[f"{name}.weight"].copy_(quantize.dense(layer))
            assert 0 < (names[f"{name}.weight"] - before).norm() < 0.2 * before.norm()  # 4 bits, and the right layer
        for own, other in zip(policy.parameters(), twin.parameters(), strict=True):
            other.copy_(own)
    found, expected = scores(policy, config), scores(twin, config)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    for side in (found, expected):
        side.sum().backward()
    for own, other in zip(policy.parameters(), twin.parameters(), strict=True):
        assert other.grad.abs().max() > 0
        assert (own.grad - other.grad).abs().max() <= 1e-3 * other.grad.abs().max()


@installed
@pytest.mark.gpu
def test_a_run_saves_an_ordinary_model_and_the_adapter(offered, tmp_path):
    """Sampled and trained; what is saved is dense in model.dtype, and its adapter goes on over a base in 4 bits."""
    from transformers import AutoModelForCausalLM

    (tmp_path / "reward.py").write_text(REWARD)
    config = settings(f"reward.function={tmp_path / 'reward.py'}:score")
    train(config, tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert "quantization" not in json.dumps(json.loads((tmp_path / "run" / "model" / "config.json").read_text()))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    adapter = settings(f"model.path={tmp_path / 'run' / 'adapter'}", "model.lora=null")
    policy = load_policy(adapter.model, load_tokenizer(adapter.model))
    saved = settings(f"model.path={tmp_path / 'run' / 'model'}", "model.lora=null", "model.quantize=null")
    with torch.no_grad():
        expected = scores(policy, config)
        of_saved = scores(load_policy(saved.model, policy.tokenizer), config)
        untrained = scores(load_policy(config.model, policy.tokenizer), config)
    assert (of_saved - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (untrained - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize(
    ("items", "named"),
    [
        (["model.lora=null"], "cannot be trained: set model.lora=16"),
        (["model.dtype=float64"], "found model.dtype=float64"),
        (["model.path=x.gguf"], "found a GGUF file"),
        (["model.shard=full"], "model.shard=full do not go together"),
        (["model.device=cpu"], "needs a CUDA device, found cpu"),
    ],
)
def test_what_does_not_go_with_it_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, items, named):
    monkeypatch.setattr("unift.training.loop.load_tokenizer", lambda model: pytest.fail("it began to load"))
    if "shard" in items[0]:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigError, match=f"model.quantize=nf4.*{named}"):
        train(settings("model.device=cpu", *items), tmp_path / "run")


def test_without_bitsandbytes_the_package_is_named(monkeypatch):
    monkeypatch.setattr(quantize, "PACKAGE", "no_such_package")
    with pytest.raises(ConfigError, match="needs no_such_package, which is not installed. Install it with"):
        quantize.check(settings().model, torch.device("cuda"))


def test_the_estimate_counts_half_a_byte():
    """Qwen2.5-0.5B's shapes: 357.9 M numbers in linear layers, of 494 M."""
    shapes = {
        "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "intermediate_size": 4864, "vocab_size": 151936, "tie_word_embeddings": True,
    }  # fmt: skip
    inside = 24 * (2 * 896 * 896 + 2 * 128 * 896 + 3 * 896 * 4864)
    assert architecture.linear(shapes) == (inside, 896 * 4864)
    found = []
    for items in (["model.quantize=null"], []):
        config = settings("model.dtype=bfloat16", *items)
        built = architecture.from_shapes(shapes, config.model)
        made = memory.estimate(built, config.model, config, memory.work_of(config, config), cpu=False)
        found.append(made.weights)
    assert found[0] - found[1] == pytest.approx((2 - quantize.BYTES) * inside - 2 * 896 * 4864)
    assert 0.5 < quantize.BYTES < 0.52


def test_dense_leaves_ordinary_layers_alone():
    layer = torch.nn.Linear(3, 2)
    assert quantize.dense(layer) is layer.weight and lora.weight(layer) is layer.weight
    assert not quantize.packed(torch.nn.Sequential(layer))
