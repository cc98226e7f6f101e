"""Drafts change how fast samples come and nothing else: the native engine without drafts is the twin."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import VOCAB, tiny_policy

from unift.config.resolve import parse_overrides, resolve
from unift.rng import generator
from unift.sampling.engines import drafted, native
from unift.sampling.engines.base import Request
from unift.sampling.engines.choose import generate
from unift.training.loop import train
from unift.training.row_memory import RowMemory
from unift.training.run.rollouts import read_rollouts
from unift.types import ConfigError, Group, Sample, Score

PROMPTS, G, MOST = (7, 12, 1, 9, 12), 5, 40


def requests(seed=0):
    """Prompts of several lengths with five samples each, of which some end early, some never; and one greedy completion."""
    rng = generator("drafts", seed)
    asked = [Request(rng.integers(3, 20, n).tolist(), rng.random((G, MOST))) for n in PROMPTS]
    return [*asked, Request(rng.integers(3, 20, 4).tolist(), None)]


def with_drafts(asked, drafts):
    return [Request(r.prompt, r.draws, drafts=texts) for r, texts in zip(asked, drafts, strict=True)]


def run(policy, asked):
    rows = drafted.DraftedRows(policy, asked, MOST, 0.9)
    while rows.advance():
        pass
    return rows.samples(), rows.work


def same(found, expected, atol=1e-9):
    for group, other in zip(found, expected, strict=True):
        assert len(group) == len(other)
        for a, b in zip(group, other, strict=True):
            assert (a.tokens, a.finished) == (b.tokens, b.finished)
            assert np.allclose(a.logps, b.logps, rtol=0, atol=atol)


def spoilt(tokens, every):
    """Every so many tokens another one, that a tiny model may draw as well."""
    return [t if (i + 1) % every else (t + 1) % 20 for i, t in enumerate(tokens)]


def misleading(tokens):
    """A text with every two tokens of the completion, each followed by a token that the completion does not have."""
    absent = next(t for t in range(VOCAB) if t not in tokens)
    return [absent, *(x for pair in zip(tokens, tokens[1:]) for x in (*pair, absent))]


DRAFTS = {
    "none": lambda groups: [[]] * len(groups),
    "empty": lambda groups: [[[]] for _ in groups],
    "misleading": lambda groups: [[misleading(s.tokens) for s in g] for g in groups],
    "one member's": lambda groups: [[g[0].tokens] for g in groups],
    "every member's": lambda groups: [[s.tokens for s in g] for g in groups],
    "another prompt's": lambda groups: [[s.tokens for s in g] for g in groups[1:] + groups[:1]],
    "spoilt": lambda groups: [[spoilt(s.tokens, 3) for s in g] for g in groups],
    "longer than the answer": lambda groups: [[s.tokens + [5] * 70 for s in g] for g in groups],
    "shorter": lambda groups: [[s.tokens[:3] for s in g] for g in groups],
    "only some": lambda groups: [[s.tokens for s in g] if i % 2 else [] for i, g in enumerate(groups)],
}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("what", DRAFTS)
@torch.no_grad()
def test_samples_are_those_without_drafts(kind, what):
    """float64: equal tokens, log-probs to rounding; rows end at different times, at EOS and at the length limit."""
    policy, _ = tiny_policy(torch.float64, kind)
    asked = requests()
    plain = native.generate(policy, asked, MOST, 0.9)
    lengths = [len(s.tokens) for g in plain for s in g]
    assert min(lengths) < 12 and max(lengths) == MOST and any(s.finished for g in plain for s in g)
    drafts = DRAFTS[what](plain)
    same(drafted.generate(policy, with_drafts(asked, drafts), MOST, 0.9), plain)
    same(run(policy, with_drafts(asked, drafts))[0], plain)
    few = drafted.generate(policy, with_drafts(asked, drafts), MOST, 0.9, rows=7)  # several batches
    same(few, plain)


@torch.no_grad()
def test_float32_differs_by_rounding_alone():
    policy, _ = tiny_policy()
    asked = requests(1)
    plain = native.generate(policy, asked, MOST, 0.9)
    same(run(policy, with_drafts(asked, DRAFTS["every member's"](plain)))[0], plain, atol=1e-5)


@torch.no_grad()
def test_right_drafts_save_forwards_and_wrong_ones_cost_little():
    """Right drafts of 2, 4, 8, 16 tokens, each with the token after it: 1 + 3 + 5 + 9 + 17 + 5 = 40 tokens take 5 forwards. Where no
    draft comes true, one comes in forward 2, 4, 8, 16, 32: five of them in 39, one token each but the first."""
    policy, _ = tiny_policy(torch.float64)
    rng = generator("drafts", 2)
    asked = [Request(rng.integers(3, 20, n).tolist(), rng.random((1, MOST))) for n in PROMPTS]
    plain = native.generate(policy, asked, MOST, 0.9)
    _, none = run(policy, asked)
    _, right = run(policy, with_drafts(asked, DRAFTS["every member's"](plain)))
    _, wrong = run(policy, with_drafts(asked, [[misleading(g[0].tokens)] for g in plain]))
    tokens = sum(len(s.tokens) - 1 for g in plain for s in g)
    longest = max(len(s.tokens) for g in plain for s in g)
    assert longest == MOST and none == {"forwards": MOST - 1, "forwarded": tokens, "drafted": 0, "accepted": 0}
    assert right["forwards"] == 5 and right["accepted"] == right["drafted"] and right["forwarded"] == tokens
    assert wrong["forwards"] == MOST - 1 and wrong["accepted"] == 0
    assert 6 <= wrong["drafted"] <= 6 * len(PROMPTS) and wrong["forwarded"] == tokens + wrong["drafted"]


def test_a_draft_goes_on_where_the_completion_left_its_text():
    texts = drafted.Texts([[1, 2, 3, 4, 5, 6], [9, 3, 4, 8, 7]])
    assert texts.draft([1, 2, 3], 2) == [4, 5]
    assert texts.draft([7, 7, 3, 4], 2) == [5, 6]  # two tokens in either text: the first
    assert texts.draft([7, 9, 3, 4], 9) == [8, 7]  # three in the second
    assert texts.draft([4], 5) == texts.draft([6, 1], 5) == []
    assert drafted.Texts([[1, 2, 0, 3], [0]], {0}).draft([1], 4) == [2]  # 0 ends a completion
    assert drafted.Texts([]).draft([1, 2], 4) == drafted.Texts([[], [3]]).draft([3], 4) == []


def test_pauses_grow_while_drafts_fail():
    patience, drafted_at = drafted.Patience(), []
    for forward in range(1, 40):
        if not patience.wait():
            drafted_at.append(forward)
            patience.learn(forward == 15)
    assert drafted_at == [1, 3, 7, 15, 16, 18, 22, 30]


# ---------------------------------------------------------------------------------------------- in a run

LOCK = ["train.steps=6", "train.prompts=8", "data.train_rows=12", "eval.every=0", "eval.train_rows=0", "save.every=2",
        "save.keep=9", "save.rollouts=true", "model.dtype=float64", "threads=1", "engine.kind=native"]  # fmt: skip


def lock(folder, *settings):
    config = resolve("uft", recipe="lock", overrides=parse_overrides([*LOCK, *settings]))
    train(config, folder)
    return [read_rollouts(folder, step)[1] for step in range(6)]


def test_a_run_samples_the_same_tokens_with_drafts(tmp_path, monkeypatch):
    """Hints of all lengths, rows that come again; and `last` is what the checkpoint keeps, so a run that continues from one
    drafts as the run that went on."""
    used = []
    advance = drafted.DraftedRows.advance
    monkeypatch.setattr(drafted.DraftedRows, "advance", lambda self: used.append(1) or advance(self))
    plain = lock(tmp_path / "plain")
    assert not used
    for draft in ("solution", "last"):
        used.clear()
        got = lock(tmp_path / draft, f"sample.draft={draft}")
        assert used
        for groups, others in zip(got, plain, strict=True):
            assert [(g.row, g.hint) for g in groups] == [(g.row, g.hint) for g in others]
            assert [[s.tokens for s in g.samples] for g in groups] == [[s.tokens for s in g.samples] for g in others]
    memory = json.loads((tmp_path / "last" / "checkpoints" / "step_000004" / "trainer.json").read_text())["memory"][
        "last"
    ]
    seen = {g.row_id: {(*g.hint, *s.tokens) for s in g.samples} for groups in plain[:4] for g in groups}
    assert {row: set(map(tuple, texts)) for row, texts in memory.items()} == seen


def test_memory_keeps_texts_without_repeats_and_only_when_asked():
    config = resolve("uft", overrides=parse_overrides(["data.task=lock", "sample.draft=last"]))
    group = Group(0, "a", [1], [5], 0, 1, [Sample([7, 2], [0.0] * 2, True, score=Score(0.0)) for _ in range(3)])
    memory = RowMemory()
    memory.keep([group], config.sample.model_copy(update={"draft": "solution"}))
    assert memory.last == {} and memory.drafts(group, [5, 6], config.sample) == [[5, 6]]
    memory.keep([group], config.sample)
    assert memory.last == {"a": [[5, 7, 2]]} and memory.drafts(group, [5, 6], config.sample) == [[5, 7, 2], [5, 6]]
    assert RowMemory.load(json.loads(json.dumps(memory.dump()))) == memory


@pytest.mark.parametrize("settings", [["engine.kind=plain"], ["engine.kind=vllm"], ["model.forward=plain"]])
def test_drafts_need_the_native_engine(settings, tmp_path):
    with pytest.raises(ConfigError, match=r"sample\.draft=solution"):
        lock(tmp_path / "run", "engine.kind=auto", "sample.draft=solution", *settings)


def test_requests_without_drafts_take_the_usual_way(monkeypatch):
    policy, _ = tiny_policy()
    monkeypatch.setattr(drafted, "run_batch", lambda *a: pytest.fail("no draft was given"))
    asked = requests()
    same(generate(policy, asked, MOST, 0.9), native.generate(policy, asked, MOST, 0.9), atol=1e-5)
