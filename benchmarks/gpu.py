"""One unift step of SmolLM2-135M on a GPU beside what the GPU can do, and what recorded steps and flex_attention buy.

    python benchmarks/gpu.py --shape knights --groups 8

bfloat16 products, float32 weights (model.autocast=all). Of sampling: tokens a second, beside the tokens a second at which
the weights (in bfloat16) and every cached key and value would be read once a step at the measured bandwidth. Of the update:
MFU, the operations of its products and attention over the time and the rate of a large bfloat16 product, measured and
nominal. The variants alternate; the first round is a warm-up and compiles.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from common import DEVICE, SHAPES, Shape, Unift, load, machine, now, prompts, save, spread
from roofline import SIZES, attention, weights

from unift.commands.doctor.speed import _rate
from unift.model.attention import flex

NOMINAL = 989e12  # operations a second of an H100 in bfloat16, by its data sheet
VARIANTS = ("all on", "no recorded steps", "no flex_attention")


@contextmanager
def variant(name: str, side: Unift) -> Iterator[None]:
    side.policy.cuda_graphs = name != "no recorded steps"
    with mock.patch.object(flex, "fits", (lambda *_: False) if name == "no flex_attention" else flex.fits):
        yield


def rates(size: int = 8192) -> tuple[float, float]:
    """Operations a second of a bfloat16 product, bytes a second of reading (a sum of bfloat16)."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    x = torch.ones(16 * size, size, device=DEVICE, dtype=torch.bfloat16)
    return 1e9 * _rate(lambda: a @ b, 2.0 * size**3, wait=now), 1e9 * _rate(x.sum, x.nbytes, wait=now)


def work(model: str, shape: Shape) -> dict[str, float]:
    """Operations of the update, and bytes that sampling reads: bfloat16 weights once a step, caches of either kind."""
    model = model.removesuffix("-random")
    layers, _, _, _, kv, _ = SIZES[model]
    trunk, head = weights(model)
    rows, steps = shape.groups * shape.g, shape.completion - 1
    update = (
        6.0 * trunk * shape.shared_tokens + 6.0 * head * rows * shape.completion + 3.5 * attention(model, shape, True)
    )
    cached = 4.0 * layers * kv * (shape.groups * shape.prefix + rows * shape.completion / 2)  # two, of two bytes
    prefill = 2.0 * trunk * shape.groups * shape.prefix
    return {"update": update, "prefill": prefill, "read": steps * (2.0 * (trunk + head) + cached)}


def measure(model_name: str, shape: Shape, repeats: int, size: int = 8192) -> dict[str, Any]:
    model, tokenizer = load(model_name)
    side = Unift(model, tokenizer, shape, ("model.autocast=all",))
    tokens = [t for _, t in prompts(tokenizer, shape, shape.groups)]
    product, read = rates(size)
    todo, seen = work(model_name, shape), {n: [] for n in VARIANTS}
    for turn in range(repeats + 1):
        for name in VARIANTS:
            with variant(name, side):
                step = side.step(tokens)
            if turn:
                seen[name].append(step)
    floor = todo["read"] / read + todo["prefill"] / product
    rows = []
    for name, steps in seen.items():
        speed = spread([s["sampled"] / s["generate"] for s in steps])
        update = spread([s["update"] for s in steps])
        rows.append(
            {
                "variant": name,
                "seconds": spread([s["seconds"] for s in steps]),
                "tokens_per_second": speed,
                "of_roofline": speed["median"] * floor / steps[0]["sampled"],
                "update": update,
                "mfu": todo["update"] / update["median"] / product,
                "mfu_nominal": todo["update"] / update["median"] / NOMINAL,
                "gap": max(s["gap"] for s in steps),
            }
        )
    peak = torch.cuda.max_memory_allocated() / 2**20 if DEVICE.type == "cuda" else None
    ideal = steps[0]["sampled"] / floor
    return {
        "rows": rows,
        "roofline_tokens_per_second": ideal,
        "tflops": product / 1e12,
        "gbytes": read / 1e9,
        "peak_mib": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("135m", "135m-random"), default="135m")
    parser.add_argument("--shape", default="knights", help="short, countdown, knights, math")
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    a = parser.parse_args()
    if DEVICE.type != "cuda":
        parser.error("needs a CUDA device: torch.cuda.is_available() is false")
    shape, began = replace(SHAPES["135m"][a.shape], groups=a.groups), time.time()
    found = measure(a.model, shape, a.repeats)
    print(
        f"products {found['tflops']:.0f} TFLOP/s, reads {found['gbytes']:.0f} GB/s; {time.time() - began:.0f} s in all"
    )
    for r in found["rows"]:
        print(
            f"{r['variant']}: step {r['seconds']['median']:.3f} s; sampling {r['tokens_per_second']['median']:,.0f} tokens/s, "
            f"{r['of_roofline']:.0%} of {found['roofline_tokens_per_second']:,.0f}; update {r['update']['median']:.3f} s, "
            f"MFU {r['mfu']:.0%} of the measured rate, {r['mfu_nominal']:.0%} of the nominal; largest gap {r['gap']:.2g}"
        )
    save(
        f"gpu-{a.model}-{a.shape}",
        {"model": a.model, "shape": a.shape, "sizes": vars(shape), **found, "machine": machine()},
    )


if __name__ == "__main__":
    main()
