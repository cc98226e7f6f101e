"""What a model with a vision tower needs beside its tokens: its class, tensors of pictures, and positions.

The model's own multimodal base puts the pictures' numbers in place of their placeholders; its text trunk alone gets unift's
attention. So a pack holds a prompt with its pictures once for all completions, in sampling and in training.

Positions are those of the text, but for models that place the tokens of a picture in three dimensions (Qwen2-VL and its kin:
time, height, width): the prefix by the model's own rule, and members go on from its largest position.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unift.rows import processor
from unift.types import ConfigError, Shown

TOWER = "vision_config"  # in config.json of a model that takes pictures
CROSS = "cross_attention_mask"  # an argument of a model whose text attends to pictures that are no part of its sequence


def model_class(settings: Any) -> Any:
    """The auto class for a config, or for what stands in config.json."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    known = settings if isinstance(settings, Mapping) else vars(settings)
    return AutoModelForImageTextToText if known.get(TOWER) else AutoModelForCausalLM


def load_reader(tokenizer: Any, folder: Path, settings: Mapping[str, Any]) -> Any:
    """The tokenizer of a model with a vision tower, with its processor attached; as it is where the folder has none.
    ``settings``: its config.json."""
    if not has_processor(folder):
        return tokenizer
    from transformers import AutoProcessor

    try:
        found = AutoProcessor.from_pretrained(str(folder), local_files_only=True)
    except ImportError as error:
        raise ConfigError(f"the processor in {folder} cannot be used: {' '.join(str(error).split())[:200]}") from error
    if getattr(found, "image_processor", None) is None or not hasattr(found, "image_token"):
        return tokenizer
    ids = {settings.get(f"{kind}_token_{end}") for kind in ("image", "video") for end in ("id", "index")}
    processor.attach(found.tokenizer, found, sorted(i for i in ids if isinstance(i, int)))
    return found.tokenizer


