"""The official UFT rules for MATH and its kin (``reward.rule=paper``), for comparison with the paper alone.

GSM8K, AIME and AMC compare numbers (within 1e-5, as Python reads them); every other source compares text after a fixed
sequence of edits, the one of the MATH benchmark's first public grader. Both look at the last tag of the last line.
"""

from __future__ import annotations

from unift.rows.tasks.base import is_mapping
from unift.types import Row

NUMERIC = ("openai/gsm8k", "aime", "amc")  # data_source
TOLERANCE = 1e-5


def paper_equal(answer: str, target: str, row: Row) -> bool:
    """The official verdict on an answer (already taken from its tag). Never raises."""
    source = row.extra.get("data_source") if is_mapping(row.extra) else None
    if source in NUMERIC:
        try:
            return abs(float(answer) - float(target)) < TOLERANCE
        except ValueError:
            return False
    try:
        return edited(answer) == edited(target)
    except (ValueError, IndexError):  # an edit that does not apply: the texts as they are
        return answer == target


def edited(text: str) -> str:
    """A text after the official edits, in their order. ValueError or IndexError where one of them has no rule."""
    for old, new in (("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac")):
        text = text.replace(old, new)
    for unwanted in ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$"):
        text = text.replace(unwanted, "")
    if text.count("\\text{ ") > 1:
        raise ValueError("two units")
    text = text.partition("\\text{ ")[0].replace("\\%", "")
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    if text.startswith("."):
        text = "0" + text
    if text.count("=") == 1 and len(text.partition("=")[0]) <= 2:
        text = text.partition("=")[2]
    text = _fractions(_roots(text).replace(" ", ""))
    if text == "0.5":
        text = "\\frac{1}{2}"
    if text.count("/") != 1:
        return text
    above, below = (int(part) for part in text.split("/"))
    return f"\\frac{{{above}}}{{{below}}}" if text == f"{above}/{below}" else text


def _roots(text: str) -> str:
    """Braces around the one character after a root sign without any."""
    first, *rest = text.split("\\sqrt")
    return first + "".join("\\sqrt" + (part if part[0] == "{" else f"{{{part[0]}}}{part[1:]}") for part in rest)


def _fractions(text: str) -> str:
    """Braces around the two characters after a fraction sign without any; all as it was if one has a single character."""
    first, *rest = text.split("\\frac")
    done = first
    for part in rest:
        if part[0] == "{":
            done += "\\frac" + part
        elif len(part) < 2:
            return text
        else:
            below = part[1:] if part[1] == "{" else f"{{{part[1]}}}{part[2:]}"
            done += f"\\frac{{{part[0]}}}{below}"
    return done
