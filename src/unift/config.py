"""Every setting, typed and validated. Unknown key = error that names the nearest one.

Layers, later ones win: the defaults below <- preset of the method <- recipe (a tuned task) <- YAML file <- ``key=value``.
What results is written to the run folder as ``config.yaml`` and is itself a valid config file.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError

from unift.settings import (
    Credit,
    Data,
    Eval,
    Inputs,
    Likelihood,
    Log,
    Lora,
    Model,
    Phase,
    PolicyStream,
    Reward,
    Rules,
    Save,
    Show,
    Train,
)
from unift.types import ConfigError
from unift.words import ANNEALINGS, BASELINES, LOSSES, NORMS, SCHEDULES, SOURCES, TOKENS

__all__ = [
    "Config", "Credit", "Inputs", "Likelihood", "Lora", "Model", "Moment", "Phase", "PolicyStream", "Rules", "Show",
    "Stage", "Train", "check", "evaluation_tokens", "longest", "stages",
    "config_hash", "differences", "numeric_settings", "parse_overrides", "preset_names", "preset_text", "read_yaml",
    "recipe_names", "recipe_text", "resolve", "to_yaml", "validate",
]  # fmt: skip


class Config(Rules):
    method: str = "uft"  # pyright: ignore[reportIncompatibleVariableOverride]
    seed: int = 0
    run: str | None = Field(default=None, description="run folder; default runs/<method>-<hash>")
    threads: int | None = Field(default=None, ge=1, description="of torch; default: all cores")
    baselines: list[str] = Field(default_factory=list, description="methods trained beside this one for comparison")
    model: Model = Model()
    data: Data = Data()
    reward: Reward = Reward()
    phases: list[Phase] = Field(default_factory=list)
    eval: Eval = Eval()
    save: Save = Save()
    log: Log = Log()


METHOD_SECTIONS = tuple(name for name in Rules.model_fields if name != "method")
# A continued run may change these: they do not touch the numbers.
FREE_KEYS = (
    "run", "save", "log", "baselines", "threads",
    "reward.workers", "reward.timeout", "reward.wall_timeout", "reward.error_rate", "reward.environment",
)  # fmt: skip


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
        raise ConfigError(f"unknown {kind} {name!r}{_nearest(name, names) or '.'} Known: {', '.join(names)}.")
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
        raise ConfigError(f"config file {str(path)!r} {'is a folder' if path.is_dir() else 'does not exist'}")
    try:
        return _yaml_mapping(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {str(path)!r} cannot be read as UTF-8 text: {error}") from error


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
    if item["type"] in ("model_type", "model_attributes_type"):
        known = ", ".join(f"{name}.{field}" for field in _fields_at(path)[:3])
        return f"setting {name!r} is a section: set what is in it ({known}, ...); found {item['input']!r}"
    return f"setting {name!r}: {item['msg'].lower()}; found {item['input']!r}"


def check(config: Config) -> None:
    """Numbers that must fit each other, before anything is loaded."""
    for phase in (stage.rules for stage in stages(config)):
        train, sample = phase.train, phase.sample
        if train.prompts % train.updates:
            raise ConfigError(
                f"train.prompts={train.prompts} does not divide into train.updates={train.updates} equal updates; "
                f"use a multiple of {train.updates}"
            )
        counted = [name for name in (phase.policy.norm, phase.likelihood.norm) if NORMS[name].micro]
        if counted:
            if train.micro_prompts is None:
                raise ConfigError(f"norm {counted[0]} needs train.micro_prompts (prompts of a micro-batch)")
            if (train.prompts // train.updates) % train.micro_prompts:
                raise ConfigError(
                    f"train.micro_prompts={train.micro_prompts} does not divide the "
                    f"{train.prompts // train.updates} prompts of an update"
                )
        loss = LOSSES[phase.policy.loss]
        compared = BASELINES[phase.credit.baseline].compares and loss.pushes and not loss.sequences
        if sample.completions == 1 and compared and not sample.demonstration:
            raise ConfigError(
                f"sample.completions=1 leaves baseline {phase.credit.baseline!r} nothing to compare with: every "
                "advantage would be 0. Use 2 or more, or credit.baseline=none"
            )
        silent = phase.likelihood.tokens == "none" or phase.likelihood.weight == 0
        pairs = sample.rejected is not None and loss.sequences
        if (sample.completions == 0 or not loss.pushes) and silent and not pairs:
            raise ConfigError(
                f"nothing to learn from: sample.completions={sample.completions}, policy.loss={phase.policy.loss} and no "
                "likelihood. Set likelihood.tokens and likelihood.weight, or sample completions"
            )
        _check_together(phase)
        if phase.show.low > phase.show.high:
            raise ConfigError(f"show.low={phase.show.low} is above show.high={phase.show.high}")
    for name in config.baselines:
        if name not in preset_names():
            raise ConfigError(f"baselines: unknown method {name!r}{_nearest(name, preset_names())}")
    if config.data.task and config.data.train:
        raise ConfigError("data.task (generated rows) and data.train (a file) are both set; keep one")
    if not (config.data.task or config.data.train):
        raise ConfigError("no rows: set data.train=FILE, or data.task to a built-in task, or use --recipe")


def _check_together(phase: Rules) -> None:
    """Settings of different sections that only make sense together."""
    sample, likelihood, g = phase.sample, phase.likelihood, phase.sample.completions
    schedule, loss, baseline = (
        SCHEDULES[phase.show.schedule],
        LOSSES[phase.policy.loss],
        BASELINES[phase.credit.baseline],
    )
    tokens, demonstrated = TOKENS[likelihood.tokens], sample.demonstration
    falling = ", ".join(name for name, word in SCHEDULES.items() if word.falls)
    wants = [
        (tokens.own and g == 0, f"likelihood.tokens={likelihood.tokens} needs sample.completions > 0"),
        (likelihood.gate is not None and g == 0, "likelihood.gate needs completions, whose success rate it compares"),
        (
            likelihood.gate is not None and not (tokens.hint and not tokens.own),
            f"likelihood.gate chooses groups whose hint or demo is supervised; found likelihood.tokens={likelihood.tokens}",
        ),
        (
            likelihood.buffer > 0 and (likelihood.gate is None or not tokens.demo),
            "likelihood.buffer holds gated rows: it needs likelihood.gate and likelihood.tokens=demo",
        ),
        (
            ANNEALINGS[likelihood.schedule].hint and not schedule.falls,
            f"likelihood.schedule={likelihood.schedule} follows a falling hint; found show.schedule={phase.show.schedule}. "
            f"Use one of {falling}",
        ),
        (
            phase.policy.weight == "complement" and likelihood.weight > 1,
            f"policy.weight=complement is 1 - likelihood.weight, which is negative at {likelihood.weight}",
        ),
        (
            phase.show.members is not None and not 0 < phase.show.members <= g,
            f"show.members={phase.show.members}, but a group has sample.completions={g}",
        ),
        (
            demonstrated and phase.policy.off_policy == "none" and not loss.sequences,
            "sample.demonstration=true puts the solution into the group: policy.off_policy must say how it pushes",
        ),
        (
            schedule.follows and g == 0,
            f"show.schedule={phase.show.schedule} follows the success of completions; sample.completions is 0",
        ),
        (
            phase.show.unit == "tokens" and schedule.counts,
            f"show.schedule={phase.show.schedule} counts cuts: use show.unit=cuts",
        ),
        (
            (phase.inputs.noise != "none" or phase.inputs.own > 0) and g > 0,
            "inputs.noise and inputs.own perturb supervised phases only; completions are sampled from clean inputs. "
            "Set sample.completions=0",
        ),
        (
            phase.inputs.noise != "none" and phase.inputs.own > 0,
            f"inputs.noise={phase.inputs.noise} and inputs.own={phase.inputs.own} both change the embeddings; keep one",
        ),
        (
            sample.refill > 0 and not (loss.pushes and baseline.scores),
            "sample.refill replaces groups whose scores are all equal; here the policy stream does not look at scores",
        ),
        (
            loss.sequences and not NORMS[phase.policy.norm].sequences,
            f"policy.loss={phase.policy.loss} counts sequences: use policy.norm=seq_mean_token_sum",
        ),
        (
            sample.rejected is not None and not (loss.sequences and demonstrated),
            "sample.rejected names what the solution is preferred to: it needs policy.loss=dpo or una and "
            "sample.demonstration=true",
        ),
        (
            loss.sequences and likelihood.tokens != "none",
            f"policy.loss={phase.policy.loss} has the solution as a member (sample.demonstration); set likelihood.tokens=none",
        ),
        (
            baseline.solution and not (demonstrated and SOURCES[sample.source].reference and g > 0),
            f"credit.baseline={phase.credit.baseline} sets the solution against completions of the reference: it needs "
            "sample.demonstration=true, sample.source=reference and completions",
        ),
        (
            baseline.solution and sample.temperature != 1,
            f"credit.baseline={phase.credit.baseline} divides by the reference's own probability of a completion: "
            "sample.temperature must be 1",
        ),
    ]
    for wrong, text in wants:
        if wrong:
            raise ConfigError(text)


@dataclass(frozen=True)
class Stage:
    """A stretch of a run with one method: its steps ``start`` to ``stop`` - 1, counted from 0 over the run."""

    start: int
    stop: int
    rules: Rules

    @property
    def total(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Moment:
    """A step of a run: what its random draws are addressed by. ``step`` counts from 0 over the run."""

    seed: int
    step: int
    stage: Stage

    @property
    def rules(self) -> Rules:
        return self.stage.rules

    @property
    def within(self) -> int:
        """Steps since the stage began, which its schedules count by."""
        return self.step - self.stage.start


def stages(config: Config) -> list[Stage]:
    """The run in its stages: one, unless there are phases."""
    if not config.phases:
        return [Stage(0, config.train.steps, config)]
    shares = sum(phase.share for phase in config.phases)
    if abs(shares - 1) > 1e-3:
        raise ConfigError(f"the shares of the phases add up to {shares:g}, expected 1")
    found: list[Stage] = []
    done, start = 0.0, 0
    for phase in config.phases:
        done += phase.share
        stop = round(config.train.steps * done / shares)
        if stop <= start:
            raise ConfigError(f"phase {phase.method!r} would have no step of train.steps={config.train.steps}")
        found.append(Stage(start, stop, phase))
        start = stop
    return found


def evaluation_tokens(config: Config) -> int:
    """Length limit of a completion in evaluations: eval.max_tokens, else the longest that a stage samples."""
    return config.eval.max_tokens or max(stage.rules.sample.max_tokens for stage in stages(config))


def longest(config: Config) -> int:
    """Tokens of the longest sequence that a run can forward: prompt with its whole solution as hint, then a completion."""
    completions = [stage.rules.sample.max_tokens for stage in stages(config)]
    return config.data.max_prompt + max([*completions, config.eval.max_tokens or 0])


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
