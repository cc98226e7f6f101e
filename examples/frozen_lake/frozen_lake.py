"""Frozen Lake (after IFT, arXiv 2405.11870, section 5.3): which loss comes nearest to the best policy from one good trajectory?

    python examples/frozen_lake/frozen_lake.py     # five minutes on one core; prints the table, writes frozen_lake.png

A network learns from one optimal trajectory (and, where the loss compares, from a worse one) on the 4x4 map without slipping;
the distance of its state-action matrix to the best one is the result. What the paper leaves open is varied: the worse
trajectory, the network, the rate and what "best" means (the policy itself, or a network trained on it).

Shapes: N moves of a trajectory, S states (those where a move is left to make), A = 4 moves (left, down, right, up).
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, logsigmoid

from unift.objectives.likelihood import tail
from unift.objectives.loss import log_odds

LEFT, DOWN, RIGHT, UP = range(4)
WIDTH, STEPS, MIX, GAMMA, BETA, ODDS = 32, 300, 0.2, 0.95, 0.1, 0.1
OPTIMAL = (DOWN, DOWN, RIGHT, DOWN, RIGHT, RIGHT)
WORSE = {
    "hole": (DOWN, RIGHT),
    "detour": (RIGHT, RIGHT, DOWN, DOWN, DOWN, RIGHT),  # as short as OPTIMAL, through other states
    "slow": (LEFT, DOWN, UP, DOWN, DOWN, RIGHT, DOWN, RIGHT, RIGHT),
}
RATES = (0.003, 0.03)
NETWORKS = {"one": 0, "two": 1}  # layers after the embedding: the head, or a hidden layer and the head
BESTS = ("itself", "trained")
METHODS = ("sft", "dpo", "orpo", "ift", "ift eq. 21")
PAIRED = ("dpo", "orpo")  # the others never see the worse trajectory


@dataclass(frozen=True)
class Choice:
    method: str
    worse: str
    layers: str
    rate: float


Found = dict[Choice, Tensor]


@dataclass(frozen=True)
class Trajectory:
    states_N: Tensor
    moves_N: Tensor


def lake() -> gymnasium.Env[int, int]:
    return gymnasium.make("FrozenLake-v1", map_name="4x4", is_slippery=False)


def walk(env: gymnasium.Env[int, int], moves: Sequence[int]) -> Trajectory:
    """The states in which the moves are made. ValueError where the walk ends before the moves do."""
    state, _ = env.reset(seed=0)
    states, done = [], False
    for move in moves:
        if done:
            raise ValueError(f"the walk {moves} ends after {len(states)} moves")
        states.append(int(state))
        state, _, done, *_ = env.step(move)
    return Trajectory(torch.tensor(states), torch.tensor(moves))


def successors(env: gymnasium.Env[int, int]) -> Tensor:
    """Where each move leads, [states, A]."""
    table: dict[int, Any] = env.unwrapped.P  # type: ignore[attr-defined]
    return torch.tensor([[table[s][a][0][1] for a in range(4)] for s in range(len(table))])


def best_moves(env: gymnasium.Env[int, int]) -> tuple[Tensor, Tensor]:
    """(states from which the goal can be reached, the best policy there [S, A]: uniform over the moves of a shortest way)."""
    table: dict[int, Any] = env.unwrapped.P  # type: ignore[attr-defined]
    nxt = successors(env)
    ends = {s for s in table if all(table[s][a][0][3] for a in range(4))}  # holes and the goal stay where they are
    goal = len(table) - 1
    away = {goal: 0}
    for _ in table:
        for s in set(table) - ends - set(away):
            reached = [away[n] for n in nxt[s].tolist() if n in away]
            if reached:
                away[s] = 1 + min(reached)
    states = [s for s in sorted(away) if s != goal]
    shortest = torch.tensor([[float(away.get(n, 99) == away[s] - 1) for n in nxt[s].tolist()] for s in states])
    return torch.tensor(states), shortest / shortest.sum(1, keepdim=True)


def network(layers: str, seed: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hidden = [nn.Linear(WIDTH, WIDTH) for _ in range(NETWORKS[layers])]
        return nn.Sequential(nn.Embedding(16, WIDTH), *hidden, nn.ReLU(), nn.Linear(WIDTH, 4)).double()


def logps(model: nn.Sequential, t: Trajectory, embedded_ND: Tensor | None = None) -> Tensor:
    """log pi of each move, [N]."""
    logits = model(t.states_N) if embedded_ND is None else model[1:](embedded_ND)
    return log_softmax(logits, -1).gather(1, t.moves_N[:, None])[:, 0]


def mixed(model: nn.Sequential, t: Trajectory, nxt: Tensor) -> Tensor:
    """Temporal residual connection (eq. 17): a state's embedding with a fifth of that of the state which the model's own
    best move would have reached, [N, D]."""
    with torch.no_grad():
        reached_N = nxt[t.states_N, model(t.states_N).argmax(-1)]
    own_N = torch.cat([t.states_N[:1], reached_N[:-1]])
    return (1 - MIX) * model[0](t.states_N) + MIX * model[0](own_N)


def loss_of(
    method: str, model: nn.Sequential, start: nn.Sequential, good: Trajectory, bad: Trajectory, nxt: Tensor
) -> Tensor:
    """The scalar loss of a step. ``start``: the model at the start, DPO's reference."""
    if method == "sft":
        return -logps(model, good).mean()
    if method == "dpo":  # arXiv 2305.18290, eq. 7
        with torch.no_grad():
            base = logps(start, good).sum() - logps(start, bad).sum()
        return -logsigmoid(BETA * (logps(model, good).sum() - logps(model, bad).sum() - base))
    if method == "orpo":
        mean = logps(model, good).mean()  # arXiv 2403.07691, eq. 6
        return -mean - ODDS * logsigmoid(log_odds(mean) - log_odds(logps(model, bad).mean()))
    l_N = logps(model, good, mixed(model, good, nxt))
    if method == "ift":  # as in its code: discounted sums of the losses from a token on are its weight
        return -tail(l_N, torch.zeros_like(good.moves_N), GAMMA).mean()
    if method == "ift eq. 21":  # a token stands in the sum of every token up to it, undiscounted
        n = len(l_N)
        return -(torch.arange(1, n + 1) * l_N).sum() * 2 / (n * (n + 1))
    raise ValueError(f"method: found {method!r}, expected one of {METHODS}")


