"""Low-rank adapters (LoRA, arXiv 2106.09685): put on, read as one weight, merged into copies when a model is saved.

The frozen weights are never written to. An adapter's whole weight is W + (alpha / r) B A (``weight``); whoever multiplies by
a layer's matrix asks for it here, since ``layer.weight`` of a wrapped layer is the frozen part alone.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from unift.model.quantize import dense, packed
from unift.model.sharding import state as state_of
from unift.types import ConfigError

if TYPE_CHECKING:
    from unift.config.sections import Lora


def adapt(model: Any, lora: Lora, without: Sequence[str] = ()) -> nn.Module:
    """``model`` wrapped by peft, its own weights frozen. Where embeddings or head are adapted, the two are untied. ``without``:
    names of layers that get no adapter, whatever the targets say.

    Raises ConfigError where the targets do not fit, or where what would be saved is not what would be trained.
    """
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        target_modules=lora.targets,
        exclude_modules=list(without) or None,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    what = f"model.lora.targets={lora.targets!r} does not fit {type(model).__name__}"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")  # untied below
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # peft sets it layer by layer
            wrapped = get_peft_model(model, settings)
    except ValueError as error:
        raise ConfigError(f"{what}: {error} Name other model.lora.targets") from error
    _untie(model, what)
    return wrapped.eval()


def proceed(model: Any, folder: Path, settings: Mapping[str, Any], lora: Lora | None) -> nn.Module:
    """``model`` with the adapter in ``folder``, which trains on. ``settings``: its adapter_config.json. ``lora``: what the
    user's settings say of adapters. Dropout that the adapter was trained with is off, as everywhere here.

    Raises ConfigError where these contradict the adapter, where it is of a kind that does not train here, or where its file
    lacks layers that its settings name.
    """
    from peft import PeftModel

    _agree(folder, settings, lora)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
            # Layers without numbers of theirs would begin anew, and peft goes on.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            wrapped = PeftModel.from_pretrained(model, str(folder), is_trainable=True, local_files_only=True)
    except Exception as error:  # peft, safetensors and torch have errors of their own
        said = " ".join(str(error).split())[:300] or repr(error)
        raise ConfigError(f"the adapter in {folder} does not fit {type(model).__name__}: {said}") from error
    _untie(model, f"the adapter in {folder}")
    return wrapped.eval()  # peft's new modules are in training mode


# Keys of adapter_config.json that make something else of an adapter than W + (alpha / r) B A on whole layers.
ODD = ("modules_to_save", "use_dora", "rank_pattern", "alpha_pattern", "use_rslora", "lora_bias", "target_parameters")
ODD += ("trainable_token_indices", "layer_replication", "use_qalora", "use_bdlora", "alora_invocation_tokens")
ODD += ("arrow_config", "kasa_config", "monteclora_config", "velora_config")


def _agree(folder: Path, settings: Mapping[str, Any], lora: Lora | None) -> None:
    """ConfigError where an adapter is not plain LoRA, or model.lora sets a value that is not its own."""
    odd = [key for key in ODD if settings.get(key)]
    odd += [f"bias={settings['bias']}"] if settings.get("bias", "none") != "none" else []
    if settings.get("peft_type") != "LORA" or odd:
        kind = ", ".join(odd) or f"peft_type={settings.get('peft_type')}"
        raise ConfigError(
            f"the adapter in {folder} has {kind}: only plain LoRA is continued. Merge it into its model first (merge_and_unload)"
        )
    found = settings.get("target_modules")
    own = {"rank": settings.get("r"), "alpha": settings.get("lora_alpha"), "targets": found}
    for key in sorted(lora.model_fields_set) if lora is not None else ():
        wanted = getattr(lora, key)
        same = set(wanted) == set(found or []) if key == "targets" and isinstance(wanted, list) else wanted == own[key]
        if key == "targets" and wanted == "all-linear":
            continue  # peft writes the layers' names instead
        if not same:
            raise ConfigError(
                f"model.lora.{key}={wanted!r} contradicts the adapter in {folder}, which has {own[key]!r}. Leave model.lora "
                "out: the adapter brings its own"
            )


def save(model: Any, folder: Path, base: str) -> None:
    """The adapters alone, as peft writes them. ``base``: the model that they belong to, as its loader shall name it."""
    from unift.model import sharding

    model.peft_config["default"].base_model_name_or_path = base
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Could not find a config file in"
        )  # peft asks for the vocabulary's size
        model.save_pretrained(folder, state_dict=sharding.state(model), save_embedding_layers=False)


def adapted(model: nn.Module) -> dict[str, Any]:
    """The wrapped layers by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}


