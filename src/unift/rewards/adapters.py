"""Turn a named reward function, of ours, TRL's or verl's signature, into one: (completion, row, hint) -> Score | None.

A bad value is an exception here (`BadValue`), never a 0: the scorer counts it. None means "does not apply" in TRL-style
functions, where it is part of the contract, and in functions whose return annotation names None; elsewhere it is most
likely a forgotten ``return`` and a bad value.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import os
import re
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import Any, TypedDict, TypeGuard, get_args

from unift.rewards.journal import NAME_CHARS, NOTE_CHARS, PARTS, class_of, is_list, is_mapping
from unift.rows.pictures import opened
from unift.types import RewardError, Row, Score

ACCEPTED = """the three accepted signatures are
  score(completion, row) -> float or Score   unift; hint, format_score, rule and answer are passed when it names them
  f(prompts, completions, **columns) -> list        TRL; called with lists of one element; None = does not apply
  compute_score(data_source, solution_str, ground_truth, extra_info) -> float or dict with "score"      verl
(unift and verl: None = does not apply where the return annotation says so, as in -> float | None)"""
EMPTY, REQUIRED = inspect.Parameter.empty, (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class BadValue(ValueError):
    """The reward function returned something that is not a reward; says what was returned and what was expected."""


Call = Callable[[str, Row, str], Score | None]  # (completion, row, hint)


class Options(TypedDict):
    """Settings that reach the functions that name them as parameters."""

    format_score: float
    rule: str
    answer: str


@dataclass(frozen=True)
class Reward:
    """A loaded reward. ``call(completion, row, hint)`` raises BadValue or whatever the user's function raises."""

    name: str  # the spec it was loaded from
    kind: str  # "task", "unift", "TRL" or "verl"
    call: Call

    def __call__(self, completion: str, row: Row, hint: str = "") -> Score | None:
        return self.call(completion, row, hint)


def load_reward(spec: str, *, format_score: float = 0.0, rule: str = "unift", answer: str = "tags") -> Reward:
    """The reward named by ``module:function``, ``path/to/file.py:function``, a built-in task or "auto" (row.task).

    Modules are looked for on sys.path and in the working directory. format_score, rule and answer reach the functions that
    name them as parameters (all built-in tasks do). Raises RewardError saying what was found and what was expected.
    """
    options = Options(format_score=format_score, rule=rule, answer=answer)
    if ":" in spec:
        function = _import_function(spec)
        try:
            return adapt(function, spec, **options)
        except RewardError as error:
            raise RewardError(f"reward {spec!r}: {error}") from None
    if spec == "auto":
        return Reward(spec, "task", _auto(options))
    return Reward(spec, "task", _task(spec, options))


