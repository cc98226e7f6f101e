"""Split federated fine-tuning over a jammed link, in small (after R-SFLLM, arXiv 2407.11654). Flower runs the federation.

    pip install -e '.[split-federated]'
    python examples/split_federated/split_federated.py      # prints the table, writes split_federated.png

Three clients hold 80 solved rows of the letter lock each. In a round every client trains the embedded base on its rows, with
the embeddings sent over the link (link.py) before the first block; Flower averages the weights. Afterwards: the share of
held-out solutions that greedy decoding writes exactly, over a clean channel, and the mean log-prob of their tokens over both.

Shapes: N rows, L tokens, D width.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent))
from link import JAMMERS, SCENARIOS, Link, make_link

from unift import rng
from unift.rows.tasks import make_rows
from unift.rows.tokens import encode_row

BASE = resources.files("unift") / "model" / "embedded" / "lock"
CLIENTS, ROWS, TEST, ROUNDS, STEPS, BATCH, RATE = 3, 80, 150, 6, 15, 32, 3e-3
SNRS = (0.0, 10.0, 20.0)  # dB, signal over noise
JAMMER = 10.0  # dB, jammer over signal
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Setting:
    scenario: str
    jammer: str
    snr: float
    seed: int


@dataclass(frozen=True)
class Rows:
    tokens_NL: Tensor
    solution_NL: Tensor  # 1 where a token of the solution stands


@cache
def _loaded() -> Any:
    return AutoModelForCausalLM.from_pretrained(str(BASE), dtype=torch.float32, local_files_only=True)


def base() -> Any:
    return copy.deepcopy(_loaded())


@cache
def rows_of(seed: int) -> tuple[Rows, Rows]:
    """(training rows of all clients, held-out rows), one key, so that every row has one solution."""
    tokenizer = AutoTokenizer.from_pretrained(str(BASE), local_files_only=True)

    def encoded(split: str, n: int) -> Rows:
        rows = [encode_row(tokenizer, row, 64) for row in make_rows("lock", n, seed, split, length=5, keys=1)]
        both = [(row.prompt, row.solution) for row in rows]
        longest = max(len(p) + len(s) for p, s in both)
        tokens = torch.zeros(n, longest, dtype=torch.long)
        on = torch.zeros(n, longest, dtype=torch.bool)
        for i, (p, s) in enumerate(both):
            tokens[i, : len(p) + len(s)] = torch.tensor([*p, *s])
            on[i, len(p) : len(p) + len(s)] = True
        return Rows(tokens, on)

    return encoded("train", CLIENTS * ROWS), encoded("test", TEST)


def logps(model: Any, rows: Rows, link: Link | None = None, address: tuple[object, ...] = ()) -> tuple[Tensor, Tensor]:
    """(log-prob of every token of the solutions [S], whether each solution is what greedy decoding writes [N])."""
    e_NLD = model.get_input_embeddings()(rows.tokens_NL)
    if link is not None:
        e_NLD = link.through(e_NLD, rng.generator("link", *address))
    logits = model(inputs_embeds=e_NLD).logits[:, :-1]
    target, on = rows.tokens_NL[:, 1:], rows.solution_NL[:, 1:]
    l = logits.log_softmax(-1).gather(2, target[..., None])[..., 0]
    written = ((logits.argmax(-1) == target) | ~on).all(1)
    return l[on], written


def sensed(model: Any, rows: Rows, s: Setting) -> Link | None:
    """The link at this model: R from the embeddings of the rows, the worst direction from the loss's gradient at them."""
    if s.scenario == "no link":
        return None
    e_NLD = model.get_input_embeddings()(rows.tokens_NL).detach().requires_grad_()
    logits = model(inputs_embeds=e_NLD).logits[:, :-1]
    on = rows.solution_NL[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits[on], rows.tokens_NL[:, 1:][on])
    (g_NLD,) = torch.autograd.grad(loss, e_NLD)
    sent = rows.tokens_NL != 0
    return make_link(s.scenario, s.jammer, e_NLD.detach()[sent], g_NLD[sent], s.snr, JAMMER)