def is_adapted(layer: nn.Module) -> bool:
    return hasattr(layer, "base_layer")


def weight(layer: Any) -> Tensor:
    """The matrix that a layer multiplies by, differentiable in the adapters: W + (alpha / r) B A in W's precision, or W
    where there is no adapter or it is switched off. A W in 4 bits is unpacked."""
    if not is_adapted(layer):
        return dense(layer)
    own = frozen = dense(layer.get_base_layer())
    if layer.disable_adapters:
        return frozen
    for name in layer.active_adapters:
        frozen = frozen + layer.get_delta_weight(name)  # bfloat16 + float32 is float32: rounded once, at the end
    return frozen.to(own.dtype)


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """Weights of the model below the adapters, under their own names, with the adapters merged into copies. Weights that
    are tied stay tied, and those in 4 bits are dense."""
    layers = adapted(model)
    frozen = {f"{name}.weight": layer for name, layer in packed(model).items()}
    whole = {f"{name}.base_layer.weight": layer for name, layer in layers.items()}
    made: dict[int, Tensor] = {}  # a layer that stands in several places is merged once
    state = {}
    for name, tensor in state_of(model).items():
        if ".lora_" in name:
            continue
        layer = whole.get(name)
        if layer is not None:
            if id(layer) not in made:
                made[id(layer)] = weight(layer).contiguous()
            tensor = made[id(layer)]
        elif name in frozen:
            tensor = dense(frozen[name])
        state[name.replace(".base_layer.", ".")] = tensor
    return state


# ---------------------------------------------------------------------------------------------- tied weights


def _untie(model: Any, what: str) -> None:
    """Give embeddings and head a weight each where one of them is adapted and they share one. Any other weight that an
    adapted layer shares with another is an error: after merging they differ, and a saved model ties them again."""
    shared: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    for name, layer in adapted(model).items():
        own = layer.get_base_layer()
        holders = {
            id(module): path
            for path, module in model.named_modules()
            if any(p is own.weight for p in module.parameters(recurse=False))
        }
        if len(holders) < 2:
            continue
        bases = [m.get_base_layer() if is_adapted(m) else m for m in (embeddings, head) if m is not None]
        if holders.keys() != {id(m) for m in bases} or not _can_untie(model):
            others = ", ".join(sorted(path for i, path in holders.items() if i != id(own)))
            raise ConfigError(
                f"{what}: {name} shares its weight with {others}, and a saved {type(model).__name__} shares it again, so "
                "that adapters on one of them would be lost or count twice. Leave it out of model.lora.targets"
            )
        bases[1].weight = nn.Parameter(bases[1].weight.detach().clone(), requires_grad=False)
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False


def _can_untie(model: Any) -> bool:
    """Does the class keep a weight for the head when its config says that it is not tied?"""
    config = copy.deepcopy(model.config)
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False
    with torch.device("meta"):
        twin = type(model)(config)
    head = twin.get_output_embeddings()
    ignored = set(getattr(twin, "_keys_to_ignore_on_save", None) or [])
    names = {name for name, p in twin.named_parameters(remove_duplicate=False) if p is head.weight}
    return head.weight is not twin.get_input_embeddings().weight and not names & ignored