def adapt(
    function: Callable[..., Any],
    name: str = "",
    *,
    format_score: float = 0.0,
    rule: str = "unift",
    answer: str = "tags",
) -> Reward:
    """Wrap a function after its parameter names. Raises RewardError for a signature that is none of the three."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise RewardError(f"found {function!r}, which has no readable signature ({error}); {ACCEPTED}") from None
    options = Options(format_score=format_score, rule=rule, answer=answer)
    if {"solution_str", "ground_truth"} <= parameters.keys():
        kind, call, given = "verl", _verl(function, parameters), {"data_source", "extra_info"}
        given |= {"solution_str", "ground_truth"}
    elif {"completion", "row"} <= parameters.keys():
        kind, call, given = "unift", _ours(function, parameters, options), {"completion", "row", "hint", *options}
    elif "completions" in parameters:
        kind, call, given = "TRL", _trl(function, parameters), None  # columns are known only with a row
    else:
        raise RewardError(f"found the signature {_shown(function)}; {ACCEPTED}")
    for parameter in parameters.values():
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            raise RewardError(f"found {_shown(function)}: {parameter.name!r} cannot be passed by name; {ACCEPTED}")
        required = parameter.default is EMPTY and parameter.kind in REQUIRED
        if required and parameter.name == "completion_ids":
            raise RewardError(f"found {_shown(function)}: rewards see text, there are no completion_ids; {ACCEPTED}")
        if required and given is not None and parameter.name not in given:
            raise RewardError(
                f"found {_shown(function)} ({kind}), whose parameter {parameter.name!r} has no default and is not one "
                f"that is passed ({', '.join(sorted(given))}); give it a default. {ACCEPTED}"
            )
    return Reward(name or getattr(function, "__name__", "reward"), kind, call)


# ------------------------------------------------------------------------------------------------ finding the function


def _import_function(spec: str) -> Callable[..., Any]:
    place, _, path = spec.rpartition(":")
    if not place or not path:
        raise RewardError(f"reward {spec!r}: expected module:function or path/to/file.py:function")
    found: Any = _import_file(Path(place), spec) if place.endswith(".py") else _import_module(place, spec)
    for part in path.split("."):
        if not hasattr(found, part):
            names = [name for name in dir(found) if name[0] != "_" and callable(getattr(found, name, None))]
            raise RewardError(f"reward {spec!r}: {place} has no {part!r}; it has {', '.join(names[:20]) or 'nothing'}")
        found = getattr(found, part)
    if not callable(found):
        raise RewardError(f"reward {spec!r} is {type(found).__name__} {found!r:.80}; expected a function")
    return found


def _import_module(name: str, spec: str) -> ModuleType:
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # the `unift` script does not have it, and a person expects it
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise RewardError(
            f"reward {spec!r}: cannot import module {name!r} ({described(error)}). Give a module on sys.path or in "
            f"{os.getcwd()}, or path/to/file.py:function"
        ) from error


def _import_file(path: Path, spec: str) -> ModuleType:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise RewardError(f"reward {spec!r}: there is no file {path}")
    name = f"unift_reward_{path.stem}_{blake2b(str(path).encode(), digest_size=4).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # its neighbours are importable, as when it is run as a script
    source = importlib.util.spec_from_file_location(name, path)
    assert source is not None and source.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(source)
    sys.modules[name] = module  # dataclasses look their own module up
    try:
        source.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise RewardError(f"reward {spec!r}: cannot import {path} ({described(error)})") from error
    return module


# ------------------------------------------------------------------------------------------------------- the signatures


def _task(name: str, options: Options) -> Call:
    from unift.rows.tasks import get_task

    try:
        function = get_task(name).score
    except Exception as error:
        raise RewardError(
            f"reward {name!r} is neither a built-in task ({error}) nor module:function nor file.py:function"
        ) from error
    return _ours(function, inspect.signature(function).parameters, options)


def _auto(options: Options) -> Call:
    known: dict[str, Call] = {}

    def call(completion: str, row: Row, hint: str) -> Score | None:
        if row.task not in known:
            if not row.task:
                raise RewardError(f"row {row.id!r} has no task, so reward 'auto' has no scorer; name a reward function")
            known[row.task] = _task(row.task, options)
        return known[row.task](completion, row, hint)

    return call


def _ours(function: Callable[..., Any], parameters: Mapping[str, inspect.Parameter], options: Options) -> Call:
    extras = {name: value for name, value in options.items() if _takes(parameters, name)}
    takes_hint, may_skip = _takes(parameters, "hint"), _may_skip(function)

    def call(completion: str, row: Row, hint: str) -> Score | None:
        named = {**extras, "hint": hint} if takes_hint else extras
        value = _finished(function(completion=completion, row=row, **named))
        return None if value is None and may_skip else as_score(value)

    return call


def _verl(function: Callable[..., Any], parameters: Mapping[str, inspect.Parameter]) -> Call:
    may_skip = _may_skip(function)

    def call(completion: str, row: Row, hint: str) -> Score | None:
        named = {
            "data_source": row.extra.get("data_source", row.task),
            "solution_str": completion,
            "ground_truth": row.answer,
            "extra_info": row.extra.get("extra_info", dict(row.extra)),
        }
        value = _finished(function(**{name: v for name, v in named.items() if _takes(parameters, name)}))
        if value is None and may_skip:
            return None
        return _score_of_dict(value) if is_mapping(value) else as_score(value)

    return call


def _trl(function: Callable[..., Any], parameters: Mapping[str, inspect.Parameter]) -> Call:
    """Lists of ONE element: one bad completion cannot spoil the others, and a hang has a name."""

    def call(completion: str, row: Row, hint: str) -> Score | None:
        prompt = row.prompt
        chat = not isinstance(prompt, str)
        columns = {
            "prompts": prompt if isinstance(prompt, str) else [dict(message) for message in prompt],
            "completions": [{"role": "assistant", "content": completion}] if chat else completion,
            "id": row.id,
            "task": row.task,
            "answer": row.answer,
            "steps": list(row.steps),
            "solution": row.solution,
            "hint": hint,
        }
        if row.images and "images" in parameters:  # unpacked only for a function that names them
            columns["images"] = [opened(found, f"row {row.id!r}") for found in row.images]
        columns |= {name: value for name, value in row.extra.items() if name not in ("prompts", "completions")}
        for parameter in parameters.values():
            if parameter.default is EMPTY and parameter.kind in REQUIRED and parameter.name not in columns:
                raise RewardError(
                    f"the function wants column {parameter.name!r}; row {row.id!r} has {', '.join(sorted(columns))}"
                )
        values = _finished(function(**{name: [v] for name, v in columns.items() if _takes(parameters, name)}))
        if hasattr(values, "tolist"):
            values = values.tolist()
        if not _is_row(values):
            raise BadValue(f"returned {_brief(values)}; a TRL reward returns a list with one number per completion")
        if len(values) != 1:
            raise BadValue(f"returned {len(values)} values for 1 completion; expected a list of 1")
        return None if values[0] is None else as_score(values[0])

    return call


def _is_row(value: object) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    return is_list(value) or isinstance(value, tuple)


def _takes(parameters: Mapping[str, inspect.Parameter], name: str) -> bool:
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _may_skip(function: Callable[..., Any]) -> bool:
    """Whether the return annotation names None beside a value, as in ``float | None`` or ``Optional[float]``."""
    try:
        annotation = inspect.signature(function).return_annotation
    except (TypeError, ValueError):
        return False
    if isinstance(annotation, str):
        return annotation.strip() != "None" and re.search(r"\bNone\b|\bOptional\b", annotation) is not None
    return type(None) in get_args(annotation)


def _finished(value: Any) -> Any:
    """The result of an async function, too: each item has its own deadline, so there is nothing to interleave."""
    if not inspect.isawaitable(value):
        return value

    import asyncio  # slow to import, and few need it

    async def wait(awaitable: Awaitable[Any]) -> Any:
        return await awaitable

    return asyncio.run(wait(value))


# ----------------------------------------------------------------------------------------------------------- the values


def as_score(value: Any) -> Score:
    """A plain Score (builtin types only, all finite) of a number or a Score. Raises BadValue."""
    if not isinstance(value, Score):
        return Score(_number(value, "returned"))
    correct: Any = value.correct  # of the user's making, whatever the field is said to be
    if correct is not None and not isinstance(correct, bool):
        if _number(correct, "returned a Score whose `correct` is") not in (0.0, 1.0):
            raise BadValue(f"returned a Score whose `correct` is {_brief(correct)}; expected True, False or None")
        correct = bool(correct)
    if len(value.parts) > PARTS:
        raise BadValue(f"returned a Score of {len(value.parts)} parts; expected at most {PARTS}")
    parts = {
        str(name)[:NAME_CHARS]: _number(part, f"returned a Score whose part {str(name)[:80]!r} is")
        for name, part in value.parts.items()
    }
    return Score(_number(value.value, "returned a Score of value"), correct, parts, str(value.note)[:NOTE_CHARS])


def _score_of_dict(value: Mapping[str, Any]) -> Score:
    """verl's dict: "score" trains, "acc" (where there is one) says whether it is correct, other numbers are parts."""
    if "score" not in value:
        raise BadValue(f"returned a dict with keys {sorted(map(str, value))}; expected a key 'score'")
    plain = {str(name): _of_array(v) for name, v in value.items() if name != "score"}
    rest = {name: v for name, v in plain.items() if isinstance(v, (bool, int, float))}
    correct = bool(rest["acc"]) if rest.get("acc") in (0, 1) else None
    return as_score(Score(_number(value["score"], "returned a dict whose score is"), correct, rest))


def _of_array(value: Any) -> Any:
    """The number that a scalar of numpy or torch is: ``answer == truth`` may be one."""
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def _number(value: Any, what: str) -> float:
    if hasattr(class_of(value), "__float__"):  # numbers of any library, but not text
        try:
            number = float(value)
        except Exception as error:
            raise BadValue(f"{what} {_brief(value)}; expected one number ({described(error)})") from None
        if math.isfinite(number):
            return number
    raise BadValue(f"{what} {_brief(value)}; expected a finite number")


def _brief(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:
        text = "?"
    return f"{type(value).__name__} {text[:80]}" if value is not None else "None"


def _shown(function: Callable[..., Any]) -> str:
    return f"{getattr(function, '__name__', type(function).__name__)}{inspect.signature(function)}"


def described(error: BaseException) -> str:
    """One line: type, message and the place in the file where it was raised."""
    try:
        text = f"{type(error).__name__}: {error}"[:500]
    except Exception:
        text = type(error).__name__
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or trace.tb_frame.f_code.co_filename == __file__:
        return text
    return f"{text} ({os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno})"
