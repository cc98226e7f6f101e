"""Step time of unift against group size, hint length and number of groups: the prefix's cost is flat in G.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --long     completions of thousands of tokens: time, and peak memory of a process each

Each line of a table changes one number. "prefix" is the update's time that is not explained by the completions: a line
fitted through G gives the slope (a completion's cost) and the intercept (the prefix's and the step's).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Shape, Unift, load, machine, peak_rss, prompts, save, spread

BASE = Shape(prefix=350, hint=200, completion=32, groups=2, g=8)
LONG = Shape(prefix=2048, hint=0, completion=4096, groups=1, g=8)
LENGTHS = [512, 1024, 2048, 3072, 4096]
BUDGETS = [("one forward", "train.token_budget=65536"), ("divided", "train.token_budget=16384")]
BUDGETS += [("a completion at a time", "train.token_budget=8192")]
BUDGETS += [("one forward, checkpointing", "train.token_budget=65536 train.gradient_checkpointing=true")]
BUDGETS += [("divided, checkpointing", "train.token_budget=16384 train.gradient_checkpointing=true")]


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


def child(shape: Shape, settings: str) -> None:
    """One step in a process of its own, so that its peak resident set is the step's."""
    torch.set_num_threads(1)
    model, tokenizer = load("3m")
    rows = [t for _, t in prompts(tokenizer, shape, shape.groups)]
    side = Unift(model, tokenizer, shape, tuple(settings.split()))
    loaded = peak_rss()
    found = side.step(rows)
    peak = peak_rss()
    print(json.dumps(found | {"peak_mib": peak / 1024, "loaded_mib": loaded / 1024}))


def measured(shape: Shape, settings: str) -> dict[str, Any]:
    words = [sys.executable, str(Path(__file__)), "--child", json.dumps(vars(shape)), settings]
    out = subprocess.run(words, capture_output=True, text=True)
    if out.returncode:
        sys.exit(f"{shape} {settings} failed:\n{out.stderr[-3000:]}")
    row = json.loads(out.stdout.strip().splitlines()[-1])
    print(
        f"{shape.completion} tokens, {settings}: {row['generate_cpu']:.1f} + {row['update_cpu']:.1f} CPU s, "
        f"{row['seconds']:.1f} s, {row['peak_mib']:,.0f} MiB, {row['forwarded']:,.0f} tokens forwarded",
        flush=True,
    )
    return row


def long() -> None:
    """Step time and memory against the length of completions. What grows with its square is attention: a parabola is fitted,
    whose last term is compared with the products of attention."""
    lengths = [{"completion": n} | measured(replace(LONG, completion=n), "train.token_budget=65536") for n in LENGTHS]
    budgets = [{"how": how} | measured(LONG, settings) for how, settings in BUDGETS]
    n = np.array(LENGTHS, float)
    peak = np.array([row["peak_mib"] for row in lengths])
    slope, start = np.polyfit(n, peak, 1)
    fit: dict[str, Any] = {"mib_per_1000": 1000 * slope, "mib_start": start}
    fit["mib_worst"] = float(np.abs(slope * n + start - peak).max() / peak.max())
    for part in ("generate_cpu", "update_cpu"):
        seen = np.array([row[part] for row in lengths])
        square, linear, constant = np.polyfit(n, seen, 2)
        found = square * n**2 + linear * n + constant
        fit[part] = {"square": square, "linear": linear, "constant": constant}
        fit[part]["worst"] = float(np.abs(found - seen).max() / seen.max())
    print(json.dumps(fit, indent=1))
    save("long", {"base": vars(LONG), "lengths": lengths, "budgets": budgets, "fit": fit, "machine": machine()})


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return child(Shape(**json.loads(sys.argv[2])), sys.argv[3])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--long", action="store_true", help="completions of up to 4,096 tokens, a quarter of an hour")
    a = parser.parse_args()
    torch.set_num_threads(1)
    if a.long:
        return long()
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