def train_client(weights: Weights, s: Setting, client: int, number: int, steps: int = STEPS) -> Weights:
    """The weights after a client's steps of round ``number``: SFT on its own rows over the link."""
    torch.set_num_threads(1)
    model = base()
    model.load_state_dict(weights)
    everything, _ = rows_of(s.seed)
    own = slice(client * ROWS, (client + 1) * ROWS)
    mine = Rows(everything.tokens_NL[own], everything.solution_NL[own])
    link = sensed(model, mine, s)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.0)
    for step in range(steps):
        address = (s.seed, client, number, step)
        picked = rng.generator("batch", *address).permutation(ROWS)[:BATCH]
        l_S, _ = logps(model, Rows(mine.tokens_NL[picked], mine.solution_NL[picked]), link, address)
        optimizer.zero_grad()
        (-l_S.mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.state_dict()


def judged(weights: Weights, s: Setting) -> dict[str, Any]:
    """Accuracy over a clean channel, mean log-prob over it and over the link, of the held-out rows."""
    model = base()
    model.load_state_dict(weights)
    train, test = rows_of(s.seed)
    link = sensed(model, train, s)
    with torch.no_grad():
        clean, written = logps(model, test)
        over, _ = logps(model, test, link, ("test", s.seed))
    return {
        **asdict(s),
        "accuracy": float(written.double().mean()),
        "clean": float(clean.mean()),
        "over": float(over.mean()),
    }


def settings(seeds: int) -> list[Setting]:
    """Without a link there is no ratio and without a jammer no kind: those run once."""
    out = []
    for seed, scenario in itertools.product(range(seeds), SCENARIOS):
        kinds = JAMMERS if scenario in ("no protection", "protected") else JAMMERS[:1]
        snrs = SNRS[-1:] if scenario == "no link" else SNRS
        out += [Setting(scenario, kind, snr, seed) for kind, snr in itertools.product(kinds, snrs)]
    return out


def federation(todo: list[Setting], rounds: int, steps: int, tell: Callable[[dict[str, Any]], None]) -> None:
    """Every setting as rounds of Flower's FedAvg, in one simulation. Offline: no telemetry, no usage reports.

    ``tell`` is handed the result of each setting when it is there."""
    os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))  # for the workers
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    client_app, server_app = ClientApp(), ServerApp()

    @client_app.train()
    def _(message: Message, context: Context) -> Message:
        import split_federated as module

        told = dict(message.content["config"])
        s = module.Setting(told["scenario"], told["jammer"], told["snr"], told["seed"])
        client = int(context.node_config["partition-id"])
        weights = module.train_client(
            message.content["arrays"].to_torch_state_dict(), s, client, told["server-round"], told["steps"]
        )
        content = {"arrays": ArrayRecord(weights), "metrics": MetricRecord({"num-examples": ROWS})}
        return Message(content=RecordDict(content), reply_to=message)

    @server_app.main()
    def _(grid: Grid, context: Context) -> None:
        start = base().state_dict()
        for s in todo:
            strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=CLIENTS, min_available_nodes=CLIENTS)
            told = ConfigRecord({**asdict(s), "steps": steps})
            result = strategy.start(grid, ArrayRecord(start), num_rounds=rounds, train_config=told)
            tell(judged(result.arrays.to_torch_state_dict(), s))

    resources_of = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 1}}
    run_simulation(server_app, client_app, num_supernodes=CLIENTS, backend_config=resources_of)


def study(seeds: int, path: Path, rounds: int = ROUNDS, steps: int = STEPS) -> list[dict[str, Any]]:
    """Results of all settings, one line each in the file ``path``; a repeated call runs those that are not there yet."""

    def read() -> list[dict[str, Any]]:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def append(result: dict[str, Any]) -> None:
        with path.open("a") as file:
            file.write(json.dumps(result) + "\n")

    names = [field.name for field in fields(Setting)]
    done = {tuple(result[name] for name in names) for result in read()}
    todo = [s for s in settings(seeds) if tuple(asdict(s).values()) not in done]
    if todo:
        federation(todo, rounds, steps, append)
    return read()


def table(found: list[dict[str, Any]]) -> str:
    lines = ["| scenario | jammer | SNR, dB | accuracy, each seed | log-prob clean / over the link |", "|---" * 5 + "|"]
    keys = list(dict.fromkeys((r["scenario"], r["jammer"], r["snr"]) for r in found))
    for scenario, kind, snr in keys:
        runs = [r for r in found if (r["scenario"], r["jammer"], r["snr"]) == (scenario, kind, snr)]
        mean = {key: sum(r[key] for r in runs) / len(runs) for key in ("accuracy", "clean", "over")}
        each = " ".join(f"{r['accuracy']:.3f}" for r in runs)
        jammer = kind if scenario in ("no protection", "protected") else "-"
        ratio = "-" if scenario == "no link" else f"{snr:g}"
        lines.append(
            f"| {scenario} | {jammer} | {ratio} | {mean['accuracy']:.3f} ({each}) | {mean['clean']:.3f} / {mean['over']:.3f} |"
        )
    return "\n".join(lines)


def figure(found: list[dict[str, Any]], path: Path) -> None:
    """Accuracy over the signal-to-noise ratio, a panel a jammer: mean and range over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(1, len(JAMMERS), figsize=(9, 3.4), sharey=True, layout="constrained")
    for ax, kind in zip(axes, JAMMERS):
        for scenario in SCENARIOS:
            own = kind if scenario in ("no protection", "protected") else JAMMERS[0]
            points = []
            for snr in SNRS:
                at = SNRS[-1] if scenario == "no link" else snr
                y = [r["accuracy"] for r in found if (r["scenario"], r["jammer"], r["snr"]) == (scenario, own, at)]
                points += [(snr, sum(y) / len(y), min(y), max(y))] if y else []
            x, mean, low, high = zip(*points)
            (line,) = ax.plot(x, mean, marker="o", label=scenario)
            ax.fill_between(x, low, high, alpha=0.15, color=line.get_color())
        ax.set(title=f"jammer: {kind}", xlabel="signal-to-noise ratio, dB", ylim=(-0.03, 1.03))
    axes[0].set_ylabel("held-out accuracy, clean channel")
    axes[0].legend()
    fig.savefig(path, dpi=80)
    plt.close(fig)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("split_federated.png"))
    given = parser.parse_args()
    everything = study(given.seeds, given.out.with_suffix(".jsonl"))
    print(table(everything))
    figure(everything, given.out)
