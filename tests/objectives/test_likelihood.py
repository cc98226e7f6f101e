"""Rules of the likelihood stream through e_t = -dL/dl_t, with l a leaf, against closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import close, gradients, packed_loss, random_tokens, settings, tiny_policy

from unift import rng
from unift.config import needs
from unift.config.sections import Likelihood
from unift.config.stages import Moment, Stage
from unift.credit.members import chosen, items_of
from unift.model.logprobs import logprobs
from unift.model.packs import DEMO, OWN, Item, Member, cut, pack
from unift.objectives import likelihood
from unift.objectives import loss as objectives
from unift.objectives.weights import weigh
from unift.sampling.engines.choose import in_process
from unift.sampling.groups import complete
from unift.training.update import prepare
from unift.types import Group, Sample, Score

PI, OLD, REF = np.log(0.25), np.log(0.20), np.log(0.50)  # the golden token


def leaf(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def fixed(*values):
    return torch.tensor(values, dtype=torch.float64)


def effective(g, l):
    """e = -dL/dl of L = -sum g."""
    (grad,) = torch.autograd.grad(g.sum(), l)
    return grad.tolist()


def of_rule(l, old=OLD, ref=REF, **more):
    n = len(l)
    sequence = torch.zeros(n, dtype=torch.long)
    s = Likelihood(tokens="demo", weight=1, **more)
    olds, refs = torch.full((n,), old).double(), torch.full((n,), ref).double()
    return effective(likelihood.terms(l, olds, refs, sequence, torch.ones(n, dtype=torch.bool), s), l)


@pytest.mark.parametrize(
    ("more", "e"),
    [
        ({"rule": "nll"}, 1.0),
        ({"rule": "probability"}, 0.25),
        ({"rule": "uncertainty"}, 0.1875),
        ({"rule": "shaped", "threshold": 0.1}, 0.204082),
        ({"rule": "trust", "threshold": 0.5}, 0.5),
        ({"rule": "trust", "threshold": 0.1}, 1.0),
        ({"rule": "ratio", "clip": 0.28}, 1.25),
        ({"rule": "ratio", "clip": 0.2}, 0.0),
        ({"rule": "importance", "clip": 16}, 0.5),
        ({"rule": "importance", "clip": 0.3}, 0.3),
        ({"rule": "pearson", "beta": 1.0}, 1.346574),
        ({"rule": "pearson", "beta": 0.1}, 0.103466),
        ({"rule": "hellinger", "beta": 0.1}, 0.115450),
        ({"rule": "total_variation", "beta": 0.1}, 0.1),
        ({"rule": "tail", "gamma": 0.0}, 1.0),
    ],
)
def test_golden_token(more, e):
    """One token with pi = .25, pi_old = .20, pi_ref = .50: e in closed form."""
    assert of_rule(leaf(PI), **more) == pytest.approx([e], abs=5e-7)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"rule": "probability"}, (0.162803, -0.184836, 0.022033)),
        ({"rule": "uncertainty"}, (0.122961, -0.139602, 0.016641)),
        ({"rule": "shaped", "threshold": 0.1}, (0.136996, -0.155537, 0.018540)),
        ({"rule": "trust", "threshold": 0.5}, (0.325607, -0.369673, 0.044066)),
    ],
)
def test_f1_gradients_on_logits(rule, expected):
    z = leaf(2.0, 1.0, 0.0)
    l = torch.log_softmax(z, 0)[1:2]
    on = torch.ones(1, dtype=torch.bool)
    g = likelihood.terms(l, l.detach(), None, torch.zeros(1, dtype=torch.long), on, Likelihood(weight=1, **rule))
    (grad,) = torch.autograd.grad(-g.sum(), z)
    assert grad.tolist() == pytest.approx(expected, abs=5e-7)
    if rule["rule"] == "probability":  # DFT's gradient is that of -pi itself
        (other,) = torch.autograd.grad(-torch.softmax(z, 0)[1], z)
        assert torch.allclose(grad, other, atol=1e-12)


def test_shaping_is_largest_at_its_threshold():
    l = leaf(*np.log([0.01, 0.1, 0.5, 0.9]))
    assert [x / p for x, p in zip(of_rule(l, rule="shaped", threshold=0.1), (0.01, 0.1, 0.5, 0.9))] == pytest.approx(
        [0.082645 / 0.01, 0.25 / 0.1, 0.138889 / 0.5, 0.09 / 0.9], rel=1e-5
    )


@pytest.mark.parametrize(("x", "pearson", "hellinger"), [(0.0, 1, 1), (0.5, 0.75, 0.444444), (1.0, 0.5, 0.25)])
def test_divergences(x, pearson, hellinger):
    """phi'(0) = 1; x = .5 and 1, as arXiv 2507.00018. Beyond their domains the weights are bounded and never negative."""
    for rule, slope in (("pearson", pearson), ("hellinger", hellinger)):
        beta = 0.1
        assert of_rule(leaf(REF + x / beta), rule=rule, beta=beta) == pytest.approx([beta * slope], abs=5e-7)
    assert of_rule(leaf(REF + 30.0), rule="pearson", beta=0.1) == [0.0]
    assert of_rule(leaf(REF - 30.0), rule="hellinger", beta=0.1) == pytest.approx([0.4])


