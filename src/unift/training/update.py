"""One optimizer batch: packs in, one step of the optimizer out. The gradient is a plain sum over micro-batches."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

from unift import processes
from unift.config import words
from unift.config.sections import Rules, Train
from unift.model import critic, precision
from unift.model.logprobs import logprobs
from unift.model.packs import COMPLETION, Item, PackedBatch, cut, pack
from unift.model.policy import Policy
from unift.objectives import input_noise
from unift.objectives import loss as objectives
from unift.objectives.weights import weigh
from unift.types import NonFiniteError


def learning_rate(train: Train, step: float, steps: int) -> float:
    """Linear warm-up, then constant, cosine or linear decay to 0 over the phase. ``step`` counts from 0."""
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    done = (step - train.warmup) / max(steps - train.warmup, 1)
    return train.lr * DECAYS[train.decay](done)


DECAYS: Mapping[words.DecayName, Callable[[float], float]] = {  # of the share of the steps after the warm-up
    "constant": lambda done: 1.0,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "linear": lambda done: 1 - done,
}


def make_optimizer(policy: Policy, train: Train) -> torch.optim.Optimizer:
    """AdamW over what is trained. Warns where the weights cannot hold its updates."""
    said = precision.warning(precision.of_model(policy.parameters()), train.lr)
    if said and processes.first():
        warnings.warn(said, RuntimeWarning, stacklevel=2)
    fused = policy.device.type in ("cpu", "cuda")
    return torch.optim.AdamW(
        policy.parameters(), lr=train.lr, betas=train.betas, weight_decay=train.weight_decay, fused=fused
    )


@torch.no_grad()
def reference_logprobs(score: Callable[[PackedBatch], Tensor], packs: Sequence[PackedBatch]) -> list[PackedBatch]:
    return [replace(p, ref_S=score(p).double()) for p in packs]


def prepare(
    policy: Policy, items: Sequence[Item], rules: Rules, reference: Callable[[PackedBatch], Tensor] | None
) -> list[list[PackedBatch]]:
    """Packs of every update of a step: this process's share of the items, weighed over all of them. Log-probs under
    the reference and, from the second update on, under the policy at the start of the step are attached here, without
    gradient and only where they are used."""
    size = len(items) // rules.train.updates
    updates: list[list[PackedBatch]] = []
    for first in range(0, len(items), size):
        part = items[first : first + size]
        weights = weigh(part, rules)
        own = processes.balanced_share([i.tokens_forwarded for i in part])
        packs = []
        for which in cut([part[i] for i in own], rules.train.token_budget):
            items_of_pack = [own[i] for i in which]
            packed = pack(part, items_of_pack, weights, rules)
            if packed is not None:
                packs.append(packed.to(policy.device))
                if input_noise.active(rules):
                    packs[-1:] = input_noise.perturbed(policy, packs[-1], [part[i] for i in items_of_pack], rules)
        updates.append(packs)
    for number, packs in enumerate(updates):
        with torch.no_grad():
            if number > 0 or rules.train.epochs > 1:
                packs[:] = [replace(p, old_S=logprobs(policy, p, rules.sample.temperature)[0].double()) for p in packs]
            if reference is not None:
                packs[:] = reference_logprobs(reference, packs)
    return updates * rules.train.epochs


@dataclass(frozen=True)
class Order:
    """What an update is told: its learning rate, whether to take both streams' gradients apart and measure them, and the
    file that its packs go to if something is not finite."""

    lr: float
    measure: bool
    dump: Path


@dataclass
class Tally:
    """Sums over the packs of an update, and over the processes. Losses of the streams, then numbers of sampled tokens."""

    policy: float = 0.0
    likelihood: float = 0.0
    kl: float = 0.0
    value: float = 0.0
    tokens: float = 0.0
    entropy: float = 0.0
    clipped_low: float = 0.0
    clipped_high: float = 0.0
    gap: float = 0.0  # |log-prob here - log-prob when sampled|
    forwarded: float = 0.0
    supervised: float = 0.0
    worst_gap: float = 0.0  # the largest

    def see(
        self, losses: Mapping[str, Tensor], l_S: Tensor, entropy_S: Tensor, batch: PackedBatch, rules: Rules
    ) -> None:
        for name, loss in losses.items():
            if name != "entropy":
                setattr(self, name, getattr(self, name) + float(loss.detach()))
        own = batch.role_S == COMPLETION
        n = float(own.sum())
        if not n:
            return
        self.tokens += n
        self.entropy += float(entropy_S[own].sum())
        if batch.old_S is None:
            drift = (l_S[own] - batch.sampler_S[own]).abs()
            self.gap += float(drift.sum())
            self.worst_gap = max(self.worst_gap, float(drift.max()))
        else:
            ratio, a = torch.exp(l_S[own] - batch.old_S[own]), batch.advantage_S[own]
            self.clipped_low += float(((ratio < 1 - rules.policy.low) & (a < 0)).sum())
            self.clipped_high += float(((ratio > 1 + rules.policy.high) & (a > 0)).sum())

    def over_processes(self) -> None:
        """Numbers travel over gloo, which has a deadline: whoever goes on to sum gradients knows that all are there."""
        what = "the losses of an update"
        names = [f.name for f in fields(self) if f.name != "worst_gap"]
        for name, total in zip(names, processes.sums(what, [getattr(self, n) for n in names]), strict=True):
            setattr(self, name, total)
        self.worst_gap = max(processes.gather(what, self.worst_gap))


def apply(
    policy: Policy, optimizer: torch.optim.Optimizer, packs: Sequence[PackedBatch], rules: Rules, order: Order
) -> dict[str, float]:
    """One optimizer step, or none where the gradient is longer than train.skip_norm; returns its metrics.

    Raises NonFiniteError, with the packs saved under ``order.dump``, before anything non-finite reaches the weights.
    """
    tally, streams = Tally(), {}
    if order.measure:
        streams = {name: [torch.zeros_like(p) for p in policy.parameters()] for name in ("policy", "likelihood")}
    optimizer.zero_grad(set_to_none=True)
    for batch in packs:
        losses, l_S, entropy_S = losses_of(policy, batch, rules)
        loss = losses["policy"] + losses["likelihood"]
        if not torch.isfinite(loss):
            _stop(f"the loss is {loss.item()}", packs, order.dump)
        if order.measure:
            _backward_apart(losses, streams, policy.parameters())
        else:
            loss.backward()
        with torch.no_grad():
            tally.see(losses, l_S, entropy_S, batch, rules)
    tally.forwarded = sum(policy.tokens_forwarded(b) for b in packs)
    tally.supervised = sum(len(b.target_S) for b in packs)
    tally.over_processes()
    _gather_gradients(policy.parameters(), streams)
    norm = _clipped(policy, rules.train.clip_norm, packs, order.dump)
    for group in optimizer.param_groups:
        group["lr"] = order.lr
    skipped = rules.train.skip_norm is not None and norm > rules.train.skip_norm
    if not skipped:
        optimizer.step()
    told = {"grad/norm": norm, "lr": order.lr} | ({"grad/skipped": float(skipped)} if rules.train.skip_norm else {})
    return _metrics(tally, policy, rules) | told | _angle(streams)


def losses_of(policy: Policy, batch: PackedBatch, rules: Rules) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """(losses of both streams, log-probs [S], entropies [S]); the critic's loss is a part of the policy stream's."""
    v_S = None
    if policy.critic is None:
        l_S, entropy_S = logprobs(policy, batch, rules.sample.temperature)
    else:
        l_S, entropy_S, v_S = critic.logprobs_and_values(policy, batch, rules.sample.temperature)
    with_entropy = entropy_S if rules.policy.entropy or rules.policy.off_policy_top < 1 else None
    kl = rules.reference
    losses = objectives.losses(l_S, with_entropy, batch, rules.policy, kl.estimator, rules.likelihood, kl.clamp)
    if v_S is not None:
        losses["value"] = rules.credit.value_weight * objectives.value_loss(v_S, batch, rules.credit.value_clip)
        losses["policy"] = losses["policy"] + losses["value"]
    return losses, l_S, entropy_S


def _backward_apart(
    losses: Mapping[str, Tensor], streams: Mapping[str, list[Tensor]], parameters: Sequence[Tensor]
) -> None:
    """Add each stream's gradient to its own buffers."""
    for name, buffers in streams.items():
        parts = torch.autograd.grad(losses[name], parameters, retain_graph=name == "policy", allow_unused=True)
        for buffer, part in zip(buffers, parts, strict=True):
            if part is not None:
                buffer += part


