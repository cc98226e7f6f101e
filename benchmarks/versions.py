"""Two versions of unift on a recipe, alternating: CPU seconds a step, of an evaluation, and their ratios.

    git worktree add ../before COMMIT
    python benchmarks/versions.py ../before --recipe smollm2 --methods uft,rft,sft --save

Each measurement is a process of its own, which trains ``--steps`` steps on the version's own ``src`` by `unift.train` and says the
CPU seconds of each; the first step is a warm-up. Completions of a run depend on the weights, and these on rounding, so both
versions begin from the same model and take few steps: the recipe's after ``--warm`` steps of SFT, because a base that never ends its
answers is not what a run is about. "evaluate" is `unift.evaluate` of the recipe's held-out rows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
# Nothing but steps: no evaluation and no checkpoint between them, and hints as in the middle of a run.
QUIET = {"eval.every": 0, "eval.train_rows": 0, "save.every": 0, "train.budget": None, "threads": 1}
HALF = {"show.schedule": "constant", "show.high": 0.5}


def warm(recipe: str, steps: int, folder: str) -> str:
    """The model after a few steps of SFT, as a folder."""
    import unift

    unift.train("sft", recipe=recipe, run=folder, quiet=True, **{"train.steps": steps, "data.test_rows": 1, **QUIET})
    return str(Path(folder) / "model")


def child(recipe: str, method: str, steps: int, model: str) -> None:
    import unift

    if method == "evaluate":
        cpu = time.process_time()
        unift.evaluate(model, recipe=recipe, **{"model.gguf": None, "threads": 1})
        print(json.dumps([time.process_time() - cpu]))
        return
    settings = QUIET | (HALF if method.startswith("uft") else {}) | {"model.gguf": None}
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        unift.train(
            method,
            model=model,
            recipe=recipe,
            run=folder,
            quiet=True,
            on_step=lambda *_: ends.append(time.process_time()),
            **{"train.steps": steps, "data.test_rows": 1, **settings},
        )
    print(json.dumps([b - a for a, b in zip(ends, ends[1:], strict=False)]))


def measure(source: Path, a: argparse.Namespace, method: str, model: str) -> float:
    """CPU seconds of a step, the mean after the first."""
    call = [
        sys.executable,
        __file__,
        "--recipe",
        a.recipe,
        "--methods",
        method,
        "--steps",
        str(a.steps),
        "--child",
        model,
    ]
    env = os.environ | {"PYTHONPATH": str(source / "src"), "OMP_NUM_THREADS": "1"}
    out = subprocess.run(call, capture_output=True, text=True, env=env)
    if out.returncode:
        sys.exit(out.stderr)
    seconds = json.loads(out.stdout.strip().splitlines()[-1])
    return sum(seconds) / len(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, nargs="?", help="a checkout of the other version")
    parser.add_argument("--recipe", default="smollm2")
    parser.add_argument("--methods", default="uft,rft,sft,evaluate", help="presets, and evaluate")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", type=int, default=12)
    parser.add_argument("--note", default="", help="what else ran on the machine")
    parser.add_argument("--save", action="store_true", help="keep the result under benchmarks/results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child:
        return child(a.recipe, a.methods, a.steps, a.child)
    with tempfile.TemporaryDirectory() as folder:
        compare(a, warm(a.recipe, a.warm, folder))


def compare(a: argparse.Namespace, model: str) -> None:
    from common import machine, save, spread

    record: dict[str, Any] = {"recipe": a.recipe, "note": a.note, "methods": {}}
    commits = [
        subprocess.run(
            ["git", "-C", str(p), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip()
        for p in (a.before, HERE)
    ]
    record["commits"] = {"before": commits[0], "now": commits[1]}
    for method in a.methods.split(","):
        pairs = [(measure(a.before, a, method, model), measure(HERE, a, method, model)) for _ in range(a.rounds)]
        ratio = spread([x / y for x, y in pairs])
        record["methods"][method] = {
            "ratio": ratio, "before": spread([x for x, _ in pairs]), "now": spread([y for _, y in pairs])
        }  # fmt: skip
        before, now = (record["methods"][method][side]["median"] for side in ("before", "now"))
        print(
            f"{a.recipe} {method}: {before:.2f} -> {now:.2f} CPU seconds, {ratio['median']:.2f} times as fast "
            f"[{ratio['min']:.2f}, {ratio['max']:.2f}], {ratio['n']} pairs",
            flush=True,
        )
        if a.save:
            save(f"versions-{a.recipe}", {**record, "machine": machine()})


if __name__ == "__main__":
    main()
