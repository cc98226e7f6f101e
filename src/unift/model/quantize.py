"""The frozen weights below LoRA adapters in 4 bits (QLoRA, arXiv 2305.14314), by bitsandbytes: about half a byte a number.

transformers replaces the linear layers inside the decoder by bitsandbytes' own as it reads them; embeddings, head and norms stay in
``model.dtype``, in which the products are made, too: a matrix is unpacked for each. What is saved is dense again (`dense`).
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from unift import processes
from unift.config import launcher
from unift.model.folder import adapter_folder
from unift.types import ConfigError

if TYPE_CHECKING:
    from unift.config.sections import Model

PACKAGE = "bitsandbytes"
DEVICES = ("cuda",)  # where this is offered
# Bytes of a number: 4 bits, a byte of scale for every 64 of them, and a float32 of scale for every 256 of those.
BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


def check(model: Model, device: torch.device) -> None:
    """Raise ConfigError, before weights are read, where ``model.quantize`` cannot be had."""
    if model.quantize is None:
        return
    said = f"model.quantize={model.quantize}"
    if model.lora is None and adapter_folder(model.path) is None:
        raise ConfigError(
            f"{said} keeps the weights in 4 bits, and these cannot be trained: set model.lora=16, or leave model.quantize out"
        )
    if model.dtype == "float64":
        raise ConfigError(
            f"{said} multiplies in float32 or bfloat16, found model.dtype=float64: use model.dtype=bfloat16"
        )
    if model.gguf or model.path.endswith(".gguf"):
        raise ConfigError(f"{said} reads safetensors, found a GGUF file: save the model as a Hugging Face folder first")
    if processes.size() > 1 and launcher.shards(model):
        raise ConfigError(
            f"{said} and model.shard=full do not go together: packed weights are not dealt out. Use model.shard=none, where "
            "every process holds the small base"
        )
    if device.type not in DEVICES:
        raise ConfigError(
            f"{said} needs a CUDA device, found {device.type}: leave model.quantize out, or train where there is a GPU"
        )
    if importlib.util.find_spec(PACKAGE) is None:
        raise ConfigError(
            f"{said} needs {PACKAGE}, which is not installed. Install it with `pip install {PACKAGE}`, or use "
            "model.dtype=bfloat16 without model.quantize"
        )


def arguments(model: Model, device: torch.device) -> dict[str, Any]:
    """What ``from_pretrained`` is told; nothing without ``model.quantize``."""
    if model.quantize is None:
        return {}
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=model.quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, model.dtype),
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def check_layers(model: Any) -> None:
    """Raise ConfigError where the layers that were read are not those that the rest of unift knows how to use."""
    found = packed(model)
    turned = [n for n, layer in found.items() if getattr(layer, "source_cls", nn.Linear) is not nn.Linear]
    if not found or turned or is_packed(model.get_output_embeddings()):
        why = f"{turned[0]} is no nn.Linear" if turned else "its head is in 4 bits" if found else "it has no nn.Linear"
        raise ConfigError(f"model.quantize does not fit {type(model).__name__}: {why}. Leave it out")


def is_packed(layer: nn.Module) -> bool:
    """Does it hold 4-bit weights itself? An adapter around it shows them as its own."""
    return getattr(layer._parameters.get("weight"), "quant_state", None) is not None


def dense(layer: Any) -> Tensor:
    """The matrix that a layer multiplies by, unpacked, in the type of its products, where it is in 4 bits."""
    if not is_packed(layer):
        return layer.weight
    from bitsandbytes.functional import dequantize_4bit  # type: ignore[import-not-found]

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(layer.compute_dtype)


def packed(model: nn.Module) -> dict[str, nn.Module]:
    """The layers in 4 bits by name."""
    return {name: layer for name, layer in model.named_modules() if is_packed(layer)}
