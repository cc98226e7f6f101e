"""The least time that a step's products need on this machine: floating-point operations over measured GEMM rates.

    python benchmarks/roofline.py

Counts products with weight matrices and attention's own; every norm, activation, copy and draw comes on top. Rates are
the best of many calls in CPU seconds, so that other jobs on the machine hardly matter. ``floor`` is unift's work (prefix
once a group, head at loss positions), ``floor_trl`` the same rates applied to what TRL computes without checkpointing:
every copy of the prefix, and on the CPU the head at every position.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from common import SHAPES, Shape, machine, save

from unift import matmul

# layers, width, inner width, width of queries, of keys, vocabulary
SIZES = {"3m": (4, 256, 688, 256, 256, 128), "135m": (30, 576, 1536, 576, 192, 49152)}


def rate(rows: int, inner: int, outer: int, oneDNN: bool) -> float:
    """Operations a CPU second of a product [rows, inner] x [outer, inner]'."""
    matmul.route(oneDNN)
    x, w = torch.randn(rows, inner), torch.randn(outer, inner)
    work: Callable[[], Any] = lambda: torch.nn.functional.linear(x, w)  # noqa: E731
    work()
    best = float("inf")
    calls = max(1, int(2e8 / (2.0 * rows * inner * outer)))
    for _ in range(12):
        began = time.process_time()
        for _ in range(calls):
            work()
        best = min(best, (time.process_time() - began) / calls)
    matmul.route(False)
    return 2.0 * rows * inner * outer / best


def weights(model: str) -> tuple[int, int]:
    layers, width, inner, q, kv, vocab = SIZES[model]
    return layers * (width * (2 * q + 2 * kv) + 3 * width * inner), vocab * width


def attention(model: str, shape: Shape, shared: bool) -> float:
    """Operations of a forward pass of attention over the batch: scores and weighted values, causal halves counted."""
    layers, _, _, q, _, _ = SIZES[model]
    p, r = shape.prefix, shape.completion
    sequences = shape.groups * shape.g
    prefix = p * p / 2 * (shape.groups if shared else sequences)
    return 4.0 * layers * q * (prefix + sequences * (r * p + r * r / 2))


def floors(model: str, shape: Shape) -> dict[str, float]:
    layers, width, inner, *_, vocab = SIZES[model]
    trunk, head = weights(model)
    rows = shape.groups * shape.g
    wide, thin = rate(1024, width, inner, True), rate(rows, width, inner, False)
    head_wide, head_thin = rate(512, width, vocab, vocab > 1000), rate(rows, width, vocab, vocab > 1000)
    mkl_wide, mkl_thin = rate(1024, width, inner, False), rate(rows, width, vocab, False)
    steps = shape.completion - 1
    loss_positions = rows * shape.completion
    tokens = shape.shared_tokens
    train = (6 * trunk * tokens + 3.5 * attention(model, shape, True)) / wide + 6 * head * loss_positions / head_wide
    prefill = 2 * trunk * shape.prefix * shape.groups / wide
    decode = rows * steps * (2 * trunk / thin + 2 * head / head_thin)
    decode += 4.0 * layers * SIZES[model][3] * rows * steps * (shape.prefix + shape.completion / 2) / wide
    plain = shape.plain_tokens
    trl_train = (6 * (trunk + head) * plain + 3.5 * attention(model, shape, False)) / mkl_wide
    trl_generate = 2 * trunk * shape.prefix * rows / mkl_wide + rows * steps * (2 * trunk / thin + 2 * head / mkl_thin)
    return {
        "train": train,
        "generate": prefill + decode,
        "floor": train + prefill + decode,
        "floor_trl": trl_train + trl_generate,
        "gflops_wide": wide / 1e9,
        "gflops_thin": thin / 1e9,
        "gflops_wide_default": mkl_wide / 1e9,
        "gflops_head_thin": head_thin / 1e9,
        "gflops_head_thin_default": mkl_thin / 1e9,
    }


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    with torch.no_grad():
        for model, shapes in SHAPES.items():
            for name, shape in shapes.items():
                row = {"model": model, "shape": name, **floors(model, shape)}
                rows.append(row)
                print(
                    f"{model} {name}: floor {row['floor']:.2f} s (generate {row['generate']:.2f}, train {row['train']:.2f}), "
                    f"TRL's work at the same rates {row['floor_trl']:.2f} s",
                    flush=True,
                )
    save("roofline", {"rows": rows, "machine": machine()})


if __name__ == "__main__":
    main()
