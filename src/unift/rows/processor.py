"""A model's *processor*: what turns a row's pictures into placeholders in its prompt and into tensors.

The processor beside a model's weights makes tensors of pictures, and of each place in a rendered prompt as many placeholder
tokens as the model computes numbers for. It travels with its tokenizer (`attach`, `reader_of`): a tokenizer without one is of a
model of text.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

from unift.rows.pictures import opened, picture
from unift.types import DataError, Picture

NOT_PICTURES = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "mm_token_type_ids",
    "labels",
)  # what a processor makes of the text
_ATTRIBUTE = "unift_pictures"


class _Heard:
    """A tokenizer that keeps the text it was given: the prompt with all placeholders."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.text = tokenizer, ""

    def __call__(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        self.text = text if isinstance(text, str) else text[0]
        return self._tokenizer(text, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


class Reader:
    """A model's processor, asked for text with placeholders and for tensors. ``placeholders``: ids of the tokens that stand for
    numbers of a picture (or a video), as the model's config.json names them."""

    def __init__(self, processor: Any, placeholders: Sequence[int] = ()) -> None:
        self.processor = processor
        self.token = str(processor.image_token)  # what stands for a picture in a rendered text
        self.placeholders = frozenset(placeholders or {processor.tokenizer.convert_tokens_to_ids(self.token)})
        self.marks_pictures = True  # whether the types that it gives to tokens mark the pictures
        self.tensors = lru_cache(maxsize=16)(self._tensors)  # of a pack: several passes of a step need the same

    def expand(self, text: str, images: Sequence[Picture], where: str) -> str:
        """A rendered text with its placeholders. DataError where it has not as many places as there are pictures."""
        places = text.count(self.token)
        if not places and not images:
            if self.needs_pictures:
                raise DataError(f"{where}: the row has no picture, and this model takes no prompt without one")
            return text
        if places != len(images):
            raise DataError(
                f"{where}: the rendered prompt has {places} places for pictures ({self.token}), the row {len(images)} pictures"
            )
        processor = copy.copy(self.processor)
        processor.tokenizer = heard = _Heard(self.processor.tokenizer)
        self._run(processor, [text], [images], where)
        return heard.text

    @cached_property
    def needs_pictures(self) -> bool:
        """PaliGemma's processor refuses a text alone; the model would then attend in both directions over all of it."""
        try:
            self.processor(text=["a"])
        except Exception:  # a processor raises many kinds
            return True
        return False

    def tokens(self, images: tuple[Picture, ...]) -> list[int]:
        """Ids of a text of these pictures, a line each."""
        text = self.expand("".join(f"{self.token}\n" for _ in images), images, "pictures")
        return list(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _tensors(self, sequences: tuple[tuple[Picture, ...], ...]) -> dict[str, Any]:
        """What the model is given of the pictures of several sequences, each with one at least: how a picture is cut can depend
        on how many its own sequence has."""
        texts = [self.token * len(images) for images in sequences]
        made = self._run(self.processor, texts, sequences, "pictures", return_tensors="pt", padding=True)
        self.marks_pictures = "token_type_ids" not in made or bool((made["token_type_ids"] != 0).any())
        return {name: value for name, value in made.items() if name not in NOT_PICTURES}

    @staticmethod
    def _run(
        processor: Any, texts: Sequence[str], sequences: Sequence[Sequence[Picture]], where: str, **how: Any
    ) -> Any:
        shown = [[opened(found, where) for found in images] for images in sequences]
        try:
            return processor(text=texts, images=shown, **how)
        except Exception as error:  # a processor raises many kinds
            said = " ".join(str(error).split())[:200] or type(error).__name__
            raise DataError(f"{where}: the model's processor refuses the pictures: {said}") from error


def noise(rng: Any, size: tuple[int, int]) -> Picture:
    """A picture of random pixels, (height, width), to try a model with."""
    from PIL import Image

    return picture(Image.fromarray(rng.integers(0, 256, (*size, 3), dtype="uint8")), "pictures")


def attach(tokenizer: Any, processor: Any, placeholders: Sequence[int] = ()) -> None:
    """Let the processor travel with its tokenizer."""
    if not getattr(tokenizer, "chat_template", None):
        tokenizer.chat_template = getattr(processor, "chat_template", None)
    setattr(tokenizer, _ATTRIBUTE, Reader(processor, placeholders))


def reader_of(tokenizer: Any) -> Reader | None:
    """The reader that came with a tokenizer; None where its model takes no pictures."""
    found: Any = getattr(tokenizer, "__dict__", {}).get(_ATTRIBUTE)
    return found if isinstance(found, Reader) else None


def needed(tokenizer: Any, where: str) -> Reader:
    """The reader; DataError for a row with pictures and a model of text."""
    reader = reader_of(tokenizer)
    if reader is None:
        raise DataError(
            f"{where}: the row has pictures, and model.path is a model of text alone, or lacks its processor "
            "(preprocessor_config.json). Use a model with a vision tower (docs/pictures.md)"
        )
    return reader