def test_total_variation_is_sft():
    """phi(x) = x: the reference drops out, and weight = 1/beta gives SFT's loss and weights."""
    for ref in (REF, -7.0):
        assert of_rule(leaf(PI, -3.0), ref=ref, rule="total_variation", beta=0.1) == pytest.approx([0.1, 0.1])
    policy, _ = tiny_policy()
    items = demos()
    more = ["likelihood.rule=total_variation", "likelihood.beta=0.1", "likelihood.weight=10"]
    loss, sft = packed_loss(policy, items, settings("sft"))
    other, got = packed_loss(policy, items, settings("sft", *more))
    assert other == pytest.approx(loss, rel=1e-6)
    close(got, sft, 1e-6)


def test_importance_of_a_sequence_is_its_own_mean():
    """iw-SFT trap: the weight belongs to a sequence, whatever stands beside it in a micro-batch."""
    l, sequence = leaf(-1.0, -2.0, -3.0), torch.tensor([0, 1, 0])
    ref, on = fixed(-2.0, -2.5, -3.5), torch.ones(3, dtype=torch.bool)
    s = Likelihood(rule="importance", scope="sequence", clip=16, weight=1)
    e = effective(likelihood.terms(l, ref, ref, sequence, on, s), l)
    assert e == pytest.approx([math.exp(0.75), math.exp(0.5), math.exp(0.75)])


@pytest.mark.parametrize(
    ("gamma", "weights", "loss"),
    [
        (0.5, (0.891892, 1.135135, 0.972973), 2.027027),
        (0.95, (1.250046, 1.081181, 0.668772), 1.806242),
        (0.0, (1, 1, 1), 2.0),
    ],
)
def test_ift_weights_and_loss(gamma, weights, loss):
    l = leaf(-1.0, -2.0, -3.0)
    g = likelihood.tail(l, torch.zeros(3, dtype=torch.long), gamma)
    assert (g / l).tolist() == pytest.approx(weights, abs=5e-7) and -g.mean().item() == pytest.approx(loss, abs=5e-7)


