"""Layers of settings become one config, typed and validated. Unknown key = error that names the nearest one.

Layers, later ones win: the defaults of ``sections.py`` <- preset of the method <- recipe (a tuned task) <- YAML file
<- ``key=value``.
What results is written to the run folder as ``config.yaml`` and is itself a valid config file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ValidationError

from unift.config.aliases import suggestion
from unift.config.checks import check, check_model
from unift.config.identity import flat
from unift.config.packaged import nearest, preset_text, recipe_text
from unift.config.sections import METHOD_SECTIONS, Config
from unift.types import HANDED, ConfigError

PATHS = ("model.path", "data.train", "data.test", "reward.function")  # settings that name a file or a folder

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # owner/name of a model on the Hub


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        old = merged.get(name)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            merged[name] = _merge(cast("Mapping[str, Any]", old), cast("Mapping[str, Any]", value))
        elif isinstance(value, Mapping) and isinstance(old, list):
            merged[name] = _merge_items(name, cast("list[Any]", old), cast("Mapping[str, Any]", value))
        else:
            merged[name] = value
    return merged


def _merge_items(name: str, base: list[Any], over: Mapping[str, Any]) -> list[Any]:
    """Items of a list by their place, as in ``phases.0.share=0.2``."""
    places = {str(i): item for i, item in enumerate(base)}
    for place in over:
        if place not in places:
            raise ConfigError(
                f"{name}.{place}: {name} is a list of {len(base)}; expected {name}.0 to {name}.{len(base) - 1}, "
                "or the whole list"
            )
    return list(_merge(places, over).values())


def nested(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """``{"train.lr": 1e-6}`` -> ``{"train": {"lr": 1e-6}}``; later names win."""
    tree: dict[str, Any] = {}
    for name, value in dotted.items():
        *path, last = name.split(".")
        node: dict[str, Any] = {last: value}
        for part in reversed(path):
            node = {part: node}
        tree = _merge(tree, node)
    return tree


def dotted(items: Iterable[str]) -> dict[str, Any]:
    """``["train.lr=1e-6", "model.path=/m"]`` -> values by dotted name. Values are read as YAML."""
    found: dict[str, Any] = {}
    for item in items:
        name, sign, value = item.partition("=")
        if not sign or not name.strip():
            raise ConfigError(f"cannot read the setting {item!r}: expected key=value, as in train.lr=1e-6")
        try:
            found[name.strip()] = _loaded(value)
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            why = f" ({error.context})" if isinstance(error, yaml.MarkedYAMLError) and error.context else ""
            raise ConfigError(f"cannot read the value of {name.strip()!r} as YAML: {value!r}{why}") from error
    return found


class _Loader(yaml.SafeLoader):
    """YAML of settings. A name that stands twice in a mapping is an error: the later one would replace the earlier, a whole section
    maybe, without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.MarkedYAMLError(f"{twice[0]!r} stands there twice", node.start_mark)
        return node


def _loaded(text: str) -> Any:
    return yaml.load(text, _Loader)


def parse_overrides(items: Iterable[str]) -> dict[str, Any]:
    """``["train.lr=1e-6", "model.path=/m"]`` -> nested dict."""
    return nested(dotted(items))


def _yaml_mapping(text: str, source: str) -> dict[str, Any]:
    try:
        tree: Any = _loaded(text) or {}
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a date such as 2026-99-99
        raise ConfigError(f"{source} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: expected a mapping of settings, found {type(tree).__name__}")
    return cast("dict[str, Any]", tree)


