"""Checkpoints of sharded weights (torch.distributed.checkpoint): every process writes its own part, and any number of
processes reads what it needs of them, one process among them.

What is stored is the same whether weights are sharded or not: weights as the model sees them, and in the optimizer's state
the float32 copies (``master``), which are the shards themselves where these are float32 (`Policy.seen`)."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unift import processes
from unift.model.sharding import assign
from unift.types import UniftError

if TYPE_CHECKING:
    from unift.model.policy import Policy

FOLDER = "shards"
MASTER = "master"  # in the optimizer's state: the float32 copy of a weight (`optimizer.MasterWeights`)


def write(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """Weights and optimizer state into ``folder``. All processes call this together."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    tensors: dict[str, Any] = {}
    for name, p in policy.named_parameters():
        tensors[f"weights/{name}"] = policy.seen(name, p.detach())
        copied = {MASTER: p.detach()} if policy.seen(name, p).dtype != p.dtype else {}
        kept = copied | optimizer.state.get(p, {})
        tensors |= {f"optimizer/{name}/{key}": value for key, value in kept.items()}
    with _clear("written", folder):
        save(tensors, storage_writer=FileSystemWriter(folder))


def _stored(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and type of every tensor that is stored in ``folder``."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    kinds = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {k: (m.size, m.properties.dtype) for k, m in kinds.items() if isinstance(m, TensorStorageMetadata)}


def names(folder: Path) -> set[str]:
    """Of the weights that are stored in ``folder``."""
    return {key.removeprefix("weights/") for key in _stored(folder) if key.startswith("weights/")}


def read(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer | None, own: Mapping[str, Tensor]) -> None:
    """Load the weights ``own`` (by name) and the optimizer's state in place. All processes call this together."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    wanted: dict[str, Any] = {f"weights/{name}": policy.seen(name, p.detach()) for name, p in own.items()}
    for key, (shape, dtype) in _stored(folder).items():
        if key.startswith("optimizer/") and optimizer is not None:
            name, what = key.removeprefix("optimizer/").rsplit("/", 1)
            wanted[key] = _like(optimizer, own[name], shape, dtype)
            if not _is_shard(policy, name, own[name], what):
                optimizer.state[own[name]][what] = wanted[key]
    with _clear("read", folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # that one process reads alone
        load(wanted, storage_reader=FileSystemReader(folder), no_dist=processes.size() == 1)
    with torch.no_grad():
        for name, p in own.items():  # nothing to copy where the weight itself was read
            if policy.seen(name, p).dtype != p.dtype:
                p.copy_(wanted.get(f"optimizer/{name}/{MASTER}", wanted[f"weights/{name}"]))


def spread(policy: Policy, optimizer: torch.optim.Optimizer, stored: dict[str, Any]) -> None:
    """Take a whole optimizer state (of ``Optimizer.state_dict()``) into one of sharded weights. It counts parameters in the
    order of the optimizer's groups, which need not be the model's."""
    names = {id(p): name for name, p in policy.named_parameters()}
    for number, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        name = names[id(p)]
        for what, value in stored["state"].get(number, {}).items():
            if _is_shard(policy, name, p, what):
                assign(p, value)
                continue
            state = _like(optimizer, p, value.shape, value.dtype)
            assign(state, value)
            optimizer.state[p][what] = state


def _is_shard(policy: Policy, name: str, p: Tensor, what: str) -> bool:
    """Is this part of a weight's state its float32 copy, where that is the shard itself?"""
    return what == MASTER and policy.seen(name, p).dtype != p.dtype


def _like(optimizer: torch.optim.Optimizer, p: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Zeros for a state of ``p``: dealt out as its weight where it has its shape, else a number of its own."""
    if shape == p.shape and len(shape):
        return torch.zeros_like(p, dtype=dtype, requires_grad=False)
    beside = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return torch.zeros(shape, dtype=dtype, device=p.device if beside else "cpu")


@contextmanager
def _clear(done: str, folder: Path) -> Generator[None, None, None]:
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with processes.exchanging("a checkpoint in shards"):
            yield
    except CheckpointException as error:  # of any process; it is no Exception
        causes = "; ".join(f"process {n}: {e}" for n, (e, _) in sorted(error.failures.items()))
        raise UniftError(f"{folder} cannot be {done}: {causes:.300}") from error
