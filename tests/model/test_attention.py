"""Attention of packed rows: the merged passes against stock attention with copied prefixes, and the pieces around it."""

from __future__ import annotations

import copy
import dataclasses
import functools

import numpy as np
import pytest
import torch
from conftest import close, gradients, make_items, packed_loss, settings, tiny_policy
from plain import uft_loss

from unift.model.attention.flash import FlashAttention
from unift.model.attention.packed import make_layout, stock_attention
from unift.model.logprobs import chunked_logprobs, logprobs
from unift.model.packs import COMPLETION, DEMO, Item, Member, cut, pack
from unift.objectives.weights import weigh
from unift.sampling.engines.base import Request
from unift.sampling.engines.draw import inverse_cdf
from unift.sampling.engines.native import generate

RNG = np.random.default_rng(11)


def layout_of(prefixes, members, stem=0):
    """Layout of prefixes and members of the given lengths, one after the other in a flat row, behind a stem."""
    at, spans, own = stem, [], []
    for p, lengths in zip(prefixes, members, strict=True):
        spans.append(range(at, at + p))
        at += p
        own.append([range(at + sum(lengths[:j]), at + sum(lengths[: j + 1])) for j in range(len(lengths))])
        at += sum(lengths)
    return make_layout(spans, own, at, stem), at


CASES = {
    "one group": ([5], [[3, 3, 3]]),
    "ragged": ([5, 1, 9], [[1, 4, 2], [6], [2, 2]]),
    "no padding at all": ([4, 4], [[3, 3], [3, 3]]),
    "one-token completions": ([3, 6], [[0, 0], [0, 5]]),  # a single token is only a target and is not forwarded
    "no members": ([3, 6], [[], []]),
    "a group without members": ([3, 6], [[], [4]]),
    "sixteen": ([7], [list(range(1, 17))]),
    "a stem": ([5, 1, 9], [[1, 4, 2], [6], [2, 2]], 6),
    "a stem without padding": ([4, 4], [[3, 3], [3, 3]], 1),
    "a stem before prefixes alone": ([3, 6], [[], []], 20),
}


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("kv", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_merged_passes_equal_copied_prefixes(case, kv, dtype):
    at, total = layout_of(*CASES[case])
    draw = torch.Generator().manual_seed(1)
    new = lambda h: torch.randn(total, h, 8, generator=draw, dtype=torch.float64).to(dtype)  # noqa: E731
    inputs, g = [new(4), new(kv), new(kv)], new(4)
    results = []
    for path in (FlashAttention.apply, stock_attention):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = path(*leaves, at, 0.3)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, g)])
    bound = 1e-5 if dtype == torch.float32 else 1e-12
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() < bound
    assert results[0][0].abs().max() > 0.1 and results[0][2].abs().max() > 0.01


@pytest.mark.parametrize("case", ["ragged", "a stem"])
def test_half_precision_is_computed_in_float32(case):
    """Values of bfloat16, with queries and keys promoted by rotary embeddings as autocast has them: the float32 result, rounded."""
    at, total = layout_of(*CASES[case])
    draw = torch.Generator().manual_seed(1)
    low = [torch.randn(total, h, 8, generator=draw).bfloat16() for h in (4, 2, 2, 4)]
    results = []
    for given in (low, [x.float() for x in low], [low[0].float(), low[1].float(), low[2], low[3]]):
        leaves = [x.clone().requires_grad_() for x in given[:3]]
        out = FlashAttention.apply(*leaves, at, 0.3)
        assert out.dtype == leaves[2].dtype
        grads = torch.autograd.grad(out, leaves, given[3].to(out.dtype))
        assert [x.dtype for x in grads] == [x.dtype for x in leaves]
        results.append([out.detach(), *grads])
    for exact, *others in zip(results[1], results[0], results[2], strict=True):
        for x in others:
            assert torch.equal(x, exact.to(x.dtype))


