"""Weights, gradients and optimizer state in shards, one a process (FSDP2: ``torch.distributed.fsdp.fully_shard``).

Each decoder layer is a group of its own, all the rest (embeddings, head, last norm) is the root's: a group's weights are
gathered before its forward and its backward pass, and its gradient is summed and dealt out right after the latter. unift
calls trunk and head apart, so whatever reads weights runs inside the forward of one module (`Root`, `Policy.run`).

Every pass is an exchange: all processes make the same passes in the same order, or they wait for each other. Samplers,
whose processes decode different lengths, hold all weights meanwhile (`whole`). What a pass runs may differ between processes
where it is the root's: a vision tower, which packs without a picture do not run, and on the plain path the whole model, which
as many forwards run as the rows of a pack need. The root is gathered once a pass whatever runs in it, and has a gradient for
each of its weights, used or not (`_reach_all`).

bfloat16 weights that an optimizer steps in float32 (train.master_weights) are float32 in their shards, and rounded as they
are gathered (``masters``): the copies are the shards, and no other numbers are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
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
        self.gathered: torch.dtype | None = (
            None  # of the model's weights where they are gathered, if shards have another
        )

    def forward(self, do: Callable[[], T]) -> T:
        return do()


def shard(
    model: nn.Module,
    base: Any,
    device: torch.device,
    critic: nn.Linear | None,
    masters: bool = True,
    shared: bool = True,
) -> Root:
    """Leave this process its part of the weights, in place. ``base``: the model below adapters, if it has some. critic: the
    value head, where any phase of the run has one. masters: 16-bit weights that are trained become float32 shards. shared: a
    pass runs each decoder layer once, on the shared-prefix path; on the plain one as often as its rows need.

    Raises ConfigError where this torch or this model does not allow it.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise ConfigError(f"model.shard=full needs torch 2.8 or newer; found {torch.__version__}")
    # A group of its own: torch keeps the mesh, and so its group, in caches that outlive the run (see `processes.joined`).
    group: Any = dist.new_group(timeout=timedelta(seconds=processes.wait_seconds()))
    mesh = DeviceMesh.from_group(group, device.type)
    root, half = Root(model, critic), _half(model)
    root.gathered = half if masters else None
    # Without float32 copies gradients are summed in float32, too, and rounded once.
    policy = MixedPrecisionPolicy(root.gathered, torch.float32 if half else None, cast_forward_inputs=False)
    if critic is not None:
        fully_shard(critic, mesh=mesh)
    layers = decoder_layers(base) if shared else []
    alike = shared and text_trunk(base) is base.base_model  # all processes use all weights in every pass
    own = [] if alike else _outside(model, layers)
    for part in (*layers, root):
        if root.gathered is not None:  # layer by layer, so that the whole model is never there in float32
            _widen(part)
        fully_shard(part, mesh=mesh, mp_policy=policy)
    for part in groups(root):
        part.set_gradient_divide_factor(1.0)  # the loss is a sum with its weights inside: nothing is averaged
        part.set_force_sum_reduction_for_comms(True)
    with torch.no_grad():
        run(root, lambda: None)  # the first forward settles which module is the root
    if root.gathered is not None:
        _sum_in_float32(root)
    if own:
        base.get_input_embeddings().register_forward_hook(partial(_reach_all, own))
    return root


def _outside(model: nn.Module, layers: Sequence[nn.Module]) -> list[tuple[nn.Module, str]]:
    """Places (module, name) of the trained weights that are in none of the ``layers``."""
    inside = {id(m) for layer in layers for m in layer.modules()}
    return [
        (module, name)
        for module in model.modules()
        if id(module) not in inside
        for name, p in module.named_parameters(recurse=False)
        if p.requires_grad
    ]


def _reach_all(places: Sequence[tuple[nn.Module, str]], embeddings: nn.Module, args: Any, embedded: Tensor) -> Tensor:
    """The embedded tokens, through which the backward pass of any process reaches all these weights.

    Two things depend on it. FSDP2 sums the gradients that there are: of weights that one process has used and another has not
    the two would sum tensors of different sizes. And it sums a group's in its backward pass if an input of the group needs a
    gradient, otherwise after all others: with adapters the first layer's input needs one where a trained tower's numbers are
    in it, and nowhere else, so that processes with and without pictures would sum two groups in two orders.
    """
    if not torch.is_grad_enabled():
        return embedded
    return _Reach.apply(embedded, *(module._parameters[name] for module, name in places))  # type: ignore[return-value]


class _Reach(torch.autograd.Function):
    """The first tensor, with a gradient of zero for each of the others."""

    @staticmethod
    def forward(ctx: Any, embedded: Tensor, *weights: Tensor) -> Tensor:
        ctx.like = [(w.shape, w.dtype) for w in weights]
        return embedded.clone()  # models write the numbers of pictures into it

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], *(grads[0].new_zeros((), dtype=dtype).expand(shape) for shape, dtype in ctx.like)


def _half(model: nn.Module) -> torch.dtype | None:
    """The 16-bit type of the weights that are trained; None where they have another. ConfigError where they have several,
    which FSDP2 does not sum together."""
    found = sorted({p.dtype for p in model.parameters() if p.requires_grad}, key=str)
    if len(found) > 1:
        raise ConfigError(
            f"model.shard=full needs trained weights of one type, and {type(model).__name__} has {', '.join(map(str, found))}: "
            "use model.dtype=float32 (model.autocast=all multiplies in bfloat16), or model.shard=none"
        )
    return found[0] if found and found[0] in (torch.bfloat16, torch.float16) else None


def _widen(part: nn.Module) -> None:
    """16-bit weights that are still whole become float32, in place, so that tied ones stay tied."""
    for p in part.parameters():
        if not sharded(p) and p.dtype in (torch.bfloat16, torch.float16):
            p.data = p.data.float()


def _sum_in_float32(root: Root) -> None:
    """What a pass adds up for a weight that stands in several places (tied embeddings) is added in float32, as where weights
    are not sharded. FSDP2 keeps the tensors that stand for whole weights, so this holds for every later pass."""
    with whole(root):
        for p in root.model.parameters():
            if p.dtype == root.gathered and hasattr(p, "grad_dtype"):
                p.grad_dtype = torch.float32


def text_trunk(base: Any) -> nn.Module:
    """The trunk, or of a model with a vision tower the part of it that reads text."""
    return base.base_model if base.config.get_text_config() is base.config else base.get_decoder()


def decoder_layers(base: Any) -> list[nn.Module]:
    """The layers of the trunk of text: modules of the kinds that transformers never splits, or else of its longest list. The
    layers of a vision tower are none: whether a pass runs them is a matter of its pictures."""
    trunk = text_trunk(base)
    kinds = {kind for model in (base, trunk) for kind in getattr(model, "_no_split_modules", None) or ()}
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