def test_ift_effective_weights():
    """Through the undetached weights; with them detached the later tokens would pull less than the middle one."""
    l = leaf(-1.0, -2.0, -3.0)
    e = effective(likelihood.tail(l, torch.zeros(3, dtype=torch.long), 0.5) / 3, l)
    assert e == pytest.approx([0.186267, 0.319942, 0.400292], abs=5e-7)
    gamma, c = 0.8, np.random.default_rng(1).exponential(size=7)
    powers = np.triu(gamma ** np.maximum(np.arange(7)[None] - np.arange(7)[:, None], 0))
    w = powers @ c / 7
    total, weighted = w.sum(), (w * c).sum()
    closed = (w + powers.T @ c / 7) / total - weighted / total**2 * powers.sum(
        0
    ) / 7  # the quotient rule on sum w c / sum w
    l = leaf(*-c)
    e = effective(likelihood.tail(l, torch.zeros(7, dtype=torch.long), gamma) / 7, l)
    assert e == pytest.approx(closed.tolist(), abs=1e-12)
    two = leaf(-1.0, -5.0, -2.0, -3.0)  # another sequence in between changes nothing
    e = effective(likelihood.tail(two, torch.tensor([0, 1, 0, 0]), 0.5) / 3, two)
    assert [e[0], *e[2:]] == pytest.approx([0.186267, 0.319942, 0.400292], abs=5e-7)
    assert e[1] == pytest.approx(1 / 3)  # a sequence of one token is SFT


# ---------------------------------------------------------------------------------------------- in a pack


def demos(n=4, seed=0):
    gen = np.random.default_rng(seed)
    make = lambda i: (random_tokens(gen, 3 + i), random_tokens(gen, i), [*random_tokens(gen, 4), 1])  # noqa: E731
    rows = [make(i) for i in range(n)]
    return [Item(p, h, [Member(rest, DEMO)], address=(0, 0, f"r{i}")) for i, (p, h, rest) in enumerate(rows)]


SUPERVISED = ["dft", "iw-sft", "psft", "trsft", "sft-pearson", "sft-hellinger", "ift"]


@pytest.mark.parametrize("method", SUPERVISED)
def test_at_the_start_rules_are_multiples_of_sft(method):
    """With pi = pi_old = pi_ref the ratio and reference rules give SFT's e_t; dft and trsft its multiples."""
    config = settings(method, "likelihood.norm=token_mean")
    items = demos()
    batch = pack(items, range(4), weigh(items, config), config)
    l = torch.linspace(-3, -0.1, len(batch.target_S), dtype=torch.float64).requires_grad_()
    batch = replace(batch, ref_S=l.detach().clone(), old_S=l.detach().clone())
    parts = objectives.losses(l, None, batch, config)
    e_S = fixed(*effective(-(parts["policy"] + parts["likelihood"]), l)) * len(l)
    p_S = l.detach().exp()
    expected = {"dft": p_S, "trsft": p_S / p_S.clamp(min=0.1)}.get(method, torch.ones_like(p_S))
    if method == "ift":
        assert not torch.allclose(e_S, expected, atol=0.1)
    else:
        assert torch.allclose(e_S, expected, atol=1e-9)


def test_psft_is_sft_and_reinforce_at_ratio_one():
    """The gradient of -A rho at A = 1, rho = 1 is that of the NLL. The printed loss of PSFT is the constant -1."""
    policy, _ = tiny_policy()
    items = demos()
    loss, got = packed_loss(policy, items, settings("psft"))
    _, sft = packed_loss(policy, items, settings("sft"))
    assert loss == pytest.approx(-1.0)
    close(got, sft, 1e-6)
    own = [Item(i.prompt + i.hint, [], [Member(i.members[0].tokens, 1, 1.0)]) for i in items]
    whole = [Item(i.prompt + i.hint, [], i.members) for i in items]
    _, reinforce = packed_loss(policy, own, settings("rft", "policy.loss=reinforce", "reference.kl=0"))
    _, plain = packed_loss(policy, whole, settings("sft"))
    close(reinforce, plain, 1e-6)