def behind(stem, items):
    """The items with these tokens before their prompts."""
    return [dataclasses.replace(i, prompt=[*stem, *i.prompt]) for i in items]


STEM = [int(t) for t in np.random.default_rng(3).integers(2, 37, 70)]


@pytest.mark.parametrize("name", ["uft", "sft", "rft"])
def test_what_all_prompts_begin_with_is_computed_once(name):
    """Loss and gradients of groups behind a common beginning, against copies of all of it."""
    policy, plain = tiny_policy(torch.float64)
    config = settings(name, *(["likelihood.weight=0.3", "reference.kl=0"] if name == "uft" else []))
    items = behind(STEM, make_items((1, 4, 3), (12, 0, 3)))
    if name == "sft":
        items = [dataclasses.replace(i, hint=[], members=[Member(i.members[0].tokens, DEMO)]) for i in items]
    batch = pack(items, range(3), weigh(items, config), config)
    assert batch.layout.stem == len(STEM)
    assert len(batch.tokens_T) == sum(i.tokens_forwarded for i in items) - 2 * len(STEM)
    assert batch.layout.longest == max(len(i.prompt + i.hint) + len(m.tokens) - 1 for i in items for m in i.members)
    loss, got = packed_loss(policy, items, config)
    expected = uft_loss(plain, None, items, config)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)  # transformers' norms are float32
    close(got, gradients(plain), 1e-6)


def test_where_there_is_no_common_beginning():
    """One item, one short of it, equal prompts (the last token stays own), and inputs that are changed item by item."""
    config, items = settings("uft"), make_items((2, 2, 2), (0, 3, 3))
    stem_of = lambda items, config: pack(items, range(len(items)), None, config).layout.stem  # noqa: E731
    assert stem_of(behind(STEM, items), config) == len(STEM)
    assert stem_of(behind(STEM, items)[:1], config) == 0
    assert stem_of(items, config) == 0
    same = [dataclasses.replace(i, prompt=STEM) for i in items]
    assert stem_of(same, config) == len(STEM) - 1
    noisy = settings("sft", "inputs.noise=uniform", "inputs.scale=5")
    assert stem_of(behind(STEM, items), noisy) == 0


def test_the_token_budget_counts_a_common_beginning_once():
    config, items = settings("uft"), behind(STEM, make_items((2, 2, 2, 2), (1, 1, 1, 1)))
    own = [i.tokens_forwarded - len(STEM) for i in items]
    for budget in (len(STEM) + sum(own), len(STEM) + sum(own) - 1, len(STEM) + max(own), 1):
        packs = cut(items, budget, config)
        sizes = [len(pack(items, p, None, config).tokens_T) for p in packs]
        assert all(n <= budget or len(p) == 1 for n, p in zip(sizes, packs, strict=True))
        assert sorted(i for p in packs for i in p) == [0, 1, 2, 3]
        assert (len(packs) == 1) == (budget == len(STEM) + sum(own))


@pytest.mark.parametrize("g", [1, 5])
def test_samples_behind_a_common_beginning(g):
    """The same tokens as prompt by prompt, and the trainer's log-probs."""
    policy, _ = tiny_policy(torch.float64)
    prompts = [STEM + [int(t) for t in RNG.integers(2, 37, n)] for n in (1, 7, 3)]
    asked = [Request(p, RNG.random((g, 12))) for p in prompts]
    together, alone = generate(policy, asked, 12), [generate(policy, [r], 12)[0] for r in asked]
    for a, b in zip(together, alone, strict=True):
        assert [s.tokens for s in a] == [s.tokens for s in b]
        assert max(abs(x - y) for s, t in zip(a, b, strict=True) for x, y in zip(s.logps, t.logps, strict=True)) < 1e-6
    config = settings("rft")
    items = [
        Item(p, [], [Member(s.tokens, COMPLETION, 1.0, s.logps) for s in a])
        for p, a in zip(prompts, together, strict=True)
    ]
    batch = pack(items, range(3), weigh(items, config), config)
    assert batch.layout.stem == len(STEM)
    with torch.no_grad():
        assert (logprobs(policy, batch)[0] - batch.sampler_S).abs().max() < 1e-6


