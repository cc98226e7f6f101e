"""Peak memory of one GRPO step, unift against TRL: every measurement in a process of its own.

    python benchmarks/memory.py [--quick]
    python benchmarks/memory.py --estimate     what `unift train --dry-run` says, against the peak of two steps

Reports the peak resident set of a process that loads the model and takes one step, and how it grows with
the vocabulary and the group size. On a GPU it is the peak of the CUDA allocator, both sides multiply in bfloat16, and the
result is kept apart.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import DEVICE, RESULTS, SHAPES, Shape, Unift, load, machine, peak_rss, prompts, save

SIDES = ("unift", "trl", "trl-checkpointing")


# (model, sizes, settings): long and short completions, weights or activations that take most.
ESTIMATES: list[tuple[str, Shape, str]] = [
    ("3m", Shape(350, 0, 256, 4), ""),
    ("3m", Shape(350, 0, 256, 4), "train.gradient_checkpointing=true"),
    ("3m", Shape(1024, 0, 1024, 1), "train.token_budget=4096"),
    ("60m", Shape(200, 0, 64, 4), ""),
    ("60m", Shape(200, 0, 64, 4), "model.dtype=bfloat16"),
    ("135m-random", Shape(100, 0, 16, 1), ""),
    ("135m-random", Shape(350, 0, 64, 1), ""),
]


def sized(vocab: int) -> tuple[Any, Any]:
    """The 3 M Llama with a larger head. The end token is one of ``vocab`` here, so that a row may end early, rarely."""
    import transformers as t

    model, tokenizer = load("3m")
    model.config.vocab_size = vocab
    larger = t.LlamaForCausalLM(model.config)
    larger.generation_config = model.generation_config
    return larger, tokenizer


def child(side: str, model_name: str, shape: Shape, vocab: int) -> None:
    torch.set_num_threads(1)
    model, tokenizer = sized(vocab) if vocab else load(model_name)
    rows = prompts(tokenizer, shape, shape.groups)
    loaded = peak_rss()
    cuda = DEVICE.type == "cuda"
    if side == "unift":
        Unift(model, tokenizer, shape, ("model.autocast=all",) if cuda else ()).step([tokens for _, tokens in rows])
    else:
        from vs_trl import trl_trainer

        with tempfile.TemporaryDirectory() as folder:
            texts = [text for text, _ in rows]
            trl_trainer(model, tokenizer, texts, shape, 1, side == "trl-checkpointing", folder, cuda).train()
    peak = peak_rss()
    if cuda:  # in KiB, as the others
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        peak, loaded = torch.cuda.max_memory_allocated() // 1024, weights // 1024
    print(json.dumps({"peak_mib": peak / 1024, "loaded_mib": loaded / 1024}))


def two_steps(name: str, shape: Shape, settings: str) -> None:
    """The optimizer has its state when the second one computes activations."""
    torch.set_num_threads(1)
    model, tokenizer = load(name)
    rows = [tokens for _, tokens in prompts(tokenizer, shape, shape.groups)]
    side = Unift(model.bfloat16() if "bfloat16" in settings else model, tokenizer, shape, tuple(settings.split()))
    for _ in range(2):
        side.step(rows)
    print(json.dumps({"peak_mib": peak_rss() / 1024}))


def estimated(name: str, shape: Shape, settings: str) -> dict[str, Any]:
    """What the shapes of the model and the lengths of the step say."""
    from unift.model import architecture, memory

    with torch.device("meta"):
        model, tokenizer = load(name)
    rules = Unift.settings(shape, tuple(settings.split()))
    pack = min(shape.shared_tokens, max(rules.train.token_budget, shape.prefix + shape.completion))
    work = memory.Work(pack, pack - shape.prefix, shape.groups * shape.g, shape.prefix, shape.completion, shape.g)
    built = architecture.from_shapes(model.config.to_dict(), rules.model)
    assert built is not None
    found = memory.estimate(built, rules.model, rules, work)
    return {"estimate_mib": found.peak / 2**20, "parts": found.text()}


def estimates() -> None:
    rows = []
    for name, shape, settings in ESTIMATES:
        row = {"model": name, "sizes": vars(shape), "settings": settings}
        row |= run(["--child-estimate", name, json.dumps(vars(shape)), settings]) | estimated(name, shape, settings)
        rows.append(row)
        ratio = row["estimate_mib"] / row["peak_mib"]
        print(
            f"{name} {shape} {settings}: {row['peak_mib']:,.0f} MiB, estimate {ratio:.2f} of it; {row['parts']}",
            flush=True,
        )
    save("estimate", {"rows": rows, "machine": machine()})


def run(words: list[str]) -> dict[str, Any]:
    out = subprocess.run([sys.executable, str(Path(__file__)), *words], capture_output=True, text=True)
    if out.returncode:
        sys.exit(f"{words} failed:\n{out.stderr[-3000:]}")
    return json.loads(out.stdout.strip().splitlines()[-1])


def measure(side: str, model_name: str, shape: Shape, vocab: int = 0) -> dict[str, float]:
    return run(["--child", side, model_name, json.dumps(vars(shape)), str(vocab)])


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        side, name, shape, vocab = sys.argv[2:6]
        return child(side, name, Shape(**json.loads(shape)), int(vocab))
    if sys.argv[1:2] == ["--child-estimate"]:
        return two_steps(sys.argv[2], Shape(**json.loads(sys.argv[3])), sys.argv[4])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--estimate", action="store_true", help="compare with the estimate instead")
    parser.add_argument("--quick", action="store_true", help="the 3 M model only")
    parser.add_argument("--model", choices=("135m", "135m-random"), default="135m", help="the larger one")
    parser.add_argument("--only", nargs="*", help="these cases, by name; the others' results stay as they are")
    a = parser.parse_args()
    if a.estimate:
        return estimates()
    cases: list[tuple[str, str, Shape, int]] = [(f"3m {n}", "3m", SHAPES["3m"][n], 0) for n in ("short", "knights")]
    small = replace(SHAPES["3m"]["short"], groups=2)
    cases += [(f"3m vocabulary {v}", "3m", small, v) for v in (8192, 49152, 151936)]
    cases += [(f"3m G={g}", "3m", replace(SHAPES["3m"]["countdown"], groups=4, g=g), 0) for g in (2, 8, 16)]
    if not a.quick:
        cases += [(f"{a.model} {n}", a.model, SHAPES[a.model][n], 0) for n in ("short", "knights")]
    target = "memory" + "-cuda" * (DEVICE.type == "cuda")
    kept = json.loads((RESULTS / f"{target}.json").read_text())["rows"] if a.only else []
    rows = {row["case"]: row for row in kept}
    for title, name, shape, vocab in cases:
        if a.only and title not in a.only:
            continue
        row: dict[str, Any] = {"case": title, "sizes": vars(shape), "vocab": vocab, "commit": machine()["commit"]}
        for side in SIDES:
            row[side] = measure(side, name, shape, vocab)
        row["saved"] = 1 - row["unift"]["peak_mib"] / row["trl"]["peak_mib"]
        rows[title] = row
        peaks = ", ".join(f"{s} {row[s]['peak_mib']:,.0f}" for s in SIDES)
        print(f"{title}: {peaks} MiB; {row['saved']:.0%} below TRL without checkpointing", flush=True)
        save(target, {"rows": list(rows.values()), "machine": machine()})


if __name__ == "__main__":
    main()
