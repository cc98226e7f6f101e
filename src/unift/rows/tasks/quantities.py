"""Readings of a text that is one thing: a quantity with its unit, digits in a base, a time, a ratio, words."""

from __future__ import annotations

import re
from fractions import Fraction

from unift.rows.tasks.formula import FormulaError, parse_formula, symbols
from unift.rows.tasks.kinds import Based, Choice, Quantity, Ratio, Read, Reading, Time, Unreadable, Words
from unift.rows.tasks.pieces import split, without_introduction
from unift.rows.tasks.spelling import SCALES, unit_of

MAX_PLACES = 40  # at which words may begin
_CURRENCY = {"\\$": "$", "$": "$", "\\euro": "€", "\\pound": "£"}


def quantity(text: str, again: Read) -> list[Reading]:
    """A formula with a unit, a currency sign, a noun or a scale (3 million) where it has them."""
    bare, unit = _without_currency(text)
    if match := re.search(r"\^\s*\\circ\s*([CF])$", bare):
        bare, unit = bare[: match.start()], unit or f"{match[1]}^1"
    found: list[Reading] = []
    reason: Exception | None = None
    try:
        found.append(_measured(bare, unit))
    except FormulaError as error:
        reason = error
    for core, scale, named in _with_words(bare):
        try:
            measured = _measured(core, unit or named)
        except FormulaError:
            continue
        if not symbols(measured.tree):
            factor = ("num", Fraction(scale), None)
            found.append(measured if scale == 1 else Quantity(("mul", measured.tree, factor), measured.unit))
            break
    if not found and reason is not None:
        raise reason
    return found


def _without_currency(text: str) -> tuple[str, str]:
    before = re.match(r"(-?)\s*(\\\$|\$|\\euro|\\pound|USD|US\$)\s*(?=[\d.\\(-])", text)
    if before:
        return before[1] + text[before.end() :], _CURRENCY.get(before[2], "$") + "^1"
    after = re.search(r"(?<=[\d})])\s*(\\\$|\$|\\euro|\\pound)\s*$", text)
    return (text[: after.start()].strip(), _CURRENCY[after[1]] + "^1") if after else (text, "")


def _measured(text: str, unit: str) -> Quantity:
    """A formula with the signs for percent and degrees, which stand at its end. Degrees inside it belong to it."""
    if text.endswith("%"):
        return Quantity(parse_formula(text[:-1]), "%^1")
    tree = parse_formula(text)
    inner = tree[1] if tree[0] == "neg" else tree
    if inner[0] == "degree" and unit in ("", "deg^1"):
        return Quantity(("neg", inner[1]) if tree[0] == "neg" else inner[1], "deg^1")
    return Quantity(tree, unit)


def _with_words(text: str) -> list[tuple[str, int, str]]:
    """(formula, scale, unit) for each place at which words or units may begin; "" is a noun that is no unit."""
    attached = re.search(r"(?<=\d)(?:[a-z]{2,}(?:/[a-z]+)?|[mgshL])(?:\^\{?\d\}?)?$", text)
    places = [match.span() for match in re.finditer(r"\s+", text)][:MAX_PLACES]
    found: list[tuple[str, int, str]] = []
    for start, end in [*places, *([(attached.start(), attached.start())] if attached else [])]:
        scale = 1
        first, _, rest = text[end:].partition(" ")
        while first.lower() in SCALES:
            scale *= SCALES[first.lower()]
            first, _, rest = rest.partition(" ")
        words = f"{first} {rest}".strip()
        named = unit_of(words)
        if named is not None and start > 0 and (words or scale > 1):
            money = named.startswith(("$", "€", "£"))  # dollars per day are dollars
            found.append((text[:start], scale, named.split(" ")[0] if money else named))
    return found


def words(text: str, again: Read) -> list[Reading]:
    """Plain words, compared without case, punctuation and article; one letter is compared as it is."""
    if re.search(r"[\\^_=<>+*/|{}$]", text) or not re.search(r"[^\W\d_]", text):
        return []
    bare = re.sub(r"[.,;:!?()\"'\[\]]|\s-\s", " ", text)
    words = without_introduction(" ".join(bare.split())).split(" ")
    if len(words) > 1 and len(words[1]) > 1 and words[0].lower() in ("a", "an", "the"):
        words = words[1:]
    if re.search(r"\d", text) and not any(re.fullmatch(r"[^\W\d_]{2,}", word) for word in words):
        return []
    if all(len(word) == 1 for word in words):  # n! is a factorial, and "A?" a doubt
        return [Words(" ".join(words))] if len(words) == 1 and not re.search("[!?]", text) else []
    return [Words(" ".join(words).casefold())]


_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
_TENS = "thirty forty fifty sixty seventy eighty ninety"
_COUNTS = {word: n for n, word in enumerate(_SMALL.split())} | {word: 10 * n for n, word in enumerate(_TENS.split(), 3)}


def count_word(text: str, again: Read) -> list[Reading]:
    """Sixteen, twenty-five people, one hundred."""
    pairs = re.sub(rf"^({_TENS.replace(' ', '|')}|twenty)[- ](?=({_SMALL.replace(' ', '|')})\b)", r"\1-", text.lower())
    first, _, rest = pairs.partition(" ")
    tens, _, ones = first.partition("-")
    if tens not in _COUNTS or ones and (_COUNTS[tens] < 20 or not 0 < _COUNTS.get(ones, 0) < 10):
        return []
    count, scale = _COUNTS[tens] + _COUNTS.get(ones, 0), rest.partition(" ")
    if scale[0] in SCALES:
        count, rest = count * SCALES[scale[0]], scale[2]
    unit = unit_of(text[len(text) - len(rest) :])
    return [] if unit is None else [Quantity(("num", Fraction(count), None), unit)]


_CHOICE = re.compile(r"(?:\(\s*([A-J])\s*\)|([A-J])\s*[.):])\s*([^A-J]*\d[^A-J]*)")


def choice(text: str, again: Read) -> list[Reading]:
    """(C) 12: a letter of a multiple choice with its one value. A second letter, or words, would be a second candidate."""
    match = _CHOICE.fullmatch(text)
    if match is None:
        return []
    values = again(match[3])
    return [Choice(match[1] or match[2], values)] if all(isinstance(value, Quantity) for value in values) else []


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
    base = _BASES.get(word) or (int(word) if word.isdecimal() else 0)
    digits = match[1].upper()
    if not 2 <= base <= 36 or any(int(digit, 36) >= base for digit in digits):
        raise Unreadable("digits that the number base does not have")
    return [Based(digits.lstrip("0") or "0", base)]
