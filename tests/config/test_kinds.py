"""Names and values as people type them: other libraries' names, true for 1, a path beside its YAML file."""

from __future__ import annotations

import pytest
import yaml

from unift.config import aliases, packaged
from unift.config.identity import flat
from unift.config.resolve import beside, parse_overrides, read_yaml, resolve
from unift.config.sections import Config, Lora, Phase, Section
from unift.rows.tasks import base
from unift.types import ConfigError, closest


def make(*items):
    return resolve("uft", overrides=parse_overrides(["data.task=lock", *items]))


def settings(model, prefix=""):
    """Dotted name -> annotation of every setting."""
    found = {}
    for name, field in model.model_fields.items():
        section = next(
            (t for t in (field.annotation, *getattr(field.annotation, "__args__", ())) if _is_section(t)), None
        )
        found[prefix + name] = field.annotation
        if section is not None and section is not Phase:
            found |= settings(section, f"{prefix}{name}.")
    return found


def _is_section(annotation):
    return isinstance(annotation, type) and issubclass(annotation, Section)


def parts(annotation):
    return {annotation} | {part for inner in getattr(annotation, "__args__", ()) for part in parts(inner)}


ALL = settings(Config)
NUMBERS = [n for n, a in ALL.items() if {int, float} & parts(a) and bool not in parts(a)]
SWITCHES = [n for n, a in ALL.items() if a is bool]


def test_every_suggestion_is_a_setting():
    meant = {setting for words in aliases.SETTINGS.values() for setting in words.split(" and ")}
    assert meant <= set(ALL) and set(aliases.NOTES) <= set(aliases.SETTINGS)
    assert not set(aliases.SETTINGS) & {n for n in ALL if "." not in n}, "a name of ours is no other library's"


@pytest.mark.parametrize(
    ("item", "meant"),
    [
        ("lr=1", "'train.lr'"),
        ("train.learning_rate=1", "'train.lr'"),
        ("num_generations=8", "'sample.completions'"),
        ("train.max_completion_length=8", "'sample.max_tokens'"),
        ("max_prompt_length=8", "'data.max_prompt'"),
        ("beta=0.1", "'reference.kl'"),
        ("train.per-device-train-batch-size=8", "'train.prompts'"),
        ("gradient_accumulation_steps=8", "'train.token_budget'"),
        ("num_iterations=2", "'train.epochs'"),
        ("epsilon=0.2", "'policy.low' and 'policy.high'"),
        ("actor_rollout_ref.rollout.n=8", "'sample.completions'"),
        ("actor_rollout_ref.actor.ppo_mini_batch_size=8", "'train.updates'"),
        ("algorithm.kl_ctrl.kl_coef=0.1", "'reference.kl'"),
        ("train.temperature=0.5", "'sample.temperature'"),
        ("train.seed=1", "'seed'"),
        ("phases=[{method: rft, share: 1, train: {learning_rate: 1}}]", "'train.lr'"),
    ],
)
def test_names_of_other_libraries(item, meant):
    with pytest.raises(ConfigError) as error:
        make(item)
    assert f"; did you mean {meant}" in str(error.value) and "\n" not in str(error.value)


def test_a_whole_file_of_another_library():
    """A line for each setting that has a counterpart here."""
    tree = {"data": {"task": "lock"}, "algorithm": {"gamma": 1, "adv_estimator": "grpo"}, "trainer": {"save_freq": 3}}
    with pytest.raises(ConfigError) as error:
        resolve("uft", file=tree)
    assert str(error.value).splitlines() == [
        "unknown setting 'algorithm.adv_estimator'; did you mean 'credit.baseline'?",
        "unknown setting 'trainer.save_freq'; did you mean 'save.every'?",
    ]


@pytest.mark.parametrize("name", NUMBERS)
def test_true_is_no_number(name):
    with pytest.raises(ConfigError, match=f"setting '{name}': expected a number; found True"):
        make(f"{name}=true")


@pytest.mark.parametrize("value", ['"no"', "1", "0.0", "[true]"])
@pytest.mark.parametrize("name", SWITCHES)
def test_only_true_and_false_are_switches(name, value):
    with pytest.raises(ConfigError, match=f"setting '{name}': "):
        make(f"{name}={value}")


def test_the_lists_above_hold_something():
    assert {"train.steps", "seed", "policy.weight", "eval.rows", "train.betas", "model.lora.rank"} <= set(NUMBERS)
    assert {"save.rollouts", "credit.whiten", "model.cuda_graphs"} <= set(SWITCHES)


def test_numbers_inside_a_pair():
    with pytest.raises(ConfigError, match="setting 'train.betas': expected a number"):
        make("train.betas=[true, 0.9]")
    assert make("train.betas=[0.5, 0.75]", "train.lr=1e-3").train.betas == (0.5, 0.75)


@pytest.mark.parametrize("name", ["seed", "data.seed", "train.steps", "train.prompts", "threads"])
@pytest.mark.parametrize("value", [2**70, f'"{2**70}"', 1.5e40])
def test_whole_numbers_fit_64_bits(name, value):
    with pytest.raises(ConfigError, match=f"setting '{name}': "):
        make(f"{name}={value}")


