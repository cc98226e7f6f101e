"""Updates of tiny models with a vision tower, in one process or in shards of several: what `training/test_pictures_sharded.py`
compares. As a script: every case of the JSON file on the command line, by processes of torchrun."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import vision_zoo as zoo
from conftest import settings

from unift import processes
from unift.config.surroundings import Engine, Lora
from unift.model import critic, lora, vision
from unift.model.packs import COMPLETION, DEMO, Item, Member
from unift.model.sharding import full
from unift.rows.readers import rows_of
from unift.rows.tokens import encode_rows
from unift.training import update
from unift.training.optimizer import make_optimizer

# Pictures of each row, and letters of its question: the two longest go to two processes, and so on.
ROWS = ((2, 9), (0, 90), (1, 8), (0, 60), (0, 50), (1, 7), (0, 40))
STEPS = 2


def items_of(policy, processor, seed):
    """One item a row, with a hint, completions with advantages, and a demonstration."""
    rng, reader = np.random.default_rng(seed), policy.reader
    rows = [
        {
            "prompt": [
                {"role": "user", "content": [*[{"type": "image"}] * n, {"type": "text", "text": "q" * letters}]}
            ],
            "images": [zoo.noise(7 * i + j, *((32, 48), (64, 32))[j]) for j in range(n)],
            "steps": [f" step {i}."],
            "answer": str(i),
        }
        for i, (n, letters) in enumerate(ROWS)
    ]
    if reader.needs_pictures:
        rows = [row for row in rows if row["images"]]
    known, items = len(processor.tokenizer), []
    for i, e in enumerate(encode_rows(processor.tokenizer, rows_of(rows, need_steps=False), 400)):
        tokens = [rng.integers(known - 90, known - 10, n).tolist() for n in (4, 1, 6)]
        members = [
            Member(own, COMPLETION, a, logps=[-4.0] * len(own), returns=[0.5] * len(own), values=[0.1] * len(own))
            for own, a in zip(tokens, (1.0, -0.7, 0.4), strict=True)
        ]
        hint = e.solution[:3] if i % 2 else []
        rest = Member(e.solution[len(hint) :], DEMO) if i % 3 == 0 else None
        items.append(Item(e.prompt, hint, members + ([rest] if rest else []), address=(i,), shown=e.shown))
    return items


def policy_of(family, adapters, frozen, dtype):
    """As `load_policy` makes it of a folder."""
    policy, _, processor = zoo.policy(family, getattr(torch, dtype))
    outside = vision.outside_text(policy.model) if frozen else []
    for name in outside:
        policy.model.get_submodule(name).requires_grad_(False)
    if adapters:
        torch.manual_seed(1)
        policy.model, policy.lora = lora.adapt(policy.model, Lora(rank=2), outside), True
        with torch.no_grad():
            for name, p in policy.model.named_parameters():
                if "lora_B" in name:  # which begin at 0, where A has no gradient
                    p.copy_(0.1 * torch.randn_like(p))
    return policy, processor


def updates(family, adapters=False, frozen=False, dtype="float64", method="uft", words=(), text=False):
    """What some updates leave behind: losses and norms of each, gradients and weights after the last, and of each pass
    which processes showed pictures (None: a pack that keeps others company). text: no row shows any."""
    policy, processor = policy_of(family, adapters, frozen, dtype)
    how = ["train.lr=0.001", "train.token_budget=150", "likelihood.weight=0.1", "train.clip_norm=1000", *words]
    rules = settings(method, *how)
    valued = method == "ppo"
    if processes.size() > 1:
        policy = policy.sharded(critic.new_critic(policy) if valued else None)
    if valued:
        policy.critic = critic.new_critic(policy)
    optimizer, told, shown = make_optimizer(policy, rules.train), [], []
    for step in range(STEPS):
        items = items_of(policy, processor, step)
        items = [i for i in items if i.shown is None] if text else items
        for packs in update.prepare(policy, items, rules, None):
            own = [None if p.filler else any(p.shown) for p in packs]
            shown += list(zip(*processes.gather("what is shown", own), strict=True))
            order = update.Order(1e-3, step == 1, Path("nonfinite.pt"), Engine(gap_limit=100))
            told.append(update.apply(policy, optimizer, packs, rules, order))
    named = policy.named_parameters()
    return {
        "metrics": told,
        "shown": shown,
        "gradients": {n: full(p.grad).clone() for n, p in named if p.grad is not None},
        "weights": {n: full(p.detach()).clone() for n, p in named},
    }


def main():
    file = Path(sys.argv[1])
    with processes.joined():
        for name, how in json.loads(file.read_text()).items():
            found = updates(**how)
            if processes.first():
                torch.save(found, file.parent / f"{name}.pt")
                print(name, flush=True)


if __name__ == "__main__":
    main()
