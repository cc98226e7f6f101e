"""One optimizer batch: packs in, one step of the optimizer out. The gradient is a plain sum over micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from unift import processes
from unift.config import needs, words
from unift.config.sections import Engine, Rules, Train
from unift.model import critic
from unift.model.divide import divide
from unift.model.logprobs import logprobs
from unift.model.packs import COMPLETION, Item, PackedBatch, cut, pack
from unift.model.policy import Policy
from unift.objectives import input_noise
from unift.objectives import loss as objectives
from unift.objectives.weights import weigh
from unift.training import gradients, sampler_gap
from unift.training.optimizer import set_rate
from unift.types import NonFiniteError


def learning_rate(train: Train, step: float, steps: int) -> float:
    """Linear warm-up, then constant, cosine or linear decay to 0 over the phase. ``step`` counts from 0, and not by whole
    ones with train.budget."""
    if step < train.warmup:
        return min(train.lr * (step + 1) / train.warmup, train.lr)
    done = (step - train.warmup) / max(steps - train.warmup, 1)
    return train.lr * DECAYS[train.decay](done)


DECAYS: Mapping[words.DecayName, Callable[[float], float]] = {  # of the share of the steps after the warm-up
    "constant": lambda done: 1.0,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "linear": lambda done: 1 - done,
}


@torch.no_grad()
def reference_logprobs(score: Callable[[PackedBatch], Tensor], packs: Sequence[PackedBatch]) -> list[PackedBatch]:
    return [replace(p, ref_S=score(p).double()) for p in packs]


def prepare(
    policy: Policy, items: Sequence[Item], rules: Rules, reference: Callable[[PackedBatch], Tensor] | None
) -> list[list[PackedBatch]]:
    """Packs of every update of a step: this process's share of the items, weighed over all of them. Log-probs under
    the reference and, from the second update on, under the policy at the start of the step are attached here, without
    gradient and only where they are used: the latter by ratios, and to compare with the sampler."""
    reference = reference if needs.reference_logps(rules) else None
    old = needs.old(rules) or (needs.completions(rules) and words.LOSSES[rules.policy.loss].pushes)
    size = len(items) // rules.train.updates
    updates: list[list[tuple[PackedBatch, list[Item]]]] = []
    for first in range(0, len(items), size):
        batch = items[first : first + size]
        parts = divide(batch, weigh(batch, rules), rules)
        part, weights = [p.item for p in parts], [p.weights for p in parts if p.weights is not None]
        own = processes.balanced_share([i.tokens_forwarded for i in part])
        whiches = [[own[i] for i in which] for which in cut([part[i] for i in own], rules.train.token_budget, rules)]
        packed = [(pack(part, which, weights, rules), [part[i] for i in which]) for which in whiches]
        updates.append([(p, of) for p, of in packed if p is not None])
    for packs, n in zip(updates, gradients.missing(policy, [len(packs) for packs in updates]), strict=True):
        packs += [gradients.filler(policy, items[0], rules)] * n
    ready = [_with_inputs(policy, packs, rules, reference) for packs in updates]
    for number, packs in enumerate(ready):
        with torch.no_grad():
            if old and (number > 0 or rules.train.epochs > 1):
                packs[:] = [replace(p, old_S=logprobs(policy, p, rules.sample.temperature)[0].double()) for p in packs]
            if reference is not None:
                packs[:] = reference_logprobs(reference, packs)
    return ready * rules.train.epochs


def _with_inputs(
    policy: Policy,
    packs: Sequence[tuple[PackedBatch, list[Item]]],
    rules: Rules,
    reference: Callable[[PackedBatch], Tensor] | None,
) -> list[PackedBatch]:
    """The packs on the policy's device, with what is done to their input embeddings."""
    moved = [p.to(policy.device) for p, _ in packs]
    if not needs.changed_inputs(rules):
        return moved
    if reference is not None and not words.NOISES[rules.inputs.noise].drawn:  # the loss whose gradient is the noise
        moved = reference_logprobs(reference, moved)
    pairs = zip(moved, packs, strict=True)
    return [made for p, (_, items) in pairs for made in input_noise.perturbed(policy, p, items, rules)]


