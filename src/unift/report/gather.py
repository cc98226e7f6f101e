"""Everything the page shows, read from a run folder. Missing and torn files are remarks, not errors: a run may be going on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from unift import config as configuration
from unift.config import Config, Phase
from unift.metrics import read_metrics
from unift.report import rollouts
from unift.types import ConfigError, UniftError

CONFIG = "config.yaml"


@dataclass(frozen=True)
class RunData:
    """A run as far as it went. ``config``: None if this version of unift does not accept the stored settings."""

    folder: Path
    settings: Mapping[str, Any]  # config.yaml as it stands
    config: Config | None
    metrics: Sequence[Mapping[str, Any]]  # one mapping a finished step; step 0 is the untouched base
    result: Mapping[str, Any] | None  # result.json; None: not finished
    environment: Mapping[str, Any]
    rollouts: Sequence[rollouts.Step]
    rollout_steps: int  # steps with stored rollouts, of which the above are a choice
    stopped: bool  # a loss or gradient was not finite
    remarks: Sequence[str]  # what could not be read

    @property
    def method(self) -> str:
        return str(self.settings.get("method", "unknown method"))

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def done(self) -> int:
        """Finished steps."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def total(self) -> int:
        return int(self.settings["train"]["steps"])

    @property
    def base(self) -> Mapping[str, Any] | None:
        """Accuracy of the untouched model: {"accuracy", "low", "high", "n"}; None without held-out rows."""
        first = self.metrics[0].get("base") if self.metrics else None
        return (self.result or {}).get("base") or first or None


def run_folders(source: Path) -> list[Path]:
    """The run folder itself, or the runs directly below it, in the order of compare.json, then by name."""
    if not source.is_dir():
        what = "is a file" if source.exists() else "does not exist"
        raise UniftError(f"{source} {what}; expected a run folder, or a folder of runs as `unift compare` leaves it")
    if (source / CONFIG).is_file():
        return [source]
    found = sorted((p.parent for p in source.glob(f"*/{CONFIG}")), key=lambda p: _natural(p.name))
    if not found:
        raise UniftError(
            f"{source} holds no run: found neither {CONFIG} nor folders with one. Expected the folder given to "
            "`unift train --run` or `unift compare --run`"
        )
    try:
        order = [f"{r['method']}-seed{r['seed']}" for r in json.loads((source / "compare.json").read_text())]
    except (OSError, ValueError, KeyError, TypeError):
        order = []
    return sorted(found, key=lambda p: order.index(p.name) if p.name in order else len(order))


def _natural(name: str) -> tuple[str, int]:
    """uft-seed2 before uft-seed10."""
    head = name.rstrip("0123456789")
    return head, int(name[len(head) :] or -1)


def read_run(folder: Path, steps: int = 8, groups: int = 3, samples: int = 4) -> RunData:
    """``steps``, ``groups``, ``samples``: at most so many rollouts (steps, groups of a step, different completions)."""
    remarks: list[str] = []
    settings = configuration.read_yaml(folder / CONFIG)
    try:
        int(settings["train"]["steps"])
    except (KeyError, TypeError, ValueError):
        raise UniftError(
            f"{folder / CONFIG} is not the settings of a run: train.steps is missing or no number. It is written by "
            "`unift train`; restore it, or name another folder"
        ) from None
    try:
        config = configuration.validate(settings)
        configuration.stages(config)
    except ConfigError as error:
        config = None
        remarks.append(f"This version of unift does not accept the stored settings ({error}); advantages are left out.")
    metrics = _metrics(folder / "metrics.jsonl", remarks)
    shown, available = rollouts.choose(folder, config, steps, groups, samples, remarks)
    return RunData(
        folder=folder,
        settings=settings,
        config=config,
        metrics=metrics,
        result=_json(folder / "result.json", remarks),
        environment=_json(folder / "environment.json", remarks) or {},
        rollouts=shown,
        rollout_steps=available,
        stopped=(folder / "nonfinite").is_dir() and any((folder / "nonfinite").iterdir()),
        remarks=remarks,
    )


def _json(path: Path, remarks: list[str]) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        remarks.append(f"{path.name} could not be read ({error}).")
        return None
    if not isinstance(value, dict):
        remarks.append(f"{path.name} was left out: found {type(value).__name__}, expected an object.")
        return None
    return value


def _metrics(path: Path, remarks: list[str]) -> list[dict[str, Any]]:
    try:
        records = read_metrics(path)
        written = sum(bool(line.strip()) for line in path.read_bytes().splitlines()) if path.is_file() else 0
    except (OSError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UniftError(
            f"{path} cannot be read ({error!r}): expected one JSON object with a step a line. "
            "Continuing the run (`unift train` with the same command) writes it anew from the last checkpoint"
        ) from error
    if not all(isinstance(r, dict) and isinstance(r.get("step"), int) for r in records):
        raise UniftError(f"{path} holds a line that is no metrics of a step: expected JSON objects with a whole step")
    if written > len(records):
        remarks.append(
            f"metrics.jsonl: {written - len(records)} of {written} lines left out, from the first that is torn. "
            "The last line of a run that was killed, or is being written, may be."
        )
    return records


# ---------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Setting:
    key: str
    value: str
    default: str
    origin: str  # "this run": in neither the preset nor the defaults; "preset": by the method; "default"


def settings_of(run: RunData) -> list[Setting]:
    """Every setting, those of this run first, then those of the method's preset, then what is left at its default."""
    defaults = Config().model_dump(mode="json")
    preset = _preset(run.method)
    phases, planned = run.settings.get("phases") or [], preset.get("phases") or []
    found = _compared({k: v for k, v in run.settings.items() if k != "phases"}, defaults, preset)
    for number, phase in enumerate(phases):
        plan = planned[number] if number < len(planned) else {}
        blank = Phase(method="", share=1).model_dump(mode="json")
        found += _compared(phase, blank, _preset(str(phase.get("method"))) | plan, f"phase {number + 1}: ")
    rank = ("this run", "preset", "default")
    return sorted(found, key=lambda s: rank.index(s.origin))


def _preset(method: str) -> dict[str, Any]:
    return yaml.safe_load(configuration.preset_text(method)) or {} if method in configuration.preset_names() else {}


def _compared(
    tree: Mapping[str, Any], defaults: Mapping[str, Any], preset: Mapping[str, Any], head: str = ""
) -> list[Setting]:
    known, planned, found = flat(defaults), flat(preset), []
    for key, value in flat(tree).items():
        default = known.get(key)
        if value == planned.get(key, default):
            origin = "default" if value == default else "preset"
        else:  # also where a recipe sets back to the default what the preset had changed
            origin = "this run"
        found.append(Setting(head + key, text_of(value), text_of(default), origin))
    return found


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"train": {"lr": 1}} -> {"train.lr": 1}. Lists stay values; an empty mapping is one too."""
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree} if prefix else {}
    merged: dict[str, Any] = {}
    for name, value in tree.items():
        merged |= flat(value, f"{prefix}.{name}" if prefix else str(name))
    return merged


def text_of(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if value is None or isinstance(value, (bool, list, dict)):
        return json.dumps(value, ensure_ascii=False)
    return str(value)