@pytest.mark.parametrize("members", [(1, 1, 1), (1, 2, 16), (3, 16, 5)])
@pytest.mark.parametrize("hints", [(0, 0, 0), (12, 0, 3)], ids=["empty hints", "long hints"])
def test_group_sizes(members, hints):
    """Loss and gradients of groups of 1 to 16 completions beside each other."""
    policy, plain = tiny_policy()
    config = settings("uft", "likelihood.weight=0.3", "reference.kl=0")
    items = make_items(members, hints)
    loss, got = packed_loss(policy, items, config)
    expected = uft_loss(plain, None, items, config)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    close(got, gradients(plain), 1e-5)


def _norm_fp64(norm, x):
    return norm.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_real_model(smollm, dtype):
    """SmolLM2-135M: loss, gradients, and the sampler's log-probs against the trainer's, ragged lengths, EOS and not.

    In fp32 thirty layers of rounding separate any two orders of summation: the plain path itself is 3e-5 of the largest
    gradient away from its own fp64. The fp64 case holds the formulas to 1e-9; its RMSNorm, which transformers computes in
    fp32 whatever the weights, is one in fp64.
    """
    from unift.config.sections import Model
    from unift.model.load import load_policy

    policy = load_policy(Model(path=str(smollm), device="cpu"))
    policy.model.to(dtype)
    plain = copy.deepcopy(policy.model)
    plain.set_attn_implementation("sdpa")  # eager attention has its softmax in fp32
    if dtype == torch.float64:
        for module in [*policy.model.modules(), *plain.modules()]:
            if type(module).__name__ == "LlamaRMSNorm":
                module.forward = functools.partial(_norm_fp64, module)
    rng = np.random.default_rng(11)
    config = settings("uft", "likelihood.weight=0.3", "reference.kl=0")
    eos = policy.tokenizer.eos_token_id
    asked = [Request(rng.integers(100, 40_000, n).tolist(), rng.random((3, 6))) for n in (7, 12)]
    groups = generate(policy, asked, 6)
    items = [
        Item(r.prompt[:4], r.prompt[4:], [Member(s.tokens, COMPLETION, float(j) - 1, s.logps) for j, s in enumerate(g)])
        for r, g in zip(asked, groups, strict=True)
    ]
    items[0].members.append(Member([500, eos], COMPLETION, 0.5))
    batch = pack(items, range(2), weigh(items, config), config)
    with torch.no_grad():
        l_S = logprobs(policy, batch)[0].double()
    sampled = (batch.role_S == COMPLETION) & ~batch.sampler_S.isnan()
    assert (l_S[sampled] - batch.sampler_S[sampled]).abs().max() < (1e-4 if dtype == torch.float32 else 1e-9)
    loss, got = packed_loss(policy, items, config)
    expected = uft_loss(plain, None, items, config)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-4 if dtype == torch.float32 else 1e-9)
    close(got, gradients(plain), 3e-4 if dtype == torch.float32 else 1e-9)


