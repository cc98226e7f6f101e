"""Every preset: no loss on the prompt, an update that depends on neither cut nor row order, bitwise resume; the table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import close, gradients, random_tokens, settings, tiny_policy
from kills import killed
from test_resume import outcome
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from unift.config import needs
from unift.config.packaged import preset_names
from unift.config.resolve import parse_overrides, resolve
from unift.config.stages import Moment, Stage, stages
from unift.credit import assign
from unift.model import critic
from unift.model.logprobs import logprobs
from unift.objectives import loss as objectives
from unift.rows.dataset import Split
from unift.rows.tokens import Encoded
from unift.sampling.engines.choose import in_process
from unift.sampling.groups import complete, equal_scores, hinted
from unift.training import annealing, loop, step, update
from unift.training.loop import train
from unift.training.run.metrics import read_metrics
from unift.types import Row, Score

PRESETS = preset_names()
DOCS = Path(__file__).parents[2] / "docs"


class Decoder:
    eos_token_id, pad_token_id = 1, 0

    def batch_decode(self, sequences, **more):
        return [" ".join(map(str, s)) for s in sequences]


def phases():
    """(preset, number of the phase)."""
    return [(name, i) for name in PRESETS for i in range(len(stages(settings(name))))]


def prepared(name, phase, order=None, budget=10**6, step=3):
    """A step of a method as the loop makes it, up to the packs of a single update; on a tiny policy.

    ``order``: of the rows in the update.
    """
    base = settings(name)
    more = ["train.prompts=6", "train.updates=1", "sample.max_tokens=7"]
    more += ["train.micro_prompts=3"] if stages(base)[phase].rules.train.micro_prompts else []
    more += ["sample.completions=4"] if base.sample.completions > 1 and not base.phases else []
    s = stages(settings(name, *more))[phase].rules
    policy, _ = tiny_policy(torch.float64)
    policy.tokenizer = Decoder()
    reference, _ = tiny_policy(torch.float64, seed=1)
    reference.tokenizer = Decoder()
    if needs.critic(s):
        policy.critic = critic.new_critic(policy)
        torch.nn.init.constant_(policy.critic.weight, 0.05)
    gen = np.random.default_rng(5)
    rows = [Row(f"r{i}", "", ("",), "", None) for i in range(6)]
    encoded = [Encoded(random_tokens(gen, 3 + i), [*random_tokens(gen, 8), 1], [0, 2, 4, 6]) for i in range(6)]
    moment = Moment(0, step, Stage(0, 500, s))
    split = Split(rows, encoded, [None] * 6)
    groups = hinted(range(6), split, moment, {})
    if s.sample.completions:
        engine = in_process(reference if s.sample.source == "reference" else policy)
        complete(engine, policy.tokenizer, dict(enumerate(groups)), moment)
        for g in groups:
            for n, sample in enumerate(g.samples):
                sample.score = Score(float((sample.tokens[-1] + n) % 2) if g.row else 0.0)  # the first row fails
    s = annealing.at(s, step, 500, groups)
    score = lambda b: logprobs(reference, b, s.sample.temperature)[0]  # noqa: E731
    items = assign.credited(groups, split, s, assign.Models(policy, score, {}), (0, step))
    one = annealing.one_update(s)
    one = one.model_copy(update={"train": one.train.model_copy(update={"token_budget": budget})})
    items = items if order is None else [items[i] for i in order]
    (packs,) = update.prepare(policy, items, one, score if needs.reference(s) else None)
    return policy, packs, one


def loss_of(policy, packs, s):
    """Summed loss and gradients of the packs of an update."""
    policy.model.zero_grad()
    total = 0.0
    for batch in packs:
        if policy.critic is None:
            l_S, entropy_S = logprobs(policy, batch, s.sample.temperature)
        else:
            l_S, entropy_S, v_S = critic.logprobs_and_values(policy, batch, s.sample.temperature)
        parts = objectives.losses(l_S, entropy_S, batch, s)
        loss = parts["policy"] + parts["likelihood"]
        if policy.critic is not None:
            loss = loss + s.credit.value_weight * objectives.value_loss(v_S, batch, s.credit.value_clip)
        loss.backward()
        total += loss.item()
    return total, gradients(policy.model)


@pytest.mark.parametrize(("name", "phase"), phases())
def test_the_prompt_carries_no_loss(name, phase):
    """The logits that predict prompt tokens have a gradient of exactly 0; others do not."""
    policy, packs, s = prepared(name, phase)
    moved = 0
    for batch in packs:
        logits = torch.randn(len(batch.tokens_T), 37, dtype=torch.float64, requires_grad=True)
        logp = torch.log_softmax(logits, -1)[batch.at_S]
        l_S, entropy_S = logp.gather(1, batch.target_S[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
        parts = objectives.losses(l_S, entropy_S, batch, s)
        (grad,) = torch.autograd.grad(parts["policy"] + parts["likelihood"], logits)
        touched = grad.abs().sum(1) > 0
        prompts = {tuple(random_prompt): len(random_prompt) for random_prompt in prompts_of()}
        for b, n in enumerate(batch.layout.prefix_len_B.tolist()):
            at = batch.layout.prefix_BP[b, :n]
            tokens = batch.tokens_T[at].tolist()
            own = max(length for prompt, length in prompts.items() if tuple(tokens[:length]) == prompt)
            assert not touched[at[: own - 1]].any()
        moved += int(touched.sum())
    assert moved > 0


def prompts_of():
    gen = np.random.default_rng(5)
    out = []
    for i in range(6):
        out.append(random_tokens(gen, 3 + i))
        random_tokens(gen, 8)
    return out


def exact_norm(self, x):
    """Llama's norm in the precision of its input. transformers computes it in float32, so that a prefix's gradient, which comes
    back in parts from a divided group, would be rounded in parts."""
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.mark.parametrize(("name", "phase"), phases())
def test_the_update_depends_on_neither_cut_nor_row_order(name, phase, monkeypatch):
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    policy, packs, s = prepared(name, phase)
    loss, whole = loss_of(policy, packs, s)
    bound = 1e-8 if policy.critic is None else 1e-5  # the value head is float32
    # uft-paper averages over runs of micro_prompts rows, as the official code does: its order counts by definition.
    order = None if s.train.micro_prompts else (4, 2, 0, 5, 1, 3)
    for rows, budget in ((None, 1), (order, 40)):  # budget 1 divides every group that it can
        other, got = loss_of(*prepared(name, phase, rows, budget))
        assert other == pytest.approx(loss, rel=bound, abs=1e-10)
        close(got, whole, bound)


# ---------------------------------------------------------------------------------------------- whole runs


# Always run: one of each kind of state, sampler and pass. The others, of the same kinds, are slow tests.
QUICK = "adaptive adaback relift dapo reft data-mixing prefix-rft rloo psft neftune ift upft luffy una discriminative".split()


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in PRESETS])
def test_runs_and_resumes_bitwise(name, tmp_path):
    """A few steps on the demo's base with a reward that is often earned, killed before the last step, then continued."""
    (tmp_path / "coin.py").write_text(
        "def score(completion, row):\n    return float(sum(map(ord, completion)) % 3 == 0)\n"
    )
    steps = 4
    base = resolve(name, recipe="lock")
    tiny = [
        f"train.steps={steps}", "train.prompts=8", "data.train_rows=12", "data.test_rows=2", "eval.every=0", "save.every=1",
        "save.keep=20", "save.rollouts=true", "log.gradients_every=2", "threads=1", f"reward.function={tmp_path}/coin.py:score",
    ]  # fmt: skip
    if any(stage.rules.train.micro_prompts for stage in stages(base)):
        tiny.append("train.micro_prompts=2")
    if base.likelihood.buffer:
        tiny.append("likelihood.buffer=2")  # small enough to be emptied in so few steps
    config = resolve(name, recipe="lock", overrides=parse_overrides(tiny))
    result = train(config, tmp_path / "whole")
    expected = outcome(tmp_path / "whole", steps)
    assert result["steps"] == steps and all(np.isfinite(m["loss"]) for m in expected[1][1:])
    assert any(m["grad/norm"] > 0 for m in expected[1][1:])
    with killed(loop, "one_step", steps - 1):
        train(config, tmp_path / "cut")
    train(config, tmp_path / "cut")
    assert outcome(tmp_path / "cut", steps) == expected


