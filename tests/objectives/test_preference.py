"""Pairs, scores and partitions (arXiv 2305.18290, 2408.15339, 2502.18679), through e_t with l a leaf."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import VOCAB, FakeTokenizer, char_tokenizer, close, gradients, settings, tiny_policy
from plain import token_logprobs

from unift.config import needs
from unift.credit import assign, discriminative, members
from unift.credit.members import items_of, paired
from unift.model.logprobs import logprobs
from unift.model.packs import COMPLETION, DEMO, Item, Member, pack
from unift.objectives import loss as objectives
from unift.objectives.weights import weigh
from unift.rows import dataset
from unift.rows.dataset import Split
from unift.rows.tokens import Encoded
from unift.training.annealing import one_update
from unift.training.row_memory import RowMemory
from unift.training.run.metrics import read_metrics
from unift.training.update import prepare
from unift.types import ConfigError, DataError, Group, Row, Sample, Score


def group(*scores, tokens=None):
    own = tokens or [[5 + i, 1] for i in range(len(scores))]
    return Group(
        0, "r", [3, 4], [], 0, 5, [Sample(t, [-1.0] * len(t), True, score=Score(v)) for t, v in zip(own, scores)]
    )


def of(items, config, l, ref):
    """(loss, e_t, roles) of one batch of items, l and the reference's log-probs given token by token."""
    batch = pack(items, range(len(items)), weigh(items, config), config)
    l = torch.tensor(l, dtype=torch.float64, requires_grad=True)
    batch = replace(batch, ref_S=torch.tensor(ref, dtype=torch.float64))
    loss = objectives.losses(l, None, batch, config)["policy"]
    (grad,) = torch.autograd.grad(loss, l)
    return loss.item(), (-grad).tolist(), batch


def pair(a=([5, 6], [7, 8])):
    return Item([3], [], [Member(a[0], COMPLETION, 1.0, pair=0), Member(a[1], COMPLETION, -1.0, pair=0)])


def test_golden_dpo():
    """Log-probs (-10, -12), reference (-11, -11), beta .1: margin .2, loss .598139, e = +-.045017 on every token."""
    loss, e, _ = of([pair()], settings("dpo"), [-4.0, -6.0, -5.0, -7.0], [-5.0, -6.0, -5.0, -6.0])
    assert loss == pytest.approx(0.598139, abs=5e-7)
    assert e == pytest.approx([0.045017, 0.045017, -0.045017, -0.045017], abs=5e-7)
    loss, _, _ = of([pair()], settings("dpo"), [-1.0] * 4, [-1.0] * 4)
    assert loss == pytest.approx(math.log(2))


def test_dpo_is_a_mean_over_pairs():
    """Each pair has the weight it would have alone, divided by the number of pairs; order of members does not matter."""
    flipped = Item([3], [], list(reversed(pair().members)))
    _, alone, _ = of([pair()], settings("dpo"), [-4.0, -6.0, -5.0, -7.0], [-5.0, -6.0, -5.0, -6.0])
    _, two, _ = of(
        [pair(), flipped], settings("dpo"), [-4.0, -6, -5, -7, -5, -7, -4, -6], [-5.0, -6, -5, -6, -5, -6, -5, -6]
    )
    assert two == pytest.approx([x / 2 for x in [*alone, *alone[2:], *alone[:2]]])


@pytest.mark.parametrize(
    ("ratio", "loss", "e"),
    [(0, 0.25, 0.0025), (10, 0.225645, 0.002369), (-10, 0.275603, 0.002618), (100, 0.072329, 0.001058)],
)
def test_una_on_a_score_of_one(ratio, loss, e):
    """UNA, arXiv 2408.15339: beta .01, s = 1; the same e on both tokens of the sequence."""
    item = Item([3], [], [Member([5, 1], DEMO, label=1.0)])
    got, weights, _ = of([item], settings("una"), [ratio / 2, ratio / 2], [0.0, 0.0])
    assert got == pytest.approx(loss, abs=5e-7) and weights == pytest.approx([e, e], abs=5e-7)


