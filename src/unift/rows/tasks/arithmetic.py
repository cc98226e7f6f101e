"""Exact value of an arithmetic expression written by a model: + - * / ( ), signs, whole numbers, nothing else.

No ``eval`` and no sympy: the text comes from a model and is never trusted. Every size is capped, so the work is bounded
whatever the text holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

MAX_TEXT = 512  # characters
MAX_DEPTH = 40  # brackets and signs before a number inside one another
MAX_DIGITS = 12  # of one literal
_DIGITS = "0123456789"  # str.isdigit would let other scripts and superscripts through
_SPACE = " \t\r\n"


class ExpressionError(ValueError):
    """The text is not an expression of this grammar, or is over a size cap."""


@dataclass(frozen=True)
class Expression:
    numbers: tuple[int, ...]  # literals from left to right, as written (a sign is not part of a literal)
    value: Fraction | None  # None: division by zero


def parse_expression(text: str, *, decimals: bool = False) -> Expression:
    """Parse and evaluate; ``*`` and ``/`` bind tighter than ``+`` and ``-``, all group from the left.

    A whole number may end in a point ("85."). decimals: literals may have decimals, as in Python; each group of digits
    is then one of the ``numbers``.
    Raises ExpressionError for anything else: other characters (``**`` and ``//`` included), a missing operand or
    bracket, a literal with leading zeros or more than MAX_DIGITS digits, too long or too deep a text.
    """
    if len(text) > MAX_TEXT:
        raise ExpressionError(f"{len(text)} characters, at most {MAX_TEXT} are read")
    tokens = _tokens(text, decimals)
    value, end = _sum(tokens, 0, 0)
    if end != len(tokens):
        raise ExpressionError(f"unexpected {tokens[end]!r}")
    groups = (group for token in tokens if token[-1] in _DIGITS for group in token.split(".") if group)
    return Expression(tuple(int(group) for group in groups), value)


def _tokens(text: str, decimals: bool) -> list[str]:
    tokens: list[str] = []
    i = 0
    while i < len(text):
        char, j = text[i], i + 1
        if char in _DIGITS or (decimals and char == "."):
            while j < len(text) and text[j] in _DIGITS:
                j += 1
            whole = j
            if char in _DIGITS and text[j : j + 1] == ".":
                j += 1
                while decimals and j < len(text) and text[j] in _DIGITS:
                    j += 1
            digits = j - i - text.count(".", i, j)
            if digits > MAX_DIGITS:
                raise ExpressionError(f"a number of {digits} digits, at most {MAX_DIGITS} are read")
            if char == "0" and whole - i > 1 and whole == j and text[i:j].strip("0"):
                raise ExpressionError(f"leading zero in {text[i:j]!r}")
            if text[i:j] == ".":
                raise ExpressionError("unexpected '.'")
            tokens.append(text[i:j].rstrip("."))
        elif char not in "+-*/()" and char not in _SPACE:
            raise ExpressionError(f"unexpected {char!r}")
        elif char not in _SPACE:
            tokens.append(char)
        i = j
    return tokens


def _sum(tokens: list[str], i: int, depth: int) -> tuple[Fraction | None, int]:
    left, i = _product(tokens, i, depth)
    while i < len(tokens) and tokens[i] in "+-":
        sign = tokens[i]
        right, i = _product(tokens, i + 1, depth)
        left = None if left is None or right is None else left + right if sign == "+" else left - right
    return left, i


def _product(tokens: list[str], i: int, depth: int) -> tuple[Fraction | None, int]:
    left, i = _atom(tokens, i, depth)
    while i < len(tokens) and tokens[i] in "*/":
        sign = tokens[i]
        right, i = _atom(tokens, i + 1, depth)
        if left is None or right is None or (sign == "/" and right == 0):
            left = None
        else:
            left = left * right if sign == "*" else left / right
    return left, i


def _atom(tokens: list[str], i: int, depth: int) -> tuple[Fraction | None, int]:
    if depth > MAX_DEPTH:
        raise ExpressionError(f"nested deeper than {MAX_DEPTH}")
    if i == len(tokens):
        raise ExpressionError("a number is missing at the end")
    token = tokens[i]
    if token in "+-":
        value, i = _atom(tokens, i + 1, depth + 1)
        return (None if value is None else -value if token == "-" else value), i
    if token == "(":
        value, i = _sum(tokens, i + 1, depth + 1)
        if i == len(tokens) or tokens[i] != ")":
            raise ExpressionError("a closing bracket is missing")
        return value, i + 1
    if token[-1] in _DIGITS:
        return Fraction("0" + token), i + 1
    raise ExpressionError(f"unexpected {token!r}")
