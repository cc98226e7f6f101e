"""Activation checkpointing (arXiv 1604.06174): a decoder layer keeps its input alone and is computed again in the backward
pass. Values and gradients stay what they are; the forward is paid for twice.

transformers has the same, but only in training mode, which switches dropout on, and without what surrounds the forward: here
the layout that attention follows and the library that multiplies are those of the first time.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from unift.model import attention, matmul
from unift.types import ConfigError


def use(model: nn.Module, on: bool) -> None:
    """Switch it on or off in every decoder layer of a model, LoRA adapters included. Sampling and whatever else runs without
    gradients is untouched. Raises ConfigError for a model whose layers are not known."""
    found = layers(model)
    if on and not found:
        raise ConfigError(
            f"train.gradient_checkpointing=true: {type(model).__name__} does not say what its layers are. Set it to false and "
            "lower train.token_budget"
        )
    for layer in found:
        if on:
            # A bound method, so that a deep copy of the model gets one of its own layer.
            layer.forward = MethodType(_recomputed, layer)  # type: ignore[method-assign]
        elif isinstance(layer.__dict__.get("forward"), MethodType):
            del layer.__dict__["forward"]


def layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers: what transformers itself would checkpoint, or else what it never splits over devices."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not found:
        names = {str(n) for m in model.modules() for n in getattr(m, "_no_split_modules", None) or ()}
        found = [m for m in model.modules() if type(m).__name__ in names]
    inside = {id(m) for layer in found for m in layer.modules() if m is not layer}
    return [m for m in found if id(m) not in inside]


def _recomputed(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = type(self).forward
    if not torch.is_grad_enabled():
        return forward(self, *args, **kwargs)
    layout = attention.current()
    small = torch.get_float32_matmul_precision() == "highest"

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _AsBefore(layout, small)

    return checkpoint(
        forward, self, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, **kwargs
    )


class _AsBefore(AbstractContextManager[None]):
    """The backward pass runs outside of the forward's contexts, on a GPU in another thread; two streams run it twice."""

    def __init__(self, layout: attention.Layout | None, small: bool) -> None:
        self.layout, self.small = layout, small
        self.entered: list[ExitStack] = []

    def __enter__(self) -> None:
        stack = ExitStack()
        if self.layout is not None:
            stack.enter_context(attention.layout(self.layout))
        stack.enter_context(matmul.small(self.small))
        self.entered.append(stack)

    def __exit__(self, *error: object) -> None:
        self.entered.pop().close()
