"""``unift train`` with its defaults: UFT with a live display, its baselines beside it, and what came out, in plain words."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

from unift.commands.compare import write_report
from unift.commands.compare.jobs import END_SECONDS, on_signals, run_many, train_job
from unift.commands.compare.table import reading, table
from unift.commands.display import Live
from unift.config.sections import Config
from unift.training.loop import train
from unift.types import UniftError


def run_demo(config: Config, folder: Path, settings: list[str], recipe: str) -> None:
    """Train ``config`` here and ``config.baselines`` in processes of their own; print table, reading, plot and folder."""
    own = folder / f"{config.method}-seed{config.seed}"
    print(
        f"unift demo: {config.method} on the task {config.data.task!r}, {config.data.train_rows} solved rows, embedded base."
    )
    print(f"Beside it, on the other core: {', '.join(config.baselines) or 'nothing'}. Run folder: {folder}", flush=True)
    jobs = [train_job(m, config.seed, recipe, folder, settings) for m in config.baselines]
    others: list[dict[str, Any]] = []
    failures: list[str] = []
    stop = threading.Event()

    def baselines() -> None:
        for job in jobs:  # one by one: a baseline that fails does not take the finished ones with it
            try:
                others.extend(run_many([job], 1, stop=stop))
            except KeyboardInterrupt:
                return
            except UniftError as error:
                failures.append(str(error))

    worker = threading.Thread(target=baselines, daemon=True)
    try:
        with on_signals(signal.default_int_handler):  # raises KeyboardInterrupt
            worker.start()
            with Live() as display:
                result = train(config.model_copy(update={"threads": 1}), own, display.update, watch=display.watch)
            if worker.is_alive():
                print(f"{config.method} is done; waiting for the baselines ...", flush=True)
            worker.join()
    except BaseException:
        stop.set()  # the thread ends its process
        worker.join(2 * END_SECONDS)
        raise
    for failure in failures:
        print(f"error: {failure}", flush=True)
    results = [*others, result]
    plot = write_report(folder, results)
    print("\n" + table(results))
    print(
        "\n".join(
            ["", *reading(results), "", f"plot: {plot}", f"run folder: {folder}  (as a page: unift report {folder})"]
        )
    )
