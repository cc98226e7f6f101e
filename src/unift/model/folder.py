"""A model's folder: where it is, what its config.json says, and one message for whatever cannot be read in it. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from unift.types import ConfigError, UniftError


def locate(path: str) -> Path:
    """Folder of a model: a real folder, ``embedded:NAME`` in the package, or a GGUF file's folder."""
    if path.startswith("embedded:"):
        root = Path(str(resources.files("unift.model") / "embedded"))
        folder = root / path.split(":", 1)[1]
        if not folder.is_dir():
            known = sorted(f.name for f in root.iterdir() if f.is_dir() and not f.name.startswith("_"))
            raise ConfigError(f"model.path={path!r}: no such base in the package. Known: {', '.join(known)}")
        return folder
    folder = Path(path).expanduser()
    if not folder.exists():
        raise ConfigError(
            f"model.path={path!r} is neither a folder nor embedded:NAME. unift does not download models: "
            "fetch the folder first, for example with `hf download`"
        )
    if folder.is_file() and folder.suffix != ".gguf":
        raise ConfigError(f"model.path={path!r} is a file of an unknown kind; expected a folder or a .gguf file")
    if folder.is_dir() and not (folder / "config.json").is_file() and not any(folder.glob("*.gguf")):
        raise ConfigError(
            f"model.path={path!r}: the folder has no config.json, so it is no Hugging Face model. Expected config.json, "
            "weights (*.safetensors) and a tokenizer (tokenizer.json), or a .gguf file"
        )
    return folder.parent if folder.is_file() else folder


def model_settings(folder: Path) -> dict[str, Any]:
    """config.json of a model; empty where there is none (a GGUF file). ConfigError if it is damaged."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}): fetch the model again") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds {type(found).__name__}, expected an object: fetch the model again")
    return found


@contextmanager
def reading(what: str, folder: Path) -> Iterator[None]:
    """Whatever a reader raises becomes one clear line. safetensors, tokenizers, torch and pickle have errors of their own for
    a file that is cut short or is something else, bare exceptions among them."""
    try:
        yield
    except (UniftError, MemoryError):
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:300] or repr(error)
        raise ConfigError(
            f"no {what} could be read from {folder}: {said}. If a file there was cut short, fetch the model again"
        ) from error
