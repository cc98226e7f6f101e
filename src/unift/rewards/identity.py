"""A text for a reward that stays the same as long as the reward does: part of what a run is told apart by."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from functools import partial
from hashlib import blake2b
from logging import Logger
from types import CodeType, ModuleType
from typing import Any, TypeGuard

from unift.rewards.journal import is_mapping
from unift.rewards.spec import entries_of, import_path, qualified

DIGITS = 12


def describe(reward: Any) -> str:
    """Of text, the text itself; of a callable, its name and a hash; of a list, both with the weights.

    The hash covers the source of the function (its bytecode where there is no source), and what the function takes from
    outside: closures, defaults, bound arguments, attributes of its object, and the globals that it names, with the
    functions and classes among them that its own module or a script defines. Objects of other modules count by name. So
    the text survives another cell number, path or process, and changes with the code and its parameters. Raises
    RewardError for what is no reward.
    """
    if isinstance(reward, str):
        return reward
    if callable(reward):
        digest = blake2b(digest_size=DIGITS // 2)
        for piece in _pieces(reward, _home(reward), {}):
            digest.update(piece.encode("utf-8", "surrogatepass") + b"\0")
        return f"{qualified(reward)}@{digest.hexdigest()}"
    entries, _ = entries_of(reward)
    return " + ".join(f"{weight:g}*{describe(entry)}" for entry, weight in entries)


def _home(reward: Any) -> str:
    while isinstance(reward, partial):
        reward = reward.func
    return getattr(reward, "__module__", "") or ""


def _pieces(thing: Any, home: str, seen: dict[int, Any]) -> Iterator[str]:
    """A walk over all that decides what the thing does, as text."""
    if thing is None or isinstance(thing, (bool, int, float, complex, str, bytes)):
        yield f"{type(thing).__name__} {thing!r}"
        return
    if isinstance(thing, ModuleType):
        yield f"module {thing.__name__}"
        return
    if id(thing) in seen:
        yield "again"
        return
    seen[id(thing)] = thing  # held, so that no other object gets its number
    inside: list[Any] = []
    if isinstance(thing, partial):
        yield "partial"
        inside = [thing.func, *thing.args, dict(thing.keywords)]
    elif inspect.ismethod(thing):
        yield f"method {thing.__func__.__qualname__}"
        inside = [thing.__func__, thing.__self__]
    elif inspect.isfunction(thing):
        yield f"function {thing.__qualname__}"
        if _own(thing, home):
            yield _source(thing) or _bytecode(thing.__code__)
            inside = [*(thing.__defaults__ or ()), thing.__kwdefaults__ or {}, *_outside(thing)]
        else:
            yield str(thing.__module__)
    elif isinstance(thing, type):
        yield f"class {thing.__module__ if not _own(thing, home) else ''} {thing.__qualname__}"
        if _own(thing, home):
            yield _source(thing)
            inside = [v for k, v in sorted(vars(thing).items()) if inspect.isfunction(v) or not k.startswith("__")]
    elif is_mapping(thing):
        yield f"mapping {len(thing)}"
        inside = [x for item in sorted(thing.items(), key=_by_name) for x in item]
    elif isinstance(thing, Logger):  # its attributes lead to all loggers of the process
        yield f"logger {thing.name}"
    elif _is_set(thing):
        yield f"set {len(thing)}"
        inside = sorted(thing, key=repr)
    elif _is_sequence(thing):
        yield f"sequence {type(thing).__name__} {len(thing)}"
        inside = list(thing)
    else:
        yield f"object {type(thing).__module__}.{type(thing).__qualname__}"
        if hasattr(thing, "tobytes") and hasattr(thing, "shape"):  # arrays
            yield f"{thing.shape} {getattr(thing, 'dtype', '')} {blake2b(thing.tobytes()).hexdigest()}"
        elif hasattr(thing, "pattern"):  # regular expressions
            yield f"{thing.pattern!r} {getattr(thing, 'flags', '')}"
        else:
            inside = [type(thing), getattr(thing, "__dict__", {})]
    for one in inside:
        yield from _pieces(one, home, seen)


def _is_set(thing: object) -> TypeGuard[set[Any] | frozenset[Any]]:
    return isinstance(thing, (set, frozenset))


def _is_sequence(thing: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(thing, Sequence)


def _by_name(item: tuple[Any, Any]) -> str:
    return repr(item[0])


def _own(thing: Any, home: str) -> bool:
    """Whether the code is the user's own: of the reward's module, or of a module that has no name to import it by."""
    return thing.__module__ == home or import_path(thing) is None


def _outside(function: Any) -> list[Any]:
    """Values of the variables around a function and of the globals that it names, also within functions in it."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or ())
    found: list[Any] = []
    for name, cell in cells:
        try:
            found += [name, cell.cell_contents]
        except ValueError:  # not set yet
            found.append(name)
    names = sorted(set(_names(function.__code__)) & function.__globals__.keys())
    return [*found, *(x for name in names for x in (name, function.__globals__[name]))]


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _source(thing: Any) -> str:
    """The source as a syntax tree, so that comments and layout do not count; "" where there is none of its own."""
    if getattr(thing, "__name__", "") == "<lambda>":  # its line may hold several
        return ""
    try:
        text = textwrap.dedent(inspect.getsource(thing))
    except (OSError, TypeError):
        return ""
    try:
        return ast.dump(ast.parse(text))
    except SyntaxError:
        return ""


def _bytecode(code: CodeType) -> str:
    constants = [_constant(c) for c in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {constants}"


def _constant(constant: Any) -> str:
    if isinstance(constant, CodeType):
        return _bytecode(constant)
    if _is_set(constant):  # in an order that differs between processes
        return str(sorted(map(repr, constant)))
    return repr(constant)
