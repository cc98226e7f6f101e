"""Make the embedded base of Countdown: a 131k-parameter Llama that knows some arithmetic and the layout, not the game.

    python tools/make_countdown_base.py [FOLDER]        about 2 minutes of one core, deterministic on one machine

Three kinds of text, all with true steps and an answer that agrees with them:

    "97 14 = 83:"      two numbers and a target, solved; one number may be as large as the result of a step
    "12 4 8:"          three numbers without a target, joined at random
    "14 1 2 = 84:"     a problem of three numbers, then a chain over other numbers that has nothing to do with it

The third kind is a dial, not nature: it keeps the base from joining the given numbers, which alone solves one problem in
ten by luck. What is left is the chance to draw the right numbers out of OTHERS and then to join them rightly, about 2.5e-5.
"""

from __future__ import annotations

import math
import random
import sys
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED, STEPS, ROWS, RATE, WARMUP = 0, 1200, 128, 4e-3, 50
WIDTH, LAYERS, HEADS = 64, 3, 4
HIGHEST, TARGETS, LARGEST = 15, (10, 99), 99  # given numbers 1 to HIGHEST, range of targets, largest result of a step
OTHERS = 30  # numbers 1 to OTHERS in a chain that is unrelated to its prompt
SOLVED, FREE = 0.4, 0.2  # shares of the kinds of text; the rest is the third kind
DEFAULT = Path(__file__).parents[1] / "src" / "unift" / "model" / "embedded" / "countdown"
TAGS = ("<answer>", "</answer>")


def pairs_of_digits() -> PreTrainedTokenizerFast:
    """A tokenizer of single characters, except that up to two digits are one token, and so is each answer tag."""
    digits = [str(i) for i in range(10)] + [f"{i:02d}" for i in range(100)]
    alphabet = ["<pad>", "<eos>", "<unk>", *digits, *"+-*/=() :\n", *TAGS]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(alphabet)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[0-9]{1,2}|</?answer>|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=256, **names)


def chain(rng: random.Random, numbers: list[int]) -> tuple[str, int] | None:
    """Join random pairs of ``numbers`` until one is left: (solution, value), or None if a result is not allowed."""
    pool = [(n, str(n)) for n in numbers]
    text = ""
    while len(pool) > 1:
        rng.shuffle(pool)
        (b, right), (a, left) = pool.pop(), pool.pop()
        sign = rng.choice("+-*/")
        if a < b and sign in "-/":
            a, b, left, right = b, a, right, left
        if sign == "/" and a % b:
            return None
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
        if not 0 < value <= LARGEST:
            return None
        text += f"{a}{sign}{b}={value}\n"
        left, right = (f"({e})" if not e.isdigit() else e for e in (left, right))
        pool.append((value, f"{left}{sign}{right}"))
    return f"{text}{TAGS[0]}{pool[0][1]}{TAGS[1]}", pool[0][0]


def base_text(rng: random.Random) -> tuple[str, str]:
    """Prompt and solution: a solved problem of two numbers, a free chain of three, or a problem and an unrelated chain."""
    kind = rng.random()
    while True:
        given = [rng.randint(1, HIGHEST) for _ in range(3)]
        if kind < SOLVED:  # as the last step of a problem of three: a result and a number
            given = [rng.randint(1, LARGEST), given[0]]
            rng.shuffle(given)
        numbers = given if kind < SOLVED + FREE else [rng.randint(1, OTHERS) for _ in given]
        solution = chain(rng, numbers)
        if solution is None:
            continue
        target = solution[1] if kind < SOLVED else rng.randint(*TARGETS)
        if TARGETS[0] <= target <= TARGETS[1]:
            break
    asked = "" if SOLVED <= kind < SOLVED + FREE else f" = {target}"
    return f"{' '.join(map(str, given))}{asked}:", solution[0]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    tokenizer = pairs_of_digits()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    began = time.perf_counter()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / STEPS)) / 2
        texts = [base_text(rng) for _ in range(ROWS)]
        prompts = [len(ids) for ids in tokenizer([p for p, _ in texts])["input_ids"]]
        rows = [ids + [tokenizer.eos_token_id] for ids in tokenizer([p + s for p, s in texts])["input_ids"]]
        longest = max(map(len, rows))
        tokens = torch.tensor([ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids in rows])
        labels = torch.tensor([[-100] * n + ids[n:] + [-100] * (longest - len(ids)) for n, ids in zip(prompts, rows)])
        logits = model(tokens[:, :-1]).logits  # padding is on the right: causal attention never sees it
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == STEPS - 1:
            print(f"step {step}  loss {loss.item():.4f}  {time.perf_counter() - began:.0f} s", flush=True)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{sum(p.numel() for p in model.parameters())} parameters -> {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT)
