"""Chain: a calculation of several operations from left to right, each result the next one's left side.

    prompt "Calculate from left to right, ...\\n14 - 2 - 9 + 30\\n", steps "14 - 2 = 12\\n", "12 - 9 = 3\\n", "3 + 30 = 33\\n",
    ending "<answer>33</answer>"

With ``example=True`` a solved problem stands in the prompt, the same for all rows of the same options. A base model that is
shown the form closes a whole solution right in one of three samples; without it SmolLM2-135M does so once in twenty thousand,
and then no hint leads to a reward.

Short enough for a language model of 100 million parameters on a CPU: a line takes about ten tokens of one digit each. The
left-to-right rule differs from the precedence of school where a product follows a sum, so ``signs`` with ``*`` ask for more
than what a pretrained model already writes.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import numpy as np

from unift.rng import generator
from unift.rows.tasks.answer import extract_answer, paper_last_line, unwrapped
from unift.rows.tasks.base import Task, build_row, check_rule, field_of, span, verdict
from unift.types import ConfigError, Row, Score

PROMPT = (
    "Calculate from left to right, one operation a line, then write the result in <answer> </answer> tags.\n"
    "{example}{text}\n"
)
SIGNS = "+-*"
NUMBER = re.compile(r"[+-]?[0-9]{1,12}")
MAX_TRIES = 300  # chains that are begun before the ranges are called infeasible
DRAWS = 200  # of one operation before its chain is given up


def make(
    seed: int,
    index: int,
    *,
    operations: Any = (3, 5),
    values: Any = (1, 99),
    results: Any = (0, 99),
    signs: Any = "+-",
    spaces: bool = True,
    example: bool = False,
) -> Row:
    """Problem ``index`` of this seed: every result on the way lies in ``results``.

    operations, values, results: how many operations, the range of the numbers, of the results; a whole number or (low, high).
    signs: which of ``+-*`` are drawn, again and again until the result lies in ``results``. spaces: around the signs;
    without them a line of two-digit numbers is 9 tokens of one digit each instead of 11. example: whether a solved problem
    comes first.
    """
    if not isinstance(signs, str) or not signs or set(signs) - set(SIGNS):
        raise ConfigError(f"option 'signs' of chain: found {signs!r}, expected one or more of {SIGNS!r}.")
    how_many, value_range = span("operations", operations, 1, 16), span("values", values, 0, 10**6)
    ranges = (how_many, value_range, span("results", results, 0, 10**9))
    solved = ""
    if example:
        text, steps, result = _written(*_drawn(generator("chain", "example"), ranges, signs), spaces)
        solved = f"{text}\n{''.join(steps)}<answer>{result}</answer>\n\n"
    text, steps, result = _written(*_drawn(generator("chain", seed, index), ranges, signs), spaces)
    prompt = PROMPT.format(example=solved, text=text)
    answer = {"text": text, "result": result}
    return build_row("chain", prompt, steps, f"<answer>{result}</answer>", answer, {"index": index})


def _drawn(
    rng: np.random.Generator, ranges: tuple[tuple[int, int], tuple[int, int], tuple[int, int]], signs: str
) -> tuple[list[int], str, list[int]]:
    """(numbers, signs between them, results); ranges: of the number of operations, of the values, of the results."""
    operations, values, results = ranges
    length = int(rng.integers(operations[0], operations[1] + 1))
    for _ in range(MAX_TRIES):
        numbers, drawn, found = [int(rng.integers(values[0], values[1] + 1))], "", list[int]()
        for _ in range(length):
            drawn_now = _next(rng, (found or numbers)[-1], signs, values, results)
            if drawn_now is None:
                break
            sign, number, result = drawn_now
            numbers, drawn, found = [*numbers, number], drawn + sign, [*found, result]
        if len(found) == length:
            return numbers, drawn, found
    raise ConfigError(
        f"chain found no problem in {MAX_TRIES} tries with operations={operations}, values={values}, results={results}, "
        f"signs={signs!r}: widen one of the ranges."
    )


def score(
    completion: str, row: Row, *, hint: str = "", format_score: float = 0.0, rule: str = "unift", answer: str = "tags"
) -> Score:
    """Right: the answer is the result as a whole number. An expression is not: the calculation itself would be one.

    ``format_score`` goes to any whole number. The hint is not used. rule="paper" looks at the last line only (the paper has
    no chain).
    """
    check_rule(rule, answer)
    result = int(field_of(row, "result"))
    said = paper_last_line(completion) if rule == "paper" else extract_answer(completion, answer)
    if said is None:
        return verdict(False, False, format_score, "no answer", answered=False)
    number = NUMBER.fullmatch(said if rule == "paper" else unwrapped(said))
    if number is None:
        return verdict(False, False, format_score, "the answer is not one whole number")
    value = int(number[0])
    return verdict(value == result, True, format_score, "" if value == result else f"says {value}, right is {result}")


def canonical(row: Row) -> Hashable:
    """The calculation without spaces: another order is another problem."""
    return str(field_of(row, "text")).replace(" ", "")


def _next(
    rng: np.random.Generator, value: int, signs: str, values: tuple[int, int], results: tuple[int, int]
) -> tuple[str, int, int] | None:
    """Sign, number and result of an operation on ``value`` that stays within ``results``; None if no draw does."""
    for _ in range(DRAWS):
        sign, number = signs[int(rng.integers(len(signs)))], int(rng.integers(values[0], values[1] + 1))
        result = {"+": value + number, "-": value - number, "*": value * number}[sign]
        if results[0] <= result <= results[1]:
            return sign, number, result
    return None


def _written(numbers: list[int], signs: str, results: list[int], spaces: bool) -> tuple[str, list[str], int]:
    """(the problem, its lines, the last result)."""
    gap = " " if spaces else ""
    text = str(numbers[0]) + "".join(f"{gap}{s}{gap}{n}" for s, n in zip(signs, numbers[1:], strict=True))
    sides = [numbers[0], *results[:-1]]
    terms = zip(sides, signs, numbers[1:], results, strict=True)
    steps = [f"{a}{gap}{s}{gap}{b}{gap}={gap}{c}\n" for a, s, b, c in terms]
    return text, steps, results[-1]


TASK = Task(
    "chain",
    make,
    score,
    canonical,
    {"operations": (3, 5), "values": (1, 99), "results": (0, 99), "signs": "+-", "spaces": True, "example": False},
)
