"""An estimate, on paper, of how long a step takes on GPUs: operations over a share of their rate, bytes over a share of their
bandwidth. `python benchmarks/estimate.py` prints it for other assumptions; nothing here is measured.

A step is, one after the other: sampling, weights to the server, training, the rest. Training costs 2 operations a weight and
token for each forward pass, and twice that for a backward pass. A decode round reads all weights and the keys and values of all
running completions once, or is bound by its operations where those take longer, plus a fixed time for launching and scheduling.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from unift.commands.doctor.sizes import MODELS
from unift.model import architecture
from unift.types import ConfigError


@dataclass(frozen=True)
class Machine:
    """Of one GPU unless said otherwise. Rates of an H100 SXM by NVIDIA's data sheet (bfloat16, dense); shares of them, and
    everything below, are assumptions."""

    operations: float = 989e12  # a second
    bandwidth: float = 3.35e12  # bytes a second
    train_share: float = 0.35  # of the operations, in training (MFU)
    prefill_share: float = 0.40  # of the operations, in prompts and in decode rounds that are bound by them
    decode_share: float = 0.50  # of the bandwidth, in decode rounds
    round_seconds: float = 0.006  # of a decode round beside its products
    running: int = 256  # completions that decode side by side
    link_near: float = 150e9  # bytes a second of an all-reduce inside a node of 8,
    link_far: float = 25e9  # and across nodes
    disk: float = 2e9  # bytes a second: weights written for the server, and read by it
    other_seconds: float = 3.0  # of a step: scores, rows, logs


@dataclass(frozen=True)
class Batch:
    """A step. Lengths in tokens, means but for ``longest``; the defaults are the paper's sizes (arXiv 2505.16984) with
    lengths that are assumed."""

    prompts: int = 256
    group: int = 4
    updates: int = 4
    prefix: int = 300  # prompt and hint
    completion: int = 500
    longest: int = 1024  # of a step's completions
    reference: bool = True  # a KL needs its forward pass
    checkpointing: bool = True


@dataclass(frozen=True)
class Step:
    """Seconds."""

    sampling: float
    sync: float
    training: float
    other: float
    sampled: int  # tokens

    @property
    def seconds(self) -> float:
        return self.sampling + self.sync + self.training + self.other

    @property
    def tokens_per_second(self) -> float:
        return self.sampled / self.seconds


LOW = Machine(train_share=0.20, prefill_share=0.25, decode_share=0.30, round_seconds=0.012, link_near=75e9, link_far=10e9,
              disk=0.5e9, other_seconds=8.0)  # fmt: skip
HIGH = Machine(train_share=0.50, prefill_share=0.55, decode_share=0.70, round_seconds=0.003, link_near=300e9, link_far=50e9,
               disk=5e9, other_seconds=1.0)  # fmt: skip


def numbers(shapes: Mapping[str, Any]) -> int:
    """All of the model. Raises ConfigError where a shape is missing."""
    found = architecture.parameters(shapes)
    if found is None:
        raise ConfigError("config.json has no hidden_size, num_hidden_layers or vocab_size: nothing to estimate from")
    return found


def weights(shapes: Mapping[str, Any]) -> tuple[int, int]:
    """Numbers of the layers, and of the head."""
    head = shapes["vocab_size"] * shapes["hidden_size"]
    return numbers(shapes) - head * (1 if shapes.get("tie_word_embeddings", False) else 2), head


def group_operations(shapes: Mapping[str, Any], batch: Batch) -> float:
    """Of one group in a step. The prefix is forwarded once a group, the head at completions alone; causal halves of attention
    are counted. Forwards: for the gradient, for log-probs before the first of several updates, for the reference; a backward
    pass counts as two, and one more forward with checkpointing."""
    layers, head = weights(shapes)
    p, r, g = batch.prefix, batch.completion, batch.group
    pairs = p * p / 2 + g * (r * p + r * r / 2)
    forward = 2 * layers * (p + g * r) + 2 * head * g * r
    forward += 4 * shapes["num_hidden_layers"] * architecture.heads(shapes)[0] * pairs
    return forward * (3 + (batch.updates > 1) + batch.reference + batch.checkpointing)


def training_seconds(shapes: Mapping[str, Any], batch: Batch, machine: Machine, gpus: int) -> float:
    """The process with most groups decides; then gradients (float32) are summed in a ring, once an update."""
    busiest = ceil(batch.prompts / batch.updates / gpus)
    work = batch.updates * busiest * group_operations(shapes, batch) / (machine.operations * machine.train_share)
    link = machine.link_near if gpus <= 8 else machine.link_far
    return work + batch.updates * 2 * (gpus - 1) / gpus * 4 * numbers(shapes) / link


def sampling_seconds(shapes: Mapping[str, Any], batch: Batch, machine: Machine, gpus: int) -> float:
    """Each GPU holds a copy of the model (bfloat16) and its share of the groups."""
    layers, head = weights(shapes)
    groups = ceil(batch.prompts / gpus)
    completions = groups * batch.group
    rows = min(completions, machine.running)
    rounds = completions * batch.completion / rows + batch.longest - batch.completion
    cached = 2 * 2 * shapes["num_hidden_layers"] * architecture.heads(shapes)[1]  # bytes of a token's keys and values
    read = 2 * (layers + head) + rows * (batch.prefix + batch.completion / 2) * cached
    multiplied = 2 * (layers + head) * rows / (machine.operations * machine.prefill_share)
    one = max(read / (machine.bandwidth * machine.decode_share), multiplied) + machine.round_seconds
    return rounds * one + groups * 2 * layers * batch.prefix / (machine.operations * machine.prefill_share)


def step(shapes: Mapping[str, Any], batch: Batch, machine: Machine, gpus: int, serving: int) -> Step:
    """``serving`` of the GPUs run the server while the others wait, and wait while the others train; 0: all do both in turn,
    with the engine of the process, and no weights travel."""
    sync = 2 * 2 * numbers(shapes) / machine.disk if serving else 0.0
    return Step(
        sampling_seconds(shapes, batch, machine, serving or gpus),
        sync,
        training_seconds(shapes, batch, machine, gpus - serving),
        machine.other_seconds,
        batch.prompts * batch.group * batch.completion,
    )


def best_share(shapes: Mapping[str, Any], batch: Batch, machine: Machine, gpus: int) -> int:
    """GPUs for the server with which a step is shortest; 0 for one GPU alone. At most 8: one server, one node."""
    if gpus == 1:
        return 0
    return min(range(1, min(gpus, 9)), key=lambda n: step(shapes, batch, machine, gpus, n).seconds)


SIZES = ((1, 0), (8, 2), (64, 8))  # GPUs, and how many of them sample: the recipes, and eight nodes


def table(batch: Batch | None = None, machines: tuple[Machine, Machine, Machine] = (LOW, Machine(), HIGH)) -> str:
    """Of every model of the paper: the middle assumptions, and the two ends in brackets. ``machines``: slow, middle, fast."""
    batch = batch or Batch()
    head = "| model | H100 | of them vLLM | sampling, s | weights, s | training, s | a step, s |"
    lines = [f"{head} sampled tokens/s | hours for 100 steps |", "|---|---|---|---|---|---|---|---|---|"]
    for name, shapes in MODELS.items():
        if name.endswith("7B"):  # none of the paper's
            continue
        for gpus, serving in SIZES:
            slow, middle, fast = (step(shapes, batch, machine, gpus, serving) for machine in machines)
            hours = [s.seconds / 36 for s in (middle, fast, slow)]
            cells = [
                name.partition("/")[2],
                str(gpus),
                str(serving) if serving else "-",
                *(f"{x:.0f}" for x in (middle.sampling, middle.sync, middle.training, middle.seconds)),
                f"{round(middle.tokens_per_second, -2):,.0f} [{round(slow.tokens_per_second, -2):,.0f}, "
                f"{round(fast.tokens_per_second, -2):,.0f}]",
                f"{hours[0]:.1f} [{hours[1]:.1f}, {hours[2]:.1f}]",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def assumptions() -> str:
    """The three machines side by side."""
    lines = ["| of one H100 | low | middle | high |", "|---|---|---|---|"]
    words = {
        "train_share": "share of 989 TFLOP/s (bfloat16, dense) in training",
        "prefill_share": "the same in prompts and decode rounds",
        "decode_share": "share of 3.35 TB/s in decode rounds",
        "round_seconds": "seconds of a decode round beside its products",
        "link_near": "bytes/s of an all-reduce, up to 8 GPUs",
        "link_far": "the same across nodes",
        "disk": "bytes/s of weights written, and read, for the server",
        "other_seconds": "seconds of a step for scores, rows, logs",
    }
    for key, text in words.items():
        lines.append(f"| {text} | " + " | ".join(f"{getattr(m, key):g}" for m in (LOW, Machine(), HIGH)) + " |")
    return "\n".join(lines)
