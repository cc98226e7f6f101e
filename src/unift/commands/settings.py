"""From what a caller says to a run: layers of settings, the run folder, quiet libraries, a display. No torch at import."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from unift import processes
from unift.config import hub
from unift.config.identity import config_hash, flat
from unift.config.packaged import recipe_text
from unift.config.resolve import beside, dotted, nested, read_yaml, resolve
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
    rows: Sequence[Row] = (),
) -> Config:
    """Settings of a run from their layers: preset, recipe, file (or mapping), ``settings`` by dotted names.

    Without rows, model, recipe and file, the embedded demo's. rows: training rows that were handed over from Python.
    """
    over = nested(settings or {})
    file = config if isinstance(config, Mapping) else beside(read_yaml(config), Path(config), over) if config else {}
    file = of_recipes_task(recipe, file, over, rows)
    return resolve(method, recipe=DEMO if is_demo(config, recipe, over) else recipe, file=file, overrides=over)


def of_recipes_task(
    recipe: str | None, file: Mapping[str, Any], over: Mapping[str, Any], rows: Sequence[Row] = ()
) -> Mapping[str, Any]:
    """The file's settings, with the recipe's model where rows of one's own pose the recipe's own task: all that it knows. Rows
    of another task need another model, and are left to `config.checks.check_model`.

    rows: those that were handed over. Of a file the first row tells: one of another task has letters that the model lacks.
    Raises DataError for a file that cannot be read.
    """
    user = flat(file) | flat(over)
    source = user.get("data.train")
    if recipe is None or not source or user.get("model.path"):
        return file
    if not rows and source != HANDED and not str(source).startswith("hf:"):
        from unift.rows.readers import read_rows

        rows = read_rows(str(source), format=str(user.get("data.format", "auto")), limit=1, need_steps=False)
    packaged = yaml.safe_load(recipe_text(recipe))
    if not rows or any(row.task != packaged["data"]["task"] for row in rows):
        return file
    section = file.get("model")
    return {**file, "model": {**(section if isinstance(section, Mapping) else {}), **packaged["model"]}}


def by_hand(config: str | Path | Mapping[str, Any] | None, words: Sequence[str]) -> dict[str, Any]:
    """What a file and ``key=value`` words set, nested."""
    file = config if isinstance(config, Mapping) else read_yaml(config) if config else {}
    return nested(flat(file) | dotted(words))


def is_demo(config: Any, recipe: str | None, over: Mapping[str, Any]) -> bool:
    """Without rows and model of one's own, the embedded task and base are used."""
    return config is None and recipe is None and not (over.keys() & {"data", "model"})


def folder_of(config: Config, run: str | Path | None) -> Path:
    if run is not None or config.run:
        return Path(run or str(config.run))
    return Path("runs") / f"{config.method}-{config_hash(config)}"


def trained(folder: Path) -> dict[str, Any]:
    """Settings of ``model`` that read what a finished run has saved: whole weights in their own dtype, whatever it began from."""
    return {"path": str(folder / "model"), "lora": None, "gguf": None, "quantize": None}


def quiet_libraries(config: Config | None = None) -> None:
    """Nothing asks the Hub but for what the settings name there: rows (``data.train``, ``data.test``), or a model that the Hub's
    cache lacks (`folder.locate`)."""
    if config is None or not any(str(name).startswith("hf:") for name in (config.data.train, config.data.test)):
        hub.forbid()
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
