"""One GRPO step of TRL against one of unift: same weights, prompts, group size, lengths, precision, one update.

    python benchmarks/vs_trl.py --model 3m --shape short            # needs `pip install trl==1.16.0`
    python benchmarks/vs_trl.py --recipe smollm2                    # its model, prompts, group size and precision

TRL's own trainer runs its own loop. A callback stops the clock at the end of each of its steps and lets unift take one,
so the two sides alternate in one process with the same threads. The first pair is a warm-up and is dropped. What is the
same on both sides: model weights at the start, prompt tokens, completions per prompt, tokens per completion (the end
token is outside of the vocabulary), temperature 1, no KL, clip 0.2, token-mean loss, AdamW (fused), one update a batch,
the whole batch in one forward, rewards 0, 1, 0, 1, ... Neither evaluates, saves or logs to disk. TRL computes entropies,
and so does unift. Where there is a GPU, both sides are on it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from typing import Any

import torch
from common import DEVICE, RECIPES, SHAPES, Unift, clone, load, machine, now, prompts, recipe_prompts, save, spread
from transformers import TrainerCallback


def trl_trainer(
    model: Any,
    tokenizer: Any,
    texts: list[str],
    shape: Any,
    steps: int,
    checkpointing: bool,
    folder: str,
    bf16: bool = False,
) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=shape.groups * shape.g,
        gradient_accumulation_steps=1,
        num_generations=shape.g,
        max_completion_length=shape.completion,
        gradient_checkpointing=checkpointing,
        temperature=1.0,
        beta=0.0,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        max_steps=steps,
        shuffle_dataset=False,
        bf16=bf16,
        use_cpu=DEVICE.type == "cpu",
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(i % 2) for i in range(len(completions))]

    data = Dataset.from_dict({"prompt": texts})
    return GRPOTrainer(model=model, reward_funcs=reward, args=config, train_dataset=data, processing_class=tokenizer)


class Alternate(TrainerCallback):
    """TRL's callbacks: time each of its steps, then run and time one step of unift on the same prompts."""

    def __init__(self, ours: Any, token_lists: list[list[int]], shape: Any, keep: Any) -> None:
        self.ours, self.tokens, self.shape, self.keep = ours, token_lists, shape, keep
        self.pairs: list[dict[str, Any]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.generated, self.sampled = 0.0, 0
        self.began, self.cpu = now(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        theirs = {"seconds": now() - self.began, "generate": self.generated, "sampled": self.sampled}
        theirs |= {"update": theirs["seconds"] - self.generated, "cpu": time.process_time() - self.cpu}
        n, first = self.shape.groups, self.shape.groups * len(self.pairs)
        ours = self.ours.step(self.tokens[first : first + n])
        assert theirs["sampled"] == ours["sampled"], (theirs, ours)
        ratio, cpu = (theirs[k] / ours[k] for k in ("seconds", "cpu"))
        self.pairs.append({"trl": theirs, "unift": ours, "ratio": ratio, "ratio_cpu": cpu})
        print(
            f"  pair {len(self.pairs) - 1}: TRL {theirs['seconds']:.2f} s (generate {theirs['generate']:.2f}), "
            f"unift {ours['seconds']:.2f} s (generate {ours['generate']:.2f}), {ratio:.2f}x; "
            f"CPU seconds {theirs['cpu']:.2f} and {ours['cpu']:.2f}, {cpu:.2f}x",
            flush=True,
        )
        self.keep(self.pairs)


def summary(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and ranges of the pairs after the first."""
    kept = pairs[1:]
    part = lambda side, name: spread([p[side][name] for p in kept])  # noqa: E731
    return {
        "ratio": spread([p["ratio"] for p in kept]),
        "ratio_cpu": spread([p["ratio_cpu"] for p in kept]),
        "ratio_generate": spread([p["trl"]["generate"] / p["unift"]["generate"] for p in kept]),
        "ratio_update": spread([p["trl"]["update"] / p["unift"]["update"] for p in kept]),
        **{side: {n: part(side, n) for n in ("seconds", "cpu", "generate", "update")} for side in ("trl", "unift")},
        "pairs": pairs,
        "machine": machine(),
    }


def compare(a: argparse.Namespace) -> dict[str, Any]:
    """Run the pairs; with ``--save`` the result so far is kept after each of them."""
    model_name, shape_name, pairs, checkpointing, settings = (
        a.model,
        a.shape,
        a.pairs,
        a.checkpointing,
        tuple(a.settings),
    )
    bf16 = a.bf16 or bool(a.recipe)
    if a.recipe:
        (model_name, shape), shape_name = RECIPES[a.recipe], a.recipe
    else:
        shape = SHAPES[model_name][shape_name]
    shape = replace(shape, groups=a.groups or shape.groups)
    settings += ("model.autocast=all",) if bf16 else ()
    model, tokenizer = load(model_name)
    count = shape.groups * (pairs + 1)
    rows = recipe_prompts(tokenizer, a.recipe, count) if a.recipe else prompts(tokenizer, shape, count)
    ours = Unift(clone(model), tokenizer, shape, settings)
    head = {
        "model": model_name,
        "shape": shape_name,
        "sizes": vars(shape),
        "trl_gradient_checkpointing": checkpointing,
        "settings": list(settings),
        "device": DEVICE.type,
        "precision": "bfloat16" if bf16 else "float32",
        "tokens": {"plain": shape.plain_tokens, "shared": shape.shared_tokens},
        "note": a.note,
    }

    def keep(done: list[dict[str, Any]]) -> None:
        if a.save and len(done) > 1:
            name = (
                f"vs_trl-{model_name}-{shape_name}"
                + "-checkpointing" * checkpointing
                + "-cuda" * (DEVICE.type == "cuda")
            )
            save(name + ("-" + a.suffix if a.suffix else ""), {**head, **summary(done)})

    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(
            model, tokenizer, [text for text, _ in rows], shape, pairs + 1, checkpointing, folder, bf16
        )
        callback = Alternate(ours, [tokens for _, tokens in rows], shape, keep)
        trainer.add_callback(callback)
        generate = trainer._generate_and_score_completions

        def timed(inputs: Any) -> Any:
            began = now()
            out = generate(inputs)
            callback.generated += now() - began
            callback.sampled += int(out["completion_mask"].sum())
            return out

        trainer._generate_and_score_completions = timed
        print(f"{model_name} {shape_name} {shape}, TRL gradient checkpointing {'on' if checkpointing else 'off'}")
        trainer.train()
    return {**head, **summary(callback.pairs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(SHAPES), default="3m")
    parser.add_argument("--shape", default="short", help="short, countdown, knights, math")
    parser.add_argument("--recipe", choices=list(RECIPES), help="in the place of model and shape; in bfloat16")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--checkpointing", action="store_true", help="TRL's default; off is like for like")
    parser.add_argument("--bf16", action="store_true", help="both sides multiply in bfloat16, with float32 weights")
    parser.add_argument("--groups", type=int, help="prompts a step, instead of the shape's")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--note", default="", help="what else ran on the machine")
    parser.add_argument("--save", action="store_true", help="keep the result under benchmarks/results")
    parser.add_argument("--suffix", default="", help="of the file's name, for runs with other settings")
    parser.add_argument("settings", nargs="*", help="unift settings, key=value")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    record = compare(a)
    for name, what in (("ratio", "wall clock"), ("ratio_cpu", "CPU seconds")):
        r = record[name]
        print(f"TRL / unift, {what}: {r['median']:.2f}x [{r['min']:.2f}, {r['max']:.2f}] over {r['n']} pairs")


if __name__ == "__main__":
    main()