@pytest.mark.parametrize(("score", "e"), [(1.0, 0.002509), (0.0, -0.002491)])
def test_una_golden_token(score, e):
    """pi = .25, pi_ref = .50, beta .01."""
    item = Item([3], [], [Member([1], COMPLETION, label=score)])
    _, weights, _ = of([item], settings("una"), [np.log(0.25)], [np.log(0.5)])
    assert weights == pytest.approx([e], abs=5e-7)


def test_una_on_pairs_has_the_gradient_of_dpo():
    numbers = ([-4.0, -6.0, -5.0, -7.0], [-5.0, -6.0, -5.0, -6.0])
    _, una, _ = of([pair()], settings("una", "policy.beta=0.1"), *numbers)
    _, dpo, _ = of([pair()], settings("dpo"), *numbers)
    assert una == dpo


def labelled(method, g, bad=None, *more):
    config = settings(method, *more)
    demos = [[9, 8, 1]] if config.sample.demonstration else None
    a = [[0.0] * (len(g.samples) + 1)]
    return config, paired(items_of([g], a, demos, config), [g], config, [bad])


def test_own_pairs_come_from_the_verifier():
    """Right ones without repeats against wrong ones without repeats; a group without both gives none."""
    g = group(1, 0, 1, 0, 0, tokens=[[5, 1], [6, 1], [5, 1], [7, 1], [6, 1]])
    _, (item,) = labelled("dpo", g)
    assert [(m.tokens, m.pair, m.advantage) for m in item.members] == [([5, 1], 0, 1.0), ([6, 1], 0, -1.0)]
    g = group(1, 0, 1, 0, tokens=[[5, 1], [6, 1], [8, 1], [7, 1]])
    _, (item,) = labelled("dpo", g)
    assert [(m.tokens[0], m.pair) for m in item.members] == [(5, 0), (6, 0), (8, 1), (7, 1)]
    assert labelled("dpo", group(0, 0))[1][0].members == [] and labelled("dpo", group(1, 1))[1][0].members == []


def test_pairs_scores_and_sft_rows_in_one_batch():
    """una: a row with a rejected answer is a pair; one without has its solution at 1 and its completions at their scores."""
    _, (scored,) = labelled("una", group(0.25, 1))
    assert [(m.role, m.label) for m in scored.members] == [(COMPLETION, 0.25), (COMPLETION, 1.0), (DEMO, 1.0)]
    config, (paired,) = labelled("una", group(), [7, 1], "sample.completions=0", "sample.rejected=bad")
    assert [(m.tokens, m.pair, m.advantage) for m in paired.members] == [([9, 8, 1], 0, 1.0), ([7, 1], 0, -1.0)]
    n = 2 + 2 + 3 + 5
    loss, e, batch = of([scored, paired], config, [-1.0] * n, [-1.0] * n)
    assert loss == pytest.approx((0.75**2 * 0 + 0.25**2 + 0.25 + 0.25 + 2 * math.log(2)) / 5)
    assert (
        len(set(batch.sequence_S.tolist())) == 5
        and np.sign(e).tolist() == [-1] * 2 + [1] * 2 + [1] * 3 + [1] * 3 + [-1] * 2
    )
    with pytest.raises(ConfigError, match="scores from 0 to 1, found 3"):
        labelled("una", group(3.0))


