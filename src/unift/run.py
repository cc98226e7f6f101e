"""The run folder: opened once, refused if it belongs to another run, described for people."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from unift import __version__
from unift import config as configuration
from unift.checkpoint import clean_temporary, write_atomic
from unift.config import Config
from unift.types import ConfigError, DataError, UniftError

PACKAGES = ("torch", "transformers", "accelerate", "peft", "tokenizers", "numpy", "datasets", "math-verify", "pebble")


def environment() -> dict[str, Any]:
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "unift": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "packages": versions,
    }


def open_run(folder: Path, config: Config, data: str) -> dict[str, Any] | None:
    """Create the folder, or check that it holds this very run. Returns the result if the run is already finished.

    A folder in which nothing has been measured yet (the reward failed its check, say) takes the new settings.
    """
    stored = folder / "config.yaml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UniftError(f"cannot create the run folder {folder} ({error.strerror}). Name another one with --run") from error
    if stored.is_file() and (folder / "metrics.jsonl").is_file():
        changed = configuration.differences(configuration.validate(configuration.read_yaml(stored)), config)
        if changed:
            raise ConfigError(
                f"{folder} holds a run with other settings:\n  " + "\n  ".join(changed) + "\n"
                "Use another run folder (run=...), or the settings it began with"
            )
        known = _json(folder / "environment.json").get("data")
        if known != data:
            raise DataError(
                f"the training rows are not those that {folder} began with (fingerprint {data}, expected {known}). "
                "Restore the rows, or use another run folder"
            )
        for place in (folder, folder / "checkpoints", folder / "rollouts"):
            clean_temporary(place)
        result = folder / "result.json"
        return _json(result) if result.is_file() else None
    if any(folder.iterdir()):
        own = ("config.yaml", "environment.json", "log.txt")
        foreign = [p.name for p in folder.iterdir() if not p.name.startswith(".") and p.name not in own]
        if foreign:
            raise ConfigError(f"{folder} is not empty and holds no run (found {foreign[0]!r}). Use another run folder")
    write_atomic(folder / "environment.json", json.dumps(environment() | {"data": data}, indent=1))
    write_atomic(stored, configuration.to_yaml(config))
    return None


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UniftError(f"{path} cannot be read ({error}): the run folder is damaged. Use another one (--run)") from error


def write_result(folder: Path, result: dict[str, Any]) -> None:
    write_atomic(folder / "result.json", json.dumps(result, indent=1))


@contextmanager
def trackers(config: Config, folder: Path) -> Iterator[Callable[[dict[str, Any], int], None]]:
    """log(metrics, step) to the trackers of ``log.trackers`` through accelerate; a no-op when there are none."""
    if not config.log.trackers:
        yield lambda metrics, step: None
        return
    for name in config.log.trackers:
        if importlib.util.find_spec(name) is None:  # accelerate would leave it out without a word
            raise ConfigError(f"log.trackers={config.log.trackers}: {name} is not installed. Do: pip install {name}")
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=[*config.log.trackers], project_dir=str(folder))
    accelerator.init_trackers("unift", config={k: str(v) for k, v in configuration.numeric_settings(config).items()})
    try:
        yield lambda metrics, step: accelerator.log(
            {k: v for k, v in metrics.items() if isinstance(v, (int, float))}, step=step
        )
    finally:
        accelerator.end_training()
