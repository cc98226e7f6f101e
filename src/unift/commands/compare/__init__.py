"""Several methods, several seeds, one task: runs in processes of their own, a table with intervals, a plot, a reading."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unift.commands.compare.table import Result, by_method, reading, table
from unift.processes import END_SECONDS, child_environment
from unift.types import ConfigError, UniftError

ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
COMMAND = ".command.json"  # what brought the result of a folder; a dot file, since `train` minds foreign files


class RunsFailed(UniftError):
    """Some runs failed; ``results`` has those of the others."""

    def __init__(self, text: str, results: list[Result]) -> None:
        super().__init__(text)
        self.results = results


@dataclass(frozen=True)
class Job:
    """One run. ``command`` leaves ``result.json`` in ``folder`` and exits with 0; on a begun folder it continues."""

    method: str
    seed: int
    folder: Path
    command: list[str]


def train_job(method: str, seed: int, recipe: str | None, folder: Path, settings: Sequence[str], name: str = "") -> Job:
    """``unift train`` of one run with one thread, in the folder's ``<method>-seed<seed>`` or ``<name>-seed<seed>``."""
    own = folder / f"{name or method}-seed{seed}"
    start = [
        sys.executable,
        "-m",
        "unift",
        "train",
        "--quiet",
        *(["--recipe", recipe] if recipe else []),
        "--method",
        method,
        "--run",
        str(own),
    ]
    return Job(method, seed, own, [*start, *settings, f"seed={seed}", "threads=1"])


# ---------------------------------------------------------------------------------------------- running


@contextmanager
def on_signals(handler: Callable[[int, Any], Any]) -> Generator[None, None, None]:
    """SIGTERM and SIGINT call ``handler`` instead of ending this process, which would leave its children running."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    names = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) is not signal.SIG_IGN]  # as under nohup
    before = {n: signal.signal(n, handler) for n in names}
    try:
        yield
    finally:
        for n, old in before.items():
            signal.signal(n, old)


def end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """SIGTERM, and SIGKILL for those that are still there after END_SECONDS."""
    for child in children:
        child.terminate()
    until = time.monotonic() + END_SECONDS
    for child in children:
        try:
            child.wait(max(until - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def run_many(
    jobs: Sequence[Job],
    workers: int,
    say: Callable[[str], None] = lambda text: None,
    stop: threading.Event | None = None,
) -> list[Result]:
    """Results in the order of the jobs, ``workers`` processes side by side; each writes ``log.txt`` in its folder.

    A run that this very command finished before is read from its folder. A failure does not stop the others; when all
    are through, RunsFailed names the failed ones with the last lines of their logs.
    Interrupted, or once ``stop`` is set, it ends the processes and raises KeyboardInterrupt.
    """
    results: dict[int, Result] = {}
    failed: list[str] = []
    running: dict[int, tuple[subprocess.Popen[bytes], int]] = {}
    waiting = list(range(len(jobs)))

    def ended(number: int, text: str) -> None:
        say(f"[{len(results) + len(failed)}/{len(jobs)}] {jobs[number].method} seed {jobs[number].seed}: {text}")

    try:
        while waiting or running:
            if stop is not None and stop.is_set():
                raise KeyboardInterrupt
            while waiting and len(running) < max(workers, 1):
                number = waiting.pop(0)
                finished = _finished(jobs[number])
                if finished is None:
                    running[number] = _start(jobs[number])
                else:
                    results[number] = finished
                    ended(number, f"{_outcome(finished)} (finished before)")
            for number, (process, offset) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[number]
                atexit.unregister(process.terminate)
                result = _read(jobs[number].folder)
                if process.returncode == 0 and result is not None:
                    results[number] = result
                    # Only now: a command that `train` refused must not pass for the one that brought the result.
                    (jobs[number].folder / COMMAND).write_text(json.dumps(jobs[number].command))
                    ended(number, _outcome(result))
                else:
                    failed.append(_failure(jobs[number], process.returncode, offset))
                    ended(number, f"failed (exit code {process.returncode})")
            time.sleep(0.05)
    finally:
        end([process for process, _ in running.values()])
    if failed:
        raise RunsFailed(
            f"{len(failed)} of {len(jobs)} runs failed; the others are kept. Mend the cause and repeat the command: "
            "it runs only what is missing\n  " + "\n  ".join(failed),
            [results[number] for number in sorted(results)],
        )
    return [results[number] for number in range(len(jobs))]


def _start(job: Job) -> tuple[subprocess.Popen[bytes], int]:
    """The process, and where its part of the log begins."""
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        with open(job.folder / "log.txt", "ab") as log:
            offset = log.tell()
            environment = child_environment() | ONE_THREAD
            process = subprocess.Popen(job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
    except OSError as error:
        raise UniftError(f"cannot start {job.method} seed {job.seed} in {job.folder}: {error}") from error
    atexit.register(process.terminate)  # run_many may be in a thread that dies with the interpreter
    return process, offset


def _read(folder: Path) -> Result | None:
    """result.json, with the number of training completions added from the run's settings where it lacks it."""
    from unift.config.resolve import read_yaml, validate
    from unift.config.stages import stages
    from unift.training.run import read_result

    try:
        result = read_result(folder)
    except UniftError:  # damaged is not finished: `train` says so when the run is started again
        return None
    if result is not None and "completions" not in result and (folder / "config.yaml").is_file():
        found = stages(validate(read_yaml(folder / "config.yaml")))
        result["completions"] = sum(s.total * s.rules.train.prompts * s.rules.sample.completions for s in found)
    return result


