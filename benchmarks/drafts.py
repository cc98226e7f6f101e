"""Drafts for sampling: the row's own solution, or its completions of the epoch before, checked in blocks of one forward.

    python benchmarks/drafts.py --name NAME [--rows 8,64] model.path=FOLDER data.task=chain sample.max_tokens=40 ...

A token is the inverse CDF of an addressed uniform, so a drafted token is accepted exactly when it is the token that would have
been drawn: the samples are those of the native engine, with fewer forwards. The same completions are sampled by both, alternating
in one process; the table says the drafted tokens that were accepted, forwards, tokens forwarded and CPU seconds.

``solution`` drafts the rest of the row's solution after the hint, ``last`` also the completions of an earlier sampling of the
row by the same weights, which is what a slow training leaves.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from common import machine, save, spread

from unift.config.resolve import parse_overrides, resolve
from unift.config.sections import SampleFrom
from unift.model.load import load_policy
from unift.model.policy import Policy
from unift.rows import dataset
from unift.sampling.engines import drafted, native
from unift.sampling.engines.base import Draws, Request
from unift.types import Sample

Tokens = list[int]


def with_drafts(
    policy: Policy, requests: Sequence[Request], drafts: Sequence[Sequence[Tokens]], max_tokens: int, temperature: float
) -> tuple[list[list[Sample]], dict[str, int]]:
    """Samples of one batch, and what it took: as `drafted.generate`, which does not count."""
    asked = [Request(r.prompt, r.draws, texts) for r, texts in zip(requests, drafts, strict=True)]
    with torch.no_grad(), policy.sampling(max_tokens):
        rows = drafted.DraftedRows(policy, asked, max_tokens, temperature)
        while rows.advance():
            pass
    return rows.samples(), rows.work


SOURCES = ("solution", "last")  # values of sample.draft


def requests_of(
    data: Any, count: int, share: float, g: int, max_tokens: int, epoch: int
) -> list[tuple[Request, Tokens]]:
    """Requests after a hint of this share of the steps, each with the rest of its solution."""
    found = []
    for i in range(count):
        row = data.encoded[i % len(data.encoded)]
        hint = row.hint(round(share * row.n_steps), row.n_steps)
        draws = Draws(("drafts", epoch, i), g, g, max_tokens)
        found.append((Request(row.prompt + hint, draws), row.solution[len(hint) :]))
    return found


def measure(
    policy: Policy, data: Any, rows: int, share: float, a: argparse.Namespace, sample: SampleFrom
) -> list[dict]:
    """A line a source of drafts, for ``rows`` completions side by side."""
    count, max_tokens, temperature = max(rows // a.g, 1), sample.max_tokens, sample.temperature
    asked = requests_of(data, count, share, a.g, max_tokens, 0)
    with torch.no_grad():
        last = native.generate(policy, [r for r, _ in asked], max_tokens, temperature, rows)
    asked = requests_of(data, count, share, a.g, max_tokens, 1)
    requests = [r for r, _ in asked]
    drafts = {
        "solution": [[rest] for _, rest in asked],
        "last": [[*(s.tokens for s in group), rest] for (_, rest), group in zip(asked, last, strict=True)],
    }
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in ("plain", *SOURCES)}
    same = {name: [0, 0, 0.0] for name in SOURCES}
    for _ in range(a.repeats + 1):
        for name in seen:
            cpu, wall = time.process_time(), time.perf_counter()
            if name == "plain":
                plain, counts = native.generate(policy, requests, max_tokens, temperature, rows), {}
            else:
                got, counts = with_drafts(policy, requests, drafts[name], max_tokens, temperature)
            # Under the load of other jobs CPU seconds alone can be compared.
            seen[name].append({"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, **counts})
            if name != "plain":
                pairs = [(x, y) for g, h in zip(plain, got, strict=True) for x, y in zip(g, h, strict=True)]
                equal = [(x, y) for x, y in pairs if x.tokens == y.tokens]
                gaps = [abs(p - q) for x, y in equal for p, q in zip(x.logps, y.logps, strict=True)]
                same[name] = [len(equal), len(pairs), max(gaps, default=0.0)]
    lengths = [len(s.tokens) for g in plain for s in g]
    line: list[dict] = []
    for name in SOURCES:
        kept = [x for x in zip(seen["plain"][1:], seen[name][1:], strict=True)]
        counts = seen[name][-1]
        line.append(
            {
                "rows": rows, "share": share, "source": name, "length": float(np.mean(lengths)), "longest": max(lengths),
                "speed_cpu": spread([p["cpu"] / q["cpu"] for p, q in kept]),
                "plain_cpu": spread([p["cpu"] for p, _ in kept]),
                "plain_forwards": max(lengths) - 1, "plain_forwarded": sum(lengths) - len(lengths),
                "forwards": counts["forwards"], "forwarded": counts["forwarded"],
                "accepted": counts["accepted"] / max(counts["drafted"], 1), "equal": same[name],
            }
        )  # fmt: skip
        r = line[-1]
        print(
            f"{rows} rows, share {share}, {name}: {r['speed_cpu']['median']:.2f} times as fast "
            f"[{r['speed_cpu']['min']:.2f}, {r['speed_cpu']['max']:.2f}], {100 * r['accepted']:.0f} % accepted, forwards "
            f"{r['plain_forwards']} -> {r['forwards']}, tokens {r['plain_forwarded']} -> {r['forwarded']}, equal {r['equal']}",
            flush=True,
        )
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "settings", nargs="+", help="key=value as for unift train: model.path, data.task, sample.max_tokens"
    )
    parser.add_argument("--name", required=True, help="of the model and its stage, in the table")
    parser.add_argument("--rows", default="8,16,64,256", help="completions side by side")
    parser.add_argument("--shares", default="0,0.5", help="shares of the solution that is shown")
    parser.add_argument("--g", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--note", default="")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    config = resolve("rft", overrides=parse_overrides(a.settings))
    policy = load_policy(config.model)
    data = dataset.encode(policy.tokenizer, dataset.load(config), config).train
    lines = [
        line
        for share in map(float, a.shares.split(","))
        for rows in map(int, a.rows.split(","))
        for line in measure(policy, data, rows, share, a, config.sample)
    ]
    save(
        f"drafts-{a.name}",
        {
            "name": a.name,
            "temperature": config.sample.temperature,
            "rows": lines,
            "g": a.g,
            "note": a.note,
            "machine": machine(),
        },
    )


if __name__ == "__main__":
    main()
