"""What the public code of a method does beyond the first update and beside the loss: limits, normalisers, settings."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import FakeTokenizer, char_tokenizer, settings, tiny_policy
from plain import token_logprobs

from unift.config.packaged import preset_names
from unift.config.resolve import parse_overrides, resolve
from unift.config.sections import Engine, Show
from unift.credit import assign
from unift.credit.members import cut_short
from unift.hints import schedules as hints
from unift.model.logprobs import logprobs
from unift.model.packs import COMPLETION, DEMO, HINT, OWN, Item, Member, pack
from unift.objectives import loss as objectives
from unift.objectives.weights import weigh
from unift.rows import tokens as encode
from unift.rows.dataset import Split
from unift.rows.tokens import Encoded
from unift.training.loop import train
from unift.training.optimizer import make_optimizer
from unift.training.run import metrics
from unift.training.update import Order, apply, prepare
from unift.types import ConfigError, Group, Row, Sample, Score

MADE_UP = Engine(gap_limit=100.0)  # the log-probs that these samples are said to have are no sampler's


def leaf(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def fixed(*values):
    return torch.tensor(values, dtype=torch.float64)


def effective(loss, l):
    (grad,) = torch.autograd.grad(loss, l)
    return (-grad).tolist()


def pushed(items, config, l, old):
    """(roles, e_t, - dL/dH_t) of one batch, every log-prob given, all entropies 1."""
    batch = pack(items, range(len(items)), weigh(items, config), config)
    n = len(batch.target_S)
    l, h = leaf(*np.broadcast_to(l, n)), torch.ones(n, dtype=torch.float64, requires_grad=True)
    batch = replace(batch, old_S=None if old is None else fixed(*np.broadcast_to(old, n)))
    parts = objectives.losses(l, h, batch, config)
    loss = parts["policy"] + parts["likelihood"] + 0 * h.sum()
    e, bonus = torch.autograd.grad(-loss, (l, h))
    return batch.role_S.tolist(), e.tolist(), bonus.tolist()


# ---------------------------------------------------------------------------------------------- k3 at most 10


def test_a_clamped_penalty_has_no_gradient_beyond():
    """exp(d) - d - 1 = 10 at d = 2.612: below, e = exp(d) - 1; beyond, the penalty is 10 and e is 0. Without a clamp it
    grows; k2 is limited in the same way."""
    d = fixed(-1.0, 2.6, 2.62, 5.0)
    l = leaf(0.0, 0.0, 0.0, 0.0)
    value = objectives.kl_penalty(l, d, "k3", 10.0)
    assert value.tolist() == pytest.approx([math.exp(-1), math.exp(2.6) - 3.6, 10, 10])
    assert effective(value.sum(), l) == pytest.approx([math.exp(-1) - 1, math.exp(2.6) - 1, 0, 0])
    assert effective(objectives.kl_penalty(l, d, "k3").sum(), l) == pytest.approx([math.exp(x) - 1 for x in d.tolist()])
    assert effective(objectives.kl_penalty(l, d, "k2", 4.0).sum(), l) == pytest.approx([-1, 2.6, 2.62, 0])


@pytest.mark.parametrize("clamp", [10.0, None])
def test_a_drifted_step_through_the_update(clamp, tmp_path):
    """A policy that has left its reference: some tokens lie beyond the clamp. The step's gradient norm is the one of the
    penalty written out on plain log-probs; the clamp makes it smaller."""
    config = settings("uft-paper", "policy.entropy=0", "train.updates=1", "train.prompts=1", "train.micro_prompts=1")
    kl = config.reference.model_copy(update={"clamp": clamp, "kl": 1.0})
    rules = config.model_copy(update={"reference": kl})
    policy, plain = tiny_policy(torch.float64)
    policy.tokenizer = FakeTokenizer()
    own = [[5, 6, 7, 1], [8, 1]]
    items = [Item([3, 4], [], [Member(t, COMPLETION, 0.0, [-1.0] * len(t)) for t in own])]
    l, _ = token_logprobs(plain, [[3, 4, *t] for t in own])
    l = torch.cat([x[1:] for x in l])
    d = fixed(3.0, 0.5, 2.7, -1.0, 4.0, 2.5)
    (packs,) = prepare(policy, items, rules, lambda batch: l.detach() + d)
    made = apply(
        policy, make_optimizer(policy, rules.train), packs, rules, Order(0.0, False, tmp_path / "x.pt", MADE_UP)
    )
    k3 = torch.exp(l.detach() + d - l) - (l.detach() + d - l) - 1
    (k3 if clamp is None else k3.clamp(max=clamp)).mean().backward()
    expected = math.sqrt(sum(float(p.grad.square().sum()) for p in plain.parameters() if p.grad is not None))
    assert made["grad/norm"] == pytest.approx(expected, rel=1e-5)
    assert made["kl"] == pytest.approx((k3 if clamp is None else k3.clamp(max=clamp)).mean().item(), rel=1e-6)
    assert (resolve("uft-paper", overrides={"data": {"task": "lock"}}).reference.clamp, Show().stages) == (10, "equal")


def test_a_clamp_needs_a_term_of_the_loss():
    with pytest.raises(ConfigError, match=r"reference\.clamp limits the KL term of the loss"):
        settings("rloo", "reference.clamp=10")


# ---------------------------------------------------------------------------------------------- updates that are left out


def test_a_long_gradient_is_no_update(tmp_path):
    """Above train.skip_norm neither weights nor optimizer state move, and the step counts its updates; below, it is as if
    there were no such setting. The limit looks at the gradient before clipping."""
    rules = settings("hpt", "train.updates=1", "train.prompts=2", "policy.entropy=0")
    items = [
        Item([3, 4], [], [Member([5, 6, 1], COMPLETION, 1.0, [-1.0] * 3), Member([7, 1], COMPLETION, -1.0, [-1.0] * 2)])
    ]
    norm, states = None, []
    for limit in (None, 1e-9, "just above", "just below"):
        limit = {"just above": 1.001 * (norm or 1), "just below": 0.999 * (norm or 1)}.get(limit, limit)
        policy, _ = tiny_policy(torch.float64)
        policy.tokenizer = FakeTokenizer()
        before = [p.detach().clone() for p in policy.parameters()]
        one = rules.model_copy(update={"train": rules.train.model_copy(update={"skip_norm": limit, "clip_norm": 1e-3})})
        optimizer = make_optimizer(policy, one.train)
        (packs,) = prepare(policy, items, one, None)
        made = apply(policy, optimizer, packs, one, Order(1e-2, False, tmp_path / "x.pt", MADE_UP))
        norm = made["grad/norm"]
        moved = any(not torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
        states.append((made.get("grad/skipped"), moved, bool(optimizer.state)))
    assert norm > 1e-3
    assert states == [(None, True, True), (1.0, False, False), (0.0, True, True), (1.0, False, False)]


def test_skipped_updates_are_counted_in_the_metrics(tmp_path):
    tiny = ["train.steps=2", "train.prompts=4", "data.train_rows=8", "data.test_rows=2", "eval.every=0", "save.every=0"]
    config = resolve("hpt", recipe="lock", overrides=parse_overrides([*tiny, "threads=1", "train.skip_norm=1e-9"]))
    train(config, tmp_path / "run")
    steps = metrics.read_metrics(tmp_path / "run" / "metrics.jsonl")[1:]
    assert [m["grad/skipped"] for m in steps] == [config.train.updates] * 2 == [2, 2]


# ---------------------------------------------------------------------------------------------- LUFFY, ReLIFT and HPT


MIXED = Item(
    [3], [], [Member([5, 1], COMPLETION, 1.0), Member([6, 7, 1], COMPLETION, -0.5), Member([8, 1], DEMO, 0.75)]
)
PI = 0.3


@pytest.mark.parametrize("rho", [None, 3.0])
def test_luffy_as_published(rho):
    """Sum over tokens / max_tokens whatever the number of sequences: e = rho A on completions, unclipped, and
    A gamma pi / (pi + gamma)^2 on the solution, without a ratio. Entropy: mean over the 14 tokens, the solution's too."""
    config = settings("luffy", "sample.max_tokens=10")
    items = [MIXED, replace(MIXED)]
    old = None if rho is None else math.log(PI / rho)
    role, e, bonus = pushed(items, config, math.log(PI), old)
    off = 0.75 * 0.1 * PI / (PI + 0.1) ** 2
    one = [x * (rho or 1) / 10 for x in (1.0, 1.0, -0.5, -0.5, -0.5)] + [off / 10] * 2
    assert role == [COMPLETION] * 5 + [DEMO] * 2 + [COMPLETION] * 5 + [DEMO] * 2
    assert e == pytest.approx(one * 2) and bonus == pytest.approx([0.001 / 14] * 14)


