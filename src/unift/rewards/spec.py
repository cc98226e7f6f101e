"""What a reward may be given as, and how it gets into a worker.

A reward is text (``auto``, a task, ``module:function``, ``file.py:function``), a Python callable, or a list of these, each
with a weight: ``[{"function": ..., "weight": 1.0}, ...]`` or ``[(..., 1.0), ...]``. A callable of a module that the worker
can import travels by name; any other (of a notebook, a script, a lambda, a closure) by value, through cloudpickle.
"""

from __future__ import annotations

import importlib
import inspect
import io
import math
import os
import pickle
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeGuard, cast

from unift.rewards.adapters import BadValue, Options, Reward, adapt, described, load_reward
from unift.rewards.journal import NAME_CHARS, NOTE_CHARS, class_of, is_mapping
from unift.types import RewardError, Row, Score

PAYLOAD_BYTES = 64 << 20
DEPTH = 4  # how far the search for what cannot be sent looks into functions that functions use
ADVICE = (
    "Build it inside the function (a cached helper does it once a worker), or put the reward into a file and give "
    "file.py:function"
)


Entry = tuple[str | Callable[..., Any], float]  # a reward as it is given, and its weight


@dataclass(frozen=True)
class Part:
    """One reward on its way to the workers. ``payload``: the pickled callable; None where ``spec`` is importable."""

    name: str  # of its value in Score.parts
    spec: str
    weight: float = 1.0
    payload: bytes | None = None


def parts_of(reward: Any) -> tuple[tuple[Part, ...], bool]:
    """The parts of a reward, and whether they are added up (a list is, also one of a single reward).

    Raises RewardError for what is none of the forms, for a callable of an unknown signature, and for one that cannot be
    sent to a worker.
    """
    entries, summed = entries_of(reward)
    if not summed:
        return (_part(*entries[0]),), False
    parts = [_part(*entry) for entry in entries]
    taken: dict[str, int] = {}
    for i, part in enumerate(parts):
        taken[part.name] = taken.get(part.name, 0) + 1
        if taken[part.name] > 1:
            parts[i] = Part(f"{part.name}#{taken[part.name]}", part.spec, part.weight, part.payload)
    return tuple(parts), True


def entries_of(reward: Any) -> tuple[list[Entry], bool]:
    """The rewards and their weights in whatever form they are given, and whether they are added up (a list is).

    Raises RewardError for what is none of the forms.
    """
    if _is_one(reward):
        return [(reward, 1.0)], False
    if not isinstance(reward, Sequence) or not reward:
        raise RewardError(
            f"found {reward!r:.80} as reward; expected text, a callable or a list of these, each with a weight"
        )
    given: list[Any] = [*reward]
    return [_weighted(entry) for entry in given], True


def load_parts(parts: Sequence[Part], summed: bool, options: Options) -> Reward:
    """In the worker: the rewards themselves. Raises RewardError."""
    loaded = [_load(part, options) for part in parts]
    if not summed:
        return loaded[0]
    weights = [(part.name, part.weight) for part in parts]
    kinds = "+".join(dict.fromkeys(reward.kind for reward in loaded))
    return Reward(label_of(parts, summed), kinds, partial(_sum, weights, loaded))


def label_of(parts: Sequence[Part], summed: bool) -> str:
    """How messages name the reward."""
    return " + ".join(f"{part.weight:g} * {part.spec}" for part in parts) if summed else parts[0].spec


def _sum(
    weights: Sequence[tuple[str, float]], rewards: Sequence[Reward], completion: str, row: Row, hint: str
) -> Score | None:
    """sum_i w_i v_i over the rewards that apply; None where none does, or none of weight other than 0.

    The parts hold each value before its weight. ``correct`` is what the first reward says that says so; if none does,
    whether the first one that applies gives at least 1 (the sum says little: it depends on the weights).
    """
    total = 0.0
    parts: dict[str, float] = {}
    notes: list[str] = []
    correct: bool | None = None
    first: bool | None = None
    applies = False
    for (name, weight), reward in zip(weights, rewards, strict=True):
        try:
            score = reward(completion, row, hint)
        except BadValue as error:
            raise BadValue(f"{name}: {error}") from None
        if score is None:
            continue
        applies = applies or weight != 0
        total += weight * score.value
        parts[name] = score.value
        parts |= {f"{name}/{part}"[:NAME_CHARS]: value for part, value in score.parts.items()}
        correct = score.correct if correct is None else correct
        first = score.right if first is None else first
        if score.note:
            notes.append(f"{name}: {score.note}")
    if not applies:
        return None
    if not math.isfinite(total):
        raise BadValue(f"returned values whose weighted sum is {total}; expected a finite number")
    return Score(total, first if correct is None else correct, parts, "; ".join(notes)[:NOTE_CHARS])