def test_scores_of_rows():
    """una, off-line: the solution at its row's score, binary or not; 1 where the row has none. A pair is never scored."""
    rows = [
        Row(str(i), "p", ("a",), ".", "a", extra=x) for i, x in enumerate([{"s": 0.25}, {"s": True}, {"s": False}, {}])
    ]
    assert dataset.label_column(rows, {"s"}) == [0.25, 1.0, 0.0, None]
    assert dataset.label_column(rows, set()) == []
    for bad in (1.5, "good", float("nan")):
        with pytest.raises(DataError, match=r"row 1 .*column 's': expected a score from 0 to 1"):
            dataset.label_column([replace(rows[0], extra={"s": bad})], {"s"})
    with pytest.raises(DataError, match="no row has a column 't'.*Columns: s"):
        dataset.label_column(rows, {"t"})
    config = settings("una", "sample.completions=0", "sample.label=s", "policy.beta=1")
    items = items_of([group()], [[0.0]], [[9, 8, 1]], config)
    for label, expected in ((0.25, 0.25), (0.0, 0.0), (None, 1.0)):
        (item,) = paired(members.labelled(items, [label]), [group()], config, [None])
        assert [m.label for m in item.members] == [expected]
        loss, e, _ = of([item], config, [-1.0] * 3, [-1.0] * 3)  # sigmoid(0) = 1/2
        assert loss == pytest.approx((0.5 - expected) ** 2)
        assert e == pytest.approx([-2 * (0.5 - expected) * 0.25] * 3)
    (item,) = paired(members.labelled(items, [0.25]), [group()], config, [[7, 1]])
    assert [m.pair for m in item.members] == [0, 0] and all(math.isnan(m.label) for m in item.members)


def test_dpo_against_plain_copies():
    """Loss and gradients of off-line pairs equal -log sigmoid of padded, separate sequences."""
    policy, plain = tiny_policy(torch.float64)
    reference, plain_reference = tiny_policy(torch.float64, seed=1)
    more = ("sample.completions=0", "sample.demonstration=true", "sample.rejected=bad", "train.prompts=1")
    config, items = labelled("dpo", group(), [7, 6, 6, 1], *more)
    from unift.model.logprobs import logprobs

    (packs,) = prepare(policy, items, config, lambda b: logprobs(reference, b)[0])
    (batch,) = packs
    loss = objectives.losses(logprobs(policy, batch)[0], None, batch, config)["policy"]
    loss.backward()
    both = [[3, 4, 9, 8, 1], [3, 4, 7, 6, 6, 1]]
    now = [l[1:].sum() for l in token_logprobs(plain, both)[0]]
    with torch.no_grad():
        then = [l[1:].sum() for l in token_logprobs(plain_reference, both)[0]]
    expected = -torch.nn.functional.logsigmoid(0.1 * ((now[0] - then[0]) - (now[1] - then[1])))
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    close(gradients(policy.model), gradients(plain), 1e-6)


def test_golden_orpo():
    """Token log-probs (-1, -2 | -1, -3), lambda .1: mean -1.5 and -2, p = .223130 and .135335, log odds -1.247517 and -1.854586,
    ratio .607069 (float64, from the definition): L = 1.5 + .1 * log(1 + exp(-.607069)). With g = .1 sigmoid(-.607069), two
    tokens a sequence: e = (1 + g / (1 - p)) / 2 on the preferred, -g / (1 - p') / 2 on the rejected."""
    p, q = math.exp(-1.5), math.exp(-2.0)
    ratio = math.log(p / (1 - p)) - math.log(q / (1 - q))
    assert ratio == pytest.approx(0.607069, abs=5e-7)
    g = 0.1 / (1 + math.exp(ratio))
    loss, e, _ = of([pair()], settings("orpo"), [-1.0, -2.0, -1.0, -3.0], [math.nan] * 4)
    assert loss == pytest.approx(1.5 + 0.1 * math.log1p(math.exp(-ratio)), rel=1e-12)
    up, down = (1 + g / (1 - p)) / 2, -g / (1 - q) / 2
    assert e == pytest.approx([up, up, down, down], rel=1e-12)


