"""What machine and model allow, before weights are read: threads, positions. From config.json beside the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from unift.config import needs
from unift.config.sections import Config
from unift.config.stages import evaluation_tokens, stages
from unift.model.folder import locate, model_settings
from unift.rows.crew import cores
from unift.rows.dataset import Data, Encodings
from unift.rows.tokens import Encoded
from unift.types import ConfigError, DataError

BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}  # of a number
ROWS = 256  # completions that this process decodes side by side
THREADS = 8  # times the cores (and at least 256): beyond it the system may refuse, and then ends the process


def use_threads(wanted: int | None) -> None:
    """Set torch's threads. ConfigError for a number that no machine of this size starts."""
    import torch

    if wanted is None:
        return
    most = max(256, THREADS * cores())
    if wanted > most:
        raise ConfigError(
            f"threads={wanted}: this machine has {cores()} cores and takes at most {most} threads. Set threads={cores()}"
        )
    torch.set_num_threads(wanted)


# ---------------------------------------------------------------------------------------------- config.json


def positions(settings: Mapping[str, Any]) -> int | None:
    """Tokens that a sequence may have; None where the model does not say."""
    found = settings.get("max_position_embeddings")
    return found if isinstance(found, int) else None


def text_settings(path: str) -> dict[str, Any]:
    """config.json of ``model.path``, with what it says of the text trunk of a model that takes pictures at the top; empty where
    there is none."""
    found = model_settings(locate(path))
    text = found.get("text_config")
    return {**found, **text} if isinstance(text, dict) else found


def packs() -> bool:
    """Are weights laid out anew for decoding on this machine's CPU?"""
    from unift.model import matmul

    return matmul.expected() == "oneDNN"


# ---------------------------------------------------------------------------------------------- lengths


def _context(config: Config, train: bool) -> Callable[[Encoded], tuple[int, int, int]]:
    """Of a row of the split: tokens of its prompt, of its longest hint, of a completion, as a run forwards it."""
    found = [stage.rules for stage in stages(config)]
    hinted = train and any(needs.hints(s) for s in found)
    sampled = max([s.sample.max_tokens for s in found if s.sample.completions], default=0)
    most = sampled if train else evaluation_tokens(config)
    return lambda e: (max(len(e.prompt), len(e.instructed or [])), e.step_ends[-1] if hinted else 0, most)


def longest_contexts(config: Config, data: Data) -> list[tuple[str, int, int, int, int]]:
    """(split, row from 1, tokens of its prompt, of its longest hint, of a completion) of every row that is looked at before
    a run starts (`Split.looked_at`)."""
    splits = (("data.train", data.train, _context(config, True)), ("data.test", data.test, _context(config, False)))
    return [(name, i + 1, *context(split.encoded[i])) for name, split, context in splits for i in split.looked_at]


def longest_context(config: Config, data: Data) -> int:
    """Tokens of the longest prompt with its hint and completion that a run samples."""
    return max((sum(parts) for _, _, *parts in longest_contexts(config, data)), default=0)


def check_positions(config: Config, data: Data) -> None:
    """DataError where prompt, hint and completion can take more tokens than the model has positions (its config.json;
    a GGUF file has none). Beyond them a model with learned positions fails, and one with rotary ones turns to noise.

    Rows on disk that are not looked at now are checked at their first use.
    """
    most = positions(text_settings(config.model.path))
    if most is None:
        return
    for name, number, prompt, hint, completion in longest_contexts(config, data):
        _check_context(f"{name}, row {number}", prompt, hint, completion, most)
    for name, split, context in (
        ("data.train", data.train, _context(config, True)),
        ("data.test", data.test, _context(config, False)),
    ):
        if isinstance(split.encoded, Encodings):
            split.encoded.checks.append(
                lambda i, e, name=name, context=context: _check_context(f"{name}, row {i + 1}", *context(e), most)
            )


def _check_context(where: str, prompt: int, hint: int, completion: int, most: int) -> None:
    if prompt + hint + completion > most:
        raise DataError(
            f"{where}: the prompt ({prompt} tokens), its longest hint ({hint}) and a completion "
            f"({completion}) take more than the {most} positions of the model. Lower sample.max_tokens to "
            f"{max(most - prompt - hint, 0)} or less, or drop the row"
        )
