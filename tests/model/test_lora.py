"""LoRA: what is saved is what was trained, for every set of targets; saving changes nothing."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import VOCAB, FakeTokenizer, _tiny, make_items, packed_loss, settings
from transformers import AutoModelForCausalLM

from unift.config.sections import Lora, Model
from unift.model import critic, lora
from unift.model.load import load_policy, save_pretrained
from unift.model.logprobs import logprobs as logprobs_of
from unift.model.packs import DEMO, Item, Member, cut, pack
from unift.model.policy import Policy
from unift.objectives import input_noise
from unift.objectives.weights import weigh
from unift.sampling.engines.base import Request
from unift.sampling.engines.choose import generate
from unift.types import ConfigError

TARGETS = {
    "llama": ["all-linear", ["q_proj"], ["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head", "down_proj"]],
    "gpt2": ["all-linear", ["lm_head"], ["wte"], ["wte", "lm_head", "c_fc"]],
}
CASES = [(kind, targets) for kind, some in TARGETS.items() for targets in some]


class Saved(FakeTokenizer):
    def get_vocab(self):
        return {str(i): i for i in range(VOCAB)}

    def save_pretrained(self, folder):
        pass


def base(folder, kind="llama", tie=True, dtype=torch.float32):
    torch.manual_seed(0)
    config, model_type = _tiny(kind, tie)
    model_type(config).to(dtype).save_pretrained(folder)
    return str(folder)


def live(path, targets, forward="auto", dtype="float32", size=0.3, rank=4):
    """A loaded policy whose adapters hold numbers as large as if they were trained."""
    config = Model(path=path, device="cpu", forward=forward, dtype=dtype, lora=Lora(rank=rank, targets=targets))
    policy = load_policy(config, Saved())
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, p in policy.named_parameters():
            p.copy_(size * torch.randn(p.shape, generator=draw))
    return policy


def logprobs(policy, tokens):
    """Of ``tokens`` [L] after the first by the trainer, as a demonstration."""
    config = settings("sft")
    items = [Item(tokens[:1], [], [Member(tokens[1:], DEMO)])]
    batch = pack(items, cut(items, 10**6, config)[0], weigh(items, config), config)
    return logprobs_of(policy, batch)[0]


@pytest.mark.parametrize("forward", ["shared", "plain"])
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind, targets", CASES, ids=lambda x: x if isinstance(x, str) else "+".join(x))
def test_the_saved_model_is_the_trained_one(tmp_path, kind, targets, tie, forward):
    """Sampler, trainer and the folder read by transformers give the same log-probs, within 1e-4 nat."""
    policy = live(base(tmp_path / "base", kind, tie), targets, forward)
    assert policy.shared == (forward == "shared")
    prompt = list(range(2, 9))
    (sample,) = generate(policy, [Request(prompt, None)], 12)[0]
    save_pretrained(policy, tmp_path / "model")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokens = torch.tensor(prompt + sample.tokens)
    with torch.no_grad():
        expected = saved(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
        untouched = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()(tokens[None]).logits[0, :-1]
        trained = logprobs(policy, tokens.tolist())
    own = torch.tensor(sample.logps, dtype=torch.float64)
    assert (own - expected[len(prompt) - 1 :]).abs().max() < 1e-4
    assert (trained - expected).abs().max() < 1e-4
    # The adapters matter: without them the numbers are others.
    assert (untouched.log_softmax(-1).gather(1, tokens[1:, None])[:, 0] - expected).abs().max() > 0.1


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head", "q_proj"]])
def test_gradients_of_the_shared_path_are_those_of_the_plain_one(tmp_path, targets):
    path = base(tmp_path / "base")
    config, items = settings("uft", "likelihood.weight=0.3", "reference.kl=0"), make_items()
    found = []
    for forward in ("shared", "plain"):
        policy = live(path, targets, forward)
        loss, _ = packed_loss(policy, items, config)
        found.append((loss, [p.grad.clone() for p in policy.parameters()]))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    assert all(g.abs().max() > 0 for g in found[0][1])
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max() + 1e-7


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saving_changes_no_number(tmp_path, dtype):
    policy = live(base(tmp_path / "base"), ["q_proj", "lm_head", "embed_tokens"], dtype=dtype)
    before = {n: t.clone() for n, t in policy.model.state_dict().items()}
    for _ in range(3):
        save_pretrained(policy, tmp_path / "model")
    after = policy.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def test_a_merged_weight_is_rounded_once(tmp_path):
    """bfloat16 keeps 8 significant bits: off by at most 2^-8 of W + (alpha / r) B A, computed in float64 here."""
    policy = live(base(tmp_path / "base"), ["q_proj"], dtype="bfloat16", size=0.1)
    save_pretrained(policy, tmp_path / "model")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").state_dict()
    layers = lora.adapted(policy.base)
    assert len(layers) == 2
    for name, layer in layers.items():
        a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        exact = layer.base_layer.weight.double() + 32 / 4 * (b @ a)
        got = saved[f"{name}.weight"]
        assert got.dtype == torch.bfloat16
        assert ((got.double() - exact).abs() <= exact.abs() * 2**-8 * 1.001).all()


def test_what_is_tied_stays_tied_unless_it_is_adapted(tmp_path):
    path = base(tmp_path / "base")
    for targets, tied in (("all-linear", True), (["lm_head"], False), (["embed_tokens"], False)):
        save_pretrained(live(path, targets), tmp_path / "model")
        assert json.loads((tmp_path / "model" / "config.json").read_text())["tie_word_embeddings"] is tied
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


def test_other_shared_weights_are_refused(tmp_path, monkeypatch):
    """A layer that shares its matrix with another one would be saved with the adapter on both, or on neither."""
    policy = load_policy(Model(path=base(tmp_path / "base"), device="cpu"), Saved())
    layers = policy.base.model.layers
    layers[1].self_attn.q_proj.weight = layers[0].self_attn.q_proj.weight
    with pytest.raises(ConfigError, match="q_proj shares its weight with .*layers.1.self_attn.q_proj"):
        lora.adapt(policy.model, Lora(rank=2, targets=["q_proj"]))


def test_a_head_that_is_always_tied_is_refused(tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_save", ["lm_head.weight"])
    with pytest.raises(ConfigError, match=r"model.lora.targets=\['lm_head'\] does not fit LlamaForCausalLM: .*shares"):
        live(base(tmp_path / "base"), ["lm_head"])


def test_the_reference_is_the_model_without_adapters(tmp_path):
    """Head and embeddings too: with the adapters switched off, the log-probs are those of the base."""
    path = base(tmp_path / "base")
    policy = live(path, ["embed_tokens", "lm_head"])
    tokens = list(range(2, 12))
    with torch.no_grad(), policy.model.disable_adapter():
        off = logprobs(policy, tokens)
    with torch.no_grad():
        bare = logprobs(load_policy(Model(path=path, device="cpu"), Saved()), tokens)
        assert (off - bare).abs().max() < 1e-6
        assert (logprobs(policy, tokens) - bare).abs().max() > 0.1


def demo_batch(noise, policy):
    config = settings("sft", *noise)
    items = [Item([3, 4, 5], [], [Member([6, 7, 8, 9, 1], DEMO)], address=(0,))]
    return config, items, pack(items, [0], weigh(items, config), config)


@pytest.mark.parametrize("noise", [["inputs.noise=gaussian", "inputs.scale=10"], ["inputs.own=0.5"]])
def test_changed_embeddings_are_those_of_the_adapted_model(tmp_path, noise):
    """Noise is scaled by, and guesses are mixed as, the rows that the model looks up: merged and live agree."""
    policy = live(base(tmp_path / "base", tie=False), ["embed_tokens"])
    save_pretrained(policy, tmp_path / "model")
    merged = load_policy(Model(path=str(tmp_path / "model"), device="cpu"), Saved())
    found = []
    for p in (policy, merged):
        config, items, batch = demo_batch(noise, p)
        (changed,) = input_noise.perturbed(p, batch, items, config)
        found.append(changed.delta_TD)
    assert found[1].abs().max() > 0.01
    assert (found[0] - found[1]).abs().max() < 1e-5


def test_the_critic_reads_what_the_head_reads():
    """OPT with a projection between the two: its embeddings are narrower than its layers."""
    from transformers import OPTConfig, OPTForCausalLM

    size = {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 16,
    }
    model = OPTForCausalLM(OPTConfig(vocab_size=VOCAB, max_position_embeddings=64, **size))
    head = critic.new_critic(Policy(model, FakeTokenizer(), torch.device("cpu")))
    assert head.in_features == model.lm_head.in_features == 16
