"""Tiny random models with a vision tower, their processors, and rows with pictures."""

from __future__ import annotations

import io
import re

import numpy as np
import torch

IDEFICS_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for line in message['content'] %}"
    "{% if line['type'] == 'text' %}{{ line['text'] }}{% else %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def letters(*special, eos="</s>", named=None):
    """One token a character; ``special`` are tokens of their own, some of them ``named`` as attributes."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    marks = ["<pad>", "</s>", "<unk>", *special]
    alphabet = [chr(i) for i in range(32, 127)] + ["\n"]
    backend = Tokenizer(models.WordLevel({t: i for i, t in enumerate(marks + alphabet)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(marks)
    how = {"extra_special_tokens": named} if named else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token="<pad>", unk_token="<unk>", **how)


def idefics3(kind="idefics3", **trunk):
    """(model, processor): pictures of 32 pixels, 4 tokens each, never split. ``trunk``: settings of the text model."""
    import transformers as t

    tokenizer = letters("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<|im_start|>")
    images = t.Idefics3ImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False
    )
    processor = t.Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=IDEFICS_TEMPLATE)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = size | {"image_size": 32, "patch_size": 8, "initializer_range": 0.1}
    config, made = {
        "idefics3": (t.Idefics3Config, t.Idefics3ForConditionalGeneration),
        "smolvlm": (t.SmolVLMConfig, t.SmolVLMForConditionalGeneration),
    }[kind]
    settings = config(
        text_config=text("llama", tokenizer, **trunk),
        vision_config=vision,
        scale_factor=2,
        image_token_id=processor.image_token_id,
        tie_word_embeddings=False,
    )
    return made(settings), processor


SIDE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SQUARE = SIDE | {"image_size": 32, "patch_size": 8}
CHAT = ("<|im_start|>", "<|im_end|>")


def text(kind, tokenizer, **more):
    return {"model_type": kind, "vocab_size": len(tokenizer), **TEXT, **more}


def unread(name, images, tokenizer, template, **attributes):
    """A processor of this class that reads no videos: its own beginning asks for torchvision."""
    from importlib import import_module

    import transformers as t

    module, _, kind = name.rpartition(".")
    maker = getattr(import_module(f"transformers.models.{module}"), kind) if module else getattr(t, kind)
    made = maker.__new__(maker)
    made.__dict__ |= {"image_processor": images, "tokenizer": tokenizer, "video_processor": None}
    made.__dict__ |= {"chat_template": template} | attributes
    for name in ("image", "video"):
        if hasattr(made, f"{name}_token"):
            setattr(made, f"{name}_token_id", tokenizer.convert_tokens_to_ids(getattr(made, f"{name}_token")))
    return made


def llava():
    """One token a patch, 16 a picture."""
    import transformers as t

    tokenizer = letters("<image>", *CHAT)
    square = {"height": 32, "width": 32}
    images = t.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=square)
    how = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = t.LlavaProcessor(images, tokenizer, chat_template=plain_template("<image>"), **how)
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**SQUARE, projection_dim=32),
        text_config=text("llama", tokenizer),
        image_token_index=processor.image_token_id,
        image_seq_length=16,
    )
    return t.LlavaForConditionalGeneration(config), processor


def llava_onevision():
    """Pictures in tiles; of a sequence with several pictures each is one tile."""
    import transformers as t

    tokenizer = letters("<image>", "<video>", *CHAT)
    grid = [[32, 32], [32, 64], [64, 32]]
    images = t.LlavaOnevisionImageProcessorPil(size={"height": 32, "width": 32}, image_grid_pinpoints=grid)
    how = {"num_image_tokens": 16, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9"}
    how |= {"image_token": "<image>", "video_token": "<video>"}
    processor = unread("LlavaOnevisionProcessor", images, tokenizer, plain_template("<image>"), **how)
    config = t.LlavaOnevisionConfig(
        vision_config=t.SiglipVisionConfig(**SQUARE, vision_use_head=False),
        text_config=text("qwen2", tokenizer),
        image_token_index=processor.image_token_id,
        video_token_index=processor.video_token_id,
        image_grid_pinpoints=grid,
    )
    return t.LlavaOnevisionForConditionalGeneration(config), processor


def internvl():
    """4 tokens a picture."""
    import transformers as t

    marks = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = letters(*marks.values(), "<video>", *CHAT, named=marks | {"video_token": "<video>"})
    images = t.GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, crop_to_patches=False)
    how = {"image_seq_length": 4, "image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    how |= {"start_image_token": "<img>", "end_image_token": "</img>"}
    how |= {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in marks.items()}
    how["multimodal_pattern"] = re.compile("(?P<image><IMG_CONTEXT>)|(?P<video><video>)")
    processor = unread("InternVLProcessor", images, tokenizer, plain_template("<IMG_CONTEXT>"), **how)
    config = t.InternVLConfig(
        vision_config=t.InternVLVisionConfig(**SIDE, image_size=[32, 32], patch_size=[8, 8]),
        text_config=text("qwen2", tokenizer),
        image_token_id=processor.image_token_id,
        image_seq_length=4,
    )
    return t.InternVLForConditionalGeneration(config), processor


class Lines:
    """What the processor of Pixtral does, which itself needs torchvision: pictures as they are, filled up to the largest, with
    their sizes; 16 pixels a token, and a token at the end of each line."""

    image_token = "[IMG]"

    def __init__(self, tokenizer, image_processor):
        self.tokenizer, self.image_processor, self.chat_template = tokenizer, image_processor, plain_template("[IMG]")
        self.image_token_id = tokenizer.convert_tokens_to_ids("[IMG]")

    def __call__(self, text, images=(), **how):
        flat = [np.asarray(image).astype(np.float32) / 127.5 - 1 for own in images for image in own]
        sizes, texts = [image.shape[:2] for image in flat], []
        left = iter(sizes)
        for line in text:
            head, *rest = line.split("[IMG]")
            for part in rest:
                h, w = next(left)
                lines = [["[IMG]"] * (w // 16) + ["[IMG_BREAK]"]] * (h // 16)
                head += "".join("".join(one) for one in lines).removesuffix("[IMG_BREAK]") + "[IMG_END]" + part
            texts.append(head)
        if not flat:
            return self.tokenizer(texts, **how)
        pixels = np.zeros((len(flat), 3, max(h for h, _ in sizes), max(w for _, w in sizes)), dtype=np.float32)
        for i, image in enumerate(flat):
            pixels[i, :, : image.shape[0], : image.shape[1]] = image.transpose(2, 0, 1)
        found = dict(self.tokenizer(texts, **how))
        return found | {"pixel_values": torch.from_numpy(pixels), "image_sizes": torch.tensor(sizes)}


def mistral3():
    """Pictures of any size, a token every 16 pixels and one at the end of a line."""
    import transformers as t

    tokenizer = letters("[IMG]", "[IMG_BREAK]", "[IMG_END]", *CHAT)
    processor = Lines(tokenizer, t.LlavaImageProcessorPil())
    config = t.Mistral3Config(
        vision_config=t.PixtralVisionConfig(**SIDE, image_size=64, patch_size=8, initializer_range=0.1),
        text_config=text("mistral", tokenizer, sliding_window=None, head_dim=8),
        image_token_index=processor.image_token_id,
        spatial_merge_size=2,
    )
    return t.Mistral3ForConditionalGeneration(config), processor


def qwen(kind):
    """Positions in three dimensions; a token every 16 pixels."""
    import transformers as t

    glm = kind == "glm4v"
    token, video = ("<|image|>", "<|video|>") if glm else ("<|image_pad|>", "<|video_pad|>")
    edges = ("<|begin_of_image|>", "<|end_of_image|>") if glm else ("<|vision_start|>", "<|vision_end|>")
    tokenizer = letters(token, video, *edges, "<|begin_of_video|>", "<|end_of_video|>", *CHAT)
    how = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
    sizes = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    images = (t.Glm4vImageProcessorPil if glm else t.Qwen2VLImageProcessorPil)(size=sizes, **how)
    name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL", "glm4v": "Glm4v"}[kind]
    how = {"image_token": token, "video_token": video, "video_start_id": -1, "video_end_id": -1}
    processor = unread(f"{name}Processor", images, tokenizer, plain_template(edges[0] + token + edges[1]), **how)
    vision = {"depth": 2, "num_heads": 4, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    ids = {"image_token_id": processor.image_token_id, "video_token_id": processor.video_token_id}
    vision |= {
        "qwen2_vl": {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
        "qwen2_5_vl": SIDE | {"out_hidden_size": 32, "window_size": 32, "fullatt_block_indexes": [1]},
        "qwen3_vl": SIDE | {"out_hidden_size": 32, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        "glm4v": SIDE | {"out_hidden_size": 32, "image_size": 64},
    }[kind]
    vision = {k: v for k, v in vision.items() if not k.startswith("num_hidden") and not k.startswith("num_attention")}
    own = {"rope_parameters": rope} | ({"head_dim": 8} if kind == "qwen3_vl" else {})
    config = getattr(t, f"{name}Config")(
        text_config={k: v for k, v in text("", tokenizer, **own).items() if k != "model_type"},
        vision_config=vision,
        **ids,
    )
    return getattr(t, f"{name}ForConditionalGeneration")(config), processor


def gemma3():
    """Attends in both directions over a picture: 4 tokens."""
    import transformers as t

    marks = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = letters(*marks.values(), *CHAT, named=marks)
    images = t.Gemma3ImageProcessorPil(size={"height": 32, "width": 32}, do_pan_and_scan=False)
    processor = t.Gemma3Processor(
        images, tokenizer, image_seq_length=4, chat_template=plain_template("<start_of_image>")
    )
    ids = {name.replace("token", "token_index"): getattr(tokenizer, f"{name}_id") for name in marks}
    config = t.Gemma3Config(
        vision_config=t.SiglipVisionConfig(**SQUARE, vision_use_head=False).to_dict(),
        text_config=text("gemma3_text", tokenizer, head_dim=8, sliding_window=512),
        mm_tokens_per_image=4,
        **ids,
    )
    return t.Gemma3ForConditionalGeneration(config), processor


def paligemma():
    """Attends in both directions over the whole prompt: 16 tokens a picture."""
    import transformers as t

    tokenizer = letters("<image>", "<bos>", *CHAT, named={"image_token": "<image>"})
    tokenizer.bos_token = "<bos>"
    images = t.SiglipImageProcessorPil(size={"height": 32, "width": 32})
    images.image_seq_length = 16
    processor = t.PaliGemmaProcessor(images, tokenizer, chat_template=plain_template("<image>"))
    config = t.PaliGemmaConfig(
        vision_config=t.SiglipVisionConfig(**SQUARE, vision_use_head=False, projection_dim=32).to_dict(),
        text_config=text("gemma", tokenizer, head_dim=8),
        image_token_index=processor.image_token_id,
        projection_dim=32,
        hidden_size=32,
        vocab_size=len(tokenizer),
    )
    return t.PaliGemmaForConditionalGeneration(config), processor


def mllama():
    """Cross attention from the text to tiles of 16 pixels, up to 4 a picture; one mark a picture."""
    import transformers as t

    tokenizer = letters("<|image|>", "<bos>", "<|python_tag|>", *CHAT)
    tokenizer.bos_token = "<bos>"
    images = t.MllamaImageProcessorPil(size={"height": 16, "width": 16}, max_image_tiles=4)
    processor = t.MllamaProcessor(images, tokenizer, chat_template=plain_template("<|image|>"))
    tower = {"hidden_size": 32, "intermediate_size": 48, "attention_heads": 4, "image_size": 16, "patch_size": 8}
    tower |= {"num_hidden_layers": 2, "num_global_layers": 1, "intermediate_layers_indices": [0], "max_num_tiles": 4}
    trunk = {k: v for k, v in text("", tokenizer).items() if k != "model_type"}
    config = t.MllamaConfig(
        vision_config=tower | {"vision_output_dim": 64},
        text_config=trunk
        | {"num_hidden_layers": 3, "cross_attention_layers": [1], "bos_token_id": tokenizer.bos_token_id},
        image_token_index=processor.image_token_id,
    )
    return t.MllamaForConditionalGeneration(config), processor


def plain_template(token):
    """ChatML whose parts of type image are written as ``token``."""
    return QWEN_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", token)


SHARED = {
    "idefics3": idefics3,
    "smolvlm": lambda: idefics3("smolvlm"),
    "llava": llava,
    "llava_onevision": llava_onevision,
    "internvl": internvl,
    "mistral3": mistral3,
    "qwen2_vl": lambda: qwen("qwen2_vl"),
    "qwen2_5_vl": lambda: qwen("qwen2_5_vl"),
    "glm4v": lambda: qwen("glm4v"),
    "qwen3_vl": lambda: qwen("qwen3_vl"),
}
PLAIN = {"gemma3": gemma3, "paligemma": paligemma, "mllama": mllama}
FAMILIES = SHARED | PLAIN


def saved(folder, family="idefics3", seed=0, **settings):
    """The folder of a tiny random model of the family with its processor."""
    torch.manual_seed(seed)
    model, processor = FAMILIES[family](**settings)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def noise(seed, width=32, height=32):
    """A picture that is like no other."""
    from PIL import Image

    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(image):
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()


def rows(n=6, pictures=1):
    """Rows of chat messages with image parts, a solution in steps, and an answer."""
    out = []
    for i in range(n):
        content = [{"type": "image"}] * pictures + [{"type": "text", "text": f"Sum of {i} and 2?"}]
        out.append(
            {
                "prompt": [{"role": "user", "content": content}],
                "images": [noise(10 * i + j) for j in range(pictures)],
                "steps": [f" {i} and 2.", f" So {i + 2}."],
                "answer": str(i + 2),
                "task": "math",
            }
        )
    return out


def policy(family, dtype=torch.float32, forward="auto", seed=0):
    """(policy on the path that fits it, the same model untouched, its processor)."""
    import copy

    from unift.model import attention, paths
    from unift.model.policy import Policy
    from unift.rows import processor as processors

    torch.manual_seed(seed)
    model, processor = FAMILIES[family]()
    model = model.to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():  # what is 0 or 1 at first tests nothing
            p += 0.05 * torch.randn_like(p)
    untouched = copy.deepcopy(model)
    names = (f"{kind}_token_{end}" for kind in ("image", "video") for end in ("id", "index"))
    ids = [getattr(model.config, name) for name in names if isinstance(getattr(model.config, name, None), int)]
    processors.attach(processor.tokenizer, processor, ids)
    attention.register()
    made = Policy(model, processor.tokenizer, torch.device("cpu"))
    paths.choose(made, forward, 256)
    return made, untouched, processor
