"""Which library multiplies float32 matrices on the CPU, and products in bfloat16.

PyTorch's x86 build sends float32 products to MKL, whose kernels reach about 90 % of what oneDNN's reach on AMD
processors (and half at the thin products of decoding against a large vocabulary; docs/performance.md). oneDNN takes
them when its precision is allowed to be lower; on processors without bfloat16 matrix units it stays exact float32. That
is checked here by a product against float64, and taken back where it does not hold. Attention's many small products are
slower in oneDNN, so they are left out of it (``small``).
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

THIN = 256  # rows below which a product through the trunk counts as small
LARGE = 2**22  # numbers of a head's weight from which even a thin product gains


def _amd() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return "AuthenticAMD" in (cpuinfo.read_text() if cpuinfo.is_file() else platform.processor())


def error() -> float:
    """Largest relative error of a float32 product [64, 256] x [256, 256] against float64."""
    draw = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 256, generator=draw), torch.randn(256, 256, generator=draw)
    exact = x.double() @ w.double().T
    return float((torch.nn.functional.linear(x, w) - exact).abs().max() / exact.abs().max())


def route(wanted: bool | None = None) -> str:
    """Send float32 products of the CPU to oneDNN where that is faster and exact; returns "oneDNN" or "default".

    Depends on the processor alone and never on a clock, so a continued run multiplies as the first one did. ``wanted``
    overrides the choice by vendor (the accuracy check stays). The setting is PyTorch's global one, so this is called for
    models on the CPU only: CUDA reads it too.
    """
    use = torch.backends.mkldnn.is_available() and (_amd() if wanted is None else wanted)
    torch.set_float32_matmul_precision("medium" if use else "highest")
    if use and error() > 2e-6:
        torch.set_float32_matmul_precision("highest")
        use = False
    return "oneDNN" if use else "default"


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
