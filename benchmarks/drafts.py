"""Drafts for sampling: the row's own solution, or its completions of the epoch before, checked in blocks of one forward.

    python benchmarks/drafts.py MODEL [--name NAME] [--rows 8,16,64] [key=value ...]

A token is the inverse CDF of an addressed uniform, so a drafted token is accepted exactly when it is the token that would have
been drawn: the samples are those of the native engine, with fewer forwards. The same completions are sampled by both, alternating
in one process; the table says the drafted tokens that were accepted, forwards, tokens forwarded and CPU seconds.

The sampler lives here and not in the package, for the reason that docs/performance.md gives.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from common import machine, save, spread
from torch import Tensor

from unift.config.resolve import parse_overrides, resolve
from unift.model.attention.decode import DecodeLayout
from unift.model.load import load_policy
from unift.model.policy import Policy
from unift.rows import dataset
from unift.sampling.engines import native
from unift.sampling.engines.base import Draws, Request
from unift.types import Sample

Tokens = list[int]
Drafter = Callable[[Tokens], Tokens]  # what may follow these tokens of a completion

# ---------------------------------------------------------------------------------------------- drafts


def aligned(texts: Sequence[Tokens]) -> Drafter:
    """The rest of the first text that begins with what was drawn; after a token that is in no text, nothing."""

    def propose(drawn: Tokens) -> Tokens:
        return next((t[len(drawn) :] for t in texts if len(t) > len(drawn) and t[: len(drawn)] == drawn), [])

    return propose


def looked_up(texts: Sequence[Tokens], least: int = 2, most: int = 8) -> Drafter:
    """As `aligned`; where no text begins so, what follows the longest end of it, ``least`` tokens or more, in any text."""
    exact = aligned(texts)

    def propose(drawn: Tokens) -> Tokens:
        if found := exact(drawn):
            return found
        best: Tokens = []
        longest = least - 1
        for text in texts:
            for end in range(1, len(text)):
                n = 0
                while n < min(most, end, len(drawn)) and text[end - 1 - n] == drawn[-1 - n]:
                    n += 1
                if n > longest:
                    longest, best = n, text[end:]
        return best

    return propose


# ---------------------------------------------------------------------------------------------- sampler


class BlockLayout(DecodeLayout):
    """Several new tokens a row, as many as each has: flat tokens T, of row ``row_T`` at its own position ``at_T`` (W: the most
    of any row). Positions that were written for tokens not accepted are hidden until they are written again."""

    def place(self, row_T: Tensor, at_T: Tensor) -> None:
        """Before a forward. Tokens of a row stand side by side, in order."""
        g, n = self.shape[1], self.shape[0] * self.shape[1]
        self.row_T, self.at_T = row_T, at_T
        count_N = torch.bincount(row_T, minlength=n)
        first_N = count_N.cumsum(0) - count_N
        within_T = torch.arange(len(row_T)) - first_N[row_T]
        self.width = int(count_N.max())
        self.slot_T = row_T * self.width + within_T
        self.token_S = torch.zeros(n * self.width, dtype=torch.long)
        self.token_S[self.slot_T] = torch.arange(len(row_T))
        at_BGW = torch.zeros(n * self.width, dtype=torch.long)
        at_BGW[self.slot_T] = at_T
        beyond = torch.arange(self.capacity) > at_BGW[:, None]
        dtype = next(iter(self.members.values()))[1].dtype
        hidden = torch.zeros(beyond.shape, dtype=dtype).masked_fill_(beyond, -torch.inf)
        self.hidden_B1GW1S = hidden.view(-1, 1, g, self.width, 1, self.capacity)

    def attend(self, layer: int, q_1HTD: Tensor, k_1KTD: Tensor, v_1KTD: Tensor, scale: float) -> Tensor:
        (b, g), (_, h, _, d), w = self.shape, q_1HTD.shape, self.width
        kv = k_1KTD.shape[1]
        rep = h // kv
        keys, values = self.members[layer]
        for cache, x_1KTD in ((keys, k_1KTD), (values, v_1KTD)):
            cache[self.row_T // g, :, self.row_T % g, self.at_T] = x_1KTD[0].transpose(0, 1).to(cache.dtype)
        k_BKDP, v_BKPD = self.prefix[layer]
        p = v_BKPD.shape[2]
        q_SHD = (q_1HTD[0].transpose(0, 1).to(values.dtype) * scale).index_select(0, self.token_S)
        q = q_SHD.view(b, g, w, kv, rep, d).permute(0, 3, 1, 2, 4, 5).contiguous()
        to_prefix = q.view(b, kv, g * w * rep, d) @ k_BKDP
        if self.mask_B11P is not None:
            to_prefix += self.mask_B11P
        to_self = (q.view(b, kv, g, w * rep, d) @ keys.transpose(3, 4)).view(b, kv, g, w, rep, -1)
        to_self += self.hidden_B1GW1S
        weights = torch.cat([to_prefix.view(b, kv, g, w, rep, p), to_self], dim=-1).softmax(-1)
        out = (weights[..., :p].reshape(b, kv, g * w * rep, p) @ v_BKPD).view(b, kv, g, w * rep, -1)
        out += weights[..., p:].reshape(b, kv, g, w * rep, -1) @ values
        out = out.view(b, kv, g, w, rep, -1).permute(0, 2, 3, 1, 4, 5).reshape(b * g * w, h, -1)
        return out.index_select(0, self.slot_T)[None]


class Drafted(native._Rows):
    """The rows of a batch on the CPU, each as far as its accepted drafts have brought it."""

    def __init__(
        self,
        policy: Policy,
        requests: Sequence[Request],
        drafters: Sequence[Drafter],
        max_tokens: int,
        most: int,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(policy, requests, max_tokens, temperature)
        g, self.most = self.state.shape[1], most
        self.drafters = [drafters[slot // g] for slot in range(self.grid.size)]
        self.drawn = [[int(t)] for t in self.token_N]
        self.logps = [[float(x)] for x in self.logps_NL[:, 0]]
        self.ended = self.done_N.tolist()  # by EOS, or no sample at all
        self.blocks = [min(4, most)] * self.grid.size  # tokens drafted next: doubled when all were accepted
        self.stops = set(self.eos.tolist())
        self.forwards = self.forwarded = self.proposed = self.accepted = 0

    def open(self, slot: int) -> bool:
        return not self.ended[slot] and len(self.drawn[slot]) < self.max_tokens

    def advance(self) -> bool:
        """One forward. False once every row has ended."""
        slots = self.slot_N.tolist()
        open_N = np.array([self.open(s) for s in slots])
        if not open_N.any():
            return False
        if self.drop(open_N.reshape(self.state.shape)):
            slots = self.slot_N.tolist()
        drafts: dict[int, Tokens] = {}  # by the row in the present state
        flat: list[tuple[int, int, int]] = []  # row, position, token
        for n, slot in enumerate(slots):
            if not self.open(slot):
                continue
            drawn = self.drawn[slot]
            room = min(self.blocks[slot], self.max_tokens - len(drawn) - 1)
            drafts[n] = self.drafters[slot](drawn)[:room] if room > 0 else []
            flat += [(n, len(drawn) - 1 + j, token) for j, token in enumerate([drawn[-1], *drafts[n]])]
        row_T, at_T, token_T = torch.tensor(flat).unbind(1)
        need = int(at_T.max()) + 1
        if need > self.state.capacity:
            self.state.grow(min(max(need, self.state.capacity + native.BLOCK), self.max_tokens))
        layout = self.state
        blocks = BlockLayout(layout.prefix, layout.mask_B11P, layout.members, layout.shape, layout.filled_1)
        blocks.place(row_T, at_T)
        logits_TV = self.policy.logits(self.policy.hidden(token_T, self.start_N[row_T] + at_T, blocks))
        drawn_T, logp_T = self.choose(logits_TV, self.slot_N[row_T], at_T + 1)
        found, logps, first = drawn_T.tolist(), logp_T.double().tolist(), 0
        self.forwards += 1
        self.forwarded += len(flat)
        for n, draft in drafts.items():
            self._take(slots[n], draft, found[first : first + len(draft) + 1], logps[first : first + len(draft) + 1])
            first += len(draft) + 1
        return True

    def _take(self, slot: int, draft: Tokens, drawn: Tokens, logps: list[float]) -> None:
        """``drawn``: the token after the row's last one, then after each drafted one; right up to the first that the draft
        did not foresee."""
        same = 0
        while same < len(draft) and draft[same] == drawn[same] and draft[same] not in self.stops:
            same += 1
        ends = drawn[same] in self.stops
        self.drawn[slot] += drawn[: same + 1]
        self.logps[slot] += logps[: same + 1]
        self.ended[slot] = ends
        foreseen = same + (same < len(draft) and draft[same] == drawn[same])
        self.proposed += len(draft)
        self.accepted += foreseen
        if draft:
            self.blocks[slot] = min(2 * self.blocks[slot], self.most) if foreseen == len(draft) else max(1, same)

    def samples(self) -> list[list[Sample]]:
        return [
            [Sample(self.drawn[s], self.logps[s], self.ended[s]) for s in self.grid[i, :count]]
            for i, count in enumerate(self.counts)
        ]


@torch.no_grad()
def drafted(
    policy: Policy, requests: Sequence[Request], drafters: Sequence[Drafter], max_tokens: int, rows: int, most: int
) -> tuple[list[list[Sample]], dict[str, int]]:
    """Samples in the order of the requests, and counts over all batches of ``rows`` samples."""
    cut = native.batches(requests, rows, mixed=True)
    results: list[list[Sample]] = [[] for _ in requests]
    counts = dict.fromkeys(("forwards", "forwarded", "proposed", "accepted"), 0)
    with policy.sampling(max_tokens * len(cut)):
        for batch in cut:
            state = Drafted(policy, [requests[i] for i in batch], [drafters[i] for i in batch], max_tokens, most)
            while state.advance():
                pass
            for i, samples in zip(batch, state.samples(), strict=True):
                results[i] = samples
            counts = {name: n + getattr(state, name) for name, n in counts.items()}
    return results, counts


# ---------------------------------------------------------------------------------------------- measured

SOURCES: dict[str, Callable[[Tokens, Sequence[Tokens]], Drafter]] = {
    "solution": lambda solution, last: aligned([solution]),
    "last": lambda solution, last: aligned(last),
    "both, looked up": lambda solution, last: looked_up([solution, *last]),
}


def requests_of(data: Any, count: int, share: float, g: int, max_tokens: int, epoch: int) -> list[tuple[Request, Tokens]]:
    """Requests after a hint of this share of the steps, each with the rest of its solution."""
    found = []
    for i in range(count):
        row = data.encoded[i % len(data.encoded)]
        hint = row.hint(round(share * row.n_steps), row.n_steps)
        draws = Draws(("drafts", epoch, i), g, g, max_tokens)
        found.append((Request(row.prompt + hint, draws), row.solution[len(hint) :]))
    return found


def measure(policy: Policy, data: Any, rows: int, share: float, a: argparse.Namespace, max_tokens: int) -> list[dict]:
    """A line a source of drafts, for ``rows`` completions side by side."""
    count = max(rows // a.g, 1)
    asked = requests_of(data, count, share, a.g, max_tokens, 0)
    with torch.no_grad():
        last = native.generate(policy, [r for r, _ in asked], max_tokens, 1.0, rows)
    asked = requests_of(data, count, share, a.g, max_tokens, 1)
    requests = [r for r, _ in asked]
    drafters = {
        name: [make(rest, [s.tokens for s in group]) for (_, rest), group in zip(asked, last, strict=True)]
        for name, make in SOURCES.items()
    }
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in ("plain", *SOURCES)}
    same = {name: [0, 0, 0.0] for name in SOURCES}
    for _ in range(a.repeats + 1):
        for name in seen:
            cpu, wall = time.process_time(), time.perf_counter()
            if name == "plain":
                plain, counts = native.generate(policy, requests, max_tokens, 1.0, rows), {}
            else:
                got, counts = drafted(policy, requests, drafters[name], max_tokens, rows, a.most)
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
                "accepted": counts["accepted"] / max(counts["proposed"], 1), "equal": same[name],
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
    parser.add_argument("settings", nargs="+", help="key=value as for unift train: model.path, data.task, sample.max_tokens")
    parser.add_argument("--name", required=True, help="of the model and its stage, in the table")
    parser.add_argument("--rows", default="8,16,64,256", help="completions side by side")
    parser.add_argument("--shares", default="0,0.5", help="shares of the solution that is shown")
    parser.add_argument("--g", type=int, default=8)
    parser.add_argument("--most", type=int, default=16, help="tokens drafted at once")
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
        for line in measure(policy, data, rows, share, a, config.sample.max_tokens)
    ]
    save(f"drafts-{a.name}", {"name": a.name, "rows": lines, "g": a.g, "most": a.most, "note": a.note, "machine": machine()})


if __name__ == "__main__":
    main()
