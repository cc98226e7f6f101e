"""From what a caller says to a run: layers of settings, the run folder, quiet libraries, a display. No torch at import."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from unift import processes
from unift.config.identity import config_hash
from unift.config.resolve import beside, nested, read_yaml, resolve
from unift.config.sections import Config
from unift.types import HANDED, Given, Row, Stopped

OnStep = Callable[[int, dict[str, Any]], Any]
DEMO = "lock"
BASE = "base"  # folder in the run folder: a model that was handed over from Python


def handed(what: str = "") -> str:
    """The setting that stands for a thing handed over from Python."""
    return f"{HANDED}:{what}" if what else HANDED


def resolved(
    method: str | None = None,
    *,
    recipe: str | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Config:
    """Settings of a run from their layers: preset, recipe, file (or mapping), ``settings`` by dotted names.

    Without rows, model, recipe and file, the embedded demo's.
    """
    over = nested(settings or {})
    file = config if isinstance(config, Mapping) else beside(read_yaml(config), Path(config), over) if config else {}
    return resolve(method, recipe=DEMO if is_demo(config, recipe, over) else recipe, file=file, overrides=over)


def is_demo(config: Any, recipe: str | None, over: Mapping[str, Any]) -> bool:
    """Without rows and model of one's own, the embedded task and base are used."""
    return config is None and recipe is None and not (over.keys() & {"data", "model"})


def folder_of(config: Config, run: str | Path | None) -> Path:
    if run is not None or config.run:
        return Path(run or str(config.run))
    return Path("runs") / f"{config.method}-{config_hash(config)}"


def quiet_libraries(config: Config | None = None) -> None:
    """Models are local, so nothing asks the hub, unless rows (``data.train``, ``data.test``) come from it."""
    if config is None or not any(str(name).startswith("hf:") for name in (config.data.train, config.data.test)):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # the bar of a GGUF file's conversion
    from transformers.utils import logging

    logging.disable_progress_bar()


def run_training(
    config: Config, folder: Path, given: Given | None = None, on_step: OnStep | None = None, quiet: bool = False
) -> dict[str, Any] | None:
    """Train with a display; the result, or None if the run was asked to stop: it is saved then, and a line says so."""
    quiet_libraries(config)
    from unift.commands.display import Live, Quiet
    from unift.training.loop import train

    quiet = quiet or not processes.first()
    with Quiet() if quiet else Live() as display:

        def report(metrics: dict[str, Any], total: int) -> Any:
            display.update(metrics, total)
            return on_step(metrics["step"], metrics) if on_step is not None and metrics["step"] > 0 else None

        try:
            return train(config, folder, report, given, display.watch)
        except Stopped as stop:
            if not quiet:
                print(f"{stop}; the same call continues", flush=True)
            return None


def rows_in_file(source: Any, path: Path, load: Callable[[Any], list[Row]]) -> Path:
    """The path of rows that processes can read: ``source`` itself, or a file that they are written to."""
    if isinstance(source, (str, Path)):
        return Path(source)
    from unift.rows.inspect import write_rows

    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(load(source), path)
    return path
