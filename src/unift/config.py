"""Every setting, typed and validated. Unknown key = error that names the nearest one.

Layers, later ones win: the defaults below <- preset of the method <- recipe (a tuned task) <- YAML file <- ``key=value``.
What results is written to the run folder as ``config.yaml`` and is itself a valid config file.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from unift.types import ConfigError

Norm = Literal[
    "token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm", "microbatch_token_mean"
]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Show(Section):
    """How much of the solution is revealed before the model speaks."""

    schedule: Literal["none", "all", "cosine", "constant", "uniform", "staircase"] = "none"
    high: float = Field(default=0.95, ge=0, le=1, description="p at the first step (cosine), or p throughout (constant)")
    low: float = Field(default=0.05, ge=0, le=1, description="p at the last hinted step (cosine)")
    until: float = Field(default=0.6, ge=0, le=1, description="share of the steps with hints (cosine, staircase); then none")
    draw: Literal["binomial", "rounded"] = Field(default="binomial", description="k ~ Binomial(cuts, p), or k = round(cuts * p)")
    cuts: int = Field(default=5, ge=1, description="the solution is cut into at most this many pieces")


class SampleFrom(Section):
    """How many completions of each prompt+hint the policy samples."""

    completions: int = Field(default=8, ge=0, description="G; 0 = none (supervised)")
    temperature: float = Field(default=1.0, gt=0, description="divides the logits when sampling and in every log-prob")
    max_tokens: int = Field(default=64, ge=1, description="length limit of a completion, tokens")


class Credit(Section):
    """What each completion is worth: scores of a group -> advantages."""

    baseline: Literal["group_mean", "leave_one_out", "none"] = "group_mean"
    scale: Literal["sample_std", "population_std", "none"] = "sample_std"
    epsilon: float = Field(default=1e-6, ge=0)


class Policy(Section):
    """How the completions push their log-probs."""

    loss: Literal["clip", "reinforce"] = "clip"
    low: float = Field(default=0.2, ge=0, description="ratio is clipped below 1 - low")
    high: float = Field(default=0.2, ge=0, description="ratio is clipped above 1 + high")
    dual_clip: float | None = Field(default=None, gt=1, description="cap of the ratio where the advantage is negative")
    norm: Norm = "token_mean"
    entropy: float = Field(default=0.0, ge=0, description="weight of the entropy bonus on completions")


class Likelihood(Section):
    """How the solution's tokens push their log-probs."""

    tokens: Literal["none", "hint", "demo"] = Field(default="none", description="the revealed steps, or the whole solution + EOS")
    rule: Literal["nll"] = "nll"
    weight: float = Field(default=0.0, ge=0)
    norm: Norm = "token_mean"


class Reference(Section):
    """The pull towards the model that the phase began with, on completions only."""

    kl: float = Field(default=0.0, ge=0)
    estimator: Literal["k2", "k3"] = "k3"


class Train(Section):
    steps: int = Field(default=500, ge=1)
    prompts: int = Field(default=32, ge=1, description="prompts a step (rows, not completions)")
    updates: int = Field(default=1, ge=1, description="optimizer updates a step; must divide prompts")
    lr: float = Field(default=1e-6, gt=0)
    decay: Literal["constant", "cosine", "linear"] = "constant"
    warmup: int = Field(default=0, ge=0, description="steps of linear warm-up")
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(default=0.0, ge=0)
    clip_norm: float | None = Field(default=1.0, gt=0, description="of the whole gradient; null = no clipping")
    token_budget: int = Field(default=16384, ge=1, description="padded tokens of one forward; changes memory, not the update")
    micro_prompts: int | None = Field(default=None, ge=1, description="prompts of a micro-batch (microbatch_token_mean only)")


