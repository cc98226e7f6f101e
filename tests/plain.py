"""The plain twin: one padded row per copy, stock attention, full logits, methods.md 1.4 written out with autograd."""

from __future__ import annotations

import torch

from unift.batch import COMPLETION, DEMO


def token_logprobs(model, sequences, temperature=1.0):
    """log softmax(logits / T) of every next token, one right-padded batch: list of [len-1] tensors, and entropies."""
    width = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences])
    logp = torch.log_softmax(model(input_ids=ids, attention_mask=mask).logits / temperature, -1)
    picked = logp[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    entropy = -(logp.exp() * logp).sum(-1)
    return [picked[i, : len(s) - 1] for i, s in enumerate(sequences)], [entropy[i, : len(s) - 1] for i, s in enumerate(sequences)]


def uft_loss(model, reference, items, settings, old=None):
    """The UFT objective with token means over the batch, every one of the G copies carrying the hint's likelihood."""
    t, low, high = settings.sample.temperature, settings.policy.low, settings.policy.high
    policy_sum = kl_sum = entropy_sum = n_policy = like_sum = n_like = 0.0
    for i, item in enumerate(items):
        prefix = item.prompt + item.hint
        for j, m in enumerate(item.members):
            sequence = prefix + m.tokens
            tempered, entropies = token_logprobs(model, [sequence], t)
            straight, _ = token_logprobs(model, [sequence])
            own = slice(len(prefix) - 1, len(sequence) - 1)
            shown = slice(len(item.prompt) - 1, len(prefix) - 1)
            if m.role == DEMO:
                like_sum = like_sum + straight[0][own].sum()
                n_like += len(m.tokens)
            if m.role == COMPLETION:
                l, h = tempered[0][own], entropies[0][own]
                start = l.detach() if old is None else old[i][j]
                ratio = torch.exp(l - start)
                surrogate = torch.minimum(ratio * m.advantage, ratio.clamp(1 - low, 1 + high) * m.advantage)
                policy_sum = policy_sum + surrogate.sum()
                entropy_sum = entropy_sum + h.sum()
                n_policy += len(m.tokens)
                if reference is not None:
                    with torch.no_grad():
                        ref = token_logprobs(reference, [sequence], t)[0][0][own]
                    d = ref - l
                    kl_sum = kl_sum + (torch.exp(d) - d - 1).sum()
        if settings.likelihood.tokens != "none" and item.hint:
            copies = max(sum(m.role == COMPLETION for m in item.members), 1)
            straight, _ = token_logprobs(model, [prefix])
            for _ in range(copies):
                like_sum = like_sum + straight[0][shown].sum() / copies
            n_like += len(item.hint)
    loss = 0.0
    if n_policy:
        loss = loss - policy_sum / n_policy + settings.reference.kl * kl_sum / n_policy
        loss = loss - settings.policy.entropy * entropy_sum / n_policy
    if n_like:
        loss = loss - settings.likelihood.weight * like_sum / n_like
    return loss