def has_processor(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json"))


# ---------------------------------------------------------------------------------------------- attention


def implementation(model: Any) -> str:
    """Name of the attention of the text trunk."""
    return model.config.get_text_config()._attn_implementation


def set_implementation(model: Any, name: str) -> None:
    """Replace the attention of the text trunk; a vision tower keeps its own."""
    text = model.config.get_text_config()
    if text is model.config:
        model.set_attn_implementation(name)
        return
    key = next(key for key in model.config.sub_configs if getattr(model.config, key, None) is text)
    model.set_attn_implementation({key: name})


def configs(model: Any) -> Iterator[Any]:
    """The model's config, and that of its text trunk where it is another."""
    yield model.config
    if model.config.get_text_config() is not model.config:
        yield model.config.get_text_config()


def outside_text(model: Any) -> list[str]:
    """Names of the modules with weights that belong neither to the text trunk nor to the head: tower and connector. ConfigError
    for a model of text."""
    text = model.get_decoder()
    kept = {id(m) for part in (text, model.get_output_embeddings()) for m in part.modules()}
    found = [
        name
        for name, m in model.named_modules()
        if id(m) not in kept and next(m.parameters(recurse=False), None) is not None
    ]
    if not found:
        raise ConfigError(f"model.freeze_vision=true: {type(model).__name__} takes no pictures. Leave the setting out")
    return found


# ---------------------------------------------------------------------------------------------- what a forward is given


@dataclass(frozen=True)
class View:
    """Pictures of a flat row. ``positions``: [3, T], or None where the model counts them in one dimension; ``shift_B``: what
    the positions of each group's members differ by from their place in the sequence."""

    tensors: Mapping[str, Tensor]
    positions: Tensor | None
    shift_B: Tensor

    def for_model(self, positions_T: Tensor) -> dict[str, Any]:
        """Arguments of the forward of a flat row."""
        if self.positions is None:
            return {"position_ids": positions_T[None], **self.tensors}
        return {"position_ids": self.positions[:, None], **self.tensors}


def tensors(model: Any, reader: processor.Reader | None, shown: Sequence[Shown | None]) -> dict[str, Tensor]:
    """What the processor makes of the pictures of several sequences, in the model's precision, as far as the model takes it."""
    if reader is None:
        raise ConfigError("pictures were handed to a model that has no processor")
    known = accepts(model)
    made = reader.tensors(tuple(own.pictures for own in shown if own is not None))
    found = {k: v for k, v in made.items() if k in known and isinstance(v, Tensor)}
    return {k: v.to(model.device, model.dtype if v.is_floating_point() else v.dtype) for k, v in found.items()}


def accepts(model: Any) -> set[str]:
    """Names of the arguments of the model's forward."""
    return set(inspect.signature(model.forward).parameters)


def spatial_rule(model: Any) -> Any:
    """The model's own rule for positions in three dimensions; None where it counts them in one."""
    return getattr(model.base_model, "get_rope_index", None)


def view(
    model: Any,
    reader: processor.Reader | None,
    tokens_T: Tensor,
    positions_T: Tensor,
    spans: Sequence[tuple[range, Sequence[range]]],
    shown: Sequence[Shown | None],
) -> View | None:
    """The view of a flat row whose prefixes show these pictures; None where there are none. ``spans``: of each group, its
    prefix and its members."""
    if reader is None or not any(shown):
        return None
    device, found = tokens_T.device, tensors(model, reader, shown)
    rule = spatial_rule(model)
    if rule is None:
        return View(found, None, torch.zeros(len(spans), dtype=torch.long, device=device))
    positions_3T, shifts, seen = positions_T.expand(3, -1).clone(), [], 0
    for (prefix, own), pictures in zip(spans, shown, strict=True):
        shift = 0
        if pictures is not None:
            at, n = slice(prefix.start, prefix.stop), len(pictures.pictures)
            grids = {k: v[seen : seen + n] for k, v in found.items() if k.endswith("grid_thw")}
            seen += n
            kinds = marks(reader, tokens_T[None, at])
            positions_3T[:, at] = rule(tokens_T[None, at], mm_token_type_ids=kinds, **grids)[0][:, 0]
            shift = int(positions_3T[:, at].max()) + 1 - len(prefix)
        for span in own:
            positions_3T[:, span.start : span.stop] += shift
        shifts.append(shift)
    return View(found, positions_3T, torch.tensor(shifts, device=device))


def marks(reader: processor.Reader, tokens_NL: Tensor) -> Tensor:
    """1 at the placeholders of pictures, 0 elsewhere."""
    ids = torch.tensor(sorted(reader.placeholders), device=tokens_NL.device)
    return torch.isin(tokens_NL, ids).long()


# ---------------------------------------------------------------------------------------------- padded rows


@dataclass(frozen=True)
class Seen:
    """Pictures of padded rows (the plain path): whose they are, and the reader that knows them."""

    reader: processor.Reader
    shown_N: Sequence[Shown | None]

    def select(self, index: Sequence[int]) -> Seen:
        return Seen(self.reader, [self.shown_N[i] for i in index])

    def alike(self, model: Any) -> list[list[int]]:
        """Rows that one forward may take. With cross attention those with as many pictures: transformers lets tokens before a
        picture attend to all of a batch's places for pictures, empty ones too."""
        if CROSS not in accepts(model):
            return [list(range(len(self.shown_N)))]
        counts = [0 if own is None else len(own.pictures) for own in self.shown_N]
        return [[i for i, n in enumerate(counts) if n == count] for count in sorted(set(counts))]

    def arguments(self, model: Any, tokens_NL: Tensor) -> dict[str, Tensor]:
        """Of the model's own forward: tensors, kinds of tokens as its processor gives them, and positions in three dimensions
        [3, N, L] where it has them."""
        if not any(self.shown_N):
            return {}
        found, known = tensors(model, self.reader, self.shown_N), accepts(model)
        kinds = marks(self.reader, tokens_NL)
        rule = spatial_rule(model)
        if rule is not None:
            grids = {k: v for k, v in found.items() if k.endswith("grid_thw")}
            return found | {"position_ids": rule(tokens_NL, mm_token_type_ids=kinds, **grids)[0]}
        if "token_type_ids" in known:
            found["token_type_ids"] = self._types(tokens_NL, kinds)
        return found | {CROSS: crossing(found["aspect_ratio_mask"], kinds)} if CROSS in known else found

    def _types(self, tokens_NL: Tensor, marks_NL: Tensor) -> Tensor:
        """1 at pictures, or, where the processor tells prompt and answer apart instead, 1 behind the prompt."""
        if self.reader.marks_pictures:
            return marks_NL
        prompts = torch.tensor([0 if own is None else own.prompt for own in self.shown_N], device=tokens_NL.device)
        return (torch.arange(tokens_NL.shape[1], device=tokens_NL.device) >= prompts[:, None]).long()


def crossing(tiles_NIC: Tensor, marks_NL: Tensor) -> Tensor:
    """The mask [N, L, I, C] of tokens over I pictures of C tiles: a token sees the last pictures before it whose marks stand side
    by side, as the processor of Mllama has it. ``tiles_NIC``: 1 where a picture has a tile."""
    mask = tiles_NIC.new_zeros(*marks_NL.shape, *tiles_NIC.shape[1:])
    for row, marks_L in enumerate(marks_NL):
        at, end = marks_L.nonzero()[:, 0].tolist(), len(marks_L)
        for i in reversed(range(len(at))):
            if i + 1 < len(at) and at[i + 1] > at[i] + 1:
                end = at[i + 1]
            mask[row, at[i] : end, i] = tiles_NIC[row, i]
    return mask


def seen_by(reader: processor.Reader | None, shown: Sequence[Shown | None]) -> Seen | None:
    """None where there are no pictures."""
    return Seen(reader, shown) if reader is not None and any(shown) else None