class Phase(Section):
    """One stretch of a run with its own method (SFT, then RFT). The optimizer and the KL reference start anew."""

    method: str
    share: float = Field(gt=0, le=1, description="of train.steps")
    show: Show = Show()
    sample: SampleFrom = SampleFrom()
    credit: Credit = Credit()
    policy: Policy = Policy()
    likelihood: Likelihood = Likelihood()
    reference: Reference = Reference()
    train: Train = Train()


class Lora(Section):
    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32, gt=0)
    targets: str | list[str] = "all-linear"


class Model(Section):
    path: str = Field(default="embedded:lock", description="folder, or embedded:NAME for a base inside the package")
    gguf: str | None = Field(default=None, description="GGUF file inside the folder")
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    device: str = "auto"
    autocast: Literal["none", "sample", "all"] = Field(
        default="none", description="products in bfloat16 (weights stay float32): nowhere, in sampling, in sampling and training"
    )
    lora: Lora | None = None


class Data(Section):
    task: str | None = Field(default=None, description="built-in generator: countdown, knights, lock")
    options: dict[str, Any] = Field(default_factory=dict, description="of the generator")
    train: str | None = Field(default=None, description="file of rows, or hf:owner/name")
    test: str | None = None
    format: str = "auto"
    train_rows: int | None = Field(default=None, ge=1)
    test_rows: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, description="of the generator and of the split; apart from the run's seed")
    max_prompt: int = Field(default=2048, ge=1, description="tokens of prompt + whole solution; a longer row is an error")


class Reward(Section):
    function: str = Field(default="auto", description="auto (the row's task), a task's name, module:function or file.py:function")
    format_score: float = Field(default=0.0, description="for a parsable wrong answer")
    rule: Literal["unift", "paper"] = "unift"
    workers: int = Field(default=1, ge=1)
    timeout: float = Field(default=5.0, gt=0, description="seconds for one completion")
    error_rate: float = Field(default=0.1, ge=0, le=1, description="of failed scores above which the run stops")
    memory_mb: int | None = None


class Eval(Section):
    every: int = Field(default=50, ge=0, description="steps; 0 = only at the end")
    rows: int | None = Field(default=None, ge=1, description="first so many rows of the test split")
    samples: int = Field(default=0, ge=0, description="sampled completions a row for pass@k at the end; 0 = greedy only")
    max_tokens: int | None = Field(default=None, ge=1, description="default: sample.max_tokens")


class Save(Section):
    every: int = Field(default=50, ge=0, description="steps between checkpoints; 0 = only at the end")
    keep: int = Field(default=2, ge=1, description="last so many are kept, and the best")
    rollouts: bool = True


class Log(Section):
    gradients_every: int = Field(default=10, ge=0, description="steps between measurements of both streams' gradients; 0 = never")
    trackers: list[str] = Field(default_factory=list, description="wandb, tensorboard, trackio (through accelerate)")


class Config(Section):
    method: str = "uft"
    seed: int = 0
    run: str | None = Field(default=None, description="run folder; default runs/<method>-<hash>")
    threads: int | None = Field(default=None, ge=1, description="of torch; default: all cores")
    baselines: list[str] = Field(default_factory=list, description="methods trained beside this one for comparison")
    model: Model = Model()
    data: Data = Data()
    reward: Reward = Reward()
    show: Show = Show()
    sample: SampleFrom = SampleFrom()
    credit: Credit = Credit()
    policy: Policy = Policy()
    likelihood: Likelihood = Likelihood()
    reference: Reference = Reference()
    train: Train = Train()
    phases: list[Phase] = Field(default_factory=list)
    eval: Eval = Eval()
    save: Save = Save()
    log: Log = Log()


METHOD_SECTIONS = ("show", "sample", "credit", "policy", "likelihood", "reference", "train")
# A continued run may change these: they do not touch the numbers.
FREE_KEYS = ("run", "save", "log", "baselines", "reward.workers", "reward.timeout", "reward.error_rate", "threads")


# ---------------------------------------------------------------------------------------------- files in the package


