"""What each technique buys: one unift step with each switched off in turn, alternating in one process.

python benchmarks/ablation.py --model 3m --shape knights
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from common import SHAPES, Unift, clone, load, machine, prompts, save, spread

from unift.model import matmul
from unift.model.attention.packed import stock_attention
from unift.model.packs import Item, ItemWeights, pack
from unift.sampling.engines import native


def alone(items: Any, which: Any, weights: Any, settings: Any) -> Any:
    """``pack`` with every completion a group of its own: the prefix is forwarded once for each."""
    split, own = [], []
    for i in which:
        w, n = weights[i], len(items[i].members)
        for j, member in enumerate(items[i].members):
            split.append(Item(items[i].prompt, items[i].hint, [member]))
            own.append(
                ItemWeights([w.policy[j]], w.likelihood / n, [w.own[j]], w.entropy_hint / n, [w.entropy[j]], w.given)
            )
    return PACK(split, range(len(split)), own, settings)


def one_by_one(side: Unift, requests: Any, *args: Any, **kwargs: Any) -> Any:
    """Sampling with every completion a prompt of its own: prefilled and cached once for each."""
    flat = [native.Request(r.prompt, r.uniforms()[j : j + 1]) for r in requests for j in range(r.samples)]
    out = GENERATE(side, flat, *args, **kwargs)
    g = requests[0].samples
    return [[s for x in out[i : i + g] for s in x] for i in range(0, len(out), g)]


def everywhere(pol: Any, pack: Any, temperature: float = 1.0) -> Any:
    """Log-probs with the head at every position of the pack, as a forward with full logits does."""
    hidden = pol.hidden(pack.tokens_T, pack.positions_T, pack.layout)
    logp = torch.log_softmax(pol.logits(hidden).float() / temperature, -1)
    entropy = -(logp.detach().exp() * logp.detach()).sum(-1)
    picked = logp.index_select(0, pack.at_S)
    return picked.gather(1, pack.target_S[:, None])[:, 0], entropy.index_select(0, pack.at_S)


PACK, GENERATE, ROUTE = pack, native.generate, "oneDNN altogether"


class Stock:
    """Attention by stock operations, with copies of the prefix for every completion."""

    apply = staticmethod(stock_attention)


@contextmanager
def without(name: str, side: Unift) -> Iterator[None]:
    patches = {
        "nothing (all on)": [],
        "shared prefix in training": [mock.patch("unift.training.update.pack", alone)],
        "shared prefix in sampling": [mock.patch("unift.sampling.engines.choose.generate", one_by_one)],
        "merged attention": [mock.patch("unift.model.attention.FlashAttention", Stock)],
        "head at loss positions only": [mock.patch("unift.training.update.logprobs", everywhere)],
        "kept logits": [mock.patch("unift.model.logprobs.KEEP", 0)],
        "packed weights in sampling": [mock.patch.object(matmul, "PACK_LEAST", float("inf"))],
        ROUTE: [],
    }[name]
    # Prefill uses the layout of training, so the stock attention needs the pieces that the merged one offers.
    side.route = False if name == ROUTE else None
    for p in patches:
        p.start()
    try:
        yield
    finally:
        for p in patches:
            p.stop()
        side.route = None


NAMES = (
    "nothing (all on)",
    "shared prefix in training",
    "shared prefix in sampling",
    "merged attention",
    "head at loss positions only",
    "kept logits",
    "packed weights in sampling",
    ROUTE,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(SHAPES), default="3m")
    parser.add_argument("--shape", default="knights")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--note", default="")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    shape = SHAPES[a.model][a.shape]
    model, tokenizer = load(a.model)
    side = Unift(clone(model), tokenizer, shape)
    tokens = [t for _, t in prompts(tokenizer, shape, shape.groups)]
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES}
    for _ in range(a.repeats + 1):
        for name in NAMES:
            with without(name, side):
                seen[name].append(side.step(tokens))
    rows = []
    for name in NAMES:
        kept, base = seen[name][1:], seen[NAMES[0]][1:]
        ratio = spread([x["cpu"] / y["cpu"] for x, y in zip(kept, base, strict=True)])
        row: dict[str, Any] = {"off": name, "ratio_cpu": ratio, "forwarded": kept[0]["forwarded"]}
        row |= {k: spread([x[k] for x in kept]) for k in ("cpu", "seconds", "generate", "update")}
        rows.append(row)
        print(
            f"without {name}: {ratio['median']:.2f}x [{ratio['min']:.2f}, {ratio['max']:.2f}] of the CPU seconds",
            flush=True,
        )
    save(f"ablation-{a.model}-{a.shape}", {"rows": rows, "sizes": vars(shape), "note": a.note, "machine": machine()})


if __name__ == "__main__":
    main()