def test_sft_gradient_is_an_importance_weighted_policy_gradient():
    """Identity 3: E_{y~pi}[1[y = y*] / pi(y) grad log pi(y)] = grad log pi(y*)."""
    pi = torch.softmax(fixed(2.0, 1.0, 0.0), 0)
    onehot = torch.eye(3).double()
    total = sum(pi[a] * ((a == 1) / pi[1]) * (onehot[a] - pi) for a in range(3))
    assert torch.allclose(total, onehot[1] - pi, atol=1e-12)


# ---------------------------------------------------------------------------------------------- inputs


def prepared(policy, items, config, budget=10**6):
    small = config.model_copy(update={"train": config.train.model_copy(update={"updates": 1, "token_budget": budget})})
    (packs,) = prepare(policy, items, small, None)
    return packs, small


@pytest.mark.parametrize("rule", ["importance", "pearson", "hellinger"])
def test_the_worst_case_under_a_rule_that_looks_at_the_reference(rule):
    """delta is along the gradient of the very loss: a small one raises it by scale * |g|."""
    policy, _ = tiny_policy(torch.float64)
    reference, _ = tiny_policy(torch.float64, seed=1)
    scale = 1e-4
    config = settings("sft-adversarial", f"likelihood.rule={rule}", f"inputs.scale={scale}")
    score = lambda batch: logprobs(reference, batch)[0]  # noqa: E731
    (packs,) = prepare(policy, demos(1), config, score)
    clean, worst = packs
    assert clean.delta_TD is None and worst.delta_TD.norm().item() == pytest.approx(scale)
    delta = torch.zeros_like(worst.delta_TD, requires_grad=True)
    parts = objectives.losses(logprobs(policy, replace(clean, delta_TD=delta))[0], None, clean, config)
    (g,) = torch.autograd.grad(parts["likelihood"], delta)
    assert torch.allclose(worst.delta_TD, scale * g / g.norm(), atol=1e-9)


def test_the_perturbed_copy_weighs_as_it_is_told():
    """Also its entropy bonus."""
    policy, _ = tiny_policy()
    more = ("policy.entropy=0.1", "policy.entropy_tokens=all", "inputs.copy_weight=0.25")
    config = settings("sft-adversarial", *more)
    clean, worst = prepared(policy, demos(1), config)[0]
    for name in ("likelihood_w_S", "entropy_w_S"):
        assert getattr(clean, name).any() and torch.equal(getattr(worst, name), 0.25 * getattr(clean, name))


def gradient_of(policy, packs, config):
    policy.model.zero_grad()
    total = 0.0
    for batch in packs:
        l_S, _ = logprobs(policy, batch)
        parts = objectives.losses(l_S, None, batch, config)
        parts["likelihood"].backward()
        total += parts["likelihood"].item()
    return total, gradients(policy.model)


def test_uniform_noise_has_its_size():
    """NEFTune: |entry| <= alpha / sqrt(L d), |delta|_F <= alpha, variance alpha^2 / (3 L d)."""
    policy, _ = tiny_policy()
    items = [Item(list(range(2, 32)), list(range(2, 32)), [Member([*range(2, 32), 1], DEMO)], address=(0, 0, "r"))]
    (batch,), _ = prepared(policy, items, settings("neftune"))
    delta, n = batch.delta_TD, 90 * 32
    assert delta.shape == (90, 32) and float(delta.abs().max()) <= 5 / math.sqrt(n)
    assert 0 < float(delta.norm()) <= 5
    assert float(delta.double().square().mean()) == pytest.approx(25 / (3 * n), rel=0.05)


@pytest.mark.parametrize("method", ["neftune", "sft-adversarial", "ift"])
def test_perturbed_inputs_do_not_depend_on_cut_or_order(method):
    policy, _ = tiny_policy()
    items = demos(5)
    packs, config = prepared(policy, items, settings(method))
    loss, whole = gradient_of(policy, packs, config)
    for order, budget in (((0, 1, 2, 3, 4), 1), ((3, 1, 4, 0, 2), 25)):
        packs, _ = prepared(policy, [items[i] for i in order], settings(method), budget)
        other, got = gradient_of(policy, packs, config)
        assert other == pytest.approx(loss, rel=1e-5)
        close(got, whole, 1e-4)
    _, clean = packed_loss(policy, items, settings("sft"))
    with pytest.raises(AssertionError):
        close(whole, clean, 1e-3)