@pytest.mark.parametrize("name", ["adaptive", "relift", "dapo", "discriminative"])
def test_a_kill_between_sampling_and_training_counts_nothing_twice(name, tmp_path):
    """What a run remembers about its rows moves with the weights: sampled-only steps leave the old memory."""
    (tmp_path / "coin.py").write_text(
        "def score(completion, row):\n    return float(sum(map(ord, completion)) % 3 == 0)\n"
    )
    tiny = [
        "train.steps=3", "train.prompts=8", "data.train_rows=8", "data.test_rows=2", "eval.every=0", "save.every=1",
        "save.keep=9", "save.rollouts=true", "threads=1", f"reward.function={tmp_path}/coin.py:score",
    ]  # fmt: skip
    tiny += ["likelihood.buffer=2"] if name == "relift" else []
    config = resolve(name, recipe="lock", overrides=parse_overrides(tiny))
    train(config, tmp_path / "whole")
    with killed(step, "groups_of_step", 1, after=True):
        train(config, tmp_path / "cut")
    train(config, tmp_path / "cut")
    assert outcome(tmp_path / "cut", 3) == outcome(tmp_path / "whole", 3)
    import json

    kept = [
        json.loads((tmp_path / x / "checkpoints" / "step_000003" / "trainer.json").read_text())["memory"]
        for x in ("cut", "whole")
    ]
    assert kept[0] == kept[1]
    used = {"adaptive": "hints", "relift": "waiting", "discriminative": "partition"}.get(name)
    assert used is None or used == "waiting" or kept[0][used]