def test_orpo_counts_tokens_by_sequence_and_pairs_alike():
    """Sequences of 1 and 3 tokens: a mean over each, then over pairs, whatever their lengths."""
    long = Item([3], [], [Member([5, 6, 1], COMPLETION, 1.0, pair=0), Member([8], COMPLETION, -1.0, pair=0)])
    l = [-1.0, -2.0, -1.0, -3.0, -0.5, -1.0, -3.0, -2.0]
    _, alone, _ = of([pair()], settings("orpo"), l[:4], [0.0] * 4)
    _, e, _ = of([pair(), long], settings("orpo"), l, [0.0] * 8)
    assert e[:4] == pytest.approx([x / 2 for x in alone], rel=1e-12)
    p, q = math.exp(-1.5), math.exp(-2.0)
    g = 0.1 / (1 + (p / (1 - p)) / (q / (1 - q)))
    assert e[4:] == pytest.approx([(1 + g / (1 - p)) / 6] * 3 + [-g / (1 - q) / 2], rel=1e-12)


def test_orpo_of_a_certain_sequence_is_finite():
    """Log-probs of 0 have infinite odds; the NLL of the preferred keeps its gradient, the ratio has none."""
    loss, e, _ = of([pair()], settings("orpo"), [0.0, 0.0, -1.0, -3.0], [0.0] * 4)
    assert math.isfinite(loss) and e[:2] == pytest.approx([0.5, 0.5], rel=1e-12)
    loss, e, _ = of([pair()], settings("orpo"), [-1.0, -3.0, 0.0, 0.0], [0.0] * 4)
    assert math.isfinite(loss) and e[2:] == [0.0, 0.0]


def test_orpo_from_tokens_to_gradient():
    """Loss and gradients of an off-line pair equal those of padded, separate sequences; no reference is asked for."""
    policy, plain = tiny_policy(torch.float64)
    more = ("sample.completions=0", "sample.rejected=bad", "train.prompts=1")
    config, items = labelled("orpo", group(), [7, 6, 6, 1], *more)
    assert not needs.reference(config)
    ((batch,),) = prepare(policy, items, config, None)
    loss = objectives.losses(logprobs(policy, batch)[0], None, batch, config)["policy"]
    loss.backward()
    both = [l[1:] for l in token_logprobs(plain, [[3, 4, 9, 8, 1], [3, 4, 7, 6, 6, 1]])[0]]
    odds = [l.mean().exp() / (1 - l.mean().exp()) for l in both]
    expected = -both[0].mean() - 0.1 * torch.sigmoid(torch.log(odds[0] / odds[1])).log()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    close(gradients(policy.model), gradients(plain), 1e-6)


def test_rejected_column():
    tokenizer = char_tokenizer()
    rows = [Row("a", "1+1=", ("2",), ".", "2", extra={"bad": "3."}), Row("b", "1+2=", ("3",), ".", "3")]
    first, second = dataset.encode_column(tokenizer, rows, {"bad"}, 99)
    assert tokenizer.decode(first[:-1]) == "3." and first[-1] == tokenizer.eos_token_id and second is None
    assert dataset.encode_column(tokenizer, rows, set(), 99) == [None, None]
    with pytest.raises(DataError, match="no row has a column 'worse'.*Columns: bad"):
        dataset.encode_column(tokenizer, rows, {"worse"}, 99)
    with pytest.raises(DataError, match=r"row 1 .*column 'bad': expected a text"):
        dataset.encode_column(tokenizer, [replace(rows[0], extra={"bad": 3})], {"bad"}, 99)


