"""The tables of docs/cluster.md: what known models take, by the estimate that `unift train --dry-run` prints."""

from __future__ import annotations

from collections.abc import Mapping

from unift.config.resolve import parse_overrides, resolve
from unift.config.sections import Config
from unift.model import architecture, limits, memory

QWEN = {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}
SHAPES: Mapping[str, Mapping[str, int | bool]] = {  # config.json of Qwen2.5
    "0.5B": QWEN | {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "intermediate_size": 4864},
    "1.5B": QWEN | {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "intermediate_size": 8960},
    "3B": QWEN | {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "intermediate_size": 11008},
    "7B": {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
    },
}
LLAMA = {"head_dim": 64, "num_key_value_heads": 8, "vocab_size": 128256, "intermediate_size": 8192} | {
    "tie_word_embeddings": True
}
MODELS: Mapping[str, Mapping[str, int | bool]] = {  # by name on the Hub; config.json of Llama-3.2
    **{f"Qwen/Qwen2.5-{size}": shapes for size, shapes in SHAPES.items()},
    "meta-llama/Llama-3.2-1B": LLAMA | {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32},
    "meta-llama/Llama-3.2-3B": LLAMA
    | {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128},
}
# Prompt and hint of 512 tokens, 8 completions of 1,024.
LENGTHS = "data.max_prompt=512 sample.max_tokens=1024 sample.completions=8 train.prompts=32 train.token_budget=8192"
HALF = "model.dtype=bfloat16 train.gradient_checkpointing=true"
WAYS: Mapping[str, str] = {
    "full, float32": "model.autocast=all",
    "full, float32, checkpointing": "model.autocast=all train.gradient_checkpointing=true",
    "full, bfloat16, copies, 8-bit": f"{HALF} train.optimizer=adamw_8bit",
    "the same, offload": f"{HALF} train.optimizer=adamw_8bit train.offload_optimizer=true",
    "LoRA, bfloat16": f"{HALF} model.lora=16",
    "LoRA on 4 bits": f"{HALF} model.lora=16 model.quantize=nf4",
}
CARDS = (24, 80)  # GiB
ROOM = 0.9  # of a card, the rest is the allocator's


def built(shapes: Mapping[str, int | bool], config: Config) -> architecture.Architecture:
    found = architecture.from_shapes(shapes, config.model)
    if found is None:
        raise ValueError("the shapes are incomplete")
    return found


def table() -> str:
    """GiB of each part, by model and way; and which cards hold the peak."""
    head = "| model | how | weights | reference | optimizer | gradients | activations | cache | peak | cards |"
    lines = [head, "|---|---|---|---|---|---|---|---|---|---|"]
    for name, shapes in SHAPES.items():
        for way, settings in WAYS.items():
            config = resolve("uft", overrides=parse_overrides(["data.task=lock", *LENGTHS.split(), *settings.split()]))
            work = memory.work_of(config, config)
            m = memory.estimate(built(shapes, config), config.model, config, work, cpu=False)
            fits = [f"{card} GB" for card in CARDS if m.peak <= ROOM * card * 2**30]
            parts = (m.weights, m.reference, m.optimizer, m.gradients, m.activations + m.logits, m.cache, m.peak)
            cells = [f"{part / 2**30:.1f}" for part in parts]
            lines.append(f"| {name} | {way} | {' | '.join(cells)} | {', '.join(fits) or 'several'} |")
    return "\n".join(lines)


def peak(shapes: Mapping[str, int | bool], config: Config, processes: int = 1) -> float:
    """Bytes of the fullest of so many GPUs. With ``model.shard=full`` each holds its part of what stays and of the gradients,
    and all weights while they are gathered for a sampler."""
    work = memory.work_of(config, config)
    made = built(shapes, config)
    m = memory.estimate(made, config.model, config, work, config.log.gradients_every > 0, cpu=False)
    n = processes if config.model.shard == "full" else 1
    whole = limits.BYTES[config.model.dtype] * made.numbers * (1 - 1 / n)
    training = (m.gradients + m.streams) / n + whole / int(shapes["num_hidden_layers"]) + m.activations + m.logits
    return m.process + (m.weights + m.optimizer + m.reference) / n + max(training, whole + m.sampling)


def recipes(found: Mapping[str, tuple[Config, int, int]]) -> str:
    """``found``: by file name, the settings, how many processes train, and GiB of their cards."""
    lines = [
        "| file | model | trained | processes | tokens of a forward | peak, GiB | card |",
        "|---|---|---|---|---|---|---|",
    ]
    for file, (config, processes, card) in found.items():
        shapes = MODELS[config.model.path]
        trained = built(shapes, config).trained
        cells = [f"`{file}`", config.model.path.partition("/")[2], f"{trained / 1e6:,.0f} M", str(processes)]
        cells += [
            f"{memory.work_of(config, config).pack:,}",
            f"{peak(shapes, config, processes) / 2**30:.1f}",
            f"{card} GB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
