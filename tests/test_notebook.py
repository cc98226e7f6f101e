"""The notebook: committed with the outputs of one clean run, and it still runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "first_run.ipynb"


def cells():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def source(cell):
    return "".join(cell["source"])


def printed(run_cells):
    return "".join("".join(o["text"]) for c in run_cells for o in c.get("outputs", []) if o["output_type"] == "stream")


def accuracies(text):
    """(before, after) of the line that says them, in per cent."""
    return tuple(map(int, re.search(r"(\d+)% before, (\d+)% after", text).groups()))


def test_outputs_are_those_of_one_clean_run():
    code = [c for c in cells() if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    kinds = [o["output_type"] for c in code for o in c["outputs"]]
    assert "error" not in kinds and "display_data" in kinds
    assert not [o for c in code for o in c["outputs"] if o.get("name") == "stderr"]
    assert any("image/png" in o.get("data", {}) for c in code for o in c["outputs"])
    assert NOTEBOOK.stat().st_size < 100_000
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|tmp|Users|work)/", text)
    before, after = accuracies(printed(code))
    assert before < 10 and after >= 80


def test_it_defines_its_own_rows_and_reward():
    text = "\n".join(source(c) for c in cells() if c["cell_type"] == "code")
    assert "def opens(completion, row" in text and '"prompt": ' in text and "unift.train(" in text
    assert set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE)) <= {"random", "time", "unift", "matplotlib"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive:UserWarning")  # of plt.show() in a script
def test_it_runs(tmp_path, monkeypatch, capsys):
    """By nbclient where it is installed, else its code cells as a script; the model learns the lock either way."""
    try:
        import nbformat
        from nbclient import NotebookClient
    except ImportError:
        monkeypatch.chdir(tmp_path)
        import matplotlib

        matplotlib.use("agg")
        space = {"__name__": "__main__"}
        for cell in cells():
            if cell["cell_type"] == "code":
                exec(compile(source(cell).replace("%matplotlib inline\n", ""), NOTEBOOK.name, "exec"), space)
        text = capsys.readouterr().out
    else:
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(tmp_path)}}).execute()
        text = printed(json.loads(nbformat.writes(notebook))["cells"])
    before, after = accuracies(text)
    assert before < 10 and after >= 80
