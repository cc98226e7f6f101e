"""Which library multiplies float32 matrices on the CPU, and weights packed for it while sampling.

PyTorch's x86 build sends float32 products to MKL, whose kernels reach about 90 % of what oneDNN's reach on AMD
processors (and half at the thin products of decoding against a large vocabulary; docs/performance.md). oneDNN takes
them when its precision is allowed to be lower; on processors without bfloat16 matrix units it stays exact float32. That
is checked here by a product against float64, and taken back where it does not hold. Attention's many small products are
slower in oneDNN, so they are left out of it (``small``).

A step of decoding has few rows, and either library then spends as long on rearranging a weight as on multiplying by it. The
weights do not change while a batch is sampled, so they are rearranged once (``packed``).
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor, nn

THIN = 256  # rows below which a product through the trunk counts as small
LARGE = 2**22  # numbers of a head's weight from which even a thin product gains
PACK_LEAST = 100_000  # numbers of a weight from which packing it gains
PACK_MOST = 2**30  # numbers in all packed weights: they are a second copy
_chosen = "highest"  # PyTorch's name of what ``route`` chose; medium: oneDNN


def _amd() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return "AuthenticAMD" in (cpuinfo.read_text() if cpuinfo.is_file() else platform.processor())


def error() -> float:
    """Largest relative error of a float32 product [64, 256] x [256, 256], packed or not, against float64."""
    draw = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 256, generator=draw), torch.randn(256, 256, generator=draw)
    exact = x.double() @ w.double().T
    found = [torch.nn.functional.linear(x, w)]
    if _can_pack() and torch.get_float32_matmul_precision() == "medium":
        found.append(_multiply(torch.ops.mkldnn._reorder_linear_weight(w), None, x.dtype, x))
    return max(float((y - exact).abs().max() / exact.abs().max()) for y in found)


def route(wanted: bool | None = None) -> str:
    """Send float32 products of the CPU to oneDNN where that is faster and exact; returns "oneDNN" or "default".

    Depends on the processor alone and never on a clock, so a continued run multiplies as the first one did. ``wanted``
    overrides the choice by vendor (the accuracy check stays). The setting is PyTorch's global one, so this is called for
    models on the CPU only: CUDA reads it too, and takes it for a leave to round (`unroute`).
    """
    global _chosen
    use = torch.backends.mkldnn.is_available() and (_amd() if wanted is None else wanted)
    torch.set_float32_matmul_precision("medium" if use else "highest")
    if use and error() > 2e-6:
        torch.set_float32_matmul_precision("highest")
        use = False
    _chosen = "medium" if use else "highest"
    return "oneDNN" if use else "default"


def unroute() -> None:
    """Take back what `route` set for an earlier model of this process."""
    global _chosen
    if _chosen != "highest":
        torch.set_float32_matmul_precision("highest")
        _chosen = "highest"


def expected() -> str:
    """What ``route`` would choose, without setting anything."""
    return "oneDNN" if torch.backends.mkldnn.is_available() and _amd() else "default"


@contextmanager
def small(really: bool = True) -> Iterator[None]:
    """Products in the block go to the default library: each is too small to pay for oneDNN's set-up."""
    before = torch.get_float32_matmul_precision() if really else "highest"
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def packed(model: nn.Module, bfloat16: bool = False) -> Iterator[None]:
    """In the block, the model's large linear layers multiply by weights rearranged for oneDNN; values as before up to rounding.

    bfloat16: products in bfloat16, as autocast would make them. No gradient flows through such a layer, and the weights
    must not change in the block. Nothing happens where oneDNN is not the choice of ``route``. Which layers are packed
    depends on their sizes alone.
    """
    layers = [m for m in model.modules() if _packs(m)] if _chosen == "medium" and _can_pack() else []
    if sum(m.weight.numel() for m in layers) > PACK_MOST:
        layers = []
    try:
        with torch.no_grad():
            for layer in layers:
                dtype = torch.bfloat16 if bfloat16 else layer.weight.dtype
                bias = None if layer.bias is None else layer.bias.detach().to(dtype)
                weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().to(dtype))
                # An attribute of the instance: hooks, and what wraps the layer (LoRA), stay as they are.
                layer.forward = partial(_multiply, weight, bias, dtype)  # type: ignore[assignment]
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _can_pack() -> bool:
    """PyTorch keeps the two operations for its own compiler, so they may go."""
    ops = torch.ops.mkldnn
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(ops, "_reorder_linear_weight")
        and hasattr(ops, "_linear_pointwise")
    )


def _packs(module: nn.Module) -> TypeGuard[nn.Linear]:
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return False
    weight = module.weight
    return (
        weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16) and weight.numel() >= PACK_LEAST
    )


def _multiply(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.to(dtype), weight, bias, "none", [], "")
