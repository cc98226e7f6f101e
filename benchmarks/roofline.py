"""The least time that a step's products need on this machine: operations over measured GEMM rates, or bytes over bandwidth.

    python benchmarks/roofline.py

Counts products with weight matrices and attention's own; every norm, activation, copy and draw comes on top. Rates are
the best of many calls in CPU seconds, so that other jobs on the machine hardly matter. A decode step's attention reads every
cached key and value once, so it takes the longer of its operations and its bytes. ``floor`` is unift's work (prefix once a
group, head at loss positions, packed weights in decoding), ``floor_trl`` what TRL computes without checkpointing at PyTorch's
own rates: every copy of the prefix, and on the CPU the head at every position. ``saved_bfloat16``: what the products with
weights take less in bfloat16, all that can be saved by it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from common import SHAPES, Shape, machine, save

from unift.model import matmul

# layers, width, inner width, width of queries, of keys, vocabulary
SIZES = {"3m": (4, 256, 688, 256, 256, 128), "135m": (30, 576, 1536, 576, 192, 49152)}


def best(work: Callable[[], Any], calls: int = 1) -> float:
    """CPU seconds of one call."""
    work()
    least = float("inf")
    for _ in range(12):
        began = time.process_time()
        for _ in range(calls):
            work()
        least = min(least, (time.process_time() - began) / calls)
    return least


def rate(
    rows: int, inner: int, outer: int, oneDNN: bool, packed: bool = False, dtype: torch.dtype = torch.float32
) -> float:
    """Operations a CPU second of a product [rows, inner] x [outer, inner]'."""
    operations = 2.0 * rows * inner * outer
    layer, x = torch.nn.Linear(inner, outer, bias=False, dtype=dtype), torch.randn(rows, inner, dtype=dtype)
    matmul.route(oneDNN)
    try:
        with matmul.packed(layer) if packed else nullcontext():
            return operations / best(lambda: layer(x), max(1, int(2e8 / operations)))
    finally:
        matmul.route(False)


def bandwidth() -> float:
    """Bytes a CPU second of reading 256 MiB, far more than a processor's cache."""
    x = torch.randn(2**26)
    return x.numel() * 4 / best(x.sum)


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


def floors(model: str, shape: Shape, read: float) -> dict[str, float]:
    layers, width, inner, q, kv, vocab = SIZES[model]
    trunk, head = weights(model)
    rows = shape.groups * shape.g
    large = vocab > 1000
    wide, thin = rate(1024, width, inner, True), rate(rows, width, inner, True, packed=True)
    head_wide, head_thin = rate(512, width, vocab, large), rate(rows, width, vocab, large, packed=True)
    half = [rate(*x, True, packed=rows == x[0], dtype=torch.bfloat16)
            for x in ((1024, width, inner), (rows, width, inner), (512, width, vocab), (rows, width, vocab))]  # fmt: skip
    mkl_wide, mkl_trunk, mkl_thin = (
        rate(*x, False) for x in ((1024, width, inner), (rows, width, inner), (rows, width, vocab))
    )
    steps = shape.completion - 1
    loss_positions = rows * shape.completion
    tokens = shape.shared_tokens
    attended = 3.5 * attention(model, shape, True) / wide

    def linear(wide: float, thin: float, head_wide: float, head_thin: float) -> tuple[float, float]:
        """Seconds of the products with weights: of training, of sampling."""
        prefill = 2 * trunk * shape.prefix * shape.groups / wide
        decode = rows * steps * (2 * trunk / thin + 2 * head / head_thin)
        return 6 * trunk * tokens / wide + 6 * head * loss_positions / head_wide, prefill + decode

    weighed, sampled = linear(wide, thin, head_wide, head_thin)
    train = weighed + attended
    scores = 4.0 * layers * q * rows * steps * (shape.prefix + shape.completion / 2)
    cached = 8.0 * layers * kv * steps * (shape.groups * shape.prefix + rows * shape.completion / 2)
    generate = sampled + max(scores / wide, cached / read)
    plain = shape.plain_tokens
    trl_train = (6 * (trunk + head) * plain + 3.5 * attention(model, shape, False)) / mkl_wide
    trl_generate = 2 * trunk * shape.prefix * rows / mkl_wide + rows * steps * (
        2 * trunk / mkl_trunk + 2 * head / mkl_thin
    )
    return {
        "train": train,
        "generate": generate,
        "floor": train + generate,
        "saved_bfloat16": weighed + sampled - sum(linear(*half)),
        "floor_trl": trl_train + trl_generate,
        "gflops_wide": wide / 1e9,
        "gflops_thin": thin / 1e9,
        "gflops_thin_default": mkl_trunk / 1e9,
        "gflops_wide_default": mkl_wide / 1e9,
        "gflops_head_thin": head_thin / 1e9,
        "gflops_head_thin_default": mkl_thin / 1e9,
        "attention_flops_decode_s": scores / wide,
        "attention_bytes_decode_s": cached / read,
    }


def main() -> None:
    torch.set_num_threads(1)
    rows, read = [], bandwidth()
    print(f"reads {read / 1e9:.0f} GB/s")
    with torch.no_grad():
        for model in SIZES:
            for name, shape in SHAPES[model].items():
                row = {"model": model, "shape": name, **floors(model, shape, read)}
                rows.append(row)
                print(
                    f"{model} {name}: floor {row['floor']:.2f} s (generate {row['generate']:.2f}, train {row['train']:.2f}), "
                    f"TRL's work at the same rates {row['floor_trl']:.2f} s",
                    flush=True,
                )
    save("roofline", {"rows": rows, "gbytes": read / 1e9, "machine": machine()})


if __name__ == "__main__":
    main()
