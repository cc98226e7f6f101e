"""Readings of a text that is one thing: a quantity with its unit, digits in a base, a time, a ratio, words."""

from __future__ import annotations

import re
from fractions import Fraction

from unift.tasks.formula import FormulaError, parse_formula, symbols
from unift.tasks.kinds import Based, Quantity, Ratio, Read, Reading, Time, Unreadable, Words
from unift.tasks.pieces import split, without_introduction
from unift.tasks.spelling import SCALES, unit_of

_CURRENCY = {"\\$": "$", "$": "$", "\\euro": "€", "\\pound": "£"}


def quantity(text: str, again: Read) -> list[Reading]:
    """A formula with a unit, a currency sign, a noun or a scale (3 million) where it has them."""
    bare, unit = text, ""
    money = re.match(r"(-?)\s*(\\\$|\$|\\euro|\\pound|USD|US\$)\s*(?=[\d.\\(-])", bare)
    if money:
        bare, unit = money[1] + bare[money.end() :], _CURRENCY.get(money[2], "$") + "^1"
    else:
        money = re.search(r"(?<=[\d})])\s*(\\\$|\$|\\euro|\\pound)\s*$", bare)
        if money:
            bare, unit = bare[: money.start()], _CURRENCY[money[1]] + "^1"
    if bare.endswith("%"):
        bare, unit = bare[:-1], "%^1"
    elif re.search(r"\^\s*\\circ\s*(?:C|F|\\mathrm\{[CF]\})?$", bare):
        bare, unit = re.sub(r"\^\s*\\circ\s*[CF]?$", "", bare), "deg^1"
    bare = bare.strip()
    found: list[Reading] = []
    reason: Exception | None = None
    try:
        found.append(Quantity(parse_formula(bare), unit))
    except FormulaError as error:
        reason = error
    core, words = _with_words(bare)
    if words:
        scale = 1
        first, _, rest = words.partition(" ")
        while first.lower() in SCALES:
            scale *= SCALES[first.lower()]
            first, _, rest = rest.partition(" ")
        named = unit_of(f"{first} {rest}".strip())
        if named is None:
            if not found:
                raise Unreadable(f"the words {words[:40]!r} after the formula") from reason
        else:
            tree = parse_formula(core)
            if not symbols(tree):
                tree = tree if scale == 1 else ("mul", tree, ("num", Fraction(scale), None))
                named = named.split(" ")[0] if named.startswith(("$", "€", "£")) else named
                found.append(Quantity(tree, unit or named))
    if not found and reason is not None:
        raise reason
    return found


def _with_words(text: str) -> tuple[str, str]:
    """A formula and the words (or units) after it, which white space or a bracket separates from it."""
    match = re.search(
        r"(?<=[\d)}\]iπ\s])\s+(\(?[A-Za-z%][A-Za-z'\-]*[\sA-Za-z'^{}/\-*\d.,%()]*)$|(?<=\d)((?:[a-z]{2,}|%)(?:\^\{?\d\}?)?)$",
        text,
    )
    if match is None:
        return text, ""
    start = match.start()
    # the first word that is not mathematics begins the words
    return text[:start].strip(), (match[1] or match[2]).strip()


def words(text: str, again: Read) -> list[Reading]:
    """Plain words, compared without case, punctuation and article; one letter is compared as it is."""
    if re.search(r"[\\^_=<>+*/|{}$]", text) or not re.search(r"[^\W\d_]", text):
        return []
    plain = re.sub(r"[.,;:!?()\"'\[\]]|\s-\s", " ", text)
    words = without_introduction(" ".join(plain.split())).split(" ")
    words = words[1:] if len(words) > 1 and words[0].lower() in ("a", "an", "the") else words
    if re.search(r"\d", text) and len(words) < 2:
        return []
    if all(len(word) == 1 for word in words):
        return [Words(" ".join(words))] if len(words) == 1 else []
    return [Words(" ".join(words).casefold())]


_COUNTS = {word: n for n, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
)}  # fmt: skip


def count_word(text: str, again: Read) -> list[Reading]:
    first, _, rest = text.partition(" ")
    if first.lower() not in _COUNTS or unit_of(rest) is None:
        return []
    return [Quantity(("num", Fraction(_COUNTS[first.lower()]), None), unit_of(rest) or "")]


_TIME = re.compile(r"(\d{1,2}):([0-5]\d(?::[0-5]\d)?)\s*(?:([ap])\.?\s?m\.?)?", re.IGNORECASE)


def clock(text: str, again: Read) -> list[Reading]:
    match = _TIME.fullmatch(text)
    return [Time(int(match[1]), match[2], f"{match[3].lower()}m" if match[3] else "")] if match else []


def ratio(text: str, again: Read) -> list[Reading]:
    pieces = split(text, r"\s*:\s*|(?<=\d)\s+to\s+(?=\d)")
    if pieces is None or _TIME.fullmatch(text):
        return []
    return [Ratio(tuple(parse_formula(piece) for piece in pieces))]


_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "eleven": 11,
          "twelve": 12, "sixteen": 16}  # fmt: skip
_BASED = re.compile(
    r"\(?\s*([0-9A-Fa-f]{1,60})\s*\)?\s*(?:_\s*\{?\s*(?:base\s*)?(\w{1,7})\s*\}?|\(?(?:in\s+)?base[\s-]+(\w{1,7})\)?)",
    re.IGNORECASE,
)


def based(text: str, again: Read) -> list[Reading]:
    match = _BASED.fullmatch(text)
    if match is None or not re.search(r"\d", match[1]):
        return []
    word = (match[2] or match[3]).lower()
    base = _BASES.get(word) or (int(word) if word.isdigit() else 0)
    digits = match[1].upper()
    if not 2 <= base <= 36 or any(int(digit, 36) >= base for digit in digits):
        raise Unreadable("digits that the number base does not have")
    return [Based(digits.lstrip("0") or "0", base)]
