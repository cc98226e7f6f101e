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

import json
import os
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unift.files import publish_folder, write_atomic, writing
from unift.types import UniftError

if TYPE_CHECKING:
    import torch

    from unift.model.policy import Policy


_DAMAGED = "delete this folder, and the same command continues from the checkpoint before it, or from the start"


def step_name(step: int) -> str:
    return f"step_{step:06d}"


def save(folder: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Path:
    """Checkpoint after ``step`` finished steps. ``state`` is JSON: data fingerprint, config hash, counters, versions."""
    import torch

    from unift.model.load import save_pretrained

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


def counters(folder: Path, step: int) -> dict[str, Any]:
    """What the run had counted at a checkpoint."""
    where = folder / "checkpoints" / step_name(step)
    try:
        return dict(json.loads((where / "trainer.json").read_text(encoding="utf-8"))["counters"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UniftError(f"{where} cannot be read ({error!r:.100}): {_DAMAGED}") from None


def restore(folder: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Load weights (and optimizer) of a checkpoint in place; returns its ``trainer.json``."""
    import torch

    where = folder / "checkpoints" / step_name(step)
    if not (where / "state.pt").is_file():
        raise UniftError(f"{where}/state.pt is missing. Several machines need a run folder that all of them see")
    try:
        stored = torch.load(where / "state.pt", map_location=policy.device, weights_only=True)
        trainer = json.loads((where / "trainer.json").read_text(encoding="utf-8"))
        known = {"counters", "scorer"} <= trainer.keys() and {"weights", "optimizer"} <= stored.keys()
    except Exception as error:  # torch and pickle raise many kinds; all mean that the file is damaged
        raise UniftError(f"{where} cannot be read ({str(error) or repr(error):.100}): {_DAMAGED}") from None
    if not known:
        raise UniftError(f"{where} holds no checkpoint of this version: {_DAMAGED}")
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
    return trainer


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
    """Checksum of the trainable weights: which policy sampled a rollout."""
    import torch

    value = 0
    for p in policy.parameters():
        value = zlib.crc32(p.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"
