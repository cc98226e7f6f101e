"""``unift train --dry-run``: the resolved settings, the batch arithmetic, a memory estimate and the hint schedule."""

from __future__ import annotations

import json
from pathlib import Path

from unift.config import needs
from unift.config.identity import to_yaml
from unift.config.sections import Config
from unift.config.stages import stages
from unift.hints import schedules
from unift.model.load import locate


def describe(config: Config, folder: Path) -> str:
    """Text for people. Reads the model's config.json at most; loads no weights and no rows."""
    parts = [to_yaml(config).rstrip(), f"run folder: {folder}", *_batches(config), _memory(config)]
    return "\n".join([*parts, *_schedule(config)])


def _batches(config: Config) -> list[str]:
    lines = []
    for stage in stages(config):
        s = stage.rules
        g, n, u = s.sample.completions, s.train.prompts, s.train.updates
        sequences = n * max(g, 1)
        lines.append(
            f"steps {stage.start + 1}-{stage.stop} ({s.method}): {n} prompts x {g} completions = {sequences} sequences a step, "
            f"{u} update{'s' if u > 1 else ''} of {sequences // u}; {stage.total * u} updates in all"
        )
    return lines


def _memory(config: Config) -> str:
    """Weights, gradients and AdamW state exactly, from the shapes in config.json; activations as a rough bound."""
    path = locate(config.model.path) / "config.json"
    if not path.is_file():
        return "memory: not estimated (no config.json beside the model)"
    c = json.loads(path.read_text())
    width, layers, vocab = c.get("hidden_size"), c.get("num_hidden_layers"), c.get("vocab_size")
    if not (width and layers and vocab):
        return "memory: not estimated (config.json has no hidden_size, num_hidden_layers or vocab_size)"
    heads = c.get("num_attention_heads", 1)
    kv = c.get("num_key_value_heads") or heads
    inner = c.get("intermediate_size", 4 * width)
    head = c.get("head_dim") or width // heads
    parameters = layers * (width * head * (2 * heads + 2 * kv) + 3 * width * inner + 2 * width) + vocab * width
    if not c.get("tie_word_embeddings", False):
        parameters += vocab * width
    size = {"float32": 4, "bfloat16": 2, "float64": 8}[config.model.dtype]
    trained = parameters * size * 4 if config.model.lora is None else parameters * size
    copied = any(needs.reference(stage.rules) for stage in stages(config))
    reference = parameters * size if copied and config.model.lora is None else 0
    activations = config.train.token_budget * layers * (10 * width + 3 * inner) * size
    gib = 2**30
    return (
        f"memory: {parameters / 1e6:.1f} M parameters; weights, gradients and AdamW {trained / gib:.2f} GiB, "
        f"reference {reference / gib:.2f} GiB, activations of a full micro-batch up to about {activations / gib:.2f} GiB "
        f"(train.token_budget={config.train.token_budget} lowers it)"
    )


def _schedule(config: Config) -> list[str]:
    lines = ["mean share of a 5-step solution shown:"]
    for stage in stages(config):
        n = stage.total
        marks = sorted({0, n // 10, n // 5, n // 4, n // 2, 3 * n // 5, 3 * n // 4, n - 1})
        for step in marks:
            share = schedules.expected_share(stage.rules.show, step, n)
            if share is None:
                lines.append(f"  step {stage.start + step + 1:>6} depends on each row's success")
                continue
            lines.append(f"  step {stage.start + step + 1:>6} {'#' * round(30 * share):<30} {100 * share:5.1f} %")
    return lines
