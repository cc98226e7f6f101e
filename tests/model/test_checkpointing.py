"""Activation checkpointing: equal gradients on every path, less memory, and nothing shared with a copy of the model."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import close, gradients, make_items, packed_loss, saved_bytes, settings, tiny_policy

from unift.config.sections import Lora
from unift.model import checkpointing, lora, matmul
from unift.model.packs import COMPLETION, Item, Member, pack
from unift.model.policy import Policy
from unift.objectives.weights import weigh
from unift.training import gradients as taken
from unift.training.update import losses_of, outputs_of
from unift.types import ConfigError

PATHS = [("llama", "shared"), ("qwen2", "shared"), ("gpt2", "plain"), ("llama", "plain"), ("llama", "lora")]


def policy_of(kind, path, dtype=torch.float32):
    policy, plain = tiny_policy(dtype, kind)
    if path == "plain":
        return Policy(plain, policy.tokenizer, policy.device, why_plain="a test")
    if path == "lora":
        model = lora.adapt(policy.model, Lora(rank=3))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(0, 0.1)
        return Policy(model, policy.tokenizer, policy.device, lora=True)
    return policy


@pytest.mark.parametrize(("kind", "path"), PATHS)
@pytest.mark.parametrize("autocast", ["none", "all"])
def test_equal_gradients(kind, path, autocast):
    """The layers run again with the same layout, in the same precision, by the same library: bit for bit."""
    policy = policy_of(kind, path)
    policy.autocast = autocast
    config = settings("uft", "likelihood.weight=0.3", "reference.kl=0")
    items = make_items(demo=True)
    found = {}
    matmul.route(True)
    try:
        for on in (False, True, False):
            checkpointing.use(policy.model, on)
            calls = count_calls(policy)
            found[on] = packed_loss(policy, items, config, budget=60)
            assert calls[0] > 0
            found[on] += (calls[0],)
    finally:
        matmul.route(False)
    assert found[True][2] > found[False][2], "no layer was computed again"
    assert found[True][0] == found[False][0]
    if path == "plain":  # its forwards are computed again as a whole besides: sums in another order
        close(found[True][1], found[False][1], 1e-5 if autocast == "none" else 2e-2)
    else:
        assert all(torch.equal(a, b) for a, b in zip(found[True][1], found[False][1], strict=True))


def count_calls(policy):
    calls = [0]
    for m in policy.model.modules():
        if isinstance(m, torch.nn.SiLU) or type(m).__name__ in ("SiLUActivation", "NewGELUActivation"):
            m.register_forward_hook(lambda *a: calls.__setitem__(0, calls[0] + 1))
    return calls


@pytest.mark.parametrize(("kind", "path"), PATHS)
def test_less_is_kept(kind, path):
    policy, config = policy_of(kind, path), settings("uft")
    long = [Member([2 + j % 30 for j in range(60)], COMPLETION, 1.0)]
    items = make_items(members=(6, 6, 6)) if path != "plain" else [Item([3, 4], [5], long)]  # one forward, kept whole
    batch = pack(items, range(len(items)), weigh(items, config), config)
    sizes = []
    for on in (False, True):
        checkpointing.use(policy.model, on)
        sizes.append(saved_bytes(policy, batch))
    assert sizes[1] < 0.6 * sizes[0], sizes


def test_both_streams_apart():
    """Two backward passes through one graph, each of which computes the layers again."""
    policy, config = policy_of("llama", "shared"), settings("uft", "likelihood.weight=0.3", "reference.kl=0")
    items = make_items()
    batch = pack(items, range(3), weigh(items, config), config)
    found = []
    for on in (False, True):
        checkpointing.use(policy.model, on)
        streams, outputs = taken.buffers(policy.parameters()), outputs_of(policy, batch, config)
        taken.backward(policy.parameters(), losses_of(*outputs, batch, config, config.engine), [outputs[0]], streams)
        found.append(streams)
    for name in ("policy", "likelihood"):
        assert all(torch.equal(a, b) for a, b in zip(found[0][name], found[1][name], strict=True))


def test_a_copy_of_the_model_runs_its_own_layers():
    policy, config = policy_of("llama", "shared"), settings("uft")
    checkpointing.use(policy.model, True)
    twin = Policy(copy.deepcopy(policy.model), policy.tokenizer, policy.device)
    with torch.no_grad():
        for p in twin.model.model.layers.parameters():
            p.mul_(1.5)
    items = make_items()
    loss, got = packed_loss(twin, items, config)
    assert loss != packed_loss(policy, items, config)[0]
    assert all(p.grad is not None for p in twin.model.parameters())
    checkpointing.use(twin.model, False)
    other, expected = packed_loss(twin, items, config)
    assert other == loss and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert gradients(policy.model)


def test_a_model_without_layers():
    with pytest.raises(ConfigError, match="gradient_checkpointing=true: Linear does not say"):
        checkpointing.use(torch.nn.Linear(2, 2), True)
    checkpointing.use(torch.nn.Linear(2, 2), False)


def test_a_run_is_the_same_run(tmp_path):
    """Three steps with a KL reference (a deep copy of the model) and both streams measured: the same weights."""
    from safetensors.torch import load_file

    from unift.config.resolve import parse_overrides, resolve
    from unift.training.loop import train

    small = (
        "train.steps=3 train.prompts=4 sample.completions=4 data.train_rows=8 data.test_rows=2 threads=1 train.lr=0.01"
    )
    found = []
    for on in ("false", "true"):
        words = [*small.split(), "reference.kl=0.1", "log.gradients_every=2", f"train.gradient_checkpointing={on}"]
        train(resolve("uft", recipe="lock", overrides=parse_overrides(words)), tmp_path / on)
        found.append(load_file(tmp_path / on / "model" / "model.safetensors"))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
