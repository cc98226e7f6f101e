"""Which forward a model gets: the shared-prefix path where it reproduces the model's own logits, else the plain path.

Decided when the model is loaded, from its config and by comparing logits. The text of the comparison is several ragged
groups, so that whatever passes information from one token to the next by another way than attention shows up (a state
space, a convolution), and the hidden states are blown up once, so that a soft cap shows up in an untrained model too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from unift.model import attention, plain, vision
from unift.rows import processor
from unift.types import ConfigError, Shown

if TYPE_CHECKING:
    from unift.model.policy import Policy
# Lengths of the probe's groups: prompt, then what its members forward.
PROBE = ((24, (20, 9)), (17, (13, 1)))
LARGE = 100.0  # size of the blown-up logits


class Misfit(ConfigError):
    """The shared-prefix path does not reproduce this model."""


def choose(policy: Policy, setting: str, longest: float) -> None:
    """Settle the path of a model that was just loaded: its attention is replaced, or ``policy.why_plain`` says why not.

    setting: model.forward (auto, shared, plain). longest: tokens of the longest sequence of the run.
    """
    try:
        _settle(policy, setting, longest)
    except ConfigError:
        _check_finite(policy)  # then no path could be told from another
        raise


def _settle(policy: Policy, setting: str, longest: float) -> None:
    model = policy.model
    if setting != "plain":
        try:
            check_shared(model, policy.device, longest, policy.reader)
            return
        except Misfit as error:
            if setting == "shared":
                raise ConfigError(f"model.forward=shared does not fit: {error}. Use model.forward=auto") from error
            policy.why_plain = str(error)
    else:
        policy.why_plain = "model.forward=plain"
    policy.cached = check_plain(model, policy.device, policy.reader)


@torch.no_grad()
def _check_finite(policy: Policy) -> None:
    """ConfigError where the model's own logits are NaN, with the weight that is."""
    group = _probe(policy.model, policy.device, policy.reader)[0]
    try:
        if not bool(_own(policy.model, group.prompt, group.seen).isnan().any()):
            return
    except Exception:  # which has been told
        return
    name = type(policy.model).__name__
    bad = [n for n, p in policy.model.named_parameters() if p.is_floating_point() and not bool(p.isfinite().all())]
    raise ConfigError(
        f"the weights of {name} are damaged: {bad[0]} holds numbers that are not finite. Fetch or save the model again"
        if bad
        else f"the logits of {name} are NaN though its weights are finite: use model.dtype=float32"
    ) from None


# ---------------------------------------------------------------------------------------------- by the config


def obstacle(model: Any, longest: float) -> str:
    """Why the model's class and config rule the shared-prefix path out; empty where they do not. Needs no weights."""
    if not getattr(model, "_supports_attention_backend", False):
        return "it does not let its attention be replaced"
    if vision.CROSS in vision.accepts(model):
        return "its text attends to pictures by cross attention, which a pack does not have"
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or [])
    other = sorted(kinds - {"full_attention", "sliding_attention"})
    if other:
        return f"it has layers of other kinds ({', '.join(other)})"
    window = getattr(config, "sliding_window", None)
    if window is not None and window < longest and (not kinds or "sliding_attention" in kinds):
        return _cuts(window, longest)
    caps = [f"{name}={value}" for name, value in config.to_dict().items() if "softcap" in name and value is not None]
    return f"it caps its logits softly ({', '.join(sorted(caps))})" if caps else ""


def _cuts(window: int, longest: float) -> str:
    length = f"sequences of up to {longest} tokens" if longest < math.inf else "sequences"
    return f"its attention window of {window} tokens cuts {length} (data.max_prompt + sample.max_tokens)"


# ---------------------------------------------------------------------------------------------- by its logits


@dataclass(frozen=True)
class _Probe:
    """A group: its prompt, its members, and the pictures that the prompt shows where the model takes some."""

    prompt: Tensor
    members: list[Tensor]
    seen: vision.Seen | None = None


