"""The table of what learning the jigsaw forgets: accuracy at which runs are compared, means over seeds, figure, what is missing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import script


@pytest.fixture(scope="module")
def tool():
    return script(Path(__file__).parents[1] / "tools" / "jigsaw_table.py")


def points(*pairs):
    """(accuracy on the jigsaw, on all older tasks) at steps 0, 10, ...; the older tasks' log-prob falls by 0.1 a point."""
    return [
        {"step": 10 * i, "exact": new, "older": dict.fromkeys(("colour", "shape", "half"), old), "logp": -0.1 * i}
        for i, (new, old) in enumerate(pairs)
    ]


def test_runs_are_compared_where_they_first_reach_an_accuracy(tool):
    """Linear between two evaluations: halfway from .7 to .9 the older tasks are halfway from .6 to .2."""
    assert tool.kept_at(points((0.0, 1.0), (0.7, 0.6), (0.9, 0.2), (0.7, 0.1), (0.9, 0.0)), 0.8) == pytest.approx(0.4)
    assert tool.kept_at(points((0.0, 1.0), (0.5, 0.3)), 0.8) == 0.3  # its end, where it never does
    assert tool.kept_at([*points((0.0, 1.0), (0.8, 0.5)), {"step": 15, "exact": None, "older": {}}], 0.8) == 0.5


def test_the_table_has_what_is_finished(tool, tmp_path, monkeypatch, capsys):
    """Means and ranges over seeds; runs that are missing are left out, and the figure is made."""
    for seed, last in enumerate((0.4, 0.6)):
        folder = tool.folder_of(tmp_path, "sft", 1e-3, seed)
        folder.mkdir()
        told = {"points": points((0.0, 1.0), (0.8, last)), "nll": 0.3, "nll_whole": 3.0}
        (folder / "older.json").write_text(json.dumps(told))
    monkeypatch.setattr(sys, "argv", ["jigsaw_table.py", str(tmp_path), "--table"])
    tool.main()
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| sft", "| rft", "| uft"))]
    assert "| sft | 0.001 | 10 [10, 10] | 80 [80, 80] | 100 -> 50 [40, 60] |" in row
    assert "| 50 [40, 60] | -0.10 [-0.10, -0.10] | 3.0 |" in row
    assert (tmp_path / "forgetting.png").stat().st_size > 1000
