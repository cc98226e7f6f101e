"""Every rule through its effective weight e_t = -dL/dl_t against closed forms, and the reductions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import close, gradients, make_items, packed_loss, settings, tiny_policy
from plain import token_logprobs

from unift import rng
from unift.config.sections import Credit
from unift.credit.advantages import advantages
from unift.credit.members import items_of
from unift.hints import schedules
from unift.model.packs import COMPLETION, DEMO, HINT, Item, Member, pack
from unift.objectives import loss as objectives
from unift.objectives.weights import weigh
from unift.rows.tokens import separators
from unift.sampling.engines.base import Request
from unift.sampling.engines.native import generate
from unift.types import Group, Score

OLD, REF = np.log(0.20), np.log(0.50)  # the golden token: pi = .25, pi_old = .20, pi_ref = .50


def leaf(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def fixed(*values):
    return torch.tensor(values, dtype=torch.float64)


def effective(loss, l):
    (grad,) = torch.autograd.grad(loss.sum(), l)
    return (-grad).tolist()


def surrogate(a, low=0.2, high=0.2, dual=None, pi=0.25):
    l = leaf(np.log(pi))
    return effective(-objectives.clipped_surrogate(l, fixed(OLD), fixed(a), low, high, dual), l)


# ---------------------------------------------------------------------------------------------- golden values


def test_f1_sft_gradient_on_logits():
    """z = (2, 1, 0), target 1: dL/dz = softmax - onehot (F1)."""
    z = leaf(2.0, 1.0, 0.0)
    (grad,) = torch.autograd.grad(-torch.log_softmax(z, 0)[1], z)
    assert grad.tolist() == pytest.approx([0.665241, -0.755272, 0.090031], abs=5e-7)
    from unift.model.logprobs import chunked_logprobs

    z = leaf(2.0, 1.0, 0.0)
    l_S, _ = chunked_logprobs(z[None], torch.eye(3).double(), None, torch.tensor([1]), torch.ones(1).double())
    (grad,) = torch.autograd.grad(-l_S.sum(), z)
    assert grad.tolist() == pytest.approx([0.665241, -0.755272, 0.090031], abs=5e-7)


@pytest.mark.parametrize(
    ("a", "high", "e"), [(1.0, 0.2, 0.0), (-1.0, 0.2, -1.25), (1.0, 0.28, 1.25), (-1.0, 0.28, -1.25)]
)
def test_golden_clip(a, high, e):
    """PPO/GRPO, and DAPO's higher upper bound: rho = 1.25."""
    assert surrogate(a, high=high) == pytest.approx([e])


def test_clip_below():
    """rho = 0.5: clipped for A < 0, free for A > 0; the lower bound is its own setting."""
    assert surrogate(-1.0, pi=0.1) == [0.0]
    assert surrogate(1.0, pi=0.1) == pytest.approx([0.5])
    assert surrogate(-1.0, low=0.6, pi=0.1) == pytest.approx([-0.5])


def test_f4_dual_clip():
    """A = -1, rho = 5: loss 5 without, 3 and no gradient with c = 3; never active for A > 0 or a small ratio."""
    for dual, loss, e in ((None, 5.0, -5.0), (3.0, 3.0, 0.0), (6.0, 5.0, -5.0)):
        l = leaf(np.log(5.0))
        s = objectives.clipped_surrogate(l, fixed(0.0), fixed(-1.0), 0.2, 0.2, dual)
        assert -s.item() == pytest.approx(loss) and effective(-s, l) == pytest.approx([e])
    assert surrogate(1.0, dual=3.0, pi=0.2) == pytest.approx([1.0]) and surrogate(-1.0, dual=3.0) == pytest.approx(
        [-1.25]
    )


def test_reinforce():
    l = leaf(-1.0, -7.0)
    assert effective(-objectives.reinforce(l, fixed(2.0, -0.5)), l) == [2.0, -0.5]


def test_f3_k3():
    l, ref = leaf(-1.0, -2.0), fixed(-1.5, -1.0)
    assert objectives.kl_penalty(l, ref, "k3").tolist() == pytest.approx([0.106531, 0.718282], abs=5e-7)
    assert objectives.kl_penalty(l, ref, "k2").tolist() == pytest.approx([0.125, 0.5])


@pytest.mark.parametrize(("estimator", "e"), [("k3", 1.0), ("k2", 0.693147)])
def test_golden_kl(estimator, e):
    l = leaf(np.log(0.25))
    assert effective(objectives.kl_penalty(l, fixed(REF), estimator), l) == pytest.approx([e], abs=5e-7)


