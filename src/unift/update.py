"""One optimizer batch: packs in, one step of the optimizer out. The gradient is a plain sum over micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from unift import critic, inputs, objectives, processes, words
from unift.config import Rules, Train
from unift.packs import COMPLETION, Item, PackedBatch, cut, pack
from unift.policy import Policy, logprobs
from unift.types import NonFiniteError
from unift.weights import weigh


def learning_rate(train: Train, step: int, steps: int) -> float:
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
                if inputs.active(rules):
                    packs[-1:] = inputs.perturbed(policy, packs[-1], [part[i] for i in items_of_pack], rules)
        updates.append(packs)
    for number, packs in enumerate(updates):
        with torch.no_grad():
            if number > 0 or rules.train.epochs > 1:
                packs[:] = [replace(p, old_S=logprobs(policy, p, rules.sample.temperature)[0].double()) for p in packs]
            if reference is not None:
                packs[:] = reference_logprobs(reference, packs)
    return updates * rules.train.epochs


def apply(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    packs: Sequence[PackedBatch],
    rules: Rules,
    lr: float,
    measure: bool,
    dump: Path,
) -> dict[str, float]:
    """One optimizer step, or none where the gradient is longer than train.skip_norm. ``measure``: take both streams'
    gradients apart and log their norms and cosine.

    Raises NonFiniteError, with the packs saved under ``dump``, before anything non-finite reaches the weights.
    """
    parameters = policy.parameters()
    optimizer.zero_grad(set_to_none=True)
    streams: dict[str, list[Tensor]] = {
        name: [torch.zeros_like(p) for p in parameters] for name in (("policy", "likelihood") if measure else ())
    }
    totals = dict.fromkeys(("policy", "likelihood", "kl", "value"), 0.0)
    entropy = tokens = clipped_low = clipped_high = gap = 0.0
    worst_gap = 0.0
    for batch in packs:
        if policy.critic is None:
            l_S, entropy_S = logprobs(policy, batch, rules.sample.temperature)
        else:
            l_S, entropy_S, v_S = critic.logprobs_and_values(policy, batch, rules.sample.temperature)
        with_entropy = entropy_S if rules.policy.entropy or rules.policy.off_policy_top < 1 else None
        kl = rules.reference
        losses = objectives.losses(l_S, with_entropy, batch, rules.policy, kl.estimator, rules.likelihood, kl.clamp)
        if policy.critic is not None:
            losses["value"] = rules.credit.value_weight * critic.value_loss(v_S, batch, rules.credit.value_clip)
            losses["policy"] = losses["policy"] + losses["value"]
        loss = losses["policy"] + losses["likelihood"]
        if not torch.isfinite(loss):
            _stop(f"the loss is {loss.item()}", packs, dump)
        if measure:
            for name, buffers in streams.items():
                parts = torch.autograd.grad(losses[name], parameters, retain_graph=name == "policy", allow_unused=True)
                for buffer, part in zip(buffers, parts, strict=True):
                    if part is not None:
                        buffer += part
        else:
            loss.backward()
        for name in totals:
            totals[name] += float(losses[name].detach()) if name in losses else 0.0
        with torch.no_grad():
            own = batch.role_S == COMPLETION
            n = float(own.sum())
            if n:
                tokens += n
                entropy += float(entropy_S[own].sum())
                if batch.old_S is None:
                    drift = (l_S[own] - batch.sampler_S[own]).abs()
                    gap += float(drift.sum())
                    worst_gap = max(worst_gap, float(drift.max()))
                else:
                    ratio, a = torch.exp(l_S[own] - batch.old_S[own]), batch.advantage_S[own]
                    clipped_low += float(((ratio < 1 - rules.policy.low) & (a < 0)).sum())
                    clipped_high += float(((ratio > 1 + rules.policy.high) & (a > 0)).sum())
    # First the numbers, over gloo, which has a deadline: whoever starts to sum gradients knows that all are there.
    what = "the losses of an update"
    forwarded, supervised = sum(policy.tokens_forwarded(b) for b in packs), sum(len(b.target_S) for b in packs)
    names = list(totals)
    counts = (tokens, entropy, clipped_low, clipped_high, gap, forwarded, supervised)
    summed = processes.sums(what, [*counts, *totals.values()])
    tokens, entropy, clipped_low, clipped_high, gap, forwarded, supervised = summed[: len(counts)]
    totals = dict(zip(names, summed[len(counts) :], strict=True))
    worst_gap = max(processes.gather(what, worst_gap))
    if measure:
        for name, buffers in streams.items():
            processes.add_up(f"the gradients of the {name} stream", buffers)
        for p, a, b in zip(parameters, streams["policy"], streams["likelihood"], strict=True):
            p.grad = a + b
    for p in parameters:  # an update without any loss is still a step of the optimizer
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if not measure:
        processes.add_up("the gradients", [p.grad for p in parameters if p.grad is not None])
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, rules.train.clip_norm or math.inf))
    if not math.isfinite(norm):
        bad = next(n for n, p in policy.named_parameters() if p.grad is not None and not p.grad.isfinite().all())
        _stop(f"the gradient of {bad} is not finite", packs, dump)
    for group in optimizer.param_groups:
        group["lr"] = lr
    skipped = rules.train.skip_norm is not None and norm > rules.train.skip_norm
    if not skipped:
        optimizer.step()
    seen = max(tokens, 1.0)
    metrics = {
        "loss": totals["policy"] + totals["likelihood"],
        "loss/policy": totals["policy"],
        "loss/hint": totals["likelihood"],
        "grad/norm": norm,
        "lr": lr,
        "tokens/forwarded": float(forwarded),
        "tokens/supervised": float(supervised),
    }
    if rules.train.skip_norm is not None:
        metrics["grad/skipped"] = float(skipped)
    if rules.sample.completions:
        metrics["entropy"] = entropy / seen
        metrics["sampling/sampling_logp_difference/mean"] = gap / seen
        metrics["sampling/sampling_logp_difference/max"] = worst_gap
        metrics["clip_ratio/low_mean"], metrics["clip_ratio/high_mean"] = clipped_low / seen, clipped_high / seen
        if rules.reference.kl and not words.INTOS[rules.reference.into].reward:
            metrics["kl"] = totals["kl"] / rules.reference.kl
    if policy.critic is not None:
        metrics["loss/value"] = totals["value"]
    if measure:
        a, b = (torch.cat([x.flatten() for x in streams[n]]).double() for n in ("policy", "likelihood"))
        metrics["grad/policy_norm"], metrics["grad/hint_norm"] = float(a.norm()), float(b.norm())
        product = float(a.norm() * b.norm())
        metrics["grad/cosine"] = float(a @ b) / product if product else 0.0
    return metrics


def _stop(what: str, packs: Sequence[PackedBatch], dump: Path) -> None:
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
