"""The plain data that flows through unift, and the errors it raises. No torch here.

Row -> (hints) -> Group with a prompt and a hint -> (sampling) -> its Samples -> (rewards) -> their Scores -> (credit)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

HANDED = "given"  # stands in a setting in place of the name of a thing that was handed over from Python


class UniftError(Exception):
    """A mistake a person can mend: says what was found, what was expected and what to do. The CLI prints it alone."""


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known name that a mistyped one most likely means, for messages; None where none is near."""
    names = {name.lower(): name for name in sorted(known)}
    near = difflib.get_close_matches(word.lower(), list(names), n=1, cutoff=0.5)
    return names[near[0]] if near else None


class DataError(UniftError):
    """A row or a file is not usable. Names file, row number (from 1) and column."""


class ConfigError(UniftError):
    """A setting is unknown, of the wrong type, or does not fit the others."""


class RewardError(UniftError):
    """The scorer failed too often, or cannot be loaded."""


class EngineError(UniftError):
    """The engine did not answer, or not as it should: a server is gone, hangs, or has other weights."""


class Stopped(UniftError):
    """The run was asked to stop, and was saved first. The same command continues it."""


class NonFiniteError(UniftError):
    """A loss or gradient is NaN or infinite. The batch is on disk; the message names it."""


@dataclass(frozen=True)
class Picture:
    """One picture of a row as an encoded file (PNG, JPEG, ...): by its path, or its bytes."""

    digest: str  # of the file, or of the pixels of a picture that was handed over unpacked
    path: str = ""
    data: bytes | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Shown:
    """The pictures of a prompt, and its length in tokens, placeholders included; what follows is the model's own text.

    ``unexpanded``: ids of the same prompt with one placeholder a picture, for a server that makes them as many as it needs.
    """

    pictures: tuple[Picture, ...]
    prompt: int
    unexpanded: tuple[int, ...] = ()


@dataclass(frozen=True)
class Row:
    """One problem with its worked solution.

    The full demonstration is ``prompt + "".join(steps) + ending`` (+ EOS). A hint is a prefix of ``steps``; ``ending``
    (closing tag and final answer) is never part of a hint. ``answer`` is what the verifier needs (any JSON value), None
    where the data has none.
    """

    id: str  # stable over runs: a hash of the content unless the data names one
    prompt: str | tuple[Mapping[str, str], ...]  # text, or chat messages rendered with the tokenizer's template
    steps: tuple[str, ...]
    ending: str
    answer: Any
    task: str = ""  # name of a built-in task ("countdown", ...) or the data_source of the file
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])
    images: tuple[Picture, ...] = ()  # in the order of the marks <image> in the prompt

    @property
    def solution(self) -> str:
        return "".join(self.steps) + self.ending


@dataclass(frozen=True)
class Score:
    """What a completion is worth. ``value`` trains; ``correct`` (value of the verifier, no format credit) is accuracy."""

    value: float
    correct: bool | None = None  # None: take value >= 1.0
    parts: Mapping[str, float] = field(default_factory=dict[str, float])  # e.g. {"format": 0.1, "correct": 0.0}
    note: str = ""  # why, for people

    @property
    def right(self) -> bool:
        return self.value >= 1.0 if self.correct is None else self.correct


@dataclass
class Sample:
    """One completion: token ids and their log-probs under the sampling policy, then text and score."""

    tokens: list[int]
    logps: list[float]  # of the sampled tokens: one less than tokens for each given one
    finished: bool  # ended with EOS (kept as the last token) rather than at the length limit
    text: str = ""  # decoded without special tokens, for scorers and people only
    score: Score | None = None
    error: str = ""  # "timeout", "crash", "exception: ...", "bad value: ..." when the scorer failed
    given: int = 0  # leading tokens that are a hint which this sample alone has seen; ``text`` leaves them out

    @property
    def sampled(self) -> int:
        return len(self.tokens) - self.given


@dataclass
class Group:
    """All completions of one prompt+hint. The hint is drawn once for the group."""

    row: int  # index into the dataset
    row_id: str
    prompt: list[int]  # token ids, without the hint
    hint: list[int]  # token ids, a slice of the tokenised solution
    cuts: int  # k: how many cuts of the solution are shown
    cuts_total: int  # min(L, number of steps)
    samples: list[Sample] = field(default_factory=list[Sample])
    discarded: int = 0  # tokens sampled for prompts that this one replaced (dynamic sampling)
    shown: Shown | None = None  # the prompt's pictures, until its completions are drawn
    solved: bool = True  # whether its row has a worked solution


@dataclass(frozen=True)
class Given:
    """What a Python caller hands over in place of names in the settings: rows by split ("train", "test"), and a reward."""

    rows: Mapping[str, list[Row]] = field(default_factory=dict[str, list[Row]])
    reward: Any = None
