"""Generated text of the documents (`tools/docs.py`): nothing is stale, and a stale block is found."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field

TOOL = Path(__file__).parents[1] / "tools" / "docs.py"
spec = importlib.util.spec_from_file_location("docs_tool", TOOL)
docs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(docs)


@pytest.mark.parametrize("path", docs.documents(), ids=lambda p: p.stem)
def test_nothing_is_stale(path):
    _, _, stale = docs.rewritten(path.read_text(encoding="utf-8"))
    assert not stale, f"{path.name}: {', '.join(stale)}. Run `make docs-text`"


def test_every_block_has_its_place():
    """Each stands in one document, so that a new section of the settings cannot stay without its table."""
    names = Counter(name for path in docs.documents() for name in docs.rewritten(path.read_text(encoding="utf-8"))[1])
    assert names == Counter(docs.BLOCKS.keys())


@pytest.mark.parametrize(
    "text",
    [
        "before <!-- generated: methods count -->7<!-- end --> after",
        "before\n<!-- generated: methods count -->\n7\n<!-- end -->\nafter",
        "before\n  # <!-- generated: methods count -->\n7\n  # <!-- end -->\nafter",
    ],
)
def test_a_stale_block_is_made_anew(text):
    new, names, stale = docs.rewritten(text)
    assert names == stale == ["methods count"]
    assert new == text.replace("7", str(len(docs.preset_names())))
    assert docs.rewritten(new) == (new, names, [])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- generated: no such -->7<!-- end -->", "no block is called 'no such'"),
        ("<!-- generated: methods count -->7", "has no `<!-- end -->`"),
        ("<!-- generated: methods count -->\n7\n", "has no `<!-- end -->`"),
    ],
)
def test_broken_markers_are_refused(text, said):
    with pytest.raises(SystemExit, match=said):
        docs.rewritten(text)


def test_settings_in_words():
    class Inner(BaseModel):
        """What it is."""

        rank: int = Field(default=16, ge=1)

    class Outer(BaseModel):
        word: Literal["a", "b"] = "a"
        lr: float = Field(default=1e-6, gt=0, lt=1, description="of <this> | that")
        pair: tuple[Annotated[float, Field(ge=0)], float] = (0.9, 0.999)
        inner: Inner | None = None
        names: list[Literal["x"]] = Field(default_factory=list)
        must: str

    assert docs.settings_table(Outer, "o.").splitlines() == [
        "| key | value | default | |",
        "|---|---|---|---|",
        "| `o.word` | `a`, `b` | `a` |  |",
        "| `o.lr` | number, > 0, < 1 | `1e-06` | of &lt;this> \\| that |",
        "| `o.pair` | pair | `[0.9, 0.999]` |  |",
        "| `o.inner` | mapping or null | `null` |  |",
        "| `o.names` | list of `x` | `[]` |  |",
        "| `o.must` | text | required |  |",
        "",
        "What it is.",
        "",
        "| key | value | default | |",
        "|---|---|---|---|",
        "| `o.inner.rank` | whole number, >= 1 | `16` |  |",
    ]


def test_every_method_has_one_kind():
    groups = docs.by_kind()
    assert sorted(m for methods in groups.values() for m in methods) == sorted(docs.preset_names())
    assert all(groups.values())
    for method, kind in {
        "uft": "hints and a reward",
        "grpo": "a reward",
        "sft": "solutions",
        "reft": "one after the other",
    }.items():
        assert method in groups[kind]


def test_every_setting_says_what_it_is():
    tables = [make() for name, make in docs.BLOCKS.items() if name.startswith("settings ")]
    rows = [line for table in tables for line in table.splitlines() if line.startswith("| `")]
    assert len(rows) > 90 and [row for row in rows if row.endswith("|  |")] == []
