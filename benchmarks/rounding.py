"""How exact a model's own float32 log-probs are: the untouched model in float32, by two libraries, against float64.

    python benchmarks/rounding.py --model 135m

No two ways to compute in float32 (a sampler and a trainer, say) can be expected to agree better than this.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import MODELS, Shape, load, machine, prompts, save

from unift.model import matmul


@torch.no_grad()
def logprobs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(model(ids).logits, -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(MODELS), default="135m")
    parser.add_argument("--length", type=int, default=200)
    a = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, tokenizer = load(a.model)
    model.eval()
    ids = torch.tensor([tokens for _, tokens in prompts(tokenizer, Shape(a.length, 0, 1, 1), 2)])
    found = {}
    for name, route in (("MKL", False), ("oneDNN", True)):
        matmul.route(route)
        found[name] = logprobs(model, ids)
    matmul.route(False)
    # A token of the model's own distribution at every position, since that is what a sampler looks at.
    token = torch.distributions.Categorical(logits=found["MKL"]).sample()[..., None]
    chosen = {name: l.gather(-1, token).double() for name, l in found.items()}
    chosen["float64"] = logprobs(model.double(), ids).gather(-1, token)
    rows = []
    for left, right in (("MKL", "float64"), ("oneDNN", "float64"), ("MKL", "oneDNN")):
        gap = (chosen[left] - chosen[right]).abs()
        rows.append({"pair": f"{left}, {right}", "mean": float(gap.mean()), "max": float(gap.max()), "n": gap.numel()})
        print("{pair}: mean {mean:.1e}, max {max:.1e} nats over {n} tokens".format(**rows[-1]))
    save(f"rounding-{a.model}", {"model": a.model, "rows": rows, "machine": machine()})


if __name__ == "__main__":
    main()