@pytest.mark.parametrize(
    ("method", "item", "said"),
    [
        ("dpo", "policy.norm=token_mean", "counts sequences"),
        ("dpo", "sample.rejected=bad", r"needs a policy.loss of sequences \(dpo, una, orpo\) and sample.demonstration"),
        ("una", "likelihood.tokens=demo", "set likelihood.tokens=none"),
        ("dpo", "sample.label=s", "needs policy.loss=una and sample.demonstration=true"),
        ("discriminative", "sample.source=policy", "needs sample.demonstration=true, sample.source=reference"),
        ("discriminative", "sample.temperature=0.7", "sample.temperature must be 1"),
        ("luffy", "policy.off_policy=none", "policy.off_policy must say how it pushes"),
        ("hpt", "likelihood.tokens=none", "chooses groups whose hint or demo"),
        ("relift", "likelihood.gate=null", "needs likelihood.gate"),
        ("prefix-rft", "show.members=9", "a group has sample.completions=8"),
        ("chord", "likelihood.weight=1.5", "negative at 1.5"),
        ("uft", "inputs.noise=uniform", "supervised phases only"),
        ("stage", "likelihood.schedule=hint", "follows a falling hint"),
        ("sft", "show.schedule=adaptive", "follows the success of completions"),
        ("rollout-sft", "sample.completions=0", "nothing to learn from|needs sample.completions"),
        ("upft", "likelihood.tokens=none", "nothing to learn from"),
    ],
)
def test_settings_that_do_not_fit(method, item, said):
    with pytest.raises(ConfigError, match=said):
        settings(method, item)


