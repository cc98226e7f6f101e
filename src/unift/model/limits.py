"""What machine and model allow, before weights are read: threads, positions. From config.json beside the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from unift.config import needs
from unift.config.sections import Config
from unift.config.stages import evaluation_tokens, stages
from unift.model.folder import locate, model_settings
from unift.rows.crew import cores
from unift.rows.dataset import Data, Encodings, Split
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


# Its names in config.json: of most, of GPT-2 and its kin, of MPT.
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")


def positions(settings: Mapping[str, Any]) -> int | None:
    """Tokens that a sequence may have; None where the model does not say."""
    return next((found for name in POSITIONS if isinstance(found := settings.get(name), int)), None)


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


Lengths = tuple[int, int, int]  # tokens of a prompt, of its hint, of a completion


def _context(config: Config, train: bool) -> Callable[[int, Encoded], Lengths]:
    """Of a row of the split, by its index and tokens: the longest sequence that a stage or an evaluation samples, with the longest
    hint."""
    found = [stage.rules for stage in stages(config)] if train else []
    pairs = {(needs.hints(s), s.sample.max_tokens if needs.completions(s) else 0) for s in found}
    answer, evaluated = evaluation_tokens(config), _evaluated(config) if train else math.inf

    def context(i: int, e: Encoded) -> Lengths:
        prompt = max(len(e.prompt), len(e.instructed or []))
        sampled = [(prompt, e.step_ends[-1] if hinted else 0, most) for hinted, most in pairs]
        return max([*sampled, *([(len(e.prompt), 0, answer)] if i < evaluated else [])], key=sum)

    return context


def _evaluated(config: Config) -> float:
    """How many of the training rows, the first, are evaluated at the end."""
    return math.inf if config.eval.train_rows is None else config.eval.train_rows


def longest_context(config: Config, data: Data) -> int:
    """Tokens of the longest prompt with its hint and completion that a run samples, of rows that are looked at before it starts
    (`Split.looked_at`)."""
    splits = ((data.train, _context(config, True)), (data.test, _context(config, False)))
    found = (sum(context(i, split.encoded[i])) for split, context in splits for i in split.looked_at)
    return max(found, default=0)


def check_positions(config: Config, data: Data) -> None:
    """DataError where a sequence that is sampled (prompt, hint and completion) or trained on (a prompt with its solution or its
    rejected answer) can take more tokens than the model has positions (its config.json; a GGUF file has none). Beyond them a
    model with learned positions fails, and one with rotary ones turns to noise.

    Rows on disk that are not looked at now are checked at their first use.
    """
    most = positions(text_settings(config.model.path))
    if most is None:
        return
    whole = any(needs.demonstrations(stage.rules) for stage in stages(config))
    for name, split, train in (("data.train", data.train, True), ("data.test", data.test, False)):
        context = _context(config, train)

        def check(i: int, e: Encoded, name: str = name, split: Split = split, context: Any = context) -> None:
            where, rejected = f"{name}, row {i + 1}", split.rejected[i] if split.rejected else None
            _check_context(where, context(i, e), most)
            if whole and split is data.train:
                _check_solution(where, "solution", len(e.prompt), len(e.solution), most)
            if rejected is not None:
                _check_solution(where, "rejected answer", len(e.prompt), len(rejected), most)

        for i in split.looked_at:
            check(i, split.encoded[i])
        if isinstance(split.encoded, Encodings):
            split.encoded.checks.append(check)


def _check_context(where: str, parts: Lengths, most: int) -> None:
    prompt, hint, completion = parts
    if prompt + hint + completion > most:
        raise DataError(
            f"{where}: the prompt ({prompt} tokens), its longest hint ({hint}) and a completion "
            f"({completion}) take more than the {most} positions of the model. Lower sample.max_tokens to "
            f"{max(most - prompt - hint, 0)} or less (of evaluations eval.max_tokens, where it is set), or drop the row"
        )


def _check_solution(where: str, what: str, prompt: int, solution: int, most: int) -> None:
    if prompt + solution > most:
        raise DataError(
            f"{where}: the prompt ({prompt} tokens) and its {what} ({solution}), which are trained on, take more than the {most} "
            "positions of the model. Drop the row, or use a model with more"
        )
