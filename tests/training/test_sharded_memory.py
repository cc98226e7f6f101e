"""What saves memory, together with weights in shards: the update is that of one process, or the settings are refused."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from test_processes import REWARD, launched
from test_sharding import COMMON, SUPERVISED, WIDE, assert_same, drawn, handed_on, sharded, weights

from unift.config.resolve import parse_overrides, resolve
from unift.training.loop import train
from unift.training.optimizer import check_optimizers
from unift.training.run import checkpoint
from unift.types import ConfigError

HALF = "model.dtype=bfloat16"
# A pack for each row: then every product has the same numbers with any number of processes, and rounds them alike.
APART = "train.token_budget=1"
CASES = {
    "checkpointing": ("uft", [WIDE, "train.gradient_checkpointing=true", "train.updates=2", "train.token_budget=120"]),
    "muon": ("uft", [WIDE, "train.optimizer=muon", "train.lr=0.01", "train.token_budget=120"]),
    "masters": ("sft", [HALF, APART, SUPERVISED, "train.lr=0.001"]),
    "masters-kl": ("uft", [HALF, APART, "train.lr=0.001", "reference.kl=0.01", "train.gradient_checkpointing=true"]),
    "masters-critic": ("ppo", [HALF, APART, "train.lr=0.001"]),
    "masters-phases": ("sft-rft", [HALF, APART, "train.lr=0.001", "reference.kl=0.01", "credit.scale=none"]),
    "lora-bfloat16": ("uft", [HALF, APART, "train.lr=0.01", "model.lora=4"]),
}
BOUNDS = {
    "checkpointing": 1e-10,
    "muon": 1e-10,
    # AdamW's first step divides a gradient by itself: float32's 1e-10 at a gradient of 7e-8, beside an epsilon of 1e-8, is 2e-4 of it.
    "lora-bfloat16": 1e-3,
}


def with_settings(root, names):
    (root / "reward.py").write_text(REWARD)
    own = [item for item in COMMON if not item.startswith("train.token_budget")]
    return {
        name: (CASES[name][0], [*own, f"reward.function={root / 'reward.py'}:score", *CASES[name][1]]) for name in names
    }


def settings(method, items):
    return resolve(method, recipe="lock", overrides=parse_overrides(items))


def masters(folder, step):
    """The float32 copies that a checkpoint holds, by the names of their weights."""
    from torch.distributed.checkpoint import FileSystemReader, load

    path = folder / "checkpoints" / checkpoint.step_name(step)
    if (path / "state.pt").is_file():
        stored = torch.load(path / "state.pt", weights_only=True)
        names = list(stored["weights"])
        return {names[n]: kept["master"] for n, kept in stored["optimizer"]["state"].items() if "master" in kept}
    kinds = FileSystemReader(path / "shards").read_metadata().state_dict_metadata
    found = {k: torch.zeros(m.size, dtype=m.properties.dtype) for k, m in kinds.items() if k.endswith("/master")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is a single process
        load(found, storage_reader=FileSystemReader(path / "shards"), no_dist=True)
    return {k.removeprefix("optimizer/").removesuffix("/master"): v for k, v in found.items()}


def assert_copies(folder, expected, steps):
    """Copies within rounding of float32, and every weight is its copy rounded to bfloat16: nothing is rounded twice."""
    for step in steps:
        a, b, w = masters(folder, step), masters(expected, step), weights(folder, step)
        assert a.keys() == b.keys() and a
        for name, copy in a.items():
            assert copy.dtype == torch.float32 and w[name].dtype == torch.bfloat16
            assert (copy - b[name]).abs().max() <= 1e-6 * b[name].abs().max(), (step, name)
            assert torch.equal(w[name], copy.bfloat16()), (step, name)
            assert weights(expected, step)[name].dtype == torch.bfloat16
    assert any(not torch.equal(masters(folder, max(steps))[n], masters(folder, min(steps))[n]) for n in a)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return with_settings(tmp_path_factory.mktemp("cases"), CASES)


@pytest.fixture(scope="module")
def one(tmp_path_factory, cases):
    root = tmp_path_factory.mktemp("single")
    for name, (method, items) in cases.items():
        train(settings(method, items), root / name)
    return root


@pytest.fixture(scope="module")
def two(tmp_path_factory, cases):
    return sharded(tmp_path_factory.mktemp("two"), cases, 2)


@pytest.mark.dist
@pytest.mark.parametrize("name", CASES)
def test_two_processes_with_shards_are_one(one, two, name):
    assert not list((two / name).glob("checkpoints/*/state.pt")), "nothing was sharded"
    if name in BOUNDS:
        assert_same(two / name, one / name, BOUNDS[name])
    else:
        assert_copies(two / name, one / name, (1, 2, 3))
        for step in (0, 1, 2):
            if SUPERVISED not in CASES[name][1] and (step == 0 or name != "masters-phases"):
                assert drawn(two / name, step) == drawn(one / name, step)


@pytest.mark.dist
def test_what_is_saved_of_copies_and_adapters(one, two):
    """The model in bfloat16, as in one process; adapters in a folder of their own, on a model whose weights were sharded."""
    from safetensors.torch import load_file

    for name, file in (("masters", "model/model.safetensors"), ("lora-bfloat16", "adapter/adapter_model.safetensors")):
        a, b = load_file(two / name / file), load_file(one / name / file)
        assert a.keys() == b.keys() and len(a) > 10
        assert {v.dtype for v in a.values()} == {torch.bfloat16 if name == "masters" else torch.float32}
        for n in a:
            assert (a[n].double() - b[n].double()).abs().max() <= 2.0**-8 * b[n].double().abs().max(), (name, n)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("name", ["masters", "muon"])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, cases, name):
    """One process, two, one, four, a step each: the copies, and the optimizer's state, go through both kinds of files."""
    method, items = cases[name]
    items = [*items, "train.steps=4", "model.shard=full"]
    run = tmp_path
    for step, n, run in handed_on(tmp_path, method, items):
        assert (run / "checkpoints" / checkpoint.step_name(step + 1) / "shards").is_dir() == (n > 1)
        if name == "muon":
            assert drawn(run, step) == drawn(tmp_path / "whole", step)
    if name == "muon":
        assert_same(run, tmp_path / "whole", 1e-10, steps=4)
    else:
        assert_copies(run, tmp_path / "whole", (1, 2, 3, 4))