def test_noise_is_addressed():
    """Another step or row draws its own; the same draws the same."""
    policy, _ = tiny_policy()
    at = lambda *address: prepared(policy, [replace(demos(1)[0], address=address)], settings("neftune"))[0][0].delta_TD  # noqa: E731
    assert torch.equal(at(0, 1, "a"), at(0, 1, "a"))
    assert not torch.equal(at(0, 1, "a"), at(0, 2, "a")) and not torch.equal(at(0, 1, "a"), at(0, 1, "b"))


def test_gaussian_without_noise_power_is_clean():
    """A signal-to-noise ratio of infinity reproduces the clean loss."""
    policy, _ = tiny_policy(torch.float64)
    items = demos()
    loss, _ = packed_loss(policy, items, settings("sft"))
    noisy = [
        gradient_of(policy, *prepared(policy, items, settings("sft", "inputs.noise=gaussian", f"inputs.scale={snr}")))[
            0
        ]
        for snr in (1e18, 1.0)
    ]
    assert noisy[0] == pytest.approx(loss, rel=1e-6) and abs(noisy[1] - loss) > 1e-3


def test_worst_case_noise_has_norm_eps_and_first_order_gain():
    """For a single row L(e + delta) - L(e) -> eps |g| as eps falls; delta has norm eps on every row."""
    policy, _ = tiny_policy(torch.float64)
    items = demos(1)
    gains = []
    for eps in (1e-3, 1e-4):
        (clean, bad), config = prepared(policy, items, settings("sft-adversarial", f"inputs.scale={eps}"))
        assert clean.delta_TD is None and float(bad.delta_TD.norm()) == pytest.approx(eps)
        delta = torch.zeros_like(bad.delta_TD, requires_grad=True)
        l_S, _ = logprobs(policy, replace(bad, delta_TD=delta))
        loss = objectives.losses(l_S, None, bad, config)["likelihood"]
        (g,) = torch.autograd.grad(loss, delta)
        l_S, _ = logprobs(policy, bad)
        moved = objectives.losses(l_S, None, bad, config)["likelihood"]
        gains.append((moved - loss).item() / (eps * g.norm().item()))
    assert gains[1] == pytest.approx(1, abs=1e-2) and abs(gains[1] - 1) < abs(gains[0] - 1) + 1e-6
    three, _ = prepared(policy, demos(3), settings("sft-adversarial", "inputs.scale=0.5"))
    assert float(three[1].delta_TD.norm()) == pytest.approx(0.5 * math.sqrt(3))


def test_own_guesses_replace_response_tokens_only():
    """delta = share (E[greedy] - E[y]) on every response token that is forwarded, from a plain forward pass."""
    policy, plain = tiny_policy()
    items = demos(3)
    config = settings("ift", "inputs.own=0.25")
    (batch,), _ = prepared(policy, items, config)
    table = policy.embeddings.weight
    start = 0
    for item in [items[i] for i in cut(items, 10**6, config)[0]]:
        sequence = item.prompt + item.hint + item.members[0].tokens
        with torch.no_grad():
            guess = plain(input_ids=torch.tensor([sequence])).logits[0].argmax(-1)
        n = len(sequence) - 1  # the last token is never an input
        for t in range(n):
            expected = torch.zeros(32)
            if t >= len(item.prompt):
                expected = 0.25 * (table[guess[t - 1]] - table[sequence[t]])
            assert torch.allclose(batch.delta_TD[start + t], expected, atol=1e-6)
        start += n
    assert batch.inputs_fixed and float(batch.delta_TD.abs().max()) > 0


