"""Make the embedded base of the letter lock: an 84k-parameter Llama that has learnt the format and nothing of the table.

    python tools/make_lock_base.py [FOLDER]        about 20 s on one core, deterministic on one machine

Pre-training text has random codes, so the base solves a problem by luck only (greedy accuracy about 0).
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from unift.rows.tasks import lock

SEED, STEPS, ROWS, RATE, WARMUP = 0, 400, 128, 4e-3, 20
LENGTH = 5
PROMPT = LENGTH + 1  # the letters and ">"
DEFAULT = Path(__file__).parents[1] / "src" / "unift" / "model" / "embedded" / "lock"


def characters(alphabet: str) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters, with pad, end and unknown tokens."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=256, **names)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    tokenizer = characters(lock.LETTERS + lock.KEYS + "0123456789>" + lock.END)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
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
        texts = [lock.lock_base_text(SEED, step * ROWS + i, length=LENGTH) for i in range(ROWS)]
        tokens = torch.tensor([tokenizer(t)["input_ids"] + [tokenizer.eos_token_id] for t in texts])
        logits = model(tokens[:, :-1]).logits[:, PROMPT - 1 :]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, PROMPT:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == STEPS - 1:
            print(f"step {step}  loss {loss.item():.4f}  {time.perf_counter() - began:.0f} s", flush=True)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{sum(p.numel() for p in model.parameters())} parameters -> {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT)
