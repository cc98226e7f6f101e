"""The groups of a step on disk, before they train: one line a group, gzipped."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unift.files import write_atomic
from unift.rows.pictures import thumbnail
from unift.training.run.checkpoint import step_name
from unift.types import Group, Picture, Sample, Score, UniftError

PICTURES, EDGE = "pictures", 192  # folder of small copies, and their longest side in pixels
# What damaged files raise: gzip, text, JSON and then a missing or odd field.
UNREADABLE = (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, RecursionError)


def rollouts_path(folder: Path, step: int) -> Path:
    return folder / "rollouts" / f"{step_name(step)}.jsonl.gz"


def write_rollouts(
    folder: Path,
    step: int,
    weights: str,
    groups: list[Group],
    texts: list[tuple[str, str]],
    shown: Sequence[Sequence[Picture]] = (),
) -> None:
    """``shown``: the pictures of each group's prompt, of which the run keeps a small copy."""
    path = rollouts_path(folder, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [[_kept(folder, found) for found in own] for own in shown]
    write_atomic(path, encoded(step, weights, groups, texts, kept))


def encoded(
    step: int,
    weights: str,
    groups: list[Group],
    texts: list[tuple[str, str]],
    pictures: Sequence[Sequence[str]] = (),
) -> bytes:
    """One line a group: ids, texts (prompt, hint), tokens, log-probs, scores. ``weights``: fingerprint of the policy that
    sampled. ``pictures``: of each group, names of small copies."""
    lines = [json.dumps({"step": step, "weights": weights, "groups": len(groups)})]
    for group, (prompt, hint) in zip(groups, texts, strict=True):
        record = {
            "row": group.row,
            "row_id": group.row_id,
            "cuts": group.cuts,
            "cuts_total": group.cuts_total,
            "prompt": prompt,
            "hint": hint,
            "prompt_tokens": group.prompt,
            "hint_tokens": group.hint,
            "discarded": group.discarded,
            "samples": [_sample_record(s) for s in group.samples],
        }
        if not group.solved:
            record["solved"] = False
        if pictures and pictures[len(lines) - 1]:
            record["pictures"] = list(pictures[len(lines) - 1])
        lines.append(json.dumps(record, ensure_ascii=False))
    return gzip.compress("\n".join(lines).encode(), compresslevel=1, mtime=0)


def _kept(folder: Path, found: Picture) -> str:
    """The name of a picture's small copy in the run folder, which is made once."""
    name = f"{found.digest[:20]}.png"
    path = folder / PICTURES / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, thumbnail(found, EDGE))
    return name


def _sample_record(s: Sample) -> dict[str, Any]:
    score = s.score and {
        "value": s.score.value,
        "correct": s.score.correct,
        "parts": dict(s.score.parts),
        "note": s.score.note,
    }
    return {
        "completion": s.text,
        "tokens": s.tokens,
        "logps": s.logps,
        "finished": s.finished,
        "score": score,
        "error": s.error,
        "given": s.given,
    }


def _sample(s: dict[str, Any]) -> Sample:
    score = s["score"] and Score(**s["score"])
    return Sample(s["tokens"], s["logps"], s["finished"], s["completion"], score, s["error"], s.get("given", 0))


def read_rollouts(folder: Path, step: int) -> tuple[str, list[Group]] | None:
    """(fingerprint of the sampling weights, groups) of a step, or None if none were stored."""
    path = rollouts_path(folder, step)
    if not path.is_file():
        return None
    return read(path, "delete it, and the step is sampled again, to the same numbers")


def read(path: Path, todo: str) -> tuple[str, list[Group]]:
    """(fingerprint, groups) of a file. UniftError with what to do where it is damaged."""
    try:
        head, *records = read_records(path)
        return head["weights"], [_group(record) for record in records]
    except UNREADABLE as error:
        raise UniftError(f"{path} cannot be read ({error!r}): {todo}") from None


def read_records(path: Path) -> list[Any]:
    """The head of a file of rollouts and its groups as they are stored. Raises one of UNREADABLE."""
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().split("\n")]


def _group(r: dict[str, Any]) -> Group:
    samples = [_sample(s) for s in r["samples"]]
    place = (r["row"], r["row_id"], r["prompt_tokens"], r["hint_tokens"], r["cuts"], r["cuts_total"])
    return Group(*place, samples, r.get("discarded", 0), solved=r.get("solved", True))
