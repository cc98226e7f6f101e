"""Settings: layers, refusals with the nearest name, identity of a run."""

from __future__ import annotations

import pytest
import yaml
from conftest import settings

from unift.config.identity import config_hash, differences, flat, to_yaml
from unift.config.packaged import preset_names, recipe_names, recipe_text
from unift.config.resolve import parse_overrides, resolve, validate
from unift.config.stages import stages
from unift.rows.tasks import get_task, make_rows
from unift.types import ConfigError


def make(method="uft", *items, **more):
    return resolve(method, overrides=parse_overrides(["data.task=lock", *items]), **more)


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ("train.lrr=1", "unknown setting 'train.lrr'; did you mean 'lr'"),
        ("trian.lr=1", "did you mean 'train'"),
        ("train.lr=fast", "setting 'train.lr'.*'fast'"),
        ("show.schedule=cosin", "setting 'show.schedule'"),
        ("train.updates=5", "train.prompts=32 does not divide into train.updates=5"),
        ("sample.completions=1", "every advantage would be 0"),
        ("policy.norm=microbatch_token_mean", "needs train.micro_prompts"),
        ("data.train=rows.jsonl", "both set"),
        ("lr", "expected key=value"),
    ],
)
def test_refusals(item, said):
    with pytest.raises(ConfigError, match=said):
        make("uft", item)


def test_nothing_to_learn_from():
    with pytest.raises(ConfigError, match="nothing to learn from"):
        make("rft", "sample.completions=0")


def test_unknown_method():
    with pytest.raises(ConfigError, match="did you mean 'uft'"):
        make("utf")


def test_layers():
    """default < preset < recipe < recipe of the method < file < key=value."""
    recipe = yaml.safe_load(recipe_text("lock"))
    assert make().train.lr == 1e-6
    assert resolve("uft", recipe="lock").train.lr == recipe["train"]["lr"]
    assert resolve("sft", recipe="lock").train.lr == recipe["methods"]["sft"]["train"]["lr"]
    file = {"train": {"lr": 0.5, "warmup": 3}}
    assert resolve("sft", recipe="lock", file=file).train.lr == 0.5
    both = resolve("sft", recipe="lock", file=file, overrides=parse_overrides(["train.lr=0.25"]))
    assert (both.train.lr, both.train.warmup) == (0.25, 3)


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_resolves_for_its_methods(recipe):
    """Each method keeps what the recipe says about it, it samples where its preset does, and the rows can be made."""
    tree = yaml.safe_load(recipe_text(recipe))
    for method in {"uft", "r3", *tree["baselines"], *tree["methods"]}:
        config, own = resolve(method, recipe=recipe), tree["methods"].get(method, {})
        found = flat(config.model_dump())
        for key, value in flat({k: v for k, v in own.items() if k != "phases"}).items():
            assert found[key] == (tuple(value) if isinstance(value, list) else value), (method, key)
        for stage in stages(config):
            samples = make(stage.rules.method).sample.completions > 0
            assert (stage.rules.sample.completions > 0) == samples, method
    row = make_rows(config.data.task, 1, 0, "train", **config.data.options)[0]
    assert get_task(config.data.task).score(row.solution, row).right


@pytest.mark.parametrize("method", preset_names())
def test_presets_resolve_and_round_trip(method):
    config = make(method)
    again = validate(yaml.safe_load(to_yaml(config)))
    assert again == config and config_hash(again) == config_hash(config)


def test_uft_paper_is_the_official_setting():
    p = make("uft-paper")
    assert (p.train.prompts, p.sample.completions, p.train.updates, p.train.steps) == (256, 4, 4, 500)
    assert (p.show.high, p.show.low, p.show.cuts, round(p.show.until * p.train.steps)) == (0.95, 0.05, 5, 300)
    assert (p.policy.low, p.policy.high, p.reference.kl, p.policy.entropy, p.likelihood.weight) == (
        0.2,
        0.2,
        0.001,
        0.001,
        0.001,
    )
    assert (p.train.lr, p.train.clip_norm, p.reward.format_score, p.credit.scale) == (1e-6, 1.0, 0.1, "sample_std")
    assert p.train.micro_prompts * p.sample.completions == 16 and p.policy.norm == "microbatch_token_mean"


def test_hash_ignores_what_does_not_move_numbers():
    base = config_hash(make())
    assert config_hash(make("uft", "save.every=3", "run=x", "reward.workers=4")) == base
    assert config_hash(make("uft", "seed=1")) != base
    assert differences(make(), make("uft", "train.lr=1e-5")) == ["train.lr: 1e-06 -> 1e-05"]


def test_an_item_of_a_list_is_set_by_its_place():
    """``phases.0.share`` changes that phase alone; a place that is not there is refused."""
    words = ["phases.0.share=0.2", "phases.1.share=0.8", "phases.1.train.lr=0.5"]
    plain, changed = (resolve("sft-rft", recipe="lock", overrides=parse_overrides(w)) for w in ([], words))
    assert [(p.method, p.share) for p in changed.phases] == [("sft", 0.2), ("rft", 0.8)]
    assert [p.train.lr for p in changed.phases] == [plain.phases[0].train.lr, 0.5]
    assert changed.phases[0].model_copy(update={"share": plain.phases[0].share}) == plain.phases[0]
    for word in ("phases.2.share=1", "phases.first.share=1"):
        with pytest.raises(ConfigError, match=r"phases is a list of 2; expected phases\.0 to phases\.1"):
            resolve("sft-rft", recipe="lock", overrides=parse_overrides([word]))


def test_phases():
    config = resolve("sft-rft", recipe="lock")
    one, two = stages(config)
    first, second = one.rules, two.rules
    assert (one.start, one.stop, two.start, two.stop) == (0, 200, 200, 600)
    assert first.sample.completions == 0 and first.likelihood.tokens == "demo"
    assert second.sample.completions == 8 and second.likelihood.weight == 0
    with pytest.raises(ConfigError, match="add up to"):
        stages(config.model_copy(update={"phases": config.phases[:1]}))


@pytest.mark.parametrize("word", ["url=http://10.0.0.1:8000", "folder=/dev/shm/unift", "transfer=nccl"])
def test_a_server_that_nobody_asks_is_an_error(word):
    """engine.kind=auto samples in this process; native and plain are said outright, and vllm is meant."""
    with pytest.raises(
        ConfigError, match=r"is of a server, and engine.kind=auto samples in this process. Set engine.kind=vllm"
    ):
        settings("uft", f"engine.{word}")
    for kind in ("vllm", "native"):
        settings("uft", f"engine.{word}", f"engine.kind={kind}")