def test_refill_and_buffer_happen(tmp_path):
    """The two things that change which rows a step trains on do occur in such runs: counted in tokens and updates."""
    (tmp_path / "coin.py").write_text(
        "def score(completion, row):\n    return float(sum(map(ord, completion)) % 5 == 0)\n"
    )
    tiny = [
        "train.steps=3", "train.prompts=8", "data.train_rows=24", "data.test_rows=2", "eval.every=0", "threads=1",
        "sample.completions=4", "save.rollouts=true", f"reward.function={tmp_path}/coin.py:score",
    ]  # fmt: skip
    from unift.training.run.rollouts import read_rollouts

    silent = {}
    for rounds in (0, 3):
        folder = tmp_path / f"refill{rounds}"
        train(resolve("dapo", recipe="lock", overrides=parse_overrides([*tiny, f"sample.refill={rounds}"])), folder)
        groups = read_rollouts(folder, 0)[1]
        silent[rounds] = sum(equal_scores(g, settings("dapo")) for g in groups)
        assert (sum(g.discarded for g in groups) > 0) == (rounds > 0)
    assert silent[3] < silent[0]
    train(
        resolve("relift", recipe="lock", overrides=parse_overrides([*tiny, "likelihood.buffer=3"])), tmp_path / "relift"
    )
    last = read_metrics(tmp_path / "relift" / "metrics.jsonl")[1:]
    assert any(m["loss/hint"] > 0 for m in last)


# ---------------------------------------------------------------------------------------------- the table


def test_every_preset_has_a_page_and_a_source():
    from unift.config.packaged import preset_text

    for name in PRESETS:
        page = (DOCS / "methods" / f"{name}.md").read_text()
        assert f"unift train --method {name}" in page and "```" in page and "## Departures" in page, name
        assert preset_text(name).startswith("# "), name
        assert f"methods/{name}.md" in (DOCS / "methods.md").read_text(), name
