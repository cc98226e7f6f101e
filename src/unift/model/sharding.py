"""Weights, gradients and optimizer state in shards, one a process (FSDP2: ``torch.distributed.fsdp.fully_shard``).

Each decoder layer is a group of its own, all the rest (embeddings, head, last norm) is the root's: a group's weights are
gathered before its forward and its backward pass, and its gradient is summed and dealt out right after the latter. unift
calls trunk and head apart, so whatever reads weights runs inside the forward of one module (`Root`, `Policy.run`).

Every pass is an exchange: all processes make the same passes in the same order, or they wait for each other. Samplers,
whose processes decode different lengths, hold all weights meanwhile (`whole`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from unift import processes
from unift.types import ConfigError

T = TypeVar("T")


class Root(nn.Module):
    """What is sharded, as one module. Its forward runs anything that reads the weights."""

    def __init__(self, model: nn.Module, critic: nn.Linear | None) -> None:
        super().__init__()
        self.model, self.critic = model, critic
        self.open = False  # all weights are here: see `whole`

    def forward(self, do: Callable[[], T]) -> T:
        return do()


def shard(model: nn.Module, base: Any, device: torch.device, critic: nn.Linear | None) -> Root:
    """Leave this process its part of the weights, in place. ``base``: the model below adapters, if it has some. critic: the
    value head, where any phase of the run has one. Raises ConfigError where this torch cannot do it."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise ConfigError(f"model.shard=full needs torch 2.8 or newer; found {torch.__version__}")
    # A group of its own: torch keeps the mesh, and so its group, in caches that outlive the run (see `processes.joined`).
    group: Any = dist.new_group(timeout=timedelta(seconds=processes.WAIT_SECONDS))
    mesh = DeviceMesh.from_group(group, device.type)
    root = Root(model, critic)
    for part in (*decoder_layers(base), *([critic] if critic is not None else []), root):
        fully_shard(part, mesh=mesh)
    for part in groups(root):
        part.set_gradient_divide_factor(1.0)  # the loss is a sum with its weights inside: nothing is averaged
        part.set_force_sum_reduction_for_comms(True)
    with torch.no_grad():
        run(root, lambda: None)  # the first forward settles which module is the root
    return root


def decoder_layers(base: Any) -> list[nn.Module]:
    """The layers of the trunk: modules of the kinds that transformers never splits, or else of its longest list."""
    kinds = set(getattr(base, "_no_split_modules", None) or [])
    trunk: nn.Module = base.base_model
    found = [m for m in trunk.modules() if type(m).__name__ in kinds and not isinstance(m, nn.Embedding)]
    inner = {id(child) for m in found for child in m.modules() if child is not m}
    if found:
        return [m for m in found if id(m) not in inner]
    lists = [m for m in trunk.modules() if isinstance(m, nn.ModuleList)]
    return list(max(lists, key=len)) if lists else []


def groups(root: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [m for m in root.modules() if isinstance(m, FSDPModule)]


def run(root: Any, do: Callable[[], T]) -> T:
    """``do()`` inside the root's forward. Without gradient no backward pass deals the root's weights out again: done here."""
    with processes.exchanging("a pass through the sharded model"):
        out = root(do)
        if not torch.is_grad_enabled() and not root.open:
            root.reshard()
    return out


@contextmanager
def whole(root: Any) -> Iterator[None]:
    """All weights on every process in the block, so that each may run the model as often as it likes, without gradient.

    All processes enter and leave it together. Nothing happens where the weights are not sharded (``root`` is None).
    """
    if root is None or root.open:
        yield
        return
    parts = groups(root)
    with processes.exchanging("all weights"):
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
    root.open = True
    try:
        yield
    finally:
        root.open = False
        for part in parts:
            part.set_reshard_after_forward(part is not root, recurse=False)
            part.reshard()


def state(model: nn.Module) -> dict[str, Tensor]:
    """What ``model.state_dict()`` holds, which would give the weights' shards even where they are whole."""
    found: dict[str, Tensor] = {n: p.detach() for n, p in model.named_parameters(remove_duplicate=False)}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer.detach()
    return found


# ---------------------------------------------------------------------------------------------- single tensors


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor; all of it where it is not sharded."""
    return tensor.to_local() if sharded(tensor) else tensor  # type: ignore[operator]


def full(tensor: Tensor) -> Tensor:
    """The whole tensor, on every process. All of them call this together."""
    if not sharded(tensor):
        return tensor
    with processes.exchanging("a whole tensor"):
        return tensor.full_tensor()  # type: ignore[operator]


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Write a whole tensor, the same on every process, into one that may be sharded."""
    if not sharded(target):
        target.copy_(value)
        return
    from torch.distributed.tensor import distribute_tensor

    target.copy_(distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None))  # type: ignore[attr-defined]


def sharded(tensor: Tensor) -> bool:
    """Does each process hold a part of it?"""
    return hasattr(tensor, "placements")
