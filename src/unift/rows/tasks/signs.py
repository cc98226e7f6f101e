"""The signs of a formula: numbers, names (letters, Greek, functions) and punctuation. Length is capped."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

Tree = tuple[Any, ...]
Token = tuple[str, str, bool]  # kind (num, name, punct), text, white space before it
MAX_TOKENS = 400
MAX_DIGITS = 1_000  # of one literal, and the size of its decimal exponent

FUNCTIONS = set(
    "sin cos tan cot sec csc arcsin arccos arctan arccot sinh cosh tanh log ln lg exp sqrt cbrt abs floor ceil gcd lcm max "
    "min asin acos atan".split()
)
SAME = {"asin": "arcsin", "acos": "arccos", "atan": "arctan"}
CONSTANTS = {"pi": "pi", "infty": "oo", "infinity": "oo", "inf": "oo", "i": "i", "e": "e"}
GREEK = set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau upsilon phi "
    "varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega hbar ell".split()
)
SMALL_WORDS = set("and or not the of is if in to no yes at by as an for but nor".split())  # never a product
LONGEST_PRODUCT = 3  # letters side by side that are read as a product; more of them are a word
_TOKEN = re.compile(
    r"(?P<num>(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+(?![\w.]))?)|(?P<run>[A-Za-z]+)|(?P<cmd>\\[A-Za-z]+)|(?P<punct>\*\*|[^\s])",
    re.ASCII,
)


class FormulaError(ValueError):
    """The text is not one formula of this grammar, or is over a size cap."""


def tokens_of(text: str) -> list[Token]:
    """(kind, text, white space before it). Kinds: num, name (letter, greek or function), punct."""
    found: list[Token] = []
    end = 0
    for match in _TOKEN.finditer(text):
        kind, word, spaced = match.lastgroup or "", match.group(), match.start() > end
        end = match.end()
        if kind == "run" and not (word in FUNCTIONS or word in CONSTANTS or word in GREEK):
            found += _letters(word, spaced)
        elif kind == "run" or (kind == "cmd" and word[1:] in FUNCTIONS | GREEK | set(CONSTANTS) - {"e", "i"}):
            found.append(("name", word.lstrip("\\"), spaced))
        elif kind == "cmd" or kind == "punct":
            found.append(("punct", word, spaced))
        else:
            found.append((kind, word, spaced))
        if len(found) > MAX_TOKENS:
            raise FormulaError(f"more than {MAX_TOKENS} signs")
    return found


def _letters(word: str, spaced: bool) -> Iterable[Token]:
    """A run of letters as a product of variables; "2pir" is not, and a word is none."""
    for name in ("pi", "sqrt", "sin", "cos", "tan", "log", "ln"):
        if word.endswith(name) and len(word) - len(name) <= LONGEST_PRODUCT - 1:
            return [*_letters(word[: -len(name)], spaced), ("name", name, False)]
    if len(word) > LONGEST_PRODUCT or word.lower() in SMALL_WORDS:
        raise FormulaError(f"the word {word[:40]!r}")
    return [("name", letter, spaced and i == 0) for i, letter in enumerate(word)]


def number(word: str) -> Tree:
    """A literal: digits with a decimal point and a power of ten where it has them."""
    mantissa, _, power = word.lower().partition("e")
    whole, _, decimals = mantissa.partition(".")
    if len(whole) + len(decimals) > MAX_DIGITS or len(power) > 5 or abs(int(power or 0)) > MAX_DIGITS:
        raise FormulaError("a number with too many digits")
    exponent = int(power or 0) - len(decimals)
    value = Fraction(int(whole + decimals or "0")) * Fraction(10) ** exponent
    return ("num", value, len(decimals) - int(power or 0) if "." in mantissa or power else None)
