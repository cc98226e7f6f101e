"""Do the weights hold what an update adds to them?

AdamW moves a weight by about the learning rate a step, whatever its gradient. bfloat16 has 8 significant bits: numbers near w
are between |w| 2^-8 and |w| 2^-7 apart, and a step below half of that is rounded away. LoRA's adapters stay float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from unift.model.folder import reading
from unift.model.sharding import local

LOST = 0.1  # share of the weights that may stay where they are before a person is told
TYPICAL = 0.02  # size of a weight where none can be looked at: how most models are initialised
LOOK = 2**16  # numbers that are looked at in each weight


@torch.no_grad()
def lost_share(weights: Iterable[tuple[Tensor, int]], lr: float) -> float:
    """Share of all numbers that a step of size ``lr``, up or down, leaves as they are in bfloat16. ``weights``: some numbers
    of each, and how many it has."""
    lost = total = 0.0
    for some, numbers in weights:
        w = some.detach().bfloat16()
        wide = w.float()
        stays = ((wide + lr).bfloat16() == w) & ((wide - lr).bfloat16() == w)
        lost += float(stays.float().mean()) * numbers
        total += numbers
    return lost / max(total, 1)


def of_model(parameters: Iterable[Tensor]) -> list[tuple[Tensor, int]]:
    """Those of the trained weights that are in bfloat16."""
    found = [local(p.detach()) for p in parameters if p.dtype == torch.bfloat16]
    return [(p.flatten()[:LOOK], p.numel()) for p in found if p.numel()]


def of_folder(folder: Path) -> list[tuple[Tensor, int]]:
    """The first rows of each weight of a model folder; a weight of typical size where it has no safetensors."""
    from safetensors import safe_open

    found = []
    for path in sorted(folder.glob("*.safetensors")):
        with reading("weights", folder), safe_open(path, "pt") as file:
            for name in file.keys():
                part = file.get_slice(name)
                numbers = math.prod(part.get_shape())
                if numbers and part.get_shape():
                    found.append((part[: max(LOOK * part.get_shape()[0] // numbers, 1)], numbers))
    return found or [(torch.tensor([TYPICAL]), 1)]


def warning(weights: Iterable[tuple[Tensor, int]], lr: float) -> str:
    """What to tell a person about full training in bfloat16; empty if all is well."""
    share = lost_share(weights, lr)
    if share <= LOST:
        return ""
    return (
        f"model.dtype=bfloat16 rounds an update of train.lr={lr:g} away in {100 * share:.0f} % of the weights: they would not "
        "move. Use train.master_weights=true, which steps float32 copies of them, model.dtype=float32 (model.autocast=all still "
        "multiplies in bfloat16), LoRA (model.lora={rank: 16}), whose adapters stay float32, or a larger train.lr"
    )