OFFLOAD = """
import sys
from pathlib import Path
import torch
from unift import processes
from unift.config.resolve import parse_overrides, resolve
from unift.model.load import load_tokenizer
from unift.model.sharding import assign, full
from unift.training.loop import load
from unift.training.optimizer import MAKERS, MasterWeights, make_optimizer, no_gradient
from unift.training.run import shards

config = resolve("uft", recipe="lock", overrides=parse_overrides(["model.shard=full", "train.lr=0.001", "model.device=cpu"]))

def compared():  # a function, so that nothing holds on to the processes' group when they part
    tokenizer = load_tokenizer(config.model)
    plain, apart, later = (load(config, tokenizer) for _ in range(3))

    def copies(policy):
        make = lambda own: MAKERS["adamw_fused"](own, [], config.train)
        return MasterWeights(policy.parameters(), make, config.train.lr, lambda p: True, torch.device("cpu"))

    def steps(policy, optimizer, numbers):
        for n in numbers:
            for i, p in enumerate(policy.parameters()):
                p.grad = no_gradient(p)
                assign(p.grad, torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * n + i)))
            optimizer.step()
        return [full(p.detach()) for p in policy.parameters()]

    before = [full(p.detach()) for p in plain.parameters()]
    expected = steps(plain, make_optimizer(plain, config.train), range(4))
    first = copies(apart)
    steps(apart, first, range(2))
    folder = Path(sys.argv[1]) / "shards"
    shards.write(folder, apart, first)
    second = copies(later)
    shards.read(folder, later, second, dict(later.named_parameters()))
    for optimizer, policy in ((first, apart), (second, later)):
        found = steps(policy, optimizer, range(2, 4))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert all(torch.equal(full(optimizer.state[p]["master"]), full(p.detach())) for p in policy.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, expected, strict=True))
    print("the same")

with processes.joined():
    compared()
"""


@pytest.mark.dist
def test_copies_of_shards_elsewhere_change_nothing(tmp_path):
    """train.offload_optimizer: every shard is stepped through a copy, also after copies and state went through a file."""
    (tmp_path / "script.py").write_text(OFFLOAD)
    code, out, err = launched([str(tmp_path / "script.py"), str(tmp_path)], timeout=600)
    assert code == 0, err
    assert out.count("the same") == 2


@pytest.mark.parametrize(
    ("items", "named"),
    [
        (["train.optimizer=adamw_8bit"], "train.optimizer=adamw_8bit scales its state by blocks"),
        (["train.optimizer=muon", "train.offload_optimizer=true"], "train.optimizer=muon gathers whole matrices"),
        ([HALF, "phases.1.train.master_weights=false"], "train.master_weights differs between the phases"),
    ],
)
def test_what_cannot_be_sharded_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, items, named):
    if "phases" in items[-1]:
        import yaml

        from unift.config.packaged import preset_text

        phases = yaml.safe_load(preset_text("sft-rft"))["phases"]
        phases[1] = phases[1] | {"train": phases[1].get("train", {}) | {"master_weights": False}}
        config = resolve("sft-rft", recipe="lock", overrides={"phases": phases} | parse_overrides(items[:1]))
    else:
        config = settings("uft", items)
    if "adamw_8bit" not in named:  # which is not installed everywhere
        check_optimizers(config)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("unift.training.loop.load_tokenizer", lambda model: pytest.fail("it began to load"))
    config = config.model_copy(update={"model": config.model.model_copy(update={"shard": "full"})})
    with pytest.raises(ConfigError, match=named):
        train(config, tmp_path / "run")
