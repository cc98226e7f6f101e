"""Mathematics with a short final answer, judged by math-verify. Problems come from a file; there is no generator.

`score` belongs in a scoring worker: math-verify hands the model's text to sympy, and limits its time with SIGALRM, which
Python allows only in the main thread of a process. A signal does not reach every loop inside sympy, so the worker's own
deadline (it is killed) is the real limit. math-verify is imported when the first answer needs it.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Hashable, Mapping
from functools import lru_cache
from typing import Any

from unift.rows.tasks.answer import extract_answer, paper_last_line
from unift.rows.tasks.base import Task, check_rule, verdict
from unift.types import ConfigError, DataError, Row, Score

MAX_ANSWER = 1_000  # characters of an answer that are read
SECONDS = 3  # for reading one formula, and for one comparison


def make(seed: int, index: int) -> Row:
    raise ConfigError("task 'math' has no generator: give a file with problems (columns prompt, steps, answer).")


def score(completion: str, row: Row, *, hint: str = "", format_score: float = 0.0, rule: str = "unift") -> Score:
    """Right: the answer equals the target, as text (`plain`) or as mathematics (math-verify).

    The answer may stand in one pair of $ signs or one box; a text with several formulas is not read, so that listing
    candidates earns nothing. ``format_score`` goes to any answer that can be read. rule="paper" compares text on the
    last line and pays ``format_score`` for any answer tag. The hint is not used.
    Raises RuntimeError outside the main thread (see the module docstring), never because of the completion.
    """
    check_rule(rule)
    gold = target(row)
    answer = extract_answer(completion) if rule == "unift" else paper_last_line(completion)
    if answer is None:
        return verdict(False, False, format_score, "no answer")
    if rule == "paper":
        return verdict(plain(answer) == plain(gold), True, format_score)
    if len(answer) > MAX_ANSWER:
        return verdict(False, False, format_score, f"{len(answer)} characters, at most {MAX_ANSWER} are read")
    if plain(answer) == plain(gold):
        return verdict(True, True, format_score, "equal as text")
    formula = bare(answer)
    if "$" in formula.replace("\\$", "") or "\\boxed" in formula:
        return verdict(False, False, format_score, "more than one formula")
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            "task 'math' must be scored in the main thread of a worker process (math-verify uses SIGALRM)"
        )
    read, note = _read(formula)
    if not read:
        return verdict(False, False, format_score, f"cannot read the answer: {note}")
    expected, note = _read_gold(bare(gold))
    if not expected:
        return verdict(False, True, format_score, f"not equal as text, and the target cannot be read: {note}")
    right, note = _equal(expected, read)
    return verdict(right, True, format_score, note)


def target(row: Row) -> str:
    """The expected answer: ``row.answer`` itself (text or number) or its field 'target'."""
    found = row.answer.get("target") if isinstance(row.answer, Mapping) else row.answer
    if isinstance(found, bool) or not isinstance(found, (str, int, float)) or found == "":
        raise DataError(
            f"row {row.id!r} (task 'math'), column 'answer': expected text, a number or a mapping with 'target', "
            f"found {row.answer!r:.100}."
        )
    return str(found)


def canonical(row: Row) -> Hashable:
    """The question in folded case with single spaces."""
    question = row.answer.get("question") if isinstance(row.answer, Mapping) else None
    text = question if isinstance(question, str) else row.prompt if isinstance(row.prompt, str) else str(row.prompt)
    return " ".join(text.casefold().split())


def bare(text: str) -> str:
    """Without one pair of surrounding delimiters: $..$, $$..$$, \\(..\\), \\[..\\], \\boxed{..}, and a final full stop."""
    text = text.strip()
    text = text[:-1].rstrip() if text.endswith(".") else text
    for start, end in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        inner = text[len(start) : -len(end)]
        if text.startswith(start) and text.endswith(end) and len(text) > len(start + end) and start not in inner:
            text = inner.strip()
            break
    inner = text[len("\\boxed{") : -1]
    if text.startswith("\\boxed{") and text.endswith("}") and _balanced(inner):
        text = inner.strip()
    return text


def plain(text: str) -> str:
    """For comparison as text: bare, no white space, one spelling of fractions and brackets."""
    text = re.sub(r"\s+|\\left(?![a-z])|\\right(?![a-z])", "", bare(text))
    return text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")


def _balanced(text: str) -> bool:
    depth = 0
    for char in text:
        depth += (char == "{") - (char == "}")
        if depth < 0:
            return False
    return depth == 0


def _read(formula: str) -> tuple[list[Any], str]:
    """math-verify's reading of a formula (empty if there is none) and why it failed."""
    from math_verify import parse
    from math_verify.errors import TimeoutException

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it logs a traceback for each unreadable answer
    try:
        return parse(f"${formula}$", parsing_timeout=SECONDS, raise_on_error=True) or parse(
            formula, parsing_timeout=SECONDS, raise_on_error=True
        ), "no formula"
    except TimeoutException:  # not an Exception there
        return [], f"took longer than {SECONDS} s"
    except Exception as error:  # whatever sympy raises on a model's text only means that it cannot be read
        return [], f"{type(error).__name__}: {error!s:.100}"


@lru_cache(maxsize=4096)
def _read_gold(formula: str) -> tuple[list[Any], str]:
    return _read(formula)


def _equal(gold: list[Any], answer: list[Any]) -> tuple[bool, str]:
    from math_verify import verify
    from math_verify.errors import TimeoutException

    try:
        return bool(verify(gold, answer, timeout_seconds=SECONDS, raise_on_error=True)), ""
    except TimeoutException:
        return False, f"comparing took longer than {SECONDS} s"
    except Exception as error:  # as above: two things that cannot be compared are not equal
        return False, f"not comparable: {type(error).__name__}: {error!s:.100}"


TASK = Task("math", make, score, canonical)
