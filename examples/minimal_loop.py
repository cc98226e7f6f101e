"""Unified Fine-Tuning (UFT, arXiv 2505.16984) in one file of plain PyTorch: what `unift train` does, without its speed.

    python examples/minimal_loop.py 600     # steps on the letter lock, a few minutes; all test rows are solved at the end

A step: take rows; show each the first k steps of its solution, k falling to 0 over the run; sample G completions after the
hint; score them; then one optimizer step on

    L = - (1/Zc) sum_completions [ min(rho A, clip(rho, 1 - eps, 1 + eps) A) - beta k3(l, l_ref) ]     (eq. 3.3)
        - (lambda/Zh) sum_hints l                                                   l = log pi(token | what is before it)

Only rows and addressed random numbers come from the package. `tests/test_minimal_loop.py` shows that the library makes the
same updates; it samples with a cache, computes a shared prefix once and cuts the batch to fit the memory.

Shapes: N sequences (prompts x G), L tokens of a padded sequence, V vocabulary.
"""

from __future__ import annotations

import copy
import math
import sys
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from unift import rng
from unift.rows.tasks import make_rows
from unift.rows.tasks.lock import CODES, KEYS, code_table
from unift.types import Row

BASE = resources.files("unift") / "model" / "embedded" / "lock"
assert CODES == 10  # a code is one digit


@dataclass(frozen=True)
class Settings:
    steps: int = 600
    prompts: int = 32  # rows a step
    completions: int = 8  # G
    max_tokens: int = 16  # of a completion
    high: float = 0.95  # chance that a cut is shown, at the first step
    low: float = 0.05  # and at the last hinted one
    until: float = 0.6  # share of the steps with hints
    cuts: int = 5  # the solution is cut into at most so many pieces
    clip: float = 0.2  # eps
    kl: float = 0.001  # beta
    likelihood: float = 0.2  # lambda
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    warmup: int = 10
    clip_norm: float = 1.0
    seed: int = 0


def tokens_of(tokenizer: Any, row: Row) -> tuple[list[int], list[int], list[int]]:
    """(prompt, steps, number of step tokens after each step). Tokenised once, together: a hint is a slice of this."""
    text, ends = row.prompt, []
    for step in row.steps:
        text += step
        ends.append(len(text))
    coded = tokenizer(text, return_offsets_mapping=True)
    last = [end for _, end in coded["offset_mapping"]]  # character after each token
    n = sum(end <= len(row.prompt) for end in last)
    return coded["input_ids"][:n], coded["input_ids"][n:], [0, *(sum(e <= end for e in last) - n for end in ends)]


def cuts_shown(s: Settings, step: int, row: Row) -> int:
    """k ~ Binomial(num, p(t)), p(t) = low + (high - low)/2 (1 + cos(pi t / T)), t = step + 1 <= T; then 0 (eq. B.1)."""
    num, hinted = min(s.cuts, len(row.steps)), round(s.until * s.steps)
    if step >= hinted:
        return 0
    p = s.low + (s.high - s.low) / 2 * (1 + math.cos(math.pi * (step + 1) / hinted))
    return int((rng.uniforms("hint", s.seed, step, row.id, shape=num) < p).sum())


def padded(sequences: list[list[int]]) -> Tensor:
    """[N, L], zeros to the right: in a causal model no token sees what is to its right, so no mask is needed."""
    longest = max(map(len, sequences))
    return torch.tensor([x + [0] * (longest - len(x)) for x in sequences])


@torch.no_grad()
def sample(
    model: Any, prompts: list[list[int]], uniforms_NT: np.ndarray | None, most: int, eos: int
) -> list[list[int]]:
    """A completion of every prompt, EOS kept: the token where the cumulative probability passes u; greedy without u."""
    out: list[list[int]] = [[] for _ in prompts]
    for t in range(most):
        live = [i for i, tokens in enumerate(out) if tokens[-1:] != [eos]]
        if not live:
            break
        sequences = [prompts[i] + out[i] for i in live]
        logits_NLV = model(input_ids=padded(sequences)).logits
        logp_NV = logits_NLV[range(len(live)), [len(x) - 1 for x in sequences]].log_softmax(-1)
        if uniforms_NT is None:
            token_N = logp_NV.argmax(-1)
        else:
            cdf_NV = logp_NV.exp().double().cumsum(-1)
            u_N1 = torch.from_numpy(uniforms_NT[live, t])[:, None] * cdf_NV[:, -1:]
            token_N = torch.searchsorted(cdf_NV, u_N1, right=True)[:, 0].clamp(max=cdf_NV.shape[1] - 1)
        for i, token in zip(live, token_N.tolist()):
            out[i].append(token)
    return out


def reward(hint: str, completion: str, row: Row) -> float:
    """1 when hint + completion, up to the completion's end mark, is a key and each letter with its code under that key."""
    body, mark, _ = completion.partition(".")
    text, word = hint + body, row.answer["letters"]
    key = KEYS.find(text[:1]) if text else -1
    table = code_table(row.answer["table_seed"])
    return float(bool(mark) and key >= 0 and text[1:] == "".join(f"{c}{table[ord(c) - ord('a'), key]}" for c in word))