def _finished(job: Job) -> Result | None:
    """The result, if this very command brought it. Otherwise ``train`` itself must judge whether the folder fits."""
    try:
        same = json.loads((job.folder / COMMAND).read_text()) == job.command
    except (OSError, json.JSONDecodeError):
        return None
    return _read(job.folder) if same else None


def _failure(job: Job, code: int, offset: int) -> str:
    tail = (job.folder / "log.txt").read_bytes()[offset:].decode(errors="replace").strip().splitlines()[-5:]
    why = f"exit code {code}" if code else "exit code 0, but no result.json"
    lines = [f"{job.method} seed {job.seed} ({why}), {job.folder / 'log.txt'} ends with:", *(tail or ["(nothing)"])]
    return "\n    ".join(lines)


def _outcome(result: Result) -> str:
    accuracy = f"{100 * result['test']['accuracy']:.1f} % held-out, " if result.get("test") else ""
    return f"{accuracy}{result['seconds']:.0f} s"


@dataclass(frozen=True)
class Plan:
    """A comparison. ``settings``: key=value words for every run. ``budget``: "sampled=2M", "trained=2M" or "seconds=60"."""

    methods: Sequence[str]
    seeds: int
    recipe: str | None
    folder: Path
    settings: Sequence[str] = ()
    workers: int = 2
    budget: str | None = None


def compare_methods(plan: Plan) -> tuple[str, list[Result]]:
    """The whole comparison; returns (table, reading and the path of the plot as text; results). Settings are checked first.
    If some runs fail, the table of the others is printed before RunsFailed is raised.

    With a budget, every method's steps are chosen so that one run uses it up (``budget.py``).
    """
    from unift.commands.compare import budget as budgets
    from unift.commands.settings import of_recipes_task
    from unift.config.packaged import preset_names
    from unift.config.resolve import parse_overrides, resolve

    recipe, folder, settings, workers, seeds = plan.recipe, plan.folder, plan.settings, plan.workers, plan.seeds
    limit = budgets.parse(plan.budget) if plan.budget else None
    methods = list(dict.fromkeys(m.strip() for m in plan.methods if m.strip()))
    methods = preset_names() if methods == ["all"] else methods
    if not methods or seeds < 1:
        raise ConfigError(
            f"nothing to compare: found methods {methods} and seeds={seeds}; name a method, 1 seed or more"
        )
    over = parse_overrides(settings)
    if limit and "steps" in over.get("train", {}):
        raise ConfigError("--budget chooses train.steps, which is also set; keep one")
    own: dict[str, list[str]] = {}  # settings of a method
    file = of_recipes_task(recipe, {}, over)
    configs = {m: resolve(m, recipe=recipe, file=file, overrides=over) for m in methods}
    for config in configs.values():
        if not (config.data.task or config.data.test):
            raise ConfigError("a comparison needs held-out rows: set data.test=FILE")
    stop = threading.Event()  # not an exception: that could fall between the birth of a child and its being known

    def say(text: str) -> None:
        print(text, flush=True)

    with on_signals(lambda number, frame: stop.set()):
        if limit:
            probes = [
                train_job(m, 0, recipe, folder / budgets.FOLDER, budgets.probe(settings, configs[m])) for m in methods
            ]
            costs = run_many(probes, workers, lambda text: say(f"probe {text}"), stop)
            for method, cost in zip(methods, costs, strict=True):
                own[method] = budgets.spend(limit, cost, configs[method])
        jobs = [
            train_job(m, seed, recipe, folder, [*settings, *own.get(m, [])]) for seed in range(seeds) for m in methods
        ]
        failure = None
        try:
            results = run_many(jobs, workers, say, stop)
        except RunsFailed as error:
            results, failure = error.results, error
            if not results:
                raise
    notes = (
        [f"**Not complete: {len(jobs) - len(results)} of {len(jobs)} runs failed and are missing here.**"]
        if failure
        else []
    )
    notes += [budgets.note(limit, results)] if limit else []
    plot = write_report(folder, results, notes)
    places = [f"plot: {plot}", f"folder: {folder}  (as a page: unift report {folder})"]
    text = "\n".join([table(results), "", *notes, *reading(results), "", *places])
    if failure:
        say(text)
        raise failure
    return text, results


# ---------------------------------------------------------------------------------------------- files


def write_report(folder: Path, results: Sequence[Result], notes: Sequence[str] = ()) -> Path:
    """compare.json, table.md and curves.png in the folder; returns the path of the picture.

    Curves come from ``metrics.jsonl`` of ``<method>-seed<seed>``; a run without one is in the table only.
    """
    from unift.commands.compare.plots import curves
    from unift.files import write_atomic
    from unift.training.run.metrics import read_metrics

    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "compare.json", json.dumps(list(results), indent=1))
    write_atomic(folder / "table.md", "\n".join([table(results), "", *notes, *reading(results), ""]))
    runs = {
        method: [read_metrics(folder / f"{method}-seed{r['seed']}" / "metrics.jsonl") for r in group]
        for method, group in by_method(results).items()
    }
    path = folder / "curves.png"
    temporary = path.with_name(".curves.png")
    curves(runs, temporary, "Same base, same rows: mean and range over seeds")
    os.replace(temporary, path)
    return path
