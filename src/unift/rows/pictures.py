"""Pictures of a row: read from any of the forms that data sets write, checked, and made ready for a model.

A prompt says where its pictures stand by ``<image>``, in a text as in the contents of messages; parts of type image in
messages (Hugging Face, OpenAI) are rewritten to it when a row is read. Without any mark the pictures stand before the text of
the first user message (as TRL places them), or of a prompt that is one text.

What a model makes of them is in ``processor.py``.
"""

from __future__ import annotations

import base64
import binascii
import copy
import hashlib
import io
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from unift.rows.tasks.base import is_list_or_tuple, is_mapping
from unift.types import ConfigError, DataError, Picture, Row

MARK = "<image>"
COLUMNS = ("images", "image")
PIXELS = 2**26  # of one picture: 67 million, 200 MB once it is unpacked
_limit_lock = threading.Lock()  # Pillow's limit is one for all threads
ORIENTATION, UPRIGHT = 0x0112, 1  # the EXIF tag that turns a picture, and its value for one that needs no turn


# ---------------------------------------------------------------------------------------------- from a record


def normalised(record: Mapping[str, Any], where: str, source: str) -> Mapping[str, Any]:
    """The record with its pictures as ``images``, a tuple of `Picture`, and marks in place of parts of type image; the record
    itself where it has neither. ``source``: the file of rows, in whose folder relative paths are looked for first.

    Raises DataError where marks and pictures do not fit, or a picture cannot be read.
    """
    column = next((name for name in COLUMNS if record.get(name) is not None and record[name] != []), None)
    prompt, completion = record.get("prompt"), record.get("completion")
    if column is None and not _has_parts(prompt) and not _has_parts(completion):
        return record
    listed = [] if column is None else _listed(record[column])
    inside: list[Any] = []
    made = {**record, "prompt": _flattened(prompt, inside, f"{where}, column 'prompt'")}
    if completion is not None:
        beside: list[Any] = []
        made["completion"] = _flattened(completion, beside, f"{where}, column 'completion'")
        if beside:
            raise DataError(f"{where}, column 'completion': a picture stands in the answer; expected text alone")
    folder, waiting = folder_of(source), iter(listed)
    found = [next(waiting, None) if value is None else value for value in inside]
    found += waiting
    if any(value is None for value in found):
        raise DataError(
            f"{where}, column 'prompt': {len(inside)} places for pictures, but only {len(listed)} pictures in column "
            f"{column or 'images'!r}. Give every place a picture"
        )
    for name in COLUMNS:
        made.pop(name, None)
    if not found:
        return made
    images = tuple(picture(value, f"{where}, column {column or 'prompt'!r}", folder) for value in found)
    marks = count_marks(made["prompt"])
    if marks not in (0, len(images)):
        raise DataError(
            f"{where}, column 'prompt': {marks} marks {MARK}, but {len(images)} pictures. Write one mark where each picture "
            "stands, or none: then the pictures come before the text"
        )
    return {**made, "images": images}


def stand_in(record: Any) -> bool:
    """Has a record, as it stands in a file, a column for pictures or messages of parts?"""
    if not is_mapping(record):
        return False
    return any(name in record for name in COLUMNS) or _has_parts(record.get("prompt"))


def of_record(record: Mapping[str, Any]) -> tuple[Picture, ...]:
    """The pictures of a record that was normalised."""
    found = record.get("images")
    own = isinstance(found, tuple) and all(isinstance(value, Picture) for value in cast("tuple[Any, ...]", found))
    return cast("tuple[Picture, ...]", found) if own else ()


def folder_of(name: str) -> Path | None:
    """The folder of a file of rows; None of rows from elsewhere."""
    file = Path(name.removeprefix("hf:")).expanduser()
    return file if file.is_dir() else file.parent if file.is_file() else None


def packed_columns(source: Any) -> Any:
    """A ``datasets.Dataset`` whose columns of type Image give the bytes of files, as they are stored."""
    features: Mapping[str, Any] = getattr(source, "features", None) or {}
    for name, feature in features.items():
        inner: Any = getattr(feature, "feature", None)
        found: Any = inner if type(inner).__name__ == "Image" else feature
        if type(found).__name__ == "Image" and found.decode:
            plain = copy.copy(found)
            plain.decode = False
            source = source.cast_column(name, plain if found is feature else _list_of(feature, plain))
    return source


def _list_of(feature: Any, inner: Any) -> Any:
    made = copy.copy(feature)
    made.feature = inner
    return made


def _has_parts(value: Any) -> bool:
    return is_list_or_tuple(value) and any(is_mapping(m) and is_list_or_tuple(m.get("content")) for m in value)


def _listed(value: Any) -> list[Any]:
    return list(cast("Sequence[Any]", value)) if is_list_or_tuple(value) else [value]


