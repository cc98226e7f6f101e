"""The search-tree study: lemma E.7, the exact table simulation against a twin with every node and real rollouts, the
medians of this algorithm (docs/theory.md), fits and files."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import optimize, stats

from unift.commands import theory, theory_study

METHOD = {m.name: m for m in theory.METHODS}


# ---------------------------------------------------------------------------------------------- lemma E.7


def test_explicit_step_is_the_proximal_step():
    """The explicit and the proximal step (UFT, lemma E.7), and the maximiser that both stand for, found numerically."""
    theta, ref, a = np.array([0.2, -0.1, 0.4]), np.array([0.0, 0.1, 0.0]), np.array([0.5, -0.2, -0.3])
    eta, beta = 0.3, 0.1
    golden = np.array([0.339806, -0.152427, 0.300971])
    proximal = (theta + eta * beta * ref + eta * a) / (1 + eta * beta)
    explicit = theory.visited_step(theta, ref, a, eta / (1 + eta * beta), beta)
    assert np.allclose(proximal, golden, atol=5e-7, rtol=0)
    assert np.allclose(explicit - explicit.mean(), golden - golden.mean(), atol=1e-6, rtol=0)

    def softmax(z):
        return np.exp(z - z.max()) / np.exp(z - z.max()).sum()

    def loss(z):
        pi = softmax(np.append(z, 0.0))
        return -(eta * pi @ a - eta * beta * pi @ np.log(pi / softmax(ref)) - pi @ np.log(pi / softmax(theta)))

    best = optimize.minimize(loss, np.zeros(2), tol=1e-12)
    assert np.allclose(softmax(np.append(best.x, 0.0)), softmax(explicit), atol=1e-6)


# ---------------------------------------------------------------------------------------------- the twin


class Tree:
    """Every node has logits, every rollout walks to a leaf, the rewarded leaf is anywhere. Nothing is known in advance."""

    def __init__(self, branching, height, seed):
        self.r = np.random.default_rng([seed, branching, height, 99])
        self.b, self.h = branching, height
        self.path = tuple(self.r.integers(branching, size=height).tolist())
        nodes = itertools.chain.from_iterable(itertools.product(range(branching), repeat=d) for d in range(height))
        self.theta = {node: np.zeros(branching) for node in nodes}
        self.opened = 0

    def pi(self, node):
        e = np.exp(self.theta[node] - self.theta[node].max())
        return e / e.sum()

    def rollout(self, node):
        """The leaf, without its reward."""
        while len(node) < self.h:
            node += (min(int((self.pi(node).cumsum() < self.r.random()).sum()), self.b - 1),)
        return node

    def reward(self, leaf):
        self.opened += 1
        return 1.0 if leaf == self.path else 0.1

    def solved(self):
        return math.prod(self.pi(self.path[:d])[a] for d, a in enumerate(self.path)) >= 0.5


def twin_uft(branching, height, seed, beta, eta=0.5):
    """Algorithm 2, word for word; gradient in the probabilities."""
    t = Tree(branching, height, seed)
    while not t.solved():
        start = int(t.r.integers(height + 1))
        leaf = t.rollout(t.path[:start])
        new = {}
        for d in range(start, height):
            node = leaf[:d]
            pi = t.pi(node)
            q = np.array([t.reward(t.rollout((*node, a))) for a in range(branching)])
            new[node] = (q - pi @ q) - beta * (np.log(pi) - np.log(1 / branching)) - beta
        for d in range(start):
            gradient = np.zeros(branching)
            gradient[t.path[d]] = beta / t.pi(t.path[:d])[t.path[d]]
            new[t.path[:d]] = gradient
        for node, gradient in new.items():
            t.theta[node] = t.theta[node] + eta * gradient
    return t.opened


def twin_group(branching, height, seed, start, eta=0.5):
    """RFT and R3 with every group, also those that change nothing, and updates of all nodes."""
    t = Tree(branching, height, seed)
    while not t.solved():
        depth = 0 if start == "root" else int(t.r.integers(height))
        leaves = [t.rollout(t.path[:depth]) for _ in range(4)]
        rewards = np.array([t.reward(leaf) for leaf in leaves])
        gradient = {}
        for leaf, advantage in zip(leaves, rewards - rewards.mean()):
            for d in range(depth, height):
                g = gradient.setdefault(leaf[:d], np.zeros(branching))
                g += advantage * (np.eye(branching)[leaf[d]] - t.pi(leaf[:d]))
        for node, g in gradient.items():
            t.theta[node] = t.theta[node] + eta * g
    return t.opened


def differ(a, b):
    """(z of the means, p of the two-sample rank test)."""
    z = (a.mean() - b.mean()) / math.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
    return abs(z), stats.mannwhitneyu(a, b).pvalue


TWINS = {
    "uft-0": (lambda b, h, s, eta: theory.uft_queries(b, h, s, 0.0, eta), lambda b, h, s: twin_uft(b, h, s, 0.0)),
    "uft beta 0.2": (
        lambda b, h, s, eta: theory.uft_queries(b, h, s, 0.2, eta),
        lambda b, h, s: twin_uft(b, h, s, 0.2),
    ),
    "rft": (
        lambda b, h, s, eta: theory.group_queries(b, h, s, "root", eta),
        lambda b, h, s: twin_group(b, h, s, "root"),
    ),
    "r3": (
        lambda b, h, s, eta: theory.group_queries(b, h, s, "path", eta),
        lambda b, h, s: twin_group(b, h, s, "path"),
    ),
}


@pytest.mark.parametrize(("branching", "height"), [(2, 3), (3, 2)])
@pytest.mark.parametrize("name", TWINS)
def test_table_agrees_with_the_whole_tree(name, branching, height):
    fast, twin = TWINS[name]
    whole = np.array([twin(branching, height, seed) for seed in range(300)], dtype=float)
    z, p = differ(whole, fast(branching, height, range(2000), 0.5))
    assert z < 3.5 and p > 1e-3
    z, p = differ(whole, fast(branching, height, range(2000), 0.35))
    assert z > 5 and p < 1e-6, "a wrong step size passes: the comparison is too weak"


def test_likelihood_moves_the_hint():
    """The term counts: with a large beta the tree is solved with far fewer queries."""
    slow, quick = theory.uft_queries(2, 8, range(100), 0.0), theory.uft_queries(2, 8, range(100), 0.2)
    assert np.median(quick) < 0.5 * np.median(slow)


# ---------------------------------------------------------------------------------------------- stated medians

# Medians of an independent simulation over 40 seeds (15 from H = 20 on).
H_2 = [2, 4, 6, 8, 10, 12, 14, 16, 20, 30, 40, 60]
STATED = {
    ("uft-0", 2): dict(zip(H_2, [14, 87, 253, 543, 981, 1521, 2459, 3535, 6990, 22384, 49950, 165204])),
    ("uft", 2): dict(zip(H_2, [14, 85, 238, 514, 931, 1459, 2249, 3243, 6318, 18568, 37816, 93542])),
    ("rft", 2): dict(zip(H_2, [8, 48, 130, 364, 1678, 3714, 18764, 55250])),
    ("uft-0", 3): dict(zip([2, 3, 4, 6, 8, 10], [39, 107, 231, 705, 1556, 2760])),
    ("rft", 3): dict(zip([2, 3, 4, 6, 8, 10], [28, 72, 206, 830, 7026, 55006])),
}


def level_score(ours, stated, n):
    """How many standard errors the stated median of n seeds lies from a median of ours.

    Order statistics: F(median of n) is 1/2 with standard error 1/(2 sqrt n), whatever F is; ours adds its own error.
    Atoms of F count as agreement when they cover the level 1/2.
    """
    error = 0.5 * math.sqrt(1 / n + 1 / len(ours))
    below, up_to = (ours < stated).mean(), (ours <= stated).mean()
    return min(up_to - 0.5, 0.0) / error + max(below - 0.5, 0.0) / error


def check_stated(heights):
    worst = []
    for (name, branching), row in STATED.items():
        scores = [
            level_score(theory.queries(METHOD[name], branching, h, range(200)), stated, 40 if h < 20 else 15)
            for h, stated in row.items()
            if h in heights
        ]
        if scores:
            worst.append((name, branching, max(map(abs, scores)), abs(sum(scores)) / math.sqrt(len(scores))))
    # 38 cells at 1 % together: 3.65 standard errors each; five pooled rows: 3.1.
    assert worst and all(cell < 3.65 and pooled < 3.1 for *_, cell, pooled in worst), worst


def test_medians_agree_with_the_stated_table():
    check_stated(range(21))


@pytest.mark.slow
def test_medians_of_tall_trees_agree():
    check_stated(range(21, 61))


def test_level_score():
    ours = np.arange(1000.0)
    assert level_score(ours, 499.5, 40) == 0 and level_score(np.full(50, 8.0), 8, 40) == 0
    assert level_score(ours, 900, 40) == pytest.approx(0.4 / (0.5 * math.sqrt(1 / 40 + 1 / 1000)))
    assert level_score(ours, 99, 40) == pytest.approx(-0.4 / (0.5 * math.sqrt(1 / 40 + 1 / 1000)))


# ---------------------------------------------------------------------------------------------- bounds and rare events


def test_bounds():
    assert theory.lower_bound(2, 8) == 64 and theory.lower_bound(3, 3) == 6.75 and theory.exhaustive(2, 6) == 32.5
    for height, budget in {10: 3.0e11, 20: 4.5e12, 40: 7.3e13, 50: 1.8e14}.items():
        assert theory.guarantee(2, height) == pytest.approx(budget, rel=0.02)
    assert [h for h in range(2, 61) if theory.guarantee(2, h) < theory.lower_bound(2, h)][0] in range(45, 51)


def test_rft_finds_leaves_that_are_one_in_1e36():
    """Before the first reward the policy is uniform: the queries to it are geometric with mean B^H."""
    found = theory.group_queries(4, 60, range(150), "root")
    assert np.isfinite(found).all()
    first = 4.0**60 * math.log(2)  # its median; later rewards come sooner, but not at once
    assert first < np.median(found) < 10 * first
    growth = np.log(np.median(found) / np.median(theory.group_queries(4, 50, range(150), "root"))) / math.log(4) / 10
    assert growth == pytest.approx(1, abs=0.05)


def test_sft_steps():
    # B = 2, H = 2: the logit gap grows by 1 - pi: 0, 0.5, 0.8775 (pi^2 = 0.4988), 1.1713 (0.5828).
    assert theory.sft_steps(2, 1) == 0 and theory.sft_steps(2, 2) == 3


@pytest.mark.parametrize("name", METHOD)
def test_a_seed_does_not_depend_on_its_company(name):
    together = theory.queries(METHOD[name], 3, 7, [3, 11, 5])
    assert theory.queries(METHOD[name], 3, 7, [11])[0] == together[1]
    assert len(set(together)) > 1


@pytest.mark.parametrize(("branching", "height"), [(1, 3), (2, 0)])
def test_no_such_tree(branching, height):
    with pytest.raises(ValueError, match="branching >= 2"):
        theory.queries(METHOD["rft"], branching, height, range(3))


# ---------------------------------------------------------------------------------------------- fits and files


def planted(method, law, heights, branching=2):
    """A result whose medians follow ``law`` exactly."""
    return [
        {"method": method, "branching": branching, "height": h, "queries": [law(h) * f for f in (0.5, 1.0, 2.0)]}
        for h in heights
    ]


def test_fits_and_crossover_find_what_was_planted():
    heights = [2, 8, 10, 12, 20, 30]
    cells = planted("uft-0", lambda h: 7 * h**2.9 if h >= 10 else 1e9, heights) + planted(
        "rft", lambda h: 3 * 2**h, heights
    )
    result = {"cells": cells}
    poly, expo = (theory_study.fit(result, m, 2) for m in ("uft-0", "rft"))
    assert poly["slope"] == pytest.approx(2.9) and expo["slope"] == pytest.approx(1.0)
    assert poly["low"] < 2.9 < poly["high"] and poly["heights"] == [10, 12, 20, 30]
    assert theory_study.crossover(result, 2) == 10 + 2 * (3 * 2**10 < 7 * 10**2.9)
    assert theory_study.fit({"cells": planted("rft", lambda h: 2.0**h, [2, 4, 10])}, "rft", 2) is None
    never = planted("uft-0", lambda h: 9.0**h, heights) + planted("rft", lambda h: 2.0**h, heights)
    assert theory_study.crossover({"cells": never}, 2) is None


@pytest.mark.parametrize(
    ("x", "text"), [(2.25, "2.25"), (32.5, "32.5"), (2048.5, "2,048"), (16384, "16,384"), (2**40 / 4, "2.7e11")]
)
def test_numbers(x, text):
    assert theory_study.number(x) == text


def unift(*words):
    return subprocess.run([sys.executable, "-m", "unift", *words], capture_output=True, text=True)


def test_command(tmp_path):
    words = ["theory", "--seeds", "5", "--branching", "2,3", "--max-height", "14", "--out"]
    first, second = unift(*words, str(tmp_path / "a")), unift(*words, str(tmp_path / "b"))
    assert first.returncode == 0 and second.returncode == 0, first.stderr
    a, b = (json.loads((tmp_path / n / "theory.json").read_text()) for n in "ab")
    assert a["cells"] == b["cells"] and a["fits"] == b["fits"], "same command, other numbers"
    table = (tmp_path / "a/table.md").read_text()
    assert table.strip() in first.stdout and all(f"({letter})" in table for letter in "abcd")
    slope = {f["method"]: f["slope"] for f in a["fits"] if f["branching"] == 2}
    assert 2 < slope["uft-0"] < 4 and 0.5 < slope["rft"] < 1.5
    cell = next(c for c in a["cells"] if c["method"] == "uft" and c["branching"] == 3 and c["height"] == 6)
    assert cell["median"] == np.median(cell["queries"]) and len(cell["queries"]) == 5
    assert (tmp_path / "a/theory.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--branching", "2,x"], "2,x"), (["--branching", "1"], "at least 2"), (["--seeds", "1"], "--seeds 1")],
)
def test_mistakes(words, said):
    done = unift("theory", *words)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_numpy_only():
    code = (
        "import sys; from unift.commands import theory, theory_study; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
