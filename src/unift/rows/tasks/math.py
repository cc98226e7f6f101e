"""Mathematics with a short final answer. Problems come from a file; there is no generator.

Both sides are read as a whole (`reading`) and compared by value (`equality`): exactly, or to a relative error of 1e-60.
The work is bounded by caps on length, depth, digits and powers, so no text takes longer than some milliseconds, and no
text is ever given to an evaluator that could run code.

Equality is by value, not by form: 2^{10} is right for 1024, and (x+1)^2 for x^2+2x+1.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Any

from unift.rows.tasks.answer import extract_answer, paper_last_line, unwrapped
from unift.rows.tasks.base import Task, check_rule, is_mapping, verdict
from unift.rows.tasks.paper import paper_equal
from unift.types import ConfigError, DataError, Row, Score


def make(seed: int, index: int) -> Row:
    raise ConfigError("task 'math' has no generator: give a file with problems (columns prompt, steps, answer).")


def score(
    completion: str, row: Row, *, hint: str = "", format_score: float = 0.0, rule: str = "unift", answer: str = "tags"
) -> Score:
    """Right: the answer equals the target, as text (`plain`) or as mathematics.

    ``format_score`` goes to any answer that can be read. answer: where it stands, see `tasks.answer`. rule="paper" is
    the official rule (`tasks.paper`) on the last line, and pays ``format_score`` for any answer tag. The hint is not used.
    """
    check_rule(rule, answer)
    gold = target(row)
    if rule == "paper":
        found = paper_last_line(completion)
        if found is None:
            return verdict(False, False, format_score, "no answer", answered=False)
        return verdict(paper_equal(found, gold, row), True, format_score)
    found = extract_answer(completion, answer)
    if found is None:
        return verdict(False, False, format_score, "no answer", answered=False)
    from unift.rows.tasks.equality import same
    from unift.rows.tasks.kinds import Unreadable
    from unift.rows.tasks.reading import MAX_TEXT, read

    if len(found) <= MAX_TEXT and plain(found) == plain(gold):
        return verdict(True, True, format_score, "equal as text")
    try:
        said = read(found)
    except Unreadable as error:
        return verdict(False, False, format_score, f"cannot read the answer: {error}")
    expected, reason = _read_gold(gold)
    if not expected:
        return verdict(False, True, format_score, f"not equal as text, and the target cannot be read: {reason}")
    return verdict(same(expected, said), True, format_score)


def target(row: Row) -> str:
    """The expected answer: ``row.answer`` itself (text or number) or its field 'target'."""
    found = row.answer.get("target") if is_mapping(row.answer) else row.answer
    if isinstance(found, bool) or not isinstance(found, (str, int, float)) or found == "":
        raise DataError(
            f"row {row.id!r} (task 'math'), column 'answer': expected text, a number or a mapping with 'target', "
            f"found {row.answer!r:.100}."
        )
    return str(found)


def canonical(row: Row) -> Hashable:
    """The question in folded case with single spaces."""
    question = row.answer.get("question") if is_mapping(row.answer) else None
    text = question if isinstance(question, str) else row.prompt if isinstance(row.prompt, str) else str(row.prompt)
    return " ".join(text.casefold().split())


def plain(text: str) -> str:
    r"""For comparison as text: no markup around it, white space between digits alone, one way to write \frac and brackets."""
    text = unwrapped(text.strip().removesuffix("."))
    text = re.sub(r"\\left(?![a-z])|\\right(?![a-z])", "", text)
    text = re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", text)
    return text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")


def unreadable_targets(rows: Sequence[Row]) -> list[tuple[int, str, str, str]]:
    """(number from 1, row id, target, reason) of the rows whose target is compared as text alone."""
    found: list[tuple[int, str, str, str]] = []
    for number, row in enumerate(rows, start=1):
        if row.task == "math":
            gold = target(row)
            readings, reason = _read_gold(gold)
            if not readings:
                found.append((number, row.id, gold, reason))
    return found


@lru_cache(maxsize=4096)
def _read_gold(gold: str) -> tuple[tuple[Any, ...], str]:
    from unift.rows.tasks.kinds import Unreadable
    from unift.rows.tasks.reading import read

    try:
        return read(gold), ""
    except Unreadable as error:
        return (), str(error)


TASK = Task("math", make, score, canonical)
