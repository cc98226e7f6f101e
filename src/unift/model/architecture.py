"""What a model is made of, before its weights are read: shapes, and how many numbers there are and are trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from unift.config.sections import Lora, Model
from unift.model import load, lora
from unift.model.folder import adapter_settings

SHAPES = ("hidden_size", "num_hidden_layers", "vocab_size", "tie_word_embeddings")
SHAPES += ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
SHAPES += ("num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")


@dataclass(frozen=True)
class Architecture:
    """What a model is made of. ``shapes``: of its text trunk, those of `SHAPES` that it has; the others count numbers, tied
    ones once."""

    shapes: Mapping[str, Any]
    numbers: int
    trained: int
    adapted: bool  # what is trained are adapters
    linear: int  # of all linear layers but the head,
    largest: int  # and of the largest one


def from_shapes(shapes: Mapping[str, Any], model: Model) -> Architecture | None:
    """From the shapes alone, of a decoder; None where one is not given. `of` asks the model's class instead."""
    numbers = parameters(shapes)
    if numbers is None:
        return None
    trained = numbers if model.lora is None else adapters(shapes, model.lora.rank)
    return Architecture(shapes, numbers, trained, model.lora is not None, *linear(shapes))


def parameters(settings: Mapping[str, Any]) -> int | None:
    """Of a decoder with gated feed-forward layers, from its shapes; None where one is not given."""
    width, layers, vocab = (settings.get(n) for n in ("hidden_size", "num_hidden_layers", "vocab_size"))
    if not (width and layers and vocab):
        return None
    layer = sum(rows * columns for rows, columns in _matrices(settings)) + 2 * width
    return layers * layer + vocab * width * (1 if settings.get("tie_word_embeddings", False) else 2)


def adapters(settings: Mapping[str, Any], rank: int) -> int:
    """Numbers of low-rank adapters on every linear layer of the decoder."""
    return settings["num_hidden_layers"] * sum(rank * (rows + columns) for rows, columns in _matrices(settings))


def linear(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Numbers of all linear layers of the decoder, and of the largest one."""
    sizes = [rows * columns for rows, columns in _matrices(settings)]
    return settings["num_hidden_layers"] * sum(sizes), max(sizes)


def _matrices(settings: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(outputs, inputs) of a layer's products: q, k, v, o, gate, up, down."""
    width = settings["hidden_size"]
    q, kv = heads(settings)
    ff = inner(settings)
    return [(q, width), (kv, width), (kv, width), (width, q), (ff, width), (ff, width), (width, ff)]


def heads(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Width of all query heads together, and of all key heads."""
    count = settings.get("num_attention_heads", 1)
    head = settings.get("head_dim") or settings["hidden_size"] // count
    return count * head, (settings.get("num_key_value_heads") or count) * head


def inner(settings: Mapping[str, Any]) -> int:
    """Width of the feed-forward layers that a token passes: of its experts together, where there are some."""
    wide = settings.get("intermediate_size") or 4 * settings["hidden_size"]
    experts = settings.get("num_experts_per_tok")
    if not experts:
        return wide
    return experts * (settings.get("moe_intermediate_size") or wide) + (
        settings.get("shared_expert_intermediate_size") or 0
    )


def of(config: Model) -> Architecture | None:
    """Counted on the model's own class (experts, biases, a vision tower), with its adapters; no weights are read. None where its
    config does not name the shapes of a decoder."""
    model = load.blank(config)
    text = model.config.get_text_config()
    shapes = {name: value for name in SHAPES if (value := getattr(text, name, None)) is not None}
    if parameters(shapes) is None:
        return None
    numbers = sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings()
    products = [m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    continued = adapter_settings(config.path)
    if continued is not None:  # of its shape; what it has learnt has no place here
        own = lora.adapt(model, Lora(rank=continued["r"], targets=continued["target_modules"]))
    else:
        own, _ = load.trained_part(model, config)
    trained = sum(p.numel() for p in own.parameters() if p.requires_grad)
    return Architecture(shapes, numbers, trained, own is not model, sum(products), max(products, default=0))
