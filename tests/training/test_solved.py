"""Rows of which some have a worked solution (data.solved): what they are trained by, and from which rows a stage draws."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import close, packed_loss, settings, tiny_policy
from plain import token_logprobs

from unift.config import needs
from unift.config.packaged import preset_names
from unift.config.resolve import parse_overrides, resolve
from unift.config.sections import Likelihood
from unift.config.stages import Moment, Stage, stages
from unift.credit import assign
from unift.credit.advantages import advantages, group_advantages
from unift.credit.members import items_of
from unift.model.packs import COMPLETION, DEMO
from unift.rows import store
from unift.rows.dataset import Split, solved_rows
from unift.rows.inspect import write_rows
from unift.rows.tasks import make_rows
from unift.rows.tokens import Encoded
from unift.sampling.groups import hinted
from unift.training.loop import train
from unift.training.row_memory import RowMemory
from unift.training.run.metrics import group_metrics, read_metrics
from unift.training.run.rollouts import read_rollouts
from unift.types import ConfigError, DataError, Group, Row, Sample, Score

ROWS = [Row("solved", "p", ("a", "b"), "c", "1"), Row("bare", "q", (), "", "1")]
ENCODED = [Encoded([3, 4], [5, 6, 7, 8, 1], [0, 2, 4]), Encoded([9, 10, 11], [1], [0])]
SPLIT = Split(ROWS, ENCODED, [None] * 2, [None] * 2, [0])
OWN = [[12, 13, 1], [14, 1], [15, 16, 17], [18]]
RIGHT = [1.0, 0.0, 0.0, 0.0]


def groups_of(config, right=RIGHT):
    """The two rows at the first step, with the hints that the schedule draws and the same four completions each."""
    moment = Moment(0, 0, Stage(0, 10, config))
    samples = [Sample(t, [-1.0] * len(t), t[-1] == 1, score=Score(r, r == 1)) for t, r in zip(OWN, right, strict=True)]
    return [replace(g, samples=list(samples), shown=None) for g in hinted([0, 1], SPLIT, moment, {})]


def items_of_step(config, right=RIGHT):
    policy, _ = tiny_policy(torch.float64)
    return assign.credited(groups_of(config, right), SPLIT, config, assign.Models(policy, None, {}), (0, 0))


# ---------------------------------------------------------------------------------------------- what a row is trained by


def test_uft_by_hand():
    """One of two rows has a solution, shown whole: GRPO over the 18 sampled tokens of both groups (ratio 1: value -mean of A,
    gradient that of -mean of A times the log-prob), and .1 times the mean NLL of the four hinted tokens of the one row."""
    config = settings("uft", "show.high=1", "show.schedule=constant", "reference.kl=0", "likelihood.weight=0.1")
    items = items_of_step(config)
    assert [i.hint for i in items] == [[5, 6, 7, 8], []]
    policy, stock = tiny_policy(torch.float64)
    loss, got = packed_loss(policy, items, config)
    a = advantages(RIGHT, config.credit)
    prefixes = [[3, 4, 5, 6, 7, 8], [9, 10, 11]]
    sequences = [prefix + own for prefix in prefixes for own in OWN]
    logps, _ = token_logprobs(stock, sequences)
    starts = [len(prefix) for prefix in prefixes for _ in OWN]
    sampled = sum(A * l[s - 1 :].sum() for A, l, s in zip(a * 2, logps, starts, strict=True))
    nll = -logps[0][1:5].mean()
    stock.zero_grad()
    (-sampled / 18 + 0.1 * nll).backward()
    worth = sum(A * len(own) for A, own in zip(a, OWN, strict=True)) * 2
    assert loss == pytest.approx(-worth / 18 + 0.1 * nll.item(), rel=1e-7)
    close(got, [p.grad for p in stock.parameters()], 1e-7)


def test_luffy_by_hand():
    """The solution is a fifth member with score 1 where there is one; a row without has the four completions' own mean."""
    solved, bare = items_of_step(settings("luffy"))
    credit = settings("luffy").credit
    assert [m.role for m in solved.members] == [COMPLETION] * 4 + [DEMO] and solved.members[-1].tokens == [
        5,
        6,
        7,
        8,
        1,
    ]
    assert [m.advantage for m in solved.members] == pytest.approx(advantages([*RIGHT, 1.0], credit))
    assert [m.role for m in bare.members] == [COMPLETION] * 4
    assert [m.advantage for m in bare.members] == pytest.approx(advantages(RIGHT, credit))


