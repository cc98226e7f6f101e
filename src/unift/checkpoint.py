"""Everything a run needs to continue bit for bit, written so that a kill at any moment leaves a complete state behind.

    run/
      config.yaml  environment.json  metrics.jsonl  result.json
      rollouts/step_000012.jsonl.gz       the groups of a step with tokens, log-probs and scores
      checkpoints/step_000012/            model/ (a plain Hugging Face folder), weights, optimizer, trainer.json
      checkpoints/latest  checkpoints/best   names of folders
      nonfinite/                          the batch of a step that went NaN

A file or folder gets its name only when its bytes are on disk (write to a temporary name, fsync, rename).
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from unift.types import Group, Sample, Score, UniftError

if TYPE_CHECKING:
    import torch

    from unift.policy import Policy

# ---------------------------------------------------------------------------------------------- atomic files


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
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
        _sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UniftError(
            f"could not write {path}: {error.strerror or error}. Nothing written before is lost"
        ) from error


def publish_folder(temporary: Path, final: Path) -> None:
    """fsync every file of ``temporary``, then give it its name."""
    for path in sorted(temporary.rglob("*")):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    _sync_folder(final.parent)


def clean_temporary(folder: Path) -> None:
    """Remove what a killed process left half written."""
    for path in folder.glob(".*.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


# ---------------------------------------------------------------------------------------------- checkpoints


def step_name(step: int) -> str:
    return f"step_{step:06d}"


def save(folder: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Path:
    """Checkpoint after ``step`` finished steps. ``state`` is JSON: data fingerprint, config hash, counters, versions."""
    import torch

    from unift.policy import save_pretrained

    root = folder / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    final, temporary = root / step_name(step), root / f".{step_name(step)}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writing(f"the checkpoint of step {step}", root):
            temporary.mkdir()
            save_pretrained(policy, temporary / "model")
            weights = {n: p.detach() for n, p in policy.named_parameters()}
            torch.save({"weights": weights, "optimizer": optimizer.state_dict()}, temporary / "state.pt")
            (temporary / "trainer.json").write_text(json.dumps(state | {"step": step}, indent=1))
            publish_folder(temporary, final)
    except UniftError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    write_atomic(root / "latest", final.name)
    return final


def steps_saved(folder: Path) -> list[int]:
    root = folder / "checkpoints"
    return sorted(int(p.name[5:]) for p in root.glob("step_*") if (p / "trainer.json").is_file())


def restore(folder: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Load weights (and optimizer) of a checkpoint in place; returns its ``trainer.json``."""
    import torch

    where = folder / "checkpoints" / step_name(step)
    if not (where / "state.pt").is_file():
        raise UniftError(f"{where}/state.pt is missing. Several machines need a run folder that all of them see")
    stored = torch.load(where / "state.pt", map_location=policy.device, weights_only=True)
    own = dict(policy.named_parameters())
    if optimizer is None or policy.critic is None:  # a critic belongs to the phase that trained it
        own, stored["weights"] = (
            {n: p for n, p in some.items() if not n.startswith("critic.")} for some in (own, stored["weights"])
        )
    if own.keys() != stored["weights"].keys():
        raise UniftError(f"{where} was saved from another model: its parameters have other names")
    with torch.no_grad():
        for name, value in stored["weights"].items():
            own[name].copy_(value)
    if optimizer is not None:
        optimizer.load_state_dict(stored["optimizer"])
    return json.loads((where / "trainer.json").read_text())


def prune(folder: Path, keep: int, also: Iterable[int]) -> None:
    """Keep the last ``keep`` checkpoints and those named in ``also`` (the best, the start of a phase)."""
    steps = steps_saved(folder)
    kept = set(steps[-keep:]) | set(also)
    for step in steps:
        if step not in kept:
            path = folder / "checkpoints" / step_name(step)
            doomed = path.with_name(f".{path.name}.old.tmp")  # a kill while deleting leaves no half checkpoint
            os.replace(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def fingerprint(policy: Policy) -> str:
    """Checksum of the trainable weights: which policy sampled a rollout."""
    import torch

    value = 0
    for p in policy.parameters():
        value = zlib.crc32(p.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


# ---------------------------------------------------------------------------------------------- rollouts


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