@pytest.mark.parametrize(("estimator", "forward"), [("k3", True), ("k2", False)])
def test_which_kl_the_gradient_is(estimator, forward):
    """docs/traps.md 6, by exact expectation over the vocabulary: k3's gradient is KL(ref||pi)'s, k2's is KL(pi||ref)'s."""
    z, ref = leaf(2.0, 1.0, 0.0), torch.log_softmax(fixed(0.0, 1.0, 2.0), 0)
    logp = torch.log_softmax(z, 0)
    expected_loss = (logp.exp().detach() * objectives.kl_penalty(logp, ref, estimator)).sum()
    (got,) = torch.autograd.grad(expected_loss, z, retain_graph=True)
    kl = (ref.exp() * (ref - logp)).sum() if forward else (logp.exp() * (logp - ref)).sum()
    (expected,) = torch.autograd.grad(kl, z)
    assert torch.allclose(got, expected, atol=1e-12)
    if not forward:  # on-policy distillation: A_t = log pi_T - l_t in expectation
        assert got.tolist() == pytest.approx([0.565175, -0.281541, -0.283634], abs=5e-7)


# ---------------------------------------------------------------------------------------------- the loss of a pack


ITEMS = [
    Item([3, 4], [5, 6, 7], [Member([8, 9, 1], COMPLETION, 1.5), Member([8, 1], COMPLETION, -0.5)]),
    Item([3], [], [Member([4], COMPLETION, 0.7), Member([6, 6, 6, 1], COMPLETION, -0.7)]),
]
TARGETS = [5, 6, 7, 8, 9, 1, 8, 1, 4, 6, 6, 6, 1]
OWN = [1.5] * 3 + [-0.5] * 2 + [0.7] + [-0.7] * 4


def weights_of(items, config, ref=None, old=None, entropy=None):
    """The pack, and e_t of every supervised token with l a leaf at -1.3."""
    batch = pack(items, range(len(items)), weigh(items, config), config)
    n = len(batch.target_S)
    l = torch.full((n,), -1.3, dtype=torch.float64, requires_grad=True)
    batch = replace(
        batch,
        ref_S=None if ref is None else torch.full((n,), ref).double(),
        old_S=None if old is None else torch.full((n,), old).double(),
    )
    parts = objectives.losses(l, entropy, batch, config)
    return batch, torch.tensor(effective(parts["policy"] + parts["likelihood"], l))


def test_effective_weights_of_uft():
    """COMPLETION: A/Z at rho = 1. HINT: beta/Z_hint. PROMPT: no position carries a loss."""
    batch, e_S = weights_of(ITEMS, settings("uft", "likelihood.weight=0.25", "reference.kl=0"))
    own = batch.role_S == COMPLETION
    assert batch.target_S.tolist() == TARGETS and own.tolist() == [False] * 3 + [True] * 10
    assert e_S[own].tolist() == pytest.approx([a / 10 for a in OWN])
    assert e_S[~own].tolist() == pytest.approx([0.25 / 3] * 3)


def test_hint_weight_does_not_depend_on_the_reward():
    config = settings("uft", "likelihood.weight=0.25", "reference.kl=0")
    scaled = [Item(i.prompt, i.hint, [Member(m.tokens, m.role, -9 * m.advantage) for m in i.members]) for i in ITEMS]
    for (batch, e_S), factor in ((weights_of(ITEMS, config), 1), (weights_of(scaled, config), -9)):
        assert e_S[batch.role_S == HINT].tolist() == pytest.approx([0.25 / 3] * 3)
        assert e_S[batch.role_S == COMPLETION].tolist() == pytest.approx([factor * a / 10 for a in OWN])


def test_kl_and_entropy_act_on_completions_only():
    """docs/traps.md 6: pi at -1.3, the reference at -2.3, so d = -1: e_KL = beta (exp(d) - 1)/Z on COMPLETION, 0 on HINT."""
    quiet = [Item(i.prompt, i.hint, [Member(m.tokens, m.role, 0.0) for m in i.members]) for i in ITEMS]
    batch, e_S = weights_of(quiet, settings("uft", "likelihood.weight=0", "reference.kl=0.5"), ref=-2.3)
    assert (batch.role_S == COMPLETION).all() and len(e_S) == 10
    assert e_S.tolist() == pytest.approx([0.5 * (np.exp(-1) - 1) / 10] * 10)
    batch, e_S = weights_of(
        ITEMS, settings("uft", "likelihood.weight=0.25", "reference.kl=0.5", "policy.entropy=0.3"), ref=-2.3
    )
    hint = batch.role_S == HINT
    assert e_S[hint].tolist() == pytest.approx([0.25 / 3] * 3)
    h_S = torch.arange(13).double().requires_grad_()
    parts = objectives.losses(torch.zeros(13).double(), h_S, batch, settings("uft", "policy.entropy=0.3"))
    (bonus,) = torch.autograd.grad(parts["policy"], h_S)
    assert bonus.tolist() == pytest.approx([0.0] * 3 + [-0.3 / 10] * 10)


