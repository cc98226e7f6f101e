"""The map (docs/architecture.md): its files and names exist, its rooms have the law's order, its equations their source."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
SOURCE = ROOT / "src" / "unift"


def module(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


docs, layers = module(ROOT / "tools" / "docs.py"), module(ROOT / "tests" / "test_layers.py")


def missing(text: str) -> list[str]:
    """What a page names in backquotes and the package does not have: `room/file.py`, `room/file.py::name`, `room/folder/`."""
    found = []
    for word in re.findall(r"`([\w/.]+(?:::[\w.]+)?)`", text):
        path, _, name = word.partition("::")
        if not (path.endswith(".py") or path.endswith("/")):
            continue
        inside, outside = SOURCE / path, ROOT / path
        if not (inside.exists() or outside.exists()):
            found.append(word)
        elif name and (not inside.is_file() or name not in docs.definitions(inside)):
            found.append(word)
    return found


def test_every_name_of_the_page_exists():
    assert missing(PAGE) == []
    assert len(re.findall(r"`[\w/.]+\.py::", PAGE)) > 40


@pytest.mark.parametrize(
    "word", ["objectives/loss.py::no_such", "objectives/no_such.py", "no_room/", "rows/tokens.py::Encoded.no_such"]
)
def test_what_is_missing_is_found(word):
    assert missing(f"see `{word}`, not `rows/tokens.py::Encoded.hint`, `rng.py::generator` or `config/presets/`") == [
        word
    ]


def test_rooms_in_the_laws_order():
    (line,) = re.findall(r"^_version .*$", PAGE, re.MULTILINE)
    files, _, rooms = line.partition("|")
    assert (tuple(files.split()), tuple(rooms.split())) == (layers.FOUNDATION, layers.ROOMS)
    rows = re.findall(r"^\| `(\w+)` \| .* \| (yes|no) \|$", PAGE, re.MULTILINE)
    assert tuple(name for name, _ in rows) == layers.ROOMS
    light = {name for name, torch in rows if torch == "no"}
    assert light - {"commands"} == set(layers.LIGHT) & set(layers.ROOMS)


@pytest.mark.parametrize("row", docs.EQUATIONS, ids=lambda row: f"{row[1]}:{row[2]}")
def test_equations_name_their_source(row):
    equation, file, name, source = row
    _, text = docs.definitions(SOURCE / file)[name]
    assert source in " ".join(text.split()), f"{equation}: the docstring of {file}::{name} does not say {source!r}"


def test_no_equation_is_left_out():
    """Every function that computes a numbered equation ("eq. 7") stands in the table."""
    listed = {(file, name) for _, file, name, _ in docs.EQUATIONS}
    other = {("hints/schedules.py", ""), ("hints/schedules.py", "probability")}  # say what they share with ``cosine``
    found = set()
    for room in ("hints", "credit", "objectives", "training", "rows", "sampling", "model"):
        for path in sorted((SOURCE / room).rglob("*.py")):
            file = str(path.relative_to(SOURCE))
            found |= {
                (file, n) for n, (_, text) in docs.definitions(path).items() if re.search(r"\beq\. [\dA-Z]", text)
            }
    assert len(found) > 10 and found <= listed | other, sorted(found - listed - other)


def test_lines_are_those_of_the_functions():
    """The table's line is where the function begins."""
    rows = re.findall(r"\| `([\w/]+\.py):(\d+)` \| `(\w+)` \|", PAGE)
    assert len(rows) > 20
    for file, number, name in rows:
        line = (SOURCE / file).read_text(encoding="utf-8").splitlines()[int(number) - 1]
        assert line.startswith(f"def {name}("), f"{file}:{number} is {line!r}. Run `make docs-text`"
