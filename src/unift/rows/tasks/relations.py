"""Readings of a text with relation signs: x = 3, y = 2x + 1, 0 < x < 2, x \\in (0, 2), \\sqrt{2} \\approx 1.41."""

from __future__ import annotations

import re
from typing import Any

from unift.rows.tasks.formula import FormulaError, Tree, parse_formula, symbols
from unift.rows.tasks.kinds import Approximate, Bracketed, Named, Quantity, Read, Reading, Relation, Unreadable, one
from unift.rows.tasks.pieces import NAME, SEPARATOR, split, split_at
from unift.rows.tasks.quantities import quantity
from unift.rows.tasks.signs import FUNCTIONS, SMALL_WORDS
from unift.rows.tasks.spelling import CHANGING, MAX_WORDS
from unift.rows.tasks.values import equal_trees

_RELATION = r"\s*(?:\\(?:le|ge|ne|approx|in)(?![A-Za-z])|<=|>=|!=|:=|==|<|>|=)\s*"
_SIGN = {"\\le": "<=", "\\ge": ">=", "\\ne": "!=", "\\approx": "~", "\\in": "in", ":=": "=", "==": "="}


def relation(text: str, again: Read) -> list[Reading]:
    sides, found = split_at(text, _RELATION)
    if not found or split(text, SEPARATOR) is not None:  # a list of relations is read by its items
        return []
    signs = [_SIGN.get(sign, sign) for sign in found]
    if any(not side for side in sides):
        raise Unreadable("a relation with a side that is missing")
    if set(signs) == {"in"} and len(sides) == 2:
        return list(again(sides[1]))
    if set(signs) == {"="}:
        return _equality(sides, again)
    if "~" in signs and set(signs) <= {"=", "~"}:
        return _approximation(sides, signs, again)
    if set(signs) <= {"<", "<="} or set(signs) <= {">", ">="}:
        return _inequality(sides, signs)
    if signs == ["!="]:
        return [Relation("!=", _difference(parse_formula(sides[0]), parse_formula(sides[1])))]
    raise Unreadable("relations of several kinds")


def _name_of(side: str) -> str | None:
    """The name that a side of an equation is, "" for plain words, None if it is a formula."""
    if NAME.fullmatch(side) or re.fullmatch(r"\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])+\s*\)", side):
        tight = side.replace(" ", "")
        head = re.split(r"\W", tight.lstrip("\\"))[0]
        if head in FUNCTIONS or head.lower() in CHANGING | SMALL_WORDS:
            return None
        return "" if re.fullmatch(r"[A-Za-z]{4,}", tight) else tight
    if re.fullmatch(r"m?\s*\\(?:angle|triangle|overline|widehat|overarc)\s*\{?\s*[A-Z]{1,4}'*\s*\}?", side):
        return re.sub(r"[\s{}]", "", side)
    words = side.split()
    no_symbols = all(re.fullmatch(r"[A-Za-z]{2,}|a", word) and word.lower() not in CHANGING for word in words)
    return "" if words and no_symbols and len(words) <= MAX_WORDS else None


def _difference(left: Tree, right: Tree) -> Tree:
    return ("add", left, ("neg", right))


def _equality(sides: list[str], again: Read) -> list[Reading]:
    name, last = _name_of(sides[0]), sides[-1]
    trees = [_tree(side) for side in sides]
    if name is None and len(sides) == 2 and _name_of(last) and trees[0] is not None and not symbols(trees[0]):
        return _equality(sides[::-1], again)  # 3 = x
    if name is not None:
        values = _consistent(trees[1:])
        found: list[Reading] = []
        for reading in again(last):
            own = isinstance(reading, Quantity) and name.partition("(")[0] in symbols(reading.tree)
            if own and len(sides) == 2 and trees[0] is not None:
                found.append(Relation("=", _difference(trees[0], reading.tree)))
            elif values:
                side = reading.tree if isinstance(reading, Quantity) else None
                variable = trees[0] if trees[0] is not None and trees[0][0] == "sym" else None
                equation = _difference(variable, side) if variable is not None and side is not None else None
                found.append(Named(name, reading, equation))
        if not found:
            raise Unreadable("an equation whose sides differ")
        return found
    if any(tree is None for tree in trees):
        raise Unreadable("an equation with a side that is no formula")
    if all(equal_trees(tree, trees[-1]) for tree in trees[:-1]):  # type: ignore[arg-type]
        return list(again(last))
    if value := _value_of(trees, again(last)):
        return [Relation("=", _difference(trees[0], trees[-1]), value)]  # type: ignore[arg-type]
    if len(trees) != 2 or not symbols(trees[0]) | symbols(trees[1]):  # type: ignore[arg-type]
        raise Unreadable("an equation that is false")
    return [Relation("=", _difference(trees[0], trees[1]))]  # type: ignore[arg-type]


