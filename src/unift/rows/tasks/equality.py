"""When two readings of a final answer say the same thing.

Quantities are equal when their values are (`values`); a unit may be left out, but two that are written must agree. A
decimal of six or more significant digits equals an exact value that has more, if it is that value up to its last digit.
Lists and sets have no order, points and intervals have one and keep their brackets. Ratios are equal up to a factor,
equations up to a constant factor, but "x = 3" is only "x = 3" or "3": an equation that has yet to be solved is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from unift.rows.tasks.formula import FormulaError, Tree, symbols
from unift.rows.tasks.kinds import (
    Approximate,
    Based,
    Bracketed,
    Choice,
    Matrix,
    Members,
    Named,
    Quantity,
    Ratio,
    Reading,
    Relation,
    Several,
    Time,
    Union,
    Words,
)
from unift.rows.tasks.values import equal_trees, evaluate, proportional, rounds_to

SIGNIFICANT = 6  # digits from which a decimal may stand for an exact value


def same(target: Sequence[Reading], answer: Sequence[Reading]) -> bool:
    """Whether some reading of the answer equals some reading of the target."""
    return any(_same(t, a) for t in target for a in answer)


def _same(target: Any, answer: Any) -> bool:
    if isinstance(answer, Named) and not isinstance(target, Named):
        if isinstance(target, Relation) and target.sign == "=" and answer.equation is not None:
            return proportional(target.tree, answer.equation)
        return _same(target, answer.value)
    if isinstance(target, Named):
        return _same_named(target, answer)
    if isinstance(answer, Approximate):
        consistent = _rounded(answer.exact.tree, answer.rounded.tree, least=1)
        return consistent and (_same(target, answer.exact) or _same(target, answer.rounded))
    if isinstance(target, Approximate):
        return _same(target.exact, answer) or _same(target.rounded, answer)
    if isinstance(target, Choice) or isinstance(answer, Choice):
        return _same_choice(target, answer)
    if isinstance(target, Quantity) and isinstance(answer, Relation) and answer.value is not None:
        return _same_quantity(target, answer.value)
    if isinstance(target, Quantity) and isinstance(answer, Ratio):
        return _same(answer, target)
    if isinstance(target, Ratio) and isinstance(answer, Quantity) and len(target.parts) == 2:
        return equal_trees(("div", *target.parts), answer.tree) and not symbols(answer.tree)
    if isinstance(target, (Members, Several)) and isinstance(answer, (Members, Several)):
        return _same_members(target, answer)
    if isinstance(target, Bracketed) and isinstance(answer, Several):
        return _same_point(target, answer)
    if isinstance(target, Several) and isinstance(answer, Bracketed):
        return _same_point(answer, target)
    if isinstance(target, Members):  # and the answer is none: the only member of a set may stand alone
        return len(target.items) == 1 and _same(target.items[0], answer)
    if isinstance(answer, Members):
        return len(answer.items) == 1 and _same(target, answer.items[0])
    if isinstance(target, Matrix) and isinstance(answer, Bracketed) and answer.left == "(" and answer.right == ")":
        flat = [cell for row in target.rows for cell in row]
        return 1 in (len(target.rows), len(target.rows[0])) and _pairwise(flat, answer.items)
    if isinstance(target, Words) and isinstance(answer, Quantity):  # a letter that is a choice, and as a formula
        return answer.tree == ("sym", target.text) and not answer.unit
    if isinstance(answer, Words) and isinstance(target, Quantity):
        return _same(answer, target)
    if isinstance(target, Quantity):
        return isinstance(answer, Quantity) and _same_quantity(target, answer)
    if isinstance(target, Bracketed):
        if not isinstance(answer, Bracketed) or (target.left, target.right) != (answer.left, answer.right):
            return False
        return _pairwise(target.items, answer.items)
    if isinstance(target, Union):
        return isinstance(answer, Union) and _matched(target.parts, answer.parts)
    if isinstance(target, Matrix):
        if not isinstance(answer, Matrix) or len(target.rows) != len(answer.rows):
            return False
        return all(map(_pairwise, target.rows, answer.rows))
    if isinstance(target, Relation):
        if not isinstance(answer, Relation) or target.sign != answer.sign:
            return False
        return proportional(target.tree, answer.tree, positive=target.sign[0] == ">")
    if isinstance(target, Ratio):
        return isinstance(answer, Ratio) and _same_ratio(target.parts, answer.parts)
    if isinstance(target, Time) and isinstance(answer, Time):
        same_clock = (target.hour, target.rest) == (answer.hour, answer.rest)
        return same_clock and target.half in ("", answer.half)
    return isinstance(target, (Words, Based)) and target == answer


def _same_named(target: Named, answer: Any) -> bool:
    """A solved equation: the other side may be given alone, and the name must not be another one."""
    if isinstance(answer, Named):
        if target.name == answer.name or "" in (target.name, answer.name):
            return _same(target.value, answer.value)
        solved = target.equation is None or not isinstance(target.value, Quantity) or not symbols(target.value.tree)
        return not solved and answer.equation is not None and proportional(target.equation, answer.equation)  # type: ignore[arg-type]
    if isinstance(answer, Relation):
        open_form = isinstance(target.value, Quantity) and symbols(target.value.tree) and target.equation is not None
        return bool(open_form) and answer.sign == "=" and proportional(target.equation, answer.tree)  # type: ignore[arg-type]
    return _same(target.value, answer)


def _same_choice(target: Any, answer: Any) -> bool:
    """(C) 12 is C, and 12; of two choices with values both must agree."""
    if isinstance(target, Choice) and isinstance(answer, Choice):
        return target.letter == answer.letter and same(target.values, answer.values)
    choice, other = (target, answer) if isinstance(target, Choice) else (answer, target)
    if isinstance(other, Words):
        return other.text == choice.letter
    return same(choice.values, (other,)) if choice is target else same((other,), choice.values)


def _same_members(target: Members | Several, answer: Members | Several) -> bool:
    one, other = target.items, answer.items
    names = [{item.name for item in items if isinstance(item, Named)} for items in (one, other)]
    if (len(names[0]) > 1) != (len(names[1]) > 1):  # x = 1, y = 2 against 1, 2: the order says which is which
        return isinstance(target, Several) and isinstance(answer, Several) and _pairwise(one, other)
    if isinstance(target, Members) or isinstance(answer, Members):
        if len(other) > 2 * len(one) + 2 or len(one) > 2 * len(other) + 2:  # members may repeat, but not without end
            return False
        one, other = _distinct(one), _distinct(other)
    return _matched(one, other)


def _same_point(point: Bracketed, values: Several) -> bool:
    """(3, 4) and "x = 3, y = 4": the names must be in alphabetical order, each once."""
    names = [item.name for item in values.items if isinstance(item, Named)]
    ordered = len(names) == len(values.items) and names == sorted(set(names)) and "" not in names
    return (
        ordered and (point.left, point.right) == ("(", ")") and _pairwise(point.items, [v.value for v in values.items])
    )


def _distinct(items: Sequence[Any]) -> list[Any]:
    distinct: list[Any] = []
    for item in items:
        if not any(_same(other, item) for other in distinct):
            distinct.append(item)
    return distinct


def _matched(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether the items of both pair up in some order. Equality is transitive but for rounding, so taking the first is right."""
    left = list(other)
    if len(one) != len(left):
        return False
    for item in one:
        place = next((k for k, candidate in enumerate(left) if _same(item, candidate)), None)
        if place is None:
            return False
        del left[place]
    return True


