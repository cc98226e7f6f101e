"""Runs in processes of their own, several side by side: started, watched, ended with this process, read when they are done."""

from __future__ import annotations

import atexit
import json
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

from unift.commands.compare.table import Result
from unift.processes import END_SECONDS, child_environment
from unift.types import UniftError

ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
COMMAND = ".command.json"  # what brought the result of a folder; a dot file, since `train` minds foreign files


class RunsFailed(UniftError):
    """Some runs failed; ``results`` has those of the others."""

    def __init__(self, text: str, results: list[Result]) -> None:
        super().__init__(text)
        self.results = results


@dataclass(frozen=True)
class Job:
    """One run. ``method``: its name in messages and results. ``command`` leaves ``result.json`` in ``folder`` and exits with 0;
    on a begun folder it continues."""

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
    return Job(name or method, seed, own, [*start, *settings, f"seed={seed}", "threads=1"])


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
                result = _named(jobs[number], _read(jobs[number].folder))
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
    return _named(job, _read(job.folder)) if same else None


def _named(job: Job, result: Result | None) -> Result | None:
    """The result under the job's name, which tells apart runs of one method with other settings."""
    return None if result is None else result | {"method": job.method}


def _failure(job: Job, code: int, offset: int) -> str:
    tail = (job.folder / "log.txt").read_bytes()[offset:].decode(errors="replace").strip().splitlines()[-5:]
    why = f"exit code {code}" if code else "exit code 0, but no result.json"
    lines = [f"{job.method} seed {job.seed} ({why}), {job.folder / 'log.txt'} ends with:", *(tail or ["(nothing)"])]
    return "\n    ".join(lines)


def _outcome(result: Result) -> str:
    accuracy = f"{100 * result['test']['accuracy']:.1f} % held-out, " if result.get("test") else ""
    return f"{accuracy}{result['seconds']:.0f} s"