def test_second_update_uses_the_ratio_on_completions_only():
    """pi/pi_old = exp(0.1) inside the clip: e = rho A/Z; the hint's weight stays beta/Z_hint. exp(1): clipped for A > 0."""
    config = settings("uft", "likelihood.weight=0.25", "reference.kl=0")
    batch, e_S = weights_of(ITEMS, config, old=-1.4)
    own = batch.role_S == COMPLETION
    assert e_S[own].tolist() == pytest.approx([np.exp(0.1) * a / 10 for a in OWN])
    assert e_S[~own].tolist() == pytest.approx([0.25 / 3] * 3)
    _, e_S = weights_of(ITEMS, config, old=-2.3)
    assert e_S[own].tolist() == pytest.approx([0.0 if a > 0 else np.e * a / 10 for a in OWN])
    _, e_S = weights_of(ITEMS, settings("uft", "policy.loss=reinforce", "reference.kl=0"), old=-2.3)
    assert e_S[own].tolist() == pytest.approx([a / 10 for a in OWN])


def test_prompt_has_no_loss():
    """The logits that predict prompt tokens get a gradient of exactly 0, those that predict all others do not."""
    config = settings("uft", "likelihood.weight=0.25", "reference.kl=0")
    batch = pack(ITEMS, [0, 1], weigh(ITEMS, config), config)
    logits = torch.randn(len(batch.tokens_T), 10, dtype=torch.float64, requires_grad=True)
    l_S = torch.log_softmax(logits, -1)[batch.at_S].gather(1, batch.target_S[:, None])[:, 0]
    parts = objectives.losses(l_S, None, batch, config)
    (grad,) = torch.autograd.grad(parts["policy"] + parts["likelihood"], logits)
    touched = grad.abs().sum(1) > 0
    # flat row: [3 4 | 5 6 7 | 8 9 | 8] [3 | - | 6 6 6]; a last token is never forwarded
    assert touched.tolist() == [False, True, True, True, True, True, True, True, True, True, True, True]
    assert grad[0].tolist() == [0.0] * 10


def test_sft_rule():
    """SFT: weight 1 on every token of the solution, EOS included."""
    items = [Item([3, 4], [5, 6, 7], [Member([8, 1], DEMO)]), Item([3], [9], [Member([1], DEMO)])]
    batch, e_S = weights_of(items, settings("sft"))
    assert batch.target_S.tolist() == [5, 6, 7, 8, 1, 9, 1] and e_S.tolist() == pytest.approx([1 / 7] * 7)


def test_equal_rewards_leave_the_likelihood_alone():
    """docs/traps.md 23: all advantages 0 and no KL: only the hint's likelihood is left."""
    quiet = [Item(i.prompt, i.hint, [Member(m.tokens, m.role, 0.0) for m in i.members]) for i in ITEMS]
    batch, e_S = weights_of(quiet, settings("uft", "reference.kl=0"))
    assert batch.target_S.tolist() == [5, 6, 7] and e_S.tolist() == pytest.approx([0.001 / 3] * 3)


# ---------------------------------------------------------------------------------------------- reductions


def sampled(policy, config, step, total, rows=4, g=4):
    """Groups as the loop makes them: hint drawn, completions sampled, scores of a fixed rule, advantages."""
    groups = []
    gen = np.random.default_rng(3)
    for i in range(rows):
        prompt, solution = gen.integers(2, 37, 4 + i).tolist(), gen.integers(2, 37, 5).tolist()
        k = schedules.draw(config.show, schedules.At(0, step, total, f"r{i}"), 5)
        hint = solution[: separators(5, config.show.cuts)[k]]
        request = Request(prompt + hint, rng.uniforms("sample", 0, step, f"r{i}", shape=(g, 7)))
        samples = generate(policy, [request], 7, config.sample.temperature)[0]
        for s in samples:
            s.score = Score(float(s.tokens[0] % 2))
        groups.append(Group(i, f"r{i}", prompt, hint, k, 5, samples))
    return items_of(groups, [advantages([s.score.value for s in x.samples], config.credit) for x in groups], None)


