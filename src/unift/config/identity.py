"""Which settings decide the numbers of a run, their hash, and how two configs differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, cast

import yaml

from unift.config.sections import Config

# A continued run may change these, in a phase, too: they do not touch the numbers, but for rounding.
FREE_KEYS = (
    "run", "save", "log", "baselines", "threads", "model.shard",
    "engine.url", "engine.timeout", "engine.folder", "engine.transfer", "engine.gap_limit",
    "reward.workers", "reward.timeout", "reward.wall_timeout", "reward.error_rate", "reward.memory_mb", "reward.environment",
    "train.token_budget", "train.gradient_checkpointing",
)  # fmt: skip


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"train": {"lr": 1}} -> {"train.lr": 1}. Lists stay values; an empty mapping is one too."""
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree} if prefix else {}
    found: dict[str, Any] = {}
    for name, value in cast("Mapping[str, Any]", tree).items():
        found |= flat(value, f"{prefix}.{name}" if prefix else str(name))
    return found


def numeric_settings(config: Config) -> dict[str, Any]:
    """The settings that decide the numbers, flat: {"train.lr": 1e-6, "phases.0.train.lr": 1e-5, ...}."""
    found = _numeric(config.model_dump(mode="json"))
    phases: list[Any] = found.pop("phases")
    for number, phase in enumerate(phases):
        found |= {f"phases.{number}.{name}": value for name, value in _numeric(phase).items()}
    return found if phases else found | {"phases": phases}


def _numeric(tree: Any) -> dict[str, Any]:
    return {k: v for k, v in flat(tree).items() if not any(k == free or k.startswith(free + ".") for free in FREE_KEYS)}


def config_hash(config: Config) -> str:
    text = json.dumps(numeric_settings(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def differences(old: Config, new: Config) -> list[str]:
    """Lines "train.lr: 1e-06 -> 1e-05" for each numeric setting that differs."""
    a, b = numeric_settings(old), numeric_settings(new)
    return [f"{k}: {a.get(k)!r} -> {b.get(k)!r}" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
