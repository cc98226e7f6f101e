"""Start of a run and memory against the number of rows: 10,000, 100,000 and 1,000,000 rows of JSON Lines.

    python benchmarks/rows.py

Each measurement is a process of its own: rows read (or found in the cache), longest rows tokenised, the rows of a first
step drawn and tokenised. "memory": all rows as a list and tokenised, as small files are kept; "first": as unift starts on
a file that it has not seen; "again": on one that it has (a file of up to 32 MiB is kept in memory each time). Seconds are
wall time, CPU seconds (those of helper processes included) beside them; memory is the peak of resident memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIZES = (10_000, 100_000, 1_000_000)
PROMPTS = 32


def write(path: Path, n: int) -> None:
    """``n`` sums with three steps, about 500 bytes each."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(n):
            draw = random.Random(i)
            a, b, c = (draw.randint(10, 99) for _ in range(3))
            steps = [f"First, {a} + {b} = {a + b}. " * 4, f"Then {a + b} + {c} = {a + b + c}. " * 4, "Done. " * 12]
            prompt = f"Problem {i}: what is {a} + {b} + {c}? " + "Think it over. " * 10
            file.write(json.dumps({"prompt": prompt, "steps": steps, "answer": str(a + b + c), "level": i % 5}) + "\n")


def cpu_seconds() -> float:
    """Of this process and of helpers that ended."""
    return sum(os.times()[:4])


def start(file: str, kind: str) -> dict[str, Any]:
    """What a run does with rows until its first step, in this process."""
    from common import model_3m, peak_rss

    from unift.config.resolve import parse_overrides, resolve
    from unift.rows import dataset, store

    if kind == "memory":
        store.LARGE = 2**62
    own = [
        f"data.train={file}",
        "data.task=null",
        "data.test=null",
        "data.train_rows=null",
        "data.max_prompt=2048",
        "reward.function=x.py:f",
    ]
    config = resolve("uft", recipe="lock", overrides=parse_overrides([*own, "model.path=embedded:countdown"]))
    tokenizer = model_3m()[1]
    base = peak_rss() / 1024
    began, cpu = time.perf_counter(), cpu_seconds()
    data = dataset.encode(tokenizer, dataset.load(config), config)
    batch = dataset.rows_of_step(0, 0, PROMPTS, len(data.train.rows))
    tokens = sum(len(data.train.encoded[i].solution) for i in batch)
    seconds, cpu = time.perf_counter() - began, cpu_seconds() - cpu
    peak = peak_rss() / 1024
    return {"rows": len(data.train.rows), "kind": kind, "seconds": seconds, "cpu": cpu, "mib": peak - base,
            "peak_mib": peak, "tokens": tokens, "fingerprint": data.fingerprint}  # fmt: skip


def measured(file: Path, kind: str, cache: Path) -> dict[str, Any]:
    environment = os.environ | {"UNIFT_CACHE": str(cache)}
    found = subprocess.run(
        [sys.executable, __file__, "--one", str(file), kind],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(found.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, metavar=("FILE", "KIND"))
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--most-in-memory", type=int, default=100_000, help="largest size that is also kept in memory")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(start(*args.one)))
        return
    from common import machine, save

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="unift-rows-") as folder:
        for n in args.sizes:
            file, cache = Path(folder) / f"{n}.jsonl", Path(folder) / f"cache-{n}"
            write(file, n)
            kinds = (["memory"] if n <= args.most_in_memory else []) + ["first", "again"]
            for kind in kinds:
                rows.append(measured(file, kind, cache))
                print(
                    " ".join(f"{k}={v:,.2f}" if isinstance(v, float) else f"{k}={v}" for k, v in rows[-1].items()),
                    flush=True,
                )
            file.unlink()
    save("rows", {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
