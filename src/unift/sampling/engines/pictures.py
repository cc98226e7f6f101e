"""Pictures on their way to a vLLM server, which makes tensors of them by the processor beside the model that it serves.

It takes a prompt with one placeholder a picture and makes as many of each as its tower computes numbers for. unift has done the
same by its own processor when the row was read; the two prompts must be the same, token for token, or the trainer would weigh
completions of a prompt that nobody has seen.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from unift.rows.pictures import as_url
from unift.types import EngineError, Shown

REFUSED = ". Does vLLM serve this model with that many pictures in one prompt? See docs/pictures.md, A vLLM server"


def asked(prompt: Sequence[int], shown: Shown) -> dict[str, Any]:
    """The part of a call that holds prompt and pictures. What follows the row's own prompt, a hint, are tokens as they are."""
    return {
        "token_ids": [*shown.unexpanded, *prompt[shown.prompt :]],
        "content_parts": [{"type": "image_url", "url": as_url(found)} for found in shown.pictures],
        "return_token_ids": True,
    }


def check(url: str, seen: Any, prompt: Sequence[int], placeholders: Collection[int]) -> None:
    """EngineError unless the prompt that the server completed is the trainer's."""
    if seen is None:
        raise EngineError(
            f"{url} does not say which prompt it completed (prompt_token_ids), so it may have left the pictures out. vLLM 0.32 "
            "and later are known"
        )
    theirs = [int(token) for token in seen]
    if theirs == list(prompt):
        return
    at = next(
        (i for i, (a, b) in enumerate(zip(theirs, prompt, strict=False)) if a != b), min(len(theirs), len(prompt))
    )
    counts = [sum(token in placeholders for token in found) for found in (theirs, prompt)]
    raise EngineError(
        f"{url} completed a prompt of {len(theirs)} tokens, {counts[0]} of them places of pictures; here it has {len(prompt)}, "
        f"{counts[1]} of them of pictures (the first difference is at token {at}). Its processor makes something else of a "
        "picture: serve the folder that unift serve makes of this run's model, with a near version of transformers and no "
        "--mm-processor-kwargs"
    )
