"""Where the answer stands in a completion: one rule for all tasks, chosen by ``reward.answer``.

Only the completion is searched, never the prompt or the hint, so nothing that was shown can earn a reward.

    tags         the text between ``<answer>`` and the first ``</answer>`` after it. The last such pair counts; of nested
                 openings the innermost counts; tags are case-sensitive; text after the pair is ignored.
    boxed        the content of the last ``\\boxed{...}`` (or ``\\fbox{...}``) whose braces close
    hash         the rest of the line after the last ``####`` (the convention of GSM8K)
    last_number  the last number of the text, with a sign, a fraction or a percent sign where it has one
    auto         the rule that the rows' own solutions use, see `tasks.format`

The content may span lines (of tags and boxes) and is stripped; an empty one is no answer.

The two rules of the official UFT code (``rule="paper"``) are kept for comparison only. Like ours they
are applied to the completion alone; the official code also reads the hint, whose text never holds a tag in its data.
"""

from __future__ import annotations

import re

from unift.types import ConfigError

OPEN, CLOSE = "<answer>", "</answer>"
PLACES = ("tags", "hash", "boxed", "last_number")  # in the order in which "auto" prefers them
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)  # a backslash takes the sign after it
_SPAN = 2_000  # characters of a number's surroundings that are searched at a time
_NUMBER = re.compile(
    r"(?<![\w.,])[-+−]?\s?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s?/\s?\d+)?(?:[eE][-+]?\d+)?(?:\s?\\?%)?"
    r"|(?<![\w.,])[-+−]?\.\d+"
)


def extract_answer(completion: str, place: str = "tags") -> str | None:
    """The answer in this completion, stripped, or None. Linear in the length of the text. Raises ConfigError."""
    if place not in _FINDERS:
        hint = (
            "decide it once for the run with answer_rule"
            if place == "auto"
            else f"expected {', '.join(PLACES)} or auto"
        )
        raise ConfigError(f"reward.answer={place!r} names no place of an answer; {hint}.")
    return _FINDERS[place](completion) or None


def paper_last_line(text: str) -> str | None:
    """Official rule for Countdown and MATH: the last pair within the last line only. An empty answer is ``""``."""
    return _last_match(text.rsplit("\n", 1)[-1])


def paper_full_text(text: str) -> str | None:
    """Official rule for Knights and Knaves: the last pair anywhere. An empty answer is ``""``."""
    return _last_match(text)


_WRAPPERS = (("**", "**"), ("```", "```"), ("`", "`"), ("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))


def unwrapped(text: str) -> str:
    """Without the markup that may surround a whole answer: bold, backticks, dollar signs, LaTeX delimiters, one box."""
    text = text.strip()
    for _ in range(4):
        before = text
        for start, end in (*_WRAPPERS, ("*", "*")):
            inner = text[len(start) : -len(end)]
            if text.startswith(start) and text.endswith(end) and len(text) > len(start + end) and start not in inner:
                text = inner.strip()
                break
        inner = text[len("\\boxed{") : -1]
        if text.startswith("\\boxed{") and text.endswith("}") and balanced(inner):
            text = inner.strip()
        if text == before:
            break
    return text


def balanced(text: str) -> bool:
    """Whether the braces of a text close one another."""
    depth = 0
    for char in text:
        depth += (char == "{") - (char == "}")
        if depth < 0:
            return False
    return depth == 0


def _last_pair(text: str) -> str | None:
    """Content of the last opening tag that is ever closed, stripped."""
    last_close = text.rfind(CLOSE)
    start = text.rfind(OPEN, 0, max(last_close, 0))
    if start < 0:
        return None
    start += len(OPEN)
    return text[start : text.find(CLOSE, start)].strip()


def _last_box(text: str) -> str | None:
    """Content of the last box whose brace closes."""
    closes: dict[int, int] = {}
    opened: list[int] = []
    for match in _BRACES.finditer(text):
        sign = match.group()
        if sign == "{":
            opened.append(match.start())
        elif sign == "}" and opened:
            closes[opened.pop()] = match.start()
    starts = [match.end() - 1 for match in _BOX.finditer(text) if match.end() - 1 in closes]
    return text[starts[-1] + 1 : closes[starts[-1]]].strip() if starts else None


def _after_hash(text: str) -> str | None:
    start = text.rfind("####")
    return None if start < 0 else text[start + 4 :].lstrip("#").split("\n", 1)[0].strip()


def _last_number(text: str) -> str | None:
    """The last number; the text is searched from its end in pieces, so a long one costs no more than its length."""
    end = len(text)
    while end > 0:
        start = max(0, end - _SPAN)
        while start > 0 and (text[start - 1].isalnum() or text[start - 1] in ".,/%$-+ "):
            start -= 1
            if end - start > 2 * _SPAN:
                break
        found = None
        for match in _NUMBER.finditer(text, start, end):
            found = match.group()
        if found is not None:
            return found.strip()
        end = start
    return None


def _last_match(text: str) -> str | None:
    """Last non-overlapping lazy match read from the left, stripped: an outer opening tag wins over a nested one."""
    content, start = None, text.find(OPEN)
    while start >= 0:
        start += len(OPEN)
        end = text.find(CLOSE, start)
        if end < 0:
            break
        content = text[start:end].strip()
        start = text.find(OPEN, end + len(CLOSE))
    return content


_FINDERS = {"tags": _last_pair, "boxed": _last_box, "hash": _after_hash, "last_number": _last_number}