@pytest.mark.parametrize("method", ["dpo", "una", "orpo"])
def test_rejected_answers_of_a_file(method, tmp_path):
    """Off-line pairs, end to end: every second row has a rejected answer, and the loss of the pairs falls."""
    import json

    from unift.config.resolve import parse_overrides, resolve
    from unift.rows.inspect import write_rows
    from unift.rows.tasks import make_rows
    from unift.training.loop import train

    path = tmp_path / "rows.jsonl"
    write_rows(make_rows("lock", 8, 0, "train", length=5), path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[::2]:
        row["bad"] = "".join(row["steps"])[::-1] + "."
    path.write_text("\n".join(map(json.dumps, rows)))
    more = ["sample.completions=0", "sample.demonstration=true", "sample.rejected=bad", "train.lr=1e-3", "threads=1"]
    more += [f"data.train={path}", "model.path=embedded:lock", "train.steps=4", "train.prompts=8", "train.warmup=0"]
    train(resolve(method, overrides=parse_overrides([*more, "policy.beta=0.1"])), tmp_path / "run")
    loss = [m["loss"] for m in read_metrics(tmp_path / "run" / "metrics.jsonl")[1:]]
    first = math.log(2) if method == "dpo" else (4 * 2 * math.log(2) + 4 * 0.25) / 12
    if method != "orpo":  # whose first loss is not log 2: it has the NLL inside
        assert loss[0] == pytest.approx(first, rel=1e-6)
    assert loss == sorted(loss, reverse=True)


# ---------------------------------------------------------------------------------------------- partitions


def test_golden_partition():
    """s = -10, s' = (-12, -11), log P0 = (-11, -12), tau 1 (arXiv 2502.18679)."""
    u, w = discriminative.advance(0.0, [-12, -11], [-11, -12], 1.0, 0.85)
    assert u == pytest.approx(0.379544, abs=5e-7) and w == pytest.approx([0.125847, 0.929888], abs=5e-7)
    u, w = discriminative.advance(5.0, [-12, -11], [-11, -12], 1.0, 1.0)
    assert w == pytest.approx([0.119203, 0.880797], abs=5e-7) and sum(w) == pytest.approx(1)
    assert math.exp(u) == pytest.approx(1.543081, abs=5e-7) and 10 + u == pytest.approx(10.433781, abs=5e-7)
    far, w = discriminative.advance(0.0, [-900, -901], [-2000, -1990], 1.0, 0.5)  # all in log space
    assert math.isfinite(far) and all(map(math.isfinite, w))


def official(u, parts, logp0, tau, momentum, mean):
    """(u, weights, loss) of one row in the form of the authors' code: ``parts``: log-probs of the negatives, then of the
    solution. The exponent of a negative is sum(l) / tau - log P0, or mean(l) / tau; weights are not differentiated."""
    s = [p.mean() if mean else p.sum() for p in parts]
    x = torch.stack(s[:-1]).detach() / tau - (0 if mean else logp0)
    u = torch.log((1 - momentum) * torch.exp(u) + momentum * torch.exp(x).mean())
    w = torch.exp(x - u) / len(x)
    return u, w, -s[-1] + sum(w_j * s_j for w_j, s_j in zip(w, s, strict=False))


def one_nat_policy():
    """A model in float64 that gives token 5 the probability 1/e after anything: layers that add nothing, one head row."""
    policy, plain = tiny_policy(torch.float64, tie=False)
    with torch.no_grad():
        for model in (policy.model, plain):
            model.model.embed_tokens.weight.fill_(1.0)
            model.lm_head.weight.zero_()
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            h = model.model.norm.weight.double() / math.sqrt(1 + model.config.rms_norm_eps)  # the norm of ones
            model.lm_head.weight[5] = math.log((VOCAB - 1) / (math.e - 1)) * h / (h @ h)
    return policy


def discriminated(method, policy, own, demo, logps, memory):
    """(e_t by member, packs, settings) of one row, from its tokens by the functions of the loop: items, packs, loss."""
    config = settings(method)
    policy.tokenizer = FakeTokenizer()
    samples = [Sample(t, list(p), t[-1] == 1, score=Score(0.0, None)) for t, p in zip(own, logps, strict=True)]
    row = Encoded([3, 4], demo, [0, len(demo) - 1])
    groups = [Group(0, "r", row.prompt, [], 0, 1, samples)]
    items = assign.credited(
        groups, Split([], [row], [None]), config, assign.Models(policy, None, memory.partition), (0, 0)
    )
    (packs,) = prepare(policy, items, one_update(config), None)
    (batch,) = packs
    l = logprobs(policy, batch, 1.0)[0].detach().requires_grad_()
    losses = objectives.losses(l, None, batch, config)
    (grad,) = torch.autograd.grad(losses["policy"] + losses["likelihood"], l)
    e = [(-grad[batch.member_S == j]).tolist() for j in range(len(own) + 1)]
    return e, batch, config


@pytest.mark.parametrize(
    ("method", "u", "w"),
    [("discriminative", 0.0, 0.5), ("discriminative-mean", math.log(0.1 + 0.9 * math.exp(-1 / 0.3)), None)],
)
def test_golden_discriminative_from_tokens(method, u, w):
    """Policy = reference, negatives of 20 and 35 tokens at 1 nat each: log P0 = -20 and -35 cancel the sums, so that u = 0
    and the weights are 1/2; the means are -1 whatever the lengths, u = log(.1 + .9 e^(-1/.3)) = -2.02, weights .135."""
    memory = RowMemory()
    own, demo = [[5] * 20, [5] * 35], [6, 7, 1]
    e, _, _ = discriminated(method, one_nat_policy(), own, demo, [[-1.0] * 20, [-1.0] * 35], memory)
    mean = w is None
    w = math.exp(-1 / 0.3 - u) / 2 if mean else w
    assert memory.partition == {"r": pytest.approx(u, abs=1e-5)}  # norms in float32
    assert (u, w) == (pytest.approx(-2.02, abs=5e-3), pytest.approx(0.135, abs=5e-4)) if mean else (u, w) == (0, 0.5)
    for tokens, got, weight in zip([*own, demo], e, (-w, -w, 1.0), strict=True):
        assert got == pytest.approx([weight / (len(tokens) if mean else 1)] * len(tokens), abs=1e-5)


@pytest.mark.parametrize("method", ["discriminative", "discriminative-mean"])
def test_discriminative_gradient_is_the_published_one(method):
    """Policy != reference, two steps on one row: u, every e_t and the gradient of the weights equal autograd's of the
    published form on plain log-probs. A token's weight under the policy counts once, its log P0 once or not at all."""
    policy, plain = tiny_policy(torch.float64)
    gen = np.random.default_rng(3)
    memory, u = RowMemory(), torch.tensor(0.0, dtype=torch.float64)
    for _ in range(2):
        own = [[*gen.integers(2, VOCAB, n).tolist(), 1] for n in (4, 9)]
        demo = [*gen.integers(2, VOCAB, 5).tolist(), 1]
        logps = [(-gen.random(len(t)) * 3.6).tolist() for t in own]
        logp0 = torch.tensor([sum(p) for p in logps], dtype=torch.float64)
        e, batch, config = discriminated(method, policy, own, demo, logps, memory)
        c = config.credit
        l, _ = token_logprobs(plain, [[3, 4, *t] for t in (*own, demo)])
        parts = [x[1:] for x in l]
        u, _, loss = official(u, parts, logp0, c.tau, c.momentum, c.sequence_logp == "mean")
        expected = torch.autograd.grad(loss, parts, retain_graph=True)
        for got, want in zip(e, expected, strict=True):
            assert got == pytest.approx((-want).tolist(), rel=1e-5)
        assert memory.partition["r"] == pytest.approx(u.item(), rel=1e-5)
        plain.zero_grad()
        loss.backward()
        policy.model.zero_grad()
        l_S = logprobs(policy, batch, 1.0)[0]
        objectives.losses(l_S, None, batch, config)["policy"].backward()
        close(gradients(policy.model), gradients(plain), 1e-5)  # norms in float32


def test_the_credit_is_the_gradient_of_the_partition_loss():
    """momentum 1: e_t equals autograd's of - s(y) + tau log mean_j exp(s'_j / tau - log P0_j), differentiated as a whole."""
    for method, tau in (("discriminative", 1.0), ("discriminative-mean", 0.3)):
        config = settings(method, "credit.momentum=1")
        members = [
            Member([5, 6, 1], COMPLETION, 0.0, [-1.0, -2.0, -0.5]),
            Member([7, 1], COMPLETION, 0.0, [-3.0, -1.0]),
        ]
        item = Item([3], [], [*members, Member([9, 8, 1], DEMO)], address=(0, 0, "r"))
        now = [[[-1.2, -1.0, -0.7], [-2.0, -2.5], []]]
        (made,) = discriminative.spread([item], config, now, {})
        l = torch.tensor([*now[0][0], *now[0][1], -1.0, -0.4, -0.3], dtype=torch.float64, requires_grad=True)
        batch = pack([made], [0], weigh([made], config), config)
        loss = objectives.losses(l, None, batch, config)["policy"]
        (got,) = torch.autograd.grad(loss, l)
        parts = (l[:3], l[3:5], l[5:])
        if method == "discriminative":
            s, logp0 = torch.stack([p.sum() for p in parts]), torch.tensor([-3.5, -4.0], dtype=torch.float64)
        else:
            s, logp0 = torch.stack([p.mean() for p in parts]), torch.zeros(2, dtype=torch.float64)
        expected = -s[2] + tau * (torch.logsumexp(s[:2] / tau - logp0, 0) - math.log(2))
        (grad,) = torch.autograd.grad(expected, l)
        assert torch.allclose(got, grad, atol=1e-9), method


def test_without_negatives_it_is_sft():
    config = settings("discriminative")
    item = Item([3], [], [Member([9, 8, 1], DEMO)], address=(0, 0, "r"))
    (made,) = discriminative.spread([item], config, [[[]]], {})
    batch = pack([made], [0], weigh([made], config), config)
    l = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(objectives.losses(l, None, batch, config)["policy"], l)
    assert (-grad).tolist() == [1.0] * 3


def test_partition_state_is_kept_by_row():
    config = settings("discriminative")
    item = Item([3], [], [Member([5, 1], COMPLETION, 0.0, [-1.0, -1.0]), Member([9, 1], DEMO)], address=(0, 0, "a"))
    memory = RowMemory()
    discriminative.spread([item], config, [[[-0.5, -0.5], []]], memory.partition)
    assert memory.partition == {"a": pytest.approx(math.log(0.15 + 0.85 * math.exp(1)))}
    assert RowMemory.load(memory.dump()).partition == memory.partition
