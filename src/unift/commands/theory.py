"""Reward queries to pass@1 >= 1/2 on a B-ary tree: the separation of UFT's theorems 4.2 and 4.3, simulated exactly.

A complete tree of height H with B actions a node; one leaf has reward 1, every other 0.1, so the gap of definition 4.1
is 0.9. One annotated path leads to the rewarded leaf. The policy is a softmax table with logits theta[node, action],
uniform at the start. A *query* is one look at the reward of a leaf; the count stops at the first policy that reaches the
rewarded leaf with probability >= 1/2 (known exactly, so evaluating a policy costs nothing here).

Why a table of H x B logits is exact although the tree has B^H leaves: away from the annotated path all leaves below a
node have the same reward, so what a policy does there changes no reward and no query count. Only the H nodes on the path
matter, and a rollout from path node h reaches the leaf with probability prod_{k>=h} pi_k(a*). ``tests/commands/test_theory.py``
holds the twin with every node and real rollouts.

Shapes: S seeds, H heights 0..H-1 from the root, B actions with the annotated one first. numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unift import rng

Floats = NDArray[np.float64]

WIN, LOSE = 1.0, 0.1
GAP = WIN - LOSE  # Delta of definition 4.1
GROUP = 4  # rollouts that share a baseline in RFT and R3
ETA = 0.5
TARGET = 0.5  # pass@1 of theorems 4.2 and 4.3
BLOCK = 256  # iterations whose uniforms are drawn at once


@dataclass(frozen=True)
class Method:
    """A line of the table. ``start``: where rollouts begin; ``beta``: weight of KL and likelihood in algorithm 2."""

    name: str
    label: str
    start: str  # "root", or "path": a uniformly drawn state of the annotated path
    per_action: bool  # one rollout for every action of every visited node, else groups with a mean baseline
    beta: float = 0.0


METHODS = (
    Method("rft", "RFT", "root", per_action=False),
    Method("r3", "R3", "path", per_action=False),
    Method("uft-0", "UFT, beta = 0", "path", per_action=True),
    Method("uft", "UFT, beta = 0.001", "path", per_action=True, beta=1e-3),
)


class _Draws:
    """Uniforms of every seed, from a stream of its own: seed 7 gives the same run alone and among 40."""

    def __init__(self, name: str, branching: int, height: int, seeds: Sequence[int], width: int) -> None:
        self.streams = [rng.generator("theory", name, branching, height, seed) for seed in seeds]
        self.width, self.at = width, BLOCK
        self.block = np.empty((BLOCK, len(seeds), width))

    def next(self) -> Floats:
        """[S, width] uniforms in [0, 1)."""
        if self.at == BLOCK:
            for i, stream in enumerate(self.streams):
                self.block[:, i] = stream.random((BLOCK, self.width))
            self.at = 0
        self.at += 1
        return self.block[self.at - 1]


def log_softmax(theta_SHB: Floats) -> Floats:
    shifted = theta_SHB - theta_SHB.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def visited_step(theta: Floats, theta_ref: Floats, advantage: Floats, eta: float, beta: float) -> Floats:
    """theta + eta * grad_pi [<pi, A> - beta KL(pi || pi_ref)] at a visited node; actions on the last axis.

    The gradient is taken in the probabilities (mirror ascent), not in the logits; its constant -beta moves all logits of
    a node alike and is left out. With eta / (1 + eta beta) instead of eta this is the proximal step of lemma E.7,
    (theta + eta beta theta_ref + eta A) / (1 + eta beta), up to such a constant.
    """
    return theta + eta * (advantage - beta * (log_softmax(theta) - log_softmax(theta_ref)))


def uft_queries(branching: int, height: int, seeds: Sequence[int], beta: float = 0.0, eta: float = ETA) -> Floats:
    """[S] queries of UFT as it is analysed (algorithm 2), with constant step size.

    Each iteration starts at path state l ~ Uniform{0..H} (not annealed) and rolls out to a leaf; one more rollout from
    every action of every node on that way estimates Q, hence (H - l) B queries, nodes off the path included. Visited
    nodes take :func:`visited_step`; the l nodes of the hint gain eta beta / pi(a*) on the annotated action.
    """
    draws = _Draws("uft", branching, height, seeds, 1 + 2 * height)
    theta = np.zeros((len(seeds), height, branching))
    queries = np.zeros(len(seeds))
    levels_H = np.arange(height)
    reference_B = np.zeros(branching)
    while True:
        pi = np.exp(log_softmax(theta))
        right_SH = pi[..., 0]
        running = right_SH.prod(-1) < TARGET
        if not running.any():
            return queries
        u = draws.next()
        start_S1 = np.floor(u[:, :1] * (height + 1))
        hint_SH = levels_H < start_S1
        # Still on the path at node h: every choice from l to h - 1 was the annotated one.
        stays = hint_SH | (u[:, 1 : height + 1] < right_SH)
        visited_SH = ~hint_SH
        visited_SH[:, 1:] &= np.logical_and.accumulate(stays, axis=1)[:, :-1]
        below = np.ones_like(right_SH)  # prod_{k>h} pi_k(a*): a rollout from T(s_h, a*) reaches the rewarded leaf
        below[:, :-1] = np.cumprod(right_SH[:, :0:-1], axis=1)[:, ::-1]
        q = np.full_like(theta, LOSE)
        q[..., 0] += GAP * (u[:, height + 1 :] < below)
        advantage = q - (pi * q).sum(-1, keepdims=True)
        new = np.where(visited_SH[..., None], visited_step(theta, reference_B, advantage, eta, beta), theta)
        new[..., 0] += hint_SH * eta * beta / right_SH
        theta = np.where(running[:, None, None], new, theta)
        queries += running * branching * (height - start_S1[:, 0])


def group_queries(branching: int, height: int, seeds: Sequence[int], start: str, eta: float = ETA) -> Floats:
    """[S] queries of RFT (``start="root"``) and R3 (``start="path"``).

    RFT: groups of 4 rollouts from the root, advantage = reward - mean of the group, gradient ascent on the logits with
    the sum of A_i grad log pi(a_i) over the group, step size 0.5.

    R3: the same, except that each group starts at a path state l ~ Uniform{0..H-1} (reverse-curriculum resets, mixed
    over depths as in arXiv 2402.05808): ordinary rollouts and a mean baseline, no rollout per action, no likelihood, no
    KL. UFT's law is on {0..H}; for R3 l = H would be an iteration without rollout, query or update.

    A group that fails or succeeds as a whole has no advantage and changes nothing, so it is not simulated: how many of
    those pass before the next mixed group is drawn from its geometric law, and the mixed group from its conditional law.
    """
    draws = _Draws("rft" if start == "root" else "r3", branching, height, seeds, 1 + 2 + 2 * (GROUP - 1))
    theta = np.zeros((len(seeds), height, branching))
    queries = np.zeros(len(seeds))
    levels_H = np.arange(height)
    k_K = np.arange(1.0, GROUP)  # winners of a mixed group
    ways_K = np.array([math.comb(GROUP, int(k)) for k in k_K], dtype=float)
    starts_H = np.ones(height) / height if start == "path" else np.eye(height)[0]
    rows = np.arange(len(seeds))
    while True:
        pi = np.exp(log_softmax(theta))
        right_SH = pi[..., 0]
        wins_SH = np.cumprod(right_SH[:, ::-1], axis=1)[:, ::-1]  # from path state l
        running = wins_SH[:, 0] < TARGET
        if not running.any():
            return queries
        u = draws.next()
        # expm1 and log1p: the winning probability may be 1e-18, and 1 - p would be 1.
        mixed_SH = starts_H * (-np.expm1(GROUP * np.log1p(-wins_SH)) - wins_SH**GROUP)
        mixed_S = mixed_SH.sum(-1)
        groups = 1 + np.floor(np.log1p(-u[:, 0]) / np.log1p(-mixed_S))
        l_S = _inverse(mixed_SH, u[:, 1])
        win_S1 = wins_SH[rows, l_S][:, None]
        k_S = 1 + _inverse(ways_K * win_S1**k_K * (1 - win_S1) ** (GROUP - k_K), u[:, 2])

        weight = np.zeros_like(theta)  # sum of advantages of the members that took action a at path node h
        weight[..., 0] = (k_S * GAP * (1 - k_S / GROUP))[:, None] * (levels_H >= l_S[:, None])
        onward_SH = np.cumprod(np.where(levels_H < l_S[:, None], 1.0, right_SH), axis=1)
        for j in range(GROUP - 1):  # the losers: each leaves the path at one node
            loses = np.where(j < GROUP - k_S, -GAP * k_S / GROUP, 0.0)
            v = u[:, 3 + 2 * j] * (1 - win_S1[:, 0])
            leaves_S = np.minimum((onward_SH >= (1 - v)[:, None]).sum(-1), height - 1)
            action_S = 1 + _inverse(pi[rows, leaves_S, 1:], u[:, 4 + 2 * j])
            between = (levels_H >= l_S[:, None]) & (levels_H < leaves_S[:, None])
            weight[..., 0] += loses[:, None] * between
            weight[rows, leaves_S, action_S] += loses
        gradient = weight - weight.sum(-1, keepdims=True) * pi
        theta += running[:, None, None] * eta * gradient
        queries += running * GROUP * groups


def _inverse(weight_SK: Floats, u_S: Floats) -> NDArray[np.intp]:
    """[S] index drawn in proportion to the weights of its row."""
    cumulative = np.cumsum(weight_SK, axis=-1)
    index = (cumulative <= (u_S * cumulative[:, -1])[:, None]).sum(-1)
    return np.minimum(index, weight_SK.shape[-1] - 1)


def queries(method: Method, branching: int, height: int, seeds: Sequence[int]) -> Floats:
    """[S] reward queries until pass@1 >= 1/2. branching >= 2, height >= 1."""
    if branching < 2 or height < 1:
        raise ValueError(f"a tree needs branching >= 2 and height >= 1, not {branching} and {height}")
    if method.per_action:
        return uft_queries(branching, height, seeds, method.beta)
    return group_queries(branching, height, seeds, method.start)


def sft_steps(branching: int, height: int, eta: float = ETA) -> int:
    """Gradient steps on the log-likelihood of the annotated path until pass@1 >= 1/2. They need no reward query."""
    theta_B, steps = np.zeros(branching), 0  # all nodes of the path are alike
    while True:
        pi_B = np.exp(log_softmax(theta_B))
        if pi_B[0] ** height >= TARGET:
            return steps
        theta_B = theta_B + eta * (np.eye(branching)[0] - pi_B)
        steps += 1


def lower_bound(branching: int, height: int) -> float:
    """Theorem 4.2: on some instance every RFT algorithm needs at least B^H / 4 queries."""
    return float(branching) ** height / 4


def exhaustive(branching: int, height: int) -> float:
    """Mean queries of opening leaves in a random order until the rewarded one: (B^H + 1) / 2."""
    return (float(branching) ** height + 1) / 2


def guarantee(branching: int, height: int, gap: float = GAP) -> float:
    """Theorem 4.3: (B H + N) T queries suffice, T iterations and N evaluation rollouts for each, theta_ref = 0."""
    iterations = ((height + 1) ** 2 * (math.log(branching) + 7) / (gap / 12)) ** 2
    evaluations = 72 * math.log(14 * (iterations + 1)) / gap**2
    return (branching * height + evaluations) * iterations