def _probe(model: Any, device: torch.device, reader: processor.Reader | None = None) -> list[_Probe]:
    """Ragged groups. Ids with a meaning of their own are left out."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    special: set[int] = set()
    for config in vision.configs(model):
        for name, value in config.to_dict().items():
            if name.endswith(("token_id", "token_index")) and value is not None:
                special |= set(value if isinstance(value, list) else [value])
    usable = np.array([i for i in range(vocabulary) if i not in special])
    rng = np.random.default_rng(0)
    draw = lambda n: torch.from_numpy(rng.choice(usable, n)).to(device)  # noqa: E731
    groups = [_Probe(draw(p), [draw(n) for n in own]) for p, own in PROBE]
    if reader is None:
        return groups
    sizes = ((1, (48, 40)), (2, (32, 64)))  # pictures of each group, and their height and width
    return [_with_pictures(g, reader, n, size, rng) for g, (n, size) in zip(groups, sizes, strict=True)]


def _with_pictures(
    group: _Probe, reader: processor.Reader, n: int, size: tuple[int, int], rng: np.random.Generator
) -> _Probe:
    shown = tuple(processor.noise(rng, size) for _ in range(n))
    ids = reader.tokens(shown)
    prompt = torch.cat([torch.tensor(ids, device=group.prompt.device), group.prompt])
    return _Probe(prompt, group.members, vision.Seen(reader, [Shown(shown, len(prompt))]))


def _own(model: Any, tokens_T: Tensor, seen: vision.Seen | None) -> Tensor:
    more = {} if seen is None else seen.arguments(model, tokens_T[None])
    return model(input_ids=tokens_T[None], use_cache=False, **more).logits[0]


def _differ(got: Tensor, expected: Tensor) -> str:
    """The largest difference, if it is more than rounding; else empty. Relative to the largest logit."""
    full = expected.dtype in (torch.float32, torch.float64)
    got, expected = got.double(), expected.double()
    gap, size = (got - expected).abs().max().item(), expected.abs().max().item()
    return "" if gap <= (1e-3 if full else 0.1) * size else f"{gap:.3g} of {size:.3g}"


@torch.no_grad()
def check_shared(
    model: Any, device: torch.device, longest: float = math.inf, reader: processor.Reader | None = None
) -> None:
    """Replace the model's attention by unift's. Raises Misfit, with the model as it was, if its logits are not its own; with a
    ``reader`` those of prompts with pictures.

    longest: tokens of the longest sequence of the run; inf, the default, takes every attention window for too short.
    """
    name = type(model).__name__
    reason = obstacle(model, longest)
    if reason:
        raise Misfit(f"{name}: {reason}")
    stock = vision.implementation(model)
    try:
        groups = _probe(model, device, reader)
        reason = _head(model, groups[0]) or _packed(model, groups, longest)
    except NotImplementedError as error:
        reason = str(error)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model does that the path does not expect, it is not the path for it
        reason = f"the shared-prefix path does not fit it ({error})"
    if reason:
        vision.set_implementation(model, stock)
        raise Misfit(f"{name}: {reason}")


def _head(model: Any, group: _Probe) -> str:
    """Are the logits the head's matrix times the last hidden states, however large?"""
    tokens_T, seen = group.prompt, group.seen
    more = {} if seen is None else seen.arguments(model, tokens_T[None])
    hidden_TD = model.base_model(input_ids=tokens_T[None], use_cache=False, **more).last_hidden_state[0]
    head = model.get_output_embeddings()
    factor = LARGE / max(_own(model, tokens_T, seen).abs().max().item(), 1e-6)

    met = []

    def enlarge(module: Any, args: Any, output: Any) -> Any:
        met.append(module)
        output.last_hidden_state = output.last_hidden_state * factor
        return output

    handle = model.base_model.register_forward_hook(enlarge)
    try:
        expected_TV = _own(model, tokens_T, seen)
    finally:
        handle.remove()
    if not met:  # its head reads from a part of the trunk (OPT): the comparison of the pack has to do
        return ""
    gap = _differ(torch.nn.functional.linear(hidden_TD * factor, head.weight, head.bias), expected_TV)
    return (
        f"it does more than a product between its last hidden states and its logits (they differ by {gap})"
        if gap
        else ""
    )


