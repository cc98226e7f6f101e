"""How the next token is drawn from logits by the engines of this process: inverse CDF of an addressed uniform, or argmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from unift.model.policy import Policy
from unift.sampling.engines.base import Request

VOCAB_BLOCK = 256  # tokens whose probabilities are summed first when sampling


def chooser(policy: Policy, requests: Sequence[Request], g: int, max_tokens: int, temperature: float) -> Callable:
    """f(logits [N, V], slots [N], t) -> (tokens [N], logps [N]): inverse-CDF sampling, or argmax for greedy requests, among
    the ids that are tokens. ``t``, an int or an int64 tensor [1], counts the tokens drawn before."""
    u_BGL = np.full((len(requests), g, max_tokens), -1.0)
    for b, request in enumerate(requests):
        uniforms_GL = request.uniforms()
        if uniforms_GL is not None:
            u_BGL[b, : len(uniforms_GL)] = uniforms_GL[:, :max_tokens]
    u_NL = torch.from_numpy(u_BGL.reshape(-1, max_tokens)).to(policy.device)
    greedy_N = u_NL[:, 0] < 0
    all_greedy, any_greedy = bool(greedy_N.all()), bool(greedy_N.any())

    def choose(logits_NV: Tensor, slot_N: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        z_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
        z_NV = z_NV if temperature == 1.0 else z_NV / temperature
        logp_NV = torch.log_softmax(z_NV, dim=-1)
        if all_greedy:
            token_N = policy.draw(logp_NV, greedy)
        else:
            token_N = policy.draw(logp_NV, lambda logp_NK: inverse_cdf(logp_NK, u_NL[slot_N, t]))
            if any_greedy:
                token_N = torch.where(greedy_N[slot_N], policy.draw(logp_NV, greedy), token_N)
        return token_N, logp_NV.gather(1, token_N[:, None])[:, 0]

    return choose


def greedy(scores_NK: Tensor) -> Tensor:
    return scores_NK.argmax(-1)


def inverse_cdf(logp_NV: Tensor, u_N: Tensor, block: int = VOCAB_BLOCK) -> Tensor:
    """The first token whose cumulative probability exceeds u * total, sums in float64, ``u_N`` in [0, 1).

    Two levels: sums over blocks of the vocabulary, then the sum inside the one block that u falls into; so float64
    numbers are made for a block and not for the vocabulary.
    """
    n, v = logp_NV.shape
    blocks = -(-v // block)
    p_NV = logp_NV.new_zeros(n, blocks * block)
    torch.exp(logp_NV, out=p_NV[:, :v])
    p_NCW = p_NV.view(n, blocks, block)
    cdf_NC = p_NCW.sum(-1, dtype=torch.float64).cumsum(-1)
    u_N1 = u_N[:, None] * cdf_NC[:, -1:]
    at_N1 = torch.searchsorted(cdf_NC, u_N1, right=True).clamp_(max=blocks - 1)
    before_N1 = torch.where(at_N1 > 0, cdf_NC.gather(1, (at_N1 - 1).clamp_(min=0)), 0.0)
    inside_NW = p_NCW[torch.arange(n, device=p_NV.device), at_N1[:, 0]].double().cumsum(-1) + before_N1
    token_N = at_N1[:, 0] * block + torch.searchsorted(inside_NW, u_N1, right=True)[:, 0].clamp_(max=block - 1)
    return token_N.clamp_(max=v - 1)


def ending(policy: Policy) -> list[int]:
    """Tokens that end a completion, ascending. A placeholder of a picture is one of them: it may be a target, but as an input it
    would ask for a picture."""
    placeholders = set() if policy.reader is None else policy.reader.placeholders
    return sorted({*policy.end_ids, *placeholders})


def eos_ids(policy: Policy) -> Tensor:
    """The same on the policy's device."""
    return torch.tensor(ending(policy), device=policy.device)
