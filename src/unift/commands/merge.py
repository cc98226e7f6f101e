"""Merging of checkpoints that come from one base: the fifth strategy of the Synergy Dilemma (arXiv 2507.07562).

    linear   theta = base + sum_i w_i tau_i,   tau_i = theta_i - base      task arithmetic, arXiv 2212.04089
    ties     trim, elect a sign, mean of those that agree                  TIES, arXiv 2306.01708
    dare     linear on tau_i of which entries are dropped at random        DARE, arXiv 2311.03099

All arithmetic is float64, a tensor at a time; the result has the widest dtype of the merged models (not of the base).
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from unift import rng
from unift.files import publish_folder
from unift.model.folder import reading
from unift.model.load import locate
from unift.types import ConfigError, NonFiniteError

Rule = Literal["linear", "ties", "dare"]


@dataclass(frozen=True)
class Mixing:
    """How models are merged. seed: of the draws of dare."""

    rule: Rule
    weights: Sequence[float]  # one a model
    density: float | None = None  # share of entries kept by ties (0.2 in the paper) and dare; linear has none
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise ConfigError(f"rule {self.rule!r}: expected one of {', '.join(get_args(Rule))}")
        if (self.rule == "linear") != (self.density is None):
            raise ConfigError(
                f"rule {self.rule} {'takes no' if self.rule == 'linear' else 'needs a'} density (share of entries kept)"
            )
        if self.density is not None and not 0 < self.density <= 1:
            raise ConfigError(f"density {self.density}: expected more than 0 and at most 1")

    @property
    def kept(self) -> float:
        """The share of entries that is kept."""
        return 1.0 if self.density is None else self.density


def read_weights(words: str | None, models: int, rule: str) -> list[float]:
    """Of the models, as a user writes them: "0.5,0.5". None: 1/models, and 1 for ties, which averages what agrees in sign."""
    if words is None:
        return [1.0 if rule == "ties" else 1 / models] * models
    try:
        found = [float(w) for w in words.split(",")]
    except ValueError:
        found = []
    if not found or not all(map(math.isfinite, found)):
        raise ConfigError(f"--weights {words!r}: expected numbers that are finite, e.g. 0.5,0.5")
    return found


WEIGHTS = ("model.safetensors", "model-")  # a single file, or the beginning of the names of shards

# ---------------------------------------------------------------------------------------------- rules


def linear(base: Tensor, models: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """base + sum w_i (theta_i - base), written so that weights (1, 0) return the first model bit for bit."""
    merged = base * (1 - sum(weights))
    for model, weight in zip(models, weights, strict=True):
        merged = merged + weight * model
    return merged


def trim_threshold(tau: Tensor, density: float) -> float:
    """Magnitude of the smallest of the round(density n) largest entries of a model's tau; equal ones are all kept."""
    keep = max(1, round(density * tau.numel()))
    return tau.abs().flatten().kthvalue(tau.numel() - keep + 1).values.item()


def ties(taus: Sequence[Tensor], weights: Sequence[float], thresholds: Sequence[float]) -> Tensor:
    """Merged tau of TIES. Entries below a model's threshold are zeroed; w_i tau_i vote by their sum for a sign; the mean
    is over the models with a non-zero entry of that sign. A vote of exactly 0 leaves the base as it is.

    Equal weights lambda are the paper's scaling of the merged vector by lambda.
    """
    voters = torch.stack(
        [
            weight * torch.where(tau.abs().float() >= t, tau, 0.0)
            for tau, weight, t in zip(taus, weights, thresholds, strict=True)
        ]
    )
    sign = voters.sum(0).sign()
    agree = (voters.sign() == sign) & (sign != 0)
    return (voters * agree).sum(0) / agree.sum(0).clamp(min=1)


def dare(tau: Tensor, density: float, *address: object) -> Tensor:
    """Each entry is kept with probability ``density`` and divided by it, so the mean of tau stays; the rest is 0."""
    kept = rng.uniforms("dare", *address, shape=tuple(tau.shape)) < density
    return torch.where(torch.from_numpy(np.asarray(kept)), tau / density, 0.0)


# ---------------------------------------------------------------------------------------------- folders


def _model_folder(path: str) -> Path:
    """A model folder, the model of a finished run folder, or embedded:NAME."""
    inside = Path(path).expanduser() / "model"
    return inside if inside.is_dir() else locate(path)


