"""The plain twin: one padded row per copy, stock attention, full logits, UFT's eq. 3.3 written out with autograd."""

from __future__ import annotations

import torch

from unift.model.packs import COMPLETION, DEMO


def forward(model, sequences, side="right"):
    """Logits [len, V] of every sequence from one padded batch."""
    width = max(map(len, sequences))
    ids, mask, positions = [], [], []
    for s in sequences:
        empty = [0] * (width - len(s))
        own, ones, count = list(s), [1] * len(s), list(range(len(s)))
        ids.append(empty + own if side == "left" else own + empty)
        mask.append(empty + ones if side == "left" else ones + empty)
        positions.append(empty + count if side == "left" else count + empty)
    device = next(model.parameters()).device
    ids, mask, positions = (torch.tensor(x, device=device) for x in (ids, mask, positions))
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    return [z[width - len(s) :] if side == "left" else z[: len(s)] for z, s in zip(logits, sequences, strict=True)]


def chosen(logits, sequence, temperature=1.0):
    """(log softmax(logits / T) of every next token [len-1], entropies [len-1])."""
    logp = torch.log_softmax(logits[:-1] / temperature, -1)
    picked = logp.gather(-1, torch.tensor(sequence[1:], device=logp.device)[:, None])[:, 0]
    return picked, -(logp.exp() * logp).sum(-1)


def token_logprobs(model, sequences, temperature=1.0, side="right"):
    """Log-probs and entropies of every next token: two lists of [len-1] tensors."""
    pairs = [chosen(z, s, temperature) for z, s in zip(forward(model, sequences, side), sequences, strict=True)]
    return [p[0] for p in pairs], [p[1] for p in pairs]


def aggregate(terms, norm, settings, n_items):
    """The means that ``norm`` names (docs/methods.md). ``terms``: (item, share of a sequence, its token values)."""
    if not terms:
        return 0.0
    if norm == "microbatch_token_mean":
        micro = settings.train.micro_prompts
        runs = [[t for t in terms if first <= t[0] < first + micro] for first in range(0, n_items, micro)]
        return sum(aggregate(run, "token_mean", settings, n_items) for run in runs) / len(runs)
    if norm == "token_mean":
        return sum(share * v.sum() for _, share, v in terms) / sum(share * len(v) for _, share, v in terms)
    of = {
        "seq_mean_token_mean": lambda v: v.mean(),
        "seq_mean_token_sum": lambda v: v.sum(),
        "seq_mean_token_sum_norm": lambda v: v.sum() / settings.sample.max_tokens,
    }[norm]
    return sum(share * of(v) for _, share, v in terms) / sum(share for _, share, _ in terms)


def uft_loss(model, reference, items, settings, old=None, side="right"):
    """L of UFT's eq. 3.3: every completion is a sequence of its own, which carries a copy of the group's hint.

    The G copies of a hint share one vote (1/G each), so a group that lost a completion weighs no less on the hint.
    ``old[i][j]``: log-probs of member j at the start of the step; None: this is the first update, ratio 1.
    """
    kind, t = settings.likelihood.tokens, settings.sample.temperature
    low, high = 1 - settings.policy.low, 1 + settings.policy.high
    rows = []  # (item, member, sequence, share of the likelihood, first supervised token of the likelihood, its end)
    for i, item in enumerate(items):
        prefix, n = item.prompt + item.hint, len(item.prompt)
        own = [(j, m) for j, m in enumerate(item.members) if m.role == COMPLETION]
        copies = max(len(own), 1)
        for j, m in own:
            rows.append((i, j, prefix + m.tokens, 1 / copies if kind == "hint" else 0, n, len(prefix)))
        if kind == "hint" and not own:
            rows.append((i, None, prefix, 1, n, len(prefix)))
        if kind == "demo":
            rest = [token for m in item.members if m.role == DEMO for token in m.tokens]
            rows.append((i, None, prefix + rest, 1, n, len(prefix) + len(rest)))
    sequences = [r[2] for r in rows]
    logits = forward(model, sequences, side)
    if reference is not None:
        with torch.no_grad():
            pulled = forward(reference, sequences, side)
    surrogates, kls, entropies, likelihoods = [], [], [], []
    for row, (i, j, sequence, share, first, end) in enumerate(rows):
        straight, _ = chosen(logits[row], sequence)
        if share and end > first:
            likelihoods.append((i, share, straight[first - 1 : end - 1]))
        if j is None:
            continue
        tempered, entropy = chosen(logits[row], sequence, t)
        begin = len(items[i].prompt) + len(items[i].hint) - 1
        l, a = tempered[begin:], items[i].members[j].advantage
        rho = torch.exp(l - (l.detach() if old is None else old[i][j]))
        surrogates.append((i, 1, torch.minimum(rho * a, rho.clamp(low, high) * a)))
        entropies.append((i, 1, entropy[begin:]))
        if reference is not None:
            d = chosen(pulled[row], sequence, t)[0][begin:] - l
            kls.append((i, 1, torch.exp(d) - d - 1))
    mean = lambda terms, norm: aggregate(terms, norm, settings, len(items))  # noqa: E731
    norm = settings.policy.norm
    return (
        -mean(surrogates, norm)
        + settings.reference.kl * mean(kls, norm)
        - settings.policy.entropy * mean(entropies, norm)
        - settings.likelihood.weight * mean(likelihoods, settings.likelihood.norm)
    )
