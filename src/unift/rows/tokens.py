"""Rows -> token ids, once. Prompts and hints are slices of one tokenisation; nothing is decoded and encoded again.

The boundary rule. A text prompt's trailing spaces move to the front of the solution, because BPE vocabularies put a
space at the start of the next word: "<think> " + "19 + 35" is tokenised as "<think>" + " 19 + 35". The prompt then has
the same tokens in training, evaluation and serving. Prompt and solution are tokenised together; where the joint
tokens do not begin with the prompt's own, the boundary is forced (both sides apart) and counted.
A step's cut lies after the last token that ends within the step, so a hint never holds a part of the next step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from unift.types import DataError, Row

Prompt = str | tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class Encoded:
    """Token ids of a row. ``step_ends[j]``: tokens of the solution that lie within the first j steps."""

    prompt: list[int]
    solution: list[int]  # steps + ending + EOS
    step_ends: list[int]  # n_steps + 1 entries, first 0
    forced: bool = False
    instructed: list[int] | None = None  # prompt with the run's instruction for first steps (sample.instruction)

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


def prompt_text(tokenizer: Any, row: Row) -> tuple[str, str]:
    """(prompt without trailing spaces, those spaces). Chat messages go through the tokenizer's own template."""
    if isinstance(row.prompt, str):
        stripped = row.prompt.rstrip(" ")
        return stripped, row.prompt[len(stripped) :]
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"row {row.id}: the prompt is a list of chat messages, but the tokenizer has no chat template. "
            "Use text prompts, or a tokenizer with a template"
        )
    text = tokenizer.apply_chat_template([dict(m) for m in row.prompt], tokenize=False, add_generation_prompt=True)
    return text, ""


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


def encode_row(tokenizer: Any, row: Row, max_tokens: int, number: int | None = None) -> Encoded:
    """Tokenise prompt + solution together. Raises DataError when it does not fit ``max_tokens`` (nothing is cut)."""
    where = f"row {number} (id {row.id})" if number is not None else f"row {row.id}"
    prompt, spaces = prompt_text(tokenizer, row)
    special = isinstance(row.prompt, str)  # a chat template brings its own BOS
    alone = tokenizer(prompt, add_special_tokens=special, return_offsets_mapping=True)
    own = alone["input_ids"]
    if own and own[-1] == tokenizer.eos_token_id and alone["offset_mapping"][-1] == (0, 0):
        own = own[:-1]  # some tokenizers append EOS to every text; one that the text itself holds stays
    if not own:
        raise DataError(f"{where}: the prompt is empty after tokenisation")
    text = spaces + row.solution
    joint = tokenizer(prompt + text, add_special_tokens=special, return_offsets_mapping=True)
    ids, offsets, origin = joint["input_ids"], joint["offset_mapping"], len(prompt)
    if len(ids) > len(own) and ids[-1] == tokenizer.eos_token_id:
        ids, offsets = ids[:-1], offsets[:-1]
    forced = ids[: len(own)] != own
    if forced:
        alone = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        solution, ends, origin = alone["input_ids"], [e for _, e in alone["offset_mapping"]], 0
    else:
        solution, ends = ids[len(own) :], [e for _, e in offsets[len(own) :]]
    step_ends, at, chars = [0], 0, origin + len(spaces)
    for step in row.steps:
        chars += len(step)
        while at < len(ends) and ends[at] <= chars:
            at += 1
        step_ends.append(at)
    solution = [*solution, tokenizer.eos_token_id]
    if len(own) + len(solution) > max_tokens:
        raise DataError(
            f"{where}: prompt and solution take {len(own)} + {len(solution)} tokens, data.max_prompt is {max_tokens}. "
            "unift never cuts a prompt or a hint: raise data.max_prompt, or drop the row"
        )
    return Encoded(own, solution, step_ends, forced)


def encode_rows(tokenizer: Any, rows: Sequence[Row], max_tokens: int, instruction: str | None = None) -> list[Encoded]:
    """``instruction``: text that a second version of every prompt has at its end, or in chat, of its last user message."""
    check_tokenizer(tokenizer)
    encoded = [encode_row(tokenizer, row, max_tokens, number) for number, row in enumerate(rows, start=1)]
    if instruction is None:
        return encoded
    bare = [replace(row, prompt=_with(row.prompt, instruction), steps=(), ending="") for row in rows]
    asked = [encode_row(tokenizer, row, max_tokens, number).prompt for number, row in enumerate(bare, start=1)]
    return [replace(e, instructed=prompt) for e, prompt in zip(encoded, asked, strict=True)]


def _with(prompt: Prompt, instruction: str) -> Prompt:
    if isinstance(prompt, str):
        return prompt + instruction
    last = max((i for i, m in enumerate(prompt) if m.get("role") == "user"), default=len(prompt) - 1)
    return tuple({**m, "content": m["content"] + instruction} if i == last else m for i, m in enumerate(prompt))
