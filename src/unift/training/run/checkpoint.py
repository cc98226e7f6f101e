"""Everything a run needs to continue bit for bit, written so that a kill at any moment leaves a complete state behind.

    run/
      config.yaml  environment.json  metrics.jsonl  result.json
      rollouts/step_000012.jsonl.gz       the groups of a step with tokens, log-probs and scores
      checkpoints/step_000012/            model/ (a plain Hugging Face folder), trainer.json, weights and optimizer in
                                          state.pt, or in shards/ where each process holds a part of them; with
                                          engine.overlap ahead.jsonl.gz, what was drawn for the next step
      checkpoints/latest  checkpoints/best   names of folders
      nonfinite/                          the batch of a step that went NaN

A file or folder gets its name only when its bytes are on disk (write to a temporary name, fsync, rename).
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unift import processes
from unift.files import publish_folder, write_atomic, writing
from unift.rows.tasks.base import is_mapping
from unift.types import UniftError

if TYPE_CHECKING:
    import torch

    from unift.model.policy import Policy


AHEAD = "ahead.jsonl.gz"  # what was drawn for the next step, in a checkpoint
DAMAGED = "delete this folder, and the same command continues from the checkpoint before it, or from the start"


def step_name(step: int) -> str:
    return f"step_{step:06d}"


def save(
    folder: Path,
    step: int,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    ahead: bytes | None = None,
) -> Path:
    """Checkpoint after ``step`` finished steps. ``state`` is JSON: data fingerprint, config hash, counters, versions.
    ``ahead``: a file of what was drawn for the next step.

    All processes call this together. The first one writes, and each its own part where the weights are sharded.
    """
    from unift.training.run import shards

    root = folder / "checkpoints"
    temporary = processes.lead("a checkpoint", lambda: _begun(root, step))
    try:
        if policy.root is not None:
            shards.write(temporary / shards.FOLDER, policy, optimizer)
        if ahead is not None and processes.first():
            with writing(f"the checkpoint of step {step}", root):
                (temporary / AHEAD).write_bytes(ahead)
        with policy.whole():
            return processes.lead("a checkpoint", lambda: _completed(temporary, root, step, policy, optimizer, state))
    except UniftError:
        if processes.first():
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _begun(root: Path, step: int) -> Path:
    temporary = root / f".{step_name(step)}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    with writing(f"the checkpoint of step {step}", root):
        temporary.mkdir(parents=True)
    return temporary


def _completed(
    temporary: Path, root: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> Path:
    """The rest of a checkpoint, and its name. The weights are whole."""
    import torch

    from unift.model.load import save_pretrained

    final = root / step_name(step)
    with writing(f"the checkpoint of step {step}", root):
        save_pretrained(policy, temporary / "model")
        if policy.root is None:
            weights = {n: p.detach() for n, p in policy.named_parameters()}
            torch.save({"weights": weights, "optimizer": optimizer.state_dict()}, temporary / "state.pt")
        (temporary / "trainer.json").write_text(json.dumps(state | {"step": step}, indent=1))
        publish_folder(temporary, final)
    write_atomic(root / "latest", final.name)
    return final


def steps_saved(folder: Path) -> list[int]:
    root = folder / "checkpoints"
    named = (p for p in root.glob("step_*") if p.name[5:].isdecimal())  # a copy under another name is not the run's
    return sorted(int(p.name[5:]) for p in named if (p / "trainer.json").is_file())


def name_best(folder: Path, step: int) -> None:
    """Let checkpoints/best name the checkpoint of this step, if there is one."""
    root = folder / "checkpoints"
    if step and (root / step_name(step)).is_dir():
        write_atomic(root / "best", step_name(step))


def counters(folder: Path, step: int) -> dict[str, Any]:
    """What the run had counted at a checkpoint."""
    where = folder / "checkpoints" / step_name(step)
    try:
        return dict(json.loads((where / "trainer.json").read_text(encoding="utf-8"))["counters"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UniftError(f"{where} cannot be read ({error!r:.100}): {DAMAGED}") from None


def restore(folder: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Load weights (and optimizer) of a checkpoint in place; returns its ``trainer.json``. Sharded or not, it may be continued
    either way. All processes call this together."""
    from unift.training.run import shards

    where = folder / "checkpoints" / step_name(step)
    parts = where / shards.FOLDER
    if not (where / "state.pt").is_file() and not parts.is_dir():
        raise UniftError(f"{where} holds no weights. Several machines need a run folder that all of them see")
    with _readable(where):
        trainer = _object(json.loads((where / "trainer.json").read_text(encoding="utf-8")))
        stored = _loaded(where / "state.pt", policy) if not parts.is_dir() else {}
        names = shards.names(parts) if parts.is_dir() else set(stored.get("weights", ()))
    if not {"counters", "scorer"} <= trainer.keys() or (stored and not {"weights", "optimizer"} <= stored.keys()):
        raise UniftError(f"{where} holds no checkpoint of this version: {DAMAGED}")
    own = dict(policy.named_parameters())
    if optimizer is None or policy.critic is None:  # a critic belongs to the phase that trained it
        own = {n: p for n, p in own.items() if not n.startswith("critic.")}
        names = {n for n in names if not n.startswith("critic.")}
    if own.keys() != names:
        raise UniftError(f"{where} was saved from another model: its parameters have other names")
    if not stored:
        with _readable(where):
            shards.read(parts, policy, optimizer, own)
        return trainer
    from unift.model.sharding import assign

    for name, p in own.items():
        assign(p, stored["weights"][name])
    if optimizer is not None and policy.root is not None:
        shards.spread(policy, optimizer, stored["optimizer"])
    elif optimizer is not None:
        optimizer.load_state_dict(stored["optimizer"])
    return trainer


def _object(found: Any) -> dict[str, Any]:
    """A JSON object; whatever else stands there has none of its keys."""
    return dict(found) if is_mapping(found) else {}


def _loaded(path: Path, policy: Policy) -> dict[str, Any]:
    import torch

    return torch.load(path, map_location=policy.device, weights_only=True)


@contextmanager
def _readable(where: Path) -> Generator[None, None, None]:
    try:
        yield
    except UniftError:
        raise
    except Exception as error:  # torch and pickle raise many kinds; all mean that the file is damaged
        raise UniftError(f"{where} cannot be read ({str(error) or repr(error):.100}): {DAMAGED}") from None


def prune(folder: Path, keep: int, also: Iterable[int]) -> None:
    """Keep the last ``keep`` checkpoints and those named in ``also`` (the best, the start of a phase)."""
    steps = steps_saved(folder)
    stay = set(steps[-keep:]) | set(also)
    for step in steps:
        if step not in stay:
            path = folder / "checkpoints" / step_name(step)
            doomed = path.with_name(f".{path.name}.old.tmp")  # a kill while deleting leaves no half checkpoint
            os.replace(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def fingerprint(policy: Policy) -> str:
    """Checksum of the trainable weights: which policy sampled a rollout. It does not depend on how they are sharded; where
    they are, all processes call this together, and the first one knows the answer."""
    import torch

    from unift.model.sharding import full

    value = 0
    for name, p in policy.named_parameters():
        whole = policy.seen(name, full(p.detach()))
        if policy.root is None or processes.first():
            value = zlib.crc32(whole.cpu().contiguous().view(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"