def _packed(model: Any, groups: Sequence[_Probe], longest: float) -> str:
    """Does every member of a pack get the logits of a sequence of its own?"""
    from unift.model.attention.packed import make_layout

    device = groups[0].prompt.device
    expected = [[_own(model, torch.cat([g.prompt, m]), g.seen) for m in g.members] for g in groups]
    flat, positions, prefixes, spans, total = [], [], [], [], 0
    for g in groups:
        own = []
        for part, start in [(g.prompt, 0), *((m, len(g.prompt)) for m in g.members)]:
            flat.append(part)
            positions.append(torch.arange(start, start + len(part), device=device))
            own.append(range(total, total + len(part)))
            total += len(part)
        prefixes.append(own[0])
        spans.append(own[1:])
    layout = replace(make_layout(prefixes, spans, total).to(device), longest=longest)
    vision.set_implementation(model, attention.NAME)
    tokens_T, positions_T = torch.cat(flat), torch.cat(positions)
    shown = [None if g.seen is None else g.seen.shown_N[0] for g in groups]
    reader = None if groups[0].seen is None else groups[0].seen.reader
    view = vision.view(model, reader, tokens_T, positions_T, layout.spans, shown)
    more = {"position_ids": positions_T[None]} if view is None else view.for_model(positions_T)
    with attention.layout(layout):
        hidden = model.base_model(input_ids=tokens_T[None], use_cache=False, **more).last_hidden_state[0]
    head = model.get_output_embeddings()
    for prefix, own, truths in zip(prefixes, spans, expected, strict=True):
        for member, truth_TV in zip(own, truths, strict=True):
            at = torch.tensor([*prefix, *member], device=device)
            gap = _differ(torch.nn.functional.linear(hidden[at], head.weight, head.bias), truth_TV)
            if gap:
                return f"logits of the shared-prefix path differ from its own by {gap}"
    return ""


# ---------------------------------------------------------------------------------------------- the plain path


@torch.no_grad()
def check_plain(model: Any, device: torch.device, reader: processor.Reader | None = None) -> bool:
    """Whether the model's own cache gives its own logits. Raises ConfigError if the model is no causal language model
    whose rows may be padded on the right; with a ``reader`` behind prompts with pictures."""
    if getattr(model.config, "rescale_every", 0):
        model.config.rescale_every = 0  # RWKV would divide its weights in place outside of training mode
    first, second = _probe(model, device, reader)
    a, (b, c), d, seen = first.prompt, first.members, second.prompt, first.seen
    name = type(model).__name__
    long_T, short_T = torch.cat([a, b]), torch.cat([a, c])
    try:
        alone = [_own(model, long_T, seen), _own(model, short_T, seen)]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if seen is None:
            raise
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(f"{name} cannot be trained with pictures: {said}") from error
    gap = _differ(_own(model, a, seen), alone[0][: len(a)])
    if gap:
        raise ConfigError(f"{name} is no causal language model: later tokens change its earlier logits by {gap}")
    both = None if seen is None else seen.select([0, 0])
    padded_NLV = plain.forward(model, plain.pad([long_T.tolist(), short_T.tolist()], device, both), seen=both)
    for row_LV, truth_TV in zip(padded_NLV, alone, strict=True):
        gap = _differ(row_LV[: len(truth_TV)], truth_TV)
        if gap:
            raise ConfigError(
                f"{name} cannot be trained: other rows or padding in a batch change a row's logits by {gap}"
            )
    if seen is None:
        return _cache_works(model, long_T, torch.cat([d, a, c])[: len(long_T)])
    return _cache_works(model, long_T, torch.cat([a, b.flip(0)]), both)


def _cache_works(model: Any, one_T: Tensor, two_T: Tensor, seen: vision.Seen | None = None) -> bool:
    """Prefill two rows, repeat and drop rows, append tokens: the same logits as without a cache?"""
    both_2T = torch.stack([one_T, two_T])
    start = both_2T.shape[1] - 3
    cached = plain.Decoder(model, cached=True, seen=seen)
    if cached.name is None:
        return False
    whole = plain.Decoder(model, cached=False, seen=seen)
    try:
        got = [d.start(both_2T[:, :start]) for d in (cached, whole)]
        rows = torch.tensor([1, 0, 1], device=both_2T.device)
        for step, keep in enumerate(([1, 0, 1], [0, 1, 2], [2, 1])):
            index = torch.tensor(keep, device=both_2T.device)
            rows = rows if step == 0 else rows[index]
            for d in (cached, whole):
                d.select(index)
            got += [d.append(both_2T[rows, start + step]) for d in (cached, whole)]
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a cache of another kind: everything works without one, only slower
        return False
    return not any(_differ(x, y) for x, y in zip(got[::2], got[1::2], strict=True))
