"""What a final answer says: a quantity, list, set, interval or point, matrix, relation, ratio, time, or words.

`read` gives every reading that the whole text allows (70,110 is a number and a list), or raises Unreadable with the
reason. A text of which only a part can be read is not read at all.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from unift.rows.tasks.formula import FormulaError, Tree, nested, parse_formula
from unift.rows.tasks.kinds import (
    Bracketed,
    Matrix,
    Members,
    Named,
    Quantity,
    Read,
    Reading,
    Relation,
    Several,
    Union,
    Unreadable,
    Words,
    one,
)
from unift.rows.tasks.pieces import MAX_ITEMS, NAME, SEPARATOR, closing, one_formula, split, without_introduction
from unift.rows.tasks.quantities import based, choice, clock, count_word, quantity, ratio, words
from unift.rows.tasks.relations import relation
from unift.rows.tasks.spelling import ROW_END, spelled

MAX_TEXT = 1_000  # characters
MAX_NESTED = 24  # brackets inside one another


def read(text: str) -> tuple[Reading, ...]:
    """Every reading of a final answer. Raises Unreadable; costs no more than a few milliseconds whatever the text."""
    if len(text) > MAX_TEXT:
        raise Unreadable(f"{len(text)} characters, at most {MAX_TEXT} are read")
    if nested(text) > MAX_NESTED:
        raise Unreadable(f"nested deeper than {MAX_NESTED}")
    if re.fullmatch(r"\$?\\(?:text|textbf|textrm|mbox)\s*\{[^{}\d]*\}\$?\.?", text.strip()):
        return tuple(_words_only(one_formula(spelled(text))))
    text = one_formula(spelled(text))
    if "\\ldots" in text:
        raise Unreadable("an ellipsis, which does not say what it stands for")
    if re.search(
        r"\\frac\s*\{\s*(?:d|\\partial)(?![A-Za-z]{2})[^{}]*(?:\{[^{}]*\}[^{}]*)*\}\s*\{\s*(?:d|\\partial)(?![A-Za-z]{2})\s*\\?[A-Za-z]",
        text,
    ):
        raise Unreadable("a derivative")
    return _read(text, 0)


def _words_only(text: str) -> list[Reading]:
    """Readings of text that is set as words: no letters side by side are a product there."""
    pieces = split(text, SEPARATOR)
    found: list[Reading] = words(text, _read_words)
    if pieces is not None and all(pieces):
        found.append(Several(tuple(one(piece, _read_words) for piece in pieces)))
    return found or list(_read(text, 0))


def _read_words(text: str) -> tuple[Reading, ...]:
    found = words(text, _read_words)
    if not found:
        raise Unreadable(f"{text[:60]!r} is no word")
    return tuple(found)


def _read(text: str, depth: int) -> tuple[Reading, ...]:
    """Every reading of a text in one spelling: each kind is tried, and all that apply are kept."""
    if depth > 6:
        raise Unreadable("lists inside lists")
    text = re.sub(rf"[.,;:\s\\{ROW_END}]+$", "", text.strip()).strip()
    text = text[1:].strip() if text.startswith(("=", ":")) else text
    text = re.sub(r"^(?:negative|minus)\s+(?=[\d.\\$])", "-", text, flags=re.IGNORECASE)
    if not text:
        raise Unreadable("nothing to read")
    found: list[Reading] = []
    reason = ""
    for kind in _KINDS:
        try:
            for reading in kind(text, lambda part: _read(part, depth + 1)):
                if reading not in found:
                    found.append(reading)
        except (Unreadable, FormulaError) as error:
            reason = reason or str(error)
    shorter = without_introduction(text)
    if shorter != text:
        try:
            found += [reading for reading in _read(shorter, depth + 1) if reading not in found]
        except Unreadable as error:
            reason = str(error)
    if not found:
        raise Unreadable(reason or f"{text[:60]!r} is neither a formula nor plain words")
    return tuple(found)


# ---------------------------------------------------------------------------------------------- kinds


def _thousands(text: str, again: Read) -> list[Reading]:
    """Digits in groups of three: 62,500 or 7 000, with what may follow or precede a number."""
    match = re.search(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])|(?<![\d.,])[1-9]\d{0,2}(?: \d{3})+(?![\d,/]|\s?/)", text)
    if match is None:
        return []
    joined = re.sub(
        r"(?<![\d.,])(\d{1,3}(?:,\d{3})+)(?![\d,])|(?<![\d.,])([1-9]\d{0,2}(?: \d{3})+)(?![\d,/]|\s?/)",
        lambda m: m[0].replace(",", "").replace(" ", ""),
        text,
    )
    return list(again(joined))


def _list(text: str, again: Read) -> list[Reading]:
    pieces = split(text, SEPARATOR)
    if pieces is None:
        return []
    if any(not piece for piece in pieces):
        raise Unreadable("a list with an empty place")
    if re.fullmatch(r"\d{1,3}(,\d{3})+", text) and any(piece.startswith("0") for piece in pieces):
        return []
    items: list[Any] = [one(piece, again) for piece in pieces]
    if len({isinstance(item, Words) for item in items}) > 1:
        raise Unreadable("a list of formulas and words")
    first = items[0]
    if isinstance(first, Named) and not any(isinstance(item, (Named, Relation)) for item in items[1:]):
        items = [Named(first.name, item if k else first.value) for k, item in enumerate([first, *items[1:]])]
    if all(isinstance(item, Named) and _is_interval_of_inequality(piece) for item, piece in zip(items, pieces)):
        if len({item.name for item in items}) == 1:
            return [Named(items[0].name, Union(tuple(item.value for item in items)))]
    return [Several(tuple(items))]


def _is_interval_of_inequality(text: str) -> bool:
    return re.search(r"[<>]|\\[lg]e(?![A-Za-z])", text) is not None


def _plus_minus(text: str, again: Read) -> list[Reading]:
    if "\\pm" not in text:
        return []
    if text.count("\\pm") > 1:
        raise Unreadable("more than one sign for plus or minus")
    return [Several(tuple(one(text.replace("\\pm", sign), again) for sign in ("+", "-")))]


def _brackets(text: str, again: Read) -> list[Reading]:
    """(a, b), [a, b), \\{a, b\\}, {a, b}, \\langle a, b \\rangle and the empty set."""
    if text in ("\\emptyset", "\\{\\}", "\\{ \\}", "{}"):
        return [Members(())]
    if re.fullmatch(r"\\mathbb\s*\{?\s*R\s*\}?", text):
        return [_real_line()]
    body = text.replace("\\langle", "(").replace("\\rangle", ")")
    braces = body.startswith("\\{")
    start = 1 if braces else 0
    if body[start : start + 1] not in ("(", "[", "{") or closing(body, start) != len(body) - 1:
        return []
    inner = body[start + 1 : -2 if braces and body[-2] == "\\" else -1].strip()
    left, right = body[start], body[-1]
    if braces or left == "{":
        return _in_braces(inner, braces, again)
    pieces = split(inner, r"\s*[,;]\s*")
    rows = pieces or [inner]
    if left == "[" and all(row.startswith("[") and closing(row, 0) == len(row) - 1 for row in rows):
        cells = [split(row[1:-1], r"\s*,\s*") or [row[1:-1]] for row in rows]
        if len(set(map(len, cells))) == 1 and len(rows) * len(cells[0]) <= MAX_ITEMS:
            return [Matrix(tuple(tuple(Quantity(parse_formula(cell)) for cell in row) for row in cells))]
    if pieces is None:
        return []
    items = tuple(one(piece, again) for piece in pieces)
    if left == "[" and right == "]" and len(items) > 2:
        return [Several(items)]
    return [Bracketed(left, items, right)]


def _in_braces(inner: str, escaped: bool, again: Read) -> list[Reading]:
    condition = (
        split(inner, r"\s*(?:\\mid(?![A-Za-z])|\||(?<!:):(?!:))\s*")
        if "<" in inner or ">" in inner or "\\" in inner
        else None
    )
    if condition is not None and len(condition) == 2 and NAME.fullmatch(condition[0].partition("\\in")[0].strip()):
        return list(again(condition[1]))
    pieces = split(inner, r"\s*[,;]\s*")
    if pieces is None:
        return [Members((one(inner, again),))] if escaped else list(again(inner))
    return [Members(tuple(one(piece, again) for piece in pieces))]


def _real_line() -> Bracketed:
    infinity: Tree = ("const", "oo")
    return Bracketed("(", (Quantity(("neg", infinity)), Quantity(infinity)), ")")


def _union(text: str, again: Read) -> list[Reading]:
    pieces = split(text, r"\s*\\cup(?![A-Za-z])\s*|(?<=[)\]}])\s*[U∪]\s*(?=[(\[\\{])")
    if pieces is None:
        return []
    return [Union(tuple(one(piece, again) for piece in pieces))]


def _matrix(text: str, again: Read) -> list[Reading]:
    match = re.fullmatch(
        r"(.*?)\\begin\s*\{(pmatrix|bmatrix|matrix|Bmatrix|array|smallmatrix)\}(.*)\\end\s*\{\2\}[)\]]?",
        text,
        re.DOTALL,
    )
    if match is None:
        return []
    if "\\begin" in match[3]:
        raise Unreadable("a matrix inside a matrix")
    body = re.sub(r"^\s*\{[lcr|\s]*\}", "", match[3]) if match[2] == "array" else match[3]
    scale = match[1].strip().removesuffix("(").removesuffix("[").strip()
    rows = [row.split("&") for row in re.split(rf"{ROW_END}|\\cr(?![A-Za-z])", body) if row.replace(";;", " ").strip()]
    if not rows or sum(map(len, rows)) > MAX_ITEMS or len(set(map(len, rows))) != 1:
        raise Unreadable("a matrix whose rows do not fit")
    factor = None if not scale else ("num", Fraction(-1), None) if scale == "-" else parse_formula(scale.rstrip("*"))

    def entry(cell: str) -> Quantity:
        tree = parse_formula(cell.replace(";;", " "))
        return Quantity(tree if factor is None else ("mul", factor, tree))

    return [Matrix(tuple(tuple(entry(cell) for cell in row) for row in rows))]


_KINDS = (
    based, clock, _thousands, _matrix, _plus_minus, relation, _union, _brackets, _list, choice, ratio, quantity, count_word, words
)  # fmt: skip
