"""Taking a text apart: delimiters and boxes around it, words before it, and its pieces outside all brackets."""

from __future__ import annotations

import re

from unift.rows.tasks.kinds import Unreadable
from unift.rows.tasks.spelling import CHANGING

MAX_ITEMS = 64  # of a list, a set or a matrix
SEPARATOR = r"\s*(?:,|;;|;)\s*(?:(?:and|or|&)\b)?\s*|\s+(?:and|or)\s+|\s+&\s+|\s*\\(?:text\{or\}|text\{and\})\s*"
NAME = re.compile(r"\\?[A-Za-z]+(?:_(?:\w|\{[\w\s,]{1,12}\}))?'*(?:\s*\(\s*\\?[A-Za-z]+(?:\s*,\s*\\?[A-Za-z]+)*\s*\))?")


def one_formula(text: str) -> str:
    """Without the delimiters of formulas and without the box; Unreadable for more than one box."""
    for mark in ("\\(", "\\)", "\\[", "\\]"):
        text = text.replace(mark, "$" if text.count("\\(") or text.count("\\[") or "$" in text else " ")
    boxes = re.findall(r"\\(?:boxed|fbox)(?![A-Za-z])", text)
    if len(boxes) > 1:
        raise Unreadable("more than one boxed formula")
    if boxes:
        start = re.search(r"\\(?:boxed|fbox)\s*", text)
        end = closing(text, start.end()) if start and text[start.end() : start.end() + 1] == "{" else -1  # type: ignore[union-attr]
        if start is None or end < 0:
            raise Unreadable("a box that does not close")
        text = f"{text[: start.start()]} {text[start.end() + 1 : end]} {text[end + 1 :]}"
    text = text.replace("$$", " ")
    if text.count("$") - text.count("\\$") >= 2 and (text.count("$") - text.count("\\$")) % 2 == 0:
        text = re.sub(r"(?<!\\)\$", " ", text)
    return " ".join(text.split())


def closing(text: str, start: int) -> int:
    """Place of the bracket that closes the one at ``start`` (brackets of all kinds count alike), or -1."""
    depth = 0
    for i in range(start, len(text)):
        if text[i] in "([{":
            depth += 1
        elif text[i] in ")]}":
            depth -= 1
            if depth == 0:
                return i
    return -1


def split(text: str, pattern: str) -> list[str] | None:
    """The pieces between matches of a pattern that lie outside all brackets and environments; None without a match."""
    pieces, _ = split_at(text, pattern)
    return pieces if len(pieces) > 1 else None


def split_at(text: str, pattern: str) -> tuple[list[str], list[str]]:
    """The pieces, and the matches between them."""
    outside, depth = bytearray(len(text) + 1), 0
    for i, char in enumerate(text):
        depth -= char in ")]}"
        outside[i] = depth == 0
        depth += char in "([{"
    pieces: list[str] = []
    found: list[str] = []
    start = 0
    for match in re.finditer(pattern, text):
        first, end = match.span()
        if all(outside[first:end]) and text.count("\\begin", 0, first) == text.count("\\end", 0, first):
            pieces.append(text[start:first].strip())
            found.append(match.group().strip())
            start = end
            if len(pieces) > MAX_ITEMS:
                raise Unreadable(f"more than {MAX_ITEMS} parts")
    return [*pieces, text[start:].strip()], found


_INTRODUCTION = set(
    "the final answer answers result value values solution solutions total correct required desired minimum maximum "
    "smallest largest probability number sum product difference area volume perimeter length distance cost price profit "
    "amount option choice there it he she they we so thus hence therefore then my our of for this that equation range "
    "domain interval set point points is are was equals has have had get gets got makes needs pays earns takes costs "
    "sold ways in ans be will so, remainder average mean median angle measure radius speed age height width".split()
)


_VERBS = {"is", "are", "was", "equals", "has", "have", "be"}
MAX_INTRODUCTION = 12  # words


def without_introduction(text: str) -> str:
    """Without words such as "The answer is" or "Answer:" in front: none of them changes what follows."""
    text = re.sub(r"^a total of\s+", "", text, flags=re.IGNORECASE)
    words = text.split(" ")
    count = 0
    while count < len(words) - 1 and words[count].strip(",:").lower() in _INTRODUCTION:
        count += 1
        if words[count - 1].endswith(":"):
            break
    if (
        words[0].lower() in _INTRODUCTION
    ):  # "The number of people is": up to the verb, no word of which changes a number
        for k, word in enumerate(words[: min(len(words) - 1, MAX_INTRODUCTION)]):
            known = word.lower() in _INTRODUCTION
            if not known and (word.lower() in CHANGING or not re.fullmatch(r"[A-Za-z']+", word)):
                break
            if word.lower() in _VERBS:
                count = max(count, k + 1)
    return " ".join(words[count:]).removeprefix(":").strip()