def _gather_gradients(parameters: Sequence[nn.Parameter], streams: Mapping[str, list[Tensor]]) -> None:
    """Every parameter's gradient, summed over the processes. An update without any loss is still an optimizer step."""
    for name, buffers in streams.items():
        processes.add_up(f"the gradients of the {name} stream", buffers)
    if streams:
        for p, a, b in zip(parameters, streams["policy"], streams["likelihood"], strict=True):
            p.grad = a + b
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if not streams:
        processes.add_up("the gradients", [p.grad for p in parameters if p.grad is not None])


def _clipped(policy: Policy, limit: float | None, packs: Sequence[PackedBatch], dump: Path) -> float:
    """Norm of the whole gradient, which is scaled down to ``limit`` where it is larger."""
    norm = float(torch.nn.utils.clip_grad_norm_(policy.parameters(), limit or math.inf))
    if not math.isfinite(norm):
        bad = [n for n, p in policy.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        what = f"the gradient of {bad[0]} is not finite" if bad else _overflow(policy, norm)
        _stop(what, packs, dump)
    return norm


def _overflow(policy: Policy, norm: float) -> str:
    """Every entry is finite, and the sum of their squares is not."""
    largest = {n: float(p.grad.abs().max()) for n, p in policy.named_parameters() if p.grad is not None and p.numel()}
    name = max(largest, key=lambda n: largest[n])
    return (
        f"the norm of the gradient is {norm}, though every entry is finite (the largest, {largest[name]:.3g}, is of {name}): "
        "a weight of the loss, or a reward, is far too large"
    )


def _metrics(tally: Tally, policy: Policy, rules: Rules) -> dict[str, float]:
    seen = max(tally.tokens, 1.0)
    metrics = {
        "loss": tally.policy + tally.likelihood,
        "loss/policy": tally.policy,
        "loss/hint": tally.likelihood,
        "tokens/forwarded": float(tally.forwarded),
        "tokens/supervised": float(tally.supervised),
    }
    if rules.sample.completions:
        metrics["entropy"] = tally.entropy / seen
        metrics["sampling/sampling_logp_difference/mean"] = tally.gap / seen
        metrics["sampling/sampling_logp_difference/max"] = tally.worst_gap
        metrics["clip_ratio/low_mean"] = tally.clipped_low / seen
        metrics["clip_ratio/high_mean"] = tally.clipped_high / seen
        if rules.reference.kl and not words.INTOS[rules.reference.into].reward:
            metrics["kl"] = tally.kl / rules.reference.kl
    if policy.critic is not None:
        metrics["loss/value"] = tally.value
    return metrics


def _angle(streams: Mapping[str, list[Tensor]]) -> dict[str, float]:
    """Norms of both streams' gradients and the cosine between them."""
    if not streams:
        return {}
    a, b = (torch.cat([x.flatten() for x in streams[n]]).double() for n in ("policy", "likelihood"))
    product = float(a.norm() * b.norm())
    cosine = float(a @ b) / product if product else 0.0
    return {"grad/policy_norm": float(a.norm()), "grad/hint_norm": float(b.norm()), "grad/cosine": cosine}


def _stop(what: str, packs: Sequence[PackedBatch], dump: Path) -> NoReturn:
    try:
        dump.parent.mkdir(parents=True, exist_ok=True)
        torch.save([{k: v for k, v in vars(p).items() if isinstance(v, Tensor)} for p in packs], dump)
        where = f"the batch is in {dump}"
    except (OSError, RuntimeError) as error:  # a full disk must not hide what happened
        where = f"the batch could not be saved in {dump} ({error})"
    raise NonFiniteError(
        f"{what}. The run stops before this reaches the weights; {where}. What was saved before is good: lower "
        "train.lr, or look at the batch"
    )
