"""The example of split federated training: the link against float64 numbers, its draws, a client's round, Flower where it is."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parents[1] / "examples" / "split_federated"
sys.path.insert(0, str(FOLDER))
import link  # noqa: E402
import split_federated as example  # noqa: E402

sys.path.remove(str(FOLDER))


def test_the_three_errors():
    """R = I (2x2), s2 = .1, Q = diag(10, 0). A diagonal R makes each direction a scalar: with w = 1 / (1 + c) the error is
    (1 - w)^2 + w^2 v, c what is believed and v what is there."""
    identity, q = torch.eye(2, dtype=torch.float64), torch.diag(torch.tensor([10.0, 0.0], dtype=torch.float64))
    noise = 0.1 * identity
    found = [
        link.error(identity, link.receiver(identity, believed), there)
        for believed, there in ((noise, noise), (noise, noise + q), (noise + q, noise + q))
    ]

    def scalar(c, v):
        w = 1 / (1 + c)
        return (1 - w) ** 2 + w**2 * v

    expected = [2 * scalar(0.1, 0.1), scalar(0.1, 10.1) + scalar(0.1, 0.1), scalar(10.1, 10.1) + scalar(0.1, 0.1)]
    assert found == pytest.approx(expected, rel=1e-12)
    assert found == pytest.approx([0.181818, 8.446281, 1.000819], abs=5e-7)
    assert found[0] < found[2] < found[1]


def test_the_receiver_is_the_best_linear_one():
    """W of the true covariance has the least error among its neighbours, for matrices that are not diagonal."""
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(4, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    r, c = a @ a.T, b @ b.T
    w = link.receiver(r, c)
    least = link.error(r, w, c)
    for _ in range(20):
        step = 1e-3 * torch.randn(4, 4, generator=draw, dtype=torch.float64)
        assert link.error(r, w + step, c) > least


def made(scenario, kind="worst", snr=10.0):
    draw = torch.Generator().manual_seed(1)
    e, g = (torch.randn(500, 6, generator=draw, dtype=torch.float64) * s for s in (1.0, torch.arange(1, 7)))
    return e, g, link.make_link(scenario, kind, e, g, snr, 10.0)


@pytest.mark.parametrize("kind", link.JAMMERS)
def test_what_is_received_has_the_error_that_the_formula_gives(kind):
    """20,000 sent embeddings: the mean squared error of each scenario within 3 %, and the jammer has its power."""
    for scenario in link.SCENARIOS[1:]:
        e, _, channel = made(scenario, kind)
        r = e.T @ e / len(e)
        covariance = channel.spread_DD @ channel.spread_DD.T
        power = float(torch.trace(covariance)) / float(torch.trace(r))
        assert power == pytest.approx(0.1 if scenario == "no jammer" else 10.1, rel=1e-9)
        sent = e.repeat(40, 1)
        got = channel.through(sent, np.random.default_rng(0))
        measured = float((got - sent).square().sum(1).mean())
        assert measured == pytest.approx(link.error(r, channel.receiver_DD, covariance), rel=0.03), scenario


def test_the_worst_direction_is_that_of_the_gradient():
    e, g, _ = made("no link")
    q = link.jamming("worst", g, 3.0)
    values, vectors = torch.linalg.eigh(q)
    assert values.tolist() == pytest.approx([0, 0, 0, 0, 0, 3], abs=1e-12)
    directions = torch.eye(6, dtype=torch.float64)
    seen = (g @ vectors[:, -1]).square().mean()
    assert all(seen >= (g @ d).square().mean() for d in directions)
    with pytest.raises(ValueError, match="found 'jammed'"):
        link.make_link("jammed", "worst", e, g, 10.0, 10.0)


def test_the_link_is_differentiable_and_its_draws_are_addressed():
    e, _, channel = made("protected")
    x = e[:3].clone().requires_grad_()
    y = channel.through(x, np.random.default_rng(5))
    assert torch.equal(y, channel.through(x, np.random.default_rng(5)))
    (grad,) = torch.autograd.grad(y[0, 0], x)
    assert torch.allclose(grad[0], channel.receiver_DD[0]) and not grad[1:].any()


def test_a_round_of_a_client():
    """The same address, the same weights; clients differ by their rows; a few steps make the client's rows likelier."""
    s = example.Setting("no jammer", "worst", 20.0, 0)
    start = example.base().state_dict()
    one, again, other = (example.train_client(start, s, client, 1, steps=10) for client in (0, 0, 1))
    assert all(torch.equal(one[k], again[k]) for k in one) and any(not torch.equal(one[k], other[k]) for k in one)
    before, after = (example.judged(weights, s) for weights in (start, one))
    assert after["clean"] > before["clean"] and after["over"] > before["over"]


def test_settings_table_and_figure(tmp_path):
    """Every panel has all four scenarios; what does not depend on the jammer or the ratio runs once."""
    todo = example.settings(3)
    assert len(todo) == len(set(todo)) == 3 * (1 + 3 + 6 + 6)
    found = [{**vars(s), "accuracy": 0.5, "clean": -1.0, "over": -2.0} for s in todo]
    assert len(example.table(found).splitlines()) == 2 + 1 + 3 + 6 + 6
    example.figure(found, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5_000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Flower and Ray
def test_flower_averages_what_the_clients_made(tmp_path, monkeypatch):
    """One round over the link, through Flower's simulation: the weights are the mean of the three clients'."""
    pytest.importorskip("ray", reason="needs the extra split-federated: pip install -e '.[split-federated]'")
    pytest.importorskip("flwr", reason="needs the extra split-federated: pip install -e '.[split-federated]'")
    s = example.Setting("protected", "worst", 20.0, 0)
    monkeypatch.setattr(example, "settings", lambda seeds: [s])
    (found,) = example.study(1, tmp_path / "study.jsonl", rounds=1, steps=2)
    start = example.base().state_dict()
    clients = [example.train_client(start, s, client, 1, steps=2) for client in range(3)]
    expected = example.judged({k: sum(c[k] for c in clients) / 3 for k in start}, s)
    assert found["clean"] == pytest.approx(expected["clean"], rel=1e-4)
    assert example.study(1, tmp_path / "study.jsonl", rounds=1, steps=2) == [found]  # nothing is run again
