"""The vocabulary: settings, entries and functions hold the same words, and a new word takes few lines in two files."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from unift.config import words
from unift.config.packaged import preset_names
from unift.config.resolve import resolve
from unift.config.sections import Config, Show
from unift.credit import discriminative
from unift.credit.advantages import RULES
from unift.credit.members import KEEPS, PAIRS
from unift.hints import schedules
from unift.objectives import input_noise, likelihood, weights
from unift.objectives import loss as objectives
from unift.training import annealing, optimizer, update

SOURCE = Path(words.__file__).parents[1]

SEQUENCES = {name for name, word in words.LOSSES.items() if word.sequences}
KINDS = {
    # kind: (type of the setting, section and field, entries, functions)
    "schedule": (words.ScheduleName, ("show", "schedule"), words.SCHEDULES, schedules.SCHEDULES),
    "baseline": (words.BaselineName, ("credit", "baseline"), words.BASELINES, RULES),
    "sequence_logp": (
        words.SequenceLogpName,
        ("credit", "sequence_logp"),
        words.SEQUENCE_LOGPS,
        discriminative.SEQUENCE_LOGPS,
    ),
    "loss": (words.LossName, ("policy", "loss"), words.LOSSES, {**objectives.LOSSES, **PAIRS}),
    "off_policy": (
        words.OffPolicyName,
        ("policy", "off_policy"),
        words.OFF_POLICY,
        {"none": None, **objectives.OFF_POLICY},
    ),
    "norm": (words.NormName, ("policy", "norm"), words.NORMS, weights.NORMS),
    "keep": (words.KeepName, ("likelihood", "keep"), words.KEEPS, KEEPS),
    "rule": (words.RuleName, ("likelihood", "rule"), words.RULES, likelihood.RULES),
    "annealing": (words.AnnealingName, ("likelihood", "schedule"), words.ANNEALINGS, annealing.ANNEALINGS),
    "estimator": (words.EstimatorName, ("reference", "estimator"), words.ESTIMATORS, objectives.ESTIMATORS),
    "noise": (
        words.NoiseName,
        ("inputs", "noise"),
        words.NOISES,
        {"none": None, "adversarial": None, **input_noise.NOISES},
    ),
    "optimizer": (words.OptimizerName, ("train", "optimizer"), words.OPTIMIZERS, optimizer.MAKERS),
    "decay": (words.DecayName, ("train", "decay"), None, update.DECAYS),
    "tokens": (words.TokensName, ("likelihood", "tokens"), words.TOKENS, None),
    "source": (words.SourceName, ("sample", "source"), words.SOURCES, None),
    "into": (words.IntoName, ("reference", "into"), words.INTOS, None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_settings_entries_and_functions_hold_the_same_words(kind):
    names, (section, field), entries, functions = KINDS[kind]
    typed = Config.model_fields[section].annotation.model_fields[field].annotation
    assert get_args(typed) == get_args(names)
    for table in (entries, functions):
        assert table is None or set(table) == set(get_args(names))


def test_losses_of_sequences_are_those_with_labels():
    assert SEQUENCES == set(PAIRS) == set(objectives.SEQUENCES) and not SEQUENCES & set(objectives.LOSSES)


def test_every_text_fits_its_section():
    """No template names a setting that its section lacks."""
    sections = {
        "schedule": "show",
        "baseline": "credit",
        "loss": "policy",
        "rule": "likelihood",
        "annealing": "likelihood",
    }
    for kind, section in sections.items():
        for word in KINDS[kind][2].values():
            text = words.filled(word.text, getattr(Config(), section))
            assert "{" not in text
            assert "{" not in words.filled(getattr(word, "sentence", ""), getattr(Config(), section))


def test_an_unknown_word_is_an_error():
    show = Show().model_copy(update={"schedule": "cosin"})
    for call in (
        lambda: schedules.probability(show, 0, 10),
        lambda: schedules.draw(show, schedules.At(0, 0, 10, "r"), 5),
        lambda: schedules.share(show, schedules.At(0, 0, 10, "r")),
        lambda: schedules.expected_share(show, 0, 10),
    ):
        with pytest.raises(KeyError, match="cosin"):
            call()


@pytest.mark.parametrize("name", words.SCHEDULES)
def test_every_schedule_says_how_much_it_shows(name):
    show = Show(schedule=name)
    for step in range(10):
        assert 0 <= schedules.probability(show, step, 10) <= 1


@pytest.mark.parametrize("name", preset_names())
def test_presets_use_known_words(name):
    config = resolve(name, overrides={"data": {"task": "lock"}})
    for phase in config.phases or [config]:
        for _, (section, field), entries, _ in KINDS.values():
            assert entries is None or getattr(getattr(phase, section), field) in entries


# ---------------------------------------------------------------------------------------------- a new word

# docs/new-words.md shows the same lines: (file, the line that they follow or stand in, what is added).
EXPONENTIAL = [  # credit: exp(r / tau), the weight of reward-weighted regression
    (
        "config/words.py",
        '"critic", "partition"]',
        ', "critic", "partition", "exponential"]',
        ', "critic", "partition"]',
    ),
    (
        "config/words.py",
        "BASELINES: Mapping[BaselineName, Baseline] = {",
        '\n    "exponential": Baseline("exp(r)", grouped=True),',
        None,
    ),
    ("credit/advantages.py", '    "none": np.copy,', '\n    "exponential": np.exp,', None),
]
SQUARED = [  # likelihood: pi^2 l, a sharper DFT
    ("config/words.py", '    "tail",\n]', '    "tail",\n    "squared",\n]', '    "tail",\n]'),
    ("config/words.py", "RULES: Mapping[RuleName, Rule] = {", '\n    "squared": Rule("squared"),', None),
    (
        "objectives/likelihood.py",
        '    "nll": lambda t, s: t.l,',
        '\n    "squared": lambda t, s: (2 * t.l.detach()).exp() * t.l,',
        None,
    ),
]
LINEAR = [  # hints: p falls in a straight line
    ("config/words.py", '"adaptive", "bisection"]', '"adaptive", "bisection", "linear"]', '"adaptive", "bisection"]'),
    (
        "config/words.py",
        "SCHEDULES: Mapping[ScheduleName, Schedule] = {",
        '\n    "linear": Schedule("a line from {high:g}", sentence="hints that fade in a line", ends=True, falls=True),',
        None,
    ),
    (
        "hints/schedules.py",
        '    "cosine": Schedule(chance=cosine),',
        '\n    "linear": Schedule(chance=lambda show, at, span: show.high * (1 - at.step / hinted_steps(show, at.total))),',
        None,
    ),
]


def patched(tmp_path: Path, changes: list) -> tuple[int, int]:
    """A copy of the package with the changes; returns (files changed, lines added)."""
    shutil.copytree(SOURCE, tmp_path / "unift", ignore=shutil.ignore_patterns("__pycache__"))
    lines = 0
    for file, anchor, added, replaced in changes:
        path = tmp_path / "unift" / file
        text = path.read_text(encoding="utf-8")
        old = replaced or anchor
        assert text.count(old) == 1, (file, old, text.count(old))
        new = added if replaced else old + added
        lines += max(new.count("\n") - old.count("\n"), 1)
        path.write_text(text.replace(old, new), encoding="utf-8")
    return len({file for file, *_ in changes}), lines


@pytest.mark.parametrize(
    ("changes", "settings", "said"),
    [
        (EXPONENTIAL, ["--method", "rft", "credit.baseline=exponential", "credit.scale=none"], None),
        (SQUARED, ["--method", "sft", "likelihood.rule=squared"], None),
        (LINEAR, ["--method", "uft", "show.schedule=linear"], None),
    ],
    ids=["credit", "likelihood", "schedule"],
)
def test_a_new_word_takes_two_files_and_ten_lines(tmp_path, changes, settings, said):
    files, lines = patched(tmp_path, changes)
    assert files <= 2 and lines <= 10
    small = ["train.steps=2", "train.prompts=2", "data.train_rows=4", "data.test_rows=2", "eval.every=0", "threads=1"]
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import unift; assert unift.__file__.startswith({str(tmp_path)!r});"
    code += "from unift.commands.cli import main; sys.argv[1:] = sys.argv[2:]; main()"
    train = ["train", "--quiet", "--recipe", "lock", *settings, "--run", str(tmp_path / "run"), *small]
    done = subprocess.run([sys.executable, "-c", code, "-", *train], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "result.json").is_file()