@dataclass(frozen=True)
class Order:
    """What an update is told: its learning rate, whether to take both streams' gradients apart and measure them, the file
    that its packs go to if something is not finite, and what to do where sampler and trainer differ."""

    lr: float
    measure: bool
    dump: Path
    engine: Engine = Engine()


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
    gap: float = 0.0  # |log-prob at the start of the step - log-prob when sampled|
    importance: float = 0.0  # weights of sampled tokens, where engine.gap corrects
    forwarded: float = 0.0
    supervised: float = 0.0
    worst_gap: float = 0.0  # the largest

    def see(self, losses: Mapping[str, Tensor], l_S: Tensor, entropy_S: Tensor, batch: PackedBatch) -> None:
        for name, loss in losses.items():
            if name != "entropy":
                setattr(self, name, getattr(self, name) + float(loss.detach()))
        own = batch.role_S == COMPLETION
        n = float(own.sum())
        if not n:
            return
        self.tokens += n
        self.entropy += float(entropy_S[own].sum())
        start_S = l_S if batch.old_S is None else batch.old_S
        drift = (start_S[own] - batch.sampler_S[own]).abs()
        self.gap += float(drift.sum())
        self.worst_gap = max(self.worst_gap, float(drift.max()))

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
    tally, wrong, parameters = Tally(), "", policy.parameters()
    streams = gradients.buffers(parameters) if order.measure else {}
    optimizer.zero_grad(set_to_none=True)
    for batch in packs:
        l_S, entropy_S, v_S = outputs_of(policy, batch, rules)
        losses = {} if batch.filler else losses_of(l_S, entropy_S, v_S, batch, rules, order.engine)
        loss = sum(float(losses[n].detach()) for n in gradients.STREAMS if losses)
        wrong = wrong or ("" if math.isfinite(loss) else f"the loss is {loss}")
        gradients.backward(parameters, losses, [l_S] if v_S is None else [l_S, v_S], streams)
        if losses:
            with torch.no_grad():
                tally.see(losses, l_S, entropy_S, batch)
    real = [b for b in packs if not b.filler]
    tally.forwarded = sum(policy.tokens_forwarded(b) for b in real)
    tally.supervised = sum(len(b.target_S) for b in real)
    _judge(processes.gather("the losses of an update", wrong), packs, order.dump)
    tally.over_processes()
    sampler_gap.check(tally.gap / max(tally.tokens, 1.0), order.engine)
    gradients.gather(policy, streams)
    norm, wrong = gradients.clipped(policy, rules.train.clip_norm)
    if wrong:
        _stop(wrong, packs, order.dump)
    set_rate(optimizer, order.lr)
    skipped = rules.train.skip_norm is not None and norm > rules.train.skip_norm
    if not skipped:
        optimizer.step()
    told = {"grad/norm": norm, "lr": order.lr} | ({"grad/skipped": float(skipped)} if rules.train.skip_norm else {})
    return _metrics(tally, policy, rules) | told | gradients.angle(policy, streams)


def outputs_of(policy: Policy, batch: PackedBatch, rules: Rules) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probs, entropies and, with a critic, values [S] of a pack, from one forward pass."""
    if policy.critic is None:
        return *logprobs(policy, batch, rules.sample.temperature), None
    return critic.logprobs_and_values(policy, batch, rules.sample.temperature)


def losses_of(
    l_S: Tensor, entropy_S: Tensor, v_S: Tensor | None, batch: PackedBatch, rules: Rules, engine: Engine
) -> dict[str, Tensor]:
    """Losses of both streams; the critic's loss is a part of the policy stream's. With them what else is summed up."""
    with_entropy = entropy_S if rules.policy.entropy or rules.policy.off_policy_top < 1 else None
    weighed, told = sampler_gap.corrected(batch, l_S, rules.policy.loss, engine)
    losses = objectives.losses(l_S, with_entropy, weighed, rules)
    if v_S is not None:
        losses["value"] = rules.credit.value_weight * objectives.value_loss(v_S, batch, rules.credit.value_clip)
        losses["policy"] = losses["policy"] + losses["value"]
    return losses | told | _clipped(l_S, weighed, rules)


@torch.no_grad()
def _clipped(l_S: Tensor, batch: PackedBatch, rules: Rules) -> dict[str, Tensor]:
    """Numbers of sampled tokens whose ratio, or whose completion's (gspo), is beyond the clip, where there is one."""
    if batch.old_S is None or not words.LOSSES[rules.policy.loss].clips:
        return {}
    own_S = batch.role_S == COMPLETION
    ratio, a = objectives.ratios(l_S, batch, rules.policy)[own_S], batch.advantage_S[own_S]
    low, high = (ratio < 1 - rules.policy.low) & (a < 0), (ratio > 1 + rules.policy.high) & (a > 0)
    return {"clipped_low": low.sum(), "clipped_high": high.sum()}


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
        if tally.importance:
            metrics["sampling/importance_sampling_ratio/mean"] = tally.importance / seen
        metrics["clip_ratio/low_mean"] = tally.clipped_low / seen
        metrics["clip_ratio/high_mean"] = tally.clipped_high / seen
        if rules.reference.kl and not words.INTOS[rules.reference.into].reward:
            metrics["kl"] = tally.kl / rules.reference.kl
    if policy.critic is not None:
        metrics["loss/value"] = tally.value
    return metrics


def _judge(wrong: Sequence[str], packs: Sequence[PackedBatch], dump: Path) -> None:
    """Stop every process once one of them says that its loss is not finite. ``wrong``: what each says, or nothing."""
    own = wrong[processes.rank()]
    for number, what in enumerate(wrong):
        if what:
            _stop(own or f"{what} in process {number}", packs, dump)


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