@pytest.mark.parametrize("rho", [None, 3.0])
def test_hpt_as_published(rho):
    """RL: e = rho A / max_tokens, unclipped and not divided by the number of completions. SFT: the mean over its tokens.
    Entropy: mean over the tokens of both."""
    config = settings("hpt", "sample.max_tokens=10")
    solved = Item([3], [], MIXED.members[:2], supervised=False)
    failed = Item([4], [], [Member([8, 9, 1], DEMO)])
    role, e, bonus = pushed([solved, failed], config, math.log(PI), None if rho is None else math.log(PI / rho))
    assert role == [COMPLETION] * 5 + [DEMO] * 3
    assert e == pytest.approx([x * (rho or 1) / 10 for x in (1.0, 1.0, -0.5, -0.5, -0.5)] + [1 / 3] * 3)
    assert bonus == pytest.approx([0.001 / 8] * 8)


def test_relift_as_published():
    """RL as in HPT with the entropy of completions; the update of the buffer: mean NLL and mean entropy of its solutions."""
    config = settings("relift", "sample.max_tokens=10")
    role, e, bonus = pushed(
        [Item([3], [], MIXED.members[:2], supervised=False)], config, math.log(PI), math.log(PI / 3)
    )
    assert role == [COMPLETION] * 5 and e == pytest.approx([x * 3 / 10 for x in (1.0, 1.0, -0.5, -0.5, -0.5)])
    assert bonus == pytest.approx([0.001 / 5] * 5)
    waiting = [Item([3], [], [Member([8, 9, 1], DEMO)]), Item([4], [], [Member([1], DEMO)])]
    role, e, bonus = pushed(waiting, config, math.log(PI), None)
    assert role == [DEMO] * 4 and e == pytest.approx([1 / 4] * 4) and bonus == pytest.approx([0.001 / 4] * 4)


