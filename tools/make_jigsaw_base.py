"""Make the embedded base of the jigsaw: a tiny Idefics3 that knows the older tasks and the form of an answer, no places.

    python tools/make_jigsaw_base.py [FOLDER] [--rows 2] [--cols 2]    about 2 minutes of one core, deterministic on one machine

Two layers of vision and two of text, 64 wide; pictures of rows x cols tiles of 16 pixels, one token a tile (2 x 3 tiles stand on
a grey square of nine: the task's option ``square``). The texts are the older tasks with true answers (colour, shape, half) and
jigsaws whose answer is a RANDOM permutation, so that a puzzle is solved by luck, one in 24 at 2 x 2.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from unift import rng
from unift.rows.tasks import jigsaw, scenes

SEED, STEPS, ROWS, RATE, WARMUP = 0, 1200, 96, 2e-3, 40
POOL = 8000  # pictures of each kind, drawn once
TILE, PATCH, WIDTH, LAYERS, HEADS = 16, 8, 64, 2, 4
SHARES = {"colour": 0.15, "shape": 0.4, "half": 0.2, "jigsaw": 0.25}
DEFAULT = Path(__file__).parents[1] / "src" / "unift" / "model" / "embedded" / "jigsaw"
MARKS = ["<pad>", "<eos>", "<unk>", "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% if message['role'] != 'assistant' %}\n{% endif %}{% endfor %}"
)


def words_and_characters() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the words of questions and answers, and else single characters of ASCII."""
    words = ["Which", *(f" {word}" for word in jigsaw.KINDS.values()), "?\n"]
    words += [word for known in jigsaw.WORDS.values() for word in known]
    alphabet = [chr(i) for i in range(32, 127)] + ["\n"]
    vocabulary = {token: i for i, token in enumerate([*MARKS, *words, *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    known = "|".join(word.replace("?", r"\?") for word in words)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{known}|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(MARKS)
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=256, **names)


def make(rows: int, cols: int) -> tuple[Any, Any]:
    """(untrained model, its processor) for pictures of rows x cols tiles."""
    side = max(rows, cols)
    tokenizer, edge = words_and_characters(), side * TILE
    size = {"longest_edge": edge}
    images = transformers.Idefics3ImageProcessorPil(size=size, max_image_size=size, do_image_splitting=False)
    processor = transformers.Idefics3Processor(images, tokenizer, image_seq_len=side**2, chat_template=TEMPLATE)
    layers = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS}
    layers["num_attention_heads"] = HEADS
    text = {"model_type": "llama", "vocab_size": len(tokenizer), **layers, "num_key_value_heads": HEADS}
    text |= {"max_position_embeddings": 256, "bos_token_id": None}
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = transformers.Idefics3Config(
        text_config=text,
        vision_config=layers | {"image_size": edge, "patch_size": PATCH},
        scale_factor=TILE // PATCH,
        image_token_id=processor.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    return transformers.Idefics3ForConditionalGeneration(config), processor


def pool(kind: str, rows: int, cols: int) -> tuple[torch.Tensor, list[str], list[str]]:
    """Pictures as the processor gives them [POOL, 1, 3, edge, edge], and texts: prompts with placeholders, answers."""
    drawn = [jigsaw.draw(SEED, i, rows=rows, cols=cols, tile=TILE, kind=kind) for i in range(POOL)]
    pixels = np.stack([scenes.squared(picture) for picture, _ in drawn])
    tensor = (torch.from_numpy(pixels).permute(0, 3, 1, 2)[:, None].float() / 255 - 0.5) / 0.5
    shown = f"{MARKS[4]}{MARKS[5]}{MARKS[3] * max(rows, cols) ** 2}{MARKS[4]}"
    draws = rng.generator("jigsaw-base", SEED, kind)
    found = [
        word if isinstance(word, str) else "".join(jigsaw.solution((draws.permutation(rows * cols) + 1).tolist()))
        for _, word in drawn
    ]
    return tensor, [shown + jigsaw.question(kind)] * POOL, [text + jigsaw.END for text in found]


def tokens_of(tokenizer: Any, prompts: list[str], answers: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels [n, T]; padding is on the right, and prompts are no labels."""
    asked = [len(ids) for ids in tokenizer(prompts)["input_ids"]]
    rows = [ids + [tokenizer.eos_token_id] for ids in tokenizer([p + a for p, a in zip(prompts, answers)])["input_ids"]]
    longest = max(map(len, rows))
    tokens = torch.tensor([ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids in rows])
    labels = torch.tensor([[-100] * n + ids[n:] + [-100] * (longest - len(ids)) for n, ids in zip(asked, rows)])
    return tokens, labels


def main(folder: Path, rows: int, cols: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    model, processor = make(rows, cols)
    tokenizer = processor.tokenizer
    pools = [pool(kind, rows, cols) for kind in SHARES]
    pixels = torch.cat([p for p, _, _ in pools])
    tokens, labels = tokens_of(tokenizer, [t for _, p, _ in pools for t in p], [t for _, _, a in pools for t in a])
    counts = [round(share * ROWS) for share in SHARES.values()]
    draws = rng.generator("jigsaw-base", SEED, "batches")
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    began = time.process_time()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / STEPS)) / 2
        chosen = np.concatenate([POOL * i + draws.integers(0, POOL, n) for i, n in enumerate(counts)])
        logits = model(input_ids=tokens[chosen, :-1], pixel_values=pixels[chosen]).logits
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[chosen, 1:].flatten(), reduction="none")
        each = each.view(len(chosen), -1).sum(1) / (labels[chosen, 1:] >= 0).sum(1)
        optimizer.zero_grad()
        each.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == STEPS - 1:
            by_kind = " ".join(f"{k} {v.mean():.3f}" for k, v in zip(SHARES, each.detach().split(counts)))
            print(f"step {step}  loss a token: {by_kind}  {time.process_time() - began:.0f} s", flush=True)
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    print(f"{sum(p.numel() for p in model.parameters())} parameters -> {folder}")


if __name__ == "__main__":
    words = argparse.ArgumentParser(description="Make the embedded base of the jigsaw.")
    words.add_argument("folder", nargs="?", type=Path, default=DEFAULT)
    words.add_argument("--rows", type=int, default=2, help="of tiles")
    words.add_argument("--cols", type=int, default=2, help="of tiles")
    given = words.parse_args()
    main(given.folder, given.rows, given.cols)
