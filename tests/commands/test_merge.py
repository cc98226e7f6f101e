"""Merging: identities and hand-computed tensors for each rule, folders that load, mistakes."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import tiny_policy

from unift import rng
from unift.commands import merge
from unift.model.load import save_pretrained
from unift.types import ConfigError, NonFiniteError


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------- rules


def test_linear():
    base, sft, rl = t(1.0, 1e9, 3.0), t(2.0, 1e-9, 3.0), t(1.0, 7.0, 5.0)
    assert torch.equal(merge.linear(base, [sft, rl], [1, 0]), sft) and torch.equal(
        merge.linear(base, [sft, rl], [0, 1]), rl
    )
    assert torch.equal(merge.linear(base, [sft, rl], [0, 0]), base)
    # 1 + 0.5*1 + 0.25*0; 3 + 0.5*0 + 0.25*2
    assert merge.linear(base, [sft, rl], [0.5, 0.25])[[0, 2]].tolist() == [1.5, 3.5]


def test_trim_threshold():
    tau = t(3, -1, 0.5, -4, 0, 2)
    assert [merge.trim_threshold(tau, d) for d in (1 / 6, 0.5, 1.0)] == [4, 2, 0]
    assert merge.trim_threshold(tau, 0.001) == 4, "at least one entry is kept"


def test_ties_by_hand():
    first, second = t(3, -1, 0.5, -4, 2, 5), t(-2, -2, 0.1, 1, 4, -5)
    # trimmed at 2: (3, 0, 0, -4, 2, 5) and (-2, -2, 0, 0, 4, -5); votes 1, -2, 0, -4, 6, 0
    assert merge.ties([first, second], [1, 1], [2, 2]).tolist() == [3, -2, 0, -4, 3, 0]
    # weights vote: (3, 0, 0, -4, 2, 5) and (-6, -6, 0, 0, 12, -15); votes -3, -6, 0, -4, 14, -10
    assert merge.ties([first, second], [1, 3], [2, 2]).tolist() == [-6, -6, 0, -4, 7, -15]
    assert merge.ties([first, second], [0.5, 0.5], [2, 2]).tolist() == [1.5, -1, 0, -2, 1.5, 0], "the paper's lambda"
    assert torch.equal(merge.ties([first, second], [1, 0], [0, 0]), first)


def test_trimming_is_over_the_whole_model():
    base = {"a": t(0, 0), "b": t(0, 0)}
    model = {"a": t(0.1, -0.2), "b": t(5, -4)}
    merged = merge.merge_states(base, [model], ["a", "b"], merge.Mixing("ties", [1.0], 0.5, 0))
    assert merged["a"].tolist() == [0, 0] and merged["b"].tolist() == [5, -4]


def test_dare():
    tau = torch.arange(1.0, 10001.0, dtype=torch.float64)
    dropped = merge.dare(tau, 0.25, 3, 0, "w")
    kept = rng.uniforms("dare", 3, 0, "w", shape=10000) < 0.25
    assert np.array_equal(dropped.numpy(), np.where(kept, tau.numpy() * 4, 0))
    share = (dropped != 0).double().mean().item()
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 10000) ** 0.5
    assert torch.equal(dropped, merge.dare(tau, 0.25, 3, 0, "w"))
    for other in ((4, 0, "w"), (3, 1, "w"), (3, 0, "v")):
        assert not torch.equal(dropped, merge.dare(tau, 0.25, *other))
    assert torch.equal(merge.dare(tau, 1.0, 3, 0, "w"), tau)


def test_dare_merges_what_is_left():
    base, a, b = {"w": t(1, 2, 3, 4)}, {"w": t(2, 4, 6, 8)}, {"w": t(0, 0, 0, 0)}
    merged = merge.merge_states(base, [a, b], ["w"], merge.Mixing("dare", [0.5, 0.25], 0.5, 7))["w"]
    keep = [torch.from_numpy(rng.uniforms("dare", 7, i, "w", shape=4) < 0.5) for i in (0, 1)]
    by_hand = base["w"] + 0.5 * keep[0] * 2 * t(1, 2, 3, 4) - 0.25 * keep[1] * 2 * t(1, 2, 3, 4)
    assert torch.allclose(merged, by_hand) and 0 < keep[0].sum() + keep[1].sum() < 8


def test_dtype_whole_numbers_and_nan():
    base = {"w": torch.ones(3, dtype=torch.float16), "n": torch.tensor([1, 2])}
    model = {"w": torch.full((3,), 1.0001), "n": torch.tensor([1, 2])}
    merged = merge.merge_states(base, [model], ["w", "n"], merge.Mixing("linear", [1.0]))
    assert (
        torch.equal(merged["w"], model["w"])
        and merged["w"].dtype == torch.float32
        and torch.equal(merged["n"], base["n"])
    )
    with pytest.raises(ConfigError, match="whole numbers"):
        merge.merge_states(base, [{**model, "n": torch.tensor([1, 3])}], ["w", "n"], merge.Mixing("linear", [1.0]))
    with pytest.raises(NonFiniteError, match="w is not finite"):
        merge.merge_states(base, [{**model, "w": torch.full((3,), torch.nan)}], ["w"], merge.Mixing("linear", [1.0]))


# ---------------------------------------------------------------------------------------------- folders


class Nameless:
    """A tokenizer that leaves one file."""

    eos_token_id, chat_template = 1, None

    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """base, sft and rl: three llamas of one shape; sft differs from base in small steps, rl in others."""
    root = tmp_path_factory.mktemp("merge")
    policy, _ = tiny_policy()
    policy.tokenizer = Nameless()
    start = copy.deepcopy(policy.model.state_dict())
    for i, name in enumerate(("base", "sft", "rl")):
        g = torch.Generator().manual_seed(i)
        moved = {k: v + 0.02 * i * torch.randn(v.shape, generator=g) for k, v in start.items()}
        moved["lm_head.weight"] = moved["model.embed_tokens.weight"]
        policy.model.load_state_dict(moved)
        save_pretrained(policy, root / name)
    return root


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(("rule", "density"), [("linear", None), ("ties", 1.0), ("dare", 1.0)])
def test_corners_are_the_checkpoints(folders, tmp_path, rule, density):
    base, sft, rl = (str(folders / n) for n in ("base", "sft", "rl"))
    assert not same(load(sft), load(rl))
    for weights, corner in (((1, 0), sft), ((0, 1), rl)):
        out = tmp_path / f"{weights[0]}"
        merge.merge(base, [sft, rl], out, merge.Mixing(rule, weights, density))
        assert same(load(out), load(corner))


def test_the_middle_loads_and_runs(folders, tmp_path):
    base, sft, rl = (str(folders / n) for n in ("base", "sft", "rl"))
    out = tmp_path / "deep" / "mid"
    done = merge.merge(base, [sft, rl], out, merge.Mixing("linear", [0.5, 0.25]))
    merged, (b, s, r) = load(out), (load(f).state_dict() for f in (base, sft, rl))
    for name, value in merged.state_dict().items():
        assert torch.allclose(value, b[name] + 0.5 * (s[name] - b[name]) + 0.25 * (r[name] - b[name]), atol=1e-7)
    assert merged(torch.tensor([[3, 4, 5]])).logits.isfinite().all()
    assert json.loads((out / "merge.json").read_text())["weights"] == [0.5, 0.25] and (out / "tokenizer.json").is_file()
    assert done["parameters"] == sum(p.numel() for p in merged.parameters())
    assert not list(tmp_path.glob("**/.*")), "something half written is left"


def test_shards_are_read_and_a_half_base_keeps_the_models_dtype(folders, tmp_path):
    load(folders / "sft").save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    load(folders / "base").half().save_pretrained(tmp_path / "half")
    linear = merge.Mixing("linear", [1.0])
    merge.merge(str(tmp_path / "half"), [str(tmp_path / "sharded")], tmp_path / "out", linear)
    merged = load(tmp_path / "out")
    assert same(merged, load(folders / "sft")) and merged.dtype == torch.float32
    both = [str(tmp_path / "half"), str(folders / "sft")]
    merge.merge(str(folders / "base"), both, tmp_path / "mixed", merge.Mixing("linear", [0, 1]))
    assert same(load(tmp_path / "mixed"), load(folders / "sft")), "the widest dtype of the models"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rule": "slerp"}, "linear, ties, dare"),
        ({"weights": [1.0]}, "a weight for each"),
        ({"density": 0.5}, "takes no density"),
        ({"rule": "ties"}, "needs a density"),
        ({"rule": "dare", "density": 0.0}, "at most 1"),
        ({"out": "base"}, "exists"),
        ({"base": "embedded:lock"}, "different parameters|shape"),
        ({"base": "empty"}, "no model.safetensors"),
    ],
)
def test_mistakes(folders, tmp_path, change, said):
    (folders / "empty").mkdir(exist_ok=True)
    (folders / "empty" / "config.json").write_text("{}")
    call = {"base": "base", "rule": "linear", "weights": [0.5, 0.5], "density": None, "out": None} | change
    base = call["base"] if ":" in call["base"] else str(folders / call["base"])
    out = folders / call["out"] if call["out"] else tmp_path / "out"
    with pytest.raises(ConfigError, match=said):
        how = merge.Mixing(call["rule"], call["weights"], call["density"])
        merge.merge(base, [str(folders / "sft"), str(folders / "rl")], out, how)
    assert not (tmp_path / "out").exists()


def test_command(folders, tmp_path):
    def unift(*words):
        return subprocess.run([sys.executable, "-m", "unift", "merge", *words], capture_output=True, text=True)

    words = [str(folders / n) for n in ("base", "sft", "rl")]
    done = unift(*words, "--rule", "ties", "--density", "0.2", "--out", str(tmp_path / "a"))
    assert done.returncode == 0 and "ties merge of 2 models" in done.stdout, done.stderr
    moved = [
        (x != y).double().mean().item() for x, y in zip(load(tmp_path / "a").parameters(), load(words[0]).parameters())
    ]
    assert 0.1 < np.mean(moved) < 0.45  # the union of two sets of 20 %
    done = unift(*words, "--weights", "0.5,x", "--out", str(tmp_path / "b"))
    assert done.returncode == 2 and "expected numbers" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("words", ["0.5,nan", "inf,1", "a", ""])
def test_weights_are_finite_numbers(words):
    with pytest.raises(ConfigError, match="expected numbers that are finite"):
        merge.read_weights(words, 2, "linear")
