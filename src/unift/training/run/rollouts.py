"""The groups of a step on disk, before they train: one line a group, gzipped."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from unift.files import write_atomic
from unift.training.run.checkpoint import step_name
from unift.types import Group, Sample, Score


def rollouts_path(folder: Path, step: int) -> Path:
    return folder / "rollouts" / f"{step_name(step)}.jsonl.gz"


def write_rollouts(folder: Path, step: int, weights: str, groups: list[Group], texts: list[tuple[str, str]]) -> None:
    """One line a group: ids, texts, tokens, log-probs, scores. ``weights``: fingerprint of the policy that sampled."""
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
        lines.append(json.dumps(record, ensure_ascii=False))
    path = rollouts_path(folder, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, gzip.compress("\n".join(lines).encode(), compresslevel=1, mtime=0))


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
    head, *lines = gzip.decompress(path.read_bytes()).decode().split("\n")
    groups = []
    for line in lines:
        r = json.loads(line)
        samples = [_sample(s) for s in r["samples"]]
        place = (r["row"], r["row_id"], r["prompt_tokens"], r["hint_tokens"], r["cuts"], r["cuts_total"])
        groups.append(Group(*place, samples, r.get("discarded", 0)))
    return json.loads(head)["weights"], groups