@pytest.mark.parametrize("name", [n for n in preset_names() if needs.solutions(settings(n))])
def test_a_bare_row_is_its_completions(name):
    """Whatever a method does with a solution: nothing of a row without one is supervised but what it sampled, and no gate
    takes its completions away."""
    for stage in stages(settings(name)):
        config = stage.rules
        if needs.only_solved(config) or not needs.completions(config):
            assert needs.only_solved(config) or not needs.solutions(config)
            continue
        gated = config.model_copy(
            update={"likelihood": config.likelihood.model_copy(update={"gate": 0.5})} if config.likelihood.gate else {}
        )
        groups = groups_of(gated)
        demos = [e.solution for e in ENCODED] if needs.demonstrations(gated) else None
        made = items_of(groups, [group_advantages(g, gated) for g in groups], demos, gated, (0, 0))
        bare = made[1]
        assert bare.hint == [] and all(m.role != DEMO and not m.given for m in bare.members)
        alone = items_of(groups[1:], [group_advantages(groups[1], gated)], None, _without_solutions(gated), (0, 0))
        assert bare.members == alone[0].members


def _without_solutions(rules):
    """The same rules with no word that a solution is needed for."""
    own = rules.likelihood.tokens.startswith("own")
    plain = rules.likelihood if own else Likelihood(tokens="none")
    return rules.model_copy(
        update={
            "likelihood": plain.model_copy(update={"gate": None}),
            "sample": rules.sample.model_copy(update={"demonstration": False}),
        }
    )


def test_memory_knows_no_bare_row():
    """A bare row gets no hint length and never waits for an update on its solution."""
    memory, rules = RowMemory(), settings("relift", "likelihood.buffer=1")
    groups = groups_of(rules, [0.0] * 4)
    assert memory.collect(groups, rules.likelihood) == [0] and memory.waiting == []
    adaptive = settings("uft", "show.schedule=adaptive").show
    memory.see(groups, adaptive)
    assert set(memory.hints) == {"solved"}
    assert memory.mean_share(groups, adaptive) == memory.mean_share(groups[:1], adaptive)
    assert memory.mean_share(groups[1:], adaptive) == 0.0


# ---------------------------------------------------------------------------------------------- runs

TINY = [
    "save.rollouts=true",
    "train.steps=3",
    "train.prompts=4",
    "eval.every=0",
    "threads=1",
    "data.test_rows=4",
]


def run(folder, method, *more):
    """(weights, metrics of every step) of a small run on the lock."""
    result = train(resolve(method, recipe="lock", overrides=parse_overrides([*TINY, *more])), folder)
    steps = read_metrics(folder / "metrics.jsonl")[1:]
    kept = [{k: v for k, v in m.items() if not k.startswith(("time/", "memory/", "tokens/per"))} for m in steps]
    return (folder / "model" / "model.safetensors").read_bytes(), kept, result


def test_sft_trains_on_the_solved_rows_alone(tmp_path):
    """Three of twelve rows keep their solution: bit for bit the run on those three."""
    some = run(tmp_path / "some", "sft", "data.train_rows=12", "data.solved=3")
    few = run(tmp_path / "few", "sft", "data.train_rows=3")
    assert some[0] == few[0] and some[1] == few[1]
    assert some[0] != run(tmp_path / "all", "sft", "data.train_rows=12")[0]


def test_rft_does_not_ask_for_solutions(tmp_path):
    weights, steps, _ = run(tmp_path / "some", "rft", "data.train_rows=12", "data.solved=3", "sample.completions=4")
    apart = ("groups/without_solution", "reward/with_solution", "reward/without_solution")
    assert all("groups/without_solution" in m for m in steps)
    steps = [{k: v for k, v in m.items() if k not in apart} for m in steps]
    assert (weights, steps) == run(tmp_path / "all", "rft", "data.train_rows=12", "sample.completions=4")[:2]


def test_metrics_tell_both_kinds_apart():
    """A solved row with half of its solution shown and one right completion in four, a bare one with two."""
    config = settings("uft")
    groups = groups_of(config)
    groups[0] = replace(groups[0], cuts=1, cuts_total=2, hint=[5, 6])
    groups[1] = replace(groups[1], samples=[replace(s, score=Score(1.0, True)) for s in groups[1].samples[:2]])
    found = group_metrics(groups, config)
    assert found["hint/fraction"] == 0.5 and found["hint/tokens"] == 2, "a row without a solution has no hint to show"
    assert found["groups/without_solution"] == 0.5 and found["reward"] == 0.5
    assert found["reward/with_solution"] == 0.25 and found["reward/without_solution"] == 1.0
    assert not any("solution" in name for name in group_metrics(groups[:1], config))
    assert group_metrics(groups[1:], config)["hint/fraction"] == 0.0