class _Weights:
    """Tensors of a folder by name, read when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            if path.name.startswith(WEIGHTS):
                with reading("weights", folder), safe_open(path, "pt") as handle:
                    self.files |= dict.fromkeys(handle.keys(), path)
        if not self.files:
            raise ConfigError(
                f"{folder} holds no model.safetensors. Expected a folder as save_pretrained writes it; a GGUF file or old "
                "pytorch_model.bin becomes one through AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)"
            )

    def __getitem__(self, name: str) -> Tensor:
        with reading("weights", self.folder), safe_open(self.files[name], "pt") as handle:
            return handle.get_tensor(name)


def _check(base: _Weights, models: Sequence[_Weights]) -> None:
    for model in models:
        extra = sorted(base.files.keys() ^ model.files.keys())
        if extra:
            raise ConfigError(
                f"{model.folder} and the base {base.folder} have different parameters ({len(extra)}, e.g. {extra[0]!r}). "
                "Only checkpoints trained from one base can be merged"
            )
        for name in base.files:
            if model[name].shape != base[name].shape:
                raise ConfigError(
                    f"{name}: shape {list(model[name].shape)} in {model.folder}, {list(base[name].shape)} in the base "
                    f"{base.folder}. Only checkpoints trained from one base can be merged"
                )


def merge_states(
    base: Any,
    models: Sequence[Any],
    names: Sequence[str],
    how: Mixing,
) -> dict[str, Tensor]:
    """Merged tensors by name. ``base`` and ``models``: anything that gives a tensor for a name."""
    floats = [name for name in names if base[name].is_floating_point()]

    def tau(model: Any, name: str) -> Tensor:
        return model[name].double() - base[name].double()

    thresholds = [0.0] * len(models)
    if how.rule == "ties":
        # Over the whole model, not per tensor. float32 halves the memory and only decides what is kept.
        thresholds = [
            trim_threshold(torch.cat([tau(model, n).float().flatten() for n in floats]), how.kept) for model in models
        ]
    merged = {}
    for name in names:
        if name not in floats:
            if any(not torch.equal(model[name], base[name]) for model in models):
                raise ConfigError(
                    f"{name} holds whole numbers that differ between the models: there is no mean of those"
                )
            merged[name] = base[name]
            continue
        origin, dtype = base[name].double(), models[0][name].dtype
        for model in models[1:]:
            dtype = torch.promote_types(dtype, model[name].dtype)
        if how.rule == "linear":
            value = linear(origin, [model[name].double() for model in models], how.weights)
        elif how.rule == "ties":
            value = origin + ties([tau(m, name) for m in models], how.weights, thresholds)
        else:
            dropped = [dare(tau(m, name), how.kept, how.seed, i, name) for i, m in enumerate(models)]
            value = linear(origin, [origin + d for d in dropped], how.weights)
        merged[name] = value.to(dtype).contiguous()
        if not merged[name].isfinite().all():
            raise NonFiniteError(
                f"{name} is not finite after merging (dtype {dtype}). Are all entries of the models finite?"
            )
    return merged


def merge(base: str, models: Sequence[str], out: Path, how: Mixing) -> dict[str, Any]:
    """Merge model folders into ``out``, a folder that ``AutoModelForCausalLM.from_pretrained`` reads.

    Configuration and tokenizer come from the first model. Returns what was done, which is also ``out/merge.json``.
    """
    if not models or len(how.weights) != len(models):
        raise ConfigError(
            f"{len(models)} models and {len(how.weights)} weights: expected at least one model and a weight for each"
        )
    if out.exists():
        raise ConfigError(f"{out} exists. Name a new folder, so that no model is overwritten")
    sources = [_Weights(_model_folder(path)) for path in models]
    origin = _Weights(_model_folder(base))
    _check(origin, sources)
    done = {"base": base, "models": list(models), **asdict(how), "weights": list(how.weights)}
    state = merge_states(origin, sources, sorted(origin.files), how)

    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        for path in sources[0].folder.iterdir():
            if path.is_file() and path.suffix not in {".safetensors", ".bin", ".gguf"} and ".index." not in path.name:
                shutil.copy(path, temporary)
        config = json.loads((temporary / "config.json").read_text())
        widest = max((t.dtype for t in state.values() if t.is_floating_point()), key=lambda d: d.itemsize)
        config["dtype"] = str(widest).removeprefix("torch.")
        config.pop("torch_dtype", None)  # the older name of the same key
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (temporary / "merge.json").write_text(json.dumps(done, indent=1) + "\n")
        save_file(state, temporary / "model.safetensors", metadata={"format": "pt"})
        publish_folder(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return done | {"parameters": sum(t.numel() for t in state.values())}
