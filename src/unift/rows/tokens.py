"""Rows -> token ids, once. Prompts and hints are slices of one tokenisation; nothing is decoded and encoded again.

The boundary rule. A text prompt's trailing spaces move to the front of the solution, because BPE vocabularies put a
space at the start of the next word: "<think> " + "19 + 35" is tokenised as "<think>" + " 19 + 35". The prompt then has
the same tokens in training, evaluation and serving. Prompt and solution are tokenised together; where the joint
tokens do not begin with the prompt's own, the boundary is forced (both sides apart) and counted.
A step's cut lies after the last token that ends within the step, so a hint never holds a part of the next step.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from unift.rows import chat, processor
from unift.types import ConfigError, DataError, Row, Shown

Prompt = str | tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class Encoded:
    """Token ids of a row. ``step_ends[j]``: tokens of the solution that lie within the first j steps."""

    prompt: list[int]
    solution: list[int]  # steps + ending + what closes the turn (EOS outside of a chat)
    step_ends: list[int]  # n_steps + 1 entries, first 0
    forced: bool = False
    doubled: str = ""  # opening tag that prompt and solution both had; the solution's is left out
    instructed: list[int] | None = None  # prompt with the run's instruction for first steps (sample.instruction)
    shown: Shown | None = None  # the pictures whose placeholders the prompt has

    @property
    def n_steps(self) -> int:
        return len(self.step_ends) - 1

    def hint(self, cuts_shown: int, cuts: int) -> list[int]:
        """The first sep[k] steps as token ids (see `separators`)."""
        return self.solution[: self.step_ends[separators(self.n_steps, cuts)[cuts_shown]]]

    @property
    def steps_tokens(self) -> int:
        """Tokens of all steps: the longest hint."""
        return self.step_ends[-1]


def check_tokenizer(tokenizer: Any) -> None:
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no EOS token: a completion could never end. Set tokenizer.eos_token")
    if tokenizer.pad_token_id is None:
        raise DataError("the tokenizer has no pad token. Set tokenizer.pad_token (its EOS token will do)")
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            "this tokenizer cannot report character offsets (it is not a fast tokenizer), and hints are cut by them"
        )


def separators(n_steps: int, cuts: int) -> list[int]:
    """sep[k] = round(k * S / num), num = min(cuts, S): a hint of k cuts is the first sep[k] of the S steps.

    Python's banker's rounding, as the official code (UFT section B): S=9, cuts=5 -> [0, 2, 4, 5, 7, 9].
    """
    if n_steps < 1:
        return [0]
    num = min(cuts, n_steps)
    return [round(k * n_steps / num) for k in range(num)] + [n_steps]


def token_ids(tokenizer: Any) -> list[int]:
    """Ids that stand for a token, ascending; an embedding may have more rows (padding to a round number)."""
    return sorted(set(tokenizer.get_vocab().values()))


def check_rows(tokenizer: Any, rows: int) -> None:
    """ConfigError where the tokenizer has ids beyond the ``rows`` of the model's embedding."""
    last = max(token_ids(tokenizer), default=0)
    if last >= rows:
        raise ConfigError(
            f"the tokenizer has tokens up to id {last} ({tokenizer.convert_ids_to_tokens(last)!r}), the model's embedding has "
            f"{rows} rows. Extend the model (resize_token_embeddings({last + 1}), then save_pretrained), or take the extra "
            "tokens out of the tokenizer"
        )


def encode_row(tokenizer: Any, row: Row, max_tokens: int, number: int | None = None, source: str = "") -> Encoded:
    """Tokenise prompt + solution together. Raises DataError when it does not fit ``max_tokens`` (nothing is cut), or holds
    what the tokenizer has no tokens for. source: the file, for messages."""
    where = f"row {number} (id {row.id})" if number is not None else f"row {row.id}"
    where = f"{source}, {where}" if source else where
    unexpanded, spaces = chat.prompt_text(tokenizer, row, where)
    reader = processor.reader_of(tokenizer)
    prompt = unexpanded if reader is None else reader.expand(unexpanded, row.images, where)
    doubled = chat.doubled_tag(prompt, row.solution)
    if doubled:
        row = _without_tag(row, doubled, prompt + spaces)
    text, special = spaces + row.solution, isinstance(row.prompt, str)
    own = _prompt_tokens(tokenizer, prompt, special, where)
    if not own:
        raise DataError(f"{where}: the prompt is empty after tokenisation")
    ids, offsets = _tokens(tokenizer, prompt + text, special, where)
    origin = len(prompt)
    if len(ids) > len(own) and ids[-1] == tokenizer.eos_token_id:
        ids, offsets = ids[:-1], offsets[:-1]
    forced = ids[: len(own)] != own
    if forced:
        ids, offsets = _tokens(tokenizer, text, False, where)
        solution, ends, origin = ids, [e for _, e in offsets], 0
    else:
        solution, ends = ids[len(own) :], [e for _, e in offsets[len(own) :]]
    step_ends, at, chars = [0], 0, origin + len(spaces)
    for step in row.steps:
        chars += len(step)
        while at < len(ends) and ends[at] <= chars:
            at += 1
        step_ends.append(at)
    end = chat.turn(tokenizer).end if chat.is_open(tokenizer, row, prompt) else (tokenizer.eos_token_id,)
    if solution[-1:] != [end[-1]]:  # a solution may bring the end of its turn along
        solution = [*solution, *end]
    if len(own) + len(solution) > max_tokens:
        raise DataError(
            f"{where}: prompt and solution take {len(own)} + {len(solution)} tokens, data.max_prompt is {max_tokens}. "
            "unift never cuts a prompt or a hint: raise data.max_prompt, or drop the row"
        )
    if reader is not None and not reader.placeholders.isdisjoint(solution):
        raise DataError(f"{where}: the solution holds a placeholder of a picture ({reader.token}); expected text alone")
    shown = None
    if row.images:
        shown = Shown(row.images, len(own), tuple(_prompt_tokens(tokenizer, unexpanded, special, where)))
    return Encoded(own, solution, step_ends, forced, doubled, shown=shown)


