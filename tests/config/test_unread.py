"""Settings that a run does not read, told to whoever sets them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from unift.config import words
from unift.config.identity import flat
from unift.config.packaged import preset_names, preset_text
from unift.config.resolve import parse_overrides, resolve
from unift.config.sections import Config, Show
from unift.config.unread import READ, SHOWN, sampling_by_hand, unread
from unift.hints import schedules


def told(method, *items):
    by_hand = parse_overrides(items)
    return unread(resolve(method, overrides=parse_overrides(["data.task=lock", *items])), by_hand)


@pytest.mark.parametrize(
    ("method", "item", "said"),
    [
        ("sft", "sample.source=reference", "sample.source=reference has no effect with sample.completions=0"),
        ("rloo", "policy.low=0.3", "policy.low=0.3 has no effect with policy.loss=reinforce"),
        ("rloo", "reference.estimator=k2", "reference.estimator=k2 has no effect with reference.kl=0.05"),
        ("rft", "likelihood.weight=0.5", "likelihood.weight=0.5 has no effect with likelihood.tokens=none"),
        ("uft", "show.rate=0.1", "show.rate=0.1 has no effect with show.schedule=cosine"),
        ("uft", "likelihood.gamma=0.5", "likelihood.gamma=0.5 has no effect with likelihood.rule=nll"),
        ("srft", "credit.scale=population_std", "credit.scale=population_std has no effect with credit.baseline=sign"),
        ("grpo", "credit.value_clip=1", "credit.value_clip=1 has no effect with credit.baseline=group_mean"),
        ("sft-rft", "phases.0.train.steps=9", "phases.0.train.steps=9 has no effect: train.steps is of the whole run"),
        ("sft-rft", "phases.0.policy.high=0.3", "phases.0.policy.high=0.3 has no effect with policy.loss=clip"),
    ],
)
def test_what_has_no_effect(method, item, said):
    (line,) = told(method, item)
    assert line.startswith(said)


def test_a_supervised_method_that_is_told_to_sample():
    """A number of completions that was meant for the methods beside it makes sft another method."""
    (line,) = told("sft", "sample.completions=2")
    assert line.startswith(
        "sft samples nothing by its preset; with sample.completions=2 it also learns from the reward"
    )
    (line,) = told("sft-rft", "sample.completions=2")
    assert line.startswith("sft samples nothing by its preset; with phases.0.sample.completions=2 ")
    for method in preset_names():
        assert sampling_by_hand(resolve(method, overrides={"data": {"task": "lock"}})) == [], method


def test_what_has_one():
    """Read by one stage of several is read."""
    assert told("sft-rft", "policy.high=0.3", "train.steps=10", "phases.1.policy.high=0.3") == []
    assert told("chord", "likelihood.final=0.1", "likelihood.weight=0.5", "credit.scale=none") == []
    assert told("dpo", "policy.beta=0.2", "reference.kl=0.1") == []
    assert told("prefix-rft", "policy.loss=reinforce", "policy.high=0.3", "policy.dual_clip=2") == []


def test_what_a_phase_replaces():
    """A packaged phase's own value wins over one for the whole run: whoever sets the latter is told where it stands."""
    (line,) = told_of_smollm2("train.lr=1.0e-5")
    assert line.startswith(
        "train.lr=1e-05 does not reach phase 1 (rft), which has 3e-06 of its own: set phases.1.train.lr"
    )
    assert told_of_smollm2("train.lr=3.0e-6") == [], "the same value"
    assert told_of_smollm2("train.lr=1.0e-5", "phases.1.train.lr=2.0e-6") == [], "both by hand"
    assert len(told_of_smollm2("train.prompts=4", "train.decay=linear")) == 2, "phase 0 alone has its own"


def told_of_smollm2(*items):
    by_hand = parse_overrides(items)
    return unread(resolve("sft-rft", recipe="smollm2", overrides=by_hand), by_hand)


def test_a_list_of_phases():
    phases = [
        {"method": "sft", "share": 0.5, "train": {"steps": 5}},
        {"method": "rft", "share": 0.5, "policy": {"high": 0.3}},
    ]
    file = {"data": {"task": "lock"}, "phases": phases}
    (line,) = unread(resolve("uft", file=file), file)
    assert line.startswith("phases.0.train.steps=5 has no effect")


def test_a_config_that_a_run_wrote_says_nothing():
    for method in ("uft", "sft-rft"):
        config = resolve(method, overrides=parse_overrides(["data.task=lock"]))
        assert unread(config, config.model_dump(mode="json")) == []


@pytest.mark.parametrize("schedule", words.SCHEDULES)
def test_what_schedules_read(schedule):
    """By trying: a setting is read where a step's hints, or what is learnt about a row, depend on it."""
    other = {"high": 0.8, "low": 0.2, "until": 0.9, "draw": "rounded", "stages": "floored", "target": 0.6, "rate": 0.2}

    def drawn(show):
        shown = []
        for row in map(str, range(12)):
            for step in range(0, 100, 3):
                shown.append(schedules.draw(show, schedules.At(0, step, 100, row), 9))
            span = schedules.advance(show, None, schedules.Seen(0.4, 0.55))
            shown.append(schedules.draw(show, schedules.At(0, 5, 100, row), 9, span))
        return shown

    plain = Show(schedule=schedule)
    read = {name for name, value in other.items() if drawn(plain.model_copy(update={name: value})) != drawn(plain)}
    assert read == set(SHOWN[schedule].split())


def test_the_table_names_settings():
    known = flat(Config().model_dump()).keys()
    assert READ.keys() <= known and {decides for decides, _ in READ.values()} <= known


# Said though the rest decides it: what a reader of the preset asks for first.
SPELT_OUT = ("credit.scale", "credit.baseline", "credit.epsilon", "credit.overlong", "show.draw")


@pytest.mark.parametrize("method", preset_names())
def test_presets_set_nothing_in_vain(method):
    tree = yaml.safe_load(preset_text(method))
    tree = {name: section for name, section in tree.items() if name != "phases"}
    config = resolve(method, overrides=parse_overrides(["data.task=lock"]))
    found = {line.split("=")[0] for line in unread(config, tree)}
    assert {n for n in found if flat(tree)[n] not in ("none", 0)} <= set(SPELT_OUT)


def test_a_start_says_so():
    command = [
        sys.executable,
        "-m",
        "unift",
        "train",
        "--recipe",
        "lock",
        "--method",
        "rloo",
        "--dry-run",
        "policy.low=0.3",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "note: policy.low=0.3 has no effect with policy.loss=reinforce" in done.stderr
