"""Files and folders that get their name only when their bytes are on disk: written to a temporary name, synced, renamed. And
the content of what is there, for digests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from unift.types import UniftError


def sync(path: Path) -> None:
    """Have the bytes of a file, or the names in a folder, on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def writing(what: str, folder: Path) -> Generator[None, None, None]:
    """A failed write becomes one clear error. torch and safetensors report a full disk by error types of their own."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        with suppress(OSError):
            free = shutil.disk_usage(folder).free / 2**20
            error = f"{error}; {free:,.1f} MiB are free there"
        raise UniftError(
            f"could not write {what} in {folder}: {error}. Free space and run the same command again: it continues from "
            "the last complete checkpoint"
        ) from None


def write_atomic(path: Path, data: bytes | str) -> None:
    """The file holds either its old content or all of the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as handle:
            handle.write(data.encode() if isinstance(data, str) else data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UniftError(
            f"could not write {path}: {error.strerror or error}. Nothing written before is lost"
        ) from error


def files_of(place: Path) -> list[Path]:
    """The file, or all files of the folder, in a fixed order."""
    return sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place]


def feed(update: Callable[[bytes], object], path: Path) -> int:
    """Hand the content of a file of any size to a digest's ``update``, part by part; the bytes that it was."""
    with path.open("rb") as file:
        while part := file.read(2**20):
            update(part)
        return file.tell()


def publish_folder(temporary: Path, final: Path, over: bool = True) -> None:
    """fsync every file of ``temporary``, then give it its name. over: what has that name is replaced; else OSError."""
    for path in sorted(temporary.rglob("*")):
        if path.is_file():
            sync(path)
    if over and final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)  # of a folder onto one that is not empty: an error
    sync(final.parent)


def clean_temporary(folder: Path) -> None:
    """Remove what a killed process left half written."""
    for path in folder.glob(".*.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
