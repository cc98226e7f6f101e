"""The gradient of an update: taken pack by pack, summed over the processes, measured and clipped.

Replicas (``model.shard=none``): every process holds all weights and adds up its own packs; then one sum over the processes
(`processes.add_up`). It is not left to DistributedDataParallel, which takes a mean where an update is a sum, needs the same
number of backward passes everywhere, leaves out gradients that torch.autograd.grad takes apart, and has no deadline that
says what it waited for.

Shards (``model.shard=full``): FSDP2 sums each layer's gradient in the backward pass and leaves this process its part. So all
processes make the same number of passes: whoever has fewer packs fills up with packs that carry no loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from unift import processes
from unift.config.sections import Rules
from unift.model.packs import COMPLETION, Item, Member, PackedBatch, pack
from unift.model.policy import Policy
from unift.model.sharding import full, local, sharded
from unift.training.optimizer import no_gradient

Streams = Mapping[str, list[Tensor]]  # of each stream, the gradient of every parameter
STREAMS = ("policy", "likelihood")


def filler(policy: Policy, like: Item, rules: Rules) -> tuple[PackedBatch, Item]:
    """A pack of one token that carries no loss, and its item. The token is one of the prompt that stands for no picture."""
    places = policy.reader.placeholders if policy.reader is not None else ()
    token = [t for t in like.prompt if t not in places][:1] or [0]
    item = Item(token, [], [Member(token, COMPLETION, logps=[0.0])], address=("filler",))
    packed = pack([item], [0], None, rules)
    if packed is None:
        raise ValueError("a pack of one completion holds a loss position")
    return replace(packed, filler=True), item


def missing(policy: Policy, packs: Sequence[int]) -> list[int]:
    """How many fillers each update of a step needs here. ``packs``: how many it has. None where nothing is sharded."""
    if policy.root is None:
        return [0] * len(packs)
    counts = processes.gather("the number of packs", list(packs))
    return [max(column) - own for own, column in zip(packs, zip(*counts, strict=True), strict=True)]


def buffers(parameters: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    return {name: [no_gradient(p) for p in parameters] for name in STREAMS}


def backward(
    parameters: Sequence[Tensor],
    losses: Mapping[str, Tensor],
    outputs: Sequence[Tensor],
    streams: Streams,
) -> None:
    """Add the gradient of a pack: to ``.grad``, or of each stream to its own buffers where there are some.

    parameters: as they are between two passes; in one, whole weights stand in the places of shards. losses: of both
    streams; empty for a filler. outputs: of the pass; where weights are sharded, each takes part in every backward pass, so
    that all processes sum the same gradients in the same order.
    """
    if not any(sharded(p) for p in parameters):
        if streams:
            _apart(losses, streams, parameters)
        elif losses:
            (losses["policy"] + losses["likelihood"]).backward()
        return
    with processes.exchanging("the gradients"):
        if not streams:
            _with_outputs([losses[n] for n in STREAMS if n in losses], outputs, keep=False)
            return
        for name, sums in streams.items():
            _with_outputs([losses[name]] if losses else [], outputs, keep=name == STREAMS[0])
            for total, p in zip(sums, parameters, strict=True):
                if p.grad is not None:
                    total += p.grad
                p.grad = None


def _with_outputs(losses: Sequence[Tensor], outputs: Sequence[Tensor], keep: bool) -> None:
    """Backward from the losses, and from every output with a gradient of zero, which reaches all weights."""
    roots = [*(loss for loss in losses if loss.requires_grad), *outputs]
    starts = [torch.ones_like(r) for r in roots[: len(roots) - len(outputs)]] + [torch.zeros_like(o) for o in outputs]
    torch.autograd.backward(roots, starts, retain_graph=keep)


def _apart(losses: Mapping[str, Tensor], streams: Streams, parameters: Sequence[Tensor]) -> None:
    for name, sums in streams.items():
        parts = torch.autograd.grad(losses[name], parameters, retain_graph=name == STREAMS[0], allow_unused=True)
        for total, part in zip(sums, parts, strict=True):
            if part is not None:
                total += part


def gather(policy: Policy, streams: Streams) -> None:
    """Every parameter's gradient, summed over the processes. An update without any loss is still an optimizer step."""
    parameters = policy.parameters()
    if policy.root is None:
        for name, sums in streams.items():
            processes.add_up(f"the gradients of the {name} stream", sums)
    if streams:
        for p, a, b in zip(parameters, *(streams[name] for name in STREAMS), strict=True):
            p.grad = a + b
    for p in parameters:
        if p.grad is None:
            p.grad = no_gradient(p)
    if policy.root is None and not streams:
        processes.add_up("the gradients", [p.grad for p in parameters if p.grad is not None])


# ---------------------------------------------------------------------------------------------- measuring


def clipped(policy: Policy, limit: float | None) -> tuple[float, str]:
    """(norm of the whole gradient, which is scaled down to ``limit`` where it is larger; what is not finite, or empty)."""
    parameters = policy.parameters()
    with processes.exchanging("the norm of the gradient"):
        total = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = float(full(total))
    if not math.isfinite(norm):  # before the gradient is scaled: an infinite norm would leave 0 to be told about
        return norm, _not_finite(policy, norm)
    torch.nn.utils.clip_grads_with_norm_(parameters, limit or math.inf, total)
    return norm, ""


def _not_finite(policy: Policy, norm: float) -> str:
    """Whose gradient it is; or every entry is finite, and the sum of their squares is not."""
    own = {n: local(p.grad) for n, p in policy.named_parameters() if p.grad is not None and p.numel()}
    bad = [n for part in processes.gather("a gradient that is not finite", _first_bad(own)) for n in part]
    if bad:
        return f"the gradient of {bad[0]} is not finite"
    largest = {n: float(g.abs().max()) for n, g in own.items() if g.numel()}
    found = [m for part in processes.gather("the largest gradient", list(largest.items())) for m in part]
    name, value = max(found, key=lambda pair: pair[1])
    return (
        f"the norm of the gradient is {norm}, though every entry is finite (the largest, {value:.3g}, is of {name}): "
        "a weight of the loss, or a reward, is far too large"
    )


def _first_bad(gradients: Mapping[str, Tensor]) -> list[str]:
    return [n for n, g in gradients.items() if not bool(g.isfinite().all())][:1]


def angle(policy: Policy, streams: Streams) -> dict[str, float]:
    """Norms of both streams' gradients and the cosine between them."""
    if not streams:
        return {}
    squares = [0.0, 0.0, 0.0]  # weight by weight: float64 copies of whole gradients would be the peak of a large model
    for pair in zip(*(streams[name] for name in STREAMS), strict=True):
        a, b = (local(x).flatten().double() for x in pair)
        squares = [total + float(x @ y) for total, (x, y) in zip(squares, ((a, a), (b, b), (a, b)), strict=True)]
    if policy.root is not None:
        squares = processes.sums("the angle of the gradients", squares)
    a_norm, b_norm = math.sqrt(squares[0]), math.sqrt(squares[1])
    cosine = squares[2] / (a_norm * b_norm) if a_norm * b_norm else 0.0
    return {"grad/policy_norm": a_norm, "grad/hint_norm": b_norm, "grad/cosine": cosine}