def test_entropy_of_completions_alone_can_have_its_own_normaliser():
    """A hint shown to one member is no sampled token: 3 sampled ones share the bonus; with all, the 2 given ones, too."""
    item = Item([3], [5], [Member([6, 7, 8, 1], COMPLETION, 1.0, given=2), Member([1], COMPLETION, -1.0)])
    base = (
        "policy.entropy=0.6",
        "policy.entropy_norm=token_mean",
        "policy.norm=seq_mean_token_sum_norm",
        "reference.kl=0",
    )
    role, _, bonus = pushed([item], settings("uft", *base), -1.3, None)
    assert role == [HINT] * 3 + [COMPLETION] * 3 and bonus == pytest.approx([0, 0, 0] + [0.6 / 3] * 3)
    _, _, bonus = pushed([item], settings("uft", *base, "policy.entropy_tokens=all"), -1.3, None)
    assert bonus == pytest.approx([0.6 / 6] * 6)


def test_an_unclipped_ratio_and_a_dual_clip():
    """rho A without any clip; PPO's surrogate with the dual clip c: e = 0 where A < 0 and rho > c (arXiv 1912.09729)."""
    l, old, a = leaf(*np.log([0.5, 0.5, 0.9])), fixed(*np.log([0.1, 0.1, 0.2])), fixed(1.0, -1.0, -1.0)
    assert effective(-objectives.importance_ratio(l, old, a).sum(), l) == pytest.approx([5, -5, -4.5])
    for c, e in ((3.0, [0, 0, 0]), (4.8, [0, 0, -4.5]), (10.0, [0, -5, -4.5])):
        surrogate = objectives.clipped_surrogate(l, old, a, 0.2, 0.28, c)
        assert effective(-surrogate.sum(), l) == pytest.approx(e)


# ---------------------------------------------------------------------------------------------- the baselines of UFT