def bitwise(policy, reference, first, second, step=3, total=10):
    results = [packed_loss(policy, sampled(policy, c, step, total), c, reference=reference) for c in (first, second)]
    (loss_a, a), (loss_b, b) = results
    assert loss_a == loss_b and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert any(x.any() for x in a)


def test_p_zero_is_rft_bit_for_bit():
    """UFT with p = 0, and UFT after T_hint, are RFT: same tokens, loss and gradients, every bit."""
    policy, _ = tiny_policy()
    reference, _ = tiny_policy(seed=1)
    bitwise(policy, reference, settings("uft", "show.high=0", "show.low=0"), settings("rft"))
    bitwise(policy, reference, settings("uft"), settings("rft"), step=6)
    with pytest.raises(AssertionError):  # and with hints they are not
        bitwise(policy, reference, settings("uft"), settings("rft"), step=0)


def test_uniform_with_weight_zero_is_r3_bit_for_bit():
    policy, _ = tiny_policy()
    reference, _ = tiny_policy(seed=1)
    bitwise(policy, reference, settings("uft", "show.schedule=uniform", "likelihood.weight=0"), settings("r3"))


@pytest.mark.parametrize(("a", "b"), [("uft", "rft"), ("uft", "r3"), ("uft", "stage")])
def test_presets_differ_only_in_what_names_them(a, b):
    """No hidden setting separates the methods that are compared."""
    first, second = settings(a), settings(b)
    for section in ("sample", "credit", "policy", "reference", "train", "reward", "eval"):
        assert getattr(first, section) == getattr(second, section)


def test_all_hint_and_no_completions_is_sft_on_the_span():
    """p = 1 without completions: the mean NLL of the shown span, and the sft preset on the same tokens."""
    policy, plain = tiny_policy()
    gen = np.random.default_rng(0)
    spans = [(gen.integers(2, 37, 3 + i).tolist(), gen.integers(2, 37, 6 - i).tolist()) for i in range(4)]
    config = settings("uft", "show.schedule=all", "sample.completions=0", "likelihood.weight=1", "reference.kl=0")
    loss, got = packed_loss(policy, [Item(p, h, []) for p, h in spans], config)
    logps, _ = token_logprobs(plain, [p + h for p, h in spans])
    nll = -torch.cat([l[len(p) - 1 :] for l, (p, _) in zip(logps, spans, strict=True)]).mean()
    nll.backward()
    assert loss == pytest.approx(nll.item(), rel=1e-6)
    close(got, gradients(plain), 1e-5)
    demo_loss, demo = packed_loss(policy, [Item(p, [], [Member(h, DEMO)]) for p, h in spans], settings("sft"))
    assert demo_loss == pytest.approx(loss, rel=1e-6)
    close(demo, got, 1e-5)


def test_demonstration_is_the_same_wherever_the_hint_ends():
    """sft on (hint, rest) does not depend on the split of the solution between them."""
    policy, _ = tiny_policy()
    solution = [5, 6, 7, 8, 9, 1]
    results = [
        packed_loss(policy, [Item([3, 4, 5], solution[:k], [Member(solution[k:], DEMO)])], settings("sft"))
        for k in range(6)
    ]
    for loss, grad in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        close(grad, results[0][1], 1e-5)


def test_dr_grpo_is_grpo_without_its_divisors():
    """A constant std and length norm: GRPO's weights are Dr.GRPO's times a constant of the group."""
    a = np.array(advantages([1, 0.1, 0, 0.1], Credit(epsilon=0)))
    b = np.array(advantages([1, 0.1, 0, 0.1], Credit(scale="none")))
    assert (b / a).tolist() == pytest.approx([0.469042] * 4, abs=5e-7)


def test_make_items_covers_the_edges():
    """The groups that the other tests use do hold what they claim: one-token completions, EOS and not, empty hints."""
    items = make_items()
    lengths = [len(m.tokens) for i in items for m in i.members]
    ends = {m.tokens[-1] == 1 for i in items for m in i.members}
    assert (
        min(lengths) == 1 and max(lengths) > 4 and ends == {True, False} and [len(i.hint) for i in items] == [0, 1, 6]
    )