@pytest.mark.parametrize(
    ("value", "meant"),
    [("true", Lora()), ("16", Lora(rank=16)), ("false", None), ("null", None), ("{rank: 4}", Lora(rank=4))],
)
def test_lora_in_short(value, meant):
    assert make(f"model.lora={value}").model.lora == meant


def test_rows_of_ones_own_need_a_model():
    for recipe in (None, "lock"):
        with pytest.raises(ConfigError, match="data.train='rows.jsonl' without model.path: set model.path=FOLDER"):
            resolve("uft", recipe=recipe, overrides=parse_overrides(["data.train=rows.jsonl", "data.task=null"]))
    own = ["data.train=rows.jsonl", "model.path=embedded:lock"]  # asked for by name, it is no accident
    assert resolve("uft", overrides=parse_overrides(own)).model.path == "embedded:lock"


# ---------------------------------------------------------------------------------------------- paths


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A YAML file with its rows, model and reward in a folder, seen from another one."""
    (tmp_path / "project" / "model").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    for name in ("rows.jsonl", "mine.py"):
        (tmp_path / "project" / name).write_text("")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "project" / "run.yaml"


def written(path, **tree):
    path.write_text(yaml.safe_dump(tree))
    return read_yaml(path)


def test_paths_beside_a_file(project):
    tree = written(project, model={"path": "model"}, data={"train": "rows.jsonl"}, reward={"function": "mine.py:score"})
    found = flat(beside(tree, project, {}))
    folder = project.parent
    assert found["model.path"] == str(folder / "model") and found["data.train"] == str(folder / "rows.jsonl")
    assert found["reward.function"] == f"{folder / 'mine.py'}:score"


def test_several_rewards_beside_a_file(project):
    rewards = ["mine.py:score", {"function": "mine.py:length", "weight": 0.5}, "auto"]
    found = beside(written(project, reward={"function": rewards}), project, {})["reward"]["function"]
    mine = project.parent / "mine.py"
    assert found == [f"{mine}:score", {"function": f"{mine}:length", "weight": 0.5}, "auto"]


def test_the_working_folder_comes_first(project, tmp_path):
    (tmp_path / "here" / "rows.jsonl").write_text("")
    assert beside(written(project, data={"train": "rows.jsonl"}), project, {}) == {"data": {"train": "rows.jsonl"}}


def test_a_path_in_neither_place_says_where_it_was_looked_for(project, tmp_path):
    tree = written(project, data={"test": "none.jsonl"})
    with pytest.raises(ConfigError) as error:
        beside(tree, project, {})
    said = str(error.value)
    assert f"data.test='none.jsonl' of {project} does not exist" in said
    assert f"looked in {tmp_path / 'here'} and, beside the file, in {project.parent}" in said
    assert beside(tree, project, {"data": {"test": "other.jsonl"}}) == tree  # another value counts in the end


@pytest.mark.parametrize(
    "tree",
    [
        {"model": {"path": "embedded:lock"}},
        {"data": {"train": "hf:owner/name"}},
        {"data": {"train": "given"}},
        {"reward": {"function": "module.name:score"}},
        {"reward": {"function": "auto"}},
        {"data": {"train": None}},
        {"data": 3},
    ],
)
def test_names_that_are_no_paths(project, tree):
    assert beside(tree, project, {}) == tree


# ---------------------------------------------------------------------------------------------- one function each


@pytest.mark.parametrize("word", ["utf", "lok", "cosin", "grop", "zzzz", "ft"])
def test_settings_and_tasks_guess_alike(word):
    known = ["uft", "lock", "cosine", "grpo", "sft"]
    near = closest(word, known)
    assert (f"{near!r}" in packaged.nearest(word, known)) if near else packaged.nearest(word, known) == ""
    assert (f" Did you mean {near!r}?" in base.nearest(word, known)) == (near is not None)


def test_identity_and_the_page_of_a_run_flatten_settings_alike():
    from unift.commands.report import gather
    from unift.config import identity

    assert gather.flat is identity.flat
    config = make()
    names = identity.numeric_settings(config).keys()
    assert {"train.lr", "data.options", "train.betas", "phases"} <= names
    assert all(name.split(".")[0] not in ("save", "log", "run") for name in names)
    assert flat({"a": {"b": {"c": 1}, "d": [{"e": 2}]}, "f": {}}) == {"a.b.c": 1, "a.d": [{"e": 2}], "f": {}}


@pytest.mark.parametrize("name", ["policy.weight", "data.solved", "model.lora.targets"])
def test_a_setting_of_several_types_is_one_line(name):
    """What each of its types expects, and the setting's own name."""
    with pytest.raises(ConfigError) as error:
        make(f"{name}={{a: 1}}")
    text = str(error.value)
    assert text.startswith(f"setting '{name}': input should be ") and ", or input should be " in text
    assert text.endswith("; found {'a': 1}") and "\n" not in text


def test_items_of_a_list_keep_their_place():
    with pytest.raises(ConfigError, match="setting 'train.betas.1': .*found 'x'"):
        make("train.betas=[0.5, x]")
    with pytest.raises(ConfigError, match="setting 'phases.0.share': .*found 'x'"):
        make("phases=[{method: sft, share: x}]")
