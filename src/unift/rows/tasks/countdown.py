"""Countdown: reach the target from the given numbers with + - * /, each number used exactly once.

Solutions are written as in the data released with UFT: one line per operation, then the final equation.

    paper style: "19 + 35 = 54\\n", "44 + 54 = 98\\n", "Therefore, the final equation is 44 + (19 + 35)"
                 ending " </think>\\n<answer> 44 + (19 + 35) </answer>"
    short style: "19+35=54\\n", "44+54=98\\n", ending "<answer>44+(19+35)</answer>", for small models
"""

from __future__ import annotations

from collections.abc import Hashable
from fractions import Fraction
from typing import Any

import numpy as np

from unift.rng import generator
from unift.rows.tasks.answer import extract_answer, paper_last_line, unwrapped
from unift.rows.tasks.arithmetic import ExpressionError, parse_expression
from unift.rows.tasks.base import Task, build_row, check_rule, field_of, nearest, span, verdict
from unift.types import ConfigError, Row, Score

PROMPT = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer.\n"
    "User: Using the numbers {numbers}, create an equation that equals {target}. You can use basic arithmetic "
    "operations (+, -, *, /) and each number can only be used once. Show your work in <think> </think> tags. And "
    "return the final answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>.\n"
    "Assistant: Let me solve this step by step.\n<think> "
)
STYLES = ("paper", "short")
PAPER_TOLERANCE = Fraction(1, 100_000)
MAX_TRIES = 10_000  # draws of numbers and operations before the ranges are called infeasible


def make(
    seed: int,
    index: int,
    *,
    numbers: Any = (3, 4),
    values: Any = (1, 99),
    targets: Any = (10, 100),
    integers: bool = True,
    style: str = "paper",
) -> Row:
    """Problem ``index`` of this seed. Intermediate results are positive, and whole unless ``integers`` is false.

    numbers, values, targets: how many numbers, their range, the range of the target; a whole number or (low, high).
    """
    if style not in STYLES:
        raise ConfigError(f"option 'style' of countdown: {style!r} is unknown.{nearest(str(style), STYLES)}")
    how_many, value_range = span("numbers", numbers, 2, 8), span("values", values, 1, 10**6)
    low, high = span("targets", targets, 1, 10**9)
    rng = generator("countdown", seed, index)
    for _ in range(MAX_TRIES):
        given = rng.integers(value_range[0], value_range[1] + 1, rng.integers(how_many[0], how_many[1] + 1)).tolist()
        solved = _combine(rng, given, integers)
        if solved is not None and low <= solved[0] <= high and solved[0].denominator == 1:
            return _row(given, int(solved[0]), solved[1], solved[2], style, index)
    raise ConfigError(
        f"countdown found no problem in {MAX_TRIES} tries with numbers={numbers}, values={values}, targets={targets}, "
        f"integers={integers}: widen one of the ranges."
    )


def score(
    completion: str, row: Row, *, hint: str = "", format_score: float = 0.0, rule: str = "unift", answer: str = "tags"
) -> Score:
    """Right: the answer is an expression whose literals are the given numbers, each once, and whose value is the target.

    ``format_score`` goes to any expression that can be read. Signs may be written as in LaTeX, and markup around the
    expression is dropped. answer: where it stands, see `tasks.answer`. rule="paper" is the official rule: the last line,
    Python's literals with a decimal point (their digits count as the numbers used), a value within 1e-5 of the target,
    ``format_score`` for any answer tag; its ``**`` and ``//`` are refused here as well. The hint is not used.
    """
    check_rule(rule, answer)
    numbers, target = sorted(int(n) for n in field_of(row, "numbers")), Fraction(field_of(row, "target"))
    paper = rule == "paper"
    said = paper_last_line(completion) if paper else extract_answer(completion, answer)
    if said is None:
        return verdict(False, False, format_score, "no answer", answered=False)
    try:
        found = parse_expression(said if paper else plain_signs(unwrapped(said)), decimals=paper)
    except ExpressionError as error:
        return verdict(False, paper, format_score, f"cannot read the answer: {error}")
    if sorted(found.numbers) != numbers:
        return verdict(False, True, format_score, f"uses {sorted(found.numbers)}, given {numbers}")
    if found.value is None:
        return verdict(False, True, format_score, "division by zero")
    if abs(found.value - target) >= PAPER_TOLERANCE if paper else found.value != target:
        return verdict(False, True, format_score, f"gives {found.value}, target {target}")
    return verdict(True, True, format_score)


_SIGNS = {"×": "*", "⋅": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "\\times": "*", "\\cdot": "*", "\\div": "/"}


def plain_signs(text: str) -> str:
    """An expression whose signs are written as in print or LaTeX, with the four signs of a keyboard."""
    for written, sign in (*_SIGNS.items(), ("\\left(", "("), ("\\right)", ")")):
        text = text.replace(written, sign)
    return text


def canonical(row: Row) -> Hashable:
    """(sorted numbers, target): the order of the numbers does not make another problem."""
    return tuple(sorted(int(n) for n in field_of(row, "numbers"))), int(field_of(row, "target"))


def _combine(
    rng: np.random.Generator, given: list[int], integers: bool
) -> tuple[Fraction, list[tuple[str, str, str, str]], str] | None:
    """Join random pairs until one value is left: (value, [(left, sign, right, result)], expression).

    None if the draw leads to an intermediate result that is not allowed.
    """
    # an entry: value, expression, position of its first number (sums and products keep the order of the prompt)
    pool = [(Fraction(n), str(n), i) for i, n in enumerate(given)]
    lines: list[tuple[str, str, str, str]] = []
    while len(pool) > 1:
        i, j = sorted(rng.choice(len(pool), 2, replace=False).tolist())
        b, a = pool.pop(j), pool.pop(i)
        sign = "+-*/"[int(rng.integers(4))]
        if sign in "+*":
            a, b = sorted((a, b), key=lambda entry: entry[2])
        elif a[0] < b[0]:
            a, b = b, a
        value = {"+": a[0] + b[0], "-": a[0] - b[0], "*": a[0] * b[0], "/": a[0] / b[0]}[sign]
        if value <= 0 or (integers and value.denominator != 1):
            return None
        lines.append((str(a[0]), sign, str(b[0]), str(value)))
        left, right = (f"({e[1]})" if " " in e[1] else e[1] for e in (a, b))
        pool.append((value, f"{left} {sign} {right}", min(a[2], b[2])))
    return pool[0][0], lines, pool[0][1]


def _row(
    given: list[int], target: int, lines: list[tuple[str, str, str, str]], final: str, style: str, index: int
) -> Row:
    answer, extra = {"numbers": given, "target": target}, {"index": index}
    if style == "short":
        prompt = f"{' '.join(map(str, given))} = {target}:"
        steps = [f"{a}{sign}{b}={c}\n" for a, sign, b, c in lines]
        return build_row("countdown", prompt, steps, f"<answer>{final.replace(' ', '')}</answer>", answer, extra)
    steps = [f"{a} {sign} {b} = {c}\n" for a, sign, b, c in lines]
    steps.append(f"Therefore, the final equation is {final}")
    prompt = PROMPT.format(numbers=given, target=target)
    return build_row("countdown", prompt, steps, f" </think>\n<answer> {final} </answer>", answer, extra)


TASK = Task(
    "countdown",
    make,
    score,
    canonical,
    {"numbers": (3, 4), "values": (1, 99), "targets": (10, 100), "integers": True, "style": "paper"},
)
