"""Letter lock: a designed tree-shaped task on which plain reinforcement stalls and hints do not.

The prompt shows ``length`` letters. A solution names one of ``keys`` keys and then each letter with its code under that
key, looked up in a secret table that only the reward knows. So every problem has ``keys`` right answers, and guessing
finds one with probability 10 ** -length. The whole text is a few characters, for character-level models:

    prompt "badc>", steps "H" "b3" "a1" "d9" "c0", ending "."            (length 4: 1 + 4 steps)

There is no answer tag: the answer is hint + completion, read up to the end mark, which the completion itself must write.
So a full hint earns nothing on its own, and `score` needs the hint of a hinted sample. This is the only task that does.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache
from typing import Any

import numpy as np

from unift.rng import generator
from unift.rows.tasks.base import Task, build_row, check_rule, field_of, verdict
from unift.types import ConfigError, Row, Score

LETTERS = "abcdefghij"
KEYS = "ABCDEFGHIJ"
CODES = 10  # one digit each
END = "."


def make(seed: int, index: int, *, length: int = 4, letters: int = 10, keys: int = 10, table_seed: int = 0) -> Row:
    """Problem ``index`` of this seed: letters drawn with repetition, the reference opens it with a random key."""
    word, key, _ = _draw("lock", seed, index, length, letters, keys)
    table = code_table(table_seed)
    steps = [KEYS[key], *(f"{letter}{table[LETTERS.index(letter), key]}" for letter in word)]
    answer = {"letters": word, "keys": keys, "table_seed": table_seed}
    return build_row("lock", f"{word}>", steps, END, answer, {"index": index})


def lock_base_text(seed: int, index: int, *, length: int = 4, letters: int = 10, keys: int = 10) -> str:
    """Text for pre-training a base model: prompt and solution in the right format with RANDOM codes.

    A base trained on it knows the format and nothing of the secret table.
    """
    word, key, codes = _draw("lock-base", seed, index, length, letters, keys)
    return f"{word}>{KEYS[key]}" + "".join(f"{letter}{code}" for letter, code in zip(word, codes)) + END


@lru_cache(maxsize=64)
def code_table(table_seed: int) -> np.ndarray:
    """int array (10 letters, 10 keys) of codes 0..9. Smaller locks use its upper left corner."""
    return generator("lock-table", table_seed).integers(0, CODES, (len(LETTERS), 10))


def score(
    completion: str, row: Row, *, hint: str = "", format_score: float = 0.0, rule: str = "unift", answer: str = "tags"
) -> Score:
    """Right: hint + completion up to the completion's first end mark is a key and every letter with its code.

    ``format_score`` goes to a key and all letters in order with wrong codes. Text after the end mark is ignored.
    ``rule`` and ``answer`` change nothing here: the paper has no lock, and its answer has no mark but the end.
    """
    check_rule(rule)
    word, keys, table_seed = field_of(row, "letters"), field_of(row, "keys"), field_of(row, "table_seed")
    body, mark, _ = completion.partition(END)
    if not mark:
        return verdict(False, False, format_score, f"the completion has no end mark {END!r}", answered=False)
    text = hint + body
    key = KEYS[:keys].find(text[:1]) if text else -1
    readable = (
        len(text) == 1 + 2 * len(word)
        and key >= 0
        and text[1::2] == word
        and all(char in "0123456789" for char in text[2::2])
    )
    if not readable:
        return verdict(False, False, format_score, f"not one of {keys} keys and a code for each letter of {word!r}")
    table = code_table(table_seed)
    wrong = [c for c, code in zip(word, text[2::2]) if int(code) != table[LETTERS.index(c), key]]
    return verdict(not wrong, True, format_score, f"wrong code for {', '.join(wrong)}" if wrong else "")


def canonical(row: Row) -> Hashable:
    """(letters, table): the key of the reference does not make another problem."""
    return field_of(row, "letters"), int(field_of(row, "table_seed"))


def _draw(name: str, seed: int, index: int, length: int, letters: int, keys: int) -> tuple[str, int, list[int]]:
    """Letters, key and random codes of one address; ConfigError for sizes that do not fit."""
    sizes: list[tuple[str, Any, int]] = [("length", length, 64), ("letters", letters, len(LETTERS)), ("keys", keys, 10)]
    for option, value, most in sizes:  # a setting may be of any type
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise ConfigError(f"option {option!r} of lock: found {value!r}, expected a whole number from 1 to {most}.")
    rng = generator(name, seed, index)
    word = "".join(LETTERS[i] for i in rng.integers(0, letters, length))
    return word, int(rng.integers(keys)), rng.integers(0, CODES, length).tolist()


TASK = Task("lock", make, score, canonical, {"length": 4, "letters": 10, "keys": 10, "table_seed": 0}, marked=False)