# --------------------------------------------------------------------------------------------------------- one entry


def _is_one(reward: object) -> TypeGuard[str | Callable[..., Any]]:
    return isinstance(reward, str) or callable(reward)


def _is_pair(entry: object) -> TypeGuard[tuple[Any, Any]]:
    return isinstance(entry, tuple) and len(cast("tuple[Any, ...]", entry)) == 2


def _weighted(entry: Any) -> Entry:
    """(reward, weight) of one entry of a list."""
    if _is_one(entry):
        return entry, 1.0
    reward: Any = None
    weight: Any = 1.0
    settings: Any = entry
    if is_mapping(entry) and {"function"} <= entry.keys() <= {"function", "weight"}:
        reward, weight = entry["function"], entry.get("weight", 1.0)
    elif _is_pair(entry):
        reward, weight = entry
    elif hasattr(settings, "function") and hasattr(settings, "weight"):
        reward, weight = settings.function, settings.weight
    if (
        not _is_one(reward)
        or isinstance(weight, bool)
        or not isinstance(weight, (int, float))
        or not math.isfinite(weight)
    ):
        raise RewardError(
            f"found {entry!r:.120} in a list of rewards; expected a function, (function, weight) or "
            '{"function": ..., "weight": ...} with a finite weight'
        )
    return reward, float(weight)


def _part(reward: Any, weight: float) -> Part:
    if isinstance(reward, str):
        place, colon, function = reward.rpartition(":")
        if colon and place.endswith(".py"):
            reward = f"{Path(place).expanduser().resolve()}:{function}"
        return Part((function if colon else reward)[:NAME_CHARS], reward, weight)
    name = qualified(reward)
    try:
        adapt(reward, name)
    except RewardError as error:
        raise RewardError(f"reward {name!r}: {error}") from None
    short = name.rpartition(".")[2] or name
    importable = import_path(reward)
    if importable is not None:
        return Part(short[:NAME_CHARS], importable, weight)
    return Part(short[:NAME_CHARS], name, weight, _payload(reward, name))


def _load(part: Part, options: Options) -> Reward:
    if part.payload is None:
        return load_reward(part.spec, **options)
    try:
        function = pickle.loads(part.payload)
    except BaseException as error:
        raise RewardError(
            f"reward {part.spec!r} cannot be rebuilt in a scoring worker ({described(error)}). What it uses must be "
            "importable there. " + ADVICE
        ) from None
    return adapt(function, part.spec, **options)


def _is_partial(thing: object) -> TypeGuard[partial[Any]]:
    return isinstance(thing, partial)


def qualified(function: Any) -> str:
    """``module.name`` of a callable; of its class, for an instance."""
    inner: Any = function
    while _is_partial(inner):
        inner = inner.func
    named: Any = inner if hasattr(inner, "__qualname__") else class_of(inner)
    module = getattr(named, "__module__", None)
    return ".".join(str(text) for text in (module, named.__qualname__) if text and text != "builtins")


