"""The example on Frozen Lake: the map's best moves, the trajectories, each loss against its formula, a short run."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("gymnasium", reason="the example needs the extra frozen-lake: pip install -e '.[frozen-lake]'")

EXAMPLE = Path(__file__).parents[1] / "examples" / "frozen_lake" / "frozen_lake.py"
spec = importlib.util.spec_from_file_location("frozen_lake", EXAMPLE)
example = importlib.util.module_from_spec(spec)
sys.modules["frozen_lake"] = example
spec.loader.exec_module(example)

ENV = example.lake()
GOOD, HOLE = example.walk(ENV, example.OPTIMAL), example.walk(ENV, example.WORSE["hole"])
NEXT = example.successors(ENV)


def test_best_moves():
    """By hand, on SFFF / FHFH / FFFH / HFFG: down or right from the start and from 9, one best move elsewhere."""
    states, best = example.best_moves(ENV)
    down, right, left = example.DOWN, example.RIGHT, example.LEFT
    expected = {
        0: {down, right}, 1: {right}, 2: {down}, 3: {left}, 4: {down}, 6: {down}, 8: {right}, 9: {down, right},
        10: {down}, 13: {right}, 14: {right},
    }  # fmt: skip
    assert states.tolist() == list(expected)
    for s, row in zip(states.tolist(), best.tolist()):
        assert row == [1 / len(expected[s]) if a in expected[s] else 0 for a in range(4)], s


def reward(moves):
    state, total, done = ENV.reset(seed=0)[0], 0.0, False
    for move in moves:
        state, r, done, *_ = ENV.step(move)
        total += r
    return state, total, done


def test_trajectories_are_what_they_are_called():
    assert reward(example.OPTIMAL) == (15, 1.0, True) and len(example.OPTIMAL) == 6
    assert reward(example.WORSE["hole"]) == (5, 0.0, True)
    assert reward(example.WORSE["detour"]) == (15, 1.0, True) and len(example.WORSE["detour"]) == 6
    assert reward(example.WORSE["slow"]) == (15, 1.0, True) and len(example.WORSE["slow"]) > 6
    assert GOOD.states_N.tolist()[0] == 0 and NEXT[GOOD.states_N, GOOD.moves_N].tolist() == [
        *GOOD.states_N.tolist()[1:],
        15,
    ]
    with pytest.raises(ValueError, match="ends after 2 moves"):
        example.walk(ENV, (example.DOWN, example.RIGHT, example.DOWN))


def moves_of(model, trajectory):
    logits = model(trajectory.states_N)
    return [(z[m] - torch.logsumexp(z, 0)).item() for z, m in zip(logits, trajectory.moves_N.tolist())]


@pytest.mark.parametrize("layers", example.NETWORKS)
def test_losses(layers):
    model, start = example.network(layers, 1), example.network(layers, 2)
    l, worse, l0, worse0 = (moves_of(m, t) for m in (model, start) for t in (GOOD, HOLE))
    mean, other = sum(l) / 6, sum(worse) / 2
    p, q = math.exp(mean), math.exp(other)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    expected = {
        "sft": -mean,
        "dpo": -math.log(sigmoid(0.1 * ((sum(l) - sum(l0)) - (sum(worse) - sum(worse0))))),
        "orpo": -mean - 0.1 * math.log(sigmoid(math.log(p / (1 - p)) - math.log(q / (1 - q)))),
    }
    for method, loss in expected.items():
        assert example.loss_of(method, model, start, GOOD, HOLE, NEXT).item() == pytest.approx(loss, rel=1e-9), method
    with pytest.raises(ValueError, match="found 'kto'"):
        example.loss_of("kto", model, start, GOOD, HOLE, NEXT)


def test_ift():
    """A fifth of the embedding is that of the state which the model's own move reaches; weights by the tails' losses."""
    model = example.network("one", 3)
    mixed, table = example.mixed(model, GOOD, NEXT), model[0].weight
    states = GOOD.states_N.tolist()
    assert torch.equal(mixed[0], 0.8 * table[0] + 0.2 * table[0])
    for i in range(1, 6):
        reached = int(NEXT[states[i - 1], model(GOOD.states_N)[i - 1].argmax()])
        assert torch.allclose(mixed[i], 0.8 * table[states[i]] + 0.2 * table[reached], rtol=0, atol=1e-15)
    c = (-example.logps(model, GOOD, mixed)).tolist()
    tails = [sum(0.95 ** (j - i) * c[j] for j in range(i, 6)) for i in range(6)]
    discounted = sum(w * x for w, x in zip(tails, c)) / sum(tails)
    eq21 = sum(sum(c[i:]) for i in range(6)) / 21  # 21 terms: scaled to the size of a mean
    for method, loss in (("ift", discounted), ("ift eq. 21", eq21)):
        assert example.loss_of(method, model, model, GOOD, HOLE, NEXT).item() == pytest.approx(loss, rel=1e-9)


def test_a_model_that_moves_as_the_trajectory_reads_its_own_states():
    model = example.network("one", 0)
    example.fit(model, 0.05, 60, lambda: -example.logps(model, GOOD).mean(), lambda: None)
    assert torch.equal(model(GOOD.states_N).argmax(-1), GOOD.moves_N)
    assert torch.allclose(example.mixed(model, GOOD, NEXT), model[0](GOOD.states_N), rtol=0, atol=1e-15)


def test_a_short_run(tmp_path):
    found = example.measure_all(1, 8)
    assert len(found) == 2 * 2 * 5 * 3 and all(run.shape == (1, 8, 2) for run in found.values())
    sft = found[example.Choice("sft", "hole", "one", 0.03)]
    assert sft[0, -1, 0] < sft[0, 0, 0] and not any(run.isnan().any() for run in found.values())
    assert torch.equal(sft, found[example.Choice("sft", "slow", "one", 0.03)])
    text = example.table(found)
    assert len(text.splitlines()) == 2 + 12 + 2 and text.count("**") == 2 * 12
    example.figure(found, tmp_path / "lake.png")
    assert (tmp_path / "lake.png").stat().st_size > 10_000