def _pairwise(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other))


def _same_ratio(one: Sequence[Tree], other: Sequence[Tree]) -> bool:
    """a : b : c, cross-multiplied, so that a part may be 0."""
    if len(one) != len(other):
        return False
    crossed = ((("mul", one[i], other[i + 1]), ("mul", one[i + 1], other[i])) for i in range(len(one) - 1))
    zero = ("num", Fraction(0), None)
    zeros = [[equal_trees(part, zero) for part in parts] for parts in (one, other)]
    return zeros[0] == zeros[1] and all(equal_trees(a, b) for a, b in crossed)


def _same_quantity(target: Quantity, answer: Quantity) -> bool:
    if target.unit and answer.unit and target.unit != answer.unit:
        return False
    if _equal_or_rounded(target.tree, answer.tree):
        return True
    hundredth = ("num", Fraction(1, 100), None)
    if target.unit == "%^1" and not answer.unit:
        return _equal_or_rounded(("mul", target.tree, hundredth), answer.tree)
    if answer.unit == "%^1" and not target.unit:
        return _equal_or_rounded(target.tree, ("mul", answer.tree, hundredth))
    if "deg^1" in (target.unit, answer.unit) and "" in (target.unit, answer.unit):  # 90 degrees is also pi/2
        one, other = (("degree", q.tree) if q.unit else q.tree for q in (target, answer))
        return equal_trees(one, other)
    return False


def _equal_or_rounded(target: Tree, answer: Tree) -> bool:
    return equal_trees(target, answer) or _rounded(target, answer) or _rounded(answer, target)


def _rounded(exact: Tree, decimal: Tree, least: int = SIGNIFICANT) -> bool:
    """Whether a decimal stands for an exact value that has more digits."""
    negative = decimal[0] == "neg"
    literal = decimal[1] if negative else decimal
    if literal[0] != "num" or literal[2] is None and least > 1 or symbols(exact) or _is_decimal(exact):
        return False
    digits = str(abs(literal[1].numerator)) if literal[1].denominator == 1 else _significant(literal)
    if len(digits) < least:
        return False
    try:
        value = -literal[1] if negative else literal[1]
        return rounds_to(evaluate(exact), value, literal[2] or 0)
    except FormulaError:
        return False


def _is_decimal(tree: Tree) -> bool:
    """Whether a tree is itself a decimal literal: two decimals are equal or not."""
    literal = tree[1] if tree[0] == "neg" else tree
    return literal[0] == "num" and literal[2] is not None


def _significant(literal: Tree) -> str:
    scaled = abs(literal[1]) * Fraction(10) ** literal[2]
    return str(scaled.numerator)