def _value_of(trees: list[Any], readings: tuple[Reading, ...]) -> Quantity | None:
    """What m + n = 2 + 3 = 5 or f(2) = 5 says that its left side is worth. One variable is yet to be solved for."""
    left, *rest = trees
    constant = left[0] == "apply" and not any(symbols(part) for part in left[2:])
    if not (constant or len(symbols(left)) > 1) or any(symbols(tree) for tree in rest):
        return None
    if not all(equal_trees(tree, rest[-1]) for tree in rest[:-1]):
        return None
    return next((reading for reading in readings if isinstance(reading, Quantity)), None)


def _tree(text: str) -> Tree | None:
    found = []
    try:
        found = [reading for reading in quantity(text, _none) if isinstance(reading, Quantity)]
    except (FormulaError, Unreadable):
        pass
    return found[0].tree if found else None


def _consistent(trees: list[Tree | None]) -> bool:
    """Whether the sides after the name agree where they can be compared: x = 6 * 7 = 42, but not x = 41 = 42."""
    known = [tree for tree in trees if tree is not None]
    constant = [tree for tree in known if not symbols(tree)]
    return all(equal_trees(tree, constant[-1]) for tree in constant[:-1]) if constant else all(
        equal_trees(tree, known[-1]) for tree in known[:-1]
    )  # fmt: skip


def _approximation(sides: list[str], signs: list[str], again: Read) -> list[Reading]:
    name = _name_of(sides[0])
    if name is not None and len(sides) == 2:
        return list(again(sides[1]))
    rest = sides[1:] if name is not None else sides
    if len(rest) != 2:
        raise Unreadable("a chain of approximations")
    exact, rounded = (one(side, again) for side in rest)
    if not isinstance(exact, Quantity) or not isinstance(rounded, Quantity):
        raise Unreadable("an approximation of something that is no number")
    return [Approximate(exact, rounded)]


def _inequality(sides: list[str], signs: list[str]) -> list[Reading]:
    """An interval where one variable stands between or beside constants; else a relation to 0."""
    if signs[0] in (">", ">="):
        sides, signs = sides[::-1], [{">": "<", ">=": "<="}[s] for s in signs[::-1]]
    trees = [parse_formula(side) for side in sides]
    variable = [k for k, tree in enumerate(trees) if tree[0] == "sym"]
    constant = [k for k, tree in enumerate(trees) if not symbols(tree)]
    if len(variable) == 1 and len(constant) == len(trees) - 1 and len(trees) <= 3:
        k = variable[0]
        if len(trees) == 3 and k == 1:
            ends = ("(" if signs[0] == "<" else "[", trees[0], trees[2], ")" if signs[1] == "<" else "]")
        elif len(trees) == 2:
            infinity: Tree = ("const", "oo")
            if k == 0:
                ends = ("(", ("neg", infinity), trees[1], ")" if signs[0] == "<" else "]")
            else:
                ends = ("(" if signs[0] == "<" else "[", trees[0], infinity, ")")
        else:
            raise Unreadable("a chain of inequalities")
        interval = Bracketed(ends[0], (Quantity(ends[1]), Quantity(ends[2])), ends[3])
        return [Named(trees[k][1], interval)]
    if len(trees) != 2:
        raise Unreadable("a chain of inequalities")
    return [Relation(">" if signs[0] == "<" else ">=", _difference(trees[1], trees[0]))]


def _none(text: str) -> tuple[Reading, ...]:
    raise Unreadable("a part that is no formula")
