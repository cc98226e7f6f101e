"""Weights in shards (FSDP2): the update is that of one process, whatever the method, and so are checkpoints and models."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_processes import REWARD, cut_back, launched

from unift.config.resolve import parse_overrides, resolve
from unift.training.loop import train
from unift.training.run import checkpoint
from unift.training.run.metrics import read_metrics
from unift.training.run.rollouts import read_rollouts

pytestmark = pytest.mark.dist

COMMON = [
    "train.steps=3", "train.prompts=6", "sample.completions=4", "sample.max_tokens=10", "data.train_rows=12",
    "data.test_rows=3", "eval.every=0", "save.every=1", "save.keep=9", "save.rollouts=true", "log.gradients_every=2",
    "threads=1", "eval.train_rows=0", "show.until=0.5", "train.token_budget=120",
]  # fmt: skip
WIDE, SUPERVISED = "model.dtype=float64", "sample.completions=0"
CASES = {  # the base of the recipe ties its embeddings
    "sft": ("sft", [WIDE, SUPERVISED]),
    "rft": ("rft", [WIDE, "train.updates=2"]),
    "uft": ("uft", [WIDE, "train.updates=2", "train.epochs=2", "reference.kl=0.01"]),
    "plain": ("uft", [WIDE, "model.forward=plain", "reference.kl=0.01"]),
    "plain-lora": ("uft", [WIDE, "model.forward=plain", "model.lora=4", "train.lr=0.01"]),
    "uft-float32": ("uft", ["train.updates=2", "reference.kl=0.01"]),
    "ppo": ("ppo", [WIDE, "train.updates=2"]),
    "dpo": ("dpo", [WIDE]),
    "lora": ("uft", [WIDE, "model.lora=4", "reference.kl=0.01", "train.lr=0.01"]),
    "lora-phases": ("sft-rft", [WIDE, "model.lora=4", "reference.kl=0.01", "train.lr=0.01", "credit.scale=none"]),
    "phases": ("sft-rft", [WIDE, "reference.kl=0.01", "credit.scale=none"]),
    "noise": ("neftune", [WIDE, SUPERVISED]),
    "adversarial": ("sft-adversarial", [WIDE, SUPERVISED]),
    "own": ("ift", [WIDE, SUPERVISED]),
    "critic-lora": ("ppo", [WIDE, "model.lora=4", "train.lr=0.01"]),
    "dpo-lora": ("dpo", [WIDE, "model.lora=4", "train.lr=0.01"]),
    "untied": ("uft", [WIDE]),
}
HUGE = """
def huge(completion, row):
    return score(completion, row) * (1e308 if os.environ.get("RANK") == "1" else 1.0) * 1.7
"""
SCRIPT = """
import json, sys
from pathlib import Path
from unift import processes
from unift.config.resolve import parse_overrides, resolve
from unift.training.loop import train

root = Path(sys.argv[1])
with processes.joined():
    for name, (method, items) in json.loads((root / "cases.json").read_text()).items():
        recipe = sys.argv[2] if len(sys.argv) > 2 else None
        train(resolve(method, recipe=recipe, overrides=parse_overrides([*items, "model.shard=full"])), root / name)
