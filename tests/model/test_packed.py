"""Fast equals plain: the packed shared-prefix forward against padded copies with full logits, loss and gradients."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import tiny_policy
from plain import token_logprobs, uft_loss

from unift.config.resolve import parse_overrides, resolve
from unift.model.logprobs import _ChunkedLogProb, chunked_logprobs, logprobs
from unift.model.packs import COMPLETION, DEMO, Item, Member, cut, pack
from unift.model.policy import Policy
from unift.objectives import loss as objectives
from unift.objectives.weights import weigh
from unift.sampling.engines.base import Request
from unift.sampling.engines.native import generate
from unift.training.update import prepare, reference_logprobs

RNG = np.random.default_rng(7)


def tokens(n):
    return RNG.integers(2, 37, n).tolist()


def settings(*more, method="uft"):
    return resolve(
        method, overrides=parse_overrides(["data.task=lock", "likelihood.weight=0.3", "reference.kl=0", *more])
    )


def ragged(g, hints=(0, 1, 6), demo=False):
    """Groups of ragged lengths: empty and full hints, one-token completions, with and without EOS at the end."""
    items = []
    for n, h in enumerate(hints):
        lengths = [1, *RNG.integers(1, 9, g - 1)]
        members = [
            Member(tokens(k - 1) + [1 if j % 2 else 5], COMPLETION, float(RNG.normal())) for j, k in enumerate(lengths)
        ]
        if demo:
            members.append(Member([*tokens(4), 1], DEMO))
        items.append(Item(tokens(3 + 2 * n), tokens(h), members))
    return items


def gradients(policy):
    return [p.grad.clone() for p in policy.parameters()]


def packed(policy, items, config, budget=10**6, reference=None):
    """Loss and gradients of one optimizer batch, summed over its micro-batches."""
    policy.model.zero_grad()
    weights, total = weigh(items, config), 0.0
    for which in cut(items, budget, config):
        batch = pack(items, which, weights, config)
        if batch is None:
            continue
        if reference is not None:
            (batch,) = reference_logprobs(lambda b: logprobs(reference, b, config.sample.temperature)[0], [batch])
        l_S, h_S = logprobs(policy, batch, config.sample.temperature)
        entropy = h_S if config.policy.entropy else None
        parts = objectives.losses(l_S, entropy, batch, config)
        loss = parts["policy"] + parts["likelihood"]
        loss.backward()
        total += loss.item()
    return total, gradients(policy)


def close(a, b, bound):
    worst = max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))
    scale = max(y.abs().max().item() for y in b)
    assert worst / scale < bound, f"gradients differ by {worst / scale:.2e} of the largest"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("g", [2, 4, 16])
def test_loss_and_gradients(dtype, kind, g):
    policy, plain = tiny_policy(dtype, kind)
    reference, plain_reference = tiny_policy(dtype, kind, seed=1)
    config = settings("reference.kl=0.05", "policy.entropy=0.02", "sample.temperature=0.7")
    items = ragged(g)
    loss, got = packed(policy, items, config, reference=reference)
    expected = uft_loss(plain, plain_reference, items, config)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    close(got, [p.grad for p in plain.parameters()], 1e-5 if dtype == torch.float32 else 1e-6)


@pytest.mark.parametrize("tie", [True, False])
def test_demonstrations(tie):
    """SFT: no completions, the whole solution; and a demonstration beside completions."""
    policy, plain = tiny_policy(tie=tie)
    config = settings(method="sft")
    alone = [Item(tokens(4), tokens(h), [Member([*tokens(3), 1], DEMO)]) for h in (0, 2, 5)]
    mixed = ragged(3, demo=True)
    for items, more in ((alone, config), (mixed, settings("likelihood.tokens=demo"))):
        loss, got = packed(policy, items, more)
        plain.zero_grad()
        expected = uft_loss(plain, None, items, more)
        expected.backward()
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        close(got, [p.grad for p in plain.parameters()], 1e-5)


@pytest.mark.parametrize("norm", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"])
def test_update_does_not_depend_on_the_cut(norm):
    policy, _ = tiny_policy()
    config = settings(f"policy.norm={norm}", f"likelihood.norm={norm}")
    items = ragged(4, hints=(0, 1, 6, 3, 2))
    loss, whole = packed(policy, items, config)
    for budget in (1, 60, 120):
        other, got = packed(policy, items, config, budget)
        assert other == pytest.approx(loss, rel=1e-5)
        close(got, whole, 1e-5)
    _, shuffled = packed(policy, [items[i] for i in (3, 0, 4, 2, 1)], config)
    close(shuffled, whole, 1e-5)


def test_groups_without_signal_are_skipped_exactly():
    """All scores equal and no KL: the completions are not forwarded, yet they count in Z and the likelihood stays."""
    policy, plain = tiny_policy()
    items = ragged(4)
    silent = Item(items[2].prompt, items[2].hint, [Member(m.tokens, COMPLETION, 0.0) for m in items[2].members])
    items = [*items[:2], silent]
    config = settings()
    batch = pack(items, range(3), weigh(items, config), config)
    assert len(batch.tokens_T) == sum(i.tokens_forwarded for i in items[:2]) + len(silent.prompt + silent.hint)
    loss, got = packed(policy, items, config)
    expected = uft_loss(plain, None, items, config)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    close(got, [p.grad for p in plain.parameters()], 1e-5)


def test_tokens_forwarded():
    """P + H + sum(R - 1) per group: nothing is repeated, and a last token is only a target."""
    items = ragged(5)
    batch = pack(items, range(3), weigh(items, settings()), settings())
    expected = sum(len(i.prompt) + len(i.hint) + sum(len(m.tokens) - 1 for m in i.members) for i in items)
    assert len(batch.tokens_T) == expected


def test_several_updates_use_the_log_probs_of_the_start():
    policy, plain = tiny_policy()
    config = settings("train.prompts=4", "train.updates=2", "sample.completions=3")
    items = ragged(3, hints=(0, 1, 2, 3))
    (first,), (second,) = prepare(policy, items, config, None)
    assert first.old_S is None
    now = logprobs(policy, second, 1.0)[0]
    assert torch.equal(second.old_S, now.detach().double())


@pytest.mark.parametrize("chunk", [1, 7, 50, 51])
@pytest.mark.parametrize("bias", [False, True])
def test_chunked_log_probs(chunk, bias):
    torch.manual_seed(0)
    h, w = (
        torch.randn(50, 8, dtype=torch.float64, requires_grad=True),
        torch.randn(23, 8, dtype=torch.float64, requires_grad=True),
    )
    b = torch.randn(23, dtype=torch.float64, requires_grad=True) if bias else None
    target, scale = torch.randint(23, (50,)), torch.rand(50, dtype=torch.float64) + 0.5
    weight_l, weight_h = torch.randn(50, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    inputs = [x for x in (h, w, b) if x is not None]
    l_S, h_S = chunked_logprobs(h, w, b, target, scale, chunk)
    got = torch.autograd.grad((weight_l * l_S + weight_h * h_S).sum(), inputs)
    full = torch.log_softmax(torch.nn.functional.linear(h, w, b) * scale[:, None], -1)
    plain_l, plain_h = full.gather(1, target[:, None])[:, 0], -(full.exp() * full).sum(-1)
    expected = torch.autograd.grad((weight_l * plain_l + weight_h * plain_h).sum(), inputs)
    assert torch.allclose(l_S, plain_l, atol=1e-12) and torch.allclose(h_S, plain_h, atol=1e-12)
    assert all(torch.allclose(x, y, atol=1e-10) for x, y in zip(got, expected, strict=True))


def test_logits_of_a_large_vocabulary_exist_in_smaller_chunks(monkeypatch):
    """23 tokens and room for 100 numbers: 4 rows at a time, in the forward and, where none are kept, in the backward pass."""
    rows, make = [], _ChunkedLogProb._z
    record = lambda *a: (rows.append(make(*a)), rows[-1])[1]  # noqa: E731
    monkeypatch.setattr(_ChunkedLogProb, "_z", staticmethod(record))
    monkeypatch.setattr("unift.model.logprobs.LOGITS", 100)
    h, w, target = torch.randn(10, 8, requires_grad=True), torch.randn(23, 8), torch.randint(23, (10,))
    l_S, _ = chunked_logprobs(h, w, None, target, torch.ones(10), keep=0)
    l_S.sum().backward()
    assert [len(z) for z in rows] == [4, 4, 2] * 2
    assert torch.allclose(l_S, torch.log_softmax(h @ w.T, -1).gather(1, target[:, None])[:, 0], atol=1e-5)


# ---------------------------------------------------------------------------------------------- sampling


def requests(n=9, g=5, length=12):
    return [Request(tokens(int(RNG.integers(2, 9))), RNG.random((g, length))) for _ in range(n)]


def naive(plain, request, length, temperature):
    """One sequence at a time, a full forward for every token, inverse CDF of the same uniforms."""
    out = []
    for u in request.uniforms():
        sequence = list(request.prompt)
        for t in range(length):
            with torch.no_grad():
                logits = plain(input_ids=torch.tensor([sequence])).logits[0, -1] / temperature
            cdf = torch.log_softmax(logits.float(), -1).double().exp().cumsum(0)
            sequence.append(int((cdf <= u[t] * cdf[-1]).sum()))
            if sequence[-1] == 1:
                break
        out.append(sequence[len(request.prompt) :])
    return out


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampler_equals_the_naive_one(temperature):
    policy, plain = tiny_policy()
    asked = requests()
    got = generate(policy, asked, 12, temperature)
    small = generate(policy, asked, 12, temperature, rows=1)
    for request, samples, alone in zip(asked, got, small, strict=True):
        assert [s.tokens for s in samples] == [s.tokens for s in alone] == naive(plain, request, 12, temperature)
        assert all(s.finished == (s.tokens[-1] == 1) for s in samples)
        for s in samples:
            with torch.no_grad():
                l = token_logprobs(plain, [request.prompt + s.tokens], temperature)[0][0][len(request.prompt) - 1 :]
            assert torch.allclose(l, torch.tensor(s.logps), atol=1e-5)
    assert any(s.finished for g in got for s in g) and any(not s.finished for g in got for s in g)


def test_sampler_agrees_with_the_trainer():
    policy, _ = tiny_policy()
    asked = requests(6, 4)
    groups = generate(policy, asked, 12)
    items = [
        Item(r.prompt[:1], r.prompt[1:], [Member(s.tokens, COMPLETION, 1.0, s.logps) for s in g])
        for r, g in zip(asked, groups, strict=True)
    ]
    batch = pack(items, range(6), weigh(items, settings()), settings())
    l_S = logprobs(policy, batch)[0].detach()
    own = batch.role_S == COMPLETION
    assert (l_S[own] - batch.sampler_S[own]).abs().max() < 1e-5


def test_greedy_equals_generate():
    policy, plain = tiny_policy()
    asked = [Request(tokens(n), None) for n in (2, 5, 9)]
    plain.generation_config.pad_token_id = 0
    for request, (sample,) in zip(asked, generate(policy, asked, 15), strict=True):
        out = plain.generate(torch.tensor([request.prompt]), max_new_tokens=15, do_sample=False)[
            0, len(request.prompt) :
        ]
        assert sample.tokens == out.tolist()


def test_sampling_frequencies():
    """20,000 first tokens against the softmax: chi-square below its 99.99 % quantile at this seed."""
    from scipy.stats import chi2

    policy, plain = tiny_policy()
    prompt = tokens(4)
    n = 20_000
    got = generate(policy, [Request(prompt, np.random.default_rng(3).random((n, 1)))], 1, rows=n)[0]
    with torch.no_grad():
        p = plain(input_ids=torch.tensor([prompt])).logits[0, -1].double().softmax(-1).numpy()
    seen = np.bincount([s.tokens[0] for s in got], minlength=37)
    often = p * n >= 5
    statistic = ((seen - p * n)[often] ** 2 / (p * n)[often]).sum()
    assert statistic < chi2.ppf(0.9999, often.sum() - 1)


def test_reference_policy_is_not_touched():
    """A reference built by copy gives the same log-probs until the policy moves."""
    policy, _ = tiny_policy()
    frozen = Policy(copy.deepcopy(policy.model), None, policy.device)
    items = ragged(2)
    batch = pack(items, range(3), weigh(items, settings()), settings())
    assert torch.equal(logprobs(policy, batch)[0], logprobs(frozen, batch)[0])


def test_a_temperature_is_as_exact_as_the_model():
    """1/T has no exact float32: in float64 the trainer's log-probs are softmax(logits / T) to float64's rounding."""
    policy, plain = tiny_policy(torch.float64, kind="gpt2")  # whose norms are in float64, too
    items, config = ragged(2, hints=(0,)), settings("likelihood.tokens=none")
    batch = pack(items, [0], weigh(items, config), config)
    with torch.no_grad():
        l_S, entropy_S = logprobs(policy, batch, 0.7)
        sequences = [items[0].prompt + m.tokens for m in items[0].members]
        logps, entropies = token_logprobs(plain, sequences, 0.7)
    first = len(items[0].prompt) - 1
    assert torch.allclose(l_S, torch.cat([l[first:] for l in logps]), rtol=0, atol=1e-12)
    assert torch.allclose(entropy_S, torch.cat([h[first:] for h in entropies]), rtol=0, atol=1e-12)


def test_packs_stay_within_the_budget():
    """Also where so few items are left for a pack that what they begin with is not worth a stem of theirs."""
    config, several = settings("train.token_budget=100"), 0
    rng = np.random.default_rng(0)
    for _ in range(60):
        stem = rng.integers(2, 37, int(rng.integers(8, 40))).tolist()
        ends = [(rng.integers(1, 12), rng.integers(1, 30)) for _ in range(int(rng.integers(2, 14)))]
        items = [Item(stem + tokens(p), [], [Member(tokens(n), COMPLETION, 1.0)]) for p, n in ends]
        packs = cut(items, 100, config)
        assert sorted(i for which in packs for i in which) == list(range(len(items)))
        for which in packs:
            batch = pack(items, which, None, config)
            several += len(which) > 1
            assert len(which) == 1 or len(batch.tokens_T) <= 100, (len(stem), which)
    assert several > 60
