"""Whole runs with the processors that transformers itself makes where torchvision is there: saved, found, used and saved again."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import vision_zoo as zoo

import unift
from unift.training.run.metrics import read_metrics


@cache
def missing() -> str:
    """Why torchvision cannot be used; "" where it can. One that does not fit torch raises more than ImportError."""
    try:
        import torchvision  # pyright: ignore  # noqa: F401
    except Exception as error:
        return f"torchvision cannot be imported: {error}"
    return ""


def made(kind):
    """(model, processor) with the class of image processor and of video processor that a released folder names."""
    import transformers as t

    torch.manual_seed(0)
    model, small = zoo.FAMILIES[kind]()
    words, square = {"chat_template": small.chat_template}, {"height": 32, "width": 32}
    if kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"):
        name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL", "glm4v": "Glm4v"}[kind]
        images = t.Glm4vImageProcessor if kind == "glm4v" else t.Qwen2VLImageProcessor
        videos = getattr(t, ("Qwen2VL" if kind == "qwen2_5_vl" else name) + "VideoProcessor")
        how = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
        reader = images(size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64}, **how)
        return model, getattr(t, f"{name}Processor")(reader, small.tokenizer, videos(**how), **words)
    if kind == "llava_onevision":
        reader = t.LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=[[32, 32], [32, 64], [64, 32]])
        words |= {
            "num_image_tokens": 16,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_9",
        }
        videos = t.LlavaOnevisionVideoProcessor(size=square)
        return model, t.LlavaOnevisionProcessor(reader, small.tokenizer, videos, **words)
    if kind == "internvl":
        reader = t.GotOcr2ImageProcessor(size=square, crop_to_patches=False)
        videos = t.InternVLVideoProcessor(size=square)
        return model, t.InternVLProcessor(reader, small.tokenizer, videos, image_seq_length=4, **words)
    if kind == "mistral3":
        reader = t.PixtralImageProcessor(patch_size={"height": 8, "width": 8}, size={"longest_edge": 64})
        words |= {"patch_size": 8, "spatial_merge_size": 2, "image_token": "[IMG]"}
        words |= {"image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
        return model, t.PixtralProcessor(reader, small.tokenizer, **words)
    assert kind == "llava"
    reader = t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square)
    words |= {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return model, t.LlavaProcessor(reader, small.tokenizer, **words)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of transformers and numpy
@pytest.mark.skipif(bool(missing()), reason=missing())
@pytest.mark.parametrize(
    "kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "llava", "llava_onevision", "internvl", "mistral3"]
)
def test_a_run(tmp_path, kind):
    """Sampler and trainer see the same pictures, and what is saved loads with its processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, processor = made(kind)
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    rows = zoo.rows(10, 2)
    small = {"train.steps": 2, "train.prompts": 2, "sample.completions": 3, "sample.max_tokens": 6, "train.lr": 1e-3}
    more = {"eval.max_tokens": 4, "threads": 1}
    unift.train(
        "uft",
        model=tmp_path / "base",
        train=rows[:6],
        test=rows[6:],
        run=tmp_path / "run",
        quiet=True,
        **small,
        **more,
    )
    first, *steps = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert first["forward"] == "shared" and len(steps) == 2
    assert all(step["sampling/sampling_logp_difference/max"] < 1e-5 for step in steps)
    AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "model")
    again = AutoProcessor.from_pretrained(tmp_path / "run" / "model")
    assert type(again) is type(processor) and type(again.image_processor) is type(processor.image_processor)
