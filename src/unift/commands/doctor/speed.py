"""``unift doctor --speed``: what this machine multiplies and copies, and the settings that follow.

Nothing here is read by a run: a run's numbers depend on settings and never on a clock.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from unift.commands.doctor import Check
from unift.config.sections import Config
from unift.model import architecture, matmul, memory
from unift.model.load import pick_device
from unift.rows.crew import cores

ROWS, WIDTH, INNER = 1024, 576, 1536  # a product of a 135 M model's feed-forward layer over a thousand tokens
SHARE = 0.5  # of the free memory that activations may take


@dataclass(frozen=True)
class Rates:
    """Products in 1e9 operations a second, copies in 1e9 bytes a second, with the given number of threads."""

    threads: int
    default: float
    onednn: float
    bfloat16: float
    thin: float  # float32, 8 rows: what decoding does
    copy: float


def _rate(
    work: Callable[[], object], amount: float, seconds: float = 0.15, wait: Callable[[], object] = lambda: None
) -> float:
    """Amount a second of the best of several calls: others' use of the machine only ever slows a call down. ``wait`` ends a
    call that only asked a device for its work."""
    work()
    wait()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        work()
        wait()
        best = min(best, time.perf_counter() - began)
    return amount / best / 1e9


def measure(threads: int) -> Rates:
    """Rates of this machine with so many threads. Leaves torch's settings as they were."""
    before, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(threads)
    try:
        linear, draw = torch.nn.functional.linear, torch.Generator().manual_seed(0)
        x, w = torch.randn(ROWS, WIDTH, generator=draw), torch.randn(INNER, WIDTH, generator=draw)
        xb, wb, thin, operations = x.bfloat16(), w.bfloat16(), x[:8].clone(), 2.0 * ROWS * WIDTH * INNER
        matmul.route(False)
        default, few = _rate(lambda: linear(x, w), operations), _rate(lambda: linear(thin, w), operations * 8 / ROWS)
        routed = matmul.route(True) == "oneDNN"
        onednn = _rate(lambda: linear(x, w), operations) if routed else default
        block, other = torch.zeros(2**25), torch.ones(2**25)
        copy = _rate(lambda: block.copy_(other), 2.0 * block.nbytes)
        return Rates(threads, default, onednn, _rate(lambda: linear(xb, wb), operations), few, copy)
    finally:
        torch.set_num_threads(before)
        torch.set_float32_matmul_precision(precision)


def free_bytes() -> int:
    """Memory that a process can take now: what Linux calls available, elsewhere half of all."""
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").is_file() else []
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def budget(config: Config, free: int) -> tuple[int, str] | None:
    """(largest power of two of tokens whose activations fit, why); None where the model's config names no shapes."""
    built = architecture.of(config.model)
    if built is None:
        return None
    token = memory.token_bytes(built.shapes, config.model, config.train.gradient_checkpointing)
    tokens = max(int(free * SHARE / token), 256)
    tokens = min(1 << (tokens.bit_length() - 1), 65536)
    return tokens, f"about {token / 1024:,.0f} KiB of activations a token, {free / 2**30:.1f} GiB free"


def _precision(gain: float) -> Check:
    text = f"products in bfloat16 run {gain:.1f} times as fast as in float32"
    if gain > 1.3:
        text += (
            "; model.autocast=sample samples with them (logged as sampling/sampling_logp_difference), =all trains too"
        )
    else:
        text += "; stay with model.autocast=none"
    return Check("precision", True, text)


def _budget(config: Config, free: int) -> list[Check]:
    fits = budget(config, free)
    if fits is None:
        return []
    tokens, why = fits
    return [Check("token budget", True, f"train.token_budget={tokens} (now {config.train.token_budget}): {why}")]


def gpu_checks(config: Config, device: torch.device, free: int, size: int = 8192) -> list[Check]:
    """The rates of one GPU: products of [size, size], copies, and how long it takes to launch a kernel that does nothing."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    rate = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        rate[dtype] = _rate(lambda a=a, b=b: a @ b, 2.0 * size**3, wait=wait)
    one = torch.zeros(1, device=device)
    copied = _rate(lambda: a.clone(), 2.0 * a.nbytes, wait=wait)
    launches = _rate(lambda: [one.add_(1) for _ in range(100)], 100.0, wait=wait)
    text = (
        f"float32 {rate[torch.float32] / 1e3:.1f} TFLOP/s, bfloat16 {rate[torch.bfloat16] / 1e3:.1f}; copies {copied:.0f} GB/s; "
        f"{1e-3 / launches:.1f} us to launch a kernel, which model.cuda_graphs=true saves while sampling"
    )
    gain = rate[torch.bfloat16] / rate[torch.float32]
    return [Check("speed", True, text), _precision(gain), *_budget(config, free)]


def checks(config: Config) -> list[Check]:
    """The machine's rates and the settings they recommend. Takes a few seconds."""
    if config.model.device.startswith("cuda") or (config.model.device == "auto" and torch.cuda.is_available()):
        device = pick_device(config.model.device)
        return gpu_checks(config, device, torch.cuda.mem_get_info(device)[0])
    counts = sorted({1, max(cores() // 2, 1), cores()})
    rates = [measure(n) for n in counts]
    best = max(rates, key=lambda r: (max(r.default, r.onednn), -r.threads))
    lines = [
        Check(
            "speed",
            True,
            f"{r.threads} thread{'s' if r.threads > 1 else ''}: float32 {r.default:.0f} GFLOP/s, through oneDNN "
            f"{r.onednn:.0f}, bfloat16 {r.bfloat16:.0f}, 8 rows {r.thin:.0f}; copies {r.copy:.0f} GB/s",
        )
        for r in rates
    ]
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5 * cores():
        lines.append(
            Check("load", True, f"{load:.1f} other jobs want the {cores()} cores: measure again when it is quiet")
        )
    used = config.threads or torch.get_num_threads()
    said = f"threads={best.threads}" + ("" if used == best.threads else f" (now {used})")
    lines.append(Check("threads", True, f"{said} is the fastest measured; fewer if other work shares the machine"))
    lines.append(_precision(best.bfloat16 / max(best.default, best.onednn)))
    return lines + _budget(config, free_bytes())
