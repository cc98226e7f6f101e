"""Jigsaw: a picture cut into tiles and shuffled; for each tile in reading order, the place where it belongs.

    prompt "<image>Which places?\\n", steps "a3" "b1" "c4" "d2", ending "."      (2 x 2: tile a belongs to place 3, lower left)

The pictures are procedural: their light side is above and their warm side left. The task has older ones beside it, for what a
model forgets while it learns the jigsaw (arXiv 2506.23508): the colour and the kind of a single shape, and which half of a
picture a tile comes from. ``form=foreign`` writes the same solution as bare digits, which a model that was trained on ``a3``
finds unlikely.

There is no answer tag: as with the lock, the answer is hint + completion up to the end mark, which the completion itself writes.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import numpy as np

from unift.rng import generator
from unift.rows.pictures import MARK
from unift.rows.tasks import scenes
from unift.rows.tasks.base import Task, check_rule, content_id, field_of, is_list, nearest, verdict
from unift.types import ConfigError, DataError, Row, Score

KINDS = {"jigsaw": "places", "colour": "colour", "shape": "shape", "half": "half"}  # what the prompt asks for
FORMS = ("own", "foreign")
WORDS = {"colour": tuple(scenes.COLOURS), "shape": scenes.SHAPES, "half": ("upper", "lower")}
LETTERS = "abcdefghi"
END = "."


def make(
    seed: int,
    index: int,
    *,
    rows: int = 2,
    cols: int = 2,
    tile: int = 16,
    form: str = "own",
    kind: str = "jigsaw",
    square: bool = False,
) -> Row:
    """Problem ``index`` of this seed. rows, cols: of tiles, 4 to 9 in all; tile: pixels of its edge; form: of the solution,
    own (``a3``) or foreign (``3``); kind: jigsaw, or an older task (colour, shape, half) whose solution is one word;
    square: 2 x 3 tiles stand on a square of grey, for a vision tower that takes no other shape."""
    if kind not in KINDS:
        raise ConfigError(f"option 'kind' of jigsaw: {kind!r} is unknown.{nearest(str(kind), KINDS)}")
    if form not in FORMS:
        raise ConfigError(f"option 'form' of jigsaw: {form!r} is unknown.{nearest(str(form), FORMS)}")
    padded: Any = square  # a setting may be of any type
    if not isinstance(padded, bool):
        raise ConfigError(f"option 'square' of jigsaw: found {square!r}, expected true or false.")
    pixels, found = draw(seed, index, rows=rows, cols=cols, tile=tile, kind=kind)
    pixels = scenes.squared(pixels) if square else pixels
    if isinstance(found, str):
        return _row(pixels, kind, (found,), {"kind": kind, "word": found}, index)
    answer = {"kind": kind, "order": found, "form": form}
    return _row(pixels, kind, solution(found, form), answer, index)


def draw(
    seed: int, index: int, *, rows: int = 2, cols: int = 2, tile: int = 16, kind: str = "jigsaw"
) -> tuple[np.ndarray, list[int] | str]:
    """(picture [height, width, 3], places of its tiles from 1, or the word of an older task)."""
    sizes: list[tuple[str, Any, int, int]] = [("rows", rows, 2, 4), ("cols", cols, 2, 4), ("tile", tile, 4, 512)]
    for option, value, least, most in sizes:  # a setting may be of any type
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ConfigError(
                f"option {option!r} of jigsaw: found {value!r}, expected a whole number from {least} to {most}."
            )
    count = rows * cols
    if count > len(LETTERS):
        raise ConfigError(
            f"options 'rows' and 'cols' of jigsaw: {rows} x {cols} tiles, expected at most {len(LETTERS)}."
        )
    rng = generator("jigsaw", kind, seed, index)
    if kind in ("colour", "shape"):
        pixels, colour, shape = scenes.single(rng, rows * tile, cols * tile)
        return pixels, colour if kind == "colour" else shape
    scene = scenes.landscape(rng, rows * tile, cols * tile)
    if kind == "half":
        edge = rows // 2 * cols  # of three rows the middle one belongs to neither half
        upper = bool(rng.integers(2))
        place = int(rng.integers(edge)) if upper else count - 1 - int(rng.integers(edge))
        return scenes.alone(rng, scene, rows, cols, place), WORDS["half"][not upper]
    order: list[int] = rng.permutation(count).tolist()
    return scenes.shuffled(scene, rows, cols, order), [place + 1 for place in order]


def solution(order: list[int], form: str = "own") -> tuple[str, ...]:
    """The steps that say these places, one a tile."""
    return tuple(f"{LETTERS[i] if form == 'own' else ''}{place}" for i, place in enumerate(order))


def question(kind: str) -> str:
    """The prompt without its picture."""
    return f"Which {KINDS[kind]}?\n"


def score(
    completion: str, row: Row, *, hint: str = "", format_score: float = 0.0, rule: str = "unift", answer: str = "tags"
) -> Score:
    """Right: hint + completion up to the completion's first end mark are the places of all tiles, in order and in the row's form.

    ``format_score`` goes to every tile once, in order, each at another place. Part "tiles": the share of tiles that are placed
    rightly, 0 for what cannot be read. Of an older task: right is its word, ``format_score`` goes to another of its words.
    ``rule`` and ``answer`` change nothing here: the papers have no answer tag for it, and the end mark is the only one.
    """
    check_rule(rule)
    kind = field_of(row, "kind")
    body, mark, _ = completion.partition(END)
    said = hint + body
    if kind in WORDS:
        if not mark:
            return _unended(format_score)
        word = field_of(row, "word")
        known = said in WORDS[kind]
        return verdict(said == word, known, format_score, "" if said == word else f"says {said!r:.40}, right is {word}")
    order, form = field_of(row, "order"), field_of(row, "form")
    if not is_list(order) or form not in FORMS:
        raise DataError(f"row {row.id!r} (task 'jigsaw'), column 'answer': expected a list 'order' and a known 'form'")
    if not mark:
        return _with_tiles(_unended(format_score), 0.0)
    places = _read(said, len(order), form)
    if places is None:
        found = verdict(False, False, format_score, f"not a place for each of {len(order)} tiles, in order")
        return _with_tiles(found, 0.0)
    if sorted(places) != list(range(1, len(order) + 1)):
        return _with_tiles(verdict(False, False, format_score, "two tiles at one place, or a place that is none"), 0.0)
    wrong = [LETTERS[i] for i, (said_, place) in enumerate(zip(places, order, strict=True)) if said_ != place]
    found = verdict(not wrong, True, format_score, f"wrong place for {', '.join(wrong)}" if wrong else "")
    return _with_tiles(found, 1 - len(wrong) / len(order))


def canonical(row: Row) -> Hashable:
    """(kind, the picture): the form of the solution makes no other problem."""
    if not row.images:
        raise DataError(f"row {row.id!r} (task 'jigsaw') has no picture; make rows with `unift data make jigsaw`")
    return field_of(row, "kind"), row.images[0].digest


def _read(said: str, count: int, form: str) -> list[int] | None:
    """Places in the order of the tiles; None where the text is anything but one a tile."""
    letters, digits = (said[::2], said[1::2]) if form == "own" else (LETTERS[:count], said)
    fits = letters == LETTERS[:count] and len(digits) == count and all(char in "0123456789" for char in digits)
    return [int(char) for char in digits] if fits else None


def _unended(format_score: float) -> Score:
    return verdict(False, False, format_score, f"the completion has no end mark {END!r}", answered=False)


def _with_tiles(found: Score, share: float) -> Score:
    return replace(found, parts={**found.parts, "tiles": share})


def _row(pixels: np.ndarray, kind: str, steps: tuple[str, ...], answer: dict[str, Any], index: int) -> Row:
    """The row is known by its picture, too: many problems have equal prompts and answers."""
    picture = scenes.png(pixels)
    prompt = MARK + question(kind)
    row_id = content_id([prompt, picture.digest], steps, END, answer)
    return Row(row_id, prompt, steps, END, answer, "jigsaw", {"index": index}, (picture,))


TASK = Task(
    "jigsaw",
    make,
    score,
    canonical,
    {"rows": 2, "cols": 2, "tile": 16, "form": "own", "kind": "jigsaw", "square": False},
    marked=False,
)