def count_marks(prompt: Any, mark: str = MARK) -> int:
    """Marks in a prompt, a text or messages with texts."""
    if isinstance(prompt, str):
        return prompt.count(mark)
    texts = [m.get("content") for m in prompt if is_mapping(m)] if is_list_or_tuple(prompt) else []
    return sum(text.count(mark) for text in texts if isinstance(text, str))


def _flattened(messages: Any, found: list[Any], where: str) -> Any:
    """Messages with texts for contents. ``found`` gets what each part of type image holds, None where it holds nothing."""
    if not _has_parts(messages):
        return messages
    return [
        {**m, "content": _text(m["content"], found, where)} if is_mapping(m) and "content" in m else m for m in messages
    ]


def _text(content: Any, found: list[Any], where: str) -> Any:
    if isinstance(content, str):
        found += [None] * content.count(MARK)
        return content
    text = ""
    for part in _listed(content):
        kind = part.get("type") if is_mapping(part) else None
        if kind in ("image", "image_url"):
            text += MARK
            found.append(
                next((part[key] for key in ("image", "url", "path", "image_url", "bytes") if part.get(key)), None)
            )
        elif is_mapping(part) and isinstance(part.get("text"), str):
            found += [None] * part["text"].count(MARK)
            text += part["text"]
        elif not (is_mapping(part) and kind == "text" and part.get("text") is None):
            raise DataError(f"{where}: expected parts of type text or image in a message, found {part!r:.80}")
    return text


def shown_by(rows: Any) -> bool:
    """Has any of these rows a picture? Rows on disk know it."""
    facts = getattr(rows, "facts", None)
    return any(row.images for row in rows) if facts is None else bool(facts.pictures)


# ---------------------------------------------------------------------------------------------- one picture


def picture(value: Any, where: str, folder: Path | None = None) -> Picture:
    """A picture of a path, of the bytes of a file, of ``{"bytes", "path"}`` as datasets writes it, of a ``data:`` URL, or of
    Pillow. Raises DataError for anything else, for a file that is none and for more than `PIXELS`."""
    if isinstance(value, Picture):
        return value
    while is_mapping(value):
        inner = next((value[key] for key in ("bytes", "path", "url", "image") if value.get(key)), None)
        if isinstance(inner, str) and value.get("bytes"):
            inner = _unpacked(inner, where)
        value = inner
    if hasattr(value, "tobytes") and hasattr(value, "mode") and hasattr(value, "save"):
        return _of_pillow(value, where)
    if isinstance(value, (bytes, bytearray)):
        data = bytes(value)
        found = Picture(hashlib.sha256(data).hexdigest(), data=data)
    elif isinstance(value, str) and value.startswith("data:"):
        data = _unpacked(value.partition(",")[2], where)
        found = Picture(hashlib.sha256(data).hexdigest(), data=data)
    elif isinstance(value, (str, Path)):
        path = _path(str(value), where, folder)
        data = _read(path, where)
        found = Picture(hashlib.sha256(data).hexdigest(), path=str(path))
    else:
        raise DataError(
            f"{where}: expected a picture (path, bytes, {{bytes, path}} or a Pillow image), found {type(value).__name__} "
            f"{value!r:.60}"
        )
    _header(data, where)
    return found


