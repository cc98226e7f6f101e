"""The run folder: opened once, refused if it belongs to another run, described for people."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from unift import processes
from unift._version import __version__
from unift.config.identity import differences, numeric_settings, to_yaml
from unift.config.resolve import read_yaml, validate
from unift.config.sections import Config
from unift.files import clean_temporary, write_atomic
from unift.types import ConfigError, DataError, UniftError

LOCK = ".lock"  # a dot file, as all that are not results
PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "tokenizers",
    "numpy",
    "datasets",
    "mpmath",
    "cloudpickle",
)


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


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Be the only writer of the run folder. The lock is the kernel's (flock): it goes with the process, however that ends.

    Raises UniftError with the other's process id. Only the first of several processes holds it.
    """
    if not processes.first():
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Not truncated: until the lock is ours, what stands in the file is the other's. Not inherited by children.
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UniftError(
            f"cannot create the run folder {folder} ({error.strerror}). Name another one with --run"
        ) from error
    try:
        _lock(handle, folder)
        os.truncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()} on {platform.node()}".encode(), 0)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows has no flock
        print(
            f"unift: {folder} is not locked on this system; see to it that no other process trains in it",
            file=sys.stderr,
        )
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(handle, 200, 0).decode(errors="replace") or "unknown"
        raise UniftError(
            f"another process trains in {folder}: process {owner}. Wait for it, end it, or use another run folder"
        ) from error
    except OSError as error:
        print(
            f"unift: {folder} cannot be locked ({error.strerror}); see to it that no other process trains in it",
            file=sys.stderr,
        )


def open_run(folder: Path, config: Config, data: str) -> dict[str, Any] | None:
    """Begin a run in the folder (`claim` made it), or check that it holds this very run; the result if that is finished.

    A folder in which nothing has been measured yet (the reward failed its check, say) takes the new settings.
    """
    stored = folder / "config.yaml"
    if stored.is_file() and (folder / "metrics.jsonl").is_file():
        changed = differences(_stored(stored), config)
        if changed:
            raise ConfigError(
                f"{folder} holds a run with other settings:\n  " + "\n  ".join(changed) + "\n"
                "Use another run folder (run=...), or the settings it began with"
            )
        known = read_object(folder / "environment.json").get("data")
        if not isinstance(known, str):
            raise UniftError(
                f"{folder / 'environment.json'} holds no fingerprint of the training rows: the run folder is damaged. Use "
                "another one (--run)"
            )
        if known != data:
            raise DataError(
                f"the training rows are not those that {folder} began with (fingerprint {data}, expected {known}). "
                "Restore the rows, or use another run folder"
            )
        for place in (folder, folder / "checkpoints", folder / "rollouts"):
            clean_temporary(place)
        return read_result(folder)
    if any(folder.iterdir()):
        own = ("config.yaml", "environment.json", "log.txt", "base")
        foreign = [p.name for p in folder.iterdir() if not p.name.startswith(".") and p.name not in own]
        if foreign:
            raise ConfigError(f"{folder} is not empty and holds no run (found {foreign[0]!r}). Use another run folder")
    write_atomic(folder / "environment.json", json.dumps(environment() | {"data": data}, indent=1))
    write_atomic(stored, to_yaml(config))
    return None


def _stored(path: Path) -> Config:
    """The settings that the run began with."""
    try:
        return validate(read_yaml(path))
    except ConfigError as error:
        raise ConfigError(f"{path} does not hold the settings of a run: {error}. Use another run folder") from None


def read_object(path: Path, todo: str = "Use another one (--run)") -> dict[str, Any]:
    """A JSON object of a run folder. UniftError for anything else, with what to do."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UniftError(f"{path} cannot be read ({error}): the run folder is damaged. {todo}") from error
    if not isinstance(value, dict):
        raise UniftError(
            f"{path} holds {type(value).__name__} {value!r:.40}, expected an object: the run folder is damaged. {todo}"
        )
    return value


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result of a finished run, None while it goes on. UniftError if what is there cannot be one."""
    path = folder / "result.json"
    if not path.is_file():
        return None
    todo = "Delete it and run the same command: the end of the run is done again from its last checkpoint"
    result = read_object(path, todo)
    faults = [name for name in ("seconds", "steps") if not _number(result.get(name, None if name == "seconds" else 0))]
    for name in ("base", "test", "train"):
        found = result.get(name) or {}
        sound = isinstance(found, dict) and all(_number(found.get(k)) for k in ("accuracy", "low", "high", "n"))
        faults += [name] if found and not sound else []
    if faults:
        raise UniftError(f"{path} is no result of a run: {faults[0]!r} holds {result.get(faults[0])!r:.40}. {todo}")
    return result


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def write_result(folder: Path, result: dict[str, Any]) -> None:
    write_atomic(folder / "result.json", json.dumps(result, indent=1))


def check_trackers(config: Config) -> None:
    """Raise ConfigError for a tracker that is not installed: accelerate would leave it out silently."""
    if not config.log.trackers:
        return
    from accelerate.tracking import get_available_trackers

    installed = {str(name) for name in get_available_trackers()}
    for name in config.log.trackers:
        if name not in installed:
            raise ConfigError(
                f"log.trackers: {name} is not installed. Install it with `pip install {name}`, or leave it out: "
                "metrics.jsonl is always written"
            )


@contextmanager
def trackers(config: Config, folder: Path) -> Iterator[Callable[[dict[str, Any], int], None]]:
    """log(metrics, step) to the trackers of ``log.trackers`` through accelerate, from the first process; else a no-op.

    `check_trackers` has passed. Files of TensorBoard and wandb stay in the run folder. A continued run is a new run of
    wandb with the same name.
    """
    if not config.log.trackers or not processes.first():
        yield lambda metrics, step: None
        return
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    places = ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "tensorboard"))
    accelerator = Accelerator(log_with=[*config.log.trackers], project_config=places)
    name = folder.resolve().name
    accelerator.init_trackers(
        "unift",
        config={k: str(v) for k, v in numeric_settings(config).items()},
        init_kwargs={"wandb": {"dir": str(folder), "name": name}, "trackio": {"name": name}},
    )
    try:
        yield lambda metrics, step: accelerator.log(
            {k: v for k, v in metrics.items() if isinstance(v, (int, float)) and k != "step"}, step=step
        )
    finally:
        for tracker in accelerator.trackers:  # end_training() would also end the process group, which is not its own
            tracker.finish()