def _names(folder: str) -> list[str]:
    return sorted(f.name[:-5] for f in (resources.files("unift") / folder).iterdir() if f.name.endswith(".yaml"))


def preset_names() -> list[str]:
    return _names("presets")


def recipe_names() -> list[str]:
    return _names("recipes")


def _packaged(folder: str, name: str, kind: str) -> str:
    names = _names(folder)
    if name not in names:
        raise ConfigError(f"unknown {kind} {name!r}{_nearest(name, names)}. Known: {', '.join(names)}.")
    return (resources.files("unift") / folder / f"{name}.yaml").read_text(encoding="utf-8")


def preset_text(name: str) -> str:
    return _packaged("presets", name, "method")


def recipe_text(name: str) -> str:
    return _packaged("recipes", name, "recipe")


# ---------------------------------------------------------------------------------------------- resolving the layers


def _nearest(word: str, words: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        old = merged.get(name)
        both = isinstance(value, Mapping) and isinstance(old, Mapping)
        merged[name] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _nested(dotted: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in dotted.items():
        *path, last = name.split(".")
        node: dict[str, Any] = {last: value}
        for part in reversed(path):
            node = {part: node}
        tree = _merge(tree, node)
    return tree


def parse_overrides(items: Iterable[str]) -> dict[str, Any]:
    """``["train.lr=1e-6", "model.path=/m"]`` -> nested dict. Values are read as YAML."""
    dotted = {}
    for item in items:
        name, sign, value = item.partition("=")
        if not sign or not name.strip():
            raise ConfigError(f"cannot read the setting {item!r}: expected key=value, as in train.lr=1e-6")
        try:
            dotted[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"cannot read the value of {name.strip()!r} as YAML: {value!r}") from error
    return _nested(dotted)


def _yaml_mapping(text: str, source: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: expected a mapping of settings, found {type(tree).__name__}")
    return tree


def read_yaml(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config file {str(path)!r} does not exist")
    return _yaml_mapping(path.read_text(encoding="utf-8"), str(path))


def _method_layers(method: str, recipe: Mapping[str, Any], user: Mapping[str, Any]) -> dict[str, Any]:
    tree = _yaml_mapping(preset_text(method), f"preset {method}")
    common = {name: value for name, value in recipe.items() if name != "methods"}
    own = (recipe.get("methods") or {}).get(method, {})
    for layer in (common, own, user):
        tree = _merge(tree, layer)
    return tree


def resolve(
    method: str | None = None,
    *,
    recipe: str | None = None,
    file: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Config:
    """Merge the layers and validate. Raises ConfigError with the key, what was found and the nearest name."""
    user = _merge(file or {}, overrides or {})
    method = str(method or user.get("method") or "uft")
    packaged = _yaml_mapping(recipe_text(recipe), f"recipe {recipe}") if recipe else {}
    tree = _method_layers(method, packaged, user) | {"method": method}
    phases = []
    for phase in tree.get("phases") or []:
        if not isinstance(phase, Mapping) or "method" not in phase:
            raise ConfigError(f"phases: each needs a method and a share, found {phase!r}")
        # A phase inherits the method's own sections; what the phase itself sets wins over all.
        layers = _method_layers(phase["method"], packaged, user)
        sections = {name: layers[name] for name in METHOD_SECTIONS if name in layers}
        phases.append(_merge(sections, phase))
    config = validate(tree | {"phases": phases})
    check(config)
    return config


def validate(tree: Mapping[str, Any]) -> Config:
    try:
        return Config.model_validate(dict(tree))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(item) for item in error.errors())) from None


def _fields_at(path: list[Any]) -> list[str]:
    """Names of the settings below a path such as ["train"]."""
    model: Any = Config
    for part in path:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if model is None:
            return []
    return list(model.model_fields)


def _explain(item: Any) -> str:
    path = list(item["loc"])
    name = ".".join(str(part) for part in path)
    if item["type"] == "extra_forbidden":
        known = _fields_at(path[:-1])
        everywhere = [f"{section}.{field}" for section in Config.model_fields for field in _fields_at([section])]
        hint = _nearest(str(path[-1]), known) or _nearest(name, everywhere)
        return f"unknown setting {name!r}{hint}"
    return f"setting {name!r}: {item['msg'].lower()}; found {item['input']!r}"


def check(config: Config) -> None:
    """Numbers that must fit each other, before anything is loaded."""
    spans = plan(config)
    for _, _, phase in spans:
        train, sample = phase.train, phase.sample
        if train.prompts % train.updates:
            raise ConfigError(
                f"train.prompts={train.prompts} does not divide into train.updates={train.updates} equal updates; "
                f"use a multiple of {train.updates}"
            )
        norms = (phase.policy.norm, phase.likelihood.norm)
        if "microbatch_token_mean" in norms:
            if train.micro_prompts is None:
                raise ConfigError("norm microbatch_token_mean needs train.micro_prompts (prompts of a micro-batch)")
            if (train.prompts // train.updates) % train.micro_prompts:
                raise ConfigError(
                    f"train.micro_prompts={train.micro_prompts} does not divide the "
                    f"{train.prompts // train.updates} prompts of an update"
                )
        if sample.completions == 1 and phase.credit.baseline != "none":
            raise ConfigError(
                f"sample.completions=1 leaves baseline {phase.credit.baseline!r} nothing to compare with: every "
                "advantage would be 0. Use 2 or more, or credit.baseline=none"
            )
        if sample.completions == 0 and (phase.likelihood.tokens == "none" or phase.likelihood.weight == 0):
            raise ConfigError(
                "nothing to learn from: sample.completions=0 and no likelihood. Set likelihood.tokens and "
                "likelihood.weight, or sample completions"
            )
        if phase.show.low > phase.show.high:
            raise ConfigError(f"show.low={phase.show.low} is above show.high={phase.show.high}")
    if config.data.task and config.data.train:
        raise ConfigError("data.task (generated rows) and data.train (a file) are both set; keep one")
    if not (config.data.task or config.data.train):
        raise ConfigError("no rows: set data.train=FILE, or data.task to a built-in task, or use --recipe")


def plan(config: Config) -> list[tuple[int, int, Config | Phase]]:
    """The run as spans (first step, last step + 1, settings). Steps count from 0. One span unless there are phases."""
    if not config.phases:
        return [(0, config.train.steps, config)]
    shares = sum(phase.share for phase in config.phases)
    if abs(shares - 1) > 1e-3:
        raise ConfigError(f"the shares of the phases add up to {shares:g}, expected 1")
    spans, done, start = [], 0.0, 0
    for phase in config.phases:
        done += phase.share
        stop = round(config.train.steps * done / shares)
        if stop <= start:
            raise ConfigError(f"phase {phase.method!r} would have no step of train.steps={config.train.steps}")
        spans.append((start, stop, phase))
        start = stop
    return spans


# ---------------------------------------------------------------------------------------------- identity of a run


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}.{name}" if prefix else name)
    return flat


def numeric_settings(config: Config) -> dict[str, Any]:
    """The settings that decide the numbers, flat: {"train.lr": 1e-6, ...}."""
    flat = _flat(config.model_dump(mode="json"))
    return {k: v for k, v in flat.items() if not any(k == free or k.startswith(free + ".") for free in FREE_KEYS)}


def config_hash(config: Config) -> str:
    text = json.dumps(numeric_settings(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def differences(old: Config, new: Config) -> list[str]:
    """Lines "train.lr: 1e-06 -> 1e-05" for each numeric setting that differs."""
    a, b = numeric_settings(old), numeric_settings(new)
    return [f"{k}: {a.get(k)!r} -> {b.get(k)!r}" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