def advantages(rewards_G: np.ndarray) -> np.ndarray:
    """A_i = (r_i - mean r) / (std r + 1e-6), n - 1 in the std; 0 where all are equal (GRPO, arXiv 2402.03300)."""
    if (rewards_G == rewards_G[0]).all():
        return np.zeros_like(rewards_G)
    return (rewards_G - rewards_G.mean()) / (rewards_G.std(ddof=1) + 1e-6)


def logprobs(model: Any, tokens_NL: Tensor) -> Tensor:
    """l_NL: log pi of every token given those before it; 0 for the first, which nothing predicts."""
    logp_NLV = model(input_ids=tokens_NL).logits[:, :-1].log_softmax(-1)
    return torch.nn.functional.pad(logp_NLV.gather(2, tokens_NL[:, 1:, None])[..., 0], (1, 0))


def loss_of(s: Settings, l_NL: Tensor, ref_NL: Tensor, completion_NL: Tensor, hint_NL: Tensor, a_N: Tensor) -> Tensor:
    """The loss of the file's head. ``completion_NL``, ``hint_NL``: 1 at the tokens of each stream, else 0."""
    old_NL = l_NL.detach()  # one update a step: the policy that sampled is the policy of now, and rho = 1
    rho_NL = (l_NL - old_NL).exp()
    pushed_NL = torch.minimum(rho_NL * a_N[:, None], rho_NL.clamp(1 - s.clip, 1 + s.clip) * a_N[:, None])
    k3_NL = (ref_NL - l_NL).exp() - (ref_NL - l_NL) - 1  # Schulman's estimate of KL(pi || ref)
    zc = completion_NL.sum()  # all completion tokens of the optimizer batch
    zh = hint_NL.sum().clamp(min=1)  # G copies of every hint, in the sum as in its count: their mean is that of one
    policy = -(completion_NL * (pushed_NL - s.kl * k3_NL)).sum() / zc
    return policy - s.likelihood * (hint_NL * l_NL).sum() / zh


def train(s: Settings, rows: list[Row], model: Any, tokenizer: Any) -> list[float]:
    """Trains ``model`` in place; returns the mean reward of every step."""
    reference = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr, betas=s.betas, weight_decay=0.0)
    encoded, means = [tokens_of(tokenizer, row) for row in rows], []
    for step in range(s.steps):
        sequences, spans, uniforms, picked = [], [], [], []  # per completion: prompt + hint, and where the hint lies
        for place in range(s.prompts):
            epoch, offset = divmod(step * s.prompts + place, len(rows))
            index = int(rng.generator("rows", s.seed, epoch).permutation(len(rows))[offset])
            row, (prompt, steps, ends) = rows[index], encoded[index]
            k, num = cuts_shown(s, step, row), min(s.cuts, len(row.steps))
            hint = steps[: ends[round(k * len(row.steps) / num)]]
            uniforms.append(rng.uniforms("sample", s.seed, step, place, row.id, shape=(s.completions, s.max_tokens)))
            sequences += [prompt + hint] * s.completions
            spans += [(len(prompt), len(prompt) + len(hint))] * s.completions
            picked += [row] * s.completions
        completions = sample(model, sequences, np.concatenate(uniforms), s.max_tokens, tokenizer.eos_token_id)
        hints = [tokenizer.decode(x[start:]) for x, (start, _) in zip(sequences, spans)]
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        rewards_NG = np.array(list(map(reward, hints, texts, picked))).reshape(s.prompts, s.completions)
        means.append(float(rewards_NG.mean()))
        tokens_NL = padded([x + y for x, y in zip(sequences, completions)])
        l_NL, at_L = logprobs(model, tokens_NL), torch.arange(tokens_NL.shape[1])
        with torch.no_grad():
            ref_NL = logprobs(reference, tokens_NL)
        start_N, stop_N = torch.tensor(spans).T
        end_N = stop_N + torch.tensor([len(y) for y in completions])
        hint_NL = ((at_L >= start_N[:, None]) & (at_L < stop_N[:, None])).to(l_NL)
        completion_NL = ((at_L >= stop_N[:, None]) & (at_L < end_N[:, None])).to(l_NL)
        a_N = torch.from_numpy(np.concatenate([advantages(r) for r in rewards_NG])).to(l_NL)
        optimizer.zero_grad()
        loss_of(s, l_NL, ref_NL, completion_NL, hint_NL, a_N).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip_norm)
        optimizer.param_groups[0]["lr"] = s.lr * min((step + 1) / max(s.warmup, 1), 1.0)
        optimizer.step()
    return means


def accuracy(rows: list[Row], model: Any, tokenizer: Any, most: int = 16) -> float:
    """Share of rows solved greedily and without a hint."""
    answers = sample(model, [tokens_of(tokenizer, row)[0] for row in rows], None, most, tokenizer.eos_token_id)
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return float(np.mean([reward("", text, row) for text, row in zip(texts, rows)]))


if __name__ == "__main__":
    tokenizer = AutoTokenizer.from_pretrained(str(BASE))
    model = AutoModelForCausalLM.from_pretrained(str(BASE), dtype=torch.float32)
    rewards = train(Settings(steps=int(sys.argv[1])), make_rows("lock", 80, 0, "train", length=5), model, tokenizer)
    print("reward of every tenth step:", *(f"{r:.2f}" for r in rewards[::10]))
    print(f"accuracy without hints: {accuracy(make_rows('lock', 100, 0, 'test', length=5), model, tokenizer):.2f}")