def import_path(function: Any) -> str | None:
    """``module:function`` where a worker finds this very object by it, else None."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if not isinstance(module, str) or not name or "<" in name or not _importable(module):
        return None
    found: Any = sys.modules.get(module)
    for piece in name.split("."):
        found = getattr(found, piece, None)
    return f"{module}:{name}" if found is function else None


def _importable(module: str) -> bool:
    """Whether a new interpreter with this search path finds the module, at the same place."""
    loaded = sys.modules.get(module)
    if module == "__main__" or loaded is None:
        return False
    *parents, _ = module.split(".")
    try:
        if parents and not _importable(".".join(parents)):
            return False
        path = getattr(sys.modules[".".join(parents)], "__path__", None) if parents else None
        for finder in sys.meta_path:
            spec = finder.find_spec(module, path, None)
            if spec is not None:
                own = getattr(loaded, "__file__", None)
                return own is None or spec.origin is None or os.path.realpath(spec.origin) == os.path.realpath(own)
    except Exception:
        return False
    return False


# ------------------------------------------------------------------------------------------------------------ by value


def _payload(function: Any, name: str) -> bytes:
    with _by_value(function):
        try:
            payload = _dumps(function)
        except RewardError:
            raise
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            culprit = _culprit(function, DEPTH) or f"a part of it ({described(error)})"
            raise RewardError(f"reward {name!r} cannot be sent to the scoring workers: {culprit}. {ADVICE}") from None
        if len(payload) > PAYLOAD_BYTES:
            size = f"{len(payload) / 2**20:.0f} MiB"
            largest = max(_used_by(function), key=lambda found: len(_dumps(found[1])), default=("it", None))[0]
            raise RewardError(
                f"reward {name!r} is {size} when sent to the scoring workers, above {PAYLOAD_BYTES >> 20} MiB; the "
                f"largest thing is {largest}. {ADVICE}"
            )
    return payload


def _cloudpickle() -> Any:
    """The module, which has no types. Raises RewardError where it is missing."""
    try:
        return importlib.import_module("cloudpickle")
    except ImportError:
        raise RewardError(
            "a reward that is no importable function is sent to the scoring workers by cloudpickle, which is not "
            "installed: pip install cloudpickle, or put the function into a file and give file.py:function"
        ) from None


def _dumps(thing: Any) -> bytes:
    class Pickler(_cloudpickle().Pickler):
        def reducer_override(self, obj: Any) -> Any:
            if class_of(obj).__module__.startswith("torch") and getattr(obj, "is_cuda", False) is True:
                raise pickle.PicklingError("a tensor on a GPU")
            if isinstance(obj, io.IOBase) and not isinstance(obj, (io.BytesIO, io.StringIO)):
                raise pickle.PicklingError("an open file")  # cloudpickle would copy what is in it
            above: Any = super()
            return above.reducer_override(obj)

    with io.BytesIO() as file:
        Pickler(file).dump(thing)
        return file.getvalue()


@contextmanager
def _by_value(function: Any) -> Generator[None]:
    """Modules that hold the callable and that a worker cannot import are sent along with it."""
    cloudpickle, added = _cloudpickle(), list[ModuleType]()
    for module in _modules(function):
        loaded = sys.modules.get(module)
        if loaded is not None and module != "__main__" and not _importable(module):
            cloudpickle.register_pickle_by_value(loaded)
            added.append(loaded)
    try:
        yield
    finally:
        for loaded in added:
            cloudpickle.unregister_pickle_by_value(loaded)


def _modules(thing: Any) -> set[str]:
    """Of the function, its class or its object, and what it wraps."""
    found: set[str] = set()
    while thing is not None:
        owner = getattr(thing, "__self__", None)
        for holder in (thing, class_of(thing), owner, class_of(owner)):
            module = getattr(holder, "__module__", None)
            if isinstance(module, str):
                found.add(module)
        thing = thing.func if _is_partial(thing) else getattr(thing, "__wrapped__", None)
    return found


def _used_by(thing: Any) -> list[tuple[str, Any]]:
    """(name, object) of all that travels with a callable."""
    if isinstance(thing, partial):
        named = [(f"its argument {name!r}", value) for name, value in thing.keywords.items()]
        bound = [(f"its argument {i}", value) for i, value in enumerate(thing.args)]
        return [("the function that it calls", thing.func), *bound, *named]
    if inspect.ismethod(thing):
        return [("the object that it belongs to", thing.__self__)]
    if inspect.isfunction(thing):
        with suppress(Exception):
            names = inspect.getclosurevars(thing)
            found = [(f"the variable {name!r} around it", value) for name, value in names.nonlocals.items()]
            found += [(f"the global {name!r}", value) for name, value in names.globals.items()]
            defaults = [*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
            return [*found, *(("a default value of its parameters", value) for value in defaults)]
        return []
    attributes = getattr(thing, "__dict__", None)
    if isinstance(thing, type) or not is_mapping(attributes):
        return []
    return [(f"its attribute {name!r}", value) for name, value in attributes.items()]


def _culprit(thing: Any, depth: int) -> str:
    """What of it cannot be pickled, in words; "" if nothing by itself is found."""
    for name, value in _used_by(thing):
        try:
            _dumps(value)
        except Exception as error:
            inner = _culprit(value, depth - 1) if depth > 1 else ""
            if inner:
                return f"{name}: {inner}"
            return f"{name} (a {type(value).__module__}.{type(value).__qualname__}) cannot be copied: {error}"[:500]
    return ""
