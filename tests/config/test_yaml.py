"""Settings in YAML: a name that stands twice is an error, wherever it stands."""

from __future__ import annotations

import pytest

from unift.config.resolve import parse_overrides, read_yaml
from unift.types import ConfigError


@pytest.mark.parametrize(
    "text",
    [
        "train:\n  lr: 1\nseed: 0\ntrain:\n  steps: 3\n",
        "train:\n  lr: 1\n  lr: 2\n",
        "phases:\n- {method: sft, method: rft}\n",
    ],
)
def test_a_name_that_stands_twice_is_no_setting(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match="run.yaml is not valid YAML: '(train|lr|method)' stands there twice"):
        read_yaml(file)


def test_it_is_said_of_words_too():
    with pytest.raises(ConfigError, match="cannot read the value of 'model.lora'.*'rank' stands there twice"):
        parse_overrides(["model.lora={rank: 4, rank: 8}"])


def test_names_of_a_merged_mapping_may_be_replaced(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n")
    assert read_yaml(file) == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}}
