"""What a run holds in memory, from the model's architecture and the settings: `unift train --dry-run` and the tables of
docs/cluster.md. Bytes.

Sampling and training do not overlap: on a GPU the peak is the larger one of the two beside what stays. On the CPU it is their
sum, since glibc's heap keeps freed blocks of less than 32 MiB, which seldom fit the other's sizes. Lengths are bounds, taken
from the settings; activations are those of a decoder with gated feed-forward layers (Llama, Qwen, Mistral and their like), and
what a vision tower makes of the pictures is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from unift.config import needs, words
from unift.config.sections import Config, Model, Rules
from unift.model import architecture, limits, quantize
from unift.model.architecture import Architecture
from unift.model.limits import BYTES
from unift.model.logprobs import KEEP, LOGITS

PROCESS = 450 * 2**20  # Python, PyTorch and transformers themselves


@dataclass(frozen=True)
class Work:
    """Lengths of a step, in tokens."""

    pack: int  # of the largest forward
    supervised: int  # of these, tokens with a loss
    rows: int  # completions that are sampled side by side,
    prefix: int  # and of each, prompt and hint
    completion: int
    group: int  # completions of a prompt; 0: none


@dataclass(frozen=True)
class Memory:
    """Bytes. The first four stay; of the others, those of training and those of sampling take turns."""

    process: float
    weights: float
    optimizer: float  # its state, and the float32 copies of bfloat16 weights
    reference: float
    gradients: float
    streams: float  # of both streams' gradients apart, in a step that measures them
    activations: float
    logits: float
    cache: float  # keys and values of prompts and completions
    packed: float  # weights laid out for decoding on the CPU
    kept: bool = False  # the allocator keeps what either frees
    host: float = 0.0  # what offload keeps in the CPU's memory, in none of the sums

    @property
    def training(self) -> float:
        return self.gradients + self.streams + self.activations + self.logits

    @property
    def sampling(self) -> float:
        return self.cache + self.packed

    @property
    def peak(self) -> float:
        turns = (self.training, self.sampling)
        stays = self.process + self.weights + self.optimizer + self.reference
        return stays + (sum(turns) if self.kept else max(turns))

    def text(self) -> str:
        """Its parts, for people."""
        parts = [(f.name, getattr(self, f.name)) for f in fields(self) if f.name not in ("process", "host", "kept")]
        named = ", ".join(f"{name} {size(value)}" for name, value in parts if value)
        host = f"; {size(self.host)} in the CPU's memory besides" if self.host else ""
        return (
            f"{named}; at most about {size(self.peak)} at one time, {size(self.process)} of the process included{host}"
        )


def size(number: float) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"


def work_of(config: Config, rules: Rules, longest: int | None = None) -> Work:
    """The longest step that the settings allow. ``longest``: tokens of the longest prompt with its solution, where rows are known.
    What a server samples takes no memory here."""
    g, completion, prefix = rules.sample.completions, rules.sample.max_tokens, longest or config.data.max_prompt
    prompts = -(-rules.train.prompts // rules.train.updates)
    group = prefix + max(g, 1) * completion if g else prefix
    pack = min(prompts * group, max(rules.train.token_budget, prefix + (completion if g else 0)))
    supervised = pack if not g or needs.demonstrations(rules) else pack - min(pack // group, 1) * prefix
    rows = 0 if config.engine.kind == "vllm" else min(rules.train.prompts * g, limits.ROWS)
    return Work(pack, supervised, rows, prefix, completion, g)


def estimate(
    built: Architecture, model: Model, rules: Rules, work: Work, measured: bool = False, cpu: bool = True
) -> Memory:
    """``measured``: some step measures both streams' gradients. ``cpu``: the model is on the CPU, where decoding rearranges the
    weights (`matmul.packed`) if its products go to oneDNN."""
    shapes, numbers, trained, lora = built.shapes, built.numbers, built.trained, built.adapted
    own = BYTES[model.dtype]
    wide = max(own, 4)  # of what is trained, and of its gradient
    copies = 4 * trained if not lora and own == 2 and rules.train.master_weights else 0
    gradient = own if not lora and not rules.train.master_weights else wide
    state = words.OPTIMIZERS[rules.train.optimizer].state * trained * (wide / 4 if copies or own != 2 or lora else 0.5)
    offloaded = rules.train.offload_optimizer and not cpu
    vocabulary, width = shapes["vocab_size"], shapes["hidden_size"]
    logits = min(LOGITS, work.supervised * vocabulary) * 3 * 4
    if work.supervised * vocabulary <= KEEP:
        logits += 4 * work.supervised * vocabulary
    weights = own * numbers + (4 * trained if lora else 0)
    if model.quantize is not None:  # and one matrix at a time is unpacked
        weights += (quantize.BYTES - own) * built.linear + own * built.largest
    if model.autocast == "all" and own == 4:
        weights += 2 * numbers  # the products' own copies, while a pack is computed
    packs = cpu and work.completion >= 8 and work.rows > 0 and limits.packs()
    return Memory(
        process=PROCESS,
        weights=weights,
        optimizer=0 if offloaded else state + copies,
        reference=own * numbers if needs.reference(rules) and not lora else 0,
        gradients=gradient * trained,
        streams=2 * gradient * trained if measured else 0,
        activations=activations(shapes, model, work, rules.train.gradient_checkpointing),
        logits=logits,
        cache=_cache(shapes, model, work) + 16 * work.rows * vocabulary,
        packed=(2 if model.autocast != "none" else own) * (numbers - vocabulary * width) if packs else 0,
        kept=cpu,
        host=state + max(copies, 4 * trained) if offloaded else 0,
    )


def token_bytes(shapes: Mapping[str, Any], model: Model, checkpointing: bool) -> float:
    """Activations of one more token of a pack."""
    return activations(shapes, model, Work(1, 1, 0, 1, 0, 0), checkpointing)


def activations(shapes: Mapping[str, Any], model: Model, work: Work, checkpointing: bool) -> float:
    """Of a pack: what every layer keeps for its backward pass (a token's inputs of all products, and what norms and attention
    keep), or its input alone and one layer's; and what one layer's backward pass makes."""
    width, inner, layers = shapes["hidden_size"], architecture.inner(shapes), shapes["num_hidden_layers"]
    b, q, kv = BYTES[model.dtype], *architecture.heads(shapes)
    mixed = model.autocast == "all" and b == 4
    products = 2 if mixed else b
    norms = (26 if mixed else 2 * (4 + 2 * b)) * width  # transformers' norms compute in float32
    layer = norms + products * (2 * q + 2 * kv + 4 * inner)
    passing = products * 3 * inner + b * 2 * width
    ends = (4 + 2 * b) * width  # the last norm, and the states that the head reads
    kept = layers * b * width + layer if checkpointing else layers * layer
    return work.pack * (kept + passing + ends)


def _cache(shapes: Mapping[str, Any], model: Model, work: Work) -> float:
    """Keys and values of prompts (one a group) and completions; a block of room that is just being added; the uniforms."""
    if not work.rows:
        return 0.0
    token = shapes["num_hidden_layers"] * 2 * architecture.heads(shapes)[1] * BYTES[model.dtype]
    held = work.rows * work.completion + -(-work.rows // max(work.group, 1)) * work.prefix
    return token * held * (1 + 1 / shapes["num_hidden_layers"]) + 32 * work.rows * work.completion
