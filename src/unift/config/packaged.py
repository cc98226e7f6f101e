"""Presets and recipes: the YAML files of the package, by name."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources

from unift.types import ConfigError, closest


def _names(folder: str) -> list[str]:
    return sorted(f.name[:-5] for f in (resources.files("unift.config") / folder).iterdir() if f.name.endswith(".yaml"))


def preset_names() -> list[str]:
    return _names("presets")


def recipe_names() -> list[str]:
    return _names("recipes")


def packaged(folder: str, name: str, kind: str) -> str:
    names = _names(folder)
    if name not in names:
        raise ConfigError(f"unknown {kind} {name!r}{nearest(name, names) or '.'} Known: {', '.join(names)}.")
    return (resources.files("unift.config") / folder / f"{name}.yaml").read_text(encoding="utf-8")


def preset_text(name: str) -> str:
    return packaged("presets", name, "method")


def recipe_text(name: str) -> str:
    return packaged("recipes", name, "recipe")


def nearest(word: str, words: Iterable[str]) -> str:
    near = closest(word, words)
    return f"; did you mean {near!r}?" if near else ""