def fit(model: nn.Module, rate: float, steps: int, loss: Callable[[], Tensor], after: Callable[[], None]) -> None:
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        after()


@functools.cache
def bests(layers: str, seed: int) -> tuple[Tensor, list[Tensor]]:
    """(states, the best policy in each sense of BESTS): as it is, and as the network of this seed learns it."""
    states, uniform = best_moves(lake())
    model = network(layers, seed)
    fit(model, 0.01, STEPS, lambda: -(uniform * log_softmax(model(states), -1)).sum(1).mean(), lambda: None)
    return states, [uniform, model(states).softmax(-1).detach()]


def distances(choice: Choice, seed: int, steps: int = STEPS) -> Tensor:
    """Mean squared distance of the state-action matrices after each step, in each sense of BESTS: [steps, 2]."""
    env = lake()
    states, targets = bests(choice.layers, seed)
    model, start, found = network(choice.layers, seed), network(choice.layers, seed), []
    good, bad, nxt = walk(env, OPTIMAL), walk(env, WORSE[choice.worse]), successors(env)

    def measure() -> None:
        with torch.no_grad():
            policy = model(states).softmax(-1)
        found.append(torch.stack([(policy - best).square().mean() for best in targets]))

    fit(model, choice.rate, steps, lambda: loss_of(choice.method, model, start, good, bad, nxt), measure)
    return torch.stack(found)


def measure_all(seeds: int, steps: int) -> Found:
    """[seeds, steps, 2] for each choice. Methods that never see the worse trajectory run once for all of them."""
    found: Found = {}
    for layers, rate, method, worse in itertools.product(NETWORKS, RATES, METHODS, WORSE):
        first = Choice(method, next(iter(WORSE)), layers, rate)
        choice = Choice(method, worse, layers, rate)
        if method not in PAIRED and first in found:
            found[choice] = found[first]
        else:
            found[choice] = torch.stack([distances(choice, seed, steps) for seed in range(seeds)])
    return found


def table(found: Found) -> str:
    """A line for each choice: the distance at the end (the least on the way), mean over seeds, the nearest in bold; and how
    much it matters which best policy is meant."""
    lines = [f"| worse | layers | rate | {' | '.join(METHODS)} |", "|---" * (3 + len(METHODS)) + "|"]
    for layers, rate, worse in itertools.product(NETWORKS, RATES, WORSE):
        runs = [found[Choice(method, worse, layers, rate)][:, :, 0] for method in METHODS]
        ends = [float(run[:, -1].mean()) for run in runs]
        cells = []
        for end, run in zip(ends, runs):
            bold = "**" if end == min(ends) else ""
            cells.append(f"{bold}{end:.4f}{bold} ({float(run.min(1).values.mean()):.4f})")
        lines.append(f"| {worse} | {layers} | {rate:g} | {' | '.join(cells)} |")
    apart = max(float((run[:, -1, 0] - run[:, -1, 1]).abs().max()) for run in found.values())
    return "\n".join([*lines, "", f"The best policy itself or a network trained on it: at most {apart:.4f} apart."])


def figure(found: Found, path: Path) -> None:
    """Distance over the steps at the lower rate, mean over seeds and one standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(len(NETWORKS), len(WORSE), figsize=(11, 6), sharex=True, sharey=True, layout="constrained")
    for row, layers in zip(axes, NETWORKS):
        for ax, worse in zip(row, WORSE):
            for method in METHODS:
                runs = found[Choice(method, worse, layers, RATES[0])][:, :, 0]
                mean, spread = runs.mean(0), runs.std(0, correction=0)
                (line,) = ax.plot(mean, label=method)
                ax.fill_between(range(len(mean)), mean - spread, mean + spread, alpha=0.15, color=line.get_color())
            ax.set_title(f"worse: {worse}, layers: {layers}")
        row[0].set_ylabel("distance to the best policy")
    for ax in axes[-1]:
        ax.set_xlabel("step")
    axes[0, 0].legend()
    fig.savefig(path, dpi=70)
    plt.close(fig)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("frozen_lake.png"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    everything = measure_all(given.seeds, given.steps)
    print(table(everything))
    figure(everything, given.out)
