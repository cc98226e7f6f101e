"""Where the answer stands in a completion: one rule for all tasks.

The rule (``rule="unift"``): only the completion is searched, never the prompt or the hint, so nothing that was shown can
earn a reward. An answer is the text between ``<answer>`` and the first ``</answer>`` after it. The last such pair
counts; of nested openings the innermost counts; tags are case-sensitive; text after the pair is ignored. The content
may span lines and is stripped; an empty one is no answer.

The two rules of the official UFT code (``rule="paper"``, methods.md 1.9) are kept for comparison only. Like ours they
are applied to the completion alone; the official code also reads the hint, whose text never holds a tag in its data.
"""

from __future__ import annotations

OPEN, CLOSE = "<answer>", "</answer>"


def extract_answer(completion: str) -> str | None:
    """The answer in this completion, stripped, or None. Linear in the length of the text."""
    return _last_pair(completion) or None


def paper_last_line(text: str) -> str | None:
    """Official rule for Countdown and MATH: the last pair within the last line only. An empty answer is ``""``."""
    return _last_match(text.rsplit("\n", 1)[-1])


def paper_full_text(text: str) -> str | None:
    """Official rule for Knights and Knaves: the last pair anywhere. An empty answer is ``""``."""
    return _last_match(text)


def _last_pair(text: str) -> str | None:
    """Content of the last opening tag that is ever closed, stripped."""
    last_close = text.rfind(CLOSE)
    start = text.rfind(OPEN, 0, max(last_close, 0))
    if start < 0:
        return None
    start += len(OPEN)
    return text[start : text.find(CLOSE, start)].strip()


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