def test_nothing_mixed_in_is_the_plain_input():
    """lambda = 0: the inputs are E[y*] exactly, and gamma = 0 with it is SFT on whole sequences."""
    policy, _ = tiny_policy()
    items = demos()
    config = settings("ift", "inputs.own=0", "likelihood.gamma=0")
    packs, config = prepared(policy, items, config)
    assert not needs.changed_inputs(config) and all(p.delta_TD is None for p in packs)
    _, got = gradient_of(policy, packs, config)
    _, expected = packed_loss(policy, items, settings("sft", "likelihood.norm=seq_mean_token_mean"))
    close(got, expected, 1e-6)


# ---------------------------------------------------------------------------------------------- own completions


def group(*samples, row_id="r"):
    made = [Sample(list(t), [-1.0] * len(t), t[-1] == 1, score=Score(v)) for t, v in samples]
    return Group(0, row_id, [3, 4], [], 0, 5, made)


def test_rollout_sft_keeps_one_right_completion():
    g = group(([5, 6, 1], 0.0), ([7, 1], 1.0), ([7, 1], 1.0), ([8, 1], 1.0))
    assert chosen(g, "one_right") == [[7, 1]] and chosen(g, "right") == [[7, 1], [8, 1]] and len(chosen(g, "all")) == 4
    config = settings("rollout-sft")
    items = items_of([g, group(([5, 1], 0.0))], [[0.0] * 4, [0.0]], None, config)
    batch = pack(items, [0, 1], weigh(items, config), config)
    assert (
        batch.target_S.tolist() == [7, 1]
        and batch.likelihood_w_S.tolist() == [0.5, 0.5]
        and (batch.role_S == OWN).all()
    )
    assert not batch.policy_w_S.any()


def test_rollout_sft_is_sft_on_the_same_tokens():
    policy, _ = tiny_policy()
    g = group(([7, 9, 1], 1.0), ([8, 1], 0.0))
    config = settings("rollout-sft")
    loss, got = packed_loss(policy, items_of([g], [[0.0, 0.0]], None, config), config)
    expected, sft = packed_loss(policy, [Item([3, 4], [], [Member([7, 9, 1], DEMO)])], settings("sft"))
    assert loss == pytest.approx(expected, rel=1e-6)
    close(got, sft, 1e-6)


def test_upft_samples_and_trains_the_first_tokens_only():
    """t tokens for most prompts, all of them for a tenth: sampling cost, no EOS after a cut, whole length with p = 1."""
    policy, _ = tiny_policy()
    long = 12
    asked = {}
    for name, more in (("cut", ["sample.full=0"]), ("whole", ["sample.full=1"]), ("mixed", ["sample.full=0.5"])):
        config = settings("upft", "sample.first=3", f"sample.max_tokens={long}", *more)
        groups = [Group(i, f"r{i}", [3 + i % 30, 4, 9], [], 0, 5) for i in range(40)]
        policy.tokenizer.batch_decode = lambda x, **k: [""] * len(x)
        complete(in_process(policy), policy.tokenizer, dict(enumerate(groups)), Moment(0, 0, Stage(0, 1, config)))
        asked[name] = [g.samples[0].tokens for g in groups]
    assert max(map(len, asked["cut"])) == 3 and max(map(len, asked["whole"])) == long
    for cut_, whole, mixed in zip(asked["cut"], asked["whole"], asked["mixed"], strict=True):
        assert cut_ == whole[:3] and mixed in (cut_, whole)
    full = [float(rng.uniforms("full", 0, 0, f"r{i}", shape=1)[0]) < 0.5 for i in range(40)]
    expected = [len(w) if f else min(len(w), 3) for w, f in zip(asked["whole"], full, strict=True)]
    assert [len(t) for t in asked["mixed"]] == expected and 5 < sum(full) < 35
    assert any(t[-1] != 1 for t in asked["cut"])