def read_yaml(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config file {str(path)!r} {'is a folder' if path.is_dir() else 'does not exist'}")
    try:
        return _yaml_mapping(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {str(path)!r} cannot be read as UTF-8 text: {error}") from error


def beside(tree: Mapping[str, Any], file: Path, over: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a YAML file with its relative paths as they are from here: a path that is not below the working
    folder, but beside the file, is meant there. ``over``: settings that replace those of the file.

    Raises ConfigError, with both places, for a path that is in neither.
    """
    found, set_later = flat(tree), flat(over)

    def moved(key: str, value: Any) -> Any:
        if isinstance(value, list):  # rewards, each alone or with its weight
            return [moved(key, item) for item in cast("list[Any]", value)]
        if isinstance(value, Mapping):
            entries = cast("Mapping[str, Any]", value).items()
            return {name: moved(key, item) if name == "function" else item for name, item in entries}
        if not isinstance(value, str) or _no_path(key, value):
            return value
        name, sign, function = value.rpartition(":") if key == "reward.function" else (value, "", "")
        path = Path(name).expanduser()
        if path.is_absolute() or path.exists():
            return value
        if not (file.parent / path).exists():
            if key == "model.path" and HUB_NAME.fullmatch(value):
                return value
            raise ConfigError(
                f"{key}={value!r} of {file} does not exist: looked in {Path.cwd()} and, beside the file, in "
                f"{file.parent.absolute()}"
            )
        return f"{file.parent / path}{sign}{function}"

    for key in PATHS:
        if key in found and key not in set_later:
            section, name = key.split(".")
            tree = _merge(tree, {section: {name: moved(key, found[key])}})
    return dict(tree)


def _no_path(key: str, value: str) -> bool:
    """Names of things of the package, of the Hub, of modules, and what was handed over from Python."""
    if key == "reward.function":
        return ".py:" not in value
    return value.startswith(("embedded:", "package:", "hf:", f"{HANDED}:")) or value == HANDED


def preset_settings(method: str) -> dict[str, Any]:
    """What the preset of a method sets, as in its file."""
    return _yaml_mapping(preset_text(method), f"preset {method}")


def _method_layers(method: str, recipe: Mapping[str, Any], user: Mapping[str, Any]) -> dict[str, Any]:
    tree = preset_settings(method)
    common = {name: value for name, value in recipe.items() if name != "methods"}
    methods: Mapping[str, Mapping[str, Any]] = recipe.get("methods") or {}
    own = methods.get(method, {})
    for layer in (common, own, user):
        tree = _merge(tree, layer)
    return tree


def resolve(
    method: str | None = None,
    *,
    recipe: str | None = None,
    file: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Config:
    """Merge the layers and validate. Raises ConfigError with the key, what was found and the nearest name."""
    user = _merge(file or {}, overrides or {})
    method = str(method or user.get("method") or "uft")
    packaged = _yaml_mapping(recipe_text(recipe), f"recipe {recipe}") if recipe else {}
    tree = _method_layers(method, packaged, user) | {"method": method}
    phases: list[dict[str, Any]] = []
    listed: Sequence[Any] = tree.get("phases") or []
    for found in listed:
        if not isinstance(found, Mapping) or "method" not in found:
            raise ConfigError(f"phases: each needs a method and a share, found {found!r}")
        phase = cast("Mapping[str, Any]", found)
        # A phase inherits the method's own sections; what the phase itself sets wins over all.
        layers = _method_layers(phase["method"], packaged, user)
        sections = {name: layers[name] for name in METHOD_SECTIONS if name in layers}
        phases.append(_merge(sections, phase))
    config = validate(tree | {"phases": phases})
    check(config)
    check_model(config, user)
    return config


def validate(tree: Mapping[str, Any]) -> Config:
    try:
        return Config.model_validate(dict(tree))
    except ValidationError as error:
        found: dict[str, list[Any]] = {}  # a setting that may have several types has an error for each
        for item in error.errors():
            found.setdefault(".".join(map(str, _setting(item["loc"]))), []).append(item)
        raise ConfigError("\n".join(_explain(name, items) for name, items in found.items())) from None


def _setting(place: Sequence[Any]) -> list[Any]:
    """The path of a setting, or of an item of its list, without the types that it may have, which pydantic puts behind it."""
    for i, part in enumerate(place[1:], start=1):
        known = [] if isinstance(part, int) else _fields_at(list(place[:i]))
        if not isinstance(part, int) and not known:
            return list(place[:i])
    return list(place)


def _fields_at(path: list[Any]) -> list[str]:
    """Names of the settings below a path such as ["train"]."""
    model: Any = Config
    for part in path:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if model is None:
            return []
    return list(model.model_fields)


def _unknown(name: str, value: Any) -> str:
    """A line for each unknown setting at or below ``name``, with the one that is most likely meant."""
    below = [f"{name}.{leaf}" for leaf in flat(value)] if isinstance(value, Mapping) else []
    foreign = [leaf for leaf in below if suggestion(leaf)]
    if foreign and not suggestion(name):  # settings of another library, in its own sections
        return "\n".join(f"unknown setting {leaf!r}{suggestion(leaf)}" for leaf in foreign)
    *path, last = name.split(".")
    known = _fields_at([part for part in path if not part.isdigit()])
    everywhere = [f"{section}.{field}" for section in Config.model_fields for field in _fields_at([section])]
    exact = [setting for setting in Config.model_fields if setting == last and not _fields_at([setting])]
    same = exact or [setting for setting in everywhere if setting.endswith(f".{last}")]
    hint = suggestion(name) or (f"; did you mean {same[0]!r}?" if len(same) == 1 else "")
    return f"unknown setting {name!r}{hint or nearest(last, known) or nearest(name, everywhere)}"


def _in_sections(key: str, value: Any) -> str:
    *sections, text = key.split(".")
    text += f": {json.dumps(value, default=str)}"
    for section in reversed(sections):
        text = f"{section}: {{{text}}}"
    return text


def _explain(name: str, items: Sequence[Any]) -> str:
    item, path = items[0], list(items[0]["loc"])
    if item["type"] == "extra_forbidden":
        joined = next((part for part in path if isinstance(part, str) and "." in part), None)
        if joined is None:
            return _unknown(name, item["input"])
        known = suggestion(name)
        return f"unknown setting {joined!r}" + (
            known or f": a file or a mapping has sections in place of dots, {_in_sections(joined, item['input'])}"
        )
    if item["type"] in ("model_type", "model_attributes_type"):
        known = ", ".join(f"{name}.{field}" for field in _fields_at(path)[:3])
        return f"setting {name!r} is a section: set what is in it ({known}, ...); found {item['input']!r}"
    said = ", or ".join(dict.fromkeys(one["msg"].lower() for one in items))
    return f"setting {name!r}: {said}; found {item['input']!r}"
