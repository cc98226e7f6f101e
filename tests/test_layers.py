"""The layout of the package: a room imports only rooms to its left, wherever the import stands; no circles; nothing grows."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

FOUNDATION = ("_version", "types", "rng", "intervals", "files", "processes")
ROOMS = (
    "config", "rows", "hints", "rewards", "model", "credit", "objectives", "sampling", "training", "commands",
)  # fmt: skip
ORDER = {room: i for i, room in enumerate((*FOUNDATION, *ROOMS))}
SOURCE = Path(__file__).parents[1] / "src" / "unift"
ALL = sorted(SOURCE.rglob("*.py"))
FILES = [f for f in ALL if f.parent != SOURCE or f.stem in ORDER]
MOST_LINES = 400
LIGHT = ("_version", "types", "rng", "intervals", "processes", "config", "rows", "hints", "rewards")


def module(file: Path) -> str:
    parts = file.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(file): file for file in ALL}


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) of every import of the package, in functions and under TYPE_CHECKING too: ``unift.room.file[.name]``."""
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            names = [f"{node.module}.{a.name}" for a in node.names]
        yield from ((node.lineno, n) for n in names if n.startswith("unift."))


def wrong_imports(own: str, text: str) -> list[str]:
    """Imports of a file of the room ``own`` that do not point left."""
    found = [(line, what.split(".")[1]) for line, what in imported(ast.parse(text))]
    return [f"line {line}: {room}" for line, room in found if ORDER[room] > ORDER[own]]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_imports_point_left(file):
    own = file.relative_to(SOURCE).parts[0].removesuffix(".py")
    wrong = wrong_imports(own, file.read_text(encoding="utf-8"))
    assert not wrong, f"{own} may not import {', '.join(wrong)}"


@pytest.mark.parametrize(
    "text",
    [
        "from unift.training import loop",
        "import unift.model.policy",
        "def f():\n    from unift.sampling.groups import complete",
        "if TYPE_CHECKING:\n    from unift.model.policy import Policy",
    ],
)
def test_imports_to_the_right_are_found(text):
    assert wrong_imports("rewards", text) and not wrong_imports("commands", text)


def test_no_circles():
    """Between files, counting every import statement."""
    graph = {}
    for name, file in MODULES.items():
        found = [what for _, what in imported(ast.parse(file.read_text(encoding="utf-8")))]
        graph[name] = {w if w in MODULES else w.rpartition(".")[0] for w in found} - {name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_ten_rooms_and_six_foundation_files():
    folders = {p.name for p in SOURCE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    files = {p.stem for p in SOURCE.glob("*.py")}
    assert folders == set(ROOMS) and files == {*FOUNDATION, "__init__", "__main__"}


@pytest.mark.parametrize("file", ALL, ids=lambda f: str(f.relative_to(SOURCE)))
def test_no_file_is_long(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@pytest.mark.parametrize(
    "file", [f for f in FILES if f.relative_to(SOURCE).parts[0].removesuffix(".py") in LIGHT], ids=str
)
def test_no_torch_left_of_the_model(file):
    """At import: functions may ask for it."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    heavy = {"torch", "transformers", "peft", "accelerate"}
    for node in tree.body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {n.split(".")[0] for n in names} & heavy, f"line {node.lineno}"


# Whose parameters are what a user writes: verbs of the Python API and of the command line, options of a task, keyword
# options of the pool. And one autograd function, whose arguments are tensors that need a gradient each.
MANY = {
    "commands/api.py": {"train", "evaluate", "evaluate_suite", "compare"},
    "commands/cli.py": {"train", "serve", "evaluate", "compare", "merge_models"},
    "model/logprobs.py": {"forward", "chunked_logprobs"},
    "rewards/pool.py": {"__init__"},
    "rows/tasks/chain.py": {"make"},
    "rows/tasks/countdown.py": {"make"},
    "rows/tasks/jigsaw.py": {"make"},
}
MOST_PARAMETERS = 6


def parameters(text: str) -> dict[str, int]:
    """Of every function, without self, cls and an autograd function's ctx."""
    found = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            a = node.args
            every = [
                *a.posonlyargs,
                *a.args,
                *a.kwonlyargs,
                *([a.vararg] if a.vararg else []),
                *([a.kwarg] if a.kwarg else []),
            ]
            found[node.name] = max(found.get(node.name, 0), sum(p.arg not in {"self", "cls", "ctx"} for p in every))
    return found


def test_few_parameters():
    """Nothing has more than six beside the functions above, each of which has."""
    found = {str(f.relative_to(SOURCE)): parameters(f.read_text(encoding="utf-8")) for f in ALL}
    many = {f: {n for n, k in functions.items() if k > MOST_PARAMETERS} for f, functions in found.items()}
    assert {f: names for f, names in many.items() if names} == MANY


def test_parameters_are_counted():
    text = "class A:\n    def f(self, a, /, b, *c, d=1, **e): ...\n    async def g(cls): ..."
    assert parameters(text) == {"f": 5, "g": 0}
