"""What an evaluation of a suite has earned so far: one line a row, written as it is earned, read again after a kill.

OUT/
  settings.json             what decides the numbers; another evaluation is refused
  records/<column>.jsonl    a row's answers with verdicts, one line a row
  result.json  table.md     when all rows are judged
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unift.files import write_atomic
from unift.rows.tasks.base import is_mapping
from unift.types import ConfigError, Sample, UniftError

SETTINGS = "settings.json"


def answer(sample: Sample, outcome: Any) -> dict[str, Any]:
    """One answer as it is kept. A failed scorer is no right answer; what it said is kept."""
    score = outcome if hasattr(outcome, "value") else None
    kept: dict[str, Any] = {"text": sample.text, "tokens": len(sample.tokens), "finished": sample.finished}
    kept["right"] = bool(score is not None and score.right)
    if score is None:
        return kept | {"error": str(outcome)}
    no_answer = score.parts.get("no_answer")
    return kept | ({"note": score.note} if score.note else {}) | ({"no_answer": True} if no_answer else {})


def open_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Begin, or check that the folder holds this very evaluation. ConfigError names what differs."""
    path = folder / SETTINGS
    (folder / "records").mkdir(parents=True, exist_ok=True)
    wanted = json.loads(json.dumps(settings))
    if not path.is_file():
        write_atomic(path, json.dumps(wanted, indent=1))
        return
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UniftError(f"{path} cannot be read ({error}). Name another folder with --out") from None
    known: dict[str, Any] = dict(stored) if is_mapping(stored) else {}
    changed = [
        f"{name}: {known.get(name)!r} -> {wanted.get(name)!r}"
        for name in sorted(known.keys() | wanted.keys())
        if known.get(name) != wanted.get(name)
    ]
    if changed:
        raise ConfigError(
            f"{folder} holds another evaluation:\n  " + "\n  ".join(changed) + "\nName another folder with --out"
        )


def path_of(folder: Path, column: str) -> Path:
    return folder / "records" / f"{column}.jsonl"


def append(folder: Path, column: str, records: Sequence[Mapping[str, Any]]) -> None:
    """On disk when this returns."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    try:
        with open(path_of(folder, column), "ab") as handle:
            handle.write(text.encode("utf-8", "surrogatepass"))
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        raise UniftError(
            f"could not write {path_of(folder, column)}: {error.strerror or error}. Nothing written before is lost; free "
            "space and run the same command again"
        ) from error


def read(folder: Path, column: str) -> dict[str, dict[str, Any]]:
    """Records by the key of their row. What a kill tore off the end is cut off the file, so that new lines begin anew."""
    path = path_of(folder, column)
    if not path.is_file():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        write_atomic(path, whole)
    found: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line.decode("utf-8", "surrogatepass"))
            found[record["key"]] = record
        except (ValueError, KeyError, TypeError) as error:
            raise UniftError(
                f"{path}, line {number} is no record of a row ({type(error).__name__}: {error}). Delete the line: its row "
                "is judged again"
            ) from None
    return found
