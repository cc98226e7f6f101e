"""Weights as a server reads them: one safetensors file under the model's own names, adapters merged, embeddings and head untied.

A server that was told that the two are tied leaves the old head in place when it reloads, with no more than a warning. So it
is started from a folder that says that they are not, and every file of weights holds the head under its own name.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unift.files import publish_folder, writing
from unift.model import lora, sharding
from unift.model.load import save_pretrained
from unift.model.policy import Policy
from unift.types import ConfigError

TIED = "tie_word_embeddings"
MARK = "unift-served.txt"  # in a folder that may be replaced


def state(policy: Policy) -> dict[str, Tensor]:
    """Every weight under the name that a saved model has it by (a model in memory may call and cut them otherwise), also those
    that share memory; adapters merged unless they are switched off. Sharded weights are whole by then (`Policy.whole`)."""
    from transformers.core_model_loading import revert_weight_conversion

    found = lora.merged_state(policy.base) if policy.lora else sharding.state(policy.base)
    return revert_weight_conversion(policy.base, found)


@torch.no_grad()
def write(weights: Mapping[str, Tensor], folder: Path) -> None:
    """``folder`` with these weights and nothing else; it appears whole."""
    from safetensors.torch import save_file

    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with writing("the weights for the server", folder.parent):
        temporary.mkdir(parents=True)
        # A copy of each: the file takes no memory that two names share.
        own = {
            name: w.detach().to("cpu", torch.float32 if w.dtype == torch.float64 else w.dtype, copy=True).contiguous()
            for name, w in weights.items()
        }
        save_file(own, str(temporary / "model.safetensors"), metadata={"format": "pt"})
        publish_folder(temporary, folder)


def check_place(folder: Path) -> None:
    """ConfigError where `write_model` would remove what it has not written."""
    found = folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).is_file()
    if found or (folder.exists() and not folder.is_dir()):
        raise ConfigError(
            f"{folder} holds files that are no served model, and the model for the server replaces the whole folder. Name a new "
            "or an empty folder (unift serve --folder)"
        )


def write_model(policy: Policy, folder: Path) -> None:
    """A model folder to start a server from: that of `save_pretrained`, with embeddings and head untied. It appears whole, in
    place of an earlier one; ConfigError where the folder holds something else."""
    check_place(folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    with writing("the model for the server", folder.parent):
        save_pretrained(policy, temporary)
        path = temporary / "config.json"
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for part in (settings, settings.get("text_config")):
            if isinstance(part, dict):
                part[TIED] = False
        path.write_text(json.dumps(settings, indent=2), encoding="utf-8")
        for old in (*temporary.glob("*.safetensors"), *temporary.glob("*.safetensors.index.json")):
            old.unlink()
        write(state(policy), temporary / "weights")
        (temporary / "weights" / "model.safetensors").rename(temporary / "model.safetensors")
        (temporary / "weights").rmdir()
        (temporary / MARK).write_text("Written by unift serve, which may replace this folder.\n", encoding="utf-8")
        publish_folder(temporary, folder)


def tied(folder: str) -> bool:
    """Does the config of this folder, where it can be seen from here, say that embeddings and head are one?"""
    try:
        settings = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        return bool(settings.get(TIED, False))
    except (OSError, ValueError, AttributeError):
        return False
