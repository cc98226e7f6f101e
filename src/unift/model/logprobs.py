"""Log-probs and entropies of packed groups. The language model head runs only at positions that carry a loss, in chunks,
and its logits are recomputed in the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unift.model import lora, plain
from unift.model.packs import COMPLETION, PackedBatch
from unift.model.policy import Policy

CHUNK = 1024  # loss positions whose logits exist at one time,
LOGITS = 2**25  # or fewer, so that these are no more than so many numbers (128 MiB)
KEEP = 2**27  # logits of a pack are kept for the backward pass up to so many numbers (0.5 GiB), else made again


class _ChunkedLogProb(torch.autograd.Function):
    """log softmax(scale * (h W' + b))[target] and entropy, without ever holding [S, vocabulary].

    dL/dlogits = g * (onehot - p) - g_H * p * (log p + H). Up to KEEP numbers, log p is kept for the backward pass; above,
    logits are made again chunk by chunk (one extra product).
    """

    @staticmethod
    def forward(ctx, hidden_SD, weight_VD, bias_V, target_S, scale_S, chunk, keep):
        logp, entropy, lse, kept = [], [], [], []
        for part in range(0, len(target_S), chunk):
            z = _ChunkedLogProb._z(hidden_SD, weight_VD, bias_V, scale_S, slice(part, part + chunk))
            norm = z.logsumexp(-1)
            logq = z.sub_(norm[:, None])
            logp.append(logq.gather(1, target_S[part : part + chunk, None])[:, 0])
            lse.append(norm)
            entropy.append(-(logq.exp() * logq).sum(-1))
            kept.append(logq)
            if len(target_S) * len(weight_VD) > keep:
                kept.clear()
        ctx.save_for_backward(hidden_SD, weight_VD, bias_V, target_S, scale_S, torch.cat(lse), torch.cat(entropy))
        ctx.chunk, ctx.kept = chunk, kept
        return torch.cat(logp), torch.cat(entropy)

    @staticmethod
    def _z(hidden_SD, weight_VD, bias_V, scale_S, rows):
        z = torch.nn.functional.linear(hidden_SD[rows], weight_VD, bias_V)
        z = z if z.dtype == torch.float64 else z.float()
        return z.mul_(scale_S[rows, None].to(z.dtype))

    @staticmethod
    def backward(ctx, g_logp, g_entropy):
        hidden, weight, bias, target, scale, lse, entropy = ctx.saved_tensors
        g_hidden = torch.empty_like(hidden)
        g_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        g_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        use_entropy = bool(g_entropy.any())
        for number, part in enumerate(range(0, len(target), ctx.chunk)):
            rows = slice(part, part + ctx.chunk)
            if ctx.kept:
                logq = ctx.kept[number]
            else:
                logq = _ChunkedLogProb._z(hidden, weight, bias, scale, rows).sub_(lse[rows, None])
            p = logq.exp()
            g = p * -g_logp[rows, None] if use_entropy else p.mul_(-g_logp[rows, None])
            if use_entropy:
                g -= g_entropy[rows, None] * p * (logq + entropy[rows, None])
            g.scatter_add_(1, target[rows, None], g_logp[rows, None])
            g = g.mul_(scale[rows, None].to(g.dtype)).to(hidden.dtype)
            g_hidden[rows] = g @ weight
            if g_weight is not None:
                torch.addmm(g_weight, g.T, hidden[rows], out=g_weight)
            if g_bias is not None:
                g_bias += g.sum(0)
        return g_hidden, g_weight, g_bias, None, None, None, None


def chunked_logprobs(
    hidden_SD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_S: Tensor,
    scale_S: Tensor,
    chunk: int = CHUNK,
    keep: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [S] of ``target_S`` under softmax(scale * logits), in float32 (float64 stays)."""
    keep = KEEP if keep is None else keep
    chunk = max(min(chunk, LOGITS // len(weight_VD)), 1)
    return _ChunkedLogProb.apply(hidden_SD, weight_VD, bias_V, target_S, scale_S, chunk, keep)  # type: ignore[return-value]


def logprobs(policy: Policy, batch: PackedBatch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(l_S, entropy_S) of a pack. Completions use logits / temperature as the sampler did; hints and demonstrations
    are scored under the untempered policy (docs/traps.md 8)."""
    return policy.run(lambda: _logprobs(policy, batch, scale_of(batch, temperature)))


def _logprobs(policy: Policy, batch: PackedBatch, scale_S: Tensor) -> tuple[Tensor, Tensor]:
    if not policy.shared:
        with policy.precision(sampling=False):
            return plain.logprobs(policy.base, batch, scale_S, policy.reader)
    with policy.precision(sampling=False):
        place = batch.tokens_T, batch.positions_T, batch.layout, batch.delta_TD, batch.inputs_fixed
        hidden_TD = policy.hidden(*place, view=policy.view(batch))
    return head_logprobs(policy, hidden_TD.index_select(0, batch.at_S), batch.target_S, scale_S)


def head_logprobs(policy: Policy, hidden_SD: Tensor, target_S: Tensor, scale_S: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the targets from the last hidden states, in the precision of the policy."""
    weight, bias = lora.weight(policy.head), policy.head.bias
    if policy.autocast == "all":  # explicitly: the backward pass runs outside of autocast
        hidden_SD, weight = hidden_SD.bfloat16(), weight.bfloat16()
        bias = None if bias is None else bias.bfloat16()
    return chunked_logprobs(hidden_SD, weight, bias, target_S, scale_S)


def scale_of(batch: PackedBatch, temperature: float) -> Tensor:
    """Factor of the logits, float64: 1/T at sampled tokens, 1 at tokens of the data."""
    return torch.ones_like(batch.policy_w_S).masked_fill_(batch.role_S == COMPLETION, 1.0 / temperature)
