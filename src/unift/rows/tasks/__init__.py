"""Built-in tasks: problems with step-wise solutions, and verifiers that never trust the model's text.

`get_task("countdown")` -> Task; `make_rows("countdown", 1000, seed=0, split="train")` -> rows that no test split of the
same task ever holds. A task's module is imported when it is first asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable
from importlib import import_module
from typing import Any

from unift.rows.tasks.base import Task, nearest
from unift.types import ConfigError, DataError, Row, UniftError

_MODULES = {
    "chain": "unift.rows.tasks.chain",
    "countdown": "unift.rows.tasks.countdown",
    "jigsaw": "unift.rows.tasks.jigsaw",
    "knights": "unift.rows.tasks.knights",
    "lock": "unift.rows.tasks.lock",
    "math": "unift.rows.tasks.math",
}
SPLITS = ("train", "test")
MAX_MISSES = 5_000  # draws in a row that bring nothing new before the space counts as exhausted


def task_names() -> list[str]:
    return sorted(_MODULES)


def get_task(name: str) -> Task:
    """The task of this name; ConfigError naming the nearest one if there is none."""
    if name not in _MODULES:
        raise ConfigError(f"task {name!r} is unknown.{nearest(str(name), _MODULES)}")
    return import_module(_MODULES[name]).TASK


def split_of(form: Hashable) -> str:
    """The split a canonical form belongs to, for any seed and number of rows: one in five forms is a test problem."""
    digest = hashlib.blake2b(repr(form).encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "little") % 10 < 2 else "train"


def canonical(row: Row) -> str:
    """The problem apart from its wording where the task knows how, else the prompt without case and spaces."""
    shown = "".join(f" {found.digest}" for found in row.images)
    if row.task in _MODULES:
        try:
            return repr((row.task, get_task(row.task).canonical(row))) + shown
        except (UniftError, KeyError, TypeError, ValueError):
            pass  # a file may use a task's name with other answers
    text = row.prompt if isinstance(row.prompt, str) else "".join(m["content"] for m in row.prompt)
    return " ".join(text.split()).lower() + shown


def make_rows(
    task: Task | str, n: int, seed: int, split: str, exclude: Iterable[Row] | None = None, **options: Any
) -> list[Row]:
    """``n`` different problems of this split, in the order of their index.

    The split is a function of the problem alone (`split_of`), so train rows of one seed never meet test rows of another.
    exclude: rows (of a file, say) whose problems must not come back, in whatever form they are posed.
    Raises ConfigError for an unknown split or option, DataError when the options allow fewer than ``n`` problems.
    """
    task = get_task(task) if isinstance(task, str) else task
    if split not in SPLITS:
        raise ConfigError(f"split {split!r} is unknown.{nearest(str(split), SPLITS)}")
    for option in options:
        if option not in task.options:
            raise ConfigError(f"option {option!r} of task {task.name!r} is unknown.{nearest(option, task.options)}")
    seen = {task.canonical(row) for row in exclude or ()}
    rows: list[Row] = []
    index = misses = 0
    while len(rows) < n:
        row = task.make(seed, index, **options)
        form = task.canonical(row)
        index, misses = index + 1, misses + 1
        if form not in seen and split_of(form) == split:
            seen.add(form)
            rows.append(row)
            misses = 0
        if misses > MAX_MISSES:
            raise DataError(
                f"task {task.name!r} has about {len(rows)} different {split} problems with options "
                f"{dict(task.options) | options}, {n} were asked for ({MAX_MISSES} draws in a row brought nothing new). "
                "Ask for fewer or widen the options."
            )
    return rows