@pytest.mark.parametrize("method", ["uft", "luffy", "sft-rft"])
def test_a_mixed_run(tmp_path, method):
    """Rows of both kinds are sampled, hints are shown to solved ones alone, and a run that was cut off goes on to the same
    weights from the rollouts that it stored."""
    more = ["data.train_rows=8", "data.solved=4", "train.steps=4", "save.every=1", "save.keep=9", "show.high=1.0"]
    weights = run(tmp_path / "run", method, *more)[0]
    solved = {row.id for row in make_rows("lock", 4, 0, "train", length=5)}
    groups = [g for step in range(4) for g in (read_rollouts(tmp_path / "run", step) or ("", []))[1]]
    assert {g.row_id in solved for g in groups} == {True, False}
    assert all(g.solved == (g.row_id in solved) and (g.solved or not g.hint) for g in groups)
    for path in ("result.json", "model"):
        (tmp_path / "run" / path).rename(tmp_path / f"first-{path}")
    for step in (3, 4):
        (tmp_path / "run" / "checkpoints" / f"step_{step:06d}").rename(tmp_path / f"step_{step}")
    assert run(tmp_path / "run", method, *more)[0] == weights


def test_rows_on_disk(tmp_path, monkeypatch):
    """The same rows in memory and on disk: the same solved ones, the same run."""
    monkeypatch.setenv("UNIFT_CACHE", str(tmp_path / "cache"))
    rows = [r if i % 3 else replace(r, steps=()) for i, r in enumerate(make_rows("lock", 30, 0, "train"))]
    write_rows(rows, tmp_path / "train.jsonl")
    more = [f"data.train={tmp_path / 'train.jsonl'}", "data.task=null", "model.path=embedded:lock", "data.solved=some"]
    found = []
    for where, size in (("memory", 2**30), ("disk", 0)):
        monkeypatch.setattr(store, "LARGE", size)
        found.append(run(tmp_path / where, "sft", *more)[:2])
    assert found[0] == found[1]
    kept = store.StoredRows(next((tmp_path / "cache").glob("*/rows.arrow")).parent)
    assert list(kept.solved) == solved_rows(rows) == [i for i in range(30) if i % 3]
    with pytest.raises(ConfigError, match=r"data\.solved=5.*stay on disk.*data\.solved=some"):
        run(tmp_path / "number", "sft", *more[:-1], "data.solved=5")


# ---------------------------------------------------------------------------------------------- refusals


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def test_the_refusal_names_the_setting(tmp_path):
    rows = [{"prompt": f"1+{i}=", "answer": str(i + 1), "task": "math"} for i in range(4)]
    solved = [{**row, "steps": ["a ", "b "], "ending": f"<answer>{row['answer']}</answer>"} for row in rows]
    file = [f"data.train={write(tmp_path / 'rows.jsonl', [*solved[:2], *rows[2:]])}", "data.task=null"]
    base = [*file, "model.path=embedded:countdown", "train.steps=1", "data.test=null"]
    with pytest.raises(DataError, match=r"row 3.*no worked solution.*data\.solved=some"):
        train(resolve("uft", overrides=parse_overrides(base)), tmp_path / "a")
    bare = [f"data.train={write(tmp_path / 'bare.jsonl', rows)}", *base[1:], "data.solved=some"]
    for method in ("sft", "uft", "luffy"):
        with pytest.raises(DataError, match=f"no row has a worked solution, which method {method} learns from"):
            train(resolve(method, overrides=parse_overrides(bare)), tmp_path / method)


@pytest.mark.parametrize("word", ["none", "0", "-3", "true", "1.5"])
def test_words_of_the_setting(word):
    with pytest.raises(ConfigError, match=r"data\.solved"):
        settings("uft", f"data.solved={word}")


def test_stored_rollouts_keep_it(tmp_path):
    from unift.training.run.rollouts import write_rollouts

    groups = [Group(0, "a", [3], [5], 1, 2), Group(1, "b", [4], [], 0, 0, solved=False)]
    write_rollouts(tmp_path, 0, "w", groups, [("", "")] * 2)
    found = read_rollouts(tmp_path, 0)
    assert found is not None and found[1] == groups


def test_the_doctor_counts_them(tmp_path):
    from unift.commands.doctor import load_rows

    for method in ("uft", "sft"):
        check, data = load_rows(settings(method, "data.train_rows=8", "data.solved=3"))
        assert check.ok and "8 for training" in check.text and "; 5 without a solution" in check.text and data
    check, _ = load_rows(settings("rft", "data.train_rows=8", "data.solved=3"))
    assert check.ok and "without a solution" not in check.text
