"""Runs in processes of their own, several side by side: started, watched, ended with this process, read when they are done."""

from __future__ import annotations

import atexit
import hashlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from unift.commands.compare.table import Result
from unift.files import feed, files_of
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
    on a begun folder it continues. ``inputs``: files and folders that it names, whose content decides the result, too."""

    method: str
    seed: int
    folder: Path
    command: list[str]
    inputs: Sequence[str] = ()


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
    return Job(name or method, seed, own, [*start, *settings, f"seed={seed}", "threads=1"], _named_files(settings))


def _named_files(settings: Sequence[str]) -> list[str]:
    """Rows, and the reward where it is a file's function."""
    from unift.config.identity import flat
    from unift.config.resolve import parse_overrides

    found = flat(parse_overrides(settings))
    names = [found.get("data.train"), found.get("data.test"), str(found.get("reward.function")).rpartition(":")[0]]
    return [name for name in names if isinstance(name, str) and Path(name).expanduser().is_file()]


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

    A run that this very command finished before, on the same inputs, is read from its folder. A failure does not stop the
    others; when all are through, RunsFailed names the failed ones with the last lines of their logs.
    Interrupted, or once ``stop`` is set, it ends the processes and raises KeyboardInterrupt.
    """
    results: dict[int, Result] = {}
    failed: list[str] = []
    running: dict[int, tuple[subprocess.Popen[bytes], int]] = {}
    asked: dict[int, Any] = {}
    waiting = list(range(len(jobs)))

    def ended(number: int, text: str) -> None:
        say(f"[{len(results) + len(failed)}/{len(jobs)}] {jobs[number].method} seed {jobs[number].seed}: {text}")

    try:
        while waiting or running:
            if stop is not None and stop.is_set():
                raise KeyboardInterrupt
            while waiting and len(running) < max(workers, 1):
                number = waiting.pop(0)
                asked[number] = _asked(jobs[number])  # as the inputs are now
                finished = _finished(jobs[number], asked[number])
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
                    (jobs[number].folder / COMMAND).write_text(json.dumps(asked[number]))
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


def _asked(job: Job) -> Any:
    """What brings the result: the command, and the content of its inputs."""
    if not job.inputs:
        return job.command
    return {"command": job.command, "inputs": {name: _content(Path(name).expanduser()) for name in job.inputs}}


def _content(place: Path) -> str:
    facts = [(p, s.st_size, s.st_mtime_ns) for p in files_of(place) if p.is_file() and (s := p.stat())]
    return " ".join(f"{path.name}:{_digest(path, size, at)}" for path, size, at in facts)


@lru_cache(maxsize=256)  # every run of a comparison names the same files
def _digest(path: Path, size: int, changed: int) -> str:
    digest = hashlib.sha256()
    feed(digest.update, path)
    return digest.hexdigest()[:16]


def _finished(job: Job, asked: Any) -> Result | None:
    """The result, if what is ``asked`` brought it. Otherwise ``train`` itself must judge whether the folder fits."""
    try:
        same = json.loads((job.folder / COMMAND).read_text()) == asked
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
