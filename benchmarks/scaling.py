"""Step time of unift against group size, hint length and number of groups: the prefix's cost is flat in G.

    python benchmarks/scaling.py

Each line of a table changes one number. "prefix" is the update's time that is not explained by the completions: a line
fitted through G gives the slope (a completion's cost) and the intercept (the prefix's and the step's).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from common import Shape, Unift, load, machine, prompts, save, spread

BASE = Shape(prefix=350, hint=200, completion=32, groups=2, g=8)


def sweep(name: str, values: list[int], change: Any, repeats: int) -> list[dict[str, Any]]:
    """Alternates over the values, ``repeats`` times after one warm-up each, and keeps the CPU seconds' spread."""
    sides = []
    for value in values:
        model, tokenizer = load("3m")
        shape = change(value)
        tokens = [t for _, t in prompts(tokenizer, shape, shape.groups)]
        sides.append((value, shape, Unift(model, tokenizer, shape), tokens, []))
    for _ in range(repeats + 1):
        for _, _, side, tokens, seen in sides:
            seen.append(side.step(tokens))
    rows = []
    for value, shape, _, _, seen in sides:
        kept = seen[1:]
        row = {name: value, "shared_tokens": shape.shared_tokens, "plain_tokens": shape.plain_tokens}
        row |= {k: spread([s[k] for s in kept]) for k in ("cpu", "seconds", "generate", "update")}
        rows.append(row)
        tokens = f"{shape.shared_tokens} tokens for {shape.plain_tokens}"
        print(f"{name}={value}: {row['cpu']['median']:.3f} CPU s, {tokens}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    a = parser.parse_args()
    torch.set_num_threads(1)
    tables = {
        "g": sweep("g", [2, 4, 8, 16], lambda g: replace(BASE, g=g), a.repeats),
        "hint": sweep("hint", [0, 100, 200, 400], lambda h: replace(BASE, prefix=150 + h, hint=h), a.repeats),
        "groups": sweep("groups", [1, 2, 4, 8], lambda n: replace(BASE, groups=n), a.repeats),
    }
    g = np.array([row["g"] for row in tables["g"]], float)
    slope, intercept = np.polyfit(g, [row["cpu"]["min"] for row in tables["g"]], 1)
    fit = {"per_completion": slope, "prefix_and_step": intercept}
    print(f"step = {intercept:.3f} + {slope:.4f} G CPU seconds at {json.dumps(vars(BASE))}")
    save("scaling", {"base": vars(BASE), "tables": tables, "fit": fit, "machine": machine()})


if __name__ == "__main__":
    main()
