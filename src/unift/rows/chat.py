"""Chat templates: a row's prompt as text, and how a turn of the assistant begins and ends.

The template that comes with the tokenizer is the only source: it says what opens the assistant's turn, what closes it, and
whether a BOS stands in front. A solution ends with what closes the turn, so that the model learns to stop where the
conversation goes on; without a template, or outside of a chat, that is the tokenizer's EOS.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from unift.types import DataError, Row

MARK = "unift0mark"  # stands for the assistant's text while a template is read; no template changes or trims it
TAG = re.compile(r"<[A-Za-z_]+>")  # an opening tag such as <think>
TAGS_AT_END = re.compile(r"\s*(</?[A-Za-z_]+>\s*)+$")


@dataclass(frozen=True)
class Turn:
    """Of the assistant. ``opening``: what a template writes before it; ``end``: token ids that close it."""

    opening: str
    end: tuple[int, ...]


def has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def _render(tokenizer: Any, messages: Sequence[Mapping[str, str]], **how: bool) -> str:
    return tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, **how)


def turn(tokenizer: Any) -> Turn:
    """How the template opens and closes the assistant's turn; without a template: not at all, and the EOS."""
    if not has_template(tokenizer):
        return Turn("", (tokenizer.eos_token_id,))
    return _turn(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=8)
def _turn(tokenizer: Any, template: str) -> Turn:
    """Read off a short conversation. ``template`` is a part of the key: a tokenizer may get another one."""
    question, eos = {"role": "user", "content": MARK}, (tokenizer.eos_token_id,)
    try:
        asked = _render(tokenizer, [question], add_generation_prompt=False)
        opened = _render(tokenizer, [question], add_generation_prompt=True)
        answered = _render(tokenizer, [question, {"role": "assistant", "content": MARK}], add_generation_prompt=False)
    except Exception:  # a template that wants other messages: the rows' own will say so
        return Turn("", eos)
    opening = opened[len(asked) :] if opened.startswith(asked) else ""
    closing = answered.rpartition(MARK)[2]
    ids = tokenizer(closing, add_special_tokens=False)["input_ids"]
    marks = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    first = next((i for i, token in enumerate(ids) if token in marks), None)
    return Turn(opening, eos if first is None else tuple(ids[: first + 1]))


def end_ids(tokenizer: Any) -> set[int]:
    """Tokens after which nothing follows: the tokenizer's EOS and what closes a turn of its template."""
    return {tokenizer.eos_token_id, turn(tokenizer).end[-1]}


# ---------------------------------------------------------------------------------------------- prompts


def prompt_text(tokenizer: Any, row: Row, where: str) -> tuple[str, str]:
    """(prompt without trailing spaces, what the solution begins with instead). Chat messages go through the template; a
    last message of the assistant is continued. Raises DataError with the template's own words."""
    if isinstance(row.prompt, str):
        text, lost = row.prompt, ""
    else:
        text, lost = _chat(tokenizer, row.prompt, where)
    stripped = text.rstrip(" ")
    return stripped, text[len(stripped) :] + lost


def _chat(tokenizer: Any, messages: Sequence[Mapping[str, str]], where: str) -> tuple[str, str]:
    """(rendered messages, white space at the end of a continued message that the template trims)."""
    if not has_template(tokenizer):
        raise DataError(
            f"{where}: the prompt is a list of chat messages, but the tokenizer has no chat template. "
            "Use text prompts, or a tokenizer with a template"
        )
    last = messages[-1].get("content", "")
    continued = messages[-1].get("role") == "assistant"
    if continued and not last.strip():  # an assistant's message without text: its turn has only been opened
        messages, continued = messages[:-1], False
    try:
        text = _render(tokenizer, messages, continue_final_message=continued, add_generation_prompt=not continued)
    except Exception as error:  # jinja2's errors, and whatever a template's expressions raise
        roles = ", ".join(str(m.get("role")) for m in messages)
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(
            f"{where}: the tokenizer's chat template refuses these messages ({roles}): {reason}. Change the messages (a "
            "system text can stand at the start of the first user message), or use a tokenizer with another template"
        ) from None
    tail = last[len(last.rstrip()) :] if continued else ""
    return text, "" if text.endswith(tail) else tail


def is_open(tokenizer: Any, row: Row, prompt: str) -> bool:
    """Does the prompt end within a turn of the assistant? True for messages, and for a text that was rendered before."""
    if not isinstance(row.prompt, str):
        return True
    how = turn(tokenizer)
    opening = how.opening.strip()
    opening = (
        TAGS_AT_END.sub("", opening) or opening
    )  # a text may have been rendered without the <think> of the template
    closed = prompt.rfind(tokenizer.convert_ids_to_tokens(how.end[-1]))
    return bool(opening) and prompt.rfind(opening) > closed


def doubled_tag(prompt: str, solution: str) -> str:
    """The opening tag (``<think>``) that stands at the end of the prompt and again at the start of the solution."""
    begins = TAG.match(solution.lstrip())
    return begins.group() if begins and prompt.rstrip().endswith(begins.group()) else ""
