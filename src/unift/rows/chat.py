"""Chat templates: a row's prompt as text, and how a turn of the assistant begins and ends.

The template that comes with the tokenizer is the only source: it says what opens the assistant's turn, what closes it, and
whether a BOS stands in front. A solution ends with what closes the turn, so that the model learns to stop where the
conversation goes on; without a template, or outside of a chat, that is the tokenizer's EOS.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from unift.rows import pictures, processor
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


def _render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **how: bool) -> str:
    reader = processor.reader_of(tokenizer)
    if reader is not None:
        messages = [{**m, "content": _content(tokenizer, reader, m.get("content", ""))} for m in messages]
    return tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, **how)


def _content(tokenizer: Any, reader: processor.Reader, content: Any) -> Any:
    """A text, or parts of text and pictures, in the form that the template takes."""
    if _takes_parts(tokenizer, str(tokenizer.chat_template)):
        return pictures.parts(content, marked=False) if isinstance(content, str) else content
    if isinstance(content, str):
        return content
    return "".join(part.get("text", reader.token) for part in content)


@lru_cache(maxsize=8)
def _takes_parts(tokenizer: Any, template: str) -> bool:
    """Templates of models with a vision tower read a list of parts; older ones a text with the token of a picture in it."""
    asked = [{"role": "user", "content": [{"type": "text", "text": MARK}]}]
    try:
        text = str(tokenizer.apply_chat_template(asked, tokenize=False))
    except Exception:  # whatever a template's expressions raise
        return False
    return MARK in text and "'type'" not in text and '"type"' not in text


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
    if row.images:
        row = pictures.marked(row, processor.needed(tokenizer, where).token)
    if isinstance(row.prompt, str):
        text, lost = _placed(tokenizer, row) if row.images else row.prompt, ""
    else:
        text, lost = _chat(tokenizer, row.prompt, where, bool(row.images))
    stripped = text.rstrip(" ")
    return stripped, text[len(stripped) :] + lost


def _placed(tokenizer: Any, row: Row) -> str:
    """A text prompt with what the model's template writes for a picture in place of its marks."""
    reader = processor.reader_of(tokenizer)
    token = "" if reader is None else reader.token
    return str(row.prompt).replace(pictures.MARK, _of_picture(tokenizer, token, str(tokenizer.chat_template)))


@lru_cache(maxsize=8)
def _of_picture(tokenizer: Any, token: str, template: str) -> str:
    """``<|vision_start|><|image_pad|><|vision_end|>``, say: what rendering with a picture adds; without a template its token."""
    if not has_template(tokenizer) or not _takes_parts(tokenizer, template):
        return token
    text = {"type": "text", "text": MARK}
    try:
        bare, shown = (
            _render(tokenizer, [{"role": "user", "content": c}]) for c in ([text], [{"type": "image"}, text])
        )
    except Exception:  # whatever a template's expressions raise
        return token
    start, end = os.path.commonprefix([bare, shown]), os.path.commonprefix([bare[::-1], shown[::-1]])
    added = shown[len(start) : len(shown) - len(end)].strip()
    return added if added.count(token) == 1 else token


def _chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]], where: str, shown: bool = False) -> tuple[str, str]:
    """(rendered messages, white space at the end of a continued message that the template trims). ``shown``: marks in the
    messages stand for pictures."""
    if not has_template(tokenizer):
        raise DataError(
            f"{where}: the prompt is a list of chat messages, but the tokenizer has no chat template. "
            "Use text prompts, or a tokenizer with a template"
        )
    last = messages[-1].get("content", "")
    continued = messages[-1].get("role") == "assistant"
    if continued and not last.strip():  # an assistant's message without text: its turn has only been opened
        messages, continued = messages[:-1], False
    if shown:
        messages = [{**m, "content": pictures.parts(m["content"])} for m in messages]
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
