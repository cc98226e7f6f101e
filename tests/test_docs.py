"""The documents name tests as their proof, and commands: those exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.core
import typer.main

from unift.commands.cli import app
from unift.config.identity import flat
from unift.config.sections import Config

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    p for p in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))) if p.is_file()
]


def references(line: str) -> list[tuple[str, str]]:
    """(file, test) of every `tests/file.py::test`, `file.py::test`, `::test` (of the file named before) and `tests/file.py`,
    where the file may stand in a folder."""
    found, file = [], ""
    for word in re.findall(r"`([^`]+)`", line):
        if match := re.fullmatch(r"(?:tests/)?((?:\w+/)?test_\w+\.py)?(?:::(\w+))?", word):
            file = match[1] or file
            found.append((file, match[2] or ""))
    return [(f, t) for f, t in found if f or t]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_named_tests_exist(document):
    for number, line in enumerate(document.read_text(encoding="utf-8").splitlines(), start=1):
        for file, test in references(line):
            where = f"{document.name}, line {number}: `{file}::{test}`"
            paths = list((ROOT / "tests").rglob(file)) if file else []
            assert len(paths) == 1, where
            assert not test or re.search(rf"^def {test}\(", paths[0].read_text(encoding="utf-8"), re.MULTILINE), where


def test_references_are_found():
    line = (
        "| x | `tests/test_a.py::test_b`, `::test_c`, `test_d.py::test_e` and `tests/room/test_f.py`, not `other.py` |"
    )
    assert references(line) == [
        ("test_a.py", "test_b"),
        ("test_a.py", "test_c"),
        ("test_d.py", "test_e"),
        ("room/test_f.py", ""),
    ]


def test_every_trap_has_its_answer():
    """All 33, each ruled out by construction or by a named test."""
    lines = (ROOT / "docs" / "traps.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if re.match(r"\| \d", line)]
    assert [int(number) for number, *_ in rows] == list(range(1, 34))
    for number, trap, here in rows:
        named = any(test for _, test in references(here))
        assert trap and (named or here.startswith("C: ")), f"trap {number}: {here}"


def test_every_promise_names_a_test():
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Promises")[2].partition("\n## ")[0]
    rows = [line for line in text.splitlines() if line.startswith("| ") and "promise" not in line and "---" not in line]
    assert len(rows) >= 9 and all(references(row) for row in rows)


# ---------------------------------------------------------------------------------------------- commands


def commands(text: str) -> list[list[str]]:
    """Words of every `unift ...` in blocks and in lines, without comments; "\\" at the end of a line goes on."""
    found, block = [], False
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if line.strip().startswith("```"):
            block = not block
            continue
        parts = [line.strip()] if block else re.findall(r"`([^`]+)`", line)
        for part in parts:
            if re.match(r"unift [a-z]+( |$)", part):
                found.append(shlex.split(part, comments=True)[1:])
    return found


def fault_of(words: list[str]) -> str:
    """An unknown verb, option or setting of a command; "" where it has none. Values are not looked at."""
    command, settings = typer.main.get_command(app), flat(Config().model_dump(mode="json"))
    while words and isinstance(command, typer.core.TyperGroup) and not words[0].startswith("-"):
        if words[0] not in command.commands:
            return f"verb {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {
        "--help"
    }
    for word in words:
        name = word.partition("=")[0]
        if name.startswith("-") and name != "-" and name not in options:
            return f"option {name}"
        named = "=" in word and re.fullmatch(r"[a-z_]+\.[a-z0-9_.]+", name)
        if named and name not in settings and not name.startswith(("data.options.", "phases.")):
            return f"setting {name}"
    return ""


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_commands_of_the_documents_exist(document):
    for words in commands(document.read_text(encoding="utf-8")):
        assert not fault_of(words), f"{document.name}: unift {' '.join(words)}: {fault_of(words)}"


def test_faults_of_commands_are_found():
    text = "`unift train --method uft train.lr=1`, `unift trian`\n```\nunift data make lock x --nn 3 \\\n  # no\nunift eval m train.lrr=1\n```"
    assert [fault_of(words) for words in commands(text)] == ["", "verb trian", "option --nn", "setting train.lrr"]
    assert sum(len(commands(p.read_text(encoding="utf-8"))) for p in DOCUMENTS) > 150