@pytest.mark.parametrize(("num", "total"), [(5, 500), (4, 500), (3, 167), (1, 50), (5, 12)])
def test_floored_stages(num, total):
    """The official line, num - t // (T_hint // (num + 1)) clipped to [0, num], t from 1 to T_hint, then 0."""
    show = settings("stage-paper").show
    t_hint = round(0.6 * total)
    for step in range(total):
        t = step + 1
        k = int(np.clip(num - t // (t_hint // (num + 1)), 0, num)) if t <= t_hint else 0
        assert hints.draw(show, hints.At(0, step, total, "r"), num) == k
        assert num != 5 or hints.expected_share(show, step, total) == k / 5


def test_paper_presets_differ_where_the_official_script_does():
    """--algo rft, r3 and stage are uft with other hints and, for the first two, no likelihood; nothing else."""
    uft, apart = settings("uft-paper"), {"method", "show", "likelihood"}
    for name in ("rft-paper", "r3-paper", "stage-paper"):
        other = settings(name)
        assert other.model_dump(exclude=apart) == uft.model_dump(exclude=apart), name
        assert (other.likelihood == uft.likelihood) == (name == "stage-paper")
    assert [settings(n).show.schedule for n in ("rft-paper", "r3-paper", "stage-paper")] == [
        "none",
        "uniform",
        "staircase",
    ]
    first, second = settings("sft-rft-paper").phases
    for phase, name in ((first, "sft-paper"), (second, "rft-paper")):
        for section in ("show", "sample", "credit", "policy", "likelihood", "reference"):
            assert getattr(phase, section) == getattr(settings(name), section)
    assert [round(700 * p.share) for p in (first, second)] == [200, 500] and settings(
        "sft-rft-paper"
    ).train.steps == 700


def test_sft_paper_averages_over_micro_batches_of_16():
    """32 solutions, the first 16 of 1 token, the others of 3: tokens of a micro-batch weigh 1/(2 * its tokens)."""
    config = settings("sft-paper", "train.prompts=32")
    items = [Item([3], [], [Member([1] if i < 16 else [5, 6, 1], DEMO)]) for i in range(32)]
    _, e, _ = pushed(items, config, -1.0, None)
    assert e == pytest.approx([1 / 32] * 16 + [1 / (2 * 48)] * 48)


PUBLISHED = {  # settings of the public code that no equation shows
    "dapo": {"prompts": 512, "updates": 16, "weight_decay": 0.1},
    "dr-grpo": {"prompts": 128, "updates": 8},
    "luffy": {"prompts": 128, "updates": 2, "weight_decay": 0.01, "clip_norm": 1.0},
    "relift": {"prompts": 128, "updates": 2, "weight_decay": 0.01, "clip_norm": 0.7},
    "hpt": {"prompts": 128, "updates": 2, "weight_decay": 0.01, "clip_norm": 1.0, "skip_norm": 80},
    "prefix-rft": {"weight_decay": 0.01},
    "psft": {"prompts": 64, "updates": 8, "weight_decay": 0.1},
    "dft": {"betas": (0.9, 0.95), "weight_decay": 0.01},
    "ift": {"clip_norm": 10},
    "uft-paper": {"prompts": 256, "updates": 4, "micro_prompts": 4, "weight_decay": 0.01, "clip_norm": 1.0},
    "sft-paper": {"prompts": 256, "updates": 1, "micro_prompts": 16, "betas": (0.9, 0.95), "weight_decay": 0.01},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_of_the_public_code(name):
    made = settings(name).train
    assert {key: getattr(made, key) for key in PUBLISHED[name]} == PUBLISHED[name]


def test_dual_clips():
    """DAPO's recipe sets 10, Prefix-RFT keeps verl's default of 3; the official code of UFT has none."""
    clips = {name: settings(name).policy.dual_clip for name in preset_names()}
    assert {name: c for name, c in clips.items() if c is not None} == {"dapo": 10, "prefix-rft": 3}


def test_clip_higher_acts():
    """With several updates a step there is a ratio to clip: the second update of dapo loses tokens above 1.28, not below."""
    config = settings("dapo")
    assert config.train.updates > 1
    item = Item([3], [], [Member([5, 6], COMPLETION, 1.0), Member([7], COMPLETION, -1.0)])
    _, e, _ = pushed([item], config, math.log(PI), [math.log(PI / x) for x in (1.27, 1.29, 11.0)])
    assert e == pytest.approx([1.27 / 3, 0, 0])


def test_log_probs_at_the_start_of_the_step_are_attached_from_the_second_update_on():
    policy, _ = tiny_policy(torch.float64)
    policy.tokenizer = FakeTokenizer()
    config = settings("luffy", "train.prompts=2")
    first, second = prepare(policy, [MIXED, MIXED], config, None)
    assert first[0].old_S is None and torch.equal(second[0].old_S, logprobs(policy, second[0], 1.0)[0].detach())


# ---------------------------------------------------------------------------------------------- UPFT's first steps


def test_upft_trains_first_steps_with_an_end_under_an_instruction():
    """A completion that was cut after t tokens is followed by a trained EOS and stands under the instructed prompt; one that
    ended by itself gets no second EOS; a prompt of the whole tenth keeps its own prompt and all tokens. Every completion
    weighs the same: e = 1/(2 n) on each of its n tokens."""
    config = settings("upft", "sample.full=0.5", "train.prompts=2")
    policy, _ = tiny_policy(torch.float64)
    policy.tokenizer = FakeTokenizer()
    short = {n: cut_short(config.sample, 0, 0, n) for n in ("r0", "r1", "r2", "r3", "r4", "r5", "r6", "r7")}
    cut_row, whole_row = next(n for n in short if short[n]), next(n for n in short if not short[n])
    rows = [Encoded([3, 4], [1], [0], instructed=[3, 4, 30, 31])] * 2
    for own, ends in (([5, 6, 7], [5, 6, 7, 1]), ([5, 6, 1], [5, 6, 1])):
        samples = [Sample(t, [-1.0] * len(t), t[-1] == 1, score=Score(0.0, None)) for t in (own, [8, 9])]
        groups = [Group(i, n, [3, 4], [], 0, 1, [s]) for i, (n, s) in enumerate(zip((cut_row, whole_row), samples))]
        items = assign.credited(groups, Split([], rows, [None] * 2), config, assign.Models(policy, None, {}), (0, 0))
        assert [i.prompt for i in items] == [[3, 4, 30, 31], [3, 4]]
        assert [m.tokens for i in items for m in i.members] == [ends, [8, 9]]
        role, e, _ = pushed(items, config, -1.0, None)
        assert role == [OWN] * (len(ends) + 2) and e == pytest.approx([1 / (2 * len(ends))] * len(ends) + [1 / 4] * 2)


def test_a_first_step_ends_as_its_row_does():
    """Token 36 closes the turns of a chat, 1 is the EOS: the row's own end is added, and none after either of the two."""
    config = settings("upft", "sample.full=0", "train.prompts=3")
    policy, _ = tiny_policy(torch.float64)
    policy.tokenizer = FakeTokenizer()
    policy.model.generation_config.eos_token_id = [1, 36]
    rows = [Encoded([3, 4], [9, 36], [0, 1])] * 3
    own = ([5, 6], [5, 36], [5, 1])
    samples = [Sample(t, [-1.0] * 2, t[-1] != 6, score=Score(0.0, None)) for t in own]
    groups = [Group(i, f"r{i}", [3, 4], [], 0, 1, [s]) for i, s in enumerate(samples)]
    items = assign.credited(groups, Split([], rows, [None] * 3), config, assign.Models(policy, None, {}), (0, 0))
    assert [m.tokens for i in items for m in i.members] == [[5, 6, 36], [5, 36], [5, 1]]


def test_the_instruction_ends_the_prompt_or_its_last_user_message():
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    tokenizer = char_tokenizer(template=template)
    turns = (
        {"role": "user", "content": "6*7?"},
        {"role": "assistant", "content": "42."},
        {"role": "user", "content": "7*7?"},
    )
    rows = [Row("a", "6*7?", ("42",), ".", "42"), Row("b", turns, ("49",), ".", "49")]
    encoded = encode.encode_rows(tokenizer, rows, 500, " Be brief.")
    assert [tokenizer.decode(e.instructed) for e in encoded] == [
        "6*7? Be brief.", "[user]6*7?[assistant]42.[user]7*7? Be brief.[assistant]",
    ]  # fmt: skip
    plain = encode.encode_rows(tokenizer, rows, 500)
    assert [e.instructed for e in plain] == [None, None]
    assert [(e.prompt, e.solution, e.step_ends) for e in plain] == [
        (e.prompt, e.solution, e.step_ends) for e in encoded
    ]


@pytest.mark.parametrize("item", ["sample.first_eos=true", "sample.instruction=Please"])
def test_first_step_settings_need_first_tokens(item):
    with pytest.raises(ConfigError, match=r"need sample\.first and likelihood\.tokens=own"):
        settings("rollout-sft", item)