def test_logits_kept_or_made_again():
    """Both ways of the backward pass give the same gradients, also after a first backward pass over the same graph."""
    torch.manual_seed(0)
    inputs = [
        torch.randn(50, 8, dtype=torch.float64),
        torch.randn(23, 8, dtype=torch.float64),
        torch.randn(23, dtype=torch.float64),
    ]
    target, scale = torch.randint(23, (50,)), torch.rand(50, dtype=torch.float64) + 0.5
    weight_l, weight_h = torch.randn(50, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    got = []
    for keep in (10**6, 0):
        leaves = [x.clone().requires_grad_() for x in inputs]
        l_S, h_S = chunked_logprobs(*leaves, target, scale, 16, keep)
        first = torch.autograd.grad((weight_l * l_S).sum(), leaves, retain_graph=True)
        both = torch.autograd.grad((weight_l * l_S + weight_h * h_S).sum(), leaves)
        got.append([l_S, h_S, *first, *both])
    for a, b in zip(*got, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("vocab", [5, 256, 257, 5000])
def test_two_level_inverse_cdf(vocab):
    """Against one float64 cumulative sum over the whole vocabulary."""
    draw = torch.Generator().manual_seed(vocab)
    logp = torch.log_softmax(4 * torch.randn(2000, vocab, generator=draw), -1)
    u = torch.rand(2000, generator=draw, dtype=torch.float64)
    u[0], u[1] = 0.0, 1 - 1e-12
    cdf = logp.exp().double().cumsum(-1)
    expected = (cdf <= u[:, None] * cdf[:, -1:]).sum(-1)
    assert torch.equal(inverse_cdf(logp, u), expected)
    assert len(expected.unique()) > min(vocab, 100) / 2


def test_inverse_cdf_never_draws_what_has_no_probability():
    logp = torch.full((3, 600), -torch.inf)
    logp[0, 10], logp[1, 599], logp[2, [255, 256]] = 0.0, 0.0, -0.6931472
    u = torch.tensor([0.999999, 0.5, 0.5], dtype=torch.float64)
    assert inverse_cdf(logp, u).tolist() == [10, 599, 256]


def test_products_in_bfloat16():
    """Weights and gradients stay float32; log-probs move by the rounding of bfloat16 (2^-9) and not more."""
    policy, _ = tiny_policy()
    low = dataclasses.replace(policy, autocast="all")
    items = make_items()
    config = settings("uft", "likelihood.weight=0.3", "reference.kl=0")
    batch = pack(items, range(3), weigh(items, config), config)
    with torch.no_grad():
        exact, rounded = logprobs(policy, batch)[0], logprobs(low, batch)[0]
    assert rounded.dtype == torch.float32
    assert 1e-5 < (exact - rounded).abs().max() < 0.1
    _, got = packed_loss(low, items, config)
    _, expected = packed_loss(policy, items, config)
    assert all(g.dtype == torch.float32 for g in got)
    close(got, expected, 0.1)
    asked = [Request(items[0].prompt, RNG.random((4, 6)))]
    for where in ("all", "sample"):
        (samples,) = generate(dataclasses.replace(policy, autocast=where), asked, 6)
        members = [Member(s.tokens, COMPLETION, 1.0, s.logps) for s in samples]
        one = [Item(items[0].prompt, [], members)]
        batch = pack(one, [0], weigh(one, config), config)
        gap = (logprobs(policy, batch)[0] - batch.sampler_S).abs().max()
        assert 1e-6 < gap < 0.1


def test_weights_in_bfloat16():
    """The merged passes also in the weights' own bfloat16: log-probs within its rounding of float32's, sampling works."""
    policy, _ = tiny_policy(torch.bfloat16)
    wide, _ = tiny_policy(torch.float32)
    wide.model.load_state_dict(policy.model.state_dict())
    items, config = make_items(), settings("uft", "likelihood.weight=0.3", "reference.kl=0")
    batch = pack(items, range(3), weigh(items, config), config)
    with torch.no_grad():
        gap = (logprobs(policy, batch)[0] - logprobs(wide, batch)[0]).abs().max()
    assert 1e-5 < gap < 0.1
    _, got = packed_loss(policy, items, config)
    _, expected = packed_loss(wide, items, config)
    assert all(g.dtype == torch.bfloat16 for g in got)
    close([g.float() for g in got], expected, 0.1)
    (samples,) = generate(policy, [Request(items[0].prompt, RNG.random((4, 6)))], 6)
    assert all(len(s.tokens) == len(s.logps) > 0 and np.isfinite(s.logps).all() for s in samples)