"""


def all_of(folder, reward):
    """Every case with all its settings."""
    base = untied(folder / "base")
    more = {"untied": [f"model.path={base}"]}
    return {
        name: (method, [*COMMON, f"reward.function={reward}:score", *items, *more.get(name, [])])
        for name, (method, items) in CASES.items()
    }


def untied(folder):
    """The base of the recipe with a head of its own."""
    from unift.config.surroundings import Model
    from unift.model.load import load_policy, save_pretrained

    policy = load_policy(Model(device="cpu"))
    model = policy.model
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() * 1.1)
    model.config.tie_word_embeddings = False
    save_pretrained(policy, folder)
    return folder


def sharded(root, cases, n, recipe="lock"):
    root.mkdir(exist_ok=True)
    (root / "cases.json").write_text(json.dumps(cases))
    (root / "script.py").write_text(SCRIPT)
    code, out, err = launched([str(root / "script.py"), str(root), *([recipe] if recipe else [])], n, timeout=600)
    assert code == 0, err
    return root


def weights(folder, step):
    """All that a checkpoint holds of the weights, put together."""
    from torch.distributed.checkpoint import FileSystemReader, load

    path = folder / "checkpoints" / checkpoint.step_name(step)
    if (path / "state.pt").is_file():
        return torch.load(path / "state.pt", weights_only=True)["weights"]
    stored = FileSystemReader(path / "shards").read_metadata().state_dict_metadata
    found = {k: torch.zeros(m.size, dtype=m.properties.dtype) for k, m in stored.items() if k.startswith("weights/")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is a single process
        load(found, storage_reader=FileSystemReader(path / "shards"), no_dist=True)
    return {k.removeprefix("weights/"): v for k, v in found.items()}


def assert_same(folder, expected, bound, steps=3):
    """Weights of every step, metrics within rounding."""
    started = weights(expected, 1)
    for step in range(1, steps + 1):
        a, b = weights(folder, step), weights(expected, step)
        assert a.keys() == b.keys()
        for name in a:
            assert (a[name] - b[name]).abs().max() <= bound * b[name].abs().max(), (step, name)
    assert any((b[n] - started[n]).abs().max() > 100 * bound * b[n].abs().max() for n in b), "nothing was learned"
    left, right = (read_metrics(x / "metrics.jsonl") for x in (folder, expected))
    assert [m["step"] for m in left] == [m["step"] for m in right] == list(range(steps + 1))
    for x, y in zip(left[1:], right[1:], strict=True):
        for name in y.keys() - {n for n in y if n.startswith(("sampling/", "time/", "tokens/per_second"))}:
            assert x[name] == pytest.approx(y[name], rel=max(100 * bound, 1e-9), abs=1e-3 * bound), (y["step"], name)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    root = tmp_path_factory.mktemp("one")
    (root / "reward.py").write_text(REWARD)
    return all_of(root, root / "reward.py")


@pytest.fixture(scope="module")
def one(tmp_path_factory, cases):
    """Every case in one process, which holds all weights."""
    root = tmp_path_factory.mktemp("single")
    for name, (method, items) in cases.items():
        train(resolve(method, recipe="lock", overrides=parse_overrides(items)), root / name)
    return root


@pytest.fixture(scope="module")
def two(tmp_path_factory, cases):
    return sharded(tmp_path_factory.mktemp("two"), cases, 2)


def bound(name):
    return 1e-5 if name == "uft-float32" else 1e-10


@pytest.mark.parametrize("name", CASES)
def test_two_processes_with_shards_are_one_run(one, two, name):
    assert not list((two / name).glob("checkpoints/*/state.pt")), "nothing was sharded"
    assert_same(two / name, one / name, bound(name))


def test_four_processes_some_without_a_pack(tmp_path, cases, one):
    """Two prompts a step, of which two processes get none; and a method with all there is."""
    method, items = cases["uft"]
    few = {"uft": cases["uft"], "few": (method, [*items, "train.prompts=2", "train.updates=1"]), "ppo": cases["ppo"]}
    train(resolve(method, recipe="lock", overrides=parse_overrides(few["few"][1])), tmp_path / "one")
    four = sharded(tmp_path / "four", few, 4)
    assert_same(four / "few", tmp_path / "one", 1e-10)
    for name in ("uft", "ppo"):
        assert_same(four / name, one / name, bound(name))


def test_a_model_that_was_trained_in_shards_loads_as_any_other(one, two):
    """Tied and untied embeddings, adapters merged, in a checkpoint and at the end."""
    from transformers import AutoModelForCausalLM

    for name in ("uft", "untied", "lora"):
        for place in ("model", "checkpoints/step_000002/model"):
            got, expected = (
                AutoModelForCausalLM.from_pretrained(root / name / place, dtype=torch.float64) for root in (two, one)
            )
            assert got.config.tie_word_embeddings == (name != "untied")
            a, b = got.state_dict(), expected.state_dict()
            assert a.keys() == b.keys() and "lm_head.weight" in a
            assert all((a[n] - b[n]).abs().max() <= 1e-10 * b[n].abs().max() for n in a), (name, place)


# ---------------------------------------------------------------------------------------------- other numbers of processes


def drawn(folder, step):
    return [(g.row_id, g.cuts, [s.tokens for s in g.samples]) for g in read_rollouts(folder, step)[1]]


def handed_on(tmp_path, method, items, recipe="lock", numbers=(1, 2, 1, 4)):
    """(step, processes, folder) of a run that so many processes train, a step each; beside it "whole", which one process
    trains to the end."""
    config = resolve(method, recipe=recipe, overrides=parse_overrides(items))
    source = tmp_path / "whole"
    train(config, source)
    for step, n in enumerate(numbers):
        run = tmp_path / f"part{step}" / "run"
        run.parent.mkdir()
        if step:
            cut_back(source, run, step)
        if n == 1:
            train(config, run)
        else:
            sharded(run.parent, {"run": (method, items)}, n, recipe)
        yield step, n, run
        source = run


def test_a_run_goes_on_with_another_number_of_processes(tmp_path, cases, one):
    """One process, two, one, four: a step each, all with model.shard=full. In float64 the rows, hints and tokens are those
    of a run that was never stopped; the weights differ by the order of sums."""
    method, items = cases["uft"]
    items = [*items, "train.steps=4", "model.shard=full"]
    run, kinds = tmp_path, []
    for step, _, run in handed_on(tmp_path, method, items):
        kinds.append((run / "checkpoints" / checkpoint.step_name(step + 1) / "shards").is_dir())
        assert drawn(run, step) == drawn(tmp_path / "whole", step)
    assert kinds == [False, True, False, True]
    assert_same(run, tmp_path / "whole", 1e-10, steps=4)
    one_result, whole = (json.loads((x / "result.json").read_text()) for x in (run, tmp_path / "whole"))
    assert all(one_result[k] == whole[k] for k in ("base", "test", "scorer", "tokens_sampled", "reward_seen"))


@pytest.mark.parametrize("shard", ["none", "full"])
def test_what_is_not_finite_in_one_process_ends_both_with_its_cause(tmp_path, cases, shard):
    """One group a process; only the second one's rewards, and so its loss, are out of all proportion."""
    method, items = cases["rft"]
    (tmp_path / "reward.py").write_text(REWARD + HUGE)
    settings = [*items, f"reward.function={tmp_path / 'reward.py'}:huge", "credit.scale=none", "log.gradients_every=0"]
    settings += ["train.prompts=2", "train.updates=1", f"model.shard={shard}"]
    arguments = ["-m", "unift", "train", "--quiet", "--recipe=lock", f"--method={method}", f"run={tmp_path / 'run'}"]
    code, _, err = launched([*arguments, *settings], 2)
    assert code != 0
    assert "error: process 0: the loss is" in err and "in process 1. The run stops before" in err, err
    assert "error: process 1: the loss is" in err and "Traceback" not in err.split("torch/distributed/elastic")[0]
    assert len(list((tmp_path / "run" / "nonfinite").glob("*.pt"))) == 2
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))