def _unpacked(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        raise DataError(f"{where}: expected the bytes of a picture in base64, found {text!r:.60}") from None


def _path(name: str, where: str, folder: Path | None) -> Path:
    if name.startswith(("http://", "https://")):
        raise DataError(f"{where}: {name!r:.80} lies on the network; fetch the picture and name its file")
    path = Path(name.removeprefix("file://")).expanduser()
    for place in (folder, Path.cwd()) if not path.is_absolute() else (Path("/"),):
        if place is not None and (place / path).is_file():
            return (place / path).absolute()
    places = " and ".join(str(p) for p in dict.fromkeys((folder or Path.cwd(), Path.cwd())))
    looked = "" if path.is_absolute() else f" (looked in {places})"
    raise DataError(f"{where}: no such picture: {name!r:.200}{looked}")


def _read(path: Path, where: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{where}: {path} cannot be read: {error.strerror or error}") from None


def _of_pillow(image: Any, where: str) -> Picture:
    """Kept as PNG; known by its pixels, since packers differ from machine to machine."""
    _check_size(image.size, where)
    try:
        image = image if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else image.convert("RGB")
        digest = hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes())
        packed = io.BytesIO()
        image.save(packed, format="PNG", compress_level=1)
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{where}: the picture cannot be read: {error}") from None
    return Picture(digest.hexdigest(), data=packed.getvalue())


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise ConfigError("rows with pictures need Pillow: pip install 'unift[pictures]'") from None
    return Image


def _check_size(size: tuple[int, int], where: str) -> None:
    if size[0] * size[1] > PIXELS:
        raise DataError(
            f"{where}: a picture of {size[0]:,} x {size[1]:,} pixels, more than {PIXELS:,}; scale it down before training"
        )


def _header(data: bytes, where: str) -> Any:
    """The picture, opened and not unpacked."""
    library = _pillow()
    with _limit_lock:
        limit = library.MAX_IMAGE_PIXELS
        try:
            library.MAX_IMAGE_PIXELS = None  # the check below says more than Pillow's warning
            image = library.open(io.BytesIO(data))
        except Exception as error:  # Pillow raises many kinds for a damaged file
            said = str(error).replace("\n", " ") if "BytesIO" not in str(error) else "unknown format"
            raise DataError(f"{where}: the picture cannot be read ({said or type(error).__name__})") from None
        finally:
            library.MAX_IMAGE_PIXELS = limit
    _check_size(image.size, where)
    return image


def content(found: Picture, where: str = "") -> bytes:
    """The bytes of its file. DataError where the file is gone or is another one by now."""
    if found.data is not None:
        return found.data
    data = _read(Path(found.path), where or "pictures")
    if hashlib.sha256(data).hexdigest() != found.digest:
        raise DataError(
            f"{where or 'pictures'}: {found.path} has changed since the rows were read. Restore it, or read the "
            "rows anew: those of a large file are in a cache (UNIFT_CACHE=FOLDER names another one)"
        )
    return data


def opened(found: Picture, where: str = "") -> Any:
    """The picture as a Pillow image in RGB, turned as its EXIF data says. Raises DataError for a damaged file."""
    image = _header(content(found, where), where or "pictures")
    try:
        from PIL import ImageOps

        return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # truncated files, broken chunks: Pillow raises many kinds
        name = found.path or "its bytes"
        raise DataError(f"{where or 'pictures'}: the picture cannot be read ({name}: {error})") from None


def as_url(found: Picture) -> str:
    """A ``data:`` URL of the very pixels that `opened` gives to whoever reads it plainly: the file itself where it is upright and
    in RGB, else a PNG of them."""
    data = content(found)
    image = _header(data, "pictures")
    kind = image.get_format_mimetype()
    if image.mode != "RGB" or image.getexif().get(ORIENTATION, UPRIGHT) != UPRIGHT or not kind:
        packed, kind = io.BytesIO(), "image/png"
        opened(found).save(packed, format="PNG", compress_level=1)
        data = packed.getvalue()
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def thumbnail(found: Picture, edge: int) -> bytes:
    """A small copy as PNG, at most ``edge`` pixels wide and high; a picture that is smaller keeps its size."""
    image = opened(found)
    image.thumbnail((edge, edge))
    packed = io.BytesIO()
    image.save(packed, format="PNG", optimize=True)
    return packed.getvalue()


def as_value(found: Picture) -> dict[str, Any]:
    """For a file of rows: ``{"bytes", "path"}``, of which one is None."""
    return {"bytes": found.data, "path": found.path or None}


def as_json(found: Picture) -> dict[str, Any]:
    """The same with bytes in base64."""
    packed = None if found.data is None else base64.b64encode(found.data).decode()
    return {"bytes": packed, "path": found.path or None}


def of_json(digest: str, value: Mapping[str, Any]) -> Picture:
    """What `as_json` wrote."""
    data = None if value["bytes"] is None else base64.b64decode(value["bytes"])
    return Picture(digest, value["path"] or "", data)


# ---------------------------------------------------------------------------------------------- marks in a prompt


def marked(row: Row, token: str) -> Row:
    """The row with a mark for every picture: before the text of the first user message where it has none. A text that was
    rendered before has the model's own ``token`` and stays."""
    if not row.images or count_marks(row.prompt):
        return row
    if isinstance(row.prompt, str):
        own = row.prompt.count(token) == len(row.images)
        return row if own else _with_prompt(row, MARK * len(row.images) + row.prompt)
    first = next((i for i, m in enumerate(row.prompt) if m.get("role") == "user"), 0)
    marks = MARK * len(row.images)
    return _with_prompt(
        row, tuple({**m, "content": marks + m["content"]} if i == first else m for i, m in enumerate(row.prompt))
    )


def _with_prompt(row: Row, prompt: Any) -> Row:
    return replace(row, prompt=prompt)


def parts(content: str, marked: bool = True) -> list[dict[str, str]]:
    """A content as the parts that chat templates take. ``marked``: its marks stand for pictures."""
    found: list[dict[str, str]] = []
    for number, text in enumerate(content.split(MARK) if marked else [content]):
        found += [{"type": "image"}] * (number > 0) + ([{"type": "text", "text": text}] if text else [])
    return found
