"""bfloat16 against unift's own float32, alternating in one process: time, and how far log-probs move.

    python benchmarks/precision.py --model 135m --shape short

``autocast`` multiplies in bfloat16 and keeps weights, gradients and optimizer in float32 (model.autocast); ``dtype`` holds
the weights themselves in bfloat16 (model.dtype). The gap is the largest difference between a sampled token's log-prob
under the sampler and under the trainer of the same step.
"""

from __future__ import annotations

import argparse

import torch
from common import SHAPES, Unift, clone, load, machine, prompts, save, spread

VARIANTS = {
    "float32": ("model.autocast=none", torch.float32),
    "autocast sample": ("model.autocast=sample", torch.float32),
    "autocast all": ("model.autocast=all", torch.float32),
    "dtype bfloat16": ("model.autocast=none", torch.bfloat16),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(SHAPES), default="3m")
    parser.add_argument("--shape", default="short")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--note", default="")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    shape = SHAPES[a.model][a.shape]
    model, tokenizer = load(a.model)
    tokens = [t for _, t in prompts(tokenizer, shape, shape.groups)]
    sides = {n: Unift(clone(model).to(dtype), tokenizer, shape, (setting,)) for n, (setting, dtype) in VARIANTS.items()}
    seen: dict[str, list[dict[str, float]]] = {n: [] for n in sides}
    for turn in range(a.repeats + 1):
        for name, side in sides.items():
            seen[name].append(side.step(tokens))
        if not turn:
            continue
        rows = []
        for name in sides:
            kept, base = seen[name][1:], seen["float32"][1:]
            ratio = lambda part: spread([y[part] / x[part] for x, y in zip(kept, base, strict=True)])  # noqa: B023, E731
            parts = {f"ratio_{p}": ratio(p) for p in ("cpu", "generate", "update")}
            row = {"variant": name, **parts, "gap": spread([x["gap"] for x in kept])}
            row |= {k: spread([x[k] for x in kept]) for k in ("cpu", "seconds", "generate", "update")}
            rows.append(row)
        save(
            f"precision-{a.model}-{a.shape}", {"rows": rows, "sizes": vars(shape), "note": a.note, "machine": machine()}
        )
    for row in rows:
        r = row["ratio_cpu"]
        gap = row["gap"]["median"]
        print(
            f"{row['variant']}: {r['median']:.2f}x [{r['min']:.2f}, {r['max']:.2f}] as fast as float32, gap {gap:.1e}"
        )


if __name__ == "__main__":
    main()
