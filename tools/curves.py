"""The numerics gate: short runs whose loss, reward, gradient norm and first tokens are stored and compared.

    python tools/curves.py check            against tests/curves: equal bit for bit? else where, and by how much
    python tools/curves.py update           store anew (a change that is meant to move numbers; say why in the commit)
    python tools/curves.py update before/   store elsewhere, to compare on one machine: check before/

12 steps of uft, rft and sft on the lock with the embedded base, one thread, fp32. Equality of every bit holds on one
machine with one version of torch; elsewhere the check says how far apart the curves are. The reward is the share of
right codes, because the task's own is almost never seen without hints and would leave rft's curve empty.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

METHODS = ("uft", "rft", "sft")
STEPS = 12
FOLDER = Path(__file__).resolve().parents[1] / "tests" / "curves"
KEYS = ("loss", "loss/policy", "loss/hint", "reward", "grad/norm", "entropy", "kl", "tokens/forwarded")
SETTINGS = [
    f"train.steps={STEPS}",
    "train.prompts=4",
    "data.train_rows=32",
    "data.test_rows=2",
    "eval.every=0",
    "save.every=0",
    "save.rollouts=true",
    "log.gradients_every=0",
    "threads=1",
    f"reward.function={Path(__file__).resolve()}:right_codes",
]


def right_codes(completion: str, row: Any, hint: str = "") -> float:
    """Share of the letters that have their code under the key that was named; the reward of these runs."""
    from unift.rows.tasks.lock import KEYS as NAMES
    from unift.rows.tasks.lock import LETTERS, code_table

    text, word = hint + completion, row.answer["letters"]
    key = NAMES.find(text[:1]) if text else -1
    if key < 0:
        return 0.0
    table = code_table(row.answer["table_seed"])
    pairs = zip(word, text[1::2], text[2::2])
    return sum(a == b and code == str(table[LETTERS.index(a), key]) for a, b, code in pairs) / len(word)


def record(method: str, steps: int = STEPS) -> dict[str, Any]:
    """One run: per step the numbers of KEYS, and the tokens that the first step sampled (a list per group)."""
    from unift.config.resolve import parse_overrides, resolve
    from unift.training.loop import train
    from unift.training.run.metrics import read_metrics
    from unift.training.run.rollouts import read_rollouts

    sampled = [f"sample.completions={0 if method == 'sft' else 4}"]
    config = resolve(method, recipe="lock", overrides=parse_overrides(SETTINGS + sampled))
    with tempfile.TemporaryDirectory() as folder:
        train(config, Path(folder))
        metrics = read_metrics(Path(folder) / "metrics.jsonl")[1 : steps + 1]
        stored = read_rollouts(Path(folder), 0)
    tokens = [[s.tokens for s in group.samples] for group in stored[1]] if stored else []
    return {"steps": [{k: m[k] for k in KEYS if k in m} for m in metrics], "tokens": tokens}


def environment() -> dict[str, str]:
    import platform

    import torch

    return {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability(), "machine": platform.machine()}


def gap(a: float, b: float) -> float:
    """Relative difference; 0 only for equal numbers."""
    return 0.0 if a == b else abs(a - b) / max(abs(a), abs(b), 1e-6)


def compare(stored: dict[str, Any], new: dict[str, Any]) -> list[tuple[int, str, float]]:
    """(step from 1, key, relative difference) of whatever is not equal; tokens that differ count as infinite."""
    found = [] if stored["tokens"] == new["tokens"] else [(1, "tokens", math.inf)]
    if len(stored["steps"]) != len(new["steps"]):
        found.append((min(len(stored["steps"]), len(new["steps"])) + 1, "number of steps", math.inf))
    for number, (a, b) in enumerate(zip(stored["steps"], new["steps"]), start=1):
        for key in sorted(a.keys() | b.keys()):
            difference = gap(a[key], b[key]) if key in a and key in b else math.inf
            if difference:
                found.append((number, key, difference))
    return found


def main(words: list[str]) -> int:
    if not words or words[0] not in ("check", "update") or len(words) > 2:
        print(__doc__)
        return 2
    folder = Path(words[1]) if len(words) == 2 else FOLDER
    if words[0] == "update":
        folder.mkdir(parents=True, exist_ok=True)
    moved = 0
    for method in METHODS:
        path, new = folder / f"{method}.json", record(method)
        if words[0] == "update":
            path.write_text(json.dumps({"environment": environment(), **new}, indent=1) + "\n", encoding="utf-8")
            print(f"{method}: stored in {path}")
            continue
        if not path.is_file():
            print(f"{path} does not exist; store the curves first: python tools/curves.py update {folder}")
            return 2
        stored = json.loads(path.read_text(encoding="utf-8"))
        differences = compare(stored, new)
        moved += bool(differences)
        if not differences:
            print(f"{method}: identical over {len(new['steps'])} steps")
            continue
        step, key, _ = differences[0]
        worst = max(d for _, _, d in differences)
        print(f"{method}: differs from step {step} on ({key}); largest relative difference {worst:.1e}")
        if stored["environment"] != environment():
            print(f"  stored with {stored['environment']}, this is {environment()}: equal bits are not expected")
    return int(moved > 0)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils import logging

    logging.disable_progress_bar()
    sys.exit(main(sys.argv[1:]))