def _prompt_tokens(tokenizer: Any, text: str, special: bool, where: str) -> list[int]:
    """Some tokenizers append EOS to every text: not to a prompt. One that the text itself holds stays."""
    ids, offsets = _tokens(tokenizer, text, special, where)
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id and offsets[-1] == (0, 0) else ids


def _without_tag(row: Row, tag: str, prompt: str) -> Row:
    """The row without the tag at the start of its solution, and without the white space behind it that the prompt has too."""
    after = row.solution.index(tag) + len(tag)
    drop = after + len(os.path.commonprefix([prompt[prompt.rindex(tag) + len(tag) :], row.solution[after:]]))
    steps: list[str] = []
    for step in row.steps:
        steps.append(step[drop:])
        drop = max(drop - len(step), 0)
    return replace(row, steps=tuple(steps), ending=row.ending[drop:])


def _tokens(tokenizer: Any, text: str, special: bool, where: str) -> tuple[list[int], list[tuple[int, int]]]:
    """(ids, their characters) of a text. special: with the tokens that the tokenizer puts in front of every text, once; a chat
    template brings its own, and so does a text that was rendered before."""
    try:
        found = tokenizer(
            text, add_special_tokens=special, return_offsets_mapping=True, return_special_tokens_mask=True
        )
    except Exception as error:  # the library raises a bare Exception
        raise DataError(
            f"{where}: the tokenizer cannot read the text ({error}). Mend the row or the tokenizer"
        ) from None
    ids, offsets = found["input_ids"], found["offset_mapping"]
    added = next((i for i, mask in enumerate(found["special_tokens_mask"]) if not mask), 0)
    if added and ids[:added] == ids[added : 2 * added]:
        ids, offsets = ids[added:], offsets[added:]
    lost = _lost(tokenizer, text, ids, offsets)
    if lost:
        named = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in dict.fromkeys(lost))
        raise DataError(
            f"{where}: the tokenizer has no token for {named}. Replace it in the row, or use a model whose tokenizer has it"
        )
    return ids, offsets


def _lost(tokenizer: Any, text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> str:
    """Up to three characters that become the unknown token, or no token at all."""
    lost, end, whole = "", 0, True
    unknown, name = tokenizer.unk_token_id, tokenizer.unk_token  # looked up once: each takes longer than a token
    if unknown in ids:
        for token, (a, b) in zip(ids, offsets, strict=True):
            if token == unknown and a < b and text[a:b].strip() != name:
                lost += text[a:b].strip()
    for a, b in offsets:
        if a > end and text[end:a].strip():
            whole = False
        if b > end:
            end = b
    if not (whole and not text[end:].strip()):  # offsets behind a character that was left out may be off: ask for each
        alone = (c for c in dict.fromkeys(text) if unicodedata.category(c)[0] not in "CMZ")
        lost += "".join(c for c in alone if not tokenizer(c, add_special_tokens=False)["input_ids"])
    return lost[:3]


def encode_rows(
    tokenizer: Any, rows: Sequence[Row], max_tokens: int, instruction: str | None = None, source: str = ""
) -> list[Encoded]:
    """``source``: the file, for messages. ``instruction``: text that a second version of every prompt has at its end, or in
    chat, of its last user message."""
    check_tokenizer(tokenizer)
    return [encode_with(tokenizer, row, max_tokens, instruction, n, source) for n, row in enumerate(rows, start=1)]


def encode_with(
    tokenizer: Any, row: Row, max_tokens: int, instruction: str | None, number: int, source: str = ""
) -> Encoded:
    """`encode_row`, and the prompt with the instruction where there is one."""
    encoded = encode_row(tokenizer, row, max_tokens, number, source)
    if instruction is None:
        return encoded
    bare = replace(row, prompt=_with(row.prompt, instruction), steps=(), ending="")
    return replace(encoded, instructed=encode_row(tokenizer, bare, max_tokens, number, source).prompt)


def _with(prompt: Prompt, instruction: str) -> Prompt:
    if isinstance(prompt, str):
        return prompt + instruction
    last = max((i for i, m in enumerate(prompt) if m.get("role") == "user"), default=len(prompt) - 1)
    return tuple({**m, "content": m["content"] + instruction} if i == last else m for i, m in enumerate(prompt))
